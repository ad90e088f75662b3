//! The vocabulary: one file per op, with its parameters, its shape checks and the function everything above calls.
//!
//! Each function checks its operands, names op, operand and shapes if they don't fit, and issues the op on a
//! [`crate::backend::Queue`]. Outputs are allocated by the caller. `*Params` structs are plain `#[repr(C)]` scalars: on a GPU the
//! same struct is the kernel's argument.

mod attention;
mod embed;
mod fuse;
mod gather;
mod glu;
mod linear;
mod norm;
mod rope;

pub use attention::{AttentionOperands, AttentionParams, paged_attention};
pub use embed::{EmbedParams, embed};
pub(crate) use fuse::FUSE_CHUNK;
pub use fuse::{Ffn, FuseOperands, FuseParams, Projector, SourceStage, fuse, fuse_scratch_len};
pub use gather::{KvPages, copy_slots, gather_rows};
pub use glu::{Activation, GluParams, glu, soft_cap};
pub use linear::{LinearParams, Pass, Weight, WeightPart, linear};
pub use norm::{NormOutput, RmsNormParams, rms_norm};
pub use rope::{RopeOperands, RopeParams, rope_kv_write};

use crate::backend::{DType, Tensor};

/// An operand that does not fit its op.
#[derive(Debug, thiserror::Error)]
#[error("{op}: operand `{operand}` is {found}, expected {expected}")]
pub struct ShapeError {
    pub op: &'static str,
    pub operand: &'static str,
    pub found: String,
    pub expected: String,
}

fn check(
    op: &'static str,
    operand: &'static str,
    tensor: &Tensor,
    dtypes: &[DType],
    dims: &[usize],
) -> Result<(), ShapeError> {
    if dtypes.contains(&tensor.dtype()) && tensor.shape() == dims {
        return Ok(());
    }
    let types: Vec<String> = dtypes.iter().map(|d| d.to_string()).collect();
    Err(ShapeError {
        op,
        operand,
        found: format!("{tensor:?}"),
        expected: format!("{}{dims:?}", types.join("|")),
    })
}

/// Dtypes a KV-cache page may have.
pub(crate) const KV_DTYPES: &[DType] = &[DType::F32, DType::Bf16];
const FLOATS: &[DType] = &[DType::F32, DType::Bf16, DType::F16];
