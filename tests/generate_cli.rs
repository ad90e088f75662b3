//! `generate` as its user runs it: a process, its output, its exit code. The models are tiny random ones (see
//! scripts/make_tiny_pair.py): their answers are noise, but what must be equal is equal and what must differ differs.

use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

const PROMPT: &str = "Why is the sky blue? 北京 is 42, and the answer is rain in the north.";

struct Run {
    ok: bool,
    stdout: String,
    stderr: String,
    took: Duration,
}

fn model(name: &str) -> String {
    format!("{}/tests/fixtures/pair/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Runs the binary in little memory: what allocates absurdly fails here.
fn generate<S: AsRef<str>>(args: &[S]) -> Run {
    let start = Instant::now();
    let output = Command::new("sh")
        .args(["-c", "ulimit -v 2000000; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_generate")])
        .args(args.iter().map(AsRef::as_ref))
        .env_remove("RUST_LOG")
        .output()
        .expect("the binary starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("output is UTF-8");
    Run {
        ok: output.status.success(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
        took: start.elapsed(),
    }
}

/// Splits on spaces; `{r}` and `{s}` are the models, `{}` the rest one by one.
fn line(template: &str, rest: &[&str]) -> Vec<String> {
    let mut rest = rest.iter();
    let word = |word: &str| match word {
        "{r}" => model("receiver"),
        "{s}" => model("sharer"),
        "{}" => rest.next().expect("an argument for each {}").to_string(),
        word => word.into(),
    };
    template.split_whitespace().map(word).collect()
}

/// The JSON object of a run on [`PROMPT`], 12 tokens long.
fn json_of(template: &str, rest: &[&str]) -> Value {
    let mut args = line(template, rest);
    args.extend(line("--json --ignore-eos --max-new-tokens 12 --threads 2", &[]));
    if !["--prompt", "--messages"].iter().any(|name| template.contains(name)) {
        args.extend(["--prompt".into(), PROMPT.into()]);
    }
    let run = generate(&args);
    assert!(run.ok, "{args:?}\n{}", run.stderr);
    assert_eq!(run.stdout.lines().count(), 1, "one object on one line: {}", run.stdout);
    serde_json::from_str(&run.stdout).expect("stdout is JSON")
}

const C2C: &str = "--receiver {r} --sharer {s} --fuser init:3";
const C2C_OPEN: &str = "--receiver {r} --sharer {s} --fuser init:3 --gates open --logprobs 2";

/// Tokens and their log-probabilities to the last digit.
fn said(answer: &Value) -> String {
    format!("{} {}", answer["tokens"], answer["logprobs"])
}

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
    assert_ne!(said(&open), said(&json_of(&C2C_OPEN.replace("init:3", "init:4"), &[])), "another fuser");
    assert_eq!((&closed["kv_bytes"], closed["fused_tokens"].as_u64() > Some(0)), (&json!(0), true));
    assert!(open["kv_bytes"].as_u64() > Some(0));

    let t2t = json_of("--mode t2t --receiver {r} --sharer {s}", &[]);
    assert!(t2t["background"].is_string());
    assert!(
        t2t["prompt_tokens"].as_u64() > receiver["prompt_tokens"].as_u64(),
        "it reads the background too"
    );
    assert_eq!(t2t["sharer_prompt_tokens"].as_array().map(Vec::len), Some(1));
}

#[test]
fn json_has_the_documented_fields() {
    let answer = json_of(C2C, &[]);
    let mut fields = [
        "text",
        "tokens",
        "finish_reason",
        "prompt_tokens",
        "sharer_prompt_tokens",
        "timings_ms",
        "tokens_per_s",
        "gates",
        "kv_bytes",
        "peak_rss_bytes",
        "device",
        "threads",
        "dtype",
        "overlap",
        "mode",
        "fused_tokens",
    ];
    fields.sort_unstable();
    assert_eq!(keys(&answer), fields);
    let timings = [
        "align",
        "decode",
        "first_token",
        "fuse",
        "fuse_exposed",
        "load",
        "receiver_prefill",
        "sharer_prefill",
        "tokenize",
        "total",
    ];
    assert_eq!(keys(&answer["timings_ms"]), timings);
    assert_eq!(keys(&answer["tokens_per_s"]), ["decode", "receiver_prefill", "sharer_prefill"]);
    let positive = ["load", "receiver_prefill", "sharer_prefill", "first_token", "decode", "total"];
    assert!(positive.iter().all(|phase| answer["timings_ms"][phase].as_f64() > Some(0.0)), "{answer}");
    assert_eq!(answer["gates"], json!([[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]]));
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
    let gates = json_of(&format!("{C2C} --gates 0-1,3k"), &[]);
    assert_eq!(gates["gates"], json!([[[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]]));
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
    // On this prompt the two choose alike.
    assert_eq!(longest["fused_tokens"], first["fused_tokens"]);
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

    let silent = generate(&line(
        &format!("{c2c} --max-new-tokens 0").replace("--max-new-tokens 5", ""),
        &[&path("in"), &path("quiet")],
    ));
    assert!(silent.ok, "0 new tokens: only the prefill is dumped: {}", silent.stderr);
}

/// Runs and expects a refusal: quick, no panic, and an error line that contains all of `named`.
fn refused(args: &[String], named: &[&str]) {
    let run = generate(args);
    assert!(!run.ok, "{args:?} was accepted: {}", run.stdout);
    assert!(!run.stderr.contains("panicked"), "{args:?}\n{}", run.stderr);
    assert!(run.took < Duration::from_secs(20), "{args:?} took {:?}", run.took);
    let error = run.stderr.lines().find(|line| line.starts_with("error: "));
    let error = error.unwrap_or_else(|| panic!("no error line for {args:?}\n{}", run.stderr));
    for name in named {
        assert!(error.contains(name), "{args:?}\n`{error}` does not name `{name}`");
    }
    assert!(run.stdout.is_empty(), "{args:?} printed {}", run.stdout);
}

const ALONE: &str = "--mode receiver --prompt Hi --receiver {r}";

#[test]
fn bad_options_are_refused() {
    let cases: [(&str, &[&str]); 23] = [
        ("--prompt Hi", &["--receiver"]),
        ("--mode receiver --prompt Hi", &["--receiver"]),
        ("--mode sharer --prompt Hi --receiver {r}", &["--sharer"]),
        ("--mode t2t --prompt Hi --receiver {r}", &["--sharer"]),
        ("--prompt Hi --receiver {r}", &["--sharer"]),
        ("--prompt Hi --receiver {r} --sharer {s}", &["--fuser"]),
        ("--prompt Hi --receiver {r} --sharer {s} --fuser init --fuser init", &["--fuser"]),
        ("--mode t2t --raw --prompt Hi --receiver {r} --sharer {s}", &["--raw"]),
        ("--mode receiver --receiver {r}", &["required"]),
        ("--mode receiver --prompt Hi --receiver /no/such/model.gguf", &["/no/such/model.gguf"]),
        ("--prompt Hi --receiver {r} --sharer {s} --fuser /no/such/fuser", &["/no/such/fuser"]),
        ("--prompt Hi --receiver {r} --sharer {s} --fuser init:seed", &["init:seed", "--fuser"]),
        ("--prompt Hi --receiver {r} --sharer {s} --fuser init --gates ajar", &["ajar"]),
        ("--prompt Hi --receiver {r} --sharer {s} --fuser init --gates 0-9", &["0-9"]),
        ("--prompt Hi --receiver {r} --sharer {s} --fuser init --alignment best", &["best", "span"]),
        ("--prompt Hi --receiver {r} --sharer {s} --fuser init --mapping best", &["best", "last_aligned"]),
        ("--prompt Hi --receiver {r} --sharer {s} --fuser init --fraction 1.5", &["1.5"]),
        ("--mode whisper --prompt Hi --receiver {r}", &["whisper"]),
        ("--device abacus --mode receiver --prompt Hi --receiver {r}", &["abacus"]),
        ("--dtype f8 --mode receiver --prompt Hi --receiver {r}", &["f8"]),
        ("--overlap some --mode receiver --prompt Hi --receiver {r}", &["some"]),
        ("--dump out --mode receiver --prompt Hi --receiver {r}", &["--dump", "--prompt"]),
        ("--mode receiver --input /no/such.safetensors --receiver {r}", &["/no/such.safetensors"]),
    ];
    for (args, named) in cases {
        refused(&line(args, &[]), named);
    }
    let sampling = [
        ("--temperature -1", "temperature"),
        ("--temperature nan", "temperature"),
        ("--top-k 0", "top_k"),
        ("--top-p 0", "top_p"),
        ("--top-p -0.5", "top_p"),
        ("--min-p 2", "min_p"),
        ("--repetition-penalty 0", "repetition_penalty"),
        ("--max-new-tokens 0", "max_new_tokens"),
        ("--threads many", "many"),
    ];
    for (args, named) in sampling {
        refused(&line(&format!("{ALONE} {args}"), &[]), &[named]);
    }
    refused(&line("--mode receiver --receiver {r} --prompt {}", &[""]), &["prompt is empty"]);
    refused(&line("--mode receiver --receiver {r} --raw --prompt {}", &[""]), &["prompt is empty"]);
    refused(&line(&format!("{ALONE} --stop {{}}"), &[""]), &["stop"]);
}

/// A build with CUDA on a machine with a GPU runs this; every other one says why not.
#[test]
fn cuda_runs_or_says_why_not() {
    let args = line(&format!("{ALONE} --device cuda --max-new-tokens 2"), &[]);
    if !generate(&args).ok {
        refused(&args, &["cuda"]);
    }
}

#[test]
fn prompts_longer_than_the_context_are_refused() {
    let long = "rain in the north ".repeat(400);
    refused(&line("--mode receiver --receiver {r} --prompt {}", &[&long]), &["512"]);
    refused(&line("--mode sharer --sharer {s} --prompt {}", &[&long]), &["512"]);
    refused(&line(&format!("{C2C} --prompt {{}}"), &[&long]), &["512"]);

    // The longest that fits, and no room to go on.
    let fits = "\u{1}".repeat(511);
    let run =
        generate(&line("--mode receiver --receiver {r} --raw --ignore-eos --json --prompt {}", &[&fits]));
    let answer: Value = serde_json::from_str(&run.stdout).unwrap_or_else(|_| panic!("{}", run.stderr));
    assert_eq!(answer["prompt_tokens"], 511);
    assert_eq!(answer["finish_reason"], "length");
    // Absurdly many tokens are asked for: the context ends the answer.
    let many = usize::MAX.to_string();
    let args = "--mode receiver --receiver {r} --ignore-eos --json --prompt Hi --max-new-tokens {}";
    let run = generate(&line(args, &[&many]));
    assert!(run.ok, "{}", run.stderr);
}

#[test]
fn bad_messages_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let cases: [(&str, &[u8], &str); 8] = [
        ("utf8.json", b"[{\"role\": \"user\", \"content\": \"\xff\xfe\"}]", "UTF-8"),
        ("text.json", b"Why is the sky blue?", "expected"),
        ("object.json", b"{\"role\": \"user\", \"content\": \"Hi\"}", "expected"),
        ("role.json", b"[{\"content\": \"Hi\"}]", "role"),
        ("number.json", b"[{\"role\": \"user\", \"content\": 7}]", "expected"),
        ("cut.json", b"[{\"role\": \"user\", \"content\": \"Hi", "EOF"),
        ("nothing.json", b"", "EOF"),
        ("empty.json", b"[]", "empty"),
    ];
    for (name, bytes, named) in cases {
        let path = folder.path().join(name);
        fs::write(&path, bytes).expect("written");
        let path = path.display().to_string();
        let args = line("--mode receiver --receiver {r} --messages {}", &[&path]);
        refused(&args, &[name, named]);
    }
    let missing = folder.path().join("missing.json").display().to_string();
    refused(&line("--mode receiver --receiver {r} --messages {}", &[&missing]), &["missing.json"]);
}

/// A copy of the receiver, in `folder/name`, that `change` may spoil.
fn spoiled(folder: &Path, name: &str, change: impl FnOnce(&Path)) -> Vec<String> {
    let copy: PathBuf = folder.join(name);
    fs::create_dir(&copy).expect("a folder");
    for file in fs::read_dir(model("receiver")).expect("the fixture") {
        let file = file.expect("a file");
        fs::copy(file.path(), copy.join(file.file_name())).expect("copied");
    }
    change(&copy);
    line("--mode receiver --prompt Hi --receiver {}", &[&copy.display().to_string()])
}

/// The header of a safetensors file rewritten, with the length it then has.
fn reheaded(bytes: &[u8], change: impl FnOnce(&str) -> String) -> Vec<u8> {
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header = change(std::str::from_utf8(&bytes[8..8 + length]).expect("JSON"));
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + length..]].concat()
}

#[test]
fn spoiled_folders_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let weights = |spoil: fn(Vec<u8>) -> Vec<u8>| {
        move |copy: &Path| {
            let path = copy.join("model.safetensors");
            let bytes = fs::read(&path).expect("weights");
            fs::write(&path, spoil(bytes)).expect("written");
        }
    };
    type Spoil = fn(Vec<u8>) -> Vec<u8>;
    let files: [(&str, Spoil, &str); 9] = [
        ("empty", |_| Vec::new(), "model.safetensors"),
        ("cut-in-header", |bytes| bytes[..100].to_vec(), "model.safetensors"),
        ("cut-in-data", |bytes| bytes[..bytes.len() - 10].to_vec(), "model.safetensors"),
        ("endless-header", |b| [&u64::MAX.to_le_bytes()[..], &b[8..]].concat(), "model.safetensors"),
        ("long-header", |b| [&(1u64 << 40).to_le_bytes()[..], &b[8..]].concat(), "model.safetensors"),
        ("no-json", |b| reheaded(&b, |header| header.replace('{', "[")), "model.safetensors"),
        ("integers", |b| reheaded(&b, |header| header.replace("\"F16\"", "\"I16\"")), "I16"),
        (
            "absurd-shape",
            |b| reheaded(&b, |h| h.replacen("\"shape\":[", "\"shape\":[99999999999,", 1)),
            "model",
        ),
        (
            "renamed",
            |b| reheaded(&b, |h| h.replacen("layers.2.mlp.up", "layers.7.mlp.up", 1)),
            "layers.2.mlp.up",
        ),
    ];
    for (name, spoil, named) in files {
        refused(&spoiled(folder.path(), name, weights(spoil)), &[named]);
    }

    let edit = |file: &'static str, from: &'static str, to: &'static str| {
        move |copy: &Path| {
            let path = copy.join(file);
            let text = fs::read_to_string(&path).expect("text");
            assert!(text.contains(from), "{file} has no {from}");
            fs::write(&path, text.replace(from, to)).expect("written");
        }
    };
    let config = [
        ("architecture", "\"qwen3\"", "\"qwen9\"", "qwen9"),
        ("more-layers", "\"num_hidden_layers\": 4", "\"num_hidden_layers\": 5", "layers.4"),
        ("wider", "\"hidden_size\": 32", "\"hidden_size\": 64", "[384, 32]"),
        (
            "absurd-layers",
            "\"num_hidden_layers\": 4",
            "\"num_hidden_layers\": 4000000000",
            "number of layers",
        ),
        ("negative", "\"num_attention_heads\": 4", "\"num_attention_heads\": -4", "num_attention_heads"),
        ("no-heads", "\"num_attention_heads\": 4", "\"num_attention_heads\": 0", "num_attention_heads"),
        ("no-number", "\"head_dim\": 16", "\"head_dim\": \"wide\"", "head_dim"),
    ];
    for (name, from, to, named) in config {
        // The vocabulary's size is the trained one's: whatever it is, the error must show the shape.
        let named = if name == "wider" { "32]" } else { named };
        refused(&spoiled(folder.path(), name, edit("config.json", from, to)), &[named]);
    }
    refused(
        &spoiled(folder.path(), "no-template", edit("tokenizer_config.json", "chat_template", "template")),
        &["chat template", "no-template"],
    );
    refused(
        &spoiled(folder.path(), "bad-template", edit("tokenizer_config.json", "{% endfor %}", "")),
        &["template", "bad-template"],
    );
    let remove = |file: &'static str| move |copy: &Path| fs::remove_file(copy.join(file)).expect("removed");
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        let name = format!("without-{file}");
        let named = if file == "tokenizer.json" { "tokenizer" } else { &name };
        refused(&spoiled(folder.path(), &name, remove(file)), &[named]);
    }
    refused(&spoiled(folder.path(), "bad-tokenizer", edit("tokenizer.json", "{", "[")), &["tokenizer.json"]);
}

#[test]
fn lying_gguf_files_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let head = |version: u32, tensors: u64, entries: u64| {
        [&b"GGUF"[..], &version.to_le_bytes(), &tensors.to_le_bytes(), &entries.to_le_bytes()].concat()
    };
    let string = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let architecture = |name: &str| {
        [head(3, 0, 1), string("general.architecture"), 8u32.to_le_bytes().to_vec(), string(name)].concat()
    };
    let files = [
        ("empty.gguf", Vec::new()),
        ("magic.gguf", b"GGML\x03\0\0\0".to_vec()),
        ("cut.gguf", b"GGUF\x03\0\0".to_vec()),
        ("version.gguf", head(9, 0, 0)),
        ("nothing.gguf", head(3, 0, 0)),
        ("tensors.gguf", head(3, u64::MAX, 0)),
        ("entries.gguf", head(3, 0, u64::MAX)),
        ("string.gguf", [head(3, 0, 1), u64::MAX.to_le_bytes().to_vec()].concat()),
        (
            "array.gguf",
            [head(3, 0, 1), string("a"), [9u32, 4].map(u32::to_le_bytes).concat(), vec![0xff; 8]].concat(),
        ),
        ("unknown.gguf", architecture("mamba9")),
        ("bare.gguf", architecture("qwen2")),
    ];
    for (name, bytes) in files {
        let path = folder.path().join(name);
        fs::write(&path, bytes).expect("written");
        let args = line("--mode receiver --prompt Hi --receiver {}", &[&path.display().to_string()]);
        refused(&args, &[name]);
    }
}

#[test]
fn bad_recordings_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, tensors: &[(&str, &[usize], &[i64])]| {
        let bytes: Vec<Vec<u8>> =
            tensors.iter().map(|t| t.2.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
        let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::I64, shape.to_vec(), bytes);
            (*name, view.expect("a tensor"))
        });
        let path = folder.path().join(name);
        fs::write(&path, safetensors::serialize(views, None).expect("serialised")).expect("written");
        path.display().to_string()
    };
    let cases = [
        (write("no-ids", &[("sections", &[1, 2], &[1, 1])]), "input_ids"),
        (write("flat", &[("input_ids", &[3], &[1, 2, 3])]), "input_ids"),
        (write("negative", &[("input_ids", &[1, 2], &[1, -2])]), "-2"),
        (write("large", &[("input_ids", &[1, 2], &[1, 1_000_000])]), "1000000"),
        (write("short", &[("input_ids", &[1, 2], &[1, 2]), ("sections", &[1, 2], &[1, 1])]), "sections"),
        (
            write("mask", &[("input_ids", &[1, 2], &[1, 2]), ("attention_mask", &[1, 1], &[1])]),
            "attention_mask",
        ),
        (write("sharer", &[("input_ids", &[1, 2], &[1, 2]), ("sections", &[2, 2], &[1, 4, 1, -1])]), "0b100"),
    ];
    for (path, named) in cases {
        refused(&line(&format!("{C2C} --max-new-tokens 2 --input {{}}"), &[&path]), &[named]);
    }
    let path = folder.path().join("text");
    fs::write(&path, "no safetensors").expect("written");
    refused(&line(&format!("{C2C} --input {{}}"), &[&path.display().to_string()]), &["text"]);
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
    session.fusers[0].save(&fuser, &Queue::new(&session.backend)).expect("saved");
    let fuser = fuser.display().to_string();

    let loaded = json_of(&C2C_OPEN.replace("init:3", "{}"), &[&fuser]);
    assert_eq!(said(&loaded), said(&json_of(C2C_OPEN, &[])), "saved and read again");
    let swapped = "--prompt Hi --receiver {s} --sharer {r} --fuser {}";
    refused(&line(swapped, &[&fuser]), &["receiver.layers is 3", "sharer.layers is 4"]);
    let twin = "--prompt Hi --receiver {r} --sharer {r} --fuser {}";
    refused(&line(twin, &[&fuser]), &["sharer.layers", "sharer.tokenizer"]);

    // What fuser.json says is also in the header of the weights, which counts.
    fs::write(folder.path().join("fuser/fuser.safetensors"), "{}").expect("written");
    refused(&line("--prompt Hi --receiver {r} --sharer {s} --fuser {}", &[&fuser]), &["fuser.safetensors"]);
}
