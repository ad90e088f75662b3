//! Files written whole or not at all.
//!
//! What is written goes into a file beside the one it replaces, is synced, then renamed, and the folder is synced: a
//! crash at any point leaves the old file or the new, a failure the old.

use safetensors::Dtype;
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

/// Why a file can't be written.
#[derive(Debug, thiserror::Error)]
#[error("{}: cannot be written: {source}", path.display())]
pub struct WriteError {
    pub path: PathBuf,
    pub source: io::Error,
}

impl WriteError {
    /// For `map_err` while writing `path`.
    pub fn at(path: &Path) -> impl FnOnce(io::Error) -> WriteError + '_ {
        |source| WriteError { path: path.into(), source }
    }
}

/// Replaces `path` by what `fill` writes.
pub fn write<E: From<WriteError>>(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> Result<(), E>,
) -> Result<(), E> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or_else(|| {
        WriteError::at(path)(io::Error::new(io::ErrorKind::InvalidInput, "not a file's name"))
    })?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut partial_name = std::ffi::OsString::from(".");
    partial_name.push(name);
    // Two threads may write the same file: the last one wins, neither writes into the other's.
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    partial_name.push(format!(".partial-{}-{number}", std::process::id()));
    let partial = folder.join(partial_name);
    let written = File::create(&partial).map_err(WriteError::at(path)).map_err(E::from).and_then(|file| {
        let mut out = BufWriter::new(file);
        fill(&mut out)?;
        out.into_inner()
            .map_err(io::IntoInnerError::into_error)
            .and_then(|file| file.sync_all())
            .and_then(|()| fs::rename(&partial, path))
            .map_err(WriteError::at(path))?;
        Ok(())
    });
    if written.is_err() {
        // The first error is the one to report; the partial file may not even exist.
        fs::remove_file(&partial).ok();
        return written;
    }
    // Makes the new name itself durable.
    Ok(File::open(folder).and_then(|folder| folder.sync_all()).map_err(WriteError::at(folder))?)
}

/// A tensor to write.
pub struct OutgoingTensor<'a, E> {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Fetches the bytes, little-endian, when it is their turn: only one tensor at a time is held in memory.
    pub bytes: Box<dyn Fn() -> Result<Vec<u8>, E> + 'a>,
}

/// Replaces `path` by a safetensors file that holds `tensors` in the order given, the first one aligned to 64 bytes.
pub fn write_safetensors<E: From<WriteError>>(
    path: &Path,
    metadata: &[(&str, &str)],
    tensors: &[OutgoingTensor<E>],
) -> Result<(), E> {
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        let entries = metadata.iter().map(|&(name, value)| (name.into(), value.into()));
        header.insert("__metadata__".into(), Value::Object(entries.collect()));
    }
    let mut ends = Vec::new();
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.shape.iter().product::<usize>() * tensor.dtype.bitsize() / 8;
        let entry = json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end] });
        header.insert(tensor.name.clone(), entry);
        ends.push(end - offset);
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    // Spaces up to a cache line, so that mapped tensors are aligned.
    header.push_str(&" ".repeat((header.len() + 8).next_multiple_of(64) - header.len() - 8));
    write(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())
            .and_then(|()| out.write_all(header.as_bytes()))
            .map_err(WriteError::at(path))?;
        for (tensor, announced) in tensors.iter().zip(ends) {
            let bytes = (tensor.bytes)()?;
            if bytes.len() != announced {
                let what = format!("tensor `{}` has {} bytes, not {announced}", tensor.name, bytes.len());
                return Err(WriteError::at(path)(io::Error::new(io::ErrorKind::InvalidData, what)).into());
            }
            out.write_all(&bytes).map_err(WriteError::at(path))?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    fn text(path: &Path, text: &str) -> Result<(), WriteError> {
        write(path, |out| out.write_all(text.as_bytes()).map_err(WriteError::at(path)))
    }

    fn tensor(name: &str, bytes: Vec<u8>) -> OutgoingTensor<'static, WriteError> {
        let bytes = Box::new(move || Ok(bytes.clone()));
        OutgoingTensor { name: name.into(), dtype: Dtype::U32, shape: vec![2, 1], bytes }
    }

    /// Names of the files of a folder, hidden ones too.
    fn files(folder: &Path) -> Vec<String> {
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        fs::read_dir(folder).unwrap().map(name).collect()
    }

    #[test]
    fn a_file_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        text(&path, "old, and longer").unwrap();
        text(&path, "new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(files(folder.path()), ["a"]);
    }

    #[test]
    fn a_failure_half_way_leaves_the_old_file_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        text(&path, "old").unwrap();
        let failed = write(&path, |out| {
            // More than the writer buffers, so that some of it is on disk when it fails.
            out.write_all(&vec![7; 100_000]).map_err(WriteError::at(&path))?;
            Err(WriteError::at(&path)(io::Error::other("no more")))
        });
        assert_eq!(
            failed.unwrap_err().to_string(),
            format!("{}: cannot be written: no more", path.display())
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(files(folder.path()), ["a"]);
    }

    #[test]
    fn places_that_cannot_be_written_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let occupied = folder.path().join("folder");
        fs::create_dir(&occupied).unwrap();
        for path in [folder.path().join("none/a"), occupied, "/".into(), "..".into()] {
            assert_eq!(text(&path, "new").unwrap_err().path, path);
        }
        assert_eq!(files(folder.path()), ["folder"]);
    }

    #[test]
    fn threads_that_write_one_file_do_not_mix() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let texts = ["x".repeat(20_000), "y".repeat(30_000)];
        std::thread::scope(|threads| {
            for own in &texts {
                let path = &path;
                threads.spawn(move || (0..10).for_each(|_| text(path, own).unwrap()));
            }
        });
        assert!(texts.contains(&fs::read_to_string(&path).unwrap()));
        assert_eq!(files(folder.path()), ["a"]);
    }

    #[test]
    fn tensors_keep_their_order_and_are_aligned() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let tensors = [tensor("b", (0..8).collect()), tensor("a", (8..16).collect())];
        write_safetensors(&path, &[("note", "x")], &tensors).unwrap();
        let bytes = fs::read(&path).unwrap();
        let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!((header + 8) % 64, 0);
        assert_eq!(metadata.metadata().as_ref().unwrap()["note"], "x");
        assert_eq!(metadata.info("b").unwrap().data_offsets, (0, 8));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let a = file.tensor("a").unwrap();
        assert_eq!((a.dtype(), a.shape()), (Dtype::U32, &[2, 1][..]));
        assert_eq!(a.data(), (8..16).collect::<Vec<u8>>());
    }

    #[test]
    fn a_tensor_of_another_size_than_announced_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let error = write_safetensors(&path, &[], &[tensor("a", vec![0; 7])]).unwrap_err().to_string();
        assert!(error.contains("`a` has 7 bytes, not 8"), "{error}");
        assert!(files(folder.path()).is_empty());
    }
}
