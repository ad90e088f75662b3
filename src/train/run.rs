//! A training run from its configuration to its report.

use super::{
    Batches, Error, Ranks, Recompute, Sample, TrainConfig, Trainee, TrainingPass,
    checkpoint::{self, Position, State},
    config::DataSettings,
    events::{Evaluation, Record, RunLog, Update},
    exam::{Exam, Score},
    report::{AccuracyRow, GateStrength, Report},
};
use crate::{
    backend::{self, Backend, Queue},
    builtin,
    data::{Dataset, Example, PromptStyle, Source, split},
    durable::WriteError,
    ops::Scratch,
    pipeline::Model,
};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

/// Checkpoints that are kept.
const CHECKPOINTS: usize = 2;

/// Who follows a run.
pub trait Watcher {
    /// Something to read, such as the plan; may have several lines.
    fn say(&self, text: &str);
    fn loading(&self, _path: &Path, _done: u64, _total: u64) {}
    /// An update of `total`.
    fn update(&self, _update: &Update, _total: u64) {}
}

/// Of the processes of a run that another one speaks for.
struct Silent;

impl Watcher for Silent {
    fn say(&self, _: &str) {}
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub step: u64,
    pub total: u64,
    /// `finished`, `stopped early` or `interrupted`.
    pub reason: &'static str,
    pub scores: Vec<Score>,
    /// What was trained, ready to use; not there after an interruption.
    pub result: Option<PathBuf>,
    pub report: Option<PathBuf>,
}

struct Data {
    samples: Vec<Sample>,
    held_out: Vec<Sample>,
    exam: Exam,
    sha256: Vec<Value>,
}

/// Starts a run, or with `resume` (a checkpoint, or the folder of a run) goes on with one: then the configuration is the
/// checkpoint's. `stop`: finish the update, save, end.
pub fn run(
    config: TrainConfig,
    resume: Option<&Path>,
    watcher: &dyn Watcher,
    stop: &AtomicBool,
) -> Result<Outcome, Error> {
    let state = resume.map(State::open).transpose()?;
    let config = state.as_ref().map_or(config, |state| state.position.config.clone());
    let mut ranks = Ranks::from_environment(&config, state.as_ref().map_or(0, |state| state.position.step))?;
    let watcher = if ranks.leads() { watcher } else { &Silent };
    let backend = backend::open(ranks.device(config.device), config.threads)?;
    if backend.training().is_none() {
        return Err(Error::NoTraining { device: backend.description() });
    }
    let queue = Queue::new(&backend)?;
    ranks.join_devices(&queue)?;
    let mut trainee = Trainee::open(&config, &backend, &queue, watcher)?;
    let data = Data::load(&config, &trainee, watcher)?;
    let mut batches = Batches::new(&config, &data.samples);
    let per_epoch = batches.per_epoch();
    let total = match trainee.is_solved() {
        true => 0,
        false => config.length.steps.unwrap_or_else(|| config.length.epochs.unwrap_or(1) * per_epoch),
    };
    let manifest = manifest(&config, &trainee, &data);
    let mut position = match &state {
        Some(state) => {
            if state.position.manifest["data"] != manifest["data"] {
                return Err(Error::OtherData);
            }
            trainee.restore(state, &queue)?;
            state.position.clone()
        }
        None => Position::new(config.clone(), manifest.clone()),
    };
    watcher.say(&plan(&config, &trainee, &data, &batches, total, &backend)?);
    if config.fuser.standardize {
        let fresh = state.is_none() && config.fuser.checkpoints.is_empty();
        trainee.standardize(&data.samples, &batches, &queue, fresh)?;
    }
    let out = config.out.clone();
    // What a run leaves is written by one process.
    let mut log = None;
    if ranks.leads() {
        fs::create_dir_all(&out).map_err(WriteError::at(&out))?;
        log = Some(match &state {
            Some(state) => RunLog::resume(&out, state.position.step)?,
            None => RunLog::create(&out)?,
        });
    }
    let mut note = |record: Record| log.as_mut().map_or(Ok(()), |log| log.add(&record));
    note(Record::Start { step: position.step, manifest: manifest.clone() })?;
    let mut scores = Vec::new();
    if position.step == 0 && !data.exam.questions.is_empty() && ranks.leads() {
        scores = trainee.before(&data.exam, &queue, config.baselines)?;
        say_scores(watcher, "before training", &scores);
    }

    let (started, spent_before) = (Instant::now(), position.seconds);
    let rate = config.learning_rate(total);
    let annealing = config.annealing(total);
    let mut reason = "finished";
    if trainee.is_solved() {
        watcher.say(&trainee.solve(&data.samples, &batches, &config, &queue)?);
    }
    while position.step < total {
        let step = position.step;
        trainee.set_temperature(annealing.after(step));
        let update_start = Instant::now();
        let (mut loss, mut tokens, mut layer) = (0.0, 0.0, None);
        let update = batches.update(&data.samples, step);
        for (number, batch) in ranks.share(update) {
            let samples: Vec<&Sample> = batch.iter().map(|&index| &data.samples[index as usize]).collect();
            let key = step as u32 * config.batch.accumulate as u32 + number as u32;
            // A last window that is not full is still divided by the full count, as published.
            let scale = 1.0 / config.batch.accumulate as f32;
            let report = trainee.learn(&samples, &config, key, scale)?;
            loss += report.loss / update.len() as f64;
            tokens += (report.receiver_tokens + report.sharer_tokens) as f64;
            if !report.loss.is_finite() {
                layer = trainee.first_bad_layer(&queue)?;
                break;
            }
        }
        let mut sums = [loss, tokens];
        ranks.sum(&mut sums)?;
        let [loss, tokens] = sums;
        if loss.is_finite() {
            trainee.sum_gradients(&queue, &mut ranks)?;
        }
        let norm = if loss.is_finite() { trainee.grad_norm(&queue)? } else { f64::NAN };
        if !norm.is_finite() {
            let saved = match ranks.leads() {
                true => save(&mut position, &trainee, &queue, &out, started, spent_before)?,
                false => checkpoint::folder(&out, step),
            };
            note(Record::End { step, reason: "loss or gradient is not a number".into() })?;
            return Err(Error::NotFinite { step: step + 1, layer, saved });
        }
        let learning_rate = rate.at(step);
        trainee.update(&queue, &config, step + 1, learning_rate as f32, norm)?;
        position.step += 1;
        let seconds = update_start.elapsed().as_secs_f64();
        let record = Update {
            step: position.step,
            epoch: position.step as f64 / per_epoch as f64,
            loss,
            learning_rate,
            gradient_norm: norm,
            temperature: trainee.is_fuser().then(|| f64::from(annealing.after(step))),
            gates_open: trainee.gates_open(),
            tokens: tokens as u64,
            tokens_per_second: tokens / seconds.max(1e-9),
            seconds: spent_before + started.elapsed().as_secs_f64(),
        };
        note(Record::Update(record.clone()))?;
        watcher.update(&record, total);
        let ended = position.step == total;
        let mut early = false;
        let measured = !data.held_out.is_empty() && (ended || due(position.step, config.eval_every));
        if measured && ranks.leads() {
            let loss = trainee.measure(&data.held_out, &batches)?;
            let accuracy = match ended {
                // The accuracy at the end has a table of its own.
                true => None,
                false => trainee.quick_accuracy(&data.exam, &queue)?,
            };
            let seconds = spent_before + started.elapsed().as_secs_f64();
            note(Record::Evaluation(Evaluation { step: position.step, loss, accuracy, seconds }))?;
            let accuracy =
                accuracy.map_or(String::new(), |accuracy| format!(", accuracy {:.1} %", 100.0 * accuracy));
            watcher.say(&format!("update {}: held-out loss {loss:.4}{accuracy}", position.step));
            if position.best_loss.is_none_or(|best| loss < best) {
                (position.best_loss, position.since_best) = (Some(loss), 0);
            } else {
                position.since_best += 1;
            }
            early = !ended && config.early_stop.is_some_and(|patience| position.since_best >= patience);
        }
        early = ranks.any(early)?;
        let interrupted = ranks.any(stop.load(Ordering::Relaxed) && !ended)?;
        let saves = ended || early || interrupted || due(position.step, config.save_every);
        if saves && ranks.leads() {
            let path = save(&mut position, &trainee, &queue, &out, started, spent_before)?;
            note(Record::Checkpoint { step: position.step, path })?;
        }
        if early || interrupted {
            reason = if early { "stopped early" } else { "interrupted" };
            break;
        }
    }
    note(Record::End { step: position.step, reason: reason.into() })?;
    let mut outcome = Outcome { step: position.step, total, reason, scores, result: None, report: None };
    if reason == "interrupted" || !ranks.leads() {
        return Ok(outcome);
    }
    let result = out.join("final");
    trainee.export(&result, &config, &queue, total)?;
    outcome.result = Some(result);
    if !data.exam.questions.is_empty() {
        let after = trainee.after(&data.exam, &queue, config.seed)?;
        say_scores(watcher, "after training", &after);
        outcome.scores.extend(after);
    }
    outcome.report = Some(report(&out, &trainee, &outcome, &position)?);
    Ok(outcome)
}

fn due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

fn say_scores(watcher: &dyn Watcher, when: &str, scores: &[Score]) {
    let mut text = format!("accuracy on held-out questions, {when}:");
    for score in scores {
        text += &format!(
            "\n  {:<12} {:5.1} %  ({} of {}, {:.1} ms an answer)",
            score.mode,
            100.0 * score.accuracy(),
            score.correct,
            score.questions,
            score.ms
        );
    }
    watcher.say(&text);
}

/// Saves the state and what can be used already; old checkpoints go.
fn save(
    position: &mut Position,
    trainee: &Trainee,
    queue: &Queue,
    out: &Path,
    started: Instant,
    before: f64,
) -> Result<PathBuf, Error> {
    position.seconds = before + started.elapsed().as_secs_f64();
    let folder = checkpoint::folder(out, position.step);
    fs::create_dir_all(&folder).map_err(WriteError::at(&folder))?;
    checkpoint::save(&folder, position, &trainee.trained(), queue)?;
    let mut old = checkpoint::all(out);
    old.truncate(old.len().saturating_sub(CHECKPOINTS));
    for (_, path) in old {
        // Not worth ending the run for; it is said, and the next save tries again.
        if let Err(error) = fs::remove_dir_all(&path) {
            log::warn!("{}: an old checkpoint cannot be removed: {error}", path.display());
        }
    }
    Ok(folder)
}

impl Data {
    fn load(config: &TrainConfig, trainee: &Trainee, watcher: &dyn Watcher) -> Result<Data, Error> {
        let mut sha256 = Vec::new();
        let mut read = |settings: &[DataSettings]| -> Result<Vec<(Example, PromptStyle)>, Error> {
            let mut all = Vec::new();
            for one in settings {
                let source = Source { path: builtin::resolve(&one.path), ..Source::from(one) };
                let set = Dataset::load(&source)?;
                if !set.rejected.is_empty() {
                    watcher.say(&format!("{}: {}", one.path.display(), set.rejected));
                }
                sha256
                    .push(json!({ "path": one.path, "sha256": set.sha256, "examples": set.examples.len() }));
                all.extend(set.examples.into_iter().map(|example| (example, one.prompt)));
            }
            Ok(all)
        };
        let (examples, mut held_out) = (read(&config.data)?, read(&config.held_out)?);
        let (kept, split_off) = split::split(examples.len() as u32, config.train_ratio, config.seed);
        held_out.extend(split_off.into_iter().map(|index| examples[index as usize].clone()));
        let mut skipped = 0;
        let mut tokenised = |examples: &mut dyn Iterator<Item = &Example>| -> Result<Vec<Sample>, Error> {
            let mut samples = Vec::new();
            for example in examples {
                match trainee.sample(example, config)? {
                    Some(sample) => samples.push(sample),
                    None => skipped += 1,
                }
            }
            Ok(samples)
        };
        let samples = tokenised(&mut kept.iter().map(|&index| &examples[index as usize].0))?;
        let held_out_samples = tokenised(&mut held_out.iter().map(|(example, _)| example))?;
        if skipped > 0 {
            watcher.say(&format!(
                "{skipped} samples are longer than {} tokens: left out",
                config.length.max_length
            ));
        }
        if samples.is_empty() {
            return Err(Error::NoSamples);
        }
        let mut exam = Exam::new(held_out.iter().map(|(example, style)| (example, *style)));
        if let Err(error) = trainee.tokenizers().try_for_each(|tokenizer| exam.letters(tokenizer).map(|_| ()))
        {
            watcher.say(&format!("accuracy is not measured: {error}"));
            exam.questions.clear();
        }
        Ok(Data { samples, held_out: held_out_samples, exam, sha256 })
    }
}

fn manifest(config: &TrainConfig, trainee: &Trainee, data: &Data) -> Value {
    let models = match trainee {
        Trainee::Fuser { receiver, sharers, .. } => {
            let party = |model: &Model| serde_json::to_value(model.party()).unwrap_or_default();
            json!({ "receiver": party(receiver), "sharers": sharers.iter().map(party).collect::<Vec<_>>() })
        }
        Trainee::Model { .. } => json!({ "model": config.receiver }),
    };
    json!({
        "program": concat!("c2c ", env!("CARGO_PKG_VERSION")),
        "config": config,
        "seed": config.seed,
        "data": data.sha256,
        "models": models,
    })
}

/// What the run will take, before anything is trained.
fn plan(
    config: &TrainConfig,
    trainee: &Trainee,
    data: &Data,
    batches: &Batches,
    total: u64,
    backend: &Arc<dyn Backend>,
) -> Result<String, Error> {
    let tokens: usize = data.samples.iter().map(Sample::tokens).sum();
    let labels: usize = data.samples.iter().map(Sample::labelled).sum();
    let largest = batches.largest(&data.samples);
    let per_update = tokens as f64 / batches.per_epoch() as f64;
    let recompute = if config.recompute == 0 { Recompute::None } else { Recompute::Layers };
    let (trained, what, pass, fuser) = match trainee {
        Trainee::Fuser { pair, .. } => {
            let count = pair.fusers.iter().map(|fuser| fuser.parameters.count()).sum::<usize>();
            let c = &pair.receiver.config;
            let kept: usize = pair
                .fusers
                .iter()
                .map(|fuser| {
                    let need = |scratch: fn(_) -> Scratch, layers| {
                        backend.scratch_len(scratch(fuser.fuser.extent(layers, largest)))
                    };
                    4 * (c.layers * need(Scratch::FuseSaved, 1) + need(Scratch::FuseBackward, c.layers))
                })
                .sum();
            let answers = labels / data.samples.len().max(1) + 8;
            let answers = answers * largest / (tokens / data.samples.len().max(1)).max(1);
            (count, "of the fuser", TrainingPass::bytes(c, answers, answers, recompute), kept)
        }
        Trainee::Model { trainer, .. } => {
            let pass = TrainingPass::bytes(&trainer.decoder.config, largest, largest, recompute);
            let what = if trainer.lora().is_some() { "of adapters" } else { "of the model" };
            let adapters = trainer.lora().map_or(0, |lora| lora.bytes(largest));
            (trainer.parameters.count(), what, pass, adapters)
        }
    };
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    let state = trained * super::Parameters::BYTES;
    let kept = match trainee {
        Trainee::Fuser { pair, .. } if !pair.stores.is_empty() || pair.receiver_store.is_some() => {
            let (there, missing, bytes) = pair.kept(data.samples.iter().chain(&data.held_out))?;
            format!(
                "\n      caches of prompts on disk: {there}; to be computed once: {missing}, {:.0} MiB",
                mib(bytes)
            )
        }
        _ => String::new(),
    };
    Ok(format!(
        "plan: {trained} parameters {what}, {:.0} MiB with gradients and moments\n      activations about {:.0} MiB\n      \
         {} samples of {:.0} tokens on average, {:.0} learned from; {} held out\n      {total} updates of about {per_update:.0} tokens on {}{kept}",
        mib(state),
        mib(pass + fuser),
        data.samples.len(),
        tokens as f64 / data.samples.len() as f64,
        labels as f64 / data.samples.len() as f64,
        data.held_out.len(),
        backend.description(),
    ))
}

fn report(out: &Path, trainee: &Trainee, outcome: &Outcome, position: &Position) -> Result<PathBuf, Error> {
    let (mut updates, mut evaluations) = (Vec::new(), Vec::new());
    for record in super::events::read(out)? {
        match record {
            Record::Update(update) => updates.push(update),
            Record::Evaluation(evaluation) => evaluations.push(evaluation),
            _ => {}
        }
    }
    let gates = match trainee {
        Trainee::Fuser { pair, .. } => {
            let fuser = &pair.fusers[0];
            let layers = 0..pair.receiver.config.layers;
            let strength = |layer| match fuser.fuser.route(layer) {
                Some(route) => {
                    let [key, value] = fuser.gates[route.projector];
                    GateStrength { key_logit: key.logit, value_logit: value.logit }
                }
                None => GateStrength::default(),
            };
            layers.map(strength).collect()
        }
        Trainee::Model { .. } => Vec::new(),
    };
    let accuracy = outcome.scores.iter().map(|score| AccuracyRow {
        mode: score.mode.clone(),
        data: "held out".into(),
        correct: score.correct as u64,
        asked: score.questions as u64,
        milliseconds_an_answer: Some(score.ms),
    });
    let report = Report {
        title: format!("Training run, {}", outcome.reason),
        updates,
        evaluations,
        gates,
        accuracy: accuracy.collect(),
        manifest: position.manifest.clone(),
    };
    Ok(report.write(out)?)
}
