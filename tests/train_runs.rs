//! `train` as its user runs it: a process, files, kills and resumptions, with the built-in pair.

use c2c::train::{Record, events};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

fn model(name: &str) -> String {
    format!("{}/assets/pair/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A folder with a data file and a configuration of a few small updates; more settings come behind.
struct Place(tempfile::TempDir);

impl Place {
    fn new(what: &str) -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        let rows = (0..24).map(|i| {
            format!(
                r#"{{"question": "Which number is {i}?", "choices": ["{i}", "the other", "{}", "none"], "answer_index": {}}}"#,
                i + 7,
                i % 4
            ) + "\n"
        });
        fs::write(place.path("rows.jsonl"), rows.collect::<String>()).unwrap();
        let sharers = if what == "fuser" { format!("[{:?}]", model("sharer")) } else { "[]".into() };
        let config = format!(
            "what = {what:?}\nreceiver = {:?}\nsharers = {sharers}\nseed = 3\ndtype = \"f32\"\neval_every = 4\nsave_every = 5\n\
             train_ratio = 0.75\n[fuser]\nhidden = 16\nintermediate = 24\n[length]\nsteps = 10\n[batch]\nsamples = 3\naccumulate = 2\n\
             [optimizer]\nlearning_rate = 1e-3\n[[data]]\npath = {:?}\n",
            model("receiver"),
            place.path("rows.jsonl")
        );
        fs::write(place.path("run.toml"), config).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, out: &str, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_train"));
        command.args(["--config", self.path("run.toml").to_str().unwrap()]);
        command.args(["--out", self.path(out).to_str().unwrap(), "--set", "threads=2"]).args(more);
        command.env_remove("RUST_LOG");
        command
    }

    fn train(&self, out: &str, more: &[&str]) -> Output {
        self.command(out, more).output().unwrap()
    }
}

fn resume(folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_train")).args(["--resume", folder.to_str().unwrap()]).output().unwrap()
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Losses and norms by update.
fn updates(folder: &Path) -> Vec<(u64, f64, f64)> {
    let records = events::read(folder).unwrap().into_iter();
    let update = |record| match record {
        Record::Update(update) => Some((update.step, update.loss, update.gradient_norm)),
        _ => None,
    };
    records.filter_map(update).collect()
}

fn trained(folder: &Path, file: &str) -> Vec<u8> {
    fs::read(folder.join("final").join(file)).unwrap()
}

#[test]
fn ten_updates_are_five_and_five_bit_for_bit() {
    for (what, file) in [
        ("fuser", "fuser.safetensors"),
        ("model", "model.safetensors"),
        ("lora", "adapter_model.safetensors"),
    ] {
        let place = Place::new(what);
        let whole = place.train("whole", &[]);
        assert!(whole.status.success(), "{}", told(&whole));
        let said = told(&whole);
        for part in ["plan:", "updates of about", "held-out loss", "after training", "report:"] {
            assert!(said.contains(part), "{what}: no `{part}` in\n{said}");
        }
        let whole = place.path("whole");
        // As if the run had been cut off after its checkpoint.
        let from = whole.join("checkpoint-5");
        assert!(from.is_dir(), "a checkpoint after 5 updates");
        let output = resume(&from);
        assert!(output.status.success(), "{}", told(&output));
        // It went on in the folder of the run: its updates 6 to 10 are those of the resumption.
        assert_eq!(updates(&whole).len(), 10);
        let again = place.train("again", &[]);
        assert!(again.status.success(), "{}", told(&again));
        assert_eq!(updates(&whole), updates(&place.path("again")), "{what}: updates");
        assert!(trained(&whole, file) == trained(&place.path("again"), file), "{what}: trained weights");
        assert!(whole.join("report.md").is_file() && whole.join("loss.svg").is_file());
    }
}

#[test]
fn sharers_caches_on_disk_change_nothing_but_the_work() {
    let place = Place::new("fuser");
    let kept = place.path("kept");
    let run = |out: &str, more: &[&str]| {
        let output = place.train(out, more);
        assert!(output.status.success(), "{}", told(&output));
        (updates(&place.path(out)), trained(&place.path(out), "fuser.safetensors"), told(&output))
    };
    let keep = ["--cache-sharer", kept.to_str().unwrap()];
    let without = run("without", &[]);
    let cold = run("cold", &keep);
    assert_eq!(without.0, cold.0);
    let files: Vec<PathBuf> = fs::read_dir(&kept).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.iter().all(|file| file.extension().is_some_and(|e| e == "safetensors")), "{files:?}");
    let tokens = |out: &str| -> u64 {
        let records = events::read(&place.path(out)).unwrap().into_iter();
        let of = |record| if let Record::Update(update) = record { update.tokens } else { 0 };
        records.map(of).sum()
    };
    let warm = run("warm", &keep);
    assert_eq!((&cold.0, &cold.1), (&warm.0, &warm.1), "the same run");
    assert!(tokens("warm") < tokens("cold") && tokens("cold") < tokens("without"), "the sharer read less");
    let again: Vec<PathBuf> = fs::read_dir(&kept).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), again.len(), "nothing was missing");

    // Damage is said and repaired.
    let mut bytes = fs::read(&files[0]).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&files[0], bytes).unwrap();
    let damaged = run("damaged", &keep);
    assert_eq!((&cold.0, &cold.1), (&damaged.0, &damaged.1));
    assert!(damaged.2.contains("checksum does not match"), "{}", damaged.2);
    let repaired = run("repaired", &keep);
    assert!(!repaired.2.contains("checksum"), "{}", repaired.2);

    // Another sharer's are not taken for it.
    let other = format!("sharers=[{:?}]", model("receiver"));
    let mut other_keep = vec!["--set", &other, "--set", "length.steps=1"];
    other_keep.extend(keep);
    run("other", &other_keep);
    assert!(fs::read_dir(&kept).unwrap().count() > files.len());

    let blocked = place.train("blocked", &["--cache-sharer", place.path("rows.jsonl").to_str().unwrap()]);
    assert!(!blocked.status.success() && told(&blocked).contains("rows.jsonl"), "{}", told(&blocked));
}

#[test]
fn a_part_of_the_prompt_is_learned_in_standardised_coordinates() {
    let place = Place::new("fuser");
    let part = ["--set", "fraction=back:0.5", "--set", "fuser.standardize=true"];
    let run = |out: &str, more: &[&str]| {
        let output = place.train(out, &[&part[..], more].concat());
        assert!(output.status.success(), "{}", told(&output));
        (updates(&place.path(out)), trained(&place.path(out), "fuser.safetensors"), told(&output))
    };
    let whole = run("whole", &[]);
    // Both models' caches on disk: one file a prompt and model, and the same numbers.
    let kept = place.path("kept");
    let receiver = format!("cache_receiver={kept:?}");
    let keep = ["--cache-sharer", kept.to_str().unwrap(), "--set", &receiver];
    let cold = run("cold", &keep);
    let files = fs::read_dir(&kept).unwrap().count();
    let warm = run("warm", &keep);
    assert_eq!((&whole.0, &whole.1), (&cold.0, &cold.1));
    assert_eq!((&whole.0, &whole.1), (&warm.0, &warm.1));
    assert_eq!(fs::read_dir(&kept).unwrap().count(), files);
    let missing = |said: &str| {
        said.split("to be computed once: ").nth(1).unwrap().split(',').next().unwrap().to_owned()
    };
    assert_eq!((missing(&cold.2), missing(&warm.2)), ("48".into(), "0".into()));

    // Moments are of the data, so a resumption finds them again.
    let output = resume(&place.path("cold/checkpoint-5"));
    assert!(output.status.success(), "{}", told(&output));
    assert_eq!(
        (&whole.0, &whole.1),
        (&updates(&place.path("cold")), &trained(&place.path("cold"), "fuser.safetensors"))
    );

    // What the coordinates change is the updates, not what is computed: the first loss differs by the first weights alone.
    let raw = place.train("raw", &part[..2]);
    assert!(raw.status.success(), "{}", told(&raw));
    assert_ne!(updates(&place.path("raw")), whole.0);

    // The fuser remembers its part, and inference can be told otherwise.
    let fused = |more: &[&str]| -> u64 {
        let answer = Command::new(env!("CARGO_BIN_EXE_generate"))
            .args(["--receiver", &model("receiver"), "--sharer", &model("sharer"), "--fuser"])
            .arg(place.path("whole/final"))
            .args([
                "--prompt",
                "Which number is 3, and which comes behind it?",
                "--max-new-tokens",
                "1",
                "--json",
            ])
            .args(more)
            .output()
            .unwrap();
        assert!(answer.status.success(), "{}", told(&answer));
        let answer: serde_json::Value = serde_json::from_slice(&answer.stdout).unwrap();
        answer["fused_tokens"].as_u64().unwrap()
    };
    let all = fused(&["--fraction", "1"]);
    assert_eq!(fused(&[]), all / 2);
}

#[test]
fn what_is_trained_can_be_said_on_the_command_line() {
    // The sharers of the configuration play no part then.
    let place = Place::new("fuser");
    for (what, file) in [("model", "model.safetensors"), ("lora", "adapter_config.json")] {
        let output = place.train(what, &["--what", what, "--set", "length.steps=1"]);
        assert!(output.status.success(), "{}", told(&output));
        assert!(place.path(what).join("final").join(file).is_file());
    }
    let output = place.train("other", &["--what", "everything"]);
    assert!(!output.status.success() && told(&output).contains("everything"), "{}", told(&output));
}

/// A process for each rank, and what the first of them, which writes, left.
fn in_ranks(place: &Place, out: &str, ranks: usize, more: &[&str]) -> Vec<Output> {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let processes: Vec<_> = (0..ranks)
        .map(|rank| {
            let mut command = place.command(out, more);
            command.env("WORLD_SIZE", ranks.to_string()).env("RANK", rank.to_string());
            command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    processes.into_iter().map(|process| process.wait_with_output().unwrap()).collect()
}

fn floats(folder: &Path, file: &str, name: &str) -> Vec<f32> {
    let bytes = trained(folder, file);
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let data = file.tensor(name).unwrap().data().to_vec();
    data.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

#[test]
fn two_processes_make_the_updates_of_one() {
    for what in ["fuser", "lora"] {
        let place = Place::new(what);
        // The last update of an epoch has one batch alone: a process has nothing to add.
        let settings = ["--set", "batch.samples=2", "--set", "threads=1"];
        let alone = place.train("alone", &settings);
        assert!(alone.status.success(), "{}", told(&alone));
        let ranks = in_ranks(&place, "ranks", 2, &settings);
        ranks.iter().for_each(|rank| assert!(rank.status.success(), "{}", told(rank)));
        assert!(told(&ranks[0]).contains("report:") && !told(&ranks[1]).contains("report:"));
        let (one, two) = (updates(&place.path("alone")), updates(&place.path("ranks")));
        assert_eq!((one.len(), two.len()), (10, 10), "written once");
        for (one, two) in one.iter().zip(&two) {
            assert!(
                (one.1 - two.1).abs() < 1e-4 * one.1 && (one.2 - two.2).abs() < 2e-3 * one.2,
                "{one:?} {two:?}"
            );
        }
        if what == "lora" {
            let name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight";
            let [one, two] =
                ["alone", "ranks"].map(|out| floats(&place.path(out), "adapter_model.safetensors", name));
            assert!(one.iter().zip(&two).all(|(one, two)| (one - two).abs() < 1e-3), "{one:?} {two:?}");
        }
    }
    // Who does not belong is turned away, on both sides.
    let place = Place::new("fuser");
    let uneven = in_ranks(&place, "uneven", 2, &["--set", "batch.accumulate=3"]);
    uneven.iter().for_each(|rank| {
        assert!(!rank.status.success() && told(rank).contains("batch.accumulate"), "{}", told(rank))
    });
}

/// No more than 300 KiB in a file: the disk is full while the state is saved.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_checkpoint_before() {
    let place = Place::new("fuser");
    let settings = ["--set", "length.steps=5", "--set", "save_every=5"];
    let first = place.train("run", &settings);
    assert!(first.status.success(), "{}", told(&first));
    let folder = place.path("run");
    let state = folder.join("checkpoint-5/trainer_state.safetensors");
    let before = fs::read(&state).unwrap();
    let limit = before.len() / 2 / 512;
    // The limit's signal is ignored, as it is for a real disk: the write fails.
    let script = format!("trap '' XFSZ; ulimit -f {limit}; exec \"$0\" \"$@\"");
    let full = Command::new("bash")
        .args(["-c", &script, env!("CARGO_BIN_EXE_train")])
        .args(["--config", place.path("run.toml").to_str().unwrap(), "--out", folder.to_str().unwrap()])
        .args(["--set", "threads=2", "--set", "length.steps=7", "--set", "save_every=7"])
        .output()
        .unwrap();
    let said = told(&full);
    assert!(
        !full.status.success() && said.contains("cannot be written") && !said.contains("panicked"),
        "{said}"
    );
    assert!(said.contains("trainer_state.safetensors"), "{said}");
    assert!(fs::read(&state).unwrap() == before, "the old checkpoint is as it was");
    let left = fs::read_dir(folder.join("checkpoint-7")).into_iter().flatten().flatten();
    assert_eq!(left.count(), 0, "nothing half-written stays");
    // From where it is possible to go on.
    let again = resume(&folder);
    assert!(again.status.success(), "{}", told(&again));
}

#[test]
fn a_trained_fuser_answers_and_learning_lowers_the_loss() {
    let place = Place::new("fuser");
    let output = place.train("run", &["--set", "length.steps=40", "--set", "optimizer.learning_rate=3e-3"]);
    assert!(output.status.success(), "{}", told(&output));
    let losses: Vec<f64> = updates(&place.path("run")).iter().map(|update| update.1).collect();
    let mean = |some: &[f64]| some.iter().sum::<f64>() / some.len() as f64;
    assert!(mean(&losses[30..]) < mean(&losses[..10]) - 0.05, "{losses:?}");
    let answer = Command::new(env!("CARGO_BIN_EXE_generate"))
        .args(["--receiver", &model("receiver"), "--sharer", &model("sharer"), "--fuser"])
        .arg(place.path("run/final"))
        .args(["--prompt", "Which number is 3?", "--max-new-tokens", "4", "--json"])
        .output()
        .unwrap();
    assert!(answer.status.success(), "{}", told(&answer));
}

#[test]
fn the_built_in_pair_answers_what_its_receiver_does_not_know() {
    let questions = fs::read_to_string(model("heldout.jsonl")).unwrap();
    let (mut c2c, mut receiver) = (0, 0);
    for line in questions.lines().step_by(40) {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let choices = row["choices"].as_array().unwrap().iter().zip(["A", "B", "C", "D"]);
        let choices: Vec<String> =
            choices.map(|(text, letter)| format!("{letter} {}", text.as_str().unwrap())).collect();
        let question = row["question"].as_str().unwrap().trim_end_matches('?');
        let question = format!("{question}: {}?", choices.join(", "));
        let right =
            format!("It is {}.", ["A", "B", "C", "D"][row["answer_index"].as_u64().unwrap() as usize]);
        for (mode, count) in [("c2c", &mut c2c), ("receiver", &mut receiver)] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_generate"));
            let answer =
                command.args(["--mode", mode, "--dtype", "f32", "--prompt", &question]).output().unwrap();
            assert!(answer.status.success(), "{}", told(&answer));
            *count += usize::from(String::from_utf8_lossy(&answer.stdout).trim() == right);
        }
    }
    // Of 12 questions.
    assert!(c2c >= 10 && receiver <= 7, "right: C2C {c2c}, receiver {receiver}");
}

#[test]
fn killed_at_any_moment_a_run_can_go_on() {
    let place = Place::new("fuser");
    let settings = ["--set", "save_every=1", "--set", "length.steps=200", "--set", "eval_every=0"];
    let folder = place.path("run");
    for round in 0..3 {
        let mut child = if round == 0 {
            place.command("run", &settings).stderr(Stdio::null()).spawn().unwrap()
        } else {
            Command::new(env!("CARGO_BIN_EXE_train"))
                .arg("--resume")
                .arg(&folder)
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        };
        // Until there is something to go on from, and then some.
        let start = Instant::now();
        while !has_checkpoint(&folder) && start.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(300 + 170 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(has_checkpoint(&folder));
    }
    let config = ["--set", "length.steps=3"];
    assert!(place.train("short", &config).status.success(), "another run is not in the way");
    // The state of the killed run loads.
    let step = updates(&folder).last().map_or(0, |update| update.0);
    assert!(step > 0);
    let output = Command::new("timeout")
        .args(["2", env!("CARGO_BIN_EXE_train"), "--resume", folder.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(!told(&output).contains("error"), "{}", told(&output));
}

fn has_checkpoint(folder: &Path) -> bool {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.path().join("trainer_state.safetensors").is_file())
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_says_how_to_go_on() {
    let place = Place::new("fuser");
    let settings = ["--set", "length.steps=100000", "--set", "eval_every=0", "--set", "save_every=0"];
    let child = place.command("run", &settings).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while updates_so_far(&place.path("run")) < 2 && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let said = told(&output);
    assert!(output.status.success() && said.contains("interrupted") && said.contains("--resume"), "{said}");
    assert!(has_checkpoint(&place.path("run")));
}

fn updates_so_far(folder: &Path) -> usize {
    fs::read_to_string(folder.join("log.jsonl")).map_or(0, |log| log.matches("\"update\"").count())
}

#[test]
fn bad_input_is_told() {
    let place = Place::new("fuser");
    fs::write(place.path("broken.jsonl"), "{\"question\": 1}\nnot json\n").unwrap();
    fs::write(place.path("empty.jsonl"), "").unwrap();
    let data = |name: &str| format!("data=[{{path={:?}}}]", place.path(name));
    let alone = |what: &str, receiver: &str| {
        vec![format!("what={what}"), "sharers=[]".into(), format!("receiver={:?}", place.path(receiver))]
    };
    let cases: [(Vec<String>, &str); 14] = [
        (alone("model", "rows.jsonl"), "Hugging Face folder"),
        (alone("lora", "absent.gguf"), "absent.gguf"),
        (vec![data("empty.jsonl")], "no row"),
        (vec![data("broken.jsonl")], "broken.jsonl"),
        (vec![data("absent.jsonl")], "absent.jsonl"),
        (vec!["optimiser.lr=1".into()], "optimiser"),
        (vec!["length.max_length=4".into()], "no sample"),
        (vec!["length.max_length=4".into(), "length.too_long=error".into()], "max_length"),
        (vec!["what=lora".into()], "sharers"),
        (vec!["fraction=middle:1".into()], "middle:1"),
        (vec!["fraction=back:0.001".into()], "back:0.001"),
        (vec!["fraction=0.5".into(), "include_response=true".into()], "fraction"),
        (vec!["fuser.standardize=true".into(), "fuser.kind=ridge".into()], "standardize"),
        (vec!["optimizer.learning_rate=1e30".into(), "optimizer.clip=0".into()], "not a number"),
    ];
    for (settings, word) in cases {
        let more: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
        let output = place.train("bad", &more);
        let said = told(&output);
        assert!(!output.status.success(), "{settings:?} passed");
        assert!(
            said.contains(word) && said.contains("error:") && !said.contains("panicked"),
            "{settings:?}: {said}"
        );
    }
    let output = resume(&place.path("nowhere"));
    assert!(told(&output).contains("no checkpoint"), "{}", told(&output));
}
