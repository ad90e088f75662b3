//! What is trained, as one long vector: weights, gradient, moments. Tensors are views of it.

use super::{Error, config::Decay};
use crate::{
    backend::{DType, Queue, Tensor},
    ops::{self, AdamwParams},
};
use std::ops::Range;

/// Tensors begin at multiples of a cache line.
const ALIGN: usize = 16;

/// Trainable tensors, F32. Gradients are added up in `grad` until [`Parameters::update`] takes them.
pub struct Parameters {
    entries: Vec<Entry>,
    /// Elements at the front that decay: the rest are norms and biases, where those are spared.
    decaying: usize,
    /// F32`[len]` each.
    weights: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    /// F32`[1]`
    sum: Tensor,
}

/// One tensor.
pub struct Entry {
    pub name: String,
    pub shape: Vec<usize>,
    range: Range<usize>,
}

/// Which of the four vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    Weights,
    Grad,
    /// AdamW's first and second moment.
    M,
    V,
}

/// AdamW's numbers that stay the same from update to update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adamw {
    pub betas: [f32; 2],
    pub eps: f32,
    pub weight_decay: f32,
}

impl Adamw {
    /// At update `step`, counted from 1.
    pub fn at(&self, step: u64, learning_rate: f32, grad_scale: f32, len: usize) -> AdamwParams {
        let correction = |beta: f32| (1.0 - f64::from(beta).powf(step as f64)) as f32;
        AdamwParams {
            len: len as u32,
            learning_rate,
            beta1: self.betas[0],
            beta2: self.betas[1],
            eps: self.eps,
            weight_decay: self.weight_decay,
            correction1: correction(self.betas[0]),
            correction2: correction(self.betas[1]),
            grad_scale,
        }
    }
}

impl Parameters {
    /// Zeros, for tensors of these names and shapes.
    pub fn new(queue: &Queue, tensors: Vec<(String, Vec<usize>)>, decay: Decay) -> Result<Parameters, Error> {
        let mut len = 0;
        let mut entries: Vec<Entry> =
            tensors.into_iter().map(|(name, shape)| Entry { name, shape, range: 0..0 }).collect();
        let decays = |entry: &Entry| decay == Decay::All || entry.shape.len() > 1;
        let mut place = |wanted: bool| {
            for entry in entries.iter_mut().filter(|entry| decays(entry) == wanted) {
                let elements: usize = entry.shape.iter().product();
                entry.range = len..len + elements;
                len += elements.next_multiple_of(ALIGN);
            }
            len
        };
        let decaying = place(true);
        let len = place(false);
        if u32::try_from(len).is_err() {
            return Err(Error::TooManyParameters { parameters: len });
        }
        // A GPU's memory holds whatever was there before.
        let zeros = |what: &str| -> Result<Tensor, Error> {
            let tensor = queue.backend().alloc(DType::F32, &[len], what)?;
            ops::zero(queue, &tensor)?;
            Ok(tensor)
        };
        Ok(Parameters {
            entries,
            decaying,
            weights: zeros("trained weights")?,
            grad: zeros("gradients")?,
            m: zeros("first moments")?,
            v: zeros("second moments")?,
            sum: queue.backend().alloc(DType::F32, &[1], "gradient norm")?,
        })
    }

    /// Bytes a parameter takes on the device.
    pub const BYTES: usize = 16;

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Number of trained elements.
    pub fn count(&self) -> usize {
        self.entries.iter().map(|entry| entry.range.len()).sum()
    }

    fn vector(&self, kept: Kept) -> &Tensor {
        match kept {
            Kept::Weights => &self.weights,
            Kept::Grad => &self.grad,
            Kept::M => &self.m,
            Kept::V => &self.v,
        }
    }

    /// Tensor number `index` of `kept`, sharing the memory.
    ///
    /// # Panics
    /// If there is no such tensor.
    pub fn view(&self, kept: Kept, index: usize) -> Tensor {
        let Entry { shape, range, .. } = &self.entries[index];
        let flat = self.vector(kept).narrow(range.start, range.len()).expect("entries lie in the vector");
        flat.reshape(shape).expect("as many elements as the shape has")
    }

    /// Copies `from`, of any dtype, into the weights of tensor `index`.
    pub fn set(&self, queue: &Queue, index: usize, from: &Tensor) -> Result<(), Error> {
        let view = self.view(Kept::Weights, index);
        let (rows, cols) = (view.rows(), view.row_len());
        let ids: Vec<u32> = (0..rows as u32).collect();
        let ids = queue.tensor(&ids, &[rows], "row numbers")?;
        let as_rows = |tensor: &Tensor| tensor.reshape(&[rows, cols]);
        if let (Some(from), Some(view)) = (as_rows(from), as_rows(&view)) {
            ops::embed(queue, &ids, &from, 1.0, &view)?;
        }
        Ok(())
    }

    /// All gradients, F32`[len]`.
    pub fn gradients(&self) -> &Tensor {
        &self.grad
    }

    /// `Σ g²` over all gradients.
    pub fn grad_squares(&self, queue: &Queue) -> Result<f64, Error> {
        ops::sum_of_squares(queue, &self.grad, &self.sum)?;
        Ok(f64::from(queue.download_f32(&self.sum)?[0]))
    }

    /// One update, after which gradients are 0.
    pub fn update(&self, queue: &Queue, adamw: &Adamw, step: u64, lr: f32, scale: f32) -> Result<(), Error> {
        let total = self.weights.elements();
        for (range, weight_decay) in [(0..self.decaying, adamw.weight_decay), (self.decaying..total, 0.0)] {
            if range.is_empty() {
                continue;
            }
            let p = AdamwParams { weight_decay, ..adamw.at(step, lr, scale, range.len()) };
            let part = |tensor: &Tensor| tensor.narrow(range.start, range.len()).expect("inside the vector");
            let [weights, grad, m, v] = [&self.weights, &self.grad, &self.m, &self.v].map(part);
            ops::adamw(queue, p, &weights, &grad, &m, &v)?;
        }
        Ok(())
    }
}
