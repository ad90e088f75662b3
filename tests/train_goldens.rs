//! Training of a fuser against the published program on tiny models: losses, every gradient, AdamW, a loop of micro-batches.

mod goldens;

use c2c::{
    align::Section,
    backend::{Backend, DType, Precision, Queue, cpu::Cpu},
    fuser::{Fuser, FusionMode},
    model::{self, Decoder},
    ops::IGNORED,
    pipeline::{Prompt, SharerPrompt},
    train::{Adamw, GateNoise, Kept, PairTrainer, Recompute, Run, Sample, TrainedFuser, config::Decay},
};
use goldens::{Tensors, cases, difference, find, json};
use serde_json::Value;
use std::{path::Path, sync::Arc};

/// A collated batch as the published program makes it.
struct Batch {
    samples: Vec<Sample>,
    /// Uniform numbers of the gates, `[rows, kv_heads, tokens]`, in the order they were drawn.
    noise: Vec<Vec<f32>>,
    /// For each fused token its section, its row, and its column in the padded section.
    places: Vec<(usize, usize, usize)>,
    /// Of the sections that are fused.
    widths: Vec<usize>,
    rows: usize,
}

impl Batch {
    /// `response`: the last section is fused too.
    fn read(golden: &Tensors, batch: &str, noise: &str, response: bool) -> Batch {
        let name = |tensor: &str| format!("{batch}.{tensor}");
        let shape = golden.shape(&name("input_ids"));
        let (rows, width) = (shape[0], shape[1]);
        let section = golden.shape(&name("kv_cache_index.0"))[1];
        let (ids, positions) = (golden.integers(&name("input_ids")), golden.integers(&name("position_ids")));
        let (labels, mask) = (golden.integers(&name("labels")), golden.floats(&name("attention_mask")));
        let (mut samples, mut places) = (Vec::new(), Vec::new());
        for row in 0..rows {
            let kept: Vec<usize> = (0..width).filter(|t| mask[row * width + t] != 0.0).collect();
            let at =
                |values: &[i64]| kept.iter().map(|t| values[row * width + t] as u32).collect::<Vec<u32>>();
            let fused = kept.iter().filter(|&&t| t < section).count();
            places.extend(kept[..fused].iter().map(|&t| (0, row, t)));
            if response {
                places.extend(kept[fused..].iter().map(|&t| (1, row, t - section)));
            }
            // Shifted inside the last section.
            let next = |t: usize| match labels.get(row * width + t + 1) {
                Some(&label) if t >= section && t + 1 < width && label >= 0 => label as u32,
                _ => IGNORED,
            };
            let columns = (0..kept.len()).map(|t| (t < fused).then_some(t as u32)).collect();
            let (ids, positions) = (at(&ids), at(&positions));
            let sharer =
                SharerPrompt { ids: ids[..fused].to_vec(), positions: positions[..fused].to_vec(), columns };
            let sections =
                [(fused, 1), (kept.len() - fused, 0)].map(|(len, sharer_mask)| Section { len, sharer_mask });
            let sample = Sample {
                labels: kept.iter().map(|&t| next(t)).collect(),
                prompt: Prompt { ids, positions, sharers: vec![sharer], sections: sections.to_vec() },
                origin: format!("row {row}"),
            };
            samples.push(if response { sample.including_response().unwrap() } else { sample });
        }
        let noise = (0..).map(|i| format!("{noise}gumbel_u.{i:02}")).take_while(|name| golden.has(name));
        let noise = noise.map(|name| golden.floats(&name)).collect();
        let widths = if response { vec![section, width - section] } else { vec![section] };
        Batch { samples, noise, places, widths, rows }
    }
}

impl GateNoise for Batch {
    fn fill(&self, layer: usize, half: usize, out: &mut [f32]) {
        // All layers of one section, then all of the next.
        let layers = self.noise.len() / 2 / self.widths.len();
        let heads = self.noise[0].len() / self.rows / self.widths[0];
        for (&(section, row, token), out) in self.places.iter().zip(out.chunks_exact_mut(heads)) {
            let drawn = &self.noise[2 * (section * layers + layer) + half];
            for (head, u) in out.iter_mut().enumerate() {
                *u = drawn[(row * heads + head) * self.widths[section] + token];
            }
        }
    }
}

struct Case {
    trainer: PairTrainer,
    golden: Tensors,
}

fn open(case: &Value, recompute: Recompute) -> Option<Case> {
    let golden = Tensors::read(&find(case["file"].as_str().unwrap())?);
    let backend: Arc<dyn Backend> = Cpu::new(2);
    let queue = Queue::new(&backend).unwrap();
    let decoder = |path: &Path| {
        Arc::new(Decoder::new(model::load(path, &backend, &|_, _| {}).unwrap(), Precision::F32))
    };
    let receiver = decoder(&find(case["receiver"].as_str().unwrap())?);
    let sharer = decoder(&find(case["sharer"].as_str().unwrap())?);
    let fuser = Fuser::load(&find(case["fuser"].as_str().unwrap())?, &backend).unwrap();
    let fuser = TrainedFuser::new(&fuser, &queue, Decay::All).unwrap();
    let mode = FusionMode::Sequential;
    let mut trainer =
        PairTrainer::new(queue, receiver, vec![sharer], vec![fuser], mode, DType::F32, recompute, 0.0, 0)
            .unwrap();
    trainer.include_response = case["include_response"] == true;
    Some(Case { trainer, golden })
}

fn published(kind: &str) -> Vec<Value> {
    let cases = cases("train").into_iter();
    cases.filter(|case| case["kind"] == kind).collect()
}

/// Compares every tensor and gate of the fuser with the golden's `prefix`, as far as it has them.
fn compare(case: &Case, prefix: &str, kept: Kept, tolerance: f32) {
    let fuser = &case.trainer.fusers[0];
    let mut compared = 0;
    for (i, entry) in fuser.parameters.entries().iter().enumerate() {
        let name = format!("{prefix}.{}", entry.name);
        if case.golden.has(&name) {
            let ours = case.trainer.queue.download_f32(&fuser.parameters.view(kept, i)).unwrap();
            let theirs = case.golden.floats(&name);
            let largest = theirs.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let difference = difference(&ours, &theirs);
            assert!(difference <= tolerance * largest.max(1e-2), "{name}: {difference} of {largest}");
            compared += 1;
        }
    }
    for (i, gates) in fuser.gates.iter().enumerate() {
        for (gate, half) in gates.iter().zip(["key", "value"]) {
            let name = format!("{prefix}.projector_{i}.{half}_gate_logit");
            if case.golden.has(&name) {
                let (ours, theirs) =
                    (if kept == Kept::Grad { gate.grad } else { gate.logit }, case.golden.floats(&name)[0]);
                assert!(
                    (ours - theirs).abs() <= tolerance * theirs.abs().max(1e-2),
                    "{name}: {ours} {theirs}"
                );
                compared += 1;
            }
        }
    }
    assert!(compared > 0, "nothing to compare under {prefix}");
}

const ADAMW: Adamw = Adamw { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01 };

#[test]
fn one_step_has_the_published_loss_gradients_and_update() {
    for case in published("one_step") {
        for recompute in [Recompute::None, Recompute::Layers] {
            let response = case["include_response"] == true;
            let Some(mut case) = open(&case, recompute) else { return };
            let batch = Batch::read(&case.golden, "batch", "", response);
            case.trainer.fusers[0].temperature = case.golden.floats("temperature")[0];
            let samples: Vec<&Sample> = batch.samples.iter().collect();

            if let Some(expected) = json("train/eval_loss.json").filter(|_| !response) {
                let measured = case.trainer.run(&samples, Run::Measure).unwrap();
                let expected = expected["loss_hard_gates_dropout_off"].as_f64().unwrap();
                assert!((measured.loss - expected).abs() < 2e-5, "{} {expected}", measured.loss);
            }
            let run = Run::Learn { noise: &[&batch], step: 1, scale: 1.0 };
            let report = case.trainer.run(&samples, run).unwrap();
            let loss = f64::from(case.golden.floats("loss")[0]);
            assert!((report.loss - loss).abs() < 2e-5, "loss {} {loss}", report.loss);
            compare(&case, "grad", Kept::Grad, 2e-4);

            // The golden of a fused response has loss and gradients.
            if !case.golden.has("grad_norm_before_clip") {
                continue;
            }
            let fuser = &mut case.trainer.fusers[0];
            let queue = case.trainer.queue.clone();
            let norm = fuser.grad_norm(&queue).unwrap();
            let expected = f64::from(case.golden.floats("grad_norm_before_clip")[0]);
            assert!((norm / expected - 1.0).abs() < 1e-4, "norm {norm} {expected}");
            fuser.update(&queue, &ADAMW, 1, 1e-4, (1.0 / (norm + 1e-6)) as f32).unwrap();
            // The first step is the sign of the gradient: where that is near 0, so is nothing else sure.
            compare(&case, "after_adamw", Kept::Weights, 2e-3);
            assert_eq!(case.trainer.fusers[0].grad_norm(&queue).unwrap(), 0.0, "gradients are taken");
        }
    }
}

#[test]
fn a_loop_of_micro_batches_ends_where_the_published_one_does() {
    for case in published("loop") {
        let Some(mut case) = open(&case, Recompute::None) else { return };
        let Some(history) = json("train/loop_history.json") else { return };
        let number = |text: &str| text.parse::<f64>().unwrap();
        let metadata = case.golden.metadata();
        let (micro, accumulate) = (number(&metadata["micro"]) as usize, number(&metadata["accum"]) as usize);
        let mut updates = history.as_array().unwrap().iter().enumerate();
        let queue = case.trainer.queue.clone();
        let mut losses = Vec::new();
        for k in 0..micro {
            let prefix = format!("micro{k}");
            let batch = Batch::read(&case.golden, &prefix, &format!("{prefix}."), false);
            let samples: Vec<&Sample> = batch.samples.iter().collect();
            let scale = 1.0 / accumulate as f32;
            losses.push(
                case.trainer
                    .run(&samples, Run::Learn { noise: &[&batch], step: k as u32, scale })
                    .unwrap()
                    .loss,
            );
            if (k + 1) % accumulate != 0 && k + 1 < micro {
                continue;
            }
            let (index, update) = updates.next().unwrap();
            let fuser = &mut case.trainer.fusers[0];
            for (ours, theirs) in losses.drain(..).zip(update["losses"].as_array().unwrap()) {
                let theirs = theirs.as_f64().unwrap();
                assert!((ours - theirs).abs() < 1e-3, "micro-batch {k}: loss {ours} {theirs}");
            }
            let norm = fuser.grad_norm(&queue).unwrap();
            let expected = update["grad_norm"].as_f64().unwrap();
            assert!((norm / expected - 1.0).abs() < 2e-3, "update {index}: norm {norm} {expected}");
            let clip = (number(&metadata["max_grad_norm"]) / (norm + 1e-6)).min(1.0) as f32;
            let lr = update["lr_used"].as_f64().unwrap() as f32;
            fuser.update(&queue, &ADAMW, index as u64 + 1, lr, clip).unwrap();
            fuser.temperature = update["temperature_after"].as_f64().unwrap() as f32;
            if index + 1 == 2 {
                compare(&case, "after_step2", Kept::Weights, 2e-3);
            }
        }
        assert!(updates.next().is_none(), "all updates were made");
        compare(&case, "final", Kept::Weights, 2e-2);
    }
}
