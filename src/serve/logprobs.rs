//! Log-probabilities in OpenAI's two shapes.

use crate::{engine::TokenLogprobs, tokenizer::Tokenizer};
use serde_json::{Map, Value, json};

/// JSON has no −∞; this is what others write.
const IMPOSSIBLE: f32 = -9999.0;

fn number(logprob: f32) -> f32 {
    logprob.max(IMPOSSIBLE)
}

/// A token as text; special ones, too.
pub fn text(tokenizer: &Tokenizer, id: u32) -> String {
    tokenizer.decode(&[id], false)
}

/// Of chat completions: a list of tokens, each with its alternatives.
pub fn chat(tokenizer: &Tokenizer, scores: &[TokenLogprobs]) -> Value {
    let one = |id: u32, logprob: f32| {
        let token = text(tokenizer, id);
        let bytes = token.as_bytes().to_vec();
        json!({ "token": token, "logprob": number(logprob), "bytes": bytes })
    };
    let content = scores.iter().map(|scores| {
        let mut token = one(scores.token, scores.logprob);
        token["top_logprobs"] = scores.top.iter().map(|&(id, logprob)| one(id, logprob)).collect();
        token
    });
    json!({ "content": content.collect::<Vec<Value>>() })
}

/// Of plain completions: parallel lists.
#[derive(Default)]
pub struct Lists {
    tokens: Vec<String>,
    logprobs: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<usize>,
    /// Characters so far.
    length: usize,
}

impl Lists {
    /// The first token of a prompt, of which nothing is said.
    pub fn first(&mut self, tokenizer: &Tokenizer, id: u32) {
        self.add(text(tokenizer, id), Value::Null, Value::Null);
    }

    pub fn push(&mut self, tokenizer: &Tokenizer, scores: &TokenLogprobs) {
        let mut top = Map::new();
        for &(id, logprob) in &scores.top {
            // Of tokens that read the same the most probable stays.
            top.entry(text(tokenizer, id)).or_insert_with(|| json!(number(logprob)));
        }
        self.add(text(tokenizer, scores.token), json!(number(scores.logprob)), top.into());
    }

    fn add(&mut self, token: String, logprob: Value, top: Value) {
        self.offsets.push(self.length);
        self.length += token.chars().count();
        self.tokens.push(token);
        self.logprobs.push(logprob);
        self.top.push(top);
    }

    pub fn object(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.logprobs,
            "top_logprobs": self.top,
            "text_offset": self.offsets,
        })
    }
}
