//! What the binaries drive: models loaded from files, a question in, an answer with its costs out.

use super::{
    Answer, Error, Generation, Lane, Link, Model, Overlap, Prompt, SharerPrompt, Stream, TimingsMs,
    TokensPerSecond, WantedLogits,
    answer::{ms, peak_rss_bytes},
    generate,
};
use crate::{
    align::{AlignedPrompt, Aligner, Alignment, ChatOptions, Fraction, LayerMapping},
    backend::{self, Backend, DType, DeviceChoice, Precision, Queue},
    engine::{SamplingParams, Speaker},
    fuser::{self, Fuser, FusionMode, GateOverride, Gates, Kind},
    model::Goal,
    tokenizer::{Message, TemplateOptions},
};
use clap::ValueEnum;
use serde::Serialize;
use std::{
    collections::HashMap,
    num::ParseIntError,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Tokens of a cache block.
const BLOCK_SIZE: usize = 16;

/// `--mode`: who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The receiver, on a cache fused with the sharers'.
    C2c,
    /// The receiver alone.
    Receiver,
    /// The sharer alone, the first of several.
    Sharer,
    /// Text-to-text: the sharer writes down background, the receiver reads it and answers.
    T2t,
}

/// `--dtype`: what caches are kept in, and how exact the arithmetic is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ComputeType {
    /// Exact.
    F32,
    /// Fast: products as the weights' format allows.
    Bf16,
}

impl ComputeType {
    pub(crate) fn kv(self) -> DType {
        match self {
            ComputeType::F32 => DType::F32,
            ComputeType::Bf16 => DType::Bf16,
        }
    }

    pub(crate) fn precision(self) -> Precision {
        match self {
            ComputeType::F32 => Precision::F32,
            ComputeType::Bf16 => Precision::Fast,
        }
    }
}

/// `--fuser`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FuserChoice {
    /// A checkpoint.
    Load(PathBuf),
    /// Untrained, gates closed: `init[:SEED]`.
    Init { seed: u64 },
}

impl FromStr for FuserChoice {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        match text.strip_prefix("init") {
            Some("") => Ok(FuserChoice::Init { seed: 0 }),
            Some(rest) if rest.starts_with(':') => Ok(FuserChoice::Init { seed: rest[1..].parse()? }),
            _ => Ok(FuserChoice::Load(text.into())),
        }
    }
}

impl FuserChoice {
    /// With a checkpoint that was named `hf:…` or `builtin:…` found, see [`crate::hub::local`].
    pub fn local(&self) -> Result<FuserChoice, crate::hub::Error> {
        Ok(match self {
            FuserChoice::Load(path) => FuserChoice::Load(crate::hub::local(path)?),
            init => init.clone(),
        })
    }

    /// Width of an untrained fuser: enough to drive the road, quick to make.
    const INIT_HIDDEN: usize = 256;

    /// Loads or makes the fuser and checks that it fits the pair.
    fn open(
        &self,
        receiver: &Model,
        sharer: &Model,
        mapping: LayerMapping,
        backend: &Arc<dyn Backend>,
    ) -> Result<Fuser, Error> {
        let (ours, theirs) = (receiver.party(), sharer.party());
        let fuser = match self {
            FuserChoice::Load(path) => Fuser::load(path, backend)?,
            FuserChoice::Init { seed } => {
                let width = (Self::INIT_HIDDEN, Self::INIT_HIDDEN);
                let config = receiver.fuser_config(sharer, Kind::C2c, width, mapping);
                Fuser::init(config, *seed, backend)?
            }
        };
        fuser::require_contract(fuser.config(), &ours, &theirs)?;
        Ok(fuser)
    }
}

/// Everything that is chosen before models are loaded.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    pub mode: Mode,
    pub receiver: Option<PathBuf>,
    pub sharers: Vec<PathBuf>,
    /// One a sharer.
    pub fusers: Vec<FuserChoice>,
    pub multi_sharer: FusionMode,
    pub alignment: Alignment,
    pub mapping: LayerMapping,
    pub gates: GateOverride,
    pub fraction: Option<Fraction>,
    pub dtype: ComputeType,
    pub device: DeviceChoice,
    pub threads: usize,
    pub overlap: Overlap,
}

/// What is asked.
#[derive(Clone, Debug)]
pub enum Question {
    /// A conversation, rendered by each model's chat template.
    Chat { messages: Vec<Message>, template: TemplateOptions },
    /// A text to continue, without a template.
    Raw(String),
}

/// Models, fusers and settings; answers questions.
pub struct Session {
    pub backend: Arc<dyn Backend>,
    pub receiver: Option<Model>,
    pub sharers: Vec<Model>,
    pub fusers: Vec<Fuser>,
    /// For each fuser, per receiver layer.
    pub gates: Vec<Gates>,
    options: SessionOptions,
    /// Whether the answer's own tokens are fused, see [`Session::including_response`].
    pub(super) include_response: bool,
    /// Made for the first question, then kept: they remember what they have aligned.
    aligners: Mutex<HashMap<Alignment, Arc<Aligner>>>,
    load: Duration,
}

impl Session {
    /// Opens the device, loads what the mode needs, and checks that the fusers fit the models.
    ///
    /// `progress(path, done, total)` is called while bytes of a model become ready.
    pub fn open(options: SessionOptions, progress: &dyn Fn(&Path, u64, u64)) -> Result<Session, Error> {
        Self::open_on(backend::open(options.device, options.threads)?, options, progress)
    }

    /// As [`Session::open`], on a device that is open already; `options` need not name it.
    pub fn open_on(
        backend: Arc<dyn Backend>,
        options: SessionOptions,
        progress: &dyn Fn(&Path, u64, u64),
    ) -> Result<Session, Error> {
        let start = Instant::now();
        let precision = options.dtype.precision();
        let load = |path: &PathBuf| {
            Model::load(path, &backend, precision, &|done, total| progress(path, done, total))
        };
        let needs_receiver = options.mode != Mode::Sharer;
        let receiver = match &options.receiver {
            Some(path) if needs_receiver => Some(load(path)?),
            None if needs_receiver => {
                return Err(Error::MissingModel { mode: options.mode, what: "--receiver" });
            }
            _ => None,
        };
        let wanted = match options.mode {
            Mode::C2c => options.sharers.len(),
            Mode::Sharer | Mode::T2t => 1,
            Mode::Receiver => 0,
        };
        if options.sharers.len() < wanted || (wanted == 0 && options.mode == Mode::C2c) {
            return Err(Error::MissingModel { mode: options.mode, what: "--sharer" });
        }
        let sharers = options.sharers[..wanted].iter().map(load).collect::<Result<Vec<Model>, Error>>()?;
        let (mut fusers, mut gates) = (Vec::new(), Vec::new());
        if let (Mode::C2c, Some(receiver)) = (options.mode, &receiver) {
            if options.fusers.len() != sharers.len() {
                return Err(Error::FuserCount { sharers: sharers.len(), fusers: options.fusers.len() });
            }
            for (choice, sharer) in options.fusers.iter().zip(&sharers) {
                let fuser = choice.open(receiver, sharer, options.mapping, &backend)?;
                gates.push(fuser.gates_with(&options.gates)?);
                fusers.push(fuser);
            }
        }
        let mut options = options;
        if options.fraction.is_none() {
            options.fraction = fuser::trained_fraction(fusers.iter().map(Fuser::config))?;
        }
        let (aligners, load) = (Mutex::default(), start.elapsed());
        let include_response = false;
        let session =
            Session { backend, receiver, sharers, fusers, gates, options, include_response, aligners, load };
        session.log_memory("after loading");
        Ok(session)
    }

    fn log_memory(&self, when: &str) {
        if let Some(plan) = self.backend.memory_plan() {
            log::info!("memory of {} {when}: {plan}", self.backend.description());
        }
    }

    pub fn mode(&self) -> Mode {
        self.options.mode
    }

    pub(super) fn alignment(&self) -> Alignment {
        self.options.alignment
    }

    pub fn dtype(&self) -> ComputeType {
        self.options.dtype
    }

    pub fn fusion(&self) -> FusionMode {
        self.options.multi_sharer
    }

    pub fn fraction(&self) -> Option<Fraction> {
        self.options.fraction
    }

    pub fn overlap(&self) -> Overlap {
        self.options.overlap
    }

    /// # Errors
    /// If there is none.
    pub fn model(&self, speaker: Speaker) -> Result<&Model, Error> {
        match speaker {
            Speaker::Receiver => self.receiver(),
            Speaker::Sharer => {
                let mode = self.options.mode;
                self.sharers.first().ok_or(Error::MissingModel { mode, what: "--sharer" })
            }
        }
    }

    pub(super) fn receiver(&self) -> Result<&Model, Error> {
        self.receiver.as_ref().ok_or(Error::MissingModel { mode: self.options.mode, what: "--receiver" })
    }

    /// A lane of `model` for `tokens` tokens.
    pub fn lane(&self, model: &Model, tokens: usize) -> Result<Lane, Error> {
        self.lane_beside(model, tokens, 0)
    }

    /// The same, with room for `aside` tokens of no sequence in its pages.
    fn lane_beside(&self, model: &Model, tokens: usize, aside: usize) -> Result<Lane, Error> {
        let config = &model.decoder.config;
        if tokens > config.context_length {
            let (model, limit) = (model.path.display().to_string(), config.context_length);
            return Err(Error::ContextExceeded { model, tokens, limit });
        }
        let blocks = tokens.div_ceil(BLOCK_SIZE).max(1) + aside.div_ceil(BLOCK_SIZE);
        let kv = config.paged_kv(&self.backend, blocks, BLOCK_SIZE, self.options.dtype.kv())?;
        Lane::new(model.decoder.clone(), Queue::new(&self.backend)?, kv, tokens)
    }

    /// A receiver linked to all sharers, with room for `receiver_tokens` and `sharer_tokens[i]` tokens.
    pub fn link(&self, receiver_tokens: usize, sharer_tokens: &[usize]) -> Result<Link, Error> {
        self.link_beside(receiver_tokens, sharer_tokens, 0)
    }

    /// The same, with room for `aside` tokens of no sequence in the receiver's pages.
    pub(super) fn link_beside(
        &self,
        receiver_tokens: usize,
        sharer_tokens: &[usize],
        aside: usize,
    ) -> Result<Link, Error> {
        let receiver = self.lane_beside(self.receiver()?, receiver_tokens, aside)?;
        let lanes = self.sharers.iter().zip(sharer_tokens).map(|(model, &tokens)| self.lane(model, tokens));
        let sharers = lanes.collect::<Result<Vec<Lane>, Error>>()?;
        let o = &self.options;
        self.log_memory("with a conversation's caches");
        Link::new(receiver, sharers, self.fusers.clone(), self.gates.clone(), o.multi_sharer, o.overlap)
    }

    /// Answers one question; `on_text` is called with each piece of the answer as it comes.
    pub fn answer(
        &self,
        question: &Question,
        params: &SamplingParams,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Answer, Error> {
        match self.options.mode {
            Mode::C2c => self.answer_c2c(question, params, on_text),
            Mode::Receiver => self.answer_alone(self.receiver()?, question, params, on_text),
            Mode::Sharer => self.answer_alone(&self.sharers[0], question, params, on_text),
            Mode::T2t => self.answer_t2t(question, params, on_text),
        }
    }

    /// What `model` reads of `question`.
    pub fn encode(&self, model: &Model, question: &Question) -> Result<Vec<u32>, Error> {
        let tokenizer = model.tokenizer()?;
        let ids = match question {
            Question::Raw(text) => tokenizer.encode(text, true)?.ids,
            Question::Chat { messages, template } => {
                tokenizer.encode(&tokenizer.render(messages, template)?, false)?.ids
            }
        };
        if ids.is_empty() { Err(Error::EmptyPrompt) } else { Ok(ids) }
    }

    /// The end tokens of `model` are added to those of `params`.
    pub fn with_stops(&self, model: &Model, params: &SamplingParams) -> Result<SamplingParams, Error> {
        let mut params = params.clone();
        params.eos.extend(&model.tokenizer()?.special().eos);
        Ok(params)
    }

    /// One model alone on `question`; returns the answer, and the time its prefill took.
    fn run_alone(
        &self,
        model: &Model,
        question: &Question,
        params: &SamplingParams,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Alone, Error> {
        let start = Instant::now();
        let ids = self.encode(model, question)?;
        let tokenize = start.elapsed();
        let params = self.with_stops(model, params)?;
        let mut lane = self.lane(model, capped(ids.len(), &params, model))?;
        let prefill = Instant::now();
        let positions: Vec<u32> = (0..ids.len() as u32).collect();
        lane.append(&ids, &positions, Goal::Hidden, |_, _| {})?;
        let logits = lane.logits()?;
        let (prefill, first_token) = (prefill.elapsed(), start.elapsed());
        let stream =
            Stream { detokenizer: Some(model.tokenizer()?.detokenizer()), on_text, keep_scores: false };
        let generation = generate(&mut lane, logits, &params, stream)?;
        Ok(Alone {
            generation,
            prompt_tokens: ids.len(),
            kv_bytes: lane.kv.bytes() as u64,
            tokenize,
            prefill,
            first_token,
            total: start.elapsed(),
        })
    }

    fn answer_alone(
        &self,
        model: &Model,
        question: &Question,
        params: &SamplingParams,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Answer, Error> {
        let run = self.run_alone(model, question, params, on_text)?;
        let mut answer = self.blank(run.generation);
        answer.kv_bytes = run.kv_bytes;
        answer.timings_ms.tokenize = ms(run.tokenize);
        answer.timings_ms.first_token = ms(run.first_token);
        answer.timings_ms.total = ms(run.total);
        if self.options.mode == Mode::Sharer {
            answer.sharer_prompt_tokens = vec![run.prompt_tokens];
            answer.timings_ms.sharer_prefill = ms(run.prefill);
        } else {
            answer.prompt_tokens = run.prompt_tokens;
            answer.timings_ms.receiver_prefill = ms(run.prefill);
        }
        answer.rates();
        Ok(answer)
    }

    fn answer_t2t(
        &self,
        question: &Question,
        params: &SamplingParams,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Answer, Error> {
        let ask = question.for_background()?;
        let stage1 = self.run_alone(&self.sharers[0], &ask, params, &mut |_| {})?;
        let background = stage1.generation.text.trim().to_string();
        let with_background = question.with_background(&background)?;
        let stage2 = self.run_alone(self.receiver()?, &with_background, params, on_text)?;
        let mut answer = self.blank(stage2.generation);
        answer.kv_bytes = stage1.kv_bytes.max(stage2.kv_bytes);
        answer.background = Some(background);
        answer.prompt_tokens = stage2.prompt_tokens;
        answer.sharer_prompt_tokens = vec![stage1.prompt_tokens];
        answer.timings_ms.tokenize = ms(stage1.tokenize + stage2.tokenize);
        answer.timings_ms.sharer_prefill = ms(stage1.prefill);
        answer.timings_ms.receiver_prefill = ms(stage2.prefill);
        answer.timings_ms.first_token = ms(stage1.total + stage2.first_token);
        answer.timings_ms.total = ms(stage1.total + stage2.total);
        answer.rates();
        Ok(answer)
    }

    fn aligner(&self, alignment: Alignment) -> Result<Arc<Aligner>, Error> {
        // A lock that was poisoned guards a map that is whole.
        let mut aligners = self.aligners.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(aligner) = aligners.get(&alignment) {
            return Ok(aligner.clone());
        }
        let receiver = self.receiver()?.tokenizer()?;
        let sharers =
            self.sharers.iter().map(|model| model.tokenizer().cloned()).collect::<Result<Vec<_>, _>>()?;
        let aligner = Arc::new(Aligner::new(receiver, &sharers, alignment)?);
        aligners.insert(alignment, aligner.clone());
        Ok(aligner)
    }

    /// What receiver and sharers read of `question`; `None` is the alignment of the options.
    pub fn aligned(
        &self,
        question: &Question,
        alignment: Option<Alignment>,
        fraction: Option<Fraction>,
    ) -> Result<AlignedPrompt, Error> {
        let aligner = self.aligner(alignment.unwrap_or(self.options.alignment))?;
        let mut prompt = match question {
            Question::Raw(text) => aligner.raw(text)?,
            Question::Chat { messages, template } => {
                aligner.chat(messages, &ChatOptions { template: template.clone(), open_last: false })?
            }
        };
        if let Some(fraction) = fraction {
            prompt.sections = fraction.apply(&prompt.sections);
        }
        for remark in &prompt.remarks {
            log::warn!("{remark}");
        }
        Ok(prompt)
    }

    fn answer_c2c(
        &self,
        question: &Question,
        params: &SamplingParams,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Answer, Error> {
        let receiver = self.receiver()?;
        // A tokenizer is made ready once, which is no part of a question's time.
        self.aligner(self.options.alignment)?;
        let start = Instant::now();
        let aligned = self.aligned(question, None, self.options.fraction)?;
        let align = start.elapsed();
        let prompt = Prompt::from(aligned);
        let params = self.with_stops(receiver, params)?;
        let sharer_tokens: Vec<usize> = prompt.sharers.iter().map(|own| own.ids.len()).collect();
        let mut link = self.conversation(&prompt, capped(prompt.ids.len(), &params, receiver))?;
        let (logits, report) = link.prefill(&prompt, WantedLogits::Last)?;
        let first_token = start.elapsed();
        let stream =
            Stream { detokenizer: Some(receiver.tokenizer()?.detokenizer()), on_text, keep_scores: false };
        let generation = generate(&mut *link, logits, &params, stream)?;
        let mut answer = self.blank(generation);
        answer.kv_bytes = link.kv_bytes() as u64;
        answer.prompt_tokens = prompt.ids.len();
        answer.sharer_prompt_tokens = sharer_tokens;
        answer.timings_ms.align = ms(align);
        answer.prefill(&report);
        let (tokens, bytes) = link.fused_since_prefill();
        answer.fused_tokens += tokens;
        answer.fused_kv_bytes += bytes;
        answer.timings_ms.first_token = ms(first_token);
        answer.timings_ms.total = ms(start.elapsed());
        answer.rates();
        Ok(answer)
    }

    fn blank(&self, generation: Generation) -> Answer {
        let timings_ms =
            TimingsMs { load: ms(self.load), decode: ms(generation.decode), ..TimingsMs::default() };
        Answer {
            mode: self.options.mode,
            text: generation.text,
            tokens: generation.tokens,
            finish_reason: generation.finish_reason,
            prompt_tokens: 0,
            sharer_prompt_tokens: Vec::new(),
            fused_tokens: 0,
            timings_ms,
            tokens_per_s: TokensPerSecond::default(),
            gates: self.gates.clone(),
            kv_bytes: 0,
            fused_kv_bytes: 0,
            background: None,
            logprobs: generation.logprobs,
            peak_rss_bytes: peak_rss_bytes(),
            device: self.backend.device(),
            threads: self.backend.threads(),
            dtype: self.options.dtype,
            overlap: self.options.overlap,
        }
    }
}

struct Alone {
    generation: Generation,
    prompt_tokens: usize,
    kv_bytes: u64,
    tokenize: Duration,
    prefill: Duration,
    first_token: Duration,
    total: Duration,
}

impl From<AlignedPrompt> for Prompt {
    /// Sharers read only as far as something of theirs is fused: later tokens influence nothing.
    fn from(aligned: AlignedPrompt) -> Prompt {
        let needed: Vec<usize> =
            (0..aligned.sharers.len()).map(|sharer| aligned.columns_needed(sharer)).collect();
        let sharers = aligned.sharers.into_iter().zip(needed).map(|(own, needed)| SharerPrompt {
            ids: own.ids[..needed].to_vec(),
            positions: own.positions[..needed].to_vec(),
            columns: own.columns.iter().map(|column| column.filter(|&c| (c as usize) < needed)).collect(),
        });
        Prompt {
            sharers: sharers.collect(),
            ids: aligned.receiver_ids,
            positions: aligned.receiver_positions,
            sections: aligned.sections,
        }
    }
}

/// Room for the prompt and the answer, within the model's context.
pub(super) fn capped(prompt: usize, params: &SamplingParams, model: &Model) -> usize {
    prompt.max(prompt.saturating_add(params.max_new_tokens).min(model.decoder.config.context_length))
}
