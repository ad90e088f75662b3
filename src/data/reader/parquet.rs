//! Parquet, as the Hugging Face hub stores it.

use super::{FileError, Origin, Place, Problem, Row};
use parquet::{
    basic::{ConvertedType, Repetition, Type as Physical},
    file::reader::{FileReader, SerializedFileReader},
    record::{Field, reader::RowIter},
    schema::types::Type,
};
use serde_json::{Map, Number, Value};
use std::{
    fs::File,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Arc,
};

/// The rows of a file, decoded page by page.
pub fn open(file: File, path: Arc<Path>) -> Result<Rows, FileError> {
    let problem = |problem: String| FileError::Parquet { path: path.to_path_buf(), problem };
    let reader =
        caught(|| SerializedFileReader::new(file).map_err(|error| error.to_string())).map_err(problem)?;
    for column in reader.metadata().file_metadata().schema().get_fields() {
        readable(column).map_err(|what| problem(format!("column `{}`: {what}", column.name())))?;
    }
    Ok(Rows { rows: RowIter::from_file_into(Box::new(reader)), path, row: 0, failed: false })
}

/// The `parquet` crate panics at some pages that are broken, in safe code. To its caller that is an error as others are;
/// what it was reading from is not used again.
fn caught<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err("the file is broken".into()))
}

pub struct Rows {
    rows: RowIter<'static>,
    path: Arc<Path>,
    row: u64,
    failed: bool,
}

/// The `parquet` crate takes some things for granted of which files of others may be lacking.
fn readable(column: &Type) -> Result<(), String> {
    let info = column.get_basic_info();
    if !info.has_repetition() {
        return Err("is neither required, optional nor repeated".into());
    }
    if column.is_primitive() {
        return match (column.get_physical_type(), info.converted_type()) {
            (_, ConvertedType::INTERVAL) => Err("time intervals are not supported".into()),
            (Physical::FIXED_LEN_BYTE_ARRAY, ConvertedType::NONE | ConvertedType::DECIMAL) => Ok(()),
            (Physical::FIXED_LEN_BYTE_ARRAY, other) => {
                Err(format!("{other} of fixed length is not supported"))
            }
            _ => Ok(()),
        };
    }
    let children = column.get_fields();
    let bad = |what: &str| Err(format!("is no {what} by the rules of Parquet"));
    match info.converted_type() {
        ConvertedType::LIST => match children {
            [list] if repeated(list) => {}
            _ => return bad("list"),
        },
        ConvertedType::MAP | ConvertedType::MAP_KEY_VALUE => match children {
            [entry] if repeated(entry) && entry.is_group() && matches!(entry.get_fields().len(), 1 | 2) => {}
            _ => return bad("map"),
        },
        _ if children.is_empty() => return Err("is a group without fields".into()),
        _ => {}
    }
    children.iter().try_for_each(|child| readable(child))
}

fn repeated(field: &Type) -> bool {
    let info = field.get_basic_info();
    info.has_repetition() && info.repetition() == Repetition::REPEATED
}

/// Texts, numbers, lists and groups as JSON has them; times by their number, decimals by their digits; maps from texts as
/// objects, others as lists of pairs. Bytes that are a text are one; others are null: no adapter reads pictures.
fn value(field: Field) -> Value {
    let float = |x: f64| Number::from_f64(x).map_or(Value::Null, Value::Number);
    match field {
        Field::Null => Value::Null,
        Field::Bool(x) => x.into(),
        Field::Byte(x) => x.into(),
        Field::Short(x) => x.into(),
        Field::Int(x) | Field::Date(x) | Field::TimeMillis(x) => x.into(),
        Field::Long(x) | Field::TimeMicros(x) | Field::TimestampMillis(x) | Field::TimestampMicros(x) => {
            x.into()
        }
        Field::UByte(x) => x.into(),
        Field::UShort(x) => x.into(),
        Field::UInt(x) => x.into(),
        Field::ULong(x) => x.into(),
        Field::Float16(x) => float(x.into()),
        Field::Float(x) => float(x.into()),
        Field::Double(x) => float(x),
        Field::Decimal(_) => field.to_string().into(),
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Value::from),
        Field::Group(row) => Value::Object(object(row)),
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect(),
        Field::MapInternal(map) => {
            let entries = || map.entries().iter().cloned();
            if entries().all(|(key, _)| matches!(key, Field::Str(_))) {
                entries()
                    .filter_map(|(key, x)| match key {
                        Field::Str(name) => Some((name, value(x))),
                        _ => None,
                    })
                    .collect()
            } else {
                entries().map(|(key, x)| Value::Array(vec![value(key), value(x)])).collect()
            }
        }
    }
}

fn object(row: parquet::record::Row) -> Map<String, Value> {
    row.into_columns().into_iter().map(|(name, field)| (name, value(field))).collect()
}

impl Iterator for Rows {
    type Item = Result<Row, Problem>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let rows = &mut self.rows;
        let row = caught(|| rows.next().transpose().map_err(|error| error.to_string())).transpose()?;
        self.row += 1;
        let origin = Origin { path: self.path.clone(), place: Place::Row(self.row) };
        Some(match row {
            Ok(row) => Ok(Row { fields: object(row), origin }),
            Err(problem) => {
                self.failed = true;
                Err(Problem::File(FileError::Malformed { origin, problem }))
            }
        })
    }
}
