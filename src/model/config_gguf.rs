//! [`ModelConfig`] from GGUF metadata; what is absent is derived as llama.cpp derives it.

use super::{
    Error, Gguf, ModelConfig,
    config::{Biases, MAX_LAYERS, Rope, RopeScaling, inverse_root},
    gguf,
};
use crate::{backend::DType, ops::Activation, tokenizer::GgufVocab};

/// Layers of Gemma 3 27B, the one size whose attention scale is not 1/√head_dim.
const GEMMA3_27B_LAYERS: usize = 62;

/// The metadata of one architecture: keys are prefixed with its name.
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn fail<T>(&self, problem: String) -> Result<T, Error> {
        Err(Error::Config { path: self.gguf.path().into(), problem })
    }

    fn wrap<T>(&self, read: Result<T, gguf::Error>) -> Result<T, Error> {
        read.map_err(|source| Error::Gguf { path: self.gguf.path().into(), source })
    }

    fn optional_int(&self, name: &str) -> Result<Option<usize>, Error> {
        let value = self.wrap(self.gguf.optional_int(&self.key(name)))?;
        Ok(value.map(|v| usize::try_from(v).unwrap_or(usize::MAX)))
    }

    fn int(&self, name: &str) -> Result<usize, Error> {
        self.wrap(self.gguf.int(&self.key(name))).map(|v| usize::try_from(v).unwrap_or(usize::MAX))
    }

    fn optional_float(&self, name: &str) -> Result<Option<f32>, Error> {
        self.wrap(self.gguf.optional_float(&self.key(name)))
    }

    /// A number that may be given per layer; all layers must agree.
    fn same_in_all_layers(&self, name: &str) -> Result<Option<usize>, Error> {
        let key = self.key(name);
        let Some(values) = self.wrap(self.gguf.optional_ints(&key))? else { return Ok(None) };
        match values.split_first() {
            Some((first, rest)) if rest.iter().all(|v| v == first) => {
                Ok(Some(usize::try_from(*first).unwrap_or(usize::MAX)))
            }
            _ => self.fail(format!("`{key}` differs between layers, which is not supported")),
        }
    }

    fn rope(&self, head_dim: usize, context_length: usize) -> Result<Rope, Error> {
        let theta = self.optional_float("rope.freq_base")?.unwrap_or(10_000.0);
        let divisors = self.rope_divisors(head_dim)?;
        let factor = match self.optional_float("rope.scaling.factor")? {
            None => self.optional_float("rope.scale_linear")?,
            factor => factor,
        };
        let factor = factor.filter(|&f| f != 0.0).unwrap_or(1.0);
        let kind = self.wrap(self.gguf.optional_str(&self.key("rope.scaling.type")))?;
        let scaling = match kind.unwrap_or("linear") {
            "none" => RopeScaling::None,
            "linear" if factor == 1.0 => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor },
            "yarn" => RopeScaling::Yarn {
                factor,
                original_context: self
                    .optional_int("rope.scaling.original_context_length")?
                    .unwrap_or(context_length) as f32,
                beta_fast: self.optional_float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: self.optional_float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                attention_factor: self.optional_float("rope.scaling.attn_factor")?.unwrap_or(1.0)
                    * RopeScaling::yarn_attention_factor(factor, 1.0),
            },
            other => {
                let (path, name) = (self.gguf.path().into(), other.into());
                return Err(Error::UnknownRopeScaling { path, name });
            }
        };
        match (scaling, divisors) {
            (scaling, None) => Ok(Rope { theta, scaling }),
            (RopeScaling::None, Some(divisors)) => {
                Ok(Rope { theta, scaling: RopeScaling::Divisors(divisors) })
            }
            _ => self.fail("has both rope scaling and a tensor `rope_freqs.weight`".into()),
        }
    }

    /// `rope_freqs.weight`: Llama 3.1's scaling, worked out by the converter.
    fn rope_divisors(&self, head_dim: usize) -> Result<Option<Vec<f32>>, Error> {
        let name = "rope_freqs.weight";
        let Some(info) = self.gguf.tensor(name) else { return Ok(None) };
        let path = self.gguf.path();
        if info.dtype != DType::F32 {
            let found = info.dtype.to_string();
            return Err(Error::TensorType { path: path.into(), name: name.into(), found });
        }
        if info.shape != [head_dim / 2] {
            let (found, expected) = (info.shape.clone(), vec![head_dim / 2]);
            return Err(Error::TensorShape { path: path.into(), name: name.into(), found, expected });
        }
        let bytes = self.gguf.file()[info.bytes.clone()].chunks_exact(4);
        Ok(Some(bytes.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()))
    }

    /// Which layers of Gemma 3 see a window only: all but every `n`-th.
    fn sliding_layers(&self, layers: usize) -> Result<Vec<bool>, Error> {
        let every = self.optional_int("attention.sliding_window_pattern")?.unwrap_or(6);
        if every == 0 {
            return self.fail(format!("`{}` is 0", self.key("attention.sliding_window_pattern")));
        }
        Ok((1..=layers).map(|n| n % every != 0).collect())
    }
}

impl ModelConfig {
    pub fn from_gguf(gguf: &Gguf) -> Result<ModelConfig, Error> {
        let wrap = |source| Error::Gguf { path: gguf.path().into(), source };
        let architecture = gguf.str("general.architecture").map_err(wrap)?;
        let gemma = match architecture {
            "llama" | "qwen2" | "qwen3" => false,
            "gemma3" => true,
            other => {
                return Err(Error::UnknownArchitecture { path: gguf.path().into(), name: other.into() });
            }
        };
        let keys = Keys { gguf, architecture };
        if keys.optional_int("expert_count")?.is_some_and(|n| n > 0) {
            return keys.fail("mixtures of experts are not supported".into());
        }
        let missing =
            |name: &str| Error::MissingTensor { path: gguf.path().into(), name: format!("{name}.weight") };
        let embed = gguf.tensor("token_embd.weight").ok_or_else(|| missing("token_embd"))?;
        let hidden = keys.int("embedding_length")?;
        let layers = keys.int("block_count")?;
        let heads = keys.same_in_all_layers("attention.head_count")?;
        let heads = heads.map_or_else(|| keys.int("attention.head_count"), Ok)?;
        let kv_heads = keys.same_in_all_layers("attention.head_count_kv")?.unwrap_or(heads);
        let head_dim = match keys.optional_int("attention.key_length")? {
            Some(length) => length,
            None => hidden / heads.max(1),
        };
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(other) = keys.optional_int(name)?.filter(|&other| other != head_dim) {
                let key = keys.key(name);
                return keys.fail(format!("`{key}` is {other}, other than the head dimension {head_dim}"));
            }
        }
        let ffn = keys.same_in_all_layers("feed_forward_length")?;
        let context_length = keys.int("context_length")?;
        let listed = layers.min(MAX_LAYERS);
        let local = if gemma { keys.sliding_layers(listed)? } else { vec![false; listed] };
        let window = if gemma { keys.int("attention.sliding_window")? } else { 0 };
        let window = u32::try_from(window).unwrap_or(0);
        let scaled_by = if gemma && layers == GEMMA3_27B_LAYERS { hidden / heads.max(1) } else { head_dim };
        let has = |name: &str| gguf.tensor(name).is_some();
        let id = |name: &str| {
            let id = gguf.optional_int(&format!("tokenizer.ggml.{name}_token_id")).map_err(wrap)?;
            Ok::<_, Error>(
                id.and_then(|id| u32::try_from(id).ok()).filter(|&id| (id as usize) < embed.shape[0]),
            )
        };
        let config = ModelConfig {
            architecture: architecture.into(),
            vocab: embed.shape[0],
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            ffn: ffn.map_or_else(|| keys.int("feed_forward_length"), Ok)?,
            norm_eps: keys
                .optional_float("attention.layer_norm_rms_epsilon")?
                .ok_or_else(|| wrap(gguf::Error::MissingKey(keys.key("attention.layer_norm_rms_epsilon"))))?,
            // The converter has added Gemma's one.
            norm_offset: 0.0,
            activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
            embed_scale: if gemma { (hidden as f64).sqrt() as f32 } else { 1.0 },
            attention_scale: inverse_root(scaled_by as f64),
            attention_soft_cap: keys.optional_float("attn_logit_softcapping")?.unwrap_or(0.0),
            final_soft_cap: keys.optional_float("final_logit_softcapping")?.unwrap_or(0.0),
            biases: Biases {
                qkv: architecture == "qwen2" || has("blk.0.attn_q.bias"),
                attn_out: has("blk.0.attn_output.bias"),
                ffn: has("blk.0.ffn_gate.bias"),
            },
            qk_norm: gemma || architecture == "qwen3",
            post_norms: gemma,
            tied: !has("output.weight"),
            rope: keys.rope(head_dim, context_length)?,
            rope_local: if gemma {
                let theta = keys.optional_float("rope.freq_base_swa")?.unwrap_or(10_000.0);
                Some(Rope { theta, scaling: RopeScaling::None })
            } else {
                None
            },
            interleaved_rope: architecture == "llama",
            windows: local.iter().map(|&local| if local { window } else { 0 }).collect(),
            local,
            context_length,
            eos: [id("eos")?, id("eot")?, id("eom")?].into_iter().flatten().collect(),
            bos: id("bos")?,
        };
        config.check().or_else(|(field, problem)| keys.fail(format!("{field} {problem}")))?;
        Ok(config)
    }
}

impl Gguf {
    /// The `tokenizer.*` metadata.
    pub fn vocab(&self) -> Result<GgufVocab, gguf::Error> {
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let id = |name: &str| {
            let id = self.optional_int(&key(&format!("{name}_token_id")))?;
            Ok::<_, gguf::Error>(id.map(|id| u32::try_from(id).unwrap_or(u32::MAX)))
        };
        let types = self.optional_ints(&key("token_type"))?;
        Ok(GgufVocab {
            model: self.str(&key("model"))?.into(),
            pre: self.optional_str(&key("pre"))?.map(str::to_owned),
            tokens: self.optional_strings(&key("tokens"))?.unwrap_or_default(),
            scores: self.optional_floats(&key("scores"))?,
            token_types: types
                .map(|types| types.into_iter().map(|t| i32::try_from(t).unwrap_or(i32::MAX)).collect()),
            merges: self.optional_strings(&key("merges"))?,
            bos: id("bos")?,
            eos: id("eos")?,
            unk: id("unknown")?,
            pad: id("padding")?,
            eot: id("eot")?,
            eom: id("eom")?,
            add_bos: self.optional_bool(&key("add_bos_token"))?,
            add_eos: self.optional_bool(&key("add_eos_token"))?,
            add_space_prefix: self.optional_bool(&key("add_space_prefix"))?,
            chat_template: self.optional_str("tokenizer.chat_template")?.map(str::to_owned),
            origin: self.path().display().to_string(),
        })
    }
}
