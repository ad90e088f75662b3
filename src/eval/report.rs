//! Results for people: one table that says accuracy and latency, figures, a page.

use super::{
    Error, figures, page,
    results::{Row, Summary},
    run::write_text,
};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
};

pub const MARKDOWN: &str = "report.md";
pub const HTML: &str = "report.html";

/// Heads of the table's columns; what follows the first is aligned right.
pub const COLUMNS: [&str; 12] = [
    "mode",
    "accuracy",
    "95 %",
    "ms to answer",
    "right",
    "vs Receiver",
    "p",
    "gap",
    "Sharer ms",
    "Receiver ms",
    "fuse ms",
    "sent",
];

/// What the columns mean.
pub const LEGEND: &str = "95 %: Wilson's interval. ms to answer: to its first and, where it is generated, to its last token. vs Receiver: difference in \
     points with its interval by paired bootstrap. p: McNemar's exact test. gap: the part of the distance from Receiver to Sharer that is \
     closed. Times are means over questions, prefills one after the other; – where a cache came from disk, or nothing was done. sent: \
     bytes from model to model.";

/// The cells of a row.
pub fn cells(row: &Row) -> [String; 12] {
    let percent = |rate: f64| format!("{:.1}", 100.0 * rate);
    let time = |ms: Option<f64>| match ms {
        Some(ms) if ms > 0.0 => format!("{ms:.1}"),
        _ => "–".into(),
    };
    let versus = row.versus.as_ref();
    let first_last = match (row.cost.first_token_ms, row.cost.total_ms) {
        (None, _) => "–".into(),
        (Some(first), Some(last)) if last > first * 1.0001 => format!("{first:.1} / {last:.1}"),
        (Some(first), _) => format!("{first:.1}"),
    };
    [
        row.mode.clone(),
        format!("{} %", percent(row.accuracy())),
        format!("{} – {}", percent(row.low), percent(row.high)),
        first_last,
        format!("{} of {}", row.correct, row.asked),
        versus.map_or("–".into(), |v| {
            format!("{:+.1} ({:+.1} … {:+.1})", 100.0 * v.difference, 100.0 * v.low, 100.0 * v.high)
        }),
        versus.map_or("–".into(), |v| if v.p < 0.001 { "< 0.001".into() } else { format!("{:.3}", v.p) }),
        row.gap_recovered.map_or("–".into(), |gap| format!("{:.0} %", 100.0 * gap)),
        time(row.cost.sharer_ms),
        time(Some(row.cost.receiver_ms)),
        time(Some(row.cost.fuse_ms)),
        bytes(row.cost.bytes),
    ]
}

fn bytes(count: f64) -> String {
    match count {
        0.0 => "–".into(),
        count if count < 1e3 => format!("{count:.0} B"),
        count if count < 1e6 => format!("{:.1} kB", count / 1e3),
        count => format!("{:.2} MB", count / 1e6),
    }
}

/// Rows of one task, in their order.
pub fn by_task(rows: &[Row]) -> Vec<(&str, Vec<&Row>)> {
    let mut tasks: Vec<(&str, Vec<&Row>)> = Vec::new();
    for row in rows {
        match tasks.iter_mut().find(|(task, _)| *task == row.task) {
            Some((_, rows)) => rows.push(row),
            None => tasks.push((&row.task, vec![row])),
        }
    }
    tasks
}

/// A Markdown table whose columns also line up on a terminal.
pub fn table(rows: &[&Row]) -> String {
    let mut lines: Vec<Vec<String>> = vec![COLUMNS.map(String::from).to_vec()];
    lines.extend(rows.iter().map(|row| cells(row).to_vec()));
    aligned(&lines)
}

/// A Markdown table of `lines`, the heads first, whose columns also line up on a terminal.
pub(crate) fn aligned(lines: &[Vec<String>]) -> String {
    let columns = lines.first().map_or(0, Vec::len);
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        for (column, cell) in line.iter().enumerate() {
            // Writing to a string cannot fail, here and below.
            let _ = match column {
                0 => write!(text, "| {cell:<width$} ", width = widths[0]),
                _ => write!(text, "| {cell:>width$} ", width = widths[column]),
            };
        }
        text.push_str("|\n");
        if number == 0 {
            for (column, width) in widths.iter().enumerate() {
                let end = if column == 0 { "-" } else { ":" };
                let _ = write!(text, "|{}{end}", "-".repeat(width + 1));
            }
            text.push_str("|\n");
        }
    }
    text
}

/// What the controls say, in a sentence; `None` without them.
pub fn verdict(rows: &[&Row]) -> Option<String> {
    let c2c = rows.iter().find(|row| row.mode == "c2c")?;
    let receiver = rows.iter().find(|row| row.mode == "receiver")?;
    // Shuffled columns are the question's own: what they say is whether positions matter.
    let foreign = ["c2c-swap", "c2c-zero", "c2c-random", "c2c-generic"];
    let best = rows
        .iter()
        .filter(|row| foreign.contains(&row.mode.as_str()))
        .max_by(|a, b| a.accuracy().total_cmp(&b.accuracy()))?;
    let gain = 100.0 * (c2c.accuracy() - receiver.accuracy());
    let without = 100.0 * (best.accuracy() - receiver.accuracy());
    let significant = c2c.versus.as_ref().is_some_and(|versus| versus.p < 0.05);
    let mut said = format!("C2C is {gain:+.1} points from the Receiver");
    if !significant {
        said += ", which may be chance (p ≥ 0.05): there is nothing to explain.";
        return Some(said);
    }
    let _ = write!(
        said,
        "; the best control without the Sharer's cache of the question, {}, {without:+.1}. ",
        best.mode
    );
    said += if gain <= 0.0 {
        "The fuser harms."
    } else if without < 0.25 * gain {
        "So the gain is communication: without the Sharer's cache of this question it is not there."
    } else if without < 0.75 * gain {
        "So a part of the gain is not communication: it comes without the Sharer's cache of this question."
    } else {
        "So the gain is hardly communication: most of it comes without the Sharer's cache of this question."
    };
    Some(said)
}

/// Left out, by reason.
pub fn reasons(summary: &Summary, task: &str) -> BTreeMap<String, Vec<String>> {
    let mut reasons: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for excluded in summary.excluded.get(task).into_iter().flatten() {
        reasons.entry(excluded.reason.clone()).or_default().push(excluded.origin.clone());
    }
    reasons
}

/// As many places are named for each reason; all are in `summary.json`.
const NAMED: usize = 3;

/// The table and remarks of each task, as they are printed and written.
pub fn text(summary: &Summary) -> String {
    let mut text = String::new();
    for (task, rows) in by_task(&summary.rows) {
        let _ = write!(text, "\n## {task}\n\n{}", table(&rows));
        if let Some(verdict) = verdict(&rows) {
            let _ = write!(text, "\n{verdict}\n");
        }
        for row in &rows {
            if let (Some(routed), Some(router)) = (row.routed, &row.router) {
                let _ = write!(
                    text,
                    "\nThe router gave {routed} of {} questions to the Sharer; it learned from {} training questions, of which {} taught something, in {:.1} s.\n",
                    row.asked,
                    router.asked,
                    router.disagreed,
                    router.training_ms / 1e3
                );
            }
        }
        for (reason, origins) in reasons(summary, task) {
            let named = origins.iter().take(NAMED).cloned().collect::<Vec<_>>().join("; ");
            let more = if origins.len() > NAMED { "; …" } else { "" };
            let _ = write!(text, "\nLeft out, {}: {reason} ({named}{more})\n", origins.len());
        }
    }
    text
}

/// Writes `report.md` with its figures, and the same as one page, `report.html`.
pub fn write(summary: &Summary, out: &Path) -> Result<PathBuf, Error> {
    let mut markdown = format!(
        "# {}\n\n{}, {} on {}.\n",
        summary.title, summary.started, "bytes and times are means a question", summary.device
    );
    markdown += &text(summary);
    let _ = write!(markdown, "\n{LEGEND}\n");
    for (task, rows) in by_task(&summary.rows) {
        let stem = task.replace(|c: char| !c.is_alphanumeric() && !matches!(c, '_' | '-'), "_");
        let name = format!("accuracy_{stem}.svg");
        write_text(&out.join(&name), &figures::accuracy(&rows, figures::Ground::White)?)?;
        let _ = write!(markdown, "\n![Accuracy on {task}]({name})\n");
        if let Some(svg) = figures::tradeoff(&rows, figures::Ground::White)? {
            let name = format!("latency_{stem}.svg");
            write_text(&out.join(&name), &svg)?;
            let _ = write!(markdown, "\n![Accuracy and latency on {task}]({name})\n");
        }
    }
    let _ = write!(markdown, "\n## Asked\n\n```json\n{:#}\n```\n", summary.asked);
    let path = out.join(MARKDOWN);
    write_text(&path, &markdown)?;
    write_text(&out.join(HTML), &page::html(std::slice::from_ref(summary))?)?;
    Ok(path)
}

/// Merges the runs in `folders` to one page.
pub fn merge(folders: &[PathBuf], to: &Path) -> Result<(), Error> {
    let summaries = folders.iter().map(|folder| Summary::read(folder)).collect::<Result<Vec<_>, _>>()?;
    Ok(write_text(to, &page::html(&summaries)?)?)
}
