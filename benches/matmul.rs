//! `x · Wᵀ`: many tokens against the multiply-add rate, one token against the read bandwidth. The vocabulary-sized
//! matrix of the latter is far beyond any cache.

mod machine;
mod synthetic;

use c2c::{
    backend::{DType, Precision, Queue},
    ops::{self, Pass, Weight},
};
use criterion::{Criterion, criterion_group, criterion_main};
use machine::{Machine, Work, assert_close};
use synthetic::{Synthetic, decode_row};

fn matmul(criterion: &mut Criterion) {
    let Some(machine) = Machine::open() else { return };
    let mut group = machine.group(criterion, "matmul");
    let queue = Queue::new(&machine.device).expect("a queue");
    // Tokens × inputs × outputs.
    let cases = [
        (DType::F32, Precision::F32, [512, 1024, 3072]),
        (DType::Bf16, Precision::Fast, [512, 1024, 3072]),
        (DType::Bf16, Precision::Fast, [512, 3072, 1024]),
        (DType::Bf16, Precision::Fast, [512, 896, 4864]),
        (DType::Q8_0, Precision::Fast, [512, 896, 4864]),
        (DType::Q4_0, Precision::Fast, [512, 896, 4864]),
        (DType::Q4_1, Precision::Fast, [512, 576, 1536]),
        (DType::Bf16, Precision::Fast, [1, 1024, 262_144]),
        (DType::Q8_0, Precision::Fast, [1, 1024, 262_144]),
        (DType::Q4_0, Precision::Fast, [1, 1024, 262_144]),
    ];
    for (dtype, precision, [tokens, cols, rows]) in cases {
        let id = format!("{dtype} {tokens}x{cols}x{rows}");
        let (tokens, rows) = if machine.smoke() { (tokens.min(33), rows.min(130)) } else { (tokens, rows) };
        let mut synthetic = Synthetic::new(&queue);
        let x = synthetic.activations(precision, &[tokens, cols]);
        let weight = Weight::new(synthetic.matrix(dtype, rows, cols));
        let out = machine.device.alloc(DType::F32, &[tokens, rows], "product").expect("memory");
        let pass = if tokens == 1 { Pass::Decode } else { Pass::Prefill };
        let run = || {
            ops::linear(&queue, pass, &x, &weight, precision, false, &out).expect("shapes that fit");
            queue.synchronize().expect("a product");
        };

        run();
        let x_host = queue.download_f32(&x).expect("a download");
        let found = queue.download_f32(&out).expect("a download");
        let samples = (0..64).map(|i| (i * 37 % tokens, i * 8191 % rows));
        let (found, expected): (Vec<f32>, Vec<f64>) = samples
            .map(|(token, row)| {
                let weights = decode_row(&queue, &weight.parts[0].matrix, row);
                let x = &x_host[token * cols..][..cols];
                let dot = x.iter().zip(weights).map(|(&x, w)| f64::from(x) * w).sum::<f64>();
                (found[token * rows + row], dot)
            })
            .unzip();
        // Rounding each input to 8 bits is off by 0.4 % of its size; as much of the sum, 5 times over. To bf16, where
        // the processor multiplies those, it makes 0.4 % of the sum at most; twice that.
        let tolerance = match precision {
            Precision::F32 => 1e-5,
            Precision::Fast if dtype.is_quantized() => 2e-2,
            Precision::Fast => 8e-3,
        };
        assert_close(&id, &found, &expected, tolerance);

        let flops = 2.0 * (tokens * cols * rows) as f64;
        let work = match (tokens, precision) {
            (1, _) => Work::Read(weight.bytes() as f64),
            (_, Precision::F32) => Work::F32(flops),
            (_, Precision::Fast) if dtype.is_quantized() => Work::Int8(flops),
            (_, Precision::Fast) => Work::Bf16(flops),
        };
        machine.bench(&mut group, &id, work, run);
    }
    group.finish();
}

criterion_group!(benches, matmul);
criterion_main!(benches);
