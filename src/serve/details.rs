//! What an answer in C2C mode tells on request: which tokens were aligned, and how heavy each was.

use crate::{
    align::AlignedPrompt,
    fuser::Gates,
    pipeline::{Error, Observation, Prompt, Session, WeightMap},
    tokenizer::Tokenizer,
};
use serde::Serialize;

/// Of one prompt and the first sharer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Details {
    /// The mean weight of [keys, values] of each layer; `None` where the layer has no projector.
    pub mean_weights: Vec<Option<[f32; 2]>>,
    pub alignment: TokenLinks,
    pub weights: WeightMap,
}

/// Both readings of a prompt, and which token of the one took the other's column.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TokenLinks {
    /// Each token as text. Pieces of a character are U+FFFD.
    pub receiver_tokens: Vec<String>,
    pub sharer_tokens: Vec<String>,
    /// For each receiver token the sharer's token whose column it took, if any.
    pub columns: Vec<Option<u32>>,
}

impl Details {
    /// Looks at the fuser while it works through `aligned` once more, in caches of its own; `gates` are those of the answer, for
    /// each fuser.
    ///
    /// # Errors
    /// As a prefill; [`Error::MissingModel`] without a sharer.
    pub fn of(session: &Session, aligned: &AlignedPrompt, gates: &[Gates]) -> Result<Details, Error> {
        let missing = |what| Error::MissingModel { mode: session.mode(), what };
        let receiver = session.receiver.as_ref().ok_or(missing("--receiver"))?;
        let sharer = session.sharers.first().ok_or(missing("--sharer"))?;
        let prompt = Prompt::from(aligned.clone());
        let sharer_tokens: Vec<usize> = prompt.sharers.iter().map(|own| own.ids.len()).collect();
        let mut link = session.link(prompt.ids.len(), &sharer_tokens)?;
        link.gates = gates.to_vec();
        let seen = Observation::of(&mut link, &prompt)?.into_iter().next().ok_or(missing("--sharer"))?;
        let mut columns = vec![None; prompt.ids.len()];
        for (&token, &column) in seen.tokens.iter().zip(&seen.columns) {
            columns[token as usize] = Some(column);
        }
        let alignment = TokenLinks {
            receiver_tokens: texts(receiver.tokenizer()?, &aligned.receiver_ids),
            sharer_tokens: texts(sharer.tokenizer()?, &aligned.sharers[0].ids),
            columns,
        };
        Ok(Details { mean_weights: seen.mean_weights(), alignment, weights: seen.map() })
    }
}

fn texts(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    ids.iter().map(|id| tokenizer.decode(std::slice::from_ref(id), false)).collect()
}
