//! `generate` as its user runs it: a process, its output, its exit code. The models are tiny random ones (see
//! scripts/make_tiny_pair.py): their answers are noise, but what must be equal is equal and what must differ differs.

// Each test binary uses its part.
#![allow(dead_code)]

use serde_json::Value;
use std::{
    process::Command,
    time::{Duration, Instant},
};

pub const PROMPT: &str = "Why is the sky blue? 北京 is 42, and the answer is rain in the north.";

pub struct Run {
    pub ok: bool,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

pub fn model(name: &str) -> String {
    format!("{}/tests/fixtures/pair/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Runs the binary in little memory: what allocates absurdly fails here.
pub fn generate<S: AsRef<str>>(args: &[S]) -> Run {
    generate_with(args, &[])
}

/// The same with environment variables.
pub fn generate_with<S: AsRef<str>>(args: &[S], variables: &[(&str, &str)]) -> Run {
    let start = Instant::now();
    let output = Command::new("sh")
        .args(["-c", "ulimit -v 2000000; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_generate")])
        .args(args.iter().map(AsRef::as_ref))
        .env_remove("RUST_LOG")
        .envs(variables.iter().copied())
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
pub fn line(template: &str, rest: &[&str]) -> Vec<String> {
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
pub fn json_of(template: &str, rest: &[&str]) -> Value {
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

pub const C2C: &str = "--receiver {r} --sharer {s} --fuser init:3";
pub const C2C_OPEN: &str = "--receiver {r} --sharer {s} --fuser init:3 --gates open --logprobs 2";

/// Tokens and their log-probabilities to the last digit.
pub fn said(answer: &Value) -> String {
    format!("{} {}", answer["tokens"], answer["logprobs"])
}

/// Runs and expects a refusal: quick, no panic, and an error line that contains all of `named`.
pub fn refused(args: &[String], named: &[&str]) {
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
