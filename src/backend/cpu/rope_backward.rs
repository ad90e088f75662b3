//! placeholder
use super::{Simd, team::Team};
use crate::ops::*;
pub fn rope_backward(_: &mut Team, _: Simd, _: RopeParams, _: &RopeBackwardOperands) {
    todo!()
}
