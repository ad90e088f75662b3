//! `analyze`: what a fuser does to a cache, and why a pair answers as it does. Parses, calls the library, prints.

use c2c::{
    analysis::{self, Enrichment, Options, Question, Tokenizers},
    command::{self, FusingFlags, MachineFlags, NamedModels, Screen},
    eval::{Places, Task},
    pipeline::{Mode, Overlap, SessionOptions},
};
use clap::{Parser, Subcommand};
use std::{
    error::Error,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Look inside a pair: ranks, pictures, gates, weights, the oracle, who is right, tokenizers, signatures of failure.
///
/// Without a question all are asked of the built-in pair and its held-out questions, in a minute or two. Each writes CSV, JSON and SVG into
/// --out, with report.md and report.html that hold everything.
///
/// Examples:
///   analyze
///   analyze layers --halves --limit 400
///   analyze rank --receiver smol.gguf --sharer qwen.gguf --fuser fuser/ --task arc_challenge --data data/
///   analyze weights --text "In which country is Grenoble: A Spain, B Poland, C Greece, D France?"
///   analyze overlap --from runs/evaluate-builtin
///   analyze tokenizers gpt2/tokenizer.json bert/tokenizer.json --text lines.txt
#[derive(Parser)]
#[command(version, verbatim_doc_comment, args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    question: Option<Asked>,
    #[command(flatten)]
    common: Common,
}

#[derive(clap::Args)]
struct Common {
    #[command(flatten)]
    models: NamedModels,

    /// Name of a task, definition (.toml) or data file of one's own (see evaluate --list); the built-in pair's by default
    #[arg(long, value_name = "TASK", help_heading = "Questions")]
    task: Option<String>,
    /// The folder that holds the task's file, or TASK=FILE; may be given several times
    #[arg(long, value_name = "DIR|TASK=FILE", help_heading = "Questions")]
    data: Vec<String>,
    /// At most as many questions, evenly spaced over the task's file (default: by question, 50 to 200)
    #[arg(long, value_name = "N", help_heading = "Questions")]
    limit: Option<NonZeroUsize>,
    /// Of what is drawn
    #[arg(long, default_value_t = 0, help_heading = "Questions")]
    seed: u64,

    #[command(flatten)]
    fusing: FusingFlags,

    /// Folder for tables, figures and report
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    out: Option<PathBuf>,

    #[command(flatten)]
    machine: MachineFlags,
}

#[derive(Subcommand)]
enum Asked {
    /// Effective rank of keys and values before and after fusing, layer by layer
    ///
    /// The exponential of the entropy of the singular values (made to add up to 1) of all tokens that take a column: the Receiver's before
    /// and after, what is added, and the Sharer's. A rank that rises says that the fuse brings directions which the Receiver's cache had not.
    Rank(Common),
    /// t-SNE of source, target and projected cache
    ///
    /// The Sharer's columns, the Receiver's, and the fused ones, in a plane for each of the last six layers, keys and values, with the share
    /// of neighbours that each set has in the others, counted in the cache itself.
    Tsne {
        /// At most as many tokens of each set
        #[arg(long, default_value = "150", value_name = "N", help_heading = "Questions")]
        tokens: NonZeroUsize,
        #[command(flatten)]
        common: Common,
    },
    /// The cache-enrichment oracle: accuracy at equal length, by layer, best and worst layers
    ///
    /// The Receiver reads exemplars and the question; then the exemplars are dropped from the cache. What is left is as long as the question's
    /// own cache and richer: how much of the gain stays is what a cache can carry. Then one layer alone is enriched, and the best and worst k.
    Oracle {
        /// Exemplars before each question; 0 enriches nothing
        #[arg(long, default_value_t = 4, value_name = "N", help_heading = "Questions")]
        exemplars: usize,
        /// Instead of exemplars, text-to-text's request and what the Sharer writes
        #[arg(long, conflicts_with = "exemplars", help_heading = "Questions")]
        background: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Accuracy with the gates of one layer open at a time
    ///
    /// With each layer alone, all but each, all closed (the Receiver) and open, as trained, and the best and worst k.
    Layers {
        /// Keys and values by themselves too
        #[arg(long, help_heading = "Questions")]
        halves: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Gates, and weights by layer and head, over the task's questions
    Gates(Common),
    /// The weight of each token of a text, layer by layer
    Weights {
        /// What the user says (default: the task's first question)
        #[arg(long, value_name = "TEXT", help_heading = "Questions")]
        text: Option<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Who is right: Receiver, Sharer, C2C, and their overlap
    Overlap {
        /// Take the answers that evaluate left in this folder (modes receiver, sharer and c2c)
        #[arg(long, value_name = "DIR", help_heading = "Questions")]
        from: Option<PathBuf>,
        #[command(flatten)]
        common: Common,
    },
    /// The Receiver's attention with and without the fuse: cosine and change, by layer and head
    Attention(Common),
    /// How two tokenizers read the same text, for alignments first, longest and span
    ///
    /// Success rate, one-to-many statistics, BLEU-4 and character error, in both directions. No models are loaded.
    Tokenizers {
        /// tokenizer.json, a model's folder, or a .gguf
        first: PathBuf,
        second: PathBuf,
        /// A text a line (default: a sample of several scripts)
        #[arg(long, value_name = "FILE")]
        text: Option<PathBuf>,
        /// Folder for tables, figures and report
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Signatures of failure, each with its evidence
    ///
    /// Accuracy below the Receiver's and whether alignment or gates are the cause; no gate open; gates open on weights near zero; a gain that
    /// is no communication; a fuser that takes most of the time.
    Diagnose(Common),
}

fn options(common: &Common, name: &str, questions: Vec<Question>) -> Result<Options, Box<dyn Error>> {
    let own = common.models.are_builtin();
    let task = Task::find(common.task.as_deref().unwrap_or("builtin"))?;
    let NamedModels { receiver, sharer: sharers, fuser: fusers } = common.models.local()?;
    let stem = |path: &PathBuf| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let title = if own {
        "The built-in pair, looked into".into()
    } else {
        let from: Vec<String> = common.models.sharer.iter().map(stem).collect();
        let to = common.models.receiver.as_ref().map(stem).unwrap_or_default();
        format!("{to} ← {}, looked into", from.join(", "))
    };
    Ok(Options {
        title,
        questions,
        session: SessionOptions {
            mode: Mode::C2c,
            receiver,
            sharers,
            fusers,
            multi_sharer: common.fusing.multi_sharer,
            alignment: common.fusing.alignment,
            mapping: common.fusing.mapping,
            gates: common.fusing.gates.clone(),
            fraction: None,
            dtype: common.machine.dtype,
            device: common.machine.device,
            threads: common.machine.threads,
            overlap: Overlap::Layers,
        },
        task,
        task_named: common.task.is_some(),
        places: Places::new(&common.data),
        limit: common.limit.map(NonZeroUsize::get),
        seed: common.seed,
        out: common.out.clone().unwrap_or_else(|| Path::new("runs").join(name)),
    })
}

fn asked(args: Args) -> Result<Options, Box<dyn Error>> {
    let (question, common) = match args.question {
        None => return options(&args.common, "analyze", Question::all()),
        Some(Asked::Rank(common)) => (Question::Rank, common),
        Some(Asked::Tsne { tokens, common }) => (Question::Tsne { tokens: tokens.get() }, common),
        Some(Asked::Oracle { background: true, common, .. }) => {
            (Question::Oracle(Enrichment::Background), common)
        }
        Some(Asked::Oracle { exemplars, common, .. }) => {
            (Question::Oracle(Enrichment::Exemplars(exemplars)), common)
        }
        Some(Asked::Layers { halves, common }) => (Question::Layers { halves }, common),
        Some(Asked::Gates(common)) => (Question::Gates, common),
        Some(Asked::Weights { text, common }) => (Question::Weights { text }, common),
        Some(Asked::Overlap { from, common }) => (Question::Overlap { from }, common),
        Some(Asked::Attention(common)) => (Question::Attention, common),
        Some(Asked::Tokenizers { first, second, text, out }) => {
            let common = Common { out, ..args.common };
            (Question::Tokenizers(Some(Tokenizers { first, second, text })), common)
        }
        Some(Asked::Diagnose(common)) => (Question::Diagnose, common),
    };
    let name = format!("analyze-{}", question.name());
    options(&common, &name, vec![question])
}

fn start(args: Args) -> Result<(), Box<dyn Error>> {
    let options = asked(args)?;
    let screen = Screen::new();
    let findings = analysis::run(&options, &screen)?;
    screen.clear();
    print!("{}", analysis::text(&findings));
    Ok(())
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    match start(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => command::failure(error.as_ref()),
    }
}
