//! The fuser.

use super::{Simd, team::Team};
use crate::ops::{FuseOperands, FuseParams};

pub(super) fn fuse(_team: &mut Team, _simd: Simd, _p: FuseParams, _o: &FuseOperands) {
    todo!()
}
