//! The tensors of a Hugging Face folder: `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

use super::{
    Error,
    weights::{FileTensor, FileTensors},
};
use crate::backend::{DType, cpu};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::{
    collections::{BTreeMap, HashMap},
    path::{Component, Path},
    sync::Arc,
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

#[derive(Deserialize)]
struct Index {
    /// Tensor → file.
    weight_map: BTreeMap<String, String>,
}

/// Maps the folder's files and reads their headers.
pub(super) fn open(folder: &Path) -> Result<FileTensors, Error> {
    let single = folder.join(SINGLE);
    let index = folder.join(INDEX);
    if single.is_file() {
        return Ok(FileTensors { path: single.clone(), tensors: file(&single)? });
    }
    if !index.is_file() {
        let problem = format!("has neither {SINGLE} nor {INDEX}; other weight formats are not read");
        return Err(Error::NotAModel { path: folder.into(), problem });
    }
    let bad = |problem: String| Error::Config { path: index.clone(), problem };
    let text = super::read_text(&index)?;
    let Index { weight_map } = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
    let mut shards = HashMap::new();
    let mut tensors = HashMap::new();
    for (name, shard) in weight_map {
        // A shard lies in the folder itself, whatever an index from elsewhere says.
        let mut parts = Path::new(&shard).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(bad(format!("tensor `{name}`: `{shard}` is not the name of a file in the folder")));
        }
        if !shards.contains_key(&shard) {
            shards.insert(shard.clone(), file(&folder.join(&shard))?);
        }
        let tensor = shards.get_mut(&shard).and_then(|shard| shard.remove(&name));
        let tensor =
            tensor.ok_or_else(|| Error::MissingTensor { path: folder.join(&shard), name: name.clone() })?;
        tensors.insert(name, tensor);
    }
    Ok(FileTensors { path: index, tensors })
}

fn file(path: &Path) -> Result<HashMap<String, FileTensor>, Error> {
    let file = cpu::map_file(path).map_err(|source| Error::Io { path: path.into(), source })?;
    let bad = |source| Error::Safetensors { path: path.into(), source };
    let (header, metadata) = SafeTensors::read_metadata(&file).map_err(bad)?;
    let path: Arc<Path> = path.into();
    let tensor = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        let dtype = match info.dtype {
            Dtype::F32 => Ok(DType::F32),
            Dtype::F16 => Ok(DType::F16),
            Dtype::BF16 => Ok(DType::Bf16),
            other => Err(other.to_string()),
        };
        // The header's length comes first, in 8 bytes.
        let offset = 8 + header + info.data_offsets.0;
        let tensor =
            FileTensor { path: path.clone(), file: file.clone(), offset, dtype, shape: info.shape.clone() };
        (name, tensor)
    };
    Ok(metadata.tensors().into_iter().map(tensor).collect())
}
