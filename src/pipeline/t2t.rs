//! Text-to-text, the baseline: the sharer writes down what it knows, the receiver reads it (the paper's two-stage
//! evaluation).

use crate::tokenizer::Message;

/// Stage 1, for the sharer.
pub(crate) fn ask(question: &str) -> Vec<Message> {
    let request = format!(
        "In one clear sentence, describe the most essential background knowledge needed to answer the question: {question}"
    );
    vec![Message::new("user", request)]
}

/// Stage 2, for the receiver: the request, the sharer's text as if the receiver had said it, then the question.
pub(crate) fn answer(question: &str, background: &str) -> Vec<Message> {
    let mut messages = ask(question);
    messages.extend([Message::new("assistant", background), Message::new("user", question)]);
    messages
}
