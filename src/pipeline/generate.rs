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

    /// Tokens that the context has room for.
    fn room(&self) -> usize;

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

    fn room(&self) -> usize {
        self.decoder.config.context_length.saturating_sub(Lane::ids(self).len())
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
    stream: Stream,
) -> Result<Generation, Error> {
    let Stream { detokenizer, on_text, keep_scores } = stream;
    let mut turn = Turn::new(params.clone(), on.ids(), detokenizer)?;
    let mut scores = Vec::new();
    let mut next = Next::Logits(logits);
    loop {
        let sampled = match &next {
            Next::Logits(logits) => turn.sampler.sample(logits)?,
            Next::Sampled(sampled) => sampled.clone(),
        };
        let room = on.room();
        let token = sampled.token;
        let taken = turn.take(sampled, room);
        if let (true, true, Next::Logits(logits)) = (keep_scores, taken.kept, &next) {
            scores.extend(logits);
        }
        if !taken.text.is_empty() {
            on_text(&taken.text);
        }
        if taken.finished.is_some() {
            break;
        }
        next = step(on, &mut turn.sampler, token, keep_scores)?;
    }
    Ok(Generation { scores, ..turn.end() })
}

/// One answer while it grows, token by token.
pub struct Turn {
    pub sampler: Sampler,
    params: SamplingParams,
    stop: StopMatcher,
    /// Gone once the answer has ended.
    detokenizer: Option<Detokenizer>,
    answer: Generation,
    begin: Option<Instant>,
}

/// What became of a token.
#[derive(Clone, Debug)]
pub struct Taken {
    /// Text that is now sure to be part of the answer.
    pub text: String,
    /// Whether the token is part of the answer: an end token is not.
    pub kept: bool,
    pub finished: Option<FinishReason>,
}

impl Turn {
    /// `prompt` counts for penalties; without a detokenizer there is no text, and no stop string is found.
    pub fn new(
        params: SamplingParams,
        prompt: &[u32],
        detokenizer: Option<Detokenizer>,
    ) -> Result<Turn, Error> {
        let sampler = Sampler::new(params.clone(), prompt)?;
        let answer = Generation {
            tokens: Vec::new(),
            text: String::new(),
            finish_reason: FinishReason::Length,
            logprobs: Vec::new(),
            scores: Vec::new(),
            decode: Duration::ZERO,
        };
        let stop = StopMatcher::new(&params.stop);
        Ok(Turn { sampler, params, stop, detokenizer, answer, begin: None })
    }

    /// Takes the next token; the cache has `room` for it and that many less one after it.
    pub fn take(&mut self, sampled: Sampled, room: usize) -> Taken {
        let begin = *self.begin.get_or_insert_with(Instant::now);
        if self.params.ends_at(sampled.token) {
            return self.finish(String::new(), false, FinishReason::Stop);
        }
        self.answer.tokens.push(sampled.token);
        self.answer.logprobs.extend(sampled.logprobs);
        self.answer.decode = begin.elapsed();
        let mut text = String::new();
        if let Some(detokenizer) = &mut self.detokenizer {
            let step = self.stop.push(&detokenizer.push(sampled.token));
            text = step.emit;
            if step.stopped {
                self.detokenizer = None;
                return self.finish(text, true, FinishReason::Stop);
            }
        }
        if self.answer.tokens.len() == self.params.max_new_tokens || room <= 1 {
            return self.finish(text, true, FinishReason::Length);
        }
        self.answer.text.push_str(&text);
        Taken { text, kept: true, finished: None }
    }

    /// The end: what is held back is part of the answer unless a stop string is in it.
    fn finish(&mut self, mut text: String, kept: bool, mut reason: FinishReason) -> Taken {
        if let Some(detokenizer) = self.detokenizer.take() {
            let step = self.stop.push(&detokenizer.finish());
            text.push_str(&step.emit);
            if step.stopped {
                reason = FinishReason::Stop;
            } else {
                text.push_str(&self.stop.finish());
            }
        }
        self.answer.text.push_str(&text);
        self.answer.finish_reason = reason;
        Taken { text, kept, finished: Some(reason) }
    }

    /// The answer so far.
    pub fn answer(&self) -> &Generation {
        &self.answer
    }

    pub fn end(self) -> Generation {
        self.answer
    }
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
