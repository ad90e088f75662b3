//! Whole models: the tiny ones of the goldens, and real GGUF files where there are some.

mod goldens;
mod readers;

use c2c::{
    backend::{self, Backend, DeviceChoice, Queue, Tensor},
    model::{self, Loaded, ModelConfig, Source},
    ops::Weight,
};
use std::{
    cell::Cell,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Models of the goldens.
fn golden_models() -> Vec<PathBuf> {
    let folder = goldens::find("models").and_then(|folder| fs::read_dir(folder).ok());
    let mut models: Vec<_> = folder.into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    models.retain(|path| path.join("config.json").is_file());
    models.sort();
    models
}

fn load(path: &Path, backend: &Arc<dyn Backend>) -> Loaded {
    let seen = Cell::new((0, 0));
    let loaded = model::load(path, backend, &|done, total| {
        assert!(done >= seen.get().0 && done <= total, "progress runs backwards or past its end");
        seen.set((done, total));
    });
    let loaded = loaded.unwrap_or_else(|error| panic!("{error}"));
    let (done, total) = seen.get();
    assert!(total > 0 && done == total, "{path:?}: progress ends at {done} of {total}");
    loaded
}

fn dims(weight: &Weight) -> Vec<(&[usize], bool)> {
    weight.parts.iter().map(|part| (part.matrix.shape(), part.bias.is_some())).collect()
}

fn check_shapes(loaded: &Loaded) {
    let (c, w) = (&loaded.config, &loaded.weights);
    let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    assert_eq!(w.embed.shape(), [c.vocab, c.hidden]);
    assert_eq!(w.final_norm.shape(), [c.hidden]);
    assert_eq!(dims(&w.lm_head), [(&[c.vocab, c.hidden][..], false)]);
    let same = w.lm_head.parts[0].matrix.byte_offset() == w.embed.byte_offset();
    assert_eq!(same, c.tied, "the head is the embedding table exactly where the model ties them");
    assert_eq!((w.layers.len(), c.windows.len(), c.local.len()), (c.layers, c.layers, c.layers));
    for layer in &w.layers {
        assert_eq!(layer.attn_norm.shape(), [c.hidden]);
        assert_eq!(layer.ffn_norm.shape(), [c.hidden]);
        let qkv = [q, kv, kv].map(|rows| ([rows, c.hidden], c.biases.qkv));
        assert_eq!(dims(&layer.qkv), qkv.each_ref().map(|(dims, bias)| (&dims[..], *bias)));
        assert_eq!(dims(&layer.attn_out), [(&[c.hidden, q][..], c.biases.attn_out)]);
        assert_eq!(dims(&layer.gate_up), [(&[c.ffn, c.hidden][..], c.biases.ffn); 2]);
        assert_eq!(dims(&layer.down), [(&[c.hidden, c.ffn][..], c.biases.ffn)]);
        for norm in [&layer.q_norm, &layer.k_norm] {
            assert_eq!(norm.as_ref().map(Tensor::shape), c.qk_norm.then_some(&[c.head_dim][..]));
        }
        for norm in [&layer.post_attn_norm, &layer.post_ffn_norm] {
            assert_eq!(norm.as_ref().map(Tensor::shape), c.post_norms.then_some(&[c.hidden][..]));
        }
    }
}

/// What the goldens' README says of the models it describes: layers, hidden, heads, kv heads, head_dim, ffn, vocab, tied.
fn described(c: &ModelConfig) -> ([usize; 7], bool) {
    ([c.layers, c.hidden, c.heads, c.kv_heads, c.head_dim, c.ffn, c.vocab], c.tied)
}

#[test]
fn golden_models_load() {
    let backend = backend::open(DeviceChoice::Cpu, 1).unwrap();
    let queue = Queue::new(&backend).unwrap();
    for path in golden_models() {
        let loaded = load(&path, &backend);
        check_shapes(&loaded);
        assert!(matches!(&loaded.source, Source::Folder(folder) if folder == &path));
        let c = &loaded.config;
        match path.file_name().and_then(|name| name.to_str()).unwrap() {
            "qwen3_tiny" => assert_eq!(described(c), ([4, 64, 4, 2, 16, 96, 384], true)),
            "qwen3_wide" => assert_eq!(described(c), ([3, 48, 4, 1, 32, 80, 384], false)),
            "qwen2_tiny" => assert_eq!(described(c), ([3, 48, 4, 2, 12, 96, 384], true)),
            "llama_tiny" => assert_eq!(described(c), ([5, 48, 4, 4, 16, 64, 320], false)),
            "gemma3_tiny" => {
                assert_eq!(described(c), ([6, 48, 4, 1, 24, 64, 352], true));
                assert_eq!(c.windows, [32, 32, 0, 32, 32, 0]);
                assert_eq!(c.local, [true, true, false, true, true, false]);
                assert_eq!((c.norm_offset, c.attention_scale), (1.0, 24f64.sqrt().recip() as f32));
            }
            _ => {}
        }
        // The mapped tensors hold what another reader finds.
        let bytes = fs::read(path.join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let last = c.layers - 1;
        let layer = &loaded.weights.layers[last];
        for (name, tensor) in [
            ("model.embed_tokens", &loaded.weights.embed),
            ("model.norm", &loaded.weights.final_norm),
            (&*format!("model.layers.{last}.self_attn.k_proj"), &layer.qkv.parts[1].matrix),
            (&*format!("model.layers.{last}.mlp.up_proj"), &layer.gate_up.parts[1].matrix),
            (&*format!("model.layers.{last}.mlp.down_proj"), &layer.down.parts[0].matrix),
        ] {
            let expected = file.tensor(&format!("{name}.weight")).unwrap();
            let found = queue.download(tensor).unwrap();
            assert!(found == expected.data(), "{path:?}: {name} holds other bytes");
        }
    }
}

#[test]
fn real_gguf_files_load() {
    let backend = backend::open(DeviceChoice::Cpu, 1).unwrap();
    for path in goldens::models() {
        let loaded = load(&path, &backend);
        check_shapes(&loaded);
        let Source::Gguf(gguf) = &loaded.source else { panic!("{path:?} is a GGUF file") };
        let vocab = gguf.vocab().unwrap();
        let c = &loaded.config;
        assert_eq!(vocab.tokens.len(), c.vocab, "{path:?}");
        assert!(!c.eos.is_empty() && c.eos.iter().all(|&id| (id as usize) < c.vocab), "{path:?}");
        assert_eq!(c.norm_offset, 0.0, "the converter adds Gemma's one");
        assert_eq!(c.interleaved_rope, c.architecture == "llama");
        eprintln!("{}: {c:?}", path.display());
    }
}

#[test]
fn one_model_in_two_formats_has_one_fingerprint() {
    let folder = tempfile::tempdir().unwrap();
    readers::write_sharded(folder.path());
    // Llama 3's scaling as a GGUF converter writes it: a divisor per frequency.
    let scaling = &readers::config_json()["rope_scaling"];
    let number = |key: &str| scaling[key].as_f64().unwrap();
    let (factor, low, high) = (number("factor"), number("low_freq_factor"), number("high_freq_factor"));
    let context = number("original_max_position_embeddings");
    let divisors = (0..8).map(|i| {
        let wavelength = 2.0 * std::f64::consts::PI * 10_000f64.powf(f64::from(i) / 8.0);
        let smooth = (context / wavelength - low) / (high - low);
        match wavelength {
            w if w < context / high => 1.0,
            w if w > context / low => factor as f32,
            _ => (1.0 / ((1.0 - smooth) / factor + smooth)) as f32,
        }
    });
    let mut gguf = readers::GgufFile::llama();
    gguf.tensor_f32("rope_freqs.weight", &divisors.collect::<Vec<_>>());
    let path = folder.path().join("model.gguf");
    fs::write(&path, gguf.bytes().0).unwrap();
    let backend = backend::open(DeviceChoice::Cpu, 1).unwrap();
    let (a, b) = (load(folder.path(), &backend), load(&path, &backend));
    check_shapes(&a);
    check_shapes(&b);
    let (a, b) = (a.config, b.config);
    for (a, b) in a.inverse_frequencies(false).0.iter().zip(b.inverse_frequencies(false).0) {
        assert!((a - b).abs() <= 4e-7 * a, "frequency {a:e} in one format, {b:e} in the other");
    }
    assert_eq!(a.fingerprint(), b.fingerprint());
    assert_ne!(a.interleaved_rope, b.interleaved_rope);
}
