//! Multiple choice questions.

use super::fields::{Bad, Fields, optional_text, take, take_list, text, texts};
use crate::{
    data::{
        ChoiceQuestion, Reason,
        templates::{MAX_CHOICES, choice_of, letter},
    },
    tokenizer::Message,
};
use serde_json::Value;

fn checked(
    question: String,
    choices: Vec<String>,
    answer: Option<usize>,
    said: &str,
) -> Result<ChoiceQuestion, Bad> {
    if !(2..=MAX_CHOICES).contains(&choices.len()) {
        return Err(Bad { reason: Reason::ChoiceCount, detail: format!("it has {}", choices.len()) });
    }
    match answer {
        Some(answer) if answer < choices.len() => Ok(ChoiceQuestion { question, choices, answer }),
        _ => {
            let detail = format!("`{said}` of {}", choices.len());
            Err(Bad { reason: Reason::AnswerOutside, detail })
        }
    }
}

/// An index from 0, as a number or its digits, or a letter.
fn index_or_letter(value: &Value) -> Option<usize> {
    match value {
        Value::Number(number) => number.as_u64().and_then(|index| index.try_into().ok()),
        Value::String(text) => match text.trim() {
            digits if digits.parse::<usize>().is_ok() => digits.parse().ok(),
            other => single(other).and_then(choice_of),
        },
        _ => None,
    }
}

fn single(text: &str) -> Option<char> {
    let mut characters = text.chars();
    characters.next().filter(|_| characters.next().is_none())
}

fn spelled(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

pub fn mmlu(fields: &mut Fields) -> Result<ChoiceQuestion, Bad> {
    let choices = texts(take_list(fields, "choices")?, "choices")?;
    let answer = take(fields, "answer")?;
    checked(text(fields, "question")?.to_owned(), choices, index_or_letter(&answer), &spelled(&answer))
}

pub fn normalised(fields: &mut Fields) -> Result<ChoiceQuestion, Bad> {
    let choices = texts(take_list(fields, "choices")?, "choices")?;
    let answer = take(fields, "answer_index")?;
    let (context, question) = (optional_text(fields, "context")?, text(fields, "question")?);
    let question =
        if context.trim().is_empty() { question.to_owned() } else { format!("{context}\n\n{question}") };
    let index = match &answer {
        Value::Number(_) | Value::String(_) => index_or_letter(&answer),
        _ => return Err(Reason::Type { field: "answer_index", expected: "a number" }.into()),
    };
    checked(question, choices, index, &spelled(&answer))
}

/// OpenBookQA and ARC: the answer is a key among the labels of the choices. `stem` names the question's text; in the
/// files of the authors it is within an object `question`, choices beside it.
pub fn keyed(fields: &mut Fields, stem: &'static str) -> Result<ChoiceQuestion, Bad> {
    if let Some(Value::Object(question)) = fields.get_mut("question") {
        let mut question = std::mem::take(question);
        for (name, own) in [("stem", stem), ("choices", "choices")] {
            if let Some(value) = question.remove(name) {
                fields.insert(own.into(), value);
            }
        }
    }
    let (choices, labels) = labelled(take(fields, "choices")?)?;
    let key = text(fields, "answerKey")?.trim();
    let answer = match labels {
        Some(labels) => labels.iter().position(|label| label.trim() == key),
        None => single(key).and_then(|key| match key {
            '1'..='9' => Some(key as usize - '1' as usize),
            _ => choice_of(key),
        }),
    };
    checked(text(fields, stem)?.to_owned(), choices, answer, key)
}

/// The texts of choices and, where they have them, their labels.
fn labelled(choices: Value) -> Result<(Vec<String>, Option<Vec<String>>), Bad> {
    let wrong = || Bad::from(Reason::Type { field: "choices", expected: "a list of choices" });
    match choices {
        Value::Object(mut lists) => {
            let choices = texts(take_list(&mut lists, "text")?, "text")?;
            let labels = match lists.contains_key("label") {
                true => Some(texts(take_list(&mut lists, "label")?, "label")?),
                false => None,
            };
            match &labels {
                Some(labels) if labels.len() != choices.len() => Err(wrong()),
                _ => Ok((choices, labels)),
            }
        }
        Value::Array(list) if list.iter().all(Value::is_object) => {
            let mut choices = Vec::new();
            let mut labels = Vec::new();
            for choice in &list {
                let fields = choice.as_object().ok_or_else(wrong)?;
                choices.push(text(fields, "text")?.to_owned());
                labels.push(text(fields, "label")?.to_owned());
            }
            Ok((choices, Some(labels)))
        }
        Value::Array(list) => Ok((texts(list, "choices")?, None)),
        _ => Err(wrong()),
    }
}

/// MMMLU is asked and answered in Swahili, in a form of its own.
pub fn mmmlu(fields: &mut Fields) -> Result<(Vec<Message>, Option<ChoiceQuestion>), Bad> {
    let choice = |name| text(fields, name).map(str::to_owned);
    let choices = vec![choice("A")?, choice("B")?, choice("C")?, choice("D")?];
    let question = choice("Question")?;
    let key = choice("Answer")?;
    let question = checked(question, choices, single(key.trim()).and_then(choice_of), &key)?;
    let listed: String =
        question.choices.iter().zip('A'..).map(|(text, letter)| format!("{letter}. {text}\n")).collect();
    let prompt = format!(
        "Jibu kwa usahihi swali lifuatalo:\n\n{}\n\nChaguo:\n{listed}\n\nMaelekezo:\n\
         - Soma swali na chaguo zote kwa makini.\n\
         - Chagua jibu sahihi zaidi kati ya yaliyotolewa.\n\
         - Jibu TU kwa herufi (A, B, C, D) inayolingana na jibu sahihi.\n\
         - Usijumuishe maelezo, maandishi ya ziada, au alama yoyote ya uakifishaji.\n\nJibu lako:",
        question.question
    );
    let letter = letter(question.answer).ok_or_else(|| Bad::from(Reason::AnswerOutside))?;
    let answer = format!("**Jibu lako: {letter}. {}.**", question.choices[question.answer]);
    Ok((vec![Message::new("user", prompt), Message::new("assistant", answer)], Some(question)))
}
