//! What the fuser does to one prompt, for people who want to look: which gates are open, and the weight of each token
//! and head in each layer.
//!
//! The fused cache does not tell: in it, weights are multiplied into the projections and added. They are worked out again,
//! from the columns that the fuser reads, by the op itself: a projector whose last map is zero with biases of one projects
//! one everywhere, so that on a base of zeros with an open gate the op leaves `0 + 1 · w · 1` (docs/math.md, "The fuser").

use super::{Error, Link, Prompt, SharerPrompt, WantedLogits};
use crate::{
    align::Section,
    backend::{DType, Queue, Tensor},
    cache::KvColumns,
    fuser::{Body, Fuser, FusionMode, Gates},
    ops::{self, FuseLayer, FuseOperands, FuseParams, KvPages, Projector, Weight},
};
use half::{bf16, f16};
use serde::Serialize;
use std::sync::Arc;

/// Tokens a call: bounds the fuser's scratch.
const MAX_TOKENS: usize = 512;

/// What one sharer's fuser does to one prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Observation {
    /// The receiver's tokens that take a column, in order: `[tokens]`.
    pub tokens: Vec<u32>,
    /// The sharer's columns that they take: `[tokens]`.
    pub columns: Vec<u32>,
    pub kv_heads: usize,
    /// Of keys and values of each receiver layer: 0 is closed.
    pub gates: Gates,
    /// `[layers, 2, tokens, kv_heads]`, keys before values, each from 0 to 1: the weight *w* of docs/math.md, whatever the gate
    /// does with it. NaN in a layer without projector and for `allinone`, whose weights are its own op's; 1 where the kind of
    /// fuser has no weights.
    pub weights: Vec<f32>,
}

/// Weights as a map, for a page to draw: the mean over heads, `[layer][token]`, `None` where a layer has no projector.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WeightMap {
    /// The receiver's tokens.
    pub tokens: Vec<u32>,
    pub key: Vec<Option<Vec<f32>>>,
    pub value: Vec<Option<Vec<f32>>>,
}

impl Observation {
    /// Brings `link` to `prompt` as far as it is fused, and looks at each sharer's part on the way: one observation a sharer.
    ///
    /// Costs two prefills; `link` is left with the beginning of the prompt, which the next [`Link::prefill`] makes use of.
    ///
    /// # Errors
    /// As [`Link::prefill`].
    pub fn of(link: &mut Link, prompt: &Prompt) -> Result<Vec<Observation>, Error> {
        link.validate(prompt)?;
        let mut parts: Vec<Vec<Part>> = vec![Vec::new(); link.sharers.len()];
        let mut start = 0;
        for (index, section) in prompt.sections.iter().enumerate() {
            let end = start + section.len;
            // The last section is never fused.
            let fused = index + 1 < prompt.sections.len();
            for sharer in (0..link.sharers.len()).filter(|s| fused && section.sharer_mask >> s & 1 == 1) {
                let read = match link.mode {
                    FusionMode::Parallel => 0,
                    FusionMode::Sequential => section.sharer_mask & ((1 << sharer) - 1),
                };
                link.prefill(&up_to(prompt, index, end, read), WantedLogits::Last)?;
                for tokens in aligned(&prompt.sharers[sharer], start, end).chunks(MAX_TOKENS) {
                    parts[sharer].push(Part::of(link, sharer, tokens)?);
                }
            }
            start = end;
        }
        let layers = link.receiver.kv.layers().len();
        let heads = link.receiver.kv.shape().kv_heads;
        let whole = parts.into_iter().zip(&link.gates);
        Ok(whole.map(|(parts, gates)| Observation::join(&parts, layers, heads, gates)).collect())
    }

    fn join(parts: &[Part], layers: usize, kv_heads: usize, gates: &Gates) -> Observation {
        let ends = |end: fn(&(u32, u32)) -> u32| parts.iter().flat_map(|p| &p.aligned).map(end).collect();
        let rows = (0..2 * layers).flat_map(|row| parts.iter().flat_map(move |part| &part.weights[row]));
        Observation {
            tokens: ends(|&(token, _)| token),
            columns: ends(|&(_, column)| column),
            kv_heads,
            gates: (0..layers).map(|layer| gates.get(layer).copied().unwrap_or_default()).collect(),
            weights: rows.copied().collect(),
        }
    }

    pub fn layers(&self) -> usize {
        self.gates.len()
    }

    /// Weights of keys (half 0) or values (half 1) of a layer: `[tokens, kv_heads]`. `None` without a projector.
    ///
    /// # Panics
    /// If there is no such layer or half.
    pub fn half(&self, layer: usize, half: usize) -> Option<&[f32]> {
        assert!(layer < self.layers() && half < 2, "layer {layer}, half {half} of {} layers", self.layers());
        let row = self.tokens.len() * self.kv_heads;
        let weights = &self.weights[(2 * layer + half) * row..][..row];
        (!weights.first().is_some_and(|w| w.is_nan())).then_some(weights)
    }

    /// The mean weight of keys and values of each layer, over tokens and heads; `None` without a projector, or where no token
    /// takes a column.
    pub fn mean_weights(&self) -> Vec<Option<[f32; 2]>> {
        let mean = |weights: &[f32]| {
            let sum: f64 = weights.iter().copied().map(f64::from).sum();
            (!weights.is_empty()).then(|| (sum / weights.len() as f64) as f32)
        };
        let half = |layer, half| self.half(layer, half).and_then(mean);
        (0..self.layers()).map(|layer| Some([half(layer, 0)?, half(layer, 1)?])).collect()
    }

    /// The mean over heads for each layer and token.
    pub fn map(&self) -> WeightMap {
        let token = |heads: &[f32]| heads.iter().sum::<f32>() / self.kv_heads as f32;
        let half = |half| {
            let layers = (0..self.layers()).map(|layer| self.half(layer, half));
            layers
                .map(|weights| Some(weights?.chunks_exact(self.kv_heads.max(1)).map(token).collect()))
                .collect()
        };
        WeightMap { tokens: self.tokens.clone(), key: half(0), value: half(1) }
    }
}

/// Sections before `index` as they are, section `index` fused with the sharers of `mask` alone, and one token more: the
/// last section of a prompt is never fused.
fn up_to(prompt: &Prompt, index: usize, end: usize, mask: u32) -> Prompt {
    let mut sections = prompt.sections[..=index].to_vec();
    sections[index].sharer_mask = mask;
    sections.push(Section { len: 1, sharer_mask: 0 });
    let cut = |own: &SharerPrompt| SharerPrompt {
        columns: own.columns.iter().copied().take(end + 1).collect(),
        ..own.clone()
    };
    Prompt {
        ids: prompt.ids[..=end].to_vec(),
        positions: prompt.positions[..=end].to_vec(),
        sharers: prompt.sharers.iter().map(cut).collect(),
        sections,
    }
}

/// The receiver's tokens of `start..end` that take a column, and which.
fn aligned(sharer: &SharerPrompt, start: usize, end: usize) -> Vec<(u32, u32)> {
    let column = |token: usize| Some((token as u32, sharer.columns.get(token).copied()??));
    (start..end).filter_map(column).collect()
}

/// Some tokens of a prompt.
#[derive(Clone)]
struct Part {
    /// Receiver token, sharer column.
    aligned: Vec<(u32, u32)>,
    /// `[tokens, kv_heads]` of each layer's keys, then values.
    weights: Vec<Vec<f32>>,
}

impl Part {
    /// The receiver's cache in `link` is as this sharer's fuser finds it.
    fn of(link: &Link, sharer: usize, aligned: &[(u32, u32)]) -> Result<Part, Error> {
        let queue = Queue::new(link.receiver.queue.backend())?;
        let (ours, theirs) = (&link.receiver, &link.sharers[sharer]);
        let target: Vec<u32> = aligned.iter().map(|&(token, _)| ours.slots()[token as usize]).collect();
        let source: Vec<u32> = aligned.iter().map(|&(_, column)| theirs.slots()[column as usize]).collect();
        let scales = Scales { queue: &queue, link, fuser: &link.fusers[sharer], tokens: aligned.len() };
        let mut weights = Vec::new();
        for layer in 0..ours.kv.layers().len() {
            let halves = match scales.fuser.route(layer) {
                None => {
                    let unknown = vec![f32::NAN; aligned.len() * ours.kv.shape().kv_heads];
                    [unknown.clone(), unknown]
                }
                Some(route) => scales.layer(
                    route.projector,
                    theirs.kv.read(&theirs.queue, route.sharer, &source)?,
                    ours.kv.read(&ours.queue, layer, &target)?,
                )?,
            };
            weights.extend(halves);
        }
        Ok(Part { aligned: aligned.to_vec(), weights })
    }
}

/// Has the op work out weights.
struct Scales<'a> {
    queue: &'a Queue,
    link: &'a Link,
    fuser: &'a Fuser,
    tokens: usize,
}

impl Scales<'_> {
    /// Weights `[tokens, kv_heads]` of keys and of values of one layer.
    fn layer(&self, projector: usize, source: KvColumns, target: KvColumns) -> Result<[Vec<f32>; 2], Error> {
        let shape = self.link.receiver.kv.shape();
        let heads = shape.kv_heads;
        let all = |weight: f32| Ok([(); 2].map(|()| vec![weight; self.tokens * heads]));
        let (keys, values) = match &self.fuser.projectors()[projector].body {
            Body::Halves { keys, values } if keys.scalar.is_some() => (keys, values),
            Body::Halves { .. } | Body::Linear(_) => return all(1.0),
            Body::AllInOne(_) => return all(f32::NAN),
        };
        let party = &self.fuser.config().sharer;
        let zeros = || vec![0.0; self.tokens * shape.width()];
        let out = self.pages(KvColumns { keys: zeros(), values: zeros() }, heads, shape.head_dim)?;
        let layer = FuseLayer {
            keys: self.ones(keys)?,
            values: self.ones(values)?,
            gates: [1.0; 2],
            source: self.pages(source, party.kv_heads, party.head_dim)?,
            target: self.pages(target, heads, shape.head_dim)?,
            base: self.pages(KvColumns { keys: zeros(), values: zeros() }, heads, shape.head_dim)?,
            out: out.clone(),
        };
        let numbers: Vec<u32> = (0..self.tokens as u32).collect();
        let slots = self.queue.tensor(&numbers, &[self.tokens], "observed slots")?;
        let backend = self.queue.backend();
        let need = self.fuser.scratch_len(backend.as_ref(), 1, self.tokens);
        let operands = FuseOperands {
            layers: vec![layer],
            source_slots: slots.clone(),
            target_slots: slots.clone(),
            base_slots: slots.clone(),
            out_slots: slots,
            scratch: backend.alloc(DType::F32, &[need], "observed fuser's scratch")?,
        };
        let params = FuseParams {
            tokens: self.tokens as u32,
            precision: self.link.receiver.decoder.precision,
            use_target: self.fuser.config().kind.has_target(),
        };
        ops::fuse(self.queue, params, &operands)?;
        // All elements of a head are its weight.
        let first = |pages: &Tensor| -> Result<Vec<f32>, Error> {
            Ok(self.queue.download_f32(pages)?.into_iter().step_by(shape.head_dim).collect())
        };
        Ok([first(&out.keys)?, first(&out.values)?])
    }

    /// Pages of one token each, which lie like columns, exact whatever the caches are kept in.
    fn pages(&self, columns: KvColumns, heads: usize, head_dim: usize) -> Result<KvPages, Error> {
        let dims = [self.tokens, heads, 1, head_dim];
        let page = |half: &[f32]| self.queue.tensor(half, &dims, "observed columns");
        Ok(KvPages { keys: page(&columns.keys)?, values: page(&columns.values)? })
    }

    /// `projector` with projections of one.
    fn ones(&self, projector: &Projector) -> Result<Arc<Projector>, Error> {
        let (rows, cols) = (projector.output.rows(), projector.output.cols());
        let dtype = projector.output.parts.first().map_or(DType::F32, |part| part.matrix.dtype());
        let of = |number: f32, dims: &[usize]| {
            let count = dims.iter().product();
            match dtype {
                DType::Bf16 => self.queue.tensor(&vec![bf16::from_f32(number); count], dims, "ones"),
                DType::F16 => self.queue.tensor(&vec![f16::from_f32(number); count], dims, "ones"),
                _ => self.queue.tensor(&vec![number; count], dims, "ones"),
            }
        };
        let output = Weight::with_bias(of(0.0, &[rows, cols])?, of(1.0, &[rows])?);
        Ok(Arc::new(Projector { output, ..projector.clone() }))
    }
}
