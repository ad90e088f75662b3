//! Fusing the answer as well: every token from the last section on, generated ones included, takes a column of each sharer.
//!
//! Three passes a token. The *clean* receiver and the sharers read it, each behind what it read before; the fuser makes of
//! their columns the receiver's fused one; the receiver itself then runs over the token, attending to fused columns, the
//! token's own among them. So keys and values always come from the clean receiver, whose cache nothing is ever fused into,
//! and only queries and hidden states from the fused one. Layers that no open gate reaches take the clean column as it is.
//!
//! The fused column lies in the token's slot before the pass begins. What the pass itself computes as keys and values has no
//! reader: it goes to slots aside, which no sequence has.
//!
//! From the last section on a sharer reads the receiver's ids, behind what it read of the prompt: token by token there is
//! nothing else that it could read. That needs a sharer with the receiver's vocabulary ([`Session::including_response`]).

use super::{Decode, Error, Lane, Link, Mode, Overlap, PrefillReport, Prompt, Session, WantedLogits};
use crate::{
    align::{Alignment, Section},
    backend::{DType, Event, Queue, Tensor},
    cache::BlockTable,
    fuser::{FuseCall, FusionMode, Gates, LayerCall, Positions},
    model::Goal,
    ops,
};
use std::ops::Range;

/// Tokens of one round of passes; bounds slots aside and the fuser's scratch.
pub(super) const PASS: usize = 64;

/// Caches that a prompt is brought into and an answer decoded on.
pub trait Conversation: Decode {
    /// As [`Link::prefill`].
    fn prefill(&mut self, prompt: &Prompt, wanted: WantedLogits) -> Result<(Vec<f32>, PrefillReport), Error>;

    fn link(&self) -> &Link;

    /// The receiver's cache without anything fused, where it is kept.
    fn clean(&self) -> Option<&Lane>;

    /// Lets the next decoded token sit at rotary position `position`.
    fn continue_at(&mut self, position: u32);

    /// Receiver tokens fused since the prefill, over all sharers, and the bytes of sharer cache that this read.
    fn fused_since_prefill(&self) -> (usize, u64) {
        (0, 0)
    }

    /// Memory of all caches.
    fn kv_bytes(&self) -> usize {
        self.link().kv_bytes() + self.clean().map_or(0, |clean| clean.kv.bytes())
    }
}

impl Decode for Link {
    fn ids(&self) -> &[u32] {
        self.receiver.ids()
    }

    fn room(&self) -> usize {
        self.receiver.room()
    }

    fn step(&mut self, id: u32) -> Result<Vec<f32>, Error> {
        self.receiver.step(id)
    }

    fn step_drawn(&mut self, id: u32, row: &ops::SampleRow) -> Result<Option<ops::SampledRow>, Error> {
        self.receiver.step_drawn(id, row)
    }

    fn step_logits(&self) -> Result<Vec<f32>, Error> {
        self.receiver.step_logits()
    }
}

impl Conversation for Link {
    fn prefill(&mut self, prompt: &Prompt, wanted: WantedLogits) -> Result<(Vec<f32>, PrefillReport), Error> {
        Link::prefill(self, prompt, wanted)
    }

    fn link(&self) -> &Link {
        self
    }

    fn clean(&self) -> Option<&Lane> {
        None
    }

    fn continue_at(&mut self, position: u32) {
        self.receiver.continue_at(position);
    }
}

/// A [`Link`] that fuses the answer too.
pub struct ResponseLink {
    link: Link,
    clean: Lane,
    /// Slots of the receiver's pages for keys and values that nobody reads; `_blocks` holds them.
    aside: Vec<u32>,
    _blocks: BlockTable,
    /// The fuser's.
    queue: Queue,
    scratch: Tensor,
    /// What [`Conversation::fused_since_prefill`] says.
    fused: (usize, u64),
}

impl ResponseLink {
    /// `clean`: a lane of the receiver's model with as much room as the link's receiver, whose pages have room for 64 tokens
    /// besides.
    fn new(link: Link, clean: Lane) -> Result<ResponseLink, Error> {
        let receiver = &link.receiver;
        let backend = receiver.queue.backend();
        let mut blocks = BlockTable::new(receiver.kv.pool());
        let aside = receiver.kv.append(&receiver.queue, &mut blocks, PASS)?;
        let group = layers_at_once(&link);
        let need = link.fusers.iter().map(|fuser| fuser.scratch_len(backend.as_ref(), group, PASS));
        let need = need.max().unwrap_or(0).max(1);
        let scratch = backend.alloc(DType::F32, &[need], "fuser scratch")?;
        let queue = Queue::new(backend)?;
        Ok(ResponseLink { link, clean, aside, _blocks: blocks, queue, scratch, fused: (0, 0) })
    }

    /// Reads `ids` at the receiver's `positions`; `after_pass` sees how many tokens the receiver's last pass had.
    fn respond(
        &mut self,
        ids: &[u32],
        positions: &[u32],
        mut after_pass: impl FnMut(&Lane, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Some(&first) = positions.first() else { return Ok(()) };
        // The sharers' positions go on from their own prompts as the receiver's do.
        let begins: Vec<u32> = self.link.sharers.iter().map(Lane::next_position).collect();
        let pass = PASS.min(self.link.receiver.pass_capacity());
        for (ids, positions) in ids.chunks(pass).zip(positions.chunks(pass)) {
            let theirs = begins
                .iter()
                .map(|begin| positions.iter().map(|at| begin + at.saturating_sub(first)).collect())
                .collect();
            self.round(ids, positions, theirs)?;
            after_pass(&self.link.receiver, ids.len())?;
        }
        Ok(())
    }

    /// One round of the passes over at most [`PASS`] tokens; `theirs`: positions of each sharer.
    fn round(&mut self, ids: &[u32], positions: &[u32], theirs: Vec<Vec<u32>>) -> Result<(), Error> {
        let mut sharers: Vec<Columns> = Vec::new();
        for (lane, positions) in self.link.sharers.iter_mut().zip(&theirs) {
            sharers.push(Columns::append(lane, &self.queue, ids, positions)?);
        }
        let clean = Columns::append(&mut self.clean, &self.queue, ids, positions)?;
        let receiver = &mut self.link.receiver;
        let slots = slots_tensor(&self.queue, &receiver.take(ids, positions)?)?;
        self.queue.wait(&receiver.queue.record());
        if self.link.overlap == Overlap::Off {
            sharers.iter().chain([&clean]).for_each(|columns| self.queue.wait(&columns.end));
        }

        let mut fused: Vec<Event> = Vec::new();
        let layers = self.clean.kv.layers().len();
        let group = layers_at_once(&self.link);
        for first in (0..layers).step_by(group) {
            let group = first..(first + group).min(layers);
            for layer in group.clone() {
                self.queue.wait(&clean.cached[layer]);
                let (from, to) = (&self.clean.kv.layers()[layer], &self.link.receiver.kv.layers()[layer]);
                ops::copy_slots(&self.queue, from, &clean.slots, to, &slots)?;
            }
            self.fused.1 += self.fuse(group.clone(), &sharers, &clean.slots, &slots, positions, &theirs)?;
            fused.extend(group.map(|_| self.queue.record()));
        }
        let open = |gates: &&Gates| gates.iter().any(|gates| *gates != [0.0; 2]);
        self.fused.0 += ids.len() * self.link.gates.iter().filter(open).count();
        let aside = &self.aside[..ids.len()];
        self.link.receiver.pass_over(positions, aside, |queue, layer| queue.wait(&fused[layer]))
    }

    /// Fuses the receiver's columns at `slots` and `positions`, which are copies of the clean ones at `clean`, in layers
    /// `layers`; the bytes of sharer cache that are read.
    fn fuse(
        &self,
        layers: Range<usize>,
        sharers: &[Columns],
        clean: &Tensor,
        slots: &Tensor,
        positions: &[u32],
        theirs: &[Vec<u32>],
    ) -> Result<u64, Error> {
        let mut bytes = 0;
        let link = &self.link;
        let several = sharers.len() > 1 && link.mode == FusionMode::Parallel;
        for (s, columns) in sharers.iter().enumerate() {
            let (fuser, gates) = (&link.fusers[s], &link.gates[s]);
            let mut calls = Vec::new();
            for layer in layers.clone() {
                let gates = gates.get(layer).copied().unwrap_or_default();
                let Some(source) = fuser.sharer_layer(layer).filter(|_| gates != [0.0; 2]) else { continue };
                self.queue.wait(&columns.cached[source]);
                let live = &link.receiver.kv.layers()[layer];
                calls.push(LayerCall {
                    layer,
                    gates,
                    source: &link.sharers[s].kv.layers()[source],
                    target: if several { &self.clean.kv.layers()[layer] } else { live },
                    base: live,
                    out: live,
                });
            }
            if calls.is_empty() {
                continue;
            }
            for LayerCall { source, .. } in &calls {
                let element = source.keys.dtype().block_bytes();
                bytes += (2 * positions.len() * source.width() * element) as u64;
            }
            let call = FuseCall {
                layers: &calls,
                source_slots: &columns.slots,
                target_slots: if several { clean } else { slots },
                base_slots: slots,
                out_slots: slots,
                scratch: &self.scratch,
                precision: link.receiver.decoder.precision,
            };
            let positions = Positions { source: &theirs[s], target: positions };
            fuser.issue_at(&self.queue, call, positions)?;
        }
        Ok(bytes)
    }
}

/// Without overlap all layers are ready at once.
fn layers_at_once(link: &Link) -> usize {
    match link.overlap {
        Overlap::Off => link.receiver.kv.layers().len().max(1),
        Overlap::Layers => 1,
    }
}

fn slots_tensor(queue: &Queue, slots: &[u32]) -> Result<Tensor, Error> {
    Ok(queue.tensor(slots, &[slots.len()], "slots")?)
}

/// What a lane has just appended.
struct Columns {
    slots: Tensor,
    /// When each layer's are written.
    cached: Vec<Event>,
    end: Event,
}

impl Columns {
    fn append(lane: &mut Lane, fuser: &Queue, ids: &[u32], positions: &[u32]) -> Result<Columns, Error> {
        let known = lane.slots().len();
        let cached = lane.append(ids, positions, Goal::Cache, |_, _| {})?;
        let slots = slots_tensor(fuser, &lane.slots()[known..])?;
        Ok(Columns { slots, cached, end: lane.queue.record() })
    }
}

impl Decode for ResponseLink {
    fn ids(&self) -> &[u32] {
        self.link.receiver.ids()
    }

    fn room(&self) -> usize {
        let lanes = self.link.sharers.iter().chain([&self.link.receiver]);
        lanes.map(Decode::room).min().unwrap_or(0)
    }

    fn step(&mut self, id: u32) -> Result<Vec<f32>, Error> {
        let position = self.link.receiver.next_position();
        self.respond(&[id], &[position], |_, _| Ok(()))?;
        self.link.receiver.logits()
    }

    fn step_logits(&self) -> Result<Vec<f32>, Error> {
        self.link.receiver.logits()
    }
}

impl Conversation for ResponseLink {
    /// From scratch: nothing is kept of an earlier conversation.
    fn prefill(&mut self, prompt: &Prompt, wanted: WantedLogits) -> Result<(Vec<f32>, PrefillReport), Error> {
        let covered: usize = prompt.sections.iter().map(|section| section.len).sum();
        if covered != prompt.ids.len() {
            return Err(Error::SectionLength { sections: covered, tokens: prompt.ids.len() });
        }
        let head = covered - prompt.sections.last().map_or(0, |section| section.len);
        if head == covered {
            return Err(Error::EmptyPrompt);
        }
        let lanes = self.link.sharers.iter_mut().chain([&mut self.link.receiver, &mut self.clean]);
        lanes.for_each(|lane| lane.truncate(0, 0));
        self.fused = (0, 0);
        let mut report = PrefillReport::default();
        let begin = self.clean.queue.record();
        if head > 0 {
            (_, report) = self.link.prefill(&before(prompt, head), WantedLogits::LastSection)?;
            self.clean.append(&prompt.ids[..head], &prompt.positions[..head], Goal::Cache, |_, _| {})?;
        }
        let end = self.clean.queue.record();
        let mut logits = Vec::new();
        self.respond(&prompt.ids[head..], &prompt.positions[head..], |lane, tokens| {
            if wanted == WantedLogits::LastSection {
                logits.extend(lane.pass_logits(tokens)?);
            }
            Ok(())
        })?;
        if wanted == WantedLogits::Last {
            logits = self.link.receiver.logits()?;
        }
        self.clean.queue.synchronize()?;
        let (tokens, bytes) = std::mem::take(&mut self.fused);
        report.fused_tokens += tokens;
        report.fused_kv_bytes += bytes;
        report.receiver += end.elapsed_since(&begin).unwrap_or_default();
        Ok((logits, report))
    }

    fn link(&self) -> &Link {
        &self.link
    }

    fn clean(&self) -> Option<&Lane> {
        Some(&self.clean)
    }

    fn fused_since_prefill(&self) -> (usize, u64) {
        self.fused
    }

    fn continue_at(&mut self, position: u32) {
        let lanes = self.link.sharers.iter_mut().chain([&mut self.link.receiver, &mut self.clean]);
        lanes.for_each(|lane| lane.continue_at(position));
    }
}

/// The first `head` tokens of `prompt`: all sections but the last, in whose place is an empty one.
fn before(prompt: &Prompt, head: usize) -> Prompt {
    let mut prompt = prompt.clone();
    prompt.ids.truncate(head);
    prompt.positions.truncate(head);
    prompt.sharers.iter_mut().for_each(|own| own.columns.truncate(head));
    if let Some(last) = prompt.sections.last_mut() {
        *last = Section { len: 0, sharer_mask: 0 };
    }
    prompt
}

impl Session {
    /// The same session, fusing the answer's own tokens too.
    ///
    /// # Errors
    /// In another mode than c2c. If a sharer's vocabulary is not the receiver's, whose ids it would read; with
    /// [`Alignment::None`] it reads them anyway.
    pub fn including_response(mut self) -> Result<Session, Error> {
        if self.mode() != Mode::C2c {
            return Err(Error::ResponseMode(self.mode()));
        }
        let ours = self.receiver()?.party().tokenizer;
        for sharer in self.sharers.iter().filter(|_| self.alignment() != Alignment::None) {
            if sharer.party().tokenizer != ours {
                return Err(Error::ResponseVocabulary { sharer: sharer.path.display().to_string() });
            }
        }
        self.include_response = true;
        Ok(self)
    }

    /// Caches for `prompt` and an answer, `room` receiver tokens in all.
    pub fn conversation(&self, prompt: &Prompt, room: usize) -> Result<Box<dyn Conversation>, Error> {
        let sharer_tokens = prompt.sharers.iter().map(|own| own.ids.len());
        if !self.include_response {
            return Ok(Box::new(self.link(room, &sharer_tokens.collect::<Vec<_>>())?));
        }
        let response = room - (prompt.ids.len() - prompt.sections.last().map_or(0, |section| section.len));
        let rooms = self.sharers.iter().zip(sharer_tokens);
        let rooms = rooms.map(|(model, own)| (own + response).min(model.decoder.config.context_length));
        let link = self.link_beside(room, &rooms.collect::<Vec<_>>(), PASS)?;
        Ok(Box::new(ResponseLink::new(link, self.lane(self.receiver()?, room)?)?))
    }
}
