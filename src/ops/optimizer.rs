//! AdamW on one long vector of parameters, the norm of its gradient, and setting it to 0.

use super::{ShapeError, check, check_apart, training};
use crate::backend::{DType, Queue, Tensor};

/// One update with decoupled weight decay (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AdamwParams {
    pub len: u32,
    pub learning_rate: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    pub weight_decay: f32,
    /// `1 − beta1ᵗ` and `1 − beta2ᵗ` at update t, counted from 1.
    pub correction1: f32,
    pub correction2: f32,
    /// Factor of the gradient: clipping.
    pub grad_scale: f32,
}

/// With `g = grad_scale · grad`: `m = β₁m + (1 − β₁)g`, `v = β₂v + (1 − β₂)g²`, `w −= lr · wd · w`,
/// `w −= lr · (m / correction1) / (√(v / correction2) + eps)`; then `grad = 0`, ready for the next sum. All F32`[len]`.
pub fn adamw(
    queue: &Queue,
    p: AdamwParams,
    weights: &Tensor,
    grad: &Tensor,
    m: &Tensor,
    v: &Tensor,
) -> Result<(), ShapeError> {
    const OP: &str = "adamw";
    let all = [("weights", weights), ("grad", grad), ("m", m), ("v", v)];
    for (i, (name, tensor)) in all.iter().enumerate() {
        check(OP, name, tensor, &[DType::F32], &[p.len as usize])?;
        check_apart(OP, tensor, &all[i + 1..])?;
    }
    training(OP, queue)?.adamw(queue.id(), p, weights, grad, m, v);
    Ok(())
}

/// `out[0] = Σ x²`, the same on every run: `x` F32`[len]`, `out` F32`[1]`.
pub fn sum_of_squares(queue: &Queue, x: &Tensor, out: &Tensor) -> Result<(), ShapeError> {
    const OP: &str = "sum_of_squares";
    check(OP, "x", x, &[DType::F32], &[x.elements()])?;
    check(OP, "out", out, &[DType::F32], &[1])?;
    check_apart(OP, out, &[("x", x)])?;
    training(OP, queue)?.sum_of_squares(queue.id(), x, out);
    Ok(())
}

/// `x = 0`, of any dtype and shape.
pub fn zero(queue: &Queue, x: &Tensor) -> Result<(), ShapeError> {
    training("zero", queue)?.zero(queue.id(), x);
    Ok(())
}
