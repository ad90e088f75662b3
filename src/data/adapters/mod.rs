//! Rows of known data sets as conversations.
//!
//! | adapter | data set | fields |
//! |---|---|---|
//! | `openhermes` | teknium/OpenHermes-2.5 | `conversations`: list of `from`/`role`, `value`/`content`; system messages are left out |
//! | `mmlu` | cais/mmlu | `question`, `choices`, `answer` (index or letter) |
//! | `mmlu-cot` | Brench/MMLU-Pro-CoT-Train-43K | `question`, `chain_of_thoughts` |
//! | `mmmlu` | openai/MMMLU, Swahili | `Question`, `A` … `D`, `Answer` (letter) |
//! | `openbookqa` | allenai/openbookqa | `question_stem`, `choices`, `answerKey` |
//! | `arc` | allenai/ai2_arc | `question`, `choices`, `answerKey` (letter or number) |
//! | `alpaca` | tatsu-lab/alpaca | `instruction`, `input` (may be empty), `output` or `response` |
//! | `dolly` | databricks/databricks-dolly-15k | `instruction`, `context` (may be empty), `response` |
//! | `longbench` | THUDM/LongBench | `context`, `input`, `answers` |
//! | `llm-generated` | answers written by a larger model | `input_text`, `model_response` |
//! | `messages` | any | `messages`: list of `role`, `content` |
//! | `choices` | multiple choice in one schema | `question`, `choices`, `answer_index`, perhaps `context` |
//!
//! The `choices` of the multiple choice sets are a list of texts, a list of objects with `text` and `label`, or one
//! object with the lists `text` and `label`; in CSV files, the JSON of it.

mod chat;
mod fields;
mod questions;

use super::{BadRow, ChoiceQuestion, Example, PromptStyle, Reason, Row};
use crate::tokenizer::Message;
use fields::Bad;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use serde_json::{Map, Value};
use std::{fmt, str::FromStr};

/// How the rows of one data set are to be read: see the [module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Adapter {
    OpenHermes,
    Mmlu,
    MmluCot,
    Mmmlu,
    OpenBookQa,
    Arc,
    Alpaca,
    Dolly,
    LongBench,
    LlmGenerated,
    Messages,
    Choices,
}

impl Adapter {
    pub const ALL: [Adapter; 12] = [
        Adapter::OpenHermes,
        Adapter::Mmlu,
        Adapter::MmluCot,
        Adapter::Mmmlu,
        Adapter::OpenBookQa,
        Adapter::Arc,
        Adapter::Alpaca,
        Adapter::Dolly,
        Adapter::LongBench,
        Adapter::LlmGenerated,
        Adapter::Messages,
        Adapter::Choices,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Adapter::OpenHermes => "openhermes",
            Adapter::Mmlu => "mmlu",
            Adapter::MmluCot => "mmlu-cot",
            Adapter::Mmmlu => "mmmlu",
            Adapter::OpenBookQa => "openbookqa",
            Adapter::Arc => "arc",
            Adapter::Alpaca => "alpaca",
            Adapter::Dolly => "dolly",
            Adapter::LongBench => "longbench",
            Adapter::LlmGenerated => "llm-generated",
            Adapter::Messages => "messages",
            Adapter::Choices => "choices",
        }
    }

    /// The names that the published recipes have for it.
    fn aliases(self) -> &'static [&'static str] {
        match self {
            Adapter::OpenHermes => &["OpenHermesChatDataset"],
            Adapter::Mmlu => &["MMLUChatDataset"],
            Adapter::MmluCot => &["MMLUCotChatDataset"],
            Adapter::OpenBookQa => &["OpenBookChatDataset", "openbook"],
            Adapter::Arc => &["ai2_arc"],
            Adapter::LongBench => &["LongBenchChatDataset"],
            Adapter::LlmGenerated => &["LLMGeneratedChatDataset"],
            _ => &[],
        }
    }

    /// The fields that tell its rows from others'.
    fn recognises(self, fields: &Map<String, Value>) -> bool {
        let has = |names: &[&str]| names.iter().all(|name| fields.contains_key(*name));
        match self {
            Adapter::OpenHermes => has(&["conversations"]),
            Adapter::Mmlu => has(&["question", "choices", "answer"]) && !has(&["answer_index"]),
            Adapter::MmluCot => has(&["question", "chain_of_thoughts"]),
            Adapter::Mmmlu => has(&["Question", "A", "B", "C", "D", "Answer"]),
            Adapter::OpenBookQa => has(&["question_stem", "choices", "answerKey"]),
            Adapter::Arc => has(&["question", "answerKey"]),
            Adapter::Alpaca => has(&["instruction", "output"]) || has(&["instruction", "input", "response"]),
            Adapter::Dolly => has(&["instruction", "response"]) && !has(&["input"]) && !has(&["output"]),
            Adapter::LongBench => has(&["context", "input", "answers"]),
            Adapter::LlmGenerated => has(&["input_text", "model_response"]),
            Adapter::Messages => has(&["messages"]),
            Adapter::Choices => has(&["question", "choices", "answer_index"]),
        }
    }

    /// The adapter for rows like this one.
    pub fn detect(fields: &Map<String, Value>) -> Result<Adapter, Undetected> {
        let found: Vec<Adapter> =
            Adapter::ALL.into_iter().filter(|adapter| adapter.recognises(fields)).collect();
        match found[..] {
            [adapter] => Ok(adapter),
            _ => Err(Undetected { fields: fields.keys().cloned().collect(), candidates: found }),
        }
    }

    /// What the row says, `prompt` being for multiple choice questions.
    pub fn example(self, row: Row, prompt: PromptStyle) -> Result<Example, BadRow> {
        let Row { fields, origin } = row;
        let text = |name| fields.get(name).and_then(Value::as_str).map(str::to_owned);
        let (id, subject) = (text("id"), text("subject"));
        match self.read(fields, prompt) {
            Ok((messages, question)) => Ok(Example { messages, question, id, subject, origin }),
            Err(Bad { reason, detail }) => Err(BadRow { origin, reason, detail }),
        }
    }

    fn read(
        self,
        mut fields: Map<String, Value>,
        prompt: PromptStyle,
    ) -> Result<(Vec<Message>, Option<ChoiceQuestion>), Bad> {
        let question = match self {
            Adapter::Mmlu => questions::mmlu(&mut fields)?,
            Adapter::Mmmlu => return questions::mmmlu(&mut fields),
            Adapter::OpenBookQa => questions::keyed(&mut fields, "question_stem")?,
            Adapter::Arc => questions::keyed(&mut fields, "question")?,
            Adapter::Choices => questions::normalised(&mut fields)?,
            _ => {
                let messages = match self {
                    Adapter::OpenHermes => chat::openhermes(&mut fields)?,
                    Adapter::Alpaca => chat::alpaca(&fields)?,
                    Adapter::Dolly => chat::dolly(&fields)?,
                    Adapter::LongBench => chat::longbench(&fields)?,
                    Adapter::MmluCot => chat::pair(&fields, "question", "chain_of_thoughts")?,
                    Adapter::LlmGenerated => chat::llm_generated(&fields)?,
                    _ => chat::messages(&mut fields)?,
                };
                return Ok((messages, None));
            }
        };
        let answer = prompt.answer(question.answer).ok_or_else(|| Bad::from(Reason::AnswerOutside))?;
        let messages =
            vec![Message::new("user", prompt.prompt(&question)), Message::new("assistant", answer)];
        Ok((messages, Some(question)))
    }
}

fn names() -> String {
    Adapter::ALL.map(Adapter::name).join(", ")
}

/// Rows that no adapter knows, or more than one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "cannot tell which data set this is by its fields ({}){}: name the adapter, one of {}",
    fields.join(", "),
    match candidates.len() {
        0 => String::new(),
        _ => format!("; it may be {}", candidates.iter().map(|c| c.name()).collect::<Vec<_>>().join(" or ")),
    },
    names()
)]
pub struct Undetected {
    pub fields: Vec<String>,
    pub candidates: Vec<Adapter>,
}

/// A name that is no adapter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown adapter `{0}`: use auto, {names}", names = names())]
pub struct UnknownAdapter(String);

/// Whatever the case, and with `-`, `_` and nothing alike; the published class names too.
impl FromStr for Adapter {
    type Err = UnknownAdapter;

    fn from_str(text: &str) -> Result<Adapter, UnknownAdapter> {
        let simple = |name: &str| name.to_ascii_lowercase().replace(['-', '_'], "");
        let wanted = simple(text);
        Adapter::ALL
            .into_iter()
            .find(|adapter| {
                simple(adapter.name()) == wanted
                    || adapter.aliases().iter().any(|name| simple(name) == wanted)
            })
            .ok_or_else(|| UnknownAdapter(text.into()))
    }
}

/// An adapter, or the one that the first row's fields tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AdapterChoice {
    #[default]
    Auto,
    Named(Adapter),
}

impl FromStr for AdapterChoice {
    type Err = UnknownAdapter;

    fn from_str(text: &str) -> Result<AdapterChoice, UnknownAdapter> {
        if text.eq_ignore_ascii_case("auto") {
            return Ok(AdapterChoice::Auto);
        }
        text.parse().map(AdapterChoice::Named)
    }
}

impl fmt::Display for AdapterChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AdapterChoice::Auto => "auto",
            AdapterChoice::Named(adapter) => adapter.name(),
        })
    }
}

impl Serialize for AdapterChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for AdapterChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<AdapterChoice, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests;
