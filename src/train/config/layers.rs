//! Configurations on top of each other: a preset, a file, settings of the command line.

use super::TrainConfig;
use crate::train::recipe::{self, RecipeError};
use std::{
    fs, io,
    path::{Path, PathBuf},
};
use toml::{Table, Value, de::DeTable};

/// A configuration that cannot be used. Messages of TOML carry line, column and the line itself.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{}: cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{origin}: {source}")]
    Toml { origin: String, source: Box<toml::de::Error> },
    #[error("{}: {source}", path.display())]
    Recipe { path: PathBuf, source: RecipeError },
    #[error("unknown preset `{name}`: use {}", preset_names().collect::<Vec<_>>().join(", "))]
    UnknownPreset { name: String },
    #[error("`{0}` is no setting: write KEY=VALUE, such as optimizer.learning_rate=1e-4")]
    Setting(String),
    #[error("{origin}: `{key}` {problem}")]
    Value { origin: String, key: &'static str, problem: String },
}

macro_rules! presets {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../../assets/presets/", $name, ".toml")))),*]
    };
}

const PRESETS: [(&str, &str); 5] =
    presets!["builtin", "builtin-receiver", "builtin-sharer", "choice", "published"];

/// What `--preset` knows.
pub fn preset_names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|(name, _)| *name)
}

/// Layers of settings; later ones win, key by key. A list replaces a list.
#[derive(Debug, Default)]
pub struct ConfigLayers {
    merged: Table,
    /// What errors name: where a layer is from, and its text for lines.
    origins: Vec<(String, String)>,
    notes: Vec<String>,
}

impl ConfigLayers {
    /// A named preset.
    pub fn preset(self, name: &str) -> Result<ConfigLayers, ConfigError> {
        let preset = PRESETS.iter().find(|(known, _)| *known == name);
        let (_, text) = preset.ok_or_else(|| ConfigError::UnknownPreset { name: name.into() })?;
        self.text(&format!("preset {name}"), text)
    }

    /// A TOML file, or a published recipe (.json).
    pub fn file(mut self, path: &Path) -> Result<ConfigLayers, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        if path.extension().is_none_or(|extension| extension != "json") {
            return self.text(&path.display().to_string(), &text);
        }
        let failed = |source| ConfigError::Recipe { path: path.into(), source };
        let (config, notes) = recipe::read(&text).map_err(failed)?;
        self.notes.extend(notes);
        let table =
            Table::try_from(config).map_err(|error| failed(RecipeError::Internal(error.to_string())))?;
        merge(&mut self.merged, table);
        self.origins.push((path.display().to_string(), String::new()));
        Ok(self)
    }

    /// TOML as text; `origin` is what errors name.
    pub fn text(mut self, origin: &str, text: &str) -> Result<ConfigLayers, ConfigError> {
        let failed = |source| ConfigError::Toml { origin: origin.into(), source: Box::new(source) };
        // Types and unknown keys are checked layer by layer, while lines are known.
        toml::from_str::<TrainConfig>(text).map_err(failed)?;
        merge(&mut self.merged, toml::from_str(text).map_err(failed)?);
        self.origins.push((origin.into(), text.into()));
        Ok(self)
    }

    /// `KEY=VALUE` of the command line: a dotted key and a TOML value; a value that is no TOML is a text.
    pub fn set(self, setting: &str) -> Result<ConfigLayers, ConfigError> {
        let (key, value) = setting.split_once('=').ok_or_else(|| ConfigError::Setting(setting.into()))?;
        let key = key.trim();
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
            return Err(ConfigError::Setting(setting.into()));
        }
        let as_written = format!("{key} = {value}");
        let text = match toml::from_str::<Table>(&as_written) {
            Ok(_) => as_written,
            Err(_) => format!("{key} = {}", Value::String(value.into())),
        };
        self.text(&format!("setting {setting}"), &text)
    }

    /// Everything together, checked.
    pub fn finish(self) -> Result<(TrainConfig, Vec<String>), ConfigError> {
        let named = self.origins.last().map_or("no configuration", |(origin, _)| origin).to_owned();
        let config: TrainConfig = self
            .merged
            .try_into()
            .map_err(|source| ConfigError::Toml { origin: named.clone(), source: Box::new(source) })?;
        match config.problem() {
            None => Ok((config, self.notes)),
            Some((key, problem)) => {
                // The last layer that has the key is the one to change.
                let place = self
                    .origins
                    .iter()
                    .rev()
                    .find_map(|(origin, text)| line_of(text, key).map(|line| format!("{origin}:{line}")));
                Err(ConfigError::Value { origin: place.unwrap_or(named), key, problem })
            }
        }
    }
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(into)), Value::Table(from)) => merge(into, from),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

/// The line of a TOML text, from 1, on which a dotted key lies.
fn line_of(text: &str, key: &str) -> Option<usize> {
    let document = DeTable::parse(text).ok()?;
    let (mut table, mut names) = (document.get_ref(), key.split('.').peekable());
    while let Some(name) = names.next() {
        let (found, value) = table.get_key_value(name)?;
        if names.peek().is_none() {
            return Some(1 + text[..found.span().start].matches('\n').count());
        }
        table = value.get_ref().as_table()?;
    }
    None
}
