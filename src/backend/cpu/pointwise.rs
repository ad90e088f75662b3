//! Row-wise ops: embedding, RMSNorm, GLU, soft cap, gather. Memory-bound; plain Rust that vectorises.

use super::{Simd, blocks, simd::vectorized, team::Team};
use crate::{
    backend::{DType, Tensor},
    ops::{Activation, EmbedParams, NormOutput, RmsNormParams},
};

/// Rows per task such that a task is worth handing out.
pub(super) fn rows_per_task(cols: usize) -> usize {
    (8192 / cols.max(1)).max(1)
}

pub(super) fn embed(team: &mut Team, p: EmbedParams, ids: &Tensor, table: &Tensor, out: &Tensor) {
    let (ids, hidden) = (ids.host::<u32>(), p.hidden as usize);
    let per_task = rows_per_task(hidden);
    team.chunks_mut(out.host_mut::<f32>(), per_task * hidden, |task, rows| {
        for (row, &id) in rows.chunks_exact_mut(hidden).zip(&ids[task * per_task..]) {
            blocks::row_to_f32(table, id as usize, row);
            if p.scale != 1.0 {
                row.iter_mut().for_each(|v| *v *= p.scale);
            }
        }
    });
}

/// A float weight vector as f32.
pub(super) fn vector(tensor: &Tensor) -> Vec<f32> {
    let mut out = vec![0.0; tensor.elements()];
    blocks::row_to_f32(tensor, 0, &mut out);
    out
}

/// Sum of squares in eight fixed lanes: same order on every run, and the compiler can vectorise it.
#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let chunks = x.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane += v * v;
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane += v * v;
    }
    lanes.iter().sum()
}

pub(super) fn rms_norm(
    team: &mut Team,
    simd: Simd,
    p: RmsNormParams,
    x: &Tensor,
    weight: &Tensor,
    out: &Tensor,
) {
    let cols = p.cols as usize;
    let weight: Vec<f32> = vector(weight).iter().map(|w| w + p.offset).collect();
    let per_task = rows_per_task(cols);
    // `x` may be `out` itself: the input row is read through the output in that case.
    let same = x.byte_offset() == out.byte_offset() && x.overlaps(out);
    let input = if same { &[][..] } else { x.host::<f32>() };
    team.chunks_mut(out.host_mut::<f32>(), per_task * cols, |task, rows| {
        for (i, y) in rows.chunks_exact_mut(cols).enumerate() {
            if same {
                norm_in_place(simd, y, &weight, p.eps);
            } else {
                let row = task * per_task + i;
                norm_row(simd, &input[row * cols..(row + 1) * cols], &weight, p.eps, p.output, y);
            }
        }
    });
}

vectorized! {
    /// `y = x / √(mean(x²) + eps) · weight`
    pub(super) fn norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
        let scale = 1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt();
        x.iter_mut().zip(weight).for_each(|(x, &w)| *x = *x * scale * w);
    }
}

vectorized! {
    /// As [`norm_in_place`], into `y` or added to it.
    pub(super) fn norm_row(x: &[f32], weight: &[f32], eps: f32, output: NormOutput, y: &mut [f32]) {
        let scale = 1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt();
        let pairs = y.iter_mut().zip(x).zip(weight);
        match output {
            NormOutput::Assign => pairs.for_each(|((y, &x), &w)| *y = x * scale * w),
            NormOutput::Add => pairs.for_each(|((y, &x), &w)| *y += x * scale * w),
        }
    }
}

/// `act(x)`. Inlined, so that loops over one activation vectorise.
#[inline(always)]
pub(super) fn activate(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Silu => x / (1.0 + exp(-x)),
        Activation::GeluTanh => {
            // 0.5 (1 + tanh u) = 1 / (1 + e^(−2u))
            let u = 0.797_884_6 * (x + 0.044_715 * x * x * x);
            x / (1.0 + exp(-2.0 * u))
        }
        Activation::GeluErf => 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
    }
}

/// `e^x` to about 1 unit in the last place, without branches so that loops over it vectorise. Saturates at the ends.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.3, 88.7);
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    // ln 2 in two parts: the product with n is exact in the first.
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut poly = 1.987_569_1e-4_f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        poly = poly * r + c;
    }
    let value = poly * r * r + r + 1.0;
    // n may be 128 for the largest arguments: scale in two steps.
    let half = (n * 0.5).round_ties_even();
    // Not checked for overflow, which cannot be: a check would keep loops of builds that have them from vectorising.
    let power = |k: f32| f32::from_bits(((k as i32).wrapping_add(127) as u32) << 23);
    value * power(half) * power(n - half)
}

/// Error function, absolute error below 1.2e-7 (a rational fit with an exponential tail; both parts are
/// evaluated so that loops vectorise).
#[inline(always)]
pub(super) fn erf(x: f32) -> f32 {
    let a = x.abs();
    let t = 1.0 / (1.0 + 0.5 * a);
    let mut poly = 0.170_872_77_f32;
    for c in [
        -0.822_152_23,
        1.488_515_9,
        -1.135_204,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_7,
        -1.265_512_2,
    ] {
        poly = poly * t + c;
    }
    let tail = 1.0 - t * exp(-a * a + poly);
    // Near zero the tail form loses digits: Taylor there.
    let x2 = x * x;
    let mut series = -8.548_327e-4_f32;
    for c in [5.223_978e-3, -2.686_617e-2, 0.112_837_92, -0.376_126_4, std::f32::consts::FRAC_2_SQRT_PI] {
        series = series * x2 + c;
    }
    if a < 0.5 { series * x } else { tail.copysign(x) }
}

/// `x`: gate beside up.
pub(super) fn glu(team: &mut Team, simd: Simd, activation: Activation, x: &[f32], out: &Tensor) {
    let cols = out.row_len();
    let per_task = rows_per_task(cols);
    team.chunks_mut(out.host_mut::<f32>(), per_task * cols, |task, rows| {
        for (i, y) in rows.chunks_exact_mut(cols).enumerate() {
            let at = (task * per_task + i) * 2 * cols;
            let (gate, up) = x[at..at + 2 * cols].split_at(cols);
            glu_row(simd, activation, gate, up, y);
        }
    });
}

vectorized! {
    fn glu_row(activation: Activation, gate: &[f32], up: &[f32], y: &mut [f32]) {
        let triples = y.iter_mut().zip(gate).zip(up);
        // The match stands outside the loop: inside it would keep it from vectorising.
        match activation {
            Activation::Silu => triples.for_each(|((y, &g), &u)| *y = activate(Activation::Silu, g) * u),
            Activation::GeluTanh => triples.for_each(|((y, &g), &u)| *y = activate(Activation::GeluTanh, g) * u),
            Activation::GeluErf => triples.for_each(|((y, &g), &u)| *y = activate(Activation::GeluErf, g) * u),
        }
    }
}

pub(super) fn soft_cap(team: &mut Team, cap: f32, x: &Tensor) {
    team.chunks_mut(x.host_mut::<f32>(), 8192, |_, part| {
        part.iter_mut().for_each(|v| *v = cap * (*v / cap).tanh())
    });
}

pub(super) fn gather_rows(x: &Tensor, rows: &Tensor, out: &Tensor) {
    debug_assert_eq!(x.dtype(), DType::F32);
    let (cols, x) = (x.row_len(), x.host::<f32>());
    for (y, &row) in out.host_mut::<f32>().chunks_exact_mut(cols).zip(rows.host::<u32>()) {
        y.copy_from_slice(&x[row as usize * cols..][..cols]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        for i in -87_000..88_700 {
            let x = i as f32 / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.4e-7, "exp({x}): relative error {error}");
        }
    }

    #[test]
    fn erf_agrees_with_its_integral() {
        // Midpoint rule in f64, fine enough for 1e-9.
        let mut sum = 0.0f64;
        let step = 1e-4;
        for i in 0..40_000 {
            let middle = (i as f64 + 0.5) * step;
            sum += (-middle * middle).exp() * step;
            let x = (i + 1) as f64 * step;
            let exact = sum * 2.0 / std::f64::consts::PI.sqrt();
            assert!((f64::from(erf(x as f32)) - exact).abs() < 3e-7, "erf({x})");
            assert!((f64::from(erf(-x as f32)) + exact).abs() < 3e-7, "erf(-{x})");
        }
    }
}
