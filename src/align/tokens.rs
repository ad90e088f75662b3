//! Token alignment as published: one sharer token for each receiver token, found through the token's text.

use crate::tokenizer::{Error, Tokenizer};
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

/// Which sharer token stands for a receiver token whose text the sharer cuts into several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// The first of them.
    First,
    /// The one with most characters, the first of equals.
    Longest,
}

/// The sharer token that stands for a receiver token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match {
    pub id: u32,
    pub kind: MatchKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatchKind {
    /// A special token with a counterpart: the same role (bos, eos, pad, unk) or the same text.
    Special,
    /// A special token the sharer does not have; the sharer reads its unknown token, or id 0 if it has none.
    UnknownSpecial,
    /// The text is one sharer token.
    One,
    /// The text is this many sharer tokens, of which one was chosen.
    Many(usize),
    /// The text is no sharer token at all; the sharer reads its unknown token, or id 0 if it has none.
    Nothing,
}

/// Finds for each receiver token the sharer token that stands for it (first or longest of the sharer's tokens of its
/// text; special tokens by role, then by text).
///
/// The sharer so reads a text that is mangled wherever the vocabularies differ; [`super::span`] does not do that.
pub struct TokenAligner {
    receiver: Tokenizer,
    sharer: Tokenizer,
    strategy: Strategy,
    /// Receiver's special token → the sharer's token of the same role.
    roles: HashMap<u32, u32>,
    /// Grows to the receiver's vocabulary at most.
    known: Mutex<HashMap<u32, Match>>,
}

impl TokenAligner {
    pub fn new(receiver: &Tokenizer, sharer: &Tokenizer, strategy: Strategy) -> TokenAligner {
        let (ours, theirs) = (receiver.special(), sharer.special());
        // In this order: a token of two roles takes the later one's counterpart.
        let roles = [
            (pad_id(receiver), pad_id(sharer)),
            (ours.eos_token, theirs.eos_token),
            (ours.bos, theirs.bos),
            (ours.unk, theirs.unk),
        ];
        let roles = roles.into_iter().filter_map(|(ours, theirs)| ours.zip(theirs)).collect();
        TokenAligner {
            receiver: receiver.clone(),
            sharer: sharer.clone(),
            strategy,
            roles,
            known: Mutex::default(),
        }
    }

    pub fn strategy(&self) -> Strategy {
        self.strategy
    }

    /// One sharer id per receiver id.
    pub fn align_tokens(&self, ids: &[u32]) -> Result<Vec<u32>, Error> {
        ids.iter().map(|&id| Ok(self.find(id)?.id)).collect()
    }

    /// The sharer token for one receiver token, and what kind of match it is.
    pub fn find(&self, id: u32) -> Result<Match, Error> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&found) = known().get(&id) {
            return Ok(found);
        }
        let found = self.search(id)?;
        if self.receiver.token_of(id).is_some() {
            known().insert(id, found);
        }
        Ok(found)
    }

    fn search(&self, id: u32) -> Result<Match, Error> {
        let unknown = self.sharer.special().unk.unwrap_or(0);
        let text = self.receiver.decode(&[id], false);
        if self.receiver.special_ids().contains(&id) {
            let counterpart = self.roles.get(&id).copied().or_else(|| self.sharer.id_of(&text));
            return Ok(match counterpart {
                Some(id) => Match { id, kind: MatchKind::Special },
                None => Match { id: unknown, kind: MatchKind::UnknownSpecial },
            });
        }
        let pieces = self.sharer.encode(&text, false)?.ids;
        Ok(match pieces[..] {
            [] => Match { id: unknown, kind: MatchKind::Nothing },
            [id] => Match { id, kind: MatchKind::One },
            [first, ..] => {
                let id = match self.strategy {
                    Strategy::First => first,
                    Strategy::Longest => self.longest(&pieces),
                };
                Match { id, kind: MatchKind::Many(pieces.len()) }
            }
        })
    }

    fn longest(&self, pieces: &[u32]) -> u32 {
        let mut best = (0, pieces[0]);
        for &id in pieces {
            let length = self.sharer.decode(&[id], false).chars().count();
            if length > best.0 {
                best = (length, id);
            }
        }
        best.1
    }
}

/// The padding token; the end-of-sequence token where there is none.
pub fn pad_id(tokenizer: &Tokenizer) -> Option<u32> {
    let special = tokenizer.special();
    special.pad.or(special.eos_token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn tokenizer(name: &str) -> Tokenizer {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pair").join(name);
        Tokenizer::from_folder(&folder).unwrap()
    }

    /// Where the sharer's first piece is shorter than a later one, and where it is not (the first of equals counts).
    #[test]
    fn first_and_longest_differ() {
        let (receiver, sharer) = (tokenizer("receiver"), tokenizer("sharer"));
        let ids = receiver.encode("han are question sky", false).unwrap().ids;
        let pieces = |id| {
            let ids = sharer.encode(&receiver.decode(&[id], false), false).unwrap().ids;
            ids.iter().map(|&id| sharer.decode(&[id], false)).collect::<Vec<_>>()
        };
        let cut: Vec<_> = ids.iter().map(|&id| pieces(id)).collect();
        assert_eq!(cut[0], ["h", "an"]);
        assert_eq!(cut[1], [" ", "a", "re"]);
        assert_eq!(cut[2], [" ", "qu", "es", "tio", "n"]);
        assert_eq!(cut[3], [" ", "s", "k", "y"]);
        let read = |strategy| {
            let ids = TokenAligner::new(&receiver, &sharer, strategy).align_tokens(&ids).unwrap();
            ids.iter().map(|&id| sharer.decode(&[id], false)).collect::<Vec<_>>()
        };
        assert_eq!(read(Strategy::First), ["h", " ", " ", " "]);
        assert_eq!(read(Strategy::Longest), ["an", "re", "tio", " "]);
    }
}
