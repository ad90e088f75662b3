//! RMSNorm: `y = x / √(mean(x²) + eps) · (offset + weight)`, assigned or added.

use super::{FLOATS, ShapeError, activations, check, check_apart, training};
use crate::backend::{DType, Queue, Tensor};

/// What becomes of the result.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormOutput {
    /// `out = norm(x)`
    Assign = 0,
    /// `out += norm(x)`: Gemma's post-norms feed the residual stream.
    Add = 1,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RmsNormParams {
    pub rows: u32,
    pub cols: u32,
    pub eps: f32,
    /// 1 where the file stores `weight − 1` (Gemma in Hugging Face folders), else 0.
    pub offset: f32,
    pub output: NormOutput,
}

/// `x` F32`[rows, cols]`, `out` the same (may be the same tensor with [`NormOutput::Assign`]) or, assigned, activations; `weight`
/// float `[cols]`.
pub fn rms_norm(
    queue: &Queue,
    x: &Tensor,
    weight: &Tensor,
    eps: f32,
    offset: f32,
    output: NormOutput,
    out: &Tensor,
) -> Result<(), ShapeError> {
    let (rows, cols) = (x.rows(), x.row_len());
    check("rms_norm", "x", x, &[DType::F32], &[rows, cols])?;
    check("rms_norm", "weight", weight, FLOATS, &[cols])?;
    let outputs = if output == NormOutput::Add { &[DType::F32] } else { activations(queue) };
    check("rms_norm", "out", out, outputs, &[rows, cols])?;
    let in_place =
        output == NormOutput::Assign && x.byte_offset() == out.byte_offset() && x.dtype() == out.dtype();
    let inputs = [("weight", weight), ("x", x)];
    check_apart("rms_norm", out, if in_place { &inputs[..1] } else { &inputs })?;
    let p = RmsNormParams { rows: rows as u32, cols: cols as u32, eps, offset, output };
    queue.backend().rms_norm(queue.id(), p, x, weight, out);
    Ok(())
}

/// Backward of [`rms_norm`] at `x`, F32`[rows, cols]`: `dy` as `x`; `dx` as `x`, assigned or added to (it may be `dy` itself where
/// assigned); `dweight`, F32`[cols]`, is added to.
#[allow(clippy::too_many_arguments)]
pub fn rms_norm_backward(
    queue: &Queue,
    x: &Tensor,
    weight: &Tensor,
    eps: f32,
    offset: f32,
    dy: &Tensor,
    output: NormOutput,
    dx: &Tensor,
    dweight: Option<&Tensor>,
) -> Result<(), ShapeError> {
    const OP: &str = "rms_norm_backward";
    let (rows, cols) = (x.rows(), x.row_len());
    for (name, tensor) in [("x", x), ("dy", dy), ("dx", dx)] {
        check(OP, name, tensor, &[DType::F32], &[rows, cols])?;
    }
    check(OP, "weight", weight, FLOATS, &[cols])?;
    let in_place = output == NormOutput::Assign && dx.byte_offset() == dy.byte_offset();
    let inputs = [("weight", weight), ("x", x), ("dy", dy)];
    check_apart(OP, dx, if in_place { &inputs[..2] } else { &inputs })?;
    if let Some(dweight) = dweight {
        check(OP, "dweight", dweight, &[DType::F32], &[cols])?;
        check_apart(OP, dweight, &[("weight", weight), ("x", x), ("dy", dy), ("dx", dx)])?;
    }
    let p = RmsNormParams { rows: rows as u32, cols: cols as u32, eps, offset, output };
    training(OP, queue)?.rms_norm_backward(queue.id(), p, x, weight, dy, dx, dweight);
    Ok(())
}
