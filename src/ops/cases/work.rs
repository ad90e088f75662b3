//! What a case must move and compute: the formulas of docs/KERNELS.md.

use super::{AttentionShape, Case, FuseCase, TrainingCase};
use crate::{
    backend::DType,
    ops::{NormOutput, Pass},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Every operand once.
    pub bytes: u64,
    /// Multiplications and additions.
    pub flops: u64,
    /// Whether arithmetic bounds it, not memory: products of many rows.
    pub multiplies: bool,
}

fn row_bytes(dtype: DType, cols: usize) -> usize {
    cols / dtype.block_len() * dtype.block_bytes()
}

impl Work {
    /// Where activations are stored in `activation`: pages are as precise.
    pub(super) fn of(case: &Case, activation: DType) -> Work {
        let a = activation.block_bytes();
        let (bytes, flops, multiplies) = match *case {
            Case::Embed { dtype, hidden, tokens, .. } => {
                (tokens * (row_bytes(dtype, hidden) + 4 * hidden), tokens * hidden, false)
            }
            Case::RmsNorm { rows, cols, output, .. } => {
                let out = if output == NormOutput::Add { 8 } else { a };
                (rows * cols * (4 + out), 4 * rows * cols, false)
            }
            Case::Linear { pass, ref parts, cols, tokens, accumulate, .. } => {
                let (weights, rows) = matrices(parts, cols);
                let out = if accumulate { 8 } else { a };
                let bytes = weights + tokens * (a * cols + out * rows);
                (bytes, 2 * tokens * rows * cols, pass == Pass::Prefill)
            }
            Case::LinearGlu { pass, dtype, width, cols, tokens, .. } => {
                let weights = 2 * width * row_bytes(dtype, cols);
                (weights + tokens * a * (cols + width), 4 * tokens * width * cols, pass == Pass::Prefill)
            }
            Case::Rope { heads, kv_heads, head_dim, tokens, .. } => {
                let (q, kv) = (heads * head_dim, 2 * kv_heads * head_dim);
                (tokens * (2 * a * (q + kv) + 4 * head_dim), 10 * tokens * (q + kv / 2), false)
            }
            Case::Attention { pass, heads, kv_heads, head_dim, ref sequences, window, .. } => {
                let (tokens, keys, pairs) = attention(sequences, window);
                let bytes = a * head_dim * (2 * tokens * heads + 2 * keys * kv_heads);
                (bytes, 4 * pairs * heads * head_dim, pass == Pass::Prefill)
            }
            Case::GatherRows { cols, taken, .. } => (8 * taken * cols, 0, false),
            Case::CopySlots { kv_heads, head_dim, tokens, .. } => {
                (4 * a * tokens * kv_heads * head_dim, 0, false)
            }
            Case::SoftCap { elements } => (8 * elements, 3 * elements, false),
            Case::Fuse(ref case) => {
                let (weights, columns) = fuser(case);
                let bytes = weights * case.weights.block_bytes() + columns * a;
                (bytes, 2 * case.tokens * weights, true)
            }
            Case::Training(ref case) => training(case, a),
        };
        Work { bytes: bytes as u64, flops: flops as u64, multiplies }
    }
}

/// Bytes and rows of stacked matrices.
fn matrices(parts: &[(DType, usize)], cols: usize) -> (usize, usize) {
    (
        parts.iter().map(|&(dtype, rows)| rows * row_bytes(dtype, cols)).sum(),
        parts.iter().map(|part| part.1).sum(),
    )
}

/// New tokens, keys, and pairs of a token and a key that it sees.
fn attention(sequences: &[(usize, usize)], window: usize) -> (usize, usize, usize) {
    let seen = |key: usize| if window > 0 { key.min(window) } else { key };
    let pairs = |&(new, context): &(usize, usize)| (context - new + 1..=context).map(seen).sum::<usize>();
    (
        sequences.iter().map(|s| s.0).sum(),
        sequences.iter().map(|s| s.1).sum(),
        sequences.iter().map(pairs).sum(),
    )
}

/// Elements of the matrices of all open halves, and of the columns they read and write.
fn fuser(case: &FuseCase) -> (usize, usize) {
    let [source, target] = [case.source, case.target].map(|(heads, dim)| heads * dim);
    let (hidden, inner) = (case.hidden, case.inner);
    let staged = if case.stage > 0 { target } else { source };
    let stage = case.stage * (source + 2 * inner + target);
    let input = hidden * (staged + if case.use_target { target } else { 0 });
    let scalar = if case.scalar { 2 * hidden * hidden + case.target.0 * hidden } else { 0 };
    let weights = stage + input + 2 * (1 + case.blocks) * hidden * inner + scalar + target * hidden;
    let halves = case.layers * case.gates.iter().filter(|&&gate| gate != 0.0).count();
    (halves * weights, halves * case.tokens * (source + 2 * target))
}

fn training(case: &TrainingCase, a: usize) -> (usize, usize, bool) {
    match *case {
        TrainingCase::RmsNorm { rows, cols, output, .. } => {
            let out = if output == NormOutput::Add { 8 } else { 4 };
            (rows * cols * (8 + out), 12 * rows * cols, false)
        }
        TrainingCase::Glu { tokens, width, .. } => (3 * a * tokens * width, 10 * tokens * width, false),
        TrainingCase::GluBackward { tokens, width, .. } => {
            ((2 * a + 12) * tokens * width, 20 * tokens * width, false)
        }
        TrainingCase::Embed { vocab, hidden, tokens } => {
            (4 * hidden * (tokens + 2 * tokens.min(vocab)), 2 * tokens * hidden, false)
        }
        TrainingCase::Rope { heads, kv_heads, head_dim, tokens, norm, .. } => {
            let (all, normed) = ((heads + 2 * kv_heads) * head_dim, (heads + kv_heads) * head_dim);
            let read = if norm.is_some() { a * normed } else { 0 };
            (tokens * (8 * all + read + 4 * head_dim), 20 * tokens * normed, false)
        }
        TrainingCase::Attention(AttentionShape {
            heads, kv_heads, head_dim, ref sequences, window, ..
        }) => {
            let (tokens, keys, pairs) = attention(sequences, window);
            let bytes = head_dim * (tokens * heads * (a + 8) + 2 * keys * kv_heads * (a + 8));
            (bytes, 18 * pairs * heads * head_dim, true)
        }
        TrainingCase::Linear { ref parts, cols, tokens } => {
            let (weights, rows) = matrices(parts, cols);
            let bytes = weights + 8 * rows * cols + tokens * ((a + 4) * cols + 8 * rows);
            (bytes, 4 * tokens * rows * cols, true)
        }
        TrainingCase::Fuse(ref case) => {
            let (weights, columns) = fuser(case);
            (
                weights * (2 * case.weights.block_bytes() + 8) + columns * (a + 4),
                6 * case.tokens * weights,
                true,
            )
        }
        TrainingCase::CrossEntropy { rows, vocab, .. } => (8 * rows * vocab, 10 * rows * vocab, false),
        TrainingCase::Adamw { len } => (32 * len, 15 * len, false),
        TrainingCase::SumOfSquares { len } => (4 * len, 2 * len, false),
        TrainingCase::Dropout { rows, cols, accumulate } => {
            ((if accumulate { 12 } else { 8 }) * rows * cols, 25 * rows * cols, false)
        }
    }
}
