//! The pair that the authors' program is timed with: Qwen3-0.6B ← Qwen2.5-0.5B shapes with a vocabulary of 32,000, the
//! published fuser (hidden 1024, last_aligned), all gates open.

use super::{Synthetic, ids, lane, pass_flops, receiver, sharer, small};
use c2c::{
    align::{LayerMapping, sections},
    backend::{Backend, DType, Queue, Tensor},
    cache::KvColumns,
    fuser::{Fuser, FuserConfig, FusionMode, Kind, Mapping, Party},
    model::{Decoder, ModelConfig},
    pipeline::{Lane, Link, Overlap, Prompt, SharerPrompt, WantedLogits},
};
use std::sync::Arc;

pub struct Pair {
    pub receiver: Arc<Decoder>,
    pub sharer: Arc<Decoder>,
    pub fuser: Fuser,
    device: Arc<dyn Backend>,
}

impl Pair {
    /// Weights in `dtype`; `tiny` keeps the families and drops the size.
    pub fn new(device: &Arc<dyn Backend>, dtype: DType, tiny: bool) -> Pair {
        let shape = |config: ModelConfig| if tiny { small(config) } else { config };
        let queue = Queue::new(device).expect("a queue");
        let mut synthetic = Synthetic::new(&queue);
        let [receiver, sharer] =
            [receiver(28), sharer(24)].map(|config| synthetic.decoder(&shape(config), dtype));
        let fuser = fuser(device, &receiver.config, &sharer.config, dtype, if tiny { 64 } else { 1024 });
        Pair { receiver, sharer, fuser, device: device.clone() }
    }

    /// A lane for `tokens` tokens with a queue of its own.
    pub fn lane(&self, decoder: &Arc<Decoder>, tokens: usize) -> Lane {
        lane(decoder, &Queue::new(&self.device).expect("a queue"), tokens)
    }

    /// Both models, each with room for `tokens` tokens.
    pub fn link(&self, tokens: usize) -> Link {
        let [receiver, sharer] = [&self.receiver, &self.sharer].map(|decoder| self.lane(decoder, tokens));
        let gates = vec![[1.0; 2]; self.receiver.config.layers];
        let fusers = vec![self.fuser.clone()];
        Link::new(receiver, vec![sharer], fusers, vec![gates], FusionMode::default(), Overlap::Off)
            .expect("a link")
    }

    /// Ids that begin with `first`: prompts of different `first` share nothing that a link could keep.
    pub fn ids(config: &ModelConfig, tokens: usize, first: u32) -> Vec<u32> {
        let mut ids = ids(config, tokens);
        ids[0] = first;
        ids
    }

    /// All tokens but the last are fused, each with the sharer's token at the same place.
    pub fn prompt(&self, tokens: usize, first: u32) -> Prompt {
        let positions: Vec<u32> = (0..tokens as u32).collect();
        let sharer = SharerPrompt {
            ids: Pair::ids(&self.sharer.config, tokens, first),
            positions: positions.clone(),
            columns: (0..tokens as u32).map(Some).collect(),
        };
        let ids = Pair::ids(&self.receiver.config, tokens, first);
        Prompt { ids, positions, sharers: vec![sharer], sections: sections::generation(tokens, 1) }
    }

    /// Operations to fill the sharer's cache.
    pub fn sharer_flops(&self, tokens: usize) -> f64 {
        pass_flops(&self.sharer.config, 0, tokens, false)
    }

    /// Operations of the receiver alone, up to the logits after the last token.
    pub fn receiver_flops(&self, tokens: usize) -> f64 {
        pass_flops(&self.receiver.config, 0, tokens, true) + self.logit_flops()
    }

    /// Operations inside the projectors: all tokens but the last are fused.
    pub fn fuse_flops(&self, tokens: usize) -> f64 {
        let matrices = self.fuser.projectors().iter().flat_map(|layer| layer.tensors().values());
        let weights: usize = matrices.filter(|tensor| tensor.shape().len() == 2).map(Tensor::elements).sum();
        2.0 * ((tokens - 1) * weights) as f64
    }

    /// Operations of a whole prefill. The receiver's last layer is done for the last token only.
    pub fn c2c_flops(&self, tokens: usize) -> f64 {
        let receiver = &self.receiver.config;
        self.sharer_flops(tokens)
            + pass_flops(receiver, 0, tokens - 1, false)
            + pass_flops(receiver, tokens - 1, tokens, true)
            + self.logit_flops()
            + self.fuse_flops(tokens)
    }

    pub fn logit_flops(&self) -> f64 {
        2.0 * (self.receiver.config.vocab * self.receiver.config.hidden) as f64
    }

    /// Asserts that logits and the fused cache are the same bits serial and overlapped, that they are numbers, and that
    /// another prompt's differ. Uses the prompts that begin with 1 and 2.
    pub fn check(&self, link: &mut Link, tokens: usize) {
        let mut run = |first: u32, overlap: Overlap| -> (Vec<f32>, Vec<KvColumns>) {
            link.overlap = overlap;
            let prompt = self.prompt(tokens, first);
            let (logits, report) = link.prefill(&prompt, WantedLogits::Last).expect("a prefill");
            assert_eq!(report.fused_tokens, tokens - 1, "fused tokens");
            let layers = 0..link.receiver.kv.layers().len();
            (logits, layers.map(|l| link.receiver.read(l, 0, tokens).expect("columns")).collect())
        };
        let serial = run(1, Overlap::Off);
        assert!(serial.0.iter().all(|logit| logit.is_finite()), "a logit is no number");
        assert!(run(2, Overlap::Layers).0 != serial.0, "another prompt has the same logits");
        assert!(run(1, Overlap::Layers) == serial, "overlapped and serial runs differ");
    }
}

/// Untrained, with every layer's receiver columns reading the aligned sharer layer's.
pub fn fuser(
    device: &Arc<dyn Backend>,
    receiver: &ModelConfig,
    sharer: &ModelConfig,
    dtype: DType,
    hidden: usize,
) -> Fuser {
    let mapping = LayerMapping::LAST_ALIGNED;
    let sources: Vec<usize> =
        mapping.sources(receiver.layers, sharer.layers).iter().map(|best| best[0]).collect();
    let [receiver, sharer] =
        [receiver, sharer].map(|model| Party::new(model.layers, model.kv_heads, model.head_dim));
    let mut config =
        FuserConfig::new(Kind::C2c, hidden, hidden, Mapping::from(mapping), &sources, receiver, sharer);
    config.dtype = dtype;
    Fuser::init(config, 1, device).expect("a fuser")
}
