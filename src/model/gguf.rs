//! Reader of GGUF files, versions 2 and 3, little-endian
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).
//!
//! The header is walked once; values stay in the mapped file until asked for, so what is allocated is bounded by the
//! size of the file, whatever its counts claim.

use crate::backend::{DType, cpu};
use memmap2::Mmap;
use std::{
    collections::{HashMap, HashSet},
    fmt,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

/// What can be wrong with a GGUF file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("not a GGUF file: it starts with {0:02x?}, not `GGUF`")]
    Magic([u8; 4]),
    #[error("GGUF version {0} is not supported; convert the file to version 2 or 3")]
    Version(u32),
    #[error("a big-endian GGUF file; convert it to little-endian")]
    BigEndian,
    #[error(
        "{what} at byte {at} reaches past the end of the file ({len} bytes): truncated, or a false length"
    )]
    Truncated { what: String, at: usize, len: usize },
    #[error("the header claims {count} {what}, more than a file of {len} bytes can hold")]
    Count { what: &'static str, count: u64, len: usize },
    #[error("{what} is not UTF-8")]
    Utf8 { what: String },
    #[error("metadata key `{0}` occurs twice")]
    DuplicateKey(String),
    #[error("tensor `{0}` occurs twice")]
    DuplicateTensor(String),
    #[error("metadata `{key}` has the unknown value type {kind}")]
    ValueType { key: String, kind: u32 },
    #[error("metadata `{0}` is an array of arrays, which no model uses")]
    NestedArray(String),
    #[error("metadata `{key}` is {found}, expected {expected}")]
    WrongType { key: String, found: String, expected: &'static str },
    #[error("metadata `{0}` is missing")]
    MissingKey(String),
    #[error("`general.alignment` is {0}, must be a power of two")]
    Alignment(u64),
    #[error(
        "tensor `{name}` has type {kind}, which is not supported (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K and IQ4_NL are)"
    )]
    TensorType { name: String, kind: String },
    #[error("tensor `{name}` has the impossible shape {shape:?} for type {dtype}")]
    TensorShape { name: String, shape: Vec<u64>, dtype: DType },
    #[error("tensor `{name}` lies at offset {offset}, not a multiple of the alignment {alignment}")]
    TensorOffset { name: String, offset: u64, alignment: usize },
    #[error("tensors `{0}` and `{1}` overlap")]
    Overlap(String, String),
}

/// An opened file.
#[derive(Clone)]
pub struct Gguf {
    path: PathBuf,
    file: Arc<Mmap>,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorInfo>,
}

/// Where a tensor lies in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub dtype: DType,
    /// Outermost dimension first (the file has it the other way round).
    pub shape: Vec<usize>,
    /// Bytes in the file, checked to lie within it.
    pub bytes: Range<usize>,
}

/// A metadata value: its type and where its bytes lie.
#[derive(Clone, Debug)]
enum Value {
    Scalar(Kind, Range<usize>),
    Array { of: Kind, len: usize, bytes: Range<usize> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    U64,
    I64,
    F64,
}

const ARRAY: u32 = 9;

impl Kind {
    fn from_id(id: u32) -> Option<Kind> {
        use Kind::*;
        const IDS: [Option<Kind>; 13] = [
            Some(U8),
            Some(I8),
            Some(U16),
            Some(I16),
            Some(U32),
            Some(I32),
            Some(F32),
            Some(Bool),
            Some(String),
            None,
            Some(U64),
            Some(I64),
            Some(F64),
        ];
        *IDS.get(id as usize)?
    }

    /// Bytes of a value; strings have their length before them.
    fn size(self) -> Option<usize> {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => Some(1),
            Kind::U16 | Kind::I16 => Some(2),
            Kind::U32 | Kind::I32 | Kind::F32 => Some(4),
            Kind::U64 | Kind::I64 | Kind::F64 => Some(8),
            Kind::String => None,
        }
    }
}

/// Type of a tensor by its number in the file; `Err` is the name of one that we do not read.
fn dtype(id: u32) -> Result<DType, String> {
    Ok(match id {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::Q4_0,
        3 => DType::Q4_1,
        6 => DType::Q5_0,
        7 => DType::Q5_1,
        8 => DType::Q8_0,
        10 => DType::Q2K,
        11 => DType::Q3K,
        12 => DType::Q4K,
        13 => DType::Q5K,
        14 => DType::Q6K,
        20 => DType::Iq4Nl,
        30 => DType::Bf16,
        _ => {
            const OTHERS: [(u32, &str); 18] = [
                (9, "Q8_1"),
                (15, "Q8_K"),
                (16, "IQ2_XXS"),
                (17, "IQ2_XS"),
                (18, "IQ3_XXS"),
                (19, "IQ1_S"),
                (21, "IQ3_S"),
                (22, "IQ2_S"),
                (23, "IQ4_XS"),
                (24, "I8"),
                (25, "I16"),
                (26, "I32"),
                (27, "I64"),
                (28, "F64"),
                (29, "IQ1_M"),
                (34, "TQ1_0"),
                (35, "TQ2_0"),
                (39, "MXFP4"),
            ];
            let name = OTHERS.iter().find(|(other, _)| *other == id).map(|(_, name)| *name);
            return Err(name.map_or_else(|| format!("number {id}"), str::to_owned));
        }
    })
}

/// Walks the header.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize, what: impl FnOnce() -> String) -> Result<Range<usize>, Error> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| Error::Truncated { what: what(), at: self.at, len: self.bytes.len() })?;
        let range = self.at..end;
        self.at = end;
        Ok(range)
    }

    fn array<const N: usize>(&mut self, what: impl FnOnce() -> String) -> Result<[u8; N], Error> {
        let range = self.take(N, what)?;
        Ok(self.bytes[range].try_into().expect("taken N bytes"))
    }

    fn u32(&mut self, what: impl FnOnce() -> String) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: impl FnOnce() -> String) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// The bytes of a string, without its length.
    fn string(&mut self, what: impl Fn() -> String) -> Result<Range<usize>, Error> {
        let len = self.u64(&what)?;
        // A length past usize is past the end, too.
        self.take(usize::try_from(len).unwrap_or(usize::MAX), what)
    }

    fn text(&mut self, what: impl Fn() -> String) -> Result<&'a str, Error> {
        let range = self.string(&what)?;
        std::str::from_utf8(&self.bytes[range]).map_err(|_| Error::Utf8 { what: what() })
    }

    /// A count of entries, each of at least `smallest` bytes.
    fn count(&mut self, what: &'static str, smallest: usize) -> Result<usize, Error> {
        let count = self.u64(|| format!("the number of {what}"))?;
        let room = (self.bytes.len() - self.at) / smallest;
        match usize::try_from(count) {
            Ok(n) if n <= room => Ok(n),
            _ => Err(Error::Count { what, count, len: self.bytes.len() }),
        }
    }

    fn value(&mut self, key: &str) -> Result<Value, Error> {
        let what = || format!("metadata `{key}`");
        let id = self.u32(what)?;
        let kind = |id| Kind::from_id(id).ok_or_else(|| Error::ValueType { key: key.into(), kind: id });
        if id != ARRAY {
            let kind = kind(id)?;
            let bytes = match kind.size() {
                Some(size) => self.take(size, what)?,
                None => self.string(what)?,
            };
            return Ok(Value::Scalar(kind, bytes));
        }
        let id = self.u32(what)?;
        if id == ARRAY {
            return Err(Error::NestedArray(key.into()));
        }
        let of = kind(id)?;
        let len = self.count("array elements", of.size().unwrap_or(8))?;
        let start = self.at;
        match of.size() {
            Some(size) => _ = self.take(len * size, what)?,
            None => {
                for _ in 0..len {
                    self.string(what)?;
                }
            }
        }
        Ok(Value::Array { of, len, bytes: start..self.at })
    }
}

impl Gguf {
    pub fn open(path: &Path) -> Result<Gguf, super::Error> {
        let file = cpu::map_file(path).map_err(|source| super::Error::Io { path: path.into(), source })?;
        Self::parse(path, file).map_err(|source| super::Error::Gguf { path: path.into(), source })
    }

    fn parse(path: &Path, file: Arc<Mmap>) -> Result<Gguf, Error> {
        let mut cursor = Cursor { bytes: &file, at: 0 };
        let magic = cursor.array(|| "the magic number".into())?;
        if &magic != b"GGUF" {
            return Err(Error::Magic(magic));
        }
        match cursor.u32(|| "the version".into())? {
            2 | 3 => {}
            version if version.swap_bytes() <= 3 => return Err(Error::BigEndian),
            version => return Err(Error::Version(version)),
        }
        // The smallest tensor entry: name length, rank, one dimension, type, offset. The smallest metadata entry: key
        // length, type, one byte.
        let tensor_count = cursor.count("tensors", 8 + 4 + 8 + 4 + 8)?;
        let metadata_count = cursor.count("metadata entries", 8 + 4 + 1)?;
        let mut metadata = HashMap::new();
        for n in 0..metadata_count {
            let key = cursor.text(|| format!("metadata key {n}"))?;
            let value = cursor.value(key)?;
            if metadata.insert(key.to_owned(), value).is_some() {
                return Err(Error::DuplicateKey(key.into()));
            }
        }
        let mut gguf = Gguf { path: path.into(), file: file.clone(), metadata, tensors: HashMap::new() };
        let alignment = gguf.optional_int("general.alignment")?.unwrap_or(32);
        let alignment = usize::try_from(alignment).ok().filter(|a| a.is_power_of_two());
        let alignment = alignment.ok_or_else(|| {
            Error::Alignment(gguf.optional_int("general.alignment").ok().flatten().unwrap_or(0))
        })?;
        gguf.tensors = tensors(cursor, tensor_count, alignment)?;
        Ok(gguf)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self) -> &Arc<Mmap> {
        &self.file
    }

    pub fn tensors(&self) -> &HashMap<String, TensorInfo> {
        &self.tensors
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// The value of an optional key by one of the readers below: `Ok(None)` only where the key is absent.
    fn scalar<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(Kind, &[u8]) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let read = match value {
            Value::Scalar(kind, range) => read(*kind, &self.file[range.clone()]),
            Value::Array { .. } => None,
        };
        let wrong = || Error::WrongType { key: key.into(), found: value.to_string(), expected };
        read.map(Some).ok_or_else(wrong)
    }

    /// An integer of any width that is not negative.
    pub fn optional_int(&self, key: &str) -> Result<Option<u64>, Error> {
        self.scalar(key, "a non-negative integer", int)
    }

    pub fn optional_float(&self, key: &str) -> Result<Option<f32>, Error> {
        self.scalar(key, "a floating-point number", float)
    }

    pub fn optional_bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.scalar(key, "a boolean", |kind, b| (kind == Kind::Bool).then(|| b[0] != 0))
    }

    pub fn optional_str(&self, key: &str) -> Result<Option<&str>, Error> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Scalar(Kind::String, range)) => std::str::from_utf8(&self.file[range.clone()])
                .map(Some)
                .map_err(|_| Error::Utf8 { what: format!("metadata `{key}`") }),
            Some(other) => {
                Err(Error::WrongType { key: key.into(), found: other.to_string(), expected: "a string" })
            }
        }
    }

    pub fn int(&self, key: &str) -> Result<u64, Error> {
        self.optional_int(key)?.ok_or_else(|| Error::MissingKey(key.into()))
    }

    pub fn float(&self, key: &str) -> Result<f32, Error> {
        self.optional_float(key)?.ok_or_else(|| Error::MissingKey(key.into()))
    }

    pub fn str(&self, key: &str) -> Result<&str, Error> {
        self.optional_str(key)?.ok_or_else(|| Error::MissingKey(key.into()))
    }

    /// An array of strings.
    pub fn optional_strings(&self, key: &str) -> Result<Option<Vec<String>>, Error> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let Value::Array { of: Kind::String, len, bytes } = value else {
            let expected = "an array of strings";
            return Err(Error::WrongType { key: key.into(), found: value.to_string(), expected });
        };
        let mut cursor = Cursor { bytes: &self.file[..bytes.end], at: bytes.start };
        let strings = (0..*len).map(|n| cursor.text(|| format!("element {n} of `{key}`")).map(str::to_owned));
        strings.collect::<Result<_, _>>().map(Some)
    }

    /// An array of integers that are not negative, or one such integer.
    pub fn optional_ints(&self, key: &str) -> Result<Option<Vec<u64>>, Error> {
        self.numbers(key, "an array of non-negative integers", int)
    }

    /// An array of floating-point numbers, or one.
    pub fn optional_floats(&self, key: &str) -> Result<Option<Vec<f32>>, Error> {
        self.numbers(key, "an array of floating-point numbers", float)
    }

    fn numbers<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl Fn(Kind, &[u8]) -> Option<T>,
    ) -> Result<Option<Vec<T>>, Error> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let numbers = match value {
            Value::Scalar(kind, range) => read(*kind, &self.file[range.clone()]).map(|n| vec![n]),
            Value::Array { of, bytes, .. } => of.size().and_then(|size| {
                self.file[bytes.clone()].chunks_exact(size).map(|bytes| read(*of, bytes)).collect()
            }),
        };
        let wrong = || Error::WrongType { key: key.into(), found: value.to_string(), expected };
        numbers.map(Some).ok_or_else(wrong)
    }
}

fn int(kind: Kind, bytes: &[u8]) -> Option<u64> {
    let mut wide = [0; 8];
    wide.get_mut(..bytes.len())?.copy_from_slice(bytes);
    let unsigned = u64::from_le_bytes(wide);
    let negative = bytes.last().is_some_and(|top| top & 0x80 != 0);
    match kind {
        Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => Some(unsigned),
        Kind::I8 | Kind::I16 | Kind::I32 | Kind::I64 if !negative => Some(unsigned),
        _ => None,
    }
}

fn float(kind: Kind, bytes: &[u8]) -> Option<f32> {
    match kind {
        Kind::F32 => Some(f32::from_le_bytes(bytes.try_into().ok()?)),
        Kind::F64 => Some(f64::from_le_bytes(bytes.try_into().ok()?) as f32),
        _ => None,
    }
}

fn tensors(
    mut cursor: Cursor<'_>,
    count: usize,
    alignment: usize,
) -> Result<HashMap<String, TensorInfo>, Error> {
    let file_len = cursor.bytes.len();
    let mut names = HashSet::new();
    let mut entries = Vec::new();
    for n in 0..count {
        let name = cursor.text(|| format!("the name of tensor {n}"))?;
        let what = || format!("the entry of tensor `{name}`");
        if !names.insert(name) {
            return Err(Error::DuplicateTensor(name.into()));
        }
        let rank = cursor.u32(what)?;
        let mut shape = Vec::new();
        // ggml's limit. The dimensions of a lying rank are not read.
        for _ in 0..rank.min(5) {
            shape.push(cursor.u64(what)?);
        }
        shape.reverse();
        let kind = cursor.u32(what)?;
        let offset = cursor.u64(what)?;
        let dtype = dtype(kind).map_err(|kind| Error::TensorType { name: name.into(), kind })?;
        let bytes = (1..=4).contains(&rank).then(|| tensor_bytes(dtype, &shape)).flatten();
        let Some((dims, bytes)) = bytes else {
            return Err(Error::TensorShape { name: name.into(), shape, dtype });
        };
        if !offset.is_multiple_of(alignment as u64) {
            return Err(Error::TensorOffset { name: name.into(), offset, alignment });
        }
        entries.push((name, dtype, dims, offset, bytes));
    }
    // Offsets count from the end of the header, rounded up.
    let past_end = |name: &str, at: usize| Error::Truncated {
        what: format!("the data of tensor `{name}`"),
        at,
        len: file_len,
    };
    let data = cursor.at.checked_next_multiple_of(alignment).unwrap_or(usize::MAX);
    let mut tensors = HashMap::new();
    let mut ranges = Vec::new();
    for (name, dtype, shape, offset, bytes) in entries {
        let start = usize::try_from(offset).ok().and_then(|offset| data.checked_add(offset));
        let start = start.ok_or_else(|| past_end(name, data))?;
        let end = start.checked_add(bytes).filter(|&end| end <= file_len);
        let end = end.ok_or_else(|| past_end(name, start))?;
        ranges.push((start..end, name));
        tensors.insert(name.to_owned(), TensorInfo { dtype, shape, bytes: start..end });
    }
    ranges.sort_by_key(|(range, _)| range.start);
    for pair in ranges.windows(2) {
        if pair[1].0.start < pair[0].0.end {
            return Err(Error::Overlap(pair[0].1.into(), pair[1].1.into()));
        }
    }
    Ok(tensors)
}

/// Dimensions and bytes; `None` if a dimension is 0, a row is no whole number of blocks, or the product overflows.
fn tensor_bytes(dtype: DType, shape: &[u64]) -> Option<(Vec<usize>, usize)> {
    let dims: Vec<usize> =
        shape.iter().map(|&d| usize::try_from(d).ok().filter(|&d| d > 0)).collect::<Option<_>>()?;
    let (row, outer) = dims.split_last()?;
    let bytes = outer.iter().try_fold(dtype.row_bytes(*row)?, |bytes, &d| bytes.checked_mul(d))?;
    // Elements must be countable, too: block formats have fewer bytes than elements.
    dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    Some((dims, bytes))
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Scalar(kind, _) => write!(f, "a single {kind:?}"),
            Value::Array { of, len, .. } => write!(f, "an array of {len} {of:?}"),
        }
    }
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gguf {:?} ({} metadata, {} tensors)", self.path, self.metadata.len(), self.tensors.len())
    }
}
