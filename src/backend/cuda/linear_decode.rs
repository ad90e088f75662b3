//! Linear maps bound by reading the weights (kernels/gemv.cu), and those in precision f32 (kernels/linear_f32.cu).

use super::{Launch, dtype_code, launch::KernelArgs};
use crate::{
    backend::{DType, Precision, Tensor},
    ops::{GluParams, LinearParams, Pass, Weight, WeightPart},
};

/// Matrices of a launch.
pub(super) const PARTS: usize = 3;

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct PartsArgs {
    weights: [u64; PARTS],
    biases: [u64; PARTS],
    x: u64,
    out: u64,
    rows: [u32; PARTS],
    columns: [u32; PARTS],
    dtypes: [u32; PARTS],
    bias_dtypes: [u32; PARTS],
    tokens: u32,
    cols: u32,
    out_stride: u32,
    out_bf16: u32,
    epilogue: u32,
    pub activation: u32,
    segment: u32,
}

// SAFETY: twin of `PartsArgs` in kernels/parts.cuh.
unsafe impl KernelArgs for PartsArgs {}

/// Twin of `Epilogue` in kernels/parts.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Epilogue {
    Assign = 0,
    Add = 1,
    Glu = 2,
}

/// A linear map for one token of each sequence, or in precision f32. Matrices that one kernel takes share a launch.
pub(super) fn linear(p: LinearParams, x: &Tensor, weight: &Weight, out: &Tensor) -> Vec<(Launch, PartsArgs)> {
    let epilogue = if p.accumulate { Epilogue::Add } else { Epilogue::Assign };
    let columns = weight.parts.iter().scan(0, |next, part| {
        let column = *next;
        *next += part.matrix.rows() as u32;
        Some(column)
    });
    let mut parts: Vec<(Kernel, u32, &WeightPart)> = columns
        .zip(&weight.parts)
        .filter(|(_, part)| part.matrix.rows() > 0)
        .map(|(column, part)| {
            (Kernel::of(p.precision, p.pass, x.row_len(), part.matrix.dtype()), column, part)
        })
        .collect();
    parts.sort_by_key(|(kernel, ..)| kernel.order());
    parts
        .chunk_by(|a, b| a.0 == b.0)
        .flat_map(|same| same.chunks(PARTS))
        .map(|same| {
            let stacked: Vec<_> = same.iter().map(|&(_, column, part)| (column, part)).collect();
            let mut args = PartsArgs::new(x, &stacked, out, epilogue);
            let most = same.iter().map(|(.., part)| part.matrix.rows() as u32).max().unwrap_or(0);
            (args.launch(same[0].0, most, same.len() as u32, epilogue), args)
        })
        .collect()
}

/// The same of a gated linear unit.
pub(super) fn linear_glu(p: GluParams, x: &Tensor, gate_up: &Weight, out: &Tensor) -> (Launch, PartsArgs) {
    let [gate, up] = &gate_up.parts[..] else { unreachable!("`ops` has checked that they are two") };
    let kernels = [gate, up].map(|part| Kernel::of(p.precision, p.pass, x.row_len(), part.matrix.dtype()));
    // A row of each is one warp's: they have one dtype, or it is data.
    let kernel = if kernels[0] == kernels[1] { kernels[0] } else { Kernel::RowBf16 };
    let mut args = PartsArgs::new(x, &[(0, gate), (0, up)], out, Epilogue::Glu);
    args.activation = p.activation as u32;
    (args.launch(kernel, p.width, 1, Epilogue::Glu), args)
}

impl PartsArgs {
    pub fn new(x: &Tensor, parts: &[(u32, &WeightPart)], out: &Tensor, epilogue: Epilogue) -> PartsArgs {
        let mut args = PartsArgs {
            x: x.address(),
            out: out.address(),
            tokens: x.rows() as u32,
            cols: x.row_len() as u32,
            out_stride: out.row_len() as u32,
            out_bf16: u32::from(out.dtype() == DType::Bf16),
            epilogue: epilogue as u32,
            ..PartsArgs::default()
        };
        for (i, (column, part)) in parts.iter().enumerate() {
            args.weights[i] = part.matrix.address();
            args.rows[i] = part.matrix.rows() as u32;
            args.columns[i] = *column;
            args.dtypes[i] = dtype_code(part.matrix.dtype());
            if let Some(bias) = &part.bias {
                (args.biases[i], args.bias_dtypes[i]) = (bias.address(), dtype_code(bias.dtype()));
            }
        }
        args
    }

    fn launch(&mut self, kernel: Kernel, rows: u32, matrices: u32, epilogue: Epilogue) -> Launch {
        let glu = epilogue == Epilogue::Glu;
        let (launch, segment) = launch(kernel, rows, matrices, self.cols, self.tokens, glu);
        self.segment = segment;
        launch
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernel {
    /// Rows of this dtype 16 bytes at a time.
    Gemv(DType),
    /// A warp a row, any dtypes.
    RowBf16,
    RowF32,
    /// Tiles of 64 tokens by 64 rows, any dtypes.
    TiledF32,
}

impl Kernel {
    pub fn of(precision: Precision, pass: Pass, cols: usize, dtype: DType) -> Kernel {
        match (precision, pass) {
            (Precision::F32, Pass::Prefill) => Kernel::TiledF32,
            (Precision::F32, Pass::Decode) => Kernel::RowF32,
            (Precision::Fast, _) if cols.is_multiple_of(8) => Kernel::Gemv(dtype),
            (Precision::Fast, _) => Kernel::RowBf16,
        }
    }

    fn order(self) -> u32 {
        match self {
            Kernel::Gemv(dtype) => dtype_code(dtype),
            Kernel::RowBf16 | Kernel::RowF32 | Kernel::TiledF32 => u32::MAX,
        }
    }
}

/// Columns of a tile in kernels/lanes.cuh.
const TILE: u32 = 1024;
/// Twins of the constants in kernels/gemv.cu.
const WARPS: u32 = 4;
const STAGES: u32 = 3;
const ROWS: u32 = 2;
/// As many blocks as a large GPU holds at once; each takes rows until there are none.
const MAX_BLOCKS: u32 = 1024;
/// Shared memory for x: 16 thousand columns of one token, 2 thousand of eight.
const X_BYTES: u32 = 36 << 10;

/// The launch for `matrices` of up to `rows` rows, and the tiles of x that a block holds.
pub(super) fn launch(
    kernel: Kernel,
    rows: u32,
    matrices: u32,
    cols: u32,
    tokens: u32,
    glu: bool,
) -> (Launch, u32) {
    let row = |kernel| {
        let grid = (rows.div_ceil(WARPS), tokens.div_ceil(4), matrices);
        (Launch { kernel, grid, block: 32 * WARPS, shared: 0 }, 0)
    };
    match kernel {
        Kernel::RowBf16 => row("linear_row_bf16"),
        Kernel::RowF32 => row("linear_row_f32"),
        Kernel::TiledF32 => {
            let grid = (rows.div_ceil(if glu { 32 } else { 64 }), tokens.div_ceil(64), matrices);
            (Launch { kernel: "linear_f32", grid, block: 256, shared: 0 }, 0)
        }
        Kernel::Gemv(dtype) => {
            let (kernel, at_once) = gemv_kernel(dtype, tokens);
            let groups = rows.div_ceil(WARPS * if glu { 1 } else { ROWS });
            let x_tile = x_tile_bytes(dtype) * at_once;
            let segment = cols.div_ceil(TILE).min(X_BYTES / x_tile).max(1);
            let ring = if dtype.is_quantized() {
                let tile = TILE / dtype.block_len() as u32 * dtype.block_bytes() as u32;
                // A tile may begin in the middle of 16 bytes.
                WARPS * STAGES * ROWS * ((tile + 14).next_multiple_of(16) + pad_bytes(dtype))
            } else {
                0
            };
            let grid = (tokens.div_ceil(at_once), groups.min(MAX_BLOCKS), matrices);
            (Launch { kernel, grid, block: 32 * WARPS, shared: segment * x_tile + ring }, segment)
        }
    }
}

/// Twin of `X_TILE` in kernels/lanes.cuh.
fn x_tile_bytes(dtype: DType) -> u32 {
    match dtype {
        DType::F32 | DType::F16 | DType::Bf16 | DType::U32 => 4 * 512,
        DType::Q2K | DType::Q3K => 4 * 576,
        _ => 4 * 544,
    }
}

/// Bytes of the gaps in a tile of blocks: see `Lane::PAD` in kernels/lanes.cuh.
fn pad_bytes(dtype: DType) -> u32 {
    match dtype {
        DType::Q4_0 | DType::Iq4Nl => 3 * 16,
        DType::Q8_0 => 32,
        _ => 0,
    }
}

/// The kernel for so many tokens, and how many it takes while it reads the weights once.
fn gemv_kernel(dtype: DType, tokens: u32) -> (&'static str, u32) {
    macro_rules! names {
        ($name:literal) => {
            [concat!($name, "_1"), concat!($name, "_2"), concat!($name, "_4"), concat!($name, "_8")]
        };
    }
    let names = match dtype {
        DType::F32 => names!("gemv_f32"),
        DType::F16 => names!("gemv_f16"),
        DType::Bf16 => names!("gemv_bf16"),
        DType::Q4_0 => names!("gemv_q4_0"),
        DType::Q4_1 => names!("gemv_q4_1"),
        DType::Q5_0 => names!("gemv_q5_0"),
        DType::Q5_1 => names!("gemv_q5_1"),
        DType::Q8_0 => names!("gemv_q8_0"),
        DType::Q2K => names!("gemv_q2_k"),
        DType::Q3K => names!("gemv_q3_k"),
        DType::Q4K => names!("gemv_q4_k"),
        DType::Q5K => names!("gemv_q5_k"),
        DType::Q6K => names!("gemv_q6_k"),
        DType::Iq4Nl => names!("gemv_iq4_nl"),
        DType::U32 => unreachable!("U32 is no weight"),
    };
    let size = tokens.clamp(1, 8).next_power_of_two();
    (names[size.trailing_zeros() as usize], size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_fits_on_every_card() {
        for dtype in DType::ALL.into_iter().filter(|&dtype| dtype != DType::U32) {
            for tokens in 1..20 {
                for cols in [256, 4096, 14_336, 53_248] {
                    let (launch, segment) = launch(Kernel::Gemv(dtype), 4096, 1, cols, tokens, false);
                    // 99 KiB is the most of a block on sm_86, sm_89 and sm_120.
                    assert!(launch.shared <= 64 << 10, "{dtype}, {cols} columns: {launch}");
                    assert!(segment >= 1 && segment <= cols.div_ceil(TILE));
                }
            }
        }
    }

    #[test]
    fn every_row_and_token_has_a_warp() {
        for (rows, tokens, glu) in [(1, 1, false), (7, 3, false), (1000, 9, true), (151_936, 64, false)] {
            let (launch, _) = launch(Kernel::Gemv(DType::Q4K), rows, 3, 1024, tokens, glu);
            let (passes, blocks, matrices) = launch.grid;
            assert!(blocks == MAX_BLOCKS || blocks * WARPS * if glu { 1 } else { 2 } >= rows);
            assert_eq!((passes, matrices), (tokens.div_ceil(8), 3));
        }
    }

    #[test]
    fn weights_are_read_once_for_eight_tokens() {
        let kernels: Vec<_> = (1..=9).map(|tokens| gemv_kernel(DType::Q6K, tokens)).collect();
        let sizes: Vec<_> = kernels.iter().map(|(_, size)| *size).collect();
        assert_eq!(sizes, [1, 2, 4, 4, 8, 8, 8, 8, 8]);
        assert_eq!((kernels[0].0, kernels[8].0), ("gemv_q6_k_1", "gemv_q6_k_8"));
    }
}
