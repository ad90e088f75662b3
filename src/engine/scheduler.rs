//! The thread that runs the models: lets requests in, reads prompts in pieces, decodes all answers together.
//!
//! docs/serve.md tells how it goes round.

use super::{
    Event, Failure, Job, Metrics, Read, Sampled, TokenLogprobs,
    metrics::note,
    reuse,
    room::Room,
    sequence::{Answering, Course, Reading, Shared, Waiting},
};
use crate::{
    cache::{BlockHash, Content, Fingerprint},
    fuser::{Fuser, FusionMode},
    ops::SampledRow,
    pipeline::{self, Error, Lane, Link, Overlap, Prefill, Turn, WantedLogits},
    tokenizer::Tokenizer,
};
use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering::Relaxed, mpsc::Receiver},
    time::Instant,
};

/// Tokens of a piece whose logits are all wanted, `[tokens, vocab]`.
const SCORED_PIECE: usize = 64;

pub(super) struct Scheduler {
    /// The receiver's, then each sharer's.
    pub rooms: Vec<Room>,
    /// One a sharer, or none, with their identities.
    pub fusers: Vec<Fuser>,
    pub prints: Vec<Fingerprint>,
    pub fusion: FusionMode,
    pub overlap: Overlap,
    /// Most requests that are let in at a time.
    pub sequences: usize,
    /// Tokens of prompts read between two decode passes.
    pub piece: usize,
    pub inbox: Receiver<Vec<Waiting>>,
    pub shared: Arc<Shared>,
    pub tokenizers: Vec<Option<Tokenizer>>,
    pub waiting: VecDeque<Waiting>,
    pub reading: VecDeque<Reading>,
    pub answering: Vec<Answering>,
}

impl Scheduler {
    /// Until nobody can submit anything and everything is answered.
    pub fn run(mut self) {
        while self.receive() {
            self.leave_abandoned();
            self.admit();
            self.read();
            for room in 0..self.rooms.len() {
                self.decode(room);
            }
            self.gauge();
        }
    }

    fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    fn gauge(&self) {
        let metrics = self.metrics();
        metrics.running.set((self.reading.len() + self.answering.len()) as i64);
        metrics.waiting.set(self.waiting.len() as i64);
        for room in &self.rooms {
            metrics.blocks(room.name, room.used(), room.total);
        }
    }

    /// Takes in what was submitted, and waits for it where there is nothing else to do. False at the end.
    fn receive(&mut self) -> bool {
        let idle = self.waiting.is_empty() && self.reading.is_empty() && self.answering.is_empty();
        if idle {
            match self.inbox.recv() {
                Ok(jobs) => self.queue(jobs),
                Err(_) => return false,
            }
        }
        while let Ok(jobs) = self.inbox.try_recv() {
            self.queue(jobs);
        }
        if self.shared.stopping.load(Relaxed) {
            for waiting in self.waiting.drain(..) {
                self.shared.waiting.fetch_sub(1, Relaxed);
                self.shared.metrics.ended("refused");
                waiting.outlet.send(Event::Failed(Failure::ShuttingDown));
            }
        }
        true
    }

    fn queue(&mut self, jobs: Vec<Waiting>) {
        for job in jobs {
            if job.job.continues { self.waiting.push_front(job) } else { self.waiting.push_back(job) }
        }
    }

    /// Frees what belongs to requests nobody listens to.
    fn leave_abandoned(&mut self) {
        let gone = self.waiting.iter().filter(|waiting| waiting.outlet.is_closed()).count();
        if gone > 0 {
            self.waiting.retain(|waiting| !waiting.outlet.is_closed());
            self.shared.waiting.fetch_sub(gone, Relaxed);
        }
        let mut left = gone;
        for index in (0..self.reading.len()).rev() {
            if self.reading[index].course.outlet.is_closed()
                && let Some(reading) = self.reading.remove(index)
            {
                left += 1;
                self.drop_reading(reading);
            }
        }
        for index in (0..self.answering.len()).rev() {
            if self.answering[index].course.outlet.is_closed() {
                left += 1;
                let Answering { course, .. } = self.answering.remove(index);
                self.release(&course);
            }
        }
        (0..left).for_each(|_| self.metrics().ended("abandoned"));
    }

    /// What was issued for it still runs: its blocks must not be given to others before.
    fn drop_reading(&mut self, reading: Reading) {
        if let Err(error) = reading.link.synchronize() {
            log::error!("while a request was dropped: {error}");
        }
        self.release(&reading.course);
    }

    fn release(&mut self, course: &Course) {
        for (room, needs) in self.rooms.iter_mut().zip(&course.needs) {
            room.reserved -= needs;
        }
    }

    /// Lets requests in, first come first served, as long as the blocks they may come to need are there.
    fn admit(&mut self) {
        while let Some(first) = self.waiting.front() {
            let fits = self.rooms.iter().zip(&first.needs).all(|(room, n)| room.reserved + n <= room.total);
            if !fits || self.reading.len() + self.answering.len() >= self.sequences {
                return;
            }
            let Some(Waiting { job, outlet, arrived, room, needs }) = self.waiting.pop_front() else {
                return;
            };
            self.shared.waiting.fetch_sub(1, Relaxed);
            for (room, n) in self.rooms.iter_mut().zip(&needs) {
                room.reserved += n;
            }
            let course = Course { outlet, arrived, room, needs };
            let queued = course.arrived.elapsed();
            note(&self.shared.metrics.queue_time, queued);
            match self.link(&job, room) {
                Ok((turn, link, prefill, found)) => self.reading.push_back(Reading {
                    course,
                    link,
                    prefill,
                    turn,
                    queued,
                    hashes: found.hashes,
                    sharer_hashes: found.sharer_hashes,
                    cached: found.cached,
                    sharers_cached: found.sharers_cached,
                    scored: job.prompt_logprobs.map(|n| (n, Vec::new())),
                }),
                Err(error) => {
                    course.fail(&self.shared.metrics, error.into());
                    self.release(&course);
                }
            }
        }
    }

    /// Lanes for a job, beginning with what is cached of its prompt.
    fn link(&self, job: &Job, speaker: usize) -> Result<(Turn, Link, Prefill, Found), Error> {
        let (room, prompt, salt) = (&self.rooms[speaker], &job.prompt, job.cache_salt.as_str());
        let detokenizer = self.tokenizers[speaker].as_ref().map(Tokenizer::detokenizer);
        let turn = Turn::new(job.params.clone(), &prompt.ids, detokenizer)?;
        let mut found = Found {
            hashes: if prompt.sharers.is_empty() {
                room.plain(salt, &prompt.ids, &prompt.positions)
            } else {
                room.fused(salt, self.content(job), prompt)
            },
            ..Found::default()
        };
        let mut receiver = room.lane();
        if job.prompt_logprobs.is_none() {
            let (ids, positions) = (&prompt.ids, &prompt.positions);
            let may_go_on = |tokens| reuse::may_go_on(prompt, tokens);
            found.cached = reuse::begin(&mut receiver, &found.hashes, ids, positions, may_go_on)?;
            self.metrics().looked_up(room.name, ids.len(), found.cached);
        }
        let mut sharers = Vec::new();
        for (own, room) in prompt.sharers.iter().zip(&self.rooms[1..]) {
            let mut lane = room.lane();
            let hashes = room.plain(salt, &own.ids, &own.positions);
            let whole_or_more = |tokens| own.ids.len() - tokens != 1;
            let cached = reuse::begin(&mut lane, &hashes, &own.ids, &own.positions, whole_or_more)?;
            self.metrics().looked_up(room.name, own.ids.len(), cached);
            found.sharers_cached += cached;
            found.sharer_hashes.push(hashes);
            sharers.push(lane);
        }
        let fusers = self.fusers[..sharers.len()].to_vec();
        if !sharers.is_empty() {
            let gates = job.gates.iter().flatten().flatten();
            let open = gates.clone().filter(|gate| **gate > 0.0).count();
            self.metrics().gates_open.set(open as f64 / gates.count().max(1) as f64);
        }
        let mut link = Link::new(receiver, sharers, fusers, job.gates.clone(), self.fusion, self.overlap)?;
        let wanted = match job.prompt_logprobs {
            Some(_) => WantedLogits::LastSection,
            None => WantedLogits::Last,
        };
        let prefill = link.begin(prompt.clone(), wanted)?;
        Ok((turn, link, prefill, found))
    }

    /// What else than its tokens makes a fused cache what it is. Alignment and fraction show in the columns and sections.
    fn content(&self, job: &Job) -> Content {
        let sharers = job.prompt.sharers.len();
        Content::Fused {
            fuser: Fingerprint::of(self.prints[..sharers].iter().map(Fingerprint::bytes)),
            sharers: self.rooms[1..=sharers].iter().map(Room::fingerprint).collect(),
            settings: format!("{:?} {:?}", self.fusion, job.gates),
        }
    }

    /// Reads a piece of the prompts that came first.
    fn read(&mut self) {
        let mut left = self.piece;
        while left > 0 {
            let Some(mut reading) = self.reading.pop_front() else { return };
            let before = reading.link.receiver.ids().len();
            match advance(&mut reading, left) {
                Ok(false) => {
                    self.reading.push_front(reading);
                    return;
                }
                Ok(true) => {
                    left = left.saturating_sub((reading.link.receiver.ids().len() - before).max(1));
                    self.begin_answer(reading);
                }
                Err(error) => {
                    reading.course.fail(&self.shared.metrics, error.into());
                    self.drop_reading(reading);
                }
            }
        }
    }

    /// The first token, and room for others to read.
    fn begin_answer(&mut self, reading: Reading) {
        let Reading { course, mut link, prefill, mut turn, .. } = reading;
        // Those of all tokens are of another pass than those of the last alone, in low bits.
        let last = reading.scored.as_ref().map(|_| link.receiver.logits());
        let finished = last.transpose().and_then(|last| {
            let (logits, report) = link.finish(prefill)?;
            Ok((last.unwrap_or(logits), report))
        });
        let (logits, report) = match finished {
            Ok(finished) => finished,
            Err(error) => {
                course.fail(&self.shared.metrics, error.into());
                return self.release(&course);
            }
        };
        let metrics = &self.shared.metrics;
        let publish = |lane: &Lane, hashes: &[BlockHash]| {
            for (hash, block) in hashes.iter().zip(lane.table().blocks()) {
                lane.kv.pool().publish(*hash, block);
            }
        };
        publish(&link.receiver, &reading.hashes);
        link.sharers.iter().zip(&reading.sharer_hashes).for_each(|(lane, hashes)| publish(lane, hashes));
        note(&metrics.receiver_prefill, report.receiver);
        if !link.sharers.is_empty() {
            note(&metrics.sharer_prefill, report.sharers.iter().sum());
            note(&metrics.fuse, report.fuse);
            note(&metrics.fuse_exposed, report.fuse_exposed);
            metrics.communicated.inc_by(report.fused_kv_bytes);
        }
        metrics.prompt_tokens.inc_by(link.receiver.ids().len() as u64);
        let sampled = turn.sampler.sample(&logits);
        course.outlet.send(Event::Read(Box::new(Read {
            queued: reading.queued,
            report,
            cached_tokens: reading.cached,
            cached_sharer_tokens: reading.sharers_cached,
            prompt_logprobs: reading.scored.map(|(_, scores)| scores).unwrap_or_default(),
        })));
        // The sharers' blocks are free again from here on.
        let Link { receiver: lane, .. } = link;
        let limit = self.rooms[course.room].limit;
        let mut answering =
            Answering { course, lane, turn, next: 0, limit, first_token: None, last_token: Instant::now() };
        let goes_on = match sampled {
            Ok(sampled) => answering.take(sampled, metrics),
            Err(error) => {
                answering.course.fail(metrics, Error::from(error).into());
                false
            }
        };
        if goes_on {
            self.answering.push(answering);
        } else {
            self.release(&answering.course);
        }
    }

    /// One token of every answer that `room` speaks, in one pass.
    fn decode(&mut self, room: usize) {
        let mut batch: Vec<&mut Answering> =
            self.answering.iter_mut().filter(|one| one.course.room == room).collect();
        if batch.is_empty() {
            return;
        }
        let metrics = &self.shared.metrics;
        metrics.batch.observe(batch.len() as f64);
        let drawn = draw(&mut batch);
        let mut over = Vec::new();
        match drawn {
            Ok(drawn) => {
                for (one, sampled) in batch.into_iter().zip(drawn) {
                    let goes_on = match sampled {
                        Ok(sampled) => one.take(sampled, metrics),
                        Err(error) => {
                            one.course.fail(metrics, error.into());
                            false
                        }
                    };
                    over.push(!goes_on);
                }
            }
            Err(error) => {
                log::error!("a decode pass failed: {error}");
                let failure = Failure::from(error);
                for one in batch {
                    one.course.fail(metrics, failure.clone());
                    over.push(true);
                }
            }
        }
        let mut over = over.into_iter();
        let mut ended = Vec::new();
        for index in 0..self.answering.len() {
            if self.answering[index].course.room == room && over.next() == Some(true) {
                ended.push(index);
            }
        }
        for index in ended.into_iter().rev() {
            let Answering { course, .. } = self.answering.remove(index);
            self.release(&course);
        }
    }
}

/// What is cached of a job's prompt, and under which names.
#[derive(Default)]
struct Found {
    hashes: Vec<BlockHash>,
    sharer_hashes: Vec<Vec<BlockHash>>,
    cached: usize,
    sharers_cached: usize,
}

/// The next piece of a prompt; whether it was the last.
fn advance(reading: &mut Reading, tokens: usize) -> Result<bool, Error> {
    let Reading { link, prefill, scored, .. } = reading;
    let tokens = if scored.is_some() { tokens.min(SCORED_PIECE) } else { tokens };
    let done = link.advance(prefill, tokens)?;
    if let Some((alternatives, scores)) = scored {
        let rows = prefill.take_logits();
        // As many rows as tokens were read; each but the prompt's last says how probable the next token was.
        let tokens = link.receiver.ids().len() - scores.len();
        let next = prefill.prompt().ids.get(scores.len() + 1..).unwrap_or_default();
        for (row, &id) in rows.chunks_exact((rows.len() / tokens.max(1)).max(1)).zip(next) {
            scores.push(TokenLogprobs::new(row, id, *alternatives));
        }
    }
    Ok(done)
}

/// Runs a decode pass and draws the next token of each, on the device where it can.
fn draw(batch: &mut [&mut Answering]) -> Result<Vec<Result<Sampled, Error>>, Error> {
    let ids: Vec<u32> = batch.iter().map(|one| one.next).collect();
    let rows: Option<Vec<_>> = batch.iter().map(|one| one.turn.sampler.row()).collect();
    let mut lanes: Vec<&mut Lane> = batch.iter_mut().map(|one| &mut one.lane).collect();
    let decoded = pipeline::decode(&mut lanes, &ids)?;
    let drawn = rows.map(|rows| decoded.draw(&rows)).transpose()?.flatten();
    let needs_logits = |row: &SampledRow| row.status == SampledRow::NEEDS_HOST;
    let Some(drawn) = drawn.filter(|drawn| !drawn.iter().any(needs_logits)) else {
        let logits = decoded.logits()?;
        let rows = logits.chunks_exact(logits.len() / ids.len());
        let sample = |(one, row): (&mut &mut Answering, &[f32])| Ok(one.turn.sampler.sample(row)?);
        return Ok(batch.iter_mut().zip(rows).map(sample).collect());
    };
    let accept = |(one, row): (&mut &mut Answering, &SampledRow)| {
        let sampled = one.turn.sampler.accept(row)?;
        Ok(sampled.expect("rows that need the host were sorted out"))
    };
    Ok(batch.iter_mut().zip(&drawn).map(accept).collect())
}
