//! Gates, and weights by head, over the questions of a task.

use super::{
    Error, Figure, Finding, Table,
    figures::{Heat, heat},
    finding::{digits, rounded},
    probe::Probe,
};
use serde_json::{Value, json};

/// Of one Sharer, layer, half and head.
#[derive(Clone, Copy)]
struct Head {
    tokens: usize,
    sum: f64,
    squares: f64,
    low: f64,
    high: f64,
}

impl Head {
    const NONE: Head =
        Head { tokens: 0, sum: 0.0, squares: 0.0, low: f64::INFINITY, high: f64::NEG_INFINITY };

    fn add(&mut self, weight: f64) {
        self.tokens += 1;
        self.sum += weight;
        self.squares += weight * weight;
        self.low = self.low.min(weight);
        self.high = self.high.max(weight);
    }

    fn mean(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.sum / self.tokens as f64)
    }

    fn deviation(&self) -> Option<f64> {
        let mean = self.mean()?;
        Some((self.squares / self.tokens as f64 - mean * mean).max(0.0).sqrt())
    }
}

const HALVES: [&str; 2] = ["keys", "values"];

/// Weights over questions: by Sharer, `[layer][half][head]`.
pub(super) struct Weights {
    pub questions: usize,
    sharers: Vec<Vec<[Vec<Head>; 2]>>,
}

impl Weights {
    /// Looks at each question of `sample`.
    pub fn of(probe: &mut Probe, sample: &[usize]) -> Result<Weights, Error> {
        let (layers, sharers) = (probe.layers(), probe.gates().len());
        let mut weights = Weights { questions: 0, sharers: Vec::new() };
        for (done, &index) in sample.iter().enumerate() {
            let prompt = probe.prompt(index)?;
            let observed = probe.pair().observe(&prompt)?;
            if weights.sharers.is_empty() {
                let heads = observed.first().map_or(0, |observation| observation.kv_heads);
                let none = || [vec![Head::NONE; heads], vec![Head::NONE; heads]];
                weights.sharers = (0..sharers).map(|_| (0..layers).map(|_| none()).collect()).collect();
            }
            weights.questions +=
                usize::from(observed.iter().any(|observation| !observation.tokens.is_empty()));
            for (own, observation) in weights.sharers.iter_mut().zip(&observed) {
                for (layer, halves) in own.iter_mut().enumerate() {
                    for (half, heads) in halves.iter_mut().enumerate() {
                        for row in
                            observation.half(layer, half).unwrap_or_default().chunks_exact(heads.len().max(1))
                        {
                            heads.iter_mut().zip(row).for_each(|(head, weight)| head.add(f64::from(*weight)));
                        }
                    }
                }
            }
            probe.watcher.progress(done + 1, sample.len(), "weights");
        }
        if weights.questions == 0 { Err(probe.nothing_fused()) } else { Ok(weights) }
    }

    /// The mean of a half over heads; `None` without projector.
    pub fn mean(&self, sharer: usize, layer: usize, half: usize) -> Option<f64> {
        let means: Vec<f64> = self.sharers[sharer][layer][half].iter().filter_map(Head::mean).collect();
        (!means.is_empty()).then(|| means.iter().sum::<f64>() / means.len() as f64)
    }
}

pub(super) fn ask(probe: &mut Probe) -> Result<Finding, Error> {
    let weights = Weights::of(probe, &probe.sample())?;
    let head = [
        "Sharer",
        "layer",
        "half",
        "gate",
        "logit",
        "head",
        "mean weight",
        "deviation",
        "lowest",
        "highest",
        "tokens",
    ];
    let mut table = Table::new("gates", "Gates, and weights by head.", &head);
    let (mut rows, mut values, mut said) = (Vec::new(), Vec::new(), Vec::new());
    let several = weights.sharers.len() > 1;
    for (sharer, own) in weights.sharers.iter().enumerate() {
        let fuser = &probe.models.pair.session.fusers[sharer];
        let gates = &probe.gates()[sharer];
        let mut open = [0, 0];
        for (layer, halves) in own.iter().enumerate() {
            let logits = fuser.route(layer).map(|route| fuser.projectors()[route.projector].gate_logits);
            for (half, heads) in halves.iter().enumerate() {
                let gate = gates.get(layer).map_or(0.0, |gates| gates[half]);
                open[half] += usize::from(gate > 0.0);
                for (number, head) in heads.iter().enumerate() {
                    let known = |value: Option<f64>| value.map_or(Value::Null, rounded);
                    let ends = (head.tokens > 0).then_some((head.low, head.high));
                    table.push([
                        json!(sharer + 1),
                        json!(layer),
                        json!(HALVES[half]),
                        json!(gate),
                        logits.map_or(Value::Null, |logits| rounded(f64::from(logits[half]))),
                        json!(number),
                        known(head.mean()),
                        known(head.deviation()),
                        known(ends.map(|ends| ends.0)),
                        known(ends.map(|ends| ends.1)),
                        json!(head.tokens),
                    ]);
                }
                let closed = if gate > 0.0 { "" } else { " closed" };
                let of = if several { format!("{} ", sharer + 1) } else { String::new() };
                rows.push(format!("{of}{layer} {}{closed}", HALVES[half]));
                values.push(heads.iter().map(Head::mean).collect());
            }
        }
        let mean = |half: usize| {
            let known: Vec<f64> =
                (0..own.len()).filter_map(|layer| weights.mean(sharer, layer, half)).collect();
            known.iter().sum::<f64>() / known.len().max(1) as f64
        };
        said.push(format!(
            "Sharer {}: open are {} gates of keys and {} of values, of {} layers; mean weights {} and {}",
            sharer + 1,
            open[0],
            open[1],
            own.len(),
            digits(mean(0)),
            digits(mean(1))
        ));
    }
    let heads = values.iter().map(Vec::len).max().unwrap_or(0);
    let map = Heat {
        rows,
        columns: (0..heads).map(|head| head.to_string()).collect(),
        values,
        scale: 0.0..1.0,
        across: "mean weight, by KV head",
    };
    Ok(Finding {
        question: "gates",
        title: "gates and weights by head".into(),
        about: format!(
            "The weight of docs/math.md, 0 to 1, by which the projection of a token and KV head is multiplied before the gate, over all tokens of {} \
             questions that take a column; worked out whatever the gate does with it. A gate is open (1) where its logit is positive.",
            weights.questions
        ),
        said,
        tables: vec![table],
        figures: vec![Figure::new("gates", "Mean weight by layer, half and head", |ground| {
            heat(&map, ground)
        })?],
    })
}
