//! Named evaluations: the tables and figures of the paper (docs/paper.md).

use super::{Error, Mode, Task, mode};
use serde::Deserialize;

const BUNDLED: [(&str, &str); 9] = [
    ("main", include_str!("../../assets/paper/main.toml")),
    ("controls", include_str!("../../assets/paper/controls.toml")),
    ("fraction", include_str!("../../assets/paper/fraction.toml")),
    ("length", include_str!("../../assets/paper/length.toml")),
    ("pair", include_str!("../../assets/paper/pair.toml")),
    ("ablation", include_str!("../../assets/paper/ablation.toml")),
    ("identical", include_str!("../../assets/paper/identical.toml")),
    ("multi-sharer", include_str!("../../assets/paper/multi-sharer.toml")),
    ("math", include_str!("../../assets/paper/math.toml")),
];

/// A named evaluation.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preset {
    #[serde(skip)]
    pub name: String,
    /// What the paper shows with it.
    pub description: String,
    pub modes: String,
    /// Shares of the prompt that are fused, from either end.
    #[serde(default)]
    pub fractions: Vec<f64>,
    /// For models of one's own; the built-in pair has questions of its own.
    pub tasks: Vec<String>,
    /// Each task once for each of these lengths of its context, in tokens.
    #[serde(default)]
    pub context_tokens: Vec<usize>,
    /// Whether the built-in pair can be asked.
    #[serde(default = "yes")]
    pub builtin: bool,
}

fn yes() -> bool {
    true
}

pub fn names() -> impl Iterator<Item = &'static str> {
    BUNDLED.iter().map(|(name, _)| *name)
}

impl Preset {
    pub fn find(name: &str) -> Result<Preset, Error> {
        let found = BUNDLED.iter().find(|(bundled, _)| *bundled == name);
        let (name, text) = found.ok_or_else(|| Error::UnknownPreset {
            name: name.into(),
            known: names().collect::<Vec<_>>().join(", "),
        })?;
        let preset: Preset = toml::from_str(text).map_err(|error| Error::Definition {
            place: format!("preset {name}"),
            problem: error.to_string(),
        })?;
        Ok(Preset { name: (*name).into(), ..preset })
    }

    pub fn modes(&self) -> Result<Vec<Mode>, Error> {
        let mut modes = Mode::list(&self.modes)?;
        modes.extend(mode::fractions(&self.fractions));
        Ok(modes)
    }

    /// `builtin`: the built-in pair is asked.
    pub fn tasks(&self, builtin: bool) -> Result<Vec<Task>, Error> {
        if builtin && !self.builtin {
            let with = format!("--preset {}, which needs --receiver, --sharer and --fuser", self.name);
            return Err(Error::Combination { what: "the built-in pair", with });
        }
        let names = if builtin { vec!["builtin".to_owned()] } else { self.tasks.clone() };
        names.iter().map(|name| Task::find(name)).collect()
    }
}

/// Each task once for each length of its context.
pub fn at_lengths(tasks: Vec<Task>, lengths: &[usize]) -> Vec<Task> {
    if lengths.is_empty() {
        return tasks;
    }
    let at = |task: &Task, tokens: usize| Task {
        name: format!("{}@{tokens}", task.name),
        context_tokens: Some(tokens),
        ..task.clone()
    };
    tasks.iter().flat_map(|task| lengths.iter().map(move |&tokens| at(task, tokens))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_can_be_asked() {
        for name in names() {
            let preset = Preset::find(name).unwrap();
            assert!(
                !preset.modes().unwrap().is_empty() && !preset.tasks(false).unwrap().is_empty(),
                "{name}"
            );
            assert_eq!(preset.tasks(true).is_ok(), preset.builtin, "{name}");
        }
        let error = Preset::find("table3").unwrap_err().to_string();
        assert!(error.contains("main, controls, fraction"), "{error}");
        assert_eq!(at_lengths(vec![Task::find("leval").unwrap()], &[8, 16])[1].name, "leval@16");
    }
}
