//! Comma- and tab-separated values.

use super::{FileError, Origin, Place, Problem, Row};
use crate::data::{BadRow, Reason};
use csv::{ByteRecord, ErrorKind, Reader, ReaderBuilder};
use serde_json::Value;
use std::{fs::File, path::Path, sync::Arc};

/// Records, named by the first one. A record of another length, or that is no UTF-8, is a bad row.
pub struct Records {
    reader: Reader<File>,
    names: Vec<String>,
    path: Arc<Path>,
    record: ByteRecord,
    failed: bool,
}

impl Records {
    pub fn new(file: File, path: Arc<Path>, delimiter: u8) -> Result<Records, FileError> {
        let mut reader = ReaderBuilder::new().delimiter(delimiter).flexible(true).from_reader(file);
        let names = match reader.headers() {
            Ok(names) => names.iter().map(str::to_owned).collect(),
            Err(error) => {
                let origin = Origin { path: path.clone(), place: Place::Line(1) };
                return Err(match error.into_kind() {
                    ErrorKind::Io(source) => FileError::Io { path: path.to_path_buf(), source },
                    _ => FileError::Malformed {
                        origin,
                        problem: "the names of the columns are not UTF-8".into(),
                    },
                });
            }
        };
        Ok(Records { reader, names, path, record: ByteRecord::new(), failed: false })
    }

    fn row(&self, origin: Origin) -> Result<Row, BadRow> {
        if self.record.len() != self.names.len() {
            let detail = format!("{} values for {} columns", self.record.len(), self.names.len());
            return Err(BadRow { origin, reason: Reason::Unreadable, detail });
        }
        let mut fields = serde_json::Map::new();
        for (name, value) in self.names.iter().zip(&self.record) {
            let Ok(text) = std::str::from_utf8(value) else {
                let detail = format!("column `{name}` is not UTF-8");
                return Err(BadRow { origin, reason: Reason::Unreadable, detail });
            };
            fields.insert(name.clone(), Value::String(text.to_owned()));
        }
        Ok(Row { fields, origin })
    }
}

impl Iterator for Records {
    type Item = Result<Row, Problem>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        match self.reader.read_byte_record(&mut self.record) {
            Ok(false) => None,
            Ok(true) => {
                let line = self.record.position().map_or(0, |position| position.line());
                let origin = Origin { path: self.path.clone(), place: Place::Line(line) };
                Some(self.row(origin).map_err(Problem::from))
            }
            Err(error) => {
                self.failed = true;
                let line = error.position().map_or(0, |position| position.line());
                Some(Err(Problem::File(match error.into_kind() {
                    ErrorKind::Io(source) => FileError::Io { path: self.path.to_path_buf(), source },
                    other => {
                        let origin = Origin { path: self.path.clone(), place: Place::Line(line) };
                        FileError::Malformed { origin, problem: format!("{other:?}") }
                    }
                })))
            }
        }
    }
}
