//! A model's pass over the tokens that are learned from: forward with activations kept, loss, and backward.
//!
//! Gradients of keys and values lie in pages of their own, laid out as the cache is: attention adds to every slot that a query
//! saw, so a fused past gets its gradient by the same op as the new tokens.

use super::{Error, Lora};
use crate::{
    backend::{Backend, DType, Precision, Queue, Tensor},
    model::{Batch, Decoder, LayerWeights, ModelConfig, Weights},
    ops::{
        self, AttentionGrads, AttentionOperands, KvPages, NormOutput, Pass, RopeBackwardOperands,
        RopeOperands, Scratch,
    },
};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What a backward pass finds ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// All activations are kept.
    #[default]
    None,
    /// Only what goes into each layer; the rest is computed again, layer by layer.
    Layers,
}

/// Activations of one layer, `[tokens, …]`.
#[derive(Clone)]
struct Kept {
    normed: Tensor,
    qkv: Tensor,
    q: Tensor,
    attention: Tensor,
    /// Residual stream between attention and feed-forward, F32.
    middle: Tensor,
    ffn_normed: Tensor,
    gate_up: Tensor,
    activated: Tensor,
    /// Outputs of the blocks before their post-norms, F32.
    blocks: Option<[Tensor; 2]>,
}

impl Kept {
    fn first(&self, tokens: usize) -> Kept {
        Kept {
            normed: first(&self.normed, tokens),
            qkv: first(&self.qkv, tokens),
            q: first(&self.q, tokens),
            attention: first(&self.attention, tokens),
            middle: first(&self.middle, tokens),
            ffn_normed: first(&self.ffn_normed, tokens),
            gate_up: first(&self.gate_up, tokens),
            activated: first(&self.activated, tokens),
            blocks: self.blocks.as_ref().map(|blocks| blocks.each_ref().map(|block| first(block, tokens))),
        }
    }
}

/// Gradients on their way down, F32`[tokens, …]`.
struct Down {
    /// Of the residual stream.
    stream: Tensor,
    block: Option<Tensor>,
    normed: Tensor,
    attention: Tensor,
    q: Tensor,
    qkv: Tensor,
    activated: Tensor,
    gate_up: Tensor,
    scratch: Tensor,
}

/// Memory for the loss of a chunk of rows.
struct Loss {
    hidden: Tensor,
    normed: Tensor,
    logits: Tensor,
    dnormed: Tensor,
    dhidden: Tensor,
}

/// The memory of training passes of up to a number of tokens.
pub struct TrainingPass {
    tokens: usize,
    context: usize,
    recompute: Recompute,
    /// Into each layer, and out of the last, F32`[tokens, hidden]`.
    streams: Vec<Tensor>,
    /// One a layer, or one for all.
    kept: Vec<Kept>,
    down: Down,
    loss: Loss,
    /// `0, 1, 2, …`, U32`[tokens]`: rows of a plain copy.
    rows: Tensor,
}

/// Rows to be learned from: `rows[i]` of a pass should be followed by `labels[i]`.
#[derive(Clone, Copy)]
pub struct Labels<'a> {
    pub rows: &'a [u32],
    pub labels: &'a [u32],
    /// Factor of every row's gradient.
    pub scale: f32,
}

/// What of the model a pass learns, beside the gradients of keys and values.
#[derive(Clone, Copy)]
pub enum Learned<'a> {
    Nothing,
    /// All weights: their gradients.
    Weights(&'a Weights),
    /// Adapters beside frozen weights. The update keys the elements they drop; `None`: they drop nothing.
    Adapters(&'a Lora, Option<u32>),
}

impl<'a> Learned<'a> {
    fn weights(self) -> Option<&'a Weights> {
        match self {
            Learned::Weights(grads) => Some(grads),
            _ => None,
        }
    }
}

/// Numbers of a layer's linear maps, for adapters.
const QKV: usize = 0;
const ATTN_OUT: usize = 1;
const GATE_UP: usize = 2;
const DOWN: usize = 3;

/// Elements of logits that are held at once.
const LOGITS: usize = 32 << 20;

fn first(tensor: &Tensor, rows: usize) -> Tensor {
    tensor.narrow(0, rows).expect("passes are cut to the capacity")
}

impl TrainingPass {
    /// For passes of at most `tokens` tokens, of which up to `labels` are learned from, in sequences of up to `context` tokens.
    pub fn new(
        queue: &Queue,
        config: &ModelConfig,
        precision: Precision,
        tokens: usize,
        labels: usize,
        context: usize,
        recompute: Recompute,
    ) -> Result<TrainingPass, Error> {
        let backend = queue.backend();
        let dtype = backend.activation_dtype(precision);
        let c = config;
        let (q, qkv) = (c.heads * c.head_dim, (c.heads + 2 * c.kv_heads) * c.head_dim);
        let alloc =
            |dtype: DType, rows: usize, width: usize| backend.alloc(dtype, &[rows, width], "training pass");
        let wide = |width: usize| alloc(DType::F32, tokens, width);
        let narrow = |width: usize| alloc(dtype, tokens, width);
        let keep = || -> Result<Kept, Error> {
            let blocks = if c.post_norms { Some([wide(c.hidden)?, wide(c.hidden)?]) } else { None };
            Ok(Kept {
                normed: narrow(c.hidden)?,
                qkv: narrow(qkv)?,
                q: narrow(q)?,
                attention: narrow(q)?,
                middle: wide(c.hidden)?,
                ffn_normed: narrow(c.hidden)?,
                gate_up: narrow(2 * c.ffn)?,
                activated: narrow(c.ffn)?,
                blocks,
            })
        };
        let kept = if recompute == Recompute::Layers { 1 } else { c.layers };
        let (heads, head_dim) = (c.heads, c.head_dim);
        let need = Scratch::AttentionBackward { tokens, sequences: tokens, heads, head_dim, context };
        let chunk = (LOGITS / c.vocab).clamp(1, labels.max(1));
        let rows: Vec<u32> = (0..tokens as u32).collect();
        Ok(TrainingPass {
            tokens,
            context,
            recompute,
            streams: (0..=c.layers).map(|_| wide(c.hidden)).collect::<Result<_, _>>()?,
            kept: (0..kept).map(|_| keep()).collect::<Result<_, _>>()?,
            down: Down {
                stream: wide(c.hidden)?,
                block: c.post_norms.then(|| wide(c.hidden)).transpose()?,
                normed: wide(c.hidden)?,
                attention: wide(q)?,
                q: wide(q)?,
                qkv: wide(qkv)?,
                activated: wide(c.ffn)?,
                gate_up: wide(2 * c.ffn)?,
                scratch: backend.alloc(DType::F32, &[backend.scratch_len(need)], "scratch of attention")?,
            },
            loss: Loss {
                hidden: alloc(DType::F32, chunk, c.hidden)?,
                normed: alloc(dtype, chunk, c.hidden)?,
                logits: alloc(DType::F32, chunk, c.vocab)?,
                dnormed: alloc(DType::F32, chunk, c.hidden)?,
                dhidden: alloc(DType::F32, chunk, c.hidden)?,
            },
            rows: queue.tensor(&rows, &[tokens], "row numbers")?,
        })
    }

    /// Whether there is room for `tokens` tokens, `labels` of them learned from, in sequences of up to `context`.
    pub fn fits(&self, tokens: usize, labels: usize, context: usize) -> bool {
        let chunk = self.loss.hidden.rows();
        // Labels are taken chunk by chunk, but tiny chunks are slow.
        let enough = labels <= chunk || 2 * chunk * self.loss.logits.row_len() >= LOGITS;
        tokens <= self.tokens && context <= self.context && enough
    }

    /// Bytes of [`TrainingPass::new`], for the plan.
    pub fn bytes(config: &ModelConfig, tokens: usize, labels: usize, recompute: Recompute) -> usize {
        let c = config;
        let (q, qkv) = (c.heads * c.head_dim, (c.heads + 2 * c.kv_heads) * c.head_dim);
        let blocks = if c.post_norms { 2 * c.hidden } else { 0 };
        let kept = 3 * c.hidden + qkv + 2 * q + 3 * c.ffn + blocks;
        let layers = if recompute == Recompute::Layers { 1 } else { c.layers };
        let down = 2 * c.hidden + blocks / 2 + 2 * q + qkv + 3 * c.ffn;
        let chunk = (LOGITS / c.vocab).clamp(1, labels.max(1));
        4 * (tokens * ((c.layers + 1) * c.hidden + layers * kept + down) + chunk * (c.vocab + 4 * c.hidden))
    }

    /// The first layer of the last forward pass over `tokens` tokens whose output is not finite.
    pub fn first_bad_layer(&self, queue: &Queue, tokens: usize) -> Result<Option<usize>, Error> {
        for layer in 0..self.streams.len() - 1 {
            let out = queue.download_f32(&self.stream(layer + 1, tokens.min(self.tokens)))?;
            if out.iter().any(|x| !x.is_finite()) {
                return Ok(Some(layer));
            }
        }
        Ok(None)
    }

    fn kept(&self, layer: usize, tokens: usize) -> Kept {
        self.kept[layer.min(self.kept.len() - 1)].first(tokens)
    }

    fn stream(&self, layer: usize, tokens: usize) -> Tensor {
        first(&self.streams[layer], tokens)
    }

    /// Runs `batch` through all layers. Its K and V are written to `pages`.
    ///
    /// # Panics
    /// If the batch has more tokens than there is room for.
    pub fn forward(
        &self,
        queue: &Queue,
        decoder: &Decoder,
        batch: &Batch,
        pages: &[KvPages],
        learned: Learned,
    ) -> Result<(), Error> {
        assert!(batch.tokens <= self.tokens, "pass of {} tokens", batch.tokens);
        let (weights, config) = (&decoder.weights, &decoder.config);
        ops::embed(queue, &batch.ids, &weights.embed, config.embed_scale, &self.stream(0, batch.tokens))?;
        for (layer, pages) in pages.iter().enumerate().take(config.layers) {
            self.layer(queue, decoder, batch, layer, pages, learned)?;
        }
        Ok(())
    }

    /// Layer `layer`, from its stream to the next one's.
    fn layer(
        &self,
        queue: &Queue,
        decoder: &Decoder,
        batch: &Batch,
        layer: usize,
        pages: &KvPages,
        learned: Learned,
    ) -> Result<(), Error> {
        let (tokens, precision) = (batch.tokens, decoder.precision);
        let (w, c) = (&decoder.weights.layers[layer], &decoder.config);
        let k = self.kept(layer, tokens);
        let (x, y) = (self.stream(layer, tokens), self.stream(layer + 1, tokens));
        let assign = NormOutput::Assign;
        let linear = |number: usize, x: &Tensor, weight: &ops::Weight, accumulate: bool, out: &Tensor| {
            ops::linear(queue, Pass::Prefill, x, weight, precision, accumulate, out)?;
            match learned {
                Learned::Adapters(lora, update) => {
                    lora.forward(queue, precision, layer, number, x, out, update)
                }
                _ => Ok(()),
            }
        };
        let norm = |x: &Tensor, weight: &Tensor, output: NormOutput, out: &Tensor| {
            ops::rms_norm(queue, x, weight, c.norm_eps, c.norm_offset, output, out)
        };
        norm(&x, &w.attn_norm, assign, &k.normed)?;
        linear(QKV, &k.normed, &w.qkv, false, &k.qkv)?;
        let operands = RopeOperands {
            qkv: k.qkv.clone(),
            q_out: Some(k.q.clone()),
            q_norm: w.q_norm.clone(),
            k_norm: w.k_norm.clone(),
            cos_sin: batch.angles(c, layer),
            slots: batch.slots.clone(),
            pages: pages.clone(),
        };
        ops::rope_kv_write(queue, c.rope_params(batch), &operands)?;
        ops::paged_attention(
            queue,
            c.attention_params(batch, layer, c.heads * c.head_dim),
            &self.attention(batch, &k, pages),
        )?;
        let join = |number: usize,
                    from: &Tensor,
                    x: &Tensor,
                    weight: &ops::Weight,
                    post: &Option<Tensor>,
                    y: &Tensor| {
            ops::gather_rows(queue, from, &first(&self.rows, tokens), y)?;
            match (post, &k.blocks) {
                (Some(post), Some(blocks)) => {
                    let block = &blocks[usize::from(number == DOWN)];
                    linear(number, x, weight, false, block)?;
                    Ok(norm(block, post, NormOutput::Add, y)?)
                }
                _ => linear(number, x, weight, true, y),
            }
        };
        join(ATTN_OUT, &x, &k.attention, &w.attn_out, &w.post_attn_norm, &k.middle)?;
        norm(&k.middle, &w.ffn_norm, assign, &k.ffn_normed)?;
        linear(GATE_UP, &k.ffn_normed, &w.gate_up, false, &k.gate_up)?;
        ops::glu(queue, &k.gate_up, c.activation, &k.activated)?;
        join(DOWN, &k.middle, &k.activated, &w.down, &w.post_ffn_norm, &y)?;
        Ok(())
    }

    fn attention(&self, batch: &Batch, k: &Kept, pages: &KvPages) -> AttentionOperands {
        AttentionOperands {
            q: k.q.clone(),
            pages: pages.clone(),
            cu_q: batch.cu_q.clone(),
            context: batch.context.clone(),
            block_tables: batch.block_tables.clone(),
            out: k.attention.clone(),
            scratch: self.down.scratch.clone(),
        }
    }

    /// Loss of each labelled row of the last forward pass, in nats, and the start of the backward pass: with `learn`, the
    /// gradient of the residual stream, and those of final norm and head where they are learned.
    pub fn loss(
        &self,
        queue: &Queue,
        decoder: &Decoder,
        tokens: usize,
        labels: Labels,
        learned: Learned,
        learn: bool,
    ) -> Result<Vec<f32>, Error> {
        let (w, c) = (&decoder.weights, &decoder.config);
        let (precision, stream, grads) =
            (decoder.precision, self.stream(c.layers, tokens), learned.weights());
        let down = first(&self.down.stream, tokens);
        if learn {
            ops::zero(queue, &down)?;
        }
        let chunk = self.loss.hidden.rows();
        let mut all = Vec::with_capacity(labels.rows.len());
        for (rows, ids) in labels.rows.chunks(chunk).zip(labels.labels.chunks(chunk)) {
            let n = rows.len();
            let index = queue.tensor(rows, &[n], "labelled rows")?;
            let ids = queue.tensor(ids, &[n], "labels")?;
            let loss = queue.backend().alloc(DType::F32, &[n], "losses")?;
            let [hidden, normed, logits] =
                [&self.loss.hidden, &self.loss.normed, &self.loss.logits].map(|tensor| first(tensor, n));
            ops::gather_rows(queue, &stream, &index, &hidden)?;
            ops::rms_norm(
                queue,
                &hidden,
                &w.final_norm,
                c.norm_eps,
                c.norm_offset,
                NormOutput::Assign,
                &normed,
            )?;
            ops::linear(queue, Pass::Prefill, &normed, &w.lm_head, precision, false, &logits)?;
            if c.final_soft_cap > 0.0 {
                ops::soft_cap(queue, c.final_soft_cap, &logits)?;
            }
            ops::cross_entropy(queue, &logits, &ids, labels.scale, c.final_soft_cap, &loss)?;
            if learn {
                let [dnormed, dhidden] =
                    [&self.loss.dnormed, &self.loss.dhidden].map(|tensor| first(tensor, n));
                ops::linear_backward_input(queue, &logits, &w.lm_head, precision, false, &dnormed)?;
                if let Some(grads) = grads {
                    ops::linear_backward_weight(queue, &logits, &normed, precision, &grads.lm_head)?;
                }
                ops::rms_norm_backward(
                    queue,
                    &hidden,
                    &w.final_norm,
                    c.norm_eps,
                    c.norm_offset,
                    &dnormed,
                    NormOutput::Assign,
                    &dhidden,
                    grads.map(|grads| &grads.final_norm),
                )?;
                // Backward of a gather is what backward of an embedding is.
                ops::embed_backward(queue, &index, 1.0, &dhidden, &down)?;
            }
            all.extend(queue.download_f32(&loss)?);
        }
        Ok(all)
    }

    /// Backward of the last forward pass, whose loss was taken with `learn`, from the last layer down to layer `lowest`, below
    /// whose attention only what is learned of the model wants anything.
    ///
    /// `dkv(l)` gives F32 pages, all 0, for the gradients of layer l's keys and values; `done(l)` is called when they are
    /// complete.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        queue: &Queue,
        decoder: &Decoder,
        batch: &Batch,
        pages: &[KvPages],
        learned: Learned,
        lowest: usize,
        mut dkv: impl FnMut(usize) -> Result<KvPages, Error>,
        mut done: impl FnMut(usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let config = &decoder.config;
        for layer in (lowest..config.layers).rev() {
            if self.recompute == Recompute::Layers {
                self.layer(queue, decoder, batch, layer, &pages[layer], learned)?;
            }
            let dkv = dkv(layer)?;
            let last = layer == lowest && matches!(learned, Learned::Nothing);
            self.layer_backward(queue, decoder, batch, layer, &pages[layer], learned, &dkv, last)?;
            done(layer)?;
        }
        if let Some(grads) = learned.weights() {
            let down = first(&self.down.stream, batch.tokens);
            ops::embed_backward(queue, &batch.ids, config.embed_scale, &down, &grads.embed)?;
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn layer_backward(
        &self,
        queue: &Queue,
        decoder: &Decoder,
        batch: &Batch,
        layer: usize,
        pages: &KvPages,
        learned: Learned,
        dkv: &KvPages,
        last: bool,
    ) -> Result<(), Error> {
        let grads: Option<&LayerWeights> = learned.weights().map(|grads| &grads.layers[layer]);
        let (tokens, precision) = (batch.tokens, decoder.precision);
        let (w, c) = (&decoder.weights.layers[layer], &decoder.config);
        let k = self.kept(layer, tokens);
        let d = &self.down;
        let [stream, normed, attention, q, qkv, activated, gate_up] =
            [&d.stream, &d.normed, &d.attention, &d.q, &d.qkv, &d.activated, &d.gate_up]
                .map(|tensor| first(tensor, tokens));
        // Of y = x · Wᵀ + b: dx, and the gradients of W and b, or of W's adapters, where they are trained.
        let linear = |number: usize,
                      dy: &Tensor,
                      weight: &ops::Weight,
                      x: &Tensor,
                      grad: Option<&ops::Weight>,
                      dx: &Tensor| {
            if let Some(grad) = grad {
                ops::linear_backward_weight(queue, dy, x, precision, grad)?;
            }
            ops::linear_backward_input(queue, dy, weight, precision, false, dx)?;
            match learned {
                Learned::Adapters(lora, update) => {
                    lora.backward(queue, precision, layer, number, x, dy, dx, update)
                }
                _ => Ok(()),
            }
        };
        let norm = |x: &Tensor,
                    weight: &Tensor,
                    dy: &Tensor,
                    output: NormOutput,
                    dx: &Tensor,
                    grad: Option<&Tensor>| {
            ops::rms_norm_backward(queue, x, weight, c.norm_eps, c.norm_offset, dy, output, dx, grad)
        };
        // Through a block's post-norm, where there is one: the gradient of the block's own output.
        let split = |number: usize, post: &Option<Tensor>, grad: Option<&Tensor>| -> Result<Tensor, Error> {
            match (post, &k.blocks, &d.block) {
                (Some(post), Some(blocks), Some(block)) => {
                    let block = first(block, tokens);
                    norm(&blocks[number], post, &stream, NormOutput::Assign, &block, grad)?;
                    Ok(block)
                }
                _ => Ok(stream.clone()),
            }
        };
        let dblock = split(1, &w.post_ffn_norm, grads.and_then(|g| g.post_ffn_norm.as_ref()))?;
        linear(DOWN, &dblock, &w.down, &k.activated, grads.map(|g| &g.down), &activated)?;
        ops::glu_backward(queue, &k.gate_up, c.activation, &activated, &gate_up)?;
        linear(GATE_UP, &gate_up, &w.gate_up, &k.ffn_normed, grads.map(|g| &g.gate_up), &normed)?;
        norm(&k.middle, &w.ffn_norm, &normed, NormOutput::Add, &stream, grads.map(|g| &g.ffn_norm))?;

        let dblock = split(0, &w.post_attn_norm, grads.and_then(|g| g.post_attn_norm.as_ref()))?;
        linear(ATTN_OUT, &dblock, &w.attn_out, &k.attention, grads.map(|g| &g.attn_out), &attention)?;
        let attention_grads =
            AttentionGrads { dout: attention, dq: q.clone(), dkv: dkv.clone(), scratch: d.scratch.clone() };
        let forward = self.attention(batch, &k, pages);
        ops::attention_backward(
            queue,
            c.attention_params(batch, layer, c.heads * c.head_dim),
            &forward,
            &attention_grads,
        )?;
        if last {
            return Ok(());
        }
        let operands = RopeBackwardOperands {
            qkv: k.qkv.clone(),
            q_norm: w.q_norm.clone(),
            k_norm: w.k_norm.clone(),
            cos_sin: batch.angles(c, layer),
            slots: batch.slots.clone(),
            dq: q,
            dkv: dkv.clone(),
            dqkv: qkv.clone(),
            dq_norm: grads.and_then(|g| g.q_norm.clone()),
            dk_norm: grads.and_then(|g| g.k_norm.clone()),
        };
        ops::rope_backward(queue, c.rope_params(batch), &operands)?;
        linear(QKV, &qkv, &w.qkv, &k.normed, grads.map(|g| &g.qkv), &normed)?;
        let x = self.stream(layer, tokens);
        norm(&x, &w.attn_norm, &normed, NormOutput::Add, &stream, grads.map(|g| &g.attn_norm))?;
        Ok(())
    }
}

/// F32 pages as large as `like`, for gradients; to be set to 0 before a pass adds to them.
pub fn gradient_pages(backend: &Arc<dyn Backend>, like: &KvPages) -> Result<KvPages, Error> {
    let alloc = |what| backend.alloc(DType::F32, like.keys.shape(), what);
    Ok(KvPages { keys: alloc("gradients of keys")?, values: alloc("gradients of values")? })
}
