//! Effective rank of keys and values, before and after fusing, layer by layer.

use super::{
    Error, Figure, Finding, Table,
    figures::{FUSED, Line, OTHER, RECEIVER, SHARER, lines},
    finding::{digits, rounded},
    probe::Probe,
};
use nalgebra::DMatrix;
use plotters::style::RGBColor;
use serde_json::json;

/// Effective rank of a matrix of rows of `width` numbers: the exponential of the entropy of its singular values, which are made to add
/// up to 1 (Roy and Vetterli 2007). From 1, where all rows are multiples of one, to the smaller side, where all directions are alike;
/// 0 of nothing but zeros.
pub fn effective_rank(rows: &[f32], width: usize) -> f64 {
    let mut spectrum = Spectrum::new(width);
    spectrum.add(rows);
    spectrum.effective_rank()
}

/// Rows that are summed up as they come: singular values are the roots of the eigenvalues of `XᵀX`, whatever the number of rows.
struct Spectrum {
    gram: DMatrix<f64>,
}

impl Spectrum {
    fn new(width: usize) -> Spectrum {
        Spectrum { gram: DMatrix::zeros(width, width) }
    }

    fn add(&mut self, rows: &[f32]) {
        let width = self.gram.ncols();
        // Column by column, rows of tokens are the transpose.
        let x = DMatrix::from_iterator(width, rows.len() / width.max(1), rows.iter().map(|&x| f64::from(x)));
        self.gram.gemm(1.0, &x, &x.transpose(), 1.0);
    }

    fn effective_rank(&self) -> f64 {
        let eigenvalues = self.gram.clone().symmetric_eigenvalues();
        let largest = eigenvalues.iter().copied().fold(0.0, f64::max);
        // What arithmetic leaves of zeros is none.
        let noise = largest * f64::EPSILON * eigenvalues.len() as f64;
        let singular: Vec<f64> = eigenvalues.iter().filter(|&&e| e > noise).map(|e| e.sqrt()).collect();
        let sum: f64 = singular.iter().sum();
        if sum == 0.0 {
            return 0.0;
        }
        let entropy: f64 = singular.iter().map(|s| s / sum).map(|p| -p * p.ln()).sum();
        entropy.exp()
    }
}

const SETS: [&str; 4] = ["Receiver", "Sharer", "projected", "fused"];
const COLOURS: [RGBColor; 4] = [RECEIVER, SHARER, OTHER, FUSED];
const HALVES: [&str; 2] = ["keys", "values"];

pub(super) fn ask(probe: &mut Probe) -> Result<Finding, Error> {
    let layers = probe.layers();
    // By layer, half, set.
    let mut spectra: Vec<[[Option<Spectrum>; 4]; 2]> = (0..layers).map(|_| Default::default()).collect();
    let mut tokens = 0;
    let session = &probe.models.pair.session;
    let width =
        |model: &crate::pipeline::Model| model.decoder.config.kv_heads * model.decoder.config.head_dim;
    let ours = session.receiver.as_ref().map_or(0, width);
    let theirs = session.sharers.first().map_or(0, width);
    let asked = probe.each(|caches| {
        tokens += caches.plain[0].keys.len() / ours.max(1);
        for (layer, own) in spectra.iter_mut().enumerate() {
            for (half, sets) in own.iter_mut().enumerate() {
                let pick = |columns: &crate::cache::KvColumns| match half {
                    0 => columns.keys.clone(),
                    _ => columns.values.clone(),
                };
                let (plain, fused) = (pick(&caches.plain[layer]), pick(&caches.fused[layer]));
                let projected: Vec<f32> =
                    fused.iter().zip(&plain).map(|(fused, plain)| fused - plain).collect();
                let source = caches.source[layer].as_ref().map(pick);
                let all =
                    [(Some(plain), ours), (source, theirs), (Some(projected), ours), (Some(fused), ours)];
                for (set, (rows, width)) in sets.iter_mut().zip(all) {
                    if let Some(rows) = rows {
                        set.get_or_insert_with(|| Spectrum::new(width)).add(&rows);
                    }
                }
            }
        }
    })?;
    let head = [
        "layer",
        "half",
        "Receiver",
        "fused",
        "fused / Receiver",
        "projected",
        "Sharer",
        "largest",
        "Sharer's largest",
    ];
    let mut table = Table::new("rank", "Effective rank by layer.", &head);
    let mut figures = Vec::new();
    let mut said = Vec::new();
    for (half, name) in HALVES.into_iter().enumerate() {
        let of_layer = |own: &[[Option<Spectrum>; 4]; 2]| {
            own[half].each_ref().map(|set| set.as_ref().map(Spectrum::effective_rank))
        };
        // By layer, by set.
        let ranks: Vec<[Option<f64>; 4]> = spectra.iter().map(of_layer).collect();
        for (layer, own) in ranks.iter().enumerate() {
            let of = |set: usize| own[set].map_or(json!(null), rounded);
            let (plain, fused) = (own[0].unwrap_or(0.0), own[3].unwrap_or(0.0));
            table.push([
                json!(layer),
                json!(name),
                of(0),
                of(3),
                rounded(fused / plain),
                of(2),
                of(1),
                json!(tokens.min(ours)),
                json!(tokens.min(theirs)),
            ]);
        }
        let known = |set: usize| ranks.iter().filter_map(move |own| own[set]);
        let mean = |set: usize| known(set).sum::<f64>() / known(set).count().max(1) as f64;
        said.push(format!(
            "{name}: {} in the Receiver, {} once fused (means over {layers} layers; {} in the Sharer's layers that are read)",
            digits(mean(0)),
            digits(mean(3)),
            digits(mean(1))
        ));
        let line = |set: usize| Line {
            name: SETS[set].into(),
            colour: COLOURS[set],
            values: ranks.iter().map(|own| own[set]).collect(),
        };
        let curves: Vec<Line> = (0..4).map(line).collect();
        let caption = format!("Effective rank of {name}");
        figures.push(Figure::new(&format!("rank_{name}"), &caption, |ground| {
            lines(&curves, &format!("effective rank, {name}"), ground)
        })?);
    }
    Ok(Finding {
        question: "rank",
        title: "effective rank of keys and values before and after fusing".into(),
        about: format!(
            "The exponential of the entropy of the singular values, made to add up to 1, of all {tokens} tokens of {asked} questions that take \
             a column of the Sharer's: the same tokens before and after. Not centred; keys as they lie in the cache, rotated. Projected: what \
             the fuser adds. At most the smaller of tokens and width."
        ),
        said,
        tables: vec![table],
        figures,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::normal;

    #[test]
    fn ranks_of_known_matrices() {
        let close =
            |found: f64, expected: f64| assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        // The unit matrix, however it is scaled.
        let unit: Vec<f32> = (0..36).map(|i| if i % 7 == 0 { 5.0 } else { 0.0 }).collect();
        close(effective_rank(&unit, 6), 6.0);
        // Multiples of one row.
        let one: Vec<f32> = (1..=8).flat_map(|i| [1.0, -2.0, 0.5].map(|x| x * i as f32)).collect();
        close(effective_rank(&one, 3), 1.0);
        close(effective_rank(&[0.0; 12], 4), 0.0);
        close(effective_rank(&[], 4), 0.0);
        // Singular values 3 and 1: shares ¾ and ¼.
        let shares = [0.75f64, 0.25];
        let expected = shares.iter().map(|p| -p * p.ln()).sum::<f64>().exp();
        close(effective_rank(&[3.0, 0.0, 0.0, 1.0, 0.0, 0.0], 2), expected);
        // Turned by 30° from either side, it has the same values.
        let (s, c) = (0.5f32, 0.75f32.sqrt());
        let turned = [c * 3.0, s * 3.0, -s, c];
        assert!((effective_rank(&turned, 2) - expected).abs() < 1e-5);
    }

    /// Rows that come in parts are the whole.
    #[test]
    fn rows_may_come_in_parts() {
        let rows = normal(1, 0, 40 * 5);
        let mut spectrum = Spectrum::new(5);
        rows.chunks(5 * 7).for_each(|part| spectrum.add(part));
        let whole = effective_rank(&rows, 5);
        assert!((spectrum.effective_rank() - whole).abs() < 1e-9);
        assert!(whole > 4.8 && whole < 5.0, "{whole}");
    }
}
