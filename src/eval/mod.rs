//! Evaluation: questions from files, asked in every mode, with controls, costs and intervals.
//!
//! ```text
//! task ─ items ─ asking ─ pair (prefills, fuse, decode) ─ extract, math ─ samples ─ results ─ report
//! ```
//!
//! [`task`] says what is asked, [`mode`] who answers, [`run`] does it, [`results`] and [`report`] say what came out.

pub(crate) mod answering;
pub mod asking;
pub mod extract;
pub(crate) mod figures;
pub mod items;
pub mod math;
pub mod mode;
pub(crate) mod page;
pub(crate) mod pair;
pub mod preset;
pub(crate) mod questions;
pub mod report;
pub mod results;
mod router;
pub mod run;
pub(crate) mod samples;
pub mod statistics;
pub mod task;

pub use mode::Mode;
pub use pair::Cost;
pub use run::{Options, Watcher, run};
pub use task::{Method, Places, PromptTemplate, Scoring, Task};

use crate::{align, backend, data, durable, fuser, pipeline, tokenizer, train};
use std::{
    io,
    path::{Path, PathBuf},
};

/// Why an evaluation cannot begin, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("unknown task `{name}`: use {known}, a definition (.toml) or a data file of your own")]
    UnknownTask { name: String, known: String },
    #[error("unknown mode `{name}`: use {syntax}", syntax = mode::SYNTAX)]
    UnknownMode { name: String },
    #[error("unknown preset `{name}`: use {known}")]
    UnknownPreset { name: String, known: String },
    #[error("{place}: {problem}")]
    Definition { place: String, problem: String },
    #[error(
        "the data of task {task} ({}) is not there: name its folder by --data DIR, or the file by --data {task}=FILE",
        file.display()
    )]
    NoData { task: String, file: PathBuf },
    #[error(
        "task {task} has no question that can be asked; {excluded} are left out, the first because {reason}"
    )]
    NothingToAsk { task: String, excluded: usize, reason: String },
    #[error("this mode needs --receiver")]
    NoReceiver,
    #[error("mode {mode} needs {needed} sharers, {given} were given by --sharer")]
    Sharers { mode: String, needed: usize, given: usize },
    #[error(
        "mode identical needs a fuser from the receiver to itself: --identical-fuser DIR (train with sharers = [receiver])"
    )]
    NoIdenticalFuser,
    #[error(
        "mode router needs training questions, which task {task} has none of: add `train` to its definition"
    )]
    NoTraining { task: String },
    #[error("{model}: {source}, with --method generate")]
    Letters { model: String, source: data::templates::LetterError },
    #[error("{what} cannot be combined with {with}")]
    Combination { what: &'static str, with: String },
    #[error("{} holds another evaluation ({field} differs): choose another --out, or remove it", out.display())]
    OtherRun { out: PathBuf, field: String },
    #[error("{}:{line}: {problem}; remove the file to ask these questions again", path.display())]
    Samples { path: PathBuf, line: usize, problem: String },
    #[error("{}: holds no evaluation (no {})", path.display(), results::SUMMARY)]
    NoSummary { path: PathBuf },
    #[error("{}: cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("interrupted; the same command goes on where it stopped")]
    Interrupted,
    #[error(transparent)]
    File(data::FileError),
    #[error(transparent)]
    Write(#[from] durable::WriteError),
    #[error(transparent)]
    Figure(#[from] figures::FigureError),
    #[error(transparent)]
    Pipeline(#[from] pipeline::Error),
    #[error(transparent)]
    Store(Box<train::Error>),
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    #[error(transparent)]
    Align(#[from] align::Error),
    #[error(transparent)]
    Fuser(#[from] fuser::FuserError),
    #[error(transparent)]
    Backend(#[from] backend::Error),
}

impl From<train::Error> for Error {
    fn from(error: train::Error) -> Error {
        Error::Store(Box::new(error))
    }
}

impl Error {
    /// For `map_err` while reading `path`.
    fn read(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
        |source| Error::Read { path: path.into(), source }
    }
}
