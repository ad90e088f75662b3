//! Many tokens by float weights: tiles of 32 rows.

use super::{super::gemm_f32::prefetch, isa::*};

/// `y[M, 32] += x[M, n] · panel[n, 32]`.
///
/// # Safety
/// AVX-512 F; M rows of x and y, n columns of the panel, which is aligned to a cache line.
#[inline(always)]
pub unsafe fn tile<const M: usize>(
    n: usize,
    x: *const f32,
    x_stride: usize,
    panel: *const f32,
    y: *mut f32,
    y_stride: usize,
) {
    prefetch::<M>(y, y_stride);
    // SAFETY: the caller vouches for M rows of x and y and n columns of the panel.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); 2]; M];
        for i in 0..n {
            let w = [_mm512_load_ps(panel.add(32 * i)), _mm512_load_ps(panel.add(32 * i + 16))];
            for t in 0..M {
                let v = _mm512_set1_ps(*x.add(t * x_stride + i));
                acc[t][0] = _mm512_fmadd_ps(v, w[0], acc[t][0]);
                acc[t][1] = _mm512_fmadd_ps(v, w[1], acc[t][1]);
            }
        }
        add(&acc, y, y_stride);
    }
}

/// Adds a tile's sums to `y`.
///
/// # Safety
/// AVX-512 F; M rows of 32 in y.
#[inline(always)]
pub unsafe fn add<const M: usize>(acc: &[[__m512; 2]; M], y: *mut f32, y_stride: usize) {
    for (t, acc) in acc.iter().enumerate() {
        for (half, acc) in acc.iter().enumerate() {
            // SAFETY: the caller vouches for M rows of 32.
            unsafe {
                let y = y.add(t * y_stride + 16 * half);
                _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), *acc));
            }
        }
    }
}

/// `y[M, 32] += x[M, n] · panel[n, 32]` in pairs of bf16.
///
/// # Safety
/// AVX-512 F and BF16; M rows of x and y, n columns of the panel, which is aligned to a cache line.
#[inline(always)]
pub unsafe fn tile_bf16<const M: usize>(
    n: usize,
    x: *const u32,
    x_stride: usize,
    panel: *const u32,
    y: *mut f32,
    y_stride: usize,
) {
    prefetch::<M>(y, y_stride);
    // SAFETY: the caller vouches for M rows of x and y and n columns of the panel; both vector types are 64 plain
    // bytes.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); 2]; M];
        let panel = panel.cast::<__m512i>();
        let pairs = |v: __m512i| std::mem::transmute::<__m512i, __m512bh>(v);
        for i in 0..n {
            let w = [_mm512_load_si512(panel.add(2 * i)), _mm512_load_si512(panel.add(2 * i + 1))];
            for t in 0..M {
                let v = pairs(_mm512_set1_epi32(*x.add(t * x_stride + i) as i32));
                acc[t][0] = _mm512_dpbf16_ps(acc[t][0], v, pairs(w[0]));
                acc[t][1] = _mm512_dpbf16_ps(acc[t][1], v, pairs(w[1]));
            }
        }
        add(&acc, y, y_stride);
    }
}
