//! Configurations: rope as transformers computes it, families, what is refused.

use super::{Error, ModelConfig, Rope, RopeScaling};
use serde_json::{Value, json};
use std::path::Path;

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
    type Case = (Value, [f64; 8], f64);
    #[rustfmt::skip]
    let cases: [Case; 7] = [
        (json!({"rope_theta": 1e4}),
         [1.0, 3.162277639e-1, 1.000000015e-1, 3.162277862e-2, 9.999999776e-3, 3.162277862e-3, 1.000000047e-3, 3.162277862e-4], 1.0),
        (json!({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 8.0}}),
         [1.25e-1, 2.222849242e-2, 3.952847328e-3, 7.029266562e-4, 1.250000059e-4, 2.222849253e-5, 3.952846782e-6, 7.029266840e-7], 1.0),
        (json!({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
         [1.0, 7.940301299e-2, 4.700753838e-3, 9.115831344e-4, 1.767766807e-4, 3.428102355e-5, 6.647869668e-6, 1.289173156e-6], 1.0),
        (json!({"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
         [1.0, 3.162277639e-1, 1.000000015e-1, 2.569350600e-2, 6.249999627e-3, 1.383496565e-3, 2.500000119e-4, 7.905694656e-5], 1.138629436),
        (json!({"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}),
         [1.0, 2.470529377e-1, 5.625000224e-2, 1.087033004e-2, 1.249999972e-3, 3.952847328e-4, 1.250000059e-4, 3.952847328e-5], 1.207944155),
        (json!({"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707,
                "beta_fast": 16, "beta_slow": 2, "original_max_position_embeddings": 1024}}),
         [1.0, 3.162277639e-1, 1.000000015e-1, 1.976423711e-2, 2.499999944e-3, 7.905694656e-4, 2.500000119e-4, 7.905694656e-5], 1.036992788),
        (json!({"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5,
                "original_max_position_embeddings": 4096}}),
         [1.0, 1.778279394e-1, 3.162277862e-2, 5.623413250e-3, 1.000000047e-3, 1.778279402e-4, 3.162277426e-5, 5.623413472e-6], 1.5),
    ];
    for (changes, expected, factor) in cases {
        let (found, found_factor) = config(llama(changes.clone())).unwrap().inverse_frequencies(false);
        assert_eq!(found.len(), expected.len());
        for (i, (&a, b)) in found.iter().zip(expected).enumerate() {
            assert!(
                (f64::from(a) - b).abs() <= 4e-7 * b,
                "{changes}: frequency {i} is {a:e}, expected {b:e}"
            );
        }
        assert!(
            (f64::from(found_factor) - factor).abs() <= 2e-7,
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
        config(llama(json!({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": window})))
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
