//! What `generate` answers: every mode, option and output.

mod command;

use command::*;
use serde_json::{Value, json};
use std::{collections::BTreeMap, fs};

fn keys(object: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = object.as_object().expect("an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

#[test]
fn each_mode_answers() {
    let receiver = json_of("--mode receiver --receiver {r} --logprobs 2", &[]);
    let sharer = json_of("--mode sharer --sharer {s} --logprobs 2", &[]);
    let closed = json_of(&format!("{C2C} --logprobs 2"), &[]);
    let open = json_of(C2C_OPEN, &[]);
    for answer in [&receiver, &sharer, &closed, &open] {
        assert_eq!(answer["tokens"].as_array().map(Vec::len), Some(12));
        assert_eq!(answer["finish_reason"], "length");
    }
    assert_eq!(said(&closed), said(&receiver), "closed gates change nothing");
    assert_ne!(said(&open), said(&receiver), "open gates change something");
    assert_ne!(receiver["tokens"], sharer["tokens"]);
    let kv_bytes = |answer: &Value| answer["kv_bytes"].as_u64().expect("a number");
    assert!(kv_bytes(&receiver) > 0 && kv_bytes(&sharer) > 0);
    assert!(kv_bytes(&closed) > kv_bytes(&receiver), "both models keep a cache");
    assert_ne!(said(&open), said(&json_of(&C2C_OPEN.replace("init:3", "init:4"), &[])), "another fuser");
    assert_eq!(
        (&closed["fused_kv_bytes"], &closed["fused_tokens"]),
        (&json!(0), &json!(0)),
        "closed gates cost nothing"
    );
    assert!(open["fused_kv_bytes"].as_u64() > Some(0) && open["fused_tokens"].as_u64() > Some(0));

    let t2t = json_of("--mode t2t --receiver {r} --sharer {s}", &[]);
    assert!(t2t["background"].is_string());
    assert!(
        t2t["prompt_tokens"].as_u64() > receiver["prompt_tokens"].as_u64(),
        "it reads the background too"
    );
    assert_eq!(t2t["sharer_prompt_tokens"].as_array().map(Vec::len), Some(1));
}

/// Fields of the document's table, each with the names that its meaning mentions, sorted.
fn documented(page: &'static str) -> BTreeMap<&'static str, Vec<&'static str>> {
    let names = |cell: &'static str| -> Vec<&'static str> { cell.split('`').skip(1).step_by(2).collect() };
    let mut fields = BTreeMap::new();
    for row in page.lines().filter(|line| line.starts_with("| `")) {
        let mut cells = row.split(" | ");
        let (fields_of_row, meaning) = (cells.next().expect("a field"), cells.next().expect("a meaning"));
        let mut mentioned = names(meaning);
        mentioned.sort_unstable();
        names(fields_of_row).into_iter().for_each(|field| drop(fields.insert(field, mentioned.clone())));
    }
    fields
}

#[test]
fn json_has_the_documented_fields() {
    let answer = json_of(C2C, &[]);
    let documented = documented(include_str!("../docs/answer.md"));
    let fields = documented.keys().copied().filter(|name| !["background", "logprobs"].contains(name));
    assert_eq!(keys(&answer), fields.collect::<Vec<_>>());
    assert_eq!(keys(&answer["timings_ms"]), documented["timings_ms"]);
    assert_eq!(keys(&answer["tokens_per_s"]), documented["tokens_per_s"]);
    let positive = ["load", "receiver_prefill", "sharer_prefill", "first_token", "decode", "total"];
    assert!(positive.iter().all(|phase| answer["timings_ms"][phase].as_f64() > Some(0.0)), "{answer}");
    assert_eq!(answer["gates"], json!([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]));
    assert_eq!(answer["device"], "cpu");
    assert_eq!(answer["threads"], 2);
    assert_eq!((&answer["dtype"], &answer["overlap"]), (&json!("bf16"), &json!("layers")));
    assert!(answer["peak_rss_bytes"].as_u64() > Some(1 << 20));
}

#[test]
fn the_answer_is_streamed_with_a_line_of_timings() {
    let args = "--mode receiver --receiver {r} --ignore-eos --max-new-tokens 12 --threads 2 --prompt {}";
    let run = generate(&line(args, &[PROMPT]));
    let answer = json_of("--mode receiver --receiver {r}", &[]);
    assert_eq!(run.stdout, format!("{}\n", answer["text"].as_str().expect("text")));
    let timings = run.stderr.lines().last().unwrap_or_default();
    assert!(timings.contains("first token") && timings.contains("12 tokens at"), "{}", run.stderr);
}

#[test]
fn the_same_question_in_other_words() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, messages: Value| {
        let path = folder.path().join(name);
        fs::write(&path, messages.to_string()).expect("written");
        path.display().to_string()
    };
    let user = json!({"role": "user", "content": PROMPT});
    let system = json!({"role": "system", "content": "You are a helpful assistant."});
    let one = write("one.json", json!([user]));
    let two = write("two.json", json!([system, user]));
    let prompt = json_of(C2C_OPEN, &[]);
    assert_eq!(said(&json_of(&format!("{C2C_OPEN} --messages {{}}"), &[&one])), said(&prompt));
    let with_system = json_of(&format!("{C2C_OPEN} --messages {{}}"), &[&two]);
    assert_ne!(said(&with_system), said(&prompt));
    let system = "You are a helpful assistant.";
    let args = format!("{C2C_OPEN} --system {{}} --prompt {{}}");
    assert_eq!(said(&json_of(&args, &[system, PROMPT])), said(&with_system));

    let raw = json_of(&format!("{C2C_OPEN} --raw"), &[]);
    assert!(raw["prompt_tokens"].as_u64() < prompt["prompt_tokens"].as_u64(), "no template");
    assert_eq!(raw["fused_tokens"].as_u64(), raw["prompt_tokens"].as_u64().map(|n| n - 1));
}

#[test]
fn machine_settings_change_no_digit() {
    for dtype in ["bf16", "f32"] {
        let with = |more: &str| said(&json_of(&format!("{C2C_OPEN} --dtype {dtype} {more}"), &[]));
        let layers = with("--overlap layers");
        assert_eq!(layers, with("--overlap off"), "{dtype}");
        assert_eq!(layers, with("--device cpu"), "{dtype}");
        let mut args = line(&format!("{C2C_OPEN} --dtype {dtype} --threads 1 --json --ignore-eos"), &[]);
        args.extend(line("--max-new-tokens 12 --prompt {}", &[PROMPT]));
        let one = generate(&args);
        let one: Value = serde_json::from_str(&one.stdout).expect("JSON");
        assert_eq!(one["threads"], 1);
        assert_eq!(layers, said(&one), "{dtype}, 1 thread");
    }
    assert_ne!(
        said(&json_of(&format!("{C2C_OPEN} --dtype f32"), &[])),
        said(&json_of(&format!("{C2C_OPEN} --dtype bf16"), &[])),
        "--dtype does something"
    );
}

#[test]
fn sampling_options() {
    let receiver = "--mode receiver --receiver {r} --logprobs 3";
    let greedy = json_of(receiver, &[]);
    for entry in greedy["logprobs"].as_array().expect("logprobs") {
        assert_eq!(entry["top"].as_array().map(Vec::len), Some(3));
        assert_eq!(entry["token"], entry["top"][0][0], "greedy");
        assert_eq!(entry["logprob"], entry["top"][0][1]);
        assert!(entry["logprob"].as_f64() <= Some(0.0));
        assert!(entry["top"][0][1].as_f64() >= entry["top"][1][1].as_f64());
    }
    assert_eq!(greedy["logprobs"].as_array().map(Vec::len), greedy["tokens"].as_array().map(Vec::len));

    let drawn = |seed: u32| json_of(&format!("{receiver} --temperature 1.5 --top-p 0.95 --seed {seed}"), &[]);
    assert_eq!(said(&drawn(7)), said(&drawn(7)));
    assert_ne!(said(&drawn(7)), said(&drawn(8)));
    assert_ne!(said(&drawn(7)), said(&greedy));
    assert_eq!(said(&json_of(&format!("{receiver} --temperature 1.5 --top-k 1"), &[])), said(&greedy));
    let penalised = json_of(&format!("{receiver} --presence-penalty 100"), &[]);
    let mut tokens: Vec<u64> =
        penalised["tokens"].as_array().unwrap().iter().filter_map(Value::as_u64).collect();
    tokens.sort_unstable();
    tokens.dedup();
    assert_eq!(tokens.len(), 12, "no token twice under a heavy penalty");
}

#[test]
fn an_answer_ends_where_it_is_told() {
    let receiver = "--mode receiver --receiver {r}";
    let whole = json_of(receiver, &[]);
    let text = whole["text"].as_str().expect("text");
    let stop: String = text.chars().skip(text.chars().count() / 2).take(2).collect();
    let stopped = json_of(&format!("{receiver} --stop {{}} --stop {{}}"), &["never said", &stop]);
    assert_eq!(stopped["text"], text[..text.find(&stop).expect("it is there")]);
    assert_eq!(stopped["finish_reason"], "stop");

    let tokens = whole["tokens"].as_array().expect("tokens");
    let eos = tokens[5].as_u64().expect("an id");
    let first = tokens.iter().position(|token| token.as_u64() == Some(eos)).expect("it is there");
    let args = format!("--json --max-new-tokens 12 --eos {eos} --prompt {{}} {receiver}");
    let run = generate(&line(&args, &[PROMPT]));
    let ended: Value = serde_json::from_str(&run.stdout).expect("JSON");
    assert_eq!(ended["finish_reason"], "stop");
    assert_eq!(ended["tokens"], json!(tokens[..first]));
}

#[test]
fn parts_of_a_prompt_are_fused() {
    let fused = |fraction: &str| json_of(&format!("{C2C_OPEN} --fraction {fraction}"), &[]);
    let all = json_of(C2C_OPEN, &[]);
    let tokens = all["fused_tokens"].as_u64().expect("a number");
    let (front, back) = (fused("front:0.5"), fused("back:0.5"));
    assert_eq!(front["fused_tokens"], tokens / 2);
    assert_eq!(back["fused_tokens"], tokens / 2);
    assert_eq!(said(&fused("1")), said(&all));
    assert_eq!(said(&fused("0.5")), said(&front));
    assert_ne!(said(&front), said(&back));
    assert_ne!(said(&front), said(&all));
    assert_eq!(said(&fused("0")), said(&json_of("--mode receiver --receiver {r} --logprobs 2", &[])));
    let gates = json_of(&C2C_OPEN.replace("--gates open", "--gates 0-1,3k"), &[]);
    assert_eq!(gates["gates"], json!([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]));
}

#[test]
fn two_sharers() {
    let two =
        "--receiver {r} --sharer {s} --sharer {r} --fuser init:1 --fuser init:2 --gates open --logprobs 2";
    let parallel = json_of(&format!("{two} --multi-sharer parallel"), &[]);
    let sequential = json_of(&format!("{two} --multi-sharer sequential"), &[]);
    assert_eq!(said(&json_of(two, &[])), said(&sequential), "the default");
    assert_ne!(said(&parallel), said(&sequential));
    for answer in [&parallel, &sequential] {
        assert_eq!(answer["sharer_prompt_tokens"].as_array().map(Vec::len), Some(2));
        assert_eq!(answer["gates"].as_array().map(Vec::len), Some(2));
        assert_ne!(said(answer), said(&json_of(C2C_OPEN, &[])));
    }
    assert_eq!(
        said(&json_of(&format!("{two} --overlap off --multi-sharer sequential"), &[])),
        said(&sequential)
    );
}

#[test]
fn each_alignment_and_mapping() {
    let with = |name: &str| json_of(&format!("{C2C_OPEN} --alignment {name}"), &[]);
    let (span, first, longest) = (with("span"), with("first"), with("longest"));
    assert_eq!(said(&json_of(C2C_OPEN, &[])), said(&span), "the default");
    assert_ne!(said(&span), said(&first));
    assert_ne!(said(&span), said(&longest));
    // The sharer cuts these words into pieces of which the first is not the longest.
    let with = |name: &str| {
        let args = format!("{C2C_OPEN} --alignment {name} --prompt {{}}");
        said(&json_of(&args, &["Answer more question are"]))
    };
    assert_ne!(with("first"), with("longest"));
    let own = "--receiver {r} --sharer {r} --fuser init:3 --gates open --alignment none --raw";
    let none = json_of(own, &[]);
    assert_eq!(none["fused_tokens"].as_u64(), none["prompt_tokens"].as_u64().map(|n| n - 1));

    let with = |name: &str| said(&json_of(&format!("{C2C_OPEN} --mapping {name}"), &[]));
    assert_eq!(with("last_aligned"), said(&span));
    assert_ne!(with("k_nearest"), said(&span));
    assert_eq!(with("k_nearest"), with("depth_normalized"));
}

#[test]
fn recorded_ids_are_replayed() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let numbers = |values: &[i64]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let (ids, sections) = (numbers(&(40..52).collect::<Vec<i64>>()), numbers(&[7, 1, 5, -1]));
    let view = |shape: &[usize], bytes| {
        safetensors::tensor::TensorView::new(safetensors::Dtype::I64, shape.to_vec(), bytes)
            .expect("a tensor")
    };
    let tensors = [("input_ids", view(&[1, 12], &ids)), ("sections", view(&[2, 2], &sections))];
    fs::write(path("in"), safetensors::serialize(tensors, None).expect("serialised")).expect("written");

    let c2c = format!("{C2C} --gates open --max-new-tokens 5 --json --input {{}} --dump {{}}");
    let first = generate(&line(&c2c, &[&path("in"), &path("out")]));
    assert!(first.ok, "{}", first.stderr);
    let second = generate(&line(&format!("{c2c} --overlap off"), &[&path("out"), &path("again")]));
    assert!(second.ok, "a dump is itself an input: {}", second.stderr);
    assert_eq!(first.stdout, second.stdout);
    let bytes = fs::read(path("out")).expect("a dump");
    assert_eq!(bytes, fs::read(path("again")).expect("a dump"));

    let dump = safetensors::SafeTensors::deserialize(&bytes).expect("the dump is readable");
    let shape = |name: &str| dump.tensor(name).map(|view| view.shape().to_vec()).expect(name);
    let vocab = shape("logits")[2];
    assert_eq!(shape("logits"), [1, 5, vocab]);
    for layer in 0..4 {
        assert_eq!(shape(&format!("fused.key.{layer}")), [1, 2, 12, 16]);
        assert_eq!(shape(&format!("plain_receiver.value.{layer}")), [1, 2, 7, 16]);
    }
    assert_eq!(shape("sharer1.key.2"), [1, 1, 7, 16]);
    let plain = dump.tensor("plain_receiver.key.3").expect("there").data();
    let fused = dump.tensor("fused.key.3").expect("there").data();
    assert_ne!(fused[..64], plain[..64], "the first column is fused");
    let sequence = dump.tensor("generate.sequences").expect("there");
    let sequence: Vec<i64> =
        sequence.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes"))).collect();
    let printed: Value = serde_json::from_str(&first.stdout).expect("JSON");
    assert_eq!(printed["sequences"], json!([sequence]));
    assert_eq!(sequence[..12], (40..52).collect::<Vec<i64>>());

    // The receiver alone reads the same recording and fuses nothing, as closed gates do.
    let logits = |models: &str| {
        let args = format!("{models} --max-new-tokens 0 --input {{}} --dump {{}}");
        let run = generate(&line(&args, &[&path("in"), &path("plain")]));
        assert!(run.ok, "{}", run.stderr);
        let bytes = fs::read(path("plain")).expect("a dump");
        let dump = safetensors::SafeTensors::deserialize(&bytes).expect("the dump is readable");
        dump.tensor("logits").expect("logits").data().to_vec()
    };
    let alone = logits("--mode receiver --receiver {r}");
    assert_eq!(alone, logits(C2C));
    assert_ne!(alone, dump.tensor("logits").expect("logits").data());

    let silent = generate(&line(
        &format!("{c2c} --max-new-tokens 0").replace("--max-new-tokens 5", ""),
        &[&path("in"), &path("quiet")],
    ));
    assert!(silent.ok, "0 new tokens: only the prefill is dumped: {}", silent.stderr);
}

#[test]
fn a_fuser_knows_its_pair() {
    use c2c::{backend::Queue, pipeline::*};
    let folder = tempfile::tempdir().expect("a folder");
    let fuser = folder.path().join("fuser");
    let options = SessionOptions {
        mode: Mode::C2c,
        receiver: Some(model("receiver").into()),
        sharers: vec![model("sharer").into()],
        fusers: vec![FuserChoice::Init { seed: 3 }],
        multi_sharer: Default::default(),
        alignment: Default::default(),
        mapping: c2c::align::LayerMapping::LAST_ALIGNED,
        gates: Default::default(),
        fraction: None,
        dtype: ComputeType::Bf16,
        device: c2c::backend::DeviceChoice::Cpu,
        threads: 1,
        overlap: Overlap::Off,
    };
    let session = Session::open(options, &|_, _, _| {}).expect("the pair opens");
    session.fusers[0].save(&fuser, &Queue::new(&session.backend).unwrap()).expect("saved");
    let fuser = fuser.display().to_string();

    let loaded = json_of(&C2C_OPEN.replace("init:3", "{}"), &[&fuser]);
    assert_eq!(said(&loaded), said(&json_of(C2C_OPEN, &[])), "saved and read again");
    let swapped = "--prompt Hi --receiver {s} --sharer {r} --fuser {}";
    refused(&line(swapped, &[&fuser]), &["receiver.layers is 3", "sharer.layers is 4"]);
    let twin = "--prompt Hi --receiver {r} --sharer {r} --fuser {}";
    refused(&line(twin, &[&fuser]), &["sharer.layers", "sharer.tokenizer"]);

    fs::write(folder.path().join("fuser/fuser.safetensors"), [0; 64]).expect("written");
    refused(&line("--prompt Hi --receiver {r} --sharer {s} --fuser {}", &[&fuser]), &["fuser.safetensors"]);
}
