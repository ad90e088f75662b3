//! What kernels do on softcuda, held to budgets: sectors moved, bank conflicts, matrix products. Counts, not speeds.
//! Prints a table.

mod device;

use c2c::{
    backend::{DType, Queue},
    ops::{
        Activation, NormOutput, Pass,
        cases::{AttentionShape, Case, FuseCase, Run, TrainingCase},
    },
};
use softcuda::{KernelCounts, counters::Counts};

/// Conflicts an access that products and attention may have.
const FEW: Option<f64> = Some(0.1);
/// And products of rows in blocks that begin anywhere: by how much differs from row to row, so rows that would lie in banks of
/// their own overlap.
const SOME: Option<f64> = Some(0.5);
/// Of sectors moved over the fewest possible.
const WASTE: f64 = 1.25;

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

/// Bytes that the case must move, and its kernels' counts.
fn run(case: &Case) -> Option<(u64, Vec<KernelCounts>)> {
    let soft = device::soft()?;
    let backend = c2c::backend::cuda::Cuda::open(soft.ordinal).unwrap();
    let backend: std::sync::Arc<dyn c2c::backend::Backend> = backend;
    let queue = Queue::new(&backend).unwrap();
    case.run(&queue, Run::FAST).unwrap_or_else(|error| panic!("{case:?}: {error}"));
    Some((case.work(&queue, Run::FAST).bytes, soft.counts()))
}

/// Bytes that every block reads for itself, from cache: a norm's weight.
fn cached(case: &Case) -> u64 {
    match *case {
        Case::RmsNorm { rows, cols, weight, .. } => (rows * cols * weight.block_bytes()) as u64,
        _ => 0,
    }
}

/// Whether every byte is needed by one block alone. Tiles of products and of attention share operands; that they read theirs once
/// is what [`waste`] says.
fn moves_once(case: &Case) -> bool {
    match case {
        Case::Training(case) => matches!(
            case,
            TrainingCase::Glu { .. }
                | TrainingCase::GluBackward { .. }
                | TrainingCase::Adamw { .. }
                | TrainingCase::SumOfSquares { .. }
        ),
        Case::Attention { pass, .. } => *pass == Pass::Decode,
        Case::RmsNorm { .. } | Case::Embed { .. } | Case::CopySlots { .. } => true,
        _ => false,
    }
}

fn mma(counts: &Counts) -> u64 {
    counts.mma.values().sum()
}

fn sectors(counts: &Counts) -> u64 {
    counts.global_loads.sectors + counts.global_stores.sectors
}

/// Sectors moved over the fewest that hold the bytes asked for.
fn waste(counts: &Counts) -> f64 {
    32.0 * sectors(counts) as f64 / (counts.global_loads.bytes + counts.global_stores.bytes).max(1) as f64
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
    // Each with its matrix products, and how many bank conflicts an access it may have.
    // Keys and values of two layers: the input's two columns, two products of three blocks, the output; then the weights of
    // the heads, whose 8 rows are one tile of 64.
    let fuse_products = 4 * (products(128, 384, 256) + 7 * products(128, 256, 256));
    let mut cases = vec![
        (
            Case::RmsNorm { rows: 16, cols: 2048, weight: DType::Bf16, output: NormOutput::Assign },
            Some(0),
            None,
        ),
        (linear(prefill, DType::Bf16, 128, 512, 256), Some(products(128, 512, 256)), FEW),
        (linear(prefill, DType::Q8_0, 128, 512, 256), Some(products(128, 512, 256)), None),
        (linear(prefill, DType::Q4K, 128, 512, 256), Some(products(128, 512, 256)), None),
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
            FEW,
        ),
        (linear(decode, DType::Bf16, 1, 4096, 64), Some(0), FEW),
        (linear(decode, DType::Q8_0, 1, 4096, 64), Some(0), None),
        (linear(decode, DType::Q4K, 1, 4096, 64), Some(0), None),
        (attention(prefill, 4, 4, 64, 128, 128), Some(4 * causal_products(128, 64)), FEW),
        (attention(prefill, 4, 4, 128, 128, 128), Some(4 * causal_products(128, 128)), FEW),
        (attention(decode, 8, 2, 128, 1, 1024), None, FEW),
        (Case::Fuse(FUSE), Some(fuse_products + 4 * products(128, 256, 64)), FEW),
        (Case::Embed { dtype: DType::Bf16, vocab: 64, hidden: 1024, tokens: 32 }, Some(0), None),
        (Case::CopySlots { kv_heads: 8, head_dim: 64, block_sizes: [16, 16], tokens: 64 }, Some(0), None),
        (training(TrainingCase::Glu { tokens: 16, width: 512, activation: Activation::Silu }), Some(0), None),
        (
            training(TrainingCase::GluBackward { tokens: 16, width: 512, activation: Activation::Silu }),
            Some(0),
            None,
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
            FEW,
        ),
        (training(TrainingCase::Embed { vocab: 64, hidden: 1024, tokens: 32 }), Some(0), None),
        (training(TrainingCase::CrossEntropy { rows: 4, vocab: 8192, soft_cap: 0.0 }), Some(0), None),
        (training(TrainingCase::Adamw { len: 1 << 14 }), Some(0), None),
        (training(TrainingCase::SumOfSquares { len: 1 << 20 }), Some(0), None),
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
            FEW,
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
            FEW,
        ),
        // Both products of a stack of two matrices, by tiles of 64.
        (
            training(TrainingCase::Linear {
                parts: vec![(DType::Bf16, 128), (DType::Bf16, 64)],
                cols: 256,
                tokens: 128,
            }),
            Some(2 * products(128, 256, 192)),
            FEW,
        ),
        // As in `fuse`, each three times: forward, and both gradients. The heads' 8 rows are one tile of 64, and one step of 32
        // in the gradient of what they read.
        (
            training(TrainingCase::Fuse(FuseCase { tokens: 64, ..FUSE })),
            Some(
                12 * (products(64, 384, 256) + 7 * products(64, 256, 256))
                    + 8 * products(64, 256, 64)
                    + 4 * products(64, 32, 256),
            ),
            FEW,
        ),
    ];
    // Every format by tiles; and for one token as it lies in the file, where lengths of blocks meet in banks.
    for dtype in DType::ALL.into_iter().filter(|&dtype| dtype != DType::U32) {
        for cols in [768usize, 544] {
            if cols.is_multiple_of(dtype.block_len()) {
                let row_bytes = cols / dtype.block_len() * dtype.block_bytes();
                let conflicts = if row_bytes.is_multiple_of(16) { FEW } else { SOME };
                cases.push((linear(prefill, dtype, 64, cols, 64), Some(products(64, cols, 64)), conflicts));
            }
        }
        let conflicts = if dtype.is_quantized() { Some(0.7) } else { FEW };
        cases.push((linear(decode, dtype, 1, 2048, 64), Some(0), conflicts));
    }
    println!(
        "| case | kernel | launches | lane instructions | sectors / fewest | conflicts / access | mma |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut over = Vec::new();
    for (case, expected_mma, most_conflicts) in cases {
        let Some((bytes, counts)) = run(&case) else { return };
        let name = case.op();
        assert!(!counts.is_empty(), "{case:?} launched nothing");
        let mut products = 0;
        for KernelCounts { kernel, launches, counts } in &counts {
            let (waste, conflicts, mma) = (waste(counts), conflicts(counts), mma(counts));
            products += mma;
            let lanes = counts.lane_instructions;
            println!("| {name} | {kernel} | {launches} | {lanes} | {waste:.2} | {conflicts:.2} | {mma} |");
            if waste > WASTE {
                over.push(format!("{kernel}: {waste:.2} × the fewest sectors ({case:?})"));
            }
            if most_conflicts.is_some_and(|most| conflicts > most) {
                over.push(format!("{kernel}: {conflicts:.2} bank conflicts an access ({case:?})"));
            }
        }
        let moved: u64 = counts.iter().map(|kernel| sectors(&kernel.counts)).sum();
        if moves_once(&case) && 32.0 * moved as f64 > WASTE * (bytes + cached(&case)) as f64 {
            over.push(format!("{moved} sectors for {bytes} bytes ({case:?})"));
        }
        if let Some(expected) = expected_mma
            && products != expected
        {
            over.push(format!("{products} matrix products where {expected} are needed ({case:?})"));
        }
    }
    assert!(over.is_empty(), "over budget:\n{}", over.join("\n"));
}
