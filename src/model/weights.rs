//! [`Weights`]: the tensors of a decoder, mapped from the file and checked against its [`ModelConfig`].

use super::{Error, ModelConfig, names::Names};
use crate::{
    backend::{Backend, DType, Tensor},
    ops::{Weight, WeightPart},
};
use memmap2::Mmap;
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The tensors of a model. Shapes below are in elements; matrices are `[outputs, inputs]`, of any dtype but U32, norms
/// and biases are float.
#[derive(Clone, Debug)]
pub struct Weights {
    /// `[vocab, hidden]`
    pub embed: Tensor,
    pub layers: Vec<LayerWeights>,
    /// `[hidden]`
    pub final_norm: Tensor,
    /// `[vocab, hidden]`; the memory of `embed` where the model ties them.
    pub lm_head: Weight,
}

/// One layer.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// `[hidden]`
    pub attn_norm: Tensor,
    /// q, k, v: `[heads · head_dim, hidden]` and twice `[kv_heads · head_dim, hidden]`.
    pub qkv: Weight,
    /// `[head_dim]`, both or none.
    pub q_norm: Option<Tensor>,
    pub k_norm: Option<Tensor>,
    /// `[hidden, heads · head_dim]`
    pub attn_out: Weight,
    /// `[hidden]`
    pub post_attn_norm: Option<Tensor>,
    /// `[hidden]`
    pub ffn_norm: Tensor,
    /// gate, up: `[ffn, hidden]` each.
    pub gate_up: Weight,
    /// `[hidden, ffn]`
    pub down: Weight,
    /// `[hidden]`
    pub post_ffn_norm: Option<Tensor>,
}

impl LayerWeights {
    /// `qkv`, `attn_out`, `gate_up`, `down`.
    pub fn linears_mut(&mut self) -> [&mut Weight; 4] {
        [&mut self.qkv, &mut self.attn_out, &mut self.gate_up, &mut self.down]
    }
}

/// A tensor as its file describes it.
#[derive(Clone)]
pub(super) struct FileTensor {
    pub path: Arc<Path>,
    pub file: Arc<Mmap>,
    /// First byte in the file; header and length were checked by the reader of the format.
    pub offset: usize,
    /// `Err`: the name of a type that no weight has.
    pub dtype: Result<DType, String>,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
}

/// All tensors of a model's files.
pub(super) struct FileTensors {
    /// Where a reader of messages should look: the only file, or the index of several.
    pub path: PathBuf,
    pub tensors: HashMap<String, FileTensor>,
}

/// Done and total bytes.
pub type Progress<'a> = &'a dyn Fn(u64, u64);

/// Takes the tensors a model needs out of its files, one by one.
struct Reader<'a> {
    files: FileTensors,
    backend: &'a dyn Backend,
    progress: Progress<'a>,
    done: u64,
    total: u64,
}

/// What a tensor may be stored as.
#[derive(Clone, Copy)]
enum Stored {
    /// Any weight format.
    Matrix,
    /// F32, F16 or BF16.
    Float,
}

impl FileTensor {
    fn bytes(&self) -> usize {
        let elements: usize = self.shape.iter().product();
        self.dtype.as_ref().map_or(0, |dtype| elements / dtype.block_len() * dtype.block_bytes())
    }
}

impl Reader<'_> {
    fn tensor(&mut self, name: String, dims: &[usize], stored: Stored) -> Result<Tensor, Error> {
        let Some(found) = self.files.tensors.remove(&name) else {
            return Err(Error::MissingTensor { path: self.files.path.clone(), name });
        };
        let path = found.path.to_path_buf();
        let dtype = match (&found.dtype, stored) {
            (Ok(dtype), Stored::Matrix) => *dtype,
            (Ok(dtype), Stored::Float) if !dtype.is_quantized() => *dtype,
            (other, _) => {
                let found = other.as_ref().map_or_else(String::clone, DType::to_string);
                return Err(Error::TensorType { path, name, found });
            }
        };
        if found.shape != dims {
            let (found, expected) = (found.shape, dims.to_vec());
            return Err(Error::TensorShape { path, name, found, expected });
        }
        let tensor = self.backend.map(&found.file, found.offset, dtype, dims, &name)?;
        self.read_through(&found.file[found.offset..found.offset + found.bytes()]);
        Ok(tensor)
    }

    /// Touches every page, so that the disk is waited for here, under a progress bar, and not in the first answer.
    fn read_through(&mut self, bytes: &[u8]) {
        const REPORT: usize = 16 << 20;
        const PAGE: usize = 4096;
        for part in bytes.chunks(REPORT) {
            std::hint::black_box(part.iter().step_by(PAGE).fold(0u8, |all, byte| all ^ byte));
            self.done += part.len() as u64;
            (self.progress)(self.done, self.total);
        }
    }

    fn part(&mut self, name: &str, rows: usize, cols: usize, bias: bool) -> Result<WeightPart, Error> {
        let matrix = self.tensor(format!("{name}.weight"), &[rows, cols], Stored::Matrix)?;
        let bias = bias.then(|| self.tensor(format!("{name}.bias"), &[rows], Stored::Float)).transpose()?;
        Ok(WeightPart { matrix, bias })
    }

    fn norm(&mut self, name: &str, len: usize) -> Result<Tensor, Error> {
        self.tensor(format!("{name}.weight"), &[len], Stored::Float)
    }

    fn layer(
        &mut self,
        config: &ModelConfig,
        names: &Names,
        prefix: &str,
        n: usize,
    ) -> Result<LayerWeights, Error> {
        let name = |name: &str| format!("{prefix}{}", name.replace("{}", &n.to_string()));
        let (hidden, ffn, biases) = (config.hidden, config.ffn, config.biases);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let head_norm = |this: &mut Self, norm| {
            config.qk_norm.then(|| this.norm(&name(norm), config.head_dim)).transpose()
        };
        let post_norm =
            |this: &mut Self, norm| config.post_norms.then(|| this.norm(&name(norm), hidden)).transpose();
        Ok(LayerWeights {
            attn_norm: self.norm(&name(names.attn_norm), hidden)?,
            qkv: Weight {
                parts: vec![
                    self.part(&name(names.q), q, hidden, biases.qkv)?,
                    self.part(&name(names.k), kv, hidden, biases.qkv)?,
                    self.part(&name(names.v), kv, hidden, biases.qkv)?,
                ],
            },
            q_norm: head_norm(self, names.q_norm)?,
            k_norm: head_norm(self, names.k_norm)?,
            attn_out: Weight { parts: vec![self.part(&name(names.attn_out), hidden, q, biases.attn_out)?] },
            post_attn_norm: post_norm(self, names.post_attn_norm)?,
            ffn_norm: self.norm(&name(names.ffn_norm), hidden)?,
            gate_up: Weight {
                parts: vec![
                    self.part(&name(names.gate), ffn, hidden, biases.ffn)?,
                    self.part(&name(names.up), ffn, hidden, biases.ffn)?,
                ],
            },
            down: Weight { parts: vec![self.part(&name(names.down), hidden, ffn, biases.ffn)?] },
            post_ffn_norm: post_norm(self, names.post_ffn_norm)?,
        })
    }
}

impl Weights {
    /// Maps every tensor that `config` calls for; names are `prefix` (of the head: `head_prefix`) + [`Names`].
    pub(super) fn read(
        config: &ModelConfig,
        files: FileTensors,
        names: &Names,
        (prefix, head_prefix): (&str, &str),
        backend: &dyn Backend,
        progress: Progress<'_>,
    ) -> Result<Weights, Error> {
        let total = files.tensors.values().map(|t| t.bytes() as u64).sum();
        let mut reader = Reader { files, backend, progress, done: 0, total };
        let (vocab, hidden) = (config.vocab, config.hidden);
        let embed =
            reader.tensor(format!("{prefix}{}.weight", names.embed), &[vocab, hidden], Stored::Matrix)?;
        let layers =
            (0..config.layers).map(|n| reader.layer(config, names, prefix, n)).collect::<Result<_, _>>()?;
        let final_norm = reader.norm(&format!("{prefix}{}", names.final_norm), hidden)?;
        let lm_head = if config.tied {
            Weight::new(embed.clone())
        } else {
            Weight {
                parts: vec![reader.part(&format!("{head_prefix}{}", names.lm_head), vocab, hidden, false)?],
            }
        };
        for name in reader.files.tensors.keys() {
            log::debug!("{}: tensor `{name}` is not part of the decoder", reader.files.path.display());
        }
        progress(total, total);
        Ok(Weights { embed, layers, final_norm, lm_head })
    }
}
