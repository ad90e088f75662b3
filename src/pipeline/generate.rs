//! The decode loop of one answer.

use super::{Error, Lane};
use crate::{
    engine::{Sampled, Sampler, SamplingParams, StopMatcher, TokenLogprobs},
    ops::{SampleRow, SampledRow},
    tokenizer::Detokenizer,
};
use serde::Serialize;
use std::time::{Duration, Instant};

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// `max_new_tokens`, or the end of the context.
    Length,
}

/// One answer.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Generated ids; an end token is not among them.
    pub tokens: Vec<u32>,
    /// Empty where there was no tokenizer.
    pub text: String,
    pub finish_reason: FinishReason,
    pub logprobs: Vec<TokenLogprobs>,
    /// Logits each token was drawn from, `[tokens, vocab]`, where asked for.
    pub scores: Vec<f32>,
    /// From the first token to the last.
    pub decode: Duration,
}

/// What the loop hands out as it goes.
pub struct Stream<'a> {
    pub detokenizer: Option<Detokenizer>,
    /// Called with each piece of text that is sure to be part of the answer.
    pub on_text: &'a mut dyn FnMut(&str),
    pub keep_scores: bool,
}

/// What an answer is decoded on: caches that grow by a token a step.
pub trait Decode {
    /// Token ids in the cache.
    fn ids(&self) -> &[u32];

    /// Whether the answer has to end with the token that comes next.
    fn is_full(&self) -> bool;

    /// Appends `id` and returns the logits `[vocab]` after it.
    fn step(&mut self, id: u32) -> Result<Vec<f32>, Error>;

    /// The same on a device that draws: what it drew. `None`, and nothing is done, where none does.
    fn step_drawn(&mut self, _id: u32, _row: &SampleRow) -> Result<Option<SampledRow>, Error> {
        Ok(None)
    }

    /// Logits `[vocab]` after the last step, which was drawn on the device.
    fn step_logits(&self) -> Result<Vec<f32>, Error>;
}

impl Decode for Lane {
    fn ids(&self) -> &[u32] {
        Lane::ids(self)
    }

    fn is_full(&self) -> bool {
        Lane::ids(self).len() + 1 >= self.decoder.config.context_length
    }

    fn step(&mut self, id: u32) -> Result<Vec<f32>, Error> {
        Lane::step(self, id)
    }

    fn step_drawn(&mut self, id: u32, row: &SampleRow) -> Result<Option<SampledRow>, Error> {
        Lane::step_drawn(self, id, row)
    }

    fn step_logits(&self) -> Result<Vec<f32>, Error> {
        Lane::step_logits(self)
    }
}

/// Decodes from `logits`, the logits after the last token in `on`.
///
/// Each drawn token but the last is appended: the cache then holds the prompt and the answer so far.
pub fn generate(
    on: &mut dyn Decode,
    logits: Vec<f32>,
    params: &SamplingParams,
    mut stream: Stream,
) -> Result<Generation, Error> {
    let mut sampler = Sampler::new(params.clone(), on.ids())?;
    let mut stop = StopMatcher::new(&params.stop);
    let mut answer = Generation {
        tokens: Vec::new(),
        text: String::new(),
        finish_reason: FinishReason::Length,
        logprobs: Vec::new(),
        scores: Vec::new(),
        decode: Duration::ZERO,
    };
    let mut next = Next::Logits(logits);
    let mut begin = None;
    loop {
        let sampled = match &next {
            Next::Logits(logits) => sampler.sample(logits)?,
            Next::Sampled(sampled) => sampled.clone(),
        };
        let begin = *begin.get_or_insert_with(Instant::now);
        if params.ends_at(sampled.token) {
            answer.finish_reason = FinishReason::Stop;
            break;
        }
        if let (true, Next::Logits(logits)) = (stream.keep_scores, &next) {
            answer.scores.extend(logits);
        }
        answer.tokens.push(sampled.token);
        answer.logprobs.extend(sampled.logprobs);
        answer.decode = begin.elapsed();
        if let Some(detokenizer) = &mut stream.detokenizer {
            let step = stop.push(&detokenizer.push(sampled.token));
            emit(&mut answer, &mut stream.on_text, &step.emit);
            if step.stopped {
                answer.finish_reason = FinishReason::Stop;
                return Ok(answer);
            }
        }
        if answer.tokens.len() == params.max_new_tokens || on.is_full() {
            break;
        }
        next = step(on, &mut sampler, sampled.token, stream.keep_scores)?;
    }
    if let Some(detokenizer) = stream.detokenizer.take() {
        let step = stop.push(&detokenizer.finish());
        emit(&mut answer, &mut stream.on_text, &step.emit);
        if step.stopped {
            answer.finish_reason = FinishReason::Stop;
        } else {
            let rest = stop.finish();
            emit(&mut answer, &mut stream.on_text, &rest);
        }
    }
    Ok(answer)
}

/// What the next token comes from.
enum Next {
    Logits(Vec<f32>),
    /// Drawn on the device.
    Sampled(Sampled),
}

fn step(on: &mut dyn Decode, sampler: &mut Sampler, id: u32, keep_scores: bool) -> Result<Next, Error> {
    let row = sampler.row().filter(|_| !keep_scores);
    let Some(drawn) = row.map(|row| on.step_drawn(id, &row)).transpose()?.flatten() else {
        return Ok(Next::Logits(on.step(id)?));
    };
    match sampler.accept(&drawn)? {
        Some(sampled) => Ok(Next::Sampled(sampled)),
        None => Ok(Next::Logits(on.step_logits()?)),
    }
}

fn emit(answer: &mut Generation, on_text: &mut &mut dyn FnMut(&str), text: &str) {
    if !text.is_empty() {
        answer.text.push_str(text);
        on_text(text);
    }
}
