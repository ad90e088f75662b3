//! What makes two tokenizers the same: vocabulary, merges, and which tokens are read as a whole.
//!
//! Left out is what the files of one and the same tokenizer differ in: whether decoding hides a token, how a text is
//! split before merging (written differently in tokenizer.json and GGUF), and in SentencePiece vocabularies the merges
//! (tokenizer.json ranks them, GGUF has scores; both follow from the pieces in order of their ids) and how a piece of
//! spaces is spelled (Gemma's GGUF files have spaces where its tokenizer.json has U+2581).

use std::borrow::Cow;

use sha2::{Digest, Sha256};

struct Fields(Sha256);

impl Fields {
    fn add(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }
}

/// SHA-256 over the tokens with ids below `rows` in order of their ids, and which of them are read as a whole.
/// `merges`: [`of_merges`] of a vocabulary that lists them; without, the vocabulary is SentencePiece's.
pub(super) fn of(inner: &tokenizers::Tokenizer, rows: usize, merges: Option<[u8; 32]>) -> [u8; 32] {
    let mut fields = Fields(Sha256::new());
    let vocab = inner.get_vocab(true);
    let mut vocab: Vec<(u32, &str)> = vocab.iter().map(|(token, &id)| (id, token.as_str())).collect();
    vocab.retain(|&(id, _)| (id as usize) < rows);
    vocab.sort_unstable();
    for (id, token) in vocab {
        fields.add(&id.to_le_bytes());
        match merges {
            None if token.contains(' ') => fields.add(token.replace(' ', "▁").as_bytes()),
            _ => fields.add(token.as_bytes()),
        }
    }
    fields.add(b"merges");
    fields.add(merges.as_ref().map_or(&[], |digest| digest.as_slice()));
    fields.add(b"added");
    let mut added: Vec<u32> = inner.get_added_vocabulary().get_vocab().values().copied().collect();
    added.retain(|&id| (id as usize) < rows);
    added.sort_unstable();
    for id in added {
        fields.add(&id.to_le_bytes());
    }
    fields.0.finalize().into()
}

/// SHA-256 over merges, first merge first.
pub(super) fn of_merges<'a>(merges: impl IntoIterator<Item = (&'a str, &'a str)>) -> [u8; 32] {
    let mut fields = Fields(Sha256::new());
    for (left, right) in merges {
        fields.add(left.as_bytes());
        fields.add(right.as_bytes());
    }
    fields.0.finalize().into()
}

/// The same of a tokenizer as it stands. The crate gives its merges away only in serialised form, so this takes
/// tenths of a second.
pub(super) fn of_its_merges(inner: &tokenizers::Tokenizer) -> [u8; 32] {
    /// The part of a serialised model that counts; models that are not BPE have none.
    #[derive(Default, serde::Deserialize)]
    #[serde(default)]
    struct Bpe<'a> {
        #[serde(borrow)]
        merges: Vec<(Cow<'a, str>, Cow<'a, str>)>,
    }

    let model = serde_json::to_vec(inner.get_model()).unwrap_or_default();
    let merges = serde_json::from_slice::<Bpe>(&model).unwrap_or_default().merges;
    of_merges(merges.iter().map(|(left, right)| (left.as_ref(), right.as_ref())))
}
