//! Source, target and projected cache in two dimensions.

use super::{
    Error, Figure, Finding, Table,
    figures::{Cloud, FUSED, RECEIVER, SHARER, clouds},
    finding::{percent, rounded},
    probe::Probe,
};
use crate::{cache::KvColumns, rng::normal};
use bhtsne::tSNE;
use plotters::style::RGBColor;
use serde_json::json;

const SETS: [&str; 3] = ["source: the Sharer's", "target: the Receiver's", "projected and added: fused"];
const COLOURS: [RGBColor; 3] = [SHARER, RECEIVER, FUSED];
const HALVES: [&str; 2] = ["keys", "values"];
/// Layers drawn: the last ones, as published.
const LAYERS: usize = 6;
const PERPLEXITY: f32 = 30.0;
const EPOCHS: usize = 500;
/// Neighbours that a token is asked for.
const NEIGHBOURS: usize = 10;

pub(super) fn ask(probe: &mut Probe, tokens: usize, seed: u64) -> Result<Finding, Error> {
    let layers = probe.layers();
    let first = layers.saturating_sub(LAYERS);
    let session = &probe.models.pair.session;
    let width =
        |model: &crate::pipeline::Model| model.decoder.config.kv_heads * model.decoder.config.head_dim;
    let ours = session.receiver.as_ref().map_or(1, width);
    let theirs = session.sharers.first().map_or(1, width);
    // By layer and half: rows of each set.
    let mut all: Vec<[[Vec<Vec<f32>>; 3]; 2]> = (first..layers).map(|_| Default::default()).collect();
    // As many of each question: caches of all would be large.
    let quota = tokens.div_ceil(probe.sample().len().max(1));
    let mut number = 0;
    let asked = probe.each(|caches| {
        for (layer, own) in (first..).zip(&mut all) {
            let Some(source) = &caches.source[layer] else { continue };
            let sets = [(source, theirs), (&caches.plain[layer], ours), (&caches.fused[layer], ours)];
            for (half, own) in own.iter_mut().enumerate() {
                for (rows, (columns, width)) in own.iter_mut().zip(sets) {
                    let own = rows_of(columns, half, width, ours.max(theirs));
                    // Not the first token of each, which is often the same.
                    rows.extend(evenly(&own, quota, number));
                }
            }
        }
        number += 1;
    })?;
    let mut places =
        Table::new("tsne_points", "Every point.", &["layer", "half", "set", "token", "x", "y"]).long();
    let head = [
        "layer",
        "half",
        "tokens of each",
        "KL",
        "near a target's: targets, %",
        "fused, %",
        "near a source's: fused, %",
    ];
    let mut mixing = Table::new(
        "tsne",
        "Whom a token has for neighbours in the cache itself (not in the picture): how the sets lie to each other.",
        &head,
    );
    let mut planes = Vec::new();
    let mut said = Vec::new();
    for (layer, own) in (first..).zip(&all) {
        for (half, sets) in own.iter().enumerate() {
            if sets[0].is_empty() {
                continue;
            }
            let points: Vec<Vec<Vec<f32>>> = sets.iter().map(|set| evenly(set, tokens, 0)).collect();
            let each = points[0].len();
            let data: Vec<&[f32]> = points.iter().flatten().map(Vec::as_slice).collect();
            let of: Vec<usize> = (0..3).flat_map(|set| vec![set; each]).collect();
            let (plane, divergence) = embedded(&data, seed)?;
            let near = neighbours(&data, &of);
            mixing.push([
                json!(layer),
                json!(HALVES[half]),
                json!(each),
                rounded(f64::from(divergence)),
                rounded(100.0 * near[1][1]),
                rounded(100.0 * near[1][2]),
                rounded(100.0 * near[0][2]),
            ]);
            let mut drawn: Vec<Cloud> = (0..3)
                .map(|set| Cloud { name: SETS[set], colour: COLOURS[set], points: Vec::new() })
                .collect();
            for (number, (&set, point)) in of.iter().zip(plane.chunks_exact(2)).enumerate() {
                let [x, y] = [f64::from(point[0]), f64::from(point[1])];
                drawn[set].points.push([x, y]);
                places.push([
                    json!(layer),
                    json!(HALVES[half]),
                    json!(SETS[set]),
                    json!(number % each),
                    rounded(x),
                    rounded(y),
                ]);
            }
            said.push(format!(
                "layer {layer}, {}: of a fused token's {NEIGHBOURS} nearest, {} are the Receiver's own, {} the Sharer's",
                HALVES[half],
                percent(near[2][1]),
                percent(near[2][0])
            ));
            planes.push((format!("layer {layer}, {}", HALVES[half]), drawn));
        }
    }
    let caption = "t-SNE of the cache: source, target, fused";
    let figure = Figure::new("tsne", caption, |ground| clouds(&planes, ground))?;
    Ok(Finding {
        question: "tsne",
        title: "source, target and projected cache in two dimensions".into(),
        about: format!(
            "t-SNE (perplexity {PERPLEXITY}, {EPOCHS} steps, exact) of at most {tokens} tokens of each set, of {asked} questions: the Sharer's \
             columns of the layer that is read, the Receiver's before, and after fusing. Where widths differ, rows of the narrower are filled up \
             with zeros, which leaves distances within a set as they are; how far two sets lie apart then says nothing but that they are \
             different. The last {} layers are drawn.",
            layers - first
        ),
        said,
        tables: vec![mixing, places],
        figures: vec![figure],
    })
}

fn rows_of(columns: &KvColumns, half: usize, width: usize, to: usize) -> Vec<Vec<f32>> {
    let numbers = if half == 0 { &columns.keys } else { &columns.values };
    let filled = |row: &[f32]| {
        let mut row = row.to_vec();
        row.resize(to, 0.0);
        row
    };
    numbers.chunks_exact(width).map(filled).collect()
}

/// At most `most` rows, evenly spaced from row `from` on and round again: the same of each set.
fn evenly(rows: &[Vec<f32>], most: usize, from: usize) -> Vec<Vec<f32>> {
    let n = most.min(rows.len());
    (0..n).map(|i| rows[(from + i * rows.len() / n) % rows.len()].clone()).collect()
}

fn squared(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
}

/// Places in the plane, two numbers a row, and the divergence that is left. The same seed, the same places: in one thread, for sums that
/// several threads take come in any order, and t-SNE makes much of low bits.
fn embedded(rows: &[&[f32]], seed: u64) -> Result<(Vec<f32>, f32), Error> {
    // The perplexity of fewer points cannot be larger than they are many.
    let perplexity = PERPLEXITY.min((rows.len().saturating_sub(1)) as f32 / 3.0).max(1.0);
    let begin: Vec<f32> = normal(seed, 0, 2 * rows.len()).into_iter().map(|x| 1e-4 * x).collect();
    let thread = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    Ok(thread.install(|| {
        let mut tsne: tSNE<f32, &[f32]> = tSNE::new(rows);
        tsne.perplexity(perplexity).epochs(EPOCHS).initial_embedding(begin);
        tsne.exact(|a, b| squared(a, b));
        let divergence = tsne.kl_divergence().unwrap_or(f32::NAN);
        (tsne.embedding(), divergence)
    }))
}

/// `[set][other]`: of the nearest neighbours of the tokens of a set, the share that is of another.
fn neighbours(rows: &[&[f32]], of: &[usize]) -> [[f64; 3]; 3] {
    let mut counts = [[0usize; 3]; 3];
    for (i, row) in rows.iter().enumerate() {
        let mut others: Vec<(f32, usize)> =
            (0..rows.len()).filter(|&j| j != i).map(|j| (squared(row, rows[j]), of[j])).collect();
        others.sort_by(|a, b| a.0.total_cmp(&b.0));
        others.iter().take(NEIGHBOURS).for_each(|(_, set)| counts[of[i]][*set] += 1);
    }
    counts.map(|own| {
        let all = own.iter().sum::<usize>().max(1) as f64;
        own.map(|count| count as f64 / all)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three far heaps stay three heaps, and the same seed gives the same picture.
    #[test]
    fn heaps_stay_heaps() {
        let noise = normal(3, 0, 60 * 4);
        let rows: Vec<Vec<f32>> = (0..60)
            .map(|i| (0..4).map(|d| noise[4 * i + d] + if d == i / 20 { 30.0 } else { 0.0 }).collect())
            .collect();
        let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        let of: Vec<usize> = (0..60).map(|i| i / 20).collect();
        let (plane, divergence) = embedded(&rows, 1).unwrap();
        assert!(divergence.is_finite() && plane.len() == 120);
        let points: Vec<&[f32]> = plane.chunks_exact(2).collect();
        for near in [neighbours(&rows, &of), neighbours(&points, &of)] {
            for (set, shares) in near.iter().enumerate() {
                assert!(shares[set] > 0.99, "{near:?}");
            }
        }
        assert_eq!(embedded(&rows, 1).unwrap().0, plane);
    }
}
