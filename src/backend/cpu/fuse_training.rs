//! The fuser of a layer in training: forward with all activations kept, and backward through them.
//!
//! Names as in docs/math.md: an FFN block reads `x`, widens it to `u` and leaves `y = x + drop(W2 · gelu(u))`.

use super::{
    Simd,
    fuse::{Columns, Half, NORM_EPS, Rows, carve, is_joint, joint_inputs, sigmoid},
    linear::backward as linear,
    pointwise::vector,
    pointwise_backward::{norm_rows, slope},
    simd::vectorized,
    team::{SendPtr, Team},
};
use crate::{
    ops::{
        Activation, FUSE_CHUNK, Ffn, FuseExtent, FuseGrads, FuseLayer, FuseOperands, FuseTape,
        FuseTrainingParams, LinearBackwardParams, NormOutput, Projector, Weight, dropout_part,
    },
    rng::{Purpose, Rng, Stream},
};

/// Elements a token that are kept of keys and values of a layer.
pub fn saved_len(e: FuseExtent) -> usize {
    let staged = if e.stage > 0 { e.target_width } else { e.source_width };
    let stage = if e.stage > 0 { e.source_width + 2 * e.stage + e.inner } else { 0 };
    let ffns = e.ffns - usize::from(e.stage > 0);
    let half = read(e, staged) + stage + e.hidden + ffns * (e.inner + e.hidden) + e.target_width + e.kv_heads;
    2 * e.tokens * half
}

/// Elements a token that a projector reads.
fn read(e: FuseExtent, staged: usize) -> usize {
    (staged + e.target_width) * if e.joint { 2 } else { 1 }
}

/// Elements of scratch of a backward pass; layers follow one another in the same memory.
pub fn scratch_len(e: FuseExtent) -> usize {
    let staged = if e.stage > 0 { e.target_width } else { e.source_width };
    let hidden = e.hidden.max(e.stage);
    // What the keys of a joint projector leave for the receiver's columns is held until its values are through.
    let held = if e.joint { read(e, staged) } else { 0 };
    e.tokens * (4 * hidden + 2 * e.inner + 2 * e.target_width + e.kv_heads + read(e, staged) + held)
}

/// What an FFN block leaves.
struct Block<'a> {
    /// Before the GELU, `[tokens, inner]`.
    u: &'a mut [f32],
    /// `[tokens, hidden]`
    y: &'a mut [f32],
}

/// What one half's projector leaves, each `[tokens, …]`.
struct Saved<'a> {
    /// The source's columns, what the stage makes of them before and after its block.
    stage: Option<(&'a mut [f32], &'a mut [f32], Block<'a>)>,
    input: &'a mut [f32],
    z0: &'a mut [f32],
    mlp1: Block<'a>,
    /// And the weights of the heads before their sigmoid.
    scalar: Option<(Block<'a>, &'a mut [f32])>,
    blocks: Vec<Block<'a>>,
    projected: &'a mut [f32],
}

impl<'a> Saved<'a> {
    fn new(p: &Projector, tokens: usize, source_width: usize, mut memory: &'a mut [f32]) -> Saved<'a> {
        let memory = &mut memory;
        let block = |memory: &mut &'a mut [f32], ffn: &Ffn| Block {
            u: carve(memory, tokens * ffn.w1.rows()),
            y: carve(memory, tokens * ffn.w1.cols()),
        };
        Saved {
            stage: p.source_stage.as_ref().map(|stage| {
                let source = carve(memory, tokens * source_width);
                (source, carve(memory, tokens * stage.input.rows()), block(memory, &stage.ffn))
            }),
            input: carve(memory, tokens * p.input.cols()),
            z0: carve(memory, tokens * p.hidden()),
            mlp1: block(memory, &p.mlp1),
            scalar: (p.scalar.as_ref())
                .map(|(ffn, head)| (block(memory, ffn), carve(memory, tokens * head.rows()))),
            blocks: p.blocks.iter().map(|ffn| block(memory, ffn)).collect(),
            projected: carve(memory, tokens * p.output.rows()),
        }
    }
}

/// Dropped elements of one FFN block.
#[derive(Clone, Copy)]
struct Dropout {
    probability: f32,
    rng: Rng,
}

impl Dropout {
    fn new(p: FuseTrainingParams, layer: u32, half: Half, block: u32) -> Option<Dropout> {
        let part = dropout_part(layer, half as u32, block);
        let rng = Rng::new(p.seed, Stream::new(Purpose::Dropout, part), p.step);
        (p.dropout > 0.0).then_some(Dropout { probability: p.dropout, rng })
    }

    /// Applies it to the row of one token.
    fn apply(self, token: usize, row: &mut [f32], noise: &mut [f32]) {
        let noise = &mut noise[..row.len()];
        self.rng.fill_uniform((token * row.len()) as u32, noise);
        let scale = 1.0 / (1.0 - self.probability);
        for (x, &u) in row.iter_mut().zip(&*noise) {
            *x = if u < self.probability { 0.0 } else { *x * scale };
        }
    }
}

const STAGE: u32 = 0;
const MLP1: u32 = 1;
const SCALAR: u32 = 2;
const BLOCKS: u32 = 3;

pub fn forward(team: &mut Team, simd: Simd, p: FuseTrainingParams, o: &FuseOperands, tapes: &[FuseTape]) {
    for (layer, tape) in o.layers.iter().zip(tapes) {
        let mut halves: Vec<_> = halves(layer, tape, p).collect();
        let joint = is_joint(&layer.keys, layer);
        if joint {
            // Before the first half is written.
            let inputs = joint_inputs(layer, o);
            for (_, _, saved, _) in &mut halves {
                let tokens = p.fuse.tokens as usize;
                let mut rows = Rows { team, simd, precision: p.fuse.precision, tokens };
                rows.gather(&inputs, saved.input);
            }
        }
        for (half, projector, mut saved, gates) in halves {
            let width = layer.target.width();
            let base = Columns::new(half, &layer.base, &o.base_slots);
            let out = Columns::new(half, &layer.out, &o.out_slots);
            let source = Columns::new(half, &layer.source, &o.source_slots);
            let target = Columns::new(half, &layer.target, &o.target_slots);
            let tokens = p.fuse.tokens as usize;
            for first in (0..tokens).step_by(FUSE_CHUNK) {
                let chunk = first..(first + FUSE_CHUNK).min(tokens);
                let [source, target, base, out] =
                    [source, target, base, out].map(|all| all.part(chunk.clone()));
                let rows = Rows { team, simd, precision: p.fuse.precision, tokens: chunk.len() };
                let mut pass = Forward { rows, p, layer: tape.layer, half, first };
                let scratch = o.scratch.host_mut::<f32>();
                let inputs: &[Columns] = match (joint, p.fuse.use_target) {
                    (true, _) => &[],
                    (false, true) => &[source, target],
                    (false, false) => &[source],
                };
                pass.project(projector, inputs, &mut saved, scratch);
                let fused = &mut scratch[..chunk.len() * width];
                let part = |width: usize| chunk.start * width..chunk.end * width;
                fused.copy_from_slice(&saved.projected[part(width)]);
                let heads = layer.target.kv_heads();
                let logits = saved.scalar.as_ref().map(|(_, logits)| &logits[part(heads)]);
                let gates = &gates[part(heads)];
                let replaced = (!p.fuse.use_target).then_some(target);
                pass.rows.add_base_gated(fused, logits, gates, base, replaced);
                pass.rows.store(fused, out);
            }
        }
    }
}

/// Half, projector, kept activations and gates `[tokens, kv_heads]` of keys and values.
fn halves<'a>(
    layer: &'a FuseLayer,
    tape: &'a FuseTape,
    p: FuseTrainingParams,
) -> impl Iterator<Item = (Half, &'a Projector, Saved<'a>, &'a [f32])> {
    let tokens = p.fuse.tokens as usize;
    let (saved, gates) = (tape.saved.host_mut::<f32>(), tape.gates.host::<f32>());
    let middle = saved.len() / 2;
    let (keys, values) = saved.split_at_mut(middle);
    let (key_gates, value_gates) = gates.split_at(gates.len() / 2);
    let all =
        [(Half::Keys, &*layer.keys, keys, key_gates), (Half::Values, &*layer.values, values, value_gates)];
    let source_width = layer.source.width();
    all.into_iter().map(move |(half, projector, saved, gates)| {
        (half, projector, Saved::new(projector, tokens, source_width, saved), gates)
    })
}

/// Forward pass of a chunk of tokens, `first` and on.
struct Forward<'t> {
    rows: Rows<'t>,
    p: FuseTrainingParams,
    layer: u32,
    half: Half,
    first: usize,
}

impl Forward<'_> {
    /// `inputs`: the columns that it reads; none if they lie in `saved` already.
    fn project(&mut self, p: &Projector, inputs: &[Columns], saved: &mut Saved, scratch: &mut [f32]) {
        let (first, tokens) = (self.first, self.rows.tokens);
        let at = |width: usize| first * width..(first + tokens) * width;
        if let Some(stage) = &p.source_stage {
            let (columns, z0, block) = saved.stage.as_mut().expect("kept with the stage");
            let columns = &mut columns[at(stage.input.cols())];
            self.rows.gather(&inputs[..1], columns);
            let hidden = stage.input.rows();
            self.rows.matmul(&stage.input, false, columns, &mut z0[at(hidden)]);
            self.ffn(&stage.ffn, STAGE, z0, block, scratch);
            let width = stage.output.rows();
            let staged = &mut scratch[..tokens * width];
            self.rows.matmul(&stage.output, false, &block.y[at(hidden)], staged);
            let target = inputs.get(1).copied();
            self.rows.join(staged, width, target, &mut saved.input[at(p.input.cols())]);
        } else if !inputs.is_empty() {
            self.rows.gather(inputs, &mut saved.input[at(p.input.cols())]);
        }
        let hidden = p.hidden();
        self.rows.matmul(&p.input, false, &saved.input[at(p.input.cols())], &mut saved.z0[at(hidden)]);
        self.ffn(&p.mlp1, MLP1, saved.z0, &mut saved.mlp1, scratch);
        if let (Some((ffn, head)), Some((block, logits))) = (&p.scalar, &mut saved.scalar) {
            self.ffn(ffn, SCALAR, saved.mlp1.y, block, scratch);
            self.rows.matmul(head, false, &block.y[at(hidden)], &mut logits[at(head.rows())]);
        }
        let mut x = &*saved.mlp1.y;
        for (number, (ffn, block)) in p.blocks.iter().zip(&mut saved.blocks).enumerate() {
            self.ffn(ffn, BLOCKS + number as u32, x, block, scratch);
            x = &*block.y;
        }
        let width = p.output.rows();
        self.rows.matmul(&p.output, false, &x[at(hidden)], &mut saved.projected[at(width)]);
    }

    /// `y = x + drop(W2 · gelu(W1 · rms_norm(x)))`, `x` of all tokens.
    fn ffn(&mut self, ffn: &Ffn, number: u32, x: &[f32], block: &mut Block, scratch: &mut [f32]) {
        let (first, tokens) = (self.first, self.rows.tokens);
        let (cols, wide) = (ffn.w1.cols(), ffn.w1.rows());
        let (x, u, y) = (
            &x[first * cols..][..tokens * cols],
            &mut block.u[first * wide..][..tokens * wide],
            &mut block.y[first * cols..][..tokens * cols],
        );
        let (normed, rest) = scratch.split_at_mut(tokens * cols);
        let inner = &mut rest[..tokens * wide];
        self.rows.norm(&ffn.norm, x, normed);
        self.rows.matmul(&ffn.w1, false, normed, u);
        inner.copy_from_slice(u);
        self.rows.gelu(wide, inner);
        let Some(dropout) = Dropout::new(self.p, self.layer, self.half, number) else {
            y.copy_from_slice(x);
            return self.rows.matmul(&ffn.w2, true, inner, y);
        };
        self.rows.matmul(&ffn.w2, false, inner, y);
        self.rows.chunks(y, cols, |row, rows| {
            let mut noise = vec![0.0; cols];
            for (i, y) in rows.chunks_exact_mut(cols).enumerate() {
                dropout.apply(first + row + i, y, &mut noise);
                y.iter_mut().zip(&x[(row + i) * cols..]).for_each(|(y, x)| *y += x);
            }
        });
    }
}

pub fn backward(
    team: &mut Team,
    simd: Simd,
    p: FuseTrainingParams,
    o: &FuseOperands,
    tapes: &[FuseTape],
    grads: &[FuseGrads],
) {
    let tokens = p.fuse.tokens as usize;
    for ((layer, tape), grads) in o.layers.iter().zip(tapes).zip(grads) {
        let dgates = grads.dgates.host_mut::<f32>();
        let middle = dgates.len() / 2;
        let (key_dgates, value_dgates) = dgates.split_at_mut(middle);
        let joint = is_joint(&layer.keys, layer);
        let joined = layer.keys.input.cols();
        let width = layer.target.width();
        let scratch = o.scratch.host_mut::<f32>();
        let (held, scratch) = scratch.split_at_mut(if joint { tokens * joined } else { 0 });
        held.fill(0.0);
        for (half, projector, saved, gates) in halves(layer, tape, p) {
            let (grad, dgates) = match half {
                Half::Keys => (&grads.keys, &mut *key_dgates),
                Half::Values => (&grads.values, &mut *value_dgates),
            };
            let dout = Columns::new(half, &grads.dout, &o.out_slots);
            let rows = Rows { team: &mut *team, simd, precision: p.fuse.precision, tokens };
            let pass = Backward { rows, p, layer: tape.layer, half };
            let wanted = grads.dtarget.is_some() && p.fuse.use_target;
            let dinput = pass.run(projector, grad, saved, gates, dout, dgates, wanted, scratch);
            let (Some(dinput), Some(pages)) = (dinput.filter(|_| wanted), &grads.dtarget) else { continue };
            if joint {
                held.iter_mut().zip(dinput).for_each(|(held, d)| *held += d);
                continue;
            }
            let mut rows = Rows { team: &mut *team, simd, precision: p.fuse.precision, tokens };
            let dtarget = Columns::new(half, pages, &o.target_slots);
            rows.add_columns(dinput, joined, joined - width, dtarget);
        }
        if let (true, Some(pages)) = (joint, &grads.dtarget) {
            let mut rows = Rows { team: &mut *team, simd, precision: p.fuse.precision, tokens };
            for (half, first) in [(Half::Keys, joined - 2 * width), (Half::Values, joined - width)] {
                rows.add_columns(held, joined, first, Columns::new(half, pages, &o.target_slots));
            }
        }
    }
}

/// Backward pass of one half.
struct Backward<'t> {
    rows: Rows<'t>,
    p: FuseTrainingParams,
    layer: u32,
    half: Half,
}

/// Working memory of [`Backward::ffn`].
struct Work<'s> {
    /// `[tokens, hidden]` each.
    branch: &'s mut [f32],
    normed: &'s mut [f32],
    /// `[tokens, inner]` each.
    inner: &'s mut [f32],
    dinner: &'s mut [f32],
}

impl Backward<'_> {
    /// Returns the gradient of what the projector read, `[tokens, …]`, where it was needed or is `wanted`.
    #[allow(clippy::too_many_arguments)]
    fn run<'s>(
        mut self,
        p: &Projector,
        grad: &Projector,
        saved: Saved,
        gates: &[f32],
        dout: Columns,
        dgates: &mut [f32],
        wanted: bool,
        mut scratch: &'s mut [f32],
    ) -> Option<&'s [f32]> {
        let tokens = self.rows.tokens;
        let (hidden, width) = (p.hidden(), p.output.rows());
        let stage_hidden = p.source_stage.as_ref().map_or(0, |stage| stage.input.rows());
        let most = hidden.max(stage_hidden);
        let dprojected = carve(&mut scratch, tokens * width);
        let dlogits = carve(&mut scratch, gates.len());
        let dz = carve(&mut scratch, tokens * most);
        let mut work = Work {
            branch: carve(&mut scratch, tokens * most),
            normed: carve(&mut scratch, tokens * most),
            inner: carve(&mut scratch, tokens * p.inner()),
            dinner: carve(&mut scratch, tokens * p.inner()),
        };
        let logits = saved.scalar.as_ref().map(|(_, logits)| &**logits);
        self.rows.gate_backward(saved.projected, logits, gates, dout, dprojected, dlogits, dgates);

        let last = saved.blocks.last().map_or(&*saved.mlp1.y, |block| &*block.y);
        self.linear(&p.output, &grad.output, last, dprojected, Some(dz));
        for number in (0..p.blocks.len()).rev() {
            let x = if number == 0 { &*saved.mlp1.y } else { &*saved.blocks[number - 1].y };
            let block = BLOCKS + number as u32;
            self.ffn(
                &p.blocks[number],
                &grad.blocks[number],
                block,
                x,
                saved.blocks[number].u,
                dz,
                &mut work,
            );
        }
        if let (Some((ffn, head)), Some((ffn_grad, head_grad)), Some((block, _))) =
            (&p.scalar, &grad.scalar, &saved.scalar)
        {
            let dscalar = carve(&mut scratch, tokens * hidden);
            self.linear(head, head_grad, block.y, dlogits, Some(dscalar));
            self.ffn(ffn, ffn_grad, SCALAR, saved.mlp1.y, block.u, dscalar, &mut work);
            dz.iter_mut().zip(&*dscalar).for_each(|(dz, d)| *dz += d);
        }
        self.ffn(&p.mlp1, &grad.mlp1, MLP1, saved.z0, saved.mlp1.u, dz, &mut work);
        if !wanted && p.source_stage.is_none() {
            self.linear(&p.input, &grad.input, saved.input, dz, None);
            return None;
        }
        let joined = p.input.cols();
        let dinput = carve(&mut scratch, tokens * joined);
        self.linear(&p.input, &grad.input, saved.input, dz, Some(dinput));
        if let (Some(stage), Some(stage_grad), Some((source, z0, block))) =
            (&p.source_stage, &grad.source_stage, saved.stage)
        {
            for token in 0..tokens {
                dprojected[token * width..][..width].copy_from_slice(&dinput[token * joined..][..width]);
            }
            self.linear(&stage.output, &stage_grad.output, block.y, dprojected, Some(dz));
            self.ffn(&stage.ffn, &stage_grad.ffn, STAGE, z0, block.u, dz, &mut work);
            self.linear(&stage.input, &stage_grad.input, source, dz, None);
        }
        Some(dinput)
    }

    /// Of `y = x · Wᵀ + b`.
    fn linear(&mut self, weight: &Weight, grad: &Weight, x: &[f32], dy: &[f32], dx: Option<&mut [f32]>) {
        let (tokens, precision) = (self.rows.tokens, self.rows.precision);
        let p = LinearBackwardParams { tokens: tokens as u32, precision, accumulate: false };
        let dy = &dy[..tokens * weight.rows()];
        linear::weight(self.rows.team, self.rows.simd, p, dy, &x[..tokens * weight.cols()], grad);
        if let Some(dx) = dx {
            linear::input(self.rows.team, self.rows.simd, p, dy, weight, &mut dx[..tokens * weight.cols()]);
        }
    }

    /// `dz`: gradient of `y` in, of `x` out.
    #[allow(clippy::too_many_arguments)]
    fn ffn(
        &mut self,
        ffn: &Ffn,
        grad: &Ffn,
        number: u32,
        x: &[f32],
        u: &[f32],
        dz: &mut [f32],
        work: &mut Work,
    ) {
        let tokens = self.rows.tokens;
        let (cols, wide) = (ffn.w1.cols(), ffn.w1.rows());
        let (dz, x) = (&mut dz[..tokens * cols], &x[..tokens * cols]);
        let branch = &mut work.branch[..tokens * cols];
        branch.copy_from_slice(dz);
        if let Some(dropout) = Dropout::new(self.p, self.layer, self.half, number) {
            self.rows.chunks(branch, cols, |first, rows| {
                let mut noise = vec![0.0; cols];
                for (i, row) in rows.chunks_exact_mut(cols).enumerate() {
                    dropout.apply(first + i, row, &mut noise);
                }
            });
        }
        let (inner, dinner) = (&mut work.inner[..tokens * wide], &mut work.dinner[..tokens * wide]);
        inner.copy_from_slice(&u[..tokens * wide]);
        self.rows.gelu(wide, inner);
        self.linear(&ffn.w2, &grad.w2, inner, branch, Some(dinner));
        self.rows.gelu_backward(wide, u, dinner);
        let normed = &mut work.normed[..tokens * cols];
        self.rows.norm(&ffn.norm, x, normed);
        self.linear(&ffn.w1, &grad.w1, normed, dinner, Some(branch));
        let (team, simd, weight) = (&mut *self.rows.team, self.rows.simd, vector(&ffn.norm));
        norm_rows(team, simd, x, &weight, NORM_EPS, Some(branch), NormOutput::Add, dz, Some(&grad.norm));
    }
}

impl Rows<'_> {
    /// As [`Rows::add_base`], with a gate for each token and head.
    fn add_base_gated(
        &mut self,
        fused: &mut [f32],
        logits: Option<&[f32]>,
        gates: &[f32],
        base: Columns,
        replaced: Option<Columns>,
    ) {
        let (width, dim) = (base.width(), base.head_dim());
        let heads = width / dim;
        self.chunks(fused, width, |first, rows| {
            let (mut column, mut minus) = (vec![0.0; width], vec![0.0; width]);
            for (token, row) in (first..).zip(rows.chunks_exact_mut(width)) {
                base.read(token, &mut column);
                if let Some(replaced) = replaced {
                    replaced.read(token, &mut minus);
                }
                for (i, y) in row.iter_mut().enumerate() {
                    let head = token * heads + i / dim;
                    let weight = logits.map_or(1.0, |logits| sigmoid(logits[head]));
                    *y = column[i] - gates[head] * minus[i] + gates[head] * weight * *y;
                }
            }
        });
    }

    /// Of `out = base + gate · σ(logit) · projected`: gradients of the projection, of the logits and of the gates.
    #[allow(clippy::too_many_arguments)]
    fn gate_backward(
        &mut self,
        projected: &[f32],
        logits: Option<&[f32]>,
        gates: &[f32],
        dout: Columns,
        dprojected: &mut [f32],
        dlogits: &mut [f32],
        dgates: &mut [f32],
    ) {
        let (width, dim) = (dout.width(), dout.head_dim());
        let heads = width / dim;
        let (dlogits, dgates) = (SendPtr(dlogits.as_mut_ptr()), SendPtr(dgates.as_mut_ptr()));
        self.chunks(dprojected, width, |first, rows| {
            let mut column = vec![0.0; width];
            for (token, row) in (first..).zip(rows.chunks_exact_mut(width)) {
                dout.read(token, &mut column);
                for head in 0..heads {
                    let index = token * heads + head;
                    let part = head * dim..(head + 1) * dim;
                    let (gate, weight) = (gates[index], logits.map_or(1.0, |logits| sigmoid(logits[index])));
                    let (d, p) = (&column[part.clone()], &projected[token * width..][part.clone()]);
                    let dot: f32 = d.iter().zip(p).map(|(d, p)| d * p).sum();
                    row[part].iter_mut().zip(d).for_each(|(y, d)| *y = gate * weight * d);
                    // SAFETY: both hold tokens × heads elements, and each token is one task's.
                    unsafe {
                        *dgates.get().add(index) = weight * dot;
                        *dlogits.get().add(index) = gate * dot * weight * (1.0 - weight);
                    }
                }
            }
        });
    }

    /// Adds columns `first..` of the rows of `x` (of `stride`) to pages.
    fn add_columns(&mut self, x: &[f32], stride: usize, first: usize, pages: Columns) {
        let width = pages.width();
        let mut column = vec![0.0; width];
        for token in 0..self.tokens {
            pages.read(token, &mut column);
            column.iter_mut().zip(&x[token * stride + first..]).for_each(|(c, x)| *c += x);
            pages.write(token, &column);
        }
    }

    fn gelu_backward(&mut self, cols: usize, u: &[f32], dinner: &mut [f32]) {
        let simd = self.simd;
        self.chunks(dinner, cols, |first, rows| {
            gelu_backward(simd, &u[first * cols..][..rows.len()], rows);
        });
    }
}

vectorized! {
    /// `d *= gelu'(u)`
    fn gelu_backward(u: &[f32], d: &mut [f32]) {
        for (d, &u) in d.iter_mut().zip(u) {
            *d *= slope(Activation::GeluErf, u);
        }
    }
}
