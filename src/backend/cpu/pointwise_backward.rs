//! Backward of the row-wise ops, and the loss. Memory-bound; plain Rust that vectorises. Derivations in docs/math.md ("Backward").

use super::{
    Simd,
    pointwise::{activate, erf, exp, rows_per_task, vector},
    simd::vectorized,
    team::{SendPtr, Team},
};
use crate::{
    backend::Tensor,
    ops::{Activation, CrossEntropyParams, EmbedParams, IGNORED, NormOutput, RmsNormParams},
};

/// Rows whose part of a weight's gradient is summed up at once. The parts are added in order: which thread made them leaves no
/// trace.
const ROWS: usize = 32;

/// Lanes of sums: same order on every run, and the compiler can vectorise it.
const LANES: usize = 16;

/// `Σ f(a, b)` in lanes.
#[inline(always)]
pub(super) fn sum_of(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a.remainder().iter().zip(b.remainder());
    for (a, b) in a.zip(b) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f(a, b);
        }
    }
    for (lane, (&a, &b)) in lanes.iter_mut().zip(rest) {
        *lane += f(a, b);
    }
    lanes.iter().sum()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn rms_norm(
    team: &mut Team,
    simd: Simd,
    p: RmsNormParams,
    x: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
    dx: &Tensor,
    dweight: Option<&Tensor>,
) {
    let weight: Vec<f32> = vector(weight).iter().map(|w| w + p.offset).collect();
    // `dx` may be `dy` itself, which is then read through it.
    let dy = (!dy.overlaps(dx)).then(|| dy.host::<f32>());
    norm_rows(team, simd, x.host(), &weight, p.eps, dy, p.output, dx.host_mut(), dweight);
}

/// Backward of RMSNorm of rows as long as `weight`; without `dy` it is what `dx` holds.
#[allow(clippy::too_many_arguments)]
pub(super) fn norm_rows(
    team: &mut Team,
    simd: Simd,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: Option<&[f32]>,
    output: NormOutput,
    dx: &mut [f32],
    dweight: Option<&Tensor>,
) {
    let cols = weight.len();
    let part_len = if dweight.is_some() { cols } else { 0 };
    let mut parts = vec![0.0f32; dx.len().div_ceil(ROWS * cols) * part_len];
    let parts_ptr = SendPtr(parts.as_mut_ptr());
    team.chunks_mut(dx, ROWS * cols, |task, rows| {
        // SAFETY: `part_len` elements of each task, its own.
        let part = unsafe { std::slice::from_raw_parts_mut(parts_ptr.get().add(task * part_len), part_len) };
        let mut dy_row = vec![0.0; cols];
        for (i, dx) in rows.chunks_exact_mut(cols).enumerate() {
            let at = (task * ROWS + i) * cols;
            dy_row.copy_from_slice(dy.map_or(&*dx, |dy| &dy[at..at + cols]));
            norm_row(simd, &x[at..at + cols], weight, eps, &dy_row, output, dx, part);
        }
    });
    if let Some(dweight) = dweight {
        add_parts(&parts, dweight);
    }
}

/// Adds parts of a weight's gradient to it, in order.
pub(super) fn add_parts(parts: &[f32], grad: &Tensor) {
    let grad = grad.host_mut::<f32>();
    let mut sum = vec![0.0f32; grad.len()];
    for part in parts.chunks_exact(grad.len()) {
        sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    grad.iter_mut().zip(&sum).for_each(|(grad, sum)| *grad += sum);
}

vectorized! {
    /// Backward of one row of `y = x · r · weight`, `r = 1 / √(mean(x²) + eps)`:
    /// `dx = r · (weight · dy − x · r² · mean(weight · dy · x))`, and `dy · x · r` is added to `dweight`, which is empty where it
    /// isn't wanted.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn norm_row(
        x: &[f32],
        weight: &[f32],
        eps: f32,
        dy: &[f32],
        output: NormOutput,
        dx: &mut [f32],
        dweight: &mut [f32],
    ) {
        let len = x.len() as f32;
        let r = 1.0 / (sum_of(x, x, |a, b| a * b) / len + eps).sqrt();
        let mut lanes = [0.0f32; LANES];
        let columns = x.chunks(LANES).zip(weight.chunks(LANES)).zip(dy.chunks(LANES));
        for ((x, weight), dy) in columns {
            for (((lane, &x), &w), &dy) in lanes.iter_mut().zip(x).zip(weight).zip(dy) {
                *lane += w * dy * x;
            }
        }
        let along = lanes.iter().sum::<f32>() / len * r * r;
        let columns = dx.iter_mut().zip(x).zip(weight).zip(dy);
        match output {
            NormOutput::Assign => columns.for_each(|(((dx, &x), &w), &dy)| *dx = r * (w * dy - x * along)),
            NormOutput::Add => columns.for_each(|(((dx, &x), &w), &dy)| *dx += r * (w * dy - x * along)),
        }
        dweight.iter_mut().zip(x).zip(dy).for_each(|((sum, &x), &dy)| *sum += dy * (x * r));
    }
}

pub(super) fn glu(
    team: &mut Team,
    simd: Simd,
    activation: Activation,
    gate_up: &Tensor,
    dout: &Tensor,
    dgate_up: &Tensor,
) {
    let width = dout.row_len();
    let (gate_up, dout) = (gate_up.host::<f32>(), dout.host::<f32>());
    let per_task = rows_per_task(width);
    team.chunks_mut(dgate_up.host_mut::<f32>(), per_task * 2 * width, |task, rows| {
        for (i, grads) in rows.chunks_exact_mut(2 * width).enumerate() {
            let row = task * per_task + i;
            let (gate, up) = gate_up[row * 2 * width..(row + 1) * 2 * width].split_at(width);
            let (dgate, dup) = grads.split_at_mut(width);
            glu_row(simd, activation, gate, up, &dout[row * width..(row + 1) * width], dgate, dup);
        }
    });
}

/// Derivative of [`activate`]. Inlined, so that loops over one activation vectorise.
#[inline(always)]
pub(super) fn slope(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Silu => {
            // 1 − sigmoid = e · sigmoid keeps its digits.
            let e = exp(-x);
            let sigmoid = 1.0 / (1.0 + e);
            sigmoid + x * sigmoid * (e * sigmoid)
        }
        Activation::GeluTanh => {
            // Far out it is a line, while the cube goes on growing.
            let x = x.clamp(-20.0, 20.0);
            let u = 0.797_884_6 * (x + 0.044_715 * x * x * x);
            let du = 0.797_884_6 * (1.0 + 3.0 * 0.044_715 * x * x);
            let e = exp(-2.0 * u);
            let sigmoid = 1.0 / (1.0 + e);
            sigmoid + 2.0 * x * du * sigmoid * (e * sigmoid)
        }
        Activation::GeluErf => {
            // 1 / √(2π)
            let density = 0.398_942_3 * exp(-0.5 * x * x);
            0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)) + x * density
        }
    }
}

#[inline(always)]
fn glu_pairs(
    activation: Activation,
    gate: &[f32],
    up: &[f32],
    dout: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    let inputs = gate.iter().zip(up).zip(dout);
    for ((dgate, dup), ((&g, &u), &d)) in dgate.iter_mut().zip(dup).zip(inputs) {
        *dgate = d * u * slope(activation, g);
        *dup = d * activate(activation, g);
    }
}

vectorized! {
    fn glu_row(
        activation: Activation,
        gate: &[f32],
        up: &[f32],
        dout: &[f32],
        dgate: &mut [f32],
        dup: &mut [f32],
    ) {
        // The match stands outside the loop: inside it would keep it from vectorising.
        match activation {
            Activation::Silu => glu_pairs(Activation::Silu, gate, up, dout, dgate, dup),
            Activation::GeluTanh => glu_pairs(Activation::GeluTanh, gate, up, dout, dgate, dup),
            Activation::GeluErf => glu_pairs(Activation::GeluErf, gate, up, dout, dgate, dup),
        }
    }
}

/// One thread: a token may come twice, and its sum has one order.
pub(super) fn embed(p: EmbedParams, ids: &Tensor, dout: &Tensor, dtable: &Tensor) {
    let hidden = p.hidden as usize;
    let dtable = dtable.host_mut::<f32>();
    for (&id, dout) in ids.host::<u32>().iter().zip(dout.host::<f32>().chunks_exact(hidden)) {
        let row = &mut dtable[id as usize * hidden..][..hidden];
        row.iter_mut().zip(dout).for_each(|(row, dout)| *row += p.scale * dout);
    }
}

pub(super) fn cross_entropy(
    team: &mut Team,
    simd: Simd,
    p: CrossEntropyParams,
    logits: &Tensor,
    labels: &Tensor,
    loss: &Tensor,
) {
    let labels = labels.host::<u32>();
    let losses = SendPtr(loss.host_mut::<f32>().as_mut_ptr());
    team.chunks_mut(logits.host_mut::<f32>(), p.vocab as usize, |row, logits| {
        let mut loss = 0.0;
        match labels[row] {
            IGNORED => logits.fill(0.0),
            label => cross_entropy_row(simd, p, label as usize, logits, &mut loss),
        }
        // SAFETY: `loss` is `[rows]`, checked in ops; each row is one task's.
        unsafe { *losses.get().add(row) = loss };
    });
}

/// Logits whose exponentials are summed up in f32 before the sum goes on in f64.
const RUN: usize = 1024;

vectorized! {
    fn cross_entropy_row(p: CrossEntropyParams, label: usize, logits: &mut [f32], loss: &mut f32) {
        let larger = |a: f32, b: f32| if a > b { a } else { b };
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for chunk in logits.chunks(LANES) {
            lanes.iter_mut().zip(chunk).for_each(|(lane, &x)| *lane = larger(x, *lane));
        }
        let max = lanes.into_iter().fold(f32::NEG_INFINITY, larger);
        let one_label = logits[label];
        let kept = p.soft_cap == 0.0;
        let mut sum = 0.0f64;
        for run in logits.chunks_mut(RUN) {
            sum += f64::from(if kept {
                // Exponentials are most of the work: they stay in the logits' place.
                run.iter_mut().for_each(|x| *x = exp(*x - max));
                sum_of(run, run, |e, _| e)
            } else {
                sum_of(run, run, |x, _| exp(x - max))
            });
        }
        *loss = (sum.ln() - (f64::from(one_label) - f64::from(max))) as f32;
        let inverse = (1.0 / sum) as f32;
        if kept {
            logits.iter_mut().for_each(|e| *e = *e * inverse * p.scale);
            logits[label] = (exp(one_label - max) * inverse - 1.0) * p.scale;
            return;
        }
        // The derivative of cap · tanh(x / cap) is 1 − (its result / cap)².
        let inverse_cap = 1.0 / p.soft_cap;
        let capped = |x: f32| p.scale * (1.0 - (x * inverse_cap) * (x * inverse_cap));
        for x in logits.iter_mut() {
            *x = exp(*x - max) * inverse * capped(*x);
        }
        logits[label] = (exp(one_label - max) * inverse - 1.0) * capped(one_label);
    }
}

#[cfg(test)]
mod tests;
