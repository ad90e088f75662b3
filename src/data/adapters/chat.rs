//! Conversations.

use super::fields::{Bad, Fields, optional_text, take_list, text};
use crate::{data::Reason, tokenizer::Message};
use serde_json::Value;

/// A user's message and the assistant's.
fn turn(user: String, assistant: &str) -> Vec<Message> {
    vec![Message::new("user", user), Message::new("assistant", assistant)]
}

/// Both as they are.
pub fn pair(fields: &Fields, user: &'static str, assistant: &'static str) -> Result<Vec<Message>, Bad> {
    Ok(turn(text(fields, user)?.to_owned(), text(fields, assistant)?))
}

/// The question trimmed, the response as it is.
pub fn llm_generated(fields: &Fields) -> Result<Vec<Message>, Bad> {
    Ok(turn(text(fields, "input_text")?.trim().to_owned(), text(fields, "model_response")?))
}

/// `first` and `second` with a blank line between, or `second` alone.
fn joined(first: &str, second: &str) -> String {
    let (first, second) = (first.trim(), second.trim());
    if first.is_empty() { second.to_owned() } else { format!("{first}\n\n{second}") }
}

pub fn dolly(fields: &Fields) -> Result<Vec<Message>, Bad> {
    let user = joined(optional_text(fields, "context")?, text(fields, "instruction")?);
    Ok(turn(user, text(fields, "response")?.trim()))
}

pub fn alpaca(fields: &Fields) -> Result<Vec<Message>, Bad> {
    let (instruction, input) = (text(fields, "instruction")?.trim(), optional_text(fields, "input")?.trim());
    let user = if input.is_empty() { instruction.to_owned() } else { format!("{instruction}\n\n{input}") };
    let output = if fields.contains_key("output") { "output" } else { "response" };
    Ok(turn(user, text(fields, output)?.trim()))
}

/// The first of the answers. Rows without one get the published "No answer provided".
pub fn longbench(fields: &Fields) -> Result<Vec<Message>, Bad> {
    let (context, input) = (optional_text(fields, "context")?, text(fields, "input")?);
    let answer = match fields.get("answers") {
        None => return Err(Reason::Missing("answers").into()),
        Some(Value::Array(answers)) => match answers.first() {
            None => "No answer provided",
            Some(Value::String(answer)) => answer,
            Some(_) => return Err(Reason::Type { field: "answers", expected: "a list of texts" }.into()),
        },
        Some(_) => return Err(Reason::Type { field: "answers", expected: "a list" }.into()),
    };
    let context = if context.is_empty() { String::new() } else { format!("Context: {context}\n\n") };
    Ok(turn(format!("{context}Instruction: {input}"), answer))
}

/// System messages are left out, the user's are trimmed.
pub fn openhermes(fields: &mut Fields) -> Result<Vec<Message>, Bad> {
    let mut messages = Vec::new();
    for entry in take_list(fields, "conversations")? {
        let Value::Object(entry) = entry else {
            return Err(Reason::Type { field: "conversations", expected: "a list of objects" }.into());
        };
        let either = |one, other| entry.get(one).or(entry.get(other)).and_then(Value::as_str);
        let Some(content) = either("value", "content") else { return Err(Reason::Missing("value").into()) };
        match either("from", "role") {
            Some("system") => {}
            Some("human" | "user") => messages.push(Message::new("user", content.trim())),
            Some("gpt" | "assistant") => messages.push(Message::new("assistant", content)),
            Some(other) => return Err(Bad { reason: Reason::Speaker, detail: format!("`{other}`") }),
            None => return Err(Reason::Missing("from").into()),
        }
    }
    answered(messages)
}

/// Messages as they are.
pub fn messages(fields: &mut Fields) -> Result<Vec<Message>, Bad> {
    let mut messages = Vec::new();
    for entry in take_list(fields, "messages")? {
        let message: Message = serde_json::from_value(entry).map_err(|error| Bad {
            reason: Reason::Type { field: "messages", expected: "a list of messages" },
            detail: error.to_string(),
        })?;
        if !matches!(message.role.as_str(), "system" | "user" | "assistant" | "tool") {
            return Err(Bad { reason: Reason::Speaker, detail: format!("`{}`", message.role) });
        }
        messages.push(message);
    }
    answered(messages)
}

/// There is something to learn: an answer, to something.
fn answered(messages: Vec<Message>) -> Result<Vec<Message>, Bad> {
    match messages.last() {
        Some(last) if messages.len() > 1 && last.role == "assistant" && !last.content.trim().is_empty() => {
            Ok(messages)
        }
        _ => Err(Reason::NoAnswer.into()),
    }
}
