//! Gates opened one layer at a time.

use super::{
    Error, Figure, Finding,
    by_layer::{Scored, Sweep, asks, sweep, table},
    finding::percent,
    probe::Probe,
};
use crate::{
    eval::{figures::bars, pair::Who},
    fuser::{GateOverride, Gates},
};

/// Fuses a question with these gates for every Sharer, and tells whether the answer is right.
fn right(probe: &mut Probe, gates: Vec<Gates>, index: usize) -> Result<bool, Error> {
    let prompt = probe.prompt(index)?;
    let logits = probe.fuse_with(&prompt, gates)?;
    Ok(probe.right(Who::Fused, &logits, index))
}

/// Gates of the layers marked and halves given open, as far as they have a projector.
fn open(probe: &Probe, layers: &[bool], halves: [bool; 2]) -> Result<Vec<Gates>, Error> {
    let factor = |open: bool| if open { 1.0 } else { 0.0 };
    let table: Gates = layers.iter().map(|&layer| halves.map(|half| factor(layer && half))).collect();
    let fusers = &probe.models.pair.session.fusers;
    Ok(fusers
        .iter()
        .map(|fuser| fuser.gates_with(&GateOverride::Table(table.clone())))
        .collect::<Result<_, _>>()?)
}

/// The sweep of `layers`, for others who ask what a layer does by itself.
pub(super) fn sweep_gates(probe: &mut Probe, sample: &[usize]) -> Result<Sweep, Error> {
    let (mut done, total) = (0, asks(sample.len()));
    sweep(probe.layers(), sample, &mut |index, sets| {
        done += 1;
        probe.watcher.progress(done, total, "gates by layer");
        let each = sets.iter().map(|set| {
            let gates = open(probe, set, [true; 2])?;
            right(probe, gates, index)
        });
        each.collect()
    })
}

pub(super) fn ask(probe: &mut Probe, halves: bool) -> Result<Finding, Error> {
    let sample = probe.sample();
    let layers = probe.layers();
    let swept = sweep_gates(probe, &sample)?;
    let own = probe.gates().to_vec();
    let learned = Scored::of("as it is", &sample, |index| right(probe, own.clone(), index))?;
    let mut scored = vec![Scored { name: "all closed".into(), ..swept.none.clone() }];
    scored.extend(swept.single.iter().cloned());
    let mut parts = Vec::new();
    for layer in 0..layers {
        let without: Vec<bool> = (0..layers).map(|other| other != layer).collect();
        let gates = open(probe, &without, [true; 2])?;
        parts.push(Scored::of(&format!("all but {layer}"), &sample, |index| {
            right(probe, gates.clone(), index)
        })?);
        if !halves {
            continue;
        }
        let alone: Vec<bool> = (0..layers).map(|other| other == layer).collect();
        for (name, chosen) in [("keys", [true, false]), ("values", [false, true])] {
            let gates = open(probe, &alone, chosen)?;
            let name = format!("{layer}, {name}");
            parts.push(Scored::of(&name, &sample, |index| right(probe, gates.clone(), index))?);
        }
    }
    if halves {
        let all = vec![true; layers];
        for (name, chosen) in [("all keys", [true, false]), ("all values", [false, true])] {
            let gates = open(probe, &all, chosen)?;
            parts.push(Scored::of(name, &sample, |index| right(probe, gates.clone(), index))?);
        }
    }
    scored.extend(parts);
    scored.push(Scored { name: "all open".into(), ..swept.all.clone() });
    scored.push(learned.clone());
    let best = swept.order.first().copied().unwrap_or(0);
    let said = vec![
        format!(
            "closed {}, as it is {}, all open {}",
            percent(swept.none.rate()),
            percent(learned.rate()),
            percent(swept.all.rate())
        ),
        format!(
            "the best layer by itself is {best}: {}; order by every second question: {}",
            percent(swept.single[best].rate()),
            swept.order.iter().map(usize::to_string).collect::<Vec<_>>().join(" > ")
        ),
    ];
    let drawn: Vec<_> = scored.iter().map(Scored::bar).collect();
    Ok(Finding {
        question: "layers",
        title: "gates opened one layer at a time".into(),
        about: format!(
            "Accuracy over {} questions with the gates of only one layer open, of all but one, and of the best and worst layers; the fuser is the \
             trained one, which learned with others open. Best and worst are chosen on every second question and scored on the rest.",
            sample.len()
        ),
        said,
        tables: vec![
            table("layers", "Accuracy by which gates are open.", "open", &scored),
            table(
                "layers_chosen",
                "The best and the worst layers, on the questions that had no say.",
                "open",
                &swept.chosen,
            ),
        ],
        figures: vec![Figure::new("layers", "Accuracy by which gates are open", |ground| {
            bars(&drawn, ground)
        })?],
    })
}
