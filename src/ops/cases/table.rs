//! The cases.

use super::{AttentionShape, Case, FuseCase, TrainingCase};
use crate::{
    backend::DType,
    ops::{Activation, NormOutput, Pass},
};

const FLOATS: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

fn matrices() -> impl Iterator<Item = DType> {
    DType::ALL.into_iter().filter(|&dtype| dtype != DType::U32)
}

/// Every case.
pub fn table() -> Vec<Case> {
    let mut all = Vec::new();
    pointwise(&mut all);
    linear(&mut all);
    attention(&mut all);
    fuse(&mut all);
    training(&mut all);
    all
}

/// Every op in the sizes of a model like Qwen3-0.6B and a prompt of 512 tokens, trained on 256.
pub fn timed() -> Vec<Case> {
    const HIDDEN: usize = 1024;
    let (heads, kv_heads, head_dim, block_size, tokens) = (16, 8, 128, 16, 512);
    let (silu, bf16) = (Activation::Silu, DType::Bf16);
    let linear = |pass, dtype, tokens| {
        let parts = [heads, kv_heads, kv_heads].map(|heads| (dtype, heads * head_dim)).to_vec();
        Case::Linear { pass, parts, cols: HIDDEN, tokens, bias: None, accumulate: false }
    };
    let glu = |pass, dtype, tokens| {
        let (width, bias, activation) = (3072, None, silu);
        Case::LinearGlu { pass, dtype, width, cols: HIDDEN, tokens, bias, activation }
    };
    let attention = |pass, sequences| {
        let (window, soft_cap) = (0, 0.0);
        Case::Attention { pass, heads, kv_heads, head_dim, sequences, block_size, window, soft_cap }
    };
    let fuse = FuseCase {
        source: (2, 64),
        target: (kv_heads, head_dim),
        hidden: HIDDEN,
        inner: HIDDEN,
        tokens: 256,
        ..FuseCase::C2C
    };
    let norm = Some(bf16);
    let training = [
        TrainingCase::RmsNorm {
            rows: 256,
            cols: HIDDEN,
            weight: bf16,
            output: NormOutput::Add,
            learns: true,
        },
        TrainingCase::Glu { tokens: 256, width: 3072, activation: silu },
        TrainingCase::GluBackward { tokens: 256, width: 3072, activation: silu },
        TrainingCase::Embed { vocab: 32_000, hidden: HIDDEN, tokens: 256 },
        TrainingCase::Rope { heads, kv_heads, head_dim, tokens: 256, block_size, norm, interleaved: false },
        TrainingCase::Attention(AttentionShape {
            heads,
            kv_heads,
            head_dim,
            sequences: vec![(256, 256)],
            block_size,
            window: 0,
            soft_cap: 0.0,
        }),
        TrainingCase::Linear { parts: vec![(bf16, 1024)], cols: HIDDEN, tokens: 256 },
        TrainingCase::Fuse(FuseCase { tokens: 64, ..fuse.clone() }),
        TrainingCase::CrossEntropy { rows: 64, vocab: 32_000, soft_cap: 0.0 },
        TrainingCase::Adamw { len: 1 << 22 },
        TrainingCase::SumOfSquares { len: 1 << 22 },
    ];
    let mut all = vec![
        Case::Embed { dtype: DType::Q8_0, vocab: 32_000, hidden: HIDDEN, tokens },
        Case::RmsNorm { rows: tokens, cols: HIDDEN, weight: bf16, output: NormOutput::Assign },
        linear(Pass::Prefill, bf16, tokens),
        linear(Pass::Prefill, DType::Q8_0, tokens),
        linear(Pass::Decode, bf16, 1),
        linear(Pass::Decode, DType::Q4K, 1),
        glu(Pass::Prefill, bf16, tokens),
        glu(Pass::Decode, DType::Q8_0, 1),
        Case::Rope { heads, kv_heads, head_dim, tokens, block_size, norm, interleaved: false },
        attention(Pass::Prefill, vec![(tokens, tokens)]),
        attention(Pass::Decode, vec![(1, 2048); 8]),
        Case::GatherRows { rows: tokens, cols: HIDDEN, taken: 64 },
        Case::CopySlots { kv_heads, head_dim, block_sizes: [block_size; 2], tokens },
        Case::SoftCap { elements: 1 << 20 },
        Case::Fuse(fuse),
    ];
    all.extend(training.map(Case::Training));
    all
}

fn pointwise(all: &mut Vec<Case>) {
    for dtype in matrices() {
        all.push(Case::Embed { dtype, vocab: 11, hidden: 256 + dtype.block_len(), tokens: 7 });
    }
    for (rows, cols) in [(1, 1), (7, 54), (3, 97), (2, 2048)] {
        for (weight, output) in
            FLOATS.into_iter().zip([NormOutput::Assign, NormOutput::Add].into_iter().cycle())
        {
            all.push(Case::RmsNorm { rows, cols, weight, output });
        }
    }
    all.push(Case::RmsNorm { rows: 5, cols: 896, weight: DType::F32, output: NormOutput::Add });
    all.push(Case::RmsNorm { rows: 5, cols: 896, weight: DType::Bf16, output: NormOutput::Assign });
    for (rows, cols, taken) in [(1, 1, 3), (9, 97, 4), (4, 512, 7)] {
        all.push(Case::GatherRows { rows, cols, taken });
    }
    for (kv_heads, head_dim, block_sizes, tokens) in
        [(1, 8, [1, 8], 5), (3, 54, [16, 16], 33), (2, 64, [16, 4], 19)]
    {
        all.push(Case::CopySlots { kv_heads, head_dim, block_sizes, tokens });
    }
    for elements in [1, 97, 5000] {
        all.push(Case::SoftCap { elements });
    }
    for (heads, kv_heads, head_dim, tokens, block_size, norm, interleaved) in [
        (1, 1, 8, 1, 16, None, false),
        (4, 2, 16, 7, 16, Some(DType::F32), false),
        (9, 3, 64, 33, 16, None, true),
        (4, 1, 256, 5, 16, Some(DType::Bf16), false),
        (2, 1, 96, 18, 1, Some(DType::F16), true),
        (3, 3, 54, 6, 8, Some(DType::F32), true),
        (16, 8, 128, 3, 16, Some(DType::Bf16), false),
    ] {
        all.push(Case::Rope { heads, kv_heads, head_dim, tokens, block_size, norm, interleaved });
    }
}

fn linear(all: &mut Vec<Case>) {
    let one = |pass, dtype, rows, cols, tokens| Case::Linear {
        pass,
        parts: vec![(dtype, rows)],
        cols,
        tokens,
        bias: None,
        accumulate: false,
    };
    for pass in [Pass::Prefill, Pass::Decode] {
        // Odd sizes, in the formats that allow them.
        for dtype in FLOATS {
            for (rows, cols, tokens) in [(1, 1, 1), (7, 54, 3), (97, 97, 7), (54, 136, 9)] {
                all.push(one(pass, dtype, rows, cols, tokens));
            }
        }
        // Every format, tokens on both sides of what a kernel takes at once.
        for dtype in matrices() {
            for (rows, blocks, tokens) in [(33, 2, 1), (70, 1, 5), (17, 3, 9)] {
                all.push(one(pass, dtype, rows, blocks * dtype.block_len().max(32), tokens));
            }
        }
        // Stacks of parts, biases, accumulation.
        let mixed = vec![(DType::Bf16, 40), (DType::Q8_0, 24), (DType::Bf16, 9)];
        let same = vec![(DType::Bf16, 65), (DType::Bf16, 33), (DType::Bf16, 30)];
        for (parts, bias, accumulate) in [
            (mixed.clone(), Some(DType::F32), false),
            (mixed, None, true),
            (same.clone(), Some(DType::Bf16), false),
            (same, Some(DType::F16), true),
        ] {
            for tokens in [1, 11] {
                all.push(Case::Linear { pass, parts: parts.clone(), cols: 96, tokens, bias, accumulate });
            }
        }
        for (dtype, width, cols, tokens, bias, activation) in [
            (DType::Bf16, 80, 64, 5, None, Activation::Silu),
            (DType::Bf16, 33, 54, 1, Some(DType::F32), Activation::GeluTanh),
            (DType::F32, 70, 97, 3, Some(DType::F32), Activation::GeluErf),
            (DType::Q4K, 48, 512, 9, None, Activation::Silu),
            (DType::Q5_0, 130, 64, 2, Some(DType::Bf16), Activation::Silu),
        ] {
            all.push(Case::LinearGlu { pass, dtype, width, cols, tokens, bias, activation });
        }
    }
    // Several tiles each way.
    all.push(one(Pass::Prefill, DType::Bf16, 300, 320, 150));
    all.push(one(Pass::Prefill, DType::Q4K, 140, 512, 130));
    all.push(one(Pass::Prefill, DType::Q6K, 129, 256, 65));
    all.push(one(Pass::Decode, DType::F32, 19, 2184, 3));
    all.push(one(Pass::Decode, DType::Bf16, 19, 2184, 3));
    all.push(one(Pass::Decode, DType::Q4K, 19, 2304, 3));
}

fn attention(all: &mut Vec<Case>) {
    let mut push =
        |pass, heads, kv_heads, head_dim, sequences: &[(usize, usize)], block_size, window, soft_cap| {
            let sequences = sequences.to_vec();
            all.push(Case::Attention {
                pass,
                heads,
                kv_heads,
                head_dim,
                sequences,
                block_size,
                window,
                soft_cap,
            });
        };
    let prefill = Pass::Prefill;
    push(prefill, 1, 1, 8, &[(1, 1)], 16, 0, 0.0);
    push(prefill, 2, 1, 16, &[(7, 7), (2, 20), (33, 33)], 16, 0, 0.0);
    push(prefill, 9, 3, 64, &[(54, 97), (17, 17)], 16, 0, 0.0);
    push(prefill, 14, 2, 64, &[(70, 70)], 16, 0, 0.0);
    push(prefill, 4, 1, 256, &[(20, 65), (3, 16)], 16, 24, 0.0);
    push(prefill, 8, 8, 96, &[(19, 130)], 16, 64, 50.0);
    push(prefill, 16, 8, 128, &[(129, 140), (1, 5), (40, 40)], 16, 0, 0.0);
    push(prefill, 3, 1, 54, &[(9, 30)], 8, 10, 0.0);
    push(prefill, 4, 2, 32, &[(65, 65)], 1, 16, 20.0);
    // Enough rows for long tiles.
    push(prefill, 32, 8, 64, &[(70, 70)], 16, 0, 0.0);
    push(prefill, 32, 8, 96, &[(70, 90)], 16, 0, 0.0);
    let decode = Pass::Decode;
    push(decode, 1, 1, 8, &[(1, 1)], 16, 0, 0.0);
    push(decode, 9, 3, 64, &[(1, 33), (1, 1), (1, 97)], 16, 0, 0.0);
    push(decode, 14, 2, 64, &[(1, 600)], 16, 0, 0.0);
    push(decode, 4, 1, 256, &[(1, 300), (1, 255)], 16, 100, 0.0);
    push(decode, 8, 8, 96, &[(1, 257), (1, 256)], 16, 0, 50.0);
    push(decode, 16, 8, 128, &[(1, 512), (1, 513), (1, 17)], 16, 0, 0.0);
    push(decode, 16, 2, 128, &[(1, 40)], 16, 16, 0.0);
    push(decode, 3, 1, 54, &[(1, 30), (1, 8)], 8, 10, 0.0);
}

fn fuse(all: &mut Vec<Case>) {
    const C2C: FuseCase = FuseCase::C2C;
    all.extend(
        [
            FuseCase { tokens: 1, ..C2C },
            FuseCase { weights: DType::F32, ..C2C },
            FuseCase {
                layers: 3,
                tokens: 70,
                source: (2, 64),
                target: (8, 32),
                hidden: 128,
                inner: 128,
                ..C2C
            },
            FuseCase { scalar: false, ..C2C },
            FuseCase { scalar: false, use_target: false, tokens: 33, ..C2C },
            FuseCase { apart: true, gates: [1.0, 0.25], ..C2C },
            FuseCase { gates: [0.0, 1.0], ..C2C },
            FuseCase { apart: true, gates: [1.0, 0.0], ..C2C },
            FuseCase { stage: 48, tokens: 20, source: (1, 48), ..C2C },
            FuseCase { blocks: 3, layers: 2, tokens: 19, ..C2C },
            FuseCase { hidden: 60, inner: 52, source: (3, 10), target: (2, 6), weights: DType::F16, ..C2C },
        ]
        .map(Case::Fuse),
    );
}

fn training(all: &mut Vec<Case>) {
    let mut push = |case| all.push(Case::Training(case));
    let outputs = [NormOutput::Assign, NormOutput::Add].into_iter().cycle();
    for ((rows, cols), output) in [(1, 1), (7, 54), (97, 97), (3, 2048)].into_iter().zip(outputs) {
        for (weight, learns) in [(DType::F32, true), (DType::Bf16, false)] {
            push(TrainingCase::RmsNorm { rows, cols, weight, output, learns });
        }
    }
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf] {
        for (tokens, width) in [(1, 1), (7, 54), (3, 1024)] {
            push(TrainingCase::Glu { tokens, width, activation });
            push(TrainingCase::GluBackward { tokens, width, activation });
        }
    }
    for (vocab, hidden, tokens) in [(1, 1, 3), (11, 54, 40), (5, 1024, 7)] {
        push(TrainingCase::Embed { vocab, hidden, tokens });
    }
    for (heads, kv_heads, head_dim, tokens, block_size, norm, interleaved) in [
        (1, 1, 8, 1, 16, None, false),
        (4, 2, 16, 37, 16, Some(DType::F32), false),
        (9, 3, 64, 7, 16, None, true),
        (4, 1, 256, 5, 1, Some(DType::Bf16), false),
        (3, 3, 54, 18, 8, Some(DType::F32), true),
    ] {
        push(TrainingCase::Rope { heads, kv_heads, head_dim, tokens, block_size, norm, interleaved });
    }
    let mut attention =
        |heads, kv_heads, head_dim, sequences: &[(usize, usize)], block_size, window, soft_cap| {
            let sequences = sequences.to_vec();
            push(TrainingCase::Attention(AttentionShape {
                heads,
                kv_heads,
                head_dim,
                sequences,
                block_size,
                window,
                soft_cap,
            }));
        };
    // One key alone has no gradient of its score: what is left is to be small beside the others.
    attention(1, 1, 8, &[(1, 1), (3, 5)], 16, 0, 0.0);
    attention(2, 1, 16, &[(7, 7), (2, 20), (33, 33)], 16, 0, 0.0);
    attention(9, 3, 64, &[(54, 97), (17, 17)], 16, 0, 0.0);
    attention(14, 2, 64, &[(70, 70)], 16, 0, 0.0);
    attention(4, 1, 256, &[(20, 65), (3, 16)], 16, 24, 0.0);
    attention(8, 8, 96, &[(19, 130)], 16, 64, 50.0);
    attention(16, 8, 128, &[(129, 140), (1, 5), (40, 40)], 16, 0, 0.0);
    attention(3, 1, 54, &[(9, 30)], 8, 10, 0.0);
    attention(4, 2, 32, &[(65, 65)], 1, 16, 20.0);
    let parts = vec![(DType::Bf16, 65), (DType::F32, 9), (DType::Bf16, 30)];
    push(TrainingCase::Linear { parts, cols: 96, tokens: 11 });
    push(TrainingCase::Linear { parts: vec![(DType::Q4K, 70)], cols: 256, tokens: 65 });
    push(TrainingCase::Fuse(FuseCase { tokens: 5, ..FuseCase::C2C }));
    for (rows, vocab, soft_cap) in [(1, 1, 0.0), (7, 54, 0.0), (5, 5000, 0.0), (3, 97, 30.0)] {
        push(TrainingCase::CrossEntropy { rows, vocab, soft_cap });
    }
    for len in [1, 97, 50_000] {
        push(TrainingCase::Adamw { len });
        push(TrainingCase::SumOfSquares { len });
    }
    for (rows, cols, accumulate) in [(1, 1, false), (7, 54, true), (3, 97, false), (33, 1024, true)] {
        push(TrainingCase::Dropout { rows, cols, accumulate });
    }
}
