//! Text-to-text, the baseline: the sharer writes down what it knows, the receiver reads it (spec of the paper's
//! two-stage evaluation).

use crate::tokenizer::Message;

/// The two user messages of text-to-text communication.
#[derive(Clone, Debug)]
pub struct T2tPrompts {
    /// What the sharer is asked; `{question}` stands for the question.
    pub background: String,
}

impl Default for T2tPrompts {
    fn default() -> Self {
        let background = "In one clear sentence, describe the most essential background knowledge needed to answer the \
                          question: {question}";
        T2tPrompts { background: background.into() }
    }
}

impl T2tPrompts {
    /// Stage 1, for the sharer.
    pub fn ask(&self, question: &str) -> Vec<Message> {
        vec![Message::new("user", self.background.replace("{question}", question))]
    }

    /// Stage 2, for the receiver: the request, the sharer's text as if the receiver had said it, then the question.
    pub fn answer(&self, question: &str, background: &str, prompt: &str) -> Vec<Message> {
        vec![
            Message::new("user", self.background.replace("{question}", question)),
            Message::new("assistant", background),
            Message::new("user", prompt),
        ]
    }
}
