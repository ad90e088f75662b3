//! Gates by hand: `--gates open|closed|learned|LIST|FILE`.

use super::FuserError;
use std::{path::Path, str::FromStr};

/// Factors of the projections of [keys, values] of each receiver layer; 0 is closed.
pub type Gates = Vec<[f32; 2]>;

/// What `--gates` says.
#[derive(Clone, Debug, PartialEq, Default)]
pub enum GateOverride {
    /// As trained: open where the logit is positive.
    #[default]
    Learned,
    Open,
    Closed,
    /// These layers open, all others closed: `0-3,7,9k,11v`; `k` and `v` open only keys or values.
    Layers(Vec<LayerGates>),
    /// One pair per receiver layer: a JSON file `[[key, value], …]`, as the program itself prints them.
    Table(Gates),
}

/// Layers `first..=last` of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerGates {
    pub first: usize,
    pub last: usize,
    pub keys: bool,
    pub values: bool,
}

impl FromStr for GateOverride {
    type Err = FuserError;

    /// A text that is neither a word nor a list is the name of a file.
    fn from_str(text: &str) -> Result<Self, FuserError> {
        GateOverride::in_words(text).unwrap_or_else(|| table(Path::new(text)))
    }
}

impl GateOverride {
    /// A word or a list of layers; `None` is neither. Looks at no file.
    pub fn in_words(text: &str) -> Option<Result<Self, FuserError>> {
        match text {
            "learned" => return Some(Ok(GateOverride::Learned)),
            "open" => return Some(Ok(GateOverride::Open)),
            "closed" => return Some(Ok(GateOverride::Closed)),
            _ => {}
        }
        let list = |c: char| c.is_ascii_digit() || matches!(c, '-' | ',' | 'k' | 'v' | ' ');
        if !text.starts_with(|c: char| c.is_ascii_digit()) || !text.chars().all(list) {
            return None;
        }
        let ranges: Result<Vec<_>, String> = text.split(',').map(|part| range(part.trim())).collect();
        let named = |problem| FuserError::Gates { text: text.into(), problem };
        Some(ranges.map(GateOverride::Layers).map_err(named))
    }
}

fn range(text: &str) -> Result<LayerGates, String> {
    let (digits, keys, values) = match (text.strip_suffix('k'), text.strip_suffix('v')) {
        (Some(digits), _) => (digits, true, false),
        (_, Some(digits)) => (digits, false, true),
        _ => (text, true, true),
    };
    let (first, last) = digits.split_once('-').unwrap_or((digits, digits));
    let number = |text: &str| text.parse().map_err(|_| format!("`{text}` is no layer number"));
    let (first, last) = (number(first)?, number(last)?);
    if first > last {
        return Err(format!("the range {first}-{last} runs backwards"));
    }
    Ok(LayerGates { first, last, keys, values })
}

fn table(path: &Path) -> Result<GateOverride, FuserError> {
    let fail = |problem: String| FuserError::Gates { text: path.display().to_string(), problem };
    let text = std::fs::read_to_string(path).map_err(|error| {
        fail(format!("neither open, closed, learned, nor a list such as 0-3,7, nor a file ({error})"))
    })?;
    let rows: Vec<[serde_json::Value; 2]> = serde_json::from_str(&text)
        .map_err(|error| fail(format!("expected [[key, value], …], one pair per layer: {error}")))?;
    let factor = |value: serde_json::Value| {
        let number = value.as_f64().or(value.as_bool().map(f64::from));
        let number = number.filter(|number| (0.0..=1.0).contains(number)).map(|number| number as f32);
        number.ok_or_else(|| fail(format!("`{value}` is no gate: expected 0 to 1, true or false")))
    };
    let rows = rows.into_iter().map(|[key, value]| Ok([factor(key)?, factor(value)?]));
    Ok(GateOverride::Table(rows.collect::<Result<_, FuserError>>()?))
}

impl GateOverride {
    /// The gates to run with, of a fuser that has learned `learned`, for the layers of `routed`.
    pub(super) fn apply(&self, learned: Gates, routed: &[bool]) -> Result<Gates, FuserError> {
        let layers = learned.len();
        let fail = |text: String, problem: String| Err(FuserError::Gates { text, problem });
        let mut gates = match self {
            GateOverride::Learned => learned,
            GateOverride::Open => vec![[1.0; 2]; layers],
            GateOverride::Closed => vec![[0.0; 2]; layers],
            GateOverride::Layers(ranges) => {
                let mut gates = vec![[0.0; 2]; layers];
                for range in ranges {
                    let LayerGates { first, last, keys, values } = *range;
                    if last >= layers {
                        return fail(
                            format!("{first}-{last}"),
                            format!("the receiver's layers are 0 to {}", layers.saturating_sub(1)),
                        );
                    }
                    for gate in &mut gates[first..=last] {
                        gate[0] = if keys { 1.0 } else { gate[0] };
                        gate[1] = if values { 1.0 } else { gate[1] };
                    }
                }
                gates
            }
            GateOverride::Table(table) if table.len() != layers => {
                return fail(
                    format!("table of {} layers", table.len()),
                    format!("the receiver has {layers}"),
                );
            }
            GateOverride::Table(table) => table.clone(),
        };
        let closed = gates.iter_mut().zip(routed).filter(|(_, routed)| !**routed);
        closed.for_each(|(gate, _)| *gate = [0.0; 2]);
        Ok(gates)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(text: &str, learned: Gates) -> Result<Gates, FuserError> {
        let routed = vec![true; learned.len()];
        text.parse::<GateOverride>()?.apply(learned, &routed)
    }

    #[test]
    fn words_and_lists() {
        let learned = vec![[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]];
        assert_eq!(apply("learned", learned.clone()).unwrap(), learned);
        assert_eq!(apply("open", learned.clone()).unwrap(), vec![[1.0; 2]; 4]);
        assert_eq!(apply("closed", learned.clone()).unwrap(), vec![[0.0; 2]; 4]);
        let list = apply("0-1,2k, 3v", learned.clone()).unwrap();
        assert_eq!(list, [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]);
        for bad in ["0-4", "3-1", "1--2", "0,,1", "99999999999999999999999", "0-", "no_such_file.json"] {
            let error = apply(bad, learned.clone()).unwrap_err().to_string();
            assert!(error.starts_with("gates `"), "{error}");
        }
    }

    #[test]
    fn a_table_from_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gates.json");
        let learned = vec![[0.0; 2]; 2];
        std::fs::write(&path, "[[1, 0], [true, 0.5]]").unwrap();
        assert_eq!(apply(path.to_str().unwrap(), learned.clone()).unwrap(), [[1.0, 0.0], [1.0, 0.5]]);
        for bad in ["[[1, 2], [0, 0]]", "[[1, 0]]", "[[1, null], [0, 0]]", "{}", "[[1, 0, 0], [0, 0, 0]]"] {
            std::fs::write(&path, bad).unwrap();
            assert!(apply(path.to_str().unwrap(), learned.clone()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_layer_without_projector_stays_closed() {
        let gates = GateOverride::Open.apply(vec![[0.0; 2]; 2], &[true, false]).unwrap();
        assert_eq!(gates, [[1.0; 2], [0.0; 2]]);
    }
}
