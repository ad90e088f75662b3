//! Where the messages of a conversation lie in each model's rendering of it.

use super::{Error, Remark, Segment, span::Offset};
use crate::tokenizer::{Message, TemplateOptions, Tokenizer};
use std::ops::Range;

/// How a conversation is rendered.
#[derive(Clone, Debug, Default)]
pub struct ChatOptions {
    pub template: TemplateOptions,
    /// Leave the last message, which must be the assistant's, open: nothing closes it, so that generation continues
    /// it. (`remove_last_surfix` in the published program.)
    pub open_last: bool,
}

/// One model's rendering and tokenisation of a prompt.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    pub text: String,
    pub ids: Vec<u32>,
    pub offsets: Vec<Offset>,
    /// Bytes of each message's content in `text`, in order; `None` where it is empty or cannot be found.
    contents: Vec<Option<Range<usize>>>,
    /// Tokens of each message; `None` where there is no content, or no other model finds it.
    tokens: Vec<Option<Range<usize>>>,
}

impl Reading {
    /// `as_published` looks for contents the published way, which can take a role's name for a content.
    pub fn chat(
        tokenizer: &Tokenizer,
        messages: &[Message],
        options: &ChatOptions,
        as_published: bool,
    ) -> Result<Reading, Error> {
        let text = render(tokenizer, messages, options)?;
        let encoding = tokenizer.encode(&text, false)?;
        let skeleton = if as_published { None } else { skeleton(tokenizer, messages, options) };
        let contents = match skeleton {
            Some(skeleton) => fill(&text, &skeleton, messages),
            None => search(&text, &encoding.offsets, messages),
        };
        let tokens = vec![None; messages.len()];
        Ok(Reading { text, ids: encoding.ids, offsets: encoding.offsets, contents, tokens })
    }

    /// A text that is one message, with the special tokens that the tokenizer puts around a text.
    pub fn raw(tokenizer: &Tokenizer, text: &str) -> Result<Reading, Error> {
        let encoding = tokenizer.encode(text, true)?;
        let tokens = Some(0..encoding.ids.len()).filter(|tokens| !tokens.is_empty());
        Ok(Reading {
            text: text.into(),
            ids: encoding.ids,
            offsets: encoding.offsets,
            contents: vec![Some(0..text.len())],
            tokens: vec![tokens],
        })
    }

    /// Bytes of a message's content; empty if it was not found.
    pub fn content(&self, message: usize) -> Range<usize> {
        self.contents[message].clone().unwrap_or(0..0)
    }

    /// From the first token that reaches into the content up to the first that starts behind it.
    fn find_tokens(&mut self) {
        let mut next = 0;
        for (content, tokens) in self.contents.iter().zip(&mut self.tokens) {
            let Some(content) = content else { continue };
            let rest = |from: usize| self.offsets[from..].iter();
            let start = next + rest(next).take_while(|token| token.1 <= content.start).count();
            let end = start + rest(start).take_while(|token| token.0 < content.end).count();
            *tokens = Some(start..end).filter(|tokens| !tokens.is_empty());
            next = end;
        }
    }
}

fn render(tokenizer: &Tokenizer, messages: &[Message], options: &ChatOptions) -> Result<String, Error> {
    if !options.open_last {
        return Ok(tokenizer.render(messages, &options.template)?);
    }
    if options.template.add_generation_prompt {
        return Err(Error::OpenLastWithGenerationPrompt);
    }
    let (last, before) = messages.split_last().ok_or(Error::NothingToLeaveOpen)?;
    if last.role != "assistant" {
        return Err(Error::NothingToLeaveOpen);
    }
    let template = TemplateOptions { add_generation_prompt: true, ..options.template.clone() };
    Ok(tokenizer.render(before, &template)? + &last.content)
}

fn with_content(messages: &[Message]) -> impl Iterator<Item = (usize, &str)> {
    messages.iter().map(|m| m.content.as_str()).enumerate().filter(|(_, content)| !content.is_empty())
}

/// What the template puts around contents, from a rendering with placeholders for them.
struct Skeleton {
    /// Template text before the first content.
    before: String,
    /// In the order of the text: which message's content, and the template text behind it.
    places: Vec<(usize, String)>,
}

// Private-use characters: no template trims, splits or knows them.
const OPEN: char = '\u{F8F0}';
const CLOSE: char = '\u{F8F1}';

/// `None` if the template does not accept placeholders.
fn skeleton(tokenizer: &Tokenizer, messages: &[Message], options: &ChatOptions) -> Option<Skeleton> {
    let mut marked = messages.to_vec();
    for (i, _) in with_content(messages) {
        marked[i].content = format!("{OPEN}{i}{CLOSE}");
    }
    let text = render(tokenizer, &marked, options).ok()?;
    let mut parts = text.split(OPEN);
    let before = parts.next()?.to_string();
    let place = |part: &str| {
        let (message, behind) = part.split_once(CLOSE)?;
        Some((message.parse().ok().filter(|&i: &usize| i < messages.len())?, behind.to_string()))
    };
    Some(Skeleton { before, places: parts.map(place).collect::<Option<_>>()? })
}

/// The contents' places in `text`: where they stand, as they are or trimmed, between the template texts of the
/// skeleton. A content that is not there does not spoil the others.
fn fill(text: &str, skeleton: &Skeleton, messages: &[Message]) -> Vec<Option<Range<usize>>> {
    let mut contents: Vec<Option<Range<usize>>> = vec![None; messages.len()];
    let mut at = skeleton.before.len();
    if !text.starts_with(&skeleton.before) {
        return contents;
    }
    for (n, (message, behind)) in skeleton.places.iter().enumerate() {
        let last = n + 1 == skeleton.places.len();
        let content = messages[*message].content.as_str();
        let follows = |form: &&str| {
            let rest = text[at..].strip_prefix(*form);
            rest.is_some_and(|rest| if last { rest == behind } else { rest.starts_with(behind.as_str()) })
        };
        let forms = [content, content.trim(), content.trim_start(), content.trim_end()];
        match forms.into_iter().find(follows) {
            Some("") => at += behind.len(),
            Some(form) => {
                let place = at..at + form.len();
                at = place.end + behind.len();
                contents[*message].get_or_insert(place);
            }
            None => match text[at..].find(behind.as_str()) {
                Some(skipped) if !behind.is_empty() => at += skipped + behind.len(),
                _ => break,
            },
        }
    }
    // Messages that the template prints out of order cannot be sections of a prompt.
    let mut reached = 0;
    for content in &mut contents {
        *content = content.take().filter(|place| place.start >= reached);
        reached = content.as_ref().map_or(reached, |place| place.end);
    }
    contents
}

/// The contents' places in `text` as the published program finds them: each is looked for behind the one before; best
/// is a place behind which a special token opens. Trimmed contents are looked for too.
fn search(text: &str, tokens: &[Offset], messages: &[Message]) -> Vec<Option<Range<usize>>> {
    let mut contents = vec![None; messages.len()];
    let mut from = 0;
    for (i, content) in with_content(messages) {
        contents[i] =
            [content, content.trim()].into_iter().filter(|form| !form.is_empty()).find_map(|form| {
                let places = || {
                    let places =
                        text[from..].match_indices(form).map(|(at, _)| from + at..from + at + form.len());
                    // Not a part of a token's name, as in <|begin_of_text|>.
                    places.filter(|place| !tokens.iter().any(|t| t.0 < place.start && place.end < t.1))
                };
                let closed =
                    |place: &Range<usize>| matches!(text.as_bytes().get(place.end), None | Some(b'<'));
                places().find(closed).or_else(|| places().next())
            });
        if let Some(place) = &contents[i] {
            from = place.end;
        }
    }
    contents
}

/// Makes message spans of all readings (the receiver's first) name the same text: where one model trims a content,
/// the trimmed text counts for all. Returns the messages with content that a model lacks.
pub(super) fn agree(readings: &mut [Reading], messages: &[Message]) -> Vec<Remark> {
    let mut remarks = Vec::new();
    for (message, content) in with_content(messages) {
        let whole = |reading: &Reading| reading.content(message).len() == content.len();
        if !readings.iter().all(whole) {
            for reading in readings.iter_mut() {
                let Reading { text, contents, .. } = reading;
                contents[message] = contents[message].take().and_then(|place| {
                    let printed = &text[place.clone()];
                    let start = place.start + printed.len() - printed.trim_start().len();
                    let place = start..start + printed.trim().len();
                    (text[place.clone()] == *content.trim() && !place.is_empty()).then_some(place)
                });
            }
        }
    }
    for reading in readings.iter_mut() {
        reading.find_tokens();
    }
    for (message, _) in with_content(messages) {
        for (model, reading) in readings.iter().enumerate() {
            if reading.tokens[message].is_none() {
                remarks.push(Remark::MessageNotFused { message, sharer: model.checked_sub(1) });
            }
        }
    }
    remarks
}

/// Cuts all readings where messages begin and end. A message is a segment if the receiver and at least one sharer
/// have it; sharers that lack it have an empty part of it.
pub(super) fn segments(receiver: &Reading, sharers: &[Reading]) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::new();
    let mut at =
        Segment { message: None, receiver: 0..0, sharers: vec![0..0; sharers.len()], sharer_mask: 0 };
    let mut push = |segment: Segment| {
        if segment.width() > 0 {
            segments.push(segment);
        }
    };
    for (message, tokens) in receiver.tokens.iter().enumerate() {
        let Some(tokens) = tokens else { continue };
        let has = |s: &usize| sharers[*s].tokens[message].is_some();
        let sharer_mask = (0..sharers.len()).filter(has).fold(0, |mask, s| mask | 1 << s);
        if sharer_mask == 0 {
            continue;
        }
        let mut before = at.clone();
        before.receiver = at.receiver.end..tokens.start;
        at.receiver = tokens.clone();
        for (s, sharer) in sharers.iter().enumerate() {
            let end = at.sharers[s].end;
            let tokens = sharer.tokens[message].clone().unwrap_or(end..end);
            before.sharers[s] = end..tokens.start;
            at.sharers[s] = tokens;
        }
        push(before);
        push(Segment { message: Some(message), sharer_mask, ..at.clone() });
    }
    at.receiver = at.receiver.end..receiver.ids.len();
    for (range, sharer) in at.sharers.iter_mut().zip(sharers) {
        *range = range.end..sharer.ids.len();
    }
    push(at);
    segments
}
