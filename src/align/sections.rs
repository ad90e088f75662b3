//! Sections: runs of receiver tokens that are treated alike, and which sharers each run is fused with.
//!
//! A section ends where fusion has to happen before more tokens are read: tokens of later sections attend to the
//! fused cache of earlier ones. The *last* section is never fused, whatever its mask: it is what the receiver reads
//! on top of the fused cache, and its last token gives the first logits.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// `len` receiver tokens, fused with the sharers whose bits are set in `sharer_mask` (bit 0 = first sharer).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Section {
    pub len: usize,
    /// 0: the receiver alone.
    pub sharer_mask: u32,
}

impl Section {
    /// From the published `(length, mask)`, where −1 (and 0) is "no sharer".
    pub fn from_published(len: usize, mask: i64) -> Section {
        Section { len, sharer_mask: u32::try_from(mask).unwrap_or(0) }
    }

    /// The mask as published: −1 where no sharer is chosen.
    pub fn published_mask(&self) -> i64 {
        if self.sharer_mask == 0 { -1 } else { self.sharer_mask.into() }
    }
}

/// The mask that selects the first `n` sharers.
///
/// # Panics
/// If `n` is more than 32.
pub fn all_sharers(n: usize) -> u32 {
    assert!(n <= 32, "a section's mask holds 32 sharers, not {n}");
    ((1u64 << n) - 1) as u32
}

/// One section per run of equal masks.
pub fn runs(masks: impl IntoIterator<Item = u32>) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    for sharer_mask in masks {
        match sections.last_mut() {
            Some(last) if last.sharer_mask == sharer_mask => last.len += 1,
            _ => sections.push(Section { len: 1, sharer_mask }),
        }
    }
    sections
}

/// What generation after a prompt of `tokens` uses: all but the last token fused, the last one read by the receiver
/// alone. No section is empty.
pub fn generation(tokens: usize, sharer_mask: u32) -> Vec<Section> {
    instruction(tokens, tokens, sharer_mask)
}

/// What teacher forcing uses: the first `instruction − 1` of `total` tokens fused, so that the last instruction token
/// predicts the first answer token on the fused cache.
pub fn instruction(instruction: usize, total: usize, sharer_mask: u32) -> Vec<Section> {
    let fused = instruction.saturating_sub(1);
    runs((0..total).map(|token| if token < fused { sharer_mask } else { 0 }))
}

/// Which part of the prompt a fraction of fused tokens comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Portion {
    #[default]
    Front,
    Back,
}

impl FromStr for Portion {
    type Err = BadFraction;

    fn from_str(text: &str) -> Result<Self, BadFraction> {
        match text {
            "front" => Ok(Portion::Front),
            "back" => Ok(Portion::Back),
            _ => Err(BadFraction(text.into())),
        }
    }
}

/// `--fraction`: how much of what would be fused is, and from which end. In files as on the command line: `"back:0.1"`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "String")]
pub struct Fraction {
    share: f64,
    portion: Portion,
}

/// A fraction that is none.
#[derive(Clone, Debug, thiserror::Error)]
#[error(
    "`{0}` is not a fraction: use a number from 0 to 1, with front: or back: before it (front unless given)"
)]
pub struct BadFraction(String);

impl Fraction {
    pub fn new(share: f64, portion: Portion) -> Result<Fraction, BadFraction> {
        if (0.0..=1.0).contains(&share) {
            Ok(Fraction { share, portion })
        } else {
            Err(BadFraction(share.to_string()))
        }
    }

    /// Keeps the first or last `⌊share · n⌋` of the `n` tokens that `sections` would fuse. Neighbours that nothing is
    /// fused with merge, the last section included.
    pub fn apply(&self, sections: &[Section]) -> Vec<Section> {
        if self.share == 1.0 {
            return sections.to_vec();
        }
        let fused = |i: usize| i + 1 < sections.len() && sections[i].sharer_mask != 0;
        let kept = self.of((0..sections.len()).filter(|&i| fused(i)).map(|i| sections[i].len).sum());
        let mut left: Vec<Section> = Vec::new();
        let mut push = |len: usize, sharer_mask: u32| match left.last_mut() {
            _ if len == 0 => {}
            Some(last) if last.sharer_mask == 0 && sharer_mask == 0 => last.len += len,
            _ => left.push(Section { len, sharer_mask }),
        };
        let mut start = 0;
        for (i, section) in sections.iter().enumerate() {
            if fused(i) {
                let end = start + section.len;
                let (from, to) = (kept.start.clamp(start, end), kept.end.clamp(start, end));
                push(from - start, 0);
                push(to - from, section.sharer_mask);
                push(end - to, 0);
                start = end;
            } else {
                push(section.len, section.sharer_mask);
            }
        }
        left
    }

    /// Which of `n` tokens are kept.
    pub fn of(&self, n: usize) -> std::ops::Range<usize> {
        let kept = (self.share * n as f64) as usize;
        match self.portion {
            Portion::Front => 0..kept,
            Portion::Back => n - kept..n,
        }
    }
}

impl FromStr for Fraction {
    type Err = BadFraction;

    fn from_str(text: &str) -> Result<Self, BadFraction> {
        let bad = || BadFraction(text.into());
        let (portion, share) = match text.split_once(':') {
            Some((portion, share)) => (portion.parse().map_err(|_| bad())?, share),
            None => (Portion::Front, text),
        };
        Fraction::new(share.parse().map_err(|_| bad())?, portion).map_err(|_| bad())
    }
}

impl fmt::Display for Fraction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let portion = match self.portion {
            Portion::Front => "front",
            Portion::Back => "back",
        };
        write!(f, "{portion}:{}", self.share)
    }
}

/// As a file may have it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Share(f64),
    Text(String),
}

impl TryFrom<Written> for Fraction {
    type Error = BadFraction;

    fn try_from(written: Written) -> Result<Self, BadFraction> {
        match written {
            Written::Share(share) => Fraction::new(share, Portion::Front),
            Written::Text(text) => text.parse(),
        }
    }
}

impl From<Fraction> for String {
    fn from(fraction: Fraction) -> String {
        fraction.to_string()
    }
}

/// The published "proportion" of an `instruction`: its chosen part fused, its rest and then the `response` not.
pub fn proportional(
    instruction: usize,
    response: usize,
    fraction: Fraction,
    sharer_mask: u32,
) -> Vec<Section> {
    let kept = fraction.of(instruction);
    runs((0..instruction + response).map(|token| if kept.contains(&token) { sharer_mask } else { 0 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(sections: &[Section]) -> Vec<(usize, i64)> {
        sections.iter().map(|s| (s.len, s.published_mask())).collect()
    }

    #[test]
    fn generation_leaves_the_last_token_to_the_receiver() {
        assert_eq!(pairs(&generation(5, 3)), [(4, 3), (1, -1)]);
        assert_eq!(pairs(&generation(1, 1)), [(1, -1)]);
        assert!(generation(0, 1).is_empty());
    }

    #[test]
    fn a_fraction_of_a_plain_prompt_is_the_published_proportion() {
        for share in [0.0, 0.1, 0.25, 0.3, 0.5, 0.99, 1.0] {
            for portion in [Portion::Front, Portion::Back] {
                let fraction = Fraction::new(share, portion).unwrap();
                for tokens in 1..20 {
                    assert_eq!(
                        fraction.apply(&generation(tokens, 1)),
                        proportional(tokens - 1, 1, fraction, 1),
                        "{fraction} of {tokens}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_fraction_counts_fused_tokens_only() {
        let sections: Vec<Section> =
            [(4, -1), (4, 1), (3, -1), (2, 3), (2, -1)].map(|(n, m)| Section::from_published(n, m)).into();
        let apply = |text: &str| pairs(&text.parse::<Fraction>().unwrap().apply(&sections));
        assert_eq!(apply("0.5"), [(4, -1), (3, 1), (8, -1)]);
        assert_eq!(apply("back:0.5"), [(7, -1), (1, 1), (3, -1), (2, 3), (2, -1)]);
        assert_eq!(apply("back:0"), [(15, -1)]);
        assert_eq!(apply("1"), pairs(&sections));
    }

    #[test]
    fn only_fractions_are_fractions() {
        for text in ["", "2", "-0.1", "nan", "inf", "middle:0.5", "front:", "0.5:front"] {
            assert!(text.parse::<Fraction>().is_err(), "{text} was accepted");
        }
        assert_eq!("back:0.25".parse::<Fraction>().unwrap().to_string(), "back:0.25");
    }

    #[test]
    fn published_masks_round_trip() {
        for mask in [-1, 1, 2, 3] {
            assert_eq!(Section::from_published(7, mask).published_mask(), mask);
        }
        assert_eq!(Section::from_published(7, 0).published_mask(), -1);
        assert_eq!((all_sharers(0), all_sharers(2), all_sharers(32)), (0, 3, u32::MAX));
    }
}
