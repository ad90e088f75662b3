//! From logits to tokens on the device: kernels/sample.cu.

use super::{Launch, launch::KernelArgs};
use crate::{backend::Tensor, ops::SampleOperands};

/// Logits of a chunk, which is ranked by itself.
const CHUNK: u32 = 2048;
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

/// U32 elements of scratch: of each row and chunk `k` keys, the best key, two sums (8 bytes each), and an id.
pub(super) fn scratch_len(rows: u32, vocab: u32, k: u32) -> usize {
    rows as usize * vocab.div_ceil(CHUNK) as usize * (2 * (k as usize + 3) + 1)
}

/// The launches, in order.
pub(super) fn sample(o: &SampleOperands) -> (Vec<Launch>, SampleArgs) {
    let (rows, vocab) = (o.logits.rows() as u32, o.logits.row_len() as u32);
    let ranked = o.ranked.as_ref();
    let k = ranked.map_or(0, |(ids, _)| ids.row_len() as u32);
    let chunks = vocab.div_ceil(CHUNK);
    let of_each = 8 * u64::from(rows) * u64::from(chunks);
    let best = o.scratch.address();
    let sums = best + of_each;
    let keys = sums + 2 * of_each;
    let args = SampleArgs {
        logits: o.logits.address(),
        params: o.rows.as_ref().map_or(0, Tensor::address),
        keys,
        best,
        nan: keys + u64::from(k) * of_each,
        sums: if o.sums { sums } else { 0 },
        out: o.out.address(),
        top_ids: ranked.map_or(0, |(ids, _)| ids.address()),
        top_values: ranked.map_or(0, |(_, values)| values.address()),
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
    use crate::ops::{SampleRow, SampledRow};

    #[test]
    fn sizes_are_those_of_the_kernel() {
        assert_eq!((size_of::<SampleRow>(), size_of::<SampledRow>(), size_of::<SampleArgs>()), (36, 24, 88));
    }

    #[test]
    fn a_large_vocabulary_is_many_blocks() {
        let launches = launches(2, 151_936, true);
        let grids: Vec<_> = launches.iter().map(|launch| launch.grid).collect();
        assert_eq!(grids, [(75, 2, 1), (75, 2, 1), (2, 1, 1)]);
        assert_eq!(scratch_len(2, 151_936, 20), 2 * 75 * 47);
    }
}
