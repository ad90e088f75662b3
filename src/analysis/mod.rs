//! Analysis: what the fuser does to a cache, and why a pair answers as it does. One file a question.
//!
//! ```text
//! options ─ probe (models, questions, caches) ─ a question ─ finding (sentences, tables, figures) ─ report
//! ```
//!
//! [`Question`] lists what can be asked, [`run`] asks it, [`Finding`] is what comes out.

mod attention;
mod by_layer;
mod diagnose;
mod figures;
mod finding;
mod gates;
mod layers;
mod oracle;
mod overlap;
mod probe;
mod rank;
mod report;
mod tokenizers;
mod tsne;
mod weights;

pub use finding::{Figure, Finding, Table};
pub use rank::effective_rank;
pub use tokenizers::Tokenizers;

use crate::{
    durable,
    eval::{self, Places, Task, Watcher},
    fuser, hub, model, ops, pipeline, tokenizer,
};
use probe::Probe;
use std::{
    io,
    path::{Path, PathBuf},
};

/// Why an analysis cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{question} reads letters off logits, and task {task} has no choices: name another by --task")]
    NoChoices { question: &'static str, task: String },
    #[error("{what}: no token of it is fused, so there is nothing to see")]
    NothingFused { what: String },
    #[error("{}: cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: has no line of text", path.display())]
    NoText { path: PathBuf },
    #[error(
        "{}: there are no {mode} answers to {}: run evaluate with --modes receiver,sharer,c2c --out {}",
        folder.display(),
        task.as_deref().map_or("a task".into(), |task| format!("task {task}")),
        folder.display()
    )]
    NoAnswers { folder: PathBuf, mode: &'static str, task: Option<String> },
    #[error("{}: has answers to several tasks ({}): name one by --task", folder.display(), tasks.join(", "))]
    SeveralTasks { folder: PathBuf, tasks: Vec<String> },
    #[error("{}: has no question that receiver, sharer and c2c were all asked", folder.display())]
    NothingShared { folder: PathBuf },
    #[error(
        "none of {asked} questions can be enriched: their tokens behind the exemplars are others than without them ({})",
        reason
    )]
    NothingEnriched { asked: usize, reason: &'static str },
    #[error(transparent)]
    Eval(Box<eval::Error>),
    #[error(transparent)]
    Write(#[from] durable::WriteError),
    #[error(transparent)]
    Figure(#[from] eval::figures::FigureError),
    #[error(transparent)]
    Pipeline(#[from] pipeline::Error),
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    #[error(transparent)]
    Model(#[from] model::Error),
    #[error(transparent)]
    Cache(#[from] crate::cache::Error),
    #[error(transparent)]
    Fuser(#[from] fuser::FuserError),
    #[error(transparent)]
    Shape(#[from] ops::ShapeError),
    #[error(transparent)]
    Hub(#[from] hub::Error),
    #[error("no thread for t-SNE: {0}")]
    Thread(#[from] rayon::ThreadPoolBuildError),
}

impl From<eval::Error> for Error {
    fn from(error: eval::Error) -> Error {
        Error::Eval(Box::new(error))
    }
}

/// What is asked.
#[derive(Clone, Debug)]
pub enum Question {
    /// Effective rank of keys and values before and after fusing.
    Rank,
    /// Source, target and projected cache in two dimensions: at most so many tokens of each.
    Tsne { tokens: usize },
    /// A cache enriched by what is then dropped.
    Oracle(Enrichment),
    /// Gates opened one layer at a time; `halves`: keys and values by themselves too.
    Layers { halves: bool },
    /// Gates and weights by head over the task's questions.
    Gates,
    /// Weights by token on one text, or on the task's first question.
    Weights { text: Option<String> },
    /// Who is right: Receiver, Sharer, C2C. `from`: what `evaluate` left in a folder.
    Overlap { from: Option<PathBuf> },
    /// The Receiver's attention with and without the fuse.
    Attention,
    /// How two tokenizers read the same text; without names the pair's.
    Tokenizers(Option<Tokenizers>),
    /// Signatures of failure.
    Diagnose,
}

/// What enriches a question's cache before it is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enrichment {
    /// So many of the task's exemplars.
    Exemplars(usize),
    /// Text-to-text's request and the Sharer's answer.
    Background,
}

impl Question {
    /// All that can be asked of a pair and a task, in the order of a report.
    pub fn all() -> Vec<Question> {
        vec![
            Question::Diagnose,
            Question::Overlap { from: None },
            Question::Rank,
            Question::Attention,
            Question::Gates,
            Question::Weights { text: None },
            Question::Layers { halves: true },
            Question::Oracle(Enrichment::Exemplars(4)),
            Question::Oracle(Enrichment::Background),
            Question::Tsne { tokens: 150 },
            Question::Tokenizers(None),
        ]
    }

    /// The sub-command.
    pub fn name(&self) -> &'static str {
        match self {
            Question::Rank => "rank",
            Question::Tsne { .. } => "tsne",
            Question::Oracle(_) => "oracle",
            Question::Layers { .. } => "layers",
            Question::Gates => "gates",
            Question::Weights { .. } => "weights",
            Question::Overlap { .. } => "overlap",
            Question::Attention => "attention",
            Question::Tokenizers(_) => "tokenizers",
            Question::Diagnose => "diagnose",
        }
    }

    /// Questions of the task that are enough for it, where `--limit` says nothing.
    fn limit(&self) -> usize {
        match self {
            Question::Rank | Question::Attention | Question::Gates => 100,
            Question::Tsne { .. } => 50,
            Question::Weights { .. } => 1,
            _ => 200,
        }
    }

    /// Whether answers are letters read off logits.
    fn scores(&self) -> bool {
        match self {
            Question::Overlap { from } => from.is_none(),
            Question::Oracle(_) | Question::Layers { .. } | Question::Diagnose => true,
            _ => false,
        }
    }

    /// Whether it can be answered without a pair of models.
    fn needs_no_models(&self) -> bool {
        matches!(self, Question::Overlap { from: Some(_) } | Question::Tokenizers(Some(_)))
    }
}

/// Everything that is asked of an analysis.
#[derive(Clone, Debug)]
pub struct Options {
    pub title: String,
    pub questions: Vec<Question>,
    /// Models, fusers, alignment, machine.
    pub session: pipeline::SessionOptions,
    pub task: Task,
    /// Whether the task was named: answers of others are then not looked at.
    pub task_named: bool,
    pub places: Places,
    /// At most so many of the task's questions, evenly spaced.
    pub limit: Option<usize>,
    pub seed: u64,
    pub out: PathBuf,
}

/// Asks all questions, then writes tables, figures and a report. Nothing is written before everything is known.
pub fn run(options: &Options, watcher: &dyn Watcher) -> Result<Vec<Finding>, Error> {
    let begin = std::time::Instant::now();
    let mut findings = Vec::new();
    let mut probe = match options.questions.iter().all(Question::needs_no_models) {
        true => None,
        false => Some(Probe::open(options, watcher)?),
    };
    for question in &options.questions {
        let found = match (question, &mut probe) {
            (Question::Tokenizers(Some(given)), _) => tokenizers::of_files(given)?,
            (Question::Overlap { from: Some(folder) }, _) => {
                overlap::of_files(folder, options.task_named.then_some(options.task.name.as_str()))?
            }
            (question, Some(probe)) => {
                watcher.say(&format!("{}…", question.name()));
                probe.limit = options.limit.unwrap_or(question.limit());
                ask(question, probe, options.seed)?
            }
            (_, None) => unreachable!("models are loaded where a question needs them"),
        };
        findings.push(found);
    }
    let models = probe.as_ref().map(Probe::described).unwrap_or_default();
    report::write(options, &findings, models, begin.elapsed().as_secs_f64())?;
    watcher.say(&format!("report: {}", options.out.join(report::MARKDOWN).display()));
    Ok(findings)
}

fn ask(question: &Question, probe: &mut Probe, seed: u64) -> Result<Finding, Error> {
    match question {
        Question::Rank => rank::ask(probe),
        Question::Tsne { tokens } => tsne::ask(probe, *tokens, seed),
        Question::Oracle(enrichment) => oracle::ask(probe, *enrichment),
        Question::Layers { halves } => layers::ask(probe, *halves),
        Question::Gates => gates::ask(probe),
        Question::Weights { text } => weights::ask(probe, text.as_deref()),
        Question::Overlap { .. } => overlap::ask(probe),
        Question::Attention => attention::ask(probe),
        Question::Tokenizers(_) => tokenizers::of_pair(probe),
        Question::Diagnose => diagnose::ask(probe),
    }
}

/// Findings as they are printed.
pub fn text(findings: &[Finding]) -> String {
    findings.iter().map(Finding::text).collect()
}

/// For `map_err` while reading `path`.
fn unread(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    |source| Error::Read { path: path.into(), source }
}
