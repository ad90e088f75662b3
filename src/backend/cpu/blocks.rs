//! Portable reading of every weight format.

use crate::backend::{DType, Tensor};
use half::{bf16, f16};

/// Row `row` of a matrix of any dtype as f32.
pub(super) fn row_to_f32(matrix: &Tensor, row: usize, out: &mut [f32]) {
    let len = out.len();
    match matrix.dtype() {
        DType::F32 => out.copy_from_slice(&matrix.host::<f32>()[row * len..][..len]),
        DType::Bf16 => {
            out.iter_mut().zip(&matrix.host::<bf16>()[row * len..][..len]).for_each(|(y, x)| *y = x.to_f32())
        }
        DType::F16 => {
            out.iter_mut().zip(&matrix.host::<f16>()[row * len..][..len]).for_each(|(y, x)| *y = x.to_f32())
        }
        other => todo!("{other}"),
    }
}
