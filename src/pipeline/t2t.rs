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

/// Stage 1 of a conversation: about its last user message, if there is one.
pub(crate) fn first_stage(messages: &[Message]) -> Option<Vec<Message>> {
    Some(ask(&messages[last_question(messages)?].content))
}

/// Stage 2: what came before that message, then [`answer`].
pub(crate) fn second_stage(messages: &[Message], background: &str) -> Option<Vec<Message>> {
    let last = last_question(messages)?;
    let mut conversation = messages[..last].to_vec();
    conversation.extend(answer(&messages[last].content, background));
    Some(conversation)
}

fn last_question(messages: &[Message]) -> Option<usize> {
    messages.iter().rposition(|message| message.role == "user")
}
