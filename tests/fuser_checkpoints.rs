//! Checkpoints of the fuser: round trips, and what is said about broken ones.

use c2c::{
    backend::{Backend, DType, Queue, cpu::Cpu},
    fuser::{Digest, Fuser, FuserConfig, FuserError, Kind, Mapping, Party},
    rng::{Purpose, Rng, Stream},
};
use safetensors::{SafeTensors, tensor::TensorView};
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

fn backend() -> Arc<dyn Backend> {
    Cpu::new(1)
}

fn fuser(kind: Kind, backend: &Arc<dyn Backend>) -> Fuser {
    let receiver =
        Party { name: Some("receiver".into()), config: Some(Digest([0xab; 32])), ..Party::new(3, 2, 6) };
    let sharer = Party { layers: None, name: Some("sharer".into()), ..Party::new(0, 1, 10) };
    let config = FuserConfig::new(kind, 8, 12, Mapping::LastAligned, &[0, 0, 1], receiver, sharer);
    Fuser::init(config, 5, backend).unwrap()
}

fn error(path: &Path) -> FuserError {
    match Fuser::load(path, &backend()) {
        Ok(_) => panic!("{} was accepted", path.display()),
        Err(error) => error,
    }
}

#[track_caller]
fn complains(path: &Path, words: &[&str]) {
    let error = error(path).to_string();
    for word in words {
        assert!(error.contains(word), "`{error}` should name {word}");
    }
}

#[test]
fn every_kind_survives_both_layouts() {
    let backend = backend();
    let queue = Queue::new(&backend).unwrap();
    for kind in (0..=4).map(Kind::Ablation).chain([Kind::C2c, Kind::C2cC, Kind::Latent]) {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let fuser = fuser(kind, &backend).to_dtype(dtype, &backend).unwrap();
            let folder = tempfile::tempdir().unwrap();
            fuser.save(folder.path(), &queue).unwrap();
            let again = Fuser::load(folder.path(), &backend).unwrap();
            assert_eq!(again.config(), fuser.config());
            assert_eq!(again.fingerprint(&queue).unwrap(), fuser.fingerprint(&queue).unwrap());
            assert_eq!(again.gates(), fuser.gates());

            let folder = tempfile::tempdir().unwrap();
            let saved = fuser.save_published(folder.path(), &queue);
            if matches!(kind, Kind::C2cC | Kind::Latent) {
                assert!(saved.unwrap_err().to_string().contains(&kind.to_string()));
                continue;
            }
            saved.unwrap();
            let again = Fuser::load(folder.path(), &backend).unwrap();
            // The published layout has no room for digests.
            let receiver = Party { config: None, ..fuser.config().receiver.clone() };
            assert_eq!(*again.config(), FuserConfig { receiver, ..fuser.config().clone() });
            for (a, b) in again.projectors().iter().zip(fuser.projectors()) {
                for ((name, a), b) in a.tensors().iter().zip(b.tensors().values()) {
                    let bytes = |tensor| queue.download(tensor).unwrap();
                    assert_eq!(bytes(a), bytes(b), "{name}");
                }
            }
        }
    }
}

#[test]
fn a_kind_without_gates_is_open() {
    let backend = backend();
    for kind in (0..=4).map(Kind::Ablation) {
        let expected = if kind.has_gates() { 0.0 } else { 1.0 };
        assert_eq!(fuser(kind, &backend).gates(), [[expected; 2]; 3], "{kind}");
    }
}

/// The tensors of a saved fuser, changed by `change`, written back without the configuration inside.
fn rewrite(folder: &Path, change: impl FnOnce(&mut BTreeMap<String, (Vec<usize>, Vec<u8>)>)) {
    let path = folder.join("fuser.safetensors");
    let file = fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let mut all: BTreeMap<_, _> = tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec())))
        .collect();
    change(&mut all);
    let views = all.iter().map(|(name, (shape, data))| {
        (name, TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn saved(kind: Kind) -> tempfile::TempDir {
    let backend = backend();
    let folder = tempfile::tempdir().unwrap();
    fuser(kind, &backend).save(folder.path(), &Queue::new(&backend).unwrap()).unwrap();
    folder
}

#[test]
fn missing_extra_and_misshapen_parameters_are_named() {
    let folder = saved(Kind::C2c);
    rewrite(folder.path(), |all| drop(all.remove("projector_1.key_in.bias")));
    complains(folder.path(), &["fuser.safetensors", "`projector_1.key_in.bias` is missing"]);

    let folder = saved(Kind::C2c);
    rewrite(folder.path(), |all| drop(all.remove("projector_2.value_gate_logit")));
    complains(folder.path(), &["`projector_2.value_gate_logit` is missing"]);

    let folder = saved(Kind::C2c);
    rewrite(folder.path(), |all| drop(all.insert("projector_0.key_out.bias".into(), (vec![1], vec![0; 4]))));
    complains(folder.path(), &["`projector_0.key_out.bias` does not belong"]);

    let folder = saved(Kind::C2c);
    rewrite(folder.path(), |all| drop(all.insert("projector_3.key_in.bias".into(), (vec![1], vec![0; 4]))));
    complains(folder.path(), &["`projector_3.key_in.bias` does not belong"]);

    let folder = saved(Kind::C2c);
    rewrite(folder.path(), |all| all.get_mut("projector_0.key_in.weight").unwrap().0.reverse());
    complains(folder.path(), &["`projector_0.key_in.weight`", "[22, 8]", "[8, 22]"]);

    // A configuration for another dtype or another kind than the weights'.
    for (from, to, words) in [
        ("\"F32\"", "\"BF16\"", ["is F32", "BF16"]),
        ("\"c2c\"", "\"c2c-c\"", ["source_in.weight", "missing"]),
        ("\"c2c\"", "\"ablation:1\"", ["scalar_head", "does not belong"]),
        ("\"version\": 1", "\"version\": 2", ["version", "2"]),
        ("\"hidden\": 8", "\"hidden\": 0", ["hidden", "0"]),
        ("\"hidden\": 8", "\"hidden\": 18446744073709551615", ["hidden", "18446744073709551615"]),
        ("\"num_layers\": 3", "\"num_layers\": 4000000000", ["num_layers", "4000000000"]),
        ("\"hidden\": 8", "\"hidden\": -8", ["fuser.json", "line"]),
        ("\"hidden\": 8", "\"hiden\": 8", ["fuser.json", "hiden"]),
    ] {
        let folder = saved(Kind::C2c);
        rewrite(folder.path(), |_| {});
        let path = folder.path().join("fuser.json");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(&path, text.replace(from, to)).unwrap();
        complains(folder.path(), &words);
    }
}

#[test]
fn what_is_not_there_is_said() {
    let folder = tempfile::tempdir().unwrap();
    complains(folder.path(), &["no fuser here"]);
    complains(&folder.path().join("missing"), &["no fuser here", "missing"]);
    let folder = saved(Kind::C2c);
    rewrite(folder.path(), |_| {});
    fs::remove_file(folder.path().join("fuser.json")).unwrap();
    complains(folder.path(), &["fuser.safetensors", "no fuser.json"]);
}

/// A crash between the two renames of a save leaves new weights beside an old fuser.json.
#[test]
fn a_half_done_save_is_a_checkpoint() {
    let backend = backend();
    let queue = Queue::new(&backend).unwrap();
    let folder = saved(Kind::C2c);
    let old = fs::read(folder.path().join("fuser.json")).unwrap();
    let new = fuser(Kind::Ablation(1), &backend);
    new.save(folder.path(), &queue).unwrap();
    fs::write(folder.path().join("fuser.json"), old).unwrap();
    fs::write(folder.path().join(".fuser.safetensors.partial-1"), b"half").unwrap();
    let loaded = Fuser::load(folder.path(), &backend).unwrap();
    assert_eq!(loaded.config(), new.config());
    fs::remove_file(folder.path().join("fuser.json")).unwrap();
    assert_eq!(Fuser::load(folder.path(), &backend).unwrap().config(), new.config());
}

#[test]
fn a_fuser_in_use_may_be_saved_over() {
    let backend = backend();
    let queue = Queue::new(&backend).unwrap();
    let folder = saved(Kind::C2c);
    let loaded = Fuser::load(folder.path(), &backend).unwrap();
    let before = loaded.fingerprint(&queue).unwrap();
    loaded.save(folder.path(), &queue).unwrap();
    assert_eq!(Fuser::load(folder.path(), &backend).unwrap().fingerprint(&queue).unwrap(), before);
    fuser(Kind::C2cC, &backend).save(folder.path(), &queue).unwrap();
    assert_eq!(loaded.fingerprint(&queue).unwrap(), before);
}

#[test]
fn broken_published_layouts_are_named() {
    let backend = backend();
    let cases: [(&str, &str, &str, &[&str]); 12] = [
        ("projector_config.json", "\"0\":{\"1\"", "\"3\":{\"1\"", &["projector_config.json", "receivers"]),
        ("projector_config.json", "[[0,0]]", "[]", &["no source layer"]),
        ("projector_config.json", "[[0,0]]", "[[0,7]]", &["routes", "7"]),
        ("projector_config.json", "[[0,0]]", "[[0,18446744073709551615]]", &["routes"]),
        ("projector_config.json", "[[0,0]]", "[[0,-1]]", &["projector_config.json", "line"]),
        ("projector_config.json", "{\"1\":{", "{\"2\":{},\"1\":{", &["sharers", "2"]),
        ("projector_0.json", "C2CProjector", "MLPProjector", &["class", "MLPProjector"]),
        ("projector_0.json", "\"source_dim\": 10", "\"source_dim\": 11", &["projector_1.json", "differ"]),
        ("projector_0.json", "\"source_dim\"", "\"sauce_dim\"", &["projector_0.json", "sauce_dim"]),
        ("projector_0.json", "C2CProjector", "AblationProjector", &["projector_1.json", "differ"]),
        ("projector_2.json", "{", "[", &["projector_2.json"]),
        ("projector_1.json", "\"num_layers\": 3", "\"num_layers\": 4", &["projector_1.json", "differ"]),
    ];
    for (name, from, to, words) in cases {
        let folder = tempfile::tempdir().unwrap();
        fuser(Kind::C2c, &backend).save_published(folder.path(), &Queue::new(&backend).unwrap()).unwrap();
        let path = folder.path().join("final").join(name);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        complains(folder.path(), words);
    }
    let folder = tempfile::tempdir().unwrap();
    fuser(Kind::C2c, &backend).save_published(folder.path(), &Queue::new(&backend).unwrap()).unwrap();
    fs::remove_file(folder.path().join("projectors.safetensors")).unwrap();
    complains(folder.path(), &["projector_0.pt"]);
    fs::write(folder.path().join("final/projector_0.pt"), b"").unwrap();
    complains(folder.path(), &["projector_0.pt"]);
    fs::write(folder.path().join("final/projector_0.pt"), b"\x80\x02}.").unwrap();
    complains(folder.path(), &["projector_0.pt", "not a PyTorch archive"]);
}

#[test]
fn all_in_one_configurations_that_cannot_be_are_named() {
    let cases = [
        (
            r#""gate_granularity": "token", "gate_depends_on_input": true, "gate_input_features": "both""#,
            "computed gate",
        ),
        (r#""gate_granularity": "head_merged""#, "head_merged"),
        (r#""weight_depends_on_input": true"#, "weight_input_features"),
        (r#""gate_granularity": "row""#, "row"),
        (r#""scalar_temperature": 0"#, "scalar_temperature"),
        (r#""sauce": 1"#, "sauce"),
        (r#""source_num_heads": 1, "use_layer_norm": true"#, "use_residual"),
        // All is well with it, but where are the weights?
        (r#""dropout": 0.0"#, "projector_0.pt"),
    ];
    for (more, word) in cases {
        let folder = tempfile::tempdir().unwrap();
        let heads = if word == "use_residual" { "" } else { r#""source_num_heads": 2, "# };
        let file = format!(
            r#"{{"class": "AllInOneProjector", "init_args": {{{heads}"source_dim": 16, "target_dim": 16, {more}}}}}"#
        );
        fs::write(folder.path().join("projector_0.json"), file).unwrap();
        fs::write(folder.path().join("projector_config.json"), r#"{"0": {"1": {"0": [[0, 0]]}}}"#).unwrap();
        complains(folder.path(), &[word]);
    }
}

/// Mutants of a weights file: an error or a fuser, never a panic.
#[test]
fn mutated_weights_never_panic() {
    let folder = saved(Kind::C2c);
    let path = folder.path().join("fuser.safetensors");
    let good = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let backend = backend();
    let seconds = std::env::var("C2C_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3.0);
    let start = Instant::now();
    let (mut accepted, mut refused) = (0, 0);
    for round in 0.. {
        if start.elapsed() > Duration::from_secs_f64(seconds / 2.0) {
            break;
        }
        let rng = Rng::new(31, Stream::new(Purpose::Shuffle, 0), round);
        let mut bytes = good.clone();
        for edit in 0..1 + rng.bits(0) % 3 {
            let at = rng.bits(3 * edit + 1) as usize % header;
            match rng.bits(3 * edit + 2) % 4 {
                0 => bytes[at] ^= 1 << (rng.bits(3 * edit + 3) % 8),
                1 => bytes[at] = b"0123456789\"{}[],:-"[rng.bits(3 * edit + 3) as usize % 18],
                2 => bytes.truncate(bytes.len() - rng.bits(3 * edit + 3) as usize % 64),
                _ => drop(bytes.remove(at)),
            }
        }
        // A new file each time: the old one may still be mapped.
        fs::remove_file(&path).unwrap();
        fs::write(&path, &bytes).unwrap();
        match Fuser::load(folder.path(), &backend) {
            Ok(fuser) => {
                accepted += 1;
                assert!(fuser.bytes() <= bytes.len(), "round {round}");
            }
            Err(_) => refused += 1,
        }
    }
    assert!(accepted > 0 && refused > 0, "{accepted} mutants accepted, {refused} refused");
}
