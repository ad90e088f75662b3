//! The weight of each token of one text, layer by layer.

use super::{
    Error, Figure, Finding, Table,
    figures::{Heat, heat},
    finding::{digits, rounded},
    probe::Probe,
};
use crate::{
    eval::asking,
    pipeline::{Prompt, Question},
    tokenizer::{Message, Tokenizer},
};
use serde_json::json;

const HALVES: [&str; 2] = ["keys", "values"];
/// Tokens that are named.
const NAMED: usize = 5;

pub(super) fn ask(probe: &mut Probe, text: Option<&str>) -> Result<Finding, Error> {
    let (prompt, what) = match text {
        Some(text) => {
            let messages = vec![Message::new("user", text)];
            let question = Question::Chat { messages, template: asking::generation() };
            let aligned = probe.models.pair.session.aligned(&question, None, None)?;
            (Prompt::from(aligned), "the text that was given".to_owned())
        }
        None => {
            let first = probe.sample()[0];
            (probe.prompt(first)?, probe.questions.items[first].origin.clone())
        }
    };
    let observed = probe.pair().observe(&prompt)?;
    let receiver = probe.models.pair.session.receiver.as_ref().ok_or(crate::eval::Error::NoReceiver)?;
    let ours = receiver.tokenizer()?;
    let head = ["Sharer", "token", "text", "Sharer's token", "layer", "half", "gate", "head", "weight"];
    let mut table = Table::new("weights", "Every weight.", &head).long();
    let (mut figures, mut said) = (Vec::new(), Vec::new());
    for (sharer, observation) in observed.iter().enumerate() {
        if observation.tokens.is_empty() {
            continue;
        }
        let theirs = probe.models.pair.session.sharers[sharer].tokenizer()?;
        let spelled = |tokenizer: &Tokenizer, id: u32| {
            tokenizer.decode(&[id], false).replace('\n', "⏎").replace(' ', "␣")
        };
        let names: Vec<String> =
            observation.tokens.iter().map(|&token| spelled(ours, prompt.ids[token as usize])).collect();
        let own = &prompt.sharers[sharer];
        for (at, (&token, &column)) in observation.tokens.iter().zip(&observation.columns).enumerate() {
            for layer in 0..observation.layers() {
                for (half, name) in HALVES.into_iter().enumerate() {
                    let Some(weights) = observation.half(layer, half) else { continue };
                    let heads = &weights[at * observation.kv_heads..][..observation.kv_heads];
                    for (head, weight) in heads.iter().enumerate() {
                        table.push([
                            json!(sharer + 1),
                            json!(token),
                            json!(names[at]),
                            json!(spelled(theirs, own.ids[column as usize])),
                            json!(layer),
                            json!(name),
                            json!(observation.gates[layer][half]),
                            json!(head),
                            rounded(f64::from(*weight)),
                        ]);
                    }
                }
            }
        }
        let map = observation.map();
        let (mut rows, mut values) = (Vec::new(), Vec::new());
        let mut by_token = vec![(0.0, 0usize); names.len()];
        for layer in 0..observation.layers() {
            for (half, maps) in [&map.key, &map.value].into_iter().enumerate() {
                let open = observation.gates[layer][half] > 0.0;
                rows.push(format!("{layer} {}{}", HALVES[half], if open { "" } else { " closed" }));
                let row = match &maps[layer] {
                    Some(weights) => weights.iter().map(|&weight| Some(f64::from(weight))).collect(),
                    None => vec![None; names.len()],
                };
                for (sum, weight) in by_token.iter_mut().zip(row.iter().flatten()).filter(|_| open) {
                    *sum = (sum.0 + weight, sum.1 + 1);
                }
                values.push(row);
            }
        }
        let mut order: Vec<usize> = (0..names.len()).filter(|&at| by_token[at].1 > 0).collect();
        let mean = |at: usize| by_token[at].0 / by_token[at].1 as f64;
        order.sort_by(|&a, &b| mean(b).total_cmp(&mean(a)));
        let named = |order: &mut dyn Iterator<Item = &usize>| {
            order
                .take(NAMED)
                .map(|&at| format!("`{}` {}", names[at], digits(mean(at))))
                .collect::<Vec<_>>()
                .join(", ")
        };
        if !order.is_empty() {
            said.push(format!(
                "Sharer {}: heaviest over all open layers {}; lightest {}",
                sharer + 1,
                named(&mut order.iter()),
                named(&mut order.iter().rev())
            ));
        } else {
            said.push(format!("Sharer {}: no gate is open", sharer + 1));
        }
        let map =
            Heat { rows, columns: names, values, scale: 0.0..1.0, across: "weight, mean over KV heads" };
        let name = if sharer == 0 { "weights".into() } else { format!("weights_{}", sharer + 1) };
        figures.push(Figure::new(&name, "Weight of each token", |ground| heat(&map, ground))?);
    }
    if figures.is_empty() {
        return Err(Error::NothingFused { what });
    }
    Ok(Finding {
        question: "weights",
        title: "weights by token".into(),
        about: format!(
            "The weight, 0 to 1, of each token that takes a column, by layer, of keys and values: {what}."
        ),
        said,
        tables: vec![table],
        figures,
    })
}
