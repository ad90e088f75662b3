//! Numbers of a running engine, in Prometheus' terms; names are vLLM's where it has them.

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder, core::Collector,
};
use std::time::Duration;

/// Seconds, from a tenth of a millisecond to half a minute.
const SECONDS: [f64; 17] =
    [0.0001, 0.0003, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0];

/// Counters and histograms of an engine.
pub struct Metrics {
    registry: Registry,
    pub running: IntGauge,
    pub waiting: IntGauge,
    /// By model: blocks that running requests hold, blocks in all, and the share of the former.
    pub blocks_used: IntGaugeVec,
    pub blocks_total: IntGaugeVec,
    pub cache_usage: GaugeVec,
    /// By model: tokens that were looked up in the prefix cache, and that were found.
    pub prefix_queries: IntCounterVec,
    pub prefix_hits: IntCounterVec,
    pub prompt_tokens: IntCounter,
    pub generation_tokens: IntCounter,
    /// By what became of them: stop, length, abandoned, failed, refused.
    pub requests: IntCounterVec,
    pub queue_time: Histogram,
    pub first_token: Histogram,
    pub inter_token: Histogram,
    pub latency: Histogram,
    pub decode: Histogram,
    pub receiver_prefill: Histogram,
    pub sharer_prefill: Histogram,
    pub fuse: Histogram,
    pub fuse_exposed: Histogram,
    /// Of the last fused request: gates that are open.
    pub gates_open: Gauge,
    pub communicated: IntCounter,
    /// Lanes of each decode pass.
    pub batch: Histogram,
}

impl Metrics {
    pub fn new() -> Metrics {
        let registry = Registry::new();
        Metrics {
            running: add(&registry, IntGauge::new("c2c:num_requests_running", "requests being answered")),
            waiting: add(&registry, IntGauge::new("c2c:num_requests_waiting", "requests in the queue")),
            blocks_used: by(&registry, "c2c:kv_cache_used_blocks", "cache blocks held by requests", "model"),
            blocks_total: by(&registry, "c2c:kv_cache_total_blocks", "cache blocks in all", "model"),
            cache_usage: add(
                &registry,
                GaugeVec::new(
                    Opts::new("c2c:kv_cache_usage_perc", "share of cache blocks held, 0 to 1"),
                    &["model"],
                ),
            ),
            prefix_queries: count(
                &registry,
                "c2c:prefix_cache_queries",
                "prompt tokens looked up in the prefix cache",
                "model",
            ),
            prefix_hits: count(
                &registry,
                "c2c:prefix_cache_hits",
                "prompt tokens found in the prefix cache",
                "model",
            ),
            prompt_tokens: add(&registry, IntCounter::new("c2c:prompt_tokens_total", "prompt tokens read")),
            generation_tokens: add(
                &registry,
                IntCounter::new("c2c:generation_tokens_total", "tokens generated"),
            ),
            requests: count(&registry, "c2c:requests_total", "requests by what became of them", "outcome"),
            queue_time: seconds(&registry, "c2c:request_queue_time_seconds", "time in the queue"),
            first_token: seconds(
                &registry,
                "c2c:time_to_first_token_seconds",
                "from arrival to the first token",
            ),
            inter_token: seconds(&registry, "c2c:inter_token_latency_seconds", "from token to token"),
            latency: seconds(&registry, "c2c:e2e_request_latency_seconds", "from arrival to the last token"),
            decode: seconds(&registry, "c2c:request_decode_time_seconds", "from the first token to the last"),
            receiver_prefill: seconds(
                &registry,
                "c2c:receiver_prefill_seconds",
                "work on the speaker's prompt",
            ),
            sharer_prefill: seconds(&registry, "c2c:sharer_prefill_seconds", "work on the sharers' prompts"),
            fuse: seconds(&registry, "c2c:fuse_seconds", "work of the fuser"),
            fuse_exposed: seconds(
                &registry,
                "c2c:fuse_exposed_seconds",
                "part of the fuse that no prefill hid",
            ),
            gates_open: add(
                &registry,
                Gauge::new("c2c:gate_open_ratio", "open gates of the last fused request, 0 to 1"),
            ),
            communicated: add(
                &registry,
                IntCounter::new("c2c:kv_bytes_communicated_total", "bytes of sharer cache read by fusers"),
            ),
            batch: add(
                &registry,
                Histogram::with_opts(
                    HistogramOpts::new("c2c:decode_batch_size", "sequences of a decode pass")
                        .buckets(vec![1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]),
                ),
            ),
            registry,
        }
    }

    /// The text that Prometheus reads.
    pub fn text(&self) -> String {
        let mut bytes = Vec::new();
        match TextEncoder::new().encode(&self.registry.gather(), &mut bytes) {
            Ok(()) => String::from_utf8(bytes).unwrap_or_default(),
            Err(error) => format!("# {error}\n"),
        }
    }

    /// Blocks of `model` that somebody holds, of all.
    pub fn blocks(&self, model: &str, used: usize, total: usize) {
        self.blocks_used.with_label_values(&[model]).set(used as i64);
        self.blocks_total.with_label_values(&[model]).set(total as i64);
        self.cache_usage.with_label_values(&[model]).set(used as f64 / total.max(1) as f64);
    }

    /// A prompt of `tokens` tokens, `found` of which were cached.
    pub fn looked_up(&self, model: &str, tokens: usize, found: usize) {
        self.prefix_queries.with_label_values(&[model]).inc_by(tokens as u64);
        self.prefix_hits.with_label_values(&[model]).inc_by(found as u64);
    }

    pub fn ended(&self, outcome: &str) {
        self.requests.with_label_values(&[outcome]).inc();
    }
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics::new()
    }
}

/// Names are constants of this file, so nothing here can fail that a test does not show.
fn add<C: Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<C>) -> C {
    let metric = metric.expect("a sound name");
    registry.register(Box::new(metric.clone())).expect("a name of its own");
    metric
}

fn by(registry: &Registry, name: &str, help: &str, label: &str) -> IntGaugeVec {
    add(registry, IntGaugeVec::new(Opts::new(name, help), &[label]))
}

fn count(registry: &Registry, name: &str, help: &str, label: &str) -> IntCounterVec {
    add(registry, IntCounterVec::new(Opts::new(name, help), &[label]))
}

fn seconds(registry: &Registry, name: &str, help: &str) -> Histogram {
    add(registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(SECONDS.to_vec())))
}

/// Notes a time.
pub(super) fn note(histogram: &Histogram, time: Duration) {
    histogram.observe(time.as_secs_f64());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_in_the_text() {
        let metrics = Metrics::new();
        metrics.blocks("receiver", 3, 12);
        metrics.looked_up("sharer", 40, 16);
        metrics.ended("stop");
        note(&metrics.fuse, Duration::from_millis(3));
        let text = metrics.text();
        for line in [
            "c2c:kv_cache_usage_perc{model=\"receiver\"} 0.25",
            "c2c:prefix_cache_hits{model=\"sharer\"} 16",
            "c2c:requests_total{outcome=\"stop\"} 1",
            "c2c:fuse_seconds_count 1",
            "c2c:num_requests_waiting 0",
        ] {
            assert!(text.lines().any(|found| found == line), "`{line}` is not in\n{text}");
        }
    }
}
