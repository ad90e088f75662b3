//! One HTML page of several runs: no network, readable on a phone, in light and dark.

use super::{
    Error,
    figures::{self, Ground},
    report::{COLUMNS, LEGEND, by_task, cells, reasons, verdict},
    results::{Row, Summary},
};
use std::fmt::Write as _;

const STYLE: &str = ":root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;line-height:1.2}h2{font-size:1.25rem;margin-top:2.5rem}h3{font-size:1.05rem;margin-bottom:.3rem}
.wide{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid #8884}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:Canvas}
th{font-weight:600}tr.control td{opacity:.75}tr.control td:first-child{opacity:1}
.figures{display:flex;flex-wrap:wrap;gap:1.5rem}.figures svg{max-width:100%;height:auto;flex:0 1 27.5rem;min-width:0}.figures figure{margin:0;min-width:0}
.quiet{font-size:.875rem;opacity:.8}pre{overflow-x:auto;font-size:.8rem}
nav a{margin-right:1rem}";

pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn table(rows: &[&Row]) -> String {
    let mut html = String::from("<div class=wide><table><thead><tr>");
    for head in COLUMNS {
        // Writing to a string cannot fail, here and below.
        let _ = write!(html, "<th>{}</th>", escaped(head));
    }
    html += "</tr></thead><tbody>";
    for row in rows {
        html += if row.control { "<tr class=control>" } else { "<tr>" };
        for cell in cells(row) {
            let _ = write!(html, "<td>{}</td>", escaped(&cell));
        }
        html += "</tr>";
    }
    html + "</tbody></table></div>\n"
}

/// Accuracies of all runs side by side: a line a mode, a column a run and task.
fn comparison(summaries: &[Summary]) -> String {
    let mut modes: Vec<&str> = Vec::new();
    for row in summaries.iter().flat_map(|summary| &summary.rows) {
        if !modes.contains(&row.mode.as_str()) {
            modes.push(&row.mode);
        }
    }
    let columns: Vec<(usize, &Summary, &str)> = summaries
        .iter()
        .enumerate()
        .flat_map(|(run, summary)| {
            by_task(&summary.rows).into_iter().map(move |(task, _)| (run, summary, task))
        })
        .collect();
    let mut html = String::from("<h2>All runs</h2>\n<div class=wide><table><thead><tr><th>accuracy, %</th>");
    for (run, _, task) in &columns {
        let _ = write!(html, "<th>{}: {}</th>", run + 1, escaped(task));
    }
    html += "</tr></thead><tbody>";
    for mode in modes {
        let _ = write!(html, "<tr><td>{}</td>", escaped(mode));
        for (_, summary, task) in &columns {
            let row = summary.rows.iter().find(|row| row.mode == mode && row.task == *task);
            let _ = match row {
                Some(row) => write!(html, "<td>{:.1}</td>", 100.0 * row.accuracy()),
                None => write!(html, "<td>–</td>"),
            };
        }
        html += "</tr>";
    }
    html + "</tbody></table></div>\n"
}

/// Accuracy by subject, where a task has several.
fn subjects(rows: &[&Row]) -> String {
    let Some(first) = rows.iter().find(|row| row.subjects.len() > 1) else { return String::new() };
    let mut html = String::from(
        "<details><summary>By subject</summary><div class=wide><table><thead><tr><th>subject</th>",
    );
    for row in rows {
        let _ = write!(html, "<th>{}</th>", escaped(&row.mode));
    }
    html += "</tr></thead><tbody>";
    for subject in first.subjects.keys() {
        let _ = write!(html, "<tr><td>{}</td>", escaped(subject));
        for row in rows {
            let [right, asked] = row.subjects.get(subject).copied().unwrap_or_default();
            let _ = write!(html, "<td>{right} of {asked}</td>");
        }
        html += "</tr>";
    }
    html + "</tbody></table></div></details>\n"
}

/// The beginning of a page.
pub(crate) fn begun(title: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport content=\"width=device-width,initial-scale=1\">\n\
         <title>{0}</title><style>{STYLE}</style></head><body>\n<h1>{0}</h1>\n",
        escaped(title)
    )
}

/// The page.
pub fn html(summaries: &[Summary]) -> Result<String, Error> {
    let title = match summaries {
        [one] => one.title.clone(),
        all => format!("{} evaluations", all.len()),
    };
    let mut html = begun(&title);
    if summaries.len() > 1 {
        html += &comparison(summaries);
    }
    for (number, summary) in summaries.iter().enumerate() {
        if summaries.len() > 1 {
            let _ = writeln!(html, "<h2>{}: {}</h2>", number + 1, escaped(&summary.title));
        }
        let _ = writeln!(
            html,
            "<p class=quiet>{}; {}; {:.0} s</p>",
            escaped(&summary.started),
            escaped(&summary.device),
            summary.seconds
        );
        for (task, rows) in by_task(&summary.rows) {
            let _ = writeln!(html, "<h3>{}</h3>", escaped(task));
            html += &table(&rows);
            if let Some(verdict) = verdict(&rows) {
                let _ = writeln!(html, "<p>{}</p>", escaped(&verdict));
            }
            html += "<div class=figures>";
            html += &figures::accuracy(&rows, Ground::Page)?;
            html += &figures::tradeoff(&rows, Ground::Page)?.unwrap_or_default();
            html += "</div>\n";
            html += &subjects(&rows);
            let reasons = reasons(summary, task);
            if !reasons.is_empty() {
                html += "<details><summary>Left out</summary><ul>";
                for (reason, origins) in reasons {
                    let _ = write!(html, "<li>{}: {}</li>", escaped(&reason), escaped(&origins.join("; ")));
                }
                html += "</ul></details>\n";
            }
        }
        let _ = writeln!(
            html,
            "<details><summary>What was asked</summary><pre>{}</pre></details>",
            escaped(&format!("{:#}", summary.asked))
        );
    }
    let _ = writeln!(html, "<p class=quiet>{}</p>\n</body></html>", escaped(LEGEND));
    Ok(html)
}
