//! Linear maps: `y = x · Wᵀ`.
//!
//! | weights        | decode                         | prefill                                         |
//! |----------------|--------------------------------|-------------------------------------------------|
//! | float          | rows, f32 ([`gemv_float`])     | panels, f32 or bf16 ([`gemm_f32`])              |
//! | blocks, `Fast` | rows, int8 ([`gemv_quant`])    | panels, int8 ([`gemm_int8`])                    |
//! | blocks, `F32`  | rows expanded to f32           | panels expanded to f32                          |
//!
//! Weights stay as they lie in the file: rows are read in place, panels unpacked slice by slice into a thread's
//! scratch. Which column of this table is taken says the op ([`Pass`]), so that a token's result depends neither on the
//! other tokens nor on the number of threads.

// Kernels walk several arrays of vectors by one constant range.
#![allow(clippy::needless_range_loop)]

/// The kernels of AVX-512. They are inlined into functions that have the instructions.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64 as isa;

    pub mod float;
    pub mod int8;
}
pub(super) mod backward;
#[cfg(target_arch = "x86_64")]
mod dots_avx2;
mod gemm;
#[cfg(target_arch = "x86_64")]
mod gemm_f32;
#[cfg(target_arch = "x86_64")]
mod gemm_int8;
mod gemv_float;
mod gemv_quant;
#[cfg(target_arch = "x86_64")]
mod lanes_avx2;
mod levels;
mod pack;
mod quantize;
/// The same source on instructions in software.
#[cfg(all(test, target_arch = "x86_64"))]
#[path = "avx512"]
#[allow(clippy::duplicate_mod, reason = "compiled twice to be tested")]
mod soft512 {
    use super::super::soft512 as isa;

    pub mod float;
    pub mod int8;
}
#[cfg(test)]
#[cfg(test)]
pub(super) mod tests;

use super::{
    Simd, pointwise,
    team::{SendPtr, Team},
};
use crate::{
    backend::{DType, Precision, Tensor},
    ops::{GluParams, LinearParams, Pass, Weight},
};
use gemm::Output;
use levels::Form;
use pack::Rows;
use quantize::Activations;
use std::{cell::RefCell, ops::Range};

/// Tokens that are multiplied in one go; bounds the quantised copy of the input.
const MAX_TOKENS: usize = 1024;
/// Least bytes of weights worth a task when rows are read in place.
const TASK_BYTES: usize = 8 << 10;

/// Gate and up side by side into `scratch`, then the product of the two.
pub(super) fn linear_glu(
    team: &mut Team,
    simd: Simd,
    p: GluParams,
    x: &Tensor,
    gate_up: &Weight,
    scratch: &Tensor,
    out: &Tensor,
) {
    let tokens = p.tokens as usize;
    let both = &mut scratch.host_mut::<f32>()[..tokens * 2 * p.width as usize];
    matmul(team, simd, p.pass, p.precision, false, tokens, x.host(), gate_up, both);
    pointwise::glu(team, simd, p.activation, both, out);
}

pub(super) fn linear(
    team: &mut Team,
    simd: Simd,
    p: LinearParams,
    x: &Tensor,
    weight: &Weight,
    out: &Tensor,
) {
    let (x, y) = (x.host::<f32>(), out.host_mut::<f32>());
    matmul(team, simd, p.pass, p.precision, p.accumulate, p.tokens as usize, x, weight, y)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Method {
    FloatRows,
    IntRows,
    F32Panels,
    Bf16Panels,
    IntPanels,
}

impl Method {
    fn of(simd: Simd, pass: Pass, precision: Precision, dtype: DType) -> Method {
        let panels = pass == Pass::Prefill && simd != Simd::Portable;
        match precision {
            Precision::Fast if dtype.is_quantized() && panels => Method::IntPanels,
            Precision::Fast if dtype.is_quantized() => Method::IntRows,
            Precision::Fast if dtype == DType::Bf16 && panels && simd >= Simd::Avx512Bf16 => {
                Method::Bf16Panels
            }
            _ if panels => Method::F32Panels,
            _ => Method::FloatRows,
        }
    }

    fn is_panels(self) -> bool {
        matches!(self, Method::F32Panels | Method::Bf16Panels | Method::IntPanels)
    }
}

/// One part of the weights and how it is cut into tasks.
struct Part<'a> {
    method: Method,
    form: Option<Form>,
    matrix: Rows<'a>,
    rows: usize,
    bias: Option<Vec<f32>>,
    /// Column of its first row in the output.
    column: usize,
    /// Rows of a task.
    chunk: usize,
    /// Number of the first task.
    task: usize,
}

/// The input in the forms that the methods need; kept from op to op.
#[derive(Default)]
struct Inputs {
    int8: Activations,
    /// As they are, where their rows lie badly in memory: `[tokens, apart(cols)]`.
    f32: Vec<f32>,
    /// Pairs of bf16, `[tokens, apart(⌈cols / 2⌉)]`.
    bf16: Vec<u32>,
}

/// Distance of rows of `words` 32-bit words. At a multiple of 4096 bytes the same columns of all rows would compete for
/// one set of each cache.
fn apart(words: usize) -> usize {
    if words.is_multiple_of(1024) { words + 16 } else { words }
}

/// `y = x · Wᵀ + bias`, or added to `y` with `accumulate`; `x` is `[tokens, cols]`, `y` `[tokens, rows]`.
#[allow(clippy::too_many_arguments)]
pub(super) fn matmul(
    team: &mut Team,
    simd: Simd,
    pass: Pass,
    precision: Precision,
    accumulate: bool,
    tokens: usize,
    x: &[f32],
    weight: &Weight,
    y: &mut [f32],
) {
    thread_local!(static INPUTS: RefCell<Inputs> = RefCell::default());
    let (cols, stride) = (weight.cols(), weight.rows());
    assert!(x.len() >= tokens * cols && y.len() >= tokens * stride, "matmul operands were checked in ops");
    if tokens == 0 || stride == 0 {
        return;
    }
    let parts = parts(simd, pass, precision, weight, team.threads());
    INPUTS.with_borrow_mut(|inputs| {
        for start in (0..tokens).step_by(MAX_TOKENS) {
            let count = MAX_TOKENS.min(tokens - start);
            let x = &x[start * cols..][..count * cols];
            let y = &mut y[start * stride..][..count * stride];
            multiply(team, simd, accumulate, count, x, &parts, y, inputs);
        }
    })
}

fn parts(simd: Simd, pass: Pass, precision: Precision, weight: &Weight, threads: usize) -> Vec<Part<'_>> {
    let (mut column, mut task) = (0, 0);
    let stride = weight.rows();
    let mut parts = Vec::with_capacity(weight.parts.len());
    for part in &weight.parts {
        let (matrix, rows) = (&part.matrix, part.matrix.rows());
        let method = Method::of(simd, pass, precision, matrix.dtype());
        let row_bytes = matrix.bytes() / rows.max(1);
        let chunk = if method.is_panels() {
            // Big tasks use the input's cache lines for more rows, small ones share out more evenly.
            let even = stride / (16 * threads);
            if even >= 64 { 64 } else { 32 }
        } else {
            // Long tasks: the processor's own prefetching has to find its stride anew in each.
            let even = stride.div_ceil(8 * threads).max(TASK_BYTES / row_bytes.max(1));
            even.next_multiple_of(gemv_quant::ROWS)
        };
        parts.push(Part {
            method,
            form: levels::form(matrix.dtype()),
            matrix: Rows { dtype: matrix.dtype(), bytes: matrix.host_bytes(), row_bytes },
            rows,
            bias: part.bias.as_ref().map(pointwise::vector),
            column,
            chunk,
            task,
        });
        column += rows;
        task += rows.div_ceil(chunk);
    }
    parts
}

#[allow(clippy::too_many_arguments)]
fn multiply(
    team: &mut Team,
    simd: Simd,
    accumulate: bool,
    tokens: usize,
    x: &[f32],
    parts: &[Part],
    y: &mut [f32],
    inputs: &mut Inputs,
) {
    let cols = x.len() / tokens;
    let any = |methods: [Method; 2]| parts.iter().any(|part| methods.contains(&part.method));
    if any([Method::IntRows, Method::IntPanels]) {
        inputs.int8.quantize(team, simd, cols, x);
    }
    if any([Method::Bf16Panels; 2]) {
        round_bf16(team, cols, x, &mut inputs.bf16);
    }
    let x_stride = if any([Method::F32Panels; 2]) { apart(cols) } else { cols };
    if x_stride != cols {
        copy_apart(team, cols, x, &mut inputs.f32);
    }
    let stride: usize = parts.iter().map(|part| part.rows).sum();
    let row_tasks = parts.last().map_or(0, |part| part.task + part.rows.div_ceil(part.chunk));
    // Few rows for many threads: share out the tokens too.
    let splits = if parts.iter().all(|part| part.method.is_panels()) {
        (4 * team.threads()).div_ceil(row_tasks.max(1)).clamp(1, tokens.div_ceil(96))
    } else {
        1
    };
    // Whole tiles of any kernel.
    let split = tokens.div_ceil(splits).next_multiple_of(24);
    let output = SendPtr(y.as_mut_ptr());
    let inputs = &*inputs;
    team.run(row_tasks * tokens.div_ceil(split), &|index| {
        let (row_task, first) = (index % row_tasks, index / row_tasks * split);
        let span = if splits == 1 { 0..tokens } else { first..tokens.min(first + split) };
        let part =
            parts.iter().rfind(|part| part.task <= row_task && part.rows > 0).expect("tasks come from parts");
        let start = (row_task - part.task) * part.chunk;
        let rows = start..part.rows.min(start + part.chunk);
        let output =
            Output { y: output, stride, column: part.column, bias: part.bias.as_deref(), accumulate };
        // SAFETY: `simd` is what the processor has; tasks cover different rows or tokens of `y`, which is borrowed
        // until all are done.
        unsafe { run(simd, part, rows, span, x, cols, inputs, output) }
    });
}

/// One task.
///
/// # Safety
/// The processor has `simd`, and no other task has these rows and tokens of `output`.
#[allow(clippy::too_many_arguments)]
unsafe fn run(
    simd: Simd,
    part: &Part,
    rows: Range<usize>,
    tokens: Range<usize>,
    x: &[f32],
    cols: usize,
    inputs: &Inputs,
    output: Output,
) {
    // SAFETY: passed on.
    unsafe {
        match (part.method, part.form) {
            (Method::FloatRows, _) => gemv_float::gemv_float(simd, part.matrix, rows, x, cols, output),
            (Method::IntRows, _) => gemv_quant::gemv_quant(simd, part.matrix, rows, &inputs.int8, output),
            #[cfg(target_arch = "x86_64")]
            (Method::F32Panels, _) => {
                let x = if apart(cols) == cols { x } else { &inputs.f32 };
                gemm_f32::gemm_f32(
                    simd,
                    part.matrix,
                    pack::Layout::Rows,
                    rows,
                    tokens,
                    (x, apart(cols)),
                    cols,
                    output,
                )
            }
            #[cfg(target_arch = "x86_64")]
            (Method::Bf16Panels, _) => {
                let x = (&inputs.bf16[..], apart(cols.div_ceil(2)));
                gemm_f32::gemm_bf16(simd, part.matrix, rows, tokens, x, cols, output)
            }
            #[cfg(target_arch = "x86_64")]
            (Method::IntPanels, Some(form)) => {
                gemm_int8::gemm_int8(simd, form, part.matrix, rows, tokens, &inputs.int8, output)
            }
            (method, _) => unreachable!("{method:?} by {} on {simd}", part.matrix.dtype),
        }
    }
}

/// Copies rows of `cols` to rows [`apart`].
fn copy_apart(team: &mut Team, cols: usize, x: &[f32], out: &mut Vec<f32>) {
    let stride = apart(cols);
    out.resize(x.len() / cols * stride, 0.0);
    team.chunks_mut(out, 8 * stride, |task, out| {
        for (out, x) in out.chunks_exact_mut(stride).zip(x[8 * task * cols..].chunks_exact(cols)) {
            out[..cols].copy_from_slice(x);
        }
    });
}

/// Rounds to bf16, in pairs; an odd last column gets a zero beside it.
fn round_bf16(team: &mut Team, cols: usize, x: &[f32], out: &mut Vec<u32>) {
    let pairs = cols.div_ceil(2);
    let stride = apart(pairs);
    out.resize(x.len() / cols * stride, 0);
    let bits = |v: f32| u32::from(half::bf16::from_f32(v).to_bits());
    team.chunks_mut(out, 8 * stride, |task, out| {
        for (out, x) in out.chunks_exact_mut(stride).zip(x[8 * task * cols..].chunks_exact(cols)) {
            for (pair, x) in out.iter_mut().zip(x.chunks(2)) {
                *pair = bits(x[0]) | (x.get(1).map_or(0, |&v| bits(v)) << 16);
            }
        }
    });
}
