//! Updates in standardised coordinates: as if every channel of the columns that a fuser reads had mean 0 and deviation 1.
//!
//! What tells one question from another is small beside what all columns share: keys of Qwen2.5 have channels whose mean is a hundred
//! times their deviation. A map `y = W·x + b` of such inputs is `W'·(x − μ)/σ + b'` with `W' = W·diag(σ)` and `b' = b + W·μ`. AdamW moves
//! every element of what it is given by about the learning rate, so it is given `W'` and `b'`; everything else, checkpoints included,
//! has `W` and `b` (docs/math.md, "Standardised inputs").

use super::{Error, Kept, Parameters};
use crate::{
    backend::{Queue, Tensor},
    fuser::{FuserConfig, Kind},
};

/// Samples whose columns are looked at, evenly spaced over the data.
pub const SAMPLES: usize = 256;

/// Of a channel's mean: less is as good as constant, and dividing by it would put numbers into the exported bf16 weights that cancel.
const LEAST: f64 = 1.0 / 32.0;

/// Sums over the rows of some channels.
#[derive(Clone, Debug, Default)]
pub struct Channels {
    rows: u64,
    sums: Vec<f64>,
    /// About the first row, which keeps the digits that a large mean would take.
    squares: Vec<f64>,
    first: Vec<f32>,
}

impl Channels {
    /// Of `width` channels, nothing seen yet.
    pub fn new(width: usize) -> Channels {
        Channels { rows: 0, sums: vec![0.0; width], squares: vec![0.0; width], first: vec![0.0; width] }
    }

    /// # Panics
    /// If `rows` are not whole ones.
    pub fn add(&mut self, rows: &[f32]) {
        let width = self.sums.len();
        assert!(rows.len().is_multiple_of(width), "rows of {width} channels");
        for row in rows.chunks_exact(width) {
            if self.rows == 0 {
                self.first.copy_from_slice(row);
            }
            self.rows += 1;
            let sums = self.sums.iter_mut().zip(&mut self.squares);
            for ((x, first), (sum, squares)) in row.iter().zip(&self.first).zip(sums) {
                let x = f64::from(*x) - f64::from(*first);
                *sum += x;
                *squares += x * x;
            }
        }
    }

    /// Mean and deviation of each channel; of nothing, 0 and 1.
    fn moments(&self) -> impl Iterator<Item = (f32, f32)> {
        let n = self.rows as f64;
        let sums = self.sums.iter().zip(&self.squares).zip(&self.first);
        sums.map(move |((sum, squares), first)| {
            if n == 0.0 {
                return (0.0, 1.0);
            }
            let mean = f64::from(*first) + sum / n;
            let variance = (squares / n - (sum / n).powi(2)).max(0.0);
            let deviation = variance.sqrt().max(LEAST * mean.abs());
            (mean as f32, if deviation > 1e-12 { deviation as f32 } else { 1.0 })
        })
    }
}

/// What a projector's inputs are: keys and values of the sharer, keys and values of the receiver.
pub type Inputs = [Channels; 4];

/// Nothing seen yet, by projector.
pub fn inputs(config: &FuserConfig) -> Vec<Inputs> {
    let (source, target) = (Channels::new(config.sharer.width()), Channels::new(config.receiver.width()));
    vec![[source.clone(), source, target.clone(), target]; config.projectors()]
}

/// A map whose inputs are columns, with its gradients, and the moments of each input.
pub struct InputMap {
    /// F32`[rows, cols]`, F32`[rows]`
    weight: Tensor,
    bias: Tensor,
    weight_grad: Tensor,
    bias_grad: Tensor,
    /// `[cols]`
    mean: Vec<f32>,
    deviation: Vec<f32>,
}

impl InputMap {
    /// All maps of a fuser that read columns.
    ///
    /// # Errors
    /// If its kind has none that could be trained so.
    pub fn all(
        config: &FuserConfig,
        parameters: &Parameters,
        inputs: &[Inputs],
    ) -> Result<Vec<InputMap>, Error> {
        if config.kind.is_baseline() {
            return Err(Error::Standardize { kind: config.kind });
        }
        let mut maps = Vec::new();
        for (number, inputs) in inputs.iter().enumerate() {
            for (name, inputs) in reading(config, inputs) {
                let tensor = |kept: Kept, what: &str| {
                    let name = format!("projector_{number}.{name}.{what}");
                    let index = parameters.entries().iter().position(|entry| entry.name == name);
                    parameters.view(kept, index.expect("the kinds that read columns have this map"))
                };
                let (mean, deviation) = inputs.iter().flat_map(Channels::moments).unzip();
                maps.push(InputMap {
                    weight: tensor(Kept::Weights, "weight"),
                    bias: tensor(Kept::Weights, "bias"),
                    weight_grad: tensor(Kept::Grad, "weight"),
                    bias_grad: tensor(Kept::Grad, "bias"),
                    mean,
                    deviation,
                });
            }
        }
        Ok(maps)
    }

    /// From `W`, `b` to `W'`, `b'`.
    pub fn enter(&self, queue: &Queue) -> Result<(), Error> {
        self.change(queue, [&self.weight, &self.bias], |x, bias, mean, deviation| {
            *bias += f64::from(*x) * f64::from(mean);
            *x *= deviation;
        })
    }

    /// From `W'`, `b'` to `W`, `b`.
    pub fn leave(&self, queue: &Queue) -> Result<(), Error> {
        self.change(queue, [&self.weight, &self.bias], |x, bias, mean, deviation| {
            *x /= deviation;
            *bias -= f64::from(*x) * f64::from(mean);
        })
    }

    /// Gradients by `W` and `b` to those by `W'` and `b'`: `(dW − db·μᵀ)·diag(1/σ)` and `db`.
    pub fn gradients(&self, queue: &Queue) -> Result<(), Error> {
        self.change(queue, [&self.weight_grad, &self.bias_grad], |x, bias, mean, deviation| {
            *x = ((f64::from(*x) - *bias * f64::from(mean)) / f64::from(deviation)) as f32;
        })
    }

    /// Calls `change(element, its row's bias, mean, deviation)` for every element. These maps are a small part of a fuser, and the host does it
    /// on every device.
    fn change(
        &self,
        queue: &Queue,
        [weight, bias]: [&Tensor; 2],
        change: impl Fn(&mut f32, &mut f64, f32, f32),
    ) -> Result<(), Error> {
        let (mut rows, mut biases) = (queue.download_f32(weight)?, queue.download_f32(bias)?);
        for (row, bias) in rows.chunks_exact_mut(self.mean.len()).zip(&mut biases) {
            let mut wide = f64::from(*bias);
            for ((x, mean), deviation) in row.iter_mut().zip(&self.mean).zip(&self.deviation) {
                change(x, &mut wide, *mean, *deviation);
            }
            *bias = wide as f32;
        }
        queue.upload(&rows, weight);
        queue.upload(&biases, bias);
        Ok(())
    }
}

/// The maps of a projector that read columns, and what each reads, in order.
fn reading(config: &FuserConfig, inputs: &Inputs) -> Vec<(String, Vec<Channels>)> {
    if config.kind == Kind::Latent {
        return vec![("latent_in".into(), inputs.to_vec())];
    }
    let mut maps = Vec::new();
    for (half, name) in ["key", "value"].into_iter().enumerate() {
        let (source, target) = (inputs[half].clone(), inputs[2 + half].clone());
        let mut read = vec![source];
        if config.kind.has_source_stage() {
            maps.push((format!("{name}_source_in"), read));
            // What the stage makes of the sharer's columns.
            read = vec![Channels::new(config.receiver.width())];
        }
        if config.kind.has_target() {
            read.push(target);
        }
        maps.push((format!("{name}_in"), read));
    }
    maps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::{self, DeviceChoice},
        fuser::{Mapping, Party},
        train::config::Decay,
    };

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        crate::rng::normal(9, seed, n)
    }

    #[test]
    fn a_map_and_its_gradient_are_those_of_standardised_inputs() {
        let backend = backend::open(DeviceChoice::Cpu, 1).unwrap();
        let queue = Queue::new(&backend).unwrap();
        let party = Party::new(1, 1, 2);
        let config = FuserConfig::new(Kind::C2c, 3, 3, Mapping::Custom, &[0], party.clone(), party);
        let (rows, cols, tokens) = (3, 4, 6);
        let names = ["key_in", "value_in"].iter().flat_map(|name| {
            [
                (format!("projector_0.{name}.weight"), vec![rows, cols]),
                (format!("projector_0.{name}.bias"), vec![rows]),
            ]
        });
        let parameters = Parameters::new(&queue, names.collect(), Decay::All).unwrap();
        for index in 0..4 {
            let view = parameters.view(Kept::Weights, index);
            queue.upload(&numbers(view.elements(), index as u32), &view);
        }
        // A large mean beside a small deviation; keys' channels are the first two of each side.
        let x: Vec<f32> = numbers(tokens * cols, 7)
            .iter()
            .enumerate()
            .map(|(i, x)| [10.0, -1.0, 0.5, 60.0][i % cols] + [0.5, 0.1, 1.0, 4.0][i % cols] * x)
            .collect();
        let mut seen = inputs(&config);
        for row in x.chunks(cols) {
            seen[0][0].add(&row[..2]);
            seen[0][2].add(&row[2..]);
        }
        let maps = InputMap::all(&config, &parameters, &seen).unwrap();
        let map = &maps[0];
        let read = |kept: Kept, index: usize| queue.download_f32(&parameters.view(kept, index)).unwrap();
        let product = |w: &[f32], b: &[f32], x: &[f32]| -> Vec<f64> {
            let row = |r: usize| -> f64 {
                let terms = w[r * cols..][..cols].iter().zip(x);
                f64::from(b[r]) + terms.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>()
            };
            (0..rows).map(row).collect()
        };
        let standard: Vec<f32> =
            x.iter().enumerate().map(|(i, x)| (x - map.mean[i % cols]) / map.deviation[i % cols]).collect();
        for c in 0..cols {
            let column: Vec<f32> = standard.iter().skip(c).step_by(cols).copied().collect();
            let mean = column.iter().sum::<f32>() / tokens as f32;
            let square = column.iter().map(|x| x * x).sum::<f32>() / tokens as f32;
            assert!(mean.abs() < 1e-3 && (square - 1.0).abs() < 1e-3, "channel {c}: {mean}, {square}");
        }
        let plain: Vec<f64> = x
            .chunks(cols)
            .flat_map(|x| product(&read(Kept::Weights, 0), &read(Kept::Weights, 1), x))
            .collect();

        // Gradients of Σ y·g by W and b.
        let g = numbers(tokens * rows, 11);
        let gradient = |x: &[f32]| -> (Vec<f32>, Vec<f32>) {
            let (mut dw, mut db) = (vec![0.0; rows * cols], vec![0.0; rows]);
            for (x, g) in x.chunks(cols).zip(g.chunks(rows)) {
                for r in 0..rows {
                    db[r] += g[r];
                    (0..cols).for_each(|c| dw[r * cols + c] += g[r] * x[c]);
                }
            }
            (dw, db)
        };
        let (dw, db) = gradient(&x);
        queue.upload(&dw, &parameters.view(Kept::Grad, 0));
        queue.upload(&db, &parameters.view(Kept::Grad, 1));
        map.gradients(&queue).unwrap();
        let (expected, _) = gradient(&standard);
        for (found, expected) in read(Kept::Grad, 0).iter().zip(&expected) {
            assert!((found - expected).abs() < 2e-2, "{found} is not {expected}");
        }
        assert_eq!(read(Kept::Grad, 1), db);

        let before = read(Kept::Weights, 0);
        map.enter(&queue).unwrap();
        let primed: Vec<f64> = standard
            .chunks(cols)
            .flat_map(|x| product(&read(Kept::Weights, 0), &read(Kept::Weights, 1), x))
            .collect();
        for (found, expected) in primed.iter().zip(&plain) {
            assert!((found - expected).abs() < 1e-3 * expected.abs().max(1.0), "{found} is not {expected}");
        }
        map.leave(&queue).unwrap();
        for (found, expected) in read(Kept::Weights, 0).iter().zip(&before) {
            assert!((found - expected).abs() < 1e-5, "{found} is not {expected}");
        }
    }

    #[test]
    fn a_constant_channel_stays_small() {
        let mut channels = Channels::new(2);
        (0..10).for_each(|i| channels.add(&[256.0, i as f32]));
        let moments: Vec<(f32, f32)> = channels.moments().collect();
        assert_eq!(moments[0], (256.0, 8.0));
        assert!((moments[1].1 - 8.25f32.sqrt()).abs() < 1e-5);
        assert_eq!(Channels::new(1).moments().next(), Some((0.0, 1.0)));
    }
}
