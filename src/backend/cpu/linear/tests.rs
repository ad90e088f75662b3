//! Every path against f64 references on the true weights and on exactly quantised inputs.

use super::*;
use crate::{
    backend::{Backend, DType, cpu::blocks},
    ops::WeightPart,
};

/// xorshift: the same numbers on every run.
pub(in crate::backend::cpu) struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Between −1 and 1.
    pub fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// Where a block format keeps its half-precision factors.
fn factors(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::Iq4Nl => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => &[0, 2],
        DType::Q2K => &[80, 82],
        DType::Q3K => &[108],
        DType::Q6K => &[208],
        DType::F32 | DType::F16 | DType::Bf16 | DType::U32 => &[],
    }
}

/// Random weights of any format; block formats with random bits and sensible factors.
pub(in crate::backend::cpu) fn random_matrix(
    random: &mut Random,
    dtype: DType,
    rows: usize,
    cols: usize,
) -> Tensor {
    let tensor = tensor(dtype, rows, cols);
    let bytes = tensor.host_bytes_mut();
    if dtype.is_quantized() {
        bytes.iter_mut().for_each(|b| *b = (random.bits() >> 32) as u8);
        for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
            for &at in factors(dtype) {
                let factor = half::f16::from_f32(0.01 * random.float());
                block[at..at + 2].copy_from_slice(&factor.to_le_bytes());
            }
        }
    } else {
        for element in bytes.chunks_exact_mut(dtype.block_bytes()) {
            let v = random.float();
            match dtype {
                DType::F32 => element.copy_from_slice(&v.to_le_bytes()),
                DType::F16 => element.copy_from_slice(&half::f16::from_f32(v).to_le_bytes()),
                _ => element.copy_from_slice(&half::bf16::from_f32(v).to_le_bytes()),
            }
        }
    }
    tensor
}

fn tensor(dtype: DType, rows: usize, cols: usize) -> Tensor {
    super::super::Cpu::new(1).alloc(dtype, &[rows, cols], "test").expect("a small tensor")
}

/// Mostly small numbers, some outliers, and a group of zeros.
pub(super) fn random_input(random: &mut Random, tokens: usize, cols: usize) -> Vec<f32> {
    let mut x: Vec<f32> = (0..tokens * cols).map(|_| random.float()).collect();
    x.iter_mut().step_by(97).for_each(|v| *v *= 300.0);
    x.chunks_exact_mut(cols).for_each(|token| token[..cols.min(32)].fill(0.0));
    x
}

/// Exact products `[tokens, rows]` of the dequantised weights, and the sum of the magnitudes of what was added up.
fn reference(x: &[f32], tokens: usize, weight: &Weight) -> (Vec<f64>, Vec<f64>) {
    let cols = weight.cols();
    let (mut y, mut size) = (vec![0.0; tokens * weight.rows()], vec![0.0; tokens * weight.rows()]);
    let mut column = 0;
    let mut w = vec![0.0; cols];
    for part in &weight.parts {
        let bias = part.bias.as_ref().map(pointwise::vector);
        for row in 0..part.matrix.rows() {
            blocks::row_to_f32(&part.matrix, row, &mut w);
            for t in 0..tokens {
                let terms = w.iter().zip(&x[t * cols..]).map(|(&w, &x)| f64::from(w) * f64::from(x));
                let bias = f64::from(bias.as_ref().map_or(0.0, |b| b[row]));
                y[t * weight.rows() + column] = terms.clone().sum::<f64>() + bias;
                size[t * weight.rows() + column] = terms.map(f64::abs).sum::<f64>() + bias.abs();
            }
            column += 1;
        }
    }
    (y, size)
}

/// `x` as the integer paths see it.
fn rounded(x: &[f32], cols: usize) -> Vec<f32> {
    let mut int8 = Activations::default();
    int8.quantize(&mut Team::new(1), Simd::Portable, cols, x);
    let token = |t| {
        let token: quantize::Token = int8.token(t);
        token.q.iter().enumerate().map(move |(k, &q)| f32::from(q) * token.pair[k / 32][0])
    };
    (0..x.len() / cols).flat_map(token).collect()
}

/// `x` as the bf16 paths see it.
fn rounded_to_bf16(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect()
}

#[derive(Clone, Copy)]
struct Case {
    simd: Simd,
    pass: Pass,
    precision: Precision,
    threads: usize,
    accumulate: bool,
}

fn compute(case: &Case, x: &[f32], tokens: usize, weight: &Weight) -> Vec<f32> {
    let mut y = vec![if case.accumulate { 0.5 } else { f32::NAN }; tokens * weight.rows()];
    let mut team = Team::new(case.threads);
    matmul(&mut team, case.simd, case.pass, case.precision, case.accumulate, tokens, x, weight, &mut y);
    y
}

const PASSES: [Pass; 2] = [Pass::Prefill, Pass::Decode];

/// On every level that this machine can run, as both passes.
fn everywhere() -> impl Iterator<Item = (Simd, Pass)> {
    Simd::testable().into_iter().flat_map(|simd| PASSES.map(|pass| (simd, pass)))
}

const FORMATS: [DType; 14] = [
    DType::F32,
    DType::F16,
    DType::Bf16,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q8_0,
    DType::Iq4Nl,
    DType::Q2K,
    DType::Q3K,
    DType::Q4K,
    DType::Q5K,
    DType::Q6K,
];

/// Compares with the reference; `allowed` is relative to the size of the sum.
fn check(what: &str, y: &[f32], (exact, size): &(Vec<f64>, Vec<f64>), start: f64, allowed: f64) {
    for (i, (&y, (&exact, &size))) in y.iter().zip(exact.iter().zip(size)).enumerate() {
        let error = (f64::from(y) - exact - start).abs();
        assert!(
            error <= allowed * (size + start) + 1e-6,
            "{what}: output {i} is {y}, not {exact} (size {size})"
        );
    }
}

fn compare(dtype: DType, rows: usize, cols: usize, tokens: usize) {
    let mut random = Random(0x9e37_79b9 + (rows * cols + tokens) as u64);
    let matrix = random_matrix(&mut random, dtype, rows, cols);
    let bias = random_matrix(&mut random, DType::F32, 1, rows).reshape(&[rows]).expect("same elements");
    let weight = Weight { parts: vec![WeightPart { matrix, bias: Some(bias) }] };
    let x = random_input(&mut random, tokens, cols);
    let exact = reference(&x, tokens, &weight);
    let integer = dtype.is_quantized().then(|| reference(&rounded(&x, cols), tokens, &weight));
    let bf16 = (dtype == DType::Bf16).then(|| reference(&rounded_to_bf16(&x), tokens, &weight));
    for (simd, pass) in everywhere() {
        for accumulate in [false, true] {
            let start = if accumulate { 0.5 } else { 0.0 };
            let what = format!("{dtype} [{rows}, {cols}] by {tokens} on {simd}, {pass:?}");
            let case = Case { simd, pass, precision: Precision::F32, threads: 2, accumulate };
            check(&what, &compute(&case, &x, tokens, &weight), &exact, start, 2e-6);
            let case = Case { precision: Precision::Fast, ..case };
            let y = compute(&case, &x, tokens, &weight);
            match (Method::of(simd, pass, Precision::Fast, dtype), &integer, &bf16) {
                // Nothing but f32 rounding apart from exact arithmetic on the same int8 inputs. The levels' unsigned
                // form adds and subtracts up to 16 times what the weights themselves would.
                (Method::IntRows | Method::IntPanels, Some(integer), _) => {
                    check(&what, &y, integer, start, 1e-5)
                }
                (Method::Bf16Panels, _, Some(bf16)) => check(&what, &y, bf16, start, 2e-6),
                _ => check(&what, &y, &exact, start, 2e-6),
            }
        }
    }
}

#[test]
fn every_format_agrees_with_exact_arithmetic() {
    for dtype in FORMATS {
        let cols = if dtype.is_quantized() { 3 * dtype.block_len().max(64) } else { 97 };
        for tokens in [1, 2, 3, 4, 5, 8, 9, 54] {
            compare(dtype, 54, cols, tokens);
        }
    }
}

#[test]
fn odd_sizes() {
    for dtype in [DType::F32, DType::F16, DType::Bf16, DType::Q4_0, DType::Q8_0, DType::Q6K] {
        for rows in [1, 7, 97, 161] {
            for tokens in [1, 7, 97] {
                let len = dtype.block_len();
                let cols = if dtype.is_quantized() { [len, 5 * len] } else { [1, 775] };
                cols.into_iter().for_each(|cols| compare(dtype, rows, cols, tokens));
            }
        }
    }
}

#[test]
fn largest_levels_do_not_overflow() {
    for dtype in FORMATS.into_iter().filter(|dtype| dtype.is_quantized()) {
        let (rows, cols) = (33, 2 * dtype.block_len());
        let matrix = random_matrix(&mut Random(5), dtype, rows, cols);
        // All bits set (and for signed bytes also the smallest value) is the largest level everywhere.
        for fill in [0xff, 0x80, 0x7f] {
            let bytes = matrix.host_bytes_mut();
            bytes.fill(fill);
            for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
                let one = half::f16::from_f32(0.01).to_le_bytes();
                factors(dtype).iter().for_each(|&at| block[at..at + 2].copy_from_slice(&one));
            }
            let weight = Weight::new(matrix.clone());
            for sign in [1.0, -1.0] {
                for tokens in [1, 12] {
                    let x = vec![sign; tokens * cols];
                    let exact = reference(&x, tokens, &weight);
                    for (simd, pass) in everywhere() {
                        let precision = Precision::Fast;
                        let case = Case { simd, pass, precision, threads: 1, accumulate: false };
                        let y = compute(&case, &x, tokens, &weight);
                        check(&format!("{dtype} of {fill:#x} on {simd}"), &y, &exact, 0.0, 1e-5);
                    }
                }
            }
        }
    }
}

#[test]
fn int8_inputs_cost_little() {
    // The rule of the house: an int8 product is off by less than a percent of the sum of its terms' magnitudes.
    let mut random = Random(77);
    for dtype in [DType::Q4K, DType::Q6K, DType::Q8_0] {
        let weight = Weight::new(random_matrix(&mut random, dtype, 64, 512));
        let x: Vec<f32> = (0..16 * 512).map(|_| random.float()).collect();
        let exact = reference(&x, 16, &weight);
        for (simd, pass) in everywhere() {
            let case = Case { simd, pass, precision: Precision::Fast, threads: 1, accumulate: false };
            let y = compute(&case, &x, 16, &weight);
            check(&format!("{dtype} on {simd}, {pass:?}"), &y, &exact, 0.0, 0.01);
        }
    }
}

fn mixed(random: &mut Random) -> Weight {
    let mut part = |dtype, rows, bias| {
        let matrix = random_matrix(random, dtype, rows, 512);
        let bias = random_matrix(random, bias, 1, rows).reshape(&[rows]).expect("same elements");
        WeightPart { matrix, bias: Some(bias) }
    };
    let mut parts = vec![
        part(DType::Q4K, 96, DType::F32),
        part(DType::Bf16, 17, DType::Bf16),
        part(DType::Q6K, 40, DType::F16),
        part(DType::Q5_0, 1, DType::F32),
    ];
    parts.push(WeightPart { matrix: random_matrix(random, DType::F32, 5, 512), bias: None });
    Weight { parts }
}

#[test]
fn stacked_parts_of_different_formats() {
    let mut random = Random(3);
    let weight = mixed(&mut random);
    for tokens in [1, 6, 31] {
        let x = random_input(&mut random, tokens, 512);
        let exact = reference(&x, tokens, &weight);
        for (simd, pass) in everywhere() {
            let case = Case { simd, pass, precision: Precision::F32, threads: 2, accumulate: true };
            let y = compute(&case, &x, tokens, &weight);
            check(&format!("{tokens} tokens on {simd}, {pass:?}"), &y, &exact, 0.5, 2e-6);
        }
    }
}

#[test]
fn neither_threads_nor_neighbours_change_a_bit() {
    let mut random = Random(11);
    let weight = mixed(&mut random);
    let x = random_input(&mut random, 200, 512);
    for (simd, pass) in everywhere() {
        for precision in [Precision::F32, Precision::Fast] {
            let case = |threads| Case { simd, pass, precision, threads, accumulate: false };
            let one = compute(&case(1), &x, 200, &weight);
            for threads in [2, 3, 7] {
                assert_eq!(compute(&case(threads), &x, 200, &weight), one, "{threads} threads on {simd}");
            }
            for tokens in [1, 3, 8, 9, 100] {
                let some = compute(&case(2), &x[..tokens * 512], tokens, &weight);
                assert_eq!(some, one[..tokens * weight.rows()], "{tokens} tokens on {simd}, {pass:?}");
            }
        }
    }
}

#[test]
fn a_token_decodes_alike_alone_and_among_any_number() {
    let mut random = Random(29);
    for dtype in FORMATS {
        // Rows left over by any number of them side by side.
        let (rows, cols) = (21, 768);
        let weight = Weight::new(random_matrix(&mut random, dtype, rows, cols));
        let x = random_input(&mut random, 9, cols);
        for simd in Simd::testable() {
            let case =
                Case { simd, pass: Pass::Decode, precision: Precision::Fast, threads: 2, accumulate: false };
            let all = compute(&case, &x, 9, &weight);
            for tokens in 1..9 {
                let some = compute(&case, &x[..tokens * cols], tokens, &weight);
                assert_eq!(some, all[..tokens * rows], "{dtype} by {tokens} on {simd}");
            }
        }
    }
}

/// Where the processor has what the software level stands for.
#[test]
fn software_gives_the_bits_of_the_processor() {
    if Simd::detect() < Simd::Avx512Bf16 {
        return eprintln!("skipped: AVX-512 with BF16, which this CPU lacks");
    }
    let mut random = Random(17);
    for dtype in FORMATS {
        let cols = if dtype.is_quantized() { 768 } else { 775 };
        let weight = Weight::new(random_matrix(&mut random, dtype, 97, cols));
        let x = random_input(&mut random, 54, cols);
        for precision in [Precision::F32, Precision::Fast] {
            let [ours, theirs] = [Simd::Soft512, Simd::Avx512Bf16].map(|simd| {
                let case = Case { simd, pass: Pass::Prefill, precision, threads: 2, accumulate: false };
                compute(&case, &x, 54, &weight)
            });
            assert_eq!(ours, theirs, "{dtype}, {precision:?}");
        }
    }
}

#[test]
fn a_not_a_number_shows_in_its_own_token_only() {
    let mut random = Random(13);
    let weight = mixed(&mut random);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
        for tokens in [3, 12] {
            let mut x = random_input(&mut random, tokens, 512);
            x[512 + 40] = bad;
            for (simd, pass) in everywhere() {
                for precision in [Precision::F32, Precision::Fast] {
                    let case = Case { simd, pass, precision, threads: 2, accumulate: false };
                    let y = compute(&case, &x, tokens, &weight);
                    let rows = weight.rows();
                    let others = y[..rows].iter().chain(&y[2 * rows..]);
                    assert!(others.into_iter().all(|v| v.is_finite()), "{bad} spreads on {simd}");
                    let own = y[rows..2 * rows].iter().filter(|v| !v.is_finite()).count();
                    assert!(bad.is_finite() || own > rows / 2, "{bad} vanishes on {simd}");
                }
            }
        }
    }
}

#[test]
fn half_precision_is_read_exactly() {
    for bits in 0..=u16::MAX {
        let (ours, theirs) = (levels::f16_to_f32(bits), half::f16::from_bits(bits).to_f32());
        assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "{bits:#x}: {ours}");
    }
}

#[test]
fn expansion_agrees_with_the_blocks() {
    for dtype in FORMATS {
        let matrix = random_matrix(&mut Random(23), dtype, 3, 768);
        let rows = Rows { dtype, bytes: matrix.host_bytes(), row_bytes: matrix.bytes() / 3 };
        for simd in Simd::testable() {
            let (mut ours, mut theirs) = (vec![0.0; 768], vec![0.0; 768]);
            pack::to_f32(simd, dtype, rows.row(2), &mut ours);
            blocks::row_to_f32(&matrix, 2, &mut theirs);
            for (ours, theirs) in ours.iter().zip(theirs) {
                assert!(
                    (ours - theirs).abs() <= 2e-7 * (1.0 + theirs.abs()),
                    "{dtype}: {ours}, not {theirs}"
                );
            }
        }
    }
}

#[test]
fn no_rows_and_no_tokens_are_fine() {
    let empty = Weight::new(tensor(DType::F32, 0, 8));
    matmul(
        &mut Team::new(2),
        Simd::detect(),
        Pass::Decode,
        Precision::Fast,
        false,
        1,
        &[0.0; 8],
        &empty,
        &mut [],
    );
    let weight = Weight::new(tensor(DType::F32, 4, 8));
    matmul(&mut Team::new(2), Simd::detect(), Pass::Decode, Precision::Fast, false, 0, &[], &weight, &mut []);
    let memory = weight.parts[0].matrix.memory();
    assert!(!memory.is_empty());
}
