//! Vocabularies inside GGUF files.
//!
//! `gpt2` is byte-level BPE as GPT-2 introduced it, `llama` is SentencePiece BPE with byte fallback. Both become a
//! [`tokenizers::Tokenizer`] equal to the `tokenizer.json` of the model the file was made from.

use std::collections::BTreeSet;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper};

use super::folder::surround;
use super::pre_tokenizer::PreTokenizer;
use super::special::{Specials, end_of_turn};
use super::{Error, Tokenizer};

/// The `tokenizer.*` metadata of a GGUF file. Fields are named after their keys; what the file does not have is
/// `None`.
#[derive(Clone, Debug, Default)]
pub struct GgufVocab {
    /// `tokenizer.ggml.model`: `gpt2` or `llama`.
    pub model: String,
    /// `tokenizer.ggml.pre`, of `gpt2` only.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`; the index is the id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`: SentencePiece merges the pair with the highest score first.
    pub scores: Option<Vec<f32>>,
    /// `tokenizer.ggml.token_type`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Option<Vec<i32>>,
    /// `tokenizer.ggml.merges`: two tokens with a space between, first merge first.
    pub merges: Option<Vec<String>>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unk: Option<u32>,
    pub pad: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`, end of a turn.
    pub eot: Option<u32>,
    /// `tokenizer.ggml.eom_token_id`, end of a message (Llama 3.x before a tool answers).
    pub eom: Option<u32>,
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
    /// The file's path, for errors.
    pub origin: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

pub(super) fn build(vocab: &GgufVocab) -> Result<Tokenizer, Error> {
    let kinds = vocab.kinds()?;
    vocab.check_ids()?;
    let (mut inner, add_bos) = match vocab.model.as_str() {
        "gpt2" => byte_level_bpe(vocab, &kinds)?,
        "llama" => (sentence_piece_bpe(vocab, &kinds)?, true),
        model => return Err(Error::UnknownModel { model: model.into(), known: "gpt2, llama".into() }),
    };

    let text = |id: u32| vocab.tokens[id as usize].clone();
    let used: BTreeSet<u32> =
        [vocab.bos, vocab.eos, vocab.unk, vocab.pad, vocab.eot, vocab.eom].into_iter().flatten().collect();
    let mut added: Vec<AddedToken> = Vec::new();
    for (id, &kind) in (0..).zip(&kinds) {
        let special = matches!(kind, Kind::Control | Kind::Unknown) || used.contains(&id);
        if (special || kind == Kind::UserDefined) && !text(id).is_empty() {
            added.push(AddedToken::from(text(id), special).normalized(false));
        }
    }
    // In runs of one kind: each call rebuilds the matcher of added tokens.
    added.sort_by_key(|token| !token.special);
    for run in added.chunk_by(|a, b| a.special == b.special) {
        if run[0].special {
            inner.add_special_tokens(run);
        } else {
            inner.add_tokens(run);
        }
    }

    let around = |wanted: bool, id: Option<u32>| id.filter(|_| wanted).map(|id| (text(id), id));
    let bos = around(vocab.add_bos.unwrap_or(add_bos), vocab.bos);
    let eos = around(vocab.add_eos.unwrap_or(false), vocab.eos);
    inner.with_post_processor(surround(bos, eos)?);

    let uses = [
        ("bos_token", vocab.bos),
        ("eos_token", vocab.eos),
        ("unk_token", vocab.unk),
        ("pad_token", vocab.pad),
    ];
    let mut declared: Vec<(String, String)> =
        uses.into_iter().filter_map(|(name, id)| Some((name.to_string(), text(id?)))).collect();
    for (id, _) in (0..).zip(&kinds).filter(|(_, kind)| **kind == Kind::Control) {
        declared.push(("additional_special_tokens".into(), text(id)));
    }
    let mut stop: Vec<u32> = [vocab.eos, vocab.eot, vocab.eom].into_iter().flatten().collect();
    stop.extend(end_of_turn(&inner));
    let specials = Specials::new(&inner, declared, &stop);
    let tokenizer = Tokenizer::assemble(inner, specials, vocab.origin.clone());
    match &vocab.chat_template {
        Some(source) => tokenizer.with_chat_template(source),
        None => Ok(tokenizer),
    }
}

impl GgufVocab {
    fn kinds(&self) -> Result<Vec<Kind>, Error> {
        let count = self.tokens.len();
        if count == 0 {
            return Err(Error::Vocabulary("tokenizer.ggml.tokens is missing or empty".into()));
        }
        for (name, len) in [
            ("scores", self.scores.as_ref().map(Vec::len)),
            ("token_type", self.token_types.as_ref().map(Vec::len)),
        ] {
            if len.is_some_and(|len| len != count) {
                return Err(Error::Vocabulary(format!(
                    "tokenizer.ggml.{name} has {} entries for {count} tokens",
                    len.unwrap_or(0)
                )));
            }
        }
        let Some(types) = &self.token_types else { return Ok(vec![Kind::Normal; count]) };
        let kind = |(id, kind): (usize, &i32)| match kind {
            0 | 1 => Ok(Kind::Normal),
            2 => Ok(Kind::Unknown),
            3 => Ok(Kind::Control),
            4 => Ok(Kind::UserDefined),
            5 => Ok(Kind::Unused),
            6 => Ok(Kind::Byte),
            other => Err(Error::Vocabulary(format!(
                "tokenizer.ggml.token_type[{id}] is {other}; known are 0 to 6"
            ))),
        };
        types.iter().enumerate().map(kind).collect()
    }

    fn check_ids(&self) -> Result<(), Error> {
        let ids = [
            ("bos", self.bos),
            ("eos", self.eos),
            ("unknown", self.unk),
            ("padding", self.pad),
            ("eot", self.eot),
            ("eom", self.eom),
        ];
        for (name, id) in ids {
            if let Some(id) = id.filter(|&id| id as usize >= self.tokens.len()) {
                let count = self.tokens.len();
                return Err(Error::Vocabulary(format!(
                    "tokenizer.ggml.{name}_token_id is {id}, but there are {count} tokens"
                )));
            }
        }
        Ok(())
    }

    /// Token → id. Rows that only fill the embedding up ("[PAD151665]", empty) are no tokens.
    fn ids(&self, kinds: &[Kind]) -> Vocab {
        let token = |(id, (text, kind)): (u32, (&String, &Kind))| {
            let filler = *kind == Kind::Unused && *text == format!("[PAD{id}]");
            (!text.is_empty() && !filler).then(|| (text.clone(), id))
        };
        (0..).zip(self.tokens.iter().zip(kinds)).filter_map(token).collect()
    }
}

/// The tokenizer, and whether BOS is added where the file does not say.
fn byte_level_bpe(vocab: &GgufVocab, kinds: &[Kind]) -> Result<(tokenizers::Tokenizer, bool), Error> {
    let pre = PreTokenizer::named(vocab.pre.as_deref())?;
    let merges = vocab.merges.as_ref().ok_or_else(|| {
        Error::Vocabulary("model gpt2 needs tokenizer.ggml.merges, which is missing".into())
    })?;
    let merges: Merges = merges
        .iter()
        .enumerate()
        .map(|(rank, merge)| {
            let pair = merge.split_once(' ').filter(|(left, right)| !left.is_empty() && !right.is_empty());
            pair.map(|(left, right)| (left.to_string(), right.to_string())).ok_or_else(|| {
                Error::Vocabulary(format!(
                    "tokenizer.ggml.merges[{rank}] is {merge:?}, not two tokens with a space"
                ))
            })
        })
        .collect::<Result<_, _>>()?;
    let model = BPE::builder()
        .vocab_and_merges(vocab.ids(kinds), merges)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(|error| {
            Error::Vocabulary(format!("tokenizer.ggml.merges does not fit the tokens: {error}"))
        })?;
    let mut inner = tokenizers::Tokenizer::new(model);
    inner
        .with_normalizer(pre.normalizer())
        .with_pre_tokenizer(Some(pre.splitter()?))
        .with_decoder(Some(ByteLevel::default()));
    Ok((inner, pre.add_bos))
}

fn sentence_piece_bpe(vocab: &GgufVocab, kinds: &[Kind]) -> Result<tokenizers::Tokenizer, Error> {
    let scores = vocab.scores.as_ref().ok_or_else(|| {
        Error::Vocabulary("model llama needs tokenizer.ggml.scores, which is missing".into())
    })?;
    let ids = vocab.ids(kinds);
    let merges = merges_by_score(vocab, &ids, scores);
    let mut model = BPE::builder().vocab_and_merges(ids, merges).byte_fallback(true).fuse_unk(true);
    let unknown = kinds.iter().position(|&kind| kind == Kind::Unknown);
    if let Some(unknown) = vocab.unk.map(|id| id as usize).or(unknown) {
        model = model.unk_token(vocab.tokens[unknown].clone());
    }
    let unusable = |error: tokenizers::Error| Error::Vocabulary(error.to_string());
    let mut inner = tokenizers::Tokenizer::new(model.build().map_err(unusable)?);

    let prefix = vocab.add_space_prefix.unwrap_or(true);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    let mut decoders: Vec<DecoderWrapper> = vec![
        Replace::new("▁", " ").map_err(unusable)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if prefix {
        normalizers.push(Prepend::new("▁".into()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    normalizers.push(Replace::new(" ", "▁").map_err(unusable)?.into());
    inner.with_normalizer(Some(Normalizers::new(normalizers))).with_decoder(Some(Decoders::new(decoders)));
    Ok(inner)
}

/// SentencePiece joins the neighbours whose union scores highest. As ranked merges: every way to cut a token into two
/// tokens, by the token's score, then by the lengths of the parts in descending order (the order in which
/// transformers writes them).
fn merges_by_score(vocab: &GgufVocab, ids: &Vocab, scores: &[f32]) -> Merges {
    struct Cut<'a> {
        score: f32,
        lengths: (usize, usize),
        parts: (&'a str, &'a str),
    }
    let mut cuts: Vec<Cut> = Vec::new();
    for (token, &score) in vocab.tokens.iter().zip(scores) {
        let first = cuts.len();
        let mut left_chars = 0;
        let chars = token.chars().count();
        for (at, _) in token.char_indices().skip(1) {
            left_chars += 1;
            let parts = token.split_at(at);
            if ids.contains_key(parts.0) && ids.contains_key(parts.1) {
                cuts.push(Cut { score, lengths: (left_chars, chars - left_chars), parts });
            }
        }
        cuts[first..].sort_by_key(|cut| (ids[cut.parts.0], ids[cut.parts.1]));
    }
    cuts.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.lengths.cmp(&a.lengths)));
    cuts.into_iter().map(|cut| (cut.parts.0.to_string(), cut.parts.1.to_string())).collect()
}
