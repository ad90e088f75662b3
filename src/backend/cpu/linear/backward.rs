//! placeholder
use super::super::{Simd, team::Team};
use crate::ops::{LinearBackwardParams, Weight};
pub fn input(_: &mut Team, _: Simd, _: LinearBackwardParams, _: &[f32], _: &Weight, _: &mut [f32]) {
    todo!()
}
pub fn weight(_: &mut Team, _: Simd, _: LinearBackwardParams, _: &[f32], _: &[f32], _: &Weight) {
    todo!()
}
