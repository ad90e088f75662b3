//! A training run from its configuration to its report.

use super::{
    Adamw, BatchReport, Control, DrawnNoise, Error, GateNoise, ModelTrainer, PairTrainer, Recompute, Run,
    Sample, TrainConfig, TrainedFuser, TrainingPass,
    checkpoint::{self, Position, State, Trained},
    config::{DataSettings, TooLong, What},
    events::{Evaluation, Record, RunLog, Update},
    exam::{Exam, Score},
    report::{AccuracyRow, GateStrength, Report},
    schedule::updates_per_epoch,
};
use crate::{
    align::Aligner,
    backend::{self, Backend, DType, Precision, Queue},
    builtin,
    data::{Dataset, Example, PromptStyle, Source, split},
    fuser::{Fuser, FuserConfig, Training},
    model::{self, ModelConfig},
    ops::Scratch,
    pipeline::{ComputeType, Model},
    tokenizer::Tokenizer,
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

/// What is trained, with everything around it.
enum Trainee {
    Fuser {
        pair: Box<PairTrainer>,
        aligner: Aligner,
        receiver: Model,
        sharers: Vec<Model>,
        training: Training,
    },
    Model {
        trainer: Box<ModelTrainer>,
        tokenizer: Tokenizer,
    },
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
    refuse_unbuilt(&config)?;
    let backend = backend::open(config.device, config.threads)?;
    if backend.training().is_none() {
        return Err(Error::NoTraining { device: backend.description() });
    }
    let queue = Queue::new(&backend)?;
    let mut trainee = Trainee::open(&config, &backend, &queue, watcher)?;
    let data = Data::load(&config, &trainee, watcher)?;
    let batches = Batches::new(&config, &data.samples);
    let per_epoch = batches.updates_per_epoch(&data.samples);
    let total = config.length.steps.unwrap_or_else(|| config.length.epochs.unwrap_or(1) * per_epoch);
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
    watcher.say(&plan(&config, &trainee, &data, &batches, total, &backend));
    let out = config.out.clone();
    fs::create_dir_all(&out).map_err(crate::durable::WriteError::at(&out))?;
    let mut log = match &state {
        Some(state) => RunLog::resume(&out, state.position.step)?,
        None => RunLog::create(&out)?,
    };
    log.add(&Record::Start { step: position.step, manifest: manifest.clone() })?;
    let mut scores = Vec::new();
    if position.step == 0 && !data.exam.questions.is_empty() {
        scores = trainee.before(&data.exam, &queue, config.dtype)?;
        say_scores(watcher, "before training", &scores);
    }

    let (started, spent_before) = (Instant::now(), position.seconds);
    let rate = config.learning_rate(total);
    let annealing = config.annealing(total);
    let mut reason = "finished";
    while position.step < total {
        let step = position.step;
        trainee.set_temperature(annealing.after(step));
        let update_start = Instant::now();
        let (mut loss, mut tokens, mut micro) = (0.0, 0u64, 0u32);
        let update = batches.update(&data.samples, step, per_epoch);
        for batch in &update {
            let samples: Vec<&Sample> = batch.iter().map(|&index| &data.samples[index as usize]).collect();
            let key = step as u32 * config.batch.accumulate as u32 + micro;
            // A last window that is not full is still divided by the full count, as published.
            let scale = 1.0 / config.batch.accumulate as f32;
            let report = trainee.learn(&samples, &config, key, scale)?;
            if !report.loss.is_finite() {
                let saved = save(&mut position, &trainee, &queue, &out, started, spent_before)?;
                let layer = trainee.first_bad_layer(&queue)?;
                log.add(&Record::End { step, reason: "the loss is not a number".into() })?;
                return Err(Error::NotFinite { step: step + 1, layer, saved });
            }
            loss += report.loss / update.len() as f64;
            tokens += (report.receiver_tokens + report.sharer_tokens) as u64;
            micro += 1;
        }
        let norm = trainee.grad_norm(&queue)?;
        if !norm.is_finite() {
            let saved = save(&mut position, &trainee, &queue, &out, started, spent_before)?;
            return Err(Error::NotFinite { step: step + 1, layer: None, saved });
        }
        let learning_rate = rate.at(step);
        trainee.update(&queue, &config, step + 1, learning_rate as f32, norm)?;
        position.step += 1;
        position.tokens += tokens;
        let seconds = update_start.elapsed().as_secs_f64();
        let record = Update {
            step: position.step,
            epoch: position.step as f64 / per_epoch as f64,
            loss,
            learning_rate,
            gradient_norm: norm,
            temperature: trainee.is_fuser().then(|| f64::from(annealing.after(step))),
            gates_open: trainee.gates_open(),
            tokens,
            tokens_per_second: tokens as f64 / seconds.max(1e-9),
            seconds: spent_before + started.elapsed().as_secs_f64(),
        };
        log.add(&Record::Update(record.clone()))?;
        watcher.update(&record, total);
        let ended = position.step == total;
        let mut early = false;
        if !data.held_out.is_empty() && (ended || due(position.step, config.eval_every)) {
            let loss = trainee.measure(&data.held_out, &batches)?;
            let accuracy = match ended {
                // The accuracy at the end has a table of its own.
                true => None,
                false => trainee.quick_accuracy(&data.exam, &queue, config.dtype)?,
            };
            let seconds = spent_before + started.elapsed().as_secs_f64();
            log.add(&Record::Evaluation(Evaluation { step: position.step, loss, accuracy, seconds }))?;
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
        let interrupted = stop.load(Ordering::Relaxed) && !ended;
        if ended || early || interrupted || due(position.step, config.save_every) {
            let path = save(&mut position, &trainee, &queue, &out, started, spent_before)?;
            log.add(&Record::Checkpoint { step: position.step, path })?;
        }
        if early || interrupted {
            reason = if early { "stopped early" } else { "interrupted" };
            break;
        }
    }
    log.add(&Record::End { step: position.step, reason: reason.into() })?;
    let mut outcome = Outcome { step: position.step, total, reason, scores, result: None, report: None };
    if reason == "interrupted" {
        return Ok(outcome);
    }
    let result = out.join("final");
    trainee.export(&result, &config, &queue, total)?;
    outcome.result = Some(result);
    if !data.exam.questions.is_empty() {
        let after = trainee.after(&data.exam, &queue, config.dtype, config.seed)?;
        say_scores(watcher, "after training", &after);
        outcome.scores.extend(after);
    }
    outcome.report = Some(report(&out, &trainee, &outcome, &position)?);
    Ok(outcome)
}

fn due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

fn refuse_unbuilt(config: &TrainConfig) -> Result<(), Error> {
    let what = match config {
        TrainConfig { what: What::Lora, .. } => "what = \"lora\" (low-rank adapters)",
        TrainConfig { cache_sharer: Some(_), .. } => "cache_sharer (sharers' caches on disk)",
        _ => return Ok(()),
    };
    Err(Error::NotBuilt { what })
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
    fs::create_dir_all(&folder).map_err(crate::durable::WriteError::at(&folder))?;
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
        if let Err(error) = trainee.tokenizers().try_for_each(|tokenizer| exam.check(tokenizer)) {
            watcher.say(&format!("accuracy is not measured: {error}"));
            exam.questions.clear();
        }
        Ok(Data { samples, held_out: held_out_samples, exam, sha256 })
    }
}

/// How samples become batches and updates.
struct Batches {
    samples: Option<usize>,
    tokens: Option<usize>,
    accumulate: usize,
    seed: u64,
}

impl Batches {
    fn new(config: &TrainConfig, _: &[Sample]) -> Batches {
        let samples = config.batch.samples.or(if config.batch.tokens.is_none() { Some(4) } else { None });
        Batches {
            samples,
            tokens: config.batch.tokens,
            accumulate: config.batch.accumulate,
            seed: config.seed,
        }
    }

    fn cut(&self, samples: &[Sample], order: &[u32]) -> Vec<Vec<u32>> {
        let most = self.tokens.unwrap_or(usize::MAX);
        let mut batches: Vec<Vec<u32>> = Vec::new();
        let mut room = 0;
        for &index in order {
            let tokens = samples[index as usize].tokens();
            match batches.last_mut() {
                Some(batch) if batch.len() < self.samples.unwrap_or(usize::MAX) && tokens <= room => {
                    room -= tokens;
                    batch.push(index);
                }
                _ => {
                    room = most.saturating_sub(tokens);
                    batches.push(vec![index]);
                }
            }
        }
        batches
    }

    fn epoch(&self, samples: &[Sample], epoch: u64) -> Vec<Vec<u32>> {
        self.cut(samples, &split::order(samples.len() as u32, self.seed, epoch as u32))
    }

    /// In the first epoch; by tokens, others may have a few more or less, and their updates are cut to as many.
    fn updates_per_epoch(&self, samples: &[Sample]) -> u64 {
        updates_per_epoch(self.epoch(samples, 0).len() as u64, self.accumulate as u64).max(1)
    }

    /// The batches of update number `step`, counted from 0.
    fn update(&self, samples: &[Sample], step: u64, per_epoch: u64) -> Vec<Vec<u32>> {
        let batches = self.epoch(samples, step / per_epoch);
        let first = (step % per_epoch) as usize * self.accumulate;
        let some: Vec<Vec<u32>> = batches.iter().skip(first).take(self.accumulate).cloned().collect();
        if some.is_empty() { batches.into_iter().take(self.accumulate).collect() } else { some }
    }
}

impl Trainee {
    fn open(
        config: &TrainConfig,
        backend: &Arc<dyn Backend>,
        queue: &Queue,
        watcher: &dyn Watcher,
    ) -> Result<Trainee, Error> {
        let recompute = if config.recompute == 0 { Recompute::None } else { Recompute::Layers };
        let decay = config.optimizer.decay;
        let (precision, kv) = computing(config.dtype);
        let load = |path: &Path, precision: Precision| {
            let path = builtin::resolve(path);
            Model::load(&path, backend, precision, &|done, total| watcher.loading(&path, done, total))
        };
        if config.what == What::Model {
            let path = builtin::resolve(&config.receiver);
            let tokenizer = Tokenizer::from_folder(&path)?;
            let model_config = ModelConfig::from_folder(&path)?;
            let trainer = if model::has_weights(&path) {
                let loaded = load(&config.receiver, Precision::F32)?;
                ModelTrainer::new(queue.clone(), model_config, &loaded.decoder.weights, recompute, decay)?
            } else {
                ModelTrainer::init(
                    queue.clone(),
                    model_config,
                    model::initializer_range(&path)?,
                    config.seed,
                    recompute,
                    decay,
                )?
            };
            return Ok(Trainee::Model { trainer: Box::new(trainer), tokenizer });
        }
        let receiver = load(&config.receiver, precision)?;
        let sharers =
            config.sharers.iter().map(|path| load(path, precision)).collect::<Result<Vec<Model>, _>>()?;
        let training = Training {
            dropout: config.fuser.dropout,
            initial_temperature: config.gates.initial_temperature,
            final_temperature: config.gates.final_temperature,
            anneal_steps: config.gates.anneal_steps.unwrap_or_default(),
        };
        let mut fusers = Vec::new();
        for (number, sharer) in sharers.iter().enumerate() {
            let (ours, theirs) = (receiver.party(), sharer.party());
            let fuser = match config.fuser.checkpoints.get(number) {
                Some(path) => Fuser::load(&builtin::resolve(path), backend)?,
                None => {
                    let f = &config.fuser;
                    let (mine, other) = (receiver.decoder.config.layers, sharer.decoder.config.layers);
                    let sources: Vec<usize> =
                        f.mapping.sources(mine, other).iter().map(|all| all[0]).collect();
                    let (hidden, inner, mapping) = (f.hidden, f.intermediate, f.mapping.into());
                    let new = FuserConfig::new(
                        f.kind,
                        hidden,
                        inner,
                        mapping,
                        &sources,
                        ours.clone(),
                        theirs.clone(),
                    );
                    let new = FuserConfig { num_layers: f.layers, training, ..new };
                    Fuser::init(new, config.seed + number as u64, backend)?
                }
            };
            crate::fuser::require_contract(fuser.config(), &ours, &theirs)?;
            fusers.push(TrainedFuser::new(&fuser, queue, decay)?);
        }
        let tokenizers = sharers.iter().map(tokenizer_of).collect::<Result<Vec<Tokenizer>, Error>>()?;
        let aligner = Aligner::new(&tokenizer_of(&receiver)?, &tokenizers, config.alignment)?;
        let decoders = sharers.iter().map(|sharer| sharer.decoder.clone()).collect();
        let pair = PairTrainer::new(
            queue.clone(),
            receiver.decoder.clone(),
            decoders,
            fusers,
            config.multi_sharer,
            kv,
            recompute,
            config.fuser.dropout as f32,
            config.seed,
        )?;
        Ok(Trainee::Fuser { pair: Box::new(pair), aligner, receiver, sharers, training })
    }

    /// `None`: too long, and to be left out.
    fn sample(&self, example: &Example, config: &TrainConfig) -> Result<Option<Sample>, Error> {
        let origin = example.origin.to_string();
        let sample = match self {
            Trainee::Fuser { aligner, .. } => {
                let sample = Sample::chat(aligner, &example.messages, &origin)?;
                PairTrainer::check(&sample)?;
                sample
            }
            Trainee::Model { tokenizer, .. } => Sample::alone(tokenizer, &example.messages, &origin)?,
        };
        let most = config.length.max_length;
        match config.length.too_long {
            _ if sample.tokens() <= most => Ok(Some(sample)),
            TooLong::Error => Err(Error::TooLong { origin, tokens: sample.tokens(), most }),
            TooLong::Skip => Ok(None),
            TooLong::Truncate => Ok(sample.truncated(most)),
        }
    }

    fn tokenizers(&self) -> impl Iterator<Item = &Tokenizer> {
        let all: Vec<&Tokenizer> = match self {
            Trainee::Fuser { receiver, sharers, .. } => {
                [receiver].into_iter().chain(sharers).filter_map(|model| model.tokenizer.as_ref()).collect()
            }
            Trainee::Model { tokenizer, .. } => vec![tokenizer],
        };
        all.into_iter()
    }

    fn is_fuser(&self) -> bool {
        matches!(self, Trainee::Fuser { .. })
    }

    fn trained(&self) -> Vec<Trained<'_>> {
        match self {
            Trainee::Fuser { pair, .. } => pair.fusers.iter().map(Trained::Fuser).collect(),
            Trainee::Model { trainer, .. } => vec![Trained::Model(&trainer.parameters)],
        }
    }

    fn restore(&mut self, state: &State, queue: &Queue) -> Result<(), Error> {
        match self {
            Trainee::Fuser { pair, .. } => {
                for (number, fuser) in pair.fusers.iter_mut().enumerate() {
                    state.restore(number, &fuser.parameters, queue)?;
                    state.restore_gates(number, &mut fuser.gates)?;
                }
                Ok(())
            }
            Trainee::Model { trainer, .. } => state.restore(0, &trainer.parameters, queue),
        }
    }

    fn set_temperature(&mut self, temperature: f32) {
        if let Trainee::Fuser { pair, .. } = self {
            pair.fusers.iter_mut().for_each(|fuser| fuser.temperature = temperature);
        }
    }

    fn learn(
        &mut self,
        samples: &[&Sample],
        config: &TrainConfig,
        step: u32,
        scale: f32,
    ) -> Result<BatchReport, Error> {
        match self {
            Trainee::Fuser { pair, .. } => {
                let drawn: Vec<DrawnNoise> = (0..pair.fusers.len() as u32)
                    .map(|sharer| DrawnNoise { seed: config.seed, step, sharer })
                    .collect();
                let noise: Vec<&dyn GateNoise> = drawn.iter().map(|noise| noise as &dyn GateNoise).collect();
                pair.run(samples, Run::Learn { noise: &noise, step, scale })
            }
            Trainee::Model { trainer, .. } => trainer.run(samples, Some(scale)),
        }
    }

    /// Mean held-out loss a token.
    fn measure(&mut self, samples: &[Sample], batches: &Batches) -> Result<f64, Error> {
        let order: Vec<u32> = (0..samples.len() as u32).collect();
        let (mut sum, mut labels) = (0.0, 0);
        for batch in batches.cut(samples, &order) {
            let batch: Vec<&Sample> = batch.iter().map(|&index| &samples[index as usize]).collect();
            let report = match self {
                Trainee::Fuser { pair, .. } => pair.run(&batch, Run::Measure)?,
                Trainee::Model { trainer, .. } => trainer.run(&batch, None)?,
            };
            sum += report.loss * report.labels as f64;
            labels += report.labels;
        }
        Ok(sum / labels.max(1) as f64)
    }

    fn grad_norm(&self, queue: &Queue) -> Result<f64, Error> {
        match self {
            Trainee::Fuser { pair, .. } => {
                let squares = pair.fusers.iter().map(|fuser| Ok(fuser.grad_norm(queue)?.powi(2)));
                Ok(squares.sum::<Result<f64, Error>>()?.sqrt())
            }
            Trainee::Model { trainer, .. } => Ok(trainer.parameters.grad_squares(queue)?.sqrt()),
        }
    }

    fn update(
        &mut self,
        queue: &Queue,
        config: &TrainConfig,
        step: u64,
        lr: f32,
        norm: f64,
    ) -> Result<(), Error> {
        let o = &config.optimizer;
        let adamw = Adamw {
            betas: o.betas.map(|beta| beta as f32),
            eps: o.epsilon as f32,
            weight_decay: o.weight_decay as f32,
        };
        // As torch's clip_grad_norm_.
        let clip = if o.clip > 0.0 { (o.clip / (norm + 1e-6)).min(1.0) as f32 } else { 1.0 };
        match self {
            Trainee::Fuser { pair, .. } => {
                pair.fusers.iter_mut().try_for_each(|fuser| fuser.update(queue, &adamw, step, lr, clip))
            }
            Trainee::Model { trainer, .. } => trainer.parameters.update(queue, &adamw, step, lr, clip),
        }
    }

    fn first_bad_layer(&self, queue: &Queue) -> Result<Option<usize>, Error> {
        match self {
            Trainee::Fuser { pair, .. } => pair.first_bad_layer(),
            Trainee::Model { trainer, .. } => trainer.first_bad_layer(queue),
        }
    }

    fn gates_open(&self) -> Option<f64> {
        let Trainee::Fuser { pair, .. } = self else { return None };
        let hard: Vec<f32> = pair.fusers.iter().flat_map(|fuser| fuser.hard_gates()).flatten().collect();
        Some(f64::from(hard.iter().sum::<f32>()) / hard.len().max(1) as f64)
    }

    /// Receiver, sharers, text-to-text, and C2C with the fuser as it is.
    fn before(&mut self, exam: &Exam, queue: &Queue, dtype: ComputeType) -> Result<Vec<Score>, Error> {
        let (_, kv) = computing(dtype);
        match self {
            Trainee::Fuser { pair, aligner, receiver, sharers, .. } => {
                let ours = tokenizer_of(receiver)?;
                let mut scores = vec![exam.alone("receiver", receiver, queue, kv)?];
                for (number, sharer) in sharers.iter().enumerate() {
                    let name = if number == 0 { "sharer".into() } else { format!("sharer {}", number + 1) };
                    scores.push(exam.alone(&name, sharer, queue, kv)?);
                }
                scores.push(exam.t2t(receiver, &sharers[0], queue, kv)?);
                scores.push(exam.c2c("c2c untrained", pair, aligner, &ours, false, Control::None)?);
                Ok(scores)
            }
            Trainee::Model { trainer, tokenizer } => {
                Ok(vec![exam.alone("untrained", &trained_model(trainer, tokenizer), queue, DType::F32)?])
            }
        }
    }

    fn after(
        &mut self,
        exam: &Exam,
        queue: &Queue,
        dtype: ComputeType,
        seed: u64,
    ) -> Result<Vec<Score>, Error> {
        let _ = dtype;
        match self {
            Trainee::Fuser { pair, aligner, receiver, .. } => {
                let ours = tokenizer_of(receiver)?;
                let mut ask = |mode: &str, swap: bool, control: Control| {
                    exam.c2c(mode, pair, aligner, &ours, swap, control)
                };
                Ok(vec![
                    ask("c2c", false, Control::None)?,
                    ask("c2c-swap", true, Control::None)?,
                    ask("c2c-random", false, Control::Random { seed })?,
                ])
            }
            Trainee::Model { trainer, tokenizer } => {
                Ok(vec![exam.alone("trained", &trained_model(trainer, tokenizer), queue, DType::F32)?])
            }
        }
    }

    /// During training.
    fn quick_accuracy(
        &mut self,
        exam: &Exam,
        queue: &Queue,
        dtype: ComputeType,
    ) -> Result<Option<f64>, Error> {
        if exam.questions.is_empty() {
            return Ok(None);
        }
        let few = Exam { questions: exam.questions.iter().take(200).cloned().collect() };
        let score = match self {
            Trainee::Fuser { pair, aligner, receiver, .. } => {
                let ours = tokenizer_of(receiver)?;
                few.c2c("c2c", pair, aligner, &ours, false, Control::None)?
            }
            Trainee::Model { .. } => match self.after(&few, queue, dtype, 0)?.pop() {
                Some(score) => score,
                None => return Ok(None),
            },
        };
        Ok(Some(score.accuracy()))
    }

    /// Writes what was trained where `generate` reads it.
    fn export(&self, folder: &Path, config: &TrainConfig, queue: &Queue, total: u64) -> Result<(), Error> {
        fs::create_dir_all(folder).map_err(crate::durable::WriteError::at(folder))?;
        match self {
            Trainee::Fuser { pair, training, .. } => {
                let anneal_steps = config.gates.anneal_steps.unwrap_or(total);
                for (number, fuser) in pair.fusers.iter().enumerate() {
                    let own = match pair.fusers.len() {
                        1 => folder.to_path_buf(),
                        _ => folder.join(format!("sharer-{}", number + 1)),
                    };
                    fs::create_dir_all(&own).map_err(crate::durable::WriteError::at(&own))?;
                    let fuser = fuser.snapshot(Training { anneal_steps, ..*training });
                    fuser.to_dtype(DType::Bf16, queue.backend())?.save(&own, queue)?;
                }
                Ok(())
            }
            Trainee::Model { trainer, .. } => {
                trainer.save(folder)?;
                let from = builtin::resolve(&config.receiver);
                for name in model::COMPANIONS {
                    let (from, to) = (from.join(name), folder.join(name));
                    if from.is_file() && from != to {
                        fs::copy(&from, &to).map_err(crate::durable::WriteError::at(&to))?;
                    }
                }
                Ok(())
            }
        }
    }
}

fn computing(dtype: ComputeType) -> (Precision, DType) {
    match dtype {
        ComputeType::F32 => (Precision::F32, DType::F32),
        ComputeType::Bf16 => (Precision::Fast, DType::Bf16),
    }
}

fn tokenizer_of(model: &Model) -> Result<Tokenizer, Error> {
    model.tokenizer.clone().ok_or_else(|| Error::NoTokenizer { model: model.path.clone() })
}

fn trained_model(trainer: &ModelTrainer, tokenizer: &Tokenizer) -> Model {
    Model { path: PathBuf::new(), decoder: trainer.decoder.clone(), tokenizer: Some(tokenizer.clone()) }
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
) -> String {
    let tokens: usize = data.samples.iter().map(Sample::tokens).sum();
    let labels: usize = data.samples.iter().map(Sample::labelled).sum();
    let first = batches.epoch(&data.samples, 0);
    let largest =
        first.iter().map(|batch| batch.iter().map(|&i| data.samples[i as usize].tokens()).sum::<usize>());
    let largest = largest.max().unwrap_or(0);
    let per_update = tokens as f64 / (first.len().div_ceil(config.batch.accumulate)) as f64;
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
            let c = &trainer.decoder.config;
            (
                trainer.parameters.count(),
                "of the model",
                TrainingPass::bytes(c, largest, largest, recompute),
                0,
            )
        }
    };
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    let state = trained * super::Parameters::BYTES;
    format!(
        "plan: {trained} parameters {what}, {:.0} MiB with gradients and moments\n      activations about {:.0} MiB\n      \
         {} samples of {:.0} tokens on average, {:.0} learned from; {} held out\n      {total} updates of about {per_update:.0} tokens on {}",
        mib(state),
        mib(pass + fuser),
        data.samples.len(),
        tokens as f64 / data.samples.len() as f64,
        labels as f64 / data.samples.len() as f64,
        data.held_out.len(),
        backend.description(),
    )
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
