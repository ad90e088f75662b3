use super::*;
use std::fs;

const LEAST: &str = "receiver = \"r\"\nsharers = [\"s\"]\n[[data]]\npath = \"d.jsonl\"\n";

fn read(text: &str) -> Result<TrainConfig, ConfigError> {
    ConfigLayers::default().text("run.toml", text)?.finish().map(|(config, _)| config)
}

#[test]
fn what_is_not_said_has_its_default() {
    let config = read(LEAST).unwrap();
    let data = DataSettings {
        path: "d.jsonl".into(),
        adapter: AdapterChoice::Auto,
        prompt: PromptStyle::Plain,
        ids: None,
        limit: None,
    };
    let default = TrainConfig {
        receiver: "r".into(),
        sharers: vec!["s".into()],
        data: vec![data],
        ..TrainConfig::default()
    };
    assert_eq!(config, default);
}

#[test]
fn written_and_read_again() {
    let config = TrainConfig {
        alignment: Alignment::Longest,
        multi_sharer: FusionMode::Parallel,
        device: DeviceChoice::Cuda(1),
        dtype: ComputeType::F32,
        early_stop: Some(3),
        length: LengthSettings { steps: Some(7), too_long: TooLong::Truncate, ..LengthSettings::default() },
        fuser: FuserSettings {
            kind: Kind::Ablation(2),
            mapping: LayerMapping::K_NEAREST,
            ..Default::default()
        },
        ..read(LEAST).unwrap()
    };
    assert_eq!(read(&toml::to_string(&config).unwrap()).unwrap(), config);
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<TrainConfig>(&json).unwrap(), config);
}

#[test]
fn mistakes_are_named_with_file_key_and_line() {
    for (text, words) in [
        ("seed = 1\n\n[optimizer]\nlr = 1e-3\n", ["run.toml", "lr", "line 4"]),
        ("seed = 1\nsede = 2\n", ["run.toml", "sede", "line 2"]),
        ("[optimizer]\nlearning_rate = \"high\"\n", ["run.toml", "learning_rate", "line 2"]),
        ("[optimizer]\nschedule = \"polynomial\"\n", ["run.toml", "constant_with_warmup", "line 2"]),
        ("alignment = \"words\"\n", ["run.toml", "words", "line 1"]),
        ("dtype = \"f16\"\n", ["run.toml", "f16", "line 1"]),
        ("device = \"tpu\"\n", ["run.toml", "tpu", "line 1"]),
        ("[[data]]\npath = \"x\"\nadapter = \"foo\"\n", ["run.toml", "openhermes", "line 3"]),
        ("[[data]]\nadapter = \"mmlu\"\n", ["run.toml", "path", "line 1"]),
        ("[fuser]\nkind = \"c3c\"\n", ["run.toml", "c3c", "line 2"]),
        ("seed = \n", ["run.toml", "seed", "line 1"]),
    ] {
        let error = read(text).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{error}\nshould name {word}");
        }
    }
}

#[test]
fn values_that_make_no_sense_are_named_with_their_line() {
    for (more, place) in [
        ("[fuser]\nlayers = 2", "run.toml:6: `fuser.layers` is 2: expected 3 or more"),
        ("[fuser]\ndropout = 1.0", "run.toml:6: `fuser.dropout` is 1"),
        (
            "[fuser]\ncheckpoints = [\"a\", \"b\"]",
            "run.toml:6: `fuser.checkpoints` names 2 fusers for 1 sharers",
        ),
        ("[batch]\ntokens = 9\nsamples = 1", "run.toml:6: `batch.tokens` and batch.samples exclude"),
        ("[length]\nsteps = 9\nepochs = 1", "run.toml:7: `length.epochs` and length.steps exclude"),
        ("[optimizer]\nlearning_rate = nan", "run.toml:6: `optimizer.learning_rate` is NaN"),
        ("[optimizer]\n\nbetas = [0.9, 1.0]", "run.toml:7: `optimizer.betas` is 1"),
        ("[gates]\nfinal_temperature = 0.0", "run.toml:6: `gates.final_temperature` is 0"),
    ] {
        let error = read(&format!("{LEAST}{more}\n")).unwrap_err().to_string();
        assert!(error.starts_with(place), "{error}\nshould begin {place}");
    }
    for (text, key) in [
        ("", "`receiver` is missing"),
        ("receiver = \"r\"", "`sharers` is empty"),
        ("receiver = \"r\"\nsharers = [\"s\"]", "`data` is missing"),
        ("receiver = \"r\"\nsharers = [\"s\"]\nwhat = \"model\"", "run.toml:2: `sharers` only goes with"),
    ] {
        let error = read(text).unwrap_err().to_string();
        assert!(error.contains(key), "{error}\nshould say {key}");
    }
}

#[test]
fn layers_win_key_by_key() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    fs::write(&path, "[optimizer]\nlearning_rate = 1e-3\n").unwrap();
    let layers = || ConfigLayers::default().preset("published").unwrap().file(&path).unwrap();
    let set = |setting: &str| layers().set(setting);
    let config = set("receiver=other/model").unwrap().set("batch.samples=2").unwrap().finish().unwrap().0;
    assert_eq!(config.receiver, PathBuf::from("other/model"));
    assert_eq!((config.optimizer.learning_rate, config.optimizer.warmup_ratio), (1e-3, 0.1));
    assert_eq!((config.batch.samples, config.batch.accumulate), (Some(2), 64));

    let error = set("optimizer.lr=3").unwrap_err().to_string();
    assert!(error.contains("setting optimizer.lr=3"), "{error}");
    for setting in ["seed", "=3", "a b=3"] {
        assert!(matches!(set(setting), Err(ConfigError::Setting(_))), "{setting}");
    }
    let error = set("batch.accumulate=0").unwrap().finish().unwrap_err().to_string();
    assert!(error.contains("setting batch.accumulate=0:1"), "{error}");
    let error = ConfigLayers::default().preset("publish").unwrap_err().to_string();
    assert!(error.contains("publish") && error.contains("published"), "{error}");
    let error = ConfigLayers::default().file(&folder.path().join("none.toml")).unwrap_err().to_string();
    assert!(error.contains("none.toml"), "{error}");
}

#[test]
fn recipes_are_layers_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recipe.json");
    fs::write(&path, "{\"model\": {},\n \"trainin\": 3}").unwrap();
    let error = ConfigLayers::default().file(&path).unwrap_err().to_string();
    assert!(
        error.contains("recipe.json") && error.contains("trainin") && error.contains("line 2"),
        "{error}"
    );
}

#[test]
fn every_preset_is_sound() {
    for name in preset_names() {
        let mut layers = ConfigLayers::default().preset(name).unwrap();
        if name == "choice" {
            // Of models that are named besides.
            let models = "receiver = \"r\"\nsharers = [\"s\"]\n[[data]]\npath = \"d.jsonl\"";
            layers = layers.text("mine.toml", models).unwrap();
        }
        layers.finish().unwrap();
    }
}

#[test]
fn schedules_follow_the_number_of_updates() {
    let config = read(LEAST).unwrap();
    assert_eq!(config.learning_rate(19).warmup, 1);
    assert_eq!(config.annealing(19).steps, 19);
    let more = format!("{LEAST}[optimizer]\nwarmup_steps = 7\n[gates]\nanneal_steps = 5\n");
    let config = read(&more).unwrap();
    assert_eq!((config.learning_rate(19).warmup, config.annealing(19).steps), (7, 5));
}
