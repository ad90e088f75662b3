//! Grading of mathematical answers: what a response says, and whether that is what the solution says.
//!
//! The rules are those of the published judge (math_verify 0.8): of a response the boxed formulae count first, then formulae between
//! dollar signs, then numbers, first those behind "answer". Equal are values, not spellings: ½ is 0.5, `(x+1)^2` is
//! `x^2+2x+1`, which is seen by evaluating both where no coincidence is to be feared, not by algebra.

mod complex;
mod expression;
mod latex;
mod value;

use regex::Regex;
use std::{ops::Range, sync::LazyLock};
use value::Value;

/// How a solution is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// A number or fraction, as in GSM8K.
    Plain,
    /// LaTeX without dollar signs, as in MATH.
    Latex,
}

/// A graded response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grade {
    pub correct: bool,
    /// The part of the response that was taken for its answer; `None`: it has none.
    pub extracted: Option<String>,
}

/// Whether a response gives the solution.
pub fn grade(response: &str, solution: &str, written: Written) -> Grade {
    let wanted = match written {
        Written::Plain => latex::plain(solution),
        Written::Latex => latex::parse(solution),
    };
    let found = answer(response);
    let correct = match (&found, &wanted) {
        (Some((_, Some(given))), Some(wanted)) => given.equals(wanted),
        _ => false,
    };
    Grade { correct, extracted: found.map(|(text, _)| text) }
}

/// What the response says and its value, where it can be read.
fn answer(response: &str) -> Option<(String, Option<Value>)> {
    let boxed = boxed(response);
    if !boxed.is_empty() {
        let mut values: Vec<Value> = Vec::new();
        for value in boxed.iter().filter_map(|text| latex::parse(text)) {
            if !values.iter().any(|known| known.equals(&value)) {
                values.push(value);
            }
        }
        let value = if values.len() > 1 { Some(Value::Set(values)) } else { values.pop() };
        return Some((boxed.join(","), value));
    }
    for formula in formulae(response) {
        if let Some(value) = latex::parse(formula) {
            return Some((formula.to_owned(), Some(value)));
        }
    }
    number(response)
}

/// The contents of all `\boxed{…}` that stand in no other.
fn boxed(text: &str) -> Vec<&str> {
    const BOX: &str = "\\boxed{";
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(BOX) {
        rest = &rest[at + BOX.len()..];
        let mut depth = 1;
        let close = rest.bytes().position(|byte| {
            depth += i32::from(byte == b'{') - i32::from(byte == b'}');
            depth == 0
        });
        // One that is not closed has no content, and so have none in it.
        let Some(close) = close else { break };
        found.push(&rest[..close]);
        rest = &rest[close..];
    }
    found
}

/// What stands between dollar signs or `\(` and `\)`: behind "answer" first, each from the last to the first.
fn formulae(text: &str) -> Vec<&str> {
    static FORMULA: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"(?is)(answer\s*(?:is|:|=)+\s*\**\s*)?(?:\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\])")
            .expect("the pattern is fixed")
    });
    let found = |anchored: bool| {
        let all = FORMULA.captures_iter(text).filter(move |found| found.get(1).is_some() == anchored);
        let inner =
            all.filter_map(|found| (2..=5).find_map(|group| found.get(group)).map(|inner| inner.as_str()));
        inner.collect::<Vec<_>>().into_iter().rev()
    };
    found(true).chain(found(false)).collect()
}

/// The last number or arithmetic behind "answer", else the last of the text.
fn number(text: &str) -> Option<(String, Option<Value>)> {
    static CUE: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"(?i)answer\s*(?:is|:|=)+\s*\$?").expect("the pattern is fixed"));
    let cued: Vec<usize> = CUE.find_iter(text).map(|cue| cue.end()).collect();
    for start in cued.into_iter().rev() {
        if let Some(run) = run_at(text, start) {
            return Some(read(text, run));
        }
    }
    let before = |at: usize| text[..at].chars().next_back();
    let starts = text.char_indices().filter(|(at, c)| {
        matches!(c, '0'..='9' | '-' | '(' | '.') && before(*at).is_none_or(|c| c.is_whitespace() || c == '$')
    });
    let mut last = None;
    let mut end = 0;
    for (start, _) in starts {
        if start < end {
            continue;
        }
        let Some(run) = run_at(text, start) else { continue };
        let follows = text[run.end..].chars().next();
        if follows.is_none_or(|c| !matches!(c, '}' | ']' | '\\' | '_') && !c.is_alphanumeric()) {
            end = run.end;
            last = Some(run);
        }
    }
    last.map(|run| read(text, run))
}

/// The characters from `start` on that arithmetic is made of, up to its last digit, point, bracket or percent sign.
fn run_at(text: &str, start: usize) -> Option<Range<usize>> {
    let rest = &text[start..];
    let all = |c: char| c.is_ascii_digit() || " .,+-*/^()×÷%".contains(c);
    let long = rest.find(|c| !all(c)).unwrap_or(rest.len());
    let trimmed = rest[..long].trim_end_matches(|c: char| !(c.is_ascii_digit() || c == ')' || c == '%'));
    trimmed.contains(|c: char| c.is_ascii_digit()).then_some(start..start + trimmed.len())
}

/// As the published judge, a number that ends in bold type's stars is not read.
fn read(text: &str, run: Range<usize>) -> (String, Option<Value>) {
    let own = &text[run.clone()];
    match text[run.end..].starts_with("**") {
        true => (format!("{own}**"), None),
        false => (own.to_owned(), latex::plain(own)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_not_spellings() {
        for (response, gold) in [
            ("\\boxed{0.5}", "\\frac12"),
            ("$x = 3$", "3"),
            ("\\boxed{(a+b)(a-b)}", "a^2-b^2"),
            ("\\boxed{\\{3, 1\\}}", "\\{1,3\\}"),
            ("\\boxed{12\\text{ cm}}", "12"),
            ("\\boxed{1,234}", "1234"),
            ("\\boxed{\\sqrt[3]{8}}", "2"),
            ("\\boxed{2\\pi r}", "2r\\pi"),
            ("\\boxed{x \\le 3}", "x \\leq 3"),
        ] {
            assert!(grade(response, gold, Written::Latex).correct, "{response} is {gold}");
        }
        for (response, gold) in [
            ("\\boxed{(1,2)}", "(2,1)"),
            ("\\boxed{[1,2)}", "(1,2]"),
            ("\\boxed{x^2+1}", "x^2"),
            ("\\boxed{x}", "y"),
            ("\\boxed{\\{1,2\\}}", "\\{1,2,3\\}"),
            ("\\boxed{}", "0"),
            ("\\boxed{1/0}", "\\infty"),
            ("\\boxed{x < 3}", "x > 3"),
        ] {
            assert!(!grade(response, gold, Written::Latex).correct, "{response} is not {gold}");
        }
    }

    /// Nothing that a model may write makes it fail or run long.
    #[test]
    fn whatever_is_written_is_survived() {
        for deep in ["(", "{", "\\frac{", "\\sqrt{", "-", "2^", "|", "\\left(", "\\boxed{", "$"] {
            let text = format!("Answer: \\boxed{{{}1}}", deep.repeat(20_000));
            grade(&text, &deep.repeat(20_000), Written::Latex);
        }
        for text in
            ["\\boxed{9^{9^{9^9}}}", "Answer: 1e999", "Answer: .", "Answer: -", "é答$\\$\\(", "1,,2 3..4"]
        {
            grade(text, "1", Written::Plain);
        }
    }
}
