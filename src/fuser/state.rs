//! Named tensors in files: read where they lie, written whole or not at all.

use super::FuserError;
use crate::backend::{DType, cpu::map_file};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

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
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::Bf16,
            Dtype::F16 => DType::F16,
            other => {
                return Err(FuserError::ParameterType {
                    path: path.into(),
                    name,
                    found: format!("{other:?}"),
                    expected: "one of them".into(),
                });
            }
        };
        let offset = 8 + header + info.data_offsets.0;
        let entry = Entry { file: file.clone(), dtype, shape: info.shape.clone(), offset };
        entries.insert(name, entry);
    }
    let metadata = metadata.metadata().clone().unwrap_or_default();
    Ok((StateDict { path: path.into(), entries }, metadata))
}

/// A tensor to write.
pub(super) struct Outgoing<'a> {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// Fetches the bytes when it is their turn, so that only one tensor at a time is held in memory.
    pub bytes: Box<dyn Fn() -> Result<Vec<u8>, FuserError> + 'a>,
}

/// Writes a safetensors file in one step, see [`write_file`].
pub(super) fn write_safetensors(
    path: &Path,
    metadata: &[(&str, &str)],
    tensors: &[Outgoing],
) -> Result<(), FuserError> {
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        let entries = metadata.iter().map(|&(name, value)| (name.into(), value.into()));
        header.insert("__metadata__".into(), serde_json::Value::Object(entries.collect()));
    }
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.shape.iter().product::<usize>() * tensor.dtype.block_bytes();
        // DType's names of the three float types are those of safetensors.
        let entry = serde_json::json!({
            "dtype": tensor.dtype.to_string(), "shape": tensor.shape, "data_offsets": [offset, end],
        });
        header.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut header = serde_json::Value::Object(header).to_string();
    // Spaces up to a cache line, so that mapped tensors are aligned.
    header.push_str(&" ".repeat((header.len() + 8).next_multiple_of(64) - header.len() - 8));
    write_file(path, |out| {
        let io = FuserError::io(path);
        out.write_all(&(header.len() as u64).to_le_bytes())
            .and_then(|()| out.write_all(header.as_bytes()))
            .map_err(io)?;
        for tensor in tensors {
            out.write_all(&(tensor.bytes)()?).map_err(FuserError::io(path))?;
        }
        Ok(())
    })
}

/// Replaces `path` by what `write` writes, or leaves it as it was: written beside it, synced, renamed, and the folder
/// synced, so that a crash at any point leaves the old file or the new.
pub(super) fn write_file(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> Result<(), FuserError>,
) -> Result<(), FuserError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = folder.join(format!(".{name}.partial-{}", std::process::id()));
    let written = (|| {
        let mut out = io::BufWriter::new(File::create(&partial).map_err(FuserError::io(&partial))?);
        write(&mut out)?;
        let file = out.into_inner().map_err(|error| FuserError::io(&partial)(error.into_error()))?;
        file.sync_all().map_err(FuserError::io(&partial))?;
        fs::rename(&partial, path).map_err(FuserError::io(path))?;
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(FuserError::io(folder))
    })();
    if written.is_err() {
        // The first error is the one to report; the partial file may not even exist.
        fs::remove_file(&partial).ok();
    }
    written
}

/// A whole text file; `None` if it does not exist.
pub(super) fn read_text(path: &Path) -> Result<Option<String>, FuserError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FuserError::io(path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outgoing(name: &str, value: f32) -> Outgoing<'static> {
        Outgoing {
            name: name.into(),
            dtype: DType::F32,
            shape: vec![2, 1],
            bytes: Box::new(move || Ok([value, -value].iter().flat_map(|x| x.to_le_bytes()).collect())),
        }
    }

    #[test]
    fn what_is_written_is_read_back_aligned() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        write_safetensors(&path, &[("note", "x")], &[outgoing("b", 1.0), outgoing("a", 2.0)]).unwrap();
        let (state, metadata) = read_safetensors(&path).unwrap();
        assert_eq!(metadata["note"], "x");
        let entry = &state.entries["a"];
        assert_eq!((entry.shape.as_slice(), entry.dtype), (&[2, 1][..], DType::F32));
        assert_eq!(entry.bytes(), [2.0f32, -2.0].map(f32::to_le_bytes).concat());
        assert_eq!(state.entries["b"].offset % 64, 0);
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        write_safetensors(&path, &[], &[outgoing("a", 1.0)]).unwrap();
        let before = fs::read(&path).unwrap();
        let broken =
            Outgoing { bytes: Box::new(|| Err(FuserError::NoFuser("x".into()))), ..outgoing("a", 2.0) };
        assert!(write_safetensors(&path, &[], &[outgoing("b", 3.0), broken]).is_err());
        assert_eq!(fs::read(&path).unwrap(), before);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
