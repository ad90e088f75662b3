//! The cache that a model writes, and what a fuser has to know of it.

use super::{ModelConfig, Rope, RopeScaling};
use crate::{
    backend::{Backend, DType},
    cache::{self, CacheShape, KeyForm, PagedKv, Rotation},
};
use std::sync::Arc;

impl ModelConfig {
    /// Pages for `blocks · block_size` tokens of this model, F32 or BF16.
    pub fn paged_kv(
        &self,
        backend: &Arc<dyn Backend>,
        blocks: usize,
        block_size: usize,
        dtype: DType,
    ) -> Result<PagedKv, cache::Error> {
        let shape = CacheShape { layers: self.layers, kv_heads: self.kv_heads, head_dim: self.head_dim };
        PagedKv::new(backend, shape, self.key_form(), blocks, block_size, dtype)
    }

    /// How this model's keys lie in its cache.
    pub fn key_form(&self) -> KeyForm {
        let rotation = |local: bool| {
            let (inv_freq, scale) = self.inverse_frequencies(local);
            Rotation { inv_freq, scale }
        };
        let rotations = match self.rope_local {
            None => vec![rotation(false)],
            Some(_) => self.local.iter().map(|&local| rotation(local)).collect(),
        };
        KeyForm::PostRope(rotations)
    }

    /// Rotary embedding in words, the same for the same rotation.
    pub fn rope_in_words(&self) -> String {
        let one = |rope: &Rope| {
            let scaling = match &rope.scaling {
                RopeScaling::None => String::new(),
                RopeScaling::Linear { factor } => format!(", linear × {factor}"),
                // The same scaling reaches GGUF files as a list of divisors.
                RopeScaling::Llama3 { .. } | RopeScaling::Divisors(_) => ", llama3".into(),
                RopeScaling::Yarn { factor, .. } => format!(", yarn × {factor}"),
            };
            format!("base {}{scaling}", rope.theta)
        };
        match &self.rope_local {
            None => one(&self.rope),
            Some(local) => format!("{}; local {}", one(&self.rope), one(local)),
        }
    }
}
