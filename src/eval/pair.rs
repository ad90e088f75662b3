//! The models of an evaluation, loaded once: questions go in, logits or answers with their costs come out.
//!
//! A Sharer's cache of a question is computed once for all modes that fuse it, and once for all runs where it is kept on disk.

use super::{
    Error, asking,
    mode::{GENERIC, Variant},
};
use crate::{
    align::{Aligner, Fraction, Section},
    cache::{Content, Domain, Fingerprint, KeyPositions, KvColumns, Snapshot},
    data::split,
    engine::SamplingParams,
    fuser::{GateOverride, Gates},
    model::Goal,
    pipeline::{
        Generation, Lane, Link, Model, Observation, Prompt, Session, SessionOptions, SharerPrompt, Stream,
        WantedLogits, generate,
    },
    tokenizer::{Message, Tokenizer},
    train::{Piece, PromptStore},
};
use serde::{Deserialize, Serialize};
use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// What an answer cost. Times in milliseconds; `None` where a cache came from disk, so that nobody knows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// All Sharers' prefills, or the prefill of the Sharer that answers.
    pub sharer_ms: Option<f64>,
    pub receiver_ms: f64,
    pub fuse_ms: f64,
    /// What went from model to model: cache columns, or text-to-text's text.
    pub bytes: u64,
    /// From the question to the logits of the first token of the answer, one prefill after the other.
    pub first_token_ms: Option<f64>,
    pub total_ms: Option<f64>,
    /// Generated, text-to-text's background included.
    pub tokens: usize,
}

/// A model's state after a prompt: what its answer is drawn from.
pub struct Prompted {
    /// `[vocab]`
    pub logits: Vec<f32>,
    pub cost: Cost,
    started: Instant,
    /// What was spent before: the Sharers' caches, tokenising.
    before: Option<Duration>,
    who: Who,
}

impl Prompted {
    /// Adds what was spent before: tokenising, aligning.
    pub fn charge(&mut self, time: Duration) {
        self.before = self.before.map(|before| before + time);
        for total in [&mut self.cost.first_token_ms, &mut self.cost.total_ms] {
            *total = total.map(|total| total + ms(time));
        }
    }
}

/// In whose lane the prompt lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Receiver,
    Sharer(usize),
    /// The Receiver on a fused cache.
    Fused,
}

/// The cache of one Sharer for one text.
struct Known {
    sharer: usize,
    prompt: Arc<Snapshot>,
    /// `None`: it was on disk.
    took: Option<Duration>,
}

/// A lane of one model that is used again for every question.
#[derive(Default)]
struct Alone {
    lane: Option<Lane>,
    room: usize,
    /// How long it took to read what the lane holds.
    took: Duration,
}

/// Lanes grow by as many tokens.
const GROWTH: usize = 256;

impl Alone {
    /// An empty lane with room for `tokens` tokens.
    fn empty(&mut self, session: &Session, model: &Model, tokens: usize) -> Result<&mut Lane, Error> {
        if self.lane.is_none() || self.room < tokens {
            self.lane = None;
            self.room = room(tokens, model);
            self.lane = Some(session.lane(model, self.room)?);
        }
        let lane = self.lane.as_mut().expect("it was just made");
        lane.truncate(0, 0);
        Ok(lane)
    }
}

/// Room for `tokens`, with some to spare within the model's context.
fn room(tokens: usize, model: &Model) -> usize {
    tokens.max(tokens.next_multiple_of(GROWTH).min(model.decoder.config.context_length))
}

/// A Receiver and its Sharers.
pub struct Pair {
    pub session: Session,
    aligner: Option<Aligner>,
    receiver: Alone,
    sharers: Vec<Alone>,
    link: Option<Link>,
    /// Tokens that the link has room for, the Receiver's and each Sharer's.
    link_room: (usize, Vec<usize>),
    stores: Vec<PromptStore>,
    domains: Vec<Domain>,
    known: Vec<Known>,
    open: Vec<Gates>,
    closed: Vec<Gates>,
}

impl Pair {
    pub fn open(
        options: SessionOptions,
        backend: &Arc<dyn crate::backend::Backend>,
        cache_sharer: Option<&Path>,
        progress: &dyn Fn(&Path, u64, u64),
    ) -> Result<Pair, Error> {
        let (precision, kv) = (options.dtype.precision(), options.dtype.kv());
        let alignment = options.alignment;
        let session = Session::open_on(backend.clone(), options, progress)?;
        let tokenizers = session.sharers.iter().map(|sharer| sharer.tokenizer().cloned());
        let tokenizers = tokenizers.collect::<Result<Vec<Tokenizer>, _>>()?;
        let aligner = match &session.receiver {
            Some(receiver) if !tokenizers.is_empty() => {
                Some(Aligner::new(receiver.tokenizer()?, &tokenizers, alignment)?)
            }
            _ => None,
        };
        let open =
            |sharer: &Model| cache_sharer.map(|folder| PromptStore::open(folder, sharer, precision, kv));
        let stores = session.sharers.iter().filter_map(open).collect::<Result<Vec<_>, _>>()?;
        let domains = session.sharers.iter().enumerate().map(|(s, sharer)| match stores.get(s) {
            Some(store) => store.domain().clone(),
            // Of this run's memory alone: nothing else can be taken for it.
            None => Domain {
                model: Fingerprint::of([&sharer.decoder.config.fingerprint()[..]]),
                tokenizer: Fingerprint::of([]),
                content: Content::Plain,
                keys: KeyPositions::PostRope,
                salt: String::new(),
            },
        });
        let gates = |which: GateOverride| {
            session.fusers.iter().map(|fuser| fuser.gates_with(&which)).collect::<Result<Vec<Gates>, _>>()
        };
        let (open, closed) = (gates(GateOverride::Open), gates(GateOverride::Closed));
        let (open, closed) = (open?, closed?);
        Ok(Pair {
            aligner,
            receiver: Alone::default(),
            sharers: session.sharers.iter().map(|_| Alone::default()).collect(),
            link: None,
            link_room: (0, Vec::new()),
            domains: domains.collect(),
            stores,
            known: Vec::new(),
            open,
            closed,
            session,
        })
    }

    /// # Errors
    /// If it was not loaded.
    pub fn model(&self, who: Who) -> Result<&Model, Error> {
        match who {
            Who::Sharer(index) => Ok(&self.session.sharers[index]),
            _ => self.session.receiver.as_ref().ok_or(Error::NoReceiver),
        }
    }

    /// The conversation as Receiver and Sharers read it; `part` of it is fused, by default what the fuser was trained for.
    pub fn align(
        &self,
        messages: &[Message],
        response: &str,
        part: Option<Fraction>,
    ) -> Result<Prompt, Error> {
        let aligner = self.aligner.as_ref().ok_or(Error::NoReceiver)?;
        let mut prompt: Prompt = asking::together(aligner, messages, response)?;
        if let Some(part) = part.or(self.session.fraction()) {
            prompt.sections = part.apply(&prompt.sections);
        }
        Ok(prompt)
    }

    /// Reads a prompt with one model alone; `more` tokens are to follow.
    pub fn read(&mut self, who: Who, ids: &[u32], more: usize) -> Result<Prompted, Error> {
        let started = Instant::now();
        let (model, alone) = match who {
            Who::Sharer(index) => (&self.session.sharers[index], &mut self.sharers[index]),
            _ => (self.session.receiver.as_ref().ok_or(Error::NoReceiver)?, &mut self.receiver),
        };
        let lane = alone.empty(&self.session, model, ids.len() + more)?;
        let positions: Vec<u32> = (0..ids.len() as u32).collect();
        lane.append(ids, &positions, Goal::Hidden, |_, _| {})?;
        let logits = lane.logits()?;
        alone.took = started.elapsed();
        let spent = ms(alone.took);
        let mut cost = Cost { sharer_ms: Some(0.0), first_token_ms: Some(spent), ..Cost::default() };
        match who {
            Who::Sharer(_) => cost.sharer_ms = Some(spent),
            _ => cost.receiver_ms = spent,
        }
        cost.total_ms = cost.first_token_ms;
        Ok(Prompted { logits, cost, started, before: Some(Duration::ZERO), who })
    }

    /// Reads a prompt with the Receiver on a cache fused as `variant` says, but for its part, which [`Pair::align`] has seen to. `other`: what Sharers read in [`Variant::Swap`]; `sharer`:
    /// only this one takes part.
    pub fn fuse(
        &mut self,
        mut prompt: Prompt,
        other: Option<&Prompt>,
        sharer: Option<usize>,
        variant: Variant,
        seed: u64,
        more: usize,
    ) -> Result<Prompted, Error> {
        let mask = sharer.map_or(u32::MAX, |index| 1 << index);
        for section in &mut prompt.sections {
            section.sharer_mask &= mask;
        }
        match variant {
            Variant::Shuffle => shuffle(&mut prompt, seed),
            Variant::Swap => {
                let other = other.expect("a swap is given what to swap with");
                asking::swap(&mut prompt, other);
            }
            Variant::Generic => {
                let messages = [Message::new("user", GENERIC)];
                let generic = self.align(&messages, "", None)?;
                asking::swap(&mut prompt, &generic);
            }
            _ => {}
        }
        let takes_part =
            |s: usize| prompt.sections.iter().any(|section: &Section| section.sharer_mask >> s & 1 == 1);
        for (s, own) in prompt.sharers.iter_mut().enumerate() {
            if !takes_part(s) || variant == Variant::Closed {
                *own = SharerPrompt { columns: vec![None; prompt.ids.len()], ..SharerPrompt::default() };
            }
        }
        let mut before = Some(Duration::ZERO);
        let mut caches = Vec::new();
        for (s, own) in prompt.sharers.iter().enumerate() {
            if own.ids.is_empty() {
                caches.push(None);
                continue;
            }
            let (cache, took) = self.sharer_cache(s, own)?;
            before = before.zip(took).map(|(sum, took)| sum + took);
            caches.push(Some(match variant {
                Variant::Zero => changed(&cache, |_, columns| {
                    columns.keys.fill(0.0);
                    columns.values.fill(0.0);
                }),
                Variant::Random => {
                    changed(&cache, |layer, columns| asking::same_moments(columns, seed, layer))
                }
                _ => cache,
            }));
        }
        self.make_link(&prompt, more)?;
        let link = self.link.as_mut().expect("it was just made");
        link.gates = match variant {
            Variant::Open => self.open.clone(),
            Variant::Closed => self.closed.clone(),
            _ => self.session.gates.clone(),
        };
        link.forget();
        for (lane, cache) in link.sharers.iter_mut().zip(&caches) {
            if let Some(cache) = cache {
                lane.restore(cache)?;
            }
        }
        let started = Instant::now();
        let (logits, report) = link.prefill(&prompt, WantedLogits::Last)?;
        let own = started.elapsed();
        let first_token_ms = before.map(|before| ms(before + own));
        let cost = Cost {
            sharer_ms: before.map(ms),
            receiver_ms: ms(report.receiver),
            fuse_ms: ms(report.fuse),
            bytes: report.fused_kv_bytes,
            first_token_ms,
            total_ms: first_token_ms,
            tokens: 0,
        };
        Ok(Prompted { logits, cost, started, before, who: Who::Fused })
    }

    /// What is left of the last prompt that was fused: fused pages, and the Sharers'.
    pub fn link(&self) -> Option<&Link> {
        self.link.as_ref()
    }

    /// The weights that the fusers give to the columns of a prompt, one observation a Sharer.
    pub fn observe(&mut self, prompt: &Prompt) -> Result<Vec<Observation>, Error> {
        self.make_link(prompt, 0)?;
        let link = self.link.as_mut().expect("it was just made");
        link.gates = self.session.gates.clone();
        link.forget();
        Ok(Observation::of(link, prompt)?)
    }

    /// What each layer's attention says of the last section of a prompt, `[tokens, heads · head_dim]`, on the cache that was fused last,
    /// which is of the same prompt.
    pub fn attention(&mut self, prompt: &Prompt) -> Result<Vec<Vec<f32>>, Error> {
        let link = self.link.as_mut().ok_or(Error::NoReceiver)?;
        let last = prompt.sections.last().map_or(0, |section| section.len);
        let start = prompt.ids.len() - last;
        link.receiver.truncate(start, prompt.positions[start]);
        Ok(link.receiver.append_attending(&prompt.ids[start..], &prompt.positions[start..])?)
    }

    /// Generates what follows a prompt.
    pub fn generate(&mut self, mut prompted: Prompted, most: usize) -> Result<(Generation, Cost), Error> {
        let tokenizer = self.model(prompted.who)?.tokenizer()?;
        let mut params = SamplingParams { max_new_tokens: most.max(1), ..SamplingParams::default() };
        params.eos.extend(&tokenizer.special().eos);
        let stream =
            Stream { detokenizer: Some(tokenizer.detokenizer()), on_text: &mut |_| {}, keep_scores: false };
        let lane = match prompted.who {
            Who::Fused => self.link.as_mut().map(|link| &mut link.receiver),
            Who::Receiver => self.receiver.lane.as_mut(),
            Who::Sharer(index) => self.sharers[index].lane.as_mut(),
        };
        let lane = lane.expect("a prompt was read in it");
        let answer = generate(lane, prompted.logits, &params, stream)?;
        prompted.cost.tokens += answer.tokens.len();
        prompted.cost.total_ms = prompted.before.map(|before| ms(before + prompted.started.elapsed()));
        Ok((answer, prompted.cost))
    }

    fn make_link(&mut self, prompt: &Prompt, more: usize) -> Result<(), Error> {
        let receiver = self.model(Who::Receiver)?;
        let ours = room(prompt.ids.len() + more, receiver);
        let sizes = self.session.sharers.iter().zip(&prompt.sharers);
        let theirs: Vec<usize> = sizes.map(|(model, own)| room(own.ids.len().max(1), model)).collect();
        let (have, have_theirs) = &self.link_room;
        let fits = *have >= ours && have_theirs.iter().zip(&theirs).all(|(have, need)| have >= need);
        if self.link.is_none() || !fits {
            let larger = |(have, need): (usize, &usize)| have.max(*need);
            let known = have_theirs.iter().copied().chain(std::iter::repeat(0));
            let theirs: Vec<usize> = known.zip(&theirs).map(larger).collect();
            let ours = ours.max(*have);
            self.link = None;
            self.link = Some(self.session.link(ours, &theirs)?);
            self.link_room = (ours, theirs);
        }
        Ok(())
    }

    /// The Sharer's cache of what it reads, and how long it took to compute.
    fn sharer_cache(
        &mut self,
        s: usize,
        own: &SharerPrompt,
    ) -> Result<(Arc<Snapshot>, Option<Duration>), Error> {
        let same = |known: &Known| {
            known.sharer == s
                && known.prompt.token_ids == own.ids
                && known.prompt.position_ids == own.positions
        };
        let known = match self.known.iter().position(same) {
            Some(at) => self.known.remove(at),
            None => {
                let piece = Piece { ids: &own.ids, positions: &own.positions };
                match self.stores.get(s).and_then(|store| store.get(piece)) {
                    Some(kept) => Known { sharer: s, prompt: Arc::new(kept), took: None },
                    None => {
                        self.read_for_fusing(s, piece)?;
                        let alone = &self.sharers[s];
                        let lane = alone.lane.as_ref().expect("it holds what was read");
                        let snapshot = lane.capture(self.domains[s].clone(), piece.positions)?;
                        if let Some(store) = self.stores.get(s) {
                            store.put(piece, &snapshot)?;
                        }
                        Known { sharer: s, prompt: Arc::new(snapshot), took: Some(alone.took) }
                    }
                }
            }
        };
        let found = (known.prompt.clone(), known.took);
        // The last used stay: this question's, that of the one before (swap), the generic text's.
        self.known.push(known);
        let most = 4 * self.session.sharers.len();
        if self.known.len() > most {
            self.known.remove(0);
        }
        Ok(found)
    }

    /// Leaves a Sharer's columns of `piece` in its lane. It need not read again what it has just read to answer itself: that goes on with
    /// the end of the question's turn and the answer's beginning, which the columns before them do not know of.
    fn read_for_fusing(&mut self, s: usize, piece: Piece) -> Result<(), Error> {
        let alone = &mut self.sharers[s];
        let len = piece.ids.len();
        let counted = piece.positions.iter().copied().eq(0..len as u32);
        if let Some(lane) = alone.lane.as_mut().filter(|lane| counted && lane.ids().starts_with(piece.ids)) {
            lane.truncate(len, len as u32);
            return Ok(());
        }
        let start = Instant::now();
        let lane = alone.empty(&self.session, &self.session.sharers[s], len)?;
        lane.append(piece.ids, piece.positions, Goal::Cache, |_, _| {})?;
        lane.queue.synchronize()?;
        alone.took = start.elapsed();
        Ok(())
    }
}

fn changed(cache: &Snapshot, mut change: impl FnMut(usize, &mut KvColumns)) -> Arc<Snapshot> {
    let mut cache = cache.clone();
    cache.layers.iter_mut().enumerate().for_each(|(layer, columns)| change(layer, columns));
    Arc::new(cache)
}

/// Gives each Sharer's columns to the Receiver's tokens in another order.
fn shuffle(prompt: &mut Prompt, seed: u64) {
    for own in &mut prompt.sharers {
        let present: Vec<usize> =
            (0..own.columns.len()).filter(|&token| own.columns[token].is_some()).collect();
        let order = split::order(present.len() as u32, seed, 0);
        let before = own.columns.clone();
        for (to, from) in present.iter().zip(order) {
            own.columns[*to] = before[present[from as usize]];
        }
    }
}

pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
