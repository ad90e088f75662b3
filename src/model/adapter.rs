//! Low-rank adapters of a decoder's linear maps (LoRA, arXiv 2106.09685), in the files that PEFT writes.
//!
//! A folder with `adapter_config.json` and no `config.json` is a model too: [`super::load`] loads its base and adds the
//! product of the factors to the matrices it is for. So whatever runs a model runs an adapted one, as fast as its base. Matrices in
//! f32 and bf16 keep their type, as PEFT's own merge does; others become f32, which holds what a block format says exactly: nothing
//! is quantised again.

use super::{Error, ModelConfig, Weights, names};
use crate::{
    backend::{Backend, DType, Precision, Queue, Tensor, cpu},
    builtin,
    durable::{self, OutgoingTensor, WriteError, write_safetensors},
    ops::{self, Weight},
};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

const CONFIG: &str = "adapter_config.json";
const FACTORS: &str = "adapter_model.safetensors";
/// Before the names of the model's own tensors.
const PREFIX: &str = "base_model.model.";

/// A linear map of a layer that can be adapted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoraTarget {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl LoraTarget {
    pub const ALL: [LoraTarget; 7] = [
        LoraTarget::Q,
        LoraTarget::K,
        LoraTarget::V,
        LoraTarget::O,
        LoraTarget::Gate,
        LoraTarget::Up,
        LoraTarget::Down,
    ];

    /// transformers' name of it.
    pub fn module(self) -> &'static str {
        match self {
            LoraTarget::Q => "q_proj",
            LoraTarget::K => "k_proj",
            LoraTarget::V => "v_proj",
            LoraTarget::O => "o_proj",
            LoraTarget::Gate => "gate_proj",
            LoraTarget::Up => "up_proj",
            LoraTarget::Down => "down_proj",
        }
    }

    /// By transformers' name.
    pub fn of_module(module: &str) -> Option<LoraTarget> {
        LoraTarget::ALL.into_iter().find(|target| target.module() == module)
    }

    /// `[outputs, inputs]`
    pub fn shape(self, config: &ModelConfig) -> [usize; 2] {
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        match self {
            LoraTarget::Q => [q, config.hidden],
            LoraTarget::K | LoraTarget::V => [kv, config.hidden],
            LoraTarget::O => [config.hidden, q],
            LoraTarget::Gate | LoraTarget::Up => [config.ffn, config.hidden],
            LoraTarget::Down => [config.hidden, config.ffn],
        }
    }

    /// Which of [`super::LayerWeights::linears`], and which of its parts.
    pub fn place(self) -> (usize, usize) {
        match self {
            LoraTarget::Q => (0, 0),
            LoraTarget::K => (0, 1),
            LoraTarget::V => (0, 2),
            LoraTarget::O => (1, 0),
            LoraTarget::Gate => (2, 0),
            LoraTarget::Up => (2, 1),
            LoraTarget::Down => (3, 0),
        }
    }

    /// PEFT's name of a factor.
    pub fn factor_name(self, layer: usize, factor: char) -> String {
        let names = names::hugging_face(false);
        let module = match self {
            LoraTarget::Q => names.q,
            LoraTarget::K => names.k,
            LoraTarget::V => names.v,
            LoraTarget::O => names.attn_out,
            LoraTarget::Gate => names.gate,
            LoraTarget::Up => names.up,
            LoraTarget::Down => names.down,
        };
        format!("{PREFIX}model.{}.lora_{factor}.weight", module.replace("{}", &layer.to_string()))
    }

    /// Rows of `b` (`[outputs, width]`, flat) from transformers' order to that of a file whose q and k rows come in pairs that rotate
    /// together.
    fn to_pairs(self, config: &ModelConfig, b: &[f32]) -> Vec<f32> {
        self.reorder(config, b, |half, i| [(2 * i, i), (2 * i + 1, i + half)])
    }

    /// And back.
    pub fn from_pairs(self, config: &ModelConfig, b: &[f32]) -> Vec<f32> {
        self.reorder(config, b, |half, i| [(i, 2 * i), (i + half, 2 * i + 1)])
    }

    /// `rows(half, i)`: where in a head the two members of pair i go, and where they are.
    fn reorder(
        self,
        config: &ModelConfig,
        b: &[f32],
        rows: impl Fn(usize, usize) -> [(usize, usize); 2],
    ) -> Vec<f32> {
        let mut out = b.to_vec();
        if !config.interleaved_rope || !matches!(self, LoraTarget::Q | LoraTarget::K) {
            return out;
        }
        let width = b.len() / self.shape(config)[0];
        for (from, to) in b.chunks(config.head_dim * width).zip(out.chunks_mut(config.head_dim * width)) {
            let half = config.head_dim / 2;
            for (to_row, from_row) in (0..half).flat_map(|i| rows(half, i)) {
                to[to_row * width..][..width].copy_from_slice(&from[from_row * width..][..width]);
            }
        }
        out
    }
}

/// The adapters of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// The model it is for, as its file names it: a path, or `builtin:NAME`.
    pub base: String,
    pub rank: usize,
    /// The product is scaled by `alpha / rank`.
    pub alpha: f64,
    /// That it was trained with.
    pub dropout: f64,
    pub factors: Vec<Factors>,
}

/// The two factors of one matrix's change.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    pub layer: usize,
    pub target: LoraTarget,
    /// `[rank, inputs]`
    pub a: Vec<f32>,
    /// `[outputs, rank]`, rows in transformers' order.
    pub b: Vec<f32>,
}

/// As PEFT writes it. What it writes beyond this does not change what is computed.
#[derive(Deserialize)]
struct Config {
    peft_type: String,
    base_model_name_or_path: Option<String>,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    bias: Option<String>,
    #[serde(default)]
    rank_pattern: BTreeMap<String, Value>,
    #[serde(default)]
    alpha_pattern: BTreeMap<String, Value>,
}

impl Adapter {
    /// Whether a folder is an adapter.
    pub fn is_at(folder: &Path) -> bool {
        folder.join(CONFIG).is_file() && !folder.join("config.json").is_file()
    }

    pub fn read(folder: &Path) -> Result<Adapter, Error> {
        let path = folder.join(CONFIG);
        let bad = |problem: String| Error::Config { path: path.clone(), problem };
        let config: Config =
            serde_json::from_str(&super::read_text(&path)?).map_err(|error| bad(error.to_string()))?;
        let refused = [
            (config.peft_type != "LORA", "`peft_type` is not LORA"),
            (config.use_dora, "`use_dora` is set, which is not built"),
            (config.fan_in_fan_out, "`fan_in_fan_out` is set, which no known model needs"),
            (!config.rank_pattern.is_empty(), "`rank_pattern` is given, which is not built"),
            (!config.alpha_pattern.is_empty(), "`alpha_pattern` is given, which is not built"),
            (
                config.bias.as_deref().is_some_and(|bias| bias != "none"),
                "`bias` is not `none`, which is not built",
            ),
            (config.r == 0, "`r` is 0"),
        ];
        if let Some((_, problem)) = refused.into_iter().find(|(refused, _)| *refused) {
            return Err(bad(problem.into()));
        }
        let base = config
            .base_model_name_or_path
            .ok_or_else(|| bad("`base_model_name_or_path` is missing".into()))?;
        let rank = config.r;
        // With the one the scale is alpha / √rank.
        let alpha = config.lora_alpha * if config.use_rslora { (rank as f64).sqrt() } else { 1.0 };
        let factors = read_factors(&folder.join(FACTORS), rank)?;
        Ok(Adapter { base, rank, alpha, dropout: config.lora_dropout, factors })
    }

    /// Where the base is: its path as it is, or from `folder`, the adapter's own.
    pub fn base_path(&self, folder: &Path) -> Result<PathBuf, Error> {
        let named = builtin::resolve(Path::new(&self.base));
        let found = [named.clone(), folder.join(&named)].into_iter().find(|path| path.exists());
        let bad = |problem: String| Error::Config { path: folder.join(CONFIG), problem };
        let found = found.ok_or_else(|| {
            bad(format!(
                "`base_model_name_or_path` is `{}`, which is neither a folder nor a file here: put the base model there, or \
                 write its path into this file",
                self.base
            ))
        })?;
        if Adapter::is_at(&found) {
            return Err(bad(format!(
                "its base, {}, is an adapter itself: merge that one first",
                found.display()
            )));
        }
        Ok(found)
    }

    /// Writes PEFT's two files into an existing folder.
    pub fn write(&self, folder: &Path, config: &ModelConfig) -> Result<(), WriteError> {
        let bytes = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let mut tensors: Vec<OutgoingTensor<WriteError>> = Vec::new();
        for factors in &self.factors {
            let [outputs, inputs] = factors.target.shape(config);
            for (letter, values, shape) in
                [('A', &factors.a, vec![self.rank, inputs]), ('B', &factors.b, vec![outputs, self.rank])]
            {
                tensors.push(OutgoingTensor {
                    name: factors.target.factor_name(factors.layer, letter),
                    dtype: Dtype::F32,
                    shape,
                    bytes: Box::new(move || Ok(bytes(values))),
                });
            }
        }
        write_safetensors(&folder.join(FACTORS), &[("format", "pt")], &tensors)?;
        let targets = LoraTarget::ALL.into_iter();
        let targets = targets.filter(|target| self.factors.iter().any(|factors| factors.target == *target));
        let described = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": targets.map(LoraTarget::module).collect::<Vec<_>>(),
            "bias": "none",
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "inference_mode": true,
            "modules_to_save": null,
            "use_dora": false,
            "use_rslora": false,
        });
        let path = folder.join(CONFIG);
        durable::write(&path, |out| writeln!(out, "{described:#}").map_err(WriteError::at(&path)))
    }

    /// The weights with the adapters added; those without one are shared.
    pub fn merge(
        &self,
        config: &ModelConfig,
        weights: &Weights,
        backend: &Arc<dyn Backend>,
    ) -> Result<Weights, Error> {
        let queue = Queue::new(backend)?;
        let scale = (self.alpha / self.rank as f64) as f32;
        let (mut merged, mut widened) = (weights.clone(), 0);
        for Factors { layer, target, a, b } in &self.factors {
            let [outputs, inputs] = target.shape(config);
            let wrong = |letter, found: [usize; 2], expected: [usize; 2]| Error::TensorShape {
                path: FACTORS.into(),
                name: target.factor_name(*layer, letter),
                found: found.to_vec(),
                expected: expected.to_vec(),
            };
            let rank = self.rank;
            if a.len() != rank * inputs {
                return Err(wrong('A', [rank, a.len() / rank], [rank, inputs]));
            }
            if b.len() != outputs * rank {
                return Err(wrong('B', [b.len() / rank, rank], [outputs, rank]));
            }
            let (stack, part) = target.place();
            let Some(layer) = merged.layers.get_mut(*layer) else {
                let problem = format!("adapts layer {layer} of a model that has {}", config.layers);
                return Err(Error::Config { path: FACTORS.into(), problem });
            };
            let matrix = &mut layer.linears_mut()[stack].parts[part].matrix;
            let scaled: Vec<f32> = target.to_pairs(config, b).iter().map(|x| scale * x).collect();
            let a = Weight::new(queue.tensor(a, &[rank, inputs], "low-rank factor")?);
            let b = queue.tensor(&scaled, &[outputs, rank], "low-rank factor")?;
            let sum = widened_copy(&queue, matrix)?;
            // dx = dy · W, with B for dy and A for W.
            ops::linear_backward_input(&queue, &b, &a, Precision::F32, true, &sum)?;
            *matrix = match matrix.dtype() {
                DType::Bf16 => {
                    let values: Vec<bf16> =
                        queue.download_f32(&sum)?.into_iter().map(bf16::from_f32).collect();
                    queue.tensor(&values, &[outputs, inputs], "merged weights")?
                }
                dtype => {
                    widened += usize::from(dtype != DType::F32) * sum.bytes();
                    sum
                }
            };
        }
        queue.synchronize()?;
        if widened > 0 {
            log::info!("adapted matrices are kept in f32: {:.0} MB", widened as f64 / 1e6);
        }
        Ok(merged)
    }
}

/// F32, of a matrix of any dtype.
fn widened_copy(queue: &Queue, matrix: &Tensor) -> Result<Tensor, Error> {
    let rows: Vec<u32> = (0..matrix.rows() as u32).collect();
    let rows = queue.tensor(&rows, &[rows.len()], "row numbers")?;
    let out = queue.backend().alloc(DType::F32, matrix.shape(), "merged weights")?;
    ops::embed(queue, &rows, matrix, 1.0, &out)?;
    Ok(out)
}

/// Every pair of factors in a file, by layer and target.
fn read_factors(path: &Path, rank: usize) -> Result<Vec<Factors>, Error> {
    let bytes = cpu::map_file(path).map_err(|source| Error::Io { path: path.into(), source })?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|source| Error::Safetensors { path: path.into(), source })?;
    let mut found: BTreeMap<(usize, LoraTarget), [Option<Vec<f32>>; 2]> = BTreeMap::new();
    for (name, tensor) in file.iter() {
        let Some((layer, target, second)) = parse(name) else {
            let problem = format!(
                "tensor `{name}` is no low-rank factor of a layer's q, k, v, o, gate, up or down_proj: what it changes is \
                 not built"
            );
            return Err(Error::Config { path: path.into(), problem });
        };
        let shape = tensor.shape();
        let own_rank = if second { shape.last() } else { shape.first() };
        if shape.len() != 2 || own_rank != Some(&rank) {
            let expected =
                if second { vec![shape[0], rank] } else { vec![rank, *shape.last().unwrap_or(&0)] };
            let (path, name, found) = (path.into(), name.into(), shape.to_vec());
            return Err(Error::TensorShape { path, name, found, expected });
        }
        let data = tensor.data();
        let halves = || data.as_chunks::<2>().0.iter().map(|&bytes| u16::from_le_bytes(bytes));
        let values = match tensor.dtype() {
            Dtype::F32 => data.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
            Dtype::BF16 => halves().map(|bits| bf16::from_bits(bits).to_f32()).collect(),
            Dtype::F16 => halves().map(|bits| f16::from_bits(bits).to_f32()).collect(),
            other => {
                let (path, name, found) = (path.into(), name.into(), other.to_string());
                return Err(Error::TensorType { path, name, found });
            }
        };
        found.entry((layer, target)).or_default()[usize::from(second)] = Some(values);
    }
    let pair = |((layer, target), factors): ((usize, LoraTarget), [Option<Vec<f32>>; 2])| match factors {
        [Some(a), Some(b)] => Ok(Factors { layer, target, a, b }),
        [a, _] => {
            let name = target.factor_name(layer, if a.is_none() { 'A' } else { 'B' });
            Err(Error::MissingTensor { path: path.into(), name })
        }
    };
    found.into_iter().map(pair).collect()
}

/// Layer, target, and whether it is B, of a tensor's name.
fn parse(name: &str) -> Option<(usize, LoraTarget, bool)> {
    let (_, rest) = name.strip_prefix(PREFIX)?.split_once("layers.")?;
    let (layer, rest) = rest.split_once('.')?;
    let (block, rest) = rest.split_once('.')?;
    let (module, factor) = rest.split_once('.')?;
    let target = LoraTarget::of_module(module)?;
    let expected = if target.place().0 < 2 { "self_attn" } else { "mlp" };
    let second = match factor {
        "lora_A.weight" => false,
        "lora_B.weight" => true,
        _ => return None,
    };
    (block == expected).then_some((layer.parse().ok()?, target, second))
}
