//! Attention over pages: kernels/attention_prefill.cu and attention_decode.cu.

use super::{Launch, dtype_code, launch::KernelArgs};
use crate::{
    backend::DType,
    ops::{AttentionOperands, AttentionParams, Pass},
};

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct AttentionArgs {
    q: u64,
    keys: u64,
    values: u64,
    cu_q: u64,
    context: u64,
    block_tables: u64,
    out: u64,
    partials: u64,
    sequences: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    q_stride: u32,
    max_blocks: u32,
    block_size: u32,
    splits: u32,
    window: u32,
    scale: f32,
    soft_cap: f32,
    q_dtype: u32,
    kv_dtype: u32,
}

// SAFETY: twin of `AttentionArgs` in kernels/attention.cuh.
unsafe impl KernelArgs for AttentionArgs {}

/// One launch for a prompt; for decoding, the splits and then their combination.
///
/// # Panics
/// If the size of a head is odd or above 256, the block size no power of two, or the scale not positive.
pub(super) fn paged_attention(
    p: AttentionParams,
    o: &AttentionOperands,
    processors: u32,
) -> (Launch, Option<Launch>, AttentionArgs) {
    let args = args(p, o);
    let (first, second) = launches(p, args.splits, o.q.dtype(), o.pages.keys.dtype(), processors);
    (first, second, args)
}

/// # Panics
/// If the block size is no power of two, or the scale not positive.
pub(super) fn args(p: AttentionParams, o: &AttentionOperands) -> AttentionArgs {
    let block_size = o.pages.block_size() as u32;
    assert!(block_size.is_power_of_two(), "paged_attention: blocks of {block_size} slots");
    assert!(p.scale > 0.0, "paged_attention: a scale of {}", p.scale);
    AttentionArgs {
        q: o.q.address(),
        keys: o.pages.keys.address(),
        values: o.pages.values.address(),
        cu_q: o.cu_q.address(),
        context: o.context.address(),
        block_tables: o.block_tables.address(),
        out: o.out.address(),
        partials: if p.pass == Pass::Decode { o.scratch.address() } else { 0 },
        sequences: p.sequences,
        heads: p.heads,
        kv_heads: p.kv_heads,
        head_dim: p.head_dim,
        q_stride: p.q_stride,
        max_blocks: p.max_blocks,
        block_size,
        splits: most_splits(p.max_blocks * block_size, p.window),
        window: p.window,
        scale: p.scale,
        soft_cap: p.soft_cap,
        q_dtype: dtype_code(o.q.dtype()),
        kv_dtype: dtype_code(o.pages.keys.dtype()),
    }
}

/// F32 elements of the partial results: of each sequence, split and head `head_dim` sums, a maximum and a sum of
/// exponentials.
pub(super) fn scratch_len(sequences: usize, heads: usize, head_dim: usize, context: usize) -> usize {
    sequences * most_splits(context as u32, 0) as usize * heads * (head_dim + 2)
}

/// The most splits that a sequence of up to `context` keys has: twin of `Splits` in attention_decode.cu, where up to 32
/// splits of 128 to 1024 keys grow with the context, and more are added after that.
fn most_splits(context: u32, window: u32) -> u32 {
    // The first split begins at a multiple of 16.
    let keys = if window > 0 { context.min(window.saturating_add(15)) } else { context };
    keys.div_ceil(128).min(32).max(keys.div_ceil(1024))
}

/// The launches for operands of these types, on a card of so many multiprocessors.
pub(super) fn launches(
    p: AttentionParams,
    splits: u32,
    q: DType,
    pages: DType,
    processors: u32,
) -> (Launch, Option<Launch>) {
    assert!(p.head_dim <= 256 && p.head_dim.is_multiple_of(2), "paged_attention: heads of {}", p.head_dim);
    let kernels = Kernels::of(&p, q, pages, processors);
    let group = p.heads / p.kv_heads;
    if p.pass == Pass::Prefill {
        // Each sequence may have a tile that is not full: see `QueryTile`.
        let tiles = p.tokens * group / kernels.rows + p.sequences;
        let Kernels { prefill: kernel, prefill_shared: shared, .. } = kernels;
        return (Launch { kernel, grid: (tiles * p.kv_heads, 1, 1), block: 128, shared }, None);
    }
    let Kernels { decode: kernel, decode_warps, decode_shared: shared, .. } = kernels;
    let parts = group.div_ceil(kernels.heads);
    let grid = (splits, p.kv_heads * parts, p.sequences);
    (
        Launch { kernel, grid, block: 32 * decode_warps, shared },
        Some(Launch {
            kernel: "attention_combine",
            grid: (p.heads, p.sequences, 1),
            block: p.head_dim.next_multiple_of(32).min(128),
            shared: 0,
        }),
    )
}

struct Kernels {
    prefill: &'static str,
    /// Rows of a tile.
    rows: u32,
    prefill_shared: u32,
    decode: &'static str,
    decode_warps: u32,
    /// Of a group, in one block.
    heads: u32,
    decode_shared: u32,
}

impl Kernels {
    fn of(p: &AttentionParams, q: DType, pages: DType, processors: u32) -> Kernels {
        // Queries are copied 16 bytes at a time; pages lie so that they can be if this is so.
        let aligned = p.q_stride.is_multiple_of(8);
        if q != DType::Bf16 || pages != DType::Bf16 || !aligned {
            return Kernels::plain(p);
        }
        let (prefill, long, decode) = match p.head_dim {
            16 => ("attention_prefill_16_bf16", None, "attention_decode_16_bf16"),
            32 => ("attention_prefill_32_bf16", None, "attention_decode_32_bf16"),
            64 => (
                "attention_prefill_64_bf16",
                Some("attention_prefill_64_long_bf16"),
                "attention_decode_64_bf16",
            ),
            96 => (
                "attention_prefill_96_bf16",
                Some("attention_prefill_96_long_bf16"),
                "attention_decode_96_bf16",
            ),
            128 => (
                "attention_prefill_128_bf16",
                Some("attention_prefill_128_long_bf16"),
                "attention_decode_128_bf16",
            ),
            256 => ("attention_prefill_256_bf16", None, "attention_decode_256_bf16"),
            _ => return Kernels::plain(p),
        };
        // Tiles of 128 rows, where two a multiprocessor can be had. No bit of a result depends on it.
        let (prefill, rows) = match long {
            Some(long) if p.tokens * p.heads >= 2 * 128 * processors => (long, 128),
            _ => (prefill, 64),
        };
        // Twins of `Layout` and `Decode`: queries and two tiles of keys and values; queries and for each warp two
        // stages of 16 keys and values.
        let row = 2 * p.head_dim;
        let keys = if p.head_dim <= 64 { 64 } else { 32 };
        let decode_warps = if p.head_dim <= 128 { 4 } else { 2 };
        Kernels {
            prefill,
            rows,
            prefill_shared: (rows + 2 * 2 * keys) * row,
            decode,
            decode_warps,
            heads: 16,
            decode_shared: (1 + decode_warps * 2 * 2) * 16 * row,
        }
    }

    /// Without tensor cores.
    fn plain(p: &AttentionParams) -> Kernels {
        let (prefill, decode) = match p.head_dim {
            ..=128 => ("attention_prefill_plain_128", "attention_decode_plain_128"),
            _ => ("attention_prefill_plain_256", "attention_decode_plain_256"),
        };
        Kernels { prefill, rows: 32, prefill_shared: 0, decode, decode_warps: 4, heads: 8, decode_shared: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `Splits` in attention_decode.cu, written out again.
    fn splits(keys: u32) -> u32 {
        let mut length = 128;
        while length < 1024 && length * 32 < keys {
            length *= 2;
        }
        keys.div_ceil(length)
    }

    #[test]
    fn no_context_has_more_splits_than_the_grid() {
        let mut most = 0;
        for keys in 1..100_000 {
            most = most.max(splits(keys));
            assert_eq!(most_splits(keys, 0), most, "{keys} keys");
        }
        assert_eq!(most_splits(100_000, 512), 5, "527 keys from a multiple of 16 on");
    }
}
