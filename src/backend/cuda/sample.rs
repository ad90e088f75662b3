//! From logits to tokens on the device: kernels/sample.cu.

use super::{Launch, launch::KernelArgs};
use crate::backend::Tensor;

/// Logits of a chunk, which is ranked by itself.
const CHUNK: u32 = 2048;
/// The most tokens that can be ranked.
pub(super) const MAX_K: u32 = 256;

/// How one row is drawn from. Twin of `SampleRow` in kernels/sample.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct SampleRow {
    /// Low and high half.
    pub seed: [u32; 2],
    pub choice: u32,
    /// The token of the answer.
    pub step: u32,
    /// Below 1e-5: the most probable token.
    pub temperature: f32,
    /// 0 = off.
    pub top_k: u32,
    /// 1 = off.
    pub top_p: f32,
    /// 0 = off.
    pub min_p: f32,
    /// 1: `Rules::Published`, by which top-p drops the token that crosses p.
    pub published: u32,
}

/// [`Sampled::status`]: `token` was drawn.
pub(super) const DRAWN: u32 = 0;
/// `token` is the first that is not a number.
pub(super) const NOT_A_NUMBER: u32 = 1;
/// A logit is infinite.
pub(super) const INFINITE: u32 = 2;
/// All logits are −∞.
pub(super) const NOTHING_POSSIBLE: u32 = 3;
/// The draw reaches past the ranked tokens: the row's logits are wanted on the host.
pub(super) const NEEDS_HOST: u32 = 4;

/// What became of one row. Twin of `Sampled` in kernels/sample.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Sampled {
    /// Σ exp(x − max): the row's log-sum-exp is `max + ln(sum)`. 0 where it was not asked for.
    pub sum: f64,
    pub max: f32,
    pub token: u32,
    pub status: u32,
    /// The most probable token, of equals the first.
    pub best: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct SampleArgs {
    logits: u64,
    params: u64,
    keys: u64,
    best: u64,
    nan: u64,
    sums: u64,
    out: u64,
    top_ids: u64,
    top_values: u64,
    vocab: u32,
    chunks: u32,
    k: u32,
}

// SAFETY: twin of `SampleArgs` in kernels/sample.cu.
unsafe impl KernelArgs for SampleArgs {}

pub(super) struct SampleOperands<'a> {
    /// F32`[rows, vocab]`
    pub logits: &'a Tensor,
    /// [`SampleRow`]s as U32`[rows, 9]`; none: the most probable tokens.
    pub params: Option<&'a Tensor>,
    /// The `k` most probable tokens, most probable first, −∞ past the last possible: U32 and F32 `[rows, k]`, k ≤
    /// [`MAX_K`].
    pub top: Option<(&'a Tensor, &'a Tensor)>,
    /// Whether sums over the vocabulary are wanted: for log-probabilities, and to draw without top-k.
    pub sums: bool,
    /// U32`[scratch_len]`
    pub scratch: &'a Tensor,
    /// [`Sampled`]s as U32`[rows, 6]`
    pub out: &'a Tensor,
}

/// U32 elements of scratch: of each row and chunk `k` keys, the best key, two sums (8 bytes each), and an id.
pub(super) fn scratch_len(rows: u32, vocab: u32, k: u32) -> usize {
    rows as usize * vocab.div_ceil(CHUNK) as usize * (2 * (k as usize + 3) + 1)
}

/// The launches, in order.
///
/// # Panics
/// If more than [`MAX_K`] tokens are to be ranked, or the scratch is smaller than [`scratch_len`].
pub(super) fn sample(o: &SampleOperands) -> (Vec<Launch>, SampleArgs) {
    let (rows, vocab) = (o.logits.rows() as u32, o.logits.row_len() as u32);
    let k = o.top.map_or(0, |(ids, _)| ids.row_len() as u32);
    assert!(k <= MAX_K, "sample: {k} tokens to be ranked");
    assert!(o.scratch.elements() >= scratch_len(rows, vocab, k), "sample: scratch {:?}", o.scratch);
    let chunks = vocab.div_ceil(CHUNK);
    let of_each = 8 * u64::from(rows) * u64::from(chunks);
    let best = o.scratch.address();
    let sums = best + of_each;
    let keys = sums + 2 * of_each;
    let args = SampleArgs {
        logits: o.logits.address(),
        params: o.params.map_or(0, Tensor::address),
        keys,
        best,
        nan: keys + u64::from(k) * of_each,
        sums: if o.sums { sums } else { 0 },
        out: o.out.address(),
        top_ids: o.top.map_or(0, |(ids, _)| ids.address()),
        top_values: o.top.map_or(0, |(_, values)| values.address()),
        vocab,
        chunks,
        k,
    };
    (launches(rows, vocab, o.sums), args)
}

/// A block a chunk for the ranking and, if wanted, the sums; then a block a row.
pub(super) fn launches(rows: u32, vocab: u32, sums: bool) -> Vec<Launch> {
    let by_chunk = |kernel| Launch { kernel, grid: (vocab.div_ceil(CHUNK), rows, 1), block: 256, shared: 0 };
    let draw = Launch { kernel: "sample_draw", grid: (rows, 1, 1), block: 256, shared: 0 };
    let mut all = vec![by_chunk("sample_chunks")];
    all.extend(sums.then(|| by_chunk("sample_sums")));
    all.push(draw);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_kernel() {
        assert_eq!((size_of::<SampleRow>(), size_of::<Sampled>(), size_of::<SampleArgs>()), (36, 24, 88));
    }

    #[test]
    fn a_large_vocabulary_is_many_blocks() {
        let launches = launches(2, 151_936, true);
        let grids: Vec<_> = launches.iter().map(|launch| launch.grid).collect();
        assert_eq!(grids, [(75, 2, 1), (75, 2, 1), (2, 1, 1)]);
        assert_eq!(scratch_len(2, 151_936, 20), 2 * 75 * 47);
    }
}
