//! Logits to token.

use super::{Rules, SamplingError, SamplingParams, TokenCounts, TokenLogprobs, select, softmax};
use crate::{
    ops::{MAX_RANKED, SampleRow, SampledRow},
    rng::{Purpose, Rng, Stream},
};

/// A token drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    pub token: u32,
    /// Where [`SamplingParams::logprobs`] asks for them.
    pub logprobs: Option<TokenLogprobs>,
}

/// Tokens that may be drawn, with unnormalised weights: the most probable first if a filter was at work, else in
/// vocabulary order.
#[derive(Clone, Debug, Default)]
pub struct Distribution {
    weights: Vec<(u32, f32)>,
    total: f64,
}

impl Distribution {
    /// (token, probability); sums to 1.
    pub fn probabilities(&self) -> impl Iterator<Item = (u32, f32)> + '_ {
        self.weights.iter().map(|&(token, weight)| (token, (f64::from(weight) / self.total) as f32))
    }

    /// The token at `u` in [0, 1) of the cumulative distribution; `None` only of an empty one.
    pub fn draw(&self, u: f64) -> Option<u32> {
        let target = u * self.total;
        let mut sum = 0.0;
        let drawn = self.weights.iter().find(|(_, weight)| {
            sum += f64::from(*weight);
            sum > target
        });
        // Rounding may leave the sum a hair below the target.
        drawn.or_else(|| self.weights.iter().rfind(|(_, weight)| *weight > 0.0)).map(|&(token, _)| token)
    }

    fn keep(&mut self, len: usize) {
        self.weights.truncate(len);
        self.total = self.weights.iter().map(|&(_, weight)| f64::from(weight)).sum();
    }
}

/// The sampler of one answer: parameters, the tokens seen so far, and the step that its random numbers are keyed by.
/// What it draws depends on nothing else: the same seed gives the same text in any batch.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    counts: TokenCounts,
    step: u32,
    /// Logits after penalties, kept between steps for its memory.
    adjusted: Vec<f32>,
}

impl Sampler {
    /// `prompt` counts for penalties.
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Result<Sampler, SamplingError> {
        params.validate()?;
        Ok(Sampler { params, counts: TokenCounts::new(prompt), step: 0, adjusted: Vec::new() })
    }

    /// Draws the next token from `logits` (`[vocab]`, one row) and takes it as the answer's next.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Sampled, SamplingError> {
        let mut adjusted = std::mem::take(&mut self.adjusted);
        let row = self.penalised(logits, &mut adjusted);
        let token = if self.params.is_greedy() { self.argmax(row) } else { self.draw(row) };
        self.adjusted = adjusted;
        let token = token?;
        self.counts.push(token);
        self.step += 1;
        let logprobs = self.params.logprobs.map(|n| TokenLogprobs::new(logits, token, n));
        Ok(Sampled { token, logprobs })
    }

    /// What a device needs to draw the next token as [`Sampler::sample`] would; `None` where that takes the logits: with penalties
    /// or log-probabilities, or more ranked tokens than a device has room for.
    pub fn row(&self) -> Option<SampleRow> {
        let p = &self.params;
        let too_many = p.top_k.is_some_and(|k| k > MAX_RANKED);
        if p.penalises() || p.logprobs.is_some() || too_many {
            return None;
        }
        Some(SampleRow {
            seed: [p.seed as u32, (p.seed >> 32) as u32],
            choice: p.choice,
            step: self.step,
            temperature: if p.is_greedy() { 0.0 } else { p.temperature },
            top_k: p.top_k.unwrap_or(0) as u32,
            top_p: p.top_p,
            min_p: p.min_p,
            published: u32::from(p.rules == Rules::Published),
        })
    }

    /// Takes what a device drew as the answer's next token; `None` if it could not draw.
    pub fn accept(&mut self, row: &SampledRow) -> Result<Option<Sampled>, SamplingError> {
        match row.status {
            SampledRow::DRAWN => {}
            SampledRow::NEEDS_HOST => return Ok(None),
            SampledRow::NOT_A_NUMBER => {
                return Err(self.unusable(&format!("token {} is not a number", row.token)));
            }
            SampledRow::INFINITE => return Err(self.unusable("a logit is infinite")),
            _ => return Err(self.unusable("no token is possible")),
        }
        self.counts.push(row.token);
        self.step += 1;
        Ok(Some(Sampled { token: row.token, logprobs: None }))
    }

    /// The distribution that the next token is drawn from: for analysis and tests.
    pub fn distribution(&self, logits: &[f32]) -> Result<Distribution, SamplingError> {
        let mut adjusted = Vec::new();
        let row = self.penalised(logits, &mut adjusted);
        if self.params.is_greedy() {
            return Ok(Distribution { weights: vec![(self.argmax(row)?, 1.0)], total: 1.0 });
        }
        self.filter(row)
    }

    /// Probability of each token of the vocabulary to be drawn next.
    pub fn probabilities(&self, logits: &[f32]) -> Result<Vec<f32>, SamplingError> {
        let mut all = vec![0.0; logits.len()];
        for (token, p) in self.distribution(logits)?.probabilities() {
            all[token as usize] = p;
        }
        Ok(all)
    }

    fn penalised<'a>(&self, logits: &'a [f32], adjusted: &'a mut Vec<f32>) -> &'a [f32] {
        if !self.params.penalises() {
            return logits;
        }
        adjusted.clear();
        adjusted.extend_from_slice(logits);
        self.counts.penalise(&self.params, adjusted);
        adjusted
    }

    fn argmax(&self, row: &[f32]) -> Result<u32, SamplingError> {
        let max = self.check(row)?;
        select::position(row, max).ok_or_else(|| self.unusable("no token is possible"))
    }

    fn draw(&self, row: &[f32]) -> Result<u32, SamplingError> {
        let rng = Rng::new(self.params.seed, Stream::new(Purpose::Sampling, self.params.choice), self.step);
        let drawn = self.filter(row)?.draw(rng.uniform_f64(0));
        drawn.ok_or_else(|| self.unusable("no token is possible"))
    }

    fn unusable(&self, what: &str) -> SamplingError {
        SamplingError::Logits { step: self.step, what: what.into() }
    }

    /// Refuses a row in which there is nothing to choose.
    fn check(&self, row: &[f32]) -> Result<f32, SamplingError> {
        if let Some(token) = select::find_nan(row) {
            return Err(self.unusable(&format!("token {token} is not a number")));
        }
        let max = select::max(row);
        match max {
            f32::INFINITY => Err(self.unusable("a logit is infinite")),
            f32::NEG_INFINITY => Err(self.unusable("no token is possible")),
            _ => Ok(max),
        }
    }

    /// Temperature, top-k, top-p, min-p.
    fn filter(&self, row: &[f32]) -> Result<Distribution, SamplingError> {
        let p = &self.params;
        let max = self.check(row)?;
        // Relative to the most probable token, which weighs 1.
        let weight = |x: f32| softmax::exp((x - max) / p.temperature);
        let weigh = |ranked: Vec<(u32, f32)>| ranked.into_iter().map(|(id, x)| (id, weight(x))).collect();
        let mut kept = Distribution::default();
        match p.top_k.filter(|&k| k < row.len()) {
            Some(k) => {
                kept.weights = weigh(select::top(row, k));
                kept.keep(k);
                kept.keep(self.nucleus(&kept).unwrap_or(k));
            }
            None if p.top_p < 1.0 => {
                // The nucleus is nearly always small: look for it in the head of the ranking first.
                kept.total = softmax::sum_exp(row, max, p.temperature);
                let mut head = 128;
                let len = loop {
                    kept.weights = weigh(select::top(row, head));
                    match self.nucleus(&kept) {
                        Some(len) => break len,
                        None if head >= row.len() => break row.len(),
                        None => head *= 8,
                    }
                };
                kept.keep(len);
            }
            None => {
                kept.weights = row.iter().zip(0..).map(|(&x, id)| (id, weight(x))).collect();
                kept.keep(row.len());
            }
        }
        if p.min_p > 0.0 {
            kept.weights.retain(|&(_, weight)| weight >= p.min_p);
            kept.keep(row.len());
        }
        Ok(kept)
    }

    /// How many of `ranked` (of whose `total` it may be the head) top-p keeps; `None` if that can't be seen in it.
    fn nucleus(&self, ranked: &Distribution) -> Option<usize> {
        let limit = f64::from(self.params.top_p) * ranked.total;
        if self.params.top_p >= 1.0 {
            return None;
        }
        let mut sum = 0.0;
        let crossing = ranked.weights.iter().position(|&(_, weight)| {
            sum += f64::from(weight);
            match self.params.rules {
                Rules::Standard => sum >= limit,
                Rules::Published => sum > limit,
            }
        })?;
        Some(match self.params.rules {
            Rules::Standard => crossing + 1,
            Rules::Published => crossing.max(1),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(params: SamplingParams) -> Sampler {
        Sampler::new(params, &[]).unwrap()
    }

    /// Probabilities 0.5, 0.25, 0.125, 0.125, shuffled.
    fn halves() -> Vec<f32> {
        [0.125f32, 0.5, 0.125, 0.25].map(f32::ln).to_vec()
    }

    fn kept(params: SamplingParams) -> Vec<u32> {
        let probabilities = sampler(params).probabilities(&halves()).unwrap();
        assert!((probabilities.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        (0..4).filter(|&i| probabilities[i as usize] > 0.0).collect()
    }

    #[test]
    fn filters() {
        let on = SamplingParams { temperature: 1.0, ..Default::default() };
        assert_eq!(kept(on.clone()), [0, 1, 2, 3]);
        assert_eq!(kept(SamplingParams { top_k: Some(2), ..on.clone() }), [1, 3]);
        // Of equals the lower id stays.
        assert_eq!(kept(SamplingParams { top_k: Some(3), ..on.clone() }), [0, 1, 3]);
        let nucleus = |top_p, rules| kept(SamplingParams { top_p, rules, ..on.clone() });
        assert_eq!(nucleus(0.6, Rules::Standard), [1, 3]);
        assert_eq!(nucleus(0.6, Rules::Published), [1]);
        assert_eq!(nucleus(0.1, Rules::Standard), [1]);
        assert_eq!(nucleus(0.1, Rules::Published), [1]);
        assert_eq!(nucleus(0.99, Rules::Standard), [0, 1, 2, 3]);
        assert_eq!(kept(SamplingParams { min_p: 0.4, ..on.clone() }), [1, 3]);
        assert_eq!(kept(SamplingParams { min_p: 1.0, top_p: 0.99, ..on.clone() }), [1]);
        // A low temperature sharpens before top-p is applied: 0.25/0.0625 of 0.25+0.0625+2·0.015625.
        assert_eq!(kept(SamplingParams { temperature: 0.5, top_p: 0.7, ..on }), [1]);
    }

    #[test]
    fn a_wide_nucleus_is_found_past_the_first_head() {
        let flat = vec![0.0; 5000];
        let params = SamplingParams { temperature: 1.0, top_p: 0.5, ..Default::default() };
        let kept = sampler(params).distribution(&flat).unwrap();
        assert_eq!(kept.weights.len(), 2500);
    }

    #[test]
    fn draws_follow_the_probabilities_and_the_seed() {
        let params = SamplingParams { temperature: 1.0, seed: 11, ..Default::default() };
        let draw = |params: &SamplingParams| {
            let mut sampler = sampler(params.clone());
            (0..20_000).map(|_| sampler.sample(&halves()).unwrap().token).collect::<Vec<_>>()
        };
        let tokens = draw(&params);
        assert_eq!(tokens, draw(&params));
        assert_ne!(tokens, draw(&SamplingParams { seed: 12, ..params.clone() }));
        assert_ne!(tokens, draw(&SamplingParams { choice: 1, ..params }));
        for (token, share) in [(0, 0.125), (1, 0.5), (2, 0.125), (3, 0.25)] {
            let count = tokens.iter().filter(|&&t| t == token).count() as f64 / 20_000.0;
            // Five standard deviations of the most uncertain share.
            assert!((count - share).abs() < 5.0 * (0.25f64 / 20_000.0).sqrt(), "{token}: {count}");
        }
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals_and_penalties_move_it_on() {
        let mut plain = sampler(SamplingParams::default());
        let mut wary = sampler(SamplingParams { presence_penalty: 1.0, ..Default::default() });
        let logits = [0.0, 2.0, 2.0, 1.5];
        let take = |s: &mut Sampler| (0..4).map(|_| s.sample(&logits).unwrap().token).collect::<Vec<_>>();
        assert_eq!(take(&mut plain), [1, 1, 1, 1]);
        assert_eq!(take(&mut wary), [1, 2, 3, 1]);
    }

    #[test]
    fn logprobs_are_of_the_raw_logits() {
        let params = SamplingParams {
            temperature: 0.3,
            repetition_penalty: 3.0,
            logprobs: Some(2),
            ..Default::default()
        };
        let mut sampler = Sampler::new(params, &[1]).unwrap();
        let logprobs = sampler.sample(&halves()).unwrap().logprobs.unwrap();
        assert_eq!(logprobs.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3]);
        assert!((logprobs.top[0].1 - 0.5f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn useless_logits_are_errors() {
        for temperature in [0.0, 1.0] {
            let mut sampler = sampler(SamplingParams { temperature, ..Default::default() });
            for row in [&[][..], &[1.0, f32::NAN], &[f32::INFINITY, 0.0], &[f32::NEG_INFINITY; 3]] {
                assert!(matches!(sampler.sample(row), Err(SamplingError::Logits { step: 0, .. })), "{row:?}");
            }
            assert_eq!(sampler.sample(&[f32::NEG_INFINITY, 0.0]).unwrap().token, 1);
        }
    }
}
