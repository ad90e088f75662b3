//! placeholder
use super::super::{Simd, team::Team};
use crate::ops::*;
pub fn attention_backward(
    _: &mut Team,
    _: Simd,
    _: AttentionParams,
    _: &AttentionOperands,
    _: &AttentionGrads,
) {
    todo!()
}
