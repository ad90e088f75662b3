//! What makes two tokenizers the same: vocabulary, merges, and which tokens are read as a whole.
//!
//! Whether decoding hides a token is left out (files of one and the same tokenizer differ in it), and so is how a
//! text is split before merging (written differently in tokenizer.json and GGUF).

use std::borrow::Cow;

use sha2::{Digest, Sha256};

/// SHA-256 over the tokens in order of their ids, the merges in order of their rank, the added tokens' ids.
pub(super) fn digest<'a>(
    vocab: impl IntoIterator<Item = (&'a str, u32)>,
    merges: impl IntoIterator<Item = (&'a str, &'a str)>,
    added: impl IntoIterator<Item = u32>,
) -> [u8; 32] {
    let mut hash = Sha256::new();
    let mut field = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    let mut vocab: Vec<(u32, &str)> = vocab.into_iter().map(|(token, id)| (id, token)).collect();
    vocab.sort_unstable();
    for (id, token) in vocab {
        field(&id.to_le_bytes());
        field(token.as_bytes());
    }
    field(b"merges");
    for (left, right) in merges {
        field(left.as_bytes());
        field(right.as_bytes());
    }
    field(b"added");
    let mut added: Vec<u32> = added.into_iter().collect();
    added.sort_unstable();
    for id in added {
        field(&id.to_le_bytes());
    }
    hash.finalize().into()
}

/// The digest of a tokenizer as it stands. The crate gives its merges away only in serialised form, so this takes
/// tenths of a second; GGUF vocabularies have theirs from when they are built.
pub(super) fn of(inner: &tokenizers::Tokenizer) -> [u8; 32] {
    /// The part of a serialised model that counts; models that are not BPE have none.
    #[derive(Default, serde::Deserialize)]
    #[serde(default)]
    struct Bpe<'a> {
        #[serde(borrow)]
        merges: Vec<(Cow<'a, str>, Cow<'a, str>)>,
    }

    let vocab = inner.get_vocab(true);
    let model = serde_json::to_vec(inner.get_model()).unwrap_or_default();
    let merges = serde_json::from_slice::<Bpe>(&model).unwrap_or_default().merges;
    digest(
        vocab.iter().map(|(token, &id)| (token.as_str(), id)),
        merges.iter().map(|(left, right)| (left.as_ref(), right.as_ref())),
        inner.get_added_vocabulary().get_vocab().values().copied(),
    )
}
