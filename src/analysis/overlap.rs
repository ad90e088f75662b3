//! Who is right: Receiver, Sharer, C2C.

use super::{
    Error, Figure, Finding, Table,
    figures::venn,
    finding::{percent, rounded},
    probe::Probe,
    unread,
};
use crate::eval::{Mode, answering::Asker, results::file_name, samples};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

const NAMES: [&str; 3] = ["Receiver", "Sharer", "C2C"];
const MODES: [&str; 3] = ["receiver", "sharer", "c2c"];

/// By question: whether each was right.
type Answers = Vec<(usize, [bool; 3])>;

pub(super) fn ask(probe: &mut Probe) -> Result<Finding, Error> {
    let sample = probe.sample();
    let mut answers = Vec::new();
    for (done, &index) in sample.iter().enumerate() {
        let mut asker = Asker::new(&probe.options, &probe.questions, &mut probe.models, None);
        let mut right = [false; 3];
        for (right, mode) in right.iter_mut().zip([Mode::Receiver, Mode::Sharer(0), Mode::C2C]) {
            *right = asker.answer(mode, false, index)?.correct;
        }
        answers.push((probe.questions.items[index].number, right));
        probe.watcher.progress(done + 1, sample.len(), "overlap");
    }
    found(&answers, &format!("{} questions of {}", answers.len(), probe.questions.task.name))
}

/// The same of what `evaluate` left in `folder`.
pub(super) fn of_files(folder: &Path, task: Option<&str>) -> Result<Finding, Error> {
    let mut by_mode = Vec::new();
    let mut tasks = BTreeSet::new();
    for mode in MODES {
        let mut files = files(&folder.join(mode))?;
        files.retain(|name, _| task.is_none_or(|task| *name == file_name(task)));
        if files.is_empty() {
            return Err(Error::NoAnswers { folder: folder.into(), mode, task: task.map(Into::into) });
        }
        tasks.extend(files.keys().cloned());
        by_mode.push(files);
    }
    if tasks.len() > 1 {
        return Err(Error::SeveralTasks { folder: folder.into(), tasks: tasks.into_iter().collect() });
    }
    let mut right: BTreeMap<usize, Vec<bool>> = BTreeMap::new();
    for (before, files) in by_mode.iter().enumerate() {
        for path in files.values() {
            for sample in samples::read(path)?.0 {
                let own = right.entry(sample.doc_id).or_default();
                // A question that one before was not asked is none of all three.
                if own.len() == before {
                    own.push(sample.correct());
                }
            }
        }
    }
    let answers: Answers =
        right.into_iter().filter_map(|(number, right)| Some((number, right.try_into().ok()?))).collect();
    if answers.is_empty() {
        return Err(Error::NothingShared { folder: folder.into() });
    }
    let task = tasks.into_iter().next().unwrap_or_default();
    found(&answers, &format!("{} questions of {task}, as evaluated in {}", answers.len(), folder.display()))
}

/// Files of answers of a mode, by task.
fn files(folder: &Path) -> Result<BTreeMap<String, PathBuf>, Error> {
    let mut files = BTreeMap::new();
    if !folder.is_dir() {
        return Ok(files);
    }
    for entry in fs::read_dir(folder).map_err(unread(folder))? {
        let path = entry.map_err(unread(folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let inner = name.strip_prefix("samples_").and_then(|rest| rest.strip_suffix(".jsonl"));
        // samples_TASK_TIME.jsonl
        if let Some((task, _)) = inner.and_then(|inner| inner.rsplit_once('_')) {
            files.insert(task.to_owned(), path);
        }
    }
    Ok(files)
}

/// Questions in each region: bit 0 is the Receiver, bit 1 the Sharer, bit 2 C2C.
fn regions(answers: &Answers) -> [u64; 8] {
    let mut counts = [0; 8];
    for (_, right) in answers {
        counts[right.iter().enumerate().map(|(bit, right)| usize::from(*right) << bit).sum::<usize>()] += 1;
    }
    counts
}

fn found(answers: &Answers, of: &str) -> Result<Finding, Error> {
    let counts = regions(answers);
    let total = answers.len() as u64;
    let mut table = Table::new(
        "overlap",
        "How many questions each region holds.",
        &["Receiver", "Sharer", "C2C", "questions", "share, %"],
    );
    for region in (0..8usize).rev() {
        let right = |bit: usize| json!(if region >> bit & 1 == 1 { "right" } else { "wrong" });
        let share = 100.0 * counts[region] as f64 / total.max(1) as f64;
        table.push([right(0), right(1), right(2), json!(counts[region]), rounded(share)]);
    }
    let mut each =
        Table::new("overlap_questions", "Every question.", &["question", "receiver", "sharer", "c2c"]).long();
    for (number, right) in answers {
        let of = |at: usize| json!(u8::from(right[at]));
        each.push([json!(number), of(0), of(1), of(2)]);
    }
    let mut said = Vec::new();
    let accuracy = |bit: usize| {
        let right: u64 =
            (0..8).filter(|region| region >> bit & 1 == 1).map(|region: usize| counts[region]).sum();
        format!("{} {}", NAMES[bit], percent(right as f64 / total.max(1) as f64))
    };
    said.push((0..3).map(accuracy).collect::<Vec<_>>().join(", "));
    for (who, region, what) in [
        ("only the Sharer is right", 0b010, "C2C is too"),
        ("only the Receiver is right", 0b001, "C2C keeps it"),
        ("both are right", 0b011, "C2C is too"),
        ("neither is right", 0b000, "C2C is"),
    ] {
        let (with, without) = (counts[region | 0b100], counts[region]);
        let all = with + without;
        said.push(match all {
            0 => format!("there is no question of which {who}"),
            _ => format!("of {all} of which {who}, {what} in {with}: {}", percent(with as f64 / all as f64)),
        });
    }
    Ok(Finding {
        question: "overlap",
        title: "who is right".into(),
        about: format!("Receiver alone, Sharer alone, and C2C on the same {of}."),
        said,
        tables: vec![table, each],
        figures: vec![Figure::new("overlap", "Questions answered right", |ground| {
            venn(NAMES, counts, ground)
        })?],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_hold_every_question_once() {
        let answers: Answers = (0..16).map(|n| (n, [n & 1 == 1, n & 2 == 2, n & 4 == 4])).collect();
        assert_eq!(regions(&answers), [2; 8]);
        let found = found(&answers, "16").unwrap();
        assert_eq!(found.tables[0].rows.iter().map(|row| row[3].as_u64().unwrap()).sum::<u64>(), 16);
        assert!(found.said[0].contains("C2C 50.0 %"), "{:?}", found.said);
        assert!(found.said[1].contains("of 4 of which only the Sharer is right, C2C is too in 2: 50.0 %"));
    }
}
