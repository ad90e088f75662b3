//! `POST /v1/chat/completions`.

use super::{
    answer::{Answers, Asked, Piece},
    error::ApiError,
    fields::Fields,
    logprobs,
    request::{ALTERNATIVES, Common},
    state::Server,
    stream::{self, Chunks},
};
use crate::{
    engine::{Engine, TokenLogprobs},
    pipeline::{FinishReason, Question},
    tokenizer::{Message, TemplateOptions, Tokenizer},
};
use axum::{
    Json,
    body::Bytes,
    extract::State,
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// A request as it is understood.
struct Chat {
    common: Common,
    question: Question,
}

impl Chat {
    fn read(server: &Server, engine: &Engine, body: &Bytes) -> Result<Chat, ApiError> {
        let mut fields = Fields::parse(body)?;
        let mut common = Common::take(&mut fields, server, engine)?;
        let question = conversation(&mut fields, true)?;
        let wanted: bool = fields.take("logprobs")?.unwrap_or(false);
        let alternatives = fields.number("top_logprobs", 0..=ALTERNATIVES)?;
        if alternatives.is_some_and(|n| n > 0) && !wanted {
            return Err(fields.invalid("top_logprobs", "needs `logprobs`: true"));
        }
        common.params.logprobs = wanted.then_some(alternatives.unwrap_or(0));
        if common.params.max_new_tokens == 0 {
            return Err(fields.invalid("max_tokens", "must be at least 1"));
        }
        fields.ignore_rest();
        if server.log_prompts
            && let Question::Chat { messages, .. } = &question
        {
            log::info!("chat: {}", serde_json::to_string(messages).unwrap_or_default());
        }
        Ok(Chat { common, question })
    }
}

/// Messages and what the chat template is told beside them.
pub(super) fn conversation(fields: &mut Fields, generation_prompt: bool) -> Result<Question, ApiError> {
    let mut messages: Vec<Value> = fields.need("messages")?;
    messages.iter_mut().for_each(join_parts);
    let read = |(index, message): (usize, Value)| {
        serde_json::from_value::<Message>(message)
            .map_err(|error| fields.invalid("messages", format!("[{index}] is no message: {error}")))
    };
    let messages: Vec<Message> = messages.into_iter().enumerate().map(read).collect::<Result<_, _>>()?;
    if messages.is_empty() {
        return Err(fields.invalid("messages", "is empty: there is nothing to answer"));
    }
    let mut extra: Map<String, Value> = fields.take("chat_template_kwargs")?.unwrap_or_default();
    let thinking = extra.remove("enable_thinking");
    let enable_thinking = match thinking {
        // As `generate` without --thinking.
        None | Some(Value::Null) => Some(false),
        Some(Value::Bool(thinking)) => Some(thinking),
        Some(_) => {
            return Err(fields.invalid("chat_template_kwargs", "has an `enable_thinking` that is no bool"));
        }
    };
    let add_generation_prompt = fields.take("add_generation_prompt")?.unwrap_or(generation_prompt);
    Ok(Question::Chat {
        messages,
        template: TemplateOptions { add_generation_prompt, enable_thinking, extra },
    })
}

/// Text in parts, `[{"type": "text", "text": …}]`, is text.
fn join_parts(message: &mut Value) {
    let Some(Value::Array(parts)) = message.get("content") else { return };
    let text = |part: &Value| Some(part.get("text")?.as_str()?.to_string());
    if let Some(texts) = parts.iter().map(text).collect::<Option<Vec<String>>>() {
        message["content"] = texts.concat().into();
    }
}

/// Answers whole or as a stream.
pub async fn complete(State(server): State<Arc<Server>>, body: super::Body) -> Response {
    match respond(&server, body).await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    }
}

async fn respond(server: &Arc<Server>, body: super::Body) -> Result<Response, ApiError> {
    let engine = server.engine()?.clone();
    let Chat { common, question } = Chat::read(server, &engine, &super::body(server, body)?)?;
    let answers = Answers::begin(server, &common, Asked::Question(question)).await?;
    let head = Head { id: stream::id("chatcmpl"), created: stream::now(), model: common.model.clone() };
    let tokenizer = super::tokenizer(&engine, common.mode)?.clone();
    if common.stream {
        Ok(stream::respond(|chunks| streamed(chunks, answers, common, head, tokenizer)))
    } else {
        Ok(Json(whole(answers, &common, &head, &tokenizer).await?).into_response())
    }
}

struct Head {
    id: String,
    created: u64,
    model: String,
}

impl Head {
    fn object(&self, kind: &str) -> Value {
        json!({ "id": self.id, "object": kind, "created": self.created, "model": self.model })
    }

    fn chunk(
        &self,
        index: usize,
        delta: Value,
        logprobs: Option<Value>,
        finish: Option<FinishReason>,
    ) -> Value {
        let mut chunk = self.object("chat.completion.chunk");
        chunk["choices"] =
            json!([{ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish }]);
        chunk
    }
}

async fn whole(
    mut answers: Answers,
    common: &Common,
    head: &Head,
    tokenizer: &Tokenizer,
) -> Result<Value, ApiError> {
    let mut texts = vec![String::new(); common.choices];
    let mut scores: Vec<Vec<TokenLogprobs>> = vec![Vec::new(); common.choices];
    let mut reasons = vec![FinishReason::Length; common.choices];
    while let Some(piece) = answers.next().await? {
        match piece {
            Piece::Token(index, token) => {
                texts[index].push_str(&token.text);
                scores[index].extend(token.logprobs);
            }
            Piece::End(index, done) => {
                texts[index].push_str(&done.text);
                reasons[index] = done.finish_reason;
            }
        }
    }
    let choice =
        |(index, ((text, scores), reason)): (usize, ((String, Vec<TokenLogprobs>), FinishReason))| {
            let logprobs = common.params.logprobs.map(|_| logprobs::chat(tokenizer, &scores));
            let message = json!({ "role": "assistant", "content": text });
            json!({ "index": index, "message": message, "logprobs": logprobs, "finish_reason": reason })
        };
    let mut object = head.object("chat.completion");
    object["choices"] = texts.into_iter().zip(scores).zip(reasons).enumerate().map(choice).collect();
    object["usage"] = answers.usage();
    object["c2c"] = answers.report().await?;
    Ok(object)
}

async fn streamed(
    chunks: Chunks,
    mut answers: Answers,
    common: Common,
    head: Head,
    tokenizer: Tokenizer,
) -> Result<(), stream::Broken> {
    for index in 0..common.choices {
        chunks.send(head.chunk(index, json!({ "role": "assistant", "content": "" }), None, None)).await?;
    }
    let mut left = common.choices;
    while let Some(piece) = chunks.unless_gone(answers.next()).await?? {
        match piece {
            Piece::Token(index, token) => {
                if token.text.is_empty() && token.logprobs.is_none() {
                    continue;
                }
                let logprobs = token.logprobs.map(|scores| logprobs::chat(&tokenizer, &[scores]));
                chunks.send(head.chunk(index, json!({ "content": token.text }), logprobs, None)).await?;
            }
            Piece::End(index, done) => {
                left -= 1;
                if !done.text.is_empty() {
                    chunks.send(head.chunk(index, json!({ "content": done.text }), None, None)).await?;
                }
                let mut last = head.chunk(index, json!({}), None, Some(done.finish_reason));
                if left == 0 && !common.include_usage {
                    last["c2c"] = chunks.unless_gone(answers.report()).await??;
                }
                chunks.send(last).await?;
            }
        }
    }
    if common.include_usage {
        let mut last = head.object("chat.completion.chunk");
        last["choices"] = json!([]);
        last["usage"] = answers.usage();
        last["c2c"] = chunks.unless_gone(answers.report()).await??;
        chunks.send(last).await?;
    }
    Ok(())
}
