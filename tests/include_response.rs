//! Fusing the tokens of the answer: what is particular to it. Against the published program: `pairs_goldens.rs`.

mod device;

use c2c::{
    align::{Alignment, LayerMapping, Section},
    backend::{
        Backend, DeviceChoice,
        cpu::{Cpu, Schedule, Simd},
    },
    engine::SamplingParams,
    fuser::{FusionMode, GateOverride},
    pipeline::{
        ComputeType, Conversation, FuserChoice, Mode, Overlap, Prompt, Question, Session, SessionOptions,
        SharerPrompt, Stream, WantedLogits, generate,
    },
};
use std::{path::Path, sync::Arc};

const NEW: usize = 9;

fn options(sharers: usize, multi_sharer: FusionMode, gates: GateOverride) -> SessionOptions {
    let pair = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pair");
    SessionOptions {
        mode: Mode::C2c,
        receiver: Some(pair.join("receiver")),
        sharers: vec![pair.join("sharer"); sharers],
        fusers: (0..sharers as u64).map(|seed| FuserChoice::Init { seed }).collect(),
        multi_sharer,
        alignment: Alignment::None,
        mapping: LayerMapping::LAST_ALIGNED,
        gates,
        fraction: None,
        dtype: ComputeType::F32,
        device: DeviceChoice::Cpu,
        threads: 2,
        overlap: Overlap::Layers,
    }
}

fn open(backend: Arc<dyn Backend>, options: SessionOptions) -> Session {
    Session::open_on(backend, options, &|_, _, _| {}).expect("the fixture pair opens")
}

fn steady() -> Arc<dyn Backend> {
    Cpu::with(2, Simd::detect(), Schedule::Steady)
}

/// `fused` tokens and a last section, which all models read alike.
fn prompt(fused: usize, last: usize, sharers: usize) -> Prompt {
    let tokens = fused + last;
    let ids: Vec<u32> = (0..tokens as u32).map(|t| 5 + 7 * t % 90).collect();
    let positions: Vec<u32> = (0..tokens as u32).collect();
    let own = SharerPrompt {
        ids: ids[..fused].to_vec(),
        positions: positions[..fused].to_vec(),
        columns: (0..tokens).map(|t| (t < fused).then_some(t as u32)).collect(),
    };
    let mask = (1 << sharers) - 1;
    let sections = vec![Section { len: fused, sharer_mask: mask }, Section { len: last, sharer_mask: 0 }];
    Prompt { ids, positions, sharers: vec![own; sharers], sections }
}

/// Logits of the last section, greedy tokens, then every cache.
fn answer(session: &Session, prompt: &Prompt, new: usize) -> (Vec<f32>, Vec<u32>, Vec<Vec<f32>>) {
    let mut on = session.conversation(prompt, prompt.ids.len() + new).expect("caches");
    let (logits, _) = on.prefill(prompt, WantedLogits::LastSection).expect("the prefill runs");
    let vocab = session.receiver.as_ref().unwrap().decoder.weights.lm_head.rows();
    let params = SamplingParams { max_new_tokens: new, ..SamplingParams::default() };
    let stream = Stream { detokenizer: None, on_text: &mut |_| {}, keep_scores: false };
    let last = logits[logits.len() - vocab..].to_vec();
    let tokens = generate(&mut *on, last, &params, stream).expect("it decodes").tokens;
    (logits, tokens, caches(&*on))
}

fn caches(on: &dyn Conversation) -> Vec<Vec<f32>> {
    let link = on.link();
    let mut all = Vec::new();
    for lane in link.sharers.iter().chain([&link.receiver]).chain(on.clean()) {
        for layer in 0..lane.kv.layers().len() {
            let read = lane.read(layer, 0, lane.ids().len()).expect("the cache reads");
            all.extend([read.keys, read.values]);
        }
    }
    all
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |worst, (a, b)| worst.max((a - b).abs()))
}

#[test]
fn with_closed_gates_it_is_the_receiver_alone() {
    let plain = open(steady(), options(1, FusionMode::Sequential, GateOverride::Closed));
    let with = open(steady(), options(1, FusionMode::Sequential, GateOverride::Closed));
    let with = with.including_response().unwrap();
    let prompt = prompt(11, 4, 1);
    let (logits, tokens, _) = answer(&plain, &prompt, NEW);
    let (ours, same, caches) = answer(&with, &prompt, NEW);
    assert!(difference(&logits, &ours) < 1e-5);
    assert_eq!(tokens, same);
    // The fused cache is the clean one.
    let layers = with.receiver.as_ref().unwrap().decoder.config.layers;
    let (fused, clean) = caches[caches.len() - 4 * layers..].split_at(2 * layers);
    assert_eq!(fused, clean);
}

#[test]
fn neither_overlap_nor_the_order_of_queues_changes_a_bit() {
    for (sharers, mode) in
        [(1, FusionMode::Sequential), (2, FusionMode::Parallel), (2, FusionMode::Sequential)]
    {
        let prompt = prompt(13, 5, sharers);
        let run = |backend: Arc<dyn Backend>, overlap: Overlap| {
            let options = SessionOptions { overlap, ..options(sharers, mode, GateOverride::Open) };
            answer(&open(backend, options).including_response().unwrap(), &prompt, NEW)
        };
        let expected = run(steady(), Overlap::Off);
        assert_eq!(run(steady(), Overlap::Layers), expected, "{sharers} {mode:?}");
        for seed in 0..2 {
            let shuffled = Cpu::with(2, Simd::detect(), Schedule::Seeded(seed));
            assert!(run(shuffled, Overlap::Layers) == expected, "{sharers} {mode:?}, seed {seed}");
        }
    }
}

/// Token by token the caches become what one prefill of the whole answer makes of them.
#[test]
fn generating_is_prefilling() {
    for sharers in [1, 2] {
        let session = open(steady(), options(sharers, FusionMode::Parallel, GateOverride::Open));
        let session = session.including_response().unwrap();
        let short = prompt(12, 3, sharers);
        let (_, tokens, stepwise) = answer(&session, &short, NEW);
        // The last token drawn is in no cache.
        let mut long = short.clone();
        long.ids.extend(&tokens[..tokens.len() - 1]);
        long.positions = (0..long.ids.len() as u32).collect();
        long.sections[1].len = long.ids.len() - 12;
        long.sharers.iter_mut().for_each(|own| own.columns.resize(long.ids.len(), None));
        let mut on = session.conversation(&long, long.ids.len()).unwrap();
        on.prefill(&long, WantedLogits::Last).unwrap();
        for (at_once, stepwise) in caches(&*on).iter().zip(&stepwise) {
            assert!(difference(at_once, stepwise) < 1e-4);
        }
        // The answer's columns are fused: they are not the clean ones.
        let layers = session.receiver.as_ref().unwrap().decoder.config.layers;
        let (fused, clean) = stepwise[stepwise.len() - 4 * layers..].split_at(2 * layers);
        let width = fused[0].len() / (long.ids.len());
        for (fused, clean) in fused.iter().zip(clean) {
            for (fused, clean) in fused.chunks(width).zip(clean.chunks(width)) {
                assert!(difference(fused, clean) > 1e-3);
            }
        }
    }
}

#[test]
fn a_conversation_begins_anew_with_each_prefill() {
    let session = open(steady(), options(1, FusionMode::Sequential, GateOverride::Open));
    let session = session.including_response().unwrap();
    let (first, second) = (prompt(6, 2, 1), prompt(9, 70, 1));
    let mut on = session.conversation(&second, 79).unwrap();
    on.prefill(&first, WantedLogits::Last).unwrap();
    let (again, _) = on.prefill(&second, WantedLogits::Last).unwrap();
    let mut fresh = session.conversation(&second, 79).unwrap();
    let (expected, _) = fresh.prefill(&second, WantedLogits::Last).unwrap();
    assert_eq!(again, expected);
    assert_eq!(caches(&*on), caches(&*fresh));
}

#[test]
fn what_cannot_be_is_refused() {
    let alone =
        SessionOptions { mode: Mode::Receiver, ..options(1, FusionMode::Sequential, GateOverride::Open) };
    let error = open(steady(), alone).including_response().err().unwrap().to_string();
    assert!(error.contains("c2c"), "{error}");
    let session = open(steady(), options(1, FusionMode::Sequential, GateOverride::Open));
    let session = session.including_response().unwrap();
    let empty = prompt(5, 0, 1);
    let error = session.conversation(&empty, 8).unwrap().prefill(&empty, WantedLogits::Last).err().unwrap();
    assert!(error.to_string().contains("empty"), "{error}");
    // Alignment by text, another vocabulary.
    let options = SessionOptions {
        alignment: Alignment::Span,
        ..options(1, FusionMode::Sequential, GateOverride::Open)
    };
    let session = open(steady(), options);
    let error = session.including_response().err().unwrap().to_string();
    assert!(error.contains("vocabulary") && error.contains("sharer"), "{error}");
}

/// A sharer with the receiver's tokenizer reads on in its own prompt, wherever that ends.
#[test]
fn a_question_is_answered() {
    let receiver = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pair/receiver");
    let options = SessionOptions {
        sharers: vec![receiver],
        alignment: Alignment::Span,
        ..options(1, FusionMode::Sequential, GateOverride::Open)
    };
    let session = open(steady(), options.clone()).including_response().unwrap();
    let question = Question::Raw("who knows what the other one knows?".into());
    let params = SamplingParams { max_new_tokens: NEW, ignore_eos: true, ..SamplingParams::default() };
    let answer = session.answer(&question, &params, &mut |_| {}).unwrap();
    assert_eq!(answer.tokens.len(), NEW);
    let plain = open(steady(), options).answer(&question, &params, &mut |_| {}).unwrap();
    assert!(answer.kv_bytes > plain.kv_bytes, "the clean cache");
    // The prompt's last token, and of the answer all but the last, which no cache has.
    assert_eq!(answer.fused_tokens, plain.fused_tokens + NEW);
    assert!(answer.fused_kv_bytes > plain.fused_kv_bytes);
    assert_ne!(answer.tokens, plain.tokens);
}

/// Columns written by the fuser's stream, read by the receiver's; keys and values that go aside.
#[test]
fn a_gpu_computes_the_same() {
    let Some(gpu) = device::gpu() else { return };
    let prompt = prompt(5, 2, 1);
    let run = |backend: Arc<dyn Backend>| {
        let session = open(backend, options(1, FusionMode::Sequential, GateOverride::Open));
        answer(&session.including_response().unwrap(), &prompt, 3)
    };
    let (expected, found) = (run(steady()), run(gpu.backend.clone()));
    assert_eq!(gpu.fault(), None);
    assert_eq!(found.1, expected.1, "tokens");
    assert!(difference(&found.0, &expected.0) < 1e-3);
    for (found, expected) in found.2.iter().zip(&expected.2) {
        assert!(difference(found, expected) < 1e-3);
    }
}
