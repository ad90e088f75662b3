//! All findings on one page: Markdown that links the files, HTML that holds everything.

use super::{Error, Finding, Options};
use crate::{
    durable::WriteError,
    eval::{
        page::{begun, escaped},
        run::write_text,
    },
};
use serde_json::{Value, json};
use std::{collections::HashMap, fmt::Write as _, fs};

pub const MARKDOWN: &str = "report.md";
const HTML: &str = "report.html";

/// What was asked, as results say it.
fn asked(options: &Options, models: Value) -> Value {
    let session = &options.session;
    json!({
        "program": concat!("c2c ", env!("CARGO_PKG_VERSION")),
        "questions": options.questions.iter().map(|question| format!("{question:?}")).collect::<Vec<_>>(),
        "receiver": session.receiver,
        "sharers": session.sharers,
        "fusers": session.fusers.iter().map(|fuser| format!("{fuser:?}")).collect::<Vec<_>>(),
        "alignment": session.alignment.to_string(),
        "gates": format!("{:?}", session.gates),
        "dtype": session.dtype,
        "task": options.task.name,
        "limit": options.limit,
        "seed": options.seed,
        "models": models,
    })
}

/// Writes the folder.
pub fn write(options: &Options, findings: &[Finding], models: Value, seconds: f64) -> Result<(), Error> {
    let out = &options.out;
    fs::create_dir_all(out).map_err(WriteError::at(out))?;
    let asked = asked(options, models);
    let when = chrono::Local::now().format("%Y-%m-%d %H:%M");
    let mut markdown = format!("# {}\n\n{when}, {seconds:.0} s.\n", options.title);
    let mut html = begun(&options.title);
    let _ = writeln!(html, "<p class=quiet>{when}; {seconds:.0} s</p>\n<nav>");
    for finding in findings {
        let _ = writeln!(html, "<a href=\"#{0}\">{0}</a>", finding.question);
    }
    html += "</nav>\n";
    // A question may be asked twice, in two ways.
    let mut times: HashMap<&str, usize> = HashMap::new();
    for finding in findings {
        let time = times.entry(finding.question).or_default();
        *time += 1;
        let name = if *time == 1 { finding.question.into() } else { format!("{}_{time}", finding.question) };
        finding.write(out, &name)?;
        markdown += &finding.markdown();
        html += &finding.html();
    }
    let _ = write!(markdown, "\n## Asked\n\n```json\n{asked:#}\n```\n");
    let asked_html = escaped(&format!("{asked:#}"));
    let _ = writeln!(
        html,
        "<details><summary>What was asked</summary><pre>{asked_html}</pre></details>\n</body></html>"
    );
    write_text(&out.join(MARKDOWN), &markdown)?;
    Ok(write_text(&out.join(HTML), &html)?)
}
