//! State dicts that PyTorch pickled, read without running what is in them.
//!
//! A `.pt` file is a zip of stored (uncompressed) entries: `*/data.pkl` describes the tensors, `*/data/N` are their
//! bytes. A pickle is a program; this reader knows only the instructions that describe an ordered dict of tensors, and
//! of the functions such a program may call only those three that build one. Everything else is an error naming it.
//! Nothing is ever looked up outside the file, and memory is bounded by [`MAX_PICKLE`] and the size of the file.

use super::state::Entry;
use crate::backend::DType;
use memmap2::Mmap;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io::Cursor,
    sync::Arc,
};
use zip::{CompressionMethod, ZipArchive, result::ZipError};

/// Largest `data.pkl` accepted. That of a fuser's projector has about 5 KB.
const MAX_PICKLE: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum PickleError {
    #[error("not a PyTorch archive: {0}")]
    Zip(#[from] ZipError),
    #[error("PyTorch archive: {0}")]
    Archive(String),
    #[error("pickle, byte {at}: {problem}")]
    Pickle { at: usize, problem: String },
    #[error("pickle wants `{0}`; only tensors of a state dict are read")]
    Forbidden(String),
    #[error("tensor `{tensor}`: {problem}")]
    Tensor { tensor: String, problem: String },
}

/// The tensors of a pickled state dict, where they lie in the mapped file.
pub(super) fn read_state_dict(file: &Arc<Mmap>) -> Result<BTreeMap<String, Entry>, PickleError> {
    let archive = Archive::open(file)?;
    let pickle = archive.pickle()?;
    let mut storages = HashSet::new();
    let mut entries = BTreeMap::new();
    for (name, view) in unpickle(pickle)? {
        let fail = |problem: String| PickleError::Tensor { tensor: name.clone(), problem };
        let offset = archive.locate(&view).map_err(fail)?;
        // Else a small file could make many large tensors.
        if !storages.insert(view.storage.key) {
            return Err(fail("it shares its storage with another tensor".into()));
        }
        let entry = Entry { file: file.clone(), dtype: view.storage.dtype, shape: view.shape, offset };
        entries.insert(name, entry);
    }
    Ok(entries)
}

struct Archive<'a> {
    file: &'a [u8],
    /// Offset and length in the file of each entry, by its name after the archive's folder.
    entries: HashMap<String, (usize, usize)>,
}

impl<'a> Archive<'a> {
    fn open(file: &'a Arc<Mmap>) -> Result<Archive<'a>, PickleError> {
        let archive = |problem: String| PickleError::Archive(problem);
        let mut zip = ZipArchive::new(Cursor::new(&file[..]))?;
        if zip.has_duplicate_names() || zip.has_overlapping_files()? {
            return Err(archive("entries overlap or have the same name".into()));
        }
        let mut root: Option<String> = None;
        let mut entries = HashMap::new();
        for index in 0..zip.len() {
            let entry = zip.by_index_raw(index)?;
            let name = entry.name()?.into_owned();
            if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
                return Err(archive(format!("entry `{name}` is compressed or encrypted")));
            }
            let Some((folder, rest)) = name.split_once('/') else {
                return Err(archive(format!("entry `{name}` is outside the archive's folder")));
            };
            if root.get_or_insert_with(|| folder.into()) != folder {
                return Err(archive(format!("entry `{name}` is in a second folder")));
            }
            let start = entry.data_start().and_then(|start| usize::try_from(start).ok());
            let len = usize::try_from(entry.size()).ok().filter(|_| entry.size() == entry.compressed_size());
            let range = start
                .zip(len)
                .filter(|(start, len)| start.checked_add(*len).is_some_and(|end| end <= file.len()));
            let range = range.ok_or_else(|| archive(format!("entry `{name}` reaches past the file")))?;
            entries.insert(rest.to_string(), range);
        }
        let archive = Archive { file, entries };
        match archive.entries.get("byteorder").map(|&(start, len)| &file[start..start + len]) {
            None | Some(b"little") => Ok(archive),
            Some(_) => Err(PickleError::Archive("byte order is not little-endian".into())),
        }
    }

    fn pickle(&self) -> Result<&'a [u8], PickleError> {
        let missing = || PickleError::Archive("no data.pkl inside".into());
        let &(start, len) = self.entries.get("data.pkl").ok_or_else(missing)?;
        if len as u64 > MAX_PICKLE {
            return Err(PickleError::Archive(format!(
                "data.pkl has {len} bytes, at most {MAX_PICKLE} are read"
            )));
        }
        Ok(&self.file[start..start + len])
    }

    /// Offset of a tensor in the file.
    fn locate(&self, view: &View) -> Result<usize, String> {
        let Storage { key, dtype, elements } = &view.storage;
        let &(start, len) = self
            .entries
            .get(&format!("data/{key}"))
            .ok_or_else(|| format!("its storage `data/{key}` is not in the archive"))?;
        if elements.checked_mul(dtype.block_bytes()) != Some(len) {
            return Err(format!("its storage has {len} bytes, not those of {elements} elements of {dtype}"));
        }
        let count = view.shape.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim));
        let end = count.and_then(|count| count.checked_add(view.offset));
        let (Some(count), Some(_)) = (count, end.filter(|end| end <= elements)) else {
            return Err(format!("shape {:?} reaches past its storage of {elements}", view.shape));
        };
        let mut expected = 1;
        if count == 0 {
            return Err("it is empty".into());
        }
        for (&dim, &stride) in view.shape.iter().zip(&view.strides).rev() {
            if dim != 1 && stride != expected {
                return Err(format!("it is not contiguous: strides {:?} of {:?}", view.strides, view.shape));
            }
            expected *= dim;
        }
        Ok(start + view.offset * dtype.block_bytes())
    }
}

#[derive(Clone, Debug, PartialEq)]
struct Storage {
    key: String,
    dtype: DType,
    elements: usize,
}

#[derive(Clone, Debug, PartialEq)]
struct View {
    storage: Storage,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

/// Index of a [`Value`]. Values live in one list and refer to each other by index, so that no nesting, however deep,
/// costs stack, and sharing costs nothing.
type Id = usize;

enum Value {
    Mark,
    None,
    Bool,
    Int(i64),
    Text(String),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    // Boxed: a value is 32 bytes, and a pickle may make one per byte.
    Storage(Box<Storage>),
    Tensor(Box<View>),
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Value::Mark => "a mark",
            Value::None => "None",
            Value::Bool => "a bool",
            Value::Int(_) => "an int",
            Value::Text(_) => "a text",
            Value::Tuple(_) => "a tuple",
            Value::Dict(_) => "a dict",
            Value::Global(_) => "a function",
            Value::Storage(_) => "a storage",
            Value::Tensor(_) => "a tensor",
        }
    }
}

/// All that a pickle may name.
#[derive(Clone, Copy)]
enum Global {
    OrderedDict,
    RebuildTensor,
    StorageType(DType),
}

impl Global {
    fn named(name: &str) -> Result<Global, PickleError> {
        Ok(match name {
            "collections.OrderedDict" => Global::OrderedDict,
            "torch._utils._rebuild_tensor_v2" => Global::RebuildTensor,
            "torch.FloatStorage" => Global::StorageType(DType::F32),
            "torch.BFloat16Storage" => Global::StorageType(DType::Bf16),
            "torch.HalfStorage" => Global::StorageType(DType::F16),
            _ => return Err(PickleError::Forbidden(name.into())),
        })
    }
}

/// Name and place of every tensor that the pickle describes.
fn unpickle(pickle: &[u8]) -> Result<Vec<(String, View)>, PickleError> {
    let mut machine = Machine { pickle, at: 0, values: Vec::new(), stack: Vec::new(), memo: HashMap::new() };
    machine.run()?;
    machine.state_dict()
}

struct Machine<'a> {
    pickle: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    fn fail<T>(&self, problem: impl Into<String>) -> Result<T, PickleError> {
        Err(PickleError::Pickle { at: self.at, problem: problem.into() })
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], PickleError> {
        match self.pickle.get(self.at..).and_then(|rest| rest.get(..len)) {
            Some(bytes) => {
                self.at += len;
                Ok(bytes)
            }
            None => self.fail("it ends in the middle of an instruction"),
        }
    }

    fn number<const N: usize>(&mut self) -> Result<u64, PickleError> {
        let mut bytes = [0; 8];
        bytes[..N].copy_from_slice(self.take(N)?);
        Ok(u64::from_le_bytes(bytes))
    }

    fn line(&mut self) -> Result<&'a str, PickleError> {
        let rest = &self.pickle[self.at..];
        let Some(len) = rest.iter().take(256).position(|&byte| byte == b'\n') else {
            return self.fail("a name without end");
        };
        let line = self.take(len + 1)?;
        std::str::from_utf8(&line[..len]).or_else(|_| self.fail("a name that is not UTF-8"))
    }

    fn push(&mut self, value: Value) {
        self.values.push(value);
        self.stack.push(self.values.len() - 1);
    }

    fn pop(&mut self) -> Result<Id, PickleError> {
        match self.stack.pop() {
            Some(id) => Ok(id),
            None => self.fail("the stack is empty"),
        }
    }

    fn top(&self) -> Result<Id, PickleError> {
        self.stack.last().copied().map_or_else(|| self.fail("the stack is empty"), Ok)
    }

    /// Everything above the last mark.
    fn pop_mark(&mut self) -> Result<Vec<Id>, PickleError> {
        match self.stack.iter().rposition(|&id| matches!(self.values[id], Value::Mark)) {
            Some(mark) => {
                let items = self.stack.split_off(mark + 1);
                self.stack.pop();
                Ok(items)
            }
            None => self.fail("no mark on the stack"),
        }
    }

    fn put(&mut self, key: u64) -> Result<(), PickleError> {
        let id = self.top()?;
        self.memo.insert(key as u32, id);
        Ok(())
    }

    fn get(&mut self, key: u64) -> Result<(), PickleError> {
        match self.memo.get(&(key as u32)) {
            Some(&id) => {
                self.stack.push(id);
                Ok(())
            }
            None => self.fail(format!("memo {key} was never set")),
        }
    }

    fn pop_tuple(&mut self, len: usize) -> Result<(), PickleError> {
        match self.stack.len().checked_sub(len) {
            Some(from) => {
                let items = self.stack.split_off(from);
                self.push(Value::Tuple(items));
                Ok(())
            }
            None => self.fail("the stack is empty"),
        }
    }

    fn run(&mut self) -> Result<(), PickleError> {
        loop {
            let instruction = self.take(1)?[0];
            match instruction {
                // PROTO
                0x80 => match self.number::<1>()? {
                    2 => {}
                    other => return self.fail(format!("protocol {other}; PyTorch writes 2")),
                },
                // STOP
                b'.' => return Ok(()),
                // MARK, NONE, NEWTRUE, NEWFALSE
                b'(' => self.push(Value::Mark),
                b'N' => self.push(Value::None),
                0x88 | 0x89 => self.push(Value::Bool),
                // BININT, BININT1, BININT2, LONG1
                b'J' => {
                    let number = self.number::<4>()? as u32;
                    self.push(Value::Int(i64::from(number as i32)));
                }
                b'K' => {
                    let number = self.number::<1>()?;
                    self.push(Value::Int(number as i64));
                }
                b'M' => {
                    let number = self.number::<2>()?;
                    self.push(Value::Int(number as i64));
                }
                0x8a => self.long()?,
                // BINUNICODE
                b'X' => {
                    let len = self.number::<4>()? as usize;
                    match std::str::from_utf8(self.take(len)?) {
                        Ok(text) => self.push(Value::Text(text.into())),
                        Err(_) => return self.fail("a text that is not UTF-8"),
                    }
                }
                // EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3, TUPLE
                b')' => self.push(Value::Tuple(Vec::new())),
                0x85..=0x87 => self.pop_tuple(usize::from(instruction - 0x84))?,
                b't' => {
                    let items = self.pop_mark()?;
                    self.push(Value::Tuple(items));
                }
                // EMPTY_DICT, SETITEM, SETITEMS
                b'}' => self.push(Value::Dict(Vec::new())),
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set_items(&[key, value])?;
                }
                b'u' => {
                    let items = self.pop_mark()?;
                    self.set_items(&items)?;
                }
                // BINPUT, LONG_BINPUT, BINGET, LONG_BINGET
                b'q' => {
                    let key = self.number::<1>()?;
                    self.put(key)?;
                }
                b'r' => {
                    let key = self.number::<4>()?;
                    self.put(key)?;
                }
                b'h' => {
                    let key = self.number::<1>()?;
                    self.get(key)?;
                }
                b'j' => {
                    let key = self.number::<4>()?;
                    self.get(key)?;
                }
                // GLOBAL, REDUCE, BINPERSID, BUILD
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push(Value::Global(Global::named(&format!("{module}.{name}"))?));
                }
                b'R' => self.reduce()?,
                b'Q' => self.persistent()?,
                b'b' => self.build()?,
                other => {
                    return self.fail(format!("instruction {other:#04x} is not one of a state dict's"));
                }
            }
        }
    }

    /// An int of up to eight bytes, two's complement.
    fn long(&mut self) -> Result<(), PickleError> {
        let len = self.number::<1>()? as usize;
        let bytes = self.take(len)?;
        if len > 8 {
            return self.fail("a number of more than 64 bits");
        }
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut all = [if negative { 0xff } else { 0 }; 8];
        all[..len].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(all)));
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Result<(), PickleError> {
        if !items.len().is_multiple_of(2) {
            return self.fail("a key without value");
        }
        let dict = self.top()?;
        match &mut self.values[dict] {
            Value::Dict(pairs) => {
                pairs.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
                Ok(())
            }
            other => {
                let kind = other.kind();
                self.fail(format!("items are set on {kind}"))
            }
        }
    }

    /// A call: `OrderedDict()` or `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`.
    fn reduce(&mut self) -> Result<(), PickleError> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Value::Tuple(arguments) = &self.values[arguments] else {
            return self.fail("a call without arguments");
        };
        let value = match &self.values[function] {
            Value::Global(Global::OrderedDict) if arguments.is_empty() => Value::Dict(Vec::new()),
            Value::Global(Global::RebuildTensor) => match &arguments[..] {
                [storage, offset, shape, strides, _requires_grad, _hooks] => {
                    self.tensor(*storage, *offset, *shape, *strides)?
                }
                other => return self.fail(format!("a tensor of {} arguments, not 6", other.len())),
            },
            Value::Global(_) => return self.fail("a call with other arguments than PyTorch's"),
            other => return self.fail(format!("{} is called", other.kind())),
        };
        self.push(value);
        Ok(())
    }

    fn tensor(&self, storage: Id, offset: Id, shape: Id, strides: Id) -> Result<Value, PickleError> {
        let (Value::Storage(storage), Value::Int(offset), Value::Tuple(shape), Value::Tuple(strides)) =
            (&self.values[storage], &self.values[offset], &self.values[shape], &self.values[strides])
        else {
            return self.fail("a tensor of something else than storage, offset, shape and strides");
        };
        let size = |id: &Id| match self.values[*id] {
            Value::Int(size) => usize::try_from(size).ok(),
            _ => None,
        };
        let shape: Option<Vec<usize>> = shape.iter().map(size).collect();
        let strides: Option<Vec<usize>> = strides.iter().map(size).collect();
        match (usize::try_from(*offset), shape, strides) {
            (Ok(offset), Some(shape), Some(strides)) if shape.len() == strides.len() && shape.len() <= 4 => {
                let storage = Storage::clone(storage);
                Ok(Value::Tensor(Box::new(View { storage, offset, shape, strides })))
            }
            _ => self.fail("a tensor with a negative size, or more than 4 dimensions"),
        }
    }

    /// `('storage', type, key, device, elements)`
    fn persistent(&mut self) -> Result<(), PickleError> {
        let id = self.pop()?;
        let Value::Tuple(items) = &self.values[id] else {
            return self.fail("a persistent id that is no tuple");
        };
        let items: Vec<&Value> = items.iter().map(|&id| &self.values[id]).collect();
        let [
            Value::Text(word),
            Value::Global(Global::StorageType(dtype)),
            Value::Text(key),
            Value::Text(_device),
            Value::Int(elements),
        ] = items[..]
        else {
            return self.fail("a persistent id that is no storage");
        };
        let digits = !key.is_empty() && key.len() <= 10 && key.bytes().all(|byte| byte.is_ascii_digit());
        let elements = usize::try_from(*elements).ok();
        match elements.filter(|_| word == "storage" && digits) {
            Some(elements) => {
                let storage = Storage { key: key.clone(), dtype: *dtype, elements };
                self.push(Value::Storage(Box::new(storage)));
                Ok(())
            }
            None => {
                let problem = format!("storage `{}` is not one of PyTorch's", key.escape_debug());
                self.fail(problem.chars().take(100).collect::<String>())
            }
        }
    }

    /// Attributes of an ordered dict: PyTorch sets `_metadata`, versions of modules, which say nothing here.
    fn build(&mut self) -> Result<(), PickleError> {
        let (state, object) = (self.pop()?, self.top()?);
        let (Value::Dict(state), Value::Dict(_)) = (&self.values[state], &self.values[object]) else {
            return self.fail("attributes are set on something else than a dict");
        };
        for (key, _) in state {
            match &self.values[*key] {
                Value::Text(key) if key == "_metadata" => {}
                Value::Text(key) => {
                    return Err(PickleError::Forbidden(format!(
                        "attribute {}",
                        key.chars().take(64).collect::<String>()
                    )));
                }
                other => return self.fail(format!("{} as the name of an attribute", other.kind())),
            }
        }
        Ok(())
    }

    fn state_dict(self) -> Result<Vec<(String, View)>, PickleError> {
        let pairs = match &self.stack[..] {
            [id] => match &self.values[*id] {
                Value::Dict(pairs) => pairs,
                other => return self.fail(format!("it is {}, not a state dict", other.kind())),
            },
            other => return self.fail(format!("it leaves {} values, not one", other.len())),
        };
        let mut tensors: BTreeMap<&str, &View> = BTreeMap::new();
        for (key, value) in pairs {
            let (Value::Text(key), value) = (&self.values[*key], &self.values[*value]) else {
                return self.fail("a state dict's keys are texts");
            };
            let Value::Tensor(view) = value else {
                return self.fail(format!("`{key}` is {}, not a tensor", value.kind()));
            };
            if tensors.insert(key, view).is_some() {
                return self.fail(format!("`{key}` occurs twice"));
            }
        }
        Ok(tensors.into_iter().map(|(name, view)| (name.to_string(), View::clone(view))).collect())
    }
}

#[cfg(test)]
mod tests;
