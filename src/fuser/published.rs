//! The authors' checkpoint layout (spec 5): `projector_{i}.json`, `projector_config.json` and the weights, either one
//! pickle `projector_{i}.pt` per layer or one `projectors.safetensors` beside them or beside their folder `final/`.
//!
//! Read in both forms; written with safetensors.

use super::{
    Fuser, FuserError, LayerProjector, Mapping, all_in_one,
    checkpoint::{outgoing, prefix, refuse_extra, write_text},
    config::{FuserConfig, Kind, Route, Training, VERSION},
    contract::Party,
    parameters,
    pickle::read_state_dict,
    state::{StateDict, read_safetensors, read_text},
};
use crate::{
    backend::{Backend, DType, Queue, cpu::map_file},
    durable::write_safetensors,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

const ROUTES: &str = "projector_config.json";
const WEIGHTS: &str = "projectors.safetensors";

/// The folder with the routing table, if `path` is a checkpoint in the published layout: a run's folder, its `final/`,
/// or a file in one of them.
pub(super) fn find(path: &Path) -> Option<PathBuf> {
    let folder = if path.is_dir() {
        path
    } else {
        path.parent().filter(|_| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("projector"))
        })?
    };
    [folder.to_path_buf(), folder.join("final")].into_iter().find(|folder| folder.join(ROUTES).is_file())
}

/// `projector_{i}.json`
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProjectorFile {
    class: String,
    init_args: InitArgs,
}

/// The same before its class is known.
#[derive(PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct AnyProjectorFile {
    class: String,
    init_args: Value,
}

const ALL_IN_ONE: [&str; 2] = ["AllInOneProjector", "allinoneprojector"];

/// What the projector's class was called with; what is absent has the class's default.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct InitArgs {
    source_dim: usize,
    target_dim: usize,
    #[serde(default = "one")]
    source_num_heads: usize,
    #[serde(default = "one")]
    target_num_heads: usize,
    #[serde(default = "default_dim")]
    hidden_dim: usize,
    #[serde(default = "default_dim")]
    intermediate_dim: usize,
    #[serde(default = "default_layers")]
    num_layers: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dropout: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    initial_temperature: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    final_temperature: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    anneal_steps: Option<u64>,
    /// The tensors say it themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dtype: Option<Value>,
    /// Says how the weights began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    zero_init: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ablation_level: Option<u8>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    use_scalar_weights: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    use_gates: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    use_target: Option<bool>,
}

fn one() -> usize {
    1
}

fn default_dim() -> usize {
    1024
}

fn default_layers() -> usize {
    3
}

impl ProjectorFile {
    fn kind(&self) -> Result<Kind, String> {
        let InitArgs { ablation_level, use_scalar_weights, use_gates, use_target, .. } = self.init_args;
        match self.class.as_str() {
            "C2CProjector" | "c2cprojector" => {
                if ablation_level.is_some()
                    || use_scalar_weights.is_some()
                    || use_gates.is_some()
                    || use_target.is_some()
                {
                    return Err("has arguments of an AblationProjector".into());
                }
                Ok(Kind::C2c)
            }
            "AblationProjector" | "ablationprojector" => {
                let level = ablation_level.unwrap_or(0);
                if level > 4 {
                    return Err(format!("has ablation_level {level}; there are 0 to 4"));
                }
                // The flags take away what the level leaves; the result is a level again, or no published one.
                let left = Kind::Ablation(level);
                let parts = (
                    left.has_scalar() && use_scalar_weights != Some(false),
                    left.has_gates() && use_gates != Some(false),
                    left.has_target() && use_target != Some(false),
                );
                let kinds = (0..=4).map(Kind::Ablation);
                kinds
                    .into_iter()
                    .find(|kind| (kind.has_scalar(), kind.has_gates(), kind.has_target()) == parts)
                    .ok_or_else(|| "has flags that no ablation level corresponds to".into())
            }
            other => Err(format!(
                "is of class `{other}`; C2CProjector, AblationProjector and AllInOneProjector are read"
            )),
        }
    }
}

/// receiver model → sharer model → receiver layer → [[sharer layer, projector], …]
type Routing = BTreeMap<String, BTreeMap<String, BTreeMap<String, Vec<(usize, usize)>>>>;

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, FuserError> {
    let text = fs::read_to_string(path).map_err(FuserError::io(path))?;
    serde_json::from_str(&text).map_err(FuserError::json(path))
}

fn read_routes(path: &Path) -> Result<Vec<Route>, FuserError> {
    let fail =
        |field: &str, problem: String| FuserError::Field { path: path.into(), field: field.into(), problem };
    let routing: Routing = read_json(path)?;
    let models = match routing.iter().collect::<Vec<_>>()[..] {
        [(receiver, models)] if receiver == "0" => models,
        _ => return Err(fail("receivers", "has another receiver than model 0".into())),
    };
    let table = match models.values().collect::<Vec<_>>()[..] {
        [table] => table,
        _ => {
            let count = models.len();
            return Err(fail("sharers", format!("lists {count}; each fuser is a folder of its own")));
        }
    };
    let mut routes = Vec::new();
    for (layer, sources) in table {
        let receiver = layer.parse().map_err(|_| fail(layer, "is no layer number".into()))?;
        let &(sharer, projector) =
            sources.first().ok_or_else(|| fail(layer, "has no source layer".into()))?;
        if sources.len() > 1 {
            log::warn!("{}: layer {layer} has several sources; only the first counts", path.display());
        }
        routes.push(Route { receiver, sharer, projector });
    }
    routes.sort_unstable_by_key(|route| route.receiver);
    Ok(routes)
}

/// Names of the models and the mapping, as far as the run's `config.json` tells.
fn read_run(folder: &Path) -> Result<(Option<String>, Option<String>, Mapping), FuserError> {
    for folder in [Some(folder), folder.parent()].into_iter().flatten() {
        let path = folder.join("config.json");
        let Some(text) = read_text(&path)? else { continue };
        let run: Value = serde_json::from_str(&text).map_err(FuserError::json(&path))?;
        let text = |field: &str| run["model"][field].as_str().map(String::from);
        let mapping = match run["model"]["mapping"].as_str() {
            Some("last_aligned") => Mapping::LastAligned,
            Some("k_nearest") => Mapping::KNearest,
            _ => Mapping::Custom,
        };
        return Ok((text("base_model"), text("teacher_model"), mapping));
    }
    Ok((None, None, Mapping::Custom))
}

/// `folder` is what [`find`] found.
pub(super) fn load(folder: &Path, backend: &Arc<dyn Backend>) -> Result<Fuser, FuserError> {
    let routes_path = folder.join(ROUTES);
    let routes = read_routes(&routes_path)?;
    let path = folder.join("projector_0.json");
    let first: AnyProjectorFile = read_json(&path)?;
    if ALL_IN_ONE.contains(&first.class.as_str()) {
        return load_all_in_one(folder, first, routes, backend);
    }
    let first: ProjectorFile = read_json(&path)?;
    let kind = first.kind().map_err(|problem| FuserError::Field {
        path: path.clone(),
        field: "class".into(),
        problem,
    })?;
    let args = first.init_args;
    let defaults = Training::default();
    let (receiver, sharer, mapping) = read_run(folder)?;
    let shape =
        |name, layers, kv_heads, head_dim| Party { name, layers, ..Party::new(0, kv_heads, head_dim) };
    let layers = routes.iter().map(|route| route.receiver.saturating_add(1)).max();
    let mut config = FuserConfig {
        version: VERSION,
        kind,
        hidden: args.hidden_dim,
        intermediate: args.intermediate_dim,
        num_layers: args.num_layers,
        dtype: DType::F32,
        mapping,
        routes,
        receiver: shape(receiver, layers, args.target_num_heads, args.target_dim),
        sharer: shape(sharer, None, args.source_num_heads, args.source_dim),
        all_in_one: None,
        fraction: None,
        rotations: None,
        training: Training {
            dropout: args.dropout.unwrap_or(defaults.dropout),
            initial_temperature: args.initial_temperature.unwrap_or(defaults.initial_temperature),
            final_temperature: args.final_temperature.unwrap_or(defaults.final_temperature),
            anneal_steps: args.anneal_steps.unwrap_or(defaults.anneal_steps),
        },
    };
    config.validate()?;
    for index in 1..config.projectors() {
        let path = folder.join(format!("projector_{index}.json"));
        let other: ProjectorFile = read_json(&path)?;
        if other.class != first.class || other.init_args != args {
            return Err(unlike(path));
        }
    }
    let projectors = load_weights(folder, &mut config, "key_in.weight", backend)?;
    Ok(Fuser::assemble(config, projectors))
}

fn unlike(path: PathBuf) -> FuserError {
    let problem = "differ from those of projector 0; a fuser's projectors are alike".into();
    FuserError::Field { path, field: "class and init_args".into(), problem }
}

fn load_all_in_one(
    folder: &Path,
    first: AnyProjectorFile,
    routes: Vec<Route>,
    backend: &Arc<dyn Backend>,
) -> Result<Fuser, FuserError> {
    let path = folder.join("projector_0.json");
    let args: all_in_one::InitArgs =
        serde_json::from_value(first.init_args.clone()).map_err(FuserError::json(&path))?;
    let (hidden, intermediate, num_layers, training, all_in_one) = args
        .config()
        .map_err(|problem| FuserError::Field { path: path.clone(), field: "init_args".into(), problem })?;
    let (receiver, sharer, mapping) = read_run(folder)?;
    let layers = routes.iter().map(|route| route.receiver.saturating_add(1)).max();
    let party = |name, layers, heads, dim| Party { name, layers, ..Party::new(0, heads, dim) };
    let mut config = FuserConfig {
        num_layers,
        routes,
        training,
        all_in_one: Some(all_in_one),
        ..FuserConfig::new(
            Kind::AllInOne,
            hidden,
            intermediate,
            mapping,
            &[],
            party(receiver, layers, args.target_num_heads, args.target_dim),
            party(sharer, None, args.source_num_heads, args.source_dim),
        )
    };
    config.validate()?;
    for index in 1..config.projectors() {
        let path = folder.join(format!("projector_{index}.json"));
        if read_json::<AnyProjectorFile>(&path)? != first {
            return Err(unlike(path));
        }
    }
    let projectors = load_weights(folder, &mut config, "gate_temperature", backend)?;
    Ok(Fuser::assemble(config, projectors))
}

/// The weights, and into `config` what dtype they have, which is parameter `typical`'s.
fn load_weights(
    folder: &Path,
    config: &mut FuserConfig,
    typical: &str,
    backend: &Arc<dyn Backend>,
) -> Result<Vec<LayerProjector>, FuserError> {
    let beside = [Some(folder), folder.parent()].into_iter().flatten().map(|folder| folder.join(WEIGHTS));
    let count = config.projectors();
    let set_dtype = |config: &mut FuserConfig, state: &StateDict, name: &str| {
        if let Some(entry) = state.entries.get(name) {
            config.dtype = entry.dtype;
        }
    };
    let safetensors = beside.into_iter().find(|path| path.is_file());
    if let Some(path) = safetensors {
        let (mut state, _) = read_safetensors(&path)?;
        set_dtype(config, &state, &format!("projector_0.{typical}"));
        let all = (0..count).map(|index| parameters::take(config, &mut state, &prefix(index), backend));
        let projectors = all.collect::<Result<_, _>>()?;
        refuse_extra(&state)?;
        return Ok(projectors);
    }
    let mut projectors = Vec::new();
    for index in 0..count {
        let path = folder.join(format!("projector_{index}.pt"));
        let file = map_file(&path).map_err(FuserError::io(&path))?;
        let entries =
            read_state_dict(&file).map_err(|source| FuserError::Pickle { path: path.clone(), source })?;
        let mut state = StateDict { path, entries };
        if index == 0 {
            set_dtype(config, &state, typical);
        }
        projectors.push(parameters::take(config, &mut state, "", backend)?);
        refuse_extra(&state)?;
    }
    Ok(projectors)
}

fn all_in_one_args(config: &FuserConfig) -> Option<all_in_one::InitArgs> {
    (config.kind == Kind::AllInOne).then(|| all_in_one::InitArgs::of(config))
}

/// Writes `final/projector_{i}.json`, `final/projector_config.json`, `config.json` and `projectors.safetensors` into
/// the folder `path`.
pub(super) fn save(fuser: &Fuser, path: &Path, queue: &Queue) -> Result<(), FuserError> {
    let config = fuser.config();
    let class = match config.kind {
        Kind::C2c => "C2CProjector",
        Kind::Ablation(_) => "AblationProjector",
        Kind::AllInOne => ALL_IN_ONE[0],
        kind @ (Kind::C2cC | Kind::Latent | Kind::Ridge) => {
            let problem = format!("is {kind}, which the published layout has no class for");
            return Err(FuserError::Config { field: "kind", problem });
        }
    };
    let dtype = match config.dtype {
        DType::Bf16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    };
    let Training { dropout, initial_temperature, final_temperature, anneal_steps } = config.training;
    let mut init_args = json!(all_in_one_args(config));
    if config.kind != Kind::AllInOne {
        init_args = json!(InitArgs {
            source_dim: config.sharer.head_dim,
            target_dim: config.receiver.head_dim,
            source_num_heads: config.sharer.kv_heads,
            target_num_heads: config.receiver.kv_heads,
            hidden_dim: config.hidden,
            intermediate_dim: config.intermediate,
            num_layers: config.num_layers,
            dropout: Some(dropout),
            initial_temperature: Some(initial_temperature),
            final_temperature: Some(final_temperature),
            anneal_steps: Some(anneal_steps),
            dtype: Some(json!({"__type__": "torch.dtype", "value": dtype})),
            zero_init: None,
            ablation_level: match config.kind {
                Kind::Ablation(level) => Some(level),
                _ => None,
            },
            use_scalar_weights: None,
            use_gates: None,
            use_target: None,
        });
    }
    let projector = json!({"class": class, "init_args": init_args});
    let mapping = match config.mapping {
        Mapping::LastAligned => "last_aligned",
        Mapping::KNearest => "k_nearest",
        Mapping::Custom => "custom",
    };
    let run = json!({"model": {
        "base_model": config.receiver.name,
        "teacher_model": config.sharer.name,
        "projector": {"type": class},
        "mapping": mapping,
    }});
    let table: serde_json::Map<String, Value> = config
        .routes
        .iter()
        .map(|route| (route.receiver.to_string(), json!([[route.sharer, route.projector]])))
        .collect();

    let last = path.join("final");
    fs::create_dir_all(&last).map_err(FuserError::io(&last))?;
    write_safetensors(&path.join(WEIGHTS), &[("format", "pt")], &outgoing(fuser, queue))?;
    let text = |value| serde_json::to_string_pretty(&value).map_err(FuserError::json(path));
    write_text(&path.join("config.json"), &text(run)?)?;
    write_text(&last.join(ROUTES), &json!({"0": {"1": table}}).to_string())?;
    let projector = text(projector)?;
    for index in 0..config.projectors() {
        write_text(&last.join(format!("projector_{index}.json")), &projector)?;
    }
    Ok(())
}
