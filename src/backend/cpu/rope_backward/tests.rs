use super::{super::differences::*, *};
use crate::ops::KvPages;

#[derive(Clone, Copy, Debug)]
struct Shape {
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    norm: bool,
    interleaved: bool,
}

const EPS: f32 = 1e-6;
const OFFSET: f32 = 1.0;
const BLOCK: usize = 4;

/// The forward in f64: q rotated, then K, then V, each `[tokens, heads, dim]`.
fn forward(s: Shape, qkv: &[f64], norms: &[f64], angles: &[f64]) -> Vec<f64> {
    let width = (s.heads + 2 * s.kv_heads) * s.dim;
    let half = s.dim / 2;
    let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
    for (row, angles) in qkv.chunks_exact(width).zip(angles.chunks_exact(half)) {
        for (head, x) in row.chunks_exact(s.dim).enumerate() {
            if head >= s.heads + s.kv_heads {
                v.extend(x);
                continue;
            }
            let (weight, out) =
                if head < s.heads { (&norms[..s.dim], &mut q) } else { (&norms[s.dim..], &mut k) };
            let r = 1.0 / (dot(x, x) / s.dim as f64 + f64::from(EPS)).sqrt();
            let x: Vec<f64> = match s.norm {
                true => x.iter().zip(weight).map(|(x, w)| x * r * (w + f64::from(OFFSET))).collect(),
                false => x.to_vec(),
            };
            let pair = |i: usize| if s.interleaved { (x[2 * i], x[2 * i + 1]) } else { (x[i], x[i + half]) };
            out.extend((0..half).map(|i| pair(i).0 * angles[i].cos() - pair(i).1 * angles[i].sin()));
            out.extend((0..half).map(|i| pair(i).1 * angles[i].cos() + pair(i).0 * angles[i].sin()));
        }
    }
    [q, k, v].concat()
}

struct Case {
    s: Shape,
    qkv: Vec<f32>,
    norms: Vec<f32>,
    /// f32 numbers, so that their cosines differ from those of f64 by rounding alone.
    angles: Vec<f64>,
    /// In the order of [`forward`]'s result.
    grads: Vec<f32>,
}

impl Case {
    fn new(s: Shape) -> Case {
        let width = (s.heads + 2 * s.kv_heads) * s.dim;
        Case {
            s,
            qkv: noise(1, s.tokens * width),
            norms: noise(2, 2 * s.dim),
            angles: wide(&noise(3, s.tokens * s.dim / 2)),
            grads: noise(4, s.tokens * width),
        }
    }

    /// dqkv, dq_norm and dk_norm (both on top of 1).
    fn run(&self, threads: usize, simd: Simd) -> [Vec<f32>; 3] {
        let s = self.s;
        let width = (s.heads + 2 * s.kv_heads) * s.dim;
        let q_len = s.tokens * s.heads * s.dim;
        let (dq, dkv) = self.grads.split_at(q_len);
        // Slots from the last to the first, a block of no one before them.
        let slots: Vec<u32> = (0..s.tokens).rev().map(|t| (BLOCK + t) as u32).collect();
        let blocks = 1 + s.tokens.div_ceil(BLOCK);
        let page = |grads: &[f32]| {
            let mut page = vec![f32::NAN; blocks * s.kv_heads * BLOCK * s.dim];
            for (i, part) in grads.chunks_exact(s.dim).enumerate() {
                let (slot, head) = (slots[i / s.kv_heads] as usize, i % s.kv_heads);
                let at = ((slot / BLOCK * s.kv_heads + head) * BLOCK + slot % BLOCK) * s.dim;
                page[at..at + s.dim].copy_from_slice(part);
            }
            tensor(&page, &[blocks, s.kv_heads, BLOCK, s.dim])
        };
        let (dk, dv) = dkv.split_at(dkv.len() / 2);
        let table: Vec<f32> = self
            .angles
            .chunks_exact(s.dim / 2)
            .flat_map(|row| row.iter().map(|a| a.cos()).chain(row.iter().map(|a| a.sin())))
            .map(|x| x as f32)
            .collect();
        let norm = |at: usize| s.norm.then(|| tensor(&self.norms[at * s.dim..(at + 1) * s.dim], &[s.dim]));
        let dnorm = || s.norm.then(|| tensor(&vec![1.0f32; s.dim], &[s.dim]));
        let o = RopeBackwardOperands {
            qkv: tensor(&self.qkv, &[s.tokens, width]),
            q_norm: norm(0),
            k_norm: norm(1),
            cos_sin: tensor(&table, &[s.tokens, s.dim]),
            slots: tensor(&slots, &[s.tokens]),
            dq: tensor(dq, &[s.tokens, s.heads * s.dim]),
            dkv: KvPages { keys: page(dk), values: page(dv) },
            dqkv: tensor(&vec![f32::NAN; s.tokens * width], &[s.tokens, width]),
            dq_norm: dnorm(),
            dk_norm: dnorm(),
        };
        let p = RopeParams {
            tokens: s.tokens as u32,
            heads: s.heads as u32,
            kv_heads: s.kv_heads as u32,
            head_dim: s.dim as u32,
            norm_eps: EPS,
            norm_offset: OFFSET,
            interleaved: s.interleaved.into(),
        };
        rope_backward(&mut Team::new(threads), simd, p, &o);
        let norms = [&o.dq_norm, &o.dk_norm].map(|x| x.as_ref().map_or(vec![], |x| x.host::<f32>().to_vec()));
        let [dq_norm, dk_norm] = norms;
        [o.dqkv.host::<f32>().to_vec(), dq_norm, dk_norm]
    }
}

#[test]
fn gradients_are_the_differences() {
    for (tokens, heads, kv_heads, dim) in [(1, 1, 1, 2), (7, 3, 1, 6), (9, 4, 2, 8), (2, 2, 1, 54)] {
        for (norm, interleaved) in [(false, false), (true, false), (false, true), (true, true)] {
            let s = Shape { tokens, heads, kv_heads, dim, norm, interleaved };
            let case = Case::new(s);
            let (qkv, norms, grads) = (wide(&case.qkv), wide(&case.norms), wide(&case.grads));
            let dqkv = gradient(&qkv, |qkv| dot(&forward(s, qkv, &norms, &case.angles), &grads));
            let dnorms = gradient(&norms, |norms| dot(&forward(s, &qkv, norms, &case.angles), &grads));
            for simd in Simd::testable() {
                let what = format!("{s:?} on {simd}");
                let [found, dq_norm, dk_norm] = case.run(2, simd);
                assert_close(&found, &dqkv, 1e-6, &what);
                if norm {
                    let exact: Vec<f64> = dnorms.iter().map(|d| 1.0 + d).collect();
                    assert_close(&dq_norm, &exact[..dim], 1e-6, &what);
                    assert_close(&dk_norm, &exact[dim..], 1e-6, &what);
                }
            }
        }
    }
}

#[test]
fn threads_and_levels_leave_no_trace() {
    let s = Shape { tokens: 54, heads: 4, kv_heads: 2, dim: 24, norm: true, interleaved: true };
    let case = Case::new(s);
    let expected = case.run(1, Simd::Portable).map(|x| bits(&x));
    for simd in Simd::testable() {
        for threads in [1, 2, 3] {
            assert_eq!(case.run(threads, simd).map(|x| bits(&x)), expected, "{simd}, {threads} threads");
        }
    }
}
