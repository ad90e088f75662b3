//! The pre-tokenizers that GGUF files name in `tokenizer.ggml.pre`: how a text is cut before byte-level merging.
//!
//! Patterns are those of the models' own `tokenizer.json`, names those of llama.cpp's `llama-vocab.cpp`.

use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{NormalizerWrapper, SplitDelimiterBehavior};

use super::Error;

/// One family of pre-tokenizers.
pub(super) struct PreTokenizer {
    names: &'static [&'static str],
    /// Each splits the pieces that the ones before it left.
    patterns: &'static [&'static str],
    /// A piece that is a token as a whole is not merged up to it.
    pub ignore_merges: bool,
    /// BOS is added where the file does not say.
    pub add_bos: bool,
    nfc: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const PLAIN: PreTokenizer =
    PreTokenizer { names: &[], patterns: &[GPT2], ignore_merges: false, add_bos: false, nfc: false };

static KNOWN: [PreTokenizer; 10] = [
    PreTokenizer { names: &["gpt-2", "phi-2", "mpt", "olmo"], ..PLAIN },
    PreTokenizer { names: &["smollm", "starcoder", "refact"], patterns: &[r"\p{N}", GPT2], ..PLAIN },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3"],
        patterns: &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        ignore_merges: true,
        add_bos: true,
        nfc: false,
    },
    PreTokenizer {
        // llama.cpp leaves the composing normalisation of Qwen's tokenizer.json out; the models were trained with it.
        names: &["qwen2", "deepseek-r1-qwen"],
        patterns: &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        nfc: true,
        ..PLAIN
    },
    PreTokenizer {
        names: &["stablelm2"],
        patterns: &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        ..PLAIN
    },
    PreTokenizer {
        names: &["tekken"],
        patterns: &[
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        ignore_merges: true,
        add_bos: true,
        nfc: false,
    },
    PreTokenizer {
        names: &["gpt-4o", "llama4"],
        patterns: &[
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        ignore_merges: true,
        add_bos: false,
        nfc: false,
    },
    PreTokenizer {
        names: &["deepseek-v3"],
        patterns: &[
            r"\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+",
            r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
        ],
        ..PLAIN
    },
    PreTokenizer {
        names: &["falcon"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"],
        ..PLAIN
    },
    PreTokenizer {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
        ..PLAIN
    },
];

impl PreTokenizer {
    /// The pre-tokenizer called `name`; old files have no name and mean "default".
    pub fn named(name: Option<&str>) -> Result<&'static Self, Error> {
        let name = name.unwrap_or_else(|| {
            log::warn!("the GGUF vocabulary names no pre-tokenizer (tokenizer.ggml.pre); taking \"default\"");
            "default"
        });
        KNOWN.iter().find(|known| known.names.contains(&name)).ok_or_else(|| {
            let known: Vec<&str> = KNOWN.iter().flat_map(|known| known.names).copied().collect();
            Error::UnknownPreTokenizer { pre: name.into(), known: known.join(", ") }
        })
    }

    pub fn normalizer(&self) -> Option<NormalizerWrapper> {
        self.nfc.then(|| NFC.into())
    }

    pub fn splitter(&self) -> Result<PreTokenizerWrapper, Error> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        for &pattern in self.patterns {
            let pattern = SplitPattern::Regex(pattern.into());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                .map_err(|error| Error::Vocabulary(format!("pre-tokenizer {}: {error}", self.names[0])))?;
            steps.push(split.into());
        }
        steps.push(ByteLevel::new(false, true, false).into());
        Ok(Sequence::new(steps).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_compiles() {
        for known in &KNOWN {
            known.splitter().unwrap();
        }
    }
}
