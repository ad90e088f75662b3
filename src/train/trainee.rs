//! What is trained, with everything around it: the fusers of a pair, or a model.

use super::{
    Adamw, BatchReport, Batches, Control, DrawnNoise, Error, GateNoise, ModelTrainer, PairTrainer,
    PromptStore, Ranks, Recompute, Run, Sample, TrainConfig, TrainedFuser,
    checkpoint::{State, Trained},
    config::{TooLong, What},
    exam::{Exam, Score},
    run::Watcher,
    standardize,
};
use crate::{
    align::{Aligner, Alignment},
    backend::{Backend, DType, Precision, Queue},
    builtin,
    data::Example,
    durable::WriteError,
    fuser::{self, AllInOneConfig, Fuser, FuserConfig, FuserError, Kind, RidgeFit, Training},
    hub,
    model::{self, Adapter, ModelConfig},
    pipeline::Model,
    tokenizer::Tokenizer,
};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Questions that are asked during training.
const QUICK: usize = 200;

/// What is trained, with everything around it.
pub enum Trainee {
    Fuser {
        pair: Box<PairTrainer>,
        aligner: Aligner,
        receiver: Model,
        sharers: Vec<Model>,
        /// What caches are kept in.
        kv: DType,
        training: Training,
    },
    /// All of a model, or adapters beside it.
    Model { trainer: Box<ModelTrainer>, tokenizer: Tokenizer },
}

impl Trainee {
    pub fn open(
        config: &TrainConfig,
        backend: &Arc<dyn Backend>,
        queue: &Queue,
        watcher: &dyn Watcher,
    ) -> Result<Trainee, Error> {
        let recompute = if config.recompute == 0 { Recompute::None } else { Recompute::Layers };
        let decay = config.optimizer.decay;
        let (precision, kv) = (config.dtype.precision(), config.dtype.kv());
        let load = |path: &Path, precision: Precision| {
            let path = hub::local(path)?;
            let model =
                Model::load(&path, backend, precision, &|done, total| watcher.loading(&path, done, total))?;
            Ok::<Model, Error>(model)
        };
        if config.what == What::Model {
            let path = hub::local(&config.receiver)?;
            if !path.join("config.json").is_file() {
                return Err(Error::NotAFolder { path });
            }
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
        if config.what == What::Lora {
            if Adapter::is_at(&receiver.path) {
                return Err(Error::AdapterOfAdapter { path: config.receiver.clone() });
            }
            let (queue, tokenizer) = (queue.clone(), receiver.tokenizer()?.clone());
            let (seed, decoder) = (config.seed, &receiver.decoder);
            let trainer = ModelTrainer::adapters(queue, decoder, &config.lora, seed, recompute, decay)?;
            return Ok(Trainee::Model { trainer: Box::new(trainer), tokenizer });
        }
        let sharers =
            config.sharers.iter().map(|path| load(path, precision)).collect::<Result<Vec<Model>, _>>()?;
        let training = Training {
            dropout: config.fuser.dropout,
            initial_temperature: config.gates.initial_temperature,
            final_temperature: config.gates.final_temperature,
            anneal_steps: config.gates.anneal_steps.unwrap_or_default(),
        };
        let mut fusers: Vec<TrainedFuser> = Vec::new();
        for (number, sharer) in sharers.iter().enumerate() {
            let fuser = match config.fuser.checkpoints.get(number) {
                Some(path) => {
                    let fuser = Fuser::load(&hub::local(path)?, backend)?;
                    let fraction = config.fraction.or(fuser.config().fraction);
                    fuser.with_fraction(fraction)
                }
                None => {
                    let f = &config.fuser;
                    let new = receiver.fuser_config(sharer, f.kind, (f.hidden, f.intermediate), f.mapping);
                    let all_in_one = (f.kind == Kind::AllInOne).then(AllInOneConfig::recipe);
                    let (num_layers, fraction) = (f.layers, config.fraction);
                    let new = FuserConfig { num_layers, training, fraction, all_in_one, ..new };
                    Fuser::init(new, config.seed + number as u64, backend)?
                }
            };
            fuser::require_contract(fuser.config(), &receiver.party(), &sharer.party())?;
            if fuser.config().all_in_one.as_ref().is_some_and(|own| !own.is_trainable()) {
                return Err(FuserError::Untrainable { kind: Kind::AllInOne }.into());
            }
            fusers.push(TrainedFuser::new(&fuser, queue, decay)?);
        }
        let fraction = fuser::trained_fraction(fusers.iter().map(|fuser| fuser.fuser.config()))?;
        let tokenizers = sharers
            .iter()
            .map(|sharer| sharer.tokenizer().cloned())
            .collect::<Result<Vec<Tokenizer>, _>>()?;
        let aligner = Aligner::new(receiver.tokenizer()?, &tokenizers, config.alignment)?;
        let decoders = sharers.iter().map(|sharer| sharer.decoder.clone()).collect();
        let mut pair = PairTrainer::new(
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
        if config.include_response {
            let ours = receiver.party().tokenizer;
            let other = sharers.iter().find(|sharer| sharer.party().tokenizer != ours);
            if let Some(sharer) = other.filter(|_| config.alignment != Alignment::None) {
                return Err(Error::ResponseVocabulary { sharer: sharer.path.display().to_string() });
            }
            pair.include_response = true;
        }
        pair.fraction = fraction;
        if let Some(folder) = &config.cache_sharer {
            let open = |sharer: &Model| PromptStore::open(folder, sharer, precision, kv);
            pair.stores = sharers.iter().map(open).collect::<Result<_, _>>()?;
        }
        if let Some(folder) = &config.cache_receiver {
            pair.receiver_store = Some(PromptStore::open(folder, &receiver, precision, kv)?);
        }
        Ok(Trainee::Fuser { pair: Box::new(pair), aligner, receiver, sharers, kv, training })
    }

    /// `None`: too long, and to be left out.
    pub fn sample(&self, example: &Example, config: &TrainConfig) -> Result<Option<Sample>, Error> {
        let origin = example.origin.to_string();
        let sample = match self {
            Trainee::Fuser { pair, aligner, .. } => {
                let sample = Sample::chat(aligner, &example.messages, &origin)?;
                pair.check(&sample)?;
                if config.include_response { sample.including_response()? } else { sample }
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

    pub fn tokenizers(&self) -> impl Iterator<Item = &Tokenizer> {
        let all: Vec<&Tokenizer> = match self {
            Trainee::Fuser { receiver, sharers, .. } => {
                [receiver].into_iter().chain(sharers).filter_map(|model| model.tokenizer.as_ref()).collect()
            }
            Trainee::Model { tokenizer, .. } => vec![tokenizer],
        };
        all.into_iter()
    }

    /// Whether nothing is trained but solved for: ridge maps.
    pub fn is_solved(&self) -> bool {
        match self {
            Trainee::Fuser { pair, .. } => {
                pair.fusers.iter().all(|fuser| fuser.fuser.config().kind == Kind::Ridge)
            }
            Trainee::Model { .. } => false,
        }
    }

    /// Solves for the ridge maps of these samples; what there is to tell.
    pub fn solve(
        &mut self,
        samples: &[Sample],
        batches: &Batches,
        config: &TrainConfig,
        queue: &Queue,
    ) -> Result<String, Error> {
        let Trainee::Fuser { pair, .. } = self else { return Ok(String::new()) };
        let mut fits = Vec::new();
        for fuser in &pair.fusers {
            fits.push(RidgeFit::new(fuser.fuser.config().clone())?);
        }
        let order: Vec<u32> = (0..samples.len() as u32).collect();
        let mut pairs = 0;
        for batch in batches.cut(samples, &order) {
            let batch: Vec<&Sample> = batch.iter().map(|&index| &samples[index as usize]).collect();
            pair.observe(&batch, |sharer, route, theirs, ours, positions| {
                // Every route sees the same pairs.
                pairs += if route == 0 { positions.source.len() } else { 0 };
                fits[sharer].add(route, theirs, ours, positions);
            })?;
        }
        let mut text =
            format!("ridge maps of {pairs} pairs of columns; variance explained, keys and values:");
        for (fuser, fit) in pair.fusers.iter_mut().zip(fits) {
            let (solved, explained) = fit.solve(config.fuser.ridge_lambda, queue.backend())?;
            *fuser = TrainedFuser::new(&solved, queue, config.optimizer.decay)?;
            let n = explained.len().max(1) as f64;
            let mean = |half: usize| 100.0 * explained.iter().map(|both| both[half]).sum::<f64>() / n;
            text += &format!(" {:.1} %, {:.1} %", mean(0), mean(1));
        }
        Ok(text)
    }

    /// Lets fusers be updated in standardised coordinates, those of the columns of some of these samples.
    pub fn standardize(
        &mut self,
        samples: &[Sample],
        batches: &Batches,
        queue: &Queue,
        fresh: bool,
    ) -> Result<(), Error> {
        let Trainee::Fuser { pair, .. } = self else { return Ok(()) };
        let mut all: Vec<_> =
            pair.fusers.iter().map(|fuser| standardize::inputs(fuser.fuser.config())).collect();
        let routes: Vec<_> = pair.fusers.iter().map(|fuser| fuser.fuser.config().routes.clone()).collect();
        let every = samples.len().div_ceil(standardize::SAMPLES).max(1);
        let some: Vec<u32> = (0..samples.len() as u32).step_by(every).collect();
        for batch in batches.cut(samples, &some) {
            let batch: Vec<&Sample> = batch.iter().map(|&index| &samples[index as usize]).collect();
            pair.observe(&batch, |sharer, route, theirs, ours, _| {
                let columns = [theirs.keys, theirs.values, ours.keys, ours.values];
                let inputs = all[sharer][routes[sharer][route].projector].iter_mut();
                inputs.zip(&columns).for_each(|(channels, rows)| channels.add(rows));
            })?;
        }
        let fusers = pair.fusers.iter_mut().zip(&all);
        fusers.into_iter().try_for_each(|(fuser, inputs)| fuser.standardize(queue, inputs, fresh))
    }

    pub fn is_fuser(&self) -> bool {
        matches!(self, Trainee::Fuser { .. })
    }

    pub fn trained(&self) -> Vec<Trained<'_>> {
        match self {
            Trainee::Fuser { pair, .. } => pair.fusers.iter().map(Trained::Fuser).collect(),
            Trainee::Model { trainer, .. } => vec![Trained::Model(&trainer.parameters)],
        }
    }

    pub fn restore(&mut self, state: &State, queue: &Queue) -> Result<(), Error> {
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

    pub fn set_temperature(&mut self, temperature: f32) {
        if let Trainee::Fuser { pair, .. } = self {
            pair.fusers.iter_mut().for_each(|fuser| fuser.temperature = temperature);
        }
    }

    pub fn learn(
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
            Trainee::Model { trainer, .. } => trainer.run(samples, Some((step, scale))),
        }
    }

    /// Mean held-out loss a token.
    pub fn measure(&mut self, samples: &[Sample], batches: &Batches) -> Result<f64, Error> {
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

    /// Adds the gradients up over all processes of the run, and brings them into the coordinates of the update.
    pub fn sum_gradients(&mut self, queue: &Queue, ranks: &mut Ranks) -> Result<(), Error> {
        match self {
            Trainee::Fuser { pair, .. } => pair.fusers.iter_mut().try_for_each(|fuser| {
                ranks.sum_tensor(queue, fuser.parameters.gradients())?;
                let gates = || fuser.gates.iter().flatten();
                let mut grads: Vec<f32> = gates().map(|gate| gate.grad).collect();
                ranks.sum(&mut grads)?;
                let gates = fuser.gates.iter_mut().flatten();
                gates.zip(grads).for_each(|(gate, grad)| gate.grad = grad);
                fuser.standardize_gradients(queue)
            }),
            Trainee::Model { trainer, .. } => ranks.sum_tensor(queue, trainer.parameters.gradients()),
        }
    }

    pub fn grad_norm(&self, queue: &Queue) -> Result<f64, Error> {
        match self {
            Trainee::Fuser { pair, .. } => {
                let squares = pair.fusers.iter().map(|fuser| Ok(fuser.grad_norm(queue)?.powi(2)));
                Ok(squares.sum::<Result<f64, Error>>()?.sqrt())
            }
            Trainee::Model { trainer, .. } => Ok(trainer.parameters.grad_squares(queue)?.sqrt()),
        }
    }

    pub fn update(
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

    pub fn first_bad_layer(&self, queue: &Queue) -> Result<Option<usize>, Error> {
        match self {
            Trainee::Fuser { pair, .. } => pair.first_bad_layer(),
            Trainee::Model { trainer, .. } => trainer.first_bad_layer(queue),
        }
    }

    pub fn gates_open(&self) -> Option<f64> {
        let Trainee::Fuser { pair, .. } = self else { return None };
        let hard: Vec<f32> = pair.fusers.iter().flat_map(|fuser| fuser.hard_gates()).flatten().collect();
        Some(f64::from(hard.iter().sum::<f32>()) / hard.len().max(1) as f64)
    }

    /// C2C with the fuser as it is; before it, with `baselines`, receiver, sharers and text-to-text.
    pub fn before(&mut self, exam: &Exam, queue: &Queue, baselines: bool) -> Result<Vec<Score>, Error> {
        match self {
            Trainee::Fuser { pair, aligner, receiver, sharers, kv, .. } => {
                let ours = receiver.tokenizer()?.clone();
                let kv = *kv;
                let mut scores = Vec::new();
                if baselines {
                    scores.push(exam.alone("receiver", receiver, queue, kv)?);
                    for (number, sharer) in sharers.iter().enumerate() {
                        let name =
                            if number == 0 { "sharer".into() } else { format!("sharer {}", number + 1) };
                        scores.push(exam.alone(&name, sharer, queue, kv)?);
                    }
                    scores.push(exam.t2t(receiver, &sharers[0], queue, kv)?);
                }
                scores.push(exam.c2c("c2c untrained", pair, aligner, &ours, false, Control::None)?);
                Ok(scores)
            }
            Trainee::Model { trainer, tokenizer } => {
                Ok(vec![exam.alone("untrained", &trained_model(trainer, tokenizer)?, queue, DType::F32)?])
            }
        }
    }

    pub fn after(&mut self, exam: &Exam, queue: &Queue, seed: u64) -> Result<Vec<Score>, Error> {
        match self {
            Trainee::Fuser { pair, aligner, receiver, .. } => {
                let ours = receiver.tokenizer()?.clone();
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
                Ok(vec![exam.alone("trained", &trained_model(trainer, tokenizer)?, queue, DType::F32)?])
            }
        }
    }

    /// During training.
    pub fn quick_accuracy(&mut self, exam: &Exam, queue: &Queue) -> Result<Option<f64>, Error> {
        if exam.questions.is_empty() {
            return Ok(None);
        }
        let few = exam.first(QUICK);
        let score = match self {
            Trainee::Fuser { pair, aligner, receiver, .. } => {
                let ours = receiver.tokenizer()?.clone();
                few.c2c("c2c", pair, aligner, &ours, false, Control::None)?
            }
            Trainee::Model { trainer, tokenizer } => {
                few.alone("trained", &trained_model(trainer, tokenizer)?, queue, DType::F32)?
            }
        };
        Ok(Some(score.accuracy()))
    }

    /// Writes what was trained where `generate` reads it.
    pub fn export(
        &self,
        folder: &Path,
        config: &TrainConfig,
        queue: &Queue,
        total: u64,
    ) -> Result<(), Error> {
        fs::create_dir_all(folder).map_err(WriteError::at(folder))?;
        match self {
            Trainee::Fuser { pair, training, .. } => {
                let anneal_steps = config.gates.anneal_steps.unwrap_or(total);
                for (number, fuser) in pair.fusers.iter().enumerate() {
                    let own = match pair.fusers.len() {
                        1 => folder.to_path_buf(),
                        _ => folder.join(format!("sharer-{}", number + 1)),
                    };
                    fs::create_dir_all(&own).map_err(WriteError::at(&own))?;
                    let fuser = fuser.snapshot(Training { anneal_steps, ..*training });
                    // A solved map is not rounded: its numbers are the answer, not on the way to one.
                    let dtype = if fuser.config().kind == Kind::Ridge { DType::F32 } else { DType::Bf16 };
                    fuser.to_dtype(dtype, queue.backend())?.save(&own, queue)?;
                }
                Ok(())
            }
            Trainee::Model { trainer, .. } => {
                let from = hub::local(&config.receiver)?;
                trainer.save(folder, &base_name(&config.receiver))?;
                if trainer.lora().is_some() {
                    return Ok(());
                }
                for name in model::COMPANIONS {
                    let (from, to) = (from.join(name), folder.join(name));
                    if from.is_file() && from != to {
                        fs::copy(&from, &to).map_err(WriteError::at(&to))?;
                    }
                }
                Ok(())
            }
        }
    }
}

fn trained_model(trainer: &ModelTrainer, tokenizer: &Tokenizer) -> Result<Model, Error> {
    Ok(Model { path: PathBuf::new(), decoder: trainer.answering()?, tokenizer: Some(tokenizer.clone()) })
}

/// What adapters name their model: its whole path, so that they find it from anywhere.
fn base_name(receiver: &Path) -> String {
    let whole = if receiver == builtin::resolve(receiver) { fs::canonicalize(receiver).ok() } else { None };
    whole.unwrap_or_else(|| receiver.into()).display().to_string()
}
