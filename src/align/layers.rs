//! Which sharer layers feed which receiver layer. There is one projector per receiver layer.

use std::{cmp::Ordering, fmt, str::FromStr};

/// Receiver layer → sharer layers, best first; the published fuser uses the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerMapping {
    /// Both models' *last* layers are paired and the rest counted down from there. A receiver deeper than the sharer
    /// takes the sharer's layer 0 for all its surplus first layers. Candidates after the first lie below it, then
    /// above.
    LastAligned { k: usize },
    /// The `k` sharer layers nearest in relative depth `i / (layers - 1)`; of two equally near the lower comes first.
    KNearest { k: usize },
}

impl LayerMapping {
    pub const LAST_ALIGNED: LayerMapping = LayerMapping::LastAligned { k: 1 };
    pub const K_NEAREST: LayerMapping = LayerMapping::KNearest { k: 1 };
    /// Another name of [`Self::K_NEAREST`].
    pub const DEPTH_NORMALIZED: LayerMapping = LayerMapping::K_NEAREST;

    /// For each of `receiver_layers` the sharer layers that feed it: `min(k, sharer_layers)` distinct ones, best
    /// first.
    pub fn sources(self, receiver_layers: usize, sharer_layers: usize) -> Vec<Vec<usize>> {
        (0..receiver_layers)
            .map(|target| match self {
                LayerMapping::LastAligned { k } => last_aligned(target, receiver_layers, sharer_layers, k),
                LayerMapping::KNearest { k } => k_nearest(target, receiver_layers, sharer_layers, k),
            })
            .collect()
    }
}

fn last_aligned(target: usize, receiver_layers: usize, sharer_layers: usize, k: usize) -> Vec<usize> {
    let Some(last) = sharer_layers.checked_sub(1) else { return Vec::new() };
    let anchor = (target + sharer_layers).saturating_sub(receiver_layers).min(last);
    (0..=anchor).rev().chain(anchor + 1..sharer_layers).take(k).collect()
}

fn k_nearest(target: usize, receiver_layers: usize, sharer_layers: usize, k: usize) -> Vec<usize> {
    let depth = |layer: usize, layers: usize| match layers {
        0 | 1 => 0.0,
        _ => layer as f64 / (layers - 1) as f64,
    };
    let distance = |source: &usize| (depth(*source, sharer_layers) - depth(target, receiver_layers)).abs();
    let mut sources: Vec<usize> = (0..sharer_layers).collect();
    sources.sort_by(|a, b| distance(a).partial_cmp(&distance(b)).unwrap_or(Ordering::Equal));
    sources.truncate(k);
    sources
}

/// A name that is no layer mapping.
#[derive(Debug, thiserror::Error)]
#[error(
    "unknown layer mapping `{0}`: use last_aligned, k_nearest or depth_normalized; last_aligned:K and k_nearest:K \
     (K ≥ 1) keep K candidates"
)]
pub struct UnknownMapping(String);

/// `--mapping`: `last_aligned[:K]`, `k_nearest[:K]` or `depth_normalized`; K is 1 unless given.
impl FromStr for LayerMapping {
    type Err = UnknownMapping;

    fn from_str(text: &str) -> Result<Self, UnknownMapping> {
        let unknown = || UnknownMapping(text.into());
        let (name, k) = match text.split_once(':') {
            Some((name, k)) => (name, k.parse().ok().filter(|&k| k >= 1).ok_or_else(unknown)?),
            None => (text, 1),
        };
        match name {
            "last_aligned" => Ok(LayerMapping::LastAligned { k }),
            "k_nearest" => Ok(LayerMapping::KNearest { k }),
            "depth_normalized" if name == text => Ok(LayerMapping::DEPTH_NORMALIZED),
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for LayerMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, k) = match self {
            LayerMapping::LastAligned { k } => ("last_aligned", k),
            LayerMapping::KNearest { k } => ("k_nearest", k),
        };
        if *k == 1 { f.write_str(name) } else { write!(f, "{name}:{k}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_layers_meet() {
        let mapping = LayerMapping::LAST_ALIGNED;
        assert_eq!(mapping.sources(4, 2), [[0], [0], [0], [1]]);
        assert_eq!(mapping.sources(2, 4), [[2], [3]]);
        assert_eq!(LayerMapping::LastAligned { k: 3 }.sources(2, 4), [[2, 1, 0], [3, 2, 1]]);
        assert_eq!(LayerMapping::LastAligned { k: 9 }.sources(3, 3)[1], [1, 0, 2]);
    }

    #[test]
    fn depth_is_relative_and_ties_go_down() {
        assert_eq!(LayerMapping::DEPTH_NORMALIZED.sources(3, 2), [[0], [0], [1]]);
        assert_eq!(LayerMapping::KNearest { k: 2 }.sources(2, 5), [[0, 1], [4, 3]]);
        assert_eq!(LayerMapping::K_NEAREST.sources(1, 1), [[0]]);
    }

    #[test]
    fn no_source_layers_is_no_sources() {
        for mapping in [LayerMapping::LAST_ALIGNED, LayerMapping::K_NEAREST] {
            assert_eq!(mapping.sources(2, 0), [[0usize; 0]; 2]);
        }
    }

    #[test]
    fn names_round_trip() {
        for name in ["last_aligned", "k_nearest", "k_nearest:3", "last_aligned:2"] {
            assert_eq!(name.parse::<LayerMapping>().unwrap().to_string(), name);
        }
        assert_eq!("depth_normalized".parse::<LayerMapping>().unwrap(), LayerMapping::K_NEAREST);
        for name in ["", "nearest", "k_nearest:0", "k_nearest:", "depth_normalized:2", "last_aligned:-1"] {
            assert!(name.parse::<LayerMapping>().is_err(), "{name} was accepted");
        }
    }
}
