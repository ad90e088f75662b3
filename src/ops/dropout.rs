//! Dropout of single elements. It is its own backward: the same elements of the gradient are dropped.

use super::{ShapeError, check, check_apart, training};
use crate::{
    backend::{DType, Queue, Tensor},
    rng::{Purpose, Rng, Stream},
};

/// Which elements.
#[derive(Clone, Copy, Debug)]
pub struct DropoutParams {
    /// Probability that an element is 0; the others are scaled by `1 / (1 − probability)`.
    pub probability: f32,
    /// Of the numbers: [`Rng`] of this seed, stream `part` and step; the index is the element's, which is dropped where its
    /// uniform number is below `probability`.
    pub seed: u64,
    pub part: u32,
    pub step: u32,
    /// Add to `out` instead of assigning.
    pub accumulate: bool,
}

impl DropoutParams {
    pub(crate) fn rng(&self) -> Rng {
        Rng::new(self.seed, Stream::new(Purpose::Dropout, self.part), self.step)
    }
}

/// `x` F32 of up to 2³² elements, `out` as `x`.
pub fn dropout(queue: &Queue, p: DropoutParams, x: &Tensor, out: &Tensor) -> Result<(), ShapeError> {
    const OP: &str = "dropout";
    check(OP, "x", x, &[DType::F32], x.shape())?;
    check(OP, "out", out, &[DType::F32], x.shape())?;
    check_apart(OP, out, &[("x", x)])?;
    if !(0.0..1.0).contains(&p.probability) || u32::try_from(x.elements()).is_err() {
        return Err(ShapeError {
            op: OP,
            operand: "x",
            found: format!("{x:?} with probability {}", p.probability),
            expected: "up to 2³² elements, a probability in 0..1".into(),
        });
    }
    training(OP, queue)?.dropout(queue.id(), p, x, out);
    Ok(())
}
