//! What was found: sentences, tables, figures.

use super::Error;
use crate::{
    durable::{self, WriteError},
    eval::{
        figures::{FigureError, Ground},
        page::escaped,
        report::aligned,
        run::write_text,
    },
};
use serde_json::{Value, json};
use std::{fmt::Write as _, io, path::Path};

/// Numbers with heads. `name` is that of its file.
#[derive(Clone, Debug)]
pub struct Table {
    pub name: String,
    pub caption: String,
    pub head: Vec<String>,
    pub rows: Vec<Vec<Value>>,
    /// Too long to print: a file alone.
    pub long: bool,
}

/// A figure on white, for a file, and on the page's own ground.
#[derive(Clone, Debug)]
pub struct Figure {
    pub name: String,
    pub caption: String,
    white: String,
    page: String,
}

/// The answer to one question.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The sub-command.
    pub question: &'static str,
    pub title: String,
    /// What is measured, and how.
    pub about: String,
    /// What came out.
    pub said: Vec<String>,
    pub tables: Vec<Table>,
    pub figures: Vec<Figure>,
}

impl Table {
    pub fn new(name: &str, caption: &str, head: &[&str]) -> Table {
        let head = head.iter().map(|&head| head.into()).collect();
        Table { name: name.into(), caption: caption.into(), head, rows: Vec::new(), long: false }
    }

    /// The same as a file alone.
    pub fn long(self) -> Table {
        Table { long: true, ..self }
    }

    pub fn push<const N: usize>(&mut self, row: [Value; N]) {
        self.rows.push(row.to_vec());
    }

    fn lines(&self) -> Vec<Vec<String>> {
        let rows = self.rows.iter().map(|row| row.iter().map(shown).collect());
        std::iter::once(self.head.clone()).chain(rows).collect()
    }

    fn html(&self) -> String {
        let mut html = format!("<p>{}</p><div class=wide><table><thead><tr>", escaped(&self.caption));
        for (number, line) in self.lines().iter().enumerate() {
            let tag = if number == 0 { "th" } else { "td" };
            html += if number == 0 { "" } else { "<tr>" };
            for cell in line {
                // Writing to a string cannot fail, here and below.
                let _ = write!(html, "<{tag}>{}</{tag}>", escaped(cell));
            }
            html += if number == 0 { "</tr></thead><tbody>" } else { "</tr>" };
        }
        html + "</tbody></table></div>\n"
    }

    fn write(&self, path: &Path) -> Result<(), WriteError> {
        let cell = |value: &Value| match value {
            Value::Null => String::new(),
            Value::String(text) => text.clone(),
            value => value.to_string(),
        };
        durable::write(path, |out| {
            let mut csv = csv::Writer::from_writer(out);
            let failed = |error: csv::Error| WriteError::at(path)(io::Error::other(error));
            csv.write_record(&self.head).map_err(failed)?;
            for row in &self.rows {
                csv.write_record(row.iter().map(cell)).map_err(failed)?;
            }
            csv.flush().map_err(WriteError::at(path))
        })
    }
}

/// As many digits as are worth reading.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "–".into(),
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_f64() => digits(number.as_f64().unwrap_or_default()),
        value => value.to_string(),
    }
}

/// A number in words: four digits, of a small one three decimals.
pub fn digits(number: f64) -> String {
    match number.abs() {
        0.0 => "0".into(),
        size if (1e-4..1e6).contains(&size) => {
            let whole = size.log10().floor().max(0.0) as usize;
            format!("{number:.*}", 3usize.saturating_sub(whole))
        }
        _ => format!("{number:.2e}"),
    }
}

/// How probable chance is, in words.
pub fn chance(p: f64) -> String {
    if p < 0.001 { "p < 0.001".into() } else { format!("p = {p:.3}") }
}

/// Percent with one decimal.
pub fn percent(rate: f64) -> String {
    format!("{:.1} %", 100.0 * rate)
}

/// To a number of decimals that says what `value` says: files keep no noise of the arithmetic.
pub fn rounded(value: f64) -> Value {
    let scale = 1e6;
    if value.is_finite() { json!((value * scale).round() / scale) } else { Value::Null }
}

impl Figure {
    pub fn new(
        name: &str,
        caption: &str,
        draw: impl Fn(Ground) -> Result<String, FigureError>,
    ) -> Result<Figure, FigureError> {
        let (white, page) = (draw(Ground::White)?, draw(Ground::Page)?);
        Ok(Figure { name: name.into(), caption: caption.into(), white, page })
    }
}

impl Finding {
    /// As Markdown, without figures.
    pub fn text(&self) -> String {
        let mut text = format!("\n## {}: {}\n\n{}\n", self.question, self.title, self.about);
        for said in &self.said {
            let _ = write!(text, "\n- {said}");
        }
        if !self.said.is_empty() {
            text.push('\n');
        }
        for table in self.tables.iter().filter(|table| !table.long) {
            let _ = write!(text, "\n{}\n\n{}", table.caption, aligned(&table.lines()));
        }
        text
    }

    /// The same with its figures and files.
    pub(super) fn markdown(&self) -> String {
        let mut text = self.text();
        for Figure { name, caption, .. } in &self.figures {
            let _ = write!(text, "\n![{caption}]({name}.svg)\n");
        }
        let files: Vec<String> =
            self.tables.iter().map(|table| format!("[{0}.csv]({0}.csv)", table.name)).collect();
        let _ = write!(text, "\nData: {}\n", files.join(", "));
        text
    }

    pub(super) fn html(&self) -> String {
        let mut html = format!(
            "<h2 id=\"{0}\">{1}</h2>\n<p class=quiet>{2}</p>\n",
            self.question,
            escaped(&self.title),
            escaped(&self.about)
        );
        if !self.said.is_empty() {
            html += "<ul>";
            for said in &self.said {
                let _ = write!(html, "<li>{}</li>", escaped(said));
            }
            html += "</ul>\n";
        }
        html += "<div class=figures>";
        for Figure { caption, page, .. } in &self.figures {
            let _ = write!(
                html,
                "<figure>{page}<figcaption class=quiet>{}</figcaption></figure>",
                escaped(caption)
            );
        }
        html += "</div>\n";
        for table in self.tables.iter().filter(|table| !table.long) {
            html += &table.html();
        }
        html
    }

    /// Writes its tables, figures, and all but long tables as JSON.
    pub(super) fn write(&self, out: &Path, name: &str) -> Result<(), Error> {
        let mut tables = Vec::new();
        for table in &self.tables {
            table.write(&out.join(format!("{}.csv", table.name)))?;
            if !table.long {
                tables.push(json!({
                    "name": table.name, "caption": table.caption, "columns": table.head, "rows": table.rows,
                }));
            }
        }
        for figure in &self.figures {
            write_text(&out.join(format!("{}.svg", figure.name)), &figure.white)?;
        }
        let found = json!({
            "question": self.question, "title": self.title, "about": self.about, "said": self.said, "tables": tables,
        });
        Ok(write_text(&out.join(format!("{name}.json")), &format!("{found:#}\n"))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (number, said) in [
            (0.0, "0"),
            (1.0, "1.000"),
            (12.3456, "12.35"),
            (-123.456, "-123.5"),
            (4321.9, "4322"),
            (0.01234, "0.012"),
            (1e-7, "1.00e-7"),
        ] {
            assert_eq!(digits(number), said);
        }
        assert_eq!(shown(&json!(7)), "7");
        assert_eq!(shown(&Value::Null), "–");
    }
}
