//! The op `fuse` against the formulae in f64, for every kind of fuser, and what gates, slots and several sharers do.

use c2c::{
    backend::{
        Backend, Precision, Queue, Tensor,
        cpu::{Cpu, Schedule, Simd},
    },
    fuser::{FuseCall, Fuser, FuserConfig, GateOverride, Kind, LayerCall, LayerProjector, Mapping, Party},
    ops::KvPages,
    rng::{Purpose, Rng, Stream},
};
use std::sync::Arc;

const BLOCK: usize = 8;

/// `[source heads, source dim, target heads, target dim]`
type Dims = [usize; 4];

fn config(kind: Kind, [sh, sd, th, td]: Dims) -> FuserConfig {
    let (receiver, sharer) = (Party::new(2, th, td), Party::new(3, sh, sd));
    let config = FuserConfig::new(kind, 20, 28, Mapping::LastAligned, &[1, 2], receiver, sharer);
    FuserConfig { num_layers: 4, ..config }
}

fn noise(part: u32, len: usize) -> Vec<f32> {
    let mut x = vec![0.0; len];
    Rng::new(7, Stream::new(Purpose::Shuffle, part), 0).fill_uniform(0, &mut x);
    // Some values far out, as caches have them.
    x.iter_mut().enumerate().for_each(|(i, x)| *x = (2.0 * *x - 1.0) * if i % 97 == 5 { 60.0 } else { 1.0 });
    x
}

/// Pages with `tokens` columns, in scattered slots, NaN everywhere else.
struct Columns {
    pages: KvPages,
    slots: Tensor,
    order: Vec<usize>,
    heads: usize,
    dim: usize,
}

impl Columns {
    fn new(queue: &Queue, tokens: usize, heads: usize, dim: usize, data: [&[f32]; 2]) -> Columns {
        let blocks = tokens.div_ceil(BLOCK) + 1;
        let slots = blocks * BLOCK;
        // Backwards in steps of 3, which visits each slot once where 3 does not divide them; else in order.
        let scattered = |i| (3 * slots - 3 * i - 1) % slots;
        let order: Vec<usize> =
            (0..tokens).map(|i| if slots.is_multiple_of(3) { i } else { scattered(i) }).collect();
        let width = heads * dim;
        let page = |data: &[f32]| {
            let mut page = vec![f32::NAN; blocks * BLOCK * width];
            for (row, &slot) in data.chunks_exact(width).zip(&order) {
                for (head, part) in row.chunks_exact(dim).enumerate() {
                    let at = ((slot / BLOCK * heads + head) * BLOCK + slot % BLOCK) * dim;
                    page[at..at + dim].copy_from_slice(part);
                }
            }
            queue.tensor(&page, &[blocks, heads, BLOCK, dim], "page").unwrap()
        };
        let pages = KvPages { keys: page(data[0]), values: page(data[1]) };
        let slots: Vec<u32> = order.iter().map(|&slot| slot as u32).collect();
        let slots = queue.tensor(&slots, &[tokens], "slots").unwrap();
        Columns { pages, slots, order, heads, dim }
    }

    /// Keys and values `[tokens, width]`; every other slot is still NaN.
    fn read(&self, queue: &Queue) -> [Vec<f32>; 2] {
        [&self.pages.keys, &self.pages.values].map(|page| {
            let mut page = queue.download_f32(page).unwrap();
            let mut rows = Vec::new();
            for &slot in &self.order {
                for head in 0..self.heads {
                    let at = ((slot / BLOCK * self.heads + head) * BLOCK + slot % BLOCK) * self.dim;
                    rows.extend_from_slice(&page[at..at + self.dim]);
                    page[at..at + self.dim].fill(f32::NAN);
                }
            }
            assert!(page.iter().all(|x| x.is_nan()), "slots of nobody's were written");
            rows
        })
    }
}

/// `(x · Wᵀ + b)` in f64; `b` empty for none.
fn linear(x: &[f64], w: &[f32], b: &[f32]) -> Vec<f64> {
    let dot = |row: &[f32]| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>();
    let bias = |i: usize| b.get(i).map_or(0.0, |b| f64::from(*b));
    w.chunks_exact(x.len()).enumerate().map(|(i, row)| dot(row) + bias(i)).collect()
}

fn erf(x: f64) -> f64 {
    // Series and continued fraction, both to f64's precision where they are used.
    if x.abs() < 2.5 {
        let (mut term, mut sum) = (x, x);
        for n in 1..80 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return sum * 2.0 / std::f64::consts::PI.sqrt();
    }
    let mut fraction = 0.0;
    for n in (1..60).rev() {
        fraction = f64::from(n) / 2.0 / (x.abs() + fraction);
    }
    let tail = (-x * x).exp() / std::f64::consts::PI.sqrt() / (x.abs() + fraction);
    (1.0 - tail).copysign(x)
}

struct Reference<'a> {
    queue: &'a Queue,
    projector: &'a LayerProjector,
    half: &'a str,
    kind: Kind,
}

impl Reference<'_> {
    fn tensor(&self, name: &str) -> Vec<f32> {
        let tensor = &self.projector.tensors()[&format!("{}_{name}", self.half)];
        self.queue.download_f32(tensor).unwrap()
    }

    fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        linear(x, &self.tensor(&format!("{name}.weight")), &self.tensor(&format!("{name}.bias")))
    }

    fn ffn(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let norm = self.tensor(&format!("{name}.norm.weight"));
        let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + 1e-6).sqrt();
        let normed: Vec<f64> = x.iter().zip(norm).map(|(x, w)| x * scale * f64::from(w)).collect();
        let inner = linear(&normed, &self.tensor(&format!("{name}.w1.weight")), &[]);
        let inner: Vec<f64> =
            inner.iter().map(|x| 0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))).collect();
        let out = linear(&inner, &self.tensor(&format!("{name}.w2.weight")), &[]);
        x.iter().zip(out).map(|(x, y)| x + y).collect()
    }

    /// What is added to one column, and whether it replaces it.
    fn column(&self, source: &[f32], target: &[f32], heads: usize, gate: f64) -> Vec<f64> {
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
        let mut input = wide(source);
        if self.kind.has_source_stage() {
            let staged = self.ffn("source_mlp.blocks.0", &self.linear("source_in", &input));
            input = self.linear("source_out", &staged);
        }
        if self.kind.has_target() {
            input.extend(wide(target));
        }
        let z = self.ffn("mlp1.blocks.0", &self.linear("in", &input));
        let weights = self.kind.has_scalar().then(|| {
            let logits = self.linear("scalar_head", &self.ffn("scalar_mlp2.blocks.0", &z));
            logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect::<Vec<f64>>()
        });
        let z = (0..2).fold(z, |z, block| self.ffn(&format!("proj_mlp2.blocks.{block}"), &z));
        let p = self.linear("proj_out", &z);
        let dim = p.len() / heads;
        let weight = |i: usize| weights.as_ref().map_or(1.0, |w| w[i / dim]);
        let kept = if self.kind.has_target() { 1.0 } else { 1.0 - gate };
        p.iter()
            .zip(target)
            .enumerate()
            .map(|(i, (p, t))| kept * f64::from(*t) + gate * weight(i) * p)
            .collect()
    }
}

struct Case {
    backend: Arc<dyn Backend>,
    queue: Queue,
    fuser: Fuser,
    tokens: usize,
    dims: Dims,
    source: [Vec<f32>; 2],
    target: [Vec<f32>; 2],
}

impl Case {
    fn new(kind: Kind, dims: Dims, tokens: usize, simd: Simd) -> Case {
        let backend: Arc<dyn Backend> = Cpu::with(2, simd, Schedule::Steady);
        let fuser = Fuser::init(config(kind, dims), 3, &backend).unwrap();
        let [sh, sd, th, td] = dims;
        Case {
            queue: Queue::new(&backend).unwrap(),
            backend,
            fuser,
            tokens,
            dims,
            source: [0, 1].map(|part| noise(part, tokens * sh * sd)),
            target: [2, 3].map(|part| noise(part, tokens * th * td)),
        }
    }

    fn source(&self) -> Columns {
        let [heads, dim, ..] = self.dims;
        Columns::new(&self.queue, self.tokens, heads, dim, [&self.source[0], &self.source[1]])
    }

    fn target(&self) -> Columns {
        let [.., heads, dim] = self.dims;
        Columns::new(&self.queue, self.tokens, heads, dim, [&self.target[0], &self.target[1]])
    }

    fn scratch(&self) -> Tensor {
        let len = self.fuser.scratch_len(self.queue.backend().as_ref(), 1, self.tokens);
        self.queue.tensor(&vec![f32::NAN; len], &[len], "scratch").unwrap()
    }

    /// Fuses layer 1 from `target` into `out`.
    fn run(&self, gates: [f32; 2], source: &Columns, target: &Columns, out: &Columns, scratch: &Tensor) {
        self.add(gates, source, target, target, out, scratch)
    }

    /// As `run`, added to `base`.
    fn add(
        &self,
        gates: [f32; 2],
        source: &Columns,
        target: &Columns,
        base: &Columns,
        out: &Columns,
        scratch: &Tensor,
    ) {
        let layer = LayerCall {
            layer: 1,
            gates,
            source: &source.pages,
            target: &target.pages,
            base: &base.pages,
            out: &out.pages,
        };
        let call = FuseCall {
            layers: &[layer],
            source_slots: &source.slots,
            target_slots: &target.slots,
            base_slots: &base.slots,
            out_slots: &out.slots,
            scratch,
            precision: Precision::F32,
        };
        self.fuser.issue(&self.queue, call).unwrap();
    }
}

#[test]
fn every_kind_agrees_with_its_formulae() {
    let kinds = (0..=4).map(Kind::Ablation).chain([Kind::C2c, Kind::C2cC]);
    for kind in kinds {
        for (dims, tokens, simd) in [
            ([1, 4, 2, 6], 1, Simd::Portable),
            ([3, 10, 2, 8], 7, Simd::Avx2),
            ([2, 32, 5, 6], 54, Simd::Avx512),
            // More than are worked on at once.
            ([1, 4, 2, 4], 521, Simd::Avx512),
        ] {
            let case = Case::new(kind, dims, tokens, simd);
            let gates = if kind.has_gates() { [1.0, 0.25] } else { [1.0, 1.0] };
            let (source, target) = (case.source(), case.target());
            case.run(gates, &source, &target, &target, &case.scratch());
            let out = target.read(&case.queue);
            let (source_width, target_width) = (dims[0] * dims[1], dims[2] * dims[3]);
            for (half, name) in [(0, "key"), (1, "value")] {
                let projector = &case.fuser.projectors()[1];
                let reference = Reference { queue: &case.queue, projector, half: name, kind };
                let columns = case.source[half]
                    .chunks_exact(source_width)
                    .zip(case.target[half].chunks_exact(target_width));
                for ((s, t), ours) in columns.zip(out[half].chunks_exact(target_width)) {
                    let exact = reference.column(s, t, dims[2], f64::from(gates[half]));
                    for (i, (ours, exact)) in ours.iter().zip(exact).enumerate() {
                        let error = (f64::from(*ours) - exact).abs();
                        assert!(
                            error < 1e-5 * exact.abs().max(4.0),
                            "{kind} {name}[{i}]: {ours} for {exact}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_closed_gate_computes_nothing() {
    let case = Case::new(Kind::C2c, [2, 4, 2, 6], 7, Simd::Avx512);
    let untouched = |tensor: &Tensor| case.queue.download_f32(tensor).unwrap().iter().all(|x| x.is_nan());
    // Even a source full of NaN can't do harm.
    let nan = vec![f32::NAN; case.tokens * 8];
    let source = Columns::new(&case.queue, case.tokens, 2, 4, [&nan, &nan]);
    let (target, scratch) = (case.target(), case.scratch());
    case.run([0.0, 0.0], &source, &target, &target, &scratch);
    assert_eq!(target.read(&case.queue), case.target);
    assert!(untouched(&scratch));
    // Elsewhere: copied, bit for bit.
    let nan = vec![f32::NAN; case.tokens * 12];
    let out = Columns::new(&case.queue, case.tokens, 2, 6, [&nan, &nan]);
    case.run([0.0, 0.0], &source, &target, &out, &scratch);
    assert_eq!(out.read(&case.queue), case.target);
    assert!(untouched(&scratch));
    // One open: the other half is still as it was.
    let source = case.source();
    case.run([0.0, 1.0], &source, &target, &target, &scratch);
    let [keys, values] = target.read(&case.queue);
    assert_eq!(keys, case.target[0]);
    assert_ne!(values, case.target[1]);
    assert!(!untouched(&scratch));
}

/// The second of two parallel sharers reads the plain target, and adds to what the first left.
#[test]
fn parallel_sharers_add_up() {
    let case = Case::new(Kind::C2c, [2, 4, 2, 6], 7, Simd::Avx512);
    let (source, plain, out, scratch) = (case.source(), case.target(), case.target(), case.scratch());
    case.run([1.0, 1.0], &source, &plain, &out, &scratch);
    let [one, two] = [out.read(&case.queue), {
        case.add([1.0, 1.0], &source, &plain, &out, &out, &scratch);
        out.read(&case.queue)
    }];
    for half in 0..2 {
        for ((one, two), target) in one[half].iter().zip(&two[half]).zip(&case.target[half]) {
            let expected = target + 2.0 * (one - target);
            assert!((two - expected).abs() < 1e-5 * expected.abs().max(4.0), "{two} for {expected}");
        }
        assert_ne!(one[half], case.target[half]);
    }
}

#[test]
fn an_untrained_fuser_changes_nothing_until_opened() {
    let case = Case::new(Kind::C2cC, [2, 4, 2, 6], 5, Simd::Avx512);
    assert_eq!(case.fuser.gates(), [[0.0; 2]; 2]);
    let open = case.fuser.gates_with(&GateOverride::Open).unwrap();
    assert_eq!(open, [[1.0; 2]; 2]);
    let (source, target, scratch) = (case.source(), case.target(), case.scratch());
    case.run(case.fuser.gates()[1], &source, &target, &target, &scratch);
    assert_eq!(target.read(&case.queue), case.target);
    case.run(open[1], &source, &target, &target, &scratch);
    assert_ne!(target.read(&case.queue), case.target);
    let other = Fuser::init(config(Kind::C2cC, case.dims), 3, &case.backend).unwrap();
    let seeded = Fuser::init(config(Kind::C2cC, case.dims), 4, &case.backend).unwrap();
    let print = |fuser: &Fuser| fuser.fingerprint(&case.queue).unwrap();
    assert_eq!(print(&case.fuser), print(&other));
    assert_ne!(print(&case.fuser), print(&seeded));
    // U(±1/√fan_in): within the bound, and filling it.
    let weight = &case.fuser.projectors()[0].tensors()["key_mlp1.blocks.0.w2.weight"];
    let weight = case.queue.download_f32(weight).unwrap();
    let bound = 1.0 / 28f32.sqrt();
    let largest = weight.iter().fold(0.0f32, |a, b| a.max(b.abs()));
    assert!(largest <= bound && largest > 0.97 * bound, "{largest} of {bound}");
}

#[test]
fn columns_meet_in_any_order_of_slots() {
    // The same columns in other slots and pages give the same bits.
    let case = Case::new(Kind::C2c, [3, 10, 2, 8], 23, Simd::Avx512);
    let (source, target) = (case.source(), case.target());
    let nan = vec![f32::NAN; 40 * 16];
    let out = Columns::new(&case.queue, 40, 2, 8, [&nan, &nan]);
    let slots: Vec<u32> = (0..case.tokens as u32).map(|i| (i * 7 + 2) % 40).collect();
    let out = Columns {
        slots: case.queue.tensor(&slots, &[slots.len()], "slots").unwrap(),
        order: slots.iter().map(|&slot| slot as usize).collect(),
        ..out
    };
    case.run([1.0, 1.0], &source, &target, &out, &case.scratch());
    case.run([1.0, 1.0], &source, &target, &target, &case.scratch());
    assert_eq!(out.read(&case.queue), target.read(&case.queue));
}

#[test]
fn operands_that_do_not_fit_are_named() {
    let case = Case::new(Kind::C2c, [2, 4, 2, 6], 5, Simd::Avx512);
    let (source, target, scratch) = (case.source(), case.target(), case.scratch());
    let small = scratch.narrow(0, 10).unwrap();
    let fits = LayerCall {
        layer: 0,
        gates: [1.0; 2],
        source: &source.pages,
        target: &target.pages,
        base: &target.pages,
        out: &target.pages,
    };
    let call = FuseCall {
        layers: &[],
        source_slots: &source.slots,
        target_slots: &target.slots,
        base_slots: &target.slots,
        out_slots: &target.slots,
        scratch: &scratch,
        precision: Precision::F32,
    };
    let slots = target.slots.narrow(0, 3).unwrap();
    for (call, layer, word) in [
        (call, LayerCall { layer: 2, ..fits }, "layer"),
        (FuseCall { scratch: &small, ..call }, fits, "scratch"),
        (call, LayerCall { source: &target.pages, ..fits }, "input"),
        (call, LayerCall { out: &source.pages, ..fits }, "out.keys"),
        (FuseCall { out_slots: &slots, ..call }, fits, "out_slots"),
        (FuseCall { base_slots: &scratch, ..call }, fits, "base_slots"),
    ] {
        let error = case.fuser.issue(&case.queue, FuseCall { layers: &[layer], ..call }).unwrap_err();
        assert_eq!(error.operand, word, "{error}");
    }
}
