//! A sequence's numbers do not depend on its company: the same bits alone, beside others, whole or in pieces.

use c2c::{
    backend::{DType, DeviceChoice, Precision, Queue, open},
    cache::BlockTable,
    model::{Activations, Batch, Error, Extent, Goal, SequenceStep},
    ops::Pass,
    pipeline::{Lane, Model},
};
use std::path::Path;

const MODES: [(Precision, DType); 2] = [(Precision::F32, DType::F32), (Precision::Fast, DType::Bf16)];
/// More than any kernel multiplies in one go.
const SEQUENCES: usize = 12;
const DECODED: usize = 5;

fn model(precision: Precision) -> (Model, Queue) {
    let backend = open(DeviceChoice::Cpu, 2).unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pair/receiver");
    (Model::load(&path, &backend, precision, &|_, _| {}).unwrap(), Queue::new(&backend).unwrap())
}

fn lane(model: &Model, queue: &Queue, dtype: DType) -> Lane {
    let kv = model.decoder.config.paged_kv(queue.backend(), 16, 8, dtype).unwrap();
    Lane::new(model.decoder.clone(), queue.clone(), kv, 64).unwrap()
}

fn prompt(sequence: usize) -> Vec<u32> {
    (0..2 + 3 * sequence as u32).map(|i| (7 * i + 13 * sequence as u32) % 200).collect()
}

/// Logits after the prompt and after each of [`DECODED`] greedily chosen tokens.
fn alone(model: &Model, queue: &Queue, dtype: DType, sequence: usize) -> Vec<Vec<f32>> {
    let mut lane = lane(model, queue, dtype);
    let ids = prompt(sequence);
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    lane.append(&ids, &positions, Goal::Hidden, |_, _| {}).unwrap();
    let mut logits = vec![lane.logits().unwrap()];
    for _ in 0..DECODED {
        logits.push(lane.step(best(&logits[logits.len() - 1])).unwrap());
    }
    logits
}

fn best(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

#[test]
fn a_sequence_does_not_feel_its_neighbours() {
    for (precision, dtype) in MODES {
        let (model, queue) = model(precision);
        let decoder = &model.decoder;
        let kv = decoder.config.paged_kv(queue.backend(), 100, 8, dtype).unwrap();
        let extent = Extent { tokens: 512, sequences: SEQUENCES, context: 64 };
        let activations = Activations::new(queue.backend(), &decoder.config, precision, extent).unwrap();
        let mut tables: Vec<BlockTable> = (0..SEQUENCES).map(|_| BlockTable::new(kv.pool())).collect();
        let mut new: Vec<Vec<u32>> = (0..SEQUENCES).map(prompt).collect();
        let mut together = vec![Vec::new(); SEQUENCES];
        for _ in 0..=DECODED {
            let owned: Vec<_> = (tables.iter_mut().zip(&new))
                .map(|(table, ids)| {
                    let start = table.len() as u32;
                    let slots = kv.append(&queue, table, ids.len()).unwrap();
                    (
                        (start..start + ids.len() as u32).collect::<Vec<_>>(),
                        slots,
                        table.block_ids(),
                        table.len(),
                    )
                })
                .collect();
            let steps: Vec<SequenceStep> = (new.iter().zip(&owned))
                .map(|(ids, (positions, slots, blocks, context))| SequenceStep {
                    ids,
                    positions,
                    slots,
                    blocks,
                    context: *context,
                })
                .collect();
            let batch = Batch::new(&queue, &decoder.config, &steps).unwrap();
            decoder.forward(&queue, &batch, kv.layers(), &activations, Goal::Hidden, |_| {}, |_| {}).unwrap();
            let ends = new.iter().scan(0, |end, ids| {
                *end += ids.len() as u32;
                Some(*end - 1)
            });
            let rows: Vec<u32> = ends.collect();
            let logits = decoder.logits(&queue, Pass::Decode, &activations, &rows).unwrap();
            let logits = logits.chunks_exact(decoder.config.vocab).map(<[f32]>::to_vec);
            new = logits
                .zip(&mut together)
                .map(|(logits, sequence)| {
                    let next = vec![best(&logits)];
                    sequence.push(logits);
                    next
                })
                .collect();
        }
        for (sequence, together) in together.iter().enumerate() {
            assert_eq!(
                *together,
                alone(&model, &queue, dtype, sequence),
                "sequence {sequence}, {precision:?}"
            );
        }
    }
}

#[test]
fn a_prompt_may_come_in_pieces() {
    for (precision, dtype) in MODES {
        let (model, queue) = model(precision);
        let ids: Vec<u32> = (0..60).map(|i| (11 * i + 5) % 200).collect();
        let positions: Vec<u32> = (0..60).collect();
        let after = |pieces: &[usize]| {
            let mut lane = lane(&model, &queue, dtype);
            let mut start = 0;
            for piece in pieces {
                let range = start..start + piece;
                lane.append(&ids[range.clone()], &positions[range], Goal::Hidden, |_, _| {}).unwrap();
                start += piece;
            }
            assert_eq!(start, ids.len());
            (lane.read(0, 0, 60).unwrap(), lane.read(1, 0, 60).unwrap(), lane.logits().unwrap())
        };
        let whole = after(&[60]);
        for pieces in [&[30, 30][..], &[3, 2, 45, 8, 2], &[17, 40, 3]] {
            assert!(after(pieces) == whole, "in pieces of {pieces:?}, {precision:?}");
        }
    }
}

#[test]
fn decoding_and_reading_a_prompt_are_passes_of_their_own() {
    let (model, queue) = model(Precision::F32);
    let step = |ids: &'static [u32]| SequenceStep {
        ids,
        positions: &[0, 1][..ids.len()],
        slots: &[0, 1][..ids.len()],
        blocks: &[0],
        context: ids.len(),
    };
    let mixed = Batch::new(&queue, &model.decoder.config, &[step(&[1]), step(&[1, 2])]);
    assert!(matches!(mixed, Err(Error::MixedBatch)));
}
