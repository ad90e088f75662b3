//! `serve-local doctor`: whether two models and a fuser can work together, item by item.
//!
//! Three questions: can each model be used, was the fuser made for these two (see [`crate::fuser::check_contract`]), and does
//! the Sharer read what the Receiver reads (see [`crate::align::report`]). Everything is looked at, whatever fails first.

use crate::{
    align::{
        Aligner, Alignment, ChatOptions, LayerMapping,
        report::{self, TEXTS},
    },
    backend::{self, Backend, DeviceChoice, Precision},
    fuser::{Fuser, GateOverride, check_contract},
    pipeline::{FuserChoice, Model, Prompt},
    tokenizer::{Message, TemplateOptions, Tokenizer},
};
use std::{fmt, path::Path, sync::Arc};

/// What is examined.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    pub receiver: &'a Path,
    pub sharer: &'a Path,
    pub fuser: &'a FuserChoice,
    pub alignment: Alignment,
    pub gates: &'a GateOverride,
}

/// Whether an item is as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    Fits,
    /// It works, but perhaps not as wished.
    Note,
    /// It cannot work.
    Fails,
}

/// One thing of both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    pub name: String,
    /// Of the receiver, or what the fuser was made for.
    pub left: String,
    /// Of the sharer, or what is there.
    pub right: String,
    pub verdict: Verdict,
}

/// Items of one question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    pub title: &'static str,
    /// What [`Item::left`] and [`Item::right`] are.
    pub sides: [&'static str; 2],
    pub items: Vec<Item>,
}

/// Everything that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkup {
    pub sections: Vec<Section>,
}

impl Checkup {
    /// The worst of all items.
    pub fn verdict(&self) -> Verdict {
        let items = self.sections.iter().flat_map(|section| &section.items);
        items.map(|item| item.verdict).max().unwrap_or(Verdict::Fits)
    }
}

/// Looks at everything. Models are opened on the CPU, whatever device will serve them.
///
/// # Errors
/// If there is no CPU to open; what is wrong with the pair is in the result.
pub fn examine(pair: &Pair) -> Result<Checkup, backend::Error> {
    let backend = backend::open(DeviceChoice::Cpu, 0)?;
    let open = |path: &Path| Model::load(path, &backend, Precision::Fast, &|_, _| {});
    let (receiver, sharer) = (open(pair.receiver), open(pair.sharer));
    let both = [&receiver, &sharer];
    let mut sections = vec![models(both)];
    if let (Ok(receiver), Ok(sharer)) = (&receiver, &sharer) {
        sections.push(fuser(pair, receiver, sharer, &backend));
        if let (Some(ours), Some(theirs)) = (&receiver.tokenizer, &sharer.tokenizer) {
            sections.push(reading(pair.alignment, ours, theirs));
        }
    }
    Ok(Checkup { sections })
}

fn item(name: &str, sides: [String; 2], verdict: Verdict) -> Item {
    let [left, right] = sides;
    Item { name: name.into(), left, right, verdict }
}

fn fits(yes: bool) -> Verdict {
    if yes { Verdict::Fits } else { Verdict::Fails }
}

type Opened = Result<Model, crate::pipeline::Error>;

/// What each model is. Models need not be alike; they have to be usable.
fn models(both: [&Opened; 2]) -> Section {
    let mut items = Vec::new();
    let opened = both.map(|model| match model {
        Ok(model) => model.decoder.config.architecture.clone(),
        Err(error) => error.to_string(),
    });
    items.push(item("family", opened, fits(both.iter().all(|model| model.is_ok()))));
    type Say = fn(&Model) -> String;
    let facts: [(&str, Say); 5] = [
        ("layers", |m| m.decoder.config.layers.to_string()),
        ("KV heads × head_dim", |m| {
            format!("{} × {}", m.decoder.config.kv_heads, m.decoder.config.head_dim)
        }),
        ("rope", |m| m.decoder.config.rope_in_words()),
        ("context", |m| format!("{} tokens", m.decoder.config.context_length)),
        ("vocabulary", |m| format!("{} tokens", m.decoder.config.vocab)),
    ];
    for (name, say) in facts {
        items.push(item(name, both.map(|model| model.as_ref().map_or("—".into(), say)), Verdict::Fits));
    }
    let tokenizers = both.map(|model| model.as_ref().ok().and_then(|model| model.tokenizer.as_ref()));
    let said = tokenizers.map(|tokenizer| match tokenizer {
        Some(tokenizer) => format!("{} tokens", tokenizer.vocab_size()),
        None => "none: put tokenizer.json beside the weights".into(),
    });
    items.push(item("tokenizer", said, fits(tokenizers.iter().all(Option::is_some))));
    let templates = tokenizers.map(rendered);
    let verdict = if templates.iter().all(Result::is_ok) { Verdict::Fits } else { Verdict::Note };
    items.push(item("chat template", templates.map(|said| said.unwrap_or_else(|problem| problem)), verdict));
    Section { title: "models", sides: ["Receiver", "Sharer"], items }
}

fn conversation() -> [Message; 2] {
    [Message::new("system", "Answer briefly."), Message::new("user", TEXTS[0])]
}

fn template() -> TemplateOptions {
    TemplateOptions { add_generation_prompt: true, ..TemplateOptions::default() }
}

fn rendered(tokenizer: Option<&Tokenizer>) -> Result<String, String> {
    let tokenizer = tokenizer.ok_or("—")?;
    tokenizer.chat_template().ok_or("none: only plain text can be continued")?;
    match tokenizer.render(&conversation(), &template()) {
        Ok(_) => Ok("renders".into()),
        // Some templates have no place for a system message.
        Err(error) => match tokenizer.render(&conversation()[1..], &template()) {
            Ok(_) => Err("renders, but takes no system message".into()),
            Err(_) => Err(error.to_string()),
        },
    }
}

/// Whether the fuser was made for these two.
fn fuser(pair: &Pair, receiver: &Model, sharer: &Model, backend: &Arc<dyn Backend>) -> Section {
    let mut section = Section { title: "fuser", sides: ["made for", "found"], items: Vec::new() };
    let FuserChoice::Load(path) = pair.fuser else {
        let mapping = LayerMapping::LAST_ALIGNED.to_string();
        let sides = [format!("this pair, layers mapped by {mapping}"), "untrained: changes nothing".into()];
        section.items.push(item("weights", sides, Verdict::Note));
        return section;
    };
    let fuser = match Fuser::load(path, backend) {
        Ok(fuser) => fuser,
        Err(error) => {
            section.items.push(item("weights", ["a fuser".into(), error.to_string()], Verdict::Fails));
            return section;
        }
    };
    let contract = check_contract(fuser.config(), &receiver.party(), &sharer.party());
    section.items.extend(
        contract.into_iter().map(|found| item(&found.name, [found.expected, found.found], fits(found.ok))),
    );
    let gates = match fuser.gates_with(pair.gates) {
        Ok(gates) => {
            let open = gates.iter().flatten().filter(|gate| **gate > 0.0).count();
            let verdict = if open > 0 { Verdict::Fits } else { Verdict::Note };
            item("open gates", [format!("{} gates", 2 * gates.len()), format!("{open} open")], verdict)
        }
        Err(error) => item("open gates", ["—".into(), error.to_string()], Verdict::Fails),
    };
    section.items.push(gates);
    section
}

/// Whether the sharer reads what the receiver reads.
fn reading(alignment: Alignment, receiver: &Tokenizer, sharer: &Tokenizer) -> Section {
    let mut items = Vec::new();
    match report::measure(receiver, sharer, alignment, &TEXTS) {
        Ok(found) => {
            let sides = [found.receiver_tokens, found.sharer_tokens].map(|tokens| tokens.to_string());
            items.push(item("tokens of the sample", sides, Verdict::Fits));
            let note = |well| if well { Verdict::Fits } else { Verdict::Note };
            let share = format!("{:.1} %", 100.0 * found.one_to_one_rate());
            items.push(item("one token for one", ["as many as can be".into(), share], Verdict::Fits));
            let failures = found.failures.len();
            items.push(item(
                "tokens without counterpart",
                ["0".into(), failures.to_string()],
                note(failures == 0),
            ));
            let errors = format!("{:.1} %", 100.0 * found.character_error_rate);
            // Ids that mean something else to the sharer: it reads noise.
            let verdict = match alignment {
                Alignment::None => fits(found.character_error_rate == 0.0),
                _ => note(found.character_error_rate < 0.01),
            };
            items.push(item("characters read wrongly", ["0.0 %".into(), errors], verdict));
        }
        Err(error) => {
            items.push(item("tokens of the sample", ["readable".into(), error.to_string()], Verdict::Fails));
        }
    }
    items.push(fused(alignment, receiver, sharer));
    Section { title: alignment_title(alignment), sides: ["wanted", "found"], items }
}

fn alignment_title(alignment: Alignment) -> &'static str {
    match alignment {
        Alignment::None => "alignment none",
        Alignment::First => "alignment first",
        Alignment::Longest => "alignment longest",
        Alignment::Span => "alignment span",
    }
}

/// How much of a question, as a conversation in both templates, would be fused.
fn fused(alignment: Alignment, receiver: &Tokenizer, sharer: &Tokenizer) -> Item {
    const NAME: &str = "tokens of a question that are fused";
    let options = ChatOptions { template: template(), open_last: false };
    let aligned = Aligner::new(receiver, std::slice::from_ref(sharer), alignment)
        .and_then(|aligner| aligner.chat(&conversation()[1..], &options));
    let aligned = match aligned {
        Ok(aligned) => aligned,
        Err(error) => return item(NAME, ["some".into(), error.to_string()], Verdict::Fails),
    };
    let remarks: Vec<String> = aligned.remarks.iter().map(ToString::to_string).collect();
    let question = aligned.message_mask.iter().filter(|message| **message).count();
    let prompt = Prompt::from(aligned);
    let mut start = 0;
    let mut fused = 0;
    for section in &prompt.sections[..prompt.sections.len().saturating_sub(1)] {
        let columns = prompt.sharers[0].columns.iter().skip(start).take(section.len);
        fused += columns.filter(|column| section.sharer_mask & 1 == 1 && column.is_some()).count();
        start += section.len;
    }
    let found = std::iter::once(fused.to_string()).chain(remarks.iter().cloned()).collect::<Vec<_>>();
    let verdict = match fused {
        0 => Verdict::Fails,
        _ if remarks.is_empty() => Verdict::Fits,
        _ => Verdict::Note,
    };
    item(NAME, [question.to_string(), found.join("; ")], verdict)
}

impl fmt::Display for Checkup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let length = |text: &str| text.chars().count();
        let all = || self.sections.iter().flat_map(|section| &section.items);
        let name = all().map(|item| length(&item.name)).max().unwrap_or(0);
        let left = all().map(|item| length(&short(&item.left))).max().unwrap_or(0).clamp(8, 44);
        for section in &self.sections {
            let [a, b] = section.sides;
            writeln!(f, "      {:<name$}  {a:<left$}  {b}", section.title)?;
            for item in &section.items {
                let mark = match item.verdict {
                    Verdict::Fits => "ok",
                    Verdict::Note => "note",
                    Verdict::Fails => "FAIL",
                };
                let (a, b) = (short(&item.left), short(&item.right));
                writeln!(f, "{mark:<4}  {:<name$}  {a:<left$}  {b}", item.name)?;
            }
            writeln!(f)?;
        }
        f.write_str(match self.verdict() {
            Verdict::Fits => "This pair can work.",
            Verdict::Note => "This pair can work; see the notes.",
            Verdict::Fails => "This pair cannot work as it is: see FAIL above.",
        })
    }
}

/// A digest by its first digits.
fn short(text: &str) -> String {
    match text.len() == 64 && text.chars().all(|c| c.is_ascii_hexdigit()) {
        true => format!("{}…", &text[..12]),
        false => text.into(),
    }
}
