//! Text-to-text, the baseline: the sharer writes down what it knows, the receiver reads it (the paper's two-stage
//! evaluation).

use super::{Error, Question};
use crate::tokenizer::Message;

/// Stage 1, for the sharer: the published recipe's request.
pub(crate) fn ask(question: &str) -> Vec<Message> {
    let request = format!(
        "In one clear sentence, describe the most essential background knowledge needed to answer the question: {question}"
    );
    vec![Message::new("user", request)]
}

/// Stage 1 as the published program asks unless told otherwise.
pub(crate) fn ask_briefly(question: &str) -> Vec<Message> {
    let request = format!("Briefly describe the most useful background to solve the problem:\n\n{question}");
    vec![Message::new("user", request)]
}

/// Stage 2, for the receiver: the request, the sharer's text as if the receiver had said it, then the prompt.
pub(crate) fn follow(mut request: Vec<Message>, background: &str, prompt: &str) -> Vec<Message> {
    request.extend([Message::new("assistant", background), Message::new("user", prompt)]);
    request
}

/// Stage 2 where the sharer was asked for the whole prompt.
pub(crate) fn answer(question: &str, background: &str) -> Vec<Message> {
    follow(ask(question), background, question)
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
