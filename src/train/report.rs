//! What a run was, for people: a Markdown page with figures.

use super::{
    events::{Evaluation, Update},
    figures::{self, FigureError},
};
use crate::{
    durable::{self, WriteError},
    eval::statistics::wilson,
};
use serde_json::Value;
use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

/// Everything the report shows. Parts that are empty are left out.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// First line of the page.
    pub title: String,
    pub updates: Vec<Update>,
    pub evaluations: Vec<Evaluation>,
    /// One for each receiver layer.
    pub gates: Vec<GateStrength>,
    pub accuracy: Vec<AccuracyRow>,
    /// Configuration, hashes of models and data, seed, versions: whatever makes the run again.
    pub manifest: Value,
}

/// The trained gates of a receiver layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GateStrength {
    /// A positive logit is an open gate.
    pub key_logit: f32,
    pub value_logit: f32,
}

/// One way to answer the held-out questions.
#[derive(Clone, Debug, PartialEq)]
pub struct AccuracyRow {
    /// `receiver`, `sharer`, `t2t`, `c2c`, `c2c-swap`, ….
    pub mode: String,
    /// Which questions.
    pub data: String,
    pub correct: u64,
    /// Questions asked.
    pub asked: u64,
    pub milliseconds_an_answer: Option<f64>,
}

/// A report that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Figure(#[from] FigureError),
}

impl Report {
    pub const FILE: &str = "report.md";

    /// Writes `report.md` and its figures into an existing folder. The path of the page comes back.
    pub fn write(&self, folder: &Path) -> Result<PathBuf, ReportError> {
        let mut figures: Vec<(&str, &str, String)> = Vec::new();
        if !self.updates.is_empty() {
            figures.push(("Loss", "loss.svg", figures::loss(&self.updates, &self.evaluations)?));
            figures.push((
                "Learning rate and temperature",
                "schedule.svg",
                figures::schedule(&self.updates)?,
            ));
        }
        if !self.gates.is_empty() {
            figures.push(("Gates", "gates.svg", figures::gates(&self.gates)?));
        }
        for (_, name, svg) in &figures {
            write_text(&folder.join(name), svg)?;
        }
        let page = self.page(&figures);
        let path = folder.join(Self::FILE);
        write_text(&path, &page)?;
        Ok(path)
    }

    fn page(&self, figures: &[(&str, &str, String)]) -> String {
        let mut page = format!("# {}\n", self.title);
        if let Some(last) = self.updates.last() {
            let tokens: u64 = self.updates.iter().map(|update| update.tokens).sum();
            // Writing to a string cannot fail, here and below.
            let _ = write!(
                page,
                "\n{} updates ({:.2} epochs, {tokens} tokens) in {}; loss {:.4} at the end",
                last.step,
                last.epoch,
                duration(last.seconds),
                last.loss
            );
            let best = self.evaluations.iter().min_by(|a, b| a.loss.total_cmp(&b.loss));
            if let Some(best) = best {
                let _ = write!(page, ", held out {:.4} at best (after {} updates)", best.loss, best.step);
            }
            page.push_str(".\n");
        }
        if !self.accuracy.is_empty() {
            page.push_str("\n## Accuracy\n\n");
            page.push_str("| mode | data | right | asked | accuracy | 95 % interval | ms an answer |\n");
            page.push_str("|---|---|---:|---:|---:|---|---:|\n");
            for row in &self.accuracy {
                let (low, high) = wilson(row.correct, row.asked);
                let accuracy = match row.asked {
                    0 => "–".into(),
                    asked => format!("{:.1} %", 100.0 * row.correct as f64 / asked as f64),
                };
                let time = row.milliseconds_an_answer.map_or("–".into(), |time| format!("{time:.1}"));
                let _ = writeln!(
                    page,
                    "| {} | {} | {} | {} | {accuracy} | {:.1} – {:.1} % | {time} |",
                    cell(&row.mode),
                    cell(&row.data),
                    row.correct,
                    row.asked,
                    100.0 * low,
                    100.0 * high
                );
            }
        }
        for (title, name, _) in figures {
            let _ = write!(page, "\n## {title}\n\n![{title}]({name})\n");
        }
        if !self.gates.is_empty() {
            let open =
                |logit: fn(&GateStrength) -> f32| self.gates.iter().filter(|gate| logit(gate) > 0.0).count();
            let (keys, values) = (open(|gate| gate.key_logit), open(|gate| gate.value_logit));
            let layers = self.gates.len();
            let _ = write!(
                page,
                "\nOpen are {keys} of {layers} key gates and {values} of {layers} value gates.\n"
            );
        }
        if !self.manifest.is_null() {
            let _ = write!(page, "\n## Manifest\n\n```json\n{:#}\n```\n", self.manifest);
        }
        page
    }
}

fn write_text(path: &Path, text: &str) -> Result<(), WriteError> {
    durable::write(path, |out| out.write_all(text.as_bytes()).map_err(WriteError::at(path)))
}

/// A text that does not end a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match (whole / 3600, whole / 60 % 60) {
        (0, 0) => format!("{seconds:.1} s"),
        (0, minutes) => format!("{minutes} min {} s", whole % 60),
        (hours, minutes) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;

    fn report() -> Report {
        let updates = (1..=40).map(|step| Update {
            step,
            epoch: step as f64 / 20.0,
            loss: 4.0 / step as f64 + 0.3,
            learning_rate: 1e-4 * (40 - step) as f64 / 40.0,
            temperature: Some(0.001f64.powf(step as f64 / 40.0)),
            tokens: 100,
            seconds: 3.0 * step as f64,
            ..Update::default()
        });
        let evaluation = |step| Evaluation { step, loss: 5.0 / step as f64 + 0.4, ..Evaluation::default() };
        Report {
            title: "A run".into(),
            updates: updates.collect(),
            evaluations: vec![evaluation(20), evaluation(40)],
            gates: (0..12).map(|i| GateStrength { key_logit: i as f32 - 5.0, value_logit: 3.0 }).collect(),
            accuracy: vec![AccuracyRow {
                mode: "c2c".into(),
                data: "a|b".into(),
                correct: 8,
                asked: 10,
                milliseconds_an_answer: Some(12.34),
            }],
            manifest: json!({"seed": 42}),
        }
    }

    #[test]
    fn a_page_with_its_figures() {
        let folder = tempfile::tempdir().unwrap();
        let page = fs::read_to_string(report().write(folder.path()).unwrap()).unwrap();
        for part in [
            "# A run\n\n40 updates (2.00 epochs, 4000 tokens) in 2 min 0 s; loss 0.4000 at the end, held out 0.5250",
            "| c2c | a\\|b | 8 | 10 | 80.0 % | 49.0 – 94.3 % | 12.3 |",
            "![Loss](loss.svg)",
            "![Gates](gates.svg)",
            "Open are 6 of 12 key gates and 12 of 12 value gates.",
            "\"seed\": 42",
        ] {
            assert!(page.contains(part), "{page}\nshould have {part}");
        }
        for (name, words) in [
            ("loss.svg", ["held out", "training", "updates"]),
            ("schedule.svg", ["learning rate", "temperature", "updates"]),
            ("gates.svg", ["keys", "values", "receiver layer"]),
        ] {
            let svg = fs::read_to_string(folder.path().join(name)).unwrap();
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{name}");
            for word in words {
                assert!(svg.contains(word), "{name} has no `{word}`");
            }
            assert!(!svg.contains("NaN"), "{name}");
        }
    }

    #[test]
    fn runs_that_went_wrong_have_a_report_too() {
        let folder = tempfile::tempdir().unwrap();
        let page = fs::read_to_string(Report::default().write(folder.path()).unwrap()).unwrap();
        assert!(!page.contains(".svg"), "{page}");
        let update = |step, loss| Update { step, loss, ..Update::default() };
        for updates in [
            vec![update(1, f64::NAN)],
            vec![update(1, 2.0)],
            vec![update(1, 2.0), update(2, f64::INFINITY), update(3, 1.0)],
            vec![update(1, 0.0), update(2, 0.0)],
        ] {
            let gates = vec![GateStrength { key_logit: f32::NAN, value_logit: 0.0 }];
            let report = Report { updates, gates, ..Report::default() };
            report.write(folder.path()).unwrap();
            let svg = fs::read_to_string(folder.path().join("loss.svg")).unwrap();
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }
}
