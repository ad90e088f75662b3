//! Chat templates: Jinja as Hugging Face renders it (`apply_chat_template`).
//!
//! Blocks are trimmed, `raise_exception`, `strftime_now`, Python's `json.dumps` behind `tojson`, loop controls and
//! the methods of Python's `str`, `list` and `dict` are there. `{% generation %}` (a mask marker of training code)
//! is accepted and renders its body.

use std::fmt::Write as _;
use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Tuple, Value, ValueKind};
use minijinja::{Environment, ErrorKind};
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::Map;

use super::Error;

/// One message of a conversation. Fields beyond `role` and `content` (`tool_calls`, `reasoning_content`, …) are
/// kept and visible to the template.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    pub role: String,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub content: String,
    #[serde(flatten)]
    pub extra: Map<String, serde_json::Value>,
}

impl Message {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), extra: Map::new() }
    }
}

/// Assistant messages that only call tools have `"content": null`.
fn null_is_empty<'de, D: serde::Deserializer<'de>>(content: D) -> Result<String, D::Error> {
    Ok(Option::deserialize(content)?.unwrap_or_default())
}

/// What a template is rendered with, beside the messages.
#[derive(Clone, Debug, Default)]
pub struct TemplateOptions {
    /// End with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Only set where given: templates tell "false" from "not said".
    pub enable_thinking: Option<bool>,
    /// Further variables, e.g. `date_string`. They win over everything else but the messages.
    pub extra: Map<String, serde_json::Value>,
}

/// A compiled chat template with the special tokens it may print.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    origin: String,
    /// `bos_token`, `eos_token`, … → text; tokens that do not exist stay undefined and print nothing.
    tokens: Vec<(String, String)>,
}

const NAME: &str = "chat_template";

/// What the published evaluator falls back to for models without a template. The lines after the first carry
/// the four spaces of the Python source they were written in.
const HUMAN_ASSISTANT: &str = "{% for message in messages %}\
     {% if not loop.first %}{{ '\\n    ' }}{% endif %}\
     {% if message.role == 'user' %}{{ '### Human: ' + message.content }}\
     {% elif message.role == 'assistant' %}{{ '### Assistant: ' + message.content }}{% endif %}\
     {% endfor %}{% if add_generation_prompt %}{{ '\\n    ### Assistant:' }}{% endif %}";

impl ChatTemplate {
    /// Compiles `source`. `tokens` are the special tokens by their Hugging Face name (`bos_token`, `eos_token`, …);
    /// `origin` is the file that errors name.
    pub fn new(
        source: &str,
        tokens: impl IntoIterator<Item = (String, String)>,
        origin: &str,
    ) -> Result<Self, Error> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the default delimiters are valid"));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, _, value| {
            // Jinja prints undefined as nothing and everything else as Python's str().
            if value.is_undefined() {
                return Ok(());
            }
            let mut text = String::new();
            write_python(&mut text, value, false)?;
            Ok(out.write_str(&text)?)
        });
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);

        let template_error = |reason: minijinja::Error| Error::TemplateSyntax {
            origin: origin.into(),
            reason: chain(&reason),
        };
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(template_error)?;
        Ok(Self { environment, origin: origin.into(), tokens: tokens.into_iter().collect() })
    }

    /// The published fallback for models without a template: `### Human: …` / `### Assistant: …`.
    pub fn human_assistant() -> Self {
        Self::new(HUMAN_ASSISTANT, [], "the built-in human/assistant dialogue")
            .expect("the constant compiles")
    }

    /// What it was compiled from.
    pub fn source(&self) -> String {
        self.environment
            .get_template(NAME)
            .map_or_else(|_| String::new(), |template| template.source().into())
    }

    /// The conversation as the text that the model was trained to read.
    pub fn render(&self, messages: &[Message], options: &TemplateOptions) -> Result<String, Error> {
        let render_error = |reason: minijinja::Error| Error::TemplateRender {
            origin: self.origin.clone(),
            reason: chain(&reason),
        };
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| {
                let fields = [("role", &message.role), ("content", &message.content)];
                let fields = fields.map(|(name, text)| (Value::from(name), Value::from(text.as_str())));
                let extra =
                    message.extra.iter().map(|(name, value)| (Value::from(name.as_str()), to_value(value)));
                Value::from_pairs(fields.into_iter().chain(extra))
            })
            .collect();
        let mut context: Vec<(Value, Value)> = self
            .tokens
            .iter()
            .map(|(name, text)| (Value::from(name.as_str()), Value::from(text.as_str())))
            .collect();
        context.push(("tools".into(), Value::from(())));
        context.push(("documents".into(), Value::from(())));
        context.push(("add_generation_prompt".into(), options.add_generation_prompt.into()));
        if let Some(thinking) = options.enable_thinking {
            context.push(("enable_thinking".into(), thinking.into()));
        }
        context
            .extend(options.extra.iter().map(|(name, value)| (Value::from(name.as_str()), to_value(value))));
        context.push(("messages".into(), Value::from(messages)));

        let template = self.environment.get_template(NAME).map_err(render_error)?;
        template.render(Value::from_pairs(context)).map_err(render_error)
    }
}

/// `{% generation %}…{% endgeneration %}` marks the assistant's tokens for training; the text is its body.
fn without_generation_tags(source: &str) -> String {
    static OPEN: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*generation\s*([-+]?)%\}").expect("the pattern is valid"));
    static CLOSE: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}").expect("the pattern is valid")
    });
    let source = OPEN.replace_all(source, "{%$1 if true $2%}");
    CLOSE.replace_all(&source, "{%$1 endif $2%}").into_owned()
}

/// A minijinja error with its causes, in one line.
fn chain(error: &minijinja::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

fn to_value(json: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match json {
        Json::Null => Value::from(()),
        Json::Bool(bool) => Value::from(*bool),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::from(integer),
            (None, Some(integer)) => Value::from(integer),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => Value::from(items.iter().map(to_value).collect::<Vec<_>>()),
        Json::Object(map) => {
            Value::from_pairs(map.iter().map(|(name, value)| (Value::from(name.as_str()), to_value(value))))
        }
    }
}

fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(&format)).map_err(|_| {
        minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: bad format {format:?}"))
    })?;
    Ok(text)
}

/// `json.dumps(value, ensure_ascii=False, indent=…, separators=…, sort_keys=…)`, as Hugging Face's `tojson`.
fn tojson(value: Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let _: Option<bool> = options.get("ensure_ascii")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    if indent.is_some_and(|width| width > 64) {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "tojson: indent above 64"));
    }
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(_) => {
            return Err(minijinja::Error::new(
                ErrorKind::InvalidOperation,
                "tojson: separators must be a pair",
            ));
        }
        None if indent.is_some() => (",", ": "),
        None => (", ", ": "),
    };
    let mut text = String::new();
    Json { item, key, indent, sort_keys }.write(&mut text, &value, 0)?;
    // Marked safe like every filter of HF: there is no HTML here to escape.
    Ok(Value::from_safe_string(text))
}

struct Json<'a> {
    item: &'a str,
    key: &'a str,
    indent: Option<usize>,
    sort_keys: bool,
}

impl Json<'_> {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), minijinja::Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => write_number(out, value),
            ValueKind::String => write_json_string(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.block(out, '[', ']', &items, depth, |out, item| self.write(out, item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.block(out, '{', '}', &keys, depth, |out, key| {
                    match key.as_str() {
                        Some(name) => write_json_string(out, name),
                        None => write_json_string(out, &key.to_string()),
                    }
                    out.push_str(self.key);
                    self.write(out, &value.get_item(key)?, depth + 1)
                })?;
            }
            kind => {
                return Err(minijinja::Error::new(
                    ErrorKind::InvalidOperation,
                    format!("tojson: a value of type {kind} is not JSON"),
                ));
            }
        }
        Ok(())
    }

    fn block(
        &self,
        out: &mut String,
        open: char,
        close: char,
        items: &[Value],
        depth: usize,
        mut each: impl FnMut(&mut String, &Value) -> Result<(), minijinja::Error>,
    ) -> Result<(), minijinja::Error> {
        let line = |out: &mut String, depth: usize| {
            if let Some(width) = self.indent {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', width * depth));
            }
        };
        out.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                out.push_str(self.item);
            }
            line(out, depth + 1);
            each(out, item)?;
        }
        if !items.is_empty() {
            line(out, depth);
        }
        out.push(close);
        Ok(())
    }
}

/// As Python's `json` with `ensure_ascii=False`, which escapes what serde_json does: quotes, backslash and control
/// characters.
fn write_json_string(out: &mut String, text: &str) {
    out.push_str(&serde_json::Value::from(text).to_string());
}

/// A number as Python prints it: floats in scientific notation below 1e-4 and from 1e16 on.
fn write_number(out: &mut String, value: &Value) {
    let float = if value.is_integer() { None } else { f64::try_from(value.clone()).ok() };
    let scientific = float.filter(|float| float.is_finite()).map(|float| format!("{float:e}"));
    let parts = scientific.as_deref().and_then(|text| text.split_once('e'));
    let _ = match parts.and_then(|(digits, exponent)| Some((digits, exponent.parse::<i32>().ok()?))) {
        Some((digits, exponent)) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            write!(out, "{digits}e{sign}{:02}", exponent.abs())
        }
        _ => write!(out, "{value}"),
    };
}

/// `str(value)`, or `repr(value)` where `quoted`, of Python, for the types that JSON has.
fn write_python(out: &mut String, value: &Value, quoted: bool) -> Result<(), minijinja::Error> {
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => write_number(out, value),
        ValueKind::String if quoted => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
            out.push(quote);
            for char in text.chars() {
                match char {
                    '\\' => out.push_str("\\\\"),
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    char if char == quote => out.extend(['\\', char]),
                    char => out.push(char),
                }
            }
            out.push(quote);
        }
        ValueKind::String => out.push_str(value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            let (open, close) =
                if value.downcast_object_ref::<Tuple>().is_some() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            for (index, item) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                write_python(out, &item, true)?;
            }
            out.push(close);
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                write_python(out, &key, true)?;
                out.push_str(": ");
                write_python(out, &value.get_item(&key)?, true)?;
            }
            out.push('}');
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
    Ok(())
}
