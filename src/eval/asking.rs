//! How a question is put to models, and how a letter is read off their logits: the same in evaluation and while training.

use crate::{
    align::{self, Aligner, ChatOptions},
    cache::KvColumns,
    data::templates::{self, LetterError},
    pipeline::Prompt,
    rng::normal,
    tokenizer::{self, Message, TemplateOptions, Tokenizer},
};

/// The model is to answer, without thinking aloud first.
pub fn generation() -> TemplateOptions {
    TemplateOptions {
        add_generation_prompt: true,
        enable_thinking: Some(false),
        ..TemplateOptions::default()
    }
}

/// The conversation with the answer begun, as one model alone reads it.
pub fn text(tokenizer: &Tokenizer, messages: &[Message], response: &str) -> Result<String, tokenizer::Error> {
    Ok(tokenizer.render(messages, &generation())? + response)
}

/// The same with its token ids.
pub fn alone(
    tokenizer: &Tokenizer,
    messages: &[Message],
    response: &str,
) -> Result<(String, Vec<u32>), tokenizer::Error> {
    let text = text(tokenizer, messages, response)?;
    let ids = tokenizer.encode(&text, false)?.ids;
    Ok((text, ids))
}

/// The conversation with the answer begun, as the receiver and its sharers read it. Messages are fused, the last token before the
/// response and the response are not.
pub fn together(aligner: &Aligner, messages: &[Message], response: &str) -> Result<Prompt, align::Error> {
    if response.is_empty() {
        let options = ChatOptions { template: generation(), open_last: false };
        return Ok(aligner.chat(messages, &options)?.into());
    }
    let mut messages = messages.to_vec();
    messages.push(Message::new("assistant", response));
    let template = TemplateOptions { enable_thinking: Some(false), ..TemplateOptions::default() };
    let aligned = aligner.chat(&messages, &ChatOptions { template, open_last: true })?;
    let last = messages.len() - 1;
    let start = aligned.segments.iter().find(|segment| segment.message == Some(last));
    let start = start.map_or(aligned.receiver_ids.len(), |segment| segment.receiver.start);
    Ok(aligned.unfused_from(start.max(1)).into())
}

/// The tokens that score as many letters as the question with the most choices has.
///
/// # Errors
/// If answers of a model with this tokenizer cannot be told apart by a letter.
pub fn letters(tokenizer: &Tokenizer, most: usize) -> Result<Vec<u32>, LetterError> {
    templates::letter_tokens(tokenizer, most)
}

/// The choice whose letter has the highest logit, the first of equals.
pub fn best_choice(logits: &[f32], letters: &[u32], choices: usize) -> usize {
    let scores = letters.iter().take(choices).map(|&token| logits[token as usize]);
    let best = scores.enumerate();
    best.fold((0, f32::NEG_INFINITY), |best, next| if next.1 > best.1 { next } else { best }).0
}

/// Whose sharers' caches question `index` of `count` is given in a swap: those of the one before, which are at hand.
pub fn swapped_with(index: usize, count: usize) -> usize {
    (index + count - 1) % count
}

/// Lets the sharers read `other` in the place of what they read: a receiver's token takes the column that is as far from the end, where
/// prompts of a kind are alike, or the first.
pub fn swap(own: &mut Prompt, other: &Prompt) {
    for (own, other) in own.sharers.iter_mut().zip(&other.sharers) {
        let (ours, theirs) = (own.ids.len() as u32, other.ids.len() as u32);
        own.columns.iter_mut().flatten().for_each(|column| *column = (*column + theirs).saturating_sub(ours));
        own.ids.clone_from(&other.ids);
        own.positions.clone_from(&other.positions);
    }
}

/// Puts normal numbers of the same mean and deviation in the place of a layer's keys and values.
pub fn same_moments(columns: &mut KvColumns, seed: u64, layer: usize) {
    for (half, values) in [&mut columns.keys, &mut columns.values].into_iter().enumerate() {
        let n = values.len().max(1) as f32;
        let mean = values.iter().sum::<f32>() / n;
        let deviation = (values.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / n).sqrt();
        let noise = normal(seed, (2 * layer + half) as u32, values.len());
        values.iter_mut().zip(noise).for_each(|(x, noise)| *x = mean + deviation * noise);
    }
}
