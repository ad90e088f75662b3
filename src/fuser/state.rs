//! Named tensors in files, read where they lie.

use super::FuserError;
use crate::backend::{DType, cpu::map_file};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The types a parameter may have: ours, and what safetensors calls it.
const FLOATS: [(DType, Dtype); 3] =
    [(DType::F32, Dtype::F32), (DType::Bf16, Dtype::BF16), (DType::F16, Dtype::F16)];

/// What safetensors calls `dtype`, which a [`super::FuserConfig`] has been checked to be a float.
pub(super) fn safetensors_dtype(dtype: DType) -> Dtype {
    FLOATS.iter().find(|(ours, _)| *ours == dtype).map_or(Dtype::F32, |&(_, theirs)| theirs)
}

/// A tensor's place in a mapped file. Its bytes were checked to lie inside.
#[derive(Clone)]
pub(super) struct Entry {
    pub file: Arc<Mmap>,
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub offset: usize,
}

impl Entry {
    pub fn bytes(&self) -> &[u8] {
        let len = self.shape.iter().product::<usize>() * self.dtype.block_bytes();
        &self.file[self.offset..self.offset + len]
    }
}

/// The tensors of one file by name.
pub(super) struct StateDict {
    pub path: PathBuf,
    pub entries: BTreeMap<String, Entry>,
}

/// The tensors of a safetensors file, and its metadata.
pub(super) fn read_safetensors(path: &Path) -> Result<(StateDict, HashMap<String, String>), FuserError> {
    let fail = |source| FuserError::Safetensors { path: path.into(), source };
    let file = map_file(path).map_err(FuserError::io(path))?;
    let (header, metadata) = SafeTensors::read_metadata(&file).map_err(fail)?;
    let mut entries = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let Some(&(dtype, _)) = FLOATS.iter().find(|(_, theirs)| *theirs == info.dtype) else {
            return Err(FuserError::ParameterType {
                path: path.into(),
                name,
                found: format!("{:?}", info.dtype),
                expected: "one of them".into(),
            });
        };
        let offset = 8 + header + info.data_offsets.0;
        let entry = Entry { file: file.clone(), dtype, shape: info.shape.clone(), offset };
        entries.insert(name, entry);
    }
    let metadata = metadata.metadata().clone().unwrap_or_default();
    Ok((StateDict { path: path.into(), entries }, metadata))
}

/// A whole text file; `None` if it does not exist.
pub(super) fn read_text(path: &Path) -> Result<Option<String>, FuserError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FuserError::io(path)(error)),
    }
}
