//! Every width against f64, over odd sizes, with outliers, and pages whose unused slots are NaN.

use super::{Kernels, Simd, Team, portable, run};
use crate::{
    backend::{DType, Tensor, cpu::Cpu},
    ops::{AttentionOperands, AttentionParams, KvPages, Pass},
};
use half::bf16;

/// A reproducible stream of numbers.
pub(super) struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// About normal, one in a hundred ten times as large.
    pub(super) fn number(&mut self) -> f32 {
        let sum: f32 = (0..4).map(|_| self.next() as u32 as f32 / u32::MAX as f32 - 0.5).sum();
        if self.below(100) == 0 { 17.0 * sum } else { 1.7 * sum }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub block_size: usize,
    pub window: u32,
    pub soft_cap: f32,
    pub dtype: DType,
}

pub(super) const PLAIN: Shape =
    Shape { heads: 2, kv_heads: 1, dim: 16, block_size: 16, window: 0, soft_cap: 0.0, dtype: DType::F32 };

/// New tokens and keys (the new ones included) of each sequence.
pub(super) type Sequences<'a> = &'a [(usize, usize)];

pub(super) struct Case {
    pub p: AttentionParams,
    pub o: AttentionOperands,
}

pub(super) fn tensor<T: super::Element>(data: &[T], dims: &[usize]) -> Tensor {
    let tensor = Cpu::allocate(T::DTYPE, dims, "test").unwrap();
    tensor.host_mut::<T>().copy_from_slice(data);
    tensor
}

/// Sequence s holds the same numbers whatever sequences stand beside it if `seeds[s]` is the same.
pub(super) fn case(shape: Shape, sequences: Sequences, seeds: &[u64]) -> Case {
    let Shape { heads, kv_heads, dim, block_size, .. } = shape;
    let tokens: usize = sequences.iter().map(|s| s.0).sum();
    let max_blocks = sequences.iter().map(|s| s.1.div_ceil(block_size)).max().unwrap() + 1;
    let blocks = sequences.len() * max_blocks + 3;
    let q_stride = (heads + 2 * kv_heads) * dim;

    // Blocks in a shuffled order, as a pool gives them out after a while.
    let mut shuffle = Random(seeds.iter().sum());
    let mut order: Vec<u32> = (0..blocks as u32).collect();
    (1..blocks).rev().for_each(|i| order.swap(i, shuffle.below(i + 1)));

    let page_len = blocks * kv_heads * block_size * dim;
    let (mut keys, mut values) = (vec![f32::NAN; page_len], vec![f32::NAN; page_len]);
    // What lies beside q in its rows is not attention's business.
    let mut q = vec![f32::NAN; tokens * q_stride];
    let (mut cu_q, mut row) = (vec![0], 0);
    for (s, (&(new, context), &seed)) in sequences.iter().zip(seeds).enumerate() {
        let mut random = Random(seed);
        for _ in 0..new {
            q[row * q_stride..][..heads * dim].fill_with(|| random.number());
            row += 1;
        }
        cu_q.push(row as u32);
        for i in 0..context {
            for head in 0..kv_heads {
                let block = order[s * max_blocks + i / block_size] as usize;
                let offset = ((block * kv_heads + head) * block_size + i % block_size) * dim;
                keys[offset..offset + dim].fill_with(|| random.number());
                values[offset..offset + dim].fill_with(|| random.number());
            }
        }
    }
    let pages = |data: &[f32]| {
        let dims = [blocks, kv_heads, block_size, dim];
        match shape.dtype {
            DType::F32 => tensor(data, &dims),
            _ => tensor(&data.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>(), &dims),
        }
    };
    let context: Vec<u32> = sequences.iter().map(|s| s.1 as u32).collect();
    Case {
        p: AttentionParams {
            pass: if tokens == sequences.len() { Pass::Decode } else { Pass::Prefill },
            tokens: tokens as u32,
            sequences: sequences.len() as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: dim as u32,
            q_stride: q_stride as u32,
            max_blocks: max_blocks as u32,
            scale: 1.0 / (dim as f32).sqrt(),
            soft_cap: shape.soft_cap,
            window: shape.window,
        },
        o: AttentionOperands {
            q: tensor(&q, &[tokens, q_stride]),
            pages: KvPages { keys: pages(&keys), values: pages(&values) },
            cu_q: tensor(&cu_q, &[cu_q.len()]),
            context: tensor(&context, &[sequences.len()]),
            block_tables: tensor(&order[..sequences.len() * max_blocks], &[sequences.len(), max_blocks]),
            out: tensor(&vec![f32::NAN; tokens * heads * dim], &[tokens, heads * dim]),
            scratch: tensor::<f32>(&[], &[0]),
        },
    }
}

impl Case {
    /// q, keys and values.
    pub(super) fn inputs(&self) -> [Vec<f64>; 3] {
        [&self.o.q, &self.o.pages.keys, &self.o.pages.values].map(|t| match t.dtype() {
            DType::F32 => t.host::<f32>().iter().map(|&x| x.into()).collect(),
            _ => t.host::<bf16>().iter().map(|x| x.to_f64()).collect(),
        })
    }

    fn exact(&self) -> Vec<f64> {
        self.exact_of(&self.inputs())
    }

    /// The definition, in f64.
    pub(super) fn exact_of(&self, [q, keys, values]: &[Vec<f64>; 3]) -> Vec<f64> {
        let (p, o) = (self.p, &self.o);
        let (heads, dim, size) = (p.heads as usize, p.head_dim as usize, o.pages.block_size());
        let mut out = Vec::new();
        for s in 0..p.sequences as usize {
            let rows = o.cu_q.host::<u32>()[s] as usize..o.cu_q.host::<u32>()[s + 1] as usize;
            let earlier = o.context.host::<u32>()[s] as usize - rows.len();
            let table = &o.block_tables.host::<u32>()[s * p.max_blocks as usize..];
            for (i, row) in rows.enumerate() {
                for h in 0..heads {
                    let at = earlier + i;
                    let first = match p.window as usize {
                        0 => 0,
                        window => (at + 1).saturating_sub(window),
                    };
                    let offset = |key: usize| {
                        let block = table[key / size] as usize * p.kv_heads as usize;
                        ((block + h / (heads / p.kv_heads as usize)) * size + key % size) * dim
                    };
                    let q = &q[row * p.q_stride as usize + h * dim..][..dim];
                    let scores: Vec<f64> = (first..=at)
                        .map(|key| {
                            let dot: f64 = q.iter().zip(&keys[offset(key)..]).map(|(a, b)| a * b).sum();
                            let (s, cap) = (dot * f64::from(p.scale), f64::from(p.soft_cap));
                            if cap > 0.0 { cap * (s / cap).tanh() } else { s }
                        })
                        .collect();
                    let max = scores.iter().copied().fold(f64::MIN, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    let weighted = |d: usize| {
                        let terms = (first..=at).zip(&weights).map(|(key, w)| w * values[offset(key) + d]);
                        terms.sum::<f64>() / total
                    };
                    out.extend((0..dim).map(weighted));
                }
            }
        }
        out
    }

    /// The op's result, `None` for the portable reference.
    fn result(&self, threads: usize, kernels: Option<Kernels>) -> Vec<f32> {
        let mut team = Team::new(threads);
        self.o.out.host_mut::<f32>().fill(f32::NAN);
        match kernels {
            Some(kernels) => run(&mut team, kernels, self.p, &self.o),
            None => portable::paged_attention(&mut team, self.p, &self.o),
        }
        self.o.out.host::<f32>().to_vec()
    }
}

/// All widths that this machine can run.
fn widths() -> Vec<(Simd, Kernels)> {
    let levels = Simd::testable().into_iter();
    levels.filter_map(|simd| Some((simd, Kernels::of(simd)?))).collect()
}

fn errors(found: &[f32], exact: &[f64]) -> (f64, f64) {
    let differences = || found.iter().zip(exact).map(|(&a, &b)| (f64::from(a) - b).abs());
    let largest = differences().fold(0.0, |a: f64, b| if b.is_nan() { f64::INFINITY } else { a.max(b) });
    (largest, (differences().map(|d| d * d).sum::<f64>() / exact.len() as f64).sqrt())
}

/// At most twice the error of the plain f32 reference, in the largest element and in the mean square.
fn check(shape: Shape, sequences: Sequences) {
    let seeds: Vec<u64> = (0..sequences.len() as u64).map(|s| s + 7).collect();
    let case = case(shape, sequences, &seeds);
    let exact = case.exact();
    let size = exact.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
    let (largest, mean) = errors(&case.result(2, None), &exact);
    for (name, kernels) in widths() {
        let found = errors(&case.result(2, Some(kernels)), &exact);
        let rounding = f64::from(f32::EPSILON) * size;
        assert!(
            found.0 <= 2.0 * largest + 2.0 * rounding && found.1 <= 2.0 * mean + 0.25 * rounding,
            "{name}, {shape:?}, {sequences:?}: largest error {:e}, mean {:e}; the reference's {largest:e}, {mean:e}; results up to {size}",
            found.0,
            found.1,
        );
    }
}

const BOTH: [DType; 2] = [DType::F32, DType::Bf16];

#[test]
fn head_dims_and_ratios() {
    for (heads, kv_heads) in [(1, 1), (2, 1), (9, 3), (4, 1), (14, 2), (9, 1)] {
        for dim in [12, 16, 24, 32, 64, 80, 96, 128, 256] {
            let dtype = BOTH[(heads + dim / 4) % 2];
            let shape = Shape { heads, kv_heads, dim, dtype, ..PLAIN };
            check(shape, &[(54, 54), (1, 97), (7, 7), (1, 1), (2, 30)]);
        }
    }
}

#[test]
fn lengths_and_block_sizes() {
    for block_size in [1, 4, 16, 32, 128] {
        for new in [1, 7, 54, 97, 260] {
            for earlier in [0, 1, 15, 16, 130, 700] {
                let dtype = BOTH[(new + earlier) % 2];
                let shape = Shape { heads: 3, block_size, dtype, ..PLAIN };
                check(shape, &[(new, new + earlier)]);
            }
        }
    }
}

#[test]
fn windows_and_soft_caps() {
    for window in [1, 7, 64, 97, 200] {
        for soft_cap in [0.0, 5.0, 50.0] {
            for dtype in BOTH {
                let shape = Shape { heads: 6, kv_heads: 2, dim: 32, window, soft_cap, dtype, ..PLAIN };
                check(shape, &[(300, 300), (1, 300), (97, 400), (2, 150), (1, 5)]);
            }
        }
    }
}

#[test]
fn long_contexts_are_split() {
    for (heads, window) in [(7, 0), (1, 0), (2, 1500)] {
        let shape = Shape { heads, dim: 64, window, dtype: DType::Bf16, ..PLAIN };
        check(shape, &[(1, 3001), (2, 2048), (1, 129)]);
    }
}

/// Scores far apart: all of the weight on one key, which changes as the tiles go by.
#[test]
fn rising_and_falling_scores() {
    for dtype in BOTH {
        let shape = Shape { dim: 16, dtype, ..PLAIN };
        let mut case = case(shape, &[(90, 200), (1, 200)], &[1, 2]);
        case.p.scale = 40.0;
        let exact = case.exact();
        let (largest, mean) = errors(&case.result(1, None), &exact);
        for (name, kernels) in widths() {
            let found = errors(&case.result(2, Some(kernels)), &exact);
            assert!(found.0 <= 2.0 * largest + 1e-6 && found.1 <= 2.0 * mean + 1e-7, "{name}: {found:?}");
        }
    }
}

#[test]
fn threads_and_company_leave_no_trace() {
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for (window, soft_cap) in [(0, 0.0), (50, 20.0)] {
        let shape = Shape { heads: 6, kv_heads: 2, dim: 64, window, soft_cap, dtype: DType::Bf16, ..PLAIN };
        let sequences = [(150, 150), (1, 1100), (7, 90), (1, 3), (400, 430), (2, 64)];
        let seeds = [3, 1, 4, 15, 9, 2];
        for (name, kernels) in widths() {
            let together = case(shape, &sequences, &seeds);
            let expected = together.result(1, Some(kernels));
            assert!(expected.iter().all(|x| x.is_finite()), "{name}: not every result was written");
            for threads in [2, 3, 5] {
                assert_eq!(
                    bits(&together.result(threads, Some(kernels))),
                    bits(&expected),
                    "{name}, {threads} threads"
                );
            }
            let mut row = 0;
            for (&sequence, &seed) in sequences.iter().zip(&seeds) {
                let alone = case(shape, &[sequence], &[seed]).result(2, Some(kernels));
                let width = shape.heads * shape.dim;
                let rows = row * width..(row + sequence.0) * width;
                assert_eq!(bits(&alone), bits(&expected[rows]), "{name}: {sequence:?} alone");
                row += sequence.0;
            }
        }
    }
}

/// Where the processor has what the software level stands for.
#[test]
fn software_gives_the_bits_of_the_processor() {
    if Simd::detect() < Simd::Avx512 {
        return eprintln!("skipped: AVX-512, which this CPU lacks");
    }
    for soft_cap in [0.0, 20.0] {
        let shape = Shape { heads: 6, kv_heads: 2, dim: 80, soft_cap, dtype: DType::Bf16, ..PLAIN };
        let case = case(shape, &[(150, 150), (1, 1100), (7, 90)], &[3, 1, 4]);
        let [ours, theirs] = [Simd::Soft512, Simd::Avx512].map(|simd| case.result(2, Kernels::of(simd)));
        assert_eq!(ours, theirs, "soft cap {soft_cap}");
    }
}

#[test]
fn a_block_that_does_not_exist_is_refused() {
    let case = case(PLAIN, &[(1, 20)], &[1]);
    case.o.block_tables.host_mut::<u32>()[1] = 1000;
    for (name, kernels) in widths() {
        let outcome =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| case.result(1, Some(kernels))));
        assert!(outcome.is_err(), "{name} read past the pages");
    }
}
