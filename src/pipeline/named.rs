//! Models as a command line names them, and the bar that shows them load.

use super::FuserChoice;
use crate::{builtin, hub};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    sync::Mutex,
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
