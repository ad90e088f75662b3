//! A conversation that goes on: caches brought forward turn by turn are those of one fresh prefill. And a schedule that
//! runs queues in a random order changes nothing.

mod goldens;

use c2c::{
    align::{Aligner, Alignment, ChatOptions, LayerMapping, Section},
    backend::{
        Backend, DeviceChoice,
        cpu::{Cpu, Schedule, Simd},
    },
    engine::SamplingParams,
    fuser::{FusionMode, GateOverride},
    pipeline::{
        ComputeType, FuserChoice, Link, Mode, Overlap, PrefillReport, Prompt, Session, SessionOptions,
        SharerPrompt, Stream, WantedLogits, generate,
    },
    tokenizer::{Message, TemplateOptions},
};
use std::{path::Path, sync::Arc};

const ROOM: usize = 400;

/// The receiver of the fixture pair, `sharers` times its sharer, untrained fusers with open gates.
fn session(backend: Arc<dyn Backend>, sharers: usize, multi_sharer: FusionMode) -> Session {
    let pair = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pair");
    let options = SessionOptions {
        mode: Mode::C2c,
        receiver: Some(pair.join("receiver")),
        sharers: vec![pair.join("sharer"); sharers],
        fusers: (0..sharers as u64).map(|seed| FuserChoice::Init { seed }).collect(),
        multi_sharer,
        alignment: Alignment::Span,
        mapping: LayerMapping::LAST_ALIGNED,
        gates: GateOverride::Open,
        fraction: None,
        dtype: ComputeType::F32,
        device: DeviceChoice::Cpu,
        threads: 2,
        overlap: Overlap::Layers,
    };
    Session::open_on(backend, options, &|_, _, _| {}).expect("the fixture pair opens")
}

fn steady() -> Arc<dyn Backend> {
    Cpu::with(2, Simd::detect(), Schedule::Steady)
}

fn link(session: &Session) -> Link {
    session.link(ROOM, &vec![ROOM; session.sharers.len()]).expect("a link")
}

fn chat(session: &Session, messages: &[Message]) -> Prompt {
    let tokenizer = |model: &c2c::pipeline::Model| model.tokenizer.clone().expect("a tokenizer");
    let sharers: Vec<_> = session.sharers.iter().map(tokenizer).collect();
    let receiver = tokenizer(session.receiver.as_ref().expect("a receiver"));
    let template = TemplateOptions { add_generation_prompt: true, ..TemplateOptions::default() };
    let aligner = Aligner::new(&receiver, &sharers, Alignment::Span).expect("an aligner");
    let options = ChatOptions { template, open_last: false };
    aligner.chat(messages, &options).expect("the conversation aligns").into()
}

/// Everything a link holds: logits, then K and V of each layer of each lane.
fn contents(link: &Link, logits: Vec<f32>) -> Vec<(String, Vec<f32>)> {
    let mut all = vec![("logits".to_string(), logits)];
    for (lane, name) in
        std::iter::once(&link.receiver).chain(&link.sharers).zip(["receiver", "sharer 1", "sharer 2"])
    {
        for layer in 0..lane.kv.layers().len() {
            let read = lane.read(layer, 0, lane.ids().len()).expect("the cache reads");
            all.push((format!("{name} keys of layer {layer}"), read.keys));
            all.push((format!("{name} values of layer {layer}"), read.values));
        }
    }
    all
}

fn prefill(link: &mut Link, prompt: &Prompt) -> (Vec<(String, Vec<f32>)>, PrefillReport) {
    let (logits, report) = link.prefill(prompt, WantedLogits::Last).expect("the prefill runs");
    (contents(link, logits), report)
}

/// Bit for bit where `tolerance` is 0, else relative to the largest number of the tensor.
fn assert_equal(found: &[(String, Vec<f32>)], expected: &[(String, Vec<f32>)], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for ((name, found), (_, expected)) in found.iter().zip(expected) {
        let largest = expected.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        let worst = goldens::difference(found, expected);
        assert!(worst <= tolerance * largest, "{what}: {name} differs by {worst} of {largest}");
    }
}

/// Other batch shapes may add in another order.
const REORDERED: f32 = 2e-5;

fn answer(link: &mut Link, logits: &[(String, Vec<f32>)], tokens: usize) -> Vec<u32> {
    let params = SamplingParams { max_new_tokens: tokens, ..SamplingParams::default() };
    let stream = Stream { detokenizer: None, on_text: &mut |_| {}, keep_scores: false };
    generate(&mut link.receiver, logits[0].1.clone(), &params, stream).expect("it decodes").tokens
}

fn turns() -> [Message; 5] {
    [
        Message::new("system", "You are a helpful assistant."),
        Message::new("user", "Why is the sky blue? 北京 is the other question."),
        Message::new("assistant", "Because air scatters blue light."),
        Message::new("user", "And what is the answer to the question of life, 42?"),
        Message::new("assistant", "Yes."),
    ]
}

#[test]
fn a_longer_conversation_continues_the_caches() {
    for (sharers, mode) in [(1, FusionMode::Parallel), (2, FusionMode::Parallel), (2, FusionMode::Sequential)]
    {
        let session = session(steady(), sharers, mode);
        let turns = turns();
        let mut continued = link(&session);
        let (first, _) = prefill(&mut continued, &chat(&session, &turns[..2]));
        // What the receiver says is not what the next turn claims it said.
        answer(&mut continued, &first, 7);
        let prompt = chat(&session, &turns[..4]);
        let (found, kept) = prefill(&mut continued, &prompt);
        let (expected, all) = prefill(&mut link(&session), &prompt);
        assert_equal(&found, &expected, REORDERED, &format!("{sharers} sharers, {mode:?}"));
        assert!(0 < kept.fused_tokens && kept.fused_tokens < all.fused_tokens, "{kept:?} of {all:?}");

        // The same again costs nothing but the last section.
        let (again, none) = prefill(&mut continued, &prompt);
        assert_equal(&again, &expected, REORDERED, "again");
        assert_eq!(none.fused_tokens, 0);
    }
}

#[test]
fn an_edited_message_is_read_again() {
    let session = session(steady(), 1, FusionMode::Parallel);
    let mut continued = link(&session);
    prefill(&mut continued, &chat(&session, &turns()[..4]));
    for edited in [1, 0, 3] {
        let mut turns = turns();
        turns[edited].content = "Rain, and then thunder in the north.".into();
        let prompt = chat(&session, &turns[..4]);
        let (found, _) = prefill(&mut continued, &prompt);
        let (expected, _) = prefill(&mut link(&session), &prompt);
        assert_equal(&found, &expected, REORDERED, &format!("message {edited} edited"));
    }
    // Back to a shorter conversation.
    let prompt = chat(&session, &turns()[..2]);
    let (found, _) = prefill(&mut continued, &prompt);
    let (expected, _) = prefill(&mut link(&session), &prompt);
    assert_equal(&found, &expected, REORDERED, "shorter");
}

/// Token ids without meaning; receiver token j takes sharer column j in the sections with a mask.
fn by_ids(ids: &[u32], sections: &[(usize, u32)], sharer_offset: u32) -> Prompt {
    let sections: Vec<Section> =
        sections.iter().map(|&(len, sharer_mask)| Section { len, sharer_mask }).collect();
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    let sharer = SharerPrompt {
        ids: ids.iter().map(|id| id % 300).collect(),
        positions: positions.iter().map(|position| position + sharer_offset).collect(),
        columns: positions.iter().map(|&position| Some(position)).collect(),
    };
    Prompt { ids: ids.to_vec(), positions, sharers: vec![sharer], sections }
}

#[test]
fn generated_tokens_stay_in_the_cache() {
    let session = session(steady(), 1, FusionMode::Parallel);
    let mut ids: Vec<u32> = (0..24).map(|i| 40 + i * 7 % 200).collect();
    let mut continued = link(&session);
    let (first, _) = prefill(&mut continued, &by_ids(&ids, &[(20, 1), (4, 0)], 0));
    let generated = answer(&mut continued, &first, 9);
    assert_eq!(generated.len(), 9);
    ids.extend(&generated);
    ids.extend([60, 61, 62, 63, 64, 65]);
    let prompt = by_ids(&ids, &[(20, 1), (4 + 9, 0), (4, 1), (2, 0)], 0);
    let before = continued.receiver.ids().len();
    let (found, kept) = prefill(&mut continued, &prompt);
    let (expected, all) = prefill(&mut link(&session), &prompt);
    assert_equal(&found, &expected, REORDERED, "after generated tokens");
    assert_eq!((before, kept.fused_tokens, all.fused_tokens), (24 + 8, 4, 24));

    // Without the answer: the conversation was rolled back to before it.
    let prompt = by_ids(&ids[..24], &[(20, 1), (4, 0)], 0);
    let (found, _) = prefill(&mut continued, &prompt);
    assert_equal(&found, &first, REORDERED, "rolled back");
}

#[test]
fn what_was_fused_is_not_kept_where_it_would_not_be() {
    let session = session(steady(), 1, FusionMode::Parallel);
    let ids: Vec<u32> = (0..24).map(|i| 40 + i * 7 % 200).collect();
    let long = by_ids(&ids, &[(8, 1), (8, 1), (8, 0)], 0);
    let cases = [
        // A last section is never fused, though it once was one among others.
        ("last section", by_ids(&ids[..16], &[(8, 1), (8, 1)], 0)),
        ("other mask", by_ids(&ids, &[(8, 1), (8, 0), (8, 0)], 0)),
        ("other sections", by_ids(&ids, &[(4, 1), (12, 1), (8, 0)], 0)),
        ("other sharer positions", by_ids(&ids, &[(8, 1), (8, 1), (8, 0)], 3)),
    ];
    for (what, prompt) in cases {
        let mut continued = link(&session);
        prefill(&mut continued, &long);
        let (found, _) = prefill(&mut continued, &prompt);
        let (expected, _) = prefill(&mut link(&session), &prompt);
        assert_equal(&found, &expected, REORDERED, what);
    }
}

#[test]
fn the_order_of_queues_changes_nothing() {
    let run = |schedule| {
        let session = session(Cpu::with(2, Simd::detect(), schedule), 2, FusionMode::Parallel);
        let mut link = link(&session);
        let (first, _) = prefill(&mut link, &chat(&session, &turns()[..2]));
        let (second, _) = prefill(&mut link, &chat(&session, &turns()[..4]));
        let tokens = answer(&mut link, &second, 4);
        (first, second, tokens)
    };
    let steady = run(Schedule::Steady);
    for seed in 0..20 {
        let seeded = run(Schedule::Seeded(seed));
        assert_equal(&seeded.0, &steady.0, 0.0, &format!("first turn, seed {seed}"));
        assert_equal(&seeded.1, &steady.1, 0.0, &format!("second turn, seed {seed}"));
        assert_eq!(seeded.2, steady.2, "seed {seed}");
    }
}
