//! Taking typed values out of a row.

use crate::data::Reason;
use serde_json::{Map, Value};

/// Why a row is bad, before its place is known.
#[derive(Debug)]
pub struct Bad {
    pub reason: Reason,
    pub detail: String,
}

impl From<Reason> for Bad {
    fn from(reason: Reason) -> Bad {
        Bad { reason, detail: String::new() }
    }
}

pub type Fields = Map<String, Value>;

fn wrong(field: &'static str, expected: &'static str) -> Bad {
    Reason::Type { field, expected }.into()
}

/// The text of a field that may be missing, null or empty.
pub fn optional_text<'a>(fields: &'a Fields, name: &'static str) -> Result<&'a str, Bad> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(""),
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(wrong(name, "a text")),
    }
}

/// The text of a field, which must have more than spaces.
pub fn text<'a>(fields: &'a Fields, name: &'static str) -> Result<&'a str, Bad> {
    match fields.get(name) {
        None => Err(Reason::Missing(name).into()),
        Some(Value::String(text)) if text.trim().is_empty() => Err(Reason::Empty(name).into()),
        Some(Value::String(text)) => Ok(text),
        Some(Value::Null) => Err(Reason::Empty(name).into()),
        Some(_) => Err(wrong(name, "a text")),
    }
}

/// A field taken out; a text that is the JSON of a list or object counts as that (in CSV there is no other way).
pub fn take(fields: &mut Fields, name: &'static str) -> Result<Value, Bad> {
    match fields.remove(name) {
        None => Err(Reason::Missing(name).into()),
        Some(Value::Null) => Err(Reason::Empty(name).into()),
        Some(Value::String(text)) if text.starts_with(['[', '{']) => {
            Ok(serde_json::from_str(&text).unwrap_or(Value::String(text)))
        }
        Some(value) => Ok(value),
    }
}

pub fn take_list(fields: &mut Fields, name: &'static str) -> Result<Vec<Value>, Bad> {
    match take(fields, name)? {
        Value::Array(list) => Ok(list),
        _ => Err(wrong(name, "a list")),
    }
}

/// The texts of a list; numbers and truth values are spelled out (choices of arithmetic questions).
pub fn texts(list: Vec<Value>, name: &'static str) -> Result<Vec<String>, Bad> {
    list.into_iter()
        .map(|value| match value {
            Value::String(text) => Ok(text),
            Value::Number(_) | Value::Bool(_) => Ok(value.to_string()),
            _ => Err(wrong(name, "a list of texts")),
        })
        .collect()
}
