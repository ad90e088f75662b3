//! JSON, by the line and by the value.

use super::{FileError, Origin, Place, Problem, Row, row};
use crate::data::{BadRow, Reason};
use serde::Deserialize;
use serde_json::{Deserializer, Map, Value};
use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
    sync::Arc,
};

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// One value a line. A line that is no JSON is a bad row; the next ones are read.
pub struct Lines {
    reader: BufReader<File>,
    path: Arc<Path>,
    line: u64,
    buffer: Vec<u8>,
    failed: bool,
}

impl Lines {
    pub fn new(file: File, path: Arc<Path>) -> Lines {
        Lines { reader: BufReader::new(file), path, line: 0, buffer: Vec::new(), failed: false }
    }
}

impl Iterator for Lines {
    type Item = Result<Row, Problem>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.failed {
            self.buffer.clear();
            match self.reader.read_until(b'\n', &mut self.buffer) {
                Ok(0) => return None,
                Ok(_) => self.line += 1,
                Err(error) => {
                    self.failed = true;
                    return Some(Err(FileError::io(&self.path)(error).into()));
                }
            }
            let mut text = self.buffer.as_slice();
            if self.line == 1 {
                text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text);
            }
            if text.trim_ascii().is_empty() {
                continue;
            }
            let origin = Origin { path: self.path.clone(), place: Place::Line(self.line) };
            return Some(match serde_json::from_slice(text) {
                Ok(value) => row(value, origin),
                Err(error) => {
                    // Of a text of one line, the line that the message ends with is no news.
                    let detail = error.to_string().replace(" at line 1 column ", " at column ");
                    Err(BadRow { origin, reason: Reason::Unreadable, detail }.into())
                }
            });
        }
        None
    }
}

/// The elements of a list at the top, or of the list `data` of an object at the top; other objects at the top are
/// rows themselves. What is no JSON ends the file with an error, for nobody knows where the next row begins.
pub struct Values {
    bytes: Bytes,
    path: Arc<Path>,
    row: u64,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Top,
    /// Before an element; `within_object` where the list is the member `data` of an object.
    Element {
        first: bool,
        within_object: bool,
    },
    Ended,
}

/// A reader that can take back the last byte it gave: the end of a number shows only in what follows.
struct Bytes {
    reader: BufReader<File>,
    last: u8,
    taken_back: bool,
    ended: bool,
}

impl Read for Bytes {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        if std::mem::take(&mut self.taken_back) {
            out[0] = self.last;
            return Ok(1);
        }
        let length = self.reader.read(out)?;
        match length {
            0 => self.ended = true,
            _ => self.last = out[length - 1],
        }
        Ok(length)
    }
}

impl Bytes {
    /// The next byte that is no space, left where it is.
    fn peek(&mut self) -> io::Result<Option<u8>> {
        loop {
            let mut byte = [0];
            if self.read(&mut byte)? == 0 {
                return Ok(None);
            }
            if !byte[0].is_ascii_whitespace() {
                self.taken_back = true;
                return Ok(Some(byte[0]));
            }
        }
    }

    /// Goes over the byte that was peeked at.
    fn skip(&mut self) {
        self.taken_back = false;
    }

    fn value<T: for<'de> Deserialize<'de>>(&mut self) -> Result<T, Stop> {
        let number = self.peek()?.is_some_and(|byte| byte == b'-' || byte.is_ascii_digit());
        let value = T::deserialize(&mut Deserializer::from_reader(&mut *self)).map_err(|error| {
            if error.is_io() { Stop::Io(error.into()) } else { Stop::Json(plain(&error)) }
        })?;
        // Only of a number more is read than belongs to it: one byte, if there is one.
        self.taken_back = number && !self.ended;
        Ok(value)
    }
}

/// The message without a position, which would be counted from the value's first byte.
fn plain(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let position = message.rfind(" at line ").unwrap_or(message.len());
    message[..position].to_owned()
}

/// Why no value follows.
enum Stop {
    Io(io::Error),
    Json(String),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Stop {
        Stop::Io(error)
    }
}

fn expected<T>(what: &str, found: Option<u8>) -> Result<T, Stop> {
    Err(Stop::Json(match found {
        Some(byte) => format!("expected {what}, found `{}`", byte.escape_ascii()),
        None => format!("expected {what}, but the file ends"),
    }))
}

impl Values {
    pub fn new(file: File, path: Arc<Path>) -> Values {
        let bytes = Bytes { reader: BufReader::new(file), last: 0, taken_back: false, ended: false };
        Values { bytes, path, row: 0, state: State::Top }
    }

    fn next_value(&mut self) -> Result<Option<Value>, Stop> {
        loop {
            match self.state {
                State::Ended => return Ok(None),
                State::Top => {
                    if self.row == 0 && self.bytes.reader.fill_buf()?.starts_with(BYTE_ORDER_MARK) {
                        self.bytes.reader.consume(BYTE_ORDER_MARK.len());
                    }
                    match self.bytes.peek()? {
                        None => self.state = State::Ended,
                        Some(b'[') => {
                            self.bytes.skip();
                            self.state = State::Element { first: true, within_object: false };
                        }
                        Some(b'{') => {
                            if let Some(fields) = self.object()? {
                                return Ok(Some(Value::Object(fields)));
                            }
                        }
                        found => return expected("a list or an object", found),
                    }
                }
                State::Element { first, within_object } => {
                    let next = self.bytes.peek()?;
                    if next == Some(b']') {
                        self.bytes.skip();
                        if within_object {
                            self.rest_of_object()?;
                        }
                        self.state = State::Top;
                        continue;
                    }
                    if !first {
                        if next != Some(b',') {
                            return expected("`,` or `]` after an element", next);
                        }
                        self.bytes.skip();
                    }
                    self.state = State::Element { first: false, within_object };
                    return self.bytes.value().map(Some);
                }
            }
        }
    }

    /// An object at the top, its brace ahead; none where its list `data` follows, whose rows come next.
    fn object(&mut self) -> Result<Option<Map<String, Value>>, Stop> {
        self.bytes.skip();
        let mut fields = Map::new();
        if self.bytes.peek()? == Some(b'}') {
            self.bytes.skip();
            return Ok(Some(fields));
        }
        loop {
            let name = self.member_name()?;
            if name == "data" && self.bytes.peek()? == Some(b'[') {
                self.bytes.skip();
                self.state = State::Element { first: true, within_object: true };
                return Ok(None);
            }
            fields.insert(name, self.bytes.value()?);
            if !self.another_member()? {
                return Ok(Some(fields));
            }
        }
    }

    fn rest_of_object(&mut self) -> Result<(), Stop> {
        while self.another_member()? {
            self.member_name()?;
            self.bytes.value::<serde::de::IgnoredAny>()?;
        }
        Ok(())
    }

    fn member_name(&mut self) -> Result<String, Stop> {
        let name = self.bytes.value()?;
        match self.bytes.peek()? {
            Some(b':') => self.bytes.skip(),
            found => return expected("`:`", found),
        }
        Ok(name)
    }

    fn another_member(&mut self) -> Result<bool, Stop> {
        let found = self.bytes.peek()?;
        match found {
            Some(b',' | b'}') => self.bytes.skip(),
            _ => return expected("`,` or `}` after a member", found),
        }
        Ok(found == Some(b','))
    }
}

impl Iterator for Values {
    type Item = Result<Row, Problem>;

    fn next(&mut self) -> Option<Self::Item> {
        let value = self.next_value().transpose()?;
        self.row += 1;
        let origin = Origin { path: self.path.clone(), place: Place::Row(self.row) };
        Some(
            value
                .map_err(|stop| {
                    self.state = State::Ended;
                    match stop {
                        Stop::Io(error) => FileError::io(&self.path)(error).into(),
                        Stop::Json(problem) => {
                            FileError::Malformed { origin: origin.clone(), problem }.into()
                        }
                    }
                })
                .and_then(|value| row(value, origin)),
        )
    }
}
