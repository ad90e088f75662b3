//! What the Receiver's attention says of a prompt's last section, with and without the fuse.

use super::{
    Error, Figure, Finding, Table,
    figures::{Heat, Line, OTHER, RECEIVER, heat, lines},
    finding::{digits, rounded},
    probe::{Probe, fused_tokens},
};
use crate::eval::mode::Variant;
use serde_json::json;

/// Sums over tokens of one layer.
#[derive(Clone, Default)]
struct Sums {
    tokens: usize,
    cosine: f64,
    lowest: f64,
    /// ‖with − without‖ / ‖without‖.
    change: f64,
    by_head: Vec<f64>,
}

/// Cosine of two rows; 1 of equal ones, zeros included.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    if a == b {
        return 1.0;
    }
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms == 0.0 { 0.0 } else { dot(a, b) / norms }
}

impl Sums {
    fn add(&mut self, with: &[f32], without: &[f32], heads: usize) {
        let own = cosine(with, without);
        self.lowest = if self.tokens == 0 { own } else { self.lowest.min(own) };
        self.cosine += own;
        let norm =
            |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let change = norm(&mut with.iter().zip(without).map(|(a, b)| a - b));
        let size = norm(&mut without.iter().copied());
        self.change += if change == 0.0 { 0.0 } else { change / size.max(f64::MIN_POSITIVE) };
        self.by_head.resize(heads, 0.0);
        let dim = with.len() / heads;
        let parts = with.chunks_exact(dim).zip(without.chunks_exact(dim));
        self.by_head.iter_mut().zip(parts).for_each(|(sum, (a, b))| *sum += cosine(a, b));
        self.tokens += 1;
    }

    fn mean(&self, sum: f64) -> f64 {
        sum / self.tokens.max(1) as f64
    }
}

pub(super) fn ask(probe: &mut Probe) -> Result<Finding, Error> {
    let sample = probe.sample();
    let config =
        &probe.models.pair.session.receiver.as_ref().ok_or(crate::eval::Error::NoReceiver)?.decoder.config;
    let (heads, width) = (config.heads, config.heads * config.head_dim);
    let mut sums = vec![Sums::default(); probe.layers()];
    let mut asked = 0;
    for (done, &index) in sample.iter().enumerate() {
        let prompt = probe.prompt(index)?;
        if !fused_tokens(&prompt).is_empty() {
            probe.fuse(&prompt, Variant::Closed)?;
            let without = probe.pair().attention(&prompt)?;
            probe.fuse(&prompt, Variant::Plain)?;
            let with = probe.pair().attention(&prompt)?;
            for ((sums, with), without) in sums.iter_mut().zip(&with).zip(&without) {
                for (with, without) in with.chunks_exact(width).zip(without.chunks_exact(width)) {
                    sums.add(with, without, heads);
                }
            }
            asked += 1;
        }
        probe.watcher.progress(done + 1, sample.len(), "attention");
    }
    if asked == 0 {
        return Err(probe.nothing_fused());
    }
    let head = ["layer", "mean cosine", "lowest", "relative change"];
    let mut table = Table::new(
        "attention",
        "The attention's output with the fuse against that without, by layer.",
        &head,
    );
    for (layer, sums) in sums.iter().enumerate() {
        table.push([
            json!(layer),
            rounded(sums.mean(sums.cosine)),
            rounded(sums.lowest),
            rounded(sums.mean(sums.change)),
        ]);
    }
    let mut by_head =
        Table::new("attention_heads", "Mean cosine by head.", &["layer", "head", "mean cosine"]).long();
    for (layer, sums) in sums.iter().enumerate() {
        for (head, sum) in sums.by_head.iter().enumerate() {
            by_head.push([json!(layer), json!(head), rounded(sums.mean(*sum))]);
        }
    }
    let curve = |name: &str, colour, of: &dyn Fn(&Sums) -> f64| Line {
        name: name.into(),
        colour,
        values: sums.iter().map(|sums| Some(of(sums))).collect(),
    };
    let curves = [
        curve("mean over tokens", RECEIVER, &|sums| sums.mean(sums.cosine)),
        curve("lowest", OTHER, &|sums| sums.lowest),
    ];
    let map = Heat {
        rows: (0..sums.len()).map(|layer| format!("layer {layer}")).collect(),
        columns: (0..heads).map(|head| head.to_string()).collect(),
        values: sums
            .iter()
            .map(|sums| sums.by_head.iter().map(|sum| Some(1.0 - sums.mean(*sum))).collect())
            .collect(),
        scale: 0.0..1.0,
        across: "1 − cosine, by head",
    };
    let least = (0..sums.len())
        .min_by(|&a, &b| sums[a].mean(sums[a].cosine).total_cmp(&sums[b].mean(sums[b].cosine)));
    let least = least.unwrap_or(0);
    Ok(Finding {
        question: "attention",
        title: "attention with and without the fuse".into(),
        about: format!(
            "What the attention of each layer gives before its output map, for the tokens of the last section ({} of {asked} questions), which \
             see the fused cache and are not fused themselves: once with the gates as they are, once closed. From layer 1 on the queries \
             differ too, for the layers below have said something else.",
            sums.first().map_or(0, |sums| sums.tokens)
        ),
        said: vec![format!(
            "layer {least} is turned most: mean cosine {}, changed by {} of its length",
            digits(sums[least].mean(sums[least].cosine)),
            digits(sums[least].mean(sums[least].change))
        )],
        tables: vec![table, by_head],
        figures: vec![
            Figure::new("attention", "With the fuse against without", |ground| {
                lines(&curves, "cosine", ground)
            })?,
            Figure::new("attention_heads", "How far each head is turned", |ground| heat(&map, ground))?,
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosines_by_hand() {
        assert_eq!(cosine(&[1.0, 0.0], &[2.0, 0.0]), 1.0);
        assert_eq!(cosine(&[1.0, 0.0], &[0.0, 3.0]), 0.0);
        assert_eq!(cosine(&[0.0, 0.0], &[0.0, 0.0]), 1.0);
        assert!((cosine(&[1.0, 1.0], &[1.0, 0.0]) - 0.5f64.sqrt()).abs() < 1e-12);
        let mut sums = Sums::default();
        sums.add(&[3.0, 0.0, 0.0, 2.0], &[1.0, 0.0, 0.0, 2.0], 2);
        sums.add(&[0.0, 1.0, 0.0, 2.0], &[1.0, 0.0, 0.0, 2.0], 2);
        assert_eq!(sums.by_head, [1.0, 2.0]);
        assert!(
            (sums.lowest - 0.8).abs() < 1e-12
                && (sums.change - (2.0 + 2f64.sqrt()) / 5f64.sqrt()).abs() < 1e-9
        );
    }

    /// The first token sees itself alone: its attention gives its own values, for every head those of its KV head. Watching changes nothing.
    #[test]
    fn the_first_token_sees_itself() {
        let session = crate::analysis::probe::builtin();
        let receiver = session.receiver.as_ref().unwrap();
        let config = &receiver.decoder.config;
        let mut lane = session.lane(receiver, 64).unwrap();
        let ids: Vec<u32> = (20..40).collect();
        let positions: Vec<u32> = (0..20).collect();
        let said = lane.append_attending(&ids, &positions).unwrap();
        let logits = lane.logits().unwrap();
        assert_eq!(said.len(), config.layers);
        for (layer, rows) in said.iter().enumerate() {
            assert_eq!(rows.len(), ids.len() * config.heads * config.head_dim);
            let values = lane.read(layer, 0, 1).unwrap().values;
            for (head, row) in
                rows[..config.heads * config.head_dim].chunks_exact(config.head_dim).enumerate()
            {
                let own =
                    &values[head / (config.heads / config.kv_heads) * config.head_dim..][..config.head_dim];
                assert!(row.iter().zip(own).all(|(a, b)| (a - b).abs() < 1e-5), "layer {layer}, head {head}");
            }
        }
        lane.truncate(0, 0);
        lane.append(&ids, &positions, crate::model::Goal::Hidden, |_, _| {}).unwrap();
        assert_eq!(lane.logits().unwrap(), logits);
    }
}
