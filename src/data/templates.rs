//! How multiple choice questions are asked, and how a letter is scored.
//!
//! The texts are the published ones, to the space: fusers were trained and measured on them.

use super::ChoiceQuestion;
use crate::tokenizer::{self, Tokenizer};
use serde::{Deserialize, Serialize};

/// What an answer begins with; the letter follows after a space.
pub const RESPONSE: &str = "The correct answer is";

/// As many choices have a letter.
pub const MAX_CHOICES: usize = 26;

/// How a multiple choice question is put to a model in training. The answer is "The correct answer is X." in each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptStyle {
    /// As the published training data: question and choices without instructions ([`plain`]).
    #[default]
    Plain,
    /// As the published evaluation asks without chain of thought ([`direct`]).
    Template,
    /// In one line, as the built-in pair is asked ([`line`]), and answered by "It is X.".
    Line,
}

impl PromptStyle {
    pub fn prompt(self, question: &ChoiceQuestion) -> String {
        match self {
            PromptStyle::Plain => plain(&question.question, &question.choices),
            PromptStyle::Template => direct(&question.question, &question.choices),
            PromptStyle::Line => line(&question.question, &question.choices),
        }
    }

    /// What an answer begins with; the letter follows after a space.
    pub fn response(self) -> &'static str {
        match self {
            PromptStyle::Plain | PromptStyle::Template => RESPONSE,
            PromptStyle::Line => "It is",
        }
    }

    /// The assistant's message in training, such as "The correct answer is B.".
    pub fn answer(self, choice: usize) -> Option<String> {
        letter(choice).map(|letter| format!("{} {letter}.", self.response()))
    }
}

/// `A` for choice 0. There are [`MAX_CHOICES`].
pub fn letter(choice: usize) -> Option<char> {
    (choice < MAX_CHOICES).then(|| char::from(b'A' + choice as u8))
}

/// The choice that a letter of either case names.
pub fn choice_of(letter: char) -> Option<usize> {
    letter.is_ascii_alphabetic().then(|| usize::from(letter.to_ascii_uppercase() as u8 - b'A'))
}

/// "A. text", a line each, every line ended.
pub fn lines(choices: &[String]) -> String {
    choices.iter().zip('A'..='Z').map(|(text, letter)| format!("{letter}. {text}\n")).collect()
}

/// The form of training data: "Question: …", blank line, "Choices:", the choices.
pub fn plain(question: &str, choices: &[String]) -> String {
    format!("Question: {question}\n\nChoices:\n{}", lines(choices).trim_end_matches('\n'))
}

/// "Which one: A this, B that?"
pub fn line(question: &str, choices: &[String]) -> String {
    let choices: Vec<String> =
        choices.iter().zip('A'..='Z').map(|(text, letter)| format!("{letter} {text}")).collect();
    format!("{}: {}?", question.trim_end_matches('?'), choices.join(", "))
}

/// Question and choices alone (the published `use_template: false`).
pub fn bare(question: &str, choices: &[String]) -> String {
    format!("{question}\n\nChoices:\n{}", lines(choices))
}

/// The evaluation's prompt without chain of thought.
pub fn direct(question: &str, choices: &[String]) -> String {
    format!(
        "Accurately answer the following question:\n\n{question}\n\nChoices:\n{}\n\nInstructions:\n\
         - Carefully read the question and all options.\n\
         - Select the single most correct answer.\n\
         - Respond ONLY in the following format: \"The correct answer is A/B/C/D\".\n\
         - Do not include any explanations, additional text, or punctuation besides the answer.\n\n{RESPONSE}",
        lines(choices)
    )
}

/// The evaluation's prompt with chain of thought. The 19 spaces are the published program's.
pub fn chain_of_thought(question: &str, choices: &[String]) -> String {
    format!(
        "Accurately answer the following question:\n{:19}\n{question}\n\nChoices:\n{}\n\nInstructions:\n\
         - Carefully read the question and all options.\n\
         - Let's think step by step and explain your reasoning briefly.\n\
         - Then give the final answer starting with {RESPONSE}",
        "",
        lines(choices)
    )
}

/// The evaluation's prompt for problems with a number as answer.
pub fn math(question: &str) -> String {
    format!(
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: \
         $ANSWER (without quotes) where $ANSWER is the answer to the problem.\n\n{question}\n\nPlease think step by \
         step and explain your reasoning. Remember to put your answer on its own line after \"Answer:\", and you do \
         not need to use a \\boxed command."
    )
}

/// A tokenizer that cannot be scored by letters.
#[derive(Debug, thiserror::Error)]
pub enum LetterError {
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    #[error("{0} choices have no letters: use 1 to {MAX_CHOICES}")]
    TooMany(usize),
    #[error("this tokenizer makes nothing of ` {0}`, so the letter cannot be scored")]
    Nothing(char),
    #[error(
        "this tokenizer begins ` {0}` and ` {1}` with the same token, so letters cannot be told apart by their first \
         token: measure by generated text instead"
    )]
    Same(char, char),
}

/// The token whose logit after [`RESPONSE`] scores each of the first `choices` letters: the first of " A", " B", ….
pub fn letter_tokens(tokenizer: &Tokenizer, choices: usize) -> Result<Vec<u32>, LetterError> {
    if choices > MAX_CHOICES {
        return Err(LetterError::TooMany(choices));
    }
    let mut tokens = Vec::with_capacity(choices);
    for letter in ('A'..='Z').take(choices) {
        let ids = tokenizer.encode(&format!(" {letter}"), false)?.ids;
        let token = *ids.first().ok_or(LetterError::Nothing(letter))?;
        if let Some(earlier) = tokens.iter().zip('A'..='Z').find(|(other, _)| **other == token) {
            return Err(LetterError::Same(earlier.1, letter));
        }
        tokens.push(token);
    }
    Ok(tokens)
}
