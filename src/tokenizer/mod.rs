//! Text ↔ token ids: `tokenizer.json` files, the vocabularies inside GGUF files, chat templates.
//!
//! Both kinds of file end in one [`tokenizers::Tokenizer`], so encoding has one implementation. What this module
//! adds is what the files around `tokenizer.json` say (special tokens, stop tokens, the chat template), the
//! construction from GGUF metadata, and decoding token by token.

mod detokenizer;
mod error;
mod fingerprint;
mod folder;
mod gguf;
mod pre_tokenizer;
mod special;
mod template;

use std::path::Path;
use std::sync::{Arc, OnceLock};

pub use detokenizer::Detokenizer;
pub use error::Error;
pub use gguf::GgufVocab;
pub use special::SpecialTokens;
pub use template::{ChatTemplate, Message, TemplateOptions};

use detokenizer::Spelling;
use special::Specials;

/// A tokenizer with its special tokens and chat template. Clones share everything.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
    template: Option<Arc<ChatTemplate>>,
}

struct Shared {
    inner: tokenizers::Tokenizer,
    specials: Specials,
    spelling: Spelling,
    /// The file or folder this came from, for errors.
    origin: String,
    /// SHA-256 of the merges; unused with a SentencePiece vocabulary.
    merges: OnceLock<[u8; 32]>,
}

/// Token ids and, for each, the byte range of the text it stands for. Ranges lie on character boundaries; tokens
/// that share one character (byte-level pieces of an emoji) all carry that character's range, tokens that were
/// added (BOS) an empty one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoding {
    pub ids: Vec<u32>,
    pub offsets: Vec<(usize, usize)>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where present, the files a Hugging Face model folder has beside it:
    /// `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json` (or else `config.json`) for the
    /// stop tokens, `chat_template.jinja` or `chat_template.json`.
    pub fn from_folder(dir: &Path) -> Result<Self, Error> {
        folder::load(dir)
    }

    /// Reads a `tokenizer.json` alone: special tokens are those it marks so, there is no chat template.
    pub fn from_file(tokenizer_json: &Path) -> Result<Self, Error> {
        folder::load_file(tokenizer_json)
    }

    /// Builds the tokenizer that a GGUF file's `tokenizer.*` metadata describes.
    pub fn from_gguf(vocab: &GgufVocab) -> Result<Self, Error> {
        gguf::build(vocab)
    }

    fn assemble(
        inner: tokenizers::Tokenizer,
        specials: Specials,
        origin: String,
        merges: OnceLock<[u8; 32]>,
    ) -> Self {
        let spelling = Spelling::of(&inner);
        let shared = Shared { inner, specials, spelling, origin, merges };
        Self { shared: Arc::new(shared), template: None }
    }

    /// Special tokens written in `text` become their ids. `add_special` adds what the tokenizer itself puts around a
    /// text (often BOS); leave it off for the output of a chat template, which already has them.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Encoding, Error> {
        let encoding =
            self.shared.inner.encode(text, add_special).map_err(|error| Error::Encode(error.to_string()))?;
        Ok(Encoding { ids: encoding.get_ids().to_vec(), offsets: encoding.get_offsets().to_vec() })
    }

    /// Text of `ids`; unknown ids are left out. No clean-up of spaces.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        // The decoders of language models cannot fail; should one, the pieces as they are spelled are the best answer.
        self.shared.inner.decode(ids, skip_special).unwrap_or_else(|_| {
            ids.iter()
                .filter(|&&id| !(skip_special && self.is_special(id)))
                .filter_map(|&id| self.token_of(id))
                .collect()
        })
    }

    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.shared.inner.token_to_id(token)
    }

    /// The token as the vocabulary spells it (`Ġthe`, `▁the`, `<0x0A>`).
    pub fn token_of(&self, id: u32) -> Option<String> {
        self.shared.inner.id_to_token(id)
    }

    /// Number of tokens, added ones included. The embedding of a model may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.shared.inner.get_vocab_size(true)
    }

    pub fn special(&self) -> &SpecialTokens {
        &self.shared.specials.tokens
    }

    /// Whether `decode(.., skip_special = true)` leaves this token out.
    pub fn is_special(&self, id: u32) -> bool {
        self.shared.specials.is_special(id)
    }

    /// The declared special tokens in Hugging Face's `all_special_ids` order: bos, eos, unk, sep, pad, cls, mask,
    /// then the additional ones. This is fewer than [`is_special`](Self::is_special) says yes to: a tokenizer may
    /// mark tokens special without declaring a use.
    pub fn special_ids(&self) -> &[u32] {
        &self.shared.specials.declared
    }

    /// SHA-256 over vocabulary, merges and added tokens: equal for equal tokenizers, from tokenizer.json or GGUF.
    /// Only tokens that a model with `rows` rows of embedding can read count: the tokenizer.json of a small model
    /// may name tokens of its larger siblings. Takes up to some tenths of a second.
    pub fn fingerprint(&self, rows: usize) -> [u8; 32] {
        let Shared { inner, spelling, merges, .. } = &*self.shared;
        let ranked = !matches!(spelling, Spelling::SentencePiece { .. });
        let merges = ranked.then(|| *merges.get_or_init(|| fingerprint::of_its_merges(inner)));
        fingerprint::of(inner, rows, merges)
    }

    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.template.as_deref()
    }

    /// The same tokenizer with another chat template (Jinja source).
    pub fn with_chat_template(mut self, source: &str) -> Result<Self, Error> {
        let tokens = self.shared.specials.texts.iter().cloned();
        self.template = Some(Arc::new(ChatTemplate::new(source, tokens, &self.shared.origin)?));
        Ok(self)
    }

    /// Renders a conversation with the chat template; without one this is an error that names the tokenizer's file.
    pub fn render(&self, messages: &[Message], options: &TemplateOptions) -> Result<String, Error> {
        match self.chat_template() {
            Some(template) => template.render(messages, options),
            None => Err(Error::NoTemplate { origin: self.shared.origin.clone() }),
        }
    }

    /// Decodes token by token, special tokens left out.
    pub fn detokenizer(&self) -> Detokenizer {
        Detokenizer::new(self.clone())
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("origin", &self.shared.origin)
            .field("vocab_size", &self.vocab_size())
            .field("special", self.special())
            .finish_non_exhaustive()
    }
}
