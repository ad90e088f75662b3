//! One line a question and mode, in lm-eval's shape, written as soon as it is known: a killed run goes on behind its last whole line.

use super::{Cost, Error, items::Item};
use crate::durable::WriteError;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

/// A question, answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// The question's number in its file.
    pub doc_id: usize,
    pub doc: Value,
    pub target: String,
    pub arguments: Value,
    pub resps: Value,
    pub filtered_resps: Value,
    pub filter: String,
    pub metrics: Vec<String>,
    pub doc_hash: String,
    pub prompt_hash: String,
    pub target_hash: String,
    pub acc: f64,
    /// Beyond lm-eval's: what was taken for the answer, in words.
    pub prediction: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub subject: Option<String>,
    pub origin: String,
    pub cost: Cost,
    /// Text-to-text's background; the model that the router picked.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub note: Option<String>,
}

pub fn sha256(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What was answered.
pub struct Answered {
    pub prompt: String,
    /// By logits: the log-probability of each letter, and whether it is the most probable token of all.
    pub letters: Option<Vec<(f64, bool)>>,
    pub text: Option<String>,
    pub most_tokens: usize,
    pub prediction: Option<String>,
    pub correct: bool,
    pub cost: Cost,
    pub note: Option<String>,
}

impl Sample {
    pub fn new(item: &Item, answered: &Answered) -> Sample {
        let mut arguments = serde_json::Map::new();
        let (resps, filtered) = match &answered.letters {
            Some(letters) => {
                let mut resps = Vec::new();
                for (index, (log_probability, greedy)) in letters.iter().enumerate() {
                    let choice = format!(" {}", super::items::letter(index));
                    arguments.insert(
                        format!("gen_args_{index}"),
                        json!({ "arg_0": answered.prompt, "arg_1": choice }),
                    );
                    resps.push(json!([log_probability.to_string(), greedy.to_string()]));
                }
                let each: Vec<Value> = resps.iter().map(|resp| json!([resp])).collect();
                (Value::from(each), Value::from(resps))
            }
            None => {
                let settings =
                    json!({ "until": [], "do_sample": false, "max_gen_toks": answered.most_tokens });
                arguments.insert("gen_args_0".into(), json!({ "arg_0": answered.prompt, "arg_1": settings }));
                (json!([[answered.text]]), json!([answered.prediction]))
            }
        };
        let target = item.target();
        Sample {
            doc_id: item.number,
            doc: item.doc.clone(),
            arguments: arguments.into(),
            resps,
            filtered_resps: filtered,
            filter: "none".into(),
            metrics: vec!["acc".into()],
            doc_hash: sha256(&item.doc.to_string()),
            prompt_hash: sha256(&answered.prompt),
            target_hash: sha256(&target),
            target,
            acc: f64::from(u8::from(answered.correct)),
            prediction: answered.prediction.clone(),
            subject: item.subject.clone(),
            origin: item.origin.clone(),
            cost: answered.cost.clone(),
            note: answered.note.clone(),
        }
    }

    pub fn correct(&self) -> bool {
        self.acc > 0.5
    }

    /// Without what only the file needs: rows may be long documents.
    fn light(mut self) -> Sample {
        (self.doc, self.arguments) = (Value::Null, Value::Null);
        self
    }
}

/// The whole lines of a file, and their length in bytes.
pub fn read(path: &Path) -> Result<(Vec<Sample>, usize), Error> {
    let bytes = fs::read(path).map_err(Error::read(path))?;
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    let mut samples = Vec::new();
    for (index, line) in bytes[..whole].split(|&byte| byte == b'\n').enumerate() {
        if line.is_empty() {
            continue;
        }
        let sample: Sample = serde_json::from_slice(line).map_err(|error| Error::Samples {
            path: path.into(),
            line: index + 1,
            problem: error.to_string(),
        })?;
        samples.push(sample.light());
    }
    Ok((samples, whole))
}

/// The samples of one mode and task.
pub struct SampleFile {
    path: PathBuf,
    file: File,
    /// Without rows and prompts.
    pub samples: Vec<Sample>,
}

impl SampleFile {
    /// Reads what is there; a torn last line is cut off.
    pub fn open(path: &Path) -> Result<SampleFile, Error> {
        let (samples, whole) = if path.exists() { read(path)? } else { Default::default() };
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(WriteError::at(path))?;
        file.set_len(whole as u64).map_err(WriteError::at(path))?;
        Ok(SampleFile { path: path.into(), file, samples })
    }

    pub fn has(&self, number: usize) -> bool {
        self.samples.iter().any(|sample| sample.doc_id == number)
    }

    /// One write a line: a kill tears the last one at most.
    pub fn add(&mut self, sample: Sample) -> Result<(), Error> {
        let mut line =
            serde_json::to_string(&sample).map_err(|error| WriteError::at(&self.path)(error.into()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(WriteError::at(&self.path))?;
        self.samples.push(sample.light());
        Ok(())
    }

    pub fn sync(&self) -> Result<(), Error> {
        Ok(self.file.sync_all().map_err(WriteError::at(&self.path))?)
    }
}
