//! The contract between a receiver, a sharer and a fuser: checked at load, and broken by name.

use super::config::FuserConfig;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use std::fmt;

/// One party of the contract, a receiver or a sharer as the fuser knows it: the shape of its cache, and what the
/// numbers in it mean.
///
/// `None` stands for "not recorded" (the published checkpoints record little); such items are not compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Party {
    /// For the reader.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// SHA-256 of the model's configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<Digest>,
    /// SHA-256 of its vocabulary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<Digest>,
    /// Rotary embedding in words: base, scaling, pairing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope: Option<String>,
    /// Normalisation of the keys in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub norm: Option<String>,
}

impl Party {
    pub fn new(layers: usize, kv_heads: usize, head_dim: usize) -> Party {
        Party {
            name: None,
            layers: Some(layers),
            kv_heads,
            head_dim,
            config: None,
            tokenizer: None,
            rope: None,
            norm: None,
        }
    }

    /// Elements of one token's keys in one layer.
    pub fn width(&self) -> usize {
        self.kv_heads.saturating_mul(self.head_dim)
    }
}

/// A SHA-256, written in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut digest = [0; 32];
        let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect();
        let digits = digits.filter(|digits| digits.len() == 64);
        let digits = digits.ok_or_else(|| D::Error::custom("a digest is 64 hexadecimal digits"))?;
        digest.iter_mut().zip(digits.chunks_exact(2)).for_each(|(byte, d)| *byte = d[0] << 4 | d[1]);
        Ok(Digest(digest))
    }
}

/// One thing the fuser expects of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ContractItem {
    /// `receiver.kv_heads`, `sharer.tokenizer`, …
    pub name: String,
    pub expected: String,
    pub found: String,
    pub ok: bool,
}

impl fmt::Display for ContractItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ContractItem { name, expected, found, .. } = self;
        write!(f, "{name} is {found}, the fuser was made for {expected}")
    }
}

/// The items that differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContractError {
    pub items: Vec<ContractItem>,
}

impl std::error::Error for ContractError {}

impl fmt::Display for ContractError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the fuser does not fit these models: ")?;
        for (i, item) in self.items.iter().enumerate() {
            write!(f, "{}{item}", if i == 0 { "" } else { "; " })?;
        }
        f.write_str(" (receiver and sharer the right way round? the right fuser for this pair?)")
    }
}

/// Compares what `fuser` was made for with the models at hand, item by item.
pub fn check_contract(fuser: &FuserConfig, receiver: &Party, sharer: &Party) -> Vec<ContractItem> {
    let mut items = Vec::new();
    for (side, expected, found) in
        [("receiver", &fuser.receiver, receiver), ("sharer", &fuser.sharer, sharer)]
    {
        let mut item = |name: &str, expected: Option<String>, found: Option<String>| {
            items.push(ContractItem {
                name: format!("{side}.{name}"),
                ok: expected.is_none() || found.is_none() || expected == found,
                expected: expected.unwrap_or_else(|| "not recorded".into()),
                found: found.unwrap_or_else(|| "unknown".into()),
            });
        };
        let text = |n: usize| Some(n.to_string());
        item("layers", expected.layers.and_then(text), found.layers.and_then(text));
        item("kv_heads", text(expected.kv_heads), text(found.kv_heads));
        item("head_dim", text(expected.head_dim), text(found.head_dim));
        item("rope", expected.rope.clone(), found.rope.clone());
        item("norm", expected.norm.clone(), found.norm.clone());
        let digest = |digest: Option<Digest>| digest.map(|digest| digest.to_string());
        item("tokenizer", digest(expected.tokenizer), digest(found.tokenizer));
        item("config", digest(expected.config), digest(found.config));
    }
    let highest = |layer: fn(&super::Route) -> usize| fuser.routes.iter().map(layer).max().unwrap_or(0);
    for (name, layers, highest) in [
        ("mapping.receiver", receiver.layers, highest(|route| route.receiver)),
        ("mapping.sharer", sharer.layers, highest(|route| route.sharer)),
    ] {
        items.push(ContractItem {
            name: name.into(),
            expected: format!("more than {highest} layers"),
            found: layers.map_or("unknown".into(), |layers| format!("{layers} layers")),
            ok: layers.is_none_or(|layers| highest < layers),
        });
    }
    items
}

/// [`check_contract`] as an error.
pub fn require_contract(fuser: &FuserConfig, receiver: &Party, sharer: &Party) -> Result<(), ContractError> {
    let items: Vec<_> = check_contract(fuser, receiver, sharer).into_iter().filter(|item| !item.ok).collect();
    if items.is_empty() { Ok(()) } else { Err(ContractError { items }) }
}

#[cfg(test)]
mod tests {
    use super::{super::config::*, *};

    #[test]
    fn each_difference_is_named() {
        let full = |layers| Party {
            name: None,
            config: Some(Digest([1; 32])),
            tokenizer: Some(Digest([2; 32])),
            rope: Some("base 10000".into()),
            norm: Some("none".into()),
            ..Party::new(layers, 2, 8)
        };
        let (receiver, sharer) = (full(3), full(2));
        let config = FuserConfig::new(
            Kind::C2c,
            16,
            24,
            Mapping::LastAligned,
            &[0, 0, 1],
            receiver.clone(),
            sharer.clone(),
        );
        require_contract(&config, &receiver, &sharer).unwrap();
        type Change = fn(&mut Party);
        let changes: [(&str, Change); 7] = [
            ("layers", |m| m.layers = Some(9)),
            ("kv_heads", |m| m.kv_heads = 9),
            ("head_dim", |m| m.head_dim = 9),
            ("rope", |m| m.rope = Some("base 500000".into())),
            ("norm", |m| m.norm = Some("rms".into())),
            ("tokenizer", |m| m.tokenizer = Some(Digest([9; 32]))),
            ("config", |m| m.config = Some(Digest([9; 32]))),
        ];
        for (name, change) in changes {
            for side in ["receiver", "sharer"] {
                let (mut r, mut s) = (receiver.clone(), sharer.clone());
                change(if side == "receiver" { &mut r } else { &mut s });
                let error = require_contract(&config, &r, &s).unwrap_err();
                let names: Vec<_> = error.items.iter().map(|item| item.name.as_str()).collect();
                assert_eq!(names, [format!("{side}.{name}")]);
            }
        }
        let error = require_contract(&config, &receiver, &full(1)).unwrap_err();
        assert!(error.to_string().contains("mapping.sharer is 1 layers"), "{error}");
    }

    #[test]
    fn what_was_not_recorded_is_not_compared() {
        let bare = Party { layers: None, ..Party::new(0, 2, 8) };
        let config = FuserConfig::new(Kind::C2c, 8, 8, Mapping::Custom, &[0], bare.clone(), bare);
        let model = Party { rope: Some("base 10000".into()), ..Party::new(1, 2, 8) };
        require_contract(&config, &model, &model).unwrap();
    }
}
