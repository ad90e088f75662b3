//! `evaluate`: questions, modes, controls, costs. Parses, calls the library, prints.

use c2c::{
    command::{self, FusingFlags, MachineFlags, NamedModels, Screen},
    eval::{
        self, Method, Mode, Options, Places, PromptTemplate, Task,
        preset::{self, Preset},
        report,
    },
    pipeline::{FuserChoice, Overlap, SessionOptions},
};
use clap::{Parser, Subcommand};
use std::{
    error::Error,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// Measure what a pair of models answers right, alone, by text and by C2C, with controls that say why.
///
/// Without arguments the built-in pair is asked its held-out questions in every mode, in a few minutes.
///
/// Examples:
///   evaluate --limit 100
///   evaluate --receiver smol.gguf --sharer qwen.gguf --fuser fuser/ --data data/ --tasks arc_challenge,openbookqa --modes receiver,sharer,t2t,c2c,controls
///   evaluate --preset main --receiver smol.gguf --sharer qwen.gguf --fuser fuser/ --data data/
///   evaluate report runs/a runs/b --out both.html
#[derive(Parser)]
#[command(version, verbatim_doc_comment, args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    models: NamedModels,
    /// For mode identical: a fuser from the receiver to itself
    #[arg(long, value_name = "PATH|init[:SEED]", help_heading = "Models")]
    identical_fuser: Option<FuserChoice>,

    /// Names of tasks, definitions (.toml) or data files of one's own, with commas (see --list)
    #[arg(long, value_name = "A,B", help_heading = "Questions")]
    tasks: Option<String>,
    /// The folder that holds the tasks' files, or TASK=FILE; may be given several times
    #[arg(long, value_name = "DIR|TASK=FILE", help_heading = "Questions")]
    data: Vec<String>,
    /// At most as many questions of each task, evenly spaced over its file
    #[arg(long, value_name = "N", help_heading = "Questions")]
    limit: Option<usize>,
    /// Exemplars before each question
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Questions")]
    few_shot: usize,
    /// direct, chain_of_thought, bare, plain, line, math, or a text with {question} and {choices} (default: the task's)
    #[arg(long, value_name = "NAME|TEXT", help_heading = "Questions")]
    prompt: Option<String>,
    /// Ask for reasoning before the answer, and generate
    #[arg(long, help_heading = "Questions")]
    cot: bool,
    /// Most tokens of a long context; its middle is left out
    #[arg(long, value_name = "N", help_heading = "Questions")]
    context_tokens: Option<usize>,

    /// Who answers, with commas (see --list)
    #[arg(long, value_name = "A,B", help_heading = "Answers")]
    modes: Option<String>,
    /// Read a letter off the logits, or generate a text (default: the task's)
    #[arg(long, value_enum, help_heading = "Answers")]
    method: Option<Method>,
    /// What answers begin with (default: the task's, by logits)
    #[arg(long, value_name = "TEXT", help_heading = "Answers")]
    response: Option<String>,
    /// Most tokens of a generated answer (default: the task's)
    #[arg(long, value_name = "N", help_heading = "Answers")]
    max_new_tokens: Option<usize>,
    /// Most tokens that the sharer writes in text-to-text (published: 256, or 1024)
    #[arg(long, default_value_t = 256, value_name = "N", help_heading = "Answers")]
    t2t_tokens: usize,
    /// Training questions of the router
    #[arg(long, default_value_t = 200, value_name = "N", help_heading = "Answers")]
    router_questions: usize,
    /// Of noise and order in controls
    #[arg(long, default_value_t = 0, help_heading = "Answers")]
    seed: u64,

    #[command(flatten)]
    fusing: FusingFlags,

    /// A named evaluation of the paper; other arguments go before it (see --list)
    #[arg(long, value_name = "NAME", help_heading = "Run")]
    preset: Option<String>,
    /// Folder for answers and report; what it holds already is not asked again
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    out: Option<PathBuf>,
    /// Keep the Sharers' caches in this folder for later runs (times of cached prefills are then unknown)
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    cache_sharer: Option<PathBuf>,
    /// Print tasks, modes and presets
    #[arg(long, help_heading = "Run")]
    list: bool,

    #[command(flatten)]
    machine: MachineFlags,
}

#[derive(Subcommand)]
enum Command {
    /// Merge finished evaluations to one HTML page
    Report {
        /// Folders of evaluations
        #[arg(required = true, value_name = "DIR")]
        runs: Vec<PathBuf>,
        /// The page
        #[arg(long, default_value = report::HTML, value_name = "FILE.html")]
        out: PathBuf,
    },
}

/// What the built-in pair is asked without arguments.
const MODES: &str = "receiver,sharer,router,t2t,t2t-brief,c2c,controls";

fn options(args: &Args) -> Result<Options, Box<dyn Error>> {
    let own = args.models.are_builtin();
    let preset = args.preset.as_deref().map(Preset::find).transpose()?;
    let mut tasks = match (&args.tasks, &preset) {
        (Some(names), _) => Task::list(names)?,
        (None, Some(preset)) => preset.tasks(own)?,
        (None, None) => vec![Task::find("builtin")?],
    };
    if let Some(preset) = &preset {
        tasks = preset::at_lengths(tasks, &preset.context_tokens);
    }
    let modes = match (&args.modes, &preset) {
        (Some(modes), _) => Mode::list(modes)?,
        (None, Some(preset)) => preset.modes()?,
        (None, None) => Mode::list(MODES)?,
    };
    let NamedModels { receiver, sharer: sharers, fuser: fusers } = args.models.local()?;
    let name =
        args.preset.clone().unwrap_or_else(|| if own { "builtin".into() } else { "evaluation".into() });
    let title = match (&preset, own) {
        (Some(preset), _) => format!("{}: {}", preset.name, preset.description),
        (None, true) => "The built-in pair".into(),
        (None, false) => {
            let stem = |path: &PathBuf| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let from: Vec<String> = args.models.sharer.iter().map(stem).collect();
            format!("{} ← {}", args.models.receiver.as_ref().map(stem).unwrap_or_default(), from.join(", "))
        }
    };
    Ok(Options {
        title,
        tasks,
        places: Places::new(&args.data),
        modes,
        session: SessionOptions {
            // Chosen by what the modes need.
            mode: c2c::pipeline::Mode::C2c,
            receiver,
            sharers,
            fusers,
            multi_sharer: args.fusing.multi_sharer,
            alignment: args.fusing.alignment,
            mapping: args.fusing.mapping,
            gates: args.fusing.gates.clone(),
            fraction: None,
            dtype: args.machine.dtype,
            device: args.machine.device,
            threads: args.machine.threads,
            overlap: Overlap::Layers,
        },
        identical_fuser: args.identical_fuser.as_ref().map(FuserChoice::local).transpose()?,
        method: args.method,
        prompt: args.prompt.clone().map(PromptTemplate::from),
        chain_of_thought: args.cot,
        few_shot: args.few_shot,
        response: args.response.clone(),
        max_new_tokens: args.max_new_tokens,
        background_tokens: args.t2t_tokens,
        limit: args.limit,
        context_tokens: args.context_tokens,
        router_questions: args.router_questions,
        seed: args.seed,
        cache_sharer: args.cache_sharer.clone(),
        out: args.out.clone().unwrap_or_else(|| Path::new("runs").join(format!("evaluate-{name}"))),
    })
}

fn list() -> Result<(), Box<dyn Error>> {
    println!("tasks:");
    for task in Task::bundled()? {
        println!("  {task}");
    }
    println!("\nmodes:\n  {}", eval::mode::SYNTAX);
    println!("\npresets:");
    for name in preset::names() {
        println!("  {name:<14} {}", Preset::find(name)?.description);
    }
    Ok(())
}

fn start(args: &Args) -> Result<(), Box<dyn Error>> {
    if let Some(Command::Report { runs, out }) = &args.command {
        report::merge(runs, out)?;
        println!("{}", out.display());
        return Ok(());
    }
    if args.list {
        return list();
    }
    let stop = Arc::new(AtomicBool::new(false));
    let asked = stop.clone();
    // A second Ctrl-C ends at once.
    let handler = ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    });
    if let Err(error) = handler {
        log::warn!("Ctrl-C cannot be caught: {error}");
    }
    let screen = Screen::new();
    let summary = eval::run(&options(args)?, &screen, &stop)?;
    screen.clear();
    print!("{}", report::text(&summary));
    Ok(())
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    match start(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => command::failure(error.as_ref()),
    }
}
