//! Decoding token by token.
//!
//! A token is not text: it may end inside a character (byte-level BPE, byte fallback), and SentencePiece's first
//! space is not part of the text. The detokenizer holds bytes back until they are whole characters, so the pieces it
//! returns can be printed as they come and together are what [`Tokenizer::decode`] gives for all ids at once. (Bytes
//! that can never become a character turn into U+FFFD as soon as that is certain.)

use std::sync::LazyLock;

use super::Tokenizer;

/// How the vocabulary spells bytes, told from the decoder of the tokenizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's alphabet: one character per byte.
    ByteLevel,
    /// `▁` for a space, `<0xE4>` for a byte; so many spaces are dropped at the start of a text.
    SentencePiece { strip: usize },
    /// Anything else: decoded again with the tokens before it, which is slower but knows nothing of the spelling.
    Other,
}

impl Spelling {
    pub fn of(inner: &tokenizers::Tokenizer) -> Self {
        let decoder = serde_json::to_value(inner.get_decoder()).unwrap_or_default();
        if decoder["type"] == "ByteLevel" {
            return Self::ByteLevel;
        }
        let Some([replace, fallback, fuse, rest @ ..]) = decoder["decoders"].as_array().map(Vec::as_slice)
        else {
            return Self::Other;
        };
        let space = replace["pattern"]["String"] == "▁" && replace["content"] == " ";
        if !(space && fallback["type"] == "ByteFallback" && fuse["type"] == "Fuse") {
            return Self::Other;
        }
        match rest {
            [] => Self::SentencePiece { strip: 0 },
            [strip] if strip["type"] == "Strip" && strip["content"] == " " && strip["stop"] == 0 => {
                Self::SentencePiece { strip: strip["start"].as_u64().unwrap_or(0) as usize }
            }
            _ => Self::Other,
        }
    }
}

/// Turns a stream of ids into a stream of text made of whole characters only.
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Bytes that are not yet a whole character (at most 3).
    pending: Vec<u8>,
    /// Spaces still to drop; 0 once the text has begun.
    strip: usize,
    /// [`Spelling::Other`] only: ids since the last but one piece, and the text of those already returned.
    window: Vec<u32>,
    shown: usize,
}

impl Detokenizer {
    pub(super) fn new(tokenizer: Tokenizer) -> Self {
        let strip = match tokenizer.shared.spelling {
            Spelling::SentencePiece { strip } => strip,
            _ => 0,
        };
        Self { tokenizer, skip_special: true, pending: Vec::new(), strip, window: Vec::new(), shown: 0 }
    }

    /// Prints special tokens too.
    pub fn keep_special(mut self) -> Self {
        self.skip_special = false;
        self
    }

    /// The text that `id` completes; empty while a character is still open, and for unknown ids.
    pub fn push(&mut self, id: u32) -> String {
        if self.skip_special && self.tokenizer.is_special(id) {
            return String::new();
        }
        let Some(token) = self.tokenizer.token_of(id) else { return String::new() };
        match self.tokenizer.shared.spelling {
            Spelling::ByteLevel => {
                byte_level(&token, &mut self.pending);
                self.complete(false)
            }
            Spelling::SentencePiece { .. } => {
                match fallback_byte(&token) {
                    Some(byte) => self.pending.push(byte),
                    None => self.pending.extend_from_slice(token.replace('▁', " ").as_bytes()),
                }
                self.complete(false)
            }
            Spelling::Other => self.decode_again(id),
        }
    }

    /// What is left at the end of the ids: an unfinished character becomes U+FFFD.
    pub fn finish(mut self) -> String {
        match self.tokenizer.shared.spelling {
            Spelling::Other => {
                let text = self.tokenizer.decode(&self.window, self.skip_special);
                text.get(self.shown..).unwrap_or_default().to_string()
            }
            _ => self.complete(true),
        }
    }

    /// Takes the whole characters out of `pending`.
    fn complete(&mut self, last: bool) -> String {
        // ByteFallback writes one U+FFFD for each byte of a broken character, byte-level decoding one for all.
        let per_byte = matches!(self.tokenizer.shared.spelling, Spelling::SentencePiece { .. });
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        while !rest.is_empty() {
            let (valid, broken) = match std::str::from_utf8(rest) {
                Ok(valid) => (valid, 0),
                Err(error) => {
                    let valid = &rest[..error.valid_up_to()];
                    let open = rest.len() - valid.len();
                    let broken = error.error_len().unwrap_or(if last { open } else { 0 });
                    (std::str::from_utf8(valid).unwrap_or_default(), broken)
                }
            };
            text.push_str(valid);
            text.extend(std::iter::repeat_n(
                char::REPLACEMENT_CHARACTER,
                if per_byte { broken } else { broken.min(1) },
            ));
            rest = &rest[valid.len() + broken..];
            if broken == 0 {
                break;
            }
        }
        self.pending = rest.to_vec();

        while self.strip > 0 && text.starts_with(' ') {
            text.remove(0);
            self.strip -= 1;
        }
        if !text.is_empty() {
            self.strip = 0;
        }
        text
    }

    fn decode_again(&mut self, id: u32) -> String {
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window, self.skip_special);
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return String::new();
        }
        let new = text.get(self.shown..).unwrap_or_default().to_string();
        if !new.is_empty() {
            // The token just shown stays as context: decoders look at what stands before.
            self.window.drain(..self.window.len() - 1);
            self.shown = self.tokenizer.decode(&self.window, self.skip_special).len();
        }
        new
    }
}

/// `<0xE4>` → 0xE4.
fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

/// Bytes of a token in GPT-2's alphabet; a token with other characters (an added one) is its own UTF-8.
fn byte_level(token: &str, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for char in token.chars() {
        match BYTE_OF.get(char as usize).copied().flatten() {
            Some(byte) => bytes.push(byte),
            None => {
                bytes.truncate(start);
                bytes.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// GPT-2's alphabet: bytes that print in Latin-1 stand for themselves, the others follow from U+0100 in order.
static BYTE_OF: LazyLock<[Option<u8>; 0x144]> = LazyLock::new(|| {
    let mut table = [None; 0x144];
    let mut next = 0x100;
    for byte in 0..=255u8 {
        let prints = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let char = if prints {
            byte as usize
        } else {
            next += 1;
            next - 1
        };
        table[char] = Some(byte);
    }
    table
});
