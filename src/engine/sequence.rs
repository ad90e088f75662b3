//! A request on its way through the engine.

use super::{Done, Event, Failure, Job, Metrics, Sampled, Token, TokenLogprobs, metrics::note};
use crate::{
    cache::BlockHash,
    pipeline::{Lane, Link, Prefill, Turn},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc::UnboundedSender;

/// Where the events of one job go.
#[derive(Clone)]
pub(super) struct Outlet {
    /// The job's number among those that were submitted together.
    pub index: usize,
    pub sender: UnboundedSender<(usize, Event)>,
}

impl Outlet {
    /// Whether nobody listens any more.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    pub fn send(&self, event: Event) {
        // Whoever went away is noticed at the next pass.
        let _ = self.sender.send((self.index, event));
    }
}

/// A job in the queue.
pub(super) struct Waiting {
    pub job: Job,
    pub outlet: Outlet,
    pub arrived: Instant,
    /// Which room speaks.
    pub room: usize,
    /// Blocks that it may come to need, by room.
    pub needs: Vec<usize>,
}

/// What stays the same from admission to the end.
pub(super) struct Course {
    pub outlet: Outlet,
    pub arrived: Instant,
    pub room: usize,
    pub needs: Vec<usize>,
}

impl Course {
    pub fn fail(&self, metrics: &Metrics, failure: Failure) {
        metrics.ended("failed");
        self.outlet.send(Event::Failed(failure));
    }
}

/// A request whose prompt is being read.
pub(super) struct Reading {
    pub course: Course,
    pub link: Link,
    pub prefill: Prefill,
    pub turn: Turn,
    pub queued: Duration,
    /// Of the full blocks of the speaker's prompt and of each sharer's.
    pub hashes: Vec<BlockHash>,
    pub sharer_hashes: Vec<Vec<BlockHash>>,
    pub cached: usize,
    pub sharers_cached: usize,
    /// Where log-probabilities of the prompt are wanted: how many alternatives, and those so far.
    pub scored: Option<(usize, Vec<TokenLogprobs>)>,
}

/// A request that is being answered.
pub(super) struct Answering {
    pub course: Course,
    pub lane: Lane,
    pub turn: Turn,
    /// The token drawn last, which is not in the cache yet.
    pub next: u32,
    /// Tokens that its room has for a sequence.
    pub limit: usize,
    pub first_token: Option<Instant>,
    pub last_token: Instant,
}

impl Answering {
    /// Takes the next token; whether the answer goes on.
    pub fn take(&mut self, sampled: Sampled, metrics: &Metrics) -> bool {
        let now = Instant::now();
        match self.first_token {
            Some(_) => note(&metrics.inter_token, now - self.last_token),
            None => note(&metrics.first_token, now - self.course.arrived),
        }
        let first = *self.first_token.get_or_insert(now);
        self.last_token = now;
        let (id, logprobs) = (sampled.token, sampled.logprobs.clone());
        let room = self.limit.saturating_sub(self.lane.ids().len());
        let mut taken = self.turn.take(sampled, room);
        let mut end = None;
        if taken.kept {
            metrics.generation_tokens.inc();
            let text = std::mem::take(&mut taken.text);
            self.course.outlet.send(Event::Token(Token { id, text, logprobs }));
        } else {
            end = Some(Token { id, text: String::new(), logprobs });
        }
        self.next = id;
        let Some(finish_reason) = taken.finished else { return true };
        let answer = self.turn.answer();
        note(&metrics.latency, now - self.course.arrived);
        note(&metrics.decode, now - first);
        metrics.ended(match finish_reason {
            crate::pipeline::FinishReason::Stop => "stop",
            crate::pipeline::FinishReason::Length => "length",
        });
        self.course.outlet.send(Event::Done(Done {
            text: taken.text,
            end,
            finish_reason,
            tokens: answer.tokens.len(),
            first_token: first - self.course.arrived,
            decode: now - first,
        }));
        false
    }
}

/// Numbers that both sides of the engine see.
#[derive(Default)]
pub(super) struct Shared {
    pub metrics: Arc<Metrics>,
    /// Jobs that were submitted and not let in yet.
    pub waiting: std::sync::atomic::AtomicUsize,
    pub stopping: std::sync::atomic::AtomicBool,
}
