//! A sequence's cache in a file: safetensors, versioned, with a checksum, written whole or not at all.
//!
//! Tensors: `key.{layer}` and `value.{layer}` `[tokens, kv_heads, head_dim]` in the pages' dtype, `token_ids` and
//! `position_ids` U32`[tokens]`. Metadata: `format` = `c2c.kv`, `version`, `description` (JSON: domain, key form,
//! shape, dtype) and `sha256` over the description and the tensors in the order just given.

use super::{BlockTable, CacheShape, Domain, Error, KeyForm, KvColumns, PagedKv};
use crate::{
    backend::{DType, Queue},
    durable::{OutgoingTensor, WriteError, write_safetensors},
};
use half::bf16;
use safetensors::{Dtype, SafeTensors, tensor::Metadata};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

const FORMAT: &str = "c2c.kv";
const VERSION: &str = "1";

/// Why a snapshot can't be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("{}: not a KV-cache snapshot: {what}", path.display())]
    Format { path: PathBuf, what: String },
    #[error("{}: snapshot version {found}; this build reads version {VERSION}: take the snapshot again", path.display())]
    Version { path: PathBuf, found: String },
    #[error("{}: the checksum does not match: the file is damaged, take the snapshot again", path.display())]
    Checksum { path: PathBuf },
    #[error("{}: the snapshot's {field} is {found}, expected {expected}", path.display())]
    Domain { path: PathBuf, field: &'static str, found: String, expected: String },
}

/// The cache of one sequence, on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    pub domain: Domain,
    pub keys: KeyForm,
    pub shape: CacheShape,
    /// Of the pages it was taken from (F32 or BF16), and of the file.
    pub dtype: DType,
    pub token_ids: Vec<u32>,
    pub position_ids: Vec<u32>,
    pub layers: Vec<KvColumns>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    domain: Domain,
    keys: KeyForm,
    shape: CacheShape,
    dtype: FileDtype,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
enum FileDtype {
    F32,
    BF16,
}

impl FileDtype {
    fn new(dtype: DType) -> FileDtype {
        if dtype == DType::Bf16 { FileDtype::BF16 } else { FileDtype::F32 }
    }

    fn dtype(self) -> (DType, Dtype) {
        match self {
            FileDtype::F32 => (DType::F32, Dtype::F32),
            FileDtype::BF16 => (DType::Bf16, Dtype::BF16),
        }
    }

    fn bytes(self, values: &[f32]) -> Vec<u8> {
        match self {
            FileDtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            FileDtype::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        }
    }
}

impl Snapshot {
    /// Copies the sequence of `table` out of `kv`, after everything issued on `queue` so far. `token_ids` and
    /// `position_ids` are those of its tokens.
    pub fn capture(
        kv: &PagedKv,
        queue: &Queue,
        table: &BlockTable,
        domain: Domain,
        token_ids: &[u32],
        position_ids: &[u32],
    ) -> Result<Snapshot, Error> {
        for (what, ids) in [("number of token ids", token_ids), ("number of position ids", position_ids)] {
            expect(what, &ids.len(), &table.len())?;
        }
        expect("key positions", &domain.keys, &kv.keys().positions())?;
        let slots = table.slots(0..table.len())?;
        let layers =
            (0..kv.shape().layers).map(|layer| kv.read(queue, layer, &slots)).collect::<Result<_, _>>()?;
        Ok(Snapshot {
            domain,
            keys: kv.keys().clone(),
            shape: kv.shape(),
            dtype: kv.dtype(),
            token_ids: token_ids.to_vec(),
            position_ids: position_ids.to_vec(),
            layers,
        })
    }

    /// Puts the sequence into blocks of `kv`, which must have the same shape, key form and dtype.
    pub fn restore(&self, kv: &PagedKv, queue: &Queue) -> Result<BlockTable, Error> {
        expect("shape of the snapshot", &self.shape, &kv.shape())?;
        expect("dtype of the snapshot", &self.dtype, &kv.dtype())?;
        expect("key form of the snapshot", &self.keys, kv.keys())?;
        expect("number of layers of the snapshot", &self.layers.len(), &self.shape.layers)?;
        let mut table = BlockTable::new(kv.pool());
        let slots = kv.append(queue, &mut table, self.token_ids.len())?;
        for (layer, columns) in self.layers.iter().enumerate() {
            kv.write(queue, layer, &slots, columns)?;
        }
        Ok(table)
    }

    /// Writes the snapshot to `path`, which holds the old or the new one whatever happens meanwhile.
    pub fn save(&self, path: &Path) -> Result<(), SnapshotError> {
        let dtype = FileDtype::new(self.dtype);
        let description =
            Description { domain: self.domain.clone(), keys: self.keys.clone(), shape: self.shape, dtype };
        let description = serde_json::to_string(&description)
            .map_err(|error| SnapshotError::Format { path: path.into(), what: error.to_string() })?;
        let tensors = self.tensors();
        let mut sum = Checksum::new(&description);
        for tensor in &tensors {
            sum.update(&(tensor.bytes)()?);
        }
        let metadata = [
            ("format", FORMAT),
            ("version", VERSION),
            ("description", &description),
            ("sha256", &sum.finish()),
        ];
        write_safetensors(path, &metadata, &tensors)
    }

    /// In the order of the checksum.
    fn tensors(&self) -> Vec<OutgoingTensor<'_, SnapshotError>> {
        let (tokens, shape) = (self.token_ids.len(), self.shape);
        let dtype = FileDtype::new(self.dtype);
        let mut all = Vec::new();
        for (layer, pair) in self.layers.iter().enumerate() {
            for (name, columns) in [("key", &pair.keys), ("value", &pair.values)] {
                all.push(OutgoingTensor {
                    name: format!("{name}.{layer}"),
                    dtype: dtype.dtype().1,
                    shape: vec![tokens, shape.kv_heads, shape.head_dim],
                    bytes: Box::new(move || Ok(dtype.bytes(columns))),
                });
            }
        }
        for (name, ids) in [("token_ids", &self.token_ids), ("position_ids", &self.position_ids)] {
            let bytes = || Ok(ids.iter().flat_map(|id| id.to_le_bytes()).collect());
            let (name, bytes) = (name.into(), Box::new(bytes));
            all.push(OutgoingTensor { name, dtype: Dtype::U32, shape: vec![tokens], bytes });
        }
        all
    }

    /// Reads a snapshot that must be of `domain`. Version, checksum and every shape are verified before anything is
    /// believed.
    pub fn load(path: &Path, domain: &Domain) -> Result<Snapshot, SnapshotError> {
        Snapshot::read(path, Some(domain))
    }

    /// Reads a snapshot of any domain, to look at; verified like [`Snapshot::load`].
    pub fn inspect(path: &Path) -> Result<Snapshot, SnapshotError> {
        Snapshot::read(path, None)
    }

    fn read(path: &Path, domain: Option<&Domain>) -> Result<Snapshot, SnapshotError> {
        let io = |source| SnapshotError::Io { path: path.into(), source };
        let wrong = |what: &dyn ToString| SnapshotError::Format { path: path.into(), what: what.to_string() };
        let file = fs::read(path).map_err(io)?;
        // Refuses tensors that overlap, leave gaps or don't fit their shapes or the file.
        let (header_len, header) = SafeTensors::read_metadata(&file).map_err(|error| wrong(&error))?;
        let data = &file[8 + header_len..];
        let entry = |key: &str| header.metadata().as_ref().and_then(|metadata| metadata.get(key));
        let required = |key: &str| entry(key).ok_or_else(|| wrong(&format!("no `{key}` in its metadata")));
        if required("format")? != FORMAT {
            return Err(wrong(&format!("its format is `{}`", required("format")?)));
        }
        if required("version")? != VERSION {
            return Err(SnapshotError::Version { path: path.into(), found: required("version")?.clone() });
        }
        let text = required("description")?;
        let description: Description =
            serde_json::from_str(text).map_err(|error| wrong(&format!("its description: {error}")))?;
        if let Some(domain) = domain {
            description.domain.expect(domain, path)?;
        }
        let names = layout(&description, &header).map_err(|what| wrong(&what))?;

        let tensors = names.iter().filter_map(|name| header.info(name));
        let tensors: Vec<&[u8]> =
            tensors.map(|info| &data[info.data_offsets.0..info.data_offsets.1]).collect();
        let mut sum = Checksum::new(text);
        tensors.iter().for_each(|tensor| sum.update(tensor));
        if *required("sha256")? != sum.finish() {
            return Err(SnapshotError::Checksum { path: path.into() });
        }

        let (caches, id_tensors) = tensors.split_at(2 * description.shape.layers);
        let floats = |bytes: &[u8]| match description.dtype {
            FileDtype::F32 => {
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            FileDtype::BF16 => {
                bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
        };
        let ids = |bytes: &[u8]| {
            bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        };
        let layers = caches.chunks_exact(2);
        Ok(Snapshot {
            layers: layers.map(|c| KvColumns { keys: floats(c[0]), values: floats(c[1]) }).collect(),
            token_ids: ids(id_tensors[0]),
            position_ids: ids(id_tensors[1]),
            dtype: description.dtype.dtype().0,
            domain: description.domain,
            keys: description.keys,
            shape: description.shape,
        })
    }
}

/// Names of the tensors in the order of the checksum, once all are there with the shapes described, and no others.
fn layout(description: &Description, header: &Metadata) -> Result<Vec<String>, String> {
    let shape = description.shape;
    let count = header.tensors().len();
    // Before `layers` is believed: a file may announce any number.
    if shape.layers.checked_mul(2).and_then(|n| n.checked_add(2)) != Some(count) {
        return Err(format!("{count} tensors for {} layers", shape.layers));
    }
    description.keys.check(&shape).map_err(|error| error.to_string())?;
    if description.keys.positions() != description.domain.keys {
        return Err("its key form is not the one of its domain".into());
    }
    let tokens = header.info("token_ids").and_then(|info| info.shape.first().copied());
    let tokens = tokens.ok_or("no tensor `token_ids`")?;
    let dtype = description.dtype.dtype().1;
    let caches = (0..shape.layers).flat_map(|layer| [format!("key.{layer}"), format!("value.{layer}")]);
    let caches = caches.map(|name| (name, dtype, vec![tokens, shape.kv_heads, shape.head_dim]));
    let ids = ["token_ids", "position_ids"].map(|name| (name.to_string(), Dtype::U32, vec![tokens]));
    caches
        .chain(ids)
        .map(|(name, dtype, dims)| {
            let info = header.info(&name).ok_or_else(|| format!("no tensor `{name}`"))?;
            if info.dtype == dtype && info.shape == dims {
                return Ok(name);
            }
            Err(format!("`{name}` is {:?}{:?}, expected {dtype:?}{dims:?}", info.dtype, info.shape))
        })
        .collect()
}

impl Domain {
    /// Names the first field in which this domain of the file `path` is not `expected`.
    fn expect(&self, expected: &Domain, path: &Path) -> Result<(), SnapshotError> {
        let fields = [
            ("model", self.model.to_string(), expected.model.to_string()),
            ("tokenizer", self.tokenizer.to_string(), expected.tokenizer.to_string()),
            ("content", format!("{:?}", self.content), format!("{:?}", expected.content)),
            ("keys", format!("{:?}", self.keys), format!("{:?}", expected.keys)),
            ("salt", format!("{:?}", self.salt), format!("{:?}", expected.salt)),
        ];
        match fields.into_iter().find(|(_, found, expected)| found != expected) {
            None => Ok(()),
            Some((field, found, expected)) => {
                Err(SnapshotError::Domain { path: path.into(), field, found, expected })
            }
        }
    }
}

fn expect<T: PartialEq + std::fmt::Debug>(what: &'static str, found: &T, expected: &T) -> Result<(), Error> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Mismatch { what, found: format!("{found:?}"), expected: format!("{expected:?}") })
}

struct Checksum(Sha256);

impl Checksum {
    fn new(description: &str) -> Checksum {
        let mut sum = Checksum(Sha256::new());
        sum.update(description.as_bytes());
        sum
    }

    fn update(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    fn finish(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
