//! What one example is to the models: tokens, sections, and what follows each token.

use super::Error;
use crate::{
    align::{AlignedPrompt, Aligner, ChatOptions},
    ops::IGNORED,
    pipeline::Prompt,
    tokenizer::{Message, TemplateOptions, Tokenizer},
};

/// A conversation as the receiver and its sharers read it.
#[derive(Clone, Debug)]
pub struct Sample {
    pub prompt: Prompt,
    /// For each receiver token the one that should follow, or [`IGNORED`].
    pub labels: Vec<u32>,
    /// Where it came from, for messages.
    pub origin: String,
}

impl Sample {
    /// Receiver tokens.
    pub fn tokens(&self) -> usize {
        self.prompt.ids.len()
    }

    /// Tokens that are learned from.
    pub fn labelled(&self) -> usize {
        self.labels.iter().filter(|&&label| label != IGNORED).count()
    }

    /// A conversation whose last message, the assistant's, is to be learned with the tokens that close it. Messages before it are
    /// fused as [`Aligner::chat`] says; the last one is not.
    pub fn chat(aligner: &Aligner, messages: &[Message], origin: &str) -> Result<Sample, Error> {
        let bad = |problem: &str| Error::Sample { origin: origin.into(), problem: problem.into() };
        let last = messages.len().checked_sub(1).ok_or_else(|| bad("has no messages"))?;
        if messages[last].role != "assistant" {
            return Err(bad("does not end with the assistant's message"));
        }
        let template = TemplateOptions { enable_thinking: Some(false), ..TemplateOptions::default() };
        let aligned = aligner.chat(messages, &ChatOptions { template, ..ChatOptions::default() })?;
        let segment = aligned.segments.iter().find(|segment| segment.message == Some(last));
        let start = segment.ok_or_else(|| bad("has an answer that the template drops"))?.receiver.start;
        if start == 0 {
            return Err(bad("has nothing before its answer"));
        }
        let labels = shifted(&aligned.receiver_ids, start);
        let prompt = unfused_from(aligned, start);
        Ok(Sample { prompt, labels, origin: origin.into() })
    }

    /// The same for one model alone.
    pub fn alone(tokenizer: &Tokenizer, messages: &[Message], origin: &str) -> Result<Sample, Error> {
        let aligner = Aligner::new(tokenizer, &[], crate::align::Alignment::Span)?;
        Sample::chat(&aligner, messages, origin)
    }
}

/// Every token from `start` on follows the one before it.
fn shifted(ids: &[u32], start: usize) -> Vec<u32> {
    let next = ids.iter().skip(1).copied().chain([IGNORED]);
    next.enumerate().map(|(t, id)| if t + 1 >= start { id } else { IGNORED }).collect()
}

/// The prompt with everything from token `start` on, and the token before it, in one last section that is not fused: the
/// token before the answer is the first to be learned from.
fn unfused_from(mut aligned: AlignedPrompt, start: usize) -> Prompt {
    let (keep, total) = (start - 1, aligned.receiver_ids.len());
    let mut at = 0;
    let mut sections = Vec::new();
    for section in &aligned.sections {
        let len = section.len.min(keep.saturating_sub(at));
        at += section.len;
        if len > 0 {
            sections.push(crate::align::Section { len, ..*section });
        }
    }
    // Template text before the answer joins it.
    let mut rest = total - keep;
    while sections.last().is_some_and(|section| section.sharer_mask == 0) {
        rest += sections.pop().map_or(0, |section| section.len);
    }
    sections.push(crate::align::Section { len: rest, sharer_mask: 0 });
    aligned.sections = sections;
    aligned.into()
}
