//! Baseline fusers. Whole sections at once and in memory of their own: they are what others are compared with, not what is
//! fast.

use super::{
    Simd,
    fuse::{Columns, Half, Rows, copy, sigmoid},
    pointwise::vector,
    team::Team,
};
use crate::{
    backend::Precision,
    ops::{
        AllInOne, Baseline, BaselineLayer, BaselineOperands, Factor, Features, Granularity, LinearMap, Mlp,
        Nonlinearity, SelfTerm,
    },
};

/// Of LayerNorm.
const NORM_EPS: f32 = 1e-5;

pub(super) fn fuse(team: &mut Team, simd: Simd, tokens: usize, precision: Precision, o: &BaselineOperands) {
    for layer in &o.layers {
        let mut rows = Rows { team: &mut *team, simd, precision, tokens };
        let columns = |half, pages, slots| Columns::new(half, pages, slots);
        let halves = [Half::Keys, Half::Values];
        let mut read = |columns: Columns| {
            let mut all = vec![0.0; tokens * columns.width()];
            rows.gather(&[columns], &mut all);
            all
        };
        let source = halves.map(|half| read(columns(half, &layer.source, &o.source_slots)));
        let target = halves.map(|half| read(columns(half, &layer.target, &o.target_slots)));
        let base = halves.map(|half| columns(half, &layer.base, &o.base_slots));
        let mut sums = base.map(&mut read);
        let changes = match &layer.projector {
            Baseline::AllInOne(p) => Shape::of(layer, tokens).all_in_one(&mut rows, p, &source, &target),
            Baseline::Linear(map, angles) => {
                let angles = [angles[0].host::<f32>(), angles[1].host::<f32>()];
                Shape::of(layer, tokens).linear(&mut rows, map, source, &target, angles, layer)
            }
        };
        for (half, (sum, (own, projected))) in halves.into_iter().zip(sums.iter_mut().zip(&changes)) {
            let gate = layer.gates[half as usize];
            let out = columns(half, &layer.out, &o.out_slots);
            if gate == 0.0 {
                copy(base[half as usize], out);
                continue;
            }
            // What replaces the receiver's column first: it cancels without a rest where the base is that column.
            for (sum, (own, projected)) in sum.iter_mut().zip(own.iter().zip(projected)) {
                *sum = (*sum + gate * own) + gate * projected;
            }
            rows.store(sum, out);
        }
    }
}

/// For keys and values: what becomes of the receiver's own column less that column, and what is added; `[tokens, width]`.
type Changes = [(Vec<f32>, Vec<f32>); 2];

#[derive(Clone, Copy)]
struct Shape {
    tokens: usize,
    heads: usize,
    dim: usize,
}

impl Shape {
    fn of(layer: &BaselineLayer, tokens: usize) -> Shape {
        Shape { tokens, heads: layer.target.kv_heads(), dim: layer.target.head_dim() }
    }

    fn width(self) -> usize {
        self.heads * self.dim
    }

    fn linear(
        self,
        rows: &mut Rows,
        map: &LinearMap,
        [mut keys, values]: [Vec<f32>; 2],
        target: &[Vec<f32>; 2],
        [theirs, ours]: [&[f32]; 2],
        layer: &BaselineLayer,
    ) -> Changes {
        let dim = layer.source.head_dim();
        turn(&mut keys, layer.source.width(), dim, theirs, -1.0);
        let mut projected = [(&map.keys, &keys), (&map.values, &values)].map(|(weight, x)| {
            let mut y = vec![0.0; self.tokens * self.width()];
            rows.matmul(weight, false, x, &mut y);
            y
        });
        turn(&mut projected[0], self.width(), self.dim, ours, 1.0);
        let mut projected = projected.into_iter();
        [0, 1].map(|half| {
            let own = target[half].iter().map(|t| -t).collect();
            (own, projected.next().expect("keys and values"))
        })
    }

    fn all_in_one(
        self,
        rows: &mut Rows,
        p: &AllInOne,
        source: &[Vec<f32>; 2],
        target: &[Vec<f32>; 2],
    ) -> Changes {
        let mut projected = [0, 1].map(|half| run(rows, &p.projections[half], self.tokens, &source[half]));
        if let Some(combiners) = &p.combiners {
            let width = self.width();
            projected = [0, 1].map(|half| {
                let pairs = projected[half].chunks_exact(width).zip(target[half].chunks_exact(width));
                let joined: Vec<f32> = pairs.flat_map(|(p, t)| p.iter().chain(t).copied()).collect();
                let mut y = vec![0.0; self.tokens * width];
                rows.matmul(&combiners[half], false, &joined, &mut y);
                y
            });
        }
        let gate = self.factor(rows, &p.gate, target, &projected);
        [0, 1].map(|half| {
            let weights = self.factor(rows, &p.weights[half], target, &projected);
            let mut own = vec![0.0; self.tokens * self.width()];
            let mut added = std::mem::take(&mut projected[half].clone());
            for (i, (own, added)) in own.iter_mut().zip(&mut added).enumerate() {
                let weight = sigmoid(weights[i] / p.temperature);
                let t = target[half][i];
                *own = match p.self_term {
                    SelfTerm::Kept => 0.0,
                    SelfTerm::Remainder => -weight * t,
                    SelfTerm::Dropped => -t,
                };
                *added *= if gate[i] > 0.0 { weight } else { 0.0 };
            }
            (own, added)
        })
    }

    /// A number for each element, `[tokens, width]`.
    fn factor(
        self,
        rows: &mut Rows,
        factor: &Factor,
        target: &[Vec<f32>; 2],
        projected: &[Vec<f32>; 2],
    ) -> Vec<f32> {
        let Shape { tokens, heads, dim } = self;
        let spread = |of: &dyn Fn(usize, usize, usize) -> f32| -> Vec<f32> {
            let all =
                (0..tokens).flat_map(|t| (0..heads).flat_map(move |h| (0..dim).map(move |d| (t, h, d))));
            all.map(|(t, h, d)| of(t, h, d)).collect()
        };
        match factor {
            Factor::Table(table, granularity) => {
                let table = vector(table);
                spread(&|t, h, d| match granularity {
                    Granularity::Scalar => table[0],
                    Granularity::Token => table[t],
                    Granularity::Head | Granularity::HeadMerged => table[t * heads + h],
                    Granularity::Value => table[(t * heads + h) * dim + d],
                })
            }
            Factor::Network { mlp, head, granularity, features } => {
                let parts: Vec<&Vec<f32>> = match features {
                    Features::TargetKey => vec![&target[0]],
                    Features::TargetValue => vec![&target[1]],
                    Features::Both => vec![&target[0], &target[1]],
                    Features::TargetProjectedKey => vec![&target[0], &projected[0]],
                    Features::TargetProjectedValue => vec![&target[1], &projected[1]],
                    Features::TargetProjectedBoth => {
                        vec![&target[0], &target[1], &projected[0], &projected[1]]
                    }
                };
                // A row a token and head, the features one after the other; heads follow one another.
                let mut x = Vec::new();
                for column in 0..tokens * heads {
                    parts.iter().for_each(|part| x.extend(&part[column * dim..(column + 1) * dim]));
                }
                let column = parts.len() * dim;
                let count = match granularity {
                    Granularity::Scalar => {
                        let columns = (tokens * heads) as f32;
                        x = (0..column)
                            .map(|i| x.iter().skip(i).step_by(column).sum::<f32>() / columns)
                            .collect();
                        1
                    }
                    Granularity::Token | Granularity::HeadMerged => tokens,
                    Granularity::Head | Granularity::Value => tokens * heads,
                };
                let mut y = run(rows, mlp, count, &x);
                if let Some(head) = head {
                    y = linear(rows, head, count, &y);
                }
                spread(&|t, h, d| match granularity {
                    Granularity::Scalar => y[0],
                    Granularity::Token => y[t],
                    Granularity::Head | Granularity::HeadMerged => y[t * heads + h],
                    Granularity::Value => y[(t * heads + h) * dim + d],
                })
            }
        }
    }
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

fn linear(rows: &mut Rows, weight: &crate::ops::Weight, count: usize, x: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; count * weight.rows()];
    let mut rows = Rows { team: &mut *rows.team, simd: rows.simd, precision: rows.precision, tokens: count };
    rows.matmul(weight, false, x, &mut y);
    y
}

/// Rows `[count, …]` through the layers.
fn run(rows: &mut Rows, mlp: &Mlp, count: usize, x: &[f32]) -> Vec<f32> {
    let mut h = x.to_vec();
    for layer in &mlp.hidden {
        h = linear(rows, &layer.linear, count, &h);
        if layer.nonlinearity.is_none() {
            let width = layer.linear.rows() / 2;
            let pairs = h.chunks_exact(2 * width);
            h = pairs.flat_map(|row| (0..width).map(|i| row[i] * sigmoid(row[i]) * row[width + i])).collect();
        }
        if let Some(norm) = &layer.norm {
            let [weight, bias] = norm.each_ref().map(vector);
            for row in h.chunks_exact_mut(weight.len()) {
                let n = row.len() as f32;
                let mean = row.iter().sum::<f32>() / n;
                let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / n;
                let scale = 1.0 / (variance + NORM_EPS).sqrt();
                for ((x, w), b) in row.iter_mut().zip(&weight).zip(&bias) {
                    *x = (*x - mean) * scale * w + b;
                }
            }
        }
        match layer.nonlinearity {
            None => {}
            Some(Nonlinearity::Gelu) => rows_gelu(rows, &mut h),
            Some(Nonlinearity::Silu) => h.iter_mut().for_each(|x| *x *= sigmoid(*x)),
            Some(Nonlinearity::Relu) => h.iter_mut().for_each(|x| *x = x.max(0.0)),
        }
    }
    let mut y = linear(rows, &mlp.output, count, &h);
    if mlp.residual {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
    }
    y
}

fn rows_gelu(rows: &mut Rows, x: &mut [f32]) {
    let mut rows =
        Rows { team: &mut *rows.team, simd: rows.simd, precision: rows.precision, tokens: x.len() };
    rows.gelu(1, x);
}
