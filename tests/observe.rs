//! What an observation says of the fuser is what the fuser did: weights by plain arithmetic, fused columns by weights.

use c2c::{
    align::{Aligner, Alignment, ChatOptions, LayerMapping},
    backend::{
        Queue,
        cpu::{Cpu, Schedule, Simd},
    },
    builtin,
    fuser::{FusionMode, GateOverride, LayerProjector},
    pipeline::{
        ComputeType, FuserChoice, Link, Mode, Observation, Overlap, Prompt, Question, Session,
        SessionOptions, WantedLogits,
    },
    serve::{Details, TokenLinks},
    tokenizer::{Message, TemplateOptions},
};
use std::{f64::consts::PI, path::Path};

const ROOM: usize = 300;

fn options() -> SessionOptions {
    SessionOptions {
        mode: Mode::C2c,
        receiver: Some(builtin::path("receiver")),
        sharers: vec![builtin::path("sharer")],
        fusers: vec![FuserChoice::Load(builtin::path("fuser"))],
        multi_sharer: FusionMode::Parallel,
        alignment: Alignment::Span,
        mapping: LayerMapping::LAST_ALIGNED,
        gates: GateOverride::Learned,
        fraction: None,
        dtype: ComputeType::F32,
        device: c2c::backend::DeviceChoice::Cpu,
        threads: 2,
        overlap: Overlap::Layers,
    }
}

fn open(options: SessionOptions) -> Session {
    Session::open_on(Cpu::with(2, Simd::detect(), Schedule::Steady), options, &|_, _, _| {})
        .expect("the pair opens")
}

/// The fixture pair with two untrained fusers.
fn two_sharers(multi_sharer: FusionMode, gates: GateOverride) -> Session {
    let pair = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pair");
    open(SessionOptions {
        receiver: Some(pair.join("receiver")),
        sharers: vec![pair.join("sharer"); 2],
        fusers: vec![FuserChoice::Init { seed: 1 }, FuserChoice::Init { seed: 2 }],
        multi_sharer,
        gates,
        ..options()
    })
}

fn link(session: &Session) -> Link {
    session.link(ROOM, &vec![ROOM; session.sharers.len()]).expect("a link")
}

fn prompt(session: &Session, messages: &[Message]) -> Prompt {
    let tokenizer = |model: &c2c::pipeline::Model| model.tokenizer.clone().expect("a tokenizer");
    let sharers: Vec<_> = session.sharers.iter().map(tokenizer).collect();
    let receiver = tokenizer(session.receiver.as_ref().expect("a receiver"));
    let aligner = Aligner::new(&receiver, &sharers, Alignment::Span).expect("an aligner");
    aligner
        .chat(messages, &ChatOptions { template: template(), open_last: false })
        .expect("the conversation aligns")
        .into()
}

fn template() -> TemplateOptions {
    TemplateOptions { add_generation_prompt: true, ..TemplateOptions::default() }
}

fn question() -> [Message; 1] {
    [Message::new("user", "In which country is Grenoble: A Spain, B Poland, C Greece, D France?")]
}

fn observe(link: &mut Link, prompt: &Prompt) -> Vec<Observation> {
    Observation::of(link, prompt).expect("the fuser is observed")
}

/// The projector of docs/math.md in f64, from parameters by their published names.
struct Plain<'a> {
    parameters: &'a LayerProjector,
    queue: &'a Queue,
    half: &'a str,
}

impl Plain<'_> {
    fn tensor(&self, name: &str) -> Option<Vec<f64>> {
        let tensor = self.parameters.tensors().get(&format!("{}_{name}", self.half))?;
        let numbers = self.queue.download_f32(tensor).expect("a parameter is read");
        Some(numbers.into_iter().map(f64::from).collect())
    }

    fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let weight = self.tensor(&format!("{name}.weight")).expect("a weight");
        let bias = self.tensor(&format!("{name}.bias"));
        let products = weight.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum());
        let products = products.collect::<Vec<f64>>();
        let bias = bias.unwrap_or_else(|| vec![0.0; products.len()]);
        products.iter().zip(bias).map(|(y, b)| y + b).collect()
    }

    fn ffn(&self, block: &str, x: &[f64]) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let norm = self.tensor(&format!("{block}.norm.weight")).expect("a norm");
        let normed: Vec<f64> = x.iter().zip(norm).map(|(x, w)| x * w / (mean + 1e-6).sqrt()).collect();
        let inner: Vec<f64> =
            self.linear(&format!("{block}.w1"), &normed).into_iter().map(|x| x * phi(x)).collect();
        self.linear(&format!("{block}.w2"), &inner).iter().zip(x).map(|(y, x)| y + x).collect()
    }

    /// Weights of the heads, and the projection, of one token.
    fn project(&self, source: &[f32], target: &[f32]) -> (Vec<f64>, Vec<f64>) {
        let input: Vec<f64> = source.iter().chain(target).copied().map(f64::from).collect();
        let z = self.ffn("mlp1.blocks.0", &self.linear("in", &input));
        let weights = self.linear("scalar_head", &self.ffn("scalar_mlp2.blocks.0", &z));
        let projection = self.linear("proj_out", &self.ffn("proj_mlp2.blocks.0", &z));
        (weights.into_iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(), projection)
    }
}

/// The normal distribution's: (1 + erf(x / √2)) / 2, by its series.
fn phi(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    let (mut term, mut sum, mut n) = (x, x, 1.0);
    while term.abs() > 1e-14 {
        term *= -x * x / (2.0 * n);
        sum += term / (2.0 * n + 1.0);
        n += 1.0;
    }
    0.5 + sum / (2.0 * PI).sqrt()
}

#[test]
fn weights_and_gates_explain_the_fused_cache() {
    let session = open(options());
    let prompt = prompt(&session, &question());
    let (mut plain, mut fused) = (link(&session), link(&session));
    plain.gates[0].iter_mut().for_each(|gates| *gates = [0.0; 2]);
    for link in [&mut plain, &mut fused] {
        link.prefill(&prompt, WantedLogits::Last).expect("the prefill runs");
    }
    let seen = observe(&mut link(&session), &prompt).remove(0);
    assert!(seen.tokens.len() > 20, "{} tokens", seen.tokens.len());
    assert_eq!(seen.gates, session.gates[0]);
    let (fuser, queue) = (&session.fusers[0], &fused.receiver.queue);
    let heads = seen.kv_heads;
    for layer in 0..seen.layers() {
        let route = fuser.route(layer).expect("all layers of the built-in pair have a projector");
        let ours = plain.receiver.read(layer, 0, prompt.ids.len()).expect("it reads");
        let theirs = plain.sharers[0].read(route.sharer, 0, plain.sharers[0].ids().len()).expect("it reads");
        let after = fused.receiver.read(layer, 0, prompt.ids.len()).expect("it reads");
        let halves = [
            ("key", &ours.keys, &theirs.keys, &after.keys),
            ("value", &ours.values, &theirs.values, &after.values),
        ];
        for (number, (half, ours, theirs, after)) in halves.into_iter().enumerate() {
            let parameters = Plain { parameters: &fuser.projectors()[route.projector], queue, half };
            let (target_width, source_width) = (ours.len() / prompt.ids.len(), {
                let party = &fuser.config().sharer;
                party.width()
            });
            let gate = f64::from(seen.gates[layer][number]);
            let rows = seen.half(layer, number).expect("a projector").chunks_exact(heads);
            for (row, (&token, &column)) in rows.zip(seen.tokens.iter().zip(&seen.columns)).step_by(7) {
                let t = &ours[token as usize * target_width..][..target_width];
                let s = &theirs[column as usize * source_width..][..source_width];
                let (weights, projection) = parameters.project(s, t);
                for (found, expected) in row.iter().zip(&weights) {
                    let place = format!("layer {layer}, {half}, token {token}");
                    assert!((f64::from(*found) - expected).abs() < 1e-4, "{place}: {found}, not {expected}");
                }
                let out = &after[token as usize * target_width..][..target_width];
                let size = projection.iter().chain([&1.0]).fold(0.0f64, |max, p| max.max(p.abs()));
                for (i, (&out, &t)) in out.iter().zip(t).enumerate() {
                    let weight = f64::from(row[i * heads / target_width]);
                    let expected = f64::from(t) + gate * weight * projection[i];
                    let error = (f64::from(out) - expected).abs();
                    assert!(error < 1e-4 * size, "layer {layer}, {half}, token {token}: off by {error}");
                }
            }
        }
    }
    let mean = seen.mean_weights();
    let map = seen.map();
    for (layer, mean) in mean.iter().enumerate() {
        let tokens = map.key[layer].as_ref().expect("a projector");
        let of_tokens = tokens.iter().sum::<f32>() / tokens.len() as f32;
        assert!((mean.expect("a projector")[0] - of_tokens).abs() < 1e-5);
        assert!(tokens.iter().all(|w| (0.0..=1.0).contains(w)));
    }
}

#[test]
fn a_link_that_was_observed_answers_as_a_fresh_one() {
    let messages = [Message::new("system", "Answer with one letter."), question()[0].clone()];
    let session = open(options());
    let prompt = prompt(&session, &messages);
    let fused = prompt.sections.iter().filter(|section| section.sharer_mask != 0).count();
    assert_eq!(fused, 2, "{:?}", prompt.sections);
    let mut fresh = link(&session);
    let (expected, _) = fresh.prefill(&prompt, WantedLogits::Last).expect("it runs");
    let mut observed = link(&session);
    let seen = observe(&mut observed, &prompt);
    let (found, _) = observed.prefill(&prompt, WantedLogits::Last).expect("it runs");
    let largest = expected.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let worst = found.iter().zip(&expected).fold(0.0f32, |max, (a, b)| max.max((a - b).abs()));
    assert!(worst <= 2e-5 * largest, "logits differ by {worst} of {largest}");
    assert_eq!(observe(&mut observed, &prompt), seen, "what is seen does not depend on what came before");
}

#[test]
fn a_later_sharer_is_seen_on_what_it_reads() {
    let of = |mode, gates| {
        let session = two_sharers(mode, gates);
        let prompt = prompt(&session, &question());
        observe(&mut link(&session), &prompt)
    };
    let parallel = of(FusionMode::Parallel, GateOverride::Open);
    let sequential = of(FusionMode::Sequential, GateOverride::Open);
    assert_eq!(parallel.len(), 2);
    assert_eq!(parallel[0], sequential[0], "the first reads the plain cache either way");
    assert_ne!(parallel[1].weights, sequential[1].weights, "the second reads what the first left");
    let closed = of(FusionMode::Sequential, GateOverride::Closed);
    assert_eq!(closed[1].weights, parallel[1].weights, "which is the plain cache where that left nothing");
}

#[test]
fn details_name_the_tokens_on_both_sides() {
    let session = open(options());
    let question = Question::Chat { messages: question().into(), template: template() };
    let aligned = session.aligned(&question, None, None).expect("the question aligns");
    let details = Details::of(&session, &aligned, &session.gates).expect("the fuser is observed");
    let TokenLinks { receiver_tokens, sharer_tokens, columns } = &details.alignment;
    assert_eq!(receiver_tokens.concat(), aligned.receiver_text);
    assert_eq!(sharer_tokens.concat(), aligned.sharers[0].text);
    let linked: Vec<u32> =
        (0..).zip(columns).filter(|(_, column)| column.is_some()).map(|(i, _)| i).collect();
    assert_eq!(linked, details.weights.tokens);
    let place = receiver_tokens.iter().position(|text| text.contains("France")).expect("it is asked");
    let column = columns[place].expect("the question is fused") as usize;
    assert!(sharer_tokens[column].contains("ance"), "{}", sharer_tokens[column]);
    let json = serde_json::to_value(&details).expect("it is written");
    assert_eq!(json["weights"]["key"].as_array().map(Vec::len), Some(session.gates[0].len()));
    assert_eq!(json["mean_weights"][0].as_array().map(Vec::len), Some(2));
}
