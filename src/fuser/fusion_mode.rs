//! How the fusers of several sharers meet in one receiver.

use std::{fmt, str::FromStr};

/// How the fusers of several sharers meet (spec 1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FusionMode {
    /// Every fuser reads the receiver's plain cache; what they add is summed: `base` is `out` from the second on.
    Parallel,
    /// Each fuser reads what the one before left: `target` and `base` are `out` from the second on.
    #[default]
    Sequential,
}

impl FromStr for FusionMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "parallel" => Ok(FusionMode::Parallel),
            "sequential" => Ok(FusionMode::Sequential),
            _ => Err(format!("unknown fusion mode `{text}`: use parallel or sequential")),
        }
    }
}

impl fmt::Display for FusionMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FusionMode::Parallel => "parallel",
            FusionMode::Sequential => "sequential",
        })
    }
}
