//! What an NVIDIA GPU can do at best: cuBLAS on a large product, and copies of device memory.

use super::Rates;
use cudarc::{
    cublas::{CudaBlas, Gemm, GemmConfig, sys as cublas},
    driver::{CudaContext, CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits},
};
use half::bf16;
use std::{
    error::Error,
    sync::Arc,
    time::{Duration, Instant},
};

/// Rows and columns of the product.
const SIZE: usize = 8192;
/// Bytes of a copy: beyond any cache.
const COPIED: usize = 1 << 30;
const RUNS: usize = 5;

/// Without cuBLAS on the machine the rates of multiplication stay unknown.
pub fn measure(ordinal: usize) -> Result<Rates, Box<dyn Error>> {
    let context = CudaContext::new(ordinal)?;
    let stream = context.new_stream()?;
    let (from, mut to) = (stream.alloc_zeros::<u8>(COPIED)?, stream.alloc_zeros::<u8>(COPIED)?);
    let copy = best(&stream, || Ok(stream.memcpy_dtod(&from, &mut to)?))?;
    drop((from, to));
    let mut rates = Rates { read: Some(2.0 * COPIED as f64 / copy.as_secs_f64()), ..Rates::default() };
    // SAFETY: opens the library, whose initialisers are trusted.
    if !unsafe { cublas::is_culib_present() } {
        println!("libcublas.so is not on this machine: shares of the multiply rate are left out");
        return Ok(rates);
    }
    let blas = CudaBlas::new(stream.clone())?;
    let one = |x: f32| bf16::from_f32(x);
    rates.bf16 = Some(product(&stream, &blas, one(1.0), one(0.0))?);
    rates.f32 = Some(product(&stream, &blas, 1.0f32, 0.0)?);
    // Blocks are expanded to bf16.
    rates.int8 = rates.bf16;
    Ok(rates)
}

fn product<T: Copy + DeviceRepr + ValidAsZeroBits>(
    stream: &Arc<CudaStream>,
    blas: &CudaBlas,
    alpha: T,
    beta: T,
) -> Result<f64, Box<dyn Error>>
where
    CudaBlas: Gemm<T>,
{
    let size = SIZE as i32;
    let matrix = || -> Result<CudaSlice<T>, Box<dyn Error>> { Ok(stream.alloc_zeros::<T>(SIZE * SIZE)?) };
    let (a, b, mut c) = (matrix()?, matrix()?, matrix()?);
    let config = GemmConfig {
        transa: cublas::cublasOperation_t::CUBLAS_OP_T,
        transb: cublas::cublasOperation_t::CUBLAS_OP_N,
        m: size,
        n: size,
        k: size,
        alpha,
        lda: size,
        ldb: size,
        beta,
        ldc: size,
    };
    let time = best(stream, || {
        // SAFETY: three matrices of SIZE × SIZE.
        unsafe { blas.gemm(config, &a, &b, &mut c)? };
        Ok(())
    })?;
    Ok(2.0 * (SIZE as f64).powi(3) / time.as_secs_f64())
}

fn best(
    stream: &CudaStream,
    mut run: impl FnMut() -> Result<(), Box<dyn Error>>,
) -> Result<Duration, Box<dyn Error>> {
    let mut best = Duration::MAX;
    for _ in 0..=RUNS {
        stream.synchronize()?;
        let start = Instant::now();
        run()?;
        stream.synchronize()?;
        best = best.min(start.elapsed());
    }
    Ok(best)
}
