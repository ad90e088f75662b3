//! Gated linear unit and the soft cap on logits.

use super::{ShapeError, check, check_apart};
use crate::backend::{DType, Queue, Tensor};

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

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GluParams {
    pub rows: u32,
    /// Width of the output; the input is twice as wide.
    pub cols: u32,
    pub activation: Activation,
}

/// `x` F32`[tokens, 2 · ffn]` with the gate in the left half, the up projection in the right;
/// `out` F32`[tokens, ffn]` `= act(gate) · up`.
pub fn glu(queue: &Queue, x: &Tensor, activation: Activation, out: &Tensor) -> Result<(), ShapeError> {
    let (rows, cols) = (out.rows(), out.row_len());
    check("glu", "out", out, &[DType::F32], &[rows, cols])?;
    check("glu", "x", x, &[DType::F32], &[rows, 2 * cols])?;
    check_apart("glu", out, &[("x", x)])?;
    queue.backend().glu(queue.id(), GluParams { rows: rows as u32, cols: cols as u32, activation }, x, out);
    Ok(())
}

/// `x = cap · tanh(x / cap)` in place, F32 of any shape.
pub fn soft_cap(queue: &Queue, cap: f32, x: &Tensor) -> Result<(), ShapeError> {
    check("soft_cap", "x", x, &[DType::F32], x.shape())?;
    queue.backend().soft_cap(queue.id(), cap, x);
    Ok(())
}
