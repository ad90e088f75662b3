//! A receiver linked to its sharers: their lanes, the fuser, and what was fused so far. [`super::prefill`] is the road over them.
//!
//! Fusion does not change the receiver's hidden states inside a section, so layer l of the fuser may start as soon as
//! the sharer's mapped layer and the receiver's layer l have written their K and V. Three kinds of queue (one a
//! sharer, one for the receiver, one for the fuser) and three kinds of event (sharer layer cached → fuse, receiver
//! layer cached → fuse, layer fused → next section) say exactly that.

use super::{Error, Lane, Prefill};
use crate::{
    align::Section,
    backend::{DType, Event, Queue, Tensor},
    fuser::{FuseCall, Fuser, FusionMode, Gates, LayerCall, Positions},
    ops::{self, KvPages},
};
use clap::ValueEnum;
use serde::Serialize;
use std::ops::Range;

/// `--overlap`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Overlap {
    /// Sharers, then the receiver, then the fuser.
    Off,
    /// Each as early as its inputs allow, layer by layer.
    #[default]
    Layers,
}

/// What one sharer reads.
#[derive(Clone, Debug, Default)]
pub struct SharerPrompt {
    pub ids: Vec<u32>,
    pub positions: Vec<u32>,
    /// For each receiver token the sharer token whose cache column it takes, if any.
    pub columns: Vec<Option<u32>>,
}

/// A whole conversation as token ids.
#[derive(Clone, Debug, Default)]
pub struct Prompt {
    pub ids: Vec<u32>,
    pub positions: Vec<u32>,
    pub sharers: Vec<SharerPrompt>,
    /// Cover all receiver tokens. Each but the last is fused as its mask says; the last never is.
    pub sections: Vec<Section>,
}

/// Fused tokens a call: bounds the fuser's scratch.
const MAX_FUSE: usize = 1024;
/// Elements of scratch that layers fused together may take: 256 MiB.
const FUSE_SCRATCH: usize = 64 << 20;

/// A receiver, its sharers, and a fuser for each.
pub struct Link {
    pub receiver: Lane,
    pub sharers: Vec<Lane>,
    pub fusers: Vec<Fuser>,
    /// For each fuser, per receiver layer.
    pub gates: Vec<Gates>,
    pub mode: FusionMode,
    pub overlap: Overlap,
    /// The fuser's.
    pub(super) queue: Queue,
    scratch: Option<Tensor>,
    /// What was fused so far: sections over the receiver's tokens, and the sharers' columns for them.
    pub(super) fused: Prompt,
}

impl Link {
    /// `fusers[i]` and `gates[i]` belong to `sharers[i]`.
    ///
    /// # Errors
    /// If the device has no queue for the fuser.
    ///
    /// # Panics
    /// If there are not as many fusers and gates as sharers.
    pub fn new(
        receiver: Lane,
        sharers: Vec<Lane>,
        fusers: Vec<Fuser>,
        gates: Vec<Gates>,
        mode: FusionMode,
        overlap: Overlap,
    ) -> Result<Link, Error> {
        assert_eq!((sharers.len(), sharers.len()), (fusers.len(), gates.len()), "a fuser for each sharer");
        let queue = Queue::new(receiver.queue.backend())?;
        Ok(Link {
            receiver,
            sharers,
            fusers,
            gates,
            mode,
            overlap,
            queue,
            scratch: None,
            fused: Prompt::default(),
        })
    }

    /// Memory of all caches.
    pub fn kv_bytes(&self) -> usize {
        self.sharers.iter().chain([&self.receiver]).map(|lane| lane.kv.bytes()).sum()
    }

    /// Waits until everything issued on any of the queues is done.
    pub fn synchronize(&self) -> Result<(), Error> {
        for lane in self.sharers.iter().chain([&self.receiver]) {
            lane.queue.synchronize()?;
        }
        Ok(self.queue.synchronize()?)
    }

    /// Forgets the conversation: the next prefill reads everything anew, but for what sharers' lanes are given before it.
    pub fn forget(&mut self) {
        self.receiver.truncate(0, 0);
        self.sharers.iter_mut().for_each(|lane| lane.truncate(0, 0));
        self.fused = Prompt::default();
    }

    pub(super) fn validate(&self, prompt: &Prompt) -> Result<(), Error> {
        if prompt.ids.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let covered: usize = prompt.sections.iter().map(|section| section.len).sum();
        if covered != prompt.ids.len() {
            return Err(Error::SectionLength { sections: covered, tokens: prompt.ids.len() });
        }
        for (index, section) in prompt.sections.iter().enumerate() {
            let mask = section.sharer_mask;
            if mask >> self.sharers.len() != 0 {
                return Err(Error::UnknownSharer { section: index, mask, sharers: self.sharers.len() });
            }
        }
        for (sharer, own) in prompt.sharers.iter().enumerate() {
            for (token, column) in own.columns.iter().enumerate() {
                if let Some(column) = column.filter(|&column| column as usize >= own.ids.len()) {
                    let (column, tokens) = (column as usize, own.ids.len());
                    return Err(Error::ColumnOutOfRange { token, column, sharer, tokens });
                }
            }
        }
        Ok(())
    }

    /// Counts tokens that the receiver generated since the last prefill to that conversation's last section.
    pub(super) fn note_generated(&mut self) {
        let generated = self.receiver.ids().get(self.fused.ids.len()..).unwrap_or_default();
        let next = self.receiver.next_position().saturating_sub(generated.len() as u32);
        self.fused.positions.extend((next..).take(generated.len()));
        self.fused.ids.extend(generated);
        if let Some(last) = self.fused.sections.last_mut() {
            last.len += generated.len();
        }
        for own in &mut self.fused.sharers {
            own.columns.resize(self.fused.ids.len(), None);
        }
    }

    /// Cuts all lanes back to the part of the last conversation that `prompt` begins with.
    pub(super) fn rewind_to_shared(&mut self, prompt: &Prompt) {
        let old = &self.fused;
        for ((lane, own), was) in self.sharers.iter_mut().zip(&prompt.sharers).zip(&old.sharers) {
            let shared =
                common(&own.ids, &was.ids).min(common(&own.positions, &was.positions)).min(lane.ids().len());
            lane.truncate(shared, own.positions.get(shared).copied().unwrap_or(0));
        }
        // Same tokens, fused in the same way: fused sections whole, unfused ones as far as they go. The last section of
        // a conversation is not fused, whatever its mask. At least one token is left for the logits.
        let fusing = |sections: &[Section], i: usize| {
            if i + 1 == sections.len() { 0 } else { sections[i].sharer_mask }
        };
        let (mut kept, mut start) = (0, 0);
        for (index, (new, was)) in prompt.sections.iter().zip(&old.sections).enumerate() {
            let range = start..start + new.len.min(was.len);
            start += new.len;
            let mask = fusing(&prompt.sections, index);
            let ids = prompt.ids.get(range.clone()) == old.ids.get(range.clone())
                && prompt.positions.get(range.clone()) == old.positions.get(range.clone());
            let columns = prompt.sharers.iter().zip(&old.sharers).all(|(new, was)| {
                let columns = new.columns.get(range.clone()).unwrap_or_default();
                let read = columns.iter().flatten().max().map_or(0, |&last| last as usize + 1);
                Some(columns) == was.columns.get(range.clone())
                    && new.ids.get(..read) == was.ids.get(..read)
                    && new.positions.get(..read) == was.positions.get(..read)
            });
            let whole = new.len == was.len;
            if !ids || mask != fusing(&old.sections, index) || (mask != 0 && !(whole && columns)) {
                break;
            }
            kept = range.end;
            if !whole {
                break;
            }
        }
        let kept = kept.min(prompt.ids.len() - 1).min(self.receiver.ids().len());
        self.receiver.truncate(kept, prompt.positions[kept]);
    }

    /// Fuses the receiver's tokens `start..end` with the sharers of `mask`.
    pub(super) fn fuse_section(
        &mut self,
        prefill: &mut Prefill,
        start: usize,
        end: usize,
        mask: u32,
    ) -> Result<(), Error> {
        let Prefill { prompt, sharer_cached, receiver_cached, fused, report, .. } = prefill;
        let open = |sharer: &usize| self.gates[*sharer].iter().any(|gates| *gates != [0.0; 2]);
        let selected: Vec<usize> =
            (0..self.sharers.len()).filter(|i| mask >> i & 1 == 1).filter(open).collect();
        if selected.is_empty() {
            return Ok(());
        }
        let several = selected.len() > 1 && self.mode == FusionMode::Parallel;
        // Several sharers in parallel all read the plain cache while the sum grows in place: keep a plain copy.
        let plain = several.then(|| self.plain_copy(start, end)).transpose()?;
        let mut pairs: Vec<Columns> = Vec::new();
        for &sharer in &selected {
            pairs.push(self.columns(prompt, sharer, start, end, several)?);
            report.fused_tokens += pairs.last().map_or(0, |pair| pair.tokens);
        }
        let layers = self.receiver.kv.layers().len();
        // Without overlap all layers are ready at once; a plain copy has room for one.
        let group = match self.overlap {
            Overlap::Off if !several => self.layers_at_once(&selected, end - start),
            _ => 1,
        };
        let scratch = self.scratch_for(&selected, group, end - start)?;
        for first in (0..layers).step_by(group) {
            let group = first..(first + group).min(layers);
            for layer in group.clone() {
                self.queue.wait(&receiver_cached[layer]);
                if let Some(plain) = &plain {
                    let live = &self.receiver.kv.layers()[layer];
                    ops::copy_slots(&self.queue, live, &plain.from, &plain.pages, &plain.slots)?;
                }
            }
            for (&sharer, pair) in selected.iter().zip(&pairs) {
                let plain = plain.as_ref().map(|plain| &plain.pages);
                let layers = self.layer_calls(sharer, group.clone(), plain, &sharer_cached[sharer]);
                for LayerCall { source, .. } in &layers {
                    report.fused_kv_bytes +=
                        (2 * pair.tokens * source.width() * source.keys.dtype().block_bytes()) as u64;
                }
                for part in &pair.parts {
                    let call = FuseCall {
                        layers: &layers,
                        source_slots: &part.source,
                        target_slots: part.in_copy.as_ref().unwrap_or(&part.target),
                        base_slots: &part.target,
                        out_slots: &part.target,
                        scratch: &scratch,
                        precision: self.receiver.decoder.precision,
                    };
                    let positions = Positions { source: &part.positions[0], target: &part.positions[1] };
                    self.fusers[sharer].issue_at(&self.queue, call, positions)?;
                }
            }
            for layer in group {
                fused[layer] = Some(self.queue.record());
            }
        }
        Ok(())
    }

    /// What sharer `sharer` adds to the receiver's layers `layers`, once the fuser's queue has waited for its side.
    fn layer_calls<'a>(
        &'a self,
        sharer: usize,
        layers: Range<usize>,
        plain: Option<&'a KvPages>,
        cached: &[Event],
    ) -> Vec<LayerCall<'a>> {
        let mut calls = Vec::new();
        for layer in layers {
            let gates = self.gates[sharer].get(layer).copied().unwrap_or_default();
            let Some(source_layer) = self.fusers[sharer].sharer_layer(layer) else { continue };
            if gates == [0.0; 2] {
                continue;
            }
            // A sharer that had nothing new to read has no events: its cache is from an earlier turn.
            if let Some(event) = cached.get(source_layer) {
                self.queue.wait(event);
            }
            let source = &self.sharers[sharer].kv.layers()[source_layer];
            let live = &self.receiver.kv.layers()[layer];
            let target = plain.unwrap_or(live);
            calls.push(LayerCall { layer, gates, source, target, base: live, out: live });
        }
        calls
    }

    /// As many layers as [`FUSE_SCRATCH`] has room for.
    fn layers_at_once(&self, selected: &[usize], tokens: usize) -> usize {
        let layers = self.receiver.kv.layers().len().max(1);
        let fits = |&layers: &usize| self.scratch_need(selected, layers, tokens) <= FUSE_SCRATCH;
        (1..=layers).rev().find(fits).unwrap_or(1)
    }

    fn slots_tensor(&self, slots: &[u32]) -> Result<Tensor, Error> {
        Ok(self.queue.tensor(slots, &[slots.len()], "slots")?)
    }

    /// Which slots of sharer `sharer` go with which of the receiver's for tokens `start..end`, in parts of at most
    /// [`MAX_FUSE`]; `copied`: also their slots in a [`PlainCopy`] of these tokens.
    fn columns(
        &self,
        prompt: &Prompt,
        sharer: usize,
        start: usize,
        end: usize,
        copied: bool,
    ) -> Result<Columns, Error> {
        let aligned: Vec<(usize, u32)> = (start..end)
            .filter_map(|token| Some((token, prompt.sharers[sharer].columns.get(token).copied()??)))
            .collect();
        let (theirs, ours) = (self.sharers[sharer].slots(), self.receiver.slots());
        let mut parts = Vec::new();
        for part in aligned.chunks(self.fusers[sharer].most_tokens(MAX_FUSE)) {
            let source: Vec<u32> = part.iter().map(|&(_, column)| theirs[column as usize]).collect();
            let target: Vec<u32> = part.iter().map(|&(token, _)| ours[token]).collect();
            let in_copy: Vec<u32> = part.iter().map(|&(token, _)| (token - start) as u32).collect();
            let own = &prompt.sharers[sharer].positions;
            let positions = [
                part.iter().map(|&(_, column)| own[column as usize]).collect(),
                part.iter().map(|&(token, _)| prompt.positions[token]).collect(),
            ];
            parts.push(Part {
                positions,
                source: self.slots_tensor(&source)?,
                target: self.slots_tensor(&target)?,
                in_copy: copied.then(|| self.slots_tensor(&in_copy)).transpose()?,
            });
        }
        Ok(Columns { tokens: aligned.len(), parts })
    }

    /// Room for one layer of tokens `start..end`.
    fn plain_copy(&self, start: usize, end: usize) -> Result<PlainCopy, Error> {
        let tokens = end - start;
        let live = &self.receiver.kv.layers()[0];
        let (heads, size, dim) = (live.kv_heads(), live.block_size(), live.head_dim());
        let dims = [tokens.div_ceil(size), heads, size, dim];
        let backend = self.queue.backend();
        let page = |what| backend.alloc(live.keys.dtype(), &dims, what);
        let pages = KvPages { keys: page("plain keys")?, values: page("plain values")? };
        let slots: Vec<u32> = (0..tokens as u32).collect();
        let from = self.slots_tensor(&self.receiver.slots()[start..end])?;
        Ok(PlainCopy { pages, from, slots: self.slots_tensor(&slots)? })
    }

    /// Elements of scratch for `layers` layers of `tokens` tokens.
    fn scratch_need(&self, selected: &[usize], layers: usize, tokens: usize) -> usize {
        let backend = self.queue.backend().as_ref();
        let most = |sharer: usize| tokens.min(self.fusers[sharer].most_tokens(MAX_FUSE));
        let need = |&sharer: &usize| self.fusers[sharer].scratch_len(backend, layers, most(sharer));
        selected.iter().map(need).max().unwrap_or(0)
    }

    fn scratch_for(&mut self, selected: &[usize], layers: usize, tokens: usize) -> Result<Tensor, Error> {
        let need = self.scratch_need(selected, layers, tokens);
        match &self.scratch {
            Some(scratch) if scratch.elements() >= need => Ok(scratch.clone()),
            _ => {
                let scratch = self.queue.backend().alloc(DType::F32, &[need], "fuser scratch")?;
                self.scratch = Some(scratch.clone());
                Ok(scratch)
            }
        }
    }
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

struct Columns {
    tokens: usize,
    parts: Vec<Part>,
}

struct Part {
    /// Rotary positions of the source's columns and of the target's.
    positions: [Vec<u32>; 2],
    source: Tensor,
    target: Tensor,
    /// The target's slots in the plain copy, where there is one: the tokens' places in the section.
    in_copy: Option<Tensor>,
}

/// One layer of the receiver's cache as it was before the first sharer.
struct PlainCopy {
    pages: KvPages,
    /// The tokens' slots in the receiver's own cache, and in `pages`.
    from: Tensor,
    slots: Tensor,
}
