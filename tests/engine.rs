//! Many requests at a time: each gets the answer it would get alone, and nothing stays behind.

use c2c::{
    align::{Alignment, LayerMapping},
    backend::{DeviceChoice, cpu::Cpu},
    builtin,
    engine::{
        Engine, EngineOptions, Event, Events, FuseOptions, Prepared, Refused, SamplingParams, Speaker,
        TokenLogprobs,
    },
    fuser::{FusionMode, GateOverride},
    model::Goal,
    pipeline::{ComputeType, FuserChoice, Mode, Overlap, Question, Session, SessionOptions},
    tokenizer::{Message, TemplateOptions},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

const DTYPES: [ComputeType; 2] = [ComputeType::F32, ComputeType::Bf16];

/// The built-in pair.
fn session(mode: Mode, dtype: ComputeType) -> Session {
    let options = SessionOptions {
        mode,
        receiver: Some(builtin::path("receiver")),
        sharers: vec![builtin::path("sharer")],
        fusers: vec![FuserChoice::Load(builtin::path("fuser"))],
        multi_sharer: FusionMode::default(),
        alignment: Alignment::Span,
        mapping: LayerMapping::LAST_ALIGNED,
        gates: GateOverride::Learned,
        fraction: None,
        dtype,
        device: DeviceChoice::Cpu,
        threads: 2,
        overlap: Overlap::Layers,
    };
    Session::open_on(Cpu::new(2), options, &|_, _, _| {}).expect("the pair opens")
}

fn engine(dtype: ComputeType, options: &EngineOptions) -> Engine {
    Engine::start(Arc::new(session(Mode::C2c, dtype)), options).expect("an engine")
}

fn question(index: usize) -> Question {
    let words = ["France", "Grenoble", "country", "A", "Greece", "In which", "is"];
    let text: Vec<&str> = (0..1 + 5 * index).map(|i| words[(i * 3 + index) % words.len()]).collect();
    let system = Message::new("system", "You answer in few words, as people do who have little time.");
    let messages = vec![system, Message::new("user", text.join(" "))];
    let template = TemplateOptions { add_generation_prompt: true, ..TemplateOptions::default() };
    Question::Chat { messages, template }
}

fn params(index: usize) -> SamplingParams {
    SamplingParams { max_new_tokens: 3 + 2 * index, ignore_eos: true, ..SamplingParams::default() }
}

/// What an answer was made of.
#[derive(Debug, Default)]
struct Answer {
    tokens: Vec<u32>,
    text: String,
    cached: usize,
    sharer_cached: usize,
    prompt_logprobs: Vec<TokenLogprobs>,
    done: bool,
}

fn collect(mut events: Events, jobs: usize) -> Vec<Answer> {
    let mut answers: Vec<Answer> = (0..jobs).map(|_| Answer::default()).collect();
    while let Some((index, event)) = events.wait() {
        let answer = &mut answers[index];
        match event {
            Event::Read(read) => {
                answer.cached = read.cached_tokens;
                answer.sharer_cached = read.cached_sharer_tokens;
                answer.prompt_logprobs = read.prompt_logprobs;
            }
            Event::Token(token) => {
                answer.tokens.push(token.id);
                answer.text.push_str(&token.text);
            }
            Event::Done(done) => {
                answer.text.push_str(&done.text);
                answer.done = true;
            }
            Event::Failed(failure) => panic!("job {index} failed: {failure}"),
        }
    }
    assert!(answers.iter().all(|answer| answer.done), "an answer without an end");
    answers
}

fn ask(engine: &Engine, prepared: Vec<Prepared>) -> Vec<Answer> {
    let jobs: Vec<_> = prepared.into_iter().map(|prepared| prepared.job).collect();
    let n = jobs.len();
    collect(engine.submit(jobs).expect("the jobs are taken on"), n)
}

fn fused(engine: &Engine, question: &Question, params: &SamplingParams) -> Prepared {
    engine.fused(question, &FuseOptions::default(), params).expect("it aligns")
}

/// Waits until no request holds a block.
fn all_free(engine: &Engine) {
    let start = Instant::now();
    let used =
        || ["receiver", "sharer"].map(|name| engine.metrics().blocks_used.with_label_values(&[name]).get());
    while used() != [0, 0] {
        assert!(start.elapsed() < Duration::from_secs(20), "blocks still held: {:?}", used());
        std::thread::sleep(Duration::from_millis(5));
    }
}

const QUESTIONS: usize = 4;

#[test]
fn answers_in_a_batch_are_the_single_ones_in_every_mode() {
    for dtype in DTYPES {
        let single = |mode: Mode| {
            let session = session(mode, dtype);
            let answer = |i| session.answer(&question(i), &params(i), &mut |_| {}).expect("an answer");
            (0..QUESTIONS).map(answer).collect::<Vec<_>>()
        };
        let expected: Vec<_> =
            [Mode::C2c, Mode::Receiver, Mode::Sharer].into_iter().flat_map(single).collect();
        let written = single(Mode::T2t);
        // Pieces of prompts between passes, a cache too small for all at once, and one in which everything has room.
        let narrow = EngineOptions { kv_blocks: Some(60), piece: 20, ..EngineOptions::default() };
        for options in [narrow, EngineOptions::default()] {
            let engine = engine(dtype, &options);
            // The second time prompts are found in the cache.
            for round in 0..2 {
                let fused = (0..QUESTIONS).map(|i| fused(&engine, &question(i), &params(i)));
                let alone = [Speaker::Receiver, Speaker::Sharer]
                    .into_iter()
                    .flat_map(|speaker| (0..QUESTIONS).map(move |i| (speaker, i)))
                    .map(|(speaker, i)| {
                        engine.alone(speaker, &question(i), &params(i)).expect("it tokenises")
                    });
                let answers = ask(&engine, fused.chain(alone).collect());
                for (index, (found, expected)) in answers.iter().zip(&expected).enumerate() {
                    let what = format!("{dtype:?}, round {round}, answer {index}");
                    assert_eq!((&found.tokens, &found.text), (&expected.tokens, &expected.text), "{what}");
                }
                if round == 1 && options.kv_blocks.is_none() {
                    assert!(answers.iter().any(|answer| answer.cached > 0));
                    assert!(answers[..QUESTIONS].iter().all(|answer| answer.sharer_cached > 0));
                }
            }
            for (i, expected) in written.iter().enumerate() {
                let first = question(i).for_background().expect("a conversation");
                let first = engine.alone(Speaker::Sharer, &first, &params(i)).expect("it tokenises");
                let background = ask(&engine, vec![first]).remove(0).text;
                let second = question(i).with_background(background.trim()).expect("a conversation");
                let second = engine.alone(Speaker::Receiver, &second, &params(i)).expect("it tokenises");
                let found = ask(&engine, vec![second]).remove(0);
                assert_eq!((&found.tokens, &found.text), (&expected.tokens, &expected.text));
                assert_eq!(Some(background.trim()), expected.background.as_deref());
            }
            all_free(&engine);
        }
    }
}

#[test]
fn a_seed_gives_the_same_text_in_any_company() {
    let engine = engine(ComputeType::Bf16, &EngineOptions::default());
    let drawn = |seed| SamplingParams { temperature: 0.9, seed, logprobs: Some(2), ..params(5) };
    let one = |seed| fused(&engine, &question(2), &drawn(seed));
    let alone: Vec<_> = (0..4).map(|seed| ask(&engine, vec![one(seed)]).remove(0).tokens).collect();
    let crowd = (0..4).map(one).chain((0..8).map(|i| fused(&engine, &question(i % 5), &params(4))));
    let together = ask(&engine, crowd.collect());
    for (seed, tokens) in alone.iter().enumerate() {
        assert_eq!(tokens, &together[seed].tokens, "seed {seed}");
    }
    assert_ne!(alone[0], alone[1]);
}

#[test]
fn prefixes_are_found_by_those_they_belong_to() {
    let engine = engine(ComputeType::Bf16, &EngineOptions::default());
    let with_salt = |mut prepared: Prepared, salt: &str| {
        prepared.job.cache_salt = salt.into();
        ask(&engine, vec![prepared]).remove(0)
    };
    let q = question(5);
    let plain = || engine.alone(Speaker::Receiver, &q, &params(1)).expect("it tokenises");
    // Half of the message is not fused: the receiver can go on from there.
    let half = |gates| FuseOptions { gates, fraction: "0.5".parse().ok(), alignment: None };
    let fused = |gates| engine.fused(&q, &half(gates), &params(1)).expect("it aligns");
    let first = with_salt(fused(None), "");
    assert_eq!((first.cached, first.sharer_cached), (0, 0));
    // The receiver alone reads the same tokens, and must not be given the fused cache.
    assert_eq!(with_salt(plain(), "").cached, 0);
    assert!(with_salt(plain(), "").cached > 0);
    assert_eq!(with_salt(plain(), "mine").cached, 0);
    // Other gates are another cache of the receiver, but the sharer's is the same.
    let closed = with_salt(fused(Some(GateOverride::Closed)), "");
    assert_eq!(closed.cached, 0);
    assert!(closed.sharer_cached > 0);
    let again = with_salt(fused(None), "");
    assert!(again.cached > 0 && again.sharer_cached > 0);
    assert_eq!(again.tokens, first.tokens);
    assert_eq!(with_salt(fused(None), "mine").sharer_cached, 0);
}

#[test]
fn who_goes_away_leaves_no_blocks() {
    let engine =
        engine(ComputeType::Bf16, &EngineOptions { piece: 16, sequences: 4, ..EngineOptions::default() });
    let long = SamplingParams { max_new_tokens: 300, ignore_eos: true, ..SamplingParams::default() };
    for wait in [0, 1, 5, 40] {
        // Some wait, some are being read, some answered.
        let jobs = (0..10).map(|i| fused(&engine, &question(i % 6), &long).job).collect();
        let mut events = engine.submit(jobs).expect("the jobs are taken on");
        for _ in 0..wait {
            events.wait();
        }
        drop(events);
        all_free(&engine);
    }
    let after = ask(&engine, vec![fused(&engine, &question(1), &params(2))]);
    assert_eq!(after[0].tokens.len(), params(2).max_new_tokens);
}

#[test]
fn what_can_never_be_answered_is_refused() {
    let engine = engine(
        ComputeType::Bf16,
        &EngineOptions { kv_blocks: Some(8), queue: 3, ..EngineOptions::default() },
    );
    let alone = |ids: Vec<u32>, params: &SamplingParams| {
        engine.of_ids(Speaker::Receiver, ids, params).expect("a job")
    };
    let refused = |job| engine.submit(vec![job]).err().expect("a refusal");
    let ok = params(1);
    assert!(matches!(refused(alone(vec![], &ok)), Refused::EmptyPrompt));
    assert!(matches!(refused(alone(vec![1; 128], &ok)), Refused::TooLong { tokens: 128, limit: 127, .. }));
    assert!(matches!(refused(alone(vec![1, 4000], &ok)), Refused::UnknownToken { id: 4000, .. }));
    let bad = SamplingParams { temperature: -1.0, ..ok.clone() };
    assert!(matches!(refused(alone(vec![1], &bad)), Refused::Sampling(_)));
    let jobs = |n| (0..n).map(|_| alone(vec![1, 2, 3], &ok)).collect::<Vec<_>>();
    assert!(matches!(engine.submit(jobs(4)), Err(Refused::QueueFull(_))));
    // As long as the cache: the answer ends with it.
    let whole = SamplingParams { max_new_tokens: 10_000, ignore_eos: true, ..SamplingParams::default() };
    let answer = collect(engine.submit(vec![alone(vec![1; 100], &whole)]).expect("it fits"), 1).remove(0);
    assert_eq!(answer.tokens.len(), 28);
    engine.drain();
    assert!(matches!(engine.submit(jobs(1)), Err(Refused::ShuttingDown)));
}

#[test]
fn a_prompt_is_scored_token_by_token() {
    let engine = engine(ComputeType::F32, &EngineOptions { piece: 24, ..EngineOptions::default() });
    let prepared = engine.alone(Speaker::Receiver, &question(4), &params(1)).expect("it tokenises");
    let ids = prepared.job.prompt.ids.clone();
    let mut job = prepared.job;
    job.prompt_logprobs = Some(2);
    let scores = collect(engine.submit(vec![job]).expect("it is taken on"), 1).remove(0).prompt_logprobs;
    assert_eq!(scores.len(), ids.len() - 1);
    let session = session(Mode::Receiver, ComputeType::F32);
    let mut lane = session.lane(session.receiver.as_ref().expect("a receiver"), ids.len()).expect("a lane");
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    lane.append(&ids, &positions, Goal::Hidden, |_, _| {}).expect("a pass");
    let logits = lane.pass_logits(ids.len()).expect("logits");
    let rows = logits.chunks_exact(logits.len() / ids.len());
    for ((row, &id), found) in rows.zip(&ids[1..]).zip(&scores) {
        assert_eq!(*found, TokenLogprobs::new(row, id, 2));
    }
}
