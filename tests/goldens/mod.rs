//! Where recorded results of other implementations lie, and how to read them.

// Each test binary uses its part.
#![allow(dead_code)]

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::{
    env, fs,
    path::{Path, PathBuf},
};

fn folders() -> impl Iterator<Item = PathBuf> {
    let shared = env::var_os("C2C_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    env::var_os("C2C_GOLDENS").map(PathBuf::from).into_iter().chain([shared.join("goldens")])
}

/// A file or folder of the goldens: in `C2C_GOLDENS`, where it is there, else in the shared folder.
pub fn find(name: &str) -> Option<PathBuf> {
    let found = folders().map(|folder| folder.join(name)).find(|path| path.exists());
    if found.is_none() {
        eprintln!("skipped: there is no goldens/{name}; set C2C_SHARED or C2C_GOLDENS");
    }
    found
}

/// The cases under `key` of the manifest; none (visibly) without goldens.
pub fn cases(key: &str) -> Vec<Value> {
    let Some(path) = find("manifest.json") else { return Vec::new() };
    let manifest: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let cases = manifest[key].as_array().cloned().unwrap_or_default();
    assert!(!cases.is_empty(), "{}: no `{key}`", path.display());
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

    pub fn integers(&self, name: &str) -> Vec<i64> {
        let file = self.file();
        let tensor = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(tensor.dtype(), Dtype::I64, "{name}");
        tensor.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
    }
}

/// Largest absolute difference.
pub fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let difference = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(!a.iter().chain(b).any(|x| x.is_nan()), "NaN");
    difference
}
