//! `POST /v1/completions`: texts or token ids to be continued, or only scored.

use super::{
    answer::{Answers, Asked, Piece, usage},
    error::ApiError,
    fields::Fields,
    logprobs::Lists,
    request::{ALTERNATIVES, Common},
    state::Server,
    stream::{self, Broken, Chunks},
};
use crate::{
    engine::{Engine, TokenLogprobs},
    pipeline::{FinishReason, Mode, Question},
    tokenizer::Tokenizer,
};
use axum::{
    Json,
    body::Bytes,
    extract::State,
    response::{IntoResponse, Response},
};
use futures_util::future::try_join_all;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;

/// Most prompts of a request.
const PROMPTS: usize = 128;

#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum Prompts {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    Lists(Vec<Vec<u32>>),
}

/// One prompt, and its text as the client wrote it.
#[derive(Clone)]
enum One {
    Text(String),
    Ids(Vec<u32>),
}

/// A request as it is understood.
struct Completion {
    common: Common,
    prompts: Vec<One>,
    /// Whether the prompt is part of the answer.
    echo: bool,
}

impl Completion {
    fn read(server: &Server, engine: &Engine, body: &Bytes) -> Result<Completion, ApiError> {
        let mut fields = Fields::parse(body)?;
        let mut common = Common::take(&mut fields, server, engine)?;
        let prompts =
            fields.take::<Value>("prompt")?.ok_or_else(|| fields.invalid("prompt", "is missing"))?;
        let prompts: Prompts = serde_json::from_value(prompts).map_err(|_| {
            fields.invalid("prompt", "is neither a text, nor token ids, nor a list of one kind of them")
        })?;
        let prompts = match prompts {
            Prompts::Text(text) => vec![One::Text(text)],
            Prompts::Ids(ids) => vec![One::Ids(ids)],
            Prompts::Texts(texts) => texts.into_iter().map(One::Text).collect(),
            Prompts::Lists(lists) => lists.into_iter().map(One::Ids).collect(),
        };
        if prompts.is_empty() || prompts.len() > PROMPTS {
            return Err(
                fields.invalid("prompt", format!("is a list of {}: 1 to {PROMPTS} are taken", prompts.len()))
            );
        }
        let empty = |prompt: &One| match prompt {
            One::Text(text) => text.is_empty(),
            One::Ids(ids) => ids.is_empty(),
        };
        if prompts.iter().any(empty) {
            return Err(fields.invalid("prompt", "is empty: there is nothing to continue"));
        }
        if common.mode == Mode::T2t {
            return Err(ApiError::invalid(
                "c2c.mode",
                "text-to-text needs messages: ask /v1/chat/completions",
            ));
        }
        if common.mode == Mode::C2c && prompts.iter().any(|prompt| matches!(prompt, One::Ids(_))) {
            let problem = "of token ids is one model's alone: give receiver+sharer a text to align";
            return Err(fields.invalid("prompt", problem));
        }
        let echo = fields.take("echo")?.unwrap_or(false);
        let logprobs = fields.number("logprobs", 0..=ALTERNATIVES)?;
        common.params.logprobs = logprobs;
        common.prompt_logprobs = logprobs.filter(|_| echo);
        if common.params.max_new_tokens == 0 && !echo {
            return Err(fields.invalid("max_tokens", "is 0, which only makes sense with `echo`"));
        }
        fields.ignore_rest();
        if server.log_prompts {
            for prompt in &prompts {
                match prompt {
                    One::Text(text) => log::info!("completion: {text:?}"),
                    One::Ids(ids) => log::info!("completion: {ids:?}"),
                }
            }
        }
        Ok(Completion { common, prompts, echo })
    }
}

pub async fn complete(State(server): State<Arc<Server>>, body: super::Body) -> Response {
    match respond(&server, body).await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    }
}

async fn respond(server: &Arc<Server>, body: super::Body) -> Result<Response, ApiError> {
    let engine = server.engine()?.clone();
    let Completion { common, prompts, echo } =
        Completion::read(server, &engine, &super::body(server, body)?)?;
    let tokenizer = super::tokenizer(&engine, common.mode)?.clone();
    let begin = |(index, prompt): (usize, One)| {
        let (server, common, tokenizer) = (server.clone(), common.clone(), tokenizer.clone());
        async move {
            let (text, asked) = match prompt {
                One::Text(text) => (text.clone(), Asked::Question(Question::Raw(text))),
                One::Ids(ids) => (tokenizer.decode(&ids, false), Asked::Ids(ids)),
            };
            let answers = Answers::begin(&server, &common, asked).await?;
            let echoed = if echo { text } else { String::new() };
            Ok::<_, ApiError>(Writer { answers, tokenizer, common, echoed, first: index })
        }
    };
    let writers = try_join_all(prompts.into_iter().enumerate().map(begin)).await?;
    let head = json!({
        "id": stream::id("cmpl"), "object": "text_completion", "created": stream::now(), "model": common.model,
    });
    if common.stream {
        return Ok(stream::respond(|chunks| streamed(chunks, writers, common.include_usage, head)));
    }
    let written = try_join_all(writers.into_iter().map(Writer::whole)).await?;
    let mut object = head;
    let (mut choices, mut counts) = (Vec::new(), [0; 3]);
    for (index, (answers, own)) in written.into_iter().enumerate() {
        choices.extend(own);
        add(&mut counts, &answers);
        if index == 0 {
            object["c2c"] = answers.report().await?;
        }
    }
    object["choices"] = choices.into();
    object["usage"] = usage(counts[0], counts[1], counts[2]);
    Ok(Json(object).into_response())
}

/// Tokens of prompts, of answers, and those of prompts that were cached.
fn add(counts: &mut [usize; 3], answers: &Answers) {
    counts[0] += answers.prompt.len();
    counts[1] += answers.completion_tokens;
    counts[2] += answers.read.as_ref().map_or(0, |read| read.cached_tokens);
}

/// The answers to one prompt.
struct Writer {
    answers: Answers,
    tokenizer: Tokenizer,
    common: Common,
    /// The prompt, where it is part of the answer.
    echoed: String,
    /// The prompt's number.
    first: usize,
}

impl Writer {
    fn index(&self, choice: usize) -> usize {
        self.first * self.common.choices + choice
    }

    /// The prompt's own log-probabilities, once it is read.
    fn prompt_scores(&self, lists: &mut Lists) {
        if self.common.prompt_logprobs.is_none() {
            return;
        }
        if let Some(&id) = self.answers.prompt.first() {
            lists.first(&self.tokenizer, id);
        }
        let scores = self.answers.read.iter().flat_map(|read| &read.prompt_logprobs);
        scores.for_each(|scores| lists.push(&self.tokenizer, scores));
    }

    /// Whether tokens of the answer are told: a request for none gets none.
    fn tells(&self) -> bool {
        self.common.params.max_new_tokens > 0
    }

    async fn whole(mut self) -> Result<(Answers, Vec<Value>), ApiError> {
        let choices = self.common.choices;
        let mut texts = vec![self.echoed.clone(); choices];
        let mut scores: Vec<Vec<TokenLogprobs>> = vec![Vec::new(); choices];
        let mut reasons = vec![FinishReason::Length; choices];
        while let Some(piece) = self.answers.next().await? {
            match piece {
                Piece::Token(..) if !self.tells() => self.answers.completion_tokens = 0,
                Piece::Token(index, token) => {
                    texts[index].push_str(&token.text);
                    scores[index].extend(token.logprobs);
                }
                Piece::End(index, done) if self.tells() => {
                    texts[index].push_str(&done.text);
                    // The end token is scored, too: every prompt is followed by something.
                    scores[index].extend(done.end.and_then(|end| end.logprobs));
                    reasons[index] = done.finish_reason;
                }
                Piece::End(..) => {}
            }
        }
        let mut all = Vec::new();
        for (choice, ((text, scores), reason)) in texts.into_iter().zip(scores).zip(reasons).enumerate() {
            let logprobs = self.common.params.logprobs.map(|_| {
                let mut lists = Lists::default();
                self.prompt_scores(&mut lists);
                scores.iter().for_each(|scores| lists.push(&self.tokenizer, scores));
                lists.object()
            });
            all.push(chunk(self.index(choice), &text, logprobs, Some(reason)));
        }
        Ok((self.answers, all))
    }

    async fn stream(mut self, chunks: Chunks, head: Value) -> Result<Answers, Broken> {
        let send = |chunk: Value| {
            let mut object = head.clone();
            object["choices"] = json!([chunk]);
            chunks.send(object)
        };
        let mut echoed = vec![self.echoed.is_empty(); self.common.choices];
        while let Some(piece) = chunks.unless_gone(self.answers.next()).await?? {
            let (Piece::Token(choice, _) | Piece::End(choice, _)) = &piece;
            let (choice, index) = (*choice, self.index(*choice));
            if !std::mem::replace(&mut echoed[choice], true) {
                let logprobs = self.common.prompt_logprobs.map(|_| {
                    let mut lists = Lists::default();
                    self.prompt_scores(&mut lists);
                    lists.object()
                });
                send(chunk(index, &self.echoed, logprobs, None)).await?;
            }
            let score = |scores: Option<TokenLogprobs>| {
                scores.map(|scores| {
                    let mut lists = Lists::default();
                    lists.push(&self.tokenizer, &scores);
                    lists.object()
                })
            };
            match piece {
                Piece::Token(..) if !self.tells() => self.answers.completion_tokens = 0,
                Piece::Token(_, token) if token.text.is_empty() && token.logprobs.is_none() => {}
                Piece::Token(_, token) => {
                    send(chunk(index, &token.text, score(token.logprobs), None)).await?;
                }
                Piece::End(_, done) => {
                    let reason = if self.tells() { done.finish_reason } else { FinishReason::Length };
                    let text = if self.tells() { done.text.as_str() } else { "" };
                    let end = done.end.and_then(|end| end.logprobs).filter(|_| self.tells());
                    send(chunk(index, text, score(end), Some(reason))).await?;
                }
            }
        }
        Ok(self.answers)
    }
}

fn chunk(index: usize, text: &str, logprobs: Option<Value>, finish: Option<FinishReason>) -> Value {
    json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish })
}

async fn streamed(
    chunks: Chunks,
    writers: Vec<Writer>,
    include_usage: bool,
    head: Value,
) -> Result<(), Broken> {
    let all = writers.into_iter().map(|writer| writer.stream(chunks.clone(), head.clone()));
    let answers = try_join_all(all).await?;
    // A chunk without choices is for those who asked for it.
    if !include_usage {
        return Ok(());
    }
    let mut last = head;
    let mut counts = [0; 3];
    answers.iter().for_each(|answers| add(&mut counts, answers));
    last["choices"] = json!([]);
    last["usage"] = usage(counts[0], counts[1], counts[2]);
    if let Some(first) = answers.first() {
        last["c2c"] = chunks.unless_gone(first.report()).await??;
    }
    chunks.send(last).await
}
