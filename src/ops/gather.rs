//! Row gather, and copies between KV pages.

use super::{KV_DTYPES, ShapeError, check, check_apart};
use crate::backend::{DType, Queue, Tensor};

/// What kernels keep of a head in registers.
pub const MAX_HEAD_DIM: usize = 256;

/// One layer's keys and values in pages.
///
/// Both `[blocks, kv_heads, block_size, head_dim]`, F32 or BF16; `block_size` is a power of two, `head_dim` even and at most
/// [`MAX_HEAD_DIM`]. A *slot* is `block · block_size + offset`.
#[derive(Clone, Debug)]
pub struct KvPages {
    pub keys: Tensor,
    pub values: Tensor,
}

impl KvPages {
    pub fn blocks(&self) -> usize {
        self.keys.shape()[0]
    }
    pub fn kv_heads(&self) -> usize {
        self.keys.shape()[1]
    }
    pub fn block_size(&self) -> usize {
        self.keys.shape()[2]
    }
    pub fn head_dim(&self) -> usize {
        self.keys.shape()[3]
    }
    /// Width of one token's keys: `kv_heads · head_dim`.
    pub fn width(&self) -> usize {
        self.kv_heads() * self.head_dim()
    }

    pub(super) fn check(
        &self,
        op: &'static str,
        keys: &'static str,
        values: &'static str,
    ) -> Result<(), ShapeError> {
        let dims = self.keys.shape();
        if dims.len() != 4 {
            return Err(ShapeError {
                op,
                operand: keys,
                found: format!("{:?}", self.keys),
                expected: "[blocks, kv_heads, block_size, head_dim]".into(),
            });
        }
        if !dims[2].is_power_of_two() || !dims[3].is_multiple_of(2) || dims[3] > MAX_HEAD_DIM {
            return Err(ShapeError {
                op,
                operand: keys,
                found: format!("blocks of {} slots, heads of {}", dims[2], dims[3]),
                expected: format!("a power of two of slots, heads of an even size up to {MAX_HEAD_DIM}"),
            });
        }
        check(op, keys, &self.keys, KV_DTYPES, dims)?;
        check(op, values, &self.values, &[self.keys.dtype()], dims)
    }
}

/// `out[i] = x[rows[i]]`: `x` F32`[n, cols]`, `rows` U32`[m]`, `out` F32`[m, cols]`.
pub fn gather_rows(queue: &Queue, x: &Tensor, rows: &Tensor, out: &Tensor) -> Result<(), ShapeError> {
    let m = rows.elements();
    check("gather_rows", "x", x, &[DType::F32], &[x.rows(), x.row_len()])?;
    check("gather_rows", "rows", rows, &[DType::U32], &[m])?;
    check("gather_rows", "out", out, &[DType::F32], &[m, x.row_len()])?;
    check_apart("gather_rows", out, &[("x", x), ("rows", rows)])?;
    queue.backend().gather_rows(queue.id(), x, rows, out);
    Ok(())
}

/// Copies keys and values of `from_slots` (U32`[n]`) to `to_slots` (U32`[n]`), between pages of the same heads whatever
/// their number and size of blocks. Pages may be the same; slots must then not overlap.
pub fn copy_slots(
    queue: &Queue,
    from: &KvPages,
    from_slots: &Tensor,
    to: &KvPages,
    to_slots: &Tensor,
) -> Result<(), ShapeError> {
    from.check("copy_slots", "from.keys", "from.values")?;
    to.check("copy_slots", "to.keys", "to.values")?;
    let dims = [to.blocks(), from.kv_heads(), to.block_size(), from.head_dim()];
    check("copy_slots", "to.keys", &to.keys, &[from.keys.dtype()], &dims)?;
    let n = from_slots.elements();
    check("copy_slots", "from_slots", from_slots, &[DType::U32], &[n])?;
    check("copy_slots", "to_slots", to_slots, &[DType::U32], &[n])?;
    queue.backend().copy_slots(queue.id(), from, from_slots, to, to_slots);
    Ok(())
}
