//! What came out: lm-eval's `results_*.json` for each mode, and one summary of all modes.

use super::{
    Error, Method, Mode, Options, PromptTemplate, Task,
    items::Excluded,
    router::Router,
    run::{folder_of, write_text},
    samples::{Sample, sha256},
    statistics::{mcnemar, paired_bootstrap, wilson},
};
use crate::durable::WriteError;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

/// What every run leaves in its folder, and reports are made from.
pub const SUMMARY: &str = "summary.json";
const MANIFEST: &str = "run.json";

/// What a folder of results was begun with: runs that go on must ask the same.
pub struct Manifest {
    out: PathBuf,
    /// Names files, as in lm-eval.
    pub started: String,
    pub asked: Value,
}

impl Manifest {
    /// Reads the folder's, or begins one.
    ///
    /// # Errors
    /// If the folder holds answers to something else. More modes, tasks or questions are no contradiction.
    pub fn open(options: &Options, data: &[String]) -> Result<Manifest, Error> {
        let out = options.out.clone();
        fs::create_dir_all(&out).map_err(WriteError::at(&out))?;
        let session = &options.session;
        let fusers: Vec<String> = session.fusers.iter().map(|fuser| format!("{fuser:?}")).collect();
        let paths = session.receiver.iter().chain(&session.sharers).map(PathBuf::as_path);
        let fuser_paths = session.fusers.iter().filter_map(|fuser| match fuser {
            crate::pipeline::FuserChoice::Load(path) => Some(path.as_path()),
            crate::pipeline::FuserChoice::Init { .. } => None,
        });
        let stamps: Vec<String> = paths.chain(fuser_paths).map(stamp).collect();
        let tasks = options.tasks.iter().zip(data);
        let tasks: Map<String, Value> = tasks
            .map(|(task, sha256)| (task.name.clone(), json!({ "definition": task, "sha256": sha256 })))
            .collect();
        let mut asked = json!({
            "program": concat!("c2c ", env!("CARGO_PKG_VERSION")),
            "receiver": session.receiver,
            "sharers": session.sharers,
            "fusers": fusers,
            "identical_fuser": options.identical_fuser.as_ref().map(|fuser| format!("{fuser:?}")),
            "files": stamps,
            "multi_sharer": session.multi_sharer.to_string(),
            "alignment": session.alignment.to_string(),
            "gates": format!("{:?}", session.gates),
            "dtype": session.dtype,
            "device": format!("{:?}", session.device),
            "method": options.method,
            "prompt": options.prompt,
            "chain_of_thought": options.chain_of_thought,
            "few_shot": options.few_shot,
            "response": options.response,
            "max_new_tokens": options.max_new_tokens,
            "background_tokens": options.background_tokens,
            "context_tokens": options.context_tokens,
            "router_questions": options.router_questions,
            "seed": options.seed,
        });
        let path = out.join(MANIFEST);
        let mut started = chrono::Local::now().format("%Y-%m-%dT%H-%M-%S%.6f").to_string();
        let mut all_tasks = tasks.clone();
        if path.exists() {
            let text = fs::read_to_string(&path).map_err(Error::read(&path))?;
            let old: Value = serde_json::from_str(&text).map_err(|error| Error::Definition {
                place: path.display().to_string(),
                problem: error.to_string(),
            })?;
            let differs = |field: &str| Error::OtherRun { out: out.clone(), field: field.into() };
            for (field, value) in asked.as_object().cloned().iter().flatten() {
                // A mode that is asked later may bring its fuser.
                let later = field == "identical_fuser" && (value.is_null() || old["asked"][field].is_null());
                if old["asked"][field] != *value && !later {
                    return Err(differs(field));
                }
            }
            if asked["identical_fuser"].is_null() {
                asked["identical_fuser"] = old["asked"]["identical_fuser"].clone();
            }
            for (name, old) in old["asked"]["tasks"].as_object().into_iter().flatten() {
                match tasks.get(name) {
                    Some(task) if task != old => return Err(differs(&format!("task {name}"))),
                    _ => drop(all_tasks.insert(name.clone(), old.clone())),
                }
            }
            started = old["started"].as_str().unwrap_or(&started).to_owned();
        }
        asked["tasks"] = all_tasks.into();
        write_text(&path, &format!("{:#}\n", json!({ "started": started, "asked": asked })))?;
        Ok(Manifest { out, started, asked })
    }

    /// The file of a mode's answers to a task.
    pub fn samples(&self, folder: &Path, task: &str) -> PathBuf {
        folder.join(format!("samples_{}_{}.jsonl", file_name(task), self.started))
    }

    fn router_file(&self, task: &str) -> PathBuf {
        self.out.join(format!("router_{}.json", file_name(task)))
    }

    /// The router of an earlier run.
    pub fn router(&self, task: &str) -> Option<Router> {
        let text = fs::read_to_string(self.router_file(task)).ok()?;
        serde_json::from_str(&text).ok()
    }

    pub fn keep_router(&self, task: &str, router: &Router) -> Result<(), Error> {
        Ok(write_text(&self.router_file(task), &format!("{:#}\n", json!(router)))?)
    }
}

/// A task as file names spell it.
pub(crate) fn file_name(task: &str) -> String {
    task.replace(|c: char| !c.is_alphanumeric() && !matches!(c, '_' | '-' | '.'), "_")
}

/// Lengths and times of a model's files: that another one lies there now is noticed without reading it.
fn stamp(path: &Path) -> String {
    let mut files = vec![path.to_path_buf()];
    if let Ok(entries) = fs::read_dir(path) {
        files = entries.flatten().map(|entry| entry.path()).collect();
        files.sort();
    }
    let of = |file: &PathBuf| {
        let Ok(metadata) = fs::metadata(file) else { return "missing".to_owned() };
        let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        format!("{}:{}", metadata.len(), modified.map_or(0, |time| time.as_secs()))
    };
    sha256(&files.iter().map(of).collect::<Vec<_>>().join(" "))
}

/// One task, answered in all modes.
pub struct TaskRun {
    pub task: Task,
    pub method: Method,
    pub prompt: PromptTemplate,
    pub response: String,
    pub excluded: Vec<Excluded>,
    pub router: Option<Router>,
    /// By mode.
    pub samples: Vec<Vec<Sample>>,
}

/// Means over questions. `None`: not known of a single one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MeanCost {
    pub sharer_ms: Option<f64>,
    pub receiver_ms: f64,
    pub fuse_ms: f64,
    pub bytes: f64,
    pub first_token_ms: Option<f64>,
    pub total_ms: Option<f64>,
    pub tokens: f64,
}

/// A mode beside the Receiver, question by question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Versus {
    /// Of accuracies, with its 95 % interval (paired bootstrap).
    pub difference: f64,
    pub low: f64,
    pub high: f64,
    /// Questions that this mode alone, or the Receiver alone, has right.
    pub better: u64,
    pub worse: u64,
    /// McNemar's exact test.
    pub p: f64,
}

/// A mode on a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub task: String,
    pub mode: String,
    pub control: bool,
    pub method: Method,
    pub correct: u64,
    pub asked: u64,
    /// Wilson's 95 % interval of the accuracy.
    pub low: f64,
    pub high: f64,
    pub versus: Option<Versus>,
    /// The part of the gap between Receiver and Sharer that is closed; where there is one.
    pub gap_recovered: Option<f64>,
    pub cost: MeanCost,
    /// Right and asked.
    pub subjects: BTreeMap<String, [u64; 2]>,
    /// Questions that the router gave to the Sharer.
    pub routed: Option<u64>,
    pub router: Option<Router>,
}

impl Row {
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.asked.max(1) as f64
    }
}

/// An evaluation's results.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Summary {
    pub title: String,
    pub started: String,
    /// Of the last call.
    pub seconds: f64,
    pub device: String,
    pub asked: Value,
    pub models: Value,
    pub rows: Vec<Row>,
    pub excluded: BTreeMap<String, Vec<Excluded>>,
    /// For [`Summary::write`].
    #[serde(skip)]
    files: Vec<(PathBuf, Value)>,
}

/// The seed of bootstraps.
const SEED: u64 = 0;

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0u64), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / count as f64)
}

fn costs(samples: &[Sample]) -> MeanCost {
    let all = |of: fn(&Sample) -> f64| mean(samples.iter().map(of)).unwrap_or_default();
    let known = |of: fn(&Sample) -> Option<f64>| mean(samples.iter().filter_map(of));
    MeanCost {
        sharer_ms: known(|sample| sample.cost.sharer_ms),
        receiver_ms: all(|sample| sample.cost.receiver_ms),
        fuse_ms: all(|sample| sample.cost.fuse_ms),
        bytes: all(|sample| sample.cost.bytes as f64),
        first_token_ms: known(|sample| sample.cost.first_token_ms),
        total_ms: known(|sample| sample.cost.total_ms),
        tokens: all(|sample| sample.cost.tokens as f64),
    }
}

fn versus(samples: &[Sample], receiver: &[Sample]) -> Versus {
    // Both are sorted by question and hold the same ones.
    let differences: Vec<i8> = samples
        .iter()
        .zip(receiver)
        .map(|(own, receiver)| i8::from(own.correct()) - i8::from(receiver.correct()))
        .collect();
    let count = |wanted: i8| differences.iter().filter(|&&difference| difference == wanted).count() as u64;
    let (better, worse) = (count(1), count(-1));
    let (low, high) = paired_bootstrap(&differences, SEED);
    let difference = (better as f64 - worse as f64) / differences.len().max(1) as f64;
    Versus { difference, low, high, better, worse, p: mcnemar(better, worse) }
}

impl Summary {
    pub(super) fn new(
        options: &Options,
        manifest: &Manifest,
        device: &str,
        models: &Value,
        runs: Vec<TaskRun>,
        seconds: f64,
    ) -> Summary {
        let mut summary = Summary {
            title: options.title.clone(),
            started: manifest.started.clone(),
            seconds,
            device: device.into(),
            asked: manifest.asked.clone(),
            models: models.clone(),
            rows: Vec::new(),
            excluded: BTreeMap::new(),
            files: Vec::new(),
        };
        let at = |wanted: Mode| options.modes.iter().position(|mode| *mode == wanted);
        for run in &runs {
            summary.excluded.insert(run.task.name.clone(), run.excluded.clone());
            let receiver = at(Mode::Receiver).map(|at| &run.samples[at]);
            let rate =
                |mode: Mode| at(mode).and_then(|at| mean(run.samples[at].iter().map(|sample| sample.acc)));
            let gap = rate(Mode::Receiver)
                .zip(rate(Mode::Sharer(0)))
                .filter(|(receiver, sharer)| sharer > receiver);
            for (mode, samples) in options.modes.iter().zip(&run.samples) {
                let correct = samples.iter().filter(|sample| sample.correct()).count() as u64;
                let asked = samples.len() as u64;
                let (low, high) = wilson(correct, asked);
                let mut subjects: BTreeMap<String, [u64; 2]> = BTreeMap::new();
                for sample in samples {
                    let counts = subjects.entry(sample.subject.clone().unwrap_or_default()).or_default();
                    counts[0] += u64::from(sample.correct());
                    counts[1] += 1;
                }
                let accuracy = correct as f64 / asked.max(1) as f64;
                let is_router = *mode == Mode::Router;
                let to_sharer = |sample: &&Sample| sample.note.as_deref() == Some("sharer");
                summary.rows.push(Row {
                    task: run.task.name.clone(),
                    mode: mode.to_string(),
                    control: mode.is_control(),
                    method: run.method,
                    correct,
                    asked,
                    low,
                    high,
                    versus: receiver
                        .filter(|_| *mode != Mode::Receiver)
                        .map(|receiver| versus(samples, receiver)),
                    gap_recovered: gap
                        .filter(|_| !matches!(mode, Mode::Receiver | Mode::Sharer(_)))
                        .map(|(receiver, sharer)| (accuracy - receiver) / (sharer - receiver)),
                    cost: costs(samples),
                    subjects,
                    routed: is_router.then(|| samples.iter().filter(to_sharer).count() as u64),
                    router: run.router.clone().filter(|_| is_router),
                });
            }
        }
        for (index, mode) in options.modes.iter().enumerate() {
            let path = PathBuf::from(folder_of(mode)).join(format!("results_{}.json", manifest.started));
            let value = summary.lm_eval(options, mode, &runs, index);
            summary.files.push((path, value));
        }
        summary
    }

    /// The results of one mode in lm-eval's shape; what it has no place for lies under `c2c`.
    fn lm_eval(&self, options: &Options, mode: &Mode, runs: &[TaskRun], index: usize) -> Value {
        let mut results = Map::new();
        let (mut configs, mut versions, mut shots, mut higher, mut counts, mut hashes, mut own) =
            (Map::new(), Map::new(), Map::new(), Map::new(), Map::new(), Map::new(), Map::new());
        for run in runs {
            let (name, samples) = (run.task.name.clone(), &run.samples[index]);
            let row = self.rows.iter().find(|row| row.task == name && row.mode == mode.to_string());
            let Some(row) = row else { continue };
            let (accuracy, n) = (row.accuracy(), samples.len());
            let stderr = (accuracy * (1.0 - accuracy) / (n.max(2) - 1) as f64).sqrt();
            results.insert(
                name.clone(),
                json!({ "alias": name, "sample_len": n, "acc,none": accuracy, "acc_stderr,none": stderr }),
            );
            configs.insert(
                name.clone(),
                json!({
                    "task": name,
                    "description": run.task.description,
                    "dataset_path": run.task.file,
                    "doc_to_text": run.prompt,
                    "output_type": if run.method == Method::Logits { "multiple_choice" } else { "generate_until" },
                    "response_prefix": run.response,
                    "num_fewshot": options.few_shot,
                    "metric_list": [{ "metric": "acc", "aggregation": "mean", "higher_is_better": true }],
                    "metadata": run.task,
                }),
            );
            versions.insert(name.clone(), json!(1));
            shots.insert(name.clone(), json!(options.few_shot));
            higher.insert(name.clone(), json!({ "acc": true }));
            let original = n + run.excluded.len();
            counts.insert(name.clone(), json!({ "original": original, "effective": n }));
            let all: String =
                samples.iter().map(|s| [&s.doc_hash[..], &s.prompt_hash, &s.target_hash].concat()).collect();
            hashes.insert(name.clone(), json!(sha256(&all)));
            own.insert(name, json!({ "row": row, "excluded": run.excluded }));
        }
        let template = self.models["chat_template"].as_str();
        json!({
            "results": results,
            "group_subtasks": {},
            "configs": configs,
            "versions": versions,
            "n-shot": shots,
            "higher_is_better": higher,
            "n-samples": counts,
            "config": {
                "model": "c2c",
                "model_args": self.asked,
                "batch_size": 1,
                "device": self.device,
                "limit": options.limit,
                "random_seed": options.seed,
            },
            "date": self.started,
            "task_hashes": hashes,
            "model_source": "c2c",
            "model_name": mode.to_string(),
            "model_name_sanitized": folder_of(mode),
            "system_instruction": null,
            "system_instruction_sha": null,
            "fewshot_as_multiturn": options.few_shot > 0,
            "chat_template": template,
            "chat_template_sha": template.map(sha256),
            "total_evaluation_time_seconds": self.seconds.to_string(),
            "c2c": { "tasks": own, "models": self.models },
        })
    }

    /// Writes `summary.json`, and each mode's `results_*.json` beside its samples.
    pub fn write(&self, out: &Path) -> Result<(), Error> {
        for (path, value) in &self.files {
            write_text(&out.join(path), &format!("{value:#}\n"))?;
        }
        let text = format!("{:#}\n", serde_json::to_value(self).unwrap_or_default());
        Ok(write_text(&out.join(SUMMARY), &text)?)
    }

    /// The summary that a run left in a folder.
    pub fn read(folder: &Path) -> Result<Summary, Error> {
        let path = folder.join(SUMMARY);
        if !path.exists() {
            return Err(Error::NoSummary { path: folder.into() });
        }
        let text = fs::read_to_string(&path).map_err(Error::read(&path))?;
        serde_json::from_str(&text).map_err(|error| Error::Definition {
            place: path.display().to_string(),
            problem: error.to_string(),
        })
    }
}
