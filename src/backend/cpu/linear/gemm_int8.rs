//! Many tokens by block formats: unsigned levels times int8 inputs.
//!
//! Per group of 32 the integer sum is scaled by (weight's scale · input's scale) and added in f32, and the weight's
//! `min` times the scaled sum of the inputs is added beside it. AVX2 multiplies bytes in pairs into i16; how many of
//! those an i16 can add up before it is widened depends on the largest level: 8 pairs of 15 · 127 · 2, 4 of 31, 2 of 63.

#[cfg(test)]
use super::soft512;
use super::{
    super::Simd,
    avx512::int8,
    gemm::{Blocking, Output, Tile, blocked},
    gemm_f32::{prefetch, with_count},
    levels::{Form, GROUP, SLICE, Width},
    pack::{IntPanel, IntScratch, ROWS, Rows, with_scratch},
    quantize::Activations,
};
use std::{
    arch::{asm, x86_64::*},
    hint::black_box,
    ops::Range,
};

/// `y[tokens, rows] += x · Wᵀ`.
///
/// # Safety
/// The processor has `simd`; `x` holds `tokens`; nobody else has these rows and tokens of `output`.
pub(super) unsafe fn gemm_int8(
    simd: Simd,
    form: Form,
    rows: Rows,
    range: Range<usize>,
    tokens: Range<usize>,
    x: &Activations,
    output: Output,
) {
    assert!(x.tokens() >= tokens.end);
    let cols = x.cols();
    if simd >= Simd::Avx512 {
        let b = Blocking { lanes: 32, tile: 6, tokens: 120, slice: SLICE };
        with_scratch(|scratch: &mut IntScratch<32, { ROWS / 32 }>| {
            let pack = |s: &mut IntScratch<32, _>, panel, at| s.pack(panel, simd, rows, at);
            let tile = |s: &IntScratch<32, _>, t: Tile| {
                let input = Input::at(x, t.token, t.k, t.n);
                let panel = &s.panels[t.panel];
                // SAFETY: the caller has AVX-512; `input` has `count` rows, the panel `n` columns, `y` a tile.
                unsafe {
                    if form.halves {
                        with_count!(
                            t.count, [1 2 3 4 5 6], simd, halves_avx512 or soft512::int8::halves,
                            (input, panel, t.y, t.stride)
                        )
                    } else {
                        with_count!(
                            t.count, [1 2 3 4 5 6], simd, groups_avx512 or soft512::int8::groups,
                            (input, panel, t.y, t.stride)
                        )
                    }
                }
            };
            // SAFETY: says the caller.
            unsafe { blocked(b, (range, tokens, cols), output, scratch, pack, tile) }
        })
    } else {
        let b = Blocking { lanes: 16, tile: 3, tokens: 120, slice: SLICE };
        with_scratch(|scratch: &mut IntScratch<16, { ROWS / 16 }>| {
            let pack = |s: &mut IntScratch<16, _>, panel, at| s.pack(panel, simd, rows, at);
            let tile = |s: &IntScratch<16, _>, t: Tile| {
                let input = Input::at(x, t.token, t.k, t.n);
                let args = (input, &s.panels[t.panel], t.y, t.stride);
                // SAFETY: as above, with AVX2.
                unsafe {
                    match (form.width, form.halves) {
                        (Width::Four, false) => tile_avx2::<8, false, false>(t.count, args),
                        (Width::Four, true) => tile_avx2::<4, true, false>(t.count, args),
                        (Width::Five, _) => tile_avx2::<4, false, false>(t.count, args),
                        (Width::Six, _) => tile_avx2::<2, true, false>(t.count, args),
                        (Width::Eight, _) => tile_avx2::<1, false, true>(t.count, args),
                    }
                }
            };
            // SAFETY: says the caller.
            unsafe { blocked(b, (range, tokens, cols), output, scratch, pack, tile) }
        })
    }
}

/// Some groups of consecutive tokens, as pointers to the first.
#[derive(Clone, Copy)]
pub(super) struct Input {
    pub groups: usize,
    pub q: *const i8,
    /// Elements from one token to the next.
    pub stride: usize,
    pub pair: *const [f32; 2],
    pub half_sum: *const f32,
}

impl Input {
    /// From `token` on, columns `k..k + n`.
    pub fn at(x: &Activations, token: usize, k: usize, n: usize) -> Input {
        let token = x.token(token).after(k);
        Input {
            groups: n / GROUP,
            q: token.q.as_ptr(),
            stride: x.cols(),
            pair: token.pair.as_ptr(),
            half_sum: token.half_sum.as_ptr(),
        }
    }
}

/// `w · v`, bytes in pairs. As assembly, like [`multiply_add`], because that keeps its place: left to itself the compiler
/// turns the unrolled loop inside out, token by token, and has registers for none of the weights.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn multiply(w: __m256i, v: __m256i) -> __m256i {
    let product;
    // SAFETY: works on registers only.
    unsafe {
        asm!(
            "vpmaddubsw {product}, {w}, {v}",
            product = lateout(ymm_reg) product, w = in(ymm_reg) w, v = in(ymm_reg) v,
            options(pure, nomem, nostack, preserves_flags),
        )
    }
    product
}

/// `sum + w · v`, bytes in pairs.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn multiply_add(mut sum: __m256i, w: __m256i, v: __m256i) -> __m256i {
    // SAFETY: works on registers only.
    unsafe {
        asm!(
            "vpmaddubsw {product}, {w}, {v}",
            "vpaddw {sum}, {sum}, {product}",
            product = out(ymm_reg) _, w = in(ymm_reg) w, v = in(ymm_reg) v, sum = inout(ymm_reg) sum,
            options(pure, nomem, nostack, preserves_flags),
        )
    }
    sum
}

type Args<'a> = (Input, &'a IntPanel<16>, *mut f32, usize);

#[target_feature(enable = "avx2,fma")]
unsafe fn tile_avx2<const QUADS: usize, const HALVES: bool, const SIGNED: bool>(count: usize, args: Args) {
    // SAFETY: passed on.
    unsafe {
        match count {
            1 => tile_avx2_of::<1, QUADS, HALVES, SIGNED>(args),
            2 => tile_avx2_of::<2, QUADS, HALVES, SIGNED>(args),
            3 => tile_avx2_of::<3, QUADS, HALVES, SIGNED>(args),
            _ => tile_avx2_of::<4, QUADS, HALVES, SIGNED>(args),
        }
    }
}

/// `M` tokens by 16 rows. `QUADS` column quadruples are added up in i16.
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_avx2_of<const M: usize, const QUADS: usize, const HALVES: bool, const SIGNED: bool>(
    (x, panel, y, y_stride): Args,
) {
    let ones = _mm256_set1_epi16(1);
    let mut acc = [[_mm256_setzero_ps(); 2]; M];
    prefetch::<M>(y, y_stride);
    // Many short sums need more registers than there are when unrolled.
    let chunks = if QUADS > 2 { 8 / QUADS } else { black_box(8 / QUADS) };
    // SAFETY: the caller vouches for M rows of `x.groups` groups, as many in the panel, and a tile of y.
    unsafe {
        let (levels, scale) = (panel.q.as_ptr().cast::<__m256i>(), panel.scale.as_ptr().cast::<f32>());
        let (sub, min) = (panel.sub.as_ptr().cast::<__m256i>(), panel.min.as_ptr().cast::<f32>());
        for g in 0..x.groups {
            let mut sum = [[_mm256_setzero_si256(); 2]; M];
            for chunk in 0..chunks {
                let mut part = [[_mm256_setzero_si256(); 2]; M];
                for quad in chunk * QUADS..(chunk + 1) * QUADS {
                    let at = levels.add(2 * (8 * g + quad));
                    let mut w = [_mm256_load_si256(at), _mm256_load_si256(at.add(1))];
                    if SIGNED {
                        w = w.map(|w| _mm256_xor_si256(w, _mm256_set1_epi8(-128)));
                    }
                    for t in 0..M {
                        let q = x.q.add(t * x.stride + GROUP * g + 4 * quad).cast::<i32>();
                        let v = _mm256_set1_epi32(q.read_unaligned());
                        for i in 0..2 {
                            // |w| · sign(w) v for signed bytes: a pair's sum is at most 128 · 127 · 2.
                            let v = if SIGNED { _mm256_sign_epi8(v, w[i]) } else { v };
                            let w = if SIGNED { _mm256_abs_epi8(w[i]) } else { w[i] };
                            part[t][i] = match (quad % QUADS == 0, QUADS > 2) {
                                (true, true) => multiply(w, v),
                                (false, true) => multiply_add(part[t][i], w, v),
                                (true, false) => _mm256_maddubs_epi16(w, v),
                                (false, false) => _mm256_add_epi16(part[t][i], _mm256_maddubs_epi16(w, v)),
                            };
                        }
                    }
                }
                for i in 0..2 {
                    let factor = if HALVES {
                        // The small integer in both 16-bit halves.
                        let sub = _mm256_load_si256(sub.add(2 * (2 * g + chunk * QUADS / 4) + i));
                        _mm256_blend_epi16::<0xaa>(sub, _mm256_slli_epi32::<16>(sub))
                    } else {
                        ones
                    };
                    for t in 0..M {
                        sum[t][i] = _mm256_add_epi32(sum[t][i], _mm256_madd_epi16(part[t][i], factor));
                    }
                }
            }
            for i in 0..2 {
                let scale = _mm256_load_ps(scale.add(16 * g + 8 * i));
                for t in 0..M {
                    let pair = &*x.pair.add(t * (x.stride / GROUP) + g);
                    let factor = _mm256_mul_ps(scale, _mm256_broadcast_ss(&pair[0]));
                    acc[t][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t][i]), factor, acc[t][i]);
                    if SIGNED {
                        // min = −128 · scale went into the sign.
                    } else if HALVES {
                        let sums = x.half_sum.add(2 * (t * (x.stride / GROUP) + g));
                        for h in 0..2 {
                            let min = _mm256_load_ps(min.add(16 * (2 * g + h) + 8 * i));
                            acc[t][i] = _mm256_fmadd_ps(min, _mm256_broadcast_ss(&*sums.add(h)), acc[t][i]);
                        }
                    } else {
                        let min = _mm256_load_ps(min.add(16 * g + 8 * i));
                        acc[t][i] = _mm256_fmadd_ps(min, _mm256_broadcast_ss(&pair[1]), acc[t][i]);
                    }
                }
            }
        }
        for (t, acc) in acc.iter().enumerate() {
            for (i, acc) in acc.iter().enumerate() {
                let y = y.add(t * y_stride + 8 * i);
                _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), *acc));
            }
        }
    }
}

/// [`int8::tile`] with the instructions that it needs, for formats without half groups.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn groups_avx512<const M: usize>(x: Input, panel: &IntPanel<32>, y: *mut f32, y_stride: usize) {
    // SAFETY: passed on.
    unsafe { int8::groups::<M>(x, panel, y, y_stride) }
}

/// The same for formats with half groups.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn halves_avx512<const M: usize>(x: Input, panel: &IntPanel<32>, y: *mut f32, y_stride: usize) {
    // SAFETY: passed on.
    unsafe { int8::halves::<M>(x, panel, y, y_stride) }
}
