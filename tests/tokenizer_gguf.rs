//! Vocabularies inside GGUF files against llama.cpp and against the models' tokenizer.json.
//!
//! `C2C_MODELS` is a folder with the GGUF files that `fixtures/llama_cpp_ids.json` names; what is not there is skipped.

use std::path::{Path, PathBuf};

use c2c::tokenizer::{GgufVocab, Tokenizer};
use serde_json::{Map, Value};

/// Metadata of a GGUF file, enough of the format to read vocabularies: tests of the tokenizer need no model.
struct Metadata<'a>(&'a [u8]);

impl Metadata<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_first_chunk().unwrap();
        self.0 = rest;
        *head
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn string(&mut self) -> String {
        let len = self.u64() as usize;
        let (text, rest) = self.0.split_at(len);
        self.0 = rest;
        String::from_utf8(text.to_vec()).unwrap()
    }

    fn value(&mut self, kind: u32) -> Value {
        match kind {
            0 => u8::from_le_bytes(self.take()).into(),
            1 => i8::from_le_bytes(self.take()).into(),
            2 => u16::from_le_bytes(self.take()).into(),
            3 => i16::from_le_bytes(self.take()).into(),
            4 => u32::from_le_bytes(self.take()).into(),
            5 => i32::from_le_bytes(self.take()).into(),
            6 => f32::from_le_bytes(self.take()).into(),
            7 => (self.take::<1>()[0] != 0).into(),
            8 => self.string().into(),
            9 => {
                let kind = u32::from_le_bytes(self.take());
                (0..self.u64()).map(|_| self.value(kind)).collect()
            }
            10 => self.u64().into(),
            11 => i64::from_le_bytes(self.take()).into(),
            12 => f64::from_le_bytes(self.take()).into(),
            other => panic!("value type {other}"),
        }
    }

    fn read(path: &Path) -> Map<String, Value> {
        use std::io::Read;
        // Vocabularies lie before the tensors; the largest here is under 32 MiB.
        let mut head = Vec::new();
        std::fs::File::open(path).unwrap().take(32 << 20).read_to_end(&mut head).unwrap();
        let mut reader = Metadata(&head);
        assert_eq!(&reader.take(), b"GGUF");
        assert_eq!(u32::from_le_bytes(reader.take()), 3);
        reader.u64();
        let mut fields = Map::new();
        for _ in 0..reader.u64() {
            let name = reader.string();
            let kind = u32::from_le_bytes(reader.take());
            fields.insert(name, reader.value(kind));
        }
        fields
    }
}

fn vocab(path: &Path) -> GgufVocab {
    let fields = Metadata::read(path);
    let get = |name: &str| fields.get(&format!("tokenizer.ggml.{name}"));
    let id = |name: &str| get(&format!("{name}_token_id")).map(|id| id.as_u64().unwrap() as u32);
    let flag = |name: &str| get(name).map(|flag| flag.as_bool().unwrap());
    let text = |value: &Value| value.as_str().unwrap().to_string();
    fn list<T>(value: Option<&Value>, item: impl Fn(&Value) -> T) -> Option<Vec<T>> {
        Some(value?.as_array().unwrap().iter().map(item).collect())
    }
    GgufVocab {
        model: text(get("model").unwrap()),
        pre: get("pre").map(text),
        tokens: list(get("tokens"), text).unwrap(),
        scores: list(get("scores"), |score| score.as_f64().unwrap() as f32),
        token_types: list(get("token_type"), |kind| kind.as_i64().unwrap() as i32),
        merges: list(get("merges"), text),
        bos: id("bos"),
        eos: id("eos"),
        unk: id("unknown"),
        pad: id("padding"),
        eot: id("eot"),
        eom: id("eom"),
        add_bos: flag("add_bos_token"),
        add_eos: flag("add_eos_token"),
        add_space_prefix: flag("add_space_prefix"),
        chat_template: fields.get("tokenizer.chat_template").map(text),
        origin: path.display().to_string(),
    }
}

fn fixture() -> Value {
    serde_json::from_str(include_str!("fixtures/llama_cpp_ids.json")).unwrap()
}

fn texts() -> Vec<String> {
    serde_json::from_value(fixture()["texts"].clone()).unwrap()
}

/// The tokenizer inside `file` of `C2C_MODELS`.
fn from_gguf(file: &str) -> Option<Tokenizer> {
    let path = std::env::var_os("C2C_MODELS").map(|folder| Path::new(&folder).join(file));
    match path {
        Some(path) if path.is_file() => Some(Tokenizer::from_gguf(&vocab(&path)).unwrap()),
        _ => {
            eprintln!("skipped: no {file} in C2C_MODELS");
            None
        }
    }
}

fn from_shared(name: &str) -> Option<Tokenizer> {
    let shared = std::env::var_os("C2C_SHARED").map_or_else(|| "../shared".into(), PathBuf::from);
    let dir = shared.join("tokenizers").join(name);
    if !dir.is_dir() {
        eprintln!("skipped: no <shared>/tokenizers/{name}");
        return None;
    }
    Some(Tokenizer::from_folder(&dir).unwrap())
}

/// Texts that Qwen's composing normalisation changes; llama.cpp leaves that step out.
fn composes(text: &str) -> bool {
    text.chars().any(|char| ('\u{300}'..='\u{36F}').contains(&char) || "ΩK".contains(char))
}

#[test]
fn same_ids_as_llama_cpp() {
    for (file, expected) in fixture()["ids"].as_object().unwrap() {
        let Some(tokenizer) = from_gguf(file) else { continue };
        for (text, expected) in texts().iter().zip(expected.as_array().unwrap()) {
            if file.starts_with("qwen") && composes(text) {
                continue;
            }
            let expected: Vec<u32> = serde_json::from_value(expected.clone()).unwrap();
            assert_eq!(tokenizer.encode(text, false).unwrap().ids, expected, "{file}: {text:?}");
        }
    }
}

#[test]
fn same_ids_as_tokenizer_json() {
    for (file, name) in [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2"),
        ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "qwen2.5"),
        ("gemma-3-270m-q4_k_m.gguf", "gemma3"),
    ] {
        let (Some(gguf), Some(json)) = (from_gguf(file), from_shared(name)) else { continue };
        assert_eq!(gguf.vocab_size(), json.vocab_size() - usize::from(name == "gemma3"), "{file}");
        // Conversion to GGUF writes Gemma's tokens of several spaces as spaces, so a text that spells them with U+2581
        // itself is the one thing that cannot come out equal.
        for text in texts().into_iter().filter(|text| !text.contains("▁▁")) {
            let ours = gguf.encode(&text, false).unwrap();
            let theirs = json.encode(&text, false).unwrap();
            assert_eq!(ours, theirs, "{file}: {text:?}");
            assert_eq!(gguf.decode(&ours.ids, false), json.decode(&theirs.ids, false), "{file}: {text:?}");
        }
    }
}

#[test]
fn tmp() {
    let t = std::time::Instant::now();
    let q = from_gguf("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf").unwrap();
    println!("{:?} {:?}", q, t.elapsed());
    let v = vocab(Path::new("/work/real/models/SmolLM2-135M-Instruct.Q4_1.gguf"));
    let t = std::time::Instant::now();
    let s = Tokenizer::from_gguf(&v).unwrap();
    println!("{:?} {:?}", s, t.elapsed());
    let t = std::time::Instant::now();
    s.fingerprint();
    println!("{:?}", t.elapsed());
    let v = vocab(Path::new("/work/real/models/gemma-3-270m-q4_k_m.gguf"));
    let t = std::time::Instant::now();
    let g = Tokenizer::from_gguf(&v).unwrap();
    println!("{:?} {:?}", g, t.elapsed());
    println!("{}", s.fingerprint() == from_shared("smollm2").unwrap().fingerprint());
    println!("{}", q.fingerprint() == from_shared("qwen2.5").unwrap().fingerprint());
    println!(
        "{}",
        q.fingerprint() == Tokenizer::from_folder(Path::new("/tmp/toks/qwen2_5")).unwrap().fingerprint()
    );
    println!("{:?}", from_shared("qwen3").unwrap());
    println!("{:?}", from_shared("gpt2").unwrap());
    println!("{:?}", from_shared("gptoss").unwrap());
    println!("{:?}", from_shared("llama3").unwrap());
    println!("{:?}", from_shared("llama2").unwrap());
    println!("{:?}", from_shared("bert-uncased").unwrap());
}
#[test]
fn tmp2() {
    for f in [
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "gemma-3-270m-q4_k_m.gguf",
    ] {
        let v = vocab(&Path::new("/work/real/models").join(f));
        let t = std::time::Instant::now();
        let s = Tokenizer::from_gguf(&v).unwrap();
        println!("{f} {:?}", t.elapsed());
        let t = std::time::Instant::now();
        s.fingerprint();
        println!("fp {:?}", t.elapsed());
        let t = std::time::Instant::now();
        drop(s);
        println!("drop {:?}", t.elapsed());
    }
}
