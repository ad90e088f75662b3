//! The fuser of one layer: columns are gathered from their pages, go through a handful of matmuls, and the gated sum
//! is written into pages.

use super::{
    Simd,
    linear::matmul,
    pointwise::{activate, exp, norm_row, rows_per_task, vector},
    rope::{PageWriter, page_offset, read_page},
    simd::vectorized,
    team::Team,
};
use crate::{
    backend::{Precision, Tensor},
    ops::{
        Activation, FUSE_CHUNK, Ffn, FuseExtent, FuseLayer, FuseOperands, FuseParams, KvPages, NormOutput,
        Pass, Projector, Weight,
    },
};
use std::ops::Range;

/// Of the fuser's RMSNorm, whatever the models use.
pub(super) const NORM_EPS: f32 = 1e-6;

/// Elements of scratch: per token of a chunk its input row, three hidden rows, one inner row, the projected row and the
/// weights of the heads. Layers follow one another in the same memory.
pub(super) fn scratch_len(e: FuseExtent) -> usize {
    let staged = if e.stage > 0 { e.target_width } else { e.source_width };
    let input = (staged + e.target_width).max(e.source_width);
    // A joint projector reads twice as much, and what it makes is held until all is read.
    let input = if e.joint { 2 * input + 2 * e.target_width } else { input };
    e.tokens.min(FUSE_CHUNK) * (input + 3 * e.hidden.max(e.stage) + e.inner + e.target_width + e.kv_heads)
}

pub(super) fn fuse(team: &mut Team, simd: Simd, p: FuseParams, o: &FuseOperands) {
    o.layers.iter().for_each(|layer| fuse_layer(team, simd, p, layer, o));
}

fn fuse_layer(team: &mut Team, simd: Simd, p: FuseParams, layer: &FuseLayer, o: &FuseOperands) {
    if is_joint(&layer.keys, layer) {
        return fuse_jointly(team, simd, p, layer, o);
    }
    let halves = [(Half::Keys, &layer.keys, layer.gates[0]), (Half::Values, &layer.values, layer.gates[1])];
    for (half, projector, gate) in halves {
        let base = Columns::new(half, &layer.base, &o.base_slots);
        let out = Columns::new(half, &layer.out, &o.out_slots);
        if gate == 0.0 {
            copy(base, out);
            continue;
        }
        let source = Columns::new(half, &layer.source, &o.source_slots);
        let target = Columns::new(half, &layer.target, &o.target_slots);
        let tokens = p.tokens as usize;
        for first in (0..tokens).step_by(FUSE_CHUNK) {
            let chunk = first..(first + FUSE_CHUNK).min(tokens);
            let [source, target, base, out] = [source, target, base, out].map(|all| all.part(chunk.clone()));
            let mut rows = Rows { team, simd, precision: p.precision, tokens: chunk.len() };
            // A projector that does not read the target replaces it.
            let (inputs, replaced) =
                if p.use_target { (&[source, target][..], None) } else { (&[source][..], Some(target)) };
            let scratch = o.scratch.host_mut::<f32>();
            let (fused, weights) = rows.project(projector, inputs, out.width(), scratch);
            rows.add_base(fused, weights, gate, base, replaced);
            rows.store(fused, out);
        }
    }
}

/// Whether a projector of the layer reads keys and values.
pub(super) fn is_joint(p: &Projector, layer: &FuseLayer) -> bool {
    FuseExtent::new(p, layer.source.width(), layer.target.width(), 0).joint
}

/// What a joint projector of the layer reads: `[s_k, s_v, t_k, t_v]`.
pub(super) fn joint_inputs<'a>(layer: &'a FuseLayer, o: &'a FuseOperands) -> [Columns<'a>; 4] {
    let of = |half, pages, slots| Columns::new(half, pages, slots);
    [
        of(Half::Keys, &layer.source, &o.source_slots),
        of(Half::Values, &layer.source, &o.source_slots),
        of(Half::Keys, &layer.target, &o.target_slots),
        of(Half::Values, &layer.target, &o.target_slots),
    ]
}

fn fuse_jointly(team: &mut Team, simd: Simd, p: FuseParams, layer: &FuseLayer, o: &FuseOperands) {
    let (tokens, width) = (p.tokens as usize, layer.target.width());
    let halves = [(Half::Keys, &layer.keys, layer.gates[0]), (Half::Values, &layer.values, layer.gates[1])];
    for first in (0..tokens).step_by(FUSE_CHUNK) {
        let chunk = first..(first + FUSE_CHUNK).min(tokens);
        let inputs = joint_inputs(layer, o).map(|all| all.part(chunk.clone()));
        let base = |half| Columns::new(half, &layer.base, &o.base_slots).part(chunk.clone());
        let out = |half| Columns::new(half, &layer.out, &o.out_slots).part(chunk.clone());
        let mut rows = Rows { team, simd, precision: p.precision, tokens: chunk.len() };
        let elements = chunk.len() * width;
        let (held, scratch) = o.scratch.host_mut::<f32>().split_at_mut(2 * elements);
        // Nothing is written before both halves have read the columns.
        for ((half, projector, gate), held) in halves.into_iter().zip(held.chunks_exact_mut(elements)) {
            if gate != 0.0 {
                let (fused, weights) = rows.project(projector, &inputs, width, scratch);
                held.copy_from_slice(fused);
                rows.add_base(held, weights, gate, base(half), None);
            }
        }
        for ((half, _, gate), held) in halves.into_iter().zip(held.chunks_exact(elements)) {
            if gate == 0.0 {
                copy(base(half), out(half));
            } else {
                rows.store(held, out(half));
            }
        }
    }
}

#[derive(Clone, Copy)]
pub(super) enum Half {
    Keys,
    Values,
}

/// The keys or the values of one layer, one column per fused token.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a> {
    pages: &'a KvPages,
    tensor: &'a Tensor,
    slots: &'a [u32],
}

impl<'a> Columns<'a> {
    pub fn new(half: Half, pages: &'a KvPages, slots: &'a Tensor) -> Columns<'a> {
        let tensor = match half {
            Half::Keys => &pages.keys,
            Half::Values => &pages.values,
        };
        Columns { pages, tensor, slots: slots.host::<u32>() }
    }

    /// Those of some of the tokens.
    pub fn part(self, tokens: Range<usize>) -> Columns<'a> {
        Columns { slots: &self.slots[tokens], ..self }
    }

    pub fn width(self) -> usize {
        self.pages.width()
    }

    pub fn head_dim(self) -> usize {
        self.pages.head_dim()
    }

    fn offset(self, token: usize, head: usize) -> usize {
        page_offset(self.pages, self.slots[token] as usize, head)
    }

    /// The column of `token`, heads one after the other.
    pub fn read(self, token: usize, column: &mut [f32]) {
        for (head, part) in column.chunks_exact_mut(self.pages.head_dim()).enumerate() {
            read_page(self.tensor, self.offset(token, head), part);
        }
    }

    pub fn write(self, token: usize, column: &[f32]) {
        let writer = PageWriter::new(self.tensor);
        for (head, part) in column.chunks_exact(self.pages.head_dim()).enumerate() {
            writer.write(self.offset(token, head), part);
        }
    }

    /// Tokens from `token` on that lie one after the other in one block.
    fn run(self, token: usize) -> usize {
        let first = self.slots[token];
        let left = self.pages.block_size() - first as usize % self.pages.block_size();
        let next = self.slots[token..].iter().zip(first..);
        next.take(left).take_while(|&(&slot, expected)| slot == expected).count()
    }
}

/// A closed gate: `out = base`, which costs nothing where both are the same memory.
pub(super) fn copy(base: Columns, out: Columns) {
    let (from, to) = (base.tensor, out.tensor);
    let same = from.byte_offset() == to.byte_offset() && from.overlaps(to);
    let size = from.dtype().block_bytes();
    let row = base.pages.head_dim() * size;
    let mut token = 0;
    while token < base.slots.len() {
        let run = base.run(token).min(out.run(token));
        if !(same && base.slots[token] == out.slots[token]) {
            for head in 0..base.pages.kv_heads() {
                let read = base.offset(token, head) * size;
                let write = out.offset(token, head) * size;
                if same {
                    to.host_bytes_mut().copy_within(read..read + run * row, write);
                } else {
                    let bytes = &from.host_bytes()[read..read + run * row];
                    to.host_bytes_mut()[write..write + run * row].copy_from_slice(bytes);
                }
            }
        }
        token += run;
    }
}

/// The next `len` elements of `scratch`.
pub(super) fn carve<'a>(scratch: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (part, rest) = std::mem::take(scratch).split_at_mut(len);
    *scratch = rest;
    part
}

/// Row-wise work: one row per fused token.
pub(super) struct Rows<'t> {
    pub team: &'t mut Team,
    pub simd: Simd,
    pub precision: Precision,
    pub tokens: usize,
}

impl Rows<'_> {
    /// `p` (`[tokens, target width]`) and, where there is one, the weight per head before its sigmoid.
    fn project<'s>(
        &mut self,
        p: &Projector,
        inputs: &[Columns],
        target_width: usize,
        mut scratch: &'s mut [f32],
    ) -> (&'s mut [f32], Option<&'s [f32]>) {
        let tokens = self.tokens;
        let input = carve(&mut scratch, tokens * p.input.cols().max(inputs[0].width()));
        let hidden = p.source_stage.as_ref().map_or(0, |stage| stage.input.rows()).max(p.hidden());
        let z = carve(&mut scratch, tokens * hidden);
        let normed = carve(&mut scratch, tokens * hidden);
        let branch = carve(&mut scratch, tokens * hidden);
        let inner = carve(&mut scratch, tokens * p.inner());
        let projected = carve(&mut scratch, tokens * target_width);

        if let Some(stage) = &p.source_stage {
            self.gather(&inputs[..1], input);
            self.matmul(&stage.input, false, input, z);
            self.ffn(&stage.ffn, z, normed, inner);
            self.matmul(&stage.output, false, z, projected);
            self.join(projected, target_width, inputs.get(1).copied(), input);
        } else {
            self.gather(inputs, input);
        }
        self.matmul(&p.input, false, input, z);
        self.ffn(&p.mlp1, z, normed, inner);
        let weights = p.scalar.as_ref().map(|(ffn, head)| {
            let weights = carve(&mut scratch, tokens * head.rows());
            let z = &z[..tokens * p.hidden()];
            branch[..z.len()].copy_from_slice(z);
            self.ffn(ffn, branch, normed, inner);
            self.matmul(head, false, branch, weights);
            &*weights
        });
        for ffn in &p.blocks {
            self.ffn(ffn, z, normed, inner);
        }
        self.matmul(&p.output, false, z, projected);
        (projected, weights)
    }

    /// `fused = base + gate · σ(weights) · fused`, less `gate` times the replaced columns.
    fn add_base(
        &mut self,
        fused: &mut [f32],
        weights: Option<&[f32]>,
        gate: f32,
        base: Columns,
        replaced: Option<Columns>,
    ) {
        let (width, dim) = (base.width(), base.pages.head_dim());
        self.chunks(fused, width, |first, rows| {
            let mut column = vec![0.0; width];
            let mut minus = vec![0.0; width];
            for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                let token = first + i;
                base.read(token, &mut column);
                if let Some(replaced) = replaced {
                    replaced.read(token, &mut minus);
                    column.iter_mut().zip(&minus).for_each(|(c, m)| *c -= gate * m);
                }
                for (head, (row, base)) in row.chunks_exact_mut(dim).zip(column.chunks_exact(dim)).enumerate()
                {
                    let weight = weights.map_or(1.0, |w| sigmoid(w[token * (width / dim) + head]));
                    let factor = gate * weight;
                    row.iter_mut().zip(base).for_each(|(y, b)| *y = b + factor * *y);
                }
            }
        });
    }

    pub fn store(&mut self, rows: &[f32], out: Columns) {
        let (width, dim) = (out.width(), out.pages.head_dim());
        let writer = PageWriter::new(out.tensor);
        let per_task = rows_per_task(width);
        let tokens = self.tokens;
        self.team.run(tokens.div_ceil(per_task), &|task| {
            for token in task * per_task..((task + 1) * per_task).min(tokens) {
                let row = &rows[token * width..(token + 1) * width];
                for (head, part) in row.chunks_exact(dim).enumerate() {
                    writer.write(out.offset(token, head), part);
                }
            }
        });
    }

    /// The columns of each token, one after the other.
    pub fn gather(&mut self, columns: &[Columns], input: &mut [f32]) {
        let width = columns.iter().map(|columns| columns.width()).sum();
        self.chunks(input, width, |first, rows| {
            for (i, mut row) in rows.chunks_exact_mut(width).enumerate() {
                for columns in columns {
                    columns.read(first + i, carve(&mut row, columns.width()));
                }
            }
        });
    }

    /// `[staged; target]` of each token.
    pub fn join(&mut self, staged: &[f32], staged_width: usize, target: Option<Columns>, input: &mut [f32]) {
        let width = staged_width + target.map_or(0, Columns::width);
        self.chunks(input, width, |first, rows| {
            for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                let token = first + i;
                let (s, t) = row.split_at_mut(staged_width);
                s.copy_from_slice(&staged[token * staged_width..][..staged_width]);
                if let Some(target) = target {
                    target.read(token, t);
                }
            }
        });
    }

    /// `x += W2 · gelu(W1 · rms_norm(x))`
    fn ffn(&mut self, ffn: &Ffn, x: &mut [f32], normed: &mut [f32], inner: &mut [f32]) {
        self.norm(&ffn.norm, x, normed);
        self.matmul(&ffn.w1, false, normed, inner);
        self.gelu(ffn.w1.rows(), inner);
        self.matmul(&ffn.w2, true, inner, x);
    }

    pub fn norm(&mut self, weight: &Tensor, x: &[f32], normed: &mut [f32]) {
        let (simd, weight) = (self.simd, vector(weight));
        let cols = weight.len();
        self.chunks(normed, cols, |first, rows| {
            for (i, y) in rows.chunks_exact_mut(cols).enumerate() {
                let x = &x[(first + i) * cols..][..cols];
                norm_row(simd, x, &weight, NORM_EPS, NormOutput::Assign, y);
            }
        });
    }

    pub fn gelu(&mut self, cols: usize, x: &mut [f32]) {
        let simd = self.simd;
        self.chunks(x, cols, |_, rows| gelu(simd, rows));
    }

    pub fn matmul(&mut self, weight: &Weight, accumulate: bool, x: &[f32], y: &mut [f32]) {
        let x = &x[..self.tokens * weight.cols()];
        let y = &mut y[..self.tokens * weight.rows()];
        matmul(self.team, self.simd, Pass::Prefill, self.precision, accumulate, self.tokens, x, weight, y);
    }

    /// Runs `job(first token, rows)` on parts of `data`, rows of `width`.
    pub fn chunks(&mut self, data: &mut [f32], width: usize, job: impl Fn(usize, &mut [f32]) + Sync) {
        let per_task = rows_per_task(width);
        let data = &mut data[..self.tokens * width];
        self.team.chunks_mut(data, per_task * width, |task, rows| job(task * per_task, rows));
    }
}

pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

vectorized! {
    /// In place.
    fn gelu(x: &mut [f32]) {
        // A closure would be compiled for every processor, without the level's registers.
        for x in x {
            *x = activate(Activation::GeluErf, *x);
        }
    }
}
