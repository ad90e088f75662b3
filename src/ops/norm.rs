//! RMSNorm: `y = x / √(mean(x²) + eps) · (offset + weight)`, assigned or added.

use super::{FLOATS, ShapeError, check, check_apart};
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

/// `x`, `out` F32`[rows, cols]` (may be the same tensor with [`NormOutput::Assign`]), `weight` float `[cols]`.
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
    check("rms_norm", "out", out, &[DType::F32], &[rows, cols])?;
    let in_place = output == NormOutput::Assign && x.byte_offset() == out.byte_offset();
    let inputs = [("weight", weight), ("x", x)];
    check_apart("rms_norm", out, if in_place { &inputs[..1] } else { &inputs })?;
    let p = RmsNormParams { rows: rows as u32, cols: cols as u32, eps, offset, output };
    queue.backend().rms_norm(queue.id(), p, x, weight, out);
    Ok(())
}
