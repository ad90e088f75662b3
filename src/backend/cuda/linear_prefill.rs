//! Linear maps of many tokens on tensor cores: kernels/linear.cu.

use super::{
    Launch, dtype_code,
    linear_decode::{self, Epilogue, PARTS, PartsArgs},
};
use crate::{
    backend::{DType, Tensor},
    ops::{GluParams, LinearParams, Weight, WeightPart},
};

/// Threads of a block, twin of `MATMUL_THREADS` in kernels/matmul.cuh.
pub(super) const THREADS: u32 = 128;
/// Twins of constants there.
const STAGES: u32 = 3;
const DEPTH_BYTES: u32 = 64;

/// A linear map in precision fast: a launch for the matrices of each dtype. Rows that don't begin at multiples of 16 bytes
/// are left to [`linear_decode`].
pub(super) fn linear(
    p: LinearParams,
    x: &Tensor,
    weight: &Weight,
    out: &Tensor,
    processors: u32,
) -> Vec<(Launch, PartsArgs)> {
    if !x.row_len().is_multiple_of(8) {
        return linear_decode::linear(p, x, weight, out);
    }
    let epilogue = if p.accumulate { Epilogue::Add } else { Epilogue::Assign };
    let mut column = 0;
    let mut parts: Vec<(u32, &WeightPart)> = Vec::with_capacity(weight.parts.len());
    for part in &weight.parts {
        parts.push((column, part));
        column += part.matrix.rows() as u32;
    }
    parts.retain(|(_, part)| part.matrix.rows() > 0);
    parts.sort_by_key(|(_, part)| dtype_code(part.matrix.dtype()));
    let same = parts.chunk_by(|a, b| a.1.matrix.dtype() == b.1.matrix.dtype());
    same.flat_map(|same| same.chunks(PARTS))
        .map(|same| {
            let rows: Vec<u32> = same.iter().map(|(_, part)| part.matrix.rows() as u32).collect();
            let launch = launch(same[0].1.matrix.dtype(), p.tokens, &rows, false, processors);
            (launch, PartsArgs::new(x, same, out, epilogue))
        })
        .collect()
}

/// A gated linear unit. Gate and up projection of two dtypes are left to [`linear_decode`], as are rows that don't begin at
/// multiples of 16 bytes.
pub(super) fn linear_glu(
    p: GluParams,
    x: &Tensor,
    gate_up: &Weight,
    out: &Tensor,
    processors: u32,
) -> (Launch, PartsArgs) {
    let [gate, up] = &gate_up.parts[..] else { unreachable!("`ops` has checked that they are two") };
    let dtype = gate.matrix.dtype();
    if !x.row_len().is_multiple_of(8) || dtype != up.matrix.dtype() {
        return linear_decode::linear_glu(p, x, gate_up, out);
    }
    let mut args = PartsArgs::new(x, &[(0, gate), (0, up)], out, Epilogue::Glu);
    args.activation = p.activation as u32;
    (launch(dtype, p.tokens, &[p.width], true, processors), args)
}

/// A tile of a block and what it costs, in any unit: large tiles have fewer loads from shared memory for a product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tile {
    pub tokens: u32,
    pub rows: u32,
    cost: f32,
}

impl Tile {
    pub const LARGE: Tile = Tile { tokens: 128, rows: 128, cost: 4.0 };
    pub const RAW: Tile = Tile { tokens: 128, rows: 64, cost: 2.4 };
    pub const SMALL: Tile = Tile { tokens: 64, rows: 64, cost: 1.5 };

    fn blocks(self, tokens: u32, rows: impl Iterator<Item = u32>) -> u32 {
        tokens.div_ceil(self.tokens) * rows.map(|rows| rows.div_ceil(self.rows)).sum::<u32>()
    }

    /// Whichever is done sooner, if every multiprocessor works on one tile after the other.
    pub fn sooner(self, other: Tile, tokens: u32, rows: &[u32], processors: u32) -> Tile {
        let time = |tile: Tile| {
            tile.blocks(tokens, rows.iter().copied()).div_ceil(processors.max(1)) as f32 * tile.cost
        };
        if time(self) <= time(other) { self } else { other }
    }

    /// Bytes of the rings of matmul.cuh.
    pub fn ring_bytes(self) -> u32 {
        STAGES * (self.tokens + self.rows) * DEPTH_BYTES
    }
}

/// The launch for matrices of so many rows each, of one dtype.
pub(super) fn launch(dtype: DType, tokens: u32, rows: &[u32], glu: bool, processors: u32) -> Launch {
    let (large, small) = names(dtype);
    let plain = dtype == DType::Bf16;
    // Of a gated linear unit, a tile has rows of both matrices.
    let sides: Vec<u32> = rows.iter().map(|&rows| if glu { 2 * rows } else { rows }).collect();
    let big = if plain { Tile::LARGE } else { Tile::RAW };
    let tile = big.sooner(Tile::SMALL, tokens, &sides, processors);
    let most = sides.iter().copied().max().unwrap_or(0);
    let shared = if plain {
        tile.ring_bytes()
    } else {
        STAGES * tile.tokens * DEPTH_BYTES + 2 * tile.rows * (DEPTH_BYTES + slot_bytes(dtype))
    };
    Launch {
        kernel: if tile.tokens == big.tokens { large } else { small },
        grid: (tokens.div_ceil(tile.tokens), most.div_ceil(tile.rows), rows.len() as u32),
        block: THREADS,
        shared,
    }
}

/// Twin of `RawRows::SLOT` in kernels/linear.cu: what a row of raw weights takes in shared memory.
fn slot_bytes(dtype: DType) -> u32 {
    let columns = match dtype {
        DType::F32 | DType::F16 => 64,
        DType::Q8_0 => 128,
        _ => 256,
    };
    let length = columns / dtype.block_len() as u32 * dtype.block_bytes() as u32;
    let align = match dtype {
        DType::Q5_1 => 8,
        DType::Q4_1 | DType::Q2K => 4,
        DType::F32 | DType::F16 | DType::Q4K | DType::Q5K => 16,
        _ => 2,
    };
    if dtype == DType::F16 { length + 64 } else { ((length + 16 - align).div_ceil(16) | 1) * 16 }
}

/// The kernels with a large tile and with a small one.
fn names(dtype: DType) -> (&'static str, &'static str) {
    macro_rules! raw {
        ($name:literal) => {
            (concat!($name, "_128x64"), concat!($name, "_64x64"))
        };
    }
    match dtype {
        DType::Bf16 => ("linear_bf16_128x128", "linear_bf16_64x64"),
        DType::F32 => raw!("linear_f32"),
        DType::F16 => raw!("linear_f16"),
        DType::Q4_0 => raw!("linear_q4_0"),
        DType::Q4_1 => raw!("linear_q4_1"),
        DType::Q5_0 => raw!("linear_q5_0"),
        DType::Q5_1 => raw!("linear_q5_1"),
        DType::Q8_0 => raw!("linear_q8_0"),
        DType::Q2K => raw!("linear_q2_k"),
        DType::Q3K => raw!("linear_q3_k"),
        DType::Q4K => raw!("linear_q4_k"),
        DType::Q5K => raw!("linear_q5_k"),
        DType::Q6K => raw!("linear_q6_k"),
        DType::Iq4Nl => raw!("linear_iq4_nl"),
        DType::U32 => unreachable!("U32 is no weight"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_fits_on_every_card() {
        for dtype in DType::ALL.into_iter().filter(|&dtype| dtype != DType::U32) {
            for tokens in [1, 64, 65, 512, 4096] {
                let launch = launch(dtype, tokens, &[4096, 512, 512], false, 108);
                // 99 KiB is the most of a block on sm_86, sm_89 and sm_120.
                assert!(launch.shared <= 99 << 10, "{dtype}: {launch}");
                assert_eq!(launch.grid.2, 3);
            }
        }
    }

    #[test]
    fn short_prompts_take_small_tiles() {
        let kernel = |tokens, rows| launch(DType::Bf16, tokens, &[rows], false, 108).kernel;
        assert_eq!(kernel(40, 1024), "linear_bf16_64x64");
        assert_eq!(kernel(512, 896), "linear_bf16_64x64");
        assert_eq!(kernel(2048, 4096), "linear_bf16_128x128");
    }

    #[test]
    fn a_glu_tile_has_both_matrices() {
        let launch = launch(DType::Q4K, 4096, &[4864], true, 108);
        assert_eq!((launch.kernel, launch.grid), ("linear_q4_k_128x64", (32, 152, 1)));
    }
}
