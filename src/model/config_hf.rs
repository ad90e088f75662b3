//! [`ModelConfig`] from a Hugging Face `config.json`, with the defaults of transformers 4.52.

use super::{
    Error, ModelConfig,
    config::{Biases, MAX_LAYERS, Rope, RopeScaling, inverse_root},
    read_text,
};
use crate::ops::Activation;
use serde_json::{Map, Value};
use std::path::Path;

/// What sets a family apart from Llama.
struct Family {
    /// `model_type` in config.json.
    model_type: &'static str,
    /// Numbers that a config.json may leave out. `num_key_value_heads` and `head_dim` follow from the other numbers
    /// where they are in neither.
    defaults: &'static [(&'static str, f64)],
    attention_bias: AttentionBias,
    sliding: Sliding,
    qk_norm: bool,
    /// Gemma's own: tied embeddings by default, scaled by √hidden; norm weights stored minus one, and norms after each
    /// half of a layer; `query_pre_attn_scalar`; a rope of their own for the layers with a window.
    gemma: bool,
}

enum AttentionBias {
    Never,
    /// q, k and v, always.
    Qkv,
    /// q, k, v and the output, where `attention_bias` says so.
    AsConfigured,
}

/// Which layers have the window, unless `layer_types` says so.
enum Sliding {
    None,
    All,
    /// From `max_window_layers` on, if `use_sliding_window`.
    Upper,
    /// All but every `sliding_window_pattern`-th.
    Pattern,
}

const FAMILIES: [Family; 5] = [
    Family {
        model_type: "llama",
        defaults: &[("max_position_embeddings", 2048.0), ("rms_norm_eps", 1e-6), ("rope_theta", 1e4)],
        attention_bias: AttentionBias::AsConfigured,
        sliding: Sliding::None,
        qk_norm: false,
        gemma: false,
    },
    Family {
        model_type: "mistral",
        defaults: &[
            ("num_key_value_heads", 8.0),
            ("max_position_embeddings", 131_072.0),
            ("rms_norm_eps", 1e-6),
            ("rope_theta", 1e4),
            ("sliding_window", 4096.0),
        ],
        attention_bias: AttentionBias::Never,
        sliding: Sliding::All,
        qk_norm: false,
        gemma: false,
    },
    Family {
        model_type: "qwen2",
        defaults: &[
            ("num_key_value_heads", 32.0),
            ("max_position_embeddings", 32_768.0),
            ("rms_norm_eps", 1e-6),
            ("rope_theta", 1e4),
            ("sliding_window", 4096.0),
            ("max_window_layers", 28.0),
        ],
        attention_bias: AttentionBias::Qkv,
        sliding: Sliding::Upper,
        qk_norm: false,
        gemma: false,
    },
    Family {
        model_type: "qwen3",
        defaults: &[
            ("num_key_value_heads", 32.0),
            ("head_dim", 128.0),
            ("max_position_embeddings", 32_768.0),
            ("rms_norm_eps", 1e-6),
            ("rope_theta", 1e4),
            ("sliding_window", 4096.0),
            ("max_window_layers", 28.0),
        ],
        attention_bias: AttentionBias::AsConfigured,
        sliding: Sliding::Upper,
        qk_norm: true,
        gemma: false,
    },
    Family {
        model_type: "gemma3_text",
        defaults: &[
            ("vocab_size", 262_208.0),
            ("hidden_size", 2304.0),
            ("intermediate_size", 9216.0),
            ("num_hidden_layers", 26.0),
            ("num_attention_heads", 8.0),
            ("num_key_value_heads", 4.0),
            ("head_dim", 256.0),
            ("max_position_embeddings", 131_072.0),
            ("rms_norm_eps", 1e-6),
            ("rope_theta", 1e6),
            ("query_pre_attn_scalar", 256.0),
            ("sliding_window", 4096.0),
            ("rope_local_base_freq", 1e4),
            ("sliding_window_pattern", 6.0),
        ],
        attention_bias: AttentionBias::AsConfigured,
        sliding: Sliding::Pattern,
        qk_norm: true,
        gemma: true,
    },
];

/// One JSON object, with errors that name file and field. `null` counts as absent, but stops a default.
#[derive(Clone, Copy)]
struct Fields<'a> {
    path: &'a Path,
    object: &'a Map<String, Value>,
    defaults: &'a [(&'static str, f64)],
}

impl<'a> Fields<'a> {
    fn fail<T>(&self, problem: String) -> Result<T, Error> {
        Err(Error::Config { path: self.path.into(), problem })
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn default(&self, key: &str) -> Option<f64> {
        let default = self.defaults.iter().find(|(name, _)| *name == key).map(|(_, value)| *value);
        default.filter(|_| !self.object.contains_key(key))
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => self.fail(format!("`{key}` is {}, expected {expected}", brief(value))),
        }
    }

    fn require<T>(&self, key: &str, value: Option<T>) -> Result<T, Error> {
        value.map_or_else(|| self.fail(format!("`{key}` is missing")), Ok)
    }

    fn optional_int(&self, key: &str) -> Result<Option<usize>, Error> {
        let whole = |value: &Value| value.as_u64().and_then(|v| usize::try_from(v).ok());
        Ok(self.read(key, "a non-negative integer", whole)?.or(self.default(key).map(|v| v as usize)))
    }

    fn int(&self, key: &str) -> Result<usize, Error> {
        self.require(key, self.optional_int(key)?)
    }

    fn optional_float(&self, key: &str) -> Result<Option<f64>, Error> {
        Ok(self.read(key, "a number", Value::as_f64)?.or(self.default(key)))
    }

    fn float(&self, key: &str) -> Result<f64, Error> {
        self.require(key, self.optional_float(key)?)
    }

    fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.read(key, "true or false", Value::as_bool)
    }

    fn optional_str(&self, key: &str) -> Result<Option<&'a str>, Error> {
        self.read(key, "a string", Value::as_str)
    }

    fn object(&self, key: &str) -> Result<Option<Fields<'a>>, Error> {
        let object = self.read(key, "an object", Value::as_object)?;
        Ok(object.map(|object| Fields { object, ..*self }))
    }

    /// One token id or a list of them.
    fn ids(&self, key: &str) -> Result<Option<Vec<u32>>, Error> {
        let id = |value: &Value| value.as_u64().and_then(|v| u32::try_from(v).ok());
        self.read(key, "a token id or a list of them", |value| match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        })
    }
}

/// Enough of a value to find it by.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn activation(fields: &Fields<'_>, family: &Family) -> Result<Activation, Error> {
    let name = match fields.optional_str("hidden_activation")? {
        None => fields.optional_str("hidden_act")?,
        name => name,
    };
    match name.unwrap_or(if family.gemma { "gelu_pytorch_tanh" } else { "silu" }) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Ok(Activation::GeluTanh),
        "gelu" => Ok(Activation::GeluErf),
        name => Err(Error::UnknownActivation { path: fields.path.into(), name: name.into() }),
    }
}

/// `scaling` is the object that says how theta's frequencies are stretched.
fn rope(fields: &Fields<'_>, theta: f64, scaling: Option<Fields<'_>>) -> Result<Rope, Error> {
    let theta = theta as f32;
    let Some(scaling) = scaling else { return Ok(Rope { theta, scaling: RopeScaling::None }) };
    let kind = match scaling.optional_str("rope_type")? {
        None => scaling.optional_str("type")?,
        kind => kind,
    };
    let float = |key: &str| scaling.float(key).map(|v| v as f32);
    let scaling = match kind.unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: float("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: float("factor")?,
            low_freq_factor: float("low_freq_factor")?,
            high_freq_factor: float("high_freq_factor")?,
            original_context: float("original_max_position_embeddings")?,
        },
        "yarn" => {
            let context = fields.float("max_position_embeddings")?;
            // As transformers 4.52: a context given here wins over `factor`.
            let (factor, original) = match scaling.optional_float("original_max_position_embeddings")? {
                Some(original) => (context / original, original),
                None => (scaling.float("factor")?, context),
            };
            let mscale = |key| scaling.optional_float(key).map(|v| v.filter(|&v| v != 0.0));
            let attention_factor = match scaling.optional_float("attention_factor")? {
                Some(given) => given as f32,
                None => match (mscale("mscale")?, mscale("mscale_all_dim")?) {
                    (Some(one), Some(all)) => {
                        RopeScaling::yarn_attention_factor(factor as f32, one as f32)
                            / RopeScaling::yarn_attention_factor(factor as f32, all as f32)
                    }
                    _ => RopeScaling::yarn_attention_factor(factor as f32, 1.0),
                },
            };
            // 0 counts as not given.
            let beta = |key, default: f64| {
                scaling.optional_float(key).map(|v| v.filter(|&v| v != 0.0).unwrap_or(default) as f32)
            };
            RopeScaling::Yarn {
                factor: factor as f32,
                original_context: original as f32,
                beta_fast: beta("beta_fast", 32.0)?,
                beta_slow: beta("beta_slow", 1.0)?,
                attention_factor,
            }
        }
        other => {
            return Err(Error::UnknownRopeScaling { path: fields.path.into(), name: other.into() });
        }
    };
    Ok(Rope { theta, scaling })
}

/// Global and local rope. transformers 5 writes `rope_parameters`, one object or one per kind of layer; before that it
/// was `rope_theta`, `rope_scaling` and `rope_local_base_freq`.
fn ropes(fields: &Fields<'_>, gemma: bool) -> Result<(Rope, Option<Rope>), Error> {
    let Some(parameters) = fields.object("rope_parameters")? else {
        let global = rope(fields, fields.float("rope_theta")?, fields.object("rope_scaling")?)?;
        let local = match gemma {
            true => Some(rope(fields, fields.float("rope_local_base_freq")?, None)?),
            false => None,
        };
        return Ok((global, local));
    };
    let of = |parameters: Fields<'_>, default: &str| {
        let theta = parameters.optional_float("rope_theta")?;
        rope(fields, theta.map_or_else(|| fields.float(default), Ok)?, Some(parameters))
    };
    let global = of(parameters.object("full_attention")?.unwrap_or(parameters), "rope_theta")?;
    let local = match (gemma, parameters.object("sliding_attention")?) {
        (false, _) => None,
        (true, Some(parameters)) => Some(of(parameters, "rope_local_base_freq")?),
        (true, None) => Some(rope(fields, fields.float("rope_local_base_freq")?, None)?),
    };
    Ok((global, local))
}

fn sliding_layers(fields: &Fields<'_>, family: &Family, layers: usize) -> Result<Vec<bool>, Error> {
    if let Some(types) = fields.read("layer_types", "a list", Value::as_array)? {
        if types.len() != layers {
            return fields.fail(format!("`layer_types` has {} entries for {layers} layers", types.len()));
        }
        let sliding = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => fields.fail(format!("`layer_types` names the unknown kind {}", brief(kind))),
        };
        return types.iter().map(sliding).collect();
    }
    match family.sliding {
        Sliding::None => Ok(vec![false; layers]),
        Sliding::All => Ok(vec![true; layers]),
        Sliding::Upper => {
            let first = match fields.bool("use_sliding_window")? {
                Some(true) => fields.int("max_window_layers")?,
                _ => layers,
            };
            Ok((0..layers).map(|n| n >= first).collect())
        }
        Sliding::Pattern => {
            let every = fields.int("sliding_window_pattern")?;
            if every == 0 {
                return fields.fail("`sliding_window_pattern` is 0".into());
            }
            Ok((1..=layers).map(|n| n % every != 0).collect())
        }
    }
}

impl ModelConfig {
    /// Reads `config.json` and, for the ids that end a text, `generation_config.json` of a folder.
    pub fn from_folder(folder: &Path) -> Result<ModelConfig, Error> {
        let path = folder.join("config.json");
        let generation_path = folder.join("generation_config.json");
        let generation = if generation_path.is_file() { read_text(&generation_path)? } else { "{}".into() };
        let generation: Value = parse(&generation_path, &generation)?;
        Self::from_json(&path, &parse(&path, &read_text(&path)?)?, &generation)
    }

    fn from_json(path: &Path, json: &Value, generation: &Value) -> Result<ModelConfig, Error> {
        let whole = json.as_object();
        let whole =
            whole.ok_or_else(|| Error::Config { path: path.into(), problem: "is not an object".into() })?;
        let whole = Fields { path, object: whole, defaults: &[] };
        if whole.get("quantization_config").is_some() {
            return whole.fail("the weights are quantised; use the unquantised folder or a GGUF file".into());
        }
        let model_type = whole.require("model_type", whole.optional_str("model_type")?)?;
        // Gemma 3 with eyes: the decoder is described inside.
        let text = if model_type == "gemma3" { whole.object("text_config")? } else { None };
        let name = if text.is_some() { "gemma3_text" } else { model_type };
        let family = FAMILIES.iter().find(|family| family.model_type == name);
        let family = family
            .ok_or_else(|| Error::UnknownArchitecture { path: path.into(), name: model_type.into() })?;
        let fields = Fields { defaults: family.defaults, ..text.unwrap_or(whole) };

        if let Some(part) = fields.optional_float("partial_rotary_factor")?.filter(|&part| part != 1.0) {
            return fields.fail(format!("`partial_rotary_factor` is {part}; only whole heads are rotated"));
        }
        let (hidden, layers) = (fields.int("hidden_size")?, fields.int("num_hidden_layers")?);
        let heads = fields.int("num_attention_heads")?;
        let head_dim = fields.optional_int("head_dim")?.unwrap_or(hidden / heads.max(1));
        let (rope, rope_local) = ropes(&fields, family.gemma)?;
        let sliding = sliding_layers(&fields, family, layers.min(MAX_LAYERS))?;
        let window = fields.optional_int("sliding_window")?.unwrap_or(0);
        let window = u32::try_from(window).unwrap_or(0);
        let attention_bias = fields.bool("attention_bias")?.unwrap_or(false);
        let biases = match family.attention_bias {
            AttentionBias::Never => (false, false),
            AttentionBias::Qkv => (true, false),
            AttentionBias::AsConfigured => (attention_bias, attention_bias),
        };
        let scaled_by = match family.gemma {
            true => fields.float("query_pre_attn_scalar")?,
            false => head_dim as f64,
        };
        let no_generation = Map::new();
        let generation = Fields { object: generation.as_object().unwrap_or(&no_generation), ..whole };
        let ids = |key: &str| {
            for place in [generation, whole, fields] {
                if let Some(ids) = place.ids(key)? {
                    return Ok::<_, Error>(ids);
                }
            }
            Ok(Vec::new())
        };
        let tied = match fields.bool("tie_word_embeddings")? {
            None => whole.bool("tie_word_embeddings")?.unwrap_or(family.gemma),
            Some(tied) => tied,
        };
        let cap = |key: &str| fields.optional_float(key).map(|cap| cap.unwrap_or(0.0) as f32);
        let config = ModelConfig {
            architecture: name.into(),
            vocab: fields.int("vocab_size")?,
            hidden,
            layers,
            heads,
            kv_heads: fields.optional_int("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            ffn: fields.int("intermediate_size")?,
            norm_eps: fields.float("rms_norm_eps")? as f32,
            norm_offset: if family.gemma { 1.0 } else { 0.0 },
            activation: activation(&fields, family)?,
            embed_scale: if family.gemma { (hidden as f64).sqrt() as f32 } else { 1.0 },
            attention_scale: inverse_root(scaled_by),
            attention_soft_cap: cap("attn_logit_softcapping")?,
            final_soft_cap: cap("final_logit_softcapping")?,
            biases: Biases {
                qkv: biases.0,
                attn_out: biases.1,
                ffn: fields.bool("mlp_bias")?.unwrap_or(false),
            },
            qk_norm: family.qk_norm,
            post_norms: family.gemma,
            tied,
            rope,
            rope_local,
            interleaved_rope: false,
            windows: sliding.iter().map(|&sliding| if sliding { window } else { 0 }).collect(),
            local: sliding.iter().map(|&sliding| sliding && family.gemma).collect(),
            context_length: fields.int("max_position_embeddings")?,
            eos: ids("eos_token_id")?,
            bos: ids("bos_token_id")?.first().copied(),
        };
        config.check().or_else(|(field, problem)| fields.fail(format!("{field} {problem}")))?;
        Ok(config)
    }
}

fn parse(path: &Path, text: &str) -> Result<Value, Error> {
    serde_json::from_str(text)
        .map_err(|e| Error::Config { path: path.into(), problem: format!("is not valid JSON: {e}") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(json: Value) -> Result<ModelConfig, Error> {
        ModelConfig::from_json(Path::new("config.json"), &json, &json!({}))
    }

    /// A Llama with `changes` on top.
    fn llama(changes: Value) -> Value {
        let mut json = json!({
            "model_type": "llama", "vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 96,
            "max_position_embeddings": 4096, "eos_token_id": [3, 4], "bos_token_id": 1,
        });
        let object = json.as_object_mut().unwrap();
        object.extend(changes.as_object().unwrap().clone());
        json
    }

    /// Values of transformers 4.52.4's `ROPE_INIT_FUNCTIONS` on the same configurations.
    #[test]
    fn frequencies_are_those_of_transformers() {
        type Case = (Value, [f32; 8], f32);
        let cases: [Case; 7] = [
            (
                json!({"rope_theta": 1e4}),
                [
                    1.0,
                    3.162277639e-01,
                    1.000000015e-01,
                    3.162277862e-02,
                    9.999999776e-03,
                    3.162277862e-03,
                    1.000000047e-03,
                    3.162277862e-04,
                ],
                1.0,
            ),
            (
                json!({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 8.0}}),
                [
                    1.250000000e-01,
                    2.222849242e-02,
                    3.952847328e-03,
                    7.029266562e-04,
                    1.250000059e-04,
                    2.222849253e-05,
                    3.952846782e-06,
                    7.029266840e-07,
                ],
                1.0,
            ),
            (
                json!({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
                [
                    1.0,
                    7.940301299e-02,
                    4.700753838e-03,
                    9.115831344e-04,
                    1.767766807e-04,
                    3.428102355e-05,
                    6.647869668e-06,
                    1.289173156e-06,
                ],
                1.0,
            ),
            (
                json!({"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
                [
                    1.0,
                    3.162277639e-01,
                    1.000000015e-01,
                    2.569350600e-02,
                    6.249999627e-03,
                    1.383496565e-03,
                    2.500000119e-04,
                    7.905694656e-05,
                ],
                1.13862943649292,
            ),
            (
                json!({"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                    "original_max_position_embeddings": 512}}),
                [
                    1.0,
                    2.470529377e-01,
                    5.625000224e-02,
                    1.087033004e-02,
                    1.249999972e-03,
                    3.952847328e-04,
                    1.250000059e-04,
                    3.952847328e-05,
                ],
                1.2079441547393799,
            ),
            (
                json!({"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0,
                    "mscale_all_dim": 0.707, "beta_fast": 16, "beta_slow": 2,
                    "original_max_position_embeddings": 1024}}),
                [
                    1.0,
                    3.162277639e-01,
                    1.000000015e-01,
                    1.976423711e-02,
                    2.499999944e-03,
                    7.905694656e-04,
                    2.500000119e-04,
                    7.905694656e-05,
                ],
                1.0369927883148193,
            ),
            (
                json!({"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                    "attention_factor": 1.5, "original_max_position_embeddings": 4096}}),
                [
                    1.0,
                    1.778279394e-01,
                    3.162277862e-02,
                    5.623413250e-03,
                    1.000000047e-03,
                    1.778279402e-04,
                    3.162277426e-05,
                    5.623413472e-06,
                ],
                1.5,
            ),
        ];
        for (changes, expected, factor) in cases {
            let (found, found_factor) = config(llama(changes.clone())).unwrap().inverse_frequencies(false);
            assert_eq!(found.len(), expected.len());
            for (i, (a, b)) in found.iter().zip(expected).enumerate() {
                assert!((a - b).abs() <= 4e-7 * b, "{changes}: frequency {i} is {a:e}, expected {b:e}");
            }
            assert!(
                (found_factor - factor).abs() <= 2e-7,
                "{changes}: factor {found_factor}, expected {factor}"
            );
        }
    }

    #[test]
    fn transformers_5_rope_parameters_say_the_same() {
        let scaling = json!({"rope_type": "linear", "factor": 8.0});
        let old = config(llama(json!({"rope_theta": 1e6, "rope_scaling": scaling}))).unwrap();
        let parameters = json!({"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0});
        assert_eq!(config(llama(json!({"rope_parameters": parameters}))).unwrap(), old);
    }

    #[test]
    fn gemma_3_with_eyes_is_its_text_part() {
        // As published: most numbers are left to the defaults of the class.
        let config = config(json!({
            "model_type": "gemma3", "eos_token_id": [1, 106], "vision_config": {"hidden_size": 1152},
            "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                "num_hidden_layers": 34, "sliding_window": 1024,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        }))
        .unwrap();
        assert_eq!((config.vocab, config.hidden, config.layers, config.ffn), (262_208, 2560, 34, 10_240));
        assert_eq!((config.heads, config.kv_heads, config.head_dim), (8, 4, 256));
        assert_eq!((config.attention_scale, config.norm_offset, config.tied), (0.0625, 1.0, true));
        assert_eq!(config.windows[..7], [1024, 1024, 1024, 1024, 1024, 0, 1024]);
        assert_eq!(config.rope, Rope { theta: 1e6, scaling: RopeScaling::Linear { factor: 8.0 } });
        assert_eq!(config.rope_local, Some(Rope { theta: 1e4, scaling: RopeScaling::None }));
        assert_eq!(config.eos, [1, 106]);
    }

    #[test]
    fn windows_follow_each_family() {
        let mistral = |window: Value| {
            config(llama(
                json!({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": window}),
            ))
        };
        assert_eq!(mistral(json!(100)).unwrap().windows, [100, 100]);
        assert_eq!(mistral(Value::Null).unwrap().windows, [0, 0]);
        let qwen = |on: bool| {
            config(llama(json!({"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 100,
                "max_window_layers": 1, "use_sliding_window": on})))
        };
        assert_eq!(qwen(true).unwrap().windows, [0, 100]);
        assert_eq!(qwen(false).unwrap().windows, [0, 0]);
        assert!(qwen(true).unwrap().local.iter().all(|local| !local), "only Gemma has a rope of its own");
    }

    #[test]
    fn what_is_unknown_or_wrong_is_named() {
        let error = |changes: Value| config(llama(changes)).unwrap_err();
        assert!(
            matches!(error(json!({"model_type": "mamba"})), Error::UnknownArchitecture { name, .. } if name == "mamba")
        );
        assert!(
            matches!(error(json!({"hidden_act": "relu"})), Error::UnknownActivation { name, .. } if name == "relu")
        );
        let scaling = json!({"rope_scaling": {"rope_type": "longrope"}});
        assert!(matches!(error(scaling), Error::UnknownRopeScaling { name, .. } if name == "longrope"));
        for (changes, named) in [
            (json!({"hidden_size": null}), "`hidden_size` is missing"),
            (json!({"hidden_size": -1}), "`hidden_size` is -1"),
            (json!({"hidden_size": "64"}), "`hidden_size` is \"64\""),
            (json!({"num_attention_heads": 0}), "number of heads is 0"),
            (json!({"num_key_value_heads": 3}), "not a multiple"),
            (json!({"num_hidden_layers": 1_000_000_000_000u64}), "number of layers"),
            (json!({"head_dim": 15}), "odd"),
            (json!({"rms_norm_eps": 0}), "norm epsilon"),
            (json!({"rope_theta": -1e4}), "rope"),
            (json!({"rope_scaling": {"rope_type": "linear", "factor": 0}}), "rope"),
            (json!({"rope_scaling": {"rope_type": "linear"}}), "`factor` is missing"),
            (json!({"partial_rotary_factor": 0.5}), "`partial_rotary_factor`"),
            (json!({"layer_types": ["full_attention"]}), "`layer_types`"),
            (json!({"quantization_config": {"quant_method": "awq"}}), "quantised"),
            (json!({"eos_token_id": -3}), "`eos_token_id`"),
        ] {
            let message = error(changes.clone()).to_string();
            assert!(message.contains(named) && message.contains("config.json"), "{changes}: {message}");
        }
    }

    #[test]
    fn the_fingerprint_is_of_the_cache_not_of_the_file() {
        let plain = config(llama(json!({}))).unwrap();
        let same = ModelConfig {
            norm_offset: 1.0,
            interleaved_rope: true,
            vocab: 40,
            eos: vec![],
            context_length: 99,
            architecture: "other".into(),
            ..plain.clone()
        };
        assert_eq!(plain.fingerprint(), same.fingerprint());
        for changes in [
            json!({"rope_theta": 2e4}),
            json!({"num_key_value_heads": 2}),
            json!({"attention_bias": true}),
            json!({"rms_norm_eps": 1e-5}),
            json!({"num_hidden_layers": 3}),
        ] {
            let other = config(llama(changes.clone())).unwrap();
            assert_ne!(plain.fingerprint(), other.fingerprint(), "{changes}");
        }
    }
}
