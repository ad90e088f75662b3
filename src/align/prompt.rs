//! A prompt as receiver and sharers read it, and which sharer column belongs to which receiver token.

use super::{Section, Strategy};
use std::ops::Range;

/// One prompt, read by the receiver and by each sharer.
///
/// Holds: `columns[t]` of sharer `s` is there for every token `t` of a section that is fused with `s`; it is less
/// than the number of the sharer's tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct AlignedPrompt {
    /// What the receiver reads.
    pub receiver_text: String,
    pub receiver_ids: Vec<u32>,
    /// Rotary positions. Token alignment as published pads both models' template parts to equal length; padding is
    /// masked there, so here it is left out, but positions still count it.
    pub receiver_positions: Vec<u32>,
    /// For each receiver token: is it part of a message (not of the chat template) that a sharer reads too?
    pub message_mask: Vec<bool>,
    /// Lengths add up to the number of receiver tokens; none is empty.
    pub sections: Vec<Section>,
    /// The prompt cut where messages begin and end, in order.
    pub segments: Vec<Segment>,
    pub sharers: Vec<SharerPrompt>,
    /// What could not be aligned.
    pub remarks: Vec<Remark>,
}

/// A prompt as one sharer reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct SharerPrompt {
    /// The sharer's own rendering of the prompt. With token alignment `ids` are another reading of it.
    pub text: String,
    pub ids: Vec<u32>,
    /// Rotary positions, see [`AlignedPrompt::receiver_positions`].
    pub positions: Vec<u32>,
    /// For each receiver token the sharer token (index into `ids`, so column of the sharer's cache) it is aligned
    /// with, if any. Message tokens of a message that the sharer reads always have one. A token of the chat template
    /// has the sharer's template token at the same place of the segment, if there is one; such pairs are not fused.
    pub columns: Vec<Option<u32>>,
}

/// A message, or what the chat template puts between messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The message's index; `None` for template text.
    pub message: Option<usize>,
    /// Indices into `receiver_ids`.
    pub receiver: Range<usize>,
    /// For each sharer, indices into its `ids`.
    pub sharers: Vec<Range<usize>>,
    /// The sharers this segment is fused with: see [`Section::sharer_mask`]. 0 for template text.
    pub sharer_mask: u32,
}

impl Segment {
    /// Tokens of the segment when all models' parts are padded to the longest.
    pub fn width(&self) -> usize {
        self.sharers.iter().map(Range::len).fold(self.receiver.len(), usize::max)
    }
}

/// Something in a prompt that could not be aligned; the prompt is usable all the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remark {
    /// The message's content is not found in the receiver's (`sharer: None`) or a sharer's rendering: it is read by
    /// whoever finds it in its template, but not fused.
    MessageNotFused { message: usize, sharer: Option<usize> },
    /// A special token of the receiver in a message that has no counterpart; the sharer reads its unknown token or
    /// id 0 instead.
    UnknownSpecial { sharer: usize, receiver_id: u32 },
    /// The sharer reads no token of the text at all.
    NothingToShare { sharer: usize },
}

impl std::fmt::Display for Remark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Remark::MessageNotFused { message, sharer: None } => {
                write!(
                    f,
                    "message {message} is not fused: the receiver's template changes or drops its content"
                )
            }
            Remark::MessageNotFused { message, sharer: Some(sharer) } => {
                let n = sharer + 1;
                write!(
                    f,
                    "message {message} is not fused with sharer {n}: its template changes or drops the content"
                )
            }
            Remark::UnknownSpecial { sharer, receiver_id } => {
                write!(f, "special token {receiver_id} of the receiver is unknown to sharer {}", sharer + 1)
            }
            Remark::NothingToShare { sharer } => {
                write!(f, "sharer {} has no tokens for this text", sharer + 1)
            }
        }
    }
}

impl AlignedPrompt {
    /// How many of sharer `sharer`'s tokens have to be read before everything that is fused with it is there; its
    /// later tokens influence nothing.
    pub fn columns_needed(&self, sharer: usize) -> usize {
        let fused = self.sections.len().saturating_sub(1);
        let mut start = 0;
        let mut needed = 0;
        for section in &self.sections[..fused] {
            let tokens = start..start + section.len;
            start = tokens.end;
            if section.sharer_mask >> sharer & 1 == 1 {
                let columns = self.sharers[sharer].columns[tokens].iter().flatten();
                needed = columns.fold(needed, |needed, &column| needed.max(column as usize + 1));
            }
        }
        needed
    }

    /// The prompt with everything from token `start` on, and the token before it, in one last section that is not fused: the
    /// token before an answer is the first that has to know it.
    pub fn unfused_from(mut self, start: usize) -> AlignedPrompt {
        let (keep, total) = (start.saturating_sub(1), self.receiver_ids.len());
        let mut at = 0;
        let mut sections = Vec::new();
        for section in &self.sections {
            let len = section.len.min(keep.saturating_sub(at));
            at += section.len;
            if len > 0 {
                sections.push(Section { len, ..*section });
            }
        }
        // Template text before the answer joins it.
        let mut rest = total - keep;
        while sections.last().is_some_and(|section| section.sharer_mask == 0) {
            rest += sections.pop().map_or(0, |section| section.len);
        }
        sections.push(Section { len: rest, sharer_mask: 0 });
        self.sections = sections;
        self
    }

    /// Each sharer's part of every segment filled up with its padding token, the receiver's too, to equal length: the
    /// published form of a token-aligned prompt. `pads` are the padding ids, the receiver's first.
    ///
    /// # Panics
    /// If `pads` does not hold one id per model.
    pub fn padded(&self, pads: &[u32]) -> PaddedPrompt {
        assert_eq!(pads.len(), 1 + self.sharers.len(), "one padding id per model");
        let mut padded = PaddedPrompt {
            ids: vec![Vec::new(); pads.len()],
            padding: vec![Vec::new(); pads.len()],
            message_mask: Vec::new(),
            segments: Vec::new(),
        };
        for segment in &self.segments {
            let start = padded.message_mask.len();
            let end = start + segment.width();
            padded.message_mask.resize(end, segment.message.is_some());
            padded.segments.push((segment.message, start..end));
            let ids = std::iter::once(&self.receiver_ids).chain(self.sharers.iter().map(|s| &s.ids));
            let ranges = std::iter::once(&segment.receiver).chain(&segment.sharers);
            for (model, (ids, range)) in ids.zip(ranges).enumerate() {
                padded.ids[model].extend_from_slice(&ids[range.clone()]);
                padded.padding[model].resize(start + range.len(), false);
                padded.ids[model].resize(end, pads[model]);
                padded.padding[model].resize(end, true);
            }
        }
        padded
    }
}

/// A prompt whose models all have the same number of tokens, as published. Index 0 is the receiver.
#[derive(Clone, Debug, PartialEq)]
pub struct PaddedPrompt {
    pub ids: Vec<Vec<u32>>,
    /// True on padding; attention is masked there.
    pub padding: Vec<Vec<bool>>,
    pub message_mask: Vec<bool>,
    /// Message index (`None`: template) and token range.
    pub segments: Vec<(Option<usize>, Range<usize>)>,
}

impl PaddedPrompt {
    /// Where the last message begins: in training, the end of the instruction.
    pub fn last_message(&self) -> Option<usize> {
        self.segments.iter().rev().find_map(|(message, range)| message.map(|_| range.start))
    }
}

/// Rotary positions of the receiver and the sharers. By tokens: padding counts, so that aligned tokens have equal
/// positions, as published. By span: every model counts its own tokens.
pub(super) fn positions(segments: &[Segment], strategy: Option<Strategy>, models: usize) -> Vec<Vec<u32>> {
    let mut positions = vec![Vec::new(); models];
    let mut start = 0u32;
    for segment in segments {
        let ranges = std::iter::once(&segment.receiver).chain(&segment.sharers);
        for (positions, range) in positions.iter_mut().zip(ranges) {
            let first = if strategy.is_some() { start } else { positions.len() as u32 };
            positions.extend(first..first + range.len() as u32);
        }
        start += segment.width() as u32;
    }
    positions
}

/// A section per run of segments with the same mask. Template text that only a sharer has still separates: what
/// follows it reads the fused cache of what precedes it.
pub(super) fn sections(segments: &[Segment]) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    for segment in segments {
        match sections.last_mut() {
            Some(last) if last.sharer_mask == segment.sharer_mask => last.len += segment.receiver.len(),
            _ => sections.push(Section { len: segment.receiver.len(), sharer_mask: segment.sharer_mask }),
        }
    }
    sections.retain(|section| section.len > 0);
    sections
}
