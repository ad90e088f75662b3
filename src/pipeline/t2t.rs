//! Text-to-text, the baseline: the sharer writes down what it knows, the receiver reads it (the paper's two-stage
//! evaluation).

use super::{Error, Question};
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

impl Question {
    /// What the sharer is asked about the last user message.
    ///
    /// # Errors
    /// If this is no conversation with a user message.
    pub fn for_background(&self) -> Result<Question, Error> {
        self.rewritten(|_, question| ask(question))
    }

    /// What the receiver is asked once the sharer has written down `background`.
    ///
    /// # Errors
    /// If this is no conversation with a user message.
    pub fn with_background(&self, background: &str) -> Result<Question, Error> {
        self.rewritten(|earlier, question| {
            let mut messages = earlier.to_vec();
            messages.extend(answer(question, background));
            messages
        })
    }

    /// The messages that `rewrite` makes of those before the last user message, and of that.
    fn rewritten(&self, rewrite: impl FnOnce(&[Message], &str) -> Vec<Message>) -> Result<Question, Error> {
        let Question::Chat { messages, template } = self else { return Err(Error::T2tNeedsChat) };
        let last = messages.iter().rposition(|message| message.role == "user").ok_or(Error::T2tNeedsChat)?;
        let messages = rewrite(&messages[..last], &messages[last].content);
        Ok(Question::Chat { messages, template: template.clone() })
    }
}
