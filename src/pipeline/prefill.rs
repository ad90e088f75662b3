//! A prefill, whole or in pieces: sharers, the receiver section by section, and the fuser behind both.

use super::{Error, Link, Overlap, Prompt, lane::piece};
use crate::{
    backend::{Event, Queue},
    model::Goal,
};
use std::time::Duration;

/// Times and volume of one prefill.
#[derive(Clone, Debug, Default)]
pub struct PrefillReport {
    /// Work of each sharer's queue.
    pub sharers: Vec<Duration>,
    pub receiver: Duration,
    pub fuse: Duration,
    /// Time from the end of both prefills to the end of the fuse: what the overlap did not hide.
    pub fuse_exposed: Duration,
    /// Bytes of sharer cache read by the fuser: what goes from model to model.
    pub fused_kv_bytes: u64,
    /// Receiver tokens that took a sharer column, over all sharers.
    pub fused_tokens: usize,
}

/// Which logits a prefill is run for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WantedLogits {
    /// After the last token.
    Last,
    /// After every token of the last section.
    LastSection,
}

/// A prefill under way, see [`Link::begin`].
pub struct Prefill {
    pub(super) prompt: Prompt,
    wanted: WantedLogits,
    logits: Vec<f32>,
    /// The section that is being read, its first token, and the first that was not in the cache before.
    section: usize,
    start: usize,
    from: usize,
    /// Of each sharer's last piece, by its layers.
    pub(super) sharer_cached: Vec<Vec<Event>>,
    /// Of the receiver's last piece, by layer.
    pub(super) receiver_cached: Vec<Event>,
    /// The last fusion of each receiver layer.
    pub(super) fused: Vec<Option<Event>>,
    sharer_spans: Vec<Spans>,
    receiver_spans: Spans,
    fuse_spans: Spans,
    /// When the receiver had read what is fused.
    fusible_end: Option<Event>,
    pub(super) report: PrefillReport,
}

/// Stretches of a queue, from event to event: between two pieces it may work for others.
#[derive(Default)]
struct Spans(Vec<(Event, Event)>);

impl Spans {
    /// Work of the queue; to be asked once it is done.
    fn time(&self) -> Duration {
        self.0.iter().filter_map(|(begin, end)| end.elapsed_since(begin)).sum()
    }

    fn end(&self) -> Option<&Event> {
        self.0.last().map(|(_, end)| end)
    }
}

impl Prefill {
    pub fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    /// With [`WantedLogits::LastSection`]: the logits `[tokens, vocab]` of what was read since this was last asked.
    pub fn take_logits(&mut self) -> Vec<f32> {
        std::mem::take(&mut self.logits)
    }
}

impl Link {
    /// Brings all caches to `prompt` and returns the receiver's logits: `[vocab]` after its last token, or
    /// `[tokens of the last section, vocab]`.
    ///
    /// Called again with a longer conversation, whatever it shares with the last one (same tokens, same sections) is
    /// kept, and the rest is fused on top.
    pub fn prefill(
        &mut self,
        prompt: &Prompt,
        wanted: WantedLogits,
    ) -> Result<(Vec<f32>, PrefillReport), Error> {
        self.validate(prompt)?;
        self.note_generated();
        self.rewind_to_shared(prompt);
        let mut prefill = self.begin(prompt.clone(), wanted)?;
        while !self.advance(&mut prefill, usize::MAX)? {}
        self.finish(prefill)
    }

    /// Begins a prefill in pieces: [`Link::advance`] until there is nothing left, then [`Link::finish`].
    ///
    /// The lanes hold nothing, or the beginnings of what they are to read, fused as `prompt` says and not ending inside a
    /// section that is fused.
    pub fn begin(&mut self, prompt: Prompt, wanted: WantedLogits) -> Result<Prefill, Error> {
        self.validate(&prompt)?;
        // Until this conversation is in the caches as a whole, nothing in them may be taken for it.
        self.fused = Prompt::default();
        let sharers = self.sharers.len();
        Ok(Prefill {
            prompt,
            wanted,
            logits: Vec::new(),
            section: 0,
            start: 0,
            from: self.receiver.ids().len(),
            sharer_cached: vec![Vec::new(); sharers],
            receiver_cached: Vec::new(),
            fused: vec![None; self.receiver.kv.layers().len()],
            sharer_spans: (0..sharers).map(|_| Spans::default()).collect(),
            receiver_spans: Spans::default(),
            fuse_spans: Spans::default(),
            fusible_end: None,
            report: PrefillReport::default(),
        })
    }

    /// Issues the next piece, of about `tokens` tokens of each model, and tells whether it was the last.
    ///
    /// The logits that [`Link::finish`] returns are those of the queue's last pass: nothing else may run on it between the last
    /// piece and that.
    pub fn advance(&mut self, prefill: &mut Prefill, tokens: usize) -> Result<bool, Error> {
        // Fewer could leave single tokens over.
        let tokens = tokens.max(3);
        let sharers_done = self.advance_sharers(prefill, tokens)?;
        if self.overlap == Overlap::Off {
            if !sharers_done {
                return Ok(false);
            }
            prefill.sharer_spans.iter().filter_map(Spans::end).for_each(|end| self.receiver.queue.wait(end));
        }
        let mut room = tokens;
        while let Some(&section) = prefill.prompt.sections.get(prefill.section) {
            let end = prefill.start + section.len;
            let last = prefill.section + 1 == prefill.prompt.sections.len();
            // After its last piece the receiver must not wait for anybody.
            if last && !sharers_done {
                return Ok(false);
            }
            let left = end.saturating_sub(self.receiver.ids().len());
            if left > room && room < 3 {
                return Ok(false);
            }
            let n = piece(left, room);
            self.read(prefill, n, last)?;
            room -= n;
            if n < left {
                return Ok(false);
            }
            if !last && section.sharer_mask != 0 && prefill.from < end {
                if !sharers_done {
                    return Ok(false);
                }
                let read = self.receiver.queue.record();
                if self.overlap == Overlap::Off {
                    self.queue.wait(&read);
                }
                prefill.fusible_end = Some(read);
                let begin = self.queue.record();
                let from = prefill.from;
                self.fuse_section(prefill, from, end, section.sharer_mask)?;
                prefill.fuse_spans.0.push((begin, self.queue.record()));
            }
            prefill.section += 1;
            prefill.start = end;
            prefill.from = end.max(self.receiver.ids().len());
        }
        Ok(true)
    }

    /// The next piece of each sharer; whether all have read everything.
    fn advance_sharers(&mut self, prefill: &mut Prefill, tokens: usize) -> Result<bool, Error> {
        let mut done = true;
        for (index, (lane, own)) in self.sharers.iter_mut().zip(&prefill.prompt.sharers).enumerate() {
            let known = lane.ids().len();
            let end = known + piece(own.ids.len() - known, tokens);
            done &= end == own.ids.len();
            if end == known {
                continue;
            }
            let begin = lane.queue.record();
            let (ids, positions) = (&own.ids[known..end], &own.positions[known..end]);
            prefill.sharer_cached[index] = lane.append(ids, positions, Goal::Cache, |_, _| {})?;
            prefill.sharer_spans[index].0.push((begin, lane.queue.record()));
        }
        Ok(done)
    }

    /// The receiver reads `n` more tokens of a section.
    fn read(&mut self, prefill: &mut Prefill, n: usize, last: bool) -> Result<(), Error> {
        if n == 0 {
            return Ok(());
        }
        let from = self.receiver.ids().len();
        let Prefill { prompt, logits, fused, wanted, .. } = &mut *prefill;
        let begin = self.receiver.queue.record();
        let wait_fused = |queue: &Queue, layer: usize| {
            if let Some(event) = &fused[layer] {
                queue.wait(event);
            }
        };
        let goal = if last { Goal::Hidden } else { Goal::Cache };
        let (ids, positions) = (&prompt.ids[from..from + n], &prompt.positions[from..from + n]);
        let cached = self.receiver.append_observed(ids, positions, goal, wait_fused, |lane, tokens| {
            if last && *wanted == WantedLogits::LastSection {
                logits.extend(lane.pass_logits(tokens)?);
            }
            Ok(())
        })?;
        prefill.receiver_cached = cached;
        prefill.receiver_spans.0.push((begin, self.receiver.queue.record()));
        Ok(())
    }

    /// Waits for what [`Link::advance`] issued, and returns as [`Link::prefill`] does.
    pub fn finish(&mut self, prefill: Prefill) -> Result<(Vec<f32>, PrefillReport), Error> {
        let logits = match prefill.wanted {
            WantedLogits::Last => self.receiver.logits()?,
            WantedLogits::LastSection => prefill.logits,
        };
        self.synchronize()?;
        self.fused = prefill.prompt;
        let mut report = prefill.report;
        report.sharers = prefill.sharer_spans.iter().map(Spans::time).collect();
        report.receiver = prefill.receiver_spans.time();
        report.fuse = prefill.fuse_spans.time();
        let sharers = prefill.sharer_spans.iter().filter_map(Spans::end);
        let prefills = sharers.chain(&prefill.fusible_end).filter_map(Event::done_at).max();
        let fuse = prefill.fuse_spans.end().and_then(Event::done_at);
        if let (Some(prefills), Some(fuse)) = (prefills, fuse)
            && report.fused_tokens > 0
        {
            report.fuse_exposed = fuse.saturating_duration_since(prefills);
        }
        Ok((logits, report))
    }
}
