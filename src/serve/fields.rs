//! A request's fields, taken one by one: a wrong one is named, one that nobody takes is noted and ignored.

use super::error::ApiError;
use axum::{body::Bytes, http::StatusCode};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// A JSON object that is being read.
pub struct Fields {
    /// Where it lies in the request: empty, or `c2c.`.
    prefix: &'static str,
    map: Map<String, Value>,
}

impl Fields {
    /// # Errors
    /// If `body` is no JSON object in UTF-8.
    pub fn parse(body: &Bytes) -> Result<Fields, ApiError> {
        let bad = |problem: String| {
            ApiError::new(StatusCode::BAD_REQUEST, format!("the request is no JSON object: {problem}"))
        };
        match serde_json::from_slice(body).map_err(|error| bad(error.to_string()))? {
            Value::Object(map) => Ok(Fields { prefix: "", map }),
            other => Err(bad(format!("it is {}", kind(&other)))),
        }
    }

    /// A field that is itself an object; empty where it is not there.
    pub fn object(&mut self, name: &str, prefix: &'static str) -> Result<Fields, ApiError> {
        match self.map.remove(name) {
            None | Some(Value::Null) => Ok(Fields { prefix, map: Map::new() }),
            Some(Value::Object(map)) => Ok(Fields { prefix, map }),
            Some(other) => Err(self.invalid(name, format!("is {}, not an object", kind(&other)))),
        }
    }

    /// `null` is as good as nothing.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        match self.map.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value)
                .map(Some)
                .map_err(|error| self.invalid(name, format!("is not what it should be: {error}"))),
        }
    }

    /// # Errors
    /// Also if it is not there.
    pub fn need<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, ApiError> {
        self.take(name)?.ok_or_else(|| self.invalid(name, "is missing"))
    }

    /// A number within `range`.
    pub fn number(
        &mut self,
        name: &str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<Option<usize>, ApiError> {
        let Some(value) = self.take::<Value>(name)? else { return Ok(None) };
        let number = value.as_u64().filter(|number| range.contains(number));
        let (least, most) = (range.start(), range.end());
        let wrong =
            || self.invalid(name, format!("is {value}: expected a whole number from {least} to {most}"));
        number.map(|number| Some(number as usize)).ok_or_else(wrong)
    }

    pub fn invalid(&self, name: &str, problem: impl AsRef<str>) -> ApiError {
        let param = format!("{}{name}", self.prefix);
        ApiError::invalid(&param, format!("`{param}` {}", problem.as_ref()))
    }

    /// To be called when all are taken.
    pub fn ignore_rest(self) {
        if !self.map.is_empty() {
            let names: Vec<String> =
                self.map.keys().map(|name| format!("`{}{}`", self.prefix, name.escape_debug())).collect();
            log::info!("fields of a request that mean nothing here: {}", names.join(", "));
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
