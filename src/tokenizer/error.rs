//! What can go wrong between text and token ids.

use std::path::PathBuf;

/// An error of this module. Each names the file or the field at fault and what would help.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} has no tokenizer.json{hint}", dir.display())]
    NoTokenizer { dir: PathBuf, hint: &'static str },
    #[error("{} is not valid JSON of the expected form: {source}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{} is not a tokenizer that can be used: {reason}", path.display())]
    Parse { path: PathBuf, reason: String },
    #[error("the GGUF vocabulary is not usable: {0}")]
    Vocabulary(String),
    #[error("unknown tokenizer.ggml.model {model:?}; known models: {known}")]
    UnknownModel { model: String, known: String },
    #[error("unknown tokenizer.ggml.pre {pre:?}; known pre-tokenizers: {known}")]
    UnknownPreTokenizer { pre: String, known: String },
    #[error("the text cannot be tokenised: {0}")]
    Encode(String),
    #[error("the chat template of {origin} has an error: {reason}")]
    TemplateSyntax { origin: String, reason: String },
    #[error("the chat template of {origin} refused these messages: {reason}")]
    TemplateRender { origin: String, reason: String },
    #[error(
        "{origin} has no chat template: use raw text, or give a template (a chat_template.jinja beside tokenizer.json)"
    )]
    NoTemplate { origin: String },
}
