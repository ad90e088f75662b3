//! The input of an integer product: int8 with one scale for every 32 elements of a token.

use super::{
    super::{
        Simd,
        team::{SendPtr, Team},
    },
    levels::GROUP,
};

/// Quantised tokens; the buffers are kept from op to op.
#[derive(Default)]
pub(super) struct Activations {
    cols: usize,
    /// `[tokens, cols]`, −127…127.
    q: Vec<i8>,
    /// `[tokens, cols / 32]`: the scale, and the scale times the sum of the group's `q` (what a weight's `min` is
    /// multiplied by).
    pair: Vec<[f32; 2]>,
    /// `[tokens, cols / 32]`: the first of `pair` again, side by side.
    scale: Vec<f32>,
    /// `[tokens, cols / 32]`: the second of `pair` again, side by side.
    sum: Vec<f32>,
    /// `[tokens, cols / 16]`: the same for half groups.
    half_sum: Vec<f32>,
}

/// One quantised token, from some group on.
#[derive(Clone, Copy)]
pub(super) struct Token<'a> {
    pub q: &'a [i8],
    pub pair: &'a [[f32; 2]],
    pub scale: &'a [f32],
    pub sum: &'a [f32],
    pub half_sum: &'a [f32],
}

impl Activations {
    /// `x` is `[tokens, cols]`, `cols` a multiple of 32.
    pub fn quantize(&mut self, team: &mut Team, simd: Simd, cols: usize, x: &[f32]) {
        let groups = x.len() / GROUP;
        self.cols = cols;
        self.q.resize(groups * GROUP, 0);
        self.pair.resize(groups, [0.0; 2]);
        self.scale.resize(groups, 0.0);
        self.sum.resize(groups, 0.0);
        self.half_sum.resize(2 * groups, 0.0);
        let (q, pair) = (SendPtr(self.q.as_mut_ptr()), SendPtr(self.pair.as_mut_ptr()));
        let (scale, sum) = (SendPtr(self.scale.as_mut_ptr()), SendPtr(self.sum.as_mut_ptr()));
        let half_sum = SendPtr(self.half_sum.as_mut_ptr());
        // A decode step's few groups are done before another thread would have woken up.
        let per_task = if groups <= 1024 { groups } else { 256 };
        team.run(groups.div_ceil(per_task.max(1)), &|task| {
            let start = task * per_task;
            let n = per_task.min(groups - start);
            // SAFETY: each buffer holds `groups` groups, tasks write disjoint ranges of them, and `self` is borrowed
            // mutably until all are done.
            let groups = unsafe {
                Groups {
                    q: std::slice::from_raw_parts_mut(q.get().add(start * GROUP), n * GROUP),
                    pair: std::slice::from_raw_parts_mut(pair.get().add(start), n),
                    scale: std::slice::from_raw_parts_mut(scale.get().add(start), n),
                    sum: std::slice::from_raw_parts_mut(sum.get().add(start), n),
                    half_sum: std::slice::from_raw_parts_mut(half_sum.get().add(2 * start), 2 * n),
                }
            };
            let x = &x[start * GROUP..][..n * GROUP];
            match simd {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the level says that the processor has AVX2.
                _ if simd >= Simd::Avx2 => unsafe { groups_avx2(x, groups) },
                _ => quantize_groups(x, groups),
            }
        });
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn tokens(&self) -> usize {
        self.q.len() / self.cols.max(1)
    }

    pub fn token(&self, t: usize) -> Token<'_> {
        let groups = self.cols / GROUP;
        Token {
            q: &self.q[t * self.cols..][..self.cols],
            pair: &self.pair[t * groups..][..groups],
            scale: &self.scale[t * groups..][..groups],
            sum: &self.sum[t * groups..][..groups],
            half_sum: &self.half_sum[2 * t * groups..][..2 * groups],
        }
    }
}

impl<'a> Token<'a> {
    /// From element `k` (a multiple of 32) on.
    pub fn after(self, k: usize) -> Token<'a> {
        let g = k / GROUP;
        Token {
            q: &self.q[k..],
            pair: &self.pair[g..],
            scale: &self.scale[g..],
            sum: &self.sum[g..],
            half_sum: &self.half_sum[2 * g..],
        }
    }
}

/// What becomes of some groups.
struct Groups<'a> {
    q: &'a mut [i8],
    pair: &'a mut [[f32; 2]],
    scale: &'a mut [f32],
    sum: &'a mut [f32],
    half_sum: &'a mut [f32],
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn groups_avx2(x: &[f32], out: Groups) {
    quantize_groups(x, out)
}

#[inline(always)]
fn quantize_groups(x: &[f32], out: Groups) {
    let Groups { q, pair, scale: scales, sum, half_sum } = out;
    let groups = x.as_chunks::<GROUP>().0.iter().zip(q.as_chunks_mut::<GROUP>().0);
    for (g, (x, q)) in groups.enumerate() {
        // As integers the magnitudes sort like the floats, with infinities and NaNs on top.
        let max = x.iter().map(|v| v.to_bits() & 0x7fff_ffff).fold(0, u32::max);
        let finite = max < 0x7f80_0000;
        let max = f32::from_bits(max);
        // A group that is all but zero would overflow the inverse.
        let inverse = if finite && max > 1e-30 { 127.0 / max } else { 0.0 };
        // A token with an infinity or a NaN has no product: NaN shows it in the output.
        let scale = if !finite {
            f32::NAN
        } else if inverse == 0.0 {
            0.0
        } else {
            max / 127.0
        };
        let mut halves = [0i32; 2];
        for (h, half) in halves.iter_mut().enumerate() {
            for i in 16 * h..16 * h + 16 {
                // Adding 1.5 · 2^23 rounds to the nearest integer, ties to even, into the low bits.
                let v = if finite { x[i] * inverse } else { 0.0 };
                let level = (v + 12_582_912.0).to_bits() as i32 - 0x4b40_0000;
                q[i] = level as i8;
                *half += level;
            }
        }
        pair[g] = [scale, scale * (halves[0] + halves[1]) as f32];
        [scales[g], sum[g]] = pair[g];
        half_sum[2 * g] = scale * halves[0] as f32;
        half_sum[2 * g + 1] = scale * halves[1] as f32;
    }
}
