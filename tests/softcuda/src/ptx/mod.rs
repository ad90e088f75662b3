//! PTX text, parsed.

mod lex;
mod parse;
mod types;

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
#[cfg(test)]
mod tests {
    #[test]
    fn files() {
        for entry in std::fs::read_dir("/work/scratch/softexec/ptx").unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            let t = std::time::Instant::now();
            let tokens = super::lex::tokens(&text).unwrap();
            let parsed = super::parse::text(&tokens).unwrap();
            println!("{path:?} {} {:?}", parsed.routines.len(), t.elapsed());
        }
    }
}
