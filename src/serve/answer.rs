//! Answers to one question on their way: who speaks, in which stages, and what it all cost.

use super::{details::Details, error::ApiError, request::Common, state::Server};
use crate::{
    align::AlignedPrompt,
    engine::{Done, Engine, Event, Events, Failure, Job, Prepared, Read, Speaker, Token},
    fuser::Gates,
    pipeline::{self, Mode, Question},
};
use serde_json::{Value, json};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// What is to be answered.
pub enum Asked {
    Question(Question),
    /// Token ids of the one model that speaks.
    Ids(Vec<u32>),
}

/// Something to tell the client.
pub enum Piece {
    /// Of choice number `.0`.
    Token(usize, Token),
    End(usize, Done),
}

/// The answers to one question, in the mode that was asked for.
pub struct Answers {
    engine: Arc<Engine>,
    events: Events,
    mode: Mode,
    details: bool,
    begun: Instant,
    deadline: Instant,
    timeout: Duration,
    /// From the question to the last stage's beginning.
    before: Duration,
    tokenize: Duration,
    align: Duration,
    /// Of text-to-text's first stage.
    background: Option<Background>,
    /// What the speaker read.
    pub prompt: Vec<u32>,
    aligned: Option<AlignedPrompt>,
    gates: Vec<Gates>,
    pub read: Option<Read>,
    first: Option<Done>,
    /// Choices that have not ended.
    open: usize,
    pub completion_tokens: usize,
}

struct Background {
    text: String,
    prefill: Duration,
}

impl Answers {
    /// Reads the question, lets the sharer write where the mode says so, and hands in the jobs.
    pub async fn begin(server: &Server, common: &Common, asked: Asked) -> Result<Answers, ApiError> {
        let engine = server.engine()?.clone();
        let begun = Instant::now();
        let deadline = begun + server.limits.timeout;
        let (mut asked, mut tokenize, mut background) = (asked, Duration::ZERO, None);
        if common.mode == Mode::T2t {
            let Asked::Question(question) = &asked else { return Err(pipeline::Error::T2tNeedsChat.into()) };
            let (first, took) = (Asked::Question(question.for_background()?), server.limits.timeout);
            let prepared = prepare(&engine, common, Mode::Sharer, first).await?;
            tokenize += prepared.took;
            let events = engine.submit(vec![prepared.job])?;
            let written = tokio::time::timeout_at(deadline.into(), write(events)).await;
            let written = written.map_err(|_| ApiError::timeout(took.as_secs_f64()))??;
            asked = Asked::Question(question.with_background(&written.text)?);
            background = Some(written);
        }
        let mode = if common.mode == Mode::T2t { Mode::Receiver } else { common.mode };
        let Prepared { job, aligned, took } = prepare(&engine, common, mode, asked).await?;
        let align = if aligned.is_some() { took } else { Duration::ZERO };
        tokenize += took - align;
        let (prompt, gates) = (job.prompt.ids.clone(), job.gates.clone());
        let job = Job { prompt_logprobs: common.prompt_logprobs, ..job };
        let jobs = choices(&job, common, background.is_some());
        let before = begun.elapsed();
        let events = engine.submit(jobs)?;
        Ok(Answers {
            engine,
            events,
            mode: common.mode,
            details: common.details,
            begun,
            deadline,
            timeout: server.limits.timeout,
            before,
            tokenize,
            align,
            background,
            prompt,
            aligned,
            gates,
            read: None,
            first: None,
            open: common.choices,
            completion_tokens: 0,
        })
    }

    /// The next piece; `None` once all choices have ended.
    pub async fn next(&mut self) -> Result<Option<Piece>, ApiError> {
        while self.open > 0 {
            let event = tokio::time::timeout_at(self.deadline.into(), self.events.next()).await;
            let event = event.map_err(|_| ApiError::timeout(self.timeout.as_secs_f64()))?;
            match event.ok_or_else(ApiError::dead)? {
                (_, Event::Read(read)) => {
                    self.read.get_or_insert(*read);
                }
                (index, Event::Token(token)) => {
                    self.completion_tokens += 1;
                    return Ok(Some(Piece::Token(index, token)));
                }
                (index, Event::Done(done)) => {
                    self.open -= 1;
                    self.first.get_or_insert_with(|| done.clone());
                    return Ok(Some(Piece::End(index, done)));
                }
                (_, Event::Failed(failure)) => return Err(failure.into()),
            }
        }
        Ok(None)
    }

    /// `usage`, as OpenAI's clients know it.
    pub fn usage(&self) -> Value {
        let cached = self.read.as_ref().map_or(0, |read| read.cached_tokens);
        usage(self.prompt.len(), self.completion_tokens, cached)
    }

    /// The `c2c` object, once all has ended. With details the fuser works through the prompt once more.
    pub async fn report(&self) -> Result<Value, ApiError> {
        let total = self.begun.elapsed();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let read = self.read.clone().unwrap_or_else(|| Read {
            queued: Duration::ZERO,
            report: Default::default(),
            cached_tokens: 0,
            cached_sharer_tokens: 0,
            prompt_logprobs: Vec::new(),
        });
        let speaker = read.report.receiver;
        let sharer = match (self.mode, &self.background) {
            (Mode::Sharer, _) => speaker,
            (_, Some(background)) => background.prefill,
            _ => read.report.sharers.iter().sum(),
        };
        let receiver = if self.mode == Mode::Sharer { Duration::ZERO } else { speaker };
        let (first, decode) =
            self.first.as_ref().map_or_else(Default::default, |d| (d.first_token, d.decode));
        let mut object = json!({
            "mode": self.mode,
            "aligned_tokens": self.aligned.as_ref().map_or(0, aligned_tokens),
            "bytes_communicated": read.report.fused_kv_bytes,
            "cached_sharer_tokens": read.cached_sharer_tokens,
            "timings_ms": {
                "tokenize": ms(self.tokenize),
                "align": ms(self.align),
                "queue": ms(read.queued),
                "sharer_prefill": ms(sharer),
                "receiver_prefill": ms(receiver),
                "fuse": ms(read.report.fuse),
                "fuse_exposed": ms(read.report.fuse_exposed),
                "first_token": ms(self.before + first),
                "decode": ms(decode),
                "total": ms(total),
            },
        });
        if let Some(background) = &self.background {
            object["sharer_text"] = background.text.clone().into();
        }
        if let Some(aligned) = &self.aligned {
            object["gates"] = match self.gates.as_slice() {
                [one] => open_gates(one),
                all => all.iter().map(open_gates).collect(),
            };
            object["mean_weights"] = Value::Null;
            if self.details {
                let (engine, aligned, gates) = (self.engine.clone(), aligned.clone(), self.gates.clone());
                let details = blocking(move || Details::of(engine.session(), &aligned, &gates)).await??;
                let fields = serde_json::to_value(details).map_err(|error| {
                    ApiError::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
                })?;
                for (name, value) in fields.as_object().into_iter().flatten() {
                    object[name] = value.clone();
                }
            }
        }
        Ok(object)
    }
}

pub(super) fn usage(prompt: usize, completion: usize, cached: usize) -> Value {
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": { "cached_tokens": cached },
    })
}

fn open_gates(gates: &Gates) -> Value {
    gates.iter().map(|gates| json!(gates.map(|gate| gate > 0.0))).collect()
}

/// Receiver tokens of fused sections that have a column, over all sharers.
fn aligned_tokens(aligned: &AlignedPrompt) -> usize {
    let last = aligned.sections.len().saturating_sub(1);
    let masks = aligned.sections.iter().enumerate().flat_map(|(index, section)| {
        std::iter::repeat_n(if index == last { 0 } else { section.sharer_mask }, section.len)
    });
    let of_token = |(token, mask): (usize, u32)| {
        let fused = aligned.sharers.iter().enumerate().filter(|(sharer, _)| mask >> sharer & 1 == 1);
        fused.filter(|(_, own)| own.columns.get(token).copied().flatten().is_some()).count()
    };
    masks.enumerate().map(of_token).sum()
}

/// Tokenising and aligning take a processor's time: they must not hold up other requests.
async fn prepare(
    engine: &Arc<Engine>,
    common: &Common,
    mode: Mode,
    asked: Asked,
) -> Result<Prepared, ApiError> {
    let (engine, fuse) = (engine.clone(), common.fuse.clone());
    let mut params = common.params.clone();
    params.max_new_tokens = params.max_new_tokens.max(1);
    let speaker = if mode == Mode::Sharer { Speaker::Sharer } else { Speaker::Receiver };
    let mut prepared = blocking(move || match asked {
        Asked::Question(question) if mode == Mode::C2c => engine.fused(&question, &fuse, &params),
        Asked::Question(question) => engine.alone(speaker, &question, &params),
        Asked::Ids(ids) => {
            let job = engine.of_ids(speaker, ids, &params)?;
            Ok(Prepared { job, aligned: None, took: Duration::ZERO })
        }
    })
    .await??;
    prepared.job.cache_salt.clone_from(&common.cache_salt);
    Ok(prepared)
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        log::error!("{error}");
        ApiError::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, "the request could not be worked on")
    })
}

/// As many jobs as choices, each with numbers of its own.
fn choices(job: &Job, common: &Common, continues: bool) -> Vec<Job> {
    let choice = |choice: usize| {
        let mut job = Job { continues, ..job.clone() };
        job.params.choice = choice as u32;
        job
    };
    (0..common.choices).map(choice).collect()
}

/// The sharer's whole text.
async fn write(mut events: Events) -> Result<Background, ApiError> {
    let (mut text, mut prefill) = (String::new(), Duration::ZERO);
    while let Some((_, event)) = events.next().await {
        match event {
            Event::Read(read) => prefill = read.report.receiver,
            Event::Token(token) => text.push_str(&token.text),
            Event::Done(done) => {
                text.push_str(&done.text);
                return Ok(Background { text: text.trim().into(), prefill });
            }
            Event::Failed(failure) => return Err(Failure::into(failure)),
        }
    }
    Err(ApiError::dead())
}
