//! What `generate` refuses: bad options, prompts and files, each with an error that names it.

mod command;

use command::*;
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

const ALONE: &str = "--mode receiver --prompt Hi --receiver {r}";

#[test]
fn bad_options_are_refused() {
    let cases: [(&str, &[&str]); 23] = [
        ("--prompt Hi --sharer {s} --fuser init", &["--receiver"]),
        ("--mode receiver --prompt Hi --sharer {s}", &["--receiver"]),
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
        ("--dump out --mode receiver --prompt Hi --receiver {r}", &["--dump"]),
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
        // nvcc is missed before the driver.
        let why = if c2c::backend::cuda::MODULES.is_empty() { "scripts/nvcc.sh" } else { "driver" };
        refused(&args, &["cuda", why]);
    }
}

#[test]
fn prompts_longer_than_the_context_are_refused() {
    let long = "rain in the north ".repeat(400);
    refused(&line("--mode receiver --receiver {r} --prompt {}", &[&long]), &["512", "pair/receiver"]);
    refused(&line("--mode sharer --sharer {s} --prompt {}", &[&long]), &["512", "pair/sharer"]);
    refused(&line(&format!("{C2C} --prompt {{}}"), &[&long]), &["512", "pair/"]);

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
        ("negative", "\"num_attention_heads\": 4", "\"num_attention_heads\": -4", "heads"),
        ("no-heads", "\"num_attention_heads\": 4", "\"num_attention_heads\": 0", "number of heads"),
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
    let good = write("good", &[("input_ids", &[1, 2], &[1, 2])]);
    for mode in ["sharer", "t2t"] {
        let args = format!("--mode {mode} --receiver {{r}} --sharer {{s}} --input {{}}");
        refused(&line(&args, &[&good]), &["replay", "--mode c2c"]);
    }
    let path = folder.path().join("text");
    fs::write(&path, "no safetensors").expect("written");
    refused(&line(&format!("{C2C} --input {{}}"), &[&path.display().to_string()]), &["text"]);
}
