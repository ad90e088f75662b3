//! Where recorded results of other implementations, tokenizers and real models lie, and how to read them.
//!
//! All of them are outside the repository: whoever lacks them runs the other tests and sees what was skipped.

// Each test binary uses its part.
#![allow(dead_code)]

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::{
    collections::HashMap,
    env,
    fmt::Display,
    fs,
    io::Write,
    path::{Path, PathBuf},
};

/// Says what a test leaves out. Straight to stderr: what a passing test prints by `eprintln!` is not shown.
pub fn skipped(what: impl Display) {
    std::io::stderr().write_all(format!("skipped: {what}\n").as_bytes()).unwrap();
}

/// The folder that a variable of the environment names.
fn given(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).map(PathBuf::from)
}

/// A file or folder of the shared folder, which `C2C_SHARED` names.
pub fn shared(name: &str) -> Option<PathBuf> {
    let shared =
        given("C2C_SHARED").unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"));
    let found = Some(shared.join(name)).filter(|path| path.exists());
    if found.is_none() {
        skipped(format_args!("there is no {name} in the shared folder; set C2C_SHARED"));
    }
    found
}

/// A file or folder of the goldens: in `C2C_GOLDENS`, where it is there, else in the shared folder.
pub fn find(name: &str) -> Option<PathBuf> {
    let own = given("C2C_GOLDENS").map(|folder| folder.join(name)).filter(|path| path.exists());
    own.or_else(|| shared(&format!("goldens/{name}")))
}

/// A JSON file of the goldens.
pub fn json(name: &str) -> Option<Value> {
    let path = find(name)?;
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Some(serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

/// The folder of the tokenizer that the goldens call `name`, and whether it is the very one they were made with:
/// those are in `C2C_TOKENIZERS`; of the shared folder's, two are relatives.
pub fn tokenizer(name: &str) -> Option<(PathBuf, bool)> {
    if let Some(folder) = given("C2C_TOKENIZERS").map(|folder| folder.join(name)).filter(|path| path.is_dir())
    {
        let inner = folder.join("models");
        return Some((if inner.is_dir() { inner } else { folder }, true));
    }
    let (folder, exact) = match name {
        "qwen2_5" => ("qwen2.5", false),
        "llama3_2" => ("llama3", false),
        name => (name, true),
    };
    Some((shared(&format!("tokenizers/{folder}"))?, exact))
}

/// A model of `C2C_MODELS`, a folder of GGUF files.
pub fn model(name: &str) -> Option<PathBuf> {
    let found = given("C2C_MODELS").map(|folder| folder.join(name)).filter(|path| path.is_file());
    if found.is_none() {
        skipped(format_args!("there is no {name}; set C2C_MODELS to a folder that has it"));
    }
    found
}

/// All GGUF files of `C2C_MODELS`.
pub fn models() -> Vec<PathBuf> {
    let entries = given("C2C_MODELS").and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "gguf"));
    paths.sort();
    if paths.is_empty() {
        skipped("there are no GGUF files; set C2C_MODELS to a folder that has some");
    }
    paths
}

/// The cases under `key` of the manifest; none (visibly) without goldens.
pub fn cases(key: &str) -> Vec<Value> {
    let Some(manifest) = json("manifest.json") else { return Vec::new() };
    let cases = manifest[key].as_array().cloned().unwrap_or_default();
    assert!(!cases.is_empty(), "manifest.json: no `{key}`");
    cases
}

/// A safetensors file in memory.
pub struct Tensors(Vec<u8>);

impl Tensors {
    pub fn read(path: &Path) -> Tensors {
        Tensors(fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).unwrap()
    }

    pub fn names(&self) -> Vec<String> {
        self.file().names().into_iter().map(String::from).collect()
    }

    pub fn has(&self, name: &str) -> bool {
        self.file().tensor(name).is_ok()
    }

    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.file().tensor(name).unwrap().shape().to_vec()
    }

    /// F32 or BF16 as f32.
    pub fn floats(&self, name: &str) -> Vec<f32> {
        let file = self.file();
        let tensor = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        let data = tensor.data();
        match tensor.dtype() {
            Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            Dtype::BF16 => data
                .chunks_exact(2)
                .map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32())
                .collect(),
            other => panic!("{name} is {other:?}"),
        }
    }

    /// [`Tensors::floats`], by rows of the innermost dimension.
    pub fn rows(&self, name: &str) -> Vec<Vec<f32>> {
        let width = *self.shape(name).last().unwrap();
        self.floats(name).chunks(width).map(<[f32]>::to_vec).collect()
    }

    pub fn metadata(&self) -> HashMap<String, String> {
        let (_, metadata) = SafeTensors::read_metadata(&self.0).unwrap();
        metadata.metadata().clone().unwrap_or_default()
    }

    pub fn integers(&self, name: &str) -> Vec<i64> {
        let file = self.file();
        let tensor = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(tensor.dtype(), Dtype::I64, "{name}");
        tensor.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
    }
}

/// Largest absolute difference; infinite where a NaN is.
pub fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() });
    // `max` drops NaN.
    differences.fold(0.0, |worst, next| if next.is_nan() { f32::INFINITY } else { worst.max(next) })
}
