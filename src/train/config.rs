//! What a training run is asked to do: TOML files, named presets, settings of the command line.
//!
//! Every key has a default but the models and the data, so a file says what differs. Unknown keys are errors.

mod layers;
mod names;

use super::schedule::{Annealing, LearningRate, Schedule};
use crate::{
    align::{Alignment, Fraction, LayerMapping},
    backend::DeviceChoice,
    data::{AdapterChoice, PromptStyle, Source},
    fuser::{FusionMode, Kind},
    model::LoraTarget,
    pipeline::ComputeType,
};
pub use layers::{ConfigError, ConfigLayers, preset_names};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// What is trained: `fuser` (default), `model` (the receiver's weights) or `lora` (adapters of the receiver).
    pub what: What,
    /// The model that answers: a folder or a .gguf file. Under `model` and `lora` the model that is trained.
    pub receiver: PathBuf,
    /// The models that share their caches; none under `model` and `lora`.
    pub sharers: Vec<PathBuf>,
    /// How sharer tokens are found for receiver tokens: `span` (default), `first`, `longest` or `none`.
    #[serde(with = "names::text")]
    pub alignment: Alignment,
    /// How several sharers meet: `sequential` (default) or `parallel`.
    #[serde(with = "names::text")]
    pub multi_sharer: FusionMode,
    /// Fuse only this part of a prompt: `"back:0.1"` its last tenth, `"front:0.5"` or `"0.5"` its first half; all of it by default. The
    /// fuser remembers it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fraction: Option<Fraction>,
    /// Fuse the tokens of the answer too, as `generate --include-response` does; `false` by default.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub include_response: bool,
    /// Folder for checkpoints, log and report; `runs/train` by default.
    pub out: PathBuf,
    /// Keep the sharers' caches in this folder, so that only the first epoch computes them. Not kept by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_sharer: Option<PathBuf>,
    /// The same for the receiver's caches of the prompts before they are fused. Not kept by default; pays where answers are short and
    /// `fraction` small, so that little else is left to compute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_receiver: Option<PathBuf>,
    /// Initial weights, order of data, gate noise and dropout; 42 by default.
    pub seed: u64,
    /// `auto` (default), `cpu`, `cuda` or `cuda:N`.
    #[serde(with = "names::device")]
    pub device: DeviceChoice,
    /// CPU threads; 0 (default) = all cores.
    pub threads: usize,
    /// How the models compute: `bf16` (default) or `f32`. Weights under training and their moments are f32 always.
    #[serde(with = "names::compute")]
    pub dtype: ComputeType,
    pub fuser: FuserSettings,
    pub lora: LoraSettings,
    /// What to train on, one after the other in this order; shuffled together each epoch.
    pub data: Vec<DataSettings>,
    /// What to measure on.
    pub held_out: Vec<DataSettings>,
    /// The part of `data` that is trained on, drawn by the seed; the rest joins `held_out`. 1 (default) = all.
    pub train_ratio: f64,
    pub length: LengthSettings,
    pub batch: BatchSettings,
    pub optimizer: OptimizerSettings,
    pub gates: GateSettings,
    /// What is computed again in the backward pass instead of kept: 0 (default) nothing, 1 all within a layer, which needs less
    /// memory and more time.
    pub recompute: u8,
    /// Updates between measurements on held-out data, which are also made at the end; 0 = only at the end. Default 100.
    pub eval_every: u64,
    /// Updates between checkpoints, which are also made at the end; 0 = only at the end. Default 500.
    pub save_every: u64,
    /// Whether receiver, sharers and text-to-text answer the held-out questions before training; `true` by default. `false`
    /// saves their time where it is known already how they do.
    pub baselines: bool,
    /// End the run after so many measurements in a row without a lower held-out loss. Off by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stop: Option<u32>,
}

impl Default for TrainConfig {
    fn default() -> TrainConfig {
        TrainConfig {
            what: What::Fuser,
            receiver: PathBuf::new(),
            sharers: Vec::new(),
            alignment: Alignment::default(),
            multi_sharer: FusionMode::default(),
            fraction: None,
            include_response: false,
            out: "runs/train".into(),
            cache_sharer: None,
            cache_receiver: None,
            seed: 42,
            device: DeviceChoice::Auto,
            threads: 0,
            dtype: ComputeType::Bf16,
            fuser: FuserSettings::default(),
            lora: LoraSettings::default(),
            data: Vec::new(),
            held_out: Vec::new(),
            train_ratio: 1.0,
            length: LengthSettings::default(),
            batch: BatchSettings::default(),
            optimizer: OptimizerSettings::default(),
            gates: GateSettings::default(),
            recompute: 0,
            eval_every: 100,
            save_every: 500,
            baselines: true,
            early_stop: None,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    #[default]
    Fuser,
    Model,
    Lora,
}

/// `[fuser]`: one for each sharer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FuserSettings {
    /// Go on with these fusers' weights, one for each sharer; the other keys but `dropout` then do not apply.
    pub checkpoints: Vec<PathBuf>,
    /// `c2c` (default), `c2c-c`, `latent` or `ablation:0` … `ablation:4` or `all-in-one` (as the published recipes have it), which are trained; `ridge`, which is solved
    /// for.
    pub kind: Kind,
    /// Width of the projector's residual stream, under `latent` of the latent; 1024 by default.
    pub hidden: usize,
    /// Inner width of its blocks; 1024 by default.
    pub intermediate: usize,
    /// Linear maps and blocks together, 3 (default) or more.
    pub layers: usize,
    /// Which sharer layer feeds which receiver layer: `last_aligned` (default), `k_nearest` or `depth_normalized`.
    #[serde(with = "names::text")]
    pub mapping: LayerMapping,
    /// The part of a block's outputs that is zeroed in training; 0.1 by default.
    pub dropout: f64,
    /// Update the maps that read columns as if every channel had mean 0 and deviation 1 over the data; `false` by default, as published. With few
    /// data or a small part of the prompt fused it makes the difference between learning and not (docs/math.md, "Standardised inputs").
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub standardize: bool,
    /// Under kind `ridge`: how much the map is held back, in parts of the inputs' mean variance; 0.01 by default.
    #[serde(skip_serializing_if = "is_default_ridge")]
    pub ridge_lambda: f64,
}

const RIDGE_LAMBDA: f64 = 0.01;

fn is_default_ridge(lambda: &f64) -> bool {
    *lambda == RIDGE_LAMBDA
}

impl Default for FuserSettings {
    fn default() -> FuserSettings {
        FuserSettings {
            checkpoints: Vec::new(),
            kind: Kind::C2c,
            hidden: 1024,
            intermediate: 1024,
            layers: 3,
            mapping: LayerMapping::LAST_ALIGNED,
            dropout: 0.1,
            standardize: false,
            ridge_lambda: RIDGE_LAMBDA,
        }
    }
}

/// `[lora]`: low-rank adapters, for `what = "lora"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraSettings {
    /// 16 by default.
    pub rank: usize,
    /// The adapters' product is scaled by `alpha / rank`; 32 by default.
    pub alpha: f64,
    /// 0.1 by default.
    pub dropout: f64,
    /// Of `q`, `k`, `v`, `o`, `gate`, `up`, `down`; all by default.
    pub targets: Vec<LoraTarget>,
}

impl Default for LoraSettings {
    fn default() -> LoraSettings {
        LoraSettings { rank: 16, alpha: 32.0, dropout: 0.1, targets: LoraTarget::ALL.into() }
    }
}

/// `[[data]]` and `[[held_out]]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSettings {
    /// A file or a folder of files: .jsonl, .json, .csv, .parquet.
    pub path: PathBuf,
    /// How rows are read; `auto` (default) tells by their fields.
    #[serde(default)]
    pub adapter: AdapterChoice,
    /// How multiple choice questions are put: `plain` (default) or `template` (the evaluation's prompt).
    #[serde(default)]
    pub prompt: PromptStyle,
    /// A file of ids, one a line: only rows whose `id` is among them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ids: Option<PathBuf>,
    /// At most as many examples, the first ones; all by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

impl From<&DataSettings> for Source {
    fn from(data: &DataSettings) -> Source {
        let DataSettings { path, adapter, prompt, ids, limit } = data;
        Source { path: path.clone(), adapter: *adapter, prompt: *prompt, ids: ids.clone(), limit: *limit }
    }
}

/// `[length]`: of the run, and of its samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LengthSettings {
    /// Updates. Instead of `epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Passes over the data; 1 where `steps` is not given either.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u64>,
    /// Tokens of a sample, prompt and answer, by the receiver's tokenizer; 2048 by default.
    pub max_length: usize,
    /// What becomes of longer samples; `skip` by default.
    pub too_long: TooLong,
}

impl Default for LengthSettings {
    fn default() -> LengthSettings {
        LengthSettings { steps: None, epochs: None, max_length: 2048, too_long: TooLong::Skip }
    }
}

/// What becomes of samples longer than `max_length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TooLong {
    /// The run is refused, with the place of the first such sample.
    Error,
    /// They are left out and counted.
    Skip,
    /// The prompt loses its first tokens: the answer stays whole and the prompt keeps its last
    /// `max_length − answer` tokens. A sample whose answer leaves no room for a prompt token is left out and counted.
    Truncate,
}

/// `[batch]`: what makes an update.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BatchSettings {
    /// Samples computed at once. 4 where `tokens` is not given either.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub samples: Option<usize>,
    /// Instead of `samples`: as many samples at once as have at most so many tokens, but one at least.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<usize>,
    /// Batches whose gradients are added up before an update; 1 by default.
    pub accumulate: usize,
}

impl Default for BatchSettings {
    fn default() -> BatchSettings {
        BatchSettings { samples: None, tokens: None, accumulate: 1 }
    }
}

/// `[optimizer]`: AdamW and its rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerSettings {
    /// The highest rate; 1e-4 by default.
    pub learning_rate: f64,
    /// `linear` (default), `cosine`, `constant` or `constant_with_warmup`.
    pub schedule: Schedule,
    /// The part of the updates in which the rate rises; 0.1 by default.
    pub warmup_ratio: f64,
    /// Instead of `warmup_ratio`: updates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
    /// The part of the highest rate that `linear` and `cosine` end with; 0 by default.
    pub final_ratio: f64,
    /// Decoupled from the gradient; 0.01 by default.
    pub weight_decay: f64,
    /// What decays: `all` weights (default, as published) or `matrices`, which spares norms and biases.
    pub decay: Decay,
    /// Of the two moments; 0.9 and 0.999 by default.
    pub betas: [f64; 2],
    /// 1e-8 by default.
    pub epsilon: f64,
    /// Gradients are scaled down to this L2 norm; 1 by default, 0 = never.
    pub clip: f64,
}

impl Default for OptimizerSettings {
    fn default() -> OptimizerSettings {
        OptimizerSettings {
            learning_rate: 1e-4,
            schedule: Schedule::Linear,
            warmup_ratio: 0.1,
            warmup_steps: None,
            final_ratio: 0.0,
            weight_decay: 0.01,
            decay: Decay::All,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            clip: 1.0,
        }
    }
}

/// What weight decay applies to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    #[default]
    All,
    Matrices,
}

/// `[gates]`: the temperature of their relaxation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GateSettings {
    /// 1 by default.
    pub initial_temperature: f64,
    /// 0.001 by default.
    pub final_temperature: f64,
    /// Updates from the first to the last temperature; the number of updates of the run by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub anneal_steps: Option<u64>,
}

impl Default for GateSettings {
    fn default() -> GateSettings {
        GateSettings { initial_temperature: 1.0, final_temperature: 0.001, anneal_steps: None }
    }
}

impl TrainConfig {
    /// The learning rate of a run of `total` updates.
    pub fn learning_rate(&self, total: u64) -> LearningRate {
        let OptimizerSettings { learning_rate, schedule, warmup_ratio, warmup_steps, final_ratio, .. } =
            self.optimizer;
        let warmup = warmup_steps.unwrap_or((warmup_ratio * total as f64) as u64);
        LearningRate { schedule, base: learning_rate, warmup, total, final_ratio }
    }

    /// The gates' temperature in a run of `total` updates.
    pub fn annealing(&self, total: u64) -> Annealing {
        let GateSettings { initial_temperature, final_temperature, anneal_steps } = self.gates;
        Annealing {
            initial: initial_temperature,
            final_: final_temperature,
            steps: anneal_steps.unwrap_or(total),
        }
    }

    /// The first key whose value makes no sense, and why.
    fn problem(&self) -> Option<(&'static str, String)> {
        let problem = |key, text: &str| Some((key, text.to_owned()));
        if self.receiver.as_os_str().is_empty() {
            return problem("receiver", "is missing: name a model's folder or .gguf file");
        }
        match (self.what, self.sharers.is_empty()) {
            (What::Fuser, true) => {
                return problem("sharers", "is empty: a fuser needs a model that shares its cache");
            }
            (What::Model | What::Lora, false) => {
                return problem("sharers", "only goes with what = \"fuser\": remove it");
            }
            _ => {}
        }
        if self.data.is_empty() {
            return problem("data", "is missing: name at least one file to train on");
        }
        let fusers = self.fuser.checkpoints.len();
        if fusers != 0 && fusers != self.sharers.len() {
            let text = format!("names {fusers} fusers for {} sharers: name one each", self.sharers.len());
            return Some(("fuser.checkpoints", text));
        }
        if self.length.steps.is_some() && self.length.epochs.is_some() {
            return problem("length.epochs", "and length.steps exclude each other: remove one");
        }
        if self.batch.samples.is_some() && self.batch.tokens.is_some() {
            return problem("batch.tokens", "and batch.samples exclude each other: remove one");
        }
        if self.fuser.standardize && self.what != What::Fuser {
            return problem("fuser.standardize", "only goes with what = \"fuser\": remove it");
        }
        if self.fraction.is_some() && self.include_response {
            return problem("fraction", "and include_response exclude each other: remove one");
        }
        self.out_of_range()
    }

    fn out_of_range(&self) -> Option<(&'static str, String)> {
        let at_least = [
            ("fuser.hidden", Some(self.fuser.hidden as u64), 1),
            ("fuser.intermediate", Some(self.fuser.intermediate as u64), 1),
            ("fuser.layers", Some(self.fuser.layers as u64), 3),
            ("lora.rank", Some(self.lora.rank as u64), 1),
            ("length.steps", self.length.steps, 1),
            ("length.epochs", self.length.epochs, 1),
            ("length.max_length", Some(self.length.max_length as u64), 2),
            ("batch.samples", self.batch.samples.map(|n| n as u64), 1),
            ("batch.tokens", self.batch.tokens.map(|n| n as u64), 2),
            ("batch.accumulate", Some(self.batch.accumulate as u64), 1),
            ("gates.anneal_steps", self.gates.anneal_steps, 1),
            ("early_stop", self.early_stop.map(u64::from), 1),
        ];
        for (key, value, least) in at_least {
            if let Some(value) = value.filter(|value| *value < least) {
                return Some((key, format!("is {value}: expected {least} or more")));
            }
        }
        if self.recompute > 1 {
            return Some(("recompute", format!("is {}: expected 0 or 1", self.recompute)));
        }
        let OptimizerSettings { learning_rate, warmup_ratio, weight_decay, betas, epsilon, clip, .. } =
            self.optimizer;
        let ranges: [(&'static str, f64, bool, &str); 13] = [
            (
                "train_ratio",
                self.train_ratio,
                (0.0..=1.0).contains(&self.train_ratio) && self.train_ratio > 0.0,
                "a number above 0, up to 1",
            ),
            (
                "fuser.dropout",
                self.fuser.dropout,
                (0.0..1.0).contains(&self.fuser.dropout),
                "0 or more, below 1",
            ),
            (
                "fuser.ridge_lambda",
                self.fuser.ridge_lambda,
                self.fuser.ridge_lambda >= 0.0 && self.fuser.ridge_lambda.is_finite(),
                "0 or more",
            ),
            (
                "lora.dropout",
                self.lora.dropout,
                (0.0..1.0).contains(&self.lora.dropout),
                "0 or more, below 1",
            ),
            ("optimizer.learning_rate", learning_rate, learning_rate > 0.0, "a number above 0"),
            ("optimizer.warmup_ratio", warmup_ratio, (0.0..=1.0).contains(&warmup_ratio), "0 to 1"),
            ("optimizer.weight_decay", weight_decay, weight_decay >= 0.0, "0 or more"),
            ("optimizer.betas", betas[0], (0.0..1.0).contains(&betas[0]), "0 or more, below 1"),
            ("optimizer.betas", betas[1], (0.0..1.0).contains(&betas[1]), "0 or more, below 1"),
            ("optimizer.epsilon", epsilon, epsilon > 0.0, "a number above 0"),
            ("optimizer.clip", clip, clip >= 0.0, "0 or more"),
            (
                "gates.initial_temperature",
                self.gates.initial_temperature,
                self.gates.initial_temperature > 0.0,
                "a number above 0",
            ),
            (
                "gates.final_temperature",
                self.gates.final_temperature,
                self.gates.final_temperature > 0.0,
                "a number above 0",
            ),
        ];
        let bad = ranges.into_iter().find(|(_, value, good, _)| !(*good && value.is_finite()));
        bad.map(|(key, value, _, expected)| (key, format!("is {value}: expected {expected}")))
    }
}

#[cfg(test)]
mod tests;
