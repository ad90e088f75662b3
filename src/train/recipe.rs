//! The published program's recipes: JSON files with the blocks `model`, `training`, `output` and `data`.
//!
//! They are read as they are. What this program does not do is refused; what has no meaning here is noted.

use super::{
    config::{
        BatchSettings, DataSettings, FuserSettings, GateSettings, LengthSettings, LoraSettings,
        OptimizerSettings, TooLong, TrainConfig, What,
    },
    schedule::Schedule,
};
use crate::{
    align::Alignment,
    data::{Adapter, AdapterChoice, PromptStyle},
    fuser::{FusionMode, Kind},
    model::LoraTarget,
};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::{collections::BTreeMap, path::PathBuf};

/// A recipe that cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    #[error("no training recipe: {0}")]
    Json(#[from] serde_json::Error),
    #[error("`{key}` {problem}")]
    Value { key: &'static str, problem: String },
    #[error("the recipe cannot be written as TOML: {0}")]
    Internal(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipe {
    model: Model,
    training: Training,
    output: Output,
    data: Data,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Model {
    base_model: Option<PathBuf>,
    teacher_model: Option<Teachers>,
    baseline_model: Option<PathBuf>,
    projector: Option<Projector>,
    mapping: Option<String>,
    #[serde(default)]
    is_do_alignment: bool,
    alignment_strategy: Option<String>,
    #[serde(default)]
    include_response: bool,
    multi_source_fusion_mode: Option<String>,
    attn_implementation: Option<Value>,
}

/// One sharer, or several by name.
#[derive(Deserialize)]
#[serde(untagged)]
enum Teachers {
    One(PathBuf),
    Several(Map<String, Value>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Projector {
    #[serde(rename = "type")]
    class: String,
    params: ProjectorParams,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProjectorParams {
    hidden_dim: Option<usize>,
    intermediate_dim: Option<usize>,
    num_layers: Option<usize>,
    dropout: Option<f64>,
    initial_temperature: Option<f64>,
    final_temperature: Option<f64>,
    anneal_steps: Option<u64>,
    ablation_level: Option<u8>,
    #[serde(default)]
    zero_init: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Training {
    learning_rate: f64,
    weight_decay: f64,
    num_epochs: u64,
    max_length: usize,
    device: Option<Value>,
    scheduler_type: String,
    warmup_ratio: f64,
    max_grad_norm: f64,
    gradient_accumulation_steps: Option<usize>,
    per_device_train_batch_size: usize,
    num_processes: Option<usize>,
    freeze: Vec<String>,
    seed: u64,
    lora: Option<Lora>,
    partial_training: Option<Value>,
    pad_to_multiple_of: Option<Value>,
}

/// As PEFT has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Lora {
    r: usize,
    lora_alpha: f64,
    lora_dropout: f64,
    target_modules: Option<Vec<String>>,
    bias: Option<String>,
    task_type: Option<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Output {
    output_dir: PathBuf,
    save_steps: u64,
    eval_steps: u64,
    wandb_config: Option<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Data {
    #[serde(rename = "type")]
    class: String,
    #[serde(default)]
    kwargs: BTreeMap<String, Value>,
    train_ratio: Option<f64>,
}

fn refuse<T>(key: &'static str, problem: impl Into<String>) -> Result<T, RecipeError> {
    Err(RecipeError::Value { key, problem: problem.into() })
}

/// The run that a recipe describes, and notes on what in it has no meaning here.
pub fn read(text: &str) -> Result<(TrainConfig, Vec<String>), RecipeError> {
    let Recipe { model, training, output, data } = serde_json::from_str(text)?;
    let mut notes = Vec::new();
    let mut unused = |present: bool, key: &str, why: &str| {
        if present {
            notes.push(format!("`{key}` is not used: {why}"));
        }
    };
    unused(model.attn_implementation.is_some(), "model.attn_implementation", "there is one attention");
    unused(training.device.is_some(), "training.device", "--device chooses");
    unused(training.pad_to_multiple_of.is_some(), "training.pad_to_multiple_of", "nothing is padded");
    unused(
        output.wandb_config.is_some(),
        "output.wandb_config",
        "the log is in log.jsonl and TensorBoard's files",
    );
    if training.partial_training.is_some() {
        return refuse(
            "training.partial_training",
            "is not built: train all of the model, or use training.lora",
        );
    }
    if model.include_response && model.baseline_model.is_some() {
        return refuse("model.include_response", "has no meaning in a recipe for a single model");
    }
    let config = match &model.baseline_model {
        Some(_) => baseline(&model, &training)?,
        None => pair(&model, &training)?,
    };
    let processes = training.num_processes.unwrap_or(1);
    let accumulate = training.gradient_accumulation_steps.unwrap_or(1).saturating_mul(processes);
    if processes > 1 {
        notes.push(format!(
            "training.num_processes is {processes}: one process adds up the gradients of {accumulate} batches, which \
             is the same update"
        ));
    }
    let config = TrainConfig {
        include_response: model.include_response,
        out: output.output_dir,
        seed: training.seed,
        train_ratio: data.train_ratio.unwrap_or(1.0),
        data: vec![source(&data, &mut notes)?],
        length: LengthSettings {
            steps: None,
            epochs: Some(training.num_epochs),
            max_length: training.max_length,
            too_long: TooLong::Skip,
        },
        batch: BatchSettings {
            samples: Some(training.per_device_train_batch_size),
            tokens: None,
            accumulate,
        },
        optimizer: OptimizerSettings {
            learning_rate: training.learning_rate,
            schedule: schedule(&training.scheduler_type)?,
            warmup_ratio: training.warmup_ratio,
            weight_decay: training.weight_decay,
            clip: training.max_grad_norm,
            ..OptimizerSettings::default()
        },
        eval_every: output.eval_steps,
        save_every: output.save_steps,
        ..config
    };
    Ok((config, notes))
}

fn schedule(name: &str) -> Result<Schedule, RecipeError> {
    let known = [Schedule::Linear, Schedule::Cosine, Schedule::Constant, Schedule::ConstantWithWarmup];
    known.into_iter().find(|schedule| schedule.name() == name).map_or_else(
        || {
            let problem = format!("is `{name}`: use linear, cosine, constant or constant_with_warmup");
            refuse("training.scheduler_type", problem)
        },
        Ok,
    )
}

/// One model alone.
fn baseline(model: &Model, training: &Training) -> Result<TrainConfig, RecipeError> {
    if model.base_model.is_some() || model.teacher_model.is_some() || model.projector.is_some() {
        return refuse(
            "model.baseline_model",
            "excludes base_model, teacher_model and projector: remove one or the other",
        );
    }
    if !training.freeze.is_empty() {
        return refuse("training.freeze", "leaves nothing to train in a recipe for a single model");
    }
    let config =
        TrainConfig { receiver: model.baseline_model.clone().unwrap_or_default(), ..TrainConfig::default() };
    let Some(lora) = &training.lora else { return Ok(TrainConfig { what: What::Model, ..config }) };
    if let Some(bias) = lora.bias.as_deref().filter(|bias| *bias != "none") {
        return refuse("training.lora.bias", format!("is `{bias}`: only none is built"));
    }
    // Which PEFT class wraps the model says nothing about the numbers.
    let _ = &lora.task_type;
    let targets = match &lora.target_modules {
        None => LoraTarget::ALL.into(),
        Some(names) => names.iter().map(|name| target(name)).collect::<Result<_, _>>()?,
    };
    let lora = LoraSettings { rank: lora.r, alpha: lora.lora_alpha, dropout: lora.lora_dropout, targets };
    Ok(TrainConfig { what: What::Lora, lora, ..config })
}

fn target(name: &str) -> Result<LoraTarget, RecipeError> {
    LoraTarget::of_module(name).map_or_else(
        || {
            let known = LoraTarget::ALL.map(LoraTarget::module).join(", ");
            refuse("training.lora.target_modules", format!("names `{name}`: use {known}"))
        },
        Ok,
    )
}

/// A fuser between frozen models.
fn pair(model: &Model, training: &Training) -> Result<TrainConfig, RecipeError> {
    let Some(receiver) = model.base_model.clone() else { return refuse("model.base_model", "is missing") };
    let sharers = match &model.teacher_model {
        None => return refuse("model.teacher_model", "is missing"),
        Some(Teachers::One(path)) => vec![path.clone()],
        Some(Teachers::Several(named)) => named
            .values()
            .map(|path| match path.as_str() {
                Some(path) => Ok(PathBuf::from(path)),
                None => refuse("model.teacher_model", "has a value that is no path"),
            })
            .collect::<Result<_, _>>()?,
    };
    for part in ["teacher", "base"] {
        if !training.freeze.iter().any(|frozen| frozen == part) {
            let problem =
                format!("leaves `{part}` to be trained together with the fuser, which is not built: add it");
            return refuse("training.freeze", problem);
        }
    }
    if let Some(other) = training.freeze.iter().find(|part| !matches!(part.as_str(), "teacher" | "base")) {
        return refuse(
            "training.freeze",
            format!("has `{other}`: a fuser that is frozen leaves nothing to train"),
        );
    }
    if training.lora.is_some() {
        return refuse("training.lora", "goes with baseline_model only");
    }
    let alignment = match (model.is_do_alignment, model.alignment_strategy.as_deref()) {
        (false, _) => Alignment::None,
        (true, None | Some("first")) => Alignment::First,
        (true, Some("longest")) => Alignment::Longest,
        (true, Some(other)) => {
            return refuse("model.alignment_strategy", format!("is `{other}`: use first or longest"));
        }
    };
    let multi_sharer = match model.multi_source_fusion_mode.as_deref() {
        None => FusionMode::Sequential,
        Some(name) => {
            name.parse().or_else(|problem: String| refuse("model.multi_source_fusion_mode", problem))?
        }
    };
    let mapping = match model.mapping.as_deref() {
        None => FuserSettings::default().mapping,
        Some(name) => name
            .parse()
            .or_else(|problem: crate::align::UnknownMapping| refuse("model.mapping", problem.to_string()))?,
    };
    let Some(projector) = &model.projector else { return refuse("model.projector", "is missing") };
    let (fuser, gates) = fuser(projector)?;
    let fuser = FuserSettings { mapping, ..fuser };
    Ok(TrainConfig { receiver, sharers, alignment, multi_sharer, fuser, gates, ..TrainConfig::default() })
}

fn fuser(projector: &Projector) -> Result<(FuserSettings, GateSettings), RecipeError> {
    let params = &projector.params;
    let kind = match (projector.class.to_ascii_lowercase().as_str(), params.ablation_level) {
        ("c2cprojector", None) => Kind::C2c,
        ("ablationprojector", level) if level.unwrap_or(0) <= 4 => Kind::Ablation(level.unwrap_or(0)),
        (_, Some(level)) => {
            return refuse(
                "model.projector.params.ablation_level",
                format!("is {level}: an AblationProjector has 0 to 4"),
            );
        }
        _ => {
            let problem = format!("is `{}`: use C2CProjector or AblationProjector", projector.class);
            return refuse("model.projector.type", problem);
        }
    };
    if params.zero_init {
        return refuse(
            "model.projector.params.zero_init",
            "is not built: initial weights are PyTorch's default",
        );
    }
    let (fuser, gates) = (FuserSettings::default(), GateSettings::default());
    Ok((
        FuserSettings {
            kind,
            hidden: params.hidden_dim.unwrap_or(fuser.hidden),
            intermediate: params.intermediate_dim.unwrap_or(fuser.intermediate),
            layers: params.num_layers.unwrap_or(fuser.layers),
            dropout: params.dropout.unwrap_or(fuser.dropout),
            ..fuser
        },
        GateSettings {
            initial_temperature: params.initial_temperature.unwrap_or(gates.initial_temperature),
            final_temperature: params.final_temperature.unwrap_or(gates.final_temperature),
            anneal_steps: params.anneal_steps,
        },
    ))
}

/// The data set, in the folder that the hub's name says.
fn source(data: &Data, notes: &mut Vec<String>) -> Result<DataSettings, RecipeError> {
    let adapter: Adapter = data
        .class
        .parse()
        .or_else(|_| refuse("data.type", format!("is `{}`, which is not known", data.class)))?;
    let hub = match adapter {
        Adapter::OpenHermes => Some("teknium/OpenHermes-2.5"),
        Adapter::Mmlu => Some("cais/mmlu"),
        Adapter::MmluCot => Some("Brench/MMLU-Pro-CoT-Train-43K"),
        Adapter::OpenBookQa => Some("allenai/openbookqa"),
        _ => None,
    };
    let mut path = hub.map(PathBuf::from);
    let mut limit = None;
    for (key, value) in &data.kwargs {
        match key.as_str() {
            "data_path" | "dataset_path" => path = value.as_str().map(PathBuf::from).or(path),
            "num_samples" => match value {
                Value::Null => {}
                _ => match value.as_u64() {
                    Some(count) => limit = Some(count as usize),
                    None => {
                        return refuse("data.kwargs.num_samples", format!("is {value}: expected a number"));
                    }
                },
            },
            "max_word_count" | "max_length" => {
                notes.push(format!(
                    "`data.kwargs.{key}` is not used: training.max_length skips longer samples"
                ));
            }
            "split" => {
                notes.push("`data.kwargs.split` is not used: data are the files of the path given".into())
            }
            "cache_dir" => notes.push("`data.kwargs.cache_dir` is not used".into()),
            other => {
                let problem = format!("has `{other}`, which is not known");
                return refuse("data.kwargs", problem);
            }
        }
    }
    let Some(path) = path else {
        return refuse("data.kwargs", "does not say where the data are: give data_path");
    };
    Ok(DataSettings {
        path,
        adapter: AdapterChoice::Named(adapter),
        prompt: PromptStyle::Plain,
        ids: None,
        limit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The shape of the published recipe for Qwen3-0.6B ← Qwen2.5-0.5B.
    fn published() -> Value {
        json!({
            "model": {
                "base_model": "Qwen/Qwen3-0.6B", "teacher_model": "Qwen/Qwen2.5-0.5B-Instruct",
                "is_do_alignment": false, "alignment_strategy": "first",
                "projector": {"type": "C2CProjector", "params": {
                    "hidden_dim": 1024, "intermediate_dim": 1024, "num_layers": 3, "dropout": 0.1,
                    "initial_temperature": 1.0, "final_temperature": 0.001, "anneal_steps": 1929
                }},
                "mapping": "last_aligned"
            },
            "training": {
                "learning_rate": 1e-4, "weight_decay": 0.01, "num_epochs": 1, "max_length": 2048, "device": "cuda",
                "scheduler_type": "linear", "warmup_ratio": 0.1, "max_grad_norm": 1.0,
                "gradient_accumulation_steps": 8, "per_device_train_batch_size": 4, "num_processes": 8,
                "freeze": ["teacher", "base"], "seed": 42
            },
            "output": {
                "output_dir": "out", "save_steps": 500, "eval_steps": 100,
                "wandb_config": {"project": "p", "mode": "offline", "run_name": "r"}
            },
            "data": {
                "type": "OpenHermesChatDataset",
                "kwargs": {"split": "train", "max_word_count": 2048, "num_samples": 500000}, "train_ratio": 0.99
            }
        })
    }

    fn with(pointer: &str, value: Value) -> Value {
        let mut recipe = published();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        recipe.pointer_mut(parent).unwrap()[key] = value;
        recipe
    }

    fn config(recipe: &Value) -> Result<TrainConfig, RecipeError> {
        read(&recipe.to_string()).map(|(config, _)| config)
    }

    #[test]
    fn the_published_recipe_is_the_preset() {
        let (recipe, notes) = read(&published().to_string()).unwrap();
        let preset = crate::train::ConfigLayers::default().preset("published").unwrap().finish().unwrap().0;
        // The preset ties the annealing to the run's own number of updates.
        let gates = GateSettings { anneal_steps: Some(1929), ..preset.gates.clone() };
        assert_eq!(recipe, TrainConfig { out: "out".into(), gates, ..preset });
        assert!(notes.iter().any(|note| note.contains("wandb")), "{notes:?}");
        assert!(notes.iter().any(|note| note.contains("64 batches")), "{notes:?}");
    }

    #[test]
    fn what_is_not_known_or_built_is_refused_by_name() {
        for (pointer, value, word) in [
            ("/training/lr", json!(1), "lr"),
            ("/model/projector/params/hiden_dim", json!(1), "hiden_dim"),
            ("/data/kwargs/foo", json!(1), "foo"),
            ("/data/type", json!("FooDataset"), "FooDataset"),
            ("/model/projector/type", json!("AllInOneProjector"), "AllInOneProjector"),
            ("/model/mapping", json!("nearest"), "nearest"),
            ("/training/scheduler_type", json!("polynomial"), "polynomial"),
            ("/training/freeze", json!(["teacher"]), "base"),
            ("/training/freeze", json!(["teacher", "base", "projector"]), "projector"),
            ("/training/partial_training", json!({"method": "layer_wise"}), "partial_training"),
            ("/training/seed", json!("x"), "line"),
        ] {
            let error = config(&with(pointer, value)).unwrap_err().to_string();
            assert!(error.contains(word), "{pointer}: {error}");
        }
    }

    #[test]
    fn variants() {
        let aligned = config(&with("/model/is_do_alignment", json!(true))).unwrap();
        assert_eq!(aligned.alignment, Alignment::First);
        assert!(config(&with("/model/include_response", json!(true))).unwrap().include_response);
        let teachers = json!({"a": "one", "b": "two"});
        assert_eq!(
            config(&with("/model/teacher_model", teachers)).unwrap().sharers,
            ["one", "two"].map(PathBuf::from)
        );
        let projector = json!({"type": "AblationProjector", "params": {"ablation_level": 3}});
        assert_eq!(config(&with("/model/projector", projector)).unwrap().fuser.kind, Kind::Ablation(3));

        let mut baseline = with("/model", json!({"baseline_model": "m"}));
        baseline["training"]["freeze"] = json!([]);
        assert_eq!(config(&baseline).unwrap().what, What::Model);
        baseline["training"]["lora"] =
            json!({"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "down_proj"]});
        let lora = config(&baseline).unwrap();
        assert_eq!((lora.what, lora.lora.rank), (What::Lora, 8));
        assert_eq!(lora.lora.targets, [LoraTarget::Q, LoraTarget::Down]);
    }
}
