//! Linear map: `out = x · Wᵀ + bias`, or added to `out`; backward to its input and to its weights.

use super::{FLOATS, ShapeError, activations, check, check_apart, training};
use crate::backend::{DType, Precision, Queue, Tensor};

/// A weight matrix `[rows, cols]`, possibly stacked from parts of different dtypes (q, k, v of one layer; gate and
/// up), so that one op, and on the CPU one quantisation of the input, serves them all.
#[derive(Clone, Debug)]
pub struct Weight {
    /// From the first output column to the last.
    pub parts: Vec<WeightPart>,
}

#[derive(Clone, Debug)]
pub struct WeightPart {
    /// Any dtype but U32, `[rows, cols]`, row-major: one row an output column.
    pub matrix: Tensor,
    /// Float `[rows]`.
    pub bias: Option<Tensor>,
}

impl Weight {
    pub fn new(matrix: Tensor) -> Weight {
        Weight { parts: vec![WeightPart { matrix, bias: None }] }
    }

    pub fn with_bias(matrix: Tensor, bias: Tensor) -> Weight {
        Weight { parts: vec![WeightPart { matrix, bias: Some(bias) }] }
    }

    /// Width of the output.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.matrix.rows()).sum()
    }

    /// Width of the input.
    pub fn cols(&self) -> usize {
        self.parts.first().map_or(0, |part| part.matrix.row_len())
    }

    /// Bytes of the matrices, as they lie in memory.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.matrix.bytes()).sum()
    }
}

/// What the tokens of a linear map are. It decides how they are multiplied and so in which order products are added:
/// a token's bits do not depend on how many tokens share the op.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Many tokens of each sequence: bound by arithmetic.
    Prefill,
    /// One token of each sequence: bound by reading the weights.
    Decode,
}

#[derive(Clone, Copy, Debug)]
pub struct LinearParams {
    pub tokens: u32,
    pub pass: Pass,
    pub precision: Precision,
    /// Add to `out` (a residual stream) instead of assigning.
    pub accumulate: bool,
}

/// `x` activations of this precision, `[tokens, cols]`; `out` the same or (always where accumulated) F32, `[tokens, rows]`, not
/// overlapping `x`.
pub fn linear(
    queue: &Queue,
    pass: Pass,
    x: &Tensor,
    weight: &Weight,
    precision: Precision,
    accumulate: bool,
    out: &Tensor,
) -> Result<(), ShapeError> {
    let tokens = x.rows();
    let activation = queue.backend().activation_dtype(precision);
    check("linear", "x", x, &[activation], &[tokens, weight.cols()])?;
    for part in &weight.parts {
        let rows = part.matrix.rows();
        check("linear", "weight", &part.matrix, &DType::ALL, &[rows, weight.cols()])?;
        if let Some(bias) = &part.bias {
            check("linear", "bias", bias, FLOATS, &[rows])?;
        }
    }
    let outputs = if accumulate { &[DType::F32][..] } else { &[DType::F32, activation] };
    check("linear", "out", out, outputs, &[tokens, weight.rows()])?;
    check_apart("linear", out, &[("x", x)])?;
    let p = LinearParams { tokens: tokens as u32, pass, precision, accumulate };
    queue.backend().linear(queue.id(), p, x, weight, out);
    Ok(())
}

#[derive(Clone, Copy, Debug)]
pub struct LinearBackwardParams {
    pub tokens: u32,
    pub precision: Precision,
    /// Add to what the output holds instead of assigning.
    pub accumulate: bool,
}

/// `dx = dy · W`, or added to `dx`: `dy` F32`[tokens, rows]`, `dx` F32`[tokens, cols]`.
pub fn linear_backward_input(
    queue: &Queue,
    dy: &Tensor,
    weight: &Weight,
    precision: Precision,
    accumulate: bool,
    dx: &Tensor,
) -> Result<(), ShapeError> {
    const OP: &str = "linear_backward_input";
    let tokens = dy.rows();
    check(OP, "dy", dy, &[DType::F32], &[tokens, weight.rows()])?;
    for part in &weight.parts {
        check(OP, "weight", &part.matrix, &DType::ALL, &[part.matrix.rows(), weight.cols()])?;
    }
    check(OP, "dx", dx, &[DType::F32], &[tokens, weight.cols()])?;
    check_apart(OP, dx, &[("dy", dy)])?;
    let p = LinearBackwardParams { tokens: tokens as u32, precision, accumulate };
    training(OP, queue)?.linear_backward_input(queue.id(), p, dy, weight, dx);
    Ok(())
}

/// `dW += dyᵀ · x` and, where the part has one, `db += Σ dy` over the tokens: `dy` F32`[tokens, rows]`, `x` activations
/// `[tokens, cols]`, `grad` of the weight's parts, all F32.
pub fn linear_backward_weight(
    queue: &Queue,
    dy: &Tensor,
    x: &Tensor,
    precision: Precision,
    grad: &Weight,
) -> Result<(), ShapeError> {
    const OP: &str = "linear_backward_weight";
    let tokens = dy.rows();
    check(OP, "dy", dy, &[DType::F32], &[tokens, grad.rows()])?;
    check(OP, "x", x, activations(queue), &[tokens, grad.cols()])?;
    for part in &grad.parts {
        let rows = part.matrix.rows();
        check(OP, "grad", &part.matrix, &[DType::F32], &[rows, grad.cols()])?;
        check_apart(OP, &part.matrix, &[("dy", dy), ("x", x)])?;
        if let Some(bias) = &part.bias {
            check(OP, "grad bias", bias, &[DType::F32], &[rows])?;
            check_apart(OP, bias, &[("dy", dy), ("x", x)])?;
        }
    }
    let p = LinearBackwardParams { tokens: tokens as u32, precision, accumulate: true };
    training(OP, queue)?.linear_backward_weight(queue.id(), p, dy, x, grad);
    Ok(())
}
