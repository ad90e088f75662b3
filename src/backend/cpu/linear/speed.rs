//! Speed of the kernels beside this machine's limits: `cargo test --release --lib linear::speed -- --ignored --nocapture`.

use super::{
    tests::{Random, random_input, random_matrix},
    *,
};
use std::time::Instant;

/// Seconds that this thread has had a core: on a busy machine the only clock worth reading, with `THREADS=1`.
fn processor_time() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid clock and a place for its value.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Median seconds of `work(0)`, …, `work(variants − 1)`, in turn.
fn seconds(variants: usize, mut work: impl FnMut(usize)) -> f64 {
    (0..variants).for_each(&mut work);
    let begin = Instant::now();
    let mut times = Vec::new();
    while times.len() < 5 || begin.elapsed().as_millis() < 200 {
        let start = processor_time();
        work(times.len() % variants);
        times.push(processor_time() - start);
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Multiply-adds per second of independent FMAs (first) or of byte products summed in i16 (second) on all threads.
#[cfg(target_arch = "x86_64")]
fn multiply_rates(team: &mut Team) -> (f64, f64) {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma")]
    fn floats(steps: usize) -> f32 {
        let (a, b) = (_mm256_set1_ps(0.999), _mm256_set1_ps(1e-3));
        // Twelve different chains, or the compiler would keep one.
        let mut acc = std::hint::black_box([_mm256_set1_ps(1.0); 12]);
        for _ in 0..steps {
            for v in &mut acc {
                *v = _mm256_fmadd_ps(*v, a, b);
            }
        }
        _mm256_cvtss_f32(acc.into_iter().reduce(|a, b| _mm256_add_ps(a, b)).expect("twelve"))
    }

    #[target_feature(enable = "avx2,fma")]
    fn bytes(steps: usize) -> i32 {
        let mut acc = std::hint::black_box([_mm256_set1_epi8(1); 12]);
        let b = std::hint::black_box(_mm256_set1_epi8(1));
        for _ in 0..steps {
            for v in &mut acc {
                *v = _mm256_add_epi16(*v, _mm256_maddubs_epi16(*v, b));
            }
        }
        _mm256_extract_epi32::<0>(acc.into_iter().reduce(|a, b| _mm256_add_epi16(a, b)).expect("twelve"))
    }

    let (steps, threads) = (1 << 17, team.threads());
    let count = (steps * threads) as f64 * 12.0;
    // SAFETY: called where AVX2 was found.
    let f = seconds(1, |_| team.run(threads, &|_| _ = std::hint::black_box(unsafe { floats(steps) })));
    // SAFETY: as above.
    let i = seconds(1, |_| team.run(threads, &|_| _ = std::hint::black_box(unsafe { bytes(steps) })));
    (count * 8.0 / f, count * 32.0 / i)
}

/// Bytes per second that all threads together read from memory.
fn read_rate(team: &mut Team) -> f64 {
    let (data, part) = (vec![1u64; 32 << 20], 512 << 10);
    let time = seconds(data.len() / part, |i| {
        let data = &data[i * part..][..part];
        let chunk = 16 << 10;
        team.run(part / chunk, &|task| {
            let mut sums = [0u64; 32];
            for part in data[task * chunk..][..chunk].as_chunks::<32>().0 {
                sums.iter_mut().zip(part).for_each(|(sum, v)| *sum |= v);
            }
            std::hint::black_box(sums);
        })
    });
    part as f64 * 8.0 / time
}

#[test]
#[ignore = "measures; run it on a quiet machine in release mode"]
fn linear_speed() {
    let mut random = Random(1);
    let threads = std::env::var("THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    let mut team = Team::new(threads);
    let simd = Simd::detect();
    let read = read_rate(&mut team);
    #[cfg(target_arch = "x86_64")]
    let (floats, bytes) = if simd >= Simd::Avx2 { multiply_rates(&mut team) } else { (f64::NAN, f64::NAN) };
    println!(
        "{simd}, {threads} threads: {:.1} GFMA/s, {:.1} G byte products/s, read {:.1} GB/s",
        floats / 1e9,
        bytes / 1e9,
        read / 1e9
    );
    let only = std::env::var("FORMAT").ok();
    let counts = std::env::var("TOKENS").unwrap_or("512,64,16,8,4,1".into());
    let counts: Vec<usize> =
        counts.split(',').map(|n| n.parse().expect("TOKENS is a list of numbers")).collect();
    let formats = [
        DType::Q4_1,
        DType::Q4_0,
        DType::Q5_0,
        DType::Q8_0,
        DType::Q4K,
        DType::Q5K,
        DType::Q6K,
        DType::Q2K,
        DType::Q3K,
        DType::Iq4Nl,
        DType::Bf16,
        DType::F16,
        DType::F32,
    ];
    for dtype in formats {
        if only.as_ref().is_some_and(|only| only.split(',').all(|only| dtype.to_string() != only)) {
            continue;
        }
        let shapes =
            [(576, 576), (1536, 576), (576, 1536), (4864, 896), (896, 4864), (8960, 1536), (1536, 8960)];
        let shapes = if std::env::var("BRIEF").is_ok() { &shapes[3..4] } else { &shapes[..] };
        for &(rows, cols) in shapes {
            let cols = if cols % dtype.block_len() == 0 { cols } else { cols.next_multiple_of(256) };
            let bytes_one = rows * cols / dtype.block_len() * dtype.block_bytes();
            // Enough copies that a decode step reads memory, not caches, as a whole model would.
            let copies = (96usize << 20).div_ceil(bytes_one);
            let weights: Vec<Weight> =
                (0..copies).map(|_| Weight::new(random_matrix(&mut Random(9), dtype, rows, cols))).collect();
            #[cfg(target_arch = "x86_64")]
            let (floats, _) = if simd >= Simd::Avx2 { multiply_rates(&mut team) } else { (floats, bytes) };
            print!("{dtype:>7} {rows:>5} x {cols:>5} ({:.0}):", floats / 1e9);
            for &tokens in &counts {
                let x = random_input(&mut random, tokens, cols);
                let mut y = vec![0.0; tokens * rows];
                let variants = if tokens > 64 { 1 } else { copies };
                let time = seconds(variants, |i| {
                    matmul(&mut team, simd, Precision::Fast, false, tokens, &x, &weights[i], &mut y)
                });
                let rate = (rows * cols * tokens) as f64 / time;
                print!("  {tokens}: {:.2} fma", rate / floats);
                if tokens <= 4 {
                    print!(" {:.0}% read", 100.0 * bytes_one as f64 / time / read);
                }
            }
            println!();
        }
    }
}
