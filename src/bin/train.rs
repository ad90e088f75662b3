//! `train`: a fuser, or a model, from a configuration. Parses, calls the library, prints.

use c2c::{
    backend::DeviceChoice,
    command,
    train::{
        ConfigLayers, Update,
        config::preset_names,
        run::{self, Watcher},
    },
};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// Train the fuser between a Receiver and a Sharer, or a language model.
///
/// Both language models stay as they are; the fuser learns to carry what the Sharer's cache knows into the Receiver's. Without
/// arguments the fuser of the built-in pair is trained, in a few minutes.
///
/// Examples:
///   train --config my.toml --set optimizer.learning_rate=2e-4
///   train --config my.toml --what lora
#[derive(Parser)]
#[command(version, verbatim_doc_comment)]
struct Args {
    /// A named configuration (default: builtin, unless --config is given)
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// A TOML file, or a published recipe (.json); on top of the preset
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One setting, such as optimizer.learning_rate=1e-4; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// What is trained: the fuser, all of the Receiver, or low-rank adapters beside it
    #[arg(long, value_name = "fuser|model|lora", conflicts_with = "resume")]
    what: Option<String>,
    /// Folder for checkpoints, log and report
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Keep the Sharer's caches in this folder: later epochs and runs read them instead of running the Sharer
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    cache_sharer: Option<PathBuf>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,
    /// Go on from a checkpoint, or from the latest of a run's folder; everything else is as it was
    #[arg(long, value_name = "DIR", conflicts_with_all = ["preset", "config", "set"])]
    resume: Option<PathBuf>,
    /// Print the names of the presets
    #[arg(long)]
    presets: bool,
}

/// A bar where there is a terminal, lines elsewhere.
struct Screen {
    bar: OnceLock<ProgressBar>,
    terminal: bool,
    /// The model that was told of last: its end is reported twice.
    loaded: std::sync::Mutex<Option<PathBuf>>,
    last: std::sync::Mutex<Option<Instant>>,
}

impl Watcher for Screen {
    fn say(&self, text: &str) {
        match self.bar.get() {
            Some(bar) if self.terminal => bar.println(text),
            _ => eprintln!("{text}"),
        }
    }

    fn loading(&self, path: &Path, done: u64, total: u64) {
        let mut loaded = self.loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if done == total && loaded.as_deref() != Some(path) {
            *loaded = Some(path.into());
            self.say(&format!("loaded {} ({:.1} MB)", path.display(), total as f64 / 1e6));
        }
    }

    fn update(&self, update: &Update, total: u64) {
        let open =
            update.gates_open.map_or(String::new(), |open| format!(", gates open {:.0} %", 100.0 * open));
        let message = format!(
            "loss {:.4}, lr {:.1e}{open}, {:.0} tok/s",
            update.loss, update.learning_rate, update.tokens_per_second
        );
        if self.terminal {
            let bar = self.bar.get_or_init(|| {
                let bar = ProgressBar::new(total);
                // The template is fixed and known to be good.
                let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}, {eta} left")
                    .unwrap_or_else(|_| ProgressStyle::default_bar());
                bar.set_style(style);
                bar
            });
            bar.set_position(update.step);
            bar.set_message(message);
            return;
        }
        let Ok(mut last) = self.last.lock() else { return };
        if update.step == total || last.is_none_or(|last| last.elapsed() > Duration::from_secs(5)) {
            *last = Some(Instant::now());
            let left = update.seconds / update.step as f64 * (total - update.step) as f64;
            eprintln!("update {}/{total}: {message}, {left:.0} s left", update.step);
        }
    }
}

fn start(args: Args) -> Result<(), Box<dyn std::error::Error>> {
    let stop = Arc::new(AtomicBool::new(false));
    let asked = stop.clone();
    // A second Ctrl-C ends at once.
    let handler = ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("stopping after this update; Ctrl-C again ends at once");
    });
    if let Err(error) = handler {
        log::warn!("Ctrl-C cannot be caught: {error}");
    }
    let mut layers = ConfigLayers::default();
    match (&args.preset, &args.config) {
        (Some(preset), _) => layers = layers.preset(preset)?,
        (None, None) => layers = layers.preset("builtin")?,
        (None, Some(_)) => {}
    }
    if let Some(file) = &args.config {
        layers = layers.file(file)?;
    }
    if let Some(what) = &args.what {
        layers = layers.set(&format!("what={what}"))?;
        if what != "fuser" {
            // Those of a preset or file have no part in it.
            layers = layers.set("sharers=[]")?;
        }
    }
    for setting in &args.set {
        layers = layers.set(setting)?;
    }
    let (mut config, notes) = layers.finish()?;
    if let Some(out) = args.out {
        config.out = out;
    }
    if args.cache_sharer.is_some() {
        config.cache_sharer = args.cache_sharer;
    }
    if let Some(device) = args.device {
        config.device = device;
    }
    let screen = Screen {
        bar: OnceLock::new(),
        terminal: std::io::stderr().is_terminal(),
        loaded: std::sync::Mutex::new(None),
        last: std::sync::Mutex::new(None),
    };
    notes.iter().for_each(|note| screen.say(note));
    let outcome = run::run(config, args.resume.as_deref(), &screen, &stop)?;
    if let Some(bar) = screen.bar.get() {
        bar.finish();
    }
    screen.say(&format!("{} after {} of {} updates", outcome.reason, outcome.step, outcome.total));
    match &outcome.result {
        Some(result) => screen.say(&format!("trained: {}", result.display())),
        None if outcome.reason == "interrupted" => {
            screen.say("go on with: train --resume DIR, where DIR is the folder of this run")
        }
        // Another process of the run tells.
        None => {}
    }
    if let Some(report) = &outcome.report {
        screen.say(&format!("report: {}", report.display()));
    }
    Ok(())
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let args = Args::parse();
    if args.presets {
        preset_names().for_each(|name| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    match start(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => command::failure(error.as_ref()),
    }
}
