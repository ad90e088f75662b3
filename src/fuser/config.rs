//! What a fuser is, apart from its weights: `fuser.json`.

use super::{AllInOneConfig, FuserError, contract::Party};
use crate::{
    align::{Fraction, LayerMapping},
    backend::DType,
    cache::KeyForm,
};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// The version of `fuser.json` that this program writes, and the newest it reads.
pub const VERSION: u32 = 1;

/// No dimension of a fuser in use comes near; keeps sizes computed from a file far from overflow.
const MAX_DIM: usize = 1 << 20;

/// A fuser between one sharer and one receiver. Serialised as `fuser.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FuserConfig {
    pub version: u32,
    pub kind: Kind,
    /// Width of the projector's residual stream.
    pub hidden: usize,
    /// Inner width of its FFN blocks.
    pub intermediate: usize,
    /// 2 linear maps around `num_layers − 2` blocks; at least 3.
    pub num_layers: usize,
    #[serde(with = "dtype_name")]
    pub dtype: DType,
    pub mapping: Mapping,
    /// Which sharer layer each receiver layer reads, and with which projector.
    pub routes: Vec<Route>,
    pub receiver: Party,
    pub sharer: Party,
    #[serde(default)]
    pub training: Training,
    /// The part of a prompt that it was trained to fuse, where not all: what inference fuses unless told otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fraction: Option<Fraction>,
    /// What an AllInOneProjector is besides; of that kind alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub all_in_one: Option<AllInOneConfig>,
    /// How keys were rotated; of a ridge map alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotations: Option<Rotations>,
}

/// How the keys of both models are rotated, which a map of keys without rotation has to know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotations {
    pub receiver: KeyForm,
    pub sharer: KeyForm,
}

/// How the fusers of the paper and its ablations differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Kind {
    /// The published one.
    C2c,
    /// Published with parts removed: 0 none; 1 no weight per head; 2 also no gates; 3 also no target, the projection
    /// replaces it; 4 no gates only.
    Ablation(u8),
    /// The complex variant: the sharer's columns pass a stage of their own before they meet the receiver's.
    C2cC,
    /// The compact one: keys and values of both models meet in one narrow latent, from which keys and values are made.
    Latent,
    /// The published program's earlier, configurable one.
    AllInOne,
    /// A linear map that is solved for instead of trained, of keys without their rotation and of values.
    Ridge,
}

impl Kind {
    /// Whether each head of each token has a learned weight.
    pub fn has_scalar(self) -> bool {
        !matches!(self, Kind::Ablation(1..=3) | Kind::AllInOne | Kind::Ridge)
    }

    /// Whether layers have learned gates; without, they are always open (an AllInOneProjector's gate is part of its computation).
    pub fn has_gates(self) -> bool {
        !matches!(self, Kind::Ablation(2..=4) | Kind::AllInOne | Kind::Ridge)
    }

    /// Whether the projector reads the receiver's columns and adds to them.
    pub fn has_target(self) -> bool {
        !matches!(self, Kind::Ablation(3) | Kind::Ridge)
    }

    pub fn has_source_stage(self) -> bool {
        self == Kind::C2cC
    }

    /// Whether what becomes keys and what becomes values both read keys and values.
    pub fn is_joint(self) -> bool {
        self == Kind::Latent
    }

    /// Whether an op of its own computes it ([`crate::ops::fuse_baseline()`]), which not every device has.
    pub fn is_baseline(self) -> bool {
        matches!(self, Kind::AllInOne | Kind::Ridge)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::C2c => f.write_str("c2c"),
            Kind::Ablation(level) => write!(f, "ablation:{level}"),
            Kind::C2cC => f.write_str("c2c-c"),
            Kind::Latent => f.write_str("latent"),
            Kind::AllInOne => f.write_str("all-in-one"),
            Kind::Ridge => f.write_str("ridge"),
        }
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let level = |level: &str| level.parse().ok().filter(|level| *level <= 4).map(Kind::Ablation);
        match text {
            "c2c" => Some(Kind::C2c),
            "c2c-c" => Some(Kind::C2cC),
            "latent" => Some(Kind::Latent),
            "all-in-one" => Some(Kind::AllInOne),
            "ridge" => Some(Kind::Ridge),
            _ => text.strip_prefix("ablation:").and_then(level),
        }
        .ok_or_else(|| format!("unknown kind of fuser `{text}`: use c2c, c2c-c, latent, all-in-one, ridge or ablation:0 … ablation:4"))
    }
}

impl TryFrom<String> for Kind {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Kind> for String {
    fn from(kind: Kind) -> String {
        kind.to_string()
    }
}

/// The rule that [`FuserConfig::routes`] was made by. For the reader: the routes are what counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mapping {
    LastAligned,
    KNearest,
    /// Made by hand, or not recorded.
    Custom,
}

impl From<LayerMapping> for Mapping {
    /// Only the best candidate of a mapping is ever used, so its `k` does not matter.
    fn from(mapping: LayerMapping) -> Mapping {
        match mapping {
            LayerMapping::LastAligned { .. } => Mapping::LastAligned,
            LayerMapping::KNearest { .. } => Mapping::KNearest,
        }
    }
}

/// Receiver layer `receiver` is fused with sharer layer `sharer` by projector `projector`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    pub receiver: usize,
    pub sharer: usize,
    pub projector: usize,
}

/// Settings that only training reads. The defaults are the published ones.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    pub dropout: f64,
    pub initial_temperature: f64,
    pub final_temperature: f64,
    pub anneal_steps: u64,
}

impl Default for Training {
    fn default() -> Self {
        Training { dropout: 0.1, initial_temperature: 1.0, final_temperature: 0.001, anneal_steps: 1929 }
    }
}

impl FuserConfig {
    /// An untrained fuser's, one projector per receiver layer: layer `i` reads sharer layer `sources[i]`.
    pub fn new(
        kind: Kind,
        hidden: usize,
        intermediate: usize,
        mapping: Mapping,
        sources: &[usize],
        receiver: Party,
        sharer: Party,
    ) -> FuserConfig {
        let route = |(receiver, &sharer)| Route { receiver, sharer, projector: receiver };
        FuserConfig {
            version: VERSION,
            kind,
            hidden,
            intermediate,
            num_layers: 3,
            dtype: DType::F32,
            mapping,
            routes: sources.iter().enumerate().map(route).collect(),
            receiver,
            sharer,
            training: Training::default(),
            fraction: None,
            all_in_one: None,
            rotations: None,
        }
    }

    /// Projectors, numbered from 0.
    pub fn projectors(&self) -> usize {
        self.routes.iter().map(|route| route.projector + 1).max().unwrap_or(0)
    }

    /// Checks everything that sizes are computed from.
    pub fn validate(&self) -> Result<(), FuserError> {
        let config = |field, problem| Err(FuserError::Config { field, problem });
        if self.version == 0 || self.version > VERSION {
            return config(
                "version",
                format!("is {}; this program reads 1 to {VERSION}: use a newer one", self.version),
            );
        }
        let dims = [
            ("hidden", self.hidden),
            ("intermediate", self.intermediate),
            ("receiver.kv_heads", self.receiver.kv_heads),
            ("receiver.head_dim", self.receiver.head_dim),
            ("sharer.kv_heads", self.sharer.kv_heads),
            ("sharer.head_dim", self.sharer.head_dim),
        ];
        for (field, dim) in dims {
            if dim == 0 || dim > MAX_DIM {
                return config(field, format!("is {dim}; expected 1 to {MAX_DIM}"));
            }
        }
        for (field, shape) in [("receiver", &self.receiver), ("sharer", &self.sharer)] {
            if shape.width() > MAX_DIM {
                return config(field, format!("is {} wide; expected at most {MAX_DIM}", shape.width()));
            }
        }
        let least = if self.kind == Kind::AllInOne { 1 } else { 3 };
        if !(least..=1024).contains(&self.num_layers) {
            return config("num_layers", format!("is {}; expected {least} to 1024", self.num_layers));
        }
        self.validate_baseline()?;
        if !matches!(self.dtype, DType::F32 | DType::Bf16 | DType::F16) {
            return config("dtype", format!("is {}; expected F32, BF16 or F16", self.dtype));
        }
        self.validate_routes()
    }

    fn validate_baseline(&self) -> Result<(), FuserError> {
        let config = |field, problem: &str| Err(FuserError::Config { field, problem: problem.into() });
        match (self.kind, &self.all_in_one, &self.rotations) {
            (Kind::AllInOne, Some(all_in_one), None) => all_in_one.validate(),
            (Kind::Ridge, None, Some(Rotations { receiver, sharer })) => {
                let fits = |form: &KeyForm, party: &Party| match form {
                    KeyForm::PreRope => true,
                    KeyForm::PostRope(all) => all.iter().all(|one| 2 * one.inv_freq.len() == party.head_dim),
                };
                match fits(receiver, &self.receiver) && fits(sharer, &self.sharer) {
                    true => Ok(()),
                    false => config("rotations", "are not of the heads' size"),
                }
            }
            (Kind::AllInOne, ..) => config("all_in_one", "belongs to kind all-in-one, which needs it alone"),
            (Kind::Ridge, ..) => config("rotations", "belong to kind ridge, which needs them alone"),
            (_, None, None) => Ok(()),
            _ => config("kind", "has no all_in_one and no rotations: remove them"),
        }
    }

    fn validate_routes(&self) -> Result<(), FuserError> {
        let config = |problem| Err(FuserError::Config { field: "routes", problem });
        let (count, limit) = (self.routes.len(), 1 << 16);
        if count == 0 || count > limit {
            return config(format!("has {count} entries; expected 1 to {limit}"));
        }
        let mut used = vec![false; count];
        let mut receivers: Vec<usize> = self.routes.iter().map(|route| route.receiver).collect();
        receivers.sort_unstable();
        if let Some(pair) = receivers.windows(2).find(|pair| pair[0] == pair[1]) {
            return config(format!("names receiver layer {} twice", pair[0]));
        }
        for route in &self.routes {
            // Layers number in the tens; this bounds tables made from the routes.
            if route.receiver >= limit || route.sharer >= limit {
                return config(format!("{route:?} is out of range: expected layers below {limit}"));
            }
            match used.get_mut(route.projector) {
                Some(used) => *used = true,
                None => return config(format!("{route:?} names one of more projectors than routes")),
            }
        }
        match used.iter().take(self.projectors()).position(|used| !used) {
            Some(unused) => config(format!("leave projector {unused} unused")),
            None => Ok(()),
        }
    }
}

mod dtype_name {
    use super::DType;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(dtype: &DType, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(dtype)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DType, D::Error> {
        let name = String::deserialize(deserializer)?;
        let known = DType::ALL.into_iter().find(|dtype| dtype.to_string() == name);
        known.ok_or_else(|| D::Error::custom(format!("unknown dtype `{name}`: expected F32, BF16 or F16")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> FuserConfig {
        let shape = |layers| Party::new(layers, 2, 8);
        FuserConfig::new(Kind::C2c, 16, 24, Mapping::LastAligned, &[0, 0, 1], shape(3), shape(2))
    }

    #[test]
    fn json_round_trip() {
        for kind in [Kind::C2c, Kind::C2cC, Kind::Latent, Kind::Ablation(3)] {
            let config = FuserConfig { kind, ..config() };
            let text = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<FuserConfig>(&text).unwrap(), config);
            config.validate().unwrap();
        }
    }

    #[test]
    fn unknown_fields_and_kinds_are_refused() {
        let text = serde_json::to_string(&config()).unwrap();
        let error = serde_json::from_str::<FuserConfig>(&text.replacen("\"hidden\"", "\"hiden\"", 1));
        assert!(error.unwrap_err().to_string().contains("hiden"));
        let error = serde_json::from_str::<FuserConfig>(&text.replacen("\"c2c\"", "\"ablation:5\"", 1));
        assert!(error.unwrap_err().to_string().contains("ablation:5"));
        let error = serde_json::from_str::<FuserConfig>(&text.replacen("\"F32\"", "\"F31\"", 1));
        assert!(error.unwrap_err().to_string().contains("F31"));
    }

    #[test]
    fn bad_values_are_named() {
        let route = |receiver, projector| Route { receiver, sharer: 0, projector };
        let cases: [(FuserConfig, &str); 9] = [
            (FuserConfig { version: 9, ..config() }, "version"),
            (FuserConfig { hidden: 0, ..config() }, "hidden"),
            (FuserConfig { intermediate: usize::MAX, ..config() }, "intermediate"),
            (FuserConfig { num_layers: 2, ..config() }, "num_layers"),
            (FuserConfig { num_layers: usize::MAX, ..config() }, "num_layers"),
            (FuserConfig { dtype: DType::Q8_0, ..config() }, "dtype"),
            (FuserConfig { routes: vec![], ..config() }, "routes"),
            (FuserConfig { routes: vec![route(0, 0), route(0, 1)], ..config() }, "twice"),
            (FuserConfig { routes: vec![route(0, usize::MAX - 1)], ..config() }, "projectors"),
        ];
        for (config, word) in cases {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(word), "{error} should name {word}");
        }
    }
}
