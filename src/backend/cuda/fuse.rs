//! The fuser of all layers of a call, keys and values alike, as one grouped problem: kernels/fuse.cu.

use super::{
    Launch, dtype_code,
    launch::KernelArgs,
    linear_prefill::{THREADS, Tile},
    pages::{self, CopySlotsArgs},
};
use crate::{
    backend::{DType, Precision, Tensor},
    ops::{Ffn, FuseExtent, FuseLayer, FuseOperands, FuseParams, KvPages, Projector, Weight},
};

/// Of the fuser's RMSNorm, whatever the models use.
pub(super) const NORM_EPS: f32 = 1e-6;

/// Twin of `FuseMatrix` in kernels/fuse.cu.
#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct FuseMatrix {
    weights: u64,
    vector: u64,
    dtype: u32,
    vector_dtype: u32,
}

/// Twin of `FuseProblem`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct FuseProblem {
    source: u64,
    target: u64,
    base: u64,
    out: u64,
    gate: f32,
    unused: u32,
}

/// Twin of `FuseColumns` in kernels/columns.cuh.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq)]
pub(super) struct FuseColumns {
    slots: u64,
    pub dtype: u32,
    pub width: u32,
    heads: u32,
    block_size: u32,
    dim: u32,
    unused: u32,
}

/// Twin of `FuseEpilogue`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Epilogue {
    ToZ = 0,
    AddToZ = 1,
    ToRows = 2,
    ToGelu = 3,
    ZToRows = 4,
    ToWeights = 5,
    ToPages = 6,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct FuseArgs {
    matrices: u64,
    problems: u64,
    x: u64,
    z: u64,
    out: u64,
    weights: u64,
    first: FuseColumns,
    second: FuseColumns,
    target: FuseColumns,
    base: FuseColumns,
    to: FuseColumns,
    tokens: u32,
    rows: u32,
    cols: u32,
    matrix: u32,
    matrices_each: u32,
    z_stride: u32,
    out_stride: u32,
    epilogue: u32,
    replaces_target: u32,
    eps: f32,
}

// SAFETY: twin of `FuseArgs` in kernels/fuse.cu.
unsafe impl KernelArgs for FuseArgs {}

/// What a call does.
pub(super) struct Plan {
    /// Goes to the start of the scratch memory before anything is launched.
    pub table: Vec<u8>,
    pub launches: Vec<(Launch, FuseArgs)>,
    /// Halves with a closed gate whose `base` is not `out`.
    pub copies: Vec<(Launch, CopySlotsArgs)>,
}

/// Bytes of the scratch memory, from its start, in the order they lie in: each part begins at a multiple of 256.
struct Layout {
    matrices: usize,
    problems: usize,
    z: usize,
    /// Normalised rows, and rows that an FFN block has left.
    rows: usize,
    /// Inner rows of the FFN blocks; what C2C-C's stage makes of the source.
    inner: usize,
    weights: usize,
    end: usize,
    hidden_stride: usize,
    inner_stride: usize,
    matrices_each: usize,
}

impl Layout {
    /// For activations of `activation` bytes and `problems` halves of layers.
    fn new(e: &FuseExtent, problems: usize, activation: usize) -> Layout {
        // Rows are a multiple of 16 bytes.
        let hidden_stride = e.hidden.max(e.stage).next_multiple_of(8);
        let staged = if e.stage > 0 { e.target_width } else { 0 };
        let inner_stride = e.inner.max(staged).next_multiple_of(8);
        let products = 2 + if e.stage > 0 { 2 } else { 0 };
        // Of each FFN block a norm and two products; input, output, head, and both of the stage.
        let matrices_each = 3 * e.ffns + products + 1;
        let lines = problems * e.tokens;
        let mut end = 0;
        let mut part = |bytes: usize| {
            let start = end;
            end = (end + bytes).next_multiple_of(256);
            start
        };
        Layout {
            matrices: part(problems * matrices_each * size_of::<FuseMatrix>()),
            problems: part(problems * size_of::<FuseProblem>()),
            z: part(lines * hidden_stride * 4),
            rows: part(lines * hidden_stride * activation),
            inner: part(lines * inner_stride * activation),
            weights: part(lines * e.kv_heads * 4),
            end,
            hidden_stride,
            inner_stride,
            matrices_each,
        }
    }
}

/// F32 elements of scratch for `extent`, in either precision.
pub(super) fn scratch_len(extent: FuseExtent) -> usize {
    Layout::new(&extent, 2 * extent.layers, 4).end / 4
}

/// A launch of the fuser, for all problems at once.
struct Step<'a> {
    x: X,
    /// `None`: a norm.
    product: Option<&'a Weight>,
    norm: Option<&'a Tensor>,
    epilogue: Epilogue,
}

/// Where a product's x comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum X {
    Source,
    SourceAndTarget,
    StagedAndTarget,
    Staged,
    Rows,
    Inner,
}

/// The steps of a projector, the same for all of one size.
fn steps(p: &Projector, use_target: bool) -> Vec<Step<'_>> {
    assert!(!p.blocks.is_empty(), "fuse: a projector without a block after its first");
    let mut all = Vec::new();
    let product = |x, weight, epilogue| Step { x, product: Some(weight), norm: None, epilogue };
    if let Some(stage) = &p.source_stage {
        all.push(product(X::Source, &stage.input, Epilogue::ToZ));
        all.extend(ffn(&stage.ffn, Epilogue::ZToRows));
        all.push(product(X::Rows, &stage.output, Epilogue::ToRows));
    }
    let x = match (p.source_stage.is_some(), use_target) {
        (false, false) => X::Source,
        (false, true) => X::SourceAndTarget,
        (true, false) => X::Staged,
        (true, true) => X::StagedAndTarget,
    };
    all.push(product(x, &p.input, Epilogue::ToZ));
    all.extend(ffn(&p.mlp1, Epilogue::AddToZ));
    if let Some((block, head)) = &p.scalar {
        all.extend(ffn(block, Epilogue::ZToRows));
        all.push(product(X::Rows, head, Epilogue::ToWeights));
    }
    for (i, block) in p.blocks.iter().enumerate() {
        let last = i + 1 == p.blocks.len();
        all.extend(ffn(block, if last { Epilogue::ZToRows } else { Epilogue::AddToZ }));
    }
    all.push(product(X::Rows, &p.output, Epilogue::ToPages));
    all
}

fn ffn(block: &Ffn, epilogue: Epilogue) -> [Step<'_>; 3] {
    let norm = Step { x: X::Rows, product: None, norm: Some(&block.norm), epilogue: Epilogue::ToRows };
    [
        norm,
        Step { x: X::Rows, product: Some(&block.w1), norm: None, epilogue: Epilogue::ToGelu },
        Step { x: X::Inner, product: Some(&block.w2), norm: None, epilogue },
    ]
}

/// One half of one layer, its gate open.
struct Half<'a> {
    projector: &'a Projector,
    problem: FuseProblem,
}

/// # Panics
/// If layers have pages of different geometry, a projector has no block after its first, or a matrix is stacked or of a block format:
/// no checkpoint is read so.
pub(super) fn fuse(p: FuseParams, extent: FuseExtent, o: &FuseOperands, processors: u32) -> Plan {
    let mut copies = Vec::new();
    let mut halves = Vec::new();
    let Some(first) = o.layers.first() else {
        return Plan { table: Vec::new(), launches: Vec::new(), copies };
    };
    let geometry = Geometry::new(first, o);
    for layer in &o.layers {
        assert!(Geometry::new(layer, o) == geometry, "fuse: layers with pages of different geometry");
        let of_layer = [&layer.source, &layer.target, &layer.base, &layer.out];
        let halves_of_layer = [
            (&layer.keys, layer.gates[0], of_layer.map(|pages| &pages.keys)),
            (&layer.values, layer.gates[1], of_layer.map(|pages| &pages.values)),
        ];
        for (projector, gate, pages) in halves_of_layer {
            let [source, target, base, out] = pages.map(Tensor::address);
            if gate != 0.0 {
                let problem = FuseProblem { source, target, base, out, gate, unused: 0 };
                halves.push(Half { projector, problem });
            } else if (base, o.base_slots.address()) != (out, o.out_slots.address()) {
                copies.push(copy(pages[2], pages[3], o));
            }
        }
    }
    let (table, launches) = match halves.is_empty() {
        true => (Vec::new(), Vec::new()),
        false => grouped(p, &extent, o, &halves, &geometry, processors),
    };
    Plan { table, launches, copies }
}

/// Copies the columns of `base` to `out`.
fn copy(base: &Tensor, out: &Tensor, o: &FuseOperands) -> (Launch, CopySlotsArgs) {
    let pages = |half: &Tensor| KvPages { keys: half.clone(), values: half.clone() };
    let (mut launch, args) = pages::copy_slots(&pages(base), &o.base_slots, &pages(out), &o.out_slots);
    // The first of the two halves, which are the same.
    launch.grid.1 = 1;
    (launch, args)
}

/// Where the columns of a layer lie.
#[derive(PartialEq)]
pub(super) struct Geometry {
    pub source: FuseColumns,
    pub target: FuseColumns,
    pub base: FuseColumns,
    pub out: FuseColumns,
}

impl Geometry {
    pub fn new(layer: &FuseLayer, o: &FuseOperands) -> Geometry {
        let columns = |pages: &KvPages, slots: &Tensor| FuseColumns {
            slots: slots.address(),
            dtype: dtype_code(pages.keys.dtype()),
            width: pages.width() as u32,
            heads: pages.kv_heads() as u32,
            block_size: pages.block_size() as u32,
            dim: pages.head_dim() as u32,
            unused: 0,
        };
        Geometry {
            source: columns(&layer.source, &o.source_slots),
            target: columns(&layer.target, &o.target_slots),
            base: columns(&layer.base, &o.base_slots),
            out: columns(&layer.out, &o.out_slots),
        }
    }
}

fn grouped(
    p: FuseParams,
    extent: &FuseExtent,
    o: &FuseOperands,
    halves: &[Half],
    geometry: &Geometry,
    processors: u32,
) -> (Vec<u8>, Vec<(Launch, FuseArgs)>) {
    let activation = match p.precision {
        Precision::F32 => DType::F32,
        Precision::Fast => DType::Bf16,
    };
    let layout = Layout::new(extent, halves.len(), activation.block_bytes());
    let all: Vec<Vec<Step>> = halves.iter().map(|half| steps(half.projector, p.use_target)).collect();
    let mut table = vec![0; layout.z];
    for (i, steps) in all.iter().enumerate() {
        assert_eq!(steps.len(), all[0].len(), "fuse: projectors of different kinds");
        assert!(steps.len() <= layout.matrices_each, "fuse: more products than planned");
        for (j, step) in steps.iter().enumerate() {
            let at = layout.matrices + (i * layout.matrices_each + j) * size_of::<FuseMatrix>();
            table[at..at + size_of::<FuseMatrix>()].copy_from_slice(bytemuck::bytes_of(&step.matrix()));
        }
        let at = layout.problems + i * size_of::<FuseProblem>();
        table[at..at + size_of::<FuseProblem>()].copy_from_slice(bytemuck::bytes_of(&halves[i].problem));
    }

    let scratch = o.scratch.address();
    let [matrices, problems, z, rows, inner, weights] =
        [layout.matrices, layout.problems, layout.z, layout.rows, layout.inner, layout.weights]
            .map(|at| scratch + at as u64);
    let rows_of = |stride: usize, width: u32| FuseColumns {
        slots: 0,
        dtype: dtype_code(activation),
        width,
        heads: 1,
        block_size: 1,
        dim: stride as u32,
        unused: 0,
    };
    let (hidden, wide) = (layout.hidden_stride, layout.inner_stride);
    let scalar = halves[0].projector.scalar.is_some();
    let launches = (0..all[0].len()).map(|j| {
        let step = &all[0][j];
        let (cols, outputs) = match step.product {
            Some(weight) => (weight.cols() as u32, weight.rows() as u32),
            None => (step.norm.map_or(0, |norm| norm.elements() as u32), 0),
        };
        let (x, first) = match step.x {
            X::Source | X::SourceAndTarget => (0, geometry.source),
            X::StagedAndTarget | X::Staged => (inner, rows_of(wide, extent.target_width as u32)),
            X::Rows => (rows, rows_of(hidden, cols)),
            X::Inner => (inner, rows_of(wide, cols)),
        };
        let second = match step.x {
            X::SourceAndTarget | X::StagedAndTarget => geometry.target,
            _ => FuseColumns::default(),
        };
        // What C2C-C's stage makes waits where inner rows are kept: none are needed between.
        let (out, out_stride) = match (step.epilogue, step.product) {
            (Epilogue::ToGelu, _) | (Epilogue::ToRows, Some(_)) => (inner, wide),
            _ => (rows, hidden),
        };
        let args = FuseArgs {
            matrices,
            problems,
            x,
            z,
            out,
            weights: if scalar { weights } else { 0 },
            first,
            second,
            target: geometry.target,
            base: geometry.base,
            to: geometry.out,
            tokens: p.tokens,
            rows: outputs,
            cols,
            matrix: j as u32,
            matrices_each: layout.matrices_each as u32,
            z_stride: hidden as u32,
            out_stride: out_stride as u32,
            epilogue: step.epilogue as u32,
            replaces_target: u32::from(!p.use_target),
            eps: NORM_EPS,
        };
        let kernel = match (p.precision, step.product) {
            (Precision::F32, None) => Kernel::NormF32,
            (Precision::F32, Some(_)) => Kernel::F32,
            (Precision::Fast, None) => Kernel::NormBf16,
            (Precision::Fast, Some(_)) => {
                let weights = all.iter().all(|steps| steps[j].is_bf16());
                match (args.is_direct(), weights && cols.is_multiple_of(8)) {
                    (true, true) => Kernel::Direct,
                    (true, false) => Kernel::AnyWeights,
                    (false, _) => Kernel::Any,
                }
            }
        };
        (launch(kernel, p.tokens, outputs, halves.len() as u32, processors), args)
    });
    (table, launches.collect())
}

impl Step<'_> {
    fn matrix(&self) -> FuseMatrix {
        let mut matrix = FuseMatrix::default();
        let vector = match self.product {
            Some(weight) => {
                let [part] = &weight.parts[..] else {
                    panic!("fuse: a stack of {} matrices", weight.parts.len())
                };
                let dtype = part.matrix.dtype();
                assert!(!dtype.is_quantized(), "fuse: {dtype} weights");
                (matrix.weights, matrix.dtype) = (part.matrix.address(), dtype_code(dtype));
                part.bias.as_ref()
            }
            None => self.norm,
        };
        if let Some(vector) = vector {
            (matrix.vector, matrix.vector_dtype) = (vector.address(), dtype_code(vector.dtype()));
        }
        matrix
    }

    fn is_bf16(&self) -> bool {
        self.product.is_some_and(|weight| weight.parts.iter().all(|part| part.matrix.dtype() == DType::Bf16))
    }
}

impl FuseArgs {
    /// Whether x can be copied 16 bytes at a time.
    fn is_direct(&self) -> bool {
        let direct = |c: &FuseColumns| {
            c.width == 0
                || c.dtype == dtype_code(DType::Bf16) && c.width.is_multiple_of(8) && c.dim.is_multiple_of(8)
        };
        direct(&self.first) && direct(&self.second)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernel {
    /// bf16, 16 bytes at a time.
    Direct,
    /// The same x, weights of any type.
    AnyWeights,
    Any,
    F32,
    NormBf16,
    NormF32,
}

/// The launch of one step of `problems` problems, a product to rows of `rows` elements or a norm.
pub(super) fn launch(kernel: Kernel, tokens: u32, rows: u32, problems: u32, processors: u32) -> Launch {
    let side = Tile::SMALL.rows;
    let square = (tokens.div_ceil(side), rows.div_ceil(side), problems);
    let norm = (tokens, 1, problems);
    match kernel {
        Kernel::Direct => {
            let tile = Tile::LARGE.sooner(Tile::SMALL, tokens, &vec![rows; problems as usize], processors);
            Launch {
                kernel: if tile.rows == Tile::LARGE.rows { "fuse_128" } else { "fuse_64" },
                grid: (tokens.div_ceil(tile.tokens), rows.div_ceil(tile.rows), problems),
                block: THREADS,
                shared: tile.ring_bytes(),
            }
        }
        Kernel::AnyWeights | Kernel::Any => Launch {
            kernel: if kernel == Kernel::Any { "fuse_any" } else { "fuse_any_weights" },
            grid: square,
            block: THREADS,
            shared: Tile::SMALL.ring_bytes(),
        },
        Kernel::F32 => Launch { kernel: "fuse_f32", grid: square, block: 256, shared: 0 },
        Kernel::NormBf16 => Launch { kernel: "fuse_norm_bf16", grid: norm, block: 128, shared: 0 },
        Kernel::NormF32 => Launch { kernel: "fuse_norm_f32", grid: norm, block: 128, shared: 0 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent() -> FuseExtent {
        FuseExtent {
            layers: 28,
            tokens: 1000,
            hidden: 1024,
            inner: 1024,
            stage: 0,
            source_width: 128,
            target_width: 1024,
            kv_heads: 8,
            ffns: 3,
            joint: false,
        }
    }

    #[test]
    fn scratch_parts_follow_one_another() {
        let layout = Layout::new(&extent(), 56, 2);
        let parts = [
            layout.matrices,
            layout.problems,
            layout.z,
            layout.rows,
            layout.inner,
            layout.weights,
            layout.end,
        ];
        let lines = 56 * 1000;
        let bytes = [56 * 12 * 24, 56 * 40, lines * 4096, lines * 2048, lines * 2048, lines * 32];
        for (i, (pair, bytes)) in parts.windows(2).zip(bytes).enumerate() {
            assert!(pair[0].is_multiple_of(256) && pair[1] - pair[0] >= bytes, "part {i}: {parts:?}");
        }
        assert!(layout.end <= 4 * scratch_len(extent()));
    }

    #[test]
    fn rows_of_scratch_begin_at_multiples_of_16_bytes() {
        let odd = FuseExtent { hidden: 60, inner: 52, stage: 47, target_width: 54, ..extent() };
        let layout = Layout::new(&odd, 2, 2);
        assert_eq!((layout.hidden_stride, layout.inner_stride), (64, 56));
    }

    #[test]
    fn all_layers_fill_a_card_with_large_tiles_and_one_does_not() {
        let kernel = |tokens, problems| launch(Kernel::Direct, tokens, 1024, problems, 108).kernel;
        assert_eq!((kernel(512, 56), kernel(64, 2)), ("fuse_128", "fuse_64"));
    }
}
