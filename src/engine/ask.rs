//! From questions to jobs: tokenising and aligning, which the thread that asks does itself.

use super::{Engine, Job, SamplingParams, Speaker};
use crate::{
    align::{AlignedPrompt, Alignment, Fraction, Section},
    fuser::{GateOverride, Gates},
    pipeline::{self, Prompt, Question},
};
use std::time::{Duration, Instant};

/// How a fused answer is to be made; what is not said is as the engine was started.
#[derive(Clone, Debug, Default)]
pub struct FuseOptions {
    pub gates: Option<GateOverride>,
    pub fraction: Option<Fraction>,
    pub alignment: Option<Alignment>,
}

/// A job ready to be submitted, and what is known of it before.
#[derive(Clone, Debug)]
pub struct Prepared {
    pub job: Job,
    /// What the models read, for a fused answer.
    pub aligned: Option<AlignedPrompt>,
    /// Time of tokenising, or of tokenising and aligning.
    pub took: Duration,
}

impl Engine {
    /// One model alone on `question`.
    pub fn alone(
        &self,
        speaker: Speaker,
        question: &Question,
        params: &SamplingParams,
    ) -> Result<Prepared, pipeline::Error> {
        let start = Instant::now();
        let session = self.session();
        let ids = session.encode(session.model(speaker)?, question)?;
        let took = start.elapsed();
        Ok(Prepared { job: self.of_ids(speaker, ids, params)?, aligned: None, took })
    }

    /// One model alone on token ids.
    pub fn of_ids(
        &self,
        speaker: Speaker,
        ids: Vec<u32>,
        params: &SamplingParams,
    ) -> Result<Job, pipeline::Error> {
        let session = self.session();
        let params = session.with_stops(session.model(speaker)?, params)?;
        let prompt = Prompt {
            positions: (0..ids.len() as u32).collect(),
            sections: vec![Section { len: ids.len(), sharer_mask: 0 }],
            sharers: Vec::new(),
            ids,
        };
        let (gates, cache_salt) = (Vec::new(), String::new());
        Ok(Job { speaker, prompt, gates, params, cache_salt, prompt_logprobs: None, continues: false })
    }

    /// The receiver on a cache fused with all sharers'.
    pub fn fused(
        &self,
        question: &Question,
        options: &FuseOptions,
        params: &SamplingParams,
    ) -> Result<Prepared, pipeline::Error> {
        let session = self.session();
        let gates: Vec<Gates> = match &options.gates {
            Some(gates) => {
                session.fusers.iter().map(|fuser| fuser.gates_with(gates)).collect::<Result<_, _>>()?
            }
            None => session.gates.clone(),
        };
        let start = Instant::now();
        let aligned =
            session.aligned(question, options.alignment, options.fraction.or(session.fraction()))?;
        let took = start.elapsed();
        let params = session.with_stops(session.model(Speaker::Receiver)?, params)?;
        let job = Job {
            speaker: Speaker::Receiver,
            prompt: Prompt::from(aligned.clone()),
            gates,
            params,
            cache_salt: String::new(),
            prompt_logprobs: None,
            continues: false,
        };
        Ok(Prepared { job, aligned: Some(aligned), took })
    }
}
