//! What a request may ask of the sampler.

use super::SamplingError;

/// Two places where the published C2C sampler differs from what Hugging Face and vLLM taught users to expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Rules {
    /// Top-p keeps the token that crosses p. Repetition penalty (over prompt and answer) first, then frequency and
    /// presence penalties, which count the answer only.
    #[default]
    Standard,
    /// As published: top-p drops the token that crosses p (but never the first). Presence, frequency, then repetition,
    /// all three counted over prompt and answer.
    Published,
}

/// How to pick tokens and when to end. The default is greedy until an end token or 256 tokens.
///
/// Applied in this order: penalties, temperature, top-k, top-p, min-p.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// ≥ 0; below 1e-5 is greedy, whatever the other filters say.
    pub temperature: f32,
    /// Keep the k most probable tokens, k ≥ 1.
    pub top_k: Option<usize>,
    /// Keep the most probable tokens whose probabilities sum to p, in (0, 1]; 1 = off.
    pub top_p: f32,
    /// Keep tokens at least this fraction as probable as the most probable one, in [0, 1]; 0 = off.
    pub min_p: f32,
    /// > 0; divides positive logits of seen tokens and multiplies the others; 1 = off.
    pub repetition_penalty: f32,
    /// Subtracted from logits of seen tokens; 0 = off.
    pub presence_penalty: f32,
    /// Subtracted from logits as often as the token was seen; 0 = off.
    pub frequency_penalty: f32,
    pub rules: Rules,
    pub seed: u64,
    /// Which of several answers to one request this is: each draws its own numbers.
    pub choice: u32,
    /// The answer ends before the first of these.
    pub stop: Vec<String>,
    /// Tokens that end the answer.
    pub eos: Vec<u32>,
    /// Go on past `eos`.
    pub ignore_eos: bool,
    /// ≥ 1
    pub max_new_tokens: usize,
    /// Report log-probabilities: of the token drawn and of this many most probable ones.
    pub logprobs: Option<usize>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            rules: Rules::Standard,
            seed: 0,
            choice: 0,
            stop: Vec::new(),
            eos: Vec::new(),
            ignore_eos: false,
            max_new_tokens: 256,
            logprobs: None,
        }
    }
}

impl SamplingParams {
    /// All stop strings together: a request must not make the matcher's automaton eat the memory.
    const MAX_STOP_BYTES: usize = 1 << 20;

    /// Below this a temperature is taken as 0, like the published sampler and vLLM do.
    const GREEDY_BELOW: f32 = 1e-5;

    /// The first field that is out of range, by name.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let check = |ok: bool, field, found: &dyn std::fmt::Display, expected| {
            if ok { Ok(()) } else { Err(SamplingError::Param { field, found: found.to_string(), expected }) }
        };
        let finite = f32::is_finite;
        check(
            finite(self.temperature) && self.temperature >= 0.0,
            "temperature",
            &self.temperature,
            "a number ≥ 0 (0 = greedy)",
        )?;
        check(self.top_k != Some(0), "top_k", &0, "at least 1 (leave it out to keep all tokens)")?;
        check(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", &self.top_p, "in (0, 1] (1 = off)")?;
        check((0.0..=1.0).contains(&self.min_p), "min_p", &self.min_p, "in [0, 1] (0 = off)")?;
        check(
            finite(self.repetition_penalty) && self.repetition_penalty > 0.0,
            "repetition_penalty",
            &self.repetition_penalty,
            "a number > 0 (1 = off)",
        )?;
        let penalties =
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)];
        for (field, value) in penalties {
            check(finite(value), field, &value, "a finite number (0 = off)")?;
        }
        check(
            !self.stop.iter().any(String::is_empty),
            "stop",
            &"an empty string",
            "made of non-empty strings",
        )?;
        let bytes: usize = self.stop.iter().map(String::len).sum();
        check(
            bytes <= Self::MAX_STOP_BYTES,
            "stop",
            &format_args!("{bytes} bytes long"),
            "at most 1 MiB in all",
        )?;
        check(self.max_new_tokens > 0, "max_new_tokens", &self.max_new_tokens, "at least 1")
    }

    /// Whether the most probable token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature < Self::GREEDY_BELOW
    }

    /// Whether `token` ends the answer.
    pub fn ends_at(&self, token: u32) -> bool {
        !self.ignore_eos && self.eos.contains(&token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_values_are_refused_by_name() {
        let ok = SamplingParams { temperature: 0.7, top_k: Some(1), top_p: 1.0, ..Default::default() };
        assert_eq!(ok.validate(), Ok(()));
        type Spoil = fn(&mut SamplingParams);
        let bad: [(&str, Spoil); 18] = [
            ("temperature", |p| p.temperature = -0.1),
            ("temperature", |p| p.temperature = f32::NAN),
            ("temperature", |p| p.temperature = f32::INFINITY),
            ("top_k", |p| p.top_k = Some(0)),
            ("top_p", |p| p.top_p = 0.0),
            ("top_p", |p| p.top_p = 1.01),
            ("top_p", |p| p.top_p = f32::NAN),
            ("min_p", |p| p.min_p = -0.1),
            ("min_p", |p| p.min_p = 1.1),
            ("min_p", |p| p.min_p = f32::NAN),
            ("repetition_penalty", |p| p.repetition_penalty = 0.0),
            ("repetition_penalty", |p| p.repetition_penalty = f32::NAN),
            ("presence_penalty", |p| p.presence_penalty = f32::INFINITY),
            ("frequency_penalty", |p| p.frequency_penalty = f32::NAN),
            ("stop", |p| p.stop = vec!["a".into(), String::new()]),
            ("stop", |p| p.stop = vec!["a".repeat(2 << 20)]),
            ("max_new_tokens", |p| p.max_new_tokens = 0),
            ("top_p", |p| p.top_p = -1.0),
        ];
        for (name, change) in bad {
            let mut params = ok.clone();
            change(&mut params);
            match params.validate() {
                Err(SamplingError::Param { field, .. }) => assert_eq!(field, name),
                other => panic!("{name}: {other:?}"),
            }
        }
    }
}
