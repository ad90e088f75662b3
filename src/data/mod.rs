//! Data sets: files on this machine become conversations and multiple choice questions.
//!
//! [`reader`] turns files into rows, [`adapters`] rows into [`Example`]s, [`templates`] questions into prompts; [`split`]
//! orders and divides them. A row that cannot be used is a [`BadRow`], which names its place; [`Rejected`] counts them.

pub mod adapters;
mod load;
pub mod reader;
mod rejected;
pub mod split;
pub mod templates;

pub use adapters::{Adapter, AdapterChoice};
pub use load::{Dataset, ExampleError, Examples, LoadError, Source};
pub use reader::{FileError, Origin, Place, Problem, Row};
pub use rejected::{BadRow, Reason, Rejected};
pub use templates::PromptStyle;

use crate::tokenizer::Message;

/// One conversation to learn from or to be measured on. It ends with the assistant's message.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    pub messages: Vec<Message>,
    /// Where the row is a multiple choice question: `messages` is that question rendered, with its answer.
    pub question: Option<ChoiceQuestion>,
    /// The row's own name, where it has one.
    pub id: Option<String>,
    pub subject: Option<String>,
    pub origin: Origin,
}

/// A multiple choice question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChoiceQuestion {
    /// What is asked, without the choices; a context, where the row has one, comes first.
    pub question: String,
    /// 2 to 26.
    pub choices: Vec<String>,
    /// Index of the right choice.
    pub answer: usize,
}
