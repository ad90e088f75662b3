//! Low-rank adapters: what they compute and learn against the adapted matrices themselves, and their files.

mod command;

use c2c::{
    align::Section,
    backend::{Backend, DType, Precision, Queue, Tensor, cpu::Cpu},
    model::{self, Adapter, Decoder, LoraTarget, ModelConfig, Weights},
    ops::IGNORED,
    pipeline::Prompt,
    rng::normal,
    train::{
        Kept, ModelTrainer, Parameters, Recompute, Sample,
        config::{Decay, LoraSettings},
    },
};
use command::{generate, model};
use safetensors::SafeTensors;
use std::{fs, path::Path, sync::Arc};

const RANK: usize = 3;

fn settings(dropout: f64, targets: &[LoraTarget]) -> LoraSettings {
    LoraSettings { rank: RANK, alpha: 7.5, dropout, targets: targets.into() }
}

fn queue() -> Queue {
    let backend: Arc<dyn Backend> = Cpu::new(2);
    Queue::new(&backend).unwrap()
}

fn loaded(queue: &Queue, path: &Path) -> Arc<Decoder> {
    let loaded = model::load(path, queue.backend(), &|_, _| {}).unwrap();
    Arc::new(Decoder::new(loaded, Precision::F32))
}

/// Two texts of different lengths, the second halves of which are learned from.
fn samples() -> Vec<Sample> {
    let sample = |len: usize, salt: u32| {
        let ids: Vec<u32> = (0..len as u32).map(|t| (t * t * 7 + salt) % 300).collect();
        let labels =
            (0..len).map(|t| if t < len / 2 || t + 1 == len { IGNORED } else { ids[t + 1] }).collect();
        let sections = vec![Section { len, sharer_mask: 0 }];
        let prompt = Prompt { positions: (0..len as u32).collect(), ids, sharers: Vec::new(), sections };
        Sample { prompt, labels, origin: "test".into() }
    };
    vec![sample(19, 3), sample(8, 41)]
}

fn run(trainer: &mut ModelTrainer, learn: Option<(u32, f32)>) -> f64 {
    let samples = samples();
    trainer.run(&samples.iter().collect::<Vec<_>>(), learn).unwrap().loss
}

/// Adapters beside `decoder` whose B are no longer 0.
fn adapters(decoder: &Arc<Decoder>, settings: &LoraSettings, recompute: Recompute) -> ModelTrainer {
    let trainer = ModelTrainer::adapters(queue(), decoder, settings, 5, recompute, Decay::All).unwrap();
    for (index, entry) in trainer.parameters.entries().iter().enumerate() {
        if entry.name.contains("lora_B") {
            let view = trainer.parameters.view(Kept::Weights, index);
            let values =
                normal(8, index as u32, view.elements()).iter().map(|x| 0.1 * x).collect::<Vec<f32>>();
            trainer.queue.upload(&values, &view);
        }
    }
    // Others read them through queues of their own.
    trainer.queue.synchronize().unwrap();
    trainer
}

fn wide(queue: &Queue, tensor: &Tensor) -> Vec<f64> {
    queue.download_f32(tensor).unwrap().into_iter().map(f64::from).collect()
}

/// `left [n, k] · right [k, m]`
fn product(left: &[f64], right: &[f64], k: usize) -> Vec<f64> {
    let (n, m) = (left.len() / k, right.len() / k);
    let at = |i: usize| (0..k).map(|j| left[i / m * k + j] * right[j * m + i % m]).sum();
    (0..n * m).map(at).collect()
}

fn transposed(x: &[f64], cols: usize) -> Vec<f64> {
    let rows = x.len() / cols;
    (0..x.len()).map(|i| x[i % rows * cols + i / rows]).collect()
}

fn tensor(parameters: &Parameters, queue: &Queue, kept: Kept, name: &str) -> Vec<f64> {
    let index = parameters.entries().iter().position(|entry| entry.name == name);
    let index = index.unwrap_or_else(|| panic!("no tensor {name}"));
    wide(queue, &parameters.view(kept, index))
}

fn close(what: &str, ours: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(ours.len(), expected.len(), "{what}");
    let size = (expected.iter().map(|x| x * x).sum::<f64>() / expected.len() as f64).sqrt();
    assert!(size > 0.0, "{what}: nothing to compare");
    for (ours, expected) in ours.iter().zip(expected) {
        assert!((ours - expected).abs() <= tolerance * size, "{what}: {ours} {expected} of {size}");
    }
}

/// The model with `W + (alpha / rank) · B·A` in the place of each adapted W, worked out in f64, all of whose weights learn: by the
/// chain rule its gradient G gives `(alpha / rank) · Bᵀ·G` of A and `(alpha / rank) · G·Aᵀ` of B.
#[test]
fn loss_and_gradients_are_those_of_the_adapted_matrices() {
    let all = LoraTarget::ALL;
    let few = [LoraTarget::Q, LoraTarget::V, LoraTarget::Up, LoraTarget::Down];
    for (name, targets, recompute) in [
        ("receiver", &all[..], Recompute::None),
        ("sharer", &all[..], Recompute::Layers),
        ("sharer", &few[..], Recompute::None),
    ] {
        let queue = queue();
        let path = model(name);
        let decoder = loaded(&queue, Path::new(&path));
        let config = ModelConfig::from_folder(Path::new(&path)).unwrap();
        let mut low = adapters(&decoder, &settings(0.0, targets), recompute);
        let mut full =
            ModelTrainer::new(queue.clone(), config, &decoder.weights, recompute, Decay::All).unwrap();
        let scale = 7.5 / RANK as f64;
        let factors = |low: &ModelTrainer, kept: Kept, layer: usize, target: LoraTarget| {
            ['A', 'B'].map(|f| tensor(&low.parameters, &low.queue, kept, &target.factor_name(layer, f)))
        };
        let matrices: Vec<(usize, LoraTarget, usize)> = (0..decoder.config.layers)
            .flat_map(|layer| targets.iter().map(move |target| (layer, *target)))
            .map(|(layer, target)| {
                let name = target.factor_name(layer, 'A');
                let name = name.replace("base_model.model.", "").replace("lora_A.", "");
                let index = full.parameters.entries().iter().position(|entry| entry.name == name).unwrap();
                (layer, target, index)
            })
            .collect();
        for &(layer, target, index) in &matrices {
            let [a, b] = factors(&low, Kept::Weights, layer, target);
            let view = full.parameters.view(Kept::Weights, index);
            let sums = wide(&queue, &view).into_iter().zip(product(&b, &a, RANK));
            let sums: Vec<f32> = sums.map(|(w, change)| (w + scale * change) as f32).collect();
            queue.upload(&sums, &view);
        }
        for _ in 0..2 {
            let (ours, expected) = (run(&mut low, Some((1, 0.5))), run(&mut full, Some((1, 0.5))));
            assert!((ours - expected).abs() < 1e-5 * expected, "{name}: {ours} {expected}");
        }
        for (layer, target, index) in matrices {
            let [a, b] = factors(&low, Kept::Weights, layer, target);
            let g: Vec<f64> = wide(&queue, &full.parameters.view(Kept::Grad, index));
            let g: Vec<f64> = g.into_iter().map(|g| scale * g).collect();
            let [da, db] = factors(&low, Kept::Grad, layer, target);
            let what = format!("{name}, layer {layer}, {target:?}");
            close(&what, &da, &product(&transposed(&b, RANK), &g, b.len() / RANK), 1e-3);
            close(&what, &db, &product(&g, &transposed(&a, a.len() / RANK), a.len() / RANK), 1e-3);
        }
    }
}

#[test]
fn dropped_elements_are_the_same_on_the_way_back() {
    let decoder = loaded(&queue(), Path::new(&model("sharer")));
    let mut trainer = adapters(&decoder, &settings(0.4, &LoraTarget::ALL), Recompute::Layers);
    let plain = run(&mut trainer, None);
    let loss = run(&mut trainer, Some((3, 1.0)));
    assert!((loss - plain).abs() > 1e-6, "something is dropped");
    assert_ne!(run(&mut trainer, Some((4, 0.0))), loss, "other elements in another update");
    let queue = trainer.queue.clone();
    for index in 0..trainer.parameters.entries().len() {
        let view = trainer.parameters.view(Kept::Weights, index);
        let before = queue.download_f32(&view).unwrap();
        let gradient = wide(&queue, &trainer.parameters.view(Kept::Grad, index));
        let length = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        let mut at = |step: f64| {
            let moved = before.iter().zip(&gradient);
            let moved: Vec<f32> = moved.map(|(w, g)| (f64::from(*w) + step * g / length) as f32).collect();
            queue.upload(&moved, &view);
            run(&mut trainer, Some((3, 0.0)))
        };
        let slope = (at(2e-3) - at(-2e-3)) / 4e-3;
        queue.upload(&before, &view);
        assert!(
            (slope - length).abs() < 1e-2 * length + 3e-3,
            "tensor {index}: slope {slope}, gradient {length}"
        );
    }
}

/// The same model with rows of q and k as GGUF files of the Llama family have them.
#[test]
fn adapters_fit_either_order_of_rotary_pairs() {
    let queue = queue();
    let decoder = loaded(&queue, Path::new(&model("sharer")));
    let config = ModelConfig { interleaved_rope: true, ..decoder.config.clone() };
    let mut weights: Weights = decoder.weights.clone();
    for layer in &mut weights.layers {
        for part in &mut layer.qkv.parts[..2] {
            let (rows, cols) = (part.matrix.rows(), part.matrix.row_len());
            let values = queue.download_f32(&part.matrix).unwrap();
            let half = config.head_dim / 2;
            let row = |row: usize| {
                let (head, in_head) = (row / config.head_dim, row % config.head_dim);
                let from = head * config.head_dim + in_head % 2 * half + in_head / 2;
                values[from * cols..][..cols].to_vec()
            };
            let paired: Vec<f32> = (0..rows).flat_map(row).collect();
            part.matrix = queue.tensor(&paired, &[rows, cols], "q or k").unwrap();
        }
    }
    queue.synchronize().unwrap();
    let paired = Arc::new(Decoder { config, weights, precision: Precision::F32 });
    let mut plain = adapters(&decoder, &settings(0.0, &LoraTarget::ALL), Recompute::None);
    let snapshot = plain.lora().unwrap().snapshot(&queue, &plain.parameters, &decoder.config, "").unwrap();
    let merged = snapshot.merge(&paired.config, &paired.weights, queue.backend()).unwrap();
    let merged =
        Arc::new(Decoder { config: paired.config.clone(), weights: merged, precision: Precision::F32 });
    let mut merged = ModelTrainer::adapters(
        queue.clone(),
        &merged,
        &settings(0.0, &[LoraTarget::Q]),
        1,
        Recompute::None,
        Decay::All,
    )
    .unwrap();
    let (ours, expected) = (run(&mut merged, None), run(&mut plain, None));
    assert!((ours - expected).abs() < 1e-5, "{ours} {expected}");
    // And what is trained there comes out in transformers' order.
    let mut there = adapters(&paired, &settings(0.0, &LoraTarget::ALL), Recompute::None);
    let out = there.lora().unwrap().snapshot(&queue, &there.parameters, &paired.config, "").unwrap();
    let back = out.merge(&paired.config, &paired.weights, queue.backend()).unwrap();
    let back = Arc::new(Decoder { config: paired.config.clone(), weights: back, precision: Precision::F32 });
    let mut back = ModelTrainer::adapters(
        queue.clone(),
        &back,
        &settings(0.0, &[LoraTarget::Q]),
        1,
        Recompute::None,
        Decay::All,
    )
    .unwrap();
    let (ours, expected) = (run(&mut back, None), run(&mut there, None));
    assert!((ours - expected).abs() < 1e-5, "{ours} {expected}");
}

#[test]
fn a_folder_of_adapters_is_a_model() {
    let queue = queue();
    let base = model("sharer");
    let decoder = loaded(&queue, Path::new(&base));
    let mut trainer = adapters(&decoder, &settings(0.1, &LoraTarget::ALL), Recompute::None);
    let folder = tempfile::tempdir().unwrap();
    trainer.save(folder.path(), &base).unwrap();
    let file = fs::read(folder.path().join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let config = &decoder.config;
    for (name, shape) in [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", [RANK, config.hidden]),
        ("base_model.model.model.layers.2.mlp.down_proj.lora_B.weight", [config.hidden, RANK]),
    ] {
        assert_eq!(file.tensor(name).unwrap().shape(), shape, "{name}");
    }
    let said: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.path().join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(
        (&said["peft_type"], &said["r"], &said["lora_alpha"]),
        (&"LORA".into(), &3.into(), &7.5.into())
    );
    let again = Adapter::read(folder.path()).unwrap();
    assert_eq!(again, trainer.lora().unwrap().snapshot(&queue, &trainer.parameters, config, &base).unwrap());

    let merged = loaded(&queue, folder.path());
    assert_eq!(merged.weights.layers[0].down.parts[0].matrix.dtype(), DType::F32);
    let mut merged =
        ModelTrainer::new(queue.clone(), merged.config.clone(), &merged.weights, Recompute::None, Decay::All)
            .unwrap();
    let (ours, expected) = (run(&mut merged, None), run(&mut trainer, None));
    assert!((ours - expected).abs() < 1e-5, "{ours} {expected}");

    // It answers, with its base's tokenizer, and not as its base does.
    let ask = |model: &str| {
        let args =
            ["--mode", "receiver", "--receiver", model, "--prompt", "the answer", "--dtype", "f32", "--json"];
        let run = generate(&args);
        assert!(run.ok, "{}", run.stderr);
        serde_json::from_str::<serde_json::Value>(&run.stdout).unwrap()["tokens"].clone()
    };
    assert_ne!(ask(folder.path().to_str().unwrap()), ask(&base));
}

#[test]
fn folders_that_are_no_sound_adapter_are_named() {
    let base = model("sharer");
    let queue = queue();
    let decoder = loaded(&queue, Path::new(&base));
    let trainer = adapters(&decoder, &settings(0.0, &[LoraTarget::Q]), Recompute::None);
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("adapter_config.json");
    let weights = folder.path().join("adapter_model.safetensors");
    let fails = |word: &str| {
        let error = model::load(folder.path(), queue.backend(), &|_, _| {}).err().expect(word).to_string();
        assert!(error.contains(word), "{error}: {word}");
    };
    let edit = |key: &str, value: serde_json::Value| {
        trainer.save(folder.path(), &base).unwrap();
        let mut all: serde_json::Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        all[key] = value;
        fs::write(&config, all.to_string()).unwrap();
    };
    for (key, value) in [
        ("peft_type", "IA3".into()),
        ("use_dora", true.into()),
        ("bias", "all".into()),
        ("rank_pattern", serde_json::json!({"q_proj": 2})),
        ("base_model_name_or_path", serde_json::Value::Null),
        ("base_model_name_or_path", "nowhere/at-all".into()),
        ("r", 0.into()),
    ] {
        edit(key, value);
        fails(key);
    }
    edit("r", 4.into());
    fails("lora_");
    edit("base_model_name_or_path", folder.path().to_str().unwrap().into());
    fails("is an adapter itself");
    // Of a wider model.
    edit("base_model_name_or_path", model("receiver").into());
    fails("shape");
    trainer.save(folder.path(), &base).unwrap();
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() - 9]).unwrap();
    fails("adapter_model.safetensors");
    fs::remove_file(&weights).unwrap();
    fails("adapter_model.safetensors");
}
