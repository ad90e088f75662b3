//! How two tokenizers read the same text, by each alignment.

use super::{
    Error, Figure, Finding, Table,
    finding::{percent, rounded},
    probe::Probe,
    unread,
};
use crate::{
    align::{
        Alignment, AlignmentReport,
        report::{FailureKind, TEXTS, measure},
    },
    eval::figures::{Bar, bars},
    hub,
    model::gguf::Gguf,
    tokenizer::Tokenizer,
};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Two tokenizers by the files they lie in: tokenizer.json, a model's folder, a .gguf.
#[derive(Clone, Debug)]
pub struct Tokenizers {
    pub first: PathBuf,
    pub second: PathBuf,
    /// A text a line; a sample of several scripts if not given.
    pub text: Option<PathBuf>,
}

/// The tokenizer of a file or folder.
fn open(path: &Path) -> Result<Tokenizer, Error> {
    let path = hub::local(path)?;
    if path.is_dir() {
        return Ok(Tokenizer::from_folder(&path)?);
    }
    if path.extension().is_some_and(|extension| extension == "gguf") {
        let vocab = Gguf::open(&path)?.vocab();
        let vocab = vocab.map_err(|source| crate::model::Error::Gguf { path: path.clone(), source })?;
        return Ok(Tokenizer::from_gguf(&vocab)?);
    }
    Ok(Tokenizer::from_file(&path)?)
}

/// By what a person calls it: a folder's name for the tokenizer.json in it.
fn name(path: &Path) -> String {
    let own = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    match path.parent().and_then(Path::file_name) {
        Some(folder) if own == "tokenizer" => folder.to_string_lossy().into_owned(),
        _ => own,
    }
}

pub(super) fn of_files(given: &Tokenizers) -> Result<Finding, Error> {
    let texts = match &given.text {
        None => TEXTS.map(String::from).to_vec(),
        Some(path) => {
            let text = fs::read_to_string(path).map_err(unread(path))?;
            let lines: Vec<String> =
                text.lines().filter(|line| !line.trim().is_empty()).map(String::from).collect();
            if lines.is_empty() {
                return Err(Error::NoText { path: path.clone() });
            }
            lines
        }
    };
    let what = match &given.text {
        None => "a sample of several scripts".to_owned(),
        Some(path) => format!("the lines of {}", path.display()),
    };
    let both = [&given.first, &given.second];
    let opened = [open(both[0])?, open(both[1])?];
    found([&name(both[0]), &name(both[1])], [&opened[0], &opened[1]], &texts, &what)
}

pub(super) fn of_pair(probe: &mut Probe) -> Result<Finding, Error> {
    let sample = probe.sample();
    let texts: Vec<String> = sample
        .iter()
        .filter_map(|&index| probe.messages(index).last().map(|message| message.content.clone()))
        .collect();
    let session = &probe.models.pair.session;
    let receiver = session.receiver.as_ref().ok_or(crate::eval::Error::NoReceiver)?;
    let sharer = &session.sharers[0];
    let what = format!("the user's messages of {} questions of {}", texts.len(), probe.questions.task.name);
    found(
        [&name(&receiver.path), &name(&sharer.path)],
        [receiver.tokenizer()?, sharer.tokenizer()?],
        &texts,
        &what,
    )
}

const ALIGNMENTS: [Alignment; 3] = [Alignment::First, Alignment::Longest, Alignment::Span];

fn found(
    names: [&str; 2],
    tokenizers: [&Tokenizer; 2],
    texts: &[String],
    what: &str,
) -> Result<Finding, Error> {
    let head = [
        "Receiver → Sharer",
        "alignment",
        "success, %",
        "one to one, %",
        "one to many",
        "mean pieces",
        "most pieces",
        "BLEU-4",
        "character error, %",
        "Receiver's tokens",
        "Sharer's tokens",
        "no token",
        "broken character",
        "unknown special",
    ];
    let mut table = Table::new("tokenizers", "Each as the Receiver's, and each alignment.", &head);
    let head = ["Receiver → Sharer", "alignment", "text", "token", "Receiver's id", "spelled", "kind"];
    let mut failures = Table::new("tokenizers_failures", "Tokens that have no counterpart.", &head).long();
    let (mut drawn, mut said) = (Vec::new(), Vec::new());
    for (ours, theirs) in [(0, 1), (1, 0)] {
        let direction = format!("{} → {}", names[ours], names[theirs]);
        let (mut best, mut worst): (Option<AlignmentReport>, f64) = (None, 0.0);
        for alignment in ALIGNMENTS {
            let report = measure(tokenizers[ours], tokenizers[theirs], alignment, texts)?;
            let of =
                |kind: FailureKind| report.failures.iter().filter(|failure| failure.kind == kind).count();
            let tokens = report.receiver_tokens.max(1) as f64;
            let success = 1.0 - report.failures.len() as f64 / tokens;
            table.push([
                json!(direction),
                json!(report.alignment),
                rounded(100.0 * success),
                rounded(100.0 * report.one_to_one_rate()),
                json!(report.one_to_many),
                rounded(report.mean_pieces()),
                json!(report.most_pieces),
                rounded(report.bleu),
                rounded(100.0 * report.character_error_rate),
                json!(report.receiver_tokens),
                json!(report.sharer_tokens),
                json!(of(FailureKind::NoToken)),
                json!(of(FailureKind::BrokenCharacter)),
                json!(of(FailureKind::UnknownSpecial)),
            ]);
            for failure in &report.failures {
                failures.push([
                    json!(direction),
                    json!(report.alignment),
                    json!(failure.text),
                    json!(failure.token),
                    json!(failure.receiver_id),
                    json!(tokenizers[ours].token_of(failure.receiver_id)),
                    json!(failure.kind),
                ]);
            }
            drawn.push(Bar {
                name: format!("{} {}", if ours == 0 { "→" } else { "←" }, report.alignment),
                rate: success,
                low: report.one_to_one_rate(),
                high: success,
                quiet: ours == 1,
            });
            worst = worst.max(report.character_error_rate);
            if best.as_ref().is_none_or(|best| report.character_error_rate < best.character_error_rate) {
                best = Some(report);
            }
        }
        if let Some(best) = best {
            said.push(format!(
                "{direction}: {} misreads least, {} of the characters (at worst {}); {} of the tokens are one for one",
                best.alignment,
                percent(best.character_error_rate),
                percent(worst),
                percent(best.one_to_one_rate())
            ));
        }
    }
    Ok(Finding {
        question: "tokenizers",
        title: format!("{} and {} on the same text", names[0], names[1]),
        about: format!(
            "Over {what}. success: Receiver tokens that the Sharer can be told about. one to one: the same text is one token of the Sharer's. \
             one to many: it is cut into several. BLEU-4 and character error: what the Sharer reads, put back to text, against the original; a \
             tokenizer that drops case or accents is charged for that."
        ),
        said,
        tables: vec![table, failures],
        figures: vec![Figure::new(
            "tokenizers",
            "Success, with the share that is one to one as the lower end of the line",
            |ground| bars(&drawn, ground),
        )?],
    })
}
