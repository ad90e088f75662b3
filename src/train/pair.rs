//! One pass over a batch of samples that trains the fusers of a receiver and its sharers: both models are frozen.

use super::{
    BatchCache, Error, FuseRequest, FusedColumns, GateNoise, Labels, Learned, Piece, PromptStore, Recompute,
    Sample, TrainedFuser, TrainingPass,
    cut::{Cut, cut},
    gradient_pages,
};
use crate::{
    align::Fraction,
    backend::{DType, Event, Queue, Tensor},
    cache::KvColumns,
    eval::asking::same_moments,
    fuser::{FusionMode, LayerCall, Positions},
    model::Decoder,
    ops::{self, IGNORED, KvPages},
};
use std::{ops::Range, sync::Arc, time::Duration};

/// Bytes of gradient pages that are held at once; layers are grouped accordingly.
const GRADIENT_PAGES: usize = 256 << 20;

/// Frozen models with a trained fuser for each sharer.
pub struct PairTrainer {
    pub queue: Queue,
    pub receiver: Arc<Decoder>,
    pub sharers: Vec<Arc<Decoder>>,
    /// One a sharer.
    pub fusers: Vec<TrainedFuser>,
    pub mode: FusionMode,
    /// The part of each prompt's fused section that is fused; all of it where `None`.
    pub fraction: Option<Fraction>,
    pub recompute: Recompute,
    pub dropout: f32,
    pub seed: u64,
    /// Caches on disk, one a sharer; or empty.
    pub stores: Vec<PromptStore>,
    /// The receiver's caches before the fusion, on disk.
    pub receiver_store: Option<PromptStore>,
    /// Whether the tokens behind the fused section are fused too ([`Sample::including_response`] says with what).
    pub include_response: bool,
    receiver_cache: BatchCache,
    sharer_caches: Vec<BatchCache>,
    pass: Option<TrainingPass>,
    /// Of the last batch.
    answer_tokens: usize,
    gradients: Vec<KvPages>,
}

/// How a batch is run.
#[derive(Clone, Copy)]
pub enum Run<'a> {
    /// Soft gates with noise (one source a sharer), dropout, and gradients. `step` keys the dropped elements, `scale` is a factor
    /// of the gradient of the batch's mean loss.
    Learn { noise: &'a [&'a dyn GateNoise], step: u32, scale: f32 },
    /// Hard gates, no dropout, no gradients.
    Measure,
}

/// What the fuser is given in the place of the sharer's cache, to see whether it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// The sharer's own.
    None,
    /// Noise with the same moments.
    Random { seed: u64 },
}

/// What a batch gave.
#[derive(Clone, Debug, Default)]
pub struct BatchReport {
    /// Mean over all labels of the batch, nats.
    pub loss: f64,
    pub labels: usize,
    /// Receiver and sharer tokens that went through a model.
    pub receiver_tokens: usize,
    pub sharer_tokens: usize,
    pub phases: Phases,
}

/// Device time of the phases of a batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Phases {
    pub sharer: Duration,
    /// The prompt and, behind the fuse, the answer.
    pub receiver: Duration,
    pub fuse: Duration,
    pub loss: Duration,
    /// Of the receiver.
    pub backward: Duration,
    pub fuse_backward: Duration,
}

impl PairTrainer {
    /// # Panics
    /// If there are not as many fusers as sharers.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        queue: Queue,
        receiver: Arc<Decoder>,
        sharers: Vec<Arc<Decoder>>,
        fusers: Vec<TrainedFuser>,
        mode: FusionMode,
        kv: DType,
        recompute: Recompute,
        dropout: f32,
        seed: u64,
    ) -> Result<PairTrainer, Error> {
        assert_eq!(sharers.len(), fusers.len(), "a fuser for each sharer");
        let sharer_caches = sharers.iter().map(|sharer| BatchCache::new(&queue, sharer, kv));
        let sharer_caches = sharer_caches.collect::<Result<_, _>>()?;
        let receiver_cache = BatchCache::new(&queue, &receiver, kv)?;
        let (pass, gradients) = (None, Vec::new());
        Ok(PairTrainer {
            queue,
            receiver,
            sharers,
            fusers,
            mode,
            fraction: None,
            recompute,
            dropout,
            seed,
            stores: Vec::new(),
            receiver_store: None,
            include_response: false,
            receiver_cache,
            sharer_caches,
            pass,
            answer_tokens: 0,
            gradients,
        })
    }

    /// Whether this trainer can learn from the sample.
    pub fn check(&self, sample: &Sample) -> Result<(), Error> {
        let bad =
            |problem: &str| Err(Error::Sample { origin: sample.origin.clone(), problem: problem.into() });
        let cut = cut(sample, self.fraction)?;
        if sample.labels[..cut.fused.end].iter().any(|&label| label != IGNORED) {
            return bad("is to be learned from inside its fused section, which the fuser does not change");
        }
        if sample.labelled() == 0 {
            return bad("has no token to be learned from");
        }
        Ok(())
    }

    fn cuts(&self, samples: &[&Sample]) -> Result<Vec<Cut>, Error> {
        samples.iter().map(|sample| cut(sample, self.fraction)).collect()
    }

    /// The tokens that are fused with columns of sharer `s`.
    fn fused_tokens(&self, sample: &Sample, cut: &Cut, s: usize) -> Vec<usize> {
        let prompt = if cut.mask >> s & 1 == 1 { cut.fused.clone() } else { 0..0 };
        let response = if self.include_response { cut.fused.end..sample.tokens() } else { 0..0 };
        prompt.chain(response).collect()
    }

    /// How many tokens the receiver reads before the fusion.
    fn read_before(&self, sample: &Sample, cut: &Cut) -> usize {
        if self.include_response { sample.tokens() } else { cut.fused.end }
    }

    /// Makes room for samples, reads what the receiver reads before the fusion, and returns the pieces behind it.
    ///
    /// With the response fused too the receiver reads all tokens: their keys and values are what the fuser is given, and no
    /// gradient goes through them.
    fn read_receiver<'a>(&mut self, samples: &[&'a Sample], cuts: &[Cut]) -> Result<Vec<Piece<'a>>, Error> {
        let (queue, receiver) = (self.queue.clone(), self.receiver.clone());
        let mut lengths: Vec<usize> = samples.iter().map(|sample| sample.tokens()).collect();
        let pairs = || samples.iter().zip(cuts);
        let behind: Vec<Piece> = pairs().map(|(s, cut)| piece(s, cut.fused.end..s.tokens())).collect();
        let before: Vec<Piece> = pairs().map(|(s, cut)| piece(s, 0..self.read_before(s, cut))).collect();
        if self.include_response {
            lengths.push(behind.iter().map(|piece| piece.ids.len()).sum());
        }
        let store = self.receiver_store.as_ref();
        self.receiver_cache.begin(&queue, &receiver, &lengths)?;
        self.receiver_cache.read(&queue, &receiver, store, before)?;
        Ok(behind)
    }

    /// The batch of the pass behind the fusion.
    fn behind(&mut self, pieces: &[Piece]) -> Result<crate::model::Batch, Error> {
        match self.include_response {
            true => self.receiver_cache.over(&self.queue, &self.receiver, pieces),
            false => self.receiver_cache.append(&self.queue, &self.receiver, pieces),
        }
    }

    /// Runs a batch; with [`Run::Learn`] all gradients grow.
    pub fn run(&mut self, samples: &[&Sample], run: Run) -> Result<BatchReport, Error> {
        samples.iter().try_for_each(|sample| self.check(sample))?;
        if self.include_response {
            samples.iter().try_for_each(|sample| sample.check_response())?;
        }
        let cuts = self.cuts(samples)?;
        let queue = self.queue.clone();
        let begin = queue.record();
        let sharer_tokens = self.read_sharers(samples)?;
        let shared = queue.record();

        let receiver = self.receiver.clone();
        let answers = self.read_receiver(samples, &cuts)?;
        let prompted = queue.record();
        let columns = self.fuse(samples, &cuts, run)?;
        let fused = queue.record();

        let batch = self.behind(&answers)?;
        let labels = samples.iter().zip(&cuts).flat_map(|(s, cut)| &s.labels[cut.fused.end..]);
        let (rows, labels): (Vec<u32>, Vec<u32>) =
            (0u32..).zip(labels.copied()).filter(|(_, label)| *label != IGNORED).unzip();
        let context = batch.max_blocks * self.receiver_cache.kv.block_size();
        let pass = self.pass_for(batch.tokens, rows.len(), context)?;
        pass.forward(&queue, &receiver, &batch, self.receiver_cache.kv.layers(), Learned::Nothing)?;
        let answered = queue.record();
        let (learn, scale) = match run {
            Run::Learn { scale, .. } => (true, scale),
            Run::Measure => (false, 0.0),
        };
        let scale = scale / labels.len().max(1) as f32;
        let losses = pass.loss(
            &queue,
            &receiver,
            batch.tokens,
            Labels { rows: &rows, labels: &labels, scale },
            Learned::Nothing,
            learn,
        )?;
        let judged = queue.record();
        let fuser_passes = match learn {
            true => self.backward(&batch, &pass, &columns)?,
            false => Vec::new(),
        };
        (self.pass, self.answer_tokens) = (Some(pass), batch.tokens);
        let end = queue.record();
        queue.synchronize()?;

        let spent = |to: &Event, from: &Event| to.elapsed_since(from).unwrap_or_default();
        let fuse_backward = fuser_passes.iter().map(|[from, to]| spent(to, from)).sum();
        Ok(BatchReport {
            loss: losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() / losses.len().max(1) as f64,
            labels: losses.len(),
            receiver_tokens: samples.iter().map(|sample| sample.tokens()).sum(),
            sharer_tokens,
            phases: Phases {
                sharer: spent(&shared, &begin),
                receiver: spent(&prompted, &shared) + spent(&answered, &fused),
                fuse: spent(&fused, &prompted),
                loss: spent(&judged, &answered),
                backward: spent(&end, &judged).saturating_sub(fuse_backward),
                fuse_backward,
            },
        })
    }

    /// The first receiver layer whose output over the last batch's answers is not finite.
    pub fn first_bad_layer(&self) -> Result<Option<usize>, Error> {
        self.pass.as_ref().map_or(Ok(None), |pass| pass.first_bad_layer(&self.queue, self.answer_tokens))
    }

    /// The receiver's logits `[vocab]` after a prompt that is fused as at inference.
    pub fn logits(&mut self, prompt: &Sample, control: Control) -> Result<Vec<f32>, Error> {
        let queue = self.queue.clone();
        let included = match self.include_response {
            true => Some(prompt.clone().including_response()?),
            false => None,
        };
        let prompt = included.as_ref().unwrap_or(prompt);
        let cuts = [cut(prompt, self.fraction)?];
        self.read_sharers(&[prompt])?;
        if let Control::Random { seed } = control {
            self.randomise_sharers(seed)?;
        }
        let receiver = self.receiver.clone();
        let behind = self.read_receiver(&[prompt], &cuts)?;
        self.fuse(&[prompt], &cuts, Run::Measure)?;
        let batch = self.behind(&behind)?;
        self.receiver_cache.logits_of(&queue, &receiver, &batch)
    }

    /// Puts normal numbers of the same mean and deviation in the place of every layer's keys and values.
    fn randomise_sharers(&mut self, seed: u64) -> Result<(), Error> {
        for cache in &mut self.sharer_caches {
            let slots: Vec<u32> = cache.slots.iter().flatten().copied().collect();
            for layer in 0..cache.kv.layers().len() {
                let mut columns = cache.kv.read(&self.queue, layer, &slots)?;
                same_moments(&mut columns, seed, layer);
                cache.kv.write(&self.queue, layer, &slots, &columns)?;
            }
        }
        Ok(())
    }

    /// Fills the sharers' caches, from disk where they are kept there; the number of tokens that had to be read.
    fn read_sharers(&mut self, samples: &[&Sample]) -> Result<usize, Error> {
        let mut tokens = 0;
        for (s, (decoder, cache)) in self.sharers.iter().zip(&mut self.sharer_caches).enumerate() {
            let prompts = samples.iter().map(|sample| &sample.prompt.sharers[s]);
            let pieces: Vec<Piece> =
                prompts.map(|own| Piece { ids: &own.ids, positions: &own.positions }).collect();
            let lengths: Vec<usize> = pieces.iter().map(|piece| piece.ids.len()).collect();
            cache.begin(&self.queue, decoder, &lengths)?;
            tokens += cache.read(&self.queue, decoder, self.stores.get(s), pieces)?;
        }
        Ok(tokens)
    }

    /// How many caches of these samples' prompts are on disk, how many are to be kept there and are not, and the bytes that those
    /// will take.
    pub fn kept<'a>(
        &self,
        samples: impl Iterator<Item = &'a Sample>,
    ) -> Result<(usize, usize, usize), Error> {
        let (mut there, mut missing, mut bytes) = (0, 0, 0);
        let mut count = |store: &PromptStore, decoder: &Decoder, piece: Piece| {
            if piece.ids.is_empty() {
            } else if store.has(piece) {
                there += 1;
            } else {
                missing += 1;
                bytes += piece.ids.len() * store.bytes_a_token(&decoder.config);
            }
        };
        for sample in samples {
            for ((own, store), decoder) in sample.prompt.sharers.iter().zip(&self.stores).zip(&self.sharers) {
                count(store, decoder, Piece { ids: &own.ids, positions: &own.positions });
            }
            if let Some(store) = &self.receiver_store {
                count(
                    store,
                    &self.receiver,
                    piece(sample, 0..self.read_before(sample, &cut(sample, self.fraction)?)),
                );
            }
        }
        Ok((there, missing, bytes))
    }

    /// The memory of the last pass where it is large enough.
    fn pass_for(&mut self, tokens: usize, labels: usize, context: usize) -> Result<TrainingPass, Error> {
        match self.pass.take().filter(|pass| pass.fits(tokens, labels, context)) {
            Some(pass) => Ok(pass),
            None => {
                let (config, precision) = (&self.receiver.config, self.receiver.precision);
                TrainingPass::new(&self.queue, config, precision, tokens, labels, context, self.recompute)
            }
        }
    }

    fn slots(&self, slots: &[u32]) -> Result<Tensor, Error> {
        Ok(self.queue.tensor(slots, &[slots.len()], "slots")?)
    }

    /// The columns of a batch that are fused with those of sharer `s`.
    fn aligned(&self, samples: &[&Sample], cuts: &[Cut], s: usize) -> Aligned {
        let mut all = Aligned::default();
        for (i, (sample, cut)) in samples.iter().zip(cuts).enumerate() {
            let own = &sample.prompt.sharers[s];
            for token in self.fused_tokens(sample, cut, s) {
                if let Some(Some(column)) = own.columns.get(token) {
                    all.source.push(self.sharer_caches[s].slots[i][*column as usize]);
                    all.target.push(self.receiver_cache.slots[i][token]);
                    all.source_positions.push(own.positions[*column as usize]);
                    all.target_positions.push(sample.prompt.positions[token]);
                }
            }
        }
        all
    }

    /// Shows what the fusers would read of a batch: `see(sharer, number of a route, its columns, the receiver's, where they are)`.
    pub fn observe(
        &mut self,
        samples: &[&Sample],
        mut see: impl FnMut(usize, usize, KvColumns, KvColumns, Positions),
    ) -> Result<(), Error> {
        let cuts = self.cuts(samples)?;
        self.read_sharers(samples)?;
        self.read_receiver(samples, &cuts)?;
        for (s, fuser) in self.fusers.iter().enumerate() {
            let all = self.aligned(samples, &cuts, s);
            for (number, route) in fuser.fuser.config().routes.iter().enumerate() {
                let theirs = self.sharer_caches[s].kv.read(&self.queue, route.sharer, &all.source)?;
                let ours = self.receiver_cache.kv.read(&self.queue, route.receiver, &all.target)?;
                see(s, number, theirs, ours, all.positions());
            }
        }
        Ok(())
    }

    /// Fuses every sharer's columns into the receiver's cache. The columns of [`Run::Learn`] are kept, one entry a sharer.
    fn fuse(
        &mut self,
        samples: &[&Sample],
        cuts: &[Cut],
        run: Run,
    ) -> Result<Vec<Option<FusedColumns>>, Error> {
        let mut kept = Vec::new();
        let live = self.receiver_cache.kv.layers();
        let several = self.sharers.len() > 1 && self.mode == FusionMode::Parallel;
        // Sharers in parallel all read the plain cache while the sum grows in place.
        let plain = several.then(|| self.plain_copies()).transpose()?;
        for (s, fuser) in self.fusers.iter().enumerate() {
            let all = self.aligned(samples, cuts, s);
            if all.source.is_empty() {
                kept.push(None);
                continue;
            }
            let (source, target) = (self.slots(&all.source)?, self.slots(&all.target)?);
            let hard = fuser.hard_gates();
            let calls: Vec<LayerCall> = (0..live.len())
                .filter_map(|layer| {
                    let route = fuser.fuser.route(layer)?;
                    Some(LayerCall {
                        layer,
                        gates: hard[route.projector],
                        source: &self.sharer_caches[s].kv.layers()[route.sharer],
                        target: plain.as_ref().map_or(&live[layer], |plain| &plain[layer]),
                        base: &live[layer],
                        out: &live[layer],
                    })
                })
                .collect();
            let precision = self.receiver.precision;
            kept.push(match run {
                Run::Learn { noise, step, .. } => Some(fuser.forward(
                    &self.queue,
                    FuseRequest {
                        layers: &calls,
                        source_slots: source,
                        target_slots: target,
                        precision,
                        dropout: self.dropout,
                        seed: self.seed,
                        step,
                        noise: noise[s],
                    },
                )?),
                Run::Measure => {
                    fuser.measure(&self.queue, &calls, &source, &target, all.positions(), precision)?;
                    None
                }
            });
        }
        Ok(kept)
    }

    /// The receiver's whole cache as it is before the first sharer.
    fn plain_copies(&self) -> Result<Vec<KvPages>, Error> {
        let slots: Vec<u32> = self.receiver_cache.slots.iter().flatten().copied().collect();
        let slots = self.slots(&slots)?;
        let backend = self.queue.backend();
        let mut copies = Vec::new();
        for live in self.receiver_cache.kv.layers() {
            let page = |like: &Tensor| backend.alloc(like.dtype(), like.shape(), "plain cache");
            let copy = KvPages { keys: page(&live.keys)?, values: page(&live.values)? };
            ops::copy_slots(&self.queue, live, &slots, &copy, &slots)?;
            copies.push(copy);
        }
        Ok(copies)
    }

    /// Beginnings and ends of what the fusers' part of it was.
    fn backward(
        &mut self,
        batch: &crate::model::Batch,
        pass: &TrainingPass,
        columns: &[Option<FusedColumns>],
    ) -> Result<Vec<[Event; 2]>, Error> {
        let queue = self.queue.clone();
        let pages = self.receiver_cache.kv.layers();
        let layers = pages.len();
        let fused: Vec<bool> =
            (0..layers).map(|l| columns.iter().flatten().any(|columns| columns.has(l))).collect();
        let Some(lowest) = fused.iter().position(|&fused| fused) else { return Ok(Vec::new()) };
        let bytes = 4 * (pages[0].keys.elements() + pages[0].values.elements());
        let group = (GRADIENT_PAGES / bytes.max(1)).clamp(1, layers - lowest);
        if self.gradients.len() < group || self.gradients[0].blocks() < pages[0].blocks() {
            let make = (0..group).map(|_| gradient_pages(queue.backend(), &pages[0]));
            self.gradients = make.collect::<Result<_, _>>()?;
        }
        let gradients: Vec<KvPages> =
            self.gradients.iter().map(|all| first_blocks(all, pages[0].blocks())).collect();
        let dkv = |layer: usize| gradients[layer % group].clone();
        let (fusers, sequential) = (&self.fusers, self.mode == FusionMode::Sequential);
        let mut waiting: Vec<usize> = Vec::new();
        let mut passes = Vec::new();
        pass.backward(
            &queue,
            &self.receiver,
            batch,
            pages,
            Learned::Nothing,
            lowest,
            |layer| {
                let pages = dkv(layer);
                ops::zero(&queue, &pages.keys)?;
                ops::zero(&queue, &pages.values)?;
                Ok(pages)
            },
            |layer| {
                waiting.push(layer);
                if waiting.len() < group && layer > lowest {
                    return Ok(());
                }
                let begin = queue.record();
                // In reverse: what a later sharer read was what an earlier one had left.
                for (s, (fuser, columns)) in fusers.iter().zip(columns).enumerate().rev() {
                    if let Some(columns) = columns {
                        fuser.backward(&queue, columns, &waiting, dkv, sequential && s > 0)?;
                    }
                }
                passes.push([begin, queue.record()]);
                waiting.clear();
                Ok(())
            },
        )?;
        for (fuser, columns) in self.fusers.iter_mut().zip(columns) {
            if let Some(columns) = columns {
                fuser.gates_backward(&queue, columns)?;
            }
        }
        Ok(passes)
    }
}

/// Slots and rotary positions of columns that go together.
#[derive(Default)]
struct Aligned {
    source: Vec<u32>,
    target: Vec<u32>,
    source_positions: Vec<u32>,
    target_positions: Vec<u32>,
}

impl Aligned {
    fn positions(&self) -> Positions<'_> {
        Positions { source: &self.source_positions, target: &self.target_positions }
    }
}

fn first_blocks(pages: &KvPages, blocks: usize) -> KvPages {
    let first = |tensor: &Tensor| tensor.narrow(0, blocks).expect("as large as the cache");
    KvPages { keys: first(&pages.keys), values: first(&pages.values) }
}

fn piece(sample: &Sample, range: Range<usize>) -> Piece<'_> {
    Piece { ids: &sample.prompt.ids[range.clone()], positions: &sample.prompt.positions[range] }
}
