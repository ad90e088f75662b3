//! Gated linear unit and the soft cap on logits.

use super::{
    FLOATS, Pass, Scratch, ShapeError, Weight, activations, check, check_apart, scratch::check_scratch,
    training,
};
use crate::backend::{DType, Precision, Queue, Tensor};

#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x · sigmoid(x)`
    Silu = 0,
    /// `0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))`, Gemma's.
    GeluTanh = 1,
    /// `0.5 · x · (1 + erf(x / √2))`
    GeluErf = 2,
}

#[derive(Clone, Copy, Debug)]
pub struct GluParams {
    pub tokens: u32,
    /// Width of the output.
    pub width: u32,
    pub pass: Pass,
    pub precision: Precision,
    pub activation: Activation,
}

/// `out = act(x · Wgᵀ + bg) · (x · Wuᵀ + bu)`: `x` `[tokens, cols]` and `out` `[tokens, width]` activations, `gate_up` two
/// parts of `width` rows each. `scratch`: see [`Scratch::LinearGlu`].
#[allow(clippy::too_many_arguments)]
pub fn linear_glu(
    queue: &Queue,
    pass: Pass,
    x: &Tensor,
    gate_up: &Weight,
    precision: Precision,
    activation: Activation,
    scratch: &Tensor,
    out: &Tensor,
) -> Result<(), ShapeError> {
    const OP: &str = "linear_glu";
    let (tokens, width, cols) = (out.rows(), out.row_len(), gate_up.cols());
    let activation_dtype = queue.backend().activation_dtype(precision);
    check(OP, "out", out, &[activation_dtype], &[tokens, width])?;
    check(OP, "x", x, &[activation_dtype], &[tokens, cols])?;
    if gate_up.parts.len() != 2 {
        return Err(ShapeError {
            op: OP,
            operand: "gate_up",
            found: format!("{} parts", gate_up.parts.len()),
            expected: "gate and up".into(),
        });
    }
    for (part, name) in gate_up.parts.iter().zip(["gate", "up"]) {
        check(OP, name, &part.matrix, &DType::ALL, &[width, cols])?;
        if let Some(bias) = &part.bias {
            check(OP, name, bias, FLOATS, &[width])?;
        }
    }
    check_scratch(OP, queue, scratch, Scratch::LinearGlu { tokens, width })?;
    check_apart(OP, out, &[("x", x), ("scratch", scratch)])?;
    check_apart(OP, scratch, &[("x", x)])?;
    let p = GluParams { tokens: tokens as u32, width: width as u32, pass, precision, activation };
    queue.backend().linear_glu(queue.id(), p, x, gate_up, scratch, out);
    Ok(())
}

/// `x = cap · tanh(x / cap)` in place, F32 of any shape.
pub fn soft_cap(queue: &Queue, cap: f32, x: &Tensor) -> Result<(), ShapeError> {
    check("soft_cap", "x", x, &[DType::F32], x.shape())?;
    queue.backend().soft_cap(queue.id(), cap, x);
    Ok(())
}

/// `out = act(gate) · up`, the second half of [`linear_glu`] where gate and up are kept for a backward pass: `gate_up` activations
/// `[tokens, 2 · width]`, gate first, `out` the same `[tokens, width]`.
pub fn glu(queue: &Queue, gate_up: &Tensor, activation: Activation, out: &Tensor) -> Result<(), ShapeError> {
    const OP: &str = "glu";
    let (tokens, width) = (out.rows(), out.row_len());
    check(OP, "out", out, activations(queue), &[tokens, width])?;
    check(OP, "gate_up", gate_up, &[out.dtype()], &[tokens, 2 * width])?;
    check_apart(OP, out, &[("gate_up", gate_up)])?;
    training(OP, queue)?.glu(queue.id(), activation, gate_up, out);
    Ok(())
}

/// Backward of [`glu`]: `dout` F32`[tokens, width]`, `dgate_up` F32`[tokens, 2 · width]`, assigned.
pub fn glu_backward(
    queue: &Queue,
    gate_up: &Tensor,
    activation: Activation,
    dout: &Tensor,
    dgate_up: &Tensor,
) -> Result<(), ShapeError> {
    const OP: &str = "glu_backward";
    let (tokens, width) = (dout.rows(), dout.row_len());
    check(OP, "dout", dout, &[DType::F32], &[tokens, width])?;
    check(OP, "gate_up", gate_up, activations(queue), &[tokens, 2 * width])?;
    check(OP, "dgate_up", dgate_up, &[DType::F32], &[tokens, 2 * width])?;
    check_apart(OP, dgate_up, &[("gate_up", gate_up), ("dout", dout)])?;
    training(OP, queue)?.glu_backward(queue.id(), activation, gate_up, dout, dgate_up);
    Ok(())
}
