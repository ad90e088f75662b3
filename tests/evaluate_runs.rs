//! `evaluate` as its user runs it: a process, files, kills and resumptions, with the built-in pair.

use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

fn evaluate(out: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_evaluate"));
    command.args(["--out", out.to_str().unwrap(), "--threads", "2"]).args(args).env_remove("RUST_LOG");
    command
}

fn done(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, told) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{told}");
    (out, told)
}

/// Runs and expects a refusal whose error line has all of `named`.
fn refused(out: &Path, args: &[&str], named: &[&str]) {
    let output = evaluate(out, args).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && !told.contains("panicked"), "{args:?}\n{told}");
    let error =
        told.lines().find(|line| line.starts_with("error: ")).unwrap_or_else(|| panic!("{args:?}\n{told}"));
    for name in named {
        assert!(told.contains(name), "{args:?}: `{error}` does not name `{name}`");
    }
}

/// The file of a mode that begins and ends so.
fn file(out: &Path, mode: &str, begin: &str, end: &str) -> PathBuf {
    let names = fs::read_dir(out.join(mode)).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> = names
        .filter(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            name.starts_with(begin) && name.ends_with(end)
        })
        .collect();
    assert_eq!(found.len(), 1, "{mode}/{begin}*{end}: {found:?}");
    found.remove(0)
}

/// The samples of a mode, without what no two runs share.
fn samples(out: &Path, mode: &str) -> Vec<Value> {
    let text = fs::read_to_string(file(out, mode, "samples_builtin_", ".jsonl")).unwrap();
    let without_times = |line: &str| {
        let mut sample: Value = serde_json::from_str(line).unwrap();
        let cost = sample["cost"].take();
        sample["bytes"] = cost["bytes"].clone();
        sample["tokens"] = cost["tokens"].clone();
        sample
    };
    text.lines().map(without_times).collect()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn row<'a>(summary: &'a Value, mode: &str) -> &'a Value {
    summary["rows"].as_array().unwrap().iter().find(|row| row["mode"] == mode).unwrap()
}

/// All modes of the built-in pair: what is known of it must come out, in the shapes that others read.
#[test]
fn the_built_in_pair_is_measured_in_all_modes() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let args = ["--limit", "60", "--router-questions", "40"];
    let (printed, told) = done(&evaluate(&out, &args).output().unwrap());
    let summary = json(&out.join("summary.json"));
    let accuracy = |mode: &str| row(&summary, mode)["correct"].as_f64().unwrap() / 60.0;
    assert!(accuracy("receiver") < 0.45, "{printed}");
    for mode in ["sharer", "c2c", "t2t", "router"] {
        assert!(accuracy(mode) > 0.8, "{mode}\n{printed}");
    }
    for control in ["c2c-swap", "c2c-zero", "c2c-random", "c2c-generic"] {
        assert!(accuracy(control) < 0.6, "{control}\n{printed}");
    }
    // Closed gates leave the Receiver as it is: the same letter for every question.
    let said = |mode: &str| samples(&out, mode).iter().map(|s| s["prediction"].clone()).collect::<Vec<_>>();
    assert_eq!(said("c2c-closed"), said("receiver"));
    assert_eq!(row(&summary, "c2c-closed")["cost"]["bytes"], 0.0);
    let versus = &row(&summary, "c2c")["versus"];
    assert!(versus["p"].as_f64().unwrap() < 1e-6 && versus["low"].as_f64().unwrap() > 0.3, "{versus}");
    assert!(row(&summary, "c2c")["gap_recovered"].as_f64().unwrap() > 0.9);
    // A Sharer reads a question once: its answer and c2c say the same time, and so do controls on the same cache.
    let cost = |mode: &str, what: &str| row(&summary, mode)["cost"][what].as_f64().unwrap();
    assert!(cost("c2c", "sharer_ms") > 0.0 && cost("c2c", "bytes") > 1000.0 && cost("t2t", "bytes") > 10.0);
    assert_eq!(cost("c2c", "sharer_ms"), cost("sharer", "sharer_ms"));
    assert_eq!(cost("c2c", "sharer_ms"), cost("c2c-open", "sharer_ms"));
    assert!(cost("c2c", "first_token_ms") >= cost("c2c", "sharer_ms") + cost("c2c", "fuse_ms"));
    assert!(printed.contains("So the gain is communication"), "{printed}");
    assert!(told.contains("780/780 builtin: receiver"), "{told}");

    let results = json(&file(&out, "c2c", "results_", ".json"));
    let own = &results["results"]["builtin"];
    assert_eq!(own["acc,none"], accuracy("c2c"));
    assert!(own["acc_stderr,none"].is_number() && own["alias"] == "builtin");
    for key in ["configs", "versions", "n-shot", "higher_is_better", "n-samples", "task_hashes"] {
        assert!(!results[key]["builtin"].is_null(), "{key}");
    }
    for key in ["config", "date", "chat_template_sha", "model_name", "total_evaluation_time_seconds"] {
        assert!(!results[key].is_null(), "{key}");
    }
    let sample = &samples(&out, "receiver")[0];
    for key in [
        "doc_id",
        "doc",
        "target",
        "arguments",
        "resps",
        "filtered_resps",
        "doc_hash",
        "prompt_hash",
        "target_hash",
        "acc",
    ] {
        assert!(!sample[key].is_null(), "{key}: {sample}");
    }
    assert_eq!(sample["arguments"]["gen_args_3"]["arg_1"], " D");
    assert!(sample["arguments"]["gen_args_0"]["arg_0"].as_str().unwrap().ends_with("It is"));
    assert_eq!(sample["resps"].as_array().unwrap().len(), 4);
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("c2c-swap"));
    // Nothing is fetched: the only address is the name of SVG.
    let page = page.replace("http://www.w3.org/2000/svg", "");
    for fetches in ["http", "src=", "url(", "@import", "<link", "<script"] {
        assert!(!page.contains(fetches), "{fetches}");
    }
    let markdown = fs::read_to_string(out.join("report.md")).unwrap();
    for name in ["accuracy_builtin.svg", "latency_builtin.svg"] {
        assert!(markdown.contains(name) && out.join(name).exists(), "{name}");
    }

    // The same command has nothing left to ask; another seed is another evaluation; more modes are not.
    let before = samples(&out, "c2c");
    let start = Instant::now();
    done(&evaluate(&out, &args).output().unwrap());
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(samples(&out, "c2c"), before);
    refused(
        &out,
        &["--limit", "60", "--router-questions", "40", "--seed", "3"],
        &["another evaluation", "seed", "--out"],
    );
    let merged = folder.path().join("all.html");
    let report = Command::new(env!("CARGO_BIN_EXE_evaluate"))
        .args(["report", out.to_str().unwrap(), out.to_str().unwrap(), "--out", merged.to_str().unwrap()])
        .output()
        .unwrap();
    done(&report);
    assert!(fs::read_to_string(merged).unwrap().contains("All runs"));
}

const FEW: [&str; 4] = ["--limit", "40", "--modes", "receiver,c2c,c2c-random,c2c-shuffle,t2t"];

/// Killed in the middle, with a torn last line, and gone on with: the same answers as in one go.
#[test]
fn a_killed_run_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let cache = folder.path().join("cache");
    let cached = ["--cache-sharer", cache.to_str().unwrap()];
    done(&evaluate(&whole, &FEW).output().unwrap());
    let mut child = evaluate(&killed, &[&FEW[..], &cached].concat())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let lines = || {
        let folder = fs::read_dir(killed.join("c2c")).into_iter().flatten().flatten();
        let count = |path: PathBuf| fs::read_to_string(path).map_or(0, |text| text.lines().count());
        folder.map(|entry| count(entry.path())).max().unwrap_or(0)
    };
    while lines() < 5 && child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(120), "no answer came");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let path = file(&killed, "c2c", "samples_", ".jsonl");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, &text[..text.len() - 7]).unwrap();
    let kept = text.lines().count() - 1;
    done(&evaluate(&killed, &[&FEW[..], &cached].concat()).output().unwrap());
    assert!(kept < 40, "the run was over before it was killed");
    for mode in ["receiver", "c2c", "c2c-random", "c2c-shuffle", "t2t"] {
        let mut own = samples(&killed, mode);
        own.sort_by_key(|sample| sample["doc_id"].as_u64());
        assert_eq!(own, samples(&whole, mode), "{mode}");
    }
    // Another run takes the Sharer's caches from disk: nobody knows how long they took.
    let again = folder.path().join("again");
    done(&evaluate(&again, &[&FEW[..], &cached].concat()).output().unwrap());
    assert_eq!(samples(&again, "c2c"), samples(&whole, "c2c"));
    let cost = row(&json(&again.join("summary.json")), "c2c")["cost"].clone();
    assert!(cost["sharer_ms"].is_null() && cost["receiver_ms"].as_f64().unwrap() > 0.0, "{cost}");
}

/// Generated answers, their extraction, exemplars, and data of one's own.
#[test]
fn answers_are_generated_and_data_of_ones_own_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("mine.jsonl");
    let heldout =
        fs::read_to_string(format!("{}/assets/pair/heldout.jsonl", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let mut own: Vec<&str> = heldout.lines().take(12).collect();
    own.extend([
        r#"{"question": "no gold?", "choices": ["a", "b"], "answer_index": 9}"#,
        r#"{"question": "too many?", "choices": ["a","b","c","d","e","f","g","h","i","j","k"], "answer_index": 0}"#,
        r#"{"question": "", "choices": ["a", "b"], "answer_index": 0}"#,
    ]);
    let long =
        format!(r#"{{"question": "{}", "choices": ["a", "b"], "answer_index": 0}}"#, "long ".repeat(4000));
    own.push(&long);
    fs::write(&rows, own.join("\n")).unwrap();
    let out = folder.path().join("run");
    let args = [
        "--tasks",
        rows.to_str().unwrap(),
        "--prompt",
        "line",
        "--method",
        "generate",
        "--max-new-tokens",
        "12",
    ];
    let modes = ["--modes", "receiver,sharer,c2c,t2t"];
    let (printed, _) = done(&evaluate(&out, &[&args[..], &modes].concat()).output().unwrap());
    for reason in ["names none of the choices", "11 choices", "empty", "more than the context"] {
        assert!(printed.contains(reason), "`{reason}` is not said:\n{printed}");
    }
    let summary = json(&out.join("summary.json"));
    assert_eq!(summary["excluded"]["mine"].as_array().unwrap().len(), 4);
    for (mode, least) in [("c2c", 9), ("sharer", 11)] {
        assert_eq!(row(&summary, mode)["asked"], 12);
        assert!(row(&summary, mode)["correct"].as_u64().unwrap() >= least, "{printed}");
    }
    let sample = fs::read_to_string(file(&out, "c2c", "samples_mine_", ".jsonl")).unwrap();
    let sample: Value = serde_json::from_str(sample.lines().next().unwrap()).unwrap();
    assert!(sample["resps"][0][0].as_str().unwrap().starts_with("It is"), "{sample}");
    assert_eq!(sample["arguments"]["gen_args_0"]["arg_1"]["do_sample"], false);
    assert!(sample["cost"]["tokens"].as_u64().unwrap() >= 3);
    let shots = folder.path().join("shots");
    let args = ["--limit", "4", "--few-shot", "2", "--modes", "sharer"];
    done(&evaluate(&shots, &args).output().unwrap());
    let prompt =
        samples(&shots, "sharer")[0]["arguments"]["gen_args_0"]["arg_0"].as_str().unwrap().to_owned();
    assert_eq!(prompt.matches("It is").count(), 3, "{prompt}");
}

#[test]
fn bad_input_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let fixture = |name: &str| format!("{}/tests/fixtures/pair/{name}", env!("CARGO_MANIFEST_DIR"));
    let (receiver, fuser) =
        (fixture("receiver"), format!("{}/assets/pair/fuser", env!("CARGO_MANIFEST_DIR")));
    let sharer = fixture("sharer");
    refused(&out, &["--tasks", "arc"], &["unknown task `arc`", "arc_challenge, arc_easy"]);
    refused(&out, &["--preset", "table"], &["unknown preset `table`", "main, controls"]);
    refused(&out, &["--modes", "c2c-foo"], &["unknown mode `c2c-foo`", "c2c-shuffle"]);
    refused(&out, &["--tasks", "arc_easy"], &["arc_easy/validation.jsonl", "--data"]);
    refused(&out, &["--modes", "sharer:2"], &["sharer:2", "2 sharers"]);
    refused(&out, &["--modes", "identical"], &["--identical-fuser"]);
    refused(&out, &["--cot", "--method", "logits"], &["chain of thought"]);
    refused(&out, &["--preset", "math"], &["--receiver"]);
    // A fuser of another pair.
    let foreign = ["--receiver", &receiver, "--sharer", &sharer, "--fuser", &fuser, "--modes", "c2c"];
    refused(&out, &foreign, &["fuser"]);
    let empty = folder.path().join("empty.jsonl");
    fs::write(&empty, "{\"question\": \"a\"}\n").unwrap();
    refused(&out, &["--tasks", empty.to_str().unwrap()], &["no question that can be asked", "empty.jsonl:1"]);
    let report = Command::new(env!("CARGO_BIN_EXE_evaluate"))
        .args(["report", folder.path().to_str().unwrap()])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&report.stderr).contains("holds no evaluation"));
    let listed = Command::new(env!("CARGO_BIN_EXE_evaluate")).arg("--list").output().unwrap();
    let (text, _) = done(&listed);
    for name in ["mmlu_redux", "c2c-generic", "multi-sharer"] {
        assert!(text.contains(name), "{text}");
    }
}
