//! Fusers that others are compared with: what is particular to each. Formulae against other implementations are in
//! `fuser_goldens.rs`, gradients in `train_fuser.rs`.

mod device;

use c2c::{
    backend::{Backend, Precision, Queue, Tensor, cpu::Cpu},
    cache::{KeyForm, KvColumns, Rotation},
    fuser::{
        FuseCall, Fuser, FuserConfig, GateOverride, Kind, LayerCall, Mapping, Party, Positions, RidgeFit,
        Rotations,
    },
    ops::KvPages,
    rng::normal,
};
use std::sync::Arc;

const BLOCK: usize = 4;

fn backend() -> Arc<dyn Backend> {
    Cpu::new(2)
}

/// Columns `[tokens, heads · dim]` in pages, token `i` in slot `i`.
fn pages(queue: &Queue, columns: &KvColumns, heads: usize, dim: usize) -> KvPages {
    let tokens = columns.keys.len() / heads / dim;
    let blocks = tokens.div_ceil(BLOCK);
    let page = |rows: &[f32]| {
        let mut page = vec![0.0; blocks * heads * BLOCK * dim];
        for (slot, row) in rows.chunks_exact(heads * dim).enumerate() {
            for (head, part) in row.chunks_exact(dim).enumerate() {
                let at = ((slot / BLOCK * heads + head) * BLOCK + slot % BLOCK) * dim;
                page[at..at + dim].copy_from_slice(part);
            }
        }
        queue.tensor(&page, &[blocks, heads, BLOCK, dim], "page").unwrap()
    };
    KvPages { keys: page(&columns.keys), values: page(&columns.values) }
}

fn read(queue: &Queue, page: &Tensor, tokens: usize) -> Vec<f32> {
    let (heads, dim) = (page.shape()[1], page.shape()[3]);
    let page = queue.download_f32(page).unwrap();
    let of = |slot: usize, head: usize| ((slot / BLOCK * heads + head) * BLOCK + slot % BLOCK) * dim;
    let rows = (0..tokens).flat_map(|slot| (0..heads).map(move |head| of(slot, head)));
    rows.flat_map(|at| page[at..at + dim].to_vec()).collect()
}

/// Runs layer 0 of `fuser`; `in_place` over the target.
fn fuse(
    fuser: &Fuser,
    queue: &Queue,
    source: &KvColumns,
    target: &KvColumns,
    positions: Positions,
    in_place: bool,
) -> [Vec<f32>; 2] {
    let (ours, theirs) = (&fuser.config().receiver, &fuser.config().sharer);
    let tokens = target.keys.len() / ours.width();
    let source = pages(queue, source, theirs.kv_heads, theirs.head_dim);
    let base = pages(queue, target, ours.kv_heads, ours.head_dim);
    let out = if in_place { base.clone() } else { pages(queue, target, ours.kv_heads, ours.head_dim) };
    let slots: Vec<u32> = (0..tokens as u32).collect();
    let slots = queue.tensor(&slots, &[tokens], "slots").unwrap();
    let need = fuser.scratch_len(queue.backend().as_ref(), 1, tokens);
    let scratch = queue.tensor(&vec![f32::NAN; need], &[need], "scratch").unwrap();
    let gates = fuser.gates_with(&GateOverride::Open).unwrap()[0];
    let layer = LayerCall { layer: 0, gates, source: &source, target: &base, base: &base, out: &out };
    let call = FuseCall {
        layers: &[layer],
        source_slots: &slots,
        target_slots: &slots,
        base_slots: &slots,
        out_slots: &slots,
        scratch: &scratch,
        precision: Precision::F32,
    };
    fuser.issue_at(queue, call, positions).unwrap();
    [&out.keys, &out.values].map(|page| read(queue, page, tokens))
}

fn columns(part: u32, tokens: usize, width: usize) -> KvColumns {
    KvColumns { keys: normal(3, part, tokens * width), values: normal(3, part + 1, tokens * width) }
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |worst, (a, b)| worst.max((a - b).abs()))
}

#[test]
fn a_latent_reads_keys_and_values_wherever_it_writes() {
    let (backend, tokens) = (backend(), 7);
    let queue = Queue::new(&backend).unwrap();
    let (receiver, sharer) = (Party::new(1, 2, 8), Party::new(1, 3, 4));
    let config = FuserConfig::new(Kind::Latent, 10, 12, Mapping::Custom, &[0], receiver, sharer);
    let fuser = Fuser::init(config, 1, &backend).unwrap();
    let (source, target) = (columns(0, tokens, 12), columns(2, tokens, 16));
    let run = |source: &KvColumns, target: &KvColumns, in_place| {
        fuse(&fuser, &queue, source, target, Positions::default(), in_place)
    };
    let plain = run(&source, &target, false);
    assert_eq!(plain, run(&source, &target, true), "writing over what it reads");
    // Both halves of what comes out depend on all four of what goes in.
    type Change = fn(&mut KvColumns, &mut KvColumns);
    let changes: [Change; 4] = [
        |source, _| source.keys[0] += 1.0,
        |source, _| source.values[0] += 1.0,
        |_, target| target.keys[0] += 1.0,
        |_, target| target.values[0] += 1.0,
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let (mut source, mut target) = (source.clone(), target.clone());
        change(&mut source, &mut target);
        let changed = run(&source, &target, false);
        for half in 0..2 {
            // Elements after the first, which is the base itself.
            assert!(changed[half][1..16] != plain[half][1..16], "input {number}, half {half}");
            assert_eq!(changed[half][16..], plain[half][16..], "other tokens");
        }
    }
}

#[test]
fn a_latent_is_a_twenty_fifth_of_a_c2c_fuser() {
    let backend = backend();
    // Qwen2.5-0.5B to Qwen3-0.6B, one layer.
    let config = |kind, width| {
        let (receiver, sharer) = (Party::new(1, 8, 128), Party::new(1, 2, 64));
        FuserConfig::new(kind, width, width, Mapping::Custom, &[0], receiver, sharer)
    };
    let bytes = |config| Fuser::init(config, 0, &backend).unwrap().bytes() as f64;
    let ratio = bytes(config(Kind::Latent, 120)) / bytes(config(Kind::C2c, 1024));
    assert!((0.038..0.04).contains(&ratio), "{ratio}");
}

/// A model whose keys are rotated.
fn rotated(dim: usize, theta: f32, scale: f32) -> KeyForm {
    let inv_freq = (0..dim / 2).map(|i| theta.powf(-2.0 * i as f32 / dim as f32)).collect();
    KeyForm::PostRope(vec![Rotation { inv_freq, scale }])
}

fn turned(mut keys: Vec<f32>, width: usize, dim: usize, form: &KeyForm, positions: &[u32]) -> Vec<f32> {
    let rotation = form.rotation(0).unwrap();
    for (row, &position) in keys.chunks_exact_mut(width).zip(positions) {
        row.chunks_exact_mut(dim).for_each(|head| rotation.apply(head, position));
    }
    keys
}

struct Known {
    config: FuserConfig,
    /// Of keys and values: `[outputs, inputs]`, `[outputs]`.
    maps: [(Vec<f32>, Vec<f32>); 2],
}

const THEIRS: (usize, usize) = (2, 6);
const OURS: (usize, usize) = (3, 4);

impl Known {
    fn new() -> Known {
        let (receiver, sharer) = (Party::new(1, OURS.0, OURS.1), Party::new(1, THEIRS.0, THEIRS.1));
        let rotations =
            Rotations { receiver: rotated(OURS.1, 1e4, 1.0), sharer: rotated(THEIRS.1, 1e6, 1.25) };
        let config = FuserConfig {
            rotations: Some(rotations),
            ..FuserConfig::new(Kind::Ridge, 1, 1, Mapping::Custom, &[0], receiver, sharer)
        };
        let map = |part: u32| (normal(5, part, 12 * 12), normal(5, part + 1, 12));
        Known { config, maps: [map(0), map(2)] }
    }

    /// Columns of the sharer, the receiver's that the maps make of them, and where both sit.
    fn pairs(&self, part: u32, tokens: usize) -> (KvColumns, KvColumns, Vec<u32>, Vec<u32>) {
        let plain = columns(part, tokens, 12);
        let map = |x: &[f32], (weight, bias): &(Vec<f32>, Vec<f32>)| -> Vec<f32> {
            let row = |x: &[f32], o: usize| {
                bias[o] + x.iter().zip(&weight[o * 12..]).map(|(x, w)| x * w).sum::<f32>()
            };
            x.chunks_exact(12).flat_map(|x| (0..12).map(move |o| row(x, o))).collect()
        };
        let theirs: Vec<u32> = (0..tokens as u32).map(|t| 3 + 2 * t).collect();
        let ours: Vec<u32> = (0..tokens as u32).collect();
        let rotations = self.config.rotations.as_ref().unwrap();
        let target = KvColumns {
            keys: turned(map(&plain.keys, &self.maps[0]), 12, OURS.1, &rotations.receiver, &ours),
            values: map(&plain.values, &self.maps[1]),
        };
        let source = KvColumns {
            keys: turned(plain.keys.clone(), 12, THEIRS.1, &rotations.sharer, &theirs),
            values: plain.values,
        };
        (source, target, theirs, ours)
    }
}

#[test]
fn a_ridge_fit_finds_a_known_map_under_the_rotations() {
    let (backend, known) = (backend(), Known::new());
    let queue = Queue::new(&backend).unwrap();
    let mut fit = RidgeFit::new(known.config.clone()).unwrap();
    for part in [10, 20, 30] {
        let (source, target, theirs, ours) = known.pairs(part, 40);
        fit.add(0, source, target, Positions { source: &theirs, target: &ours });
    }
    let (fuser, explained) = fit.solve(1e-9, &backend).unwrap();
    assert!(explained[0].iter().all(|part| (part - 1.0).abs() < 1e-5), "{explained:?}");
    for (half, (weight, bias)) in ["key", "value"].iter().zip(&known.maps) {
        let found = |what: &str| {
            queue.download_f32(&fuser.projectors()[0].tensors()[&format!("{half}_map.{what}")]).unwrap()
        };
        assert!(difference(&found("weight"), weight) < 2e-3, "{half} weight");
        assert!(difference(&found("bias"), bias) < 2e-3, "{half} bias");
    }
    // New columns at other positions: exactly what the receiver itself has there, whatever it had before.
    let (source, expected, theirs, ours) = known.pairs(40, 9);
    let (theirs, ours): (Vec<u32>, Vec<u32>) = (theirs, ours);
    let before = columns(50, 9, 12);
    let positions = Positions { source: &theirs, target: &ours };
    for in_place in [false, true] {
        let out = fuse(&fuser, &queue, &source, &before, positions, in_place);
        assert!(difference(&out[0], &expected.keys) < 2e-2, "keys");
        assert!(difference(&out[1], &expected.values) < 2e-2, "values");
    }
    // Saved and read again it is the same.
    let folder = tempfile::tempdir().unwrap();
    fuser.save(folder.path(), &queue).unwrap();
    let again = Fuser::load(folder.path(), &backend).unwrap();
    assert_eq!(again.config(), fuser.config());
    assert_eq!(
        fuse(&again, &queue, &source, &before, positions, false),
        fuse(&fuser, &queue, &source, &before, positions, false)
    );
}

#[test]
fn a_large_ridge_holds_the_map_back_but_not_its_bias() {
    let (backend, known) = (backend(), Known::new());
    let queue = Queue::new(&backend).unwrap();
    let mut fit = RidgeFit::new(known.config.clone()).unwrap();
    let (source, target, theirs, ours) = known.pairs(10, 60);
    let mean: Vec<f32> =
        (0..12).map(|o| target.values.iter().skip(o).step_by(12).sum::<f32>() / 60.0).collect();
    fit.add(0, source, target, Positions { source: &theirs, target: &ours });
    let (fuser, explained) = fit.solve(1e9, &backend).unwrap();
    let tensors = fuser.projectors()[0].tensors();
    let weight = queue.download_f32(&tensors["value_map.weight"]).unwrap();
    assert!(weight.iter().all(|w| w.abs() < 1e-6));
    assert!(difference(&queue.download_f32(&tensors["value_map.bias"]).unwrap(), &mean) < 1e-4);
    assert!(explained[0].iter().all(|part| part.abs() < 1e-6), "{explained:?}");
}

#[test]
fn what_a_ridge_map_cannot_do_is_said() {
    let (backend, known) = (backend(), Known::new());
    let queue = Queue::new(&backend).unwrap();
    let mut fit = RidgeFit::new(known.config.clone()).unwrap();
    let error = fit.solve(0.01, &backend).err().unwrap().to_string();
    assert!(error.contains("0 pairs"), "{error}");
    let (source, target, theirs, ours) = known.pairs(10, 5);
    fit.add(0, source.clone(), target.clone(), Positions { source: &theirs, target: &ours });
    let error = fit.solve(0.0, &backend).err().unwrap().to_string();
    assert!(error.contains("5 pairs"), "{error}");
    let (fuser, _) = fit.solve(0.01, &backend).unwrap();

    // Without positions there is nothing to rotate by.
    let pages = (pages(&queue, &source, 2, 6), pages(&queue, &target, 3, 4));
    let slots = queue.tensor(&[0u32, 1], &[2], "slots").unwrap();
    let scratch = queue.tensor(&[0.0f32], &[1], "scratch").unwrap();
    let layer = LayerCall {
        layer: 0,
        gates: [1.0; 2],
        source: &pages.0,
        target: &pages.1,
        base: &pages.1,
        out: &pages.1,
    };
    let call = FuseCall {
        layers: &[layer],
        source_slots: &slots,
        target_slots: &slots,
        base_slots: &slots,
        out_slots: &slots,
        scratch: &scratch,
        precision: Precision::F32,
    };
    let error = fuser.issue(&queue, call).unwrap_err().to_string();
    assert!(error.contains("positions"), "{error}");

    let c2c = FuserConfig { kind: Kind::C2c, rotations: None, ..known.config.clone() };
    assert!(RidgeFit::new(c2c).err().unwrap().to_string().contains("c2c"));
    let bare = FuserConfig { rotations: None, ..known.config.clone() };
    assert!(bare.validate().unwrap_err().to_string().contains("rotations"));
}

#[test]
fn a_gpu_refuses_what_it_has_no_kernels_for() {
    let Some(gpu) = device::gpu() else { return };
    let (receiver, sharer) = (Party::new(1, 2, 8), Party::new(1, 2, 8));
    let latent = FuserConfig::new(Kind::Latent, 10, 12, Mapping::Custom, &[0], receiver, sharer);
    for config in [latent, Known::new().config] {
        let kind = config.kind.to_string();
        let cpu = Fuser::init(config.clone(), 0, &backend()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        cpu.save(folder.path(), &Queue::new(&backend()).unwrap()).unwrap();
        for refused in [Fuser::init(config, 0, &gpu.backend), Fuser::load(folder.path(), &gpu.backend)] {
            let error = refused.err().expect("refused").to_string();
            assert!(error.contains(&kind) && error.contains("cuda"), "{error}");
        }
    }
}
