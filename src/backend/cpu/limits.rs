//! What this machine can do at best, measured: the yardsticks that benches report their shares of.

use super::{Memory, Simd, Team};
use crate::backend::{DType, Shape, Storage, Tensor};
use std::{hint::black_box, time::Instant};

/// Measured limits of `threads` threads together.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// f32 multiply-adds × 2 per second.
    pub f32_flops: f64,
    /// bf16 dot-product multiply-adds × 2 per second; the f32 rate where the processor has no such instruction.
    pub bf16_flops: f64,
    /// 8-bit dot-product multiply-adds × 2 per second (VNNI, else the AVX2 pair of 8- and 16-bit multiply-adds).
    pub int8_ops: f64,
    /// Bytes per second read from memory.
    pub read_bytes: f64,
}

/// Independent accumulators: more than latency × throughput of any multiply-add unit so far.
const LANES: usize = 12;
const STEPS: usize = 4_000_000;

impl Limits {
    /// Takes about a second.
    pub fn measure(threads: usize) -> Limits {
        let mut team = Team::new(threads);
        let simd = Simd::detect();
        let f32_flops = rate(&mut team, simd, Kind::F32);
        Limits {
            f32_flops,
            bf16_flops: if simd >= Simd::Avx512Bf16 { rate(&mut team, simd, Kind::Bf16) } else { f32_flops },
            int8_ops: rate(&mut team, simd, Kind::Int8),
            read_bytes: read_bandwidth(&mut team),
        }
    }
}

#[derive(Clone, Copy)]
enum Kind {
    F32,
    Bf16,
    Int8,
}

/// Best of five runs of every thread at once.
fn rate(team: &mut Team, simd: Simd, kind: Kind) -> f64 {
    let threads = team.threads();
    let mut best = 0.0f64;
    for _ in 0..5 {
        let start = Instant::now();
        let multiply_adds = std::sync::atomic::AtomicUsize::new(0);
        team.run(threads, &|_| {
            multiply_adds.fetch_add(loop_of(simd, kind), std::sync::atomic::Ordering::Relaxed);
        });
        best = best.max(2.0 * multiply_adds.into_inner() as f64 / start.elapsed().as_secs_f64());
    }
    best
}

/// Runs the multiply-add loop; returns how many it did.
fn loop_of(simd: Simd, kind: Kind) -> usize {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: `simd` was detected on this processor, and each function needs no more than its level.
    unsafe {
        match (simd, kind) {
            (Simd::Avx512Bf16, Kind::Bf16) => return x86::bf16_avx512(),
            (Simd::Avx512 | Simd::Avx512Bf16, Kind::F32 | Kind::Bf16) => return x86::f32_avx512(),
            (Simd::Avx512 | Simd::Avx512Bf16, Kind::Int8) => return x86::int8_avx512(),
            (Simd::Avx2, Kind::F32 | Kind::Bf16) => return x86::f32_avx2(),
            (Simd::Avx2, Kind::Int8) => return x86::int8_avx2(),
            _ => {}
        }
    }
    let (mut sums, factor) = ([1.0f32; 32], black_box(0.999f32));
    for _ in 0..STEPS / 4 {
        sums.iter_mut().for_each(|sum| *sum = *sum * factor + 1e-3);
    }
    black_box((sums, simd as u32, kind as u32));
    32 * STEPS / 4
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64 as isa;

    pub mod rates;
}
/// The source of `avx512` on instructions in software.
#[cfg(all(test, target_arch = "x86_64"))]
#[path = "limits/avx512"]
#[allow(clippy::duplicate_mod, reason = "compiled twice to be tested")]
mod soft512 {
    use super::super::soft512 as isa;

    pub mod rates;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, STEPS, avx512::rates};
    use std::{arch::x86_64::*, hint::black_box};

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn f32_avx2() -> usize {
        let (a, b) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(1e-3)));
        let mut sums = [_mm256_set1_ps(1.0); LANES];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
        8 * LANES * STEPS
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn int8_avx2() -> usize {
        let (a, ones) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi16(black_box(1)));
        let mut sums = [_mm256_set1_epi32(1); LANES];
        for _ in 0..STEPS {
            for sum in &mut sums {
                let pairs = _mm256_maddubs_epi16(a, *sum);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
        black_box(sums);
        32 * LANES * STEPS
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn f32_avx512() -> usize {
        // SAFETY: the features are enabled here.
        black_box(unsafe { rates::f32(STEPS) });
        16 * LANES * STEPS
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn bf16_avx512() -> usize {
        // SAFETY: the features are enabled here.
        black_box(unsafe { rates::bf16(STEPS) });
        32 * LANES * STEPS
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn int8_avx512() -> usize {
        // SAFETY: the features are enabled here.
        black_box(unsafe { rates::int8(STEPS) });
        64 * LANES * STEPS
    }
}

/// Best of five passes over 512 MiB, far beyond any cache, each thread reading runs of 64 KiB.
fn read_bandwidth(team: &mut Team) -> f64 {
    const BYTES: usize = 512 << 20;
    const RUN: usize = 1 << 16;
    let Some(memory) = Memory::zeroed(BYTES) else { return 0.0 };
    let buffer = Tensor::from_storage(Storage::Cpu(memory), DType::U32, Shape::new(&[BYTES / 4]), 0);
    // Written once: untouched zero pages would all be the same memory.
    team.chunks_mut(buffer.host_mut::<u32>(), RUN / 4, |index, run| run.fill(index as u32));
    let data = buffer.host::<u32>();
    let mut best = 0.0f64;
    for _ in 0..5 {
        let start = Instant::now();
        team.run(BYTES / RUN, &|index| {
            let run = &data[index * RUN / 4..(index + 1) * RUN / 4];
            let mut sums = [0u32; 64];
            for line in run.chunks_exact(64) {
                sums.iter_mut().zip(line).for_each(|(sum, &value)| *sum ^= value);
            }
            black_box(sums);
        });
        best = best.max(BYTES as f64 / start.elapsed().as_secs_f64());
    }
    best
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::{super::Simd, LANES, soft512::rates};

    /// A unit that met infinities or subnormal numbers might take longer, or give up early.
    #[test]
    fn the_loops_stay_among_ordinary_numbers() {
        if Simd::detect() < Simd::Avx2 {
            return eprintln!("skipped: AVX2, which this CPU lacks");
        }
        // SAFETY: AVX2 is there, all that instructions in software need.
        let (f32, bf16, int8) = unsafe { (rates::f32(2000), rates::bf16(2000), rates::int8(2000)) };
        assert_eq!(f32.len(), LANES);
        for lane in f32.iter().flat_map(|sum| sum.0) {
            assert!((lane - 1.0).abs() < 1e-3, "{lane}");
        }
        assert!(bf16.iter().flat_map(|sum| sum.0).all(|lane| lane == 1.0 + 2000.0 / 2.0));
        assert!(int8.iter().flat_map(|sum| sum.0).all(|lane| lane == 1 + 2000 * 4 * 9));
    }
}
