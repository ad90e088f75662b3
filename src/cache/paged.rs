//! The memory of a KV-cache: pages of every layer, and reading and writing them from the host.
//!
//! For research: [`PagedKv::read`] and [`PagedKv::write`] exchange any tokens' keys and values as plain f32, whatever
//! the pages' dtype and device. With a [`super::BlockTable`]'s `slots(range)` they address positions of a sequence.

use super::{BlockPool, BlockTable, Error, KeyPositions};
use crate::{
    backend::{Backend, DType, Queue},
    ops::{self, KV_DTYPES, KvPages},
};
use half::bf16;
use serde::{Deserialize, Serialize};
use std::{collections::HashSet, sync::Arc};

/// What one token's cache is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheShape {
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl CacheShape {
    /// Keys of one token in one layer: `kv_heads · head_dim`.
    pub fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Keys and values of all layers; `None` past the address space.
    pub fn bytes_per_token(&self, dtype: DType) -> Option<usize> {
        let width = self.kv_heads.checked_mul(self.head_dim)?;
        dtype.row_bytes(width)?.checked_mul(2)?.checked_mul(self.layers)
    }
}

/// A rotary embedding: the pair (i, i + head_dim/2) of a key at position p turns by `p · inv_freq[i]`, and the key is
/// scaled (YaRN; else 1).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotation {
    /// `[head_dim / 2]`, radians per token.
    pub inv_freq: Vec<f32>,
    pub scale: f32,
}

impl Rotation {
    /// Rotates one head's key `[head_dim]` to `position`.
    pub fn apply(&self, key: &mut [f32], position: u32) {
        self.turn(key, f64::from(position), self.scale)
    }

    /// Takes the position out of a key that was rotated to `position`.
    pub fn undo(&self, key: &mut [f32], position: u32) {
        self.turn(key, -f64::from(position), 1.0 / self.scale)
    }

    /// Cosines and sines at `position`, `[head_dim]`, times the scale; angles rounded to f32 as the models do it.
    pub fn angles(&self, position: u32) -> Vec<f32> {
        let angles = || self.inv_freq.iter().map(|f| position as f32 * f);
        angles().map(|a| a.cos() * self.scale).chain(angles().map(|a| a.sin() * self.scale)).collect()
    }

    fn turn(&self, key: &mut [f32], position: f64, scale: f32) {
        let (left, right) = key.split_at_mut(key.len() / 2);
        for ((a, b), &inv_freq) in left.iter_mut().zip(right).zip(&self.inv_freq) {
            let (sin, cos) = (position * f64::from(inv_freq)).sin_cos();
            let (sin, cos) = (sin as f32 * scale, cos as f32 * scale);
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

/// Whether the keys carry their positions, and then how to take them out again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyForm {
    PreRope,
    /// One rotation per layer, or one for all.
    PostRope(Vec<Rotation>),
}

impl KeyForm {
    pub fn positions(&self) -> KeyPositions {
        match self {
            KeyForm::PreRope => KeyPositions::PreRope,
            KeyForm::PostRope(_) => KeyPositions::PostRope,
        }
    }

    /// How the keys of `layer` were rotated.
    pub fn rotation(&self, layer: usize) -> Option<&Rotation> {
        match self {
            KeyForm::PostRope(rotations) if rotations.len() > 1 => rotations.get(layer),
            KeyForm::PostRope(rotations) => rotations.first(),
            KeyForm::PreRope => None,
        }
    }

    pub(super) fn check(&self, shape: &CacheShape) -> Result<(), Error> {
        let KeyForm::PostRope(rotations) = self else { return Ok(()) };
        if rotations.len() != 1 && rotations.len() != shape.layers {
            let expected = format!("1 or {}, one per layer", shape.layers);
            return Err(mismatch("number of rotations", rotations.len(), expected));
        }
        match rotations.iter().find(|rotation| 2 * rotation.inv_freq.len() != shape.head_dim) {
            None => Ok(()),
            Some(wrong) => Err(mismatch("length of inv_freq", wrong.inv_freq.len(), shape.head_dim / 2)),
        }
    }
}

fn mismatch(what: &'static str, found: impl ToString, expected: impl ToString) -> Error {
    Error::Mismatch { what, found: found.to_string(), expected: expected.to_string() }
}

/// Keys and values of some tokens in one layer, on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct KvColumns {
    /// `[tokens, kv_heads, head_dim]`
    pub keys: Vec<f32>,
    /// `[tokens, kv_heads, head_dim]`
    pub values: Vec<f32>,
}

/// The pages of all layers, allocated once.
pub struct PagedKv {
    layers: Vec<KvPages>,
    shape: CacheShape,
    dtype: DType,
    keys: KeyForm,
    pool: BlockPool,
}

impl PagedKv {
    /// Room for `blocks · block_size` tokens. `dtype` is F32 or BF16.
    pub fn new(
        backend: &Arc<dyn Backend>,
        shape: CacheShape,
        keys: KeyForm,
        blocks: usize,
        block_size: usize,
        dtype: DType,
    ) -> Result<PagedKv, Error> {
        if !KV_DTYPES.contains(&dtype) {
            return Err(mismatch("dtype", dtype, "F32 or BF16"));
        }
        let all = [
            ("layers", shape.layers),
            ("kv_heads", shape.kv_heads),
            ("head_dim", shape.head_dim),
            ("blocks", blocks),
        ];
        if let Some((what, _)) = all.into_iter().find(|(_, n)| *n == 0) {
            return Err(mismatch(what, 0, "≥ 1"));
        }
        let bytes = shape
            .bytes_per_token(dtype)
            .and_then(|bytes| bytes.checked_mul(blocks)?.checked_mul(block_size))
            .filter(|&bytes| isize::try_from(bytes).is_ok());
        if bytes.is_none() {
            return Err(Error::TooLarge(format!("{shape:?}, {blocks} blocks of {block_size} tokens")));
        }
        keys.check(&shape)?;
        let pool = BlockPool::new(blocks, block_size)?;
        let layers = (0..shape.layers)
            .map(|layer| {
                pages(backend, &shape, blocks, block_size, dtype, &format!("KV-cache layer {layer}"))
            })
            .collect::<Result<_, Error>>()?;
        Ok(PagedKv { layers, shape, dtype, keys, pool })
    }

    /// Pages of every layer.
    pub fn layers(&self) -> &[KvPages] {
        &self.layers
    }

    /// The pages of one layer, for ops.
    pub fn layer(&self, layer: usize) -> Result<&KvPages, Error> {
        self.layers.get(layer).ok_or(Error::Layer { layer, layers: self.layers.len() })
    }

    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn keys(&self) -> &KeyForm {
        &self.keys
    }

    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    pub fn block_size(&self) -> usize {
        self.layers[0].block_size()
    }

    /// Tokens there is room for.
    pub fn slots(&self) -> usize {
        self.layers[0].blocks() * self.block_size()
    }

    /// Device memory of all pages.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|pages| pages.keys.bytes() + pages.values.bytes()).sum()
    }

    /// Slots for `n` new tokens of `table`, after copying what it shares with a fork in the block they begin in.
    pub fn append(&self, queue: &Queue, table: &mut BlockTable, n: usize) -> Result<Vec<u32>, Error> {
        let copies = table.make_writable(table.len()..table.len().saturating_add(n))?;
        self.copy(queue, &copies)?;
        table.append(n)
    }

    /// Issues the copies (from slot, to slot) that [`BlockTable::make_writable`] asks for, in every layer.
    pub fn copy(&self, queue: &Queue, copies: &[(u32, u32)]) -> Result<(), Error> {
        if copies.is_empty() {
            return Ok(());
        }
        let (from, to): (Vec<u32>, Vec<u32>) = copies.iter().copied().unzip();
        self.check_slots(&from)?;
        self.check_slots(&to)?;
        let from = queue.tensor(&from, &[from.len()], "slots to copy from")?;
        let to = queue.tensor(&to, &[to.len()], "slots to copy to")?;
        for pages in &self.layers {
            ops::copy_slots(queue, pages, &from, pages, &to)?;
        }
        Ok(())
    }

    /// Keys and values of `slots` in `layer`, in that order, after everything issued on `queue` so far.
    ///
    /// Only these slots leave the device.
    pub fn read(&self, queue: &Queue, layer: usize, slots: &[u32]) -> Result<KvColumns, Error> {
        let pages = self.layer(layer)?;
        self.check_slots(slots)?;
        if slots.is_empty() {
            return Ok(KvColumns { keys: Vec::new(), values: Vec::new() });
        }
        let (staging, staged) = self.staging(queue, slots.len())?;
        let slots = queue.tensor(slots, &[slots.len()], "slots to read")?;
        ops::copy_slots(queue, pages, &slots, &staging, &staged)?;
        Ok(KvColumns {
            keys: queue.download_f32(&staging.keys)?,
            values: queue.download_f32(&staging.values)?,
        })
    }

    /// Writes keys and values to `slots` of `layer`, rounding to the pages' dtype, in the queue's order.
    ///
    /// Slots of blocks that are shared or published need [`BlockTable::make_writable`] first.
    pub fn write(
        &self,
        queue: &Queue,
        layer: usize,
        slots: &[u32],
        columns: &KvColumns,
    ) -> Result<(), Error> {
        let pages = self.layer(layer)?;
        self.check_slots(slots)?;
        let mut seen = HashSet::new();
        if let Some(&slot) = slots.iter().find(|slot| !seen.insert(**slot)) {
            return Err(Error::SlotTwice(slot));
        }
        let elements = slots.len() * self.shape.width();
        for (what, found) in
            [("number of key elements", &columns.keys), ("number of value elements", &columns.values)]
        {
            if found.len() != elements {
                return Err(mismatch(what, found.len(), elements));
            }
        }
        if slots.is_empty() {
            return Ok(());
        }
        let (staging, staged) = self.staging(queue, slots.len())?;
        for (columns, tensor) in [(&columns.keys, &staging.keys), (&columns.values, &staging.values)] {
            match self.dtype {
                DType::Bf16 => {
                    queue.upload(&columns.iter().copied().map(bf16::from_f32).collect::<Vec<_>>(), tensor)
                }
                _ => queue.upload(columns, tensor),
            }
        }
        let slots = queue.tensor(slots, &[slots.len()], "slots to write")?;
        ops::copy_slots(queue, &staging, &staged, pages, &slots)?;
        Ok(())
    }

    fn check_slots(&self, slots: &[u32]) -> Result<(), Error> {
        match slots.iter().find(|slot| **slot as usize >= self.slots()) {
            Some(&slot) => Err(Error::Slot { slot, slots: self.slots() }),
            None => Ok(()),
        }
    }

    /// Pages of one token each, which lie like columns, and their slots.
    fn staging(&self, queue: &Queue, tokens: usize) -> Result<(KvPages, crate::backend::Tensor), Error> {
        let staging = pages(queue.backend(), &self.shape, tokens, 1, self.dtype, "KV-cache staging")?;
        let slots: Vec<u32> = (0..tokens as u32).collect();
        Ok((staging, queue.tensor(&slots, &[tokens], "staging slots")?))
    }
}

fn pages(
    backend: &Arc<dyn Backend>,
    shape: &CacheShape,
    blocks: usize,
    block_size: usize,
    dtype: DType,
    what: &str,
) -> Result<KvPages, Error> {
    let dims = [blocks, shape.kv_heads, block_size, shape.head_dim];
    Ok(KvPages { keys: backend.alloc(dtype, &dims, what)?, values: backend.alloc(dtype, &dims, what)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;

    const SHAPE: CacheShape = CacheShape { layers: 2, kv_heads: 3, head_dim: 4 };

    fn backend() -> Arc<dyn Backend> {
        Cpu::new(1)
    }

    fn cache(dtype: DType) -> (PagedKv, Queue) {
        let backend = backend();
        let kv = PagedKv::new(&backend, SHAPE, KeyForm::PreRope, 5, 4, dtype).unwrap();
        (kv, Queue::new(&backend).unwrap())
    }

    /// Numbers that bf16 holds exactly, all different.
    fn columns(tokens: usize, start: usize) -> KvColumns {
        let n = tokens * SHAPE.width();
        let numbers = |from: usize| (from..from + n).map(|x| x as f32).collect();
        KvColumns { keys: numbers(start), values: numbers(start + n) }
    }

    #[test]
    fn what_is_written_is_read_from_any_slots() {
        for dtype in [DType::F32, DType::Bf16] {
            let (kv, queue) = cache(dtype);
            let slots = [19, 0, 7, 6, 12];
            let written = columns(5, 1);
            kv.write(&queue, 1, &slots, &written).unwrap();
            assert_eq!(kv.read(&queue, 1, &slots).unwrap(), written);
            let third = kv.read(&queue, 1, &[7]).unwrap();
            assert_eq!(third.keys, written.keys[24..36]);
            assert_eq!(third.values, written.values[24..36]);
            // Neither the other layer nor other slots were touched.
            assert!(kv.read(&queue, 0, &slots).unwrap().keys.iter().all(|&x| x == 0.0));
            assert!(kv.read(&queue, 1, &[1, 18]).unwrap().values.iter().all(|&x| x == 0.0));
            assert!(kv.read(&queue, 0, &[]).unwrap().keys.is_empty());
        }
    }

    #[test]
    fn pages_are_laid_out_as_the_ops_expect() {
        let (kv, queue) = cache(DType::F32);
        // Slot 6: block 1, offset 2; element 3 of head 2.
        let written = columns(1, 1);
        kv.write(&queue, 0, &[6], &written).unwrap();
        let pages = queue.download_f32(&kv.layer(0).unwrap().keys).unwrap();
        assert_eq!(pages[((3 + 2) * 4 + 2) * 4 + 3], written.keys[2 * 4 + 3]);
        assert_eq!(pages.iter().filter(|&&x| x != 0.0).count(), SHAPE.width());
        assert_eq!(kv.bytes(), SHAPE.bytes_per_token(DType::F32).unwrap() * kv.slots());
    }

    #[test]
    fn a_fork_that_writes_leaves_the_other_alone() {
        let (kv, queue) = cache(DType::F32);
        let mut table = BlockTable::new(kv.pool());
        let first = kv.append(&queue, &mut table, 6).unwrap();
        let written = columns(6, 1);
        kv.write(&queue, 0, &first, &written).unwrap();
        let mut fork = table.fork();
        let new = kv.append(&queue, &mut fork, 1).unwrap();
        kv.write(&queue, 0, &new, &columns(1, 200)).unwrap();
        let also = kv.append(&queue, &mut table, 1).unwrap();
        kv.write(&queue, 0, &also, &columns(1, 300)).unwrap();
        assert_ne!(new, also);
        assert_eq!(kv.read(&queue, 0, &fork.slots(0..6).unwrap()).unwrap(), written);
        assert_eq!(kv.read(&queue, 0, &table.slots(0..6).unwrap()).unwrap(), written);
        assert_eq!(kv.read(&queue, 0, &fork.slots(6..7).unwrap()).unwrap(), columns(1, 200));
        assert_eq!(kv.read(&queue, 0, &table.slots(6..7).unwrap()).unwrap(), columns(1, 300));
    }

    #[test]
    fn wrong_requests_are_errors() {
        let (kv, queue) = cache(DType::F32);
        assert!(matches!(kv.read(&queue, 2, &[0]), Err(Error::Layer { layer: 2, layers: 2 })));
        assert!(matches!(kv.read(&queue, 0, &[0, 20]), Err(Error::Slot { slot: 20, slots: 20 })));
        assert!(matches!(kv.write(&queue, 0, &[3, 3], &columns(2, 0)), Err(Error::SlotTwice(3))));
        assert!(matches!(kv.write(&queue, 0, &[3], &columns(2, 0)), Err(Error::Mismatch { .. })));
        assert!(matches!(kv.copy(&queue, &[(0, 20)]), Err(Error::Slot { slot: 20, .. })));
        let backend = backend();
        let new = |shape, keys, blocks, dtype| PagedKv::new(&backend, shape, keys, blocks, 16, dtype).err();
        let post =
            |n: usize, dims| KeyForm::PostRope(vec![Rotation { inv_freq: vec![1.0; dims], scale: 1.0 }; n]);
        for (error, what) in [
            (new(SHAPE, KeyForm::PreRope, 4, DType::Q8_0), "dtype"),
            (new(SHAPE, KeyForm::PreRope, 0, DType::F32), "blocks"),
            (new(CacheShape { kv_heads: 0, ..SHAPE }, KeyForm::PreRope, 4, DType::F32), "kv_heads"),
            (new(SHAPE, post(3, 2), 4, DType::F32), "number of rotations"),
            (new(SHAPE, post(2, 4), 4, DType::F32), "length of inv_freq"),
        ] {
            assert!(
                matches!(&error, Some(Error::Mismatch { what: found, .. }) if *found == what),
                "{error:?}"
            );
        }
        let huge = CacheShape { layers: 1 << 20, kv_heads: 1 << 20, head_dim: 1 << 20 };
        assert!(matches!(new(huge, KeyForm::PreRope, 1 << 20, DType::F32), Some(Error::TooLarge(_))));
        assert!(matches!(new(SHAPE, KeyForm::PreRope, 1 << 30, DType::F32), Some(Error::TooLarge(_))));
    }

    #[test]
    fn rotations_undo_themselves() {
        let rotation = Rotation { inv_freq: vec![1.0, 0.01], scale: 1.25 };
        let key = [0.5, -2.0, 3.0, 0.25];
        let mut turned = key;
        rotation.apply(&mut turned, 3);
        let (sin, cos) = 3f32.sin_cos();
        assert!((turned[0] - 1.25 * (0.5 * cos - 3.0 * sin)).abs() < 1e-6);
        assert!((turned[2] - 1.25 * (3.0 * cos + 0.5 * sin)).abs() < 1e-6);
        rotation.undo(&mut turned, 3);
        assert!(turned.iter().zip(key).all(|(a, b)| (a - b).abs() < 1e-6), "{turned:?}");
        let form = KeyForm::PostRope(vec![rotation.clone()]);
        assert_eq!(form.rotation(17), Some(&rotation));
        assert_eq!(KeyForm::PreRope.rotation(0), None);
    }
}
