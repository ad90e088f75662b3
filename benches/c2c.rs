//! Both prefills and the fuse of all layers, as they lie one after the other and overlapped: Qwen3-0.6B ← Qwen2.5-0.5B
//! shapes with a vocabulary of 32,000, the published fuser (hidden 1024, last_aligned), all gates open, BF16.

mod machine;
mod synthetic;

use c2c::{
    align::{LayerMapping, sections},
    backend::{DType, Queue, Tensor},
    cache::KvColumns,
    fuser::{Fuser, FuserConfig, FusionMode, Kind, Mapping, Party},
    model::ModelConfig,
    pipeline::{Link, Overlap, Prompt, SharerPrompt, WantedLogits},
};
use criterion::{Criterion, criterion_group, criterion_main};
use machine::{Machine, Work};
use synthetic::{Synthetic, ids, lane, pass_flops, receiver, sharer, small};

const TOKENS: usize = 256;

fn c2c(criterion: &mut Criterion) {
    let machine = Machine::open();
    let mut group = machine.group(criterion, "c2c");
    let smoke = machine.smoke();
    let shape = |config: ModelConfig| if smoke { small(config) } else { config };
    let (receiver, sharer) = (shape(receiver(28)), shape(sharer(24)));
    let (tokens, hidden) = if smoke { (40, 64) } else { (TOKENS, 1024) };

    let queues = [Queue::new(&machine.device), Queue::new(&machine.device)];
    let mut synthetic = Synthetic::new(&queues[0]);
    let lanes = [&receiver, &sharer].map(|config| synthetic.decoder(config, DType::Bf16));
    let [receiver_lane, sharer_lane] = [0, 1].map(|i| lane(&lanes[i], &queues[i], tokens));
    let fuser = fuser(&machine, &receiver, &sharer, hidden);
    let fuser_weights: usize = (fuser.projectors().iter().flat_map(|layer| layer.tensors().values()))
        .filter(|tensor| tensor.shape().len() == 2)
        .map(Tensor::elements)
        .sum();
    let gates = vec![[1.0; 2]; receiver.layers];
    let mode = FusionMode::default();
    let mut link = Link::new(receiver_lane, vec![sharer_lane], vec![fuser], vec![gates], mode, Overlap::Off);

    check(&mut link, &prompt(&receiver, &sharer, tokens, 1), &prompt(&receiver, &sharer, tokens, 2));

    let fused = tokens - 1;
    let flops = pass_flops(&sharer, 0, tokens, false)
        + pass_flops(&receiver, 0, fused, false)
        + pass_flops(&receiver, fused, tokens, true)
        + 2.0 * (receiver.vocab * receiver.hidden) as f64
        + 2.0 * (fused * fuser_weights) as f64;
    let mut run = 0;
    let mut times = [Overlap::Off, Overlap::Layers].map(|overlap| {
        link.overlap = overlap;
        let which = if overlap == Overlap::Off { "serial" } else { "overlapped" };
        let id = format!("prefill, prefill and fuse of {TOKENS} tokens, {which}");
        machine.bench(&mut group, &id, Work::Bf16(flops), || {
            // Another first token: nothing of the last run is reused.
            run += 1;
            let prompt = prompt(&receiver, &sharer, tokens, run % 200);
            link.prefill(&prompt, WantedLogits::Last).expect("a prefill");
        })
    });
    if let [Some(serial), Some(overlapped)] = times.each_mut() {
        let change = 100.0 * (overlapped.as_secs_f64() / serial.as_secs_f64() - 1.0);
        println!("overlapped over serial: {change:+.1} % time\n");
    }
    group.finish();
}

/// Untrained, with every layer's receiver columns reading the aligned sharer layer's.
fn fuser(machine: &Machine, receiver: &ModelConfig, sharer: &ModelConfig, hidden: usize) -> Fuser {
    let mapping = LayerMapping::LAST_ALIGNED;
    let sources: Vec<usize> =
        mapping.sources(receiver.layers, sharer.layers).iter().map(|best| best[0]).collect();
    let [receiver, sharer] =
        [receiver, sharer].map(|model| Party::new(model.layers, model.kv_heads, model.head_dim));
    let mut config =
        FuserConfig::new(Kind::C2c, hidden, hidden, Mapping::from(mapping), &sources, receiver, sharer);
    config.dtype = DType::Bf16;
    Fuser::init(config, 1, &machine.device).expect("a fuser")
}

/// All tokens but the last are fused, each with the sharer's token at the same place.
fn prompt(receiver: &ModelConfig, sharer: &ModelConfig, tokens: usize, first: u32) -> Prompt {
    let ids = |config: &ModelConfig| {
        let mut ids = ids(config, tokens);
        ids[0] = first;
        ids
    };
    let positions: Vec<u32> = (0..tokens as u32).collect();
    let columns = (0..tokens as u32).map(Some).collect();
    Prompt {
        ids: ids(receiver),
        positions: positions.clone(),
        sharers: vec![SharerPrompt { ids: ids(sharer), positions, columns }],
        sections: sections::generation(tokens, 1),
    }
}

/// Logits and the fused cache are the same bits either way, and another prompt's differ.
fn check(link: &mut Link, prompt: &Prompt, other: &Prompt) {
    let mut run = |prompt: &Prompt, overlap: Overlap| -> (Vec<f32>, Vec<KvColumns>) {
        link.overlap = overlap;
        let (logits, report) = link.prefill(prompt, WantedLogits::Last).expect("a prefill");
        assert_eq!(report.fused_tokens, prompt.ids.len() - 1, "fused tokens");
        let layers = 0..link.receiver.kv.layers().len();
        (logits, layers.map(|l| link.receiver.read(l, 0, prompt.ids.len()).expect("columns")).collect())
    };
    let serial = run(prompt, Overlap::Off);
    assert!(serial.0.iter().all(|logit| logit.is_finite()), "a logit is no number");
    assert!(run(other, Overlap::Layers).0 != serial.0, "another prompt has the same logits");
    assert!(run(prompt, Overlap::Layers) == serial, "overlapped and serial runs differ");
}

criterion_group!(benches, c2c);
criterion_main!(benches);
