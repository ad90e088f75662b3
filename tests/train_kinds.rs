//! `train` and `generate` as their user runs them, for kinds of fusers and ways of fusing beside the published one.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

fn model(name: &str) -> String {
    format!("{}/assets/pair/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A folder with a data file and a configuration of a few small updates.
struct Place(tempfile::TempDir);

impl Place {
    fn new(sharer: &str) -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        let rows = (0..24).map(|i| {
            format!(
                r#"{{"question": "Which number is {i}?", "choices": ["{i}", "the other", "{}", "none"], "answer_index": {}}}"#,
                i + 7,
                i % 4
            ) + "\n"
        });
        fs::write(place.path("rows.jsonl"), rows.collect::<String>()).unwrap();
        let config = format!(
            "receiver = {:?}\nsharers = [{:?}]\nseed = 3\ndtype = \"f32\"\ntrain_ratio = 0.75\nthreads = 2\nbaselines = false\n\
             [fuser]\nhidden = 16\nintermediate = 24\n[length]\nsteps = 4\n[batch]\nsamples = 3\n[optimizer]\n\
             learning_rate = 1e-3\n[[data]]\npath = {:?}\n",
            model("receiver"),
            model(sharer),
            place.path("rows.jsonl")
        );
        fs::write(place.path("run.toml"), config).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn train(&self, out: &str, settings: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_train"));
        command.args(["--config", self.path("run.toml").to_str().unwrap()]);
        command.args(["--out", self.path(out).to_str().unwrap()]);
        settings.iter().for_each(|setting| {
            command.args(["--set", setting]);
        });
        command.env_remove("RUST_LOG").output().unwrap()
    }

    fn trained(&self, out: &str, settings: &[&str]) -> (PathBuf, String) {
        let output = self.train(out, settings);
        assert!(output.status.success(), "{}", told(&output));
        (self.path(out).join("final"), told(&output))
    }
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn generate(sharer: &str, fuser: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_generate"));
    command.args(["--receiver", &model("receiver"), "--sharer", &model(sharer), "--dtype", "f32"]);
    command.args(["--fuser", fuser.to_str().unwrap(), "--prompt", "Which number is 3?", "--device", "cpu"]);
    command.args(["--max-new-tokens", "6", "--ignore-eos", "--json", "--threads", "2"]).args(more);
    command.env_remove("RUST_LOG").output().unwrap()
}

fn tokens(output: &Output) -> Vec<u64> {
    assert!(output.status.success(), "{}", told(output));
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    answer["tokens"].as_array().unwrap().iter().map(|token| token.as_u64().unwrap()).collect()
}

#[test]
fn a_ridge_map_is_solved_for_and_answers() {
    let place = Place::new("sharer");
    let (fuser, said) = place.trained("ridge", &["fuser.kind=ridge"]);
    assert!(said.contains("ridge maps of") && said.contains("variance explained"), "{said}");
    assert!(fs::read_to_string(fuser.join("fuser.json")).unwrap().contains("\"ridge\""));
    let (again, _) = place.trained("again", &["fuser.kind=ridge"]);
    let weights = |folder: &Path| fs::read(folder.join("fuser.safetensors")).unwrap();
    assert!(weights(&fuser) == weights(&again), "the same data, the same map");
    let open = tokens(&generate("sharer", &fuser, &[]));
    assert_eq!(open.len(), 6);
    assert_eq!(open, tokens(&generate("sharer", &fuser, &["--overlap", "off"])));
    let closed = tokens(&generate("sharer", &fuser, &["--gates", "closed"]));
    assert_eq!(closed, tokens(&generate("sharer", &fuser, &["--mode", "receiver"])));
    let output = place.train("none", &["fuser.kind=ridge", "fuser.ridge_lambda=-1"]);
    assert!(!output.status.success());
}

#[test]
fn a_latent_and_an_all_in_one_are_trained_and_answer() {
    let place = Place::new("sharer");
    let (fuser, _) = place.trained("latent", &["fuser.kind=latent"]);
    assert_eq!(tokens(&generate("sharer", &fuser, &["--gates", "open"])).len(), 6);
    let (fuser, _) = place.trained("all-in-one", &["fuser.kind=all-in-one"]);
    assert_eq!(tokens(&generate("sharer", &fuser, &[])).len(), 6);
}

#[test]
fn an_answer_is_fused_in_training_as_it_is_later() {
    // The receiver with itself: one tokenizer.
    let place = Place::new("receiver");
    let (fuser, _) = place.trained("response", &["include_response=true"]);
    let with = ["--include-response", "--gates", "open"];
    let answer = tokens(&generate("receiver", &fuser, &with));
    assert_eq!(answer.len(), 6);
    assert_eq!(answer, tokens(&generate("receiver", &fuser, &[&with[..], &["--overlap", "off"]].concat())));
    // Training saw another forward pass than without.
    let (plain, _) = place.trained("plain", &[]);
    let weights = |folder: &Path| fs::read(folder.join("fuser.safetensors")).unwrap();
    assert!(weights(&fuser) != weights(&plain));

    let place = Place::new("sharer");
    let output = place.train("none", &["include_response=true"]);
    assert!(!output.status.success());
    assert!(told(&output).contains("vocabulary"), "{}", told(&output));
    let output = generate("sharer", Path::new(&model("fuser")), &with[..1]);
    assert!(!output.status.success() && told(&output).contains("vocabulary"), "{}", told(&output));
}
