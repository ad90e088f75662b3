//! Two real models of different families, where `C2C_MODELS` names a folder that has them.

mod goldens;

use c2c::{
    align::{Alignment, LayerMapping},
    backend::DeviceChoice,
    engine::SamplingParams,
    fuser::{FusionMode, GateOverride},
    pipeline::{Answer, ComputeType, FuserChoice, Mode, Overlap, Question, Session, SessionOptions},
    tokenizer::{Message, TemplateOptions},
};

const RECEIVER: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const SHARER: &str = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf";

fn ask(mode: Mode, gates: &str, dtype: ComputeType, overlap: Overlap) -> Option<Answer> {
    let options = SessionOptions {
        mode,
        receiver: Some(goldens::model(RECEIVER)?),
        sharers: vec![goldens::model(SHARER)?],
        fusers: vec![FuserChoice::Init { seed: 1 }],
        multi_sharer: FusionMode::Sequential,
        alignment: Alignment::Span,
        mapping: LayerMapping::LAST_ALIGNED,
        gates: gates.parse::<GateOverride>().unwrap(),
        fraction: None,
        dtype,
        device: DeviceChoice::Cpu,
        threads: 2,
        overlap,
    };
    let session = Session::open(options, &|_, _, _| {}).unwrap();
    let messages = vec![Message::new("user", "What is the capital of France? Answer with one word.")];
    let template = TemplateOptions { add_generation_prompt: true, ..TemplateOptions::default() };
    let params = SamplingParams { max_new_tokens: 12, logprobs: Some(1), ..SamplingParams::default() };
    Some(session.answer(&Question::Chat { messages, template }, &params, &mut |_| {}).unwrap())
}

#[test]
fn the_sharer_knows() {
    for mode in [Mode::Sharer, Mode::T2t] {
        let Some(answer) = ask(mode, "learned", ComputeType::Bf16, Overlap::Layers) else { return };
        let text = answer.background.unwrap_or(answer.text);
        assert!(text.contains("Paris"), "{mode:?}: {text}");
    }
}

#[test]
fn closed_gates_change_nothing_and_open_ones_do() {
    let Some(alone) = ask(Mode::Receiver, "learned", ComputeType::F32, Overlap::Layers) else { return };
    let closed = ask(Mode::C2c, "learned", ComputeType::F32, Overlap::Layers).unwrap();
    assert_eq!(closed.text, alone.text);
    assert_eq!((closed.fused_kv_bytes, closed.timings_ms.fuse), (0, 0.0), "closed gates cost nothing");
    let open = ask(Mode::C2c, "open", ComputeType::F32, Overlap::Layers).unwrap();
    assert!(open.fused_kv_bytes > 0 && open.fused_tokens > 5);
    assert_ne!(open.logprobs, closed.logprobs, "an open gate leaves a trace");
}

#[test]
fn overlap_changes_no_bit() {
    let Some(layers) = ask(Mode::C2c, "open", ComputeType::Bf16, Overlap::Layers) else { return };
    let off = ask(Mode::C2c, "open", ComputeType::Bf16, Overlap::Off).unwrap();
    assert_eq!((layers.text, layers.logprobs), (off.text, off.logprobs));
}
