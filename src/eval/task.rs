//! Tasks as data: a TOML file says which rows, how they are asked and how answers are scored.
//!
//! ```toml
//! file = "arc_challenge/validation.jsonl"  # in a folder of --data; or builtin:NAME, or a path
//! train = "arc_challenge/train.jsonl"      # for the router, and for exemplars where there is no few_shot
//! few_shot = "mmlu/dev.jsonl"              # exemplars of --few-shot, of the same subject where it has some
//! adapter = "choices"                      # how rows are read: see `Rows`
//! prompt = "direct"                        # a name of `PromptTemplate`, or a text with {question} and {choices}
//! scoring = "choice"                       # choice, number, latex or text
//! method = "logits"                        # logits or generate
//! response = "The correct answer is"       # what the answer begins with when it is scored by logits
//! max_new_tokens = 64                      # of a generated answer
//! ```

use super::{Error, items::Rows};
use crate::{builtin, data::templates};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

/// The definitions that come along.
const BUNDLED: [(&str, &str); 10] = [
    ("builtin", include_str!("../../assets/tasks/builtin.toml")),
    ("mmlu_redux", include_str!("../../assets/tasks/mmlu_redux.toml")),
    ("arc_challenge", include_str!("../../assets/tasks/arc_challenge.toml")),
    ("arc_easy", include_str!("../../assets/tasks/arc_easy.toml")),
    ("openbookqa", include_str!("../../assets/tasks/openbookqa.toml")),
    ("ceval", include_str!("../../assets/tasks/ceval.toml")),
    ("mmlu_pro", include_str!("../../assets/tasks/mmlu_pro.toml")),
    ("gsm8k", include_str!("../../assets/tasks/gsm8k.toml")),
    ("longbench", include_str!("../../assets/tasks/longbench.toml")),
    ("leval", include_str!("../../assets/tasks/leval.toml")),
];

/// How an answer is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// The letter whose logit is highest behind the response text.
    Logits,
    /// A text is generated, greedily, and the answer extracted from it.
    Generate,
}

/// When an answer is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scoring {
    /// It is the letter of the right choice.
    Choice,
    /// It is the number (GSM8K).
    Number,
    /// It is the value of a formula (MATH).
    Latex,
    /// It has the text of an answer.
    Text,
}

/// How a question is put.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum PromptTemplate {
    /// The published evaluation's, without chain of thought.
    Direct,
    /// The published evaluation's, with chain of thought.
    ChainOfThought,
    /// Question and choices alone.
    Bare,
    /// As the published training data.
    Plain,
    /// As the built-in pair is asked.
    Line,
    /// The published evaluation's, for problems.
    Math,
    /// A text with `{question}` and `{choices}` in it.
    Text(String),
}

impl From<String> for PromptTemplate {
    fn from(text: String) -> PromptTemplate {
        match text.as_str() {
            "direct" | "template" => PromptTemplate::Direct,
            "chain_of_thought" => PromptTemplate::ChainOfThought,
            "bare" => PromptTemplate::Bare,
            "plain" => PromptTemplate::Plain,
            "line" => PromptTemplate::Line,
            "math" => PromptTemplate::Math,
            _ => PromptTemplate::Text(text),
        }
    }
}

impl From<PromptTemplate> for String {
    fn from(prompt: PromptTemplate) -> String {
        match prompt {
            PromptTemplate::Direct => "direct".into(),
            PromptTemplate::ChainOfThought => "chain_of_thought".into(),
            PromptTemplate::Bare => "bare".into(),
            PromptTemplate::Plain => "plain".into(),
            PromptTemplate::Line => "line".into(),
            PromptTemplate::Math => "math".into(),
            PromptTemplate::Text(text) => text,
        }
    }
}

impl PromptTemplate {
    /// The user's message.
    pub fn ask(&self, question: &str, choices: &[String]) -> String {
        match self {
            PromptTemplate::Direct => templates::direct(question, choices),
            PromptTemplate::ChainOfThought => templates::chain_of_thought(question, choices),
            PromptTemplate::Bare => templates::bare(question, choices),
            PromptTemplate::Plain => templates::plain(question, choices),
            PromptTemplate::Line => templates::line(question, choices),
            PromptTemplate::Math => templates::math(question),
            PromptTemplate::Text(text) => {
                text.replace("{choices}", &templates::lines(choices)).replace("{question}", question)
            }
        }
    }
}

/// A task.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub description: String,
    pub file: PathBuf,
    #[serde(default)]
    pub train: Option<PathBuf>,
    #[serde(default)]
    pub few_shot: Option<PathBuf>,
    #[serde(default)]
    pub adapter: Rows,
    #[serde(default = "direct")]
    pub prompt: PromptTemplate,
    #[serde(default = "choice")]
    pub scoring: Scoring,
    #[serde(default = "logits")]
    pub method: Method,
    #[serde(default = "response")]
    pub response: String,
    #[serde(default = "max_new_tokens")]
    pub max_new_tokens: usize,
    /// Most receiver tokens of a long context; its middle is left out beyond.
    #[serde(default)]
    pub context_tokens: Option<usize>,
}

fn direct() -> PromptTemplate {
    PromptTemplate::Direct
}

fn choice() -> Scoring {
    Scoring::Choice
}

fn logits() -> Method {
    Method::Logits
}

fn response() -> String {
    templates::RESPONSE.into()
}

fn max_new_tokens() -> usize {
    64
}

/// Names of the bundled tasks.
pub fn names() -> impl Iterator<Item = &'static str> {
    BUNDLED.iter().map(|(name, _)| *name)
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<14} {}", self.name, self.description)
    }
}

impl Task {
    /// A bundled task by its name, a definition (`.toml`), or a data file of one's own, read as its fields say.
    pub fn find(name: &str) -> Result<Task, Error> {
        if let Some((_, text)) = BUNDLED.iter().find(|(bundled, _)| *bundled == name) {
            return Task::parse(name, text, name);
        }
        let path = Path::new(name);
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("toml") => {
                let text = fs::read_to_string(path).map_err(Error::read(path))?;
                Task::parse(&stem, &text, name)
            }
            Some(_) if path.exists() => Task::parse(&stem, &format!("file = {name:?}"), name),
            _ => Err(Error::UnknownTask { name: name.into(), known: names().collect::<Vec<_>>().join(", ") }),
        }
    }

    fn parse(name: &str, text: &str, place: &str) -> Result<Task, Error> {
        let problem = |error: toml::de::Error| Error::Definition {
            place: place.into(),
            problem: error.to_string().trim().into(),
        };
        let task: Task = toml::from_str(text).map_err(problem)?;
        Ok(Task { name: if task.name.is_empty() { name.into() } else { task.name.clone() }, ..task })
    }

    /// Several, with commas.
    pub fn list(names: &str) -> Result<Vec<Task>, Error> {
        names.split(',').map(|name| Task::find(name.trim())).collect()
    }

    /// All bundled tasks.
    pub fn bundled() -> Result<Vec<Task>, Error> {
        names().map(Task::find).collect()
    }
}

/// Where data lies: `--data DIR`, `--data TASK=PATH`.
#[derive(Clone, Debug, Default)]
pub struct Places {
    pub folders: Vec<PathBuf>,
    /// The file of a task.
    pub files: Vec<(String, PathBuf)>,
}

impl Places {
    pub fn new(given: &[String]) -> Places {
        let mut places = Places::default();
        for one in given {
            match one.split_once('=') {
                Some((task, path)) if !Path::new(one).exists() => {
                    places.files.push((task.into(), path.into()))
                }
                _ => places.folders.push(one.into()),
            }
        }
        places
    }

    /// The questions of a task.
    pub fn questions(&self, task: &Task) -> Result<PathBuf, Error> {
        match self.files.iter().find(|(name, _)| *name == task.name) {
            Some((_, path)) => Ok(path.clone()),
            None => self.find(task, &task.file),
        }
    }

    /// A file that a task names.
    pub fn find(&self, task: &Task, file: &Path) -> Result<PathBuf, Error> {
        let resolved = builtin::resolve(file);
        let candidates = self.folders.iter().map(|folder| folder.join(&resolved)).chain([resolved.clone()]);
        let found = candidates.into_iter().find(|path| path.exists());
        found.ok_or_else(|| Error::NoData { task: task.name.clone(), file: file.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundled_tasks_can_be_read_and_unknown_ones_list_them() {
        for task in Task::bundled().unwrap() {
            assert!(!task.description.is_empty(), "{}", task.name);
        }
        let error = Task::find("arc").unwrap_err().to_string();
        assert!(error.contains("`arc`") && error.contains("arc_challenge, arc_easy"), "{error}");
        let error = Task::parse("a", "file = \"x\"\nfiles = 3", "a.toml").unwrap_err().to_string();
        assert!(error.contains("a.toml") && error.contains("files"), "{error}");
    }

    #[test]
    fn data_is_found_where_it_was_said_to_be() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("arc_easy")).unwrap();
        fs::write(folder.path().join("arc_easy/validation.jsonl"), "").unwrap();
        let task = Task::find("arc_easy").unwrap();
        let places = Places::new(&[folder.path().display().to_string()]);
        assert!(places.questions(&task).unwrap().starts_with(folder.path()));
        let places = Places::new(&["arc_easy=/some/file.jsonl".into()]);
        assert_eq!(places.questions(&task).unwrap(), Path::new("/some/file.jsonl"));
        let error = Places::default().questions(&task).unwrap_err().to_string();
        assert!(error.contains("--data"), "{error}");
    }

    #[test]
    fn a_text_of_ones_own_is_filled_in() {
        let prompt = PromptTemplate::from("Q: {question}\n{choices}A:".to_owned());
        assert_eq!(
            prompt.ask("why {choices}", &["x".into(), "y".into()]),
            "Q: why {choices}\nA. x\nB. y\nA:"
        );
    }
}
