//! [`ModelConfig`]: what makes a family a family, as data. The decoder has no other notion of Llama, Qwen or Gemma.

use crate::ops::Activation;
use sha2::{Digest, Sha256};

/// A decoder-only transformer, read from a Hugging Face `config.json` or from GGUF metadata.
///
/// One layer: `x += [post_attn_norm](attention(attn_norm(x)))`, `x += [post_ffn_norm](ffn(ffn_norm(x)))`, with a gated
/// feed-forward. What is optional is present or absent in [`super::LayerWeights`].
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// As the file calls it: `llama`, `mistral`, `qwen2`, `qwen3`, `gemma3`, `gemma3_text`. For messages only.
    pub architecture: String,
    pub vocab: usize,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Width of the feed-forward.
    pub ffn: usize,
    pub norm_eps: f32,
    /// 1 where the file stores norm weights minus one (Gemma in Hugging Face folders), else 0.
    pub norm_offset: f32,
    pub activation: Activation,
    /// Embeddings are multiplied by this: 1, or √hidden for Gemma.
    pub embed_scale: f32,
    /// Of the attention scores: 1/√head_dim unless the family says otherwise.
    pub attention_scale: f32,
    /// `s = cap · tanh(s / cap)` on attention scores; 0 = none.
    pub attention_soft_cap: f32,
    /// The same on the logits; 0 = none.
    pub final_soft_cap: f32,
    /// Biases of q, k and v, of the attention's output projection, of the feed-forward.
    pub biases: Biases,
    /// RMSNorm over each head of q and k before the rotation.
    pub qk_norm: bool,
    /// Norms after attention and feed-forward, before they join the residual stream (Gemma).
    pub post_norms: bool,
    /// The head is the embedding table.
    pub tied: bool,
    pub rope: Rope,
    /// Of the layers marked in `local`, where they have a rope of their own.
    pub rope_local: Option<Rope>,
    /// Rows of q and k come in pairs `2i, 2i+1` that rotate together (GGUF's `llama`), not as `i, i + head_dim/2`.
    pub interleaved_rope: bool,
    /// Per layer: a query sees keys at distance `< window`; 0 = all earlier ones.
    pub windows: Vec<u32>,
    /// Per layer: rotated by `rope_local`.
    pub local: Vec<bool>,
    /// Tokens that the model was made for.
    pub context_length: usize,
    /// Any of these ends a text.
    pub eos: Vec<u32>,
    pub bos: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    pub qkv: bool,
    pub attn_out: bool,
    pub ffn: bool,
}

/// Rotary position embedding over the whole head.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub theta: f32,
    pub scaling: RopeScaling,
}

/// How frequencies are stretched for contexts longer than the model was first trained for.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// All frequencies divided by `factor`.
    Linear {
        factor: f32,
    },
    /// Llama 3.1: long wavelengths are divided by `factor`, short ones kept, blended between.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_context: f32,
    },
    /// YaRN, arXiv 2309.00071. `attention_factor` multiplies cosines and sines.
    Yarn {
        factor: f32,
        original_context: f32,
        beta_fast: f32,
        beta_slow: f32,
        attention_factor: f32,
    },
    /// A divisor per frequency `[head_dim/2]`: GGUF's `rope_freqs.weight`, how Llama 3.1 is written there.
    Divisors(Vec<f32>),
}

impl RopeScaling {
    /// YaRN's own attention factor for a context stretched `factor` times.
    pub(super) fn yarn_attention_factor(factor: f32, mscale: f32) -> f32 {
        if factor <= 1.0 { 1.0 } else { (0.1 * f64::from(mscale) * f64::from(factor).ln() + 1.0) as f32 }
    }
}

impl Rope {
    /// Angle per position of each pair, `[head_dim/2]`, and the factor on cosines and sines.
    ///
    /// The order of f32 operations is that of transformers 4.52 (`modeling_rope_utils.py`).
    pub fn inverse_frequencies(&self, head_dim: usize) -> (Vec<f32>, f32) {
        let pairs = head_dim / 2;
        let positions = (0..pairs).map(|i| self.theta.powf((2 * i) as f32 / head_dim as f32));
        match &self.scaling {
            RopeScaling::None => (positions.map(|p| 1.0 / p).collect(), 1.0),
            RopeScaling::Linear { factor } => (positions.map(|p| 1.0 / p / factor).collect(), 1.0),
            RopeScaling::Divisors(divisors) => {
                (positions.zip(divisors).map(|(p, d)| 1.0 / p / d).collect(), 1.0)
            }
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let blend = |inverse: f32| {
                    let wavelength = 2.0 * std::f32::consts::PI / inverse;
                    if wavelength > original_context / low_freq_factor {
                        return inverse / factor;
                    }
                    if wavelength < original_context / high_freq_factor {
                        return inverse;
                    }
                    let smooth = (original_context / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * inverse / factor + smooth * inverse
                };
                (positions.map(|p| blend(1.0 / p)).collect(), 1.0)
            }
            &RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor } => {
                let theta = f64::from(self.theta);
                // The pair that turns `rotations` times over the original context.
                let correction = |rotations: f32| {
                    let turns =
                        f64::from(original_context) / (f64::from(rotations) * 2.0 * std::f64::consts::PI);
                    head_dim as f64 * turns.ln() / (2.0 * theta.ln())
                };
                let low = correction(beta_fast).floor().max(0.0) as f32;
                let high = correction(beta_slow).ceil().min(head_dim as f64 - 1.0) as f32;
                let width = if low == high { 0.001 } else { high - low };
                let inverse = positions.enumerate().map(|(i, p)| {
                    let kept = 1.0 - ((i as f32 - low) / width).clamp(0.0, 1.0);
                    1.0 / (factor * p) * (1.0 - kept) + 1.0 / p * kept
                });
                (inverse.collect(), attention_factor)
            }
        }
    }
}

impl ModelConfig {
    /// [`Rope::inverse_frequencies`] of the global or of the local layers.
    pub fn inverse_frequencies(&self, local: bool) -> (Vec<f32>, f32) {
        let rope = if local { self.rope_local.as_ref() } else { None };
        rope.unwrap_or(&self.rope).inverse_frequencies(self.head_dim)
    }

    /// SHA-256 over what decides the content of a KV-cache, weights aside.
    ///
    /// The same for a Hugging Face folder and a GGUF file of one model: how a file stores norms or orders q and k, its
    /// context length, special tokens and a padded vocabulary are left out.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(b"c2c model 1");
        let widths = [self.hidden, self.layers, self.heads, self.kv_heads, self.head_dim, self.ffn];
        widths.iter().for_each(|&n| hash.update((n as u64).to_le_bytes()));
        let floats = [self.norm_eps, self.embed_scale, self.attention_scale, self.attention_soft_cap];
        floats.iter().for_each(|x| hash.update(x.to_le_bytes()));
        hash.update([self.activation as u8, u8::from(self.qk_norm), u8::from(self.post_norms)]);
        hash.update([self.biases.qkv, self.biases.attn_out, self.biases.ffn].map(u8::from));
        for local in [false, true] {
            let (inverse, factor) = self.inverse_frequencies(local);
            // 20 bits: the same frequencies reached by another road differ in the last place.
            inverse.iter().for_each(|x| hash.update((x.to_bits() >> 12).to_le_bytes()));
            hash.update(factor.to_le_bytes());
        }
        for (window, &local) in self.windows.iter().zip(&self.local) {
            hash.update(window.to_le_bytes());
            hash.update([u8::from(local)]);
        }
        hash.finalize().into()
    }

    /// What a file may claim at most, and what must hold between its numbers. Checked before anything is sized by
    /// them; `Err` names the field and the problem.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        let bounded = [
            ("vocabulary size", self.vocab, 1 << 24),
            ("hidden size", self.hidden, 1 << 20),
            ("number of layers", self.layers, MAX_LAYERS),
            ("number of heads", self.heads, 1 << 12),
            ("number of key/value heads", self.kv_heads, 1 << 12),
            ("head dimension", self.head_dim, 1 << 12),
            ("feed-forward size", self.ffn, 1 << 22),
            ("context length", self.context_length, 1 << 30),
        ];
        for (field, value, most) in bounded {
            if value == 0 || value > most {
                return Err((field, format!("is {value}, must be 1 to {most}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err((
                "number of heads",
                format!("{} is not a multiple of {}", self.heads, self.kv_heads),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err((
                "head dimension",
                format!("{} is odd; rotary pairs need an even one", self.head_dim),
            ));
        }
        let positive = [
            ("norm epsilon", self.norm_eps),
            ("embedding scale", self.embed_scale),
            ("attention scale", self.attention_scale),
        ];
        for (field, value) in positive {
            if !(value.is_finite() && value > 0.0) {
                return Err((field, format!("is {value}, must be a positive number")));
            }
        }
        for (field, value) in
            [("attention soft cap", self.attention_soft_cap), ("logit soft cap", self.final_soft_cap)]
        {
            if !(value.is_finite() && value >= 0.0) {
                return Err((field, format!("is {value}, must be a positive number, or absent")));
            }
        }
        for local in [false, true] {
            let (inverse, factor) = self.inverse_frequencies(local);
            let sound = |x: &f32| x.is_finite() && *x > 0.0;
            if inverse.len() != self.head_dim / 2 || !inverse.iter().all(sound) || !sound(&factor) {
                return Err(("rope", "its base and scaling give no usable frequencies".into()));
            }
        }
        Ok(())
    }
}

/// More layers than any model has; bounds the per-layer lists before a file's word is taken for their length.
pub(super) const MAX_LAYERS: usize = 1 << 12;

/// `1/√x`, rounded once.
pub(super) fn inverse_root(x: f64) -> f32 {
    x.sqrt().recip() as f32
}
