//! PTX text, parsed.

mod lex;

/// Why a text was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("PTX line {line}: {what}")]
    Syntax { line: u32, what: String },
    #[error("PTX line {line}: softcuda does not run `{instruction}`: {why}")]
    Unsupported { line: u32, instruction: String, why: String },
}

impl Error {
    pub(crate) fn syntax(line: u32, what: impl Into<String>) -> Error {
        Error::Syntax { line, what: what.into() }
    }
}
