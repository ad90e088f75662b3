//! Panels: a few rows of a weight matrix, a slice of their columns, turned so that one vector holds one column of
//! all rows. They are built where they are used, slice by slice; the matrix itself stays as it lies.

use super::{
    super::Simd,
    levels::{self, GROUP, Levels, SLICE},
};
use crate::backend::DType;

/// Rows of the weight matrix that one task unpacks side by side.
pub(super) const ROWS: usize = 64;
/// Most lanes that one task has side by side.
pub(super) const LANES: usize = 256;
/// Columns of a slice of f32 weights: a panel of 16 rows is half of a first-level cache.
pub(super) const F32_SLICE: usize = 256;

/// `LANES` rows of integer weights, see [`Levels`].
#[repr(C, align(64))]
pub(super) struct IntPanel<const LANES: usize> {
    /// Four neighbouring levels of each row.
    pub q: [[u32; LANES]; SLICE / 4],
    pub scale: [[f32; LANES]; SLICE / GROUP],
    pub sub: [[i32; LANES]; SLICE / 16],
    pub min: [[f32; LANES]; SLICE / 16],
}

/// `LANES` rows of 32-bit columns: an f32 each, or two bf16.
#[repr(C, align(64))]
pub(super) struct FloatPanel<const LANES: usize>(pub [[u32; LANES]; F32_SLICE]);

/// What a thread unpacks into: rows as read, then panels.
#[repr(C, align(64))]
pub(super) struct IntScratch<const LANES: usize, const PANELS: usize> {
    rows: [Levels; LANES],
    pub panels: [IntPanel<LANES>; PANELS],
}

#[repr(C, align(64))]
pub(super) struct FloatScratch<const LANES: usize, const PANELS: usize> {
    rows: [[u32; F32_SLICE]; LANES],
    pub panels: [FloatPanel<LANES>; PANELS],
}

/// # Safety
/// Any bytes are a value, and the alignment is at most a cache line's.
pub(super) unsafe trait Scratch {}
// SAFETY: arrays of integers and floats.
unsafe impl<const LANES: usize, const PANELS: usize> Scratch for IntScratch<LANES, PANELS> {}
// SAFETY: as above.
unsafe impl<const LANES: usize, const PANELS: usize> Scratch for FloatScratch<LANES, PANELS> {}

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "only its size and alignment matter")] [u8; 64]);

/// Lends this thread's scratch memory, with whatever was left in it.
pub(super) fn with_scratch<T: Scratch, R>(work: impl FnOnce(&mut T) -> R) -> R {
    thread_local!(static LINES: std::cell::RefCell<Vec<Line>> = const { std::cell::RefCell::new(Vec::new()) });
    LINES.with_borrow_mut(|lines| {
        let need = size_of::<T>().div_ceil(size_of::<Line>());
        if lines.len() < need {
            lines.resize(need, Line([0; 64]));
        }
        // SAFETY: large enough, aligned to a cache line, initialised, and any bytes are a `T` (`Scratch`).
        work(unsafe { &mut *lines.as_mut_ptr().cast::<T>() })
    })
}

/// Which way a matrix is read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// Its rows are lanes: `x · Wᵀ`.
    Rows,
    /// Its columns are lanes: `a · B`.
    Columns,
}

/// Columns `k..k + n` of rows `first..first + count`; with [`Layout::Columns`] the other way round.
#[derive(Clone, Copy)]
pub(super) struct Window {
    pub first: usize,
    pub count: usize,
    pub k: usize,
    pub n: usize,
}

/// Rows of one matrix, as bytes.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub dtype: DType,
    pub bytes: &'a [u8],
    pub row_bytes: usize,
}

impl<'a> Rows<'a> {
    pub fn row(&self, row: usize) -> &'a [u8] {
        &self.bytes[row * self.row_bytes..][..self.row_bytes]
    }

    /// Columns `first..first + n` of a row, in whole blocks.
    pub fn window(&self, row: usize, first: usize, n: usize) -> &'a [u8] {
        let (len, bytes) = (self.dtype.block_len(), self.dtype.block_bytes());
        &self.row(row)[first / len * bytes..][..n / len * bytes]
    }

    /// Columns `k..k + n` of a row; `k` and `n` in whole blocks.
    fn slice(&self, row: usize, k: usize, n: usize) -> &'a [u8] {
        let (len, bytes) = (self.dtype.block_len(), self.dtype.block_bytes());
        let (start, size) = (k / len * bytes, n / len * bytes);
        let row = self.row(row);
        // The next slice will be wanted when this one has met all tokens, and slices are too short for the
        // processor to foresee it.
        #[cfg(target_arch = "x86_64")]
        for line in row[start + size..].iter().take(size).step_by(64) {
            use std::arch::x86_64::*;
            // SAFETY: every x86-64 processor has it, and it never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(line).cast()) }
        }
        &row[start..start + size]
    }
}

impl<const LANES: usize, const PANELS: usize> IntScratch<LANES, PANELS> {
    /// Unpacks into panel `panel`; absent rows are zero.
    pub fn pack(&mut self, panel: usize, simd: Simd, rows: Rows, at: Window) {
        let Window { first, count, k, n } = at;
        for (i, levels) in self.rows.iter_mut().enumerate() {
            if i >= count {
                *levels = Levels::ZERO;
                continue;
            }
            unpack(simd, rows.dtype, rows.slice(first + i, k, n), levels);
        }
        let panel = &mut self.panels[panel];
        let stride = size_of::<Levels>() / 4;
        let first = &self.rows[0];
        let parts: [(*const u32, usize, *mut u32); 4] = [
            (first.q.as_ptr().cast(), n / 4, panel.q.as_mut_ptr().cast()),
            (first.scale.as_ptr().cast(), n / GROUP, panel.scale.as_mut_ptr().cast()),
            (first.sub.as_ptr().cast(), n / 16, panel.sub.as_mut_ptr().cast()),
            (first.min.as_ptr().cast(), n / 16, panel.min.as_mut_ptr().cast()),
        ];
        for (from, cols, to) in parts {
            // SAFETY: each source is an array inside every one of `LANES` consecutive `Levels`, `stride` words apart;
            // each target has at least `cols` (n ≤ SLICE) rows of `LANES` words.
            unsafe { transpose(simd, from, stride, cols, LANES, to) }
        }
    }
}

impl<const LANES: usize, const PANELS: usize> FloatScratch<LANES, PANELS> {
    /// As f32, `n` ≤ [`F32_SLICE`].
    pub fn pack_f32(&mut self, panel: usize, simd: Simd, rows: Rows, at: Window) {
        let Window { first, count, k, n } = at;
        for (i, row) in self.rows.iter_mut().enumerate() {
            let row = &mut bytemuck::cast_slice_mut::<u32, f32>(row)[..n];
            if i < count { to_f32(simd, rows.dtype, rows.slice(first + i, k, n), row) } else { row.fill(0.0) }
        }
        self.turn(panel, simd, n);
    }

    /// Rows `k..k + n` (`n` ≤ [`F32_SLICE`]) of `columns` (in whole blocks, at most [`LANES`] of them) as f32 into panels from 0 on.
    pub fn pack_columns(
        &mut self,
        simd: Simd,
        rows: Rows,
        columns: std::ops::Range<usize>,
        k: usize,
        n: usize,
    ) {
        let (row, panels) = (&mut self.rows[0], &mut self.panels);
        let row = &mut bytemuck::cast_slice_mut::<u32, f32>(row)[..columns.len()];
        for i in 0..n {
            to_f32(simd, rows.dtype, rows.window(k + i, columns.start, columns.len()), row);
            for (panel, part) in panels.iter_mut().zip(row.chunks(LANES)) {
                let lanes = bytemuck::cast_slice_mut::<u32, f32>(&mut panel.0[i]);
                lanes[..part.len()].copy_from_slice(part);
                lanes[part.len()..].fill(0.0);
            }
        }
    }

    /// As pairs of bf16, `n` ≤ 2 · [`F32_SLICE`]; an odd last column gets a zero beside it.
    pub fn pack_bf16(&mut self, panel: usize, simd: Simd, rows: Rows, at: Window) {
        let Window { first, count, k, n } = at;
        for (i, row) in self.rows.iter_mut().enumerate() {
            let pairs = n.div_ceil(2);
            row[pairs - 1] = 0;
            let row: &mut [u8] = bytemuck::cast_slice_mut(&mut row[..pairs]);
            if i < count { row[..2 * n].copy_from_slice(rows.slice(first + i, k, n)) } else { row.fill(0) }
        }
        self.turn(panel, simd, n.div_ceil(2));
    }

    fn turn(&mut self, panel: usize, simd: Simd, n: usize) {
        let to = self.panels[panel].0.as_mut_ptr().cast();
        // SAFETY: `rows` is `LANES` rows of `F32_SLICE` words, the panel the other way round, n ≤ F32_SLICE.
        unsafe { transpose(simd, self.rows.as_ptr().cast(), F32_SLICE, n, LANES, to) }
    }
}

/// [`levels::unpack`] with the best instructions.
pub(super) fn unpack(simd: Simd, dtype: DType, blocks: &[u8], out: &mut Levels) {
    match simd {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level says that the processor has AVX2.
        _ if simd >= Simd::Avx2 => unsafe { unpack_avx2(dtype, blocks, out) },
        _ => levels::unpack(dtype, blocks, out),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn unpack_avx2(dtype: DType, blocks: &[u8], out: &mut Levels) {
    levels::unpack(dtype, blocks, out)
}

/// Any number of whole blocks of any weight format as f32.
pub(super) fn to_f32(simd: Simd, dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match simd {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level says that the processor has AVX2.
        _ if simd >= Simd::Avx2 => unsafe { to_f32_avx2(dtype, bytes, out) },
        _ => to_f32_any(dtype, bytes, out),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn to_f32_avx2(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    to_f32_any(dtype, bytes, out)
}

#[inline(always)]
fn to_f32_any(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    let halves = bytes.as_chunks::<2>().0.iter().map(|&b| u16::from_le_bytes(b));
    match dtype {
        DType::F32 => {
            out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(w, &b)| *w = f32::from_le_bytes(b))
        }
        DType::Bf16 => out.iter_mut().zip(halves).for_each(|(w, h)| *w = f32::from_bits(u32::from(h) << 16)),
        DType::F16 => out.iter_mut().zip(halves).for_each(|(w, h)| *w = levels::f16_to_f32(h)),
        _ => {
            let halves = levels::form(dtype).is_some_and(|form| form.halves);
            let mut unpacked = Levels::ZERO;
            let slice = SLICE / dtype.block_len() * dtype.block_bytes();
            for (out, bytes) in out.chunks_mut(SLICE).zip(bytes.chunks(slice)) {
                levels::unpack(dtype, bytes, &mut unpacked);
                levels::expand(&unpacked, halves, out);
            }
        }
    }
}

/// `to[c · lanes + r] = from[r · stride + c]` for `c` < `cols`, `r` < `lanes`.
///
/// # Safety
/// All of these words must lie in the two buffers.
unsafe fn transpose(simd: Simd, from: *const u32, stride: usize, cols: usize, lanes: usize, to: *mut u32) {
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if simd >= Simd::Avx2 && lanes.is_multiple_of(8) {
        done = cols / 8 * 8;
        for c in (0..done).step_by(8) {
            for r in (0..lanes).step_by(8) {
                // SAFETY: the processor has AVX2 by the level; an 8 × 8 square inside what the caller vouches for.
                unsafe { square_avx2(from.add(r * stride + c), stride, to.add(c * lanes + r), lanes) }
            }
        }
    }
    for c in done..cols {
        for r in 0..lanes {
            // SAFETY: vouched for by the caller.
            unsafe { *to.add(c * lanes + r) = *from.add(r * stride + c) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn square_avx2(from: *const u32, stride: usize, to: *mut u32, lanes: usize) {
    use std::arch::x86_64::*;
    // SAFETY: the caller vouches for eight words in each of the eight rows.
    let row = |r: usize| unsafe { _mm256_loadu_ps(from.add(r * stride).cast()) };
    let (mut a, mut b) = ([_mm256_setzero_ps(); 8], [_mm256_setzero_ps(); 8]);
    for i in 0..4 {
        a[2 * i] = _mm256_unpacklo_ps(row(2 * i), row(2 * i + 1));
        a[2 * i + 1] = _mm256_unpackhi_ps(row(2 * i), row(2 * i + 1));
    }
    for i in 0..2 {
        for j in 0..2 {
            let (x, y) = (a[4 * i + j], a[4 * i + 2 + j]);
            b[4 * i + 2 * j] = _mm256_shuffle_ps::<0x44>(x, y);
            b[4 * i + 2 * j + 1] = _mm256_shuffle_ps::<0xee>(x, y);
        }
    }
    for i in 0..4 {
        let low = _mm256_permute2f128_ps::<0x20>(b[i], b[4 + i]);
        let high = _mm256_permute2f128_ps::<0x31>(b[i], b[4 + i]);
        // SAFETY: the caller vouches for eight words in each of the eight target rows.
        unsafe {
            _mm256_storeu_ps(to.add(i * lanes).cast(), low);
            _mm256_storeu_ps(to.add((4 + i) * lanes).cast(), high);
        }
    }
}
