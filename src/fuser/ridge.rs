//! Closed-form linear maps from sharer to receiver columns: sums over a data set, then one linear system a layer and half.
//! No gradient. Formulae in docs/math.md ("Ridge map"); idea: arXiv 2608.03893.

use super::{Fuser, FuserConfig, FuserError, Kind, Positions};
use crate::{
    backend::{Backend, DType, Queue},
    cache::{KeyForm, KvColumns},
};
use std::sync::Arc;

/// What the columns of a data set say about the maps of a fuser, in f64.
pub struct RidgeFit {
    config: FuserConfig,
    /// By projector, of keys and values.
    moments: Vec<[Moments; 2]>,
}

/// Sums over pairs of rows *x* and *y*.
#[derive(Clone)]
struct Moments {
    count: f64,
    x: Vec<f64>,
    y: Vec<f64>,
    /// `[inputs, inputs]`, of which the lower triangle is kept.
    xx: Vec<f64>,
    /// `[inputs, outputs]`
    xy: Vec<f64>,
    /// Of all outputs.
    yy: f64,
}

/// A map with what it was solved from.
struct Solution {
    /// `[outputs, inputs]` and `[outputs]`.
    weight: Vec<f32>,
    bias: Vec<f32>,
    /// Part of the outputs' variance that the map explains.
    explained: f64,
}

impl RidgeFit {
    /// Nothing seen yet. `config` is of kind ridge.
    pub fn new(config: FuserConfig) -> Result<RidgeFit, FuserError> {
        config.validate()?;
        if config.kind != Kind::Ridge {
            let problem = format!("is {}: only a ridge map is solved for", config.kind);
            return Err(FuserError::Config { field: "kind", problem });
        }
        let moments = Moments::new(config.sharer.width(), config.receiver.width());
        let moments = vec![[moments.clone(), moments]; config.projectors()];
        Ok(RidgeFit { config: FuserConfig { dtype: DType::F32, ..config }, moments })
    }

    pub fn config(&self) -> &FuserConfig {
        &self.config
    }

    /// Adds pairs of columns of route number `route`, as they lie in the caches: `[tokens, kv_heads, head_dim]`.
    ///
    /// # Panics
    /// If there is no such route, or not a position and a target column for each source column.
    pub fn add(&mut self, route: usize, mut source: KvColumns, mut target: KvColumns, positions: Positions) {
        let (config, route) = (&self.config, self.config.routes[route]);
        let tokens = positions.source.len();
        assert_eq!(source.keys.len(), tokens * config.sharer.width(), "a position for each sharer column");
        assert_eq!(
            target.keys.len(),
            positions.target.len() * config.receiver.width(),
            "and receiver column"
        );
        if let Some(rotations) = &config.rotations {
            let (theirs, ours) = (config.sharer.head_dim, config.receiver.head_dim);
            strip(
                &mut source.keys,
                config.sharer.width(),
                theirs,
                &rotations.sharer,
                route.sharer,
                positions.source,
            );
            strip(
                &mut target.keys,
                config.receiver.width(),
                ours,
                &rotations.receiver,
                route.receiver,
                positions.target,
            );
        }
        let [keys, values] = &mut self.moments[route.projector];
        keys.add(&source.keys, &target.keys);
        values.add(&source.values, &target.values);
    }

    /// The maps that minimise `Σ |W·x + b − y|² + λ·s·|W|²`, where *s* is the mean of the inputs' summed squares about their
    /// mean; and by projector the part of the variance of keys and values that they explain.
    ///
    /// # Errors
    /// If columns are too few, or λ too small for what they leave undetermined.
    pub fn solve(
        &self,
        lambda: f64,
        backend: &Arc<dyn Backend>,
    ) -> Result<(Fuser, Vec<[f64; 2]>), FuserError> {
        let fuser = Fuser::init(self.config.clone(), 0, backend)?;
        let queue = Queue::new(backend)?;
        let mut explained = Vec::new();
        for (projector, moments) in fuser.projectors().iter().zip(&self.moments) {
            let mut both = [0.0; 2];
            for ((half, moments), explained) in ["key", "value"].into_iter().zip(moments).zip(&mut both) {
                let solution = moments.solve(lambda).map_err(|problem| FuserError::Ridge { problem })?;
                queue.upload(&solution.weight, &projector.tensors()[&format!("{half}_map.weight")]);
                queue.upload(&solution.bias, &projector.tensors()[&format!("{half}_map.bias")]);
                *explained = solution.explained;
            }
            explained.push(both);
        }
        queue.synchronize()?;
        Ok((fuser, explained))
    }
}

/// Takes the rotation out of keys, rows of `width`.
fn strip(keys: &mut [f32], width: usize, dim: usize, form: &KeyForm, layer: usize, positions: &[u32]) {
    let Some(rotation) = form.rotation(layer) else { return };
    for (row, &position) in keys.chunks_exact_mut(width).zip(positions) {
        row.chunks_exact_mut(dim).for_each(|head| rotation.undo(head, position));
    }
}

impl Moments {
    fn new(inputs: usize, outputs: usize) -> Moments {
        let zeros = |len: usize| vec![0.0; len];
        Moments {
            count: 0.0,
            x: zeros(inputs),
            y: zeros(outputs),
            xx: zeros(inputs * inputs),
            xy: zeros(inputs * outputs),
            yy: 0.0,
        }
    }

    fn add(&mut self, x: &[f32], y: &[f32]) {
        let (inputs, outputs) = (self.x.len(), self.y.len());
        for (x, y) in x.chunks_exact(inputs).zip(y.chunks_exact(outputs)) {
            self.count += 1.0;
            for (i, &xi) in x.iter().enumerate() {
                let xi = f64::from(xi);
                self.x[i] += xi;
                add_scaled(&mut self.xx[i * inputs..=i * inputs + i], xi, x);
                add_scaled(&mut self.xy[i * outputs..(i + 1) * outputs], xi, y);
            }
            for (sum, &yi) in self.y.iter_mut().zip(y) {
                *sum += f64::from(yi);
                self.yy += f64::from(yi) * f64::from(yi);
            }
        }
    }

    fn solve(&self, lambda: f64) -> Result<Solution, String> {
        let (inputs, outputs, n) = (self.x.len(), self.y.len(), self.count);
        if n < 2.0 {
            return Err(format!("has seen {n} pairs of columns: give it data"));
        }
        // About the means, so that the bias is not shrunk.
        let mut matrix = self.xx.clone();
        let mut right = self.xy.clone();
        for i in 0..inputs {
            for j in 0..=i {
                matrix[i * inputs + j] -= self.x[i] * self.x[j] / n;
            }
            for j in 0..outputs {
                right[i * outputs + j] -= self.x[i] * self.y[j] / n;
            }
        }
        let spread = right.clone();
        let mean = (0..inputs).map(|i| matrix[i * inputs + i]).sum::<f64>() / inputs as f64;
        let ridge = lambda * mean;
        for i in 0..inputs {
            matrix[i * inputs + i] += ridge;
        }
        cholesky(&mut matrix, inputs).ok_or_else(|| {
            format!("is not determined by {n} pairs of columns of {inputs} elements with λ = {lambda}: raise λ or give it more data")
        })?;
        substitute(&matrix, inputs, &mut right, outputs);
        let total = self.yy - self.y.iter().map(|y| y * y / n).sum::<f64>();
        // |Wx − y|² about the means is total − 2·tr(WᵀD) + tr(WᵀCW), and (C + ridge)·W = D.
        let (mut product, mut norm) = (0.0, 0.0);
        for (w, d) in right.iter().zip(&spread) {
            product += w * d;
            norm += w * w;
        }
        let mut weight = vec![0.0; outputs * inputs];
        let mut bias: Vec<f64> = self.y.iter().map(|y| y / n).collect();
        for i in 0..inputs {
            for j in 0..outputs {
                let w = right[i * outputs + j];
                weight[j * inputs + i] = w as f32;
                bias[j] -= w * self.x[i] / n;
            }
        }
        let explained = if total > 0.0 { (product + ridge * norm) / total } else { 1.0 };
        Ok(Solution { weight, bias: bias.into_iter().map(|b| b as f32).collect(), explained })
    }
}

/// `sums += factor · x`
fn add_scaled(sums: &mut [f64], factor: f64, x: &[f32]) {
    sums.iter_mut().zip(x).for_each(|(sum, &x)| *sum += factor * f64::from(x));
}

/// The lower triangle of a symmetric matrix into that of its Cholesky factor; `None` if it is not positive definite.
fn cholesky(a: &mut [f64], n: usize) -> Option<()> {
    let largest = (0..n).map(|i| a[i * n + i]).fold(0.0, f64::max);
    for i in 0..n {
        for j in 0..=i {
            let (above, row) = a.split_at(i * n);
            let other = if j < i { &above[j * n..j * n + j] } else { &row[..j] };
            let sum = a[i * n + j] - row[..j].iter().zip(other).map(|(x, y)| x * y).sum::<f64>();
            if j < i {
                a[i * n + j] = sum / a[j * n + j];
            } else if sum > largest * 1e-14 {
                a[i * n + i] = sum.sqrt();
            } else {
                return None;
            }
        }
    }
    Some(())
}

/// `right`, `[n, cols]`, into the solution of `L · Lᵀ · W = right`.
fn substitute(l: &[f64], n: usize, right: &mut [f64], cols: usize) {
    let subtract = |right: &mut [f64], row: usize, other: usize, factor: f64| {
        let (low, high) = right.split_at_mut(row.max(other) * cols);
        let (to, from) = match row > other {
            true => (&mut high[..cols], &low[other * cols..][..cols]),
            false => (&mut low[row * cols..][..cols], &high[..cols]),
        };
        to.iter_mut().zip(from).for_each(|(to, from)| *to -= factor * from);
    };
    let divide = |right: &mut [f64], row: usize| {
        right[row * cols..][..cols].iter_mut().for_each(|x| *x /= l[row * n + row]);
    };
    for i in 0..n {
        (0..i).for_each(|j| subtract(right, i, j, l[i * n + j]));
        divide(right, i);
    }
    for i in (0..n).rev() {
        (i + 1..n).for_each(|j| subtract(right, i, j, l[j * n + i]));
        divide(right, i);
    }
}
