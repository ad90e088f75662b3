//! What kernels do on softcuda, held to budgets: sectors moved, bank conflicts, matrix products. Counts, not speeds.
//! Prints a table.

mod device;

use c2c::{
    backend::{DType, Precision, Queue},
    ops::{
        Activation, NormOutput, Pass,
        cases::{AttentionShape, Case, FuseCase, Run, TrainingCase},
    },
};
use softcuda::{KernelCounts, counters::Counts};

const FAST: Run = Run { precision: Precision::Fast, rounded: false };

fn linear(pass: Pass, dtype: DType, tokens: usize, cols: usize, rows: usize) -> Case {
    Case::Linear { pass, parts: vec![(dtype, rows)], cols, tokens, bias: None, accumulate: false }
}

fn attention(pass: Pass, heads: usize, kv_heads: usize, head_dim: usize, new: usize, context: usize) -> Case {
    let sequences = vec![(new, context)];
    Case::Attention { pass, heads, kv_heads, head_dim, sequences, block_size: 16, window: 0, soft_cap: 0.0 }
}

fn training(case: TrainingCase) -> Case {
    Case::Training(case)
}

const FUSE: FuseCase = FuseCase {
    layers: 2,
    tokens: 128,
    source: (2, 64),
    target: (8, 32),
    hidden: 256,
    inner: 256,
    ..FuseCase::C2C
};

fn run(case: &Case) -> Option<Vec<KernelCounts>> {
    let soft = device::soft()?;
    let backend = c2c::backend::cuda::Cuda::open(soft.ordinal).unwrap();
    let backend: std::sync::Arc<dyn c2c::backend::Backend> = backend;
    case.run(&Queue::new(&backend).unwrap(), FAST).unwrap_or_else(|error| panic!("{case:?}: {error}"));
    Some(soft.counts())
}

fn mma(counts: &Counts) -> u64 {
    counts.mma.values().sum()
}

/// Sectors moved over the fewest that hold the bytes asked for.
fn waste(counts: &Counts) -> f64 {
    let (loads, stores) = (counts.global_loads, counts.global_stores);
    32.0 * (loads.sectors + stores.sectors) as f64 / (loads.bytes + stores.bytes).max(1) as f64
}

/// Extra passes an access to shared memory.
fn conflicts(counts: &Counts) -> f64 {
    let (loads, stores) = (counts.shared_loads, counts.shared_stores);
    (loads.conflicts + stores.conflicts) as f64 / (loads.instructions + stores.instructions).max(1) as f64
}

/// m16n8k16 products of a matrix `[tokens, cols]` with one of `rows` rows.
fn products(tokens: usize, cols: usize, rows: usize) -> u64 {
    (tokens.div_ceil(16) * cols.div_ceil(16) * rows.div_ceil(8)) as u64
}

/// Of causal attention of `new` tokens of one head to themselves: scores and weighted values, in sixteens of keys.
fn causal_products(new: usize, head_dim: usize) -> u64 {
    (0..new.div_ceil(16)).map(|rows| 2 * products(16, head_dim, 16 * (rows + 1))).sum()
}

#[test]
fn kernels_keep_to_their_budgets() {
    let (prefill, decode) = (Pass::Prefill, Pass::Decode);
    // Each with its matrix products, and whether it is held to the budget of bank conflicts: matmul and attention are.
    // Keys and values of two layers: the input's two columns, two products of three blocks, the output; then the weights of
    // the heads, whose 8 rows are one tile of 64.
    let fuse_products = 4 * (products(128, 384, 256) + 7 * products(128, 256, 256));
    let cases = [
        (
            Case::RmsNorm { rows: 16, cols: 2048, weight: DType::Bf16, output: NormOutput::Assign },
            Some(0),
            false,
        ),
        (linear(prefill, DType::Bf16, 128, 512, 256), Some(products(128, 512, 256)), true),
        (linear(prefill, DType::Q8_0, 128, 512, 256), Some(products(128, 512, 256)), false),
        (linear(prefill, DType::Q4K, 128, 512, 256), Some(products(128, 512, 256)), false),
        (
            Case::LinearGlu {
                pass: prefill,
                dtype: DType::Bf16,
                width: 128,
                cols: 512,
                tokens: 128,
                bias: None,
                activation: Activation::Silu,
            },
            Some(2 * products(128, 512, 128)),
            true,
        ),
        (linear(decode, DType::Bf16, 1, 4096, 64), Some(0), true),
        (linear(decode, DType::Q8_0, 1, 4096, 64), Some(0), false),
        (linear(decode, DType::Q4K, 1, 4096, 64), Some(0), false),
        (attention(prefill, 4, 4, 64, 128, 128), Some(4 * causal_products(128, 64)), true),
        (attention(prefill, 4, 4, 128, 128, 128), Some(4 * causal_products(128, 128)), true),
        (attention(decode, 8, 2, 128, 1, 1024), None, true),
        (Case::Fuse(FUSE), Some(fuse_products + 4 * products(128, 256, 64)), true),
        (Case::Embed { dtype: DType::Bf16, vocab: 64, hidden: 1024, tokens: 32 }, Some(0), false),
        (Case::CopySlots { kv_heads: 8, head_dim: 64, block_sizes: [16, 16], tokens: 64 }, Some(0), false),
        (
            training(TrainingCase::Glu { tokens: 16, width: 512, activation: Activation::Silu }),
            Some(0),
            false,
        ),
        (
            training(TrainingCase::GluBackward { tokens: 16, width: 512, activation: Activation::Silu }),
            Some(0),
            false,
        ),
        (
            training(TrainingCase::RmsNorm {
                rows: 64,
                cols: 1024,
                weight: DType::Bf16,
                output: NormOutput::Add,
                learns: true,
            }),
            Some(0),
            true,
        ),
        (training(TrainingCase::Embed { vocab: 64, hidden: 1024, tokens: 32 }), Some(0), false),
        (training(TrainingCase::CrossEntropy { rows: 4, vocab: 8192, soft_cap: 0.0 }), Some(0), false),
        (training(TrainingCase::Adamw { len: 1 << 14 }), Some(0), false),
        (training(TrainingCase::SumOfSquares { len: 1 << 20 }), Some(0), false),
        (
            training(TrainingCase::Rope {
                heads: 8,
                kv_heads: 4,
                head_dim: 128,
                tokens: 64,
                block_size: 16,
                norm: Some(DType::Bf16),
                interleaved: false,
            }),
            Some(0),
            true,
        ),
        // The forward kernel's products; then of three pairs of tiles five products for the queries and four for the keys.
        (
            training(TrainingCase::Attention(AttentionShape {
                heads: 4,
                kv_heads: 4,
                head_dim: 64,
                sequences: vec![(128, 128)],
                block_size: 16,
                window: 0,
                soft_cap: 0.0,
            })),
            Some(4 * (causal_products(128, 64) + 3 * 9 * products(64, 64, 64))),
            true,
        ),
    ];
    println!(
        "| case | kernel | launches | lane instructions | sectors / fewest | conflicts / access | mma |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut over = Vec::new();
    for (case, expected_mma, conflict_free) in cases {
        let Some(counts) = run(&case) else { return };
        let name = format!("{case:?}");
        let name: String = name.chars().take_while(|&c| c != '{' && c != '(').collect();
        assert!(!counts.is_empty(), "{case:?} launched nothing");
        let mut products = 0;
        for KernelCounts { kernel, launches, counts } in &counts {
            let (waste, conflicts, mma) = (waste(counts), conflicts(counts), mma(counts));
            products += mma;
            let lanes = counts.lane_instructions;
            println!(
                "| {} | {kernel} | {launches} | {lanes} | {waste:.2} | {conflicts:.2} | {mma} |",
                name.trim()
            );
            if waste > 1.25 {
                over.push(format!("{kernel}: {waste:.2} × the fewest sectors ({case:?})"));
            }
            if conflict_free && conflicts > 0.1 {
                over.push(format!("{kernel}: {conflicts:.2} bank conflicts an access ({case:?})"));
            }
        }
        if let Some(expected) = expected_mma
            && products != expected
        {
            over.push(format!("{products} matrix products where {expected} are needed ({case:?})"));
        }
    }
    assert!(over.is_empty(), "over budget:\n{}", over.join("\n"));
}
