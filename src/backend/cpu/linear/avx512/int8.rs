//! Many tokens by block formats: tiles of 32 rows.

use super::{
    super::{gemm_f32::prefetch, gemm_int8::Input, levels::GROUP, pack::IntPanel},
    float::add,
    isa::*,
};

/// `M` tokens by 32 rows of a format without half groups.
///
/// # Safety
/// As of `tile`.
#[inline(always)]
pub unsafe fn groups<const M: usize>(x: Input, panel: &IntPanel<32>, y: *mut f32, y_stride: usize) {
    // SAFETY: passed on.
    unsafe { tile::<M, false>(x, panel, y, y_stride) }
}

/// `M` tokens by 32 rows of a format with half groups.
///
/// # Safety
/// As of `tile`.
#[inline(always)]
pub unsafe fn halves<const M: usize>(x: Input, panel: &IntPanel<32>, y: *mut f32, y_stride: usize) {
    // SAFETY: passed on.
    unsafe { tile::<M, true>(x, panel, y, y_stride) }
}

/// # Safety
/// AVX-512 F and VNNI; M rows of `x.groups` groups, as many in the panel, and M rows of y.
#[inline(always)]
unsafe fn tile<const M: usize, const HALVES: bool>(
    x: Input,
    panel: &IntPanel<32>,
    y: *mut f32,
    y_stride: usize,
) {
    prefetch::<M>(y, y_stride);
    // SAFETY: the caller vouches for M rows of `x.groups` groups, as many in the panel, and a tile of y.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); 2]; M];
        let (levels, scale) = (panel.q.as_ptr().cast::<__m512i>(), panel.scale.as_ptr().cast::<f32>());
        let (sub, min) = (panel.sub.as_ptr().cast::<__m512i>(), panel.min.as_ptr().cast::<f32>());
        for g in 0..x.groups {
            let mut sum = [[_mm512_setzero_si512(); 2]; M];
            for half in 0..2 {
                let mut part = [[_mm512_setzero_si512(); 2]; M];
                if !HALVES {
                    part = sum;
                }
                for quad in 4 * half..4 * half + 4 {
                    let at = levels.add(2 * (8 * g + quad));
                    let w = [_mm512_load_si512(at), _mm512_load_si512(at.add(1))];
                    for t in 0..M {
                        let q = x.q.add(t * x.stride + GROUP * g + 4 * quad).cast::<i32>();
                        let v = _mm512_set1_epi32(q.read_unaligned());
                        for i in 0..2 {
                            part[t][i] = _mm512_dpbusd_epi32(part[t][i], w[i], v);
                        }
                    }
                }
                for t in 0..M {
                    for i in 0..2 {
                        sum[t][i] = if HALVES {
                            let sub = _mm512_load_si512(sub.add(2 * (2 * g + half) + i));
                            _mm512_add_epi32(sum[t][i], _mm512_mullo_epi32(part[t][i], sub))
                        } else {
                            part[t][i]
                        };
                    }
                }
            }
            for i in 0..2 {
                let scale = _mm512_load_ps(scale.add(32 * g + 16 * i));
                for t in 0..M {
                    let pair = &*x.pair.add(t * (x.stride / GROUP) + g);
                    let factor = _mm512_mul_ps(scale, _mm512_set1_ps(pair[0]));
                    acc[t][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][i]), factor, acc[t][i]);
                    if HALVES {
                        let sums = x.half_sum.add(2 * (t * (x.stride / GROUP) + g));
                        for h in 0..2 {
                            let min = _mm512_load_ps(min.add(32 * (2 * g + h) + 16 * i));
                            acc[t][i] = _mm512_fmadd_ps(min, _mm512_set1_ps(*sums.add(h)), acc[t][i]);
                        }
                    } else {
                        let min = _mm512_load_ps(min.add(32 * g + 16 * i));
                        acc[t][i] = _mm512_fmadd_ps(min, _mm512_set1_ps(pair[1]), acc[t][i]);
                    }
                }
            }
        }
        add(&acc, y, y_stride);
    }
}
