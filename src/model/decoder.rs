//! The one decoder. Families differ in data ([`ModelConfig`], which weights exist), not in code.

use super::{Batch, Error, LayerWeights, Loaded, ModelConfig, Weights};
use crate::{
    backend::{Backend, DType, Precision, Queue, Tensor},
    ops::{self, AttentionOperands, KvPages, NormOutput, Pass, RopeOperands, Scratch},
};
use std::sync::Arc;

/// A frozen language model on a device.
pub struct Decoder {
    pub config: ModelConfig,
    pub weights: Weights,
    pub precision: Precision,
}

/// What a pass is run for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Keys and values only: the last layer ends once its K and V are written.
    Cache,
    /// Also the residual stream after the last layer, from which [`Decoder::logits`] reads.
    Hidden,
}

/// How much [`Activations`] have room for.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Of one pass.
    pub tokens: usize,
    /// Of a decode pass.
    pub sequences: usize,
    /// Tokens of a sequence, in whole blocks.
    pub context: usize,
}

/// Activations of passes of a given [`Extent`], allocated once a lane.
pub struct Activations {
    extent: Extent,
    /// The residual stream, F32`[capacity, hidden]`.
    residual: Tensor,
    normed: Tensor,
    /// Output of a block whose result is normalised before it joins the stream (Gemma).
    block: Option<Tensor>,
    qkv: Tensor,
    attention: Tensor,
    activated: Tensor,
    scratch: Tensor,
}

fn first(tensor: &Tensor, rows: usize) -> Tensor {
    tensor.narrow(0, rows).expect("passes are cut to the capacity")
}

impl Activations {
    pub fn new(
        backend: &Arc<dyn Backend>,
        config: &ModelConfig,
        precision: Precision,
        extent: Extent,
    ) -> Result<Activations, Error> {
        let Extent { tokens, sequences, context } = extent;
        let alloc = |dtype: DType, width: usize, what: &str| backend.alloc(dtype, &[tokens, width], what);
        let (heads, kv_heads, head_dim) = (config.heads, config.kv_heads, config.head_dim);
        let dtype = backend.activation_dtype(precision);
        let scratch = [
            Scratch::LinearGlu { tokens, width: config.ffn },
            Scratch::Attention { sequences, heads, head_dim, context },
        ];
        let scratch = scratch.into_iter().map(|need| backend.scratch_len(need)).max().unwrap_or(0);
        let block = config.post_norms.then(|| alloc(DType::F32, config.hidden, "block output"));
        Ok(Activations {
            extent,
            residual: alloc(DType::F32, config.hidden, "residual stream")?,
            normed: alloc(dtype, config.hidden, "normalised activations")?,
            block: block.transpose()?,
            qkv: alloc(dtype, (heads + 2 * kv_heads) * head_dim, "qkv")?,
            attention: alloc(dtype, heads * head_dim, "attention output")?,
            activated: alloc(dtype, config.ffn, "ffn activations")?,
            scratch: backend.alloc(DType::F32, &[scratch], "scratch of a lane")?,
        })
    }

    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// `[rows, heads · head_dim]`: what the attention of the layer that ran last left in the first rows, before its output map.
    pub fn attention(&self, rows: usize) -> Tensor {
        first(&self.attention, rows)
    }

    /// F32`[rows, hidden]`: the residual stream of the first rows.
    fn residual(&self, rows: usize) -> Tensor {
        first(&self.residual, rows)
    }
}

impl Decoder {
    pub fn new(loaded: Loaded, precision: Precision) -> Decoder {
        Decoder { config: loaded.config, weights: loaded.weights, precision }
    }

    /// Runs the batch through all layers.
    ///
    /// `before_layer(l)` is called before layer l touches its cache; `cached(l)` once its K and V are written and its
    /// attention has read them, so that they may be overwritten: the places to wait for and to record events.
    ///
    /// # Panics
    /// If the batch is larger than the activations' capacity.
    #[allow(clippy::too_many_arguments)]
    pub fn forward(
        &self,
        queue: &Queue,
        batch: &Batch,
        layers: &[KvPages],
        activations: &Activations,
        goal: Goal,
        mut before_layer: impl FnMut(usize),
        mut cached: impl FnMut(usize),
    ) -> Result<(), Error> {
        assert!(batch.tokens <= activations.extent.tokens, "pass of {} tokens", batch.tokens);
        let a = &Activations {
            extent: activations.extent,
            residual: first(&activations.residual, batch.tokens),
            normed: first(&activations.normed, batch.tokens),
            block: activations.block.as_ref().map(|block| first(block, batch.tokens)),
            qkv: first(&activations.qkv, batch.tokens),
            attention: first(&activations.attention, batch.tokens),
            activated: first(&activations.activated, batch.tokens),
            scratch: activations.scratch.clone(),
        };
        ops::embed(queue, &batch.ids, &self.weights.embed, self.config.embed_scale, &a.residual)?;
        for (l, (weights, pages)) in self.weights.layers.iter().zip(layers).enumerate() {
            before_layer(l);
            self.write_cache(queue, batch, l, weights, pages, a)?;
            if goal == Goal::Cache && l + 1 == self.weights.layers.len() {
                cached(l);
                return Ok(());
            }
            self.attend(queue, batch, l, weights, pages, a)?;
            cached(l);
            self.feed_forward(queue, batch.pass, weights, a)?;
        }
        Ok(())
    }

    fn norm(
        &self,
        queue: &Queue,
        x: &Tensor,
        weight: &Tensor,
        output: NormOutput,
        out: &Tensor,
    ) -> Result<(), Error> {
        Ok(ops::rms_norm(queue, x, weight, self.config.norm_eps, self.config.norm_offset, output, out)?)
    }

    /// Normalises, projects to q, k, v, rotates, and writes K and V.
    fn write_cache(
        &self,
        queue: &Queue,
        batch: &Batch,
        layer: usize,
        weights: &LayerWeights,
        pages: &KvPages,
        a: &Activations,
    ) -> Result<(), Error> {
        let config = &self.config;
        self.norm(queue, &a.residual, &weights.attn_norm, NormOutput::Assign, &a.normed)?;
        ops::linear(queue, batch.pass, &a.normed, &weights.qkv, self.precision, false, &a.qkv)?;
        let operands = RopeOperands {
            qkv: a.qkv.clone(),
            q_out: None,
            q_norm: weights.q_norm.clone(),
            k_norm: weights.k_norm.clone(),
            cos_sin: batch.angles(config, layer),
            slots: batch.slots.clone(),
            pages: pages.clone(),
        };
        Ok(ops::rope_kv_write(queue, config.rope_params(batch), &operands)?)
    }

    fn attend(
        &self,
        queue: &Queue,
        batch: &Batch,
        layer: usize,
        weights: &LayerWeights,
        pages: &KvPages,
        a: &Activations,
    ) -> Result<(), Error> {
        let config = &self.config;
        let qkv_width = (config.heads + 2 * config.kv_heads) * config.head_dim;
        let p = config.attention_params(batch, layer, qkv_width);
        let operands = AttentionOperands {
            q: a.qkv.clone(),
            pages: pages.clone(),
            cu_q: batch.cu_q.clone(),
            context: batch.context.clone(),
            block_tables: batch.block_tables.clone(),
            out: a.attention.clone(),
            scratch: a.scratch.clone(),
        };
        ops::paged_attention(queue, p, &operands)?;
        self.join(queue, batch.pass, &a.attention, &weights.attn_out, weights.post_attn_norm.as_ref(), a)
    }

    fn feed_forward(
        &self,
        queue: &Queue,
        pass: Pass,
        weights: &LayerWeights,
        a: &Activations,
    ) -> Result<(), Error> {
        self.norm(queue, &a.residual, &weights.ffn_norm, NormOutput::Assign, &a.normed)?;
        let (gate_up, activation) = (&weights.gate_up, self.config.activation);
        ops::linear_glu(
            queue,
            pass,
            &a.normed,
            gate_up,
            self.precision,
            activation,
            &a.scratch,
            &a.activated,
        )?;
        self.join(queue, pass, &a.activated, &weights.down, weights.post_ffn_norm.as_ref(), a)
    }

    /// Projects a block's result back and adds it, normalised where the family does, to the residual stream.
    fn join(
        &self,
        queue: &Queue,
        pass: Pass,
        x: &Tensor,
        weight: &ops::Weight,
        post_norm: Option<&Tensor>,
        a: &Activations,
    ) -> Result<(), Error> {
        match (post_norm, &a.block) {
            (Some(norm), Some(block)) => {
                ops::linear(queue, pass, x, weight, self.precision, false, block)?;
                self.norm(queue, block, norm, NormOutput::Add, &a.residual)
            }
            _ => Ok(ops::linear(queue, pass, x, weight, self.precision, true, &a.residual)?),
        }
    }

    /// Logits `[rows, vocab]` of chosen rows of the last pass (which ran with [`Goal::Hidden`]): `Pass::Decode` for
    /// each sequence's last token, `Pass::Prefill` for a whole prompt's.
    ///
    /// # Panics
    /// If a row is past the activations' extent.
    pub fn logits(
        &self,
        queue: &Queue,
        pass: Pass,
        activations: &Activations,
        rows: &[u32],
    ) -> Result<Vec<f32>, Error> {
        let n = rows.len();
        assert!(rows.iter().all(|&row| (row as usize) < activations.extent.tokens), "row past the pass");
        let index = queue.tensor(rows, &[n], "logit rows")?;
        let hidden = queue.backend().alloc(DType::F32, &[n, self.config.hidden], "final hidden states")?;
        ops::gather_rows(queue, &activations.residual, &index, &hidden)?;
        let head = self.head(queue, n)?;
        self.run_head(queue, pass, &hidden, &head)?;
        Ok(queue.download_f32(&head.logits)?)
    }

    /// Memory for the logits of `rows` rows.
    pub fn head(&self, queue: &Queue, rows: usize) -> Result<Head, Error> {
        let backend = queue.backend();
        let dtype = backend.activation_dtype(self.precision);
        Ok(Head {
            normed: backend.alloc(dtype, &[rows, self.config.hidden], "final hidden states")?,
            logits: backend.alloc(DType::F32, &[rows, self.weights.lm_head.rows()], "logits")?,
        })
    }

    /// Issues the logits of `hidden`, F32`[rows, hidden]`.
    fn run_head(&self, queue: &Queue, pass: Pass, hidden: &Tensor, head: &Head) -> Result<(), Error> {
        self.norm(queue, hidden, &self.weights.final_norm, NormOutput::Assign, &head.normed)?;
        let lm_head = &self.weights.lm_head;
        ops::linear(queue, pass, &head.normed, lm_head, self.precision, false, &head.logits)?;
        if self.config.final_soft_cap > 0.0 {
            ops::soft_cap(queue, self.config.final_soft_cap, &head.logits)?;
        }
        Ok(())
    }

    /// Issues one decode pass and the logits after it: what a graph captures.
    pub fn decode(
        &self,
        queue: &Queue,
        batch: &Batch,
        layers: &[KvPages],
        activations: &Activations,
        head: &Head,
    ) -> Result<(), Error> {
        self.forward(queue, batch, layers, activations, Goal::Hidden, |_| {}, |_| {})?;
        self.run_head(queue, Pass::Decode, &activations.residual(batch.tokens), head)
    }
}

/// Where the logits of some rows are computed.
pub struct Head {
    normed: Tensor,
    /// F32`[rows, vocab]`
    pub logits: Tensor,
}
