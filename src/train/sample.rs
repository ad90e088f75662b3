//! What one example is to the models: tokens, sections, and what follows each token.

use super::Error;
use crate::{
    align::{Aligner, ChatOptions},
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
        let prompt = aligned.unfused_from(start).into();
        Ok(Sample { prompt, labels, origin: origin.into() })
    }

    /// The sample whose last section is fused too, for [`super::PairTrainer::include_response`]: each sharer reads the receiver's
    /// tokens of that section behind its own prompt, and the receiver's take their columns.
    pub fn including_response(mut self) -> Result<Sample, Error> {
        let bad = |problem: &str| Error::Sample { origin: self.origin.clone(), problem: problem.into() };
        let prompt = &mut self.prompt;
        let start = prompt.ids.len() - prompt.sections.last().map_or(0, |section| section.len);
        let fused = prompt.sections.iter().rev().nth(1);
        if fused.is_none_or(|section| section.sharer_mask == 0) {
            return Err(bad(
                "has tokens between its fused section and its last one: the response begins where the prompt ends",
            ));
        }
        for own in &mut prompt.sharers {
            let (known, at) = (own.ids.len() as u32, own.positions.last().map_or(0, |last| last + 1));
            let first = prompt.positions.get(start).copied().unwrap_or(0);
            own.ids.extend(&prompt.ids[start..]);
            own.positions.extend(prompt.positions[start..].iter().map(|p| at + p.saturating_sub(first)));
            own.columns.truncate(start);
            own.columns.resize(start, None);
            own.columns.extend((known..own.ids.len() as u32).map(Some));
        }
        Ok(self)
    }

    /// Whether [`Sample::including_response`] made it.
    pub(super) fn check_response(&self) -> Result<(), Error> {
        let start = self.tokens() - self.prompt.sections.last().map_or(0, |section| section.len);
        let whole = |own: &crate::pipeline::SharerPrompt| own.columns.iter().skip(start).all(Option::is_some);
        if self.prompt.sharers.iter().all(whole) {
            return Ok(());
        }
        let problem = "does not say what the tokens of its answer are fused with".into();
        Err(Error::Sample { origin: self.origin.clone(), problem })
    }

    /// The sample without the first tokens of its prompt, so that it has `most`; `None` where the answer leaves no room for one
    /// token before it. The sharers still read all of theirs.
    pub fn truncated(mut self, most: usize) -> Option<Sample> {
        let drop = self.tokens().saturating_sub(most);
        let answer = self.labels.iter().position(|&label| label != IGNORED)?;
        if drop >= answer {
            return None;
        }
        let prompt = &mut self.prompt;
        let mut left = drop;
        for section in &mut prompt.sections {
            let cut = section.len.min(left);
            section.len -= cut;
            left -= cut;
        }
        prompt.sections.retain(|section| section.len > 0);
        prompt.ids.drain(..drop);
        // Positions count from 0 again.
        let first = prompt.positions[drop];
        prompt.positions = prompt.positions[drop..].iter().map(|position| position - first).collect();
        for own in &mut prompt.sharers {
            own.columns.drain(..drop);
        }
        self.labels.drain(..drop);
        Some(self)
    }

    /// The same for one model alone: learned is what its template puts behind the generation prompt.
    pub fn alone(tokenizer: &Tokenizer, messages: &[Message], origin: &str) -> Result<Sample, Error> {
        let bad = |problem: &str| Error::Sample { origin: origin.into(), problem: problem.into() };
        let Some((last, before)) = messages.split_last() else { return Err(bad("has no messages")) };
        if last.role != "assistant" {
            return Err(bad("does not end with the assistant's message"));
        }
        let template = |add_generation_prompt: bool| TemplateOptions {
            add_generation_prompt,
            enable_thinking: Some(false),
            ..TemplateOptions::default()
        };
        let prompt = tokenizer.render(before, &template(true))?;
        let text = tokenizer.render(messages, &template(false))?;
        if !text.starts_with(&prompt) {
            return Err(bad(
                "is rendered otherwise with its answer than without: the chat template cannot be learned from",
            ));
        }
        let encoding = tokenizer.encode(&text, false)?;
        let start = encoding.offsets.iter().position(|offset| offset.0 >= prompt.len());
        let start = start
            .filter(|&start| start > 0)
            .ok_or_else(|| bad("has nothing before its answer, or no answer"))?;
        let labels = shifted(&encoding.ids, start);
        Ok(Sample { prompt: plain(encoding.ids), labels, origin: origin.into() })
    }
}

/// A prompt that one model reads alone.
pub(super) fn plain(ids: Vec<u32>) -> Prompt {
    let len = ids.len();
    let positions = (0..len as u32).collect();
    Prompt {
        ids,
        positions,
        sharers: Vec::new(),
        sections: vec![crate::align::Section { len, sharer_mask: 0 }],
    }
}

/// Every token from `start` on follows the one before it.
fn shifted(ids: &[u32], start: usize) -> Vec<u32> {
    let next = ids.iter().skip(1).copied().chain([IGNORED]);
    next.enumerate().map(|(t, id)| if t + 1 >= start { id } else { IGNORED }).collect()
}
