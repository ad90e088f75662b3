//! Rows of a task's file as questions with gold answers; what cannot be scored is named.

use super::{Error, Scoring, extract, task::Task};
use crate::data::{
    Adapter, AdapterChoice, Origin, PromptStyle, Row,
    reader::{self, Problem},
    templates::choice_of,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::Path;

/// Letters go to J.
pub const MAX_CHOICES: usize = 10;

/// How rows are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rows {
    /// By their fields.
    #[default]
    Auto,
    /// One of the adapters of training data: `question`, `choices`, `answer_index`, and those of the hub's data sets.
    Choices,
    /// `question`, `choices`, `answer_index` or `answer`, `error_type` and `correct_answer`: a wrong ground truth is replaced by the
    /// annotators' answer, questions without one are left out.
    MmluRedux,
    /// `question`, `options`, `answer` (a letter).
    MmluPro,
    /// `question`, `A` … `D`, `answer` (a letter); or the one schema of `choices`.
    Ceval,
    /// `question` or `instruction`; `final_answer`, or the number behind `####` of `answer` or `response`.
    Gsm8k,
    /// `context`, `input`, `answers`.
    Longbench,
    /// `document`, `instructions`, `outputs`: several questions a document, of which those with one right letter count.
    Leval,
    /// `question` or `prompt` or `input`, and `answer` or `answers`.
    Text,
}

/// What the right answer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gold {
    Choice(usize),
    Texts(Vec<String>),
}

/// A question.
#[derive(Clone, Debug)]
pub struct Item {
    /// Which of the file's questions, unusable ones included; its name in samples.
    pub number: usize,
    /// As text-to-text's Sharer is asked: without choices.
    pub question: String,
    pub choices: Vec<String>,
    pub gold: Gold,
    pub subject: Option<String>,
    /// A long text before the question, which may be shortened.
    pub context: Option<String>,
    pub origin: String,
    /// The row.
    pub doc: Value,
}

impl Item {
    /// The gold answer in words: a letter, a number, a text.
    pub fn target(&self) -> String {
        match &self.gold {
            Gold::Choice(index) => letter(*index).to_string(),
            Gold::Texts(texts) => texts.join(" | "),
        }
    }
}

pub fn letter(index: usize) -> char {
    char::from(b'A' + index as u8)
}

/// A question that is not asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Excluded {
    pub origin: String,
    pub reason: String,
}

/// The questions of a file.
#[derive(Clone, Debug, Default)]
pub struct Items {
    pub items: Vec<Item>,
    pub excluded: Vec<Excluded>,
}

impl Items {
    /// # Errors
    /// If the file cannot be read on. A row that cannot be used is not an error: it is listed.
    pub fn load(task: &Task, path: &Path) -> Result<Items, Error> {
        let mut all = Items::default();
        let mut number = 0;
        for row in reader::rows(path).map_err(Error::File)? {
            let row = match row {
                Ok(row) => row,
                Err(Problem::Row(bad)) => {
                    let reason = bad.reason.to_string();
                    all.excluded.push(Excluded { origin: bad.origin.to_string(), reason });
                    number += 1;
                    continue;
                }
                Err(Problem::File(error)) => return Err(Error::File(error)),
            };
            let Row { fields, origin } = row;
            let doc = Value::Object(fields.clone());
            for question in questions(task, fields, &origin) {
                let place = question.as_ref().ok().and_then(|question| question.place.clone());
                let origin = place.map_or_else(|| origin.to_string(), |place| format!("{origin}, {place}"));
                match question.and_then(|question| question.usable(task.scoring)) {
                    Ok(q) => all.items.push(Item {
                        number,
                        question: q.text,
                        choices: q.choices,
                        gold: q.gold,
                        subject: q.subject,
                        context: q.context,
                        origin,
                        doc: doc.clone(),
                    }),
                    Err(reason) => all.excluded.push(Excluded { origin, reason }),
                }
                number += 1;
            }
        }
        Ok(all)
    }
}

struct Question {
    text: String,
    choices: Vec<String>,
    gold: Gold,
    subject: Option<String>,
    context: Option<String>,
    /// Where within its row.
    place: Option<String>,
}

type Read = Result<Question, String>;

impl Question {
    fn usable(self, scoring: Scoring) -> Read {
        if self.text.trim().is_empty() {
            return Err("its question is empty".into());
        }
        match (&self.gold, scoring) {
            (Gold::Choice(_), Scoring::Choice) if self.choices.len() > MAX_CHOICES => {
                Err(format!("it has {} choices, letters go to J", self.choices.len()))
            }
            (Gold::Choice(_), Scoring::Choice) => Ok(self),
            (Gold::Texts(texts), Scoring::Number | Scoring::Latex | Scoring::Text)
                if texts.iter().any(|text| !text.trim().is_empty()) =>
            {
                Ok(self)
            }
            _ => Err("it has no gold answer".into()),
        }
    }
}

fn questions(task: &Task, fields: Map<String, Value>, origin: &Origin) -> Vec<Read> {
    match task.adapter {
        Rows::Leval => leval(&fields),
        Rows::MmluRedux => vec![mmlu_redux(fields, origin)],
        Rows::MmluPro => vec![lettered(fields, "options", origin)],
        Rows::Ceval if fields.contains_key("A") => vec![ceval(fields, origin)],
        Rows::Gsm8k => vec![gsm8k(&fields)],
        Rows::Longbench => vec![longbench(&fields)],
        Rows::Text => vec![texts(&fields)],
        Rows::Auto if task.scoring != Scoring::Choice => vec![texts(&fields)],
        Rows::Auto if fields.contains_key("options") => vec![lettered(fields, "options", origin)],
        Rows::Auto | Rows::Choices | Rows::Ceval => vec![choices(AdapterChoice::Auto, fields, origin)],
    }
}

/// By an adapter of training data.
fn choices(adapter: AdapterChoice, fields: Map<String, Value>, origin: &Origin) -> Read {
    let adapter = match adapter {
        AdapterChoice::Named(adapter) => adapter,
        AdapterChoice::Auto => Adapter::detect(&fields).map_err(|error| error.to_string())?,
    };
    let row = Row { fields, origin: origin.clone() };
    let example = adapter.example(row, PromptStyle::Plain).map_err(|bad| match bad.detail.as_str() {
        "" => bad.reason.to_string(),
        detail => format!("{}: {detail}", bad.reason),
    })?;
    let question = example.question.ok_or("it is no multiple choice question")?;
    Ok(Question {
        text: question.question,
        choices: question.choices,
        gold: Gold::Choice(question.answer),
        subject: example.subject,
        context: None,
        place: None,
    })
}

/// Rows whose right choice a letter names.
fn lettered(mut fields: Map<String, Value>, list: &str, origin: &Origin) -> Read {
    let listed = fields.remove(list).unwrap_or_default();
    fields.insert("choices".into(), listed);
    let answer = fields.get("answer").cloned().unwrap_or_default();
    fields.insert("answer_index".into(), answer);
    if !fields.contains_key("subject") {
        let category = fields.get("category").cloned().unwrap_or_default();
        fields.insert("subject".into(), category);
    }
    choices(AdapterChoice::Named(Adapter::Choices), fields, origin)
}

fn ceval(mut fields: Map<String, Value>, origin: &Origin) -> Read {
    let listed: Vec<Value> =
        ["A", "B", "C", "D"].iter().filter_map(|name| fields.get(*name).cloned()).collect();
    fields.insert("options".into(), listed.into());
    lettered(fields, "options", origin)
}

fn mmlu_redux(mut fields: Map<String, Value>, origin: &Origin) -> Read {
    let answer = fields.remove("answer_index").or_else(|| fields.get("answer").cloned()).unwrap_or_default();
    let annotated = |name| fields.get(name).and_then(Value::as_str).unwrap_or("").trim().to_owned();
    let corrected = mmlu_redux_gold(&annotated("error_type"), &annotated("correct_answer"), answer.as_u64());
    let gold = corrected.ok_or_else(|| format!("its annotators say: {}", annotated("error_type")))?;
    fields.insert("answer_index".into(), gold.into());
    choices(AdapterChoice::Named(Adapter::Choices), fields, origin)
}

/// The right choice of an annotated question; `None` where there is none.
pub fn mmlu_redux_gold(error_type: &str, correct_answer: &str, answer: Option<u64>) -> Option<usize> {
    let answer = answer.and_then(|index| usize::try_from(index).ok());
    match error_type {
        "no_correct_answer" | "expert" => None,
        "wrong_groundtruth" => {
            let mut only = correct_answer.chars();
            match (only.next(), only.next()) {
                (Some(digit @ '0'..='3'), None) => Some(digit as usize - '0' as usize),
                (Some(letter @ 'A'..='D'), None) => choice_of(letter),
                _ => answer,
            }
        }
        _ => answer,
    }
}

fn first_text(fields: &Map<String, Value>, names: &[&str]) -> Option<String> {
    let spelled = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    };
    names.iter().find_map(|name| fields.get(*name).and_then(spelled))
}

fn open(text: Option<String>, answers: Vec<String>, fields: &Map<String, Value>) -> Read {
    Ok(Question {
        text: text.ok_or("it has no question")?,
        choices: Vec::new(),
        gold: Gold::Texts(answers),
        subject: first_text(fields, &["subject", "category"]),
        context: None,
        place: None,
    })
}

fn gsm8k(fields: &Map<String, Value>) -> Read {
    let number = first_text(fields, &["final_answer"])
        .or_else(|| extract::final_number(&first_text(fields, &["answer", "response"])?, false));
    open(first_text(fields, &["question", "instruction"]), number.into_iter().collect(), fields)
}

fn texts(fields: &Map<String, Value>) -> Read {
    let answers = match fields.get("answers") {
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => first_text(fields, &["answer", "response", "output", "final_answer"]).into_iter().collect(),
    };
    open(first_text(fields, &["question", "prompt", "input", "instruction", "problem"]), answers, fields)
}

fn longbench(fields: &Map<String, Value>) -> Read {
    let context = first_text(fields, &["context"]).filter(|context| !context.is_empty());
    let subject = first_text(fields, &["dataset", "subject"]);
    texts(fields).map(|question| Question { context, subject, ..question })
}

fn leval(fields: &Map<String, Value>) -> Vec<Read> {
    let list = |name: &str| fields.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
    let (instructions, outputs) = (list("instructions"), list("outputs"));
    if instructions.is_empty() {
        return vec![Err("it has no instructions".into())];
    }
    let document = first_text(fields, &["document"]);
    let subject = first_text(fields, &["task"]);
    let read = |(index, instruction): (usize, &Value)| {
        let place = Some(format!("question {}", index + 1));
        let (text, choices) = split_choices(instruction.as_str().unwrap_or(""));
        let output = outputs.get(index).and_then(Value::as_str).unwrap_or("");
        let gold = one_letter(output).filter(|gold| *gold < choices.len());
        let gold = gold.map_or_else(|| Gold::Texts(Vec::new()), Gold::Choice);
        Ok(Question { text, choices, gold, subject: subject.clone(), context: document.clone(), place })
    };
    instructions.iter().enumerate().map(read).collect()
}

/// The question and its choices, of a text whose last lines are "A. …" or "(A) …".
fn split_choices(text: &str) -> (String, Vec<String>) {
    let (mut question, mut choices) = (Vec::new(), Vec::new());
    for line in text.lines().map(str::trim) {
        let expected = letter(choices.len().min(25));
        let marks = [format!("{expected}."), format!("{expected})"), format!("({expected})")];
        match marks.iter().find_map(|mark| line.strip_prefix(mark.as_str())) {
            Some(choice) => choices.push(choice.trim().to_owned()),
            None if choices.is_empty() => question.push(line),
            None => {}
        }
    }
    (question.join("\n").trim().to_owned(), choices)
}

/// The choice that "B" or "(B) text" names; "AC" names none.
fn one_letter(text: &str) -> Option<usize> {
    let text = text.trim();
    let inner = text.strip_prefix('(').and_then(|rest| rest.split_once(')')).map_or(text, |(inner, _)| inner);
    let mut letters = inner.chars();
    match (letters.next(), letters.next()) {
        (Some(letter @ 'A'..='Z'), None) => choice_of(letter),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn load(task: &str, rows: &str) -> Items {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        fs::write(&path, rows).unwrap();
        Items::load(&Task::find(task).unwrap(), &path).unwrap()
    }

    #[test]
    fn what_cannot_be_scored_is_listed() {
        let eleven = format!("[{}]", ["\"x\""; 11].join(","));
        let rows = format!(
            "{{\"question\": \"a?\", \"choices\": [\"x\", \"y\"], \"answer_index\": 1}}\n\
             {{\"question\": \"b?\", \"choices\": [\"x\", \"y\"], \"answer_index\": 5}}\n\
             {{\"question\": \"c?\", \"choices\": {eleven}, \"answer_index\": 0}}\n\
             {{\"question\": \" \", \"choices\": [\"x\", \"y\"], \"answer_index\": 1}}\n\
             {{\"question\": \"d?\", \"choices\": [\"x\", \"y\"], \"answer_index\": null}}\n\
             not json\n\
             {{\"question\": \"e?\", \"choices\": [\"x\", \"y\"], \"answer_index\": 0}}\n"
        );
        let all = load("arc_easy", &rows);
        let numbers: Vec<usize> = all.items.iter().map(|item| item.number).collect();
        assert_eq!(numbers, [0, 6]);
        let reasons: Vec<&str> = all.excluded.iter().map(|excluded| excluded.reason.as_str()).collect();
        assert_eq!(reasons.len(), 5, "{reasons:?}");
        assert!(reasons[1].contains("11 choices"), "{reasons:?}");
        assert!(all.excluded[4].origin.ends_with("rows.jsonl:6"), "{:?}", all.excluded);
    }

    #[test]
    fn several_questions_of_a_document() {
        let row = r#"{"document": "long", "task": "tpo", "instructions": ["why?\nA. x\nB. y", "two?\nA. x\nB. y", "how?\n\n (A) x \n (B) y\n (C) z"], "outputs": ["B", "AB", "(C) z"]}"#;
        let all = load("leval", row);
        assert_eq!(all.items.len(), 2);
        assert_eq!((all.items[0].question.as_str(), &all.items[0].gold), ("why?", &Gold::Choice(1)));
        assert_eq!((all.items[1].choices.len(), &all.items[1].gold), (3, &Gold::Choice(2)));
        assert_eq!(all.items[0].context.as_deref(), Some("long"));
        assert!(all.excluded[0].origin.ends_with("question 2"));
    }

    #[test]
    fn numbers_and_letters_of_other_schemas() {
        let all = load(
            "gsm8k",
            "{\"question\": \"q\", \"answer\": \"so\\n#### 1,234\"}\n{\"question\": \"q\", \"answer\": \"none\"}",
        );
        assert_eq!(all.items[0].gold, Gold::Texts(vec!["1234".into()]));
        assert_eq!(all.excluded[0].reason, "it has no gold answer");
        let all = load(
            "mmlu_pro",
            r#"{"question": "q", "options": ["a", "b", "c", "d", "e"], "answer": "E", "category": "law"}"#,
        );
        assert_eq!((&all.items[0].gold, all.items[0].subject.as_deref()), (&Gold::Choice(4), Some("law")));
        let all =
            load("ceval", r#"{"question": "q", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "C"}"#);
        assert_eq!(all.items[0].gold, Gold::Choice(2));
    }
}
