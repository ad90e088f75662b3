//! `POST /tokenize`, `/detokenize`, `/apply-template`: what a model's tokenizer and chat template make of a text.

use super::{chat::conversation, error::ApiError, fields::Fields, request::models, state::Server};
use crate::{
    engine::Engine,
    pipeline::{Mode, Question},
    tokenizer::Tokenizer,
};
use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use std::sync::Arc;

type Work = fn(Fields, &Tokenizer) -> Result<Value, ApiError>;

pub async fn tokenize(State(server): State<Arc<Server>>, body: super::Body) -> Response {
    respond(&server, body, |mut fields, tokenizer| {
        let add_special = fields.take("add_special")?.unwrap_or(true);
        // A conversation instead of a text, as vLLM takes it.
        let (text, add_special) = match fields.take::<String>("content")?.or(fields.take("prompt")?) {
            Some(text) => (text, add_special),
            None => (render(&mut fields, tokenizer)?, false),
        };
        let pieces = fields.take("with_pieces")?.unwrap_or(false);
        fields.ignore_rest();
        let ids = tokenizer
            .encode(&text, add_special)
            .map_err(|error| ApiError::invalid("content", error.to_string()))?
            .ids;
        let piece = |&id: &u32| json!({ "id": id, "piece": super::logprobs::text(tokenizer, id) });
        let tokens = if pieces { ids.iter().map(piece).collect() } else { json!(ids) };
        Ok(json!({ "tokens": tokens, "count": ids.len() }))
    })
    .await
}

pub async fn detokenize(State(server): State<Arc<Server>>, body: super::Body) -> Response {
    respond(&server, body, |mut fields, tokenizer| {
        let ids: Vec<u32> = fields.need("tokens")?;
        fields.ignore_rest();
        if let Some(unknown) = ids.iter().find(|&&id| tokenizer.token_of(id).is_none()) {
            return Err(ApiError::invalid("tokens", format!("token id {unknown} is not in the vocabulary")));
        }
        Ok(json!({ "content": tokenizer.decode(&ids, false) }))
    })
    .await
}

pub async fn apply_template(State(server): State<Arc<Server>>, body: super::Body) -> Response {
    respond(&server, body, |mut fields, tokenizer| {
        let prompt = render(&mut fields, tokenizer)?;
        fields.ignore_rest();
        Ok(json!({ "prompt": prompt }))
    })
    .await
}

fn render(fields: &mut Fields, tokenizer: &Tokenizer) -> Result<String, ApiError> {
    let Question::Chat { messages, template } = conversation(fields, true)? else {
        return Err(fields.invalid("messages", "are missing"));
    };
    tokenizer.render(&messages, &template).map_err(|error| ApiError::invalid("messages", error.to_string()))
}

/// Runs `work` with the tokenizer of the model that the request names: the receiver's, where it names none.
async fn respond(server: &Server, body: super::Body, work: Work) -> Response {
    let answer = async {
        let engine = server.engine()?.clone();
        let mut fields = Fields::parse(&super::body(server, body)?)?;
        let mode = who(&mut fields, &engine)?;
        let tokenizer = super::tokenizer(&engine, mode)?.clone();
        super::answer::blocking(move || work(fields, &tokenizer)).await?
    };
    match answer.await {
        Ok(value) => Json(value).into_response(),
        Err(error) => error.into_response(),
    }
}

fn who(fields: &mut Fields, engine: &Engine) -> Result<Mode, ApiError> {
    let Some(model) = fields.take::<String>("model")? else { return Ok(Mode::Receiver) };
    match model.as_str() {
        "sharer" if models(engine).contains(&"sharer") => Ok(Mode::Sharer),
        "receiver" | "receiver+sharer" => Ok(Mode::Receiver),
        _ => Err(fields.invalid("model", "is none of those here: see /v1/models").code("model_not_found")),
    }
}
