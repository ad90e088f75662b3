//! Broken and lying model files: each is an error that names what is wrong, never a panic.

mod readers;

use c2c::{
    backend::{self, DeviceChoice, Queue},
    model::{self, Error, Gguf, Loaded, gguf},
};
use readers::*;
use std::{fs, path::Path};

fn load(path: &Path) -> Result<Loaded, Error> {
    model::load(path, &backend::open(DeviceChoice::Cpu, 1).unwrap(), &|_, _| {})
}

fn load_gguf(bytes: &[u8]) -> Result<Loaded, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    load(&path)
}

/// The error of a GGUF file after `lie` has changed it.
fn gguf_error(lie: impl FnOnce(&mut GgufFile)) -> Error {
    let mut file = GgufFile::llama();
    lie(&mut file);
    load_gguf(&file.bytes().0).err().expect("the file lies")
}

macro_rules! refused {
    ($lie:expr, $pattern:pat $(if $guard:expr)?) => {{
        let error = gguf_error($lie);
        assert!(matches!(&error, Error::Gguf { source: $pattern, .. } $(if $guard)?), "{error}");
    }};
}

#[test]
fn the_sound_file_loads() {
    for version in [2, 3] {
        let file = GgufFile { version, ..GgufFile::llama() };
        let loaded = load_gguf(&file.bytes().0).unwrap();
        let config = &loaded.config;
        // The file says neither vocabulary size nor head dimension.
        assert_eq!((config.vocab, config.head_dim, config.kv_heads), (6, 16, 1));
        assert!(config.tied && config.interleaved_rope);
        assert_eq!(config.eos, [2]);
        // The tensors are where the file says.
        let queue = Queue::new(&backend::open(DeviceChoice::Cpu, 1).unwrap()).unwrap();
        let (layer, mut file) = (&loaded.weights.layers[0], file);
        for (name, tensor) in [
            ("token_embd.weight", &loaded.weights.embed),
            ("output_norm.weight", &loaded.weights.final_norm),
            ("blk.0.attn_v.weight", &layer.qkv.parts[2].matrix),
            ("blk.0.ffn_gate.weight", &layer.gate_up.parts[0].matrix),
            ("blk.0.ffn_down.weight", &layer.down.parts[0].matrix),
        ] {
            let at = file.find(name).offset as usize;
            let bytes = queue.download(tensor).unwrap();
            assert!(bytes == file.data[at..at + bytes.len()], "{name} holds other bytes");
        }
        let model::Source::Gguf(gguf) = &loaded.source else { panic!("came from a GGUF file") };
        let vocab = gguf.vocab().unwrap();
        assert_eq!((vocab.model.as_str(), vocab.tokens.len(), vocab.eos), ("gpt2", 6, Some(2)));
        assert_eq!(vocab.merges.unwrap(), ["a b"]);
        assert_eq!(vocab.scores, None);
    }
}

#[test]
fn every_truncation_is_an_error() {
    let (bytes, header) = GgufFile::llama().bytes();
    let data_ends = bytes.len() - 31;
    for len in (0..header + 64).chain([data_ends - 100]) {
        assert!(load_gguf(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
    }
}

#[test]
fn gguf_headers_that_lie() {
    refused!(|f| f.magic = *b"GGML", gguf::Error::Magic(_));
    refused!(|f| f.version = 1, gguf::Error::Version(1));
    refused!(|f| f.version = 4, gguf::Error::Version(4));
    refused!(|f| f.version = 3u32.swap_bytes(), gguf::Error::BigEndian);
    for count in [u64::MAX, 1 << 40, 100_000] {
        refused!(|f| f.tensor_count = Some(count), gguf::Error::Count { what: "tensors", .. });
        refused!(|f| f.metadata_count = Some(count), gguf::Error::Count { what: "metadata entries", .. });
    }
    let again = |f: &mut GgufFile| f.metadata.push(("llama.block_count".into(), u32_value(1)));
    refused!(again, gguf::Error::DuplicateKey(key) if key == "llama.block_count");
    refused!(|f| f.metadata.push((vec![0xFF, 0xFE], u32_value(1))), gguf::Error::Utf8 { .. });
    refused!(|f| f.set("general.architecture", string_value(b"\xFF\xFE")), gguf::Error::Utf8 { .. });
    refused!(|f| f.set("x", 77u32.to_le_bytes().to_vec()), gguf::Error::ValueType { kind: 77, .. });
    // An array of arrays, and one that claims 2⁶⁰ elements.
    let array = |of: u32, len: u64| [&9u32.to_le_bytes()[..], &of.to_le_bytes(), &len.to_le_bytes()].concat();
    refused!(|f| f.set("x", array(9, 1)), gguf::Error::NestedArray(key) if key == "x");
    refused!(|f| f.set("x", array(4, 1 << 60)), gguf::Error::Count { what: "array elements", .. });
    refused!(|f| f.set("x", array(8, 1 << 60)), gguf::Error::Count { what: "array elements", .. });
    // A string of 2⁶³ bytes.
    let endless = [&8u32.to_le_bytes()[..], &(1u64 << 63).to_le_bytes()].concat();
    refused!(|f| f.set("x", endless), gguf::Error::Truncated { .. });
    for alignment in [0, 3, 48] {
        refused!(|f| f.set("general.alignment", u32_value(alignment)), gguf::Error::Alignment(_));
    }
    refused!(|f| f.set("general.alignment", u32_value(1 << 31)), gguf::Error::TensorOffset { .. });
    refused!(|f| f.set("general.alignment", f32_value(32.0)), gguf::Error::WrongType { .. });
    refused!(|f| f.set("llama.block_count", string_value(b"one")), gguf::Error::WrongType { .. });
    refused!(|f| f.metadata.retain(|(key, _)| key != b"llama.block_count"), gguf::Error::MissingKey(_));
}

#[test]
fn gguf_tensors_that_lie() {
    let q = "blk.0.attn_q.weight";
    for dims in [vec![0, 32], vec![u64::MAX, 2], vec![1 << 62, 1 << 62], vec![33, 32], vec![], vec![32; 5]] {
        refused!(|f| f.find(q).dims = dims, gguf::Error::TensorShape { name, .. } if name == q);
    }
    refused!(|f| f.find(q).kind = 23, gguf::Error::TensorType { name, kind } if name == q && kind == "IQ4_XS");
    refused!(|f| f.find(q).kind = 999, gguf::Error::TensorType { kind, .. } if kind == "number 999");
    refused!(|f| f.find(q).offset += 1, gguf::Error::TensorOffset { .. });
    refused!(|f| f.find(q).offset = u64::MAX - 31, gguf::Error::Truncated { .. });
    refused!(|f| f.find(q).offset = 1 << 40, gguf::Error::Truncated { .. });
    refused!(|f| f.find(q).offset = 0, gguf::Error::Overlap(..));
    refused!(|f| f.find(q).name = b"\xC0".to_vec(), gguf::Error::Utf8 { .. });
    refused!(|f| f.find(q).name = b"blk.0.attn_k.weight".to_vec(), gguf::Error::DuplicateTensor(_));
}

#[test]
fn gguf_models_that_do_not_fit() {
    let q = "blk.0.attn_q.weight";
    let error = gguf_error(|f| f.find(q).name = b"blk.0.attn_x.weight".to_vec());
    assert!(matches!(&error, Error::MissingTensor { name, .. } if name == q), "{error}");
    let error = gguf_error(|f| f.find(q).dims = vec![32, 31]);
    assert!(
        matches!(&error, Error::TensorShape { name, found, .. } if name == q && found == &[31, 32]),
        "{error}"
    );
    // A norm that is quantised.
    let norm = "blk.0.attn_norm.weight";
    let error = gguf_error(|f| f.find(norm).kind = Q8_0);
    assert!(
        matches!(&error, Error::TensorType { name, found, .. } if name == norm && found == "Q8_0"),
        "{error}"
    );
    let error = gguf_error(|f| f.set("general.architecture", string_value(b"mamba")));
    assert!(matches!(&error, Error::UnknownArchitecture { name, .. } if name == "mamba"), "{error}");
    let error = gguf_error(|f| f.set("llama.rope.scaling.type", string_value(b"longrope")));
    assert!(matches!(&error, Error::UnknownRopeScaling { name, .. } if name == "longrope"), "{error}");
    for (key, value) in [
        ("block_count", u32_value(u32::MAX)),
        ("attention.head_count", u32_value(0)),
        ("attention.key_length", u32_value(u32::MAX)),
        ("rope.dimension_count", u32_value(8)),
        ("rope.freq_base", f32_value(f32::NAN)),
        ("attention.layer_norm_rms_epsilon", f32_value(f32::INFINITY)),
        ("expert_count", u32_value(8)),
    ] {
        let error = gguf_error(|f| f.set(&format!("llama.{key}"), value));
        assert!(matches!(error, Error::Config { .. }), "{key}: {error}");
    }
}

#[test]
fn a_vocabulary_that_is_not_text() {
    let mut file = GgufFile::llama();
    file.set("tokenizer.ggml.tokens", strings_value(&[b"a", b"\xFF", b"c"]));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, file.bytes().0).unwrap();
    let error = Gguf::open(&path).unwrap().vocab().unwrap_err();
    assert_eq!(error.to_string(), "element 1 of `tokenizer.ggml.tokens` is not UTF-8");
}

/// The error of a folder with one safetensors file.
fn folder_error(file: &[u8]) -> Error {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), config_json().to_string()).unwrap();
    fs::write(folder.path().join("model.safetensors"), file).unwrap();
    load(folder.path()).err().expect("the file lies")
}

#[test]
fn safetensors_that_lie() {
    let sound = safetensors(&hugging_face_tensors());
    for len in [0, 7, 8, 20, sound.len() - 1] {
        assert!(matches!(folder_error(&sound[..len]), Error::Safetensors { .. }), "{len} bytes");
    }
    for len in [u64::MAX, 1 << 40, sound.len() as u64] {
        let lying = [&len.to_le_bytes()[..], &sound[8..]].concat();
        assert!(matches!(folder_error(&lying), Error::Safetensors { .. }), "header of {len} bytes");
    }
    let changed = |change: fn(&mut Vec<Entry>)| {
        let mut entries = hugging_face_tensors();
        change(&mut entries);
        folder_error(&safetensors(&entries))
    };
    assert!(matches!(changed(|e| e[2].2 = vec![u64::MAX, 2]), Error::Safetensors { .. }));
    assert!(matches!(changed(|e| e[2].2 = vec![31]), Error::Safetensors { .. }));
    let error = changed(|e| e[4].2 = vec![32, 16]);
    assert!(
        matches!(&error, Error::TensorShape { name, expected, .. }
            if name == "model.layers.0.self_attn.k_proj.weight" && expected == &[16, 32]),
        "{error}"
    );
    let error = changed(|e| e[2].1 = "I16");
    assert!(
        matches!(&error, Error::TensorType { name, found, .. }
            if name == "model.layers.0.input_layernorm.weight" && found == "I16"),
        "{error}"
    );
    let error = changed(|e| _ = e.pop());
    assert!(
        matches!(&error, Error::MissingTensor { name, .. } if name == "model.layers.0.mlp.down_proj.weight"),
        "{error}"
    );
}

#[test]
fn shards_that_lie() {
    let folder = tempfile::tempdir().unwrap();
    let index = String::from_utf8(write_sharded(folder.path())).unwrap();
    let path = folder.path().join("model.safetensors.index.json");
    let loaded = load(folder.path()).unwrap();
    assert_eq!(loaded.weights.layers.len(), 1);
    for (lie, named) in [
        (index.replace("a.safetensors", "../a.safetensors"), "../a.safetensors"),
        (index.replace("a.safetensors", "/etc/passwd"), "/etc/passwd"),
        (index.replace("a.safetensors", ".."), ".."),
        (index.replace("a.safetensors", "c.safetensors"), "c.safetensors"),
        (index.replace("model.norm.weight", "model.morn.weight"), "model.morn.weight"),
        (index.replace("weight_map", "map"), "weight_map"),
        (index[..index.len() / 2].into(), "index.json"),
        ("[".repeat(100_000), "index.json"),
    ] {
        fs::write(&path, &lie).unwrap();
        let error = load(folder.path()).err().expect("the index lies").to_string();
        assert!(error.contains(named), "{named}: {error}");
    }
}

#[test]
fn what_is_not_a_model_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    assert!(matches!(load(&path.join("absent.gguf")), Err(Error::Io { .. })));
    // An empty folder has no config.json.
    let error = load(path).err().unwrap().to_string();
    assert!(error.contains("config.json"), "{error}");
    fs::write(path.join("config.json"), config_json().to_string()).unwrap();
    assert!(matches!(load(path), Err(Error::NotAModel { .. })));
    fs::write(path.join("config.json"), "[1, 2]").unwrap();
    assert!(matches!(load(path), Err(Error::Config { .. })));
    fs::write(path.join("weights.safetensors"), safetensors(&hugging_face_tensors())).unwrap();
    assert!(matches!(load(&path.join("weights.safetensors")), Err(Error::NotAModel { .. })));
    fs::write(path.join("empty.gguf"), "").unwrap();
    assert!(matches!(
        load(&path.join("empty.gguf")),
        Err(Error::Gguf { source: gguf::Error::Truncated { .. }, .. })
    ));
}
