//! placeholder
use super::{Simd, team::Team};
use crate::{backend::Tensor, ops::*};
pub fn adamw(
    _: &mut Team,
    _: Simd,
    _: AdamwParams,
    _weights: &Tensor,
    _grad: &Tensor,
    _m: &Tensor,
    _v: &Tensor,
) {
    todo!()
}
pub fn sum_of_squares(_: &mut Team, _: Simd, _x: &Tensor, _out: &Tensor) {
    todo!()
}
