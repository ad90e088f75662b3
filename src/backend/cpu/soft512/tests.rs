//! Instructions that AVX2 has at half the width against the processor's; the others by hand, from Intel's manual. On a
//! processor with AVX-512 all of them against its own.

use super::*;
use crate::backend::cpu::{Simd, linear::tests::Random};
use std::arch::x86_64 as arch;

const CORNERS: [f32; 20] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    -2.5,
    3.5,
    16_777_217.0,
    -1e-45,
    1e-40,
    f32::MIN_POSITIVE,
    -f32::MIN_POSITIVE,
    f32::MAX,
    f32::MIN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    -f32::NAN,
    f32::EPSILON,
    -149.0,
];

impl Random {
    /// A corner case, any bits, or a number around 1.
    fn lane(&mut self) -> f32 {
        let bits = self.bits();
        match bits % 4 {
            0 => CORNERS[(bits >> 8) as usize % CORNERS.len()],
            1 => f32::from_bits((bits >> 8) as u32),
            _ => 4.0 * self.float(),
        }
    }

    fn floats(&mut self) -> __m512 {
        __m512(from_fn(|_| self.lane()))
    }

    fn integers(&mut self) -> __m512i {
        __m512i(from_fn(|_| [0, 1, -1, i32::MIN, i32::MAX, self.bits() as i32][self.bits() as usize % 6]))
    }
}

/// Rounds of random registers.
const ROUNDS: usize = 2000;

/// Bits, all NaNs being alike.
fn bits(lanes: [f32; 16]) -> [u32; 16] {
    lanes.map(|x| if x.is_nan() { f32::NAN } else { x }.to_bits())
}

trait Halves {
    type Half: Copy;
    /// What is compared.
    type Lanes: PartialEq + std::fmt::Debug;
    fn halves(self) -> [Self::Half; 2];
    fn lanes(self) -> Self::Lanes;
    fn join(halves: [Self::Half; 2]) -> Self;
}

impl Halves for __m512 {
    type Half = __m256;
    type Lanes = [u32; 16];
    fn halves(self) -> [__m256; 2] {
        // SAFETY: plain bytes, as many.
        unsafe { std::mem::transmute(self) }
    }
    fn lanes(self) -> [u32; 16] {
        bits(self.0)
    }
    fn join(halves: [__m256; 2]) -> Self {
        // SAFETY: plain bytes, as many.
        __m512(unsafe { std::mem::transmute::<[__m256; 2], [f32; 16]>(halves) })
    }
}

impl Halves for __m512i {
    type Half = __m256i;
    type Lanes = [i32; 16];
    fn halves(self) -> [__m256i; 2] {
        // SAFETY: plain bytes, as many.
        unsafe { std::mem::transmute(self) }
    }
    fn lanes(self) -> [i32; 16] {
        self.0
    }
    fn join(halves: [__m256i; 2]) -> Self {
        // SAFETY: plain bytes, as many.
        __m512i(unsafe { std::mem::transmute::<[__m256i; 2], [i32; 16]>(halves) })
    }
}

/// `assert_halves!(wide(a, b) is narrow)`: both halves as the processor's instruction computes them.
macro_rules! assert_halves {
    ($wide:ident $(::<$w:literal>)? ($($arg:ident),*) is $narrow:ident $(::<$n:literal>)?) => {{
        let wide = $wide $(::<$w>)? ($($arg),*);
        let narrow = like(wide, from_fn(|half| $narrow $(::<$n>)? ($($arg.halves()[half]),*)));
        assert!(same(wide, narrow), "{}: {wide:?}, not {narrow:?} of {:?}", stringify!($wide), ($($arg),*));
    }};
}

fn like<T: Halves>(_: T, halves: [T::Half; 2]) -> T {
    T::join(halves)
}

fn same<T: Halves>(a: T, b: T) -> bool {
    a.lanes() == b.lanes()
}

#[target_feature(enable = "avx2,fma")]
fn arithmetic_is_that_of_avx2(random: &mut Random) {
    let (a, b, c) = (random.floats(), random.floats(), random.floats());
    assert_halves!(_mm512_add_ps(a, b) is _mm256_add_ps);
    assert_halves!(_mm512_sub_ps(a, b) is _mm256_sub_ps);
    assert_halves!(_mm512_mul_ps(a, b) is _mm256_mul_ps);
    assert_halves!(_mm512_div_ps(a, b) is _mm256_div_ps);
    assert_halves!(_mm512_fmadd_ps(a, b, c) is _mm256_fmadd_ps);
    assert_halves!(_mm512_min_ps(a, b) is _mm256_min_ps);
    assert_halves!(_mm512_max_ps(a, b) is _mm256_max_ps);
    assert_halves!(_mm512_roundscale_ps::<0>(a) is _mm256_round_ps::<0>);
    assert_halves!(_mm512_roundscale_ps::<1>(a) is _mm256_round_ps::<1>);
    assert_halves!(_mm512_roundscale_ps::<2>(a) is _mm256_round_ps::<2>);
    assert_halves!(_mm512_roundscale_ps::<3>(a) is _mm256_round_ps::<3>);
    assert_halves!(_mm512_roundscale_ps::<4>(a) is _mm256_round_ps::<4>);
    assert_halves!(_mm512_roundscale_ps::<8>(a) is _mm256_round_ps::<8>);
    let (a, b) = (random.integers(), random.integers());
    assert_halves!(_mm512_add_epi32(a, b) is _mm256_add_epi32);
    assert_halves!(_mm512_mullo_epi32(a, b) is _mm256_mullo_epi32);
    assert_halves!(_mm512_cvtepi32_ps(a) is _mm256_cvtepi32_ps);
    assert_halves!(_mm512_castsi512_ps(a) is _mm256_castsi256_ps);
    assert_halves!(_mm512_slli_epi32::<0>(a) is _mm256_slli_epi32::<0>);
    assert_halves!(_mm512_slli_epi32::<16>(a) is _mm256_slli_epi32::<16>);
    assert_halves!(_mm512_slli_epi32::<31>(a) is _mm256_slli_epi32::<31>);
    assert_halves!(_mm512_slli_epi32::<32>(a) is _mm256_slli_epi32::<32>);
    assert_halves!(_mm512_slli_epi32::<255>(a) is _mm256_slli_epi32::<255>);
}

#[target_feature(enable = "avx2,fma")]
fn moves_are_those_of_avx2(random: &mut Random) {
    let (x, n) = (random.lane(), random.bits() as i32);
    let constant = |wide: __m512, narrow: __m256| assert!(same(wide, Halves::join([narrow; 2])));
    constant(_mm512_setzero_ps(), _mm256_setzero_ps());
    constant(_mm512_set1_ps(x), _mm256_set1_ps(x));
    let constant = |wide: __m512i, narrow: __m256i| assert!(same(wide, Halves::join([narrow; 2])));
    constant(_mm512_setzero_si512(), _mm256_setzero_si256());
    constant(_mm512_set1_epi32(n), _mm256_set1_epi32(n));
    constant(_mm512_set1_epi8(n as i8), _mm256_set1_epi8(n as i8));

    let memory: [f32; 21] = from_fn(|_| random.lane());
    // SAFETY: sixteen numbers from each of the first six on; all registers are plain bytes.
    unsafe {
        for offset in 0..6 {
            let from = memory.as_ptr().add(offset);
            let halves = [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))];
            let wide = _mm512_loadu_ps(from);
            assert!(same(wide, Halves::join(halves)));
            let (mut ours, mut theirs) = ([7f32; 21], [7f32; 21]);
            _mm512_storeu_ps(ours.as_mut_ptr().add(offset), wide);
            _mm256_storeu_ps(theirs.as_mut_ptr().add(offset), halves[0]);
            _mm256_storeu_ps(theirs.as_mut_ptr().add(offset + 8), halves[1]);
            assert_eq!(ours.map(f32::to_bits), theirs.map(f32::to_bits));
        }
        let a = random.floats();
        assert!(same(a, Halves::join([_mm512_extractf32x8_ps::<0>(a), _mm512_extractf32x8_ps::<1>(a)])));
        assert!(same(a, Halves::join([_mm512_castps512_ps256(a), a.halves()[1]])));
        assert!(same(a, _mm512_load_ps(a.0.as_ptr())));
        let a = random.integers();
        assert!(same(a, _mm512_load_si512(&raw const a)));
        let [low, high] = std::mem::transmute::<__m256i, [__m128i; 2]>(a.halves()[0]);
        let wide = Halves::join([_mm256_cvtepu16_epi32(low), _mm256_cvtepu16_epi32(high)]);
        assert!(same(_mm512_cvtepu16_epi32(a.halves()[0]), wide));
    }
}

#[target_feature(enable = "avx2,fma")]
fn masks_are_those_of_avx2(random: &mut Random) {
    let (a, b, k) = (random.floats(), random.floats(), random.bits() as u16);
    macro_rules! predicates {
        ($($p:literal)*) => {$({
            let half = |i: usize| _mm256_movemask_ps(_mm256_cmp_ps::<$p>(a.halves()[i], b.halves()[i])) as u16;
            let mask = half(0) | (half(1) << 8);
            assert_eq!(_mm512_cmp_ps_mask::<$p>(a, b), mask, "predicate {} of {a:?} and {b:?}", $p);
            assert_eq!(_mm512_mask_cmp_ps_mask::<$p>(k, a, b), mask & k, "predicate {} under {k:#x}", $p);
        })*};
    }
    predicates!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);
    let sign = __m512(from_fn(|i| if (k >> i) & 1 == 1 { -1.0 } else { 1.0 }));
    let blend = |i: usize| _mm256_blendv_ps(a.halves()[i], b.halves()[i], sign.halves()[i]);
    assert!(same(_mm512_mask_blend_ps(k, a, b), Halves::join(from_fn(blend))));
}

/// Where no sum of two products leaves 16 bits and no number is subnormal, AVX2 can do what VNNI and BF16 do.
#[target_feature(enable = "avx2,fma")]
fn dot_products_are_those_of_avx2(random: &mut Random) {
    let (src, b) = (random.integers(), random.integers());
    let a = __m512i(from_fn(|_| random.bits() as i32 & 0x7f3f_017f));
    let sums = |i: usize| {
        let pairs = _mm256_maddubs_epi16(a.halves()[i], b.halves()[i]);
        _mm256_add_epi32(src.halves()[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    };
    assert!(same(_mm512_dpbusd_epi32(src, a, b), Halves::join(from_fn(sums))));

    let ordinary = |random: &mut Random| __m512(from_fn(|_| random.float() + 1.5));
    let (src, a, b) = (ordinary(random), ordinary(random), ordinary(random));
    let (c, d) = (ordinary(random), ordinary(random));
    let (low, high) = (_mm512_cvtne2ps_pbh(b, a), _mm512_cvtne2ps_pbh(d, c));
    let element = |pairs: __m512bh, odd: usize| {
        __m512(from_fn(|i| f32::from_bits(u32::from(pairs.0[2 * i + odd]) << 16)))
    };
    for (i, x) in a.0.into_iter().chain(b.0).enumerate() {
        assert_eq!(low.0[i], half::bf16::from_f32(x).to_bits(), "{x}");
    }
    let sum = _mm512_fmadd_ps(element(low, 1), element(high, 1), src);
    let sum = _mm512_fmadd_ps(element(low, 0), element(high, 0), sum);
    assert!(same(_mm512_dpbf16_ps(src, low, high), sum));
}

#[test]
fn halves_agree_with_avx2() {
    if Simd::detect() < Simd::Avx2 {
        return eprintln!("skipped: AVX2, which this CPU lacks");
    }
    let mut random = Random(0x512);
    for _ in 0..ROUNDS {
        // SAFETY: just checked.
        unsafe {
            arithmetic_is_that_of_avx2(&mut random);
            moves_are_those_of_avx2(&mut random);
            masks_are_those_of_avx2(&mut random);
            dot_products_are_those_of_avx2(&mut random);
        }
    }
}

#[test]
fn an_aligned_load_wants_alignment() {
    if Simd::detect() < Simd::Avx2 {
        return eprintln!("skipped: AVX2, which this CPU lacks");
    }
    let memory = [__m512([1.0; 16]), __m512([2.0; 16])];
    let bytes = memory.as_ptr().cast::<u8>();
    for offset in [4, 16, 32] {
        // SAFETY: AVX2 is there; 64 bytes from any of these on.
        let load = || unsafe { _mm512_load_ps(bytes.add(offset).cast()) };
        assert!(std::panic::catch_unwind(load).is_err(), "{offset} bytes off");
        // SAFETY: as above; it panics before it reads.
        let load = || unsafe { _mm512_load_si512(bytes.add(offset).cast()) };
        assert!(std::panic::catch_unwind(load).is_err(), "{offset} bytes off");
    }
}

/// 2^`n`, also below the normal numbers.
fn power(n: i32) -> f32 {
    2f64.powi(n) as f32
}

/// The tables of special cases under VSCALEFPD and VSCALEFPS, and results that have to be rounded.
#[test]
fn scaling() {
    const INF: f32 = f32::INFINITY;
    let signaling = f32::from_bits(0x7f80_0001);
    let cases = [
        (f32::NAN, f32::NAN, f32::NAN),
        (f32::NAN, INF, INF),
        (f32::NAN, -INF, 0.0),
        (f32::NAN, 1.0, f32::NAN),
        (signaling, INF, f32::NAN),
        (signaling, -INF, f32::NAN),
        (signaling, 1.0, f32::NAN),
        (INF, f32::NAN, f32::NAN),
        (INF, INF, INF),
        (-INF, INF, -INF),
        (INF, -INF, f32::NAN),
        (-INF, -3.0, -INF),
        (0.0, f32::NAN, f32::NAN),
        (0.0, INF, f32::NAN),
        (-0.0, INF, f32::NAN),
        (-0.0, -INF, -0.0),
        (-0.0, 5.0, -0.0),
        (3.0, f32::NAN, f32::NAN),
        (-3.0, INF, -INF),
        (-3.0, -INF, -0.0),
        (1e-40, INF, INF),
        // The exponent is rounded down.
        (1.5, 3.0, 12.0),
        (1.5, 3.99, 12.0),
        (1.5, -0.5, 0.75),
        (1.5, -0.0, 1.5),
        (1.5, -1e-40, 0.75),
        // Overflow and underflow.
        (0.5, 128.0, power(127)),
        (1.0, 128.0, INF),
        (-1.0, 3e38, -INF),
        (1.0, -126.0, f32::MIN_POSITIVE),
        (1.75, -127.0, 1.75 * power(-127)),
        (1.0, -149.0, power(-149)),
        (1.0, -150.0, 0.0),
        (-1.0, -150.0, -0.0),
        (1.5, -150.0, power(-149)),
        (1.25, -149.0, power(-149)),
        (1.5, -149.0, power(-148)),
        (-1.0, -3e38, -0.0),
        (power(-149), 149.0, 1.0),
        (power(-149), 276.0, power(127)),
        (power(127), -276.0, power(-149)),
    ];
    for (a, b, expected) in cases {
        let found = scale(a, b);
        assert!(
            found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(),
            "{a} by 2^{b} is {found}, not {expected}"
        );
    }
    if Simd::detect() < Simd::Avx2 {
        return eprintln!("skipped: AVX2, which this CPU lacks");
    }
    // SAFETY: just checked.
    let masked = unsafe { _mm512_maskz_scalef_ps(0b101, _mm512_set1_ps(3.0), _mm512_set1_ps(1.0)) };
    assert_eq!(masked.0[..4], [6.0, 0.0, 6.0, 0.0]);
}

#[test]
fn rounding_to_fractions() {
    if Simd::detect() < Simd::Avx2 {
        return eprintln!("skipped: AVX2, which this CPU lacks");
    }
    // SAFETY: just checked.
    unsafe {
        let of = |x: f32| _mm512_set1_ps(x);
        assert_eq!(_mm512_roundscale_ps::<0x10>(of(1.3)).0, [1.5; 16]);
        assert_eq!(_mm512_roundscale_ps::<0x11>(of(1.3)).0, [1.0; 16]);
        assert_eq!(_mm512_roundscale_ps::<0x20>(of(-1.375)).0, [-1.5; 16]);
        assert_eq!(_mm512_roundscale_ps::<0x22>(of(-1.375)).0, [-1.25; 16]);
        assert_eq!(_mm512_roundscale_ps::<0xf3>(of(f32::MAX)).0, [f32::MAX; 16]);
        assert_eq!(_mm512_roundscale_ps::<0xf8>(of(-1e-40)).lanes(), of(-0.0).lanes());
    }
}

/// The pseudo-code `convert_fp32_to_bfloat16`.
#[test]
fn conversion_to_bf16() {
    let cases = [
        (0x3f80_0000, 0x3f80),
        // Ties go to even, everything else to the nearest.
        (0x3f80_8000, 0x3f80),
        (0x3f80_8001, 0x3f81),
        (0x3f81_7fff, 0x3f81),
        (0x3f81_8000, 0x3f82),
        (0xbf81_8000, 0xbf82),
        (0x3fff_ffff, 0x4000),
        (0x7f7f_ffff, 0x7f80),
        (0x7f80_0000, 0x7f80),
        (0xff80_0000, 0xff80),
        // NaNs become quiet and keep the bits that fit.
        (0x7f80_0001, 0x7fc0),
        (0xffa1_2345, 0xffe1),
        (0x7fff_ffff, 0x7fff),
        // Subnormal numbers are zero.
        (0x0000_0000, 0x0000),
        (0x8000_0000, 0x8000),
        (0x007f_ffff, 0x0000),
        (0x807f_ffff, 0x8000),
        (0x0080_0000, 0x0080),
    ];
    for (from, to) in cases {
        assert_eq!(to_bf16(f32::from_bits(from)), to, "{from:#x}");
    }
}

fn bf16_of(x: f32) -> u16 {
    half::bf16::from_f32(x).to_bits()
}

/// One lane of VDPBF16PS.
fn dot(src: f32, odd: [f32; 2], even: [f32; 2]) -> f32 {
    let [a, b] = [0, 1].map(|i| {
        __m512bh(from_fn(|lane| match lane {
            6 => bf16_of(even[i]),
            7 => bf16_of(odd[i]),
            _ => 0,
        }))
    });
    // SAFETY: the callers have checked for AVX2.
    let sums = unsafe { _mm512_dpbf16_ps(_mm512_set1_ps(src), a, b) };
    sums.0[3]
}

#[test]
fn bf16_dot_products() {
    if Simd::detect() < Simd::Avx2 {
        return eprintln!("skipped: AVX2, which this CPU lacks");
    }
    assert_eq!(dot(1.0, [2.0, 3.0], [4.0, -5.0]), -13.0);
    // The odd product first: 1 is lost beside it.
    assert_eq!(dot(1.0, [4096.0, 4096.0], [-4096.0, 4096.0]), 0.0);
    assert_eq!(dot(0.0, [4096.0, 4096.0], [1.0, 1.0]), 16_777_216.0);
    // Each sum is rounded to nearest even.
    assert_eq!(dot(1.0, [power(-12), power(-12)], [0.0, 0.0]), 1.0);
    assert_eq!(dot(1.0 + power(-23), [power(-12), power(-12)], [0.0, 0.0]), 1.0 + power(-22));
    assert_eq!(dot(1.0, [power(-12), power(-12)], [power(-12), power(-12)]), 1.0);
    // What comes in subnormal is zero …
    let zero = |x: f32, sign: f32| x.to_bits() == (0f32 * sign).to_bits();
    assert!(zero(dot(power(-130), [0.0, 0.0], [0.0, 0.0]), 1.0));
    assert!(zero(dot(0.0, [power(-130), power(100)], [power(127), power(-127)]), 1.0));
    // … and so is what would go out …
    let least = f32::MIN_POSITIVE;
    assert!(zero(dot(1.5 * least, [-1.0, least], [0.0, 0.0]), 1.0));
    assert!(zero(dot(-1.5 * least, [1.0, least], [-0.0, 0.0]), -1.0));
    assert_eq!(dot(1.5 * least, [-1.0, least], [1.0, least]), least);
    // … but products are not rounded by themselves.
    assert_eq!(dot(least, [power(-70), power(-70)], [0.0, 0.0]), least * (1.0 + power(-14)));
    assert_eq!(dot(f32::MAX, [f32::INFINITY, -1.0], [1.0, 1.0]), f32::NEG_INFINITY);
    assert!(dot(1.0, [f32::INFINITY, 0.0], [1.0, 1.0]).is_nan());
    // A subnormal number counts as zero beside an infinity.
    assert!(dot(1.0, [f32::INFINITY, power(-130)], [1.0, 1.0]).is_nan());
    assert!(dot(1.0, [1.0, 1.0], [f32::NAN, 1.0]).is_nan());
    assert!(dot(f32::NAN, [1.0, 1.0], [1.0, 1.0]).is_nan());
}

#[test]
fn halves_of_bf16_pairs() {
    if Simd::detect() < Simd::Avx2 {
        return eprintln!("skipped: AVX2, which this CPU lacks");
    }
    // SAFETY: just checked.
    let pairs =
        unsafe { _mm512_cvtne2ps_pbh(__m512(from_fn(|i| i as f32)), __m512(from_fn(|i| -(i as f32)))) };
    let expected = from_fn(|i| bf16_of(if i < 16 { -(i as f32) } else { (i - 16) as f32 }));
    assert_eq!(pairs.0, expected);
}

#[test]
fn int8_dot_products() {
    if Simd::detect() < Simd::Avx2 {
        return eprintln!("skipped: AVX2, which this CPU lacks");
    }
    let dot = |src: i32, a: [u8; 4], b: [i8; 4]| {
        let (a, b) = (i32::from_ne_bytes(a), i32::from_ne_bytes(b.map(i8::cast_unsigned)));
        // SAFETY: just checked.
        unsafe {
            _mm512_dpbusd_epi32(_mm512_set1_epi32(src), _mm512_set1_epi32(a), _mm512_set1_epi32(b)).0[5]
        }
    };
    assert_eq!(dot(7, [1, 2, 3, 4], [10, -20, 30, -40]), 7 + 10 - 40 + 90 - 160);
    // The first operand has no sign, the second has; nothing is cut to 16 bits.
    assert_eq!(dot(0, [255; 4], [127; 4]), 4 * 255 * 127);
    assert_eq!(dot(0, [255; 4], [-128; 4]), -4 * 255 * 128);
    assert_eq!(dot(0, [128, 0, 0, 0], [-1, 0, 0, 0]), -128);
    // No saturation at the top either.
    assert_eq!(dot(i32::MAX, [1, 0, 0, 0], [1, 0, 0, 0]), i32::MIN);
}

/// Registers of `std::arch`.
trait Real {
    type Register;
    fn real(self) -> Self::Register;
    fn soft(register: Self::Register) -> Self;
}

macro_rules! real {
    ($($soft:ident)*) => {$(
        impl Real for $soft {
            type Register = arch::$soft;
            fn real(self) -> arch::$soft {
                // SAFETY: 64 plain bytes each.
                unsafe { std::mem::transmute(self) }
            }
            fn soft(register: arch::$soft) -> Self {
                // SAFETY: as above.
                unsafe { std::mem::transmute(register) }
            }
        }
    )*};
}
real!(__m512 __m512i __m512bh);

impl Real for __mmask16 {
    type Register = __mmask16;
    fn real(self) -> __mmask16 {
        self
    }
    fn soft(register: __mmask16) -> Self {
        register
    }
}

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn all_are_the_processors(random: &mut Random) {
    macro_rules! assert_real {
        ($name:ident $(::<$n:literal>)? ($($arg:ident),*)) => {
            let soft = $name $(::<$n>)? ($($arg),*);
            let real = Real::soft(arch::$name $(::<$n>)? ($($arg.real()),*));
            assert!(same(soft, real), "{}: {soft:?}, not {real:?} of {:?}", stringify!($name), ($($arg),*));
        };
    }
    let (a, b, c, k) = (random.floats(), random.floats(), random.floats(), random.bits() as u16);
    assert_real!(_mm512_add_ps(a, b));
    assert_real!(_mm512_sub_ps(a, b));
    assert_real!(_mm512_mul_ps(a, b));
    assert_real!(_mm512_div_ps(a, b));
    assert_real!(_mm512_fmadd_ps(a, b, c));
    assert_real!(_mm512_min_ps(a, b));
    assert_real!(_mm512_max_ps(a, b));
    assert_real!(_mm512_roundscale_ps::<8>(a));
    assert_real!(_mm512_roundscale_ps::<0x31>(a));
    assert_real!(_mm512_mask_blend_ps(k, a, b));
    assert_real!(_mm512_maskz_scalef_ps(k, a, b));
    assert_eq!(
        _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(a, b),
        arch::_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(a.real(), b.real())
    );
    assert_eq!(
        _mm512_mask_cmp_ps_mask::<_CMP_LE_OQ>(k, a, b),
        arch::_mm512_mask_cmp_ps_mask::<_CMP_LE_OQ>(k, a.real(), b.real())
    );
    let (low, high) = (_mm512_cvtne2ps_pbh(a, b), _mm512_cvtne2ps_pbh(b, c));
    assert_eq!(low.0, __m512bh::soft(arch::_mm512_cvtne2ps_pbh(a.real(), b.real())).0);
    assert_real!(_mm512_dpbf16_ps(c, low, high));
    let (a, b, c) = (random.integers(), random.integers(), random.integers());
    assert_real!(_mm512_dpbusd_epi32(a, b, c));
    assert_real!(_mm512_add_epi32(a, b));
    assert_real!(_mm512_mullo_epi32(a, b));
    assert_real!(_mm512_slli_epi32::<16>(a));
    assert_real!(_mm512_cvtepi32_ps(a));
    assert_real!(_mm512_castsi512_ps(a));
    let halves = a.halves();
    assert!(same(_mm512_cvtepu16_epi32(halves[0]), Real::soft(arch::_mm512_cvtepu16_epi32(halves[0]))));
}

#[test]
fn all_agree_with_avx512() {
    if Simd::detect() < Simd::Avx512Bf16 {
        return eprintln!("skipped: AVX-512 with BF16, which this CPU lacks");
    }
    let mut random = Random(0x512);
    for _ in 0..ROUNDS {
        // SAFETY: just checked.
        unsafe { all_are_the_processors(&mut random) }
    }
}
