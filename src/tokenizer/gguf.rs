//! Vocabularies inside GGUF files.
//!
//! `gpt2` is byte-level BPE as GPT-2 introduced it, `llama` is SentencePiece BPE with byte fallback. Both become a
//! [`tokenizers::Tokenizer`] equal to the `tokenizer.json` of the model the file was made from.

use std::collections::BTreeSet;
use std::sync::OnceLock;

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
use super::{Error, Tokenizer, fingerprint};

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
    let used = vocab.used()?;
    let ids = vocab.ids(&kinds, &used);
    let added: Vec<(u32, AddedToken)> = vocab.added(&kinds, &used);

    let (mut inner, add_bos, merges_digest) = match vocab.model.as_str() {
        "gpt2" => {
            let pre = PreTokenizer::named(vocab.pre.as_deref())?;
            let merges = listed_merges(vocab)?;
            // Now that they are at hand: the crate gives its merges away only slowly.
            let pairs = merges.iter().map(|(left, right)| (left.as_str(), right.as_str()));
            let digest = fingerprint::of_merges(pairs).into();
            (byte_level_bpe(pre, ids, merges)?, pre.add_bos, digest)
        }
        "llama" => {
            let merges = merges_by_score(vocab, &ids)?;
            (sentence_piece_bpe(vocab, &kinds, ids, merges)?, true, OnceLock::new())
        }
        model => return Err(Error::UnknownModel { model: model.into(), known: "gpt2, llama".into() }),
    };

    // Each call rebuilds the matcher of added tokens, so one for each kind.
    let (special, plain): (Vec<AddedToken>, Vec<AddedToken>) =
        added.into_iter().map(|(_, token)| token).partition(|token| token.special);
    inner.add_special_tokens(&special);
    inner.add_tokens(&plain);

    let text = |id: u32| vocab.tokens[id as usize].clone();
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
    let tokenizer = Tokenizer::assemble(inner, specials, vocab.origin.clone(), merges_digest);
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

    /// The ids that have a use, checked.
    fn used(&self) -> Result<BTreeSet<u32>, Error> {
        let ids = [
            ("bos", self.bos),
            ("eos", self.eos),
            ("unknown", self.unk),
            ("padding", self.pad),
            ("eot", self.eot),
            ("eom", self.eom),
        ];
        let mut used = BTreeSet::new();
        for (name, id) in ids {
            let Some(id) = id else { continue };
            if self.tokens.get(id as usize).is_none_or(|token| token.is_empty()) {
                return Err(Error::Vocabulary(format!(
                    "tokenizer.ggml.{name}_token_id is {id}, which is no token ({} there are)",
                    self.tokens.len()
                )));
            }
            used.insert(id);
        }
        Ok(used)
    }

    /// Token → id. Rows that only fill the embedding up ("[PAD151665]", empty) are no tokens.
    fn ids(&self, kinds: &[Kind], used: &BTreeSet<u32>) -> Vocab {
        let token = |(id, (text, kind)): (u32, (&String, &Kind))| {
            let filler = *kind == Kind::Unused && *text == format!("[PAD{id}]") && !used.contains(&id);
            (!text.is_empty() && !filler).then(|| (text.clone(), id))
        };
        (0..).zip(self.tokens.iter().zip(kinds)).filter_map(token).collect()
    }

    /// The tokens that are read as a whole wherever they stand in a text.
    fn added(&self, kinds: &[Kind], used: &BTreeSet<u32>) -> Vec<(u32, AddedToken)> {
        let token = |(id, (text, kind)): (u32, (&String, &Kind))| {
            let special = matches!(kind, Kind::Control | Kind::Unknown) || used.contains(&id);
            let added = (special || *kind == Kind::UserDefined) && !text.is_empty();
            added.then(|| (id, AddedToken::from(text.clone(), special).normalized(false)))
        };
        (0..).zip(self.tokens.iter().zip(kinds)).filter_map(token).collect()
    }
}

fn listed_merges(vocab: &GgufVocab) -> Result<Merges, Error> {
    let merges = vocab.merges.as_ref().ok_or_else(|| {
        Error::Vocabulary("model gpt2 needs tokenizer.ggml.merges, which is missing".into())
    })?;
    let pair = |(rank, merge): (usize, &String)| {
        let pair = merge.split_once(' ').filter(|(left, right)| !left.is_empty() && !right.is_empty());
        pair.map(|(left, right)| (left.to_string(), right.to_string())).ok_or_else(|| {
            Error::Vocabulary(format!(
                "tokenizer.ggml.merges[{rank}] is {merge:?}, not two tokens with a space between"
            ))
        })
    };
    merges.iter().enumerate().map(pair).collect()
}

fn byte_level_bpe(pre: &PreTokenizer, ids: Vocab, merges: Merges) -> Result<tokenizers::Tokenizer, Error> {
    let model =
        BPE::builder().vocab_and_merges(ids, merges).ignore_merges(pre.ignore_merges).build().map_err(
            |error| Error::Vocabulary(format!("tokenizer.ggml.merges does not fit the tokens: {error}")),
        )?;
    let mut inner = tokenizers::Tokenizer::new(model);
    inner
        .with_normalizer(pre.normalizer())
        .with_pre_tokenizer(Some(pre.splitter()?))
        .with_decoder(Some(ByteLevel::default()));
    Ok(inner)
}

fn sentence_piece_bpe(
    vocab: &GgufVocab,
    kinds: &[Kind],
    ids: Vocab,
    merges: Merges,
) -> Result<tokenizers::Tokenizer, Error> {
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

/// A token cut into two tokens.
struct Cut<'a> {
    score: f32,
    parts: (&'a str, &'a str),
    /// In characters.
    lengths: (usize, usize),
}

/// SentencePiece joins the neighbours whose union scores highest. As ranked merges: every way to cut a token into two
/// tokens, by the token's score, then by the lengths of the parts in descending order (the order in which
/// transformers writes them).
fn merges_by_score(vocab: &GgufVocab, ids: &Vocab) -> Result<Merges, Error> {
    let scores = vocab.scores.as_ref().ok_or_else(|| {
        Error::Vocabulary("model llama needs tokenizer.ggml.scores, which is missing".into())
    })?;
    // A quarter of a million tokens, looked up a million times: worth the threads there are.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = vocab.tokens.len().div_ceil(threads).max(1);
    let mut cuts: Vec<Cut> = std::thread::scope(|scope| {
        let shares = vocab.tokens.chunks(share).zip(scores.chunks(share));
        let running: Vec<_> =
            shares.map(|(tokens, scores)| scope.spawn(move || cuts(tokens, scores, ids))).collect();
        running.into_iter().flat_map(|share| share.join().expect("looking up does not panic")).collect()
    });
    cuts.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.lengths.cmp(&a.lengths)));
    Ok(cuts.into_iter().map(|cut| (cut.parts.0.to_string(), cut.parts.1.to_string())).collect())
}

/// Of each token, the longest left part first: with falling scores the merges then are in order already.
fn cuts<'a>(tokens: &'a [String], scores: &[f32], ids: &Vocab) -> Vec<Cut<'a>> {
    let mut cuts = Vec::new();
    for (token, &score) in tokens.iter().zip(scores) {
        let chars = token.chars().count();
        for (right, (at, _)) in (1..chars).zip(token.char_indices().rev()) {
            let parts = token.split_at(at);
            if ids.contains_key(parts.1) && ids.contains_key(parts.0) {
                cuts.push(Cut { score, parts, lengths: (chars - right, right) });
            }
        }
    }
    cuts
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The merges by definition: every pair of tokens whose union is one.
    #[test]
    fn merges_are_all_cuts_by_score_and_length() {
        // Two thirds of the words of few letters, so that tokens have many cuts; scores that fall, rise and tie.
        let letters = ['a', 'b', 'é', '▁'];
        let mut tokens: Vec<String> = letters.iter().map(char::to_string).collect();
        for length in 2..=4u32 {
            let words = (0..4usize.pow(length)).filter(|word| word % 3 != 0);
            tokens.extend(words.map(|word| {
                (0..length).map(|place| letters[word / 4usize.pow(place) % 4]).collect::<String>()
            }));
        }
        let scores: Vec<f32> = (0..tokens.len()).map(|id| -((id * 37 % 50) as f32)).collect();
        let ids: Vocab = tokens.iter().cloned().zip(0..).collect();
        let mut expected = Vec::new();
        for (left, right) in tokens.iter().flat_map(|left| tokens.iter().map(move |right| (left, right))) {
            if let Some(&id) = ids.get(&format!("{left}{right}")) {
                let lengths = (left.chars().count(), right.chars().count());
                let score = scores[id as usize];
                expected.push((-score, std::cmp::Reverse(lengths), id, left.clone(), right.clone()));
            }
        }
        expected.sort_by(|a, b| a.partial_cmp(b).unwrap());
        let expected: Merges = expected.into_iter().map(|(.., left, right)| (left, right)).collect();
        let vocab = GgufVocab { tokens, scores: Some(scores), ..Default::default() };
        assert!(expected.len() > 100);
        assert_eq!(merges_by_score(&vocab, &ids).unwrap(), expected);
    }
}
