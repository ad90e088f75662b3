//! What the programs have in common: flags, bars, how errors are told.

use crate::{
    align::{Alignment, LayerMapping},
    backend::DeviceChoice,
    builtin,
    eval::Watcher,
    fuser::{FusionMode, GateOverride},
    hub,
    pipeline::{ComputeType, FuserChoice},
};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    error::Error,
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Mutex, OnceLock},
    time::{Duration, Instant},
};

/// `--receiver`, `--sharer`, `--fuser`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct NamedModels {
    /// The model that answers: a folder, a .gguf file or hf:org/name
    #[arg(long, value_name = "PATH", help_heading = "Models")]
    pub receiver: Option<PathBuf>,
    /// A model that shares its cache; may be given several times
    #[arg(long, value_name = "PATH", help_heading = "Models")]
    pub sharer: Vec<PathBuf>,
    /// A trained fuser (folder), once for each sharer; or init[:SEED], an untrained one whose gates are closed
    #[arg(long, value_name = "PATH|init[:SEED]", help_heading = "Models")]
    pub fuser: Vec<FuserChoice>,
}

impl NamedModels {
    /// Whether nothing is named: then the built-in pair is meant.
    pub fn are_builtin(&self) -> bool {
        self.receiver.is_none() && self.sharer.is_empty() && self.fuser.is_empty()
    }

    /// The same as places on this machine (see [`hub::local`]).
    pub fn local(&self) -> Result<NamedModels, hub::Error> {
        if self.are_builtin() {
            return Ok(NamedModels {
                receiver: Some(builtin::path("receiver")),
                sharer: vec![builtin::path("sharer")],
                fuser: vec![FuserChoice::Load(builtin::path("fuser"))],
            });
        }
        Ok(NamedModels {
            receiver: self.receiver.as_deref().map(hub::local).transpose()?,
            sharer: self.sharer.iter().map(|path| hub::local(path)).collect::<Result<_, _>>()?,
            fuser: self.fuser.iter().map(FuserChoice::local).collect::<Result<_, _>>()?,
        })
    }
}

/// How caches are fused.
#[derive(Clone, Debug, clap::Args)]
pub struct FusingFlags {
    /// How sharer tokens are found for receiver tokens: span, first, longest or none
    #[arg(long, default_value_t, help_heading = "Fusing")]
    pub alignment: Alignment,
    /// Which sharer layer feeds which receiver layer, for --fuser init: last_aligned, k_nearest, depth_normalized
    #[arg(long, default_value_t = LayerMapping::LAST_ALIGNED, help_heading = "Fusing")]
    pub mapping: LayerMapping,
    /// learned, open, closed, a list of open layers such as 0-3,7, or a JSON file
    #[arg(long, default_value = "learned", value_name = "GATES", help_heading = "Fusing")]
    pub gates: GateOverride,
    /// Several sharers: each adds to the plain cache (parallel) or to what the one before made of it (sequential)
    #[arg(long, default_value_t, value_name = "parallel|sequential", help_heading = "Fusing")]
    pub multi_sharer: FusionMode,
}

/// What computes, and how exactly.
#[derive(Clone, Debug, clap::Args)]
pub struct MachineFlags {
    /// Caches and arithmetic: f32 (exact) or bf16 (fast)
    #[arg(long, value_enum, default_value = "bf16", help_heading = "Machine")]
    pub dtype: ComputeType,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", help_heading = "Machine")]
    pub device: DeviceChoice,
    /// CPU threads; 0 = all cores
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Machine")]
    pub threads: usize,
}

/// A bar a model, on a terminal; gone when dropped.
#[derive(Default)]
pub struct LoadingBar(Mutex<Option<ProgressBar>>);

impl LoadingBar {
    /// `done` of `total` bytes of the model at `path` are ready.
    pub fn show(&self, path: &Path, done: u64, total: u64) {
        if !io::stderr().is_terminal() {
            return;
        }
        let Ok(mut bar) = self.0.lock() else { return };
        let bar = bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes}");
            ProgressBar::new(total).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        bar.set_length(total);
        bar.set_message(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
        bar.set_position(done);
    }
}

impl Drop for LoadingBar {
    fn drop(&mut self) {
        if let Ok(Some(bar)) = self.0.get_mut() {
            bar.finish_and_clear();
        }
    }
}

/// What is asked, as it goes: a bar where there is a terminal, lines elsewhere.
#[derive(Default)]
pub struct Screen {
    bar: OnceLock<ProgressBar>,
    terminal: bool,
    last: Mutex<Option<Instant>>,
    loaded: Mutex<Option<PathBuf>>,
}

impl Screen {
    pub fn new() -> Screen {
        Screen { terminal: io::stderr().is_terminal(), ..Screen::default() }
    }

    /// Takes the bar away.
    pub fn clear(&self) {
        if let Some(bar) = self.bar.get() {
            bar.finish_and_clear();
        }
    }
}

impl Watcher for Screen {
    fn say(&self, text: &str) {
        match self.bar.get() {
            Some(bar) if self.terminal => bar.suspend(|| eprintln!("{text}")),
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

    fn progress(&self, done: usize, total: usize, accuracy: &str) {
        if self.terminal {
            let bar = self.bar.get_or_init(|| {
                // The template is fixed and known to be good.
                let style = ProgressStyle::with_template("{bar:20} {pos}/{len} {eta} left · {wide_msg}")
                    .unwrap_or_else(|_| ProgressStyle::default_bar());
                ProgressBar::new(0).with_style(style)
            });
            bar.set_length(total as u64);
            bar.set_position(done as u64);
            bar.set_message(accuracy.to_owned());
            return;
        }
        let Ok(mut last) = self.last.lock() else { return };
        if done == total || last.is_none_or(|last| last.elapsed() > Duration::from_secs(10)) {
            *last = Some(Instant::now());
            eprintln!("{done}/{total} {accuracy}");
        }
    }
}

/// Tells the error with its causes on standard error, for a program to end with.
pub fn failure(error: &dyn Error) -> ExitCode {
    let mut said = error.to_string();
    eprintln!("error: {said}");
    let mut source = error.source();
    while let Some(cause) = source {
        // Many errors tell their cause themselves.
        let cause_text = cause.to_string();
        if !said.contains(&cause_text) {
            eprintln!("  because: {cause_text}");
            said = cause_text;
        }
        source = cause.source();
    }
    ExitCode::FAILURE
}
