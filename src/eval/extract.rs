//! The published rules that find an answer in generated text.
//!
//! They are kept to the letter, oddities included (`Answer: 4` gives A, the first letter of "Answer"), because published
//! numbers were made with them. One thing is better: the published rules never see a letter beyond D, here questions with more
//! choices are searched up to their last one.

use regex::Regex;
use std::sync::LazyLock;

/// Each is followed by the answer on the same line; line breaks may come between. English and Swahili.
const CUES: [&str; 12] = [
    "Answer:",
    "Your answer:",
    "The answer is",
    "Correct answer is",
    "Correct answer is:",
    "Correct answer:",
    "Jibu lako:",
    "Jibu:",
    "Jibu sahihi:",
    "Response:",
    "Choice:",
    "Option:",
];

static CUED: LazyLock<Vec<Regex>> = LazyLock::new(|| {
    let cued = |cue: &&str| Regex::new(&format!(r"(?i){cue}\s*(.*)")).expect("a plain text is a pattern");
    CUES.iter().map(cued).collect()
});

/// Letters that stand alone: at the end, before punctuation and a space, between a space and a space or the end; anywhere.
static ALONE: LazyLock<[Regex; 4]> = LazyLock::new(|| {
    [
        r"(?i)\b([A-Z])\b[.,;:!?)\]}]*\s*$",
        r"(?i)\b([A-Z])[.,;:!?)\]}]+\s",
        r"(?i)(?:^|\s)([A-Z])$",
        r"(?i)\b([A-Z])\b",
    ]
    .map(|pattern| Regex::new(pattern).expect("the pattern is fixed"))
});

/// In a formula a letter is a name, not an answer.
const FORMULA: [&str; 12] = ["+", "-", "*", "/", "=", "^", "mod", "sqrt", "sin", "cos", "tan", "\\frac"];
const ANSWER_WORDS: [&str; 7] = ["jibu", "answer", "choice", "option", "response", "correct", "sahihi"];

/// The choice (counted from 0) that a generated answer to a question with `choices` choices names.
pub fn choice(text: &str, choices: usize) -> Option<usize> {
    let text = text.trim();
    let last = (b'A' + choices.clamp(4, 26) as u8 - 1) as char;
    let among = |letter: &char| ('A'..=last).contains(letter);
    let index = |letter: char| (letter.to_ascii_uppercase() as u8 - b'A') as usize;
    for cue in CUED.iter() {
        let cued = cue.captures(text).and_then(|found| found.get(1));
        if let Some(letter) = cued.and_then(|rest| rest.as_str().chars().find(among)) {
            return Some(index(letter));
        }
    }
    let lower = text.to_lowercase();
    let formula = FORMULA.iter().any(|sign| lower.contains(sign))
        && !ANSWER_WORDS.iter().any(|word| lower.contains(word));
    for (number, pattern) in ALONE.iter().enumerate() {
        let letters = pattern.captures_iter(text).filter_map(|found| found.get(1)?.as_str().chars().next());
        let Some(letter) = letters.filter(|letter| among(&letter.to_ascii_uppercase())).last() else {
            continue;
        };
        if !formula {
            return Some(index(letter));
        }
        if number + 1 == ALONE.len() {
            return None;
        }
    }
    text.chars().rfind(among).map(index)
}

/// What follows "Answer:" on its line, the first time it is there.
pub fn stated(text: &str) -> Option<&str> {
    static STATED: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"(?i)answer\s*:\s*([^\n]+)").expect("the pattern is fixed"));
    Some(STATED.captures(text)?.get(1)?.as_str().trim()).filter(|answer| !answer.is_empty())
}

/// The choices that digits of an annotation name ("0,1"), counted from 0, in order.
pub fn digits(text: &str) -> Vec<usize> {
    let there = |choice: &usize| text.contains(char::from(b'0' + *choice as u8));
    (0..4).filter(there).collect()
}

/// The number behind the last `####` of a GSM8K solution. `as_published`: without thousands' commas, so that `1,234` is 1.
pub fn final_number(solution: &str, as_published: bool) -> Option<String> {
    static NUMBER: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"[-+]?\d+(\.\d+)?").expect("the pattern is fixed"));
    let (_, last) = solution.rsplit_once("####")?;
    let last = if as_published { last.to_owned() } else { last.replace(',', "") };
    NUMBER.find(&last).map(|number| number.as_str().to_owned())
}

/// A text as it is compared: lower case, without articles and punctuation, single spaces.
pub fn normal(text: &str) -> String {
    let spaced: String =
        text.to_lowercase().chars().map(|c| if c.is_alphanumeric() { c } else { ' ' }).collect();
    let words = spaced.split_whitespace().filter(|word| !matches!(*word, "a" | "an" | "the"));
    words.collect::<Vec<_>>().join(" ")
}

/// Whether a generated text gives one of the answers: it is that text, or has it as whole words.
pub fn gives(text: &str, answers: &[String]) -> bool {
    let text = format!(" {} ", normal(text));
    let wanted = answers.iter().map(|answer| normal(answer)).filter(|answer| !answer.is_empty());
    wanted.into_iter().any(|answer| text.contains(&format!(" {answer} ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_beyond_d_where_there_are_choices_for_them() {
        assert_eq!(choice("The correct answer is H", 10), Some(7));
        assert_eq!(choice("The correct answer is H", 4), None);
        assert_eq!(choice("E", 5), Some(4));
        assert_eq!(choice("It is D.", 4), Some(3));
    }

    #[test]
    fn numbers_with_commas() {
        assert_eq!(final_number("so\n#### 1,234", false).as_deref(), Some("1234"));
        assert_eq!(final_number("so\n#### 1,234", true).as_deref(), Some("1"));
        assert_eq!(final_number("so 7", false), None);
    }

    #[test]
    fn texts_are_found_as_whole_words() {
        let answers = ["The Eiffel Tower".to_string(), String::new()];
        assert!(gives("It is the Eiffel  tower.", &answers));
        assert!(!gives("It is Eiffel towers", &answers));
        assert!(!gives("", &answers));
    }
}
