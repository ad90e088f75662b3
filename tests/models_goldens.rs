//! The decoder against Hugging Face transformers on tiny random models of every family, in f32.

mod goldens;

use c2c::{
    backend::{DType, DeviceChoice, Precision, Queue, open},
    cache::KvColumns,
    model::Goal,
    pipeline::{Lane, Model},
};
use goldens::{Tensors, cases, difference, find};

/// Two runs of the reference differ by this much.
const TOLERANCE: f32 = 2e-5;

struct Case {
    name: String,
    model: Model,
    outputs: Tensors,
}

impl Case {
    fn lane(&self) -> Lane {
        let backend = open(DeviceChoice::Cpu, 2).unwrap();
        // Small blocks: many boundaries.
        let kv = self.model.decoder.config.paged_kv(&backend, 12, 8, DType::F32).unwrap();
        Lane::new(self.model.decoder.clone(), Queue::new(&backend).unwrap(), kv, 64).unwrap()
    }

    /// Logits `[tokens, vocab]` of `ids` at `positions`, appended in pieces of the given sizes.
    fn logits(&self, lane: &mut Lane, ids: &[u32], positions: &[u32], pieces: &[usize]) -> Vec<f32> {
        let mut logits = Vec::new();
        let mut start = 0;
        for &piece in pieces {
            let range = start..start + piece;
            start += piece;
            lane.append_observed(
                &ids[range.clone()],
                &positions[range],
                Goal::Hidden,
                |_, _| {},
                |lane, tokens| {
                    logits.extend(lane.pass_logits(tokens)?);
                    Ok(())
                },
            )
            .unwrap();
        }
        assert_eq!(start, ids.len());
        logits
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.outputs.integers(name).iter().map(|&id| id as u32).collect()
    }

    fn check(&self, what: &str, ours: &[f32], theirs: &[f32]) {
        let difference = difference(ours, theirs);
        assert!(difference < TOLERANCE, "{}: {what} differs by {difference}", self.name);
    }

    /// Our cache `[tokens, heads, dim]` against a golden `[1, heads, tokens, dim]`.
    fn check_cache(&self, lane: &Lane, prefix: &str) {
        let mut layers = 0;
        for layer in 0..lane.kv.layers().len() {
            let name = |what: &str| format!("{prefix}.{what}.{layer}");
            if !self.outputs.has(&name("key")) {
                continue;
            }
            layers += 1;
            let shape = self.outputs.shape(&name("key"));
            let (heads, tokens, dim) = (shape[1], shape[2], shape[3]);
            let KvColumns { keys, values } = lane.read(layer, 0, tokens).unwrap();
            for (what, ours) in [("key", keys), ("value", values)] {
                if !self.outputs.has(&name(what)) {
                    continue;
                }
                let theirs = self.outputs.floats(&name(what));
                let mut turned = vec![0.0; theirs.len()];
                for (i, value) in ours.iter().enumerate() {
                    let (token, head, d) = (i / (heads * dim), i / dim % heads, i % dim);
                    turned[(head * tokens + token) * dim + d] = *value;
                }
                self.check(&name(what), &turned, &theirs);
            }
        }
        assert!(layers > 0, "{}: no {prefix} cache", self.name);
    }
}

fn each(test: impl Fn(&Case)) {
    for case in cases("models") {
        let name = case["folder"].as_str().unwrap();
        let Some(folder) = find(name) else { continue };
        let backend = open(DeviceChoice::Cpu, 2).unwrap();
        let model = Model::load(&folder, &backend, Precision::F32, &|_, _| {}).unwrap();
        let outputs = Tensors::read(&folder.join("outputs.safetensors"));
        test(&Case { name: name.into(), model, outputs });
    }
}

#[test]
fn prompt_logits_and_cache() {
    each(|case| {
        let ids = case.ids("prompt.input_ids");
        let positions: Vec<u32> = (0..ids.len() as u32).collect();
        let mut lane = case.lane();
        let logits = case.logits(&mut lane, &ids, &positions, &[ids.len()]);
        case.check("logits", &logits, &case.outputs.floats("prompt.logits"));
        case.check_cache(&lane, "prompt");
        let chunked = case.logits(&mut case.lane(), &ids, &positions, &[13, 11, 1, 1, 3]);
        case.check("chunked logits", &chunked, &case.outputs.floats("chunked.logits"));
    });
}

#[test]
fn masked_tokens_are_left_out() {
    each(|case| {
        for prefix in ["rightpad", "holes"] {
            let shape = case.outputs.shape(&format!("{prefix}.input_ids"));
            let (ids, positions) =
                (case.ids(&format!("{prefix}.input_ids")), case.ids(&format!("{prefix}.position_ids")));
            let mask = case.outputs.integers(&format!("{prefix}.attention_mask"));
            let theirs = case.outputs.floats(&format!("{prefix}.logits"));
            let vocab = theirs.len() / ids.len();
            for row in 0..shape[0] {
                let kept: Vec<usize> =
                    (row * shape[1]..(row + 1) * shape[1]).filter(|&i| mask[i] != 0).collect();
                let pick = |list: &[u32]| kept.iter().map(|&i| list[i]).collect::<Vec<u32>>();
                let ours = case.logits(&mut case.lane(), &pick(&ids), &pick(&positions), &[kept.len()]);
                let theirs: Vec<f32> =
                    kept.iter().flat_map(|&i| theirs[i * vocab..(i + 1) * vocab].to_vec()).collect();
                case.check(prefix, &ours, &theirs);
            }
        }
    });
}

#[test]
fn positions_may_start_anywhere() {
    each(|case| {
        let (ids, positions) = (case.ids("offset.input_ids"), case.ids("offset.position_ids"));
        let mut lane = case.lane();
        let logits = case.logits(&mut lane, &ids, &positions, &[ids.len()]);
        case.check("offset logits", &logits, &case.outputs.floats("offset.logits"));
        case.check_cache(&lane, "offset");
    });
}

#[test]
fn greedy_continuation() {
    each(|case| {
        let all = case.ids("greedy.sequences");
        let prompt = case.ids("prompt.input_ids");
        let positions: Vec<u32> = (0..prompt.len() as u32).collect();
        let theirs = case.outputs.floats("greedy.logits");
        let vocab = theirs.len() / (all.len() - prompt.len());
        let mut lane = case.lane();
        lane.append(&prompt, &positions, Goal::Hidden, |_, _| {}).unwrap();
        let mut logits = lane.logits().unwrap();
        for (step, &id) in all[prompt.len()..].iter().enumerate() {
            case.check(&format!("logits of step {step}"), &logits, &theirs[step * vocab..(step + 1) * vocab]);
            let best = (0..vocab).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
            assert_eq!(best as u32, id, "{}: token {step}", case.name);
            logits = lane.step(id).unwrap();
        }
    });
}
