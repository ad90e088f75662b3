//! A small Llama, written as a GGUF file and as a Hugging Face folder, for tests of what reads them.

#![allow(dead_code)]

use std::{fs, path::Path};

pub const F32: u32 = 0;
pub const Q8_0: u32 = 8;

pub const VOCAB: u64 = 6;
const HIDDEN: u64 = 32;
const FFN: u64 = 64;

/// A GGUF file before it is written; tests put lies into the fields.
#[derive(Clone)]
pub struct GgufFile {
    pub magic: [u8; 4],
    pub version: u32,
    /// Instead of the true numbers.
    pub tensor_count: Option<u64>,
    pub metadata_count: Option<u64>,
    /// Key, type and value as they lie in the file.
    pub metadata: Vec<(Vec<u8>, Vec<u8>)>,
    pub tensors: Vec<GgufTensor>,
    pub data: Vec<u8>,
}

#[derive(Clone)]
pub struct GgufTensor {
    pub name: Vec<u8>,
    /// Innermost first, as in the file.
    pub dims: Vec<u64>,
    pub kind: u32,
    pub offset: u64,
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}

pub fn u32_value(value: u32) -> Vec<u8> {
    [4u32.to_le_bytes(), value.to_le_bytes()].concat()
}

pub fn f32_value(value: f32) -> Vec<u8> {
    [6u32.to_le_bytes(), value.to_le_bytes()].concat()
}

pub fn string_value(text: &[u8]) -> Vec<u8> {
    [&8u32.to_le_bytes()[..], &string(text)].concat()
}

pub fn strings_value(texts: &[&[u8]]) -> Vec<u8> {
    let mut bytes =
        [&9u32.to_le_bytes()[..], &8u32.to_le_bytes(), &(texts.len() as u64).to_le_bytes()].concat();
    texts.iter().for_each(|text| bytes.extend(string(text)));
    bytes
}

impl GgufFile {
    pub fn llama() -> GgufFile {
        let mut file = GgufFile {
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            metadata_count: None,
            metadata: Vec::new(),
            tensors: Vec::new(),
            data: Vec::new(),
        };
        file.set("general.architecture", string_value(b"llama"));
        for (key, value) in [
            ("block_count", 1),
            ("embedding_length", HIDDEN as u32),
            ("feed_forward_length", FFN as u32),
            ("context_length", 128),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
        ] {
            file.set(&format!("llama.{key}"), u32_value(value));
        }
        file.set("llama.attention.layer_norm_rms_epsilon", f32_value(1e-5));
        file.set("tokenizer.ggml.model", string_value(b"gpt2"));
        file.set("tokenizer.ggml.tokens", strings_value(&[b"a", b"b", b"c", b"d", b"e", b"f"]));
        file.set("tokenizer.ggml.merges", strings_value(&[b"a b"]));
        file.set("tokenizer.ggml.eos_token_id", u32_value(2));
        file.tensor("token_embd.weight", &[HIDDEN, VOCAB], Q8_0);
        file.tensor("output_norm.weight", &[HIDDEN], F32);
        for (name, dims) in layer() {
            let kind = if dims.len() == 1 { F32 } else { Q8_0 };
            file.tensor(&format!("blk.0.{}.weight", name.0), &dims, kind);
        }
        file
    }

    /// Adds or replaces a metadata entry.
    pub fn set(&mut self, key: &str, value: Vec<u8>) {
        self.metadata.retain(|(other, _)| other != key.as_bytes());
        self.metadata.push((key.into(), value));
    }

    pub fn tensor(&mut self, name: &str, dims: &[u64], kind: u32) {
        let elements: u64 = dims.iter().product();
        let bytes = if kind == F32 { 4 * elements } else { elements / 32 * 34 };
        let offset = self.data.len() as u64;
        self.tensors.push(GgufTensor { name: name.into(), dims: dims.into(), kind, offset });
        self.data.extend((0..bytes).map(|i| (i % 61) as u8));
        self.data.resize(self.data.len().next_multiple_of(32), 0);
    }

    pub fn find(&mut self, name: &str) -> &mut GgufTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name.as_bytes()).unwrap()
    }

    /// The file, and how long its header is.
    pub fn bytes(&self) -> (Vec<u8>, usize) {
        let mut bytes = [&self.magic[..], &self.version.to_le_bytes()].concat();
        bytes.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        bytes.extend(self.metadata_count.unwrap_or(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            bytes.extend(string(key));
            bytes.extend(value);
        }
        for tensor in &self.tensors {
            bytes.extend(string(&tensor.name));
            bytes.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
            bytes.extend(tensor.kind.to_le_bytes());
            bytes.extend(tensor.offset.to_le_bytes());
        }
        let header = bytes.len();
        bytes.resize(header.next_multiple_of(32), 0);
        bytes.extend(&self.data);
        (bytes, header)
    }
}

/// GGUF's and transformers' name of each tensor of a layer, and its dimensions, innermost first.
fn layer() -> [((&'static str, &'static str), Vec<u64>); 9] {
    [
        (("attn_norm", "input_layernorm"), vec![HIDDEN]),
        (("attn_q", "self_attn.q_proj"), vec![HIDDEN, HIDDEN]),
        (("attn_k", "self_attn.k_proj"), vec![HIDDEN, HIDDEN / 2]),
        (("attn_v", "self_attn.v_proj"), vec![HIDDEN, HIDDEN / 2]),
        (("attn_output", "self_attn.o_proj"), vec![HIDDEN, HIDDEN]),
        (("ffn_norm", "post_attention_layernorm"), vec![HIDDEN]),
        (("ffn_gate", "mlp.gate_proj"), vec![HIDDEN, FFN]),
        (("ffn_up", "mlp.up_proj"), vec![HIDDEN, FFN]),
        (("ffn_down", "mlp.down_proj"), vec![FFN, HIDDEN]),
    ]
}

pub fn config_json() -> serde_json::Value {
    serde_json::json!({
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": FFN,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
        "hidden_act": "silu", "eos_token_id": 2,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    })
}

/// Name, dtype, shape (outermost first), bytes.
pub type Entry = (String, &'static str, Vec<u64>, Vec<u8>);

pub fn hugging_face_tensors() -> Vec<Entry> {
    let mut entries =
        vec![("model.embed_tokens".to_owned(), vec![HIDDEN, VOCAB]), ("model.norm".to_owned(), vec![HIDDEN])];
    entries.extend(layer().map(|((_, name), dims)| (format!("model.layers.0.{name}"), dims)));
    let entry = |(name, mut dims): (String, Vec<u64>)| {
        let bytes = 2 * dims.iter().product::<u64>();
        dims.reverse();
        (format!("{name}.weight"), "BF16", dims, (0..bytes).map(|i| (i % 59) as u8).collect())
    };
    entries.into_iter().map(entry).collect()
}

/// A safetensors file with whatever header the entries give.
pub fn safetensors(entries: &[Entry]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in entries {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(
            name.clone(),
            serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}),
        );
        data.extend(bytes);
    }
    let header = serde_json::to_vec(&header).unwrap();
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
}

/// Two shards and their index.
pub fn write_sharded(folder: &Path) -> Vec<u8> {
    let entries = hugging_face_tensors();
    let (first, second) = entries.split_at(4);
    let mut map = serde_json::Map::new();
    for (shard, entries) in [("a.safetensors", first), ("b.safetensors", second)] {
        fs::write(folder.join(shard), safetensors(entries)).unwrap();
        map.extend(entries.iter().map(|entry| (entry.0.clone(), shard.into())));
    }
    let index =
        serde_json::to_vec(&serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map})).unwrap();
    fs::write(folder.join("model.safetensors.index.json"), &index).unwrap();
    fs::write(folder.join("config.json"), config_json().to_string()).unwrap();
    index
}
