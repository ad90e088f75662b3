//! Many tokens by float weights: f32 panels, and on AVX-512 bf16 panels.

#[cfg(test)]
use super::soft512;
use super::{
    super::Simd,
    avx512::float,
    gemm::{Blocking, Output, Tile, blocked},
    pack::{F32_SLICE, FloatScratch, LANES, Layout, ROWS, Rows, Window, with_scratch},
};
use std::{arch::x86_64::*, ops::Range};

/// Calls `$kernel::<M>` with the constant `M` = `$count`; `$soft::<M>` if `$simd` is the software level of tests.
macro_rules! with_count {
    ($count:expr, [$($m:literal)*], $kernel:ident, $args:tt) => {
        match $count { $($m => $kernel::<$m> $args,)* other => unreachable!("a tile of {other} tokens") }
    };
    ($count:expr, $m:tt, $simd:ident, $kernel:ident or $($soft:ident)::+, $args:tt) => {{
        #[cfg(test)]
        if $simd == $crate::backend::cpu::Simd::Soft512 {
            use $($soft)::+ as soft;
            return with_count!($count, $m, soft, $args);
        }
        with_count!($count, $m, $kernel, $args)
    }};
}
pub(super) use with_count;

/// `y[tokens, rows] += x · Wᵀ` in f32, from weights of any format; with [`Layout::Columns`] `x · W`, and `range` are columns of W.
///
/// # Safety
/// The processor has `simd`; `x` is `[≥ tokens.end, cols]`, its rows `x_stride` apart; nobody else has these rows and
/// tokens of `output`.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn gemm_f32(
    simd: Simd,
    rows: Rows,
    layout: Layout,
    range: Range<usize>,
    tokens: Range<usize>,
    (x, x_stride): (&[f32], usize),
    cols: usize,
    output: Output,
) {
    assert!(x_stride >= cols && x.len() >= tokens.end * x_stride);
    if simd >= Simd::Avx512 {
        let b = Blocking { lanes: 32, tile: 8, tokens: 120, slice: F32_SLICE };
        with_scratch(|scratch: &mut FloatScratch<32, { LANES / 32 }>| {
            let pack = |s: &mut FloatScratch<32, _>, panel, at: Window| match layout {
                Layout::Rows => s.pack_f32(panel, simd, rows, at),
                // Blocks may be wider than a panel: all at once.
                Layout::Columns if panel == 0 => s.pack_columns(simd, rows, range.clone(), at.k, at.n),
                Layout::Columns => {}
            };
            let tile = |s: &FloatScratch<32, _>, t: Tile| {
                let (w, x) = (s.panels[t.panel].0.as_ptr().cast(), &x[t.token * x_stride + t.k..]);
                // SAFETY: the caller has AVX-512; the panel holds `n` columns, `x` `count` rows from here, `y` a tile.
                unsafe {
                    with_count!(
                        t.count, [1 2 3 4 5 6 7 8], simd, tile_avx512 or soft512::float::tile,
                        (t.n, x.as_ptr(), x_stride, w, t.y, t.stride)
                    )
                }
            };
            // SAFETY: says the caller.
            unsafe { blocked(b, (range.clone(), tokens, cols), output, scratch, pack, tile) }
        })
    } else {
        let b = Blocking { lanes: 16, tile: 6, tokens: 120, slice: F32_SLICE };
        with_scratch(|scratch: &mut FloatScratch<16, { LANES / 16 }>| {
            let pack = |s: &mut FloatScratch<16, _>, panel, at: Window| match layout {
                Layout::Rows => s.pack_f32(panel, simd, rows, at),
                // Blocks may be wider than a panel: all at once.
                Layout::Columns if panel == 0 => s.pack_columns(simd, rows, range.clone(), at.k, at.n),
                Layout::Columns => {}
            };
            let tile = |s: &FloatScratch<16, _>, t: Tile| {
                let (w, x) = (s.panels[t.panel].0.as_ptr().cast(), &x[t.token * x_stride + t.k..]);
                // SAFETY: as above, with AVX2.
                unsafe {
                    with_count!(t.count, [1 2 3 4 5 6], tile_avx2, (t.n, x.as_ptr(), x_stride, w, t.y, t.stride))
                }
            };
            // SAFETY: says the caller.
            unsafe { blocked(b, (range.clone(), tokens, cols), output, scratch, pack, tile) }
        })
    }
}

/// Asks for the lines of a tile of results: they lie far apart, and by the time the sums are done they are here.
#[inline(always)]
pub(super) fn prefetch<const M: usize>(y: *const f32, y_stride: usize) {
    for t in 0..M {
        let row = y.wrapping_add(t * y_stride);
        // SAFETY: every x86-64 processor has it, and it never faults.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(row.cast());
            _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(15).cast());
        }
    }
}

/// `y[M, 16] += x[M, n] · panel[n, 16]`.
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_avx2<const M: usize>(
    n: usize,
    x: *const f32,
    x_stride: usize,
    panel: *const f32,
    y: *mut f32,
    y_stride: usize,
) {
    let mut acc = [[_mm256_setzero_ps(); 2]; M];
    prefetch::<M>(y, y_stride);
    // SAFETY: the caller vouches for M rows of x and y and n columns of the panel.
    unsafe {
        // Four columns a turn, from pointers that two strides reach all rows of: what else a turn does (addresses,
        // counting) takes as many slots of the processor's front end as the products themselves would.
        let (mut low, mut high, mut w) = (x, x.wrapping_add(3 * x_stride), panel);
        let mut column = |low: *const f32, high: *const f32, w: *const f32| {
            let w = [_mm256_load_ps(w), _mm256_load_ps(w.add(8))];
            for t in 0..M {
                let x = if t < 3 { low.add(t * x_stride) } else { high.add((t - 3) * x_stride) };
                let v = _mm256_broadcast_ss(&*x);
                acc[t][0] = _mm256_fmadd_ps(v, w[0], acc[t][0]);
                acc[t][1] = _mm256_fmadd_ps(v, w[1], acc[t][1]);
            }
        };
        for _ in 0..n / 4 {
            for j in 0..4 {
                column(low.add(j), high.wrapping_add(j), w.add(16 * j));
            }
            (low, high, w) = (low.add(4), high.wrapping_add(4), w.add(64));
        }
        for j in 0..n % 4 {
            column(low.add(j), high.wrapping_add(j), w.add(16 * j));
        }
        for (t, acc) in acc.iter().enumerate() {
            for (half, acc) in acc.iter().enumerate() {
                let y = y.add(t * y_stride + 8 * half);
                _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), *acc));
            }
        }
    }
}

/// [`float::tile`] with the instructions that it needs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn tile_avx512<const M: usize>(
    n: usize,
    x: *const f32,
    x_stride: usize,
    panel: *const f32,
    y: *mut f32,
    y_stride: usize,
) {
    // SAFETY: passed on.
    unsafe { float::tile::<M>(n, x, x_stride, panel, y, y_stride) }
}

/// `y[tokens, rows] += x · Wᵀ` from bf16 weights and inputs, summed in f32; `x` is `[tokens, pairs]` of two bf16 each,
/// rows `x_stride` apart.
///
/// # Safety
/// As [`gemm_f32`], with AVX512-BF16.
pub(super) unsafe fn gemm_bf16(
    simd: Simd,
    rows: Rows,
    range: Range<usize>,
    tokens: Range<usize>,
    (x, x_stride): (&[u32], usize),
    cols: usize,
    output: Output,
) {
    assert!(x_stride >= cols.div_ceil(2) && x.len() >= tokens.end * x_stride);
    let b = Blocking { lanes: 32, tile: 8, tokens: 120, slice: 2 * F32_SLICE };
    with_scratch(|scratch: &mut FloatScratch<32, { ROWS / 32 }>| {
        let pack = |s: &mut FloatScratch<32, _>, panel, at| s.pack_bf16(panel, simd, rows, at);
        let tile = |s: &FloatScratch<32, _>, t: Tile| {
            let (w, x) = (s.panels[t.panel].0.as_ptr().cast(), &x[t.token * x_stride + t.k / 2..]);
            let n = t.n.div_ceil(2);
            // SAFETY: the caller has AVX512-BF16; the panel holds `n` columns, `x` `count` rows from here, `y` a tile.
            unsafe {
                with_count!(
                    t.count, [1 2 3 4 5 6 7 8], simd, tile_bf16 or soft512::float::tile_bf16,
                    (n, x.as_ptr(), x_stride, w, t.y, t.stride)
                )
            }
        };
        // SAFETY: says the caller.
        unsafe { blocked(b, (range, tokens, cols), output, scratch, pack, tile) }
    })
}

/// [`float::tile_bf16`] with the instructions that it needs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn tile_bf16<const M: usize>(
    n: usize,
    x: *const u32,
    x_stride: usize,
    panel: *const u32,
    y: *mut f32,
    y_stride: usize,
) {
    // SAFETY: passed on.
    unsafe { float::tile_bf16::<M>(n, x, x_stride, panel, y, y_stride) }
}
