//! A data set read as a whole or example by example.

use super::{
    Adapter, AdapterChoice, BadRow, Example, FileError, Problem, PromptStyle, Rejected,
    adapters::Undetected,
    reader::{self, Rows},
};
use sha2::{Digest, Sha256};
use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

/// Data and how to read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// A file, or a folder of files.
    pub path: PathBuf,
    pub adapter: AdapterChoice,
    /// For multiple choice questions.
    pub prompt: PromptStyle,
    /// At most as many examples, the first ones; rows that cannot be used do not count.
    pub limit: Option<usize>,
}

/// A source that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{}: {error}", path.display())]
    Undetected { path: PathBuf, error: Undetected },
    #[error("{}: no row can be used{}", path.display(), said(rejected))]
    Nothing { path: PathBuf, rejected: Rejected },
}

fn said(rejected: &Rejected) -> String {
    if rejected.is_empty() { ": it has none".into() } else { format!("\n{rejected}") }
}

/// A data set in memory.
#[derive(Clone, Debug)]
pub struct Dataset {
    pub examples: Vec<Example>,
    pub adapter: Adapter,
    pub rejected: Rejected,
    /// SHA-256, in hexadecimal, of the files' names and contents: for manifests.
    pub sha256: String,
}

impl Dataset {
    /// Reads all of a source. It is an error if no row can be used.
    pub fn load(source: &Source) -> Result<Dataset, LoadError> {
        let mut rejected = Rejected::default();
        let mut examples = Vec::new();
        let mut rows = Examples::open(source)?;
        for example in &mut rows {
            match example {
                Ok(example) => examples.push(example),
                Err(ExampleError::Row(row)) => rejected.add(row),
                Err(ExampleError::Load(error)) => return Err(error),
            }
        }
        match rows.adapter() {
            Some(adapter) if !examples.is_empty() => {
                let sha256 = sha256(&reader::files(&source.path)?)?;
                Ok(Dataset { examples, adapter, rejected, sha256 })
            }
            _ => Err(LoadError::Nothing { path: source.path.clone(), rejected }),
        }
    }
}

/// Why there is no example: the next may be fine, or it's the end.
#[derive(Debug, thiserror::Error)]
pub enum ExampleError {
    #[error(transparent)]
    Row(#[from] BadRow),
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// The examples of a source, one in memory at a time. After an [`ExampleError::Load`] there are no more.
pub struct Examples {
    rows: Rows,
    source: Source,
    adapter: Option<Adapter>,
    left: usize,
}

impl Examples {
    pub fn open(source: &Source) -> Result<Examples, LoadError> {
        let rows = reader::rows(&source.path)?;
        let adapter = match source.adapter {
            AdapterChoice::Auto => None,
            AdapterChoice::Named(adapter) => Some(adapter),
        };
        Ok(Examples { rows, source: source.clone(), adapter, left: source.limit.unwrap_or(usize::MAX) })
    }

    /// The adapter in use; with [`AdapterChoice::Auto`] it is known after the first row.
    pub fn adapter(&self) -> Option<Adapter> {
        self.adapter
    }
}

impl Iterator for Examples {
    type Item = Result<Example, ExampleError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let row = match self.rows.next()? {
            Ok(row) => row,
            Err(Problem::Row(row)) => return Some(Err(row.into())),
            Err(Problem::File(error)) => {
                self.left = 0;
                return Some(Err(LoadError::from(error).into()));
            }
        };
        let adapter = match self.adapter {
            Some(adapter) => adapter,
            None => match Adapter::detect(&row.fields) {
                Ok(adapter) => *self.adapter.insert(adapter),
                Err(error) => {
                    self.left = 0;
                    let path = row.origin.path.to_path_buf();
                    return Some(Err(LoadError::Undetected { path, error }.into()));
                }
            },
        };
        let example = adapter.example(row, self.source.prompt);
        if example.is_ok() {
            self.left -= 1;
        }
        Some(example.map_err(ExampleError::from))
    }
}

/// SHA-256 of names and contents. Folders do not count, so data keeps its hash when it is moved.
fn sha256(files: &[PathBuf]) -> Result<String, FileError> {
    let mut hash = Sha256::new();
    for path in files {
        let content = sha256_of_file(path).map_err(|source| FileError::Io { path: path.clone(), source })?;
        hash.update(path.file_name().unwrap_or_default().as_encoded_bytes());
        hash.update([0]);
        hash.update(content);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn sha256_of_file(path: &Path) -> io::Result<[u8; 32]> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().into()),
            length => hash.update(&buffer[..length]),
        }
    }
}
