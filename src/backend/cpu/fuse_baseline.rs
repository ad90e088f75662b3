//! Baseline fusers. Whole sections at once and in memory of their own: they are what others are compared with, not what is
//! fast.

use super::{
    Simd,
    all_in_one::{Changes, Dropout, Pass, Shape},
    fuse::{Columns, Half, Rows, copy},
    team::Team,
};
use crate::{
    backend::{Precision, Tensor},
    ops::{
        Baseline, BaselineGrads, BaselineLayer, BaselineOperands, BaselineTape, BaselineTraining, KvPages,
        LinearMap,
    },
};

pub(super) fn fuse(team: &mut Team, simd: Simd, tokens: usize, precision: Precision, o: &BaselineOperands) {
    for layer in &o.layers {
        let mut rows = Rows { team: &mut *team, simd, precision, tokens };
        let columns = |half, pages, slots| Columns::new(half, pages, slots);
        let halves = HALVES;
        let source = halves.map(|half| read(&mut rows, half, &layer.source, &o.source_slots));
        let target = halves.map(|half| read(&mut rows, half, &layer.target, &o.target_slots));
        let mut sums = halves.map(|half| read(&mut rows, half, &layer.base, &o.base_slots));
        let base = halves.map(|half| columns(half, &layer.base, &o.base_slots));
        let changes = match &layer.projector {
            Baseline::AllInOne(p) => {
                let shape = shape_of(layer, tokens);
                let (source, target) = (&source, &target);
                Pass { rows: &mut rows, shape, p, source, target, dropout: None }.hard()
            }
            Baseline::Linear(map, angles) => {
                let angles = [angles[0].host::<f32>(), angles[1].host::<f32>()];
                linear(&mut rows, map, source, &target, angles, layer)
            }
        };
        for (half, (sum, change)) in halves.into_iter().zip(sums.iter_mut().zip(&changes)) {
            let gate = layer.gates[half as usize];
            let out = columns(half, &layer.out, &o.out_slots);
            if gate == 0.0 {
                copy(base[half as usize], out);
                continue;
            }
            add(sum, change, gate);
            rows.store(sum, out);
        }
    }
}

/// What replaces the receiver's column first: it cancels without a rest where the base is that column.
fn add(sum: &mut [f32], (own, projected): &(Vec<f32>, Vec<f32>), gate: f32) {
    for (sum, (own, projected)) in sum.iter_mut().zip(own.iter().zip(projected)) {
        *sum = (*sum + gate * own) + gate * projected;
    }
}

fn shape_of(layer: &BaselineLayer, tokens: usize) -> Shape {
    Shape { tokens, heads: layer.target.kv_heads(), dim: layer.target.head_dim() }
}

/// The columns of `half`, `[tokens, width]`.
fn read(rows: &mut Rows, half: Half, pages: &KvPages, slots: &Tensor) -> Vec<f32> {
    let mut all = vec![0.0; rows.tokens * pages.width()];
    rows.gather(&[Columns::new(half, pages, slots)], &mut all);
    all
}

const HALVES: [Half; 2] = [Half::Keys, Half::Values];

/// In training: AllInOneProjectors with a gate for each element.
pub(super) fn forward(
    team: &mut Team,
    simd: Simd,
    tokens: usize,
    p: BaselineTraining,
    o: &BaselineOperands,
    tapes: &[BaselineTape],
) {
    for (layer, tape) in o.layers.iter().zip(tapes) {
        let Baseline::AllInOne(projector) = &layer.projector else { continue };
        let mut rows = Rows { team: &mut *team, simd, precision: p.precision, tokens };
        let source = HALVES.map(|half| read(&mut rows, half, &layer.source, &o.source_slots));
        let target = HALVES.map(|half| read(&mut rows, half, &layer.target, &o.target_slots));
        let mut sums = HALVES.map(|half| read(&mut rows, half, &layer.base, &o.base_slots));
        // The columns may be overwritten; the backward pass reads them here.
        let mut at = 0;
        let kept = tape.inputs.host_mut::<f32>();
        for part in source.iter().chain(&target) {
            kept[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        let pass = Pass {
            rows: &mut rows,
            shape: shape_of(layer, tokens),
            p: projector,
            source: &source,
            target: &target,
            dropout: Some(dropout(p, tape)),
        };
        let changes = pass.soft(tape.gates.host::<f32>());
        for (half, (sum, change)) in HALVES.into_iter().zip(sums.iter_mut().zip(&changes)) {
            add(sum, change, 1.0);
            rows.store(sum, Columns::new(half, &layer.out, &o.out_slots));
        }
    }
}

fn dropout(p: BaselineTraining, tape: &BaselineTape) -> Dropout {
    Dropout { probability: p.dropout, seed: p.seed, step: p.step, layer: tape.layer }
}

pub(super) fn backward(
    team: &mut Team,
    simd: Simd,
    tokens: usize,
    p: BaselineTraining,
    o: &BaselineOperands,
    tapes: &[BaselineTape],
    grads: &[BaselineGrads],
) {
    for ((layer, tape), grads) in o.layers.iter().zip(tapes).zip(grads) {
        let Baseline::AllInOne(projector) = &layer.projector else { continue };
        let mut rows = Rows { team: &mut *team, simd, precision: p.precision, tokens };
        let (mut at, kept) = (0, tape.inputs.host::<f32>());
        let mut next = |width: usize| {
            at += tokens * width;
            kept[at - tokens * width..at].to_vec()
        };
        let source = HALVES.map(|_| next(layer.source.width()));
        let target = HALVES.map(|_| next(layer.target.width()));
        let dout = HALVES.map(|half| read(&mut rows, half, &grads.dout, &o.out_slots));
        let pass = Pass {
            rows: &mut rows,
            shape: shape_of(layer, tokens),
            p: projector,
            source: &source,
            target: &target,
            dropout: Some(dropout(p, tape)),
        };
        let (dgates, dtarget) = pass.backward(tape.gates.host::<f32>(), &dout, &grads.projector);
        grads.dgates.host_mut::<f32>()[..dgates.len()].copy_from_slice(&dgates);
        let Some(pages) = &grads.dtarget else { continue };
        for (half, dtarget) in HALVES.into_iter().zip(dtarget) {
            let mut sum = read(&mut rows, half, pages, &o.target_slots);
            sum.iter_mut().zip(dtarget).for_each(|(sum, d)| *sum += d);
            rows.store(&sum, Columns::new(half, pages, &o.target_slots));
        }
    }
}

fn linear(
    rows: &mut Rows,
    map: &LinearMap,
    [mut keys, values]: [Vec<f32>; 2],
    target: &[Vec<f32>; 2],
    [theirs, ours]: [&[f32]; 2],
    layer: &BaselineLayer,
) -> Changes {
    let (width, tokens) = (layer.target.width(), rows.tokens);
    turn(&mut keys, layer.source.width(), layer.source.head_dim(), theirs, -1.0);
    let mut projected = [(&map.keys, &keys), (&map.values, &values)].map(|(weight, x)| {
        let mut y = vec![0.0; tokens * width];
        rows.matmul(weight, false, x, &mut y);
        y
    });
    turn(&mut projected[0], width, layer.target.head_dim(), ours, 1.0);
    let [keys, values] = projected;
    let own = |half: usize| target[half].iter().map(|t| -t).collect();
    [(own(0), keys), (own(1), values)]
}

/// Rotates the keys of rows of `width` by their angles, or (−1) back. A factor that scales the angles' cosine and sine (yarn) is
/// undone with them.
fn turn(rows: &mut [f32], width: usize, dim: usize, angles: &[f32], sign: f32) {
    for (row, angles) in rows.chunks_exact_mut(width).zip(angles.chunks_exact(dim)) {
        let (cos, sin) = angles.split_at(dim / 2);
        for head in row.chunks_exact_mut(dim) {
            let (low, high) = head.split_at_mut(dim / 2);
            for (i, (a, b)) in low.iter_mut().zip(high).enumerate() {
                let length = if sign < 0.0 { cos[i] * cos[i] + sin[i] * sin[i] } else { 1.0 };
                let (cos, sin) = (cos[i] / length, sign * sin[i] / length);
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}
