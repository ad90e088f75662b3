//! The engine as others hold it: jobs in, events out.

use super::{
    Event, Job, Metrics, Refused, Speaker,
    room::{BLOCK_SIZE, Room},
    scheduler::Scheduler,
    sequence::{Outlet, Shared, Waiting},
};
use crate::{
    backend::Queue,
    cache::Fingerprint,
    pipeline::{Error, Session},
};
use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::Ordering::Relaxed,
        mpsc::{Sender, channel},
    },
    thread::JoinHandle,
    time::Instant,
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// What an engine is given.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Cache blocks of each model; `None`: see docs/serve.md.
    pub kv_blocks: Option<usize>,
    /// Most requests that run at a time.
    pub sequences: usize,
    /// Most requests that wait.
    pub queue: usize,
    /// About how many tokens of prompts are read between two decode passes: they hold up answers, which hold up prompts.
    pub piece: usize,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions { kv_blocks: None, sequences: 64, queue: 256, piece: 512 }
    }
}

/// Models that answer many requests at a time. Runs until dropped.
pub struct Engine {
    session: Arc<Session>,
    inbox: Mutex<Option<Sender<Vec<Waiting>>>>,
    shared: Arc<Shared>,
    queue: usize,
    facts: Vec<Facts>,
    thread: Option<JoinHandle<()>>,
}

/// What is checked before a job is taken on, by room.
struct Facts {
    name: &'static str,
    limit: usize,
    vocab: usize,
}

/// The events of jobs that were submitted together, each with its job's number. Dropped: nobody wants the answers any more.
pub struct Events(UnboundedReceiver<(usize, Event)>);

impl Events {
    /// `None` after the last, or where the engine has died.
    pub async fn next(&mut self) -> Option<(usize, Event)> {
        self.0.recv().await
    }

    /// As [`Events::next`], for threads.
    ///
    /// # Panics
    /// Inside an asynchronous task.
    pub fn wait(&mut self) -> Option<(usize, Event)> {
        self.0.blocking_recv()
    }
}

impl Engine {
    /// Allocates the models' pages and starts the thread.
    pub fn start(session: Arc<Session>, options: &EngineOptions) -> Result<Engine, Error> {
        let sequences = options.sequences.max(1);
        let mut rooms = Vec::new();
        let named = session.receiver.iter().map(|model| ("receiver", model));
        for (name, model) in named.chain(session.sharers.iter().map(|model| ("sharer", model))) {
            let queue = Queue::new(&session.backend)?;
            rooms.push(Room::new(name, model, queue, session.dtype(), options.kv_blocks, sequences)?);
        }
        let models = session.receiver.iter().chain(&session.sharers);
        let tokenizers = models.map(|model| model.tokenizer.clone()).collect();
        let mut prints = Vec::new();
        for fuser in &session.fusers {
            prints.push(Fingerprint::of([&fuser.fingerprint(rooms[0].queue())?.0[..]]));
        }
        let facts =
            rooms.iter().map(|room| Facts { name: room.name, limit: room.limit, vocab: room.vocab() });
        let facts = facts.collect();
        let shared = Arc::new(Shared::default());
        for room in &rooms {
            shared.metrics.blocks(room.name, 0, room.total);
        }
        let (sender, inbox) = channel();
        let scheduler = Scheduler {
            rooms,
            fusers: session.fusers.clone(),
            prints,
            fusion: session.fusion(),
            overlap: session.overlap(),
            sequences,
            piece: options.piece.max(1),
            inbox,
            shared: shared.clone(),
            tokenizers,
            waiting: VecDeque::new(),
            reading: VecDeque::new(),
            answering: Vec::new(),
        };
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || scheduler.run());
        let thread = thread
            .map_err(|error| crate::backend::Error::Unavailable("a thread".into(), error.to_string()))?;
        let (inbox, thread) = (Mutex::new(Some(sender)), Some(thread));
        Ok(Engine { session, inbox, shared, queue: options.queue, facts, thread })
    }

    pub fn session(&self) -> &Session {
        &self.session
    }

    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Whether the thread still runs.
    pub fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Most tokens of prompt and answer.
    pub fn limit(&self, speaker: Speaker) -> Option<usize> {
        Some(self.facts.get(self.room(speaker)?)?.limit)
    }

    fn room(&self, speaker: Speaker) -> Option<usize> {
        let first_sharer = usize::from(self.session.receiver.is_some());
        match speaker {
            Speaker::Receiver => self.session.receiver.as_ref().map(|_| 0),
            Speaker::Sharer => (!self.session.sharers.is_empty()).then_some(first_sharer),
        }
    }

    /// Queues `jobs`, all or none.
    pub fn submit(&self, jobs: Vec<Job>) -> Result<Events, Refused> {
        let result = self.try_submit(jobs);
        if result.is_err() {
            self.metrics().ended("refused");
        }
        result
    }

    fn try_submit(&self, jobs: Vec<Job>) -> Result<Events, Refused> {
        let (sender, receiver) = unbounded_channel();
        let arrived = Instant::now();
        let mut waiting = Vec::new();
        for (index, job) in jobs.into_iter().enumerate() {
            let (room, needs) = self.check(&job)?;
            let outlet = Outlet { index, sender: sender.clone() };
            waiting.push(Waiting { job, outlet, arrived, room, needs });
        }
        if self.shared.stopping.load(Relaxed) {
            return Err(Refused::ShuttingDown);
        }
        let new = waiting.len();
        let limited = !waiting.iter().all(|waiting| waiting.job.continues);
        let room = |now: usize| (!limited || now + new <= self.queue).then_some(now + new);
        self.shared.waiting.fetch_update(Relaxed, Relaxed, room).map_err(Refused::QueueFull)?;
        // A poisoned lock guards a sender that is whole.
        let inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = inbox.as_ref().map(|inbox| inbox.send(waiting).is_ok());
        if sent != Some(true) {
            self.shared.waiting.fetch_sub(new, Relaxed);
            return Err(Refused::ShuttingDown);
        }
        Ok(Events(receiver))
    }

    /// Which room speaks, and blocks that the job may come to need in each.
    fn check(&self, job: &Job) -> Result<(usize, Vec<usize>), Refused> {
        let names = |speaker| if speaker == Speaker::Receiver { "receiver" } else { "sharer" };
        let room = self.room(job.speaker).ok_or(Refused::NoModel(names(job.speaker)))?;
        job.params.validate()?;
        let sharers = job.prompt.sharers.len();
        if sharers > self.session.fusers.len() || sharers != job.gates.len() {
            return Err(Refused::NoModel("fuser"));
        }
        if sharers > 0 && job.prompt_logprobs.is_some() {
            return Err(Refused::FusedLogprobs);
        }
        if job.prompt.ids.is_empty() {
            return Err(Refused::EmptyPrompt);
        }
        let mut needs = vec![0; self.facts.len()];
        let texts = job.prompt.sharers.iter().enumerate().map(|(sharer, own)| (1 + sharer, &own.ids, 0));
        for (room, ids, answer) in texts.chain([(room, &job.prompt.ids, job.params.max_new_tokens)]) {
            let Facts { name, limit, vocab } = self.facts[room];
            // A speaker must have room for one token of the answer.
            if ids.len() + usize::from(answer > 0) > limit {
                return Err(Refused::TooLong { model: name, tokens: ids.len(), limit: limit - 1 });
            }
            if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab) {
                return Err(Refused::UnknownToken { id, vocab });
            }
            needs[room] += ids.len().saturating_add(answer).min(limit).div_ceil(BLOCK_SIZE);
        }
        Ok((room, needs))
    }

    /// Takes on nothing more; what waits is refused, what runs is finished.
    pub fn drain(&self) {
        self.shared.stopping.store(true, Relaxed);
        // An empty list wakes a thread that has nothing to do.
        if let Some(inbox) = &*self.inbox.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = inbox.send(Vec::new());
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.drain();
        *self.inbox.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the engine's thread ended by panic");
        }
    }
}
