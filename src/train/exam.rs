//! Accuracy on multiple choice questions: the letter whose logit is highest after the response text.
//!
//! One question at a time, so that times are those of an answer.

use super::{BatchCache, Control, Error, PairTrainer, Piece, Sample, batch_cache::BLOCK_SIZE};
use crate::{
    align::Aligner,
    backend::{DType, Queue},
    data::{Example, PromptStyle, templates::LetterError},
    engine::SamplingParams,
    eval::asking,
    ops::IGNORED,
    pipeline::{Lane, Model, Prompt, Stream, generate, t2t},
    tokenizer::{Message, Tokenizer},
};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Tokens that the sharer may write in text-to-text.
const BACKGROUND: usize = 64;

/// A question as it is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// The user's message.
    pub text: String,
    pub choices: usize,
    pub answer: usize,
    /// What every answer begins with.
    pub response: &'static str,
    pub subject: Option<String>,
    pub origin: String,
}

/// Who answered, and how well.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    pub mode: String,
    pub correct: usize,
    pub questions: usize,
    /// Mean time to the letter.
    pub ms: f64,
}

impl Score {
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.questions.max(1) as f64
    }
}

/// Questions to be answered.
pub struct Exam {
    pub questions: Vec<Question>,
}

impl Exam {
    /// Those of `examples` that are multiple choice questions, asked in `style`.
    pub fn new<'a>(examples: impl IntoIterator<Item = (&'a Example, PromptStyle)>) -> Exam {
        let questions = examples.into_iter().filter_map(|(example, style)| {
            let question = example.question.as_ref()?;
            Some(Question {
                text: style.prompt(question),
                choices: question.choices.len(),
                answer: question.answer,
                response: style.response(),
                subject: example.subject.clone(),
                origin: example.origin.to_string(),
            })
        });
        Exam { questions: questions.collect() }
    }

    /// The first `n` questions.
    pub fn first(&self, n: usize) -> Exam {
        Exam { questions: self.questions.iter().take(n).cloned().collect() }
    }

    /// The tokens of the letters of all choices.
    ///
    /// # Errors
    /// If answers of a model with this tokenizer cannot be told apart by a letter.
    pub fn letters(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, LetterError> {
        let most = self.questions.iter().map(|question| question.choices).max().unwrap_or(0);
        asking::letters(tokenizer, most)
    }

    /// Asks every question of `answer`, which returns the logits of a model with this tokenizer.
    fn score(
        &self,
        mode: &str,
        tokenizer: &Tokenizer,
        mut answer: impl FnMut(usize, &Question) -> Result<Vec<f32>, Error>,
    ) -> Result<Score, Error> {
        let (mut correct, mut spent) = (0, Duration::ZERO);
        let letters = self.letters(tokenizer)?;
        for (index, question) in self.questions.iter().enumerate() {
            let start = Instant::now();
            let logits = answer(index, question)?;
            spent += start.elapsed();
            let best = asking::best_choice(&logits, &letters, question.choices);
            correct += usize::from(best == question.answer);
        }
        let questions = self.questions.len();
        let ms = spent.as_secs_f64() * 1e3 / questions.max(1) as f64;
        Ok(Score { mode: mode.into(), correct, questions, ms })
    }

    /// One model alone.
    pub fn alone(&self, mode: &str, model: &Model, queue: &Queue, kv: DType) -> Result<Score, Error> {
        let tokenizer = model.tokenizer()?;
        let mut cache = BatchCache::new(queue, &model.decoder, kv)?;
        self.score(mode, tokenizer, |_, question| {
            let prompt = begun(tokenizer, &[Message::new("user", &question.text)], question)?;
            last_logits(&mut cache, queue, model, &prompt)
        })
    }

    /// The receiver with the fusers of `pair` as they are. `swap`: each question with the sharers' caches of the one before.
    pub fn c2c(
        &self,
        mode: &str,
        pair: &mut PairTrainer,
        aligner: &Aligner,
        receiver: &Tokenizer,
        swap: bool,
        control: Control,
    ) -> Result<Score, Error> {
        let prompt = |index: usize| asked(aligner, &self.questions[index]);
        self.score(mode, receiver, |index, question| {
            let mut own = prompt(index)?;
            if swap {
                let other = prompt(asking::swapped_with(index, self.questions.len()))?;
                asking::swap(&mut own, &other);
            }
            let labels = vec![IGNORED; own.ids.len()];
            pair.logits(&Sample { prompt: own, labels, origin: question.origin.clone() }, control)
        })
    }

    /// Text-to-text: the sharer writes what it knows, the receiver reads it and answers.
    pub fn t2t(&self, receiver: &Model, sharer: &Model, queue: &Queue, kv: DType) -> Result<Score, Error> {
        let (ours, theirs) = (receiver.tokenizer()?, sharer.tokenizer()?);
        let mut cache = BatchCache::new(queue, &receiver.decoder, kv)?;
        let mut params = SamplingParams { max_new_tokens: BACKGROUND, ..SamplingParams::default() };
        params.eos.extend(&theirs.special().eos);
        self.score("t2t", ours, |_, question| {
            let (_, ids) = asking::alone(theirs, &t2t::ask(&question.text), "")?;
            let positions: Vec<u32> = (0..ids.len() as u32).collect();
            let room = ids.len() + BACKGROUND;
            let (config, backend) = (&sharer.decoder.config, queue.backend());
            let pages = config.paged_kv(backend, room.div_ceil(BLOCK_SIZE), BLOCK_SIZE, kv)?;
            let mut lane = Lane::new(sharer.decoder.clone(), queue.clone(), pages, room)?;
            lane.append(&ids, &positions, crate::model::Goal::Hidden, |_, _| {})?;
            let logits = lane.logits()?;
            let stream =
                Stream { detokenizer: Some(theirs.detokenizer()), on_text: &mut |_| {}, keep_scores: false };
            let written = generate(&mut lane, logits, &params, stream)?.text;
            let messages = t2t::answer(&question.text, written.trim());
            let prompt = begun(ours, &messages, question)?;
            last_logits(&mut cache, queue, receiver, &prompt)
        })
    }
}

/// The conversation with the answer begun, for one model alone.
fn begun(tokenizer: &Tokenizer, messages: &[Message], question: &Question) -> Result<Prompt, Error> {
    Ok(super::sample::plain(asking::alone(tokenizer, messages, question.response)?.1))
}

/// The conversation with the answer begun, as the receiver and its sharers read it.
fn asked(aligner: &Aligner, question: &Question) -> Result<Prompt, Error> {
    Ok(asking::together(aligner, &[Message::new("user", &question.text)], question.response)?)
}

fn last_logits(
    cache: &mut BatchCache,
    queue: &Queue,
    model: &Model,
    prompt: &Prompt,
) -> Result<Vec<f32>, Error> {
    cache.begin(queue, &model.decoder, &[prompt.ids.len()])?;
    cache.logits(queue, &model.decoder, &[Piece { ids: &prompt.ids, positions: &prompt.positions }])
}
