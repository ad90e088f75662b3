//! The AllInOneProjector: forward, and backward through a forward pass made again. Names as in docs/math.md ("Baselines").

use super::{
    fuse::{Rows, sigmoid},
    linear::backward as linear_backward,
    pointwise::vector,
    pointwise_backward::slope,
};
use crate::{
    backend::Tensor,
    ops::{
        Activation, AllInOne, Factor, Features, Granularity, LinearBackwardParams, Mlp, Nonlinearity,
        SelfTerm, Weight, dropout_part,
    },
    rng::{Purpose, Rng, Stream},
};

/// Of LayerNorm.
const NORM_EPS: f32 = 1e-5;

/// For keys and values: what becomes of the receiver's own column less that column, and what is added; `[tokens, width]`.
pub(super) type Changes = [(Vec<f32>, Vec<f32>); 2];

/// Of the receiver's columns.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub tokens: usize,
    pub heads: usize,
    pub dim: usize,
}

impl Shape {
    pub fn width(self) -> usize {
        self.heads * self.dim
    }
}

/// Elements that are dropped behind hidden layers in training.
#[derive(Clone, Copy)]
pub(super) struct Dropout {
    pub probability: f32,
    pub seed: u64,
    pub step: u32,
    pub layer: u32,
}

impl Dropout {
    /// `block` names the hidden layer.
    fn apply(self, half: u32, block: u32, x: &mut [f32]) {
        if self.probability == 0.0 {
            return;
        }
        let part = dropout_part(self.layer, half, block);
        let mut noise = vec![0.0; x.len()];
        Rng::new(self.seed, Stream::new(Purpose::Dropout, part), self.step).fill_uniform(0, &mut noise);
        let scale = 1.0 / (1.0 - self.probability);
        for (x, u) in x.iter_mut().zip(noise) {
            *x = if u < self.probability { 0.0 } else { *x * scale };
        }
    }
}

const NO_DROPOUT: Dropout = Dropout { probability: 0.0, seed: 0, step: 0, layer: 0 };

/// Blocks of the networks behind gates and weights.
const WEIGHTS: u32 = 64;

/// What a hidden layer was given and made.
struct Trace {
    input: Vec<f32>,
    linear: Vec<f32>,
    /// Behind the gating, where there is one.
    gated: Vec<f32>,
    normed: Vec<f32>,
}

/// One pass over the columns of a layer.
pub(super) struct Pass<'a, 't> {
    pub rows: &'a mut Rows<'t>,
    pub shape: Shape,
    pub p: &'a AllInOne,
    /// Keys and values.
    pub source: &'a [Vec<f32>; 2],
    pub target: &'a [Vec<f32>; 2],
    pub dropout: Option<Dropout>,
}

/// What a pass gives before gates.
struct Made {
    traces: [Vec<Trace>; 2],
    joined: Option<[Vec<f32>; 2]>,
    projected: [Vec<f32>; 2],
    /// Before the sigmoid, an element each.
    weights: [Vec<f32>; 2],
}

impl Pass<'_, '_> {
    /// With gates that are open or shut.
    pub fn hard(mut self) -> Changes {
        let made = self.made();
        let gate = self.factor(&self.p.gate, &made.projected);
        let gate: Vec<f32> = gate.into_iter().map(|gate| if gate > 0.0 { 1.0 } else { 0.0 }).collect();
        self.changes(&made, &gate)
    }

    /// With a gate for each element, keys and values alike.
    pub fn soft(mut self, gates: &[f32]) -> Changes {
        let made = self.made();
        self.changes(&made, gates)
    }

    fn changes(&self, made: &Made, gates: &[f32]) -> Changes {
        [0, 1].map(|half| {
            let parts =
                self.target[half].iter().zip(&made.projected[half]).zip(&made.weights[half]).zip(gates);
            let change = |(((t, p), a), gate): (((&f32, &f32), &f32), &f32)| {
                let weight = sigmoid(a / self.p.temperature);
                let own = match self.p.self_term {
                    SelfTerm::Kept => 0.0,
                    SelfTerm::Remainder => -weight * t,
                    SelfTerm::Dropped => -t,
                };
                (own, gate * weight * p)
            };
            parts.map(change).unzip()
        })
    }

    fn made(&mut self) -> Made {
        let (tokens, width) = (self.shape.tokens, self.shape.width());
        let [keys, values] = [0, 1].map(|half| {
            let mut traces = Vec::new();
            let mlp = &self.p.projections[half];
            let y = self.run(mlp, tokens, &self.source[half], half as u32, 0, Some(&mut traces));
            (traces, y)
        });
        let (traces, last) = ([keys.0, values.0], [keys.1, values.1]);
        let joined = self.p.combiners.is_some().then(|| {
            [0, 1].map(|half| {
                let pairs = last[half].chunks_exact(width).zip(self.target[half].chunks_exact(width));
                pairs.flat_map(|(p, t)| p.iter().chain(t).copied()).collect::<Vec<f32>>()
            })
        });
        let projected = match (&self.p.combiners, &joined) {
            (Some(combiners), Some(joined)) => {
                [0, 1].map(|half| linear(self.rows, &combiners[half], tokens, &joined[half]))
            }
            _ => last,
        };
        let weights = [0, 1].map(|half| self.factor(&self.p.weights[half], &projected));
        Made { traces, joined, projected, weights }
    }

    /// A number for each element, `[tokens, width]`.
    fn factor(&mut self, factor: &Factor, projected: &[Vec<f32>; 2]) -> Vec<f32> {
        match factor {
            Factor::Table(table, granularity) => {
                let table = vector(table);
                self.places(*granularity).map(|place| table[place]).collect()
            }
            Factor::Network { mlp, head, granularity, features } => {
                let (x, count) = self.features(*features, *granularity, projected);
                let mut y = self.run(mlp, count, &x, 0, WEIGHTS, None);
                if let Some(head) = head {
                    y = linear(self.rows, head, count, &y);
                }
                self.places(*granularity).map(|place| y[place]).collect()
            }
        }
    }

    /// For each element where its number lies in a table, or in what a network gives.
    fn places(&self, granularity: Granularity) -> impl Iterator<Item = usize> + use<> {
        let Shape { tokens, heads, dim } = self.shape;
        (0..tokens * heads * dim).map(move |element| {
            let column = element / dim;
            match granularity {
                Granularity::Scalar => 0,
                Granularity::Token => column / heads,
                Granularity::Head | Granularity::HeadMerged => column,
                Granularity::Value => element,
            }
        })
    }

    fn parts<'b>(&'b self, features: Features, projected: &'b [Vec<f32>; 2]) -> Vec<&'b [f32]> {
        let all = [&self.target[0], &self.target[1], &projected[0], &projected[1]];
        which(features).iter().map(|&part| &all[part][..]).collect()
    }

    /// Rows of a network's input, and how many: the features of each head of each token one after the other.
    fn features(
        &self,
        features: Features,
        granularity: Granularity,
        projected: &[Vec<f32>; 2],
    ) -> (Vec<f32>, usize) {
        let Shape { tokens, heads, dim } = self.shape;
        let parts = self.parts(features, projected);
        let mut x = Vec::new();
        for column in 0..tokens * heads {
            parts.iter().for_each(|part| x.extend(&part[column * dim..(column + 1) * dim]));
        }
        let column = parts.len() * dim;
        let count = match granularity {
            Granularity::Scalar => {
                let columns = (tokens * heads) as f32;
                let mean = |i: usize| x.iter().skip(i).step_by(column).sum::<f32>() / columns;
                x = (0..column).map(mean).collect();
                1
            }
            Granularity::Token | Granularity::HeadMerged => tokens,
            Granularity::Head | Granularity::Value => tokens * heads,
        };
        (x, count)
    }

    /// Rows `[count, …]` through the layers, from dropout's block `block` on.
    fn run(
        &mut self,
        mlp: &Mlp,
        count: usize,
        x: &[f32],
        half: u32,
        block: u32,
        mut traces: Option<&mut Vec<Trace>>,
    ) -> Vec<f32> {
        let mut h = x.to_vec();
        for (number, layer) in mlp.hidden.iter().enumerate() {
            let made = linear(self.rows, &layer.linear, count, &h);
            let gated = match layer.nonlinearity {
                Some(_) => made.clone(),
                None => {
                    let width = layer.linear.rows() / 2;
                    let rows = made.chunks_exact(2 * width);
                    rows.flat_map(|r| (0..width).map(|i| r[i] * sigmoid(r[i]) * r[width + i])).collect()
                }
            };
            let mut normed = gated.clone();
            if let Some([weight, bias]) = &layer.norm {
                let (weight, bias) = (vector(weight), vector(bias));
                for row in normed.chunks_exact_mut(weight.len()) {
                    let (mean, scale) = moments(row);
                    for ((x, w), b) in row.iter_mut().zip(&weight).zip(&bias) {
                        *x = (*x - mean) * scale * w + b;
                    }
                }
            }
            let mut out = normed.clone();
            activate(self.rows, layer.nonlinearity, &mut out);
            self.dropout.unwrap_or(NO_DROPOUT).apply(half, block + number as u32, &mut out);
            let input = std::mem::replace(&mut h, out);
            if let Some(traces) = &mut traces {
                traces.push(Trace { input, linear: made, gated, normed });
            }
        }
        let mut y = linear(self.rows, &mlp.output, count, &h);
        if mlp.residual {
            y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
        }
        y
    }

    /// Backward of [`Pass::soft`] from the gradients of keys and values: adds to `grad`; the gradients of the gates, and those of the
    /// receiver's columns through what the projector read.
    pub fn backward(
        mut self,
        gates: &[f32],
        dout: &[Vec<f32>; 2],
        grad: &AllInOne,
    ) -> (Vec<f32>, [Vec<f32>; 2]) {
        let made = self.made();
        let (tokens, width) = (self.shape.tokens, self.shape.width());
        let mut dgates = vec![0.0; gates.len()];
        let mut dtarget = [0, 1].map(|_| vec![0.0; gates.len()]);
        let mut dprojected = [0, 1].map(|_| vec![0.0; gates.len()]);
        let mut dweights = [0, 1].map(|_| vec![0.0; gates.len()]);
        for half in [0, 1] {
            for i in 0..gates.len() {
                let (d, t, p) = (dout[half][i], self.target[half][i], made.projected[half][i]);
                let weight = sigmoid(made.weights[half][i] / self.p.temperature);
                let own = match self.p.self_term {
                    SelfTerm::Kept => (0.0, 0.0),
                    SelfTerm::Remainder => (-t, -weight),
                    SelfTerm::Dropped => (0.0, -1.0),
                };
                dgates[i] += d * weight * p;
                dprojected[half][i] += d * gates[i] * weight;
                dtarget[half][i] += d * own.1;
                let dweight = d * (gates[i] * p + own.0);
                dweights[half][i] = dweight * weight * (1.0 - weight) / self.p.temperature;
            }
        }
        for half in [0, 1] {
            let (factor, grad) = (&self.p.weights[half], &grad.weights[half]);
            self.factor_backward(
                factor,
                grad,
                &made.projected,
                &dweights[half],
                &mut dtarget,
                &mut dprojected,
            );
        }
        for half in [0, 1] {
            let mut d = std::mem::take(&mut dprojected[half]);
            if let (Some(combiners), Some(grads), Some(joined)) =
                (&self.p.combiners, &grad.combiners, &made.joined)
            {
                let djoined =
                    linear_back(self.rows, &combiners[half], &grads[half], tokens, &joined[half], &d);
                for (token, row) in djoined.chunks_exact(2 * width).enumerate() {
                    let at = token * width..(token + 1) * width;
                    d[at.clone()].copy_from_slice(&row[..width]);
                    dtarget[half][at].iter_mut().zip(&row[width..]).for_each(|(d, x)| *d += x);
                }
            }
            let (mlp, grad) = (&self.p.projections[half], &grad.projections[half]);
            self.mlp_backward(mlp, grad, tokens, &self.source[half], &made.traces[half], d, (half as u32, 0));
        }
        (dgates, dtarget)
    }

    fn factor_backward(
        &mut self,
        factor: &Factor,
        grad: &Factor,
        projected: &[Vec<f32>; 2],
        d: &[f32],
        dtarget: &mut [Vec<f32>; 2],
        dprojected: &mut [Vec<f32>; 2],
    ) {
        match (factor, grad) {
            (Factor::Table(_, granularity), Factor::Table(grad, _)) => {
                let grad = grad.host_mut::<f32>();
                self.places(*granularity).zip(d).for_each(|(place, d)| grad[place] += d);
            }
            (
                Factor::Network { mlp, head, granularity, features },
                Factor::Network { mlp: mlp_grad, head: head_grad, .. },
            ) => {
                let (x, count) = self.features(*features, *granularity, projected);
                let mut traces = Vec::new();
                let y = self.run(mlp, count, &x, 0, WEIGHTS, Some(&mut traces));
                let wide = head.as_ref().map_or(mlp.output.rows(), Weight::rows);
                let mut dy = vec![0.0; count * wide];
                self.places(*granularity).zip(d).for_each(|(place, d)| dy[place] += d);
                if let (Some(head), Some(grad)) = (head, head_grad) {
                    dy = linear_back(self.rows, head, grad, count, &y, &dy);
                }
                let dx = self.mlp_backward(mlp, mlp_grad, count, &x, &traces, dy, (0, WEIGHTS));
                let Shape { tokens, heads, dim } = self.shape;
                let parts = which(*features);
                for column in 0..tokens * heads {
                    for (number, &part) in parts.iter().enumerate() {
                        let all = if part < 2 { &mut dtarget[part] } else { &mut dprojected[part - 2] };
                        let to = &mut all[column * dim..(column + 1) * dim];
                        let (from, scale) = match granularity {
                            Granularity::Scalar => (number * dim, 1.0 / (tokens * heads) as f32),
                            _ => ((column * parts.len() + number) * dim, 1.0),
                        };
                        to.iter_mut().zip(&dx[from..from + dim]).for_each(|(to, d)| *to += scale * d);
                    }
                }
            }
            _ => unreachable!("gradients have the form of what they are of"),
        }
    }

    /// `d`: gradient of the output; returns that of the input.
    #[allow(clippy::too_many_arguments)]
    fn mlp_backward(
        &mut self,
        mlp: &Mlp,
        grad: &Mlp,
        count: usize,
        x: &[f32],
        traces: &[Trace],
        d: Vec<f32>,
        (half, block): (u32, u32),
    ) -> Vec<f32> {
        let dropout = self.dropout.unwrap_or(NO_DROPOUT);
        let last = match (mlp.hidden.last(), traces.last()) {
            (Some(layer), Some(trace)) => {
                let mut out = trace.normed.clone();
                activate(self.rows, layer.nonlinearity, &mut out);
                dropout.apply(half, block + mlp.hidden.len() as u32 - 1, &mut out);
                out
            }
            _ => x.to_vec(),
        };
        let mut dh = linear_back(self.rows, &mlp.output, &grad.output, count, &last, &d);
        for (number, ((layer, grad), trace)) in
            mlp.hidden.iter().zip(&grad.hidden).zip(traces).enumerate().rev()
        {
            dropout.apply(half, block + number as u32, &mut dh);
            for (d, &x) in dh.iter_mut().zip(&trace.normed) {
                *d *= match layer.nonlinearity {
                    None => 1.0,
                    Some(Nonlinearity::Gelu) => slope(Activation::GeluErf, x),
                    Some(Nonlinearity::Silu) => slope(Activation::Silu, x),
                    Some(Nonlinearity::Relu) => f32::from(x > 0.0),
                };
            }
            if let (Some(norm), Some(grads)) = (&layer.norm, &grad.norm) {
                norm_backward(&norm[0], grads, &trace.gated, &mut dh);
            }
            if layer.nonlinearity.is_none() {
                let width = layer.linear.rows() / 2;
                let rows = trace.linear.chunks_exact(2 * width).zip(dh.chunks_exact(width));
                dh = rows
                    .flat_map(|(row, d)| {
                        let (gate, up) = row.split_at(width);
                        let dgate = (0..width).map(move |i| d[i] * up[i] * slope(Activation::Silu, gate[i]));
                        dgate.chain((0..width).map(move |i| d[i] * gate[i] * sigmoid(gate[i])))
                    })
                    .collect();
            }
            dh = linear_back(self.rows, &layer.linear, &grad.linear, count, &trace.input, &dh);
        }
        if mlp.residual {
            dh.iter_mut().zip(&d).for_each(|(dh, d)| *dh += d);
        }
        dh
    }
}

/// Of target keys, target values, projected keys, projected values: those that are features.
fn which(features: Features) -> &'static [usize] {
    match features {
        Features::TargetKey => &[0],
        Features::TargetValue => &[1],
        Features::Both => &[0, 1],
        Features::TargetProjectedKey => &[0, 2],
        Features::TargetProjectedValue => &[1, 3],
        Features::TargetProjectedBoth => &[0, 1, 2, 3],
    }
}

/// Mean and reciprocal deviation.
fn moments(row: &[f32]) -> (f32, f32) {
    let n = row.len() as f32;
    let mean = row.iter().sum::<f32>() / n;
    let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / n;
    (mean, 1.0 / (variance + NORM_EPS).sqrt())
}

/// `d`: gradient of the normalised rows in, of `x` out.
fn norm_backward(weight: &Tensor, [dweight, dbias]: &[Tensor; 2], x: &[f32], d: &mut [f32]) {
    let weight = vector(weight);
    let (dweight, dbias) = (dweight.host_mut::<f32>(), dbias.host_mut::<f32>());
    let n = weight.len() as f32;
    for (x, d) in x.chunks_exact(weight.len()).zip(d.chunks_exact_mut(weight.len())) {
        let (mean, scale) = moments(x);
        let (mut sum, mut product) = (0.0, 0.0);
        for (i, d) in d.iter_mut().enumerate() {
            let normal = (x[i] - mean) * scale;
            dweight[i] += *d * normal;
            dbias[i] += *d;
            *d *= weight[i];
            sum += *d;
            product += *d * normal;
        }
        for (d, x) in d.iter_mut().zip(x) {
            *d = scale * (*d - sum / n - (x - mean) * scale * product / n);
        }
    }
}

fn activate(rows: &mut Rows, nonlinearity: Option<Nonlinearity>, x: &mut [f32]) {
    match nonlinearity {
        None => {}
        Some(Nonlinearity::Gelu) => gelu(rows, x),
        Some(Nonlinearity::Silu) => x.iter_mut().for_each(|x| *x *= sigmoid(*x)),
        Some(Nonlinearity::Relu) => x.iter_mut().for_each(|x| *x = x.max(0.0)),
    }
}

fn gelu(rows: &mut Rows, x: &mut [f32]) {
    of(rows, x.len()).gelu(1, x);
}

/// The same worker on another number of rows.
fn of<'a>(rows: &'a mut Rows, tokens: usize) -> Rows<'a> {
    Rows { team: &mut *rows.team, simd: rows.simd, precision: rows.precision, tokens }
}

fn linear(rows: &mut Rows, weight: &Weight, count: usize, x: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; count * weight.rows()];
    of(rows, count).matmul(weight, false, x, &mut y);
    y
}

fn linear_back(
    rows: &mut Rows,
    weight: &Weight,
    grad: &Weight,
    count: usize,
    x: &[f32],
    dy: &[f32],
) -> Vec<f32> {
    let p = LinearBackwardParams { tokens: count as u32, precision: rows.precision, accumulate: false };
    linear_backward::weight(rows.team, rows.simd, p, dy, x, grad);
    let mut dx = vec![0.0; count * weight.cols()];
    linear_backward::input(rows.team, rows.simd, p, dy, weight, &mut dx);
    dx
}
