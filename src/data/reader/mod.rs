//! Files as rows: JSON lines, JSON, CSV and Parquet, one row in memory at a time.
//!
//! | ending | rows |
//! |---|---|
//! | `.jsonl`, `.ndjson` | one object a line |
//! | `.json` | the elements of a list, or of the list `data` of an object; else objects, one after the other |
//! | `.csv`, `.tsv` | records, named by the first; all values are texts |
//! | `.parquet` | as the Hugging Face hub stores them (snappy, zstd, gzip or plain) |
//!
//! A folder stands for the data files that lie in it, in the order of their names.

mod csv;
mod json;
mod parquet;

use super::{BadRow, Reason};
use serde_json::{Map, Value};
use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    vec,
};

/// One row: an object with fields.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub fields: Map<String, Value>,
    pub origin: Origin,
}

/// Where a row is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    pub path: Arc<Path>,
    pub place: Place,
}

/// Which of the rows of a file; both count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The line it begins on.
    Line(u64),
    /// Files without lines.
    Row(u64),
}

impl Origin {
    pub fn new(path: impl AsRef<Path>, place: Place) -> Origin {
        Origin { path: path.as_ref().into(), place }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place {
            Place::Line(line) => write!(f, "{}:{line}", self.path.display()),
            Place::Row(row) => write!(f, "{}, row {row}", self.path.display()),
        }
    }
}

/// A file that cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("{}: cannot be read: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{}: not a data file: use .jsonl, .ndjson, .json, .csv, .tsv or .parquet, or a folder of them",
        path.display()
    )]
    Format { path: PathBuf },
    #[error("{}: the folder holds no data file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet)", path.display())]
    NoFiles { path: PathBuf },
    #[error("{origin}: {problem}")]
    Malformed { origin: Origin, problem: String },
    #[error("{}: {problem}", path.display())]
    Parquet { path: PathBuf, problem: String },
}

impl FileError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> FileError + '_ {
        |source| FileError::Io { path: path.into(), source }
    }
}

/// Why there is no row: the next rows may be fine, or the file cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    #[error(transparent)]
    Row(#[from] BadRow),
    #[error(transparent)]
    File(#[from] FileError),
}

/// How a file is read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    JsonLines,
    Json,
    Csv { delimiter: u8 },
    Parquet,
}

impl Format {
    fn of(path: &Path) -> Option<Format> {
        Some(match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "jsonl" | "ndjson" => Format::JsonLines,
            "json" => Format::Json,
            "csv" => Format::Csv { delimiter: b',' },
            "tsv" => Format::Csv { delimiter: b'\t' },
            "parquet" => Format::Parquet,
            _ => return None,
        })
    }
}

/// What the hub's tools lay beside the data.
const METADATA: [&str; 4] = ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"];

/// The data files that `path` stands for: itself, or those of a folder in the order of their names.
pub fn files(path: &Path) -> Result<Vec<PathBuf>, FileError> {
    if !fs::metadata(path).map_err(FileError::io(path))?.is_dir() {
        return match Format::of(path) {
            Some(_) => Ok(vec![path.into()]),
            None => Err(FileError::Format { path: path.into() }),
        };
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path).map_err(FileError::io(path))? {
        let entry = entry.map_err(FileError::io(path))?.path();
        let name = entry.file_name().unwrap_or_default().to_string_lossy();
        if !name.starts_with('.')
            && !METADATA.contains(&&*name)
            && Format::of(&entry).is_some()
            && entry.is_file()
        {
            files.push(entry);
        }
    }
    files.sort();
    if files.is_empty() { Err(FileError::NoFiles { path: path.into() }) } else { Ok(files) }
}

/// The rows of a file or folder. After a [`Problem::File`] there are no more.
pub fn rows(path: &Path) -> Result<Rows, FileError> {
    Ok(Rows { files: files(path)?.into_iter(), current: None })
}

/// See [`rows`].
pub struct Rows {
    files: vec::IntoIter<PathBuf>,
    current: Option<FileRows>,
}

type FileRows = Box<dyn Iterator<Item = Result<Row, Problem>>>;

fn open(path: &Path) -> Result<FileRows, FileError> {
    let format = Format::of(path).ok_or_else(|| FileError::Format { path: path.into() })?;
    let file = fs::File::open(path).map_err(FileError::io(path))?;
    let path: Arc<Path> = path.into();
    Ok(match format {
        Format::JsonLines => Box::new(json::Lines::new(file, path)),
        Format::Json => Box::new(json::Values::new(file, path)),
        Format::Csv { delimiter } => Box::new(csv::Records::new(file, path, delimiter)?),
        Format::Parquet => Box::new(parquet::open(file, path)?),
    })
}

impl Iterator for Rows {
    type Item = Result<Row, Problem>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let problem = match &mut self.current {
                Some(rows) => match rows.next() {
                    Some(Err(Problem::File(error))) => error,
                    Some(row) => return Some(row),
                    None => {
                        self.current = None;
                        continue;
                    }
                },
                None => match open(&self.files.next()?) {
                    Ok(rows) => {
                        self.current = Some(rows);
                        continue;
                    }
                    Err(error) => error,
                },
            };
            self.current = None;
            self.files = Vec::new().into_iter();
            return Some(Err(problem.into()));
        }
    }
}

/// The row that a value is, if it is one.
fn row(value: Value, origin: Origin) -> Result<Row, Problem> {
    match value {
        Value::Object(fields) => Ok(Row { fields, origin }),
        _ => Err(BadRow { origin, reason: Reason::NotAnObject, detail: String::new() }.into()),
    }
}
