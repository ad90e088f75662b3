//! Every width against differences of the forward in f64, over odd sizes, with outliers, and pages whose unused slots are NaN.

use super::{
    super::{
        super::differences::{assert_within, bits, dot, gradient_at, largest},
        paged_attention,
        tests::{Case, PLAIN, Random, Sequences, Shape, case, tensor},
    },
    *,
};
use crate::{backend::DType, ops::KvPages};
use half::bf16;

/// What the gradient pages hold before.
const BEFORE: f32 = 0.25;

struct Backwards {
    forward: Case,
    dout: Vec<f32>,
}

impl Backwards {
    fn new(shape: Shape, sequences: Sequences, seeds: &[u64]) -> Backwards {
        let forward = case(shape, sequences, seeds);
        let width = shape.heads * shape.dim;
        let dout = sequences.iter().zip(seeds).flat_map(|(&(new, _), &seed)| {
            let mut random = Random(seed + 1000);
            (0..new * width).map(move |_| random.number())
        });
        Backwards { dout: dout.collect(), forward }
    }

    /// dq, dK and dV.
    fn run(&self, threads: usize, simd: Simd) -> [Vec<f32>; 3] {
        let Case { p, o } = &self.forward;
        let mut team = Team::new(threads);
        // One result for all threads: the forward pass is not what is looked at.
        paged_attention(&mut Team::new(1), simd, *p, o);
        let page = || tensor(&vec![BEFORE; o.pages.keys.elements()], o.pages.keys.shape());
        let dims = [p.tokens as usize, (p.heads * p.head_dim) as usize];
        let grads = AttentionGrads {
            dout: tensor(&self.dout, &dims),
            dq: tensor(&vec![f32::NAN; self.dout.len()], &dims),
            dkv: KvPages { keys: page(), values: page() },
            scratch: tensor::<f32>(&[], &[0]),
        };
        attention_backward(&mut team, simd, *p, o, &grads);
        [&grads.dq, &grads.dkv.keys, &grads.dkv.values].map(|tensor| tensor.host::<f32>().to_vec())
    }

    /// Every so-many-th number of q, K and V that is one: which, and the derivative of `dout · out`.
    fn differences(&self, every: usize) -> [(Vec<usize>, Vec<f64>); 3] {
        let inputs = self.forward.inputs();
        let dout: Vec<f64> = self.dout.iter().copied().map(f64::from).collect();
        [0, 1, 2].map(|which| {
            let numbers = (0..inputs[which].len()).filter(|&i| !inputs[which][i].is_nan());
            let indices: Vec<usize> = numbers.step_by(every).collect();
            let mut all = inputs.clone();
            let exact = gradient_at(&inputs[which], &indices, |x| {
                all[which].copy_from_slice(x);
                dot(&self.forward.exact_of(&all), &dout)
            });
            (indices, exact)
        })
    }

    fn check(&self, every: usize, what: &str) {
        let (p, exact) = (self.forward.p, self.differences(every));
        let unused = self.forward.inputs()[1].iter().map(|x| x.is_nan()).collect::<Vec<bool>>();
        for simd in Simd::testable() {
            let found = self.run(2, simd);
            let what = format!("{what} on {simd}");
            let [(q, dq), (k, dk), (v, dv)] = &exact;
            let width = (p.heads * p.head_dim) as usize;
            let of_q = |&i: &usize| found[0][i / p.q_stride as usize * width + i % p.q_stride as usize];
            assert_near(&q.iter().map(of_q).collect::<Vec<f32>>(), dq, &format!("dq, {what}"));
            for (name, found, indices, exact) in [("dK", &found[1], k, dk), ("dV", &found[2], v, dv)] {
                let of = |&i: &usize| found[i] - BEFORE;
                let found: Vec<f32> = indices.iter().map(of).collect();
                assert_near(&found, exact, &format!("{name}, {what}"));
            }
            for grads in &found[1..] {
                let mut others = grads.iter().zip(&unused).filter(|(_, unused)| **unused);
                assert!(others.all(|(&x, _)| x == BEFORE), "{what}: a slot of no key was written");
            }
        }
    }
}

/// Of the largest, or of the size of the terms that cancel where a query sees one key alone.
#[track_caller]
fn assert_near(found: &[f32], exact: &[f64], what: &str) {
    assert_within(found, exact, 4e-6 * largest(exact).max(1.0), what)
}

fn seeds(sequences: Sequences) -> Vec<u64> {
    (0..sequences.len() as u64).map(|s| s + 7).collect()
}

const BOTH: [DType; 2] = [DType::F32, DType::Bf16];

#[test]
fn gradients_are_the_differences() {
    for (n, (heads, kv_heads, dim)) in [(1, 1, 2), (2, 1, 12), (6, 2, 6), (3, 3, 18)].into_iter().enumerate()
    {
        for (window, soft_cap) in [(0, 0.0), (3, 0.0), (0, 2.0), (4, 5.0)] {
            for sequences in [&[(1, 1)][..], &[(7, 7), (1, 3), (2, 9)]] {
                let (dtype, block_size) = (BOTH[(n + window as usize) % 2], 4);
                let shape = Shape { heads, kv_heads, dim, window, soft_cap, dtype, block_size };
                let case = Backwards::new(shape, sequences, &seeds(sequences));
                case.check(1, &format!("{shape:?}, {sequences:?}"));
            }
        }
    }
}

/// Several tiles of keys and of queries; some elements of each.
#[test]
fn tiles_add_up() {
    for (heads, kv_heads, dim, window, soft_cap, dtype) in [
        (2, 1, 64, 0, 0.0, DType::F32),
        (14, 2, 24, 0, 20.0, DType::Bf16),
        (3, 1, 40, 54, 0.0, DType::Bf16),
        (4, 4, 12, 20, 5.0, DType::F32),
    ] {
        let shape = Shape { heads, kv_heads, dim, window, soft_cap, dtype, ..PLAIN };
        let sequences = [(54, 97), (130, 131), (7, 100)];
        let case = Backwards::new(shape, &sequences, &seeds(&sequences));
        case.check(heads * dim * 7 + 1, &format!("{shape:?}"));
        let exact = case.run(1, Simd::Portable).map(|x| x.into_iter().map(f64::from).collect::<Vec<f64>>());
        for simd in Simd::testable() {
            for (found, exact) in case.run(2, simd).iter().zip(&exact) {
                assert_near(found, exact, &format!("{shape:?} on {simd}"));
            }
        }
    }
}

#[test]
fn head_dims_and_ratios() {
    for (heads, kv_heads) in [(1, 1), (9, 3), (14, 2), (100, 1)] {
        for dim in [16, 54, 80, 96, 128, 256] {
            let dtype = BOTH[(heads + dim / 2) % 2];
            let shape = Shape { heads, kv_heads, dim, dtype, ..PLAIN };
            let sequences = [(54, 54), (1, 97), (7, 7)];
            let case = Backwards::new(shape, &sequences, &seeds(&sequences));
            let exact =
                case.run(1, Simd::Portable).map(|x| x.into_iter().map(f64::from).collect::<Vec<f64>>());
            for simd in Simd::testable() {
                for (found, exact) in case.run(2, simd).iter().zip(&exact) {
                    assert_near(found, exact, &format!("{shape:?} on {simd}"));
                }
            }
        }
    }
}

#[test]
fn threads_and_company_leave_no_trace() {
    for (kv_heads, window, soft_cap) in [(1, 0, 0.0), (2, 50, 20.0)] {
        let shape = Shape { heads: 6, kv_heads, dim: 40, window, soft_cap, dtype: DType::Bf16, ..PLAIN };
        let (sequences, seeds) = ([(150, 150), (1, 300), (7, 90), (400, 430)], [3, 1, 4, 15]);
        for simd in Simd::testable() {
            let together = Backwards::new(shape, &sequences, &seeds);
            let expected = together.run(1, simd);
            assert!(expected.iter().flatten().all(|x| x.is_finite()), "{simd}: not every result was written");
            let expected = expected.map(|x| bits(&x));
            for threads in [2, 3, 5] {
                let found = together.run(threads, simd).map(|x| bits(&x));
                assert!(found == expected, "{simd}, {threads} threads, {kv_heads} kv heads");
            }
            let mut row = 0;
            for (&sequence, &seed) in sequences.iter().zip(&seeds) {
                let width = shape.heads * shape.dim;
                let alone = Backwards::new(shape, &[sequence], &[seed]).run(3, simd);
                let rows = row * width..(row + sequence.0) * width;
                assert!(bits(&alone[0]) == expected[0][rows], "{simd}: {sequence:?} alone");
                row += sequence.0;
            }
        }
    }
}

/// One task for all, or some for dq and others for dK and dV: which it is depends on the threads.
#[test]
fn few_heads_are_cut_finer() {
    let shape = Shape { heads: 3, kv_heads: 1, dim: 16, ..PLAIN };
    let case = Backwards::new(shape, &[(200, 200)], &[5]);
    let lens = |threads: usize| {
        let Case { p, o } = &case.forward;
        let kernels = Kernels::of(Simd::detect())?;
        let call = Call {
            p: *p,
            dim: 16,
            group: 3,
            wide: 16usize.next_multiple_of(kernels.lanes),
            q: o.q.host(),
            cu_q: o.cu_q.host(),
            context: o.context.host(),
            tables: o.block_tables.host(),
            pages: &o.pages,
            out: SendPtr(std::ptr::null_mut()),
        };
        let nothing = SendPtr(std::ptr::null_mut());
        let rows = SendPtr(std::ptr::null_mut());
        let backward = Backward { call, out: &[], dout: &[], rows, dkeys: nothing, dvalues: nothing };
        Some(cut(&backward, 0..1, threads).len())
    };
    if Simd::detect() == Simd::Portable {
        return eprintln!("skipped: AVX2, which this CPU lacks");
    }
    // 200 tokens are seven tiles of 32, and five of 48 keys.
    assert_eq!([lens(1), lens(2)], [Some(1), Some(7 + 5)]);
}

/// A beginning that two prompts share gets the gradients of both.
#[test]
fn shared_blocks_add_up() {
    let shape = Shape { heads: 2, kv_heads: 1, dim: 16, ..PLAIN };
    let sequences = [(54, 100), (54, 100), (7, 40)];
    let case = Backwards::new(shape, &sequences, &[1, 2, 3]);
    let tables = case.forward.o.block_tables.host_mut::<u32>();
    let max_blocks = case.forward.p.max_blocks as usize;
    let (first, second) = tables.split_at_mut(max_blocks);
    second[..3].copy_from_slice(&first[..3]);
    case.check(97, "three blocks of two sequences");
    for simd in Simd::testable() {
        let expected = case.run(1, simd).map(|x| bits(&x));
        for threads in [2, 3] {
            assert!(case.run(threads, simd).map(|x| bits(&x)) == expected, "{simd}, {threads} threads");
        }
    }
}

#[test]
fn no_tokens_leave_everything_as_it_was() {
    let case = Backwards::new(PLAIN, &[(0, 5), (3, 4)], &[1, 2]);
    case.check(1, "a sequence without new tokens");
}

#[test]
fn bf16_pages_are_what_they_were_widened_to() {
    let shape = Shape { dim: 20, dtype: DType::Bf16, ..PLAIN };
    let halves = Backwards::new(shape, &[(60, 90)], &[9]);
    let mut widened = Backwards::new(shape, &[(60, 90)], &[9]);
    let pages = &mut widened.forward.o.pages;
    for page in [&mut pages.keys, &mut pages.values] {
        let values: Vec<f32> = page.host::<bf16>().iter().map(|x| x.to_f32()).collect();
        *page = tensor(&values, page.shape());
    }
    for simd in Simd::testable() {
        assert!(halves.run(2, simd).map(|x| bits(&x)) == widened.run(2, simd).map(|x| bits(&x)), "{simd}");
    }
}
