//! An answer and what it cost: what `--json` prints (docs/answer.md).

use super::{ComputeType, FinishReason, Mode, Overlap, PrefillReport};
use crate::fuser::Gates;
use serde::{Serialize, Serializer};
use std::time::Duration;

/// Milliseconds of each phase. `fuse_exposed` is the part of the fuse that no prefill hid.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct TimingsMs {
    pub load: f64,
    pub tokenize: f64,
    pub align: f64,
    pub sharer_prefill: f64,
    pub receiver_prefill: f64,
    pub fuse: f64,
    pub fuse_exposed: f64,
    /// From the question to the first token, text-to-text's first stage included.
    pub first_token: f64,
    /// From the first token to the last.
    pub decode: f64,
    /// From the question to the end of the answer.
    pub total: f64,
}

/// Tokens per second of each phase; `None` where there was nothing to time.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct TokensPerSecond {
    pub receiver_prefill: Option<f64>,
    pub sharer_prefill: Option<f64>,
    pub decode: Option<f64>,
}

/// An answer and what it cost.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    pub mode: Mode,
    pub text: String,
    pub tokens: Vec<u32>,
    pub finish_reason: FinishReason,
    pub prompt_tokens: usize,
    pub sharer_prompt_tokens: Vec<usize>,
    /// Receiver tokens that took a sharer's column.
    pub fused_tokens: usize,
    pub timings_ms: TimingsMs,
    pub tokens_per_s: TokensPerSecond,
    /// For each sharer, for each receiver layer: factors of keys and values, 0 = closed, 1 = open. Written without the
    /// outer list where there is one sharer.
    #[serde(serialize_with = "one_or_all")]
    pub gates: Vec<Gates>,
    /// Memory of the caches of all models that took part; of the larger stage in text-to-text mode.
    pub kv_bytes: u64,
    /// Bytes of sharer cache that the fuser read: what went from model to model.
    pub fused_kv_bytes: u64,
    /// The sharer's text, in text-to-text mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub background: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<crate::engine::TokenLogprobs>,
    pub peak_rss_bytes: u64,
    pub device: &'static str,
    pub threads: usize,
    pub dtype: ComputeType,
    pub overlap: Overlap,
}

fn one_or_all<S: Serializer>(gates: &[Gates], serializer: S) -> Result<S::Ok, S::Error> {
    match gates {
        [one] => one.serialize(serializer),
        all => all.serialize(serializer),
    }
}

impl Answer {
    pub(super) fn prefill(&mut self, report: &PrefillReport) {
        self.timings_ms.sharer_prefill = ms(report.sharers.iter().sum());
        self.timings_ms.receiver_prefill = ms(report.receiver);
        self.timings_ms.fuse = ms(report.fuse);
        self.timings_ms.fuse_exposed = ms(report.fuse_exposed);
        self.fused_kv_bytes = report.fused_kv_bytes;
        self.fused_tokens = report.fused_tokens;
    }

    pub(super) fn rates(&mut self) {
        let rate = |tokens: usize, ms: f64| (tokens > 0 && ms > 0.0).then(|| tokens as f64 / ms * 1e3);
        self.tokens_per_s = TokensPerSecond {
            receiver_prefill: rate(self.prompt_tokens, self.timings_ms.receiver_prefill),
            sharer_prefill: rate(self.sharer_prompt_tokens.iter().sum(), self.timings_ms.sharer_prefill),
            decode: rate(self.tokens.len().saturating_sub(1), self.timings_ms.decode),
        };
    }
}

pub(super) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Largest resident size of this process so far; 0 where the system does not tell.
pub fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
