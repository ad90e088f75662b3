//! Which tokens are special, and what for.

use tokenizers::Tokenizer;

/// Ids of the tokens with a use of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    pub bos: Option<u32>,
    /// Every token that ends an answer: the model's generation settings and the tokenizer's own, without repeats.
    pub eos: Vec<u32>,
    pub pad: Option<u32>,
    pub unk: Option<u32>,
    /// The tokenizer's single `eos_token`.
    pub eos_token: Option<u32>,
}

/// All that a tokenizer knows about its special tokens.
#[derive(Default)]
pub(super) struct Specials {
    pub tokens: SpecialTokens,
    /// `all_special_ids` of Hugging Face.
    pub declared: Vec<u32>,
    /// Ids that decoding skips, sorted.
    pub marked: Vec<u32>,
    /// Name in templates (`bos_token`, …) and text.
    pub texts: Vec<(String, String)>,
}

impl Specials {
    /// `declared` names special tokens by use (`bos_token`, …), in Hugging Face's order; `stop` are the model's own
    /// stop tokens.
    pub fn new(inner: &Tokenizer, declared: Vec<(String, String)>, stop: &[u32]) -> Self {
        let named = |use_: &str| {
            let (_, text) = declared.iter().find(|(name, _)| name == use_)?;
            inner.token_to_id(text)
        };
        let eos_token = named("eos_token");
        let mut marked: Vec<u32> = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter_map(|(id, token)| token.special.then_some(id))
            .collect();
        marked.sort_unstable();

        let mut eos = stop.to_vec();
        eos.extend(eos_token);
        if stop.is_empty() {
            eos.extend(end_of_turn(inner));
        }
        keep_first(&mut eos);
        let tokens = SpecialTokens {
            bos: named("bos_token"),
            eos,
            pad: named("pad_token"),
            unk: named("unk_token"),
            eos_token,
        };

        let mut ids: Vec<u32> = declared.iter().filter_map(|(_, text)| inner.token_to_id(text)).collect();
        keep_first(&mut ids);
        Self { tokens, declared: ids, marked, texts: declared }
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.marked.binary_search(&id).is_ok()
    }
}

fn keep_first(ids: &mut Vec<u32>) {
    let mut seen = std::collections::HashSet::new();
    ids.retain(|id| seen.insert(*id));
}

/// Added tokens that end an answer in the published chat formats: what to stop at where no file says so. The list is
/// llama.cpp's.
pub(super) fn end_of_turn(inner: &Tokenizer) -> Vec<u32> {
    const TEXTS: [&str; 12] = [
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
    ];
    let added = inner.get_added_vocabulary().get_vocab();
    // Harmony ends each of an answer's channels with <|end|>, the answer itself with <|return|>.
    let harmony = added.contains_key("<|return|>");
    TEXTS
        .iter()
        .filter(|&&text| !(harmony && text == "<|end|>"))
        .filter_map(|&text| added.get(text).copied())
        .collect()
}
