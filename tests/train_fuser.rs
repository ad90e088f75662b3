//! The fuser's backward against its own forward: derivatives along random directions, for every kind, with dropout, through the
//! gates and into the receiver's columns.

use c2c::{
    backend::{Backend, Precision, Queue, Tensor, cpu::Cpu},
    fuser::{AllInOneConfig, Fuser, FuserConfig, Kind, LayerCall, Mapping, Party},
    ops::KvPages,
    rng::normal,
    train::{DrawnNoise, FuseRequest, FusedColumns, Kept, TrainedFuser, config::Decay},
};
use std::sync::Arc;

const LAYERS: usize = 2;
const TOKENS: usize = 7;
const BLOCK: usize = 4;
/// KV heads and their size.
const SOURCE: (usize, usize) = (1, 6);
const TARGET: (usize, usize) = (2, 4);

fn numbers(part: u32, len: usize) -> Vec<f32> {
    normal(11, part, len)
}

struct Fixture {
    queue: Queue,
    fuser: TrainedFuser,
    sources: Vec<KvPages>,
    /// Their contents, and what the projections are added to.
    plain: Vec<[Vec<f32>; 2]>,
    targets: Vec<KvPages>,
    outs: Vec<KvPages>,
    slots: [Tensor; 2],
    dropout: f32,
    /// The gradient of the sum that stands for a loss, by layer and half.
    douts: Vec<[Vec<f32>; 2]>,
}

fn pages(queue: &Queue, (heads, dim): (usize, usize), contents: &[Vec<f32>; 2]) -> KvPages {
    let blocks = TOKENS.div_ceil(BLOCK) + 1;
    let dims = [blocks, heads, BLOCK, dim];
    let tensor = |values: &Vec<f32>| queue.tensor(values, &dims, "pages").unwrap();
    KvPages { keys: tensor(&contents[0]), values: tensor(&contents[1]) }
}

fn contents(part: u32, (heads, dim): (usize, usize)) -> [Vec<f32>; 2] {
    let len = (TOKENS.div_ceil(BLOCK) + 1) * heads * BLOCK * dim;
    [numbers(part, len), numbers(part + 1, len)]
}

impl Fixture {
    fn new(kind: Kind, dropout: f32) -> Fixture {
        let backend: Arc<dyn Backend> = Cpu::new(2);
        let queue = Queue::new(&backend).unwrap();
        let party = |(heads, dim)| Party::new(LAYERS, heads, dim);
        let config =
            FuserConfig::new(kind, 12, 10, Mapping::LastAligned, &[0, 1], party(TARGET), party(SOURCE));
        let all_in_one = (kind == Kind::AllInOne).then(AllInOneConfig::recipe);
        let config = FuserConfig { num_layers: 4, all_in_one, ..config };
        let fuser = Fuser::init(config, 5, &backend).unwrap();
        let mut fuser = TrainedFuser::new(&fuser, &queue, Decay::All).unwrap();
        if kind.has_gates() {
            fuser
                .gates
                .iter_mut()
                .flatten()
                .zip([0.4, -0.3, 0.1, 0.7])
                .for_each(|(gate, logit)| gate.logit = logit);
        }
        let each = |part: u32, of| (0..LAYERS as u32).map(|l| contents(part + 2 * l, of)).collect::<Vec<_>>();
        let make =
            |all: &[[Vec<f32>; 2]], of| all.iter().map(|one| pages(&queue, of, one)).collect::<Vec<_>>();
        let (sources, plain) = (make(&each(100, SOURCE), SOURCE), each(200, TARGET));
        let (targets, outs) = (make(&plain, TARGET), make(&plain, TARGET));
        // Slots that leave gaps and turn around.
        let slot = |all: [u32; TOKENS]| queue.tensor(&all, &[TOKENS], "slots").unwrap();
        let slots = [slot([2, 1, 0, 5, 5, 7, 3]), slot([0, 1, 2, 3, 9, 8, 4])];
        let douts = each(300, TARGET);
        Fixture { queue, fuser, sources, plain, targets, outs, slots, dropout, douts }
    }

    fn forward(&self) -> FusedColumns {
        let calls: Vec<LayerCall> = (0..LAYERS)
            .map(|layer| LayerCall {
                layer,
                gates: [1.0; 2],
                source: &self.sources[layer],
                target: &self.targets[layer],
                base: &self.targets[layer],
                out: &self.outs[layer],
            })
            .collect();
        let request = FuseRequest {
            layers: &calls,
            source_slots: self.slots[0].clone(),
            target_slots: self.slots[1].clone(),
            precision: Precision::F32,
            dropout: self.dropout,
            seed: 9,
            step: 4,
            noise: &DrawnNoise { seed: 9, step: 4, sharer: 0 },
        };
        self.fuser.forward(&self.queue, request).unwrap()
    }

    /// `Σ dout · out` over the fused columns.
    fn loss(&self) -> f64 {
        self.forward();
        let mut sum = 0.0;
        for (out, dout) in self.outs.iter().zip(&self.douts) {
            for (tensor, dout) in [&out.keys, &out.values].into_iter().zip(dout) {
                let out = self.queue.download_f32(tensor).unwrap();
                sum += out.iter().zip(dout).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            }
        }
        sum
    }

    fn dkv(&self) -> Vec<KvPages> {
        self.douts.iter().map(|dout| pages(&self.queue, TARGET, dout)).collect()
    }
}

/// `(L(x + εd) − L(x − εd)) / 2ε` where `set(ε)` moves x to x + εd, of two steps, so that the error in ε² cancels.
fn slope(fixture: &mut Fixture, mut set: impl FnMut(&mut Fixture, f32)) -> f64 {
    const STEP: f32 = 4e-3;
    let mut central = |step: f32| {
        set(fixture, step);
        let up = fixture.loss();
        set(fixture, -step);
        let down = fixture.loss();
        set(fixture, 0.0);
        (up - down) / (2.0 * f64::from(step))
    };
    (4.0 * central(STEP / 2.0) - central(STEP)) / 3.0
}

fn close(what: &str, found: f64, expected: f64, size: f64) {
    assert!(
        (found - expected).abs() < 5e-3 * expected.abs() + 2e-3 * size,
        "{what}: {found} {expected} (of {size})"
    );
}

#[test]
fn gradients_are_the_slopes_of_the_forward_pass() {
    let kinds = [
        Kind::C2c,
        Kind::C2cC,
        Kind::Latent,
        Kind::AllInOne,
        Kind::Ablation(1),
        Kind::Ablation(3),
        Kind::Ablation(4),
    ];
    for kind in kinds {
        for dropout in [0.0, 0.3] {
            let mut f = Fixture::new(kind, dropout);
            let columns = f.forward();
            let dkv = f.dkv();
            f.fuser.backward(&f.queue.clone(), &columns, &[0, 1], |layer| dkv[layer].clone(), true).unwrap();
            f.fuser.gates_backward(&f.queue.clone(), &columns).unwrap();

            // Each tensor by itself.
            for index in 0..f.fuser.parameters.entries().len() {
                let name = f.fuser.parameters.entries()[index].name.clone();
                let view = f.fuser.parameters.view(Kept::Weights, index);
                let grad = f.queue.download_f32(&f.fuser.parameters.view(Kept::Grad, index)).unwrap();
                let start = f.queue.download_f32(&view).unwrap();
                let direction = numbers(1000 + index as u32, start.len());
                let dot = |x: &[f32]| {
                    x.iter().zip(&direction).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
                };
                let found = slope(&mut f, |f, step| {
                    let moved: Vec<f32> = start.iter().zip(&direction).map(|(x, d)| x + step * d).collect();
                    f.queue.upload(&moved, &view);
                });
                let size = grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
                close(&format!("{kind} dropout {dropout}: {name}"), found, dot(&grad), size.max(1.0));
            }
            // The gates.
            for (projector, half) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let gate = f.fuser.gates[projector][half];
                let found = slope(&mut f, |f, step| f.fuser.gates[projector][half].logit = gate.logit + step);
                if !kind.has_gates() {
                    assert_eq!((gate.grad, found), (0.0, 0.0), "{kind} has no gates");
                } else {
                    assert!(gate.grad != 0.0);
                    close(&format!("{kind}: gate {projector} {half}"), found, gate.grad.into(), 1.0);
                }
            }
            // What the projector read of the receiver, and what it added to.
            let direction = [numbers(2000, f.plain[0][0].len()), numbers(2001, f.plain[0][0].len())];
            let start = f.plain[0].clone();
            let fused = f.queue.download(&f.slots[1]).unwrap();
            let fused: Vec<u32> = fused.as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
            let (heads, dim) = TARGET;
            let mine = |i: usize| {
                let (block, offset) = (i / (heads * BLOCK * dim), i / dim % BLOCK);
                fused.contains(&((block * BLOCK + offset) as u32))
            };
            let found = slope(&mut f, |f, step| {
                let pages = f.targets[0].clone();
                for (half, tensor) in [&pages.keys, &pages.values].into_iter().enumerate() {
                    let moved = start[half].iter().zip(&direction[half]).enumerate();
                    let moved: Vec<f32> =
                        moved.map(|(i, (x, d))| if mine(i) { x + step * d } else { *x }).collect();
                    f.queue.upload(&moved, tensor);
                }
            });
            let mut expected = 0.0;
            for (tensor, direction) in [&dkv[0].keys, &dkv[0].values].into_iter().zip(&direction) {
                let grad = f.queue.download_f32(tensor).unwrap();
                let pairs = grad.iter().zip(direction).enumerate().filter(|(i, _)| mine(*i));
                expected += pairs.map(|(_, (a, b))| f64::from(*a) * f64::from(*b)).sum::<f64>();
            }
            // Without a target the projection takes its place: nothing of it is left.
            let expected = if kind == Kind::Ablation(3) { 0.0 } else { expected };
            close(&format!("{kind}: the receiver's columns"), found, expected, 10.0);
        }
    }
}

#[test]
fn dropping_depends_on_the_step_alone() {
    let f = Fixture::new(Kind::C2c, 0.5);
    let whole = Fixture::new(Kind::C2c, 0.0);
    let (first, again) = (f.loss(), f.loss());
    assert_eq!(first, again);
    assert_ne!(first, whole.loss());
}
