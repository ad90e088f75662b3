//! A data set read as a whole or example by example.

use super::{
    Adapter, AdapterChoice, BadRow, Example, FileError, PromptStyle, Rejected,
    adapters::Undetected,
    reader::{self, Problem, Row, Rows},
};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::{
    collections::HashSet,
    fs::{self, File},
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
    /// A file of ids, one a line: of the rows only those whose `id` is among them.
    pub ids: Option<PathBuf>,
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
    #[error("{}: ids: {error}", path.display())]
    Ids { path: PathBuf, error: io::Error },
    #[error("{}: no row can be used{}", path.display(), said(rejected))]
    Nothing { path: PathBuf, rejected: Rejected },
}

fn said(rejected: &Rejected) -> String {
    if rejected.is_empty() { ": none was found".into() } else { format!("\n{rejected}") }
}

/// A data set in memory.
#[derive(Clone, Debug)]
pub struct Dataset {
    pub examples: Vec<Example>,
    pub adapter: Adapter,
    pub rejected: Rejected,
    /// SHA-256, in hexadecimal, of the files' names and contents, that of the ids included: for manifests.
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
                let mut files = reader::files(&source.path)?;
                files.extend(source.ids.clone());
                let sha256 = sha256(&files)?;
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
    ids: Option<HashSet<String>>,
    left: usize,
}

impl Examples {
    pub fn open(source: &Source) -> Result<Examples, LoadError> {
        let rows = reader::rows(&source.path)?;
        let adapter = match source.adapter {
            AdapterChoice::Auto => None,
            AdapterChoice::Named(adapter) => Some(adapter),
        };
        let ids = match &source.ids {
            None => None,
            Some(path) => {
                let text = fs::read_to_string(path);
                let text = text.map_err(|error| LoadError::Ids { path: path.clone(), error })?;
                Some(text.lines().map(|line| line.trim().to_owned()).collect())
            }
        };
        let left = source.limit.unwrap_or(usize::MAX);
        Ok(Examples { rows, source: source.clone(), adapter, ids, left })
    }

    /// The adapter in use; with [`AdapterChoice::Auto`] it is known after the first row.
    pub fn adapter(&self) -> Option<Adapter> {
        self.adapter
    }

    /// The next row that is asked for, or what is wrong with the file.
    fn row(&mut self) -> Option<Result<Row, Problem>> {
        let Some(ids) = &self.ids else { return self.rows.next() };
        self.rows.find(|row| match row.as_ref().map(|row| row.fields.get("id")) {
            Ok(Some(Value::String(id))) => ids.contains(id),
            Ok(Some(id)) => ids.contains(&id.to_string()),
            Ok(None) => false,
            Err(_) => true,
        })
    }
}

impl Iterator for Examples {
    type Item = Result<Example, ExampleError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let row = match self.row()? {
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
