//! Token embedding: kernels/embed.cu, and its backward: kernels/embed_backward.cu.

use super::{Launch, launch::KernelArgs};
use crate::{
    backend::{DType, Tensor},
    ops::EmbedParams,
};

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct EmbedArgs {
    ids: u64,
    table: u64,
    out: u64,
    tokens: u32,
    hidden: u32,
    scale: f32,
}

// SAFETY: twin of `EmbedArgs` in kernels/embed.cu.
unsafe impl KernelArgs for EmbedArgs {}

pub(super) fn embed(p: EmbedParams, ids: &Tensor, table: &Tensor, out: &Tensor) -> (Launch, EmbedArgs) {
    let args = EmbedArgs {
        ids: ids.address(),
        table: table.address(),
        out: out.address(),
        tokens: p.tokens,
        hidden: p.hidden,
        scale: p.scale,
    };
    (launch(p, table.dtype()), args)
}

/// A block a token.
pub(super) fn launch(p: EmbedParams, table: DType) -> Launch {
    let kernel = match table {
        DType::F32 => "embed_f32",
        DType::F16 => "embed_f16",
        DType::Bf16 => "embed_bf16",
        DType::Q4_0 => "embed_q4_0",
        DType::Q4_1 => "embed_q4_1",
        DType::Q5_0 => "embed_q5_0",
        DType::Q5_1 => "embed_q5_1",
        DType::Q8_0 => "embed_q8_0",
        DType::Q2K => "embed_q2_k",
        DType::Q3K => "embed_q3_k",
        DType::Q4K => "embed_q4_k",
        DType::Q5K => "embed_q5_k",
        DType::Q6K => "embed_q6_k",
        DType::Iq4Nl => "embed_iq4_nl",
        DType::U32 => unreachable!("U32 is no table"),
    };
    Launch { kernel, grid: (p.tokens, 1, 1), block: 128, shared: 0 }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct EmbedBackwardArgs {
    ids: u64,
    dout: u64,
    dtable: u64,
    p: EmbedParams,
}

// SAFETY: twin of `EmbedBackwardArgs` in kernels/embed_backward.cu.
unsafe impl KernelArgs for EmbedBackwardArgs {}

/// A block a token and 1024 columns.
pub(super) fn embed_backward(
    p: EmbedParams,
    ids: &Tensor,
    dout: &Tensor,
    dtable: &Tensor,
) -> (Launch, EmbedBackwardArgs) {
    let args = EmbedBackwardArgs { ids: ids.address(), dout: dout.address(), dtable: dtable.address(), p };
    let grid = (p.tokens, p.hidden.div_ceil(1024), 1);
    (Launch { kernel: "embed_backward", grid, block: 256, shared: 0 }, args)
}
