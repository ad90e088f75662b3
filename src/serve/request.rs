//! What chat and plain completions have in common: sampling, who answers, and how.

use super::{error::ApiError, fields::Fields, state::Server};
use crate::{
    engine::{Engine, FuseOptions, SamplingParams},
    fuser::GateOverride,
    pipeline::Mode,
};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::Value;
use std::{
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{SystemTime, UNIX_EPOCH},
};

/// Most stop strings of a request.
const STOPS: usize = 64;
/// Most answers to one prompt, and most alternatives of a token.
const CHOICES: u64 = 16;
pub(super) const ALTERNATIVES: u64 = 20;
/// Tokens of an answer, where a request does not say.
const TOKENS: usize = 256;

/// The fields that both kinds of completion take.
#[derive(Clone, Debug)]
pub struct Common {
    /// As the request named it.
    pub model: String,
    pub mode: Mode,
    pub fuse: FuseOptions,
    /// Whether the answer tells of alignment and weights.
    pub details: bool,
    pub params: SamplingParams,
    /// Log-probabilities of the prompt, with so many alternatives.
    pub prompt_logprobs: Option<usize>,
    pub choices: usize,
    pub stream: bool,
    pub include_usage: bool,
    pub cache_salt: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

impl Common {
    pub fn take(fields: &mut Fields, server: &Server, engine: &Engine) -> Result<Common, ApiError> {
        let model: String = fields.need("model")?;
        let (mode, fuse, details) = c2c(fields, &model, engine)?;
        let stop = match fields.take("stop")? {
            None => Vec::new(),
            Some(OneOrMany::One(one)) => vec![one],
            Some(OneOrMany::Many(many)) => many,
        };
        if stop.len() > STOPS {
            let problem = format!("has {} strings: at most {STOPS} are looked for", stop.len());
            return Err(fields.invalid("stop", problem));
        }
        let most = server.limits.tokens as u64;
        let tokens = fields.number("max_completion_tokens", 1..=most)?;
        let tokens = tokens.or(fields.number("max_tokens", 0..=most)?).unwrap_or(TOKENS.min(most as usize));
        let top_k: Option<i64> = fields.take("top_k")?;
        let usual = SamplingParams::default();
        let mut or =
            |name: &str, usual: f32| -> Result<f32, ApiError> { Ok(fields.take(name)?.unwrap_or(usual)) };
        let params = SamplingParams {
            temperature: or("temperature", usual.temperature)?,
            top_p: or("top_p", usual.top_p)?,
            min_p: or("min_p", usual.min_p)?,
            repetition_penalty: or("repetition_penalty", usual.repetition_penalty)?,
            presence_penalty: or("presence_penalty", usual.presence_penalty)?,
            frequency_penalty: or("frequency_penalty", usual.frequency_penalty)?,
            // 0 and −1 are "off" with others.
            top_k: top_k.and_then(|k| usize::try_from(k).ok()).filter(|&k| k > 0),
            seed: seed(fields)?,
            stop,
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
            max_new_tokens: tokens,
            ..usual
        };
        // An answer of no tokens is for scoring a prompt: the engine then makes one, which is not told.
        SamplingParams { max_new_tokens: tokens.max(1), ..params.clone() }.validate()?;
        let options: Option<StreamOptions> = fields.take("stream_options")?;
        Ok(Common {
            model,
            mode,
            fuse,
            details,
            params,
            prompt_logprobs: None,
            choices: fields.number("n", 1..=CHOICES)?.unwrap_or(1),
            stream: fields.take("stream")?.unwrap_or(false),
            include_usage: options.is_some_and(|options| options.include_usage),
            cache_salt: fields.take("cache_salt")?.unwrap_or_default(),
        })
    }
}

/// The model ids that this engine answers to.
pub(super) fn models(engine: &Engine) -> Vec<&'static str> {
    let session = engine.session();
    let (receiver, sharer) = (session.receiver.is_some(), !session.sharers.is_empty());
    let all = [("receiver", receiver), ("sharer", sharer), ("receiver+sharer", receiver && sharer)];
    all.into_iter().filter(|(_, there)| *there).map(|(id, _)| id).collect()
}

/// Who answers: the model's id says, of both together the `c2c` object.
fn c2c(fields: &mut Fields, model: &str, engine: &Engine) -> Result<(Mode, FuseOptions, bool), ApiError> {
    if !models(engine).contains(&model) {
        let known = models(engine).join(", ");
        let message = format!("there is no model `{}`: {known} are there", model.escape_debug());
        let error = ApiError::invalid("model", message).code("model_not_found");
        return Err(ApiError { status: StatusCode::NOT_FOUND, ..error });
    }
    let mut c2c = fields.object("c2c", "c2c.")?;
    let given = match c2c.take::<String>("mode")?.as_deref() {
        None => None,
        Some("receiver") => Some(Mode::Receiver),
        Some("sharer") => Some(Mode::Sharer),
        Some("t2t") => Some(Mode::T2t),
        Some("c2c") => Some(Mode::C2c),
        Some(_) => return Err(c2c.invalid("mode", "is none of receiver, sharer, t2t and c2c")),
    };
    let alone = match model {
        "receiver" => Some(Mode::Receiver),
        "sharer" => Some(Mode::Sharer),
        _ => None,
    };
    let mode = match (alone, given) {
        (Some(alone), Some(given)) if alone != given => {
            return Err(
                c2c.invalid("mode", format!("needs both models: ask for receiver+sharer, not {model}"))
            );
        }
        (alone, given) => given.or(alone).unwrap_or(Mode::C2c),
    };
    if mode == Mode::C2c && engine.session().fusers.is_empty() {
        return Err(c2c.invalid("mode", "c2c needs a fuser: start the server with --fuser"));
    }
    let fuse = FuseOptions {
        gates: gates(&mut c2c)?,
        fraction: parsed(&mut c2c, "fraction")?,
        alignment: parsed(&mut c2c, "alignment")?,
    };
    let details = c2c.take("details")?.unwrap_or(false);
    c2c.ignore_rest();
    Ok((mode, fuse, details))
}

/// A word, a list of layers, or one pair of gates a layer. Never a file's name.
fn gates(c2c: &mut Fields) -> Result<Option<GateOverride>, ApiError> {
    match c2c.take::<Value>("gates")? {
        None => Ok(None),
        Some(Value::String(text)) => match GateOverride::in_words(&text) {
            Some(gates) => gates.map(Some).map_err(|error| ApiError::invalid("c2c.gates", error.to_string())),
            None => {
                let text = text.escape_debug();
                Err(c2c.invalid(
                    "gates",
                    format!("is `{text}`: expected learned, open, closed or a list such as 0-3,7"),
                ))
            }
        },
        Some(table) => {
            let gate = |value: &Value| {
                let number = value.as_f64().or(value.as_bool().map(f64::from));
                number.filter(|number| (0.0..=1.0).contains(number)).map(|number| number as f32)
            };
            let row = |row: &Value| match row.as_array().map(Vec::as_slice) {
                Some([key, value]) => Some([gate(key)?, gate(value)?]),
                _ => None,
            };
            let rows: Option<Vec<[f32; 2]>> =
                table.as_array().and_then(|rows| rows.iter().map(row).collect());
            let wrong = || c2c.invalid("gates", "is no list of [key, value], one pair a layer, each 0 to 1");
            rows.map(|rows| Some(GateOverride::Table(rows))).ok_or_else(wrong)
        }
    }
}

/// A field that is written as on the command line; a number will do for a text.
fn parsed<T: FromStr<Err: std::fmt::Display>>(
    fields: &mut Fields,
    name: &str,
) -> Result<Option<T>, ApiError> {
    let text = match fields.take::<Value>(name)? {
        None => return Ok(None),
        Some(Value::String(text)) => text,
        Some(Value::Number(number)) => number.to_string(),
        Some(_) => return Err(fields.invalid(name, "is neither a text nor a number")),
    };
    text.parse().map(Some).map_err(|error: T::Err| fields.invalid(name, format!("cannot be: {error}")))
}

/// Without one, every request draws its own numbers.
fn seed(fields: &mut Fields) -> Result<u64, ApiError> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let Some(value) = fields.take::<Value>("seed")? else {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        return Ok(now ^ COUNT.fetch_add(1, Relaxed).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    };
    let number = value.as_u64().or(value.as_i64().map(|seed| seed as u64));
    number.ok_or_else(|| fields.invalid("seed", format!("is {value}: expected a whole number of 64 bits")))
}
