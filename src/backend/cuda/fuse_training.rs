//! The fuser in training, all layers of a call as one grouped problem: kernels/fuse_training.cu.

mod steps;

use super::{
    Launch, dtype_code,
    fuse::{FuseColumns, Geometry},
    launch::KernelArgs,
    norm_backward,
};
use crate::{
    backend::DType,
    ops::{
        Ffn, FuseExtent, FuseGrads, FuseLayer, FuseOperands, FuseTape, FuseTrainingParams, KvPages,
        Projector, SourceStage, Weight, dropout_part,
    },
};
use steps::Steps;

/// Twin of `FuseOperand` in kernels/fuse_training.cu.
#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct FuseOperand {
    data: u64,
    dtype: u32,
    part: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct FuseTrainingArgs {
    operands: u64,
    operands_each: u32,
    x: u32,
    y: u32,
    weight: u32,
    bias: u32,
    extra: u32,
    out: u32,
    dlogits: u32,
    tokens: u32,
    rows: u32,
    cols: u32,
    x_stride: u32,
    y_stride: u32,
    out_stride: u32,
    gelu: u32,
    add: u32,
    dropout: f32,
    kept: f32,
    seed: [u32; 2],
    step: u32,
    block: u32,
    eps: f32,
    replaces_target: u32,
    columns: FuseColumns,
    second: FuseColumns,
    third: FuseColumns,
}

// SAFETY: twin of `FuseTrainingArgs` in kernels/fuse_training.cu.
unsafe impl KernelArgs for FuseTrainingArgs {}

/// What a call does.
pub(super) struct Plan {
    /// Goes to the start of the scratch memory before anything is launched.
    pub table: Vec<u8>,
    pub launches: Vec<(Launch, FuseTrainingArgs)>,
}

/// The most operands of a problem: of each FFN block three weights, their gradients, and two that are kept.
fn operands_each(e: &FuseExtent) -> usize {
    8 * e.ffns + 48
}

/// F32 elements that the table of operands takes.
fn table_len(e: &FuseExtent) -> usize {
    2 * e.layers * operands_each(e) * size_of::<FuseOperand>() / 4
}

fn staged(e: &FuseExtent) -> usize {
    if e.stage > 0 { e.target_width } else { e.source_width }
}

/// F32 elements that a forward pass keeps of one half of a layer.
fn saved_half(e: &FuseExtent) -> usize {
    let stage = if e.stage > 0 { e.source_width + e.stage } else { 0 };
    let blocks = e.ffns * (e.inner + e.hidden.max(e.stage));
    e.tokens * (staged(e) + e.target_width + stage + e.hidden + blocks + e.target_width + e.kv_heads)
}

/// F32 elements that a forward pass keeps of a layer.
pub(super) fn saved_len(e: FuseExtent) -> usize {
    2 * saved_half(&e)
}

fn forward_half(e: &FuseExtent) -> usize {
    e.tokens * e.hidden.max(e.stage)
}

fn backward_half(e: &FuseExtent) -> usize {
    let most = e.hidden.max(e.stage);
    let row = e.target_width + e.kv_heads + 3 * most + e.hidden + e.inner + staged(e) + e.target_width;
    e.tokens * row + norm_backward::blocks(e.tokens as u32) as usize * most
}

/// F32 elements of scratch.
pub(super) fn forward_scratch_len(e: FuseExtent) -> usize {
    table_len(&e) + 2 * e.layers * forward_half(&e)
}

/// F32 elements of scratch.
pub(super) fn backward_scratch_len(e: FuseExtent) -> usize {
    table_len(&e) + 2 * e.layers * backward_half(&e)
}

/// One half of one layer. Addresses, 0 where there is nothing.
#[derive(Clone, Copy)]
struct Half<'a> {
    projector: &'a Projector,
    grad: Option<&'a Projector>,
    part: u32,
    source: u64,
    target: u64,
    base: u64,
    out: u64,
    gates: u64,
    dgates: u64,
    dout: u64,
    dtarget: u64,
    saved: u64,
    scratch: u64,
}

/// Rows of a problem: the number of an operand, and elements from one row to the next.
#[derive(Clone, Copy)]
struct Rows {
    operand: u32,
    stride: u32,
}

/// Numbers of a linear map's operands.
struct Linear {
    weight: u32,
    bias: u32,
    grad: u32,
    bias_grad: u32,
    rows: u32,
    cols: u32,
}

/// An FFN block; its number is that of [`dropout_part`].
#[derive(Clone, Copy)]
enum Which {
    Stage,
    Mlp1,
    Scalar,
    Block(usize),
}

fn stage_of(p: &Projector) -> &SourceStage {
    p.source_stage.as_ref().expect("projectors of one size, this one with a stage")
}

fn scalar_of(p: &Projector) -> &(Ffn, Weight) {
    p.scalar.as_ref().expect("projectors of one size, this one with weights of heads")
}

impl Which {
    fn of(self, p: &Projector) -> &Ffn {
        match self {
            Which::Stage => &stage_of(p).ffn,
            Which::Mlp1 => &p.mlp1,
            Which::Scalar => &scalar_of(p).0,
            Which::Block(number) => &p.blocks[number],
        }
    }

    fn number(self) -> u32 {
        match self {
            Which::Stage => 0,
            Which::Mlp1 => 1,
            Which::Scalar => 2,
            Which::Block(number) => 3 + number as u32,
        }
    }
}

/// What an FFN block leaves: before the GELU, and its result.
#[derive(Clone, Copy)]
struct Block {
    u: Rows,
    y: Rows,
}

/// What a projector leaves.
struct Saved {
    /// The source's columns, what the stage makes of them before and after its block.
    stage: Option<(Rows, Rows, Block)>,
    input: Rows,
    z0: Rows,
    mlp1: Block,
    /// And the weights of the heads before their sigmoid.
    scalar: Option<(Block, Rows)>,
    blocks: Vec<Block>,
    projected: Rows,
}

impl Saved {
    fn new(s: &mut Steps, source_width: u32) -> Saved {
        let p = s.halves[0].projector;
        let block = |s: &mut Steps, ffn: &Ffn| Block { u: s.saved(ffn.w1.rows()), y: s.saved(ffn.w1.cols()) };
        Saved {
            stage: p.source_stage.as_ref().map(|stage| {
                let source = s.saved(source_width as usize);
                (source, s.saved(stage.input.rows()), block(s, &stage.ffn))
            }),
            input: s.saved(p.input.cols()),
            z0: s.saved(p.hidden()),
            mlp1: block(s, &p.mlp1),
            scalar: p.scalar.as_ref().map(|(ffn, head)| (block(s, ffn), s.saved(head.rows()))),
            blocks: p.blocks.iter().map(|ffn| block(s, ffn)).collect(),
            projected: s.saved(p.output.rows()),
        }
    }

    fn last(&self) -> Rows {
        self.blocks.last().unwrap_or(&self.mlp1).y
    }
}

pub(super) fn forward(
    p: FuseTrainingParams,
    extent: FuseExtent,
    o: &FuseOperands,
    tapes: &[FuseTape],
) -> Plan {
    let halves = halves(&extent, o, tapes, None, forward_half(&extent));
    let mut s = Steps::new(p, halves, o);
    let geometry = Geometry::new(&o.layers[0], o);
    let saved = Saved::new(&mut s, geometry.source.width);
    let normed = s.scratch(extent.hidden.max(extent.stage));
    let source = s.operand(|half| (half.source, DType::F32));
    let target = s.operand(|half| (half.target, DType::F32));
    let input = saved.input;
    if let Some((columns, z0, block)) = saved.stage {
        s.gather(source, geometry.source, columns);
        let (into, from) = (s.linear(|p| &stage_of(p).input), s.linear(|p| &stage_of(p).output));
        s.product(&into, columns, z0);
        s.ffn(Which::Stage, z0, block, normed);
        s.product(&from, block.y, input);
    } else {
        s.gather(source, geometry.source, input);
    }
    if p.fuse.use_target {
        let right = s.columns_from(input, staged(&extent));
        s.gather(target, geometry.target, right);
    }
    let linear = s.linear(|p| &p.input);
    s.product(&linear, input, saved.z0);
    s.ffn(Which::Mlp1, saved.z0, saved.mlp1, normed);
    if let Some((block, logits)) = saved.scalar {
        s.ffn(Which::Scalar, saved.mlp1.y, block, normed);
        let head = s.linear(|p| &scalar_of(p).1);
        s.product(&head, block.y, logits);
    }
    let mut x = saved.mlp1.y;
    for (number, &block) in saved.blocks.iter().enumerate() {
        s.ffn(Which::Block(number), x, block, normed);
        x = block.y;
    }
    let linear = s.linear(|p| &p.output);
    s.product(&linear, x, saved.projected);
    let args = FuseTrainingArgs {
        x: saved.projected.operand,
        y: s.operand(|half| (half.gates, DType::F32)),
        extra: saved.scalar.map_or(0, |(_, logits)| logits.operand),
        weight: s.operand(|half| (half.base, DType::F32)),
        bias: target,
        out: s.operand(|half| (half.out, DType::F32)),
        columns: geometry.out,
        second: geometry.base,
        third: geometry.target,
        ..s.args
    };
    s.by_token("fuse_training_gate", args);
    s.plan(&extent)
}

/// One plan after the other. Layers whose projectors share gradients are never in one.
pub(super) fn backward(
    p: FuseTrainingParams,
    extent: FuseExtent,
    o: &FuseOperands,
    tapes: &[FuseTape],
    grads: &[FuseGrads],
) -> Vec<Plan> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let place = |layer: usize| grads[layer].keys.input.parts[0].matrix.address();
    for layer in 0..grads.len() {
        match groups.iter_mut().find(|group| group.iter().all(|&other| place(other) != place(layer))) {
            Some(group) => group.push(layer),
            None => groups.push(vec![layer]),
        }
    }
    let plan = |group: &Vec<usize>| {
        let extent = FuseExtent { layers: group.len(), ..extent };
        let layers = group.iter().map(|&layer| o.layers[layer].clone()).collect();
        let tapes: Vec<FuseTape> = group.iter().map(|&layer| tapes[layer].clone()).collect();
        let grads: Vec<&FuseGrads> = group.iter().map(|&layer| &grads[layer]).collect();
        backward_of(p, extent, &FuseOperands { layers, ..o.clone() }, &tapes, &grads)
    };
    groups.iter().map(plan).collect()
}

fn backward_of(
    p: FuseTrainingParams,
    extent: FuseExtent,
    o: &FuseOperands,
    tapes: &[FuseTape],
    grads: &[&FuseGrads],
) -> Plan {
    let halves = halves(&extent, o, tapes, Some(grads), backward_half(&extent));
    let mut s = Steps::new(p, halves, o);
    let geometry = Geometry::new(&o.layers[0], o);
    let saved = Saved::new(&mut s, geometry.source.width);
    let (hidden, width) = (extent.hidden, extent.target_width);
    let most = hidden.max(extent.stage);
    let dprojected = s.scratch(width);
    let dlogits = s.scratch(extent.kv_heads);
    let (dz, dscalar) = (s.scratch(most), s.scratch(hidden));
    let work = Work {
        branch: s.scratch(most),
        normed: s.scratch(most),
        dinner: s.scratch(extent.inner),
        partials: s.partials(most),
    };
    let f32 = |mut columns: FuseColumns| {
        columns.dtype = dtype_code(DType::F32);
        columns
    };
    let args = FuseTrainingArgs {
        x: saved.projected.operand,
        y: s.operand(|half| (half.gates, DType::F32)),
        extra: saved.scalar.map_or(0, |(_, logits)| logits.operand),
        weight: s.operand(|half| (half.dout, DType::F32)),
        bias: s.operand(|half| (half.dgates, DType::F32)),
        out: dprojected.operand,
        dlogits: dlogits.operand,
        columns: f32(geometry.out),
        ..s.args
    };
    s.by_token("fuse_training_gate_backward", args);

    let dz = Rows { stride: hidden as u32, ..dz };
    let linear = s.linear(|p| &p.output);
    s.product_backward(&linear, saved.last(), dprojected, Some(dz));
    for (number, block) in saved.blocks.iter().enumerate().rev() {
        let x = if number == 0 { saved.mlp1.y } else { saved.blocks[number - 1].y };
        s.ffn_backward(Which::Block(number), x, block.u, dz, &work);
    }
    if let Some((block, _)) = saved.scalar {
        let head = s.linear(|p| &scalar_of(p).1);
        s.product_backward(&head, block.y, dlogits, Some(dscalar));
        s.ffn_backward(Which::Scalar, saved.mlp1.y, block.u, dscalar, &work);
        let args = FuseTrainingArgs { x: dscalar.operand, out: dz.operand, cols: hidden as u32, ..s.args };
        s.by_token("fuse_training_add", args);
    }
    s.ffn_backward(Which::Mlp1, saved.z0, saved.mlp1.u, dz, &work);
    let linear = s.linear(|p| &p.input);
    let wanted = grads.iter().any(|grads| grads.dtarget.is_some()) && p.fuse.use_target;
    if !wanted && saved.stage.is_none() {
        s.product_backward(&linear, saved.input, dz, None);
        return s.plan(&extent);
    }
    let dinput = s.scratch(linear.cols as usize);
    let dright = s.columns_from(dinput, staged(&extent));
    s.product_backward(&linear, saved.input, dz, Some(dinput));
    if wanted {
        let args = FuseTrainingArgs {
            x: dright.operand,
            x_stride: dright.stride,
            out: s.operand(|half| (half.dtarget, DType::F32)),
            columns: f32(geometry.target),
            ..s.args
        };
        s.by_token("fuse_training_scatter", args);
    }
    if let Some((source, z0, block)) = saved.stage {
        let (into, from) = (s.linear(|p| &stage_of(p).input), s.linear(|p| &stage_of(p).output));
        let dz = Rows { stride: into.rows, ..dz };
        s.product_backward(&from, block.y, dinput, Some(dz));
        s.ffn_backward(Which::Stage, z0, block.u, dz, &work);
        s.product_backward(&into, source, dz, None);
    }
    s.plan(&extent)
}

/// `scratch_each`: F32 elements of scratch of each.
fn halves<'a>(
    e: &FuseExtent,
    o: &'a FuseOperands,
    tapes: &'a [FuseTape],
    grads: Option<&'a [&'a FuseGrads]>,
    scratch_each: usize,
) -> Vec<Half<'a>> {
    let geometry = Geometry::new(&o.layers[0], o);
    let mut scratch = o.scratch.address() + 4 * table_len(e) as u64;
    let mut all = Vec::with_capacity(2 * o.layers.len());
    for (i, (layer, tape)) in o.layers.iter().zip(tapes).enumerate() {
        assert!(Geometry::new(layer, o) == geometry, "fuse: layers with pages of different geometry");
        let grads = grads.map(|grads| grads[i]);
        for half in 0..2 {
            let FuseLayer { source, target, base, out, .. } = layer;
            let pages = |pages: &KvPages| [&pages.keys, &pages.values][half].address();
            let gates = (half * e.tokens * e.kv_heads * 4) as u64;
            all.push(Half {
                projector: [&*layer.keys, &*layer.values][half],
                grad: grads.map(|grads| [&*grads.keys, &*grads.values][half]),
                part: dropout_part(tape.layer, half as u32, 0),
                source: pages(source),
                target: pages(target),
                base: pages(base),
                out: pages(out),
                gates: tape.gates.address() + gates,
                dgates: grads.map_or(0, |grads| grads.dgates.address() + gates),
                dout: grads.map_or(0, |grads| pages(&grads.dout)),
                dtarget: grads.and_then(|grads| grads.dtarget.as_ref()).map_or(0, pages),
                saved: tape.saved.address() + (half * saved_half(e) * 4) as u64,
                scratch,
            });
            scratch += 4 * scratch_each as u64;
        }
    }
    all
}

/// Rows that a step of a backward pass works in.
struct Work {
    branch: Rows,
    normed: Rows,
    dinner: Rows,
    partials: u32,
}
