//! Settings that are written as the command line has them.

/// For `serde(with)`: types with `FromStr` and `Display`.
pub mod text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use std::{fmt::Display, str::FromStr};

    pub fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

pub mod device {
    pub use super::text::deserialize;
    use crate::backend::DeviceChoice;
    use serde::Serializer;

    pub fn serialize<S: Serializer>(device: &DeviceChoice, serializer: S) -> Result<S::Ok, S::Error> {
        match device {
            DeviceChoice::Auto => serializer.serialize_str("auto"),
            DeviceChoice::Cpu => serializer.serialize_str("cpu"),
            DeviceChoice::Cuda(n) => serializer.collect_str(&format_args!("cuda:{n}")),
        }
    }
}

pub mod compute {
    use crate::pipeline::ComputeType;
    use clap::ValueEnum;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub fn serialize<S: Serializer>(dtype: &ComputeType, serializer: S) -> Result<S::Ok, S::Error> {
        dtype.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ComputeType, D::Error> {
        let name = String::deserialize(deserializer)?;
        ComputeType::from_str(&name, false)
            .map_err(|_| D::Error::custom(format!("unknown dtype `{name}`: use f32 or bf16")))
    }
}
