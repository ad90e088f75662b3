//! How a sharer reads what the receiver reads, and which of its layers and cache columns the receiver takes.
//!
//! [`Aligner`] turns a conversation or a plain text into an [`AlignedPrompt`]: token ids for each model, for each
//! receiver token the sharer column that goes with it, and the [`Section`]s in which the fusion proceeds.
//! [`LayerMapping`] does the same for layers. [`report`] measures how well two tokenizers get on.

mod chat;
mod layers;
mod prompt;
pub mod report;
pub mod sections;
pub mod span;
mod tokens;

pub use chat::ChatOptions;
pub use layers::{LayerMapping, UnknownMapping};
pub use prompt::{AlignedPrompt, PaddedPrompt, Remark, Segment, SharerPrompt};
pub use report::AlignmentReport;
pub use sections::{BadFraction, Fraction, Portion, Section};
pub use span::span_columns;
pub use tokens::{Match, MatchKind, Strategy, TokenAligner, pad_id};

use crate::tokenizer::{self, Message, Tokenizer};
use chat::Reading;
use std::{fmt, str::FromStr};

/// A prompt that cannot be aligned.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    #[error("the prompt is empty: the receiver has no token to read")]
    EmptyPrompt,
    #[error("an open last message needs a conversation that ends with the assistant's message")]
    NothingToLeaveOpen,
    #[error("an open last message and a generation prompt exclude each other: choose one")]
    OpenLastWithGenerationPrompt,
    #[error("{0} sharers are too many: a section can choose among 32")]
    TooManySharers(usize),
    #[error(
        "no tokenizer of this pair names a padding or end-of-sequence token, which the padded form needs"
    )]
    NoPadding,
}

/// A name that is no alignment.
#[derive(Debug, thiserror::Error)]
#[error("unknown alignment `{0}`: use none, first, longest or span")]
pub struct UnknownAlignment(String);

/// `--alignment`: how the sharer comes to its reading of the receiver's prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Alignment {
    /// The sharer reads the receiver's token ids as they are: only for equal vocabularies.
    None,
    /// The sharer reads one token of its own for each receiver token: see [`Strategy::First`].
    First,
    /// The sharer reads one token of its own for each receiver token: see [`Strategy::Longest`].
    Longest,
    /// The sharer reads the text in its own tokenisation: see [`span`].
    #[default]
    Span,
}

impl Alignment {
    /// The token strategy, where the alignment is by tokens.
    pub fn strategy(self) -> Option<Strategy> {
        match self {
            Alignment::First => Some(Strategy::First),
            Alignment::Longest => Some(Strategy::Longest),
            Alignment::None | Alignment::Span => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Alignment::None => "none",
            Alignment::First => "first",
            Alignment::Longest => "longest",
            Alignment::Span => "span",
        }
    }
}

impl FromStr for Alignment {
    type Err = UnknownAlignment;

    fn from_str(text: &str) -> Result<Self, UnknownAlignment> {
        [Alignment::None, Alignment::First, Alignment::Longest, Alignment::Span]
            .into_iter()
            .find(|a| a.name() == text)
            .ok_or_else(|| UnknownAlignment(text.into()))
    }
}

impl fmt::Display for Alignment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Aligns prompts between one receiver and its sharers.
pub struct Aligner {
    receiver: Tokenizer,
    sharers: Vec<Tokenizer>,
    alignment: Alignment,
    /// One per sharer where the alignment is by tokens, else none.
    by_token: Vec<TokenAligner>,
}

impl Aligner {
    pub fn new(receiver: &Tokenizer, sharers: &[Tokenizer], alignment: Alignment) -> Result<Aligner, Error> {
        if sharers.len() > 32 {
            return Err(Error::TooManySharers(sharers.len()));
        }
        let by_token = match alignment.strategy() {
            Some(strategy) => {
                sharers.iter().map(|sharer| TokenAligner::new(receiver, sharer, strategy)).collect()
            }
            None => Vec::new(),
        };
        Ok(Aligner { receiver: receiver.clone(), sharers: sharers.to_vec(), alignment, by_token })
    }

    /// A conversation, rendered by each model's own chat template. Messages are fused, template text is not; with
    /// [`Alignment::None`], where the sharers read the receiver's template too, everything but the last token is
    /// fused.
    ///
    /// A message whose content some template changes beyond trimming is not fused with that model, and remarked.
    pub fn chat(&self, messages: &[Message], options: &ChatOptions) -> Result<AlignedPrompt, Error> {
        let as_published = self.alignment.strategy().is_some();
        let read = |model: &Tokenizer| Reading::chat(model, messages, options, as_published);
        let mut readings = vec![read(&self.receiver)?];
        if self.alignment == Alignment::None {
            readings.resize(1 + self.sharers.len(), readings[0].clone());
        } else {
            for sharer in &self.sharers {
                readings.push(read(sharer)?);
            }
        }
        let missing = chat::agree(&mut readings, messages);
        let mut prompt = self.align(readings)?;
        if self.alignment != Alignment::None {
            prompt.remarks.splice(0..0, missing);
        } else {
            prompt.sections =
                sections::generation(prompt.receiver_ids.len(), sections::all_sharers(self.sharers.len()));
        }
        Ok(prompt)
    }

    /// A text without a chat template (`--raw`): everything but the last token is fused.
    pub fn raw(&self, text: &str) -> Result<AlignedPrompt, Error> {
        let mut readings = vec![Reading::raw(&self.receiver, text)?];
        for sharer in &self.sharers {
            readings.push(match self.alignment {
                Alignment::None => readings[0].clone(),
                _ => Reading::raw(sharer, text)?,
            });
        }
        let mut prompt = self.align(readings)?;
        let mask = prompt.segments.iter().fold(0, |mask, segment| mask | segment.sharer_mask);
        prompt.sections = sections::generation(prompt.receiver_ids.len(), mask);
        Ok(prompt)
    }

    /// The published, padded form of a prompt of this aligner.
    pub fn padded(&self, prompt: &AlignedPrompt) -> Result<PaddedPrompt, Error> {
        let models = std::iter::once(&self.receiver).chain(&self.sharers);
        let pads: Option<Vec<u32>> = models.map(pad_id).collect();
        Ok(prompt.padded(&pads.ok_or(Error::NoPadding)?))
    }

    /// From readings (the receiver's first) whose message spans agree.
    fn align(&self, readings: Vec<Reading>) -> Result<AlignedPrompt, Error> {
        let (receiver, sharers) = readings.split_first().expect("the receiver's reading is there");
        if receiver.ids.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let mut remarks = Vec::new();
        let mut segments = chat::segments(receiver, sharers);
        let mut shared: Vec<SharerPrompt> = Vec::new();
        for (s, reading) in sharers.iter().enumerate() {
            shared.push(self.share(s, receiver, reading, &mut segments, &mut remarks)?);
        }
        let mut positions =
            prompt::positions(&segments, self.alignment.strategy(), 1 + shared.len()).into_iter();
        let receiver_positions = positions.next().unwrap_or_default();
        for (sharer, positions) in shared.iter_mut().zip(positions) {
            sharer.positions = positions;
        }
        let message_mask = segments
            .iter()
            .flat_map(|segment| std::iter::repeat_n(segment.message.is_some(), segment.receiver.len()))
            .collect();
        Ok(AlignedPrompt {
            receiver_text: receiver.text.clone(),
            receiver_ids: receiver.ids.clone(),
            receiver_positions,
            message_mask,
            sections: prompt::sections(&segments),
            segments,
            sharers: shared,
            remarks,
        })
    }

    /// What sharer `s` reads and which of its columns belong to the receiver's tokens. Leaves the ranges of its tokens
    /// in `segments`, which came with those of its own `reading`.
    fn share(
        &self,
        s: usize,
        receiver: &Reading,
        reading: &Reading,
        segments: &mut [Segment],
        remarks: &mut Vec<Remark>,
    ) -> Result<SharerPrompt, Error> {
        if reading.ids.is_empty() {
            remarks.push(Remark::NothingToShare { sharer: s });
        }
        let cover = span::Cover::new(&reading.offsets);
        let places = span::in_text_order(&receiver.offsets);
        let mut ids = Vec::new();
        let mut columns: Vec<Option<u32>> = Vec::new();
        for segment in segments {
            let start = ids.len();
            let own = &reading.ids[segment.sharers[s].clone()];
            let tokens = segment.receiver.clone();
            match segment.message.filter(|_| segment.sharer_mask >> s & 1 == 1) {
                Some(_) if !self.by_token.is_empty() => {
                    for &id in &receiver.ids[tokens] {
                        let found = self.by_token[s].find(id)?;
                        let remark = Remark::UnknownSpecial { sharer: s, receiver_id: id };
                        if found.kind == MatchKind::UnknownSpecial && !remarks.contains(&remark) {
                            remarks.push(remark);
                        }
                        columns.push(Some(ids.len() as u32));
                        ids.push(found.id);
                    }
                }
                Some(message) if self.alignment == Alignment::Span => {
                    ids.extend_from_slice(own);
                    let here = receiver.content(message);
                    let there = reading.content(message);
                    // Tokens on the edges also cover template text; what counts is their part of the message.
                    let place = |at: usize| there.start + at.clamp(here.start, here.end) - here.start;
                    let own: Vec<_> =
                        places[tokens].iter().map(|&(from, to)| (place(from), place(to))).collect();
                    columns.extend(cover.columns(&own));
                }
                _ => {
                    ids.extend_from_slice(own);
                    columns.extend((0..tokens.len()).map(|i| (i < own.len()).then_some((start + i) as u32)));
                }
            }
            segment.sharers[s] = start..ids.len();
        }
        Ok(SharerPrompt { text: reading.text.clone(), ids, positions: Vec::new(), columns })
    }
}
