//! Drawing tokens where the logits are, on devices from which a row of logits is far to the host.

use super::{ShapeError, check, check_apart};
use crate::backend::{DType, Queue, Tensor};

/// How one row is drawn from, as `engine::Sampler` would.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SampleRow {
    /// Low and high half.
    pub seed: [u32; 2],
    pub choice: u32,
    /// The token of the answer.
    pub step: u32,
    /// Below 1e-5: the most probable token.
    pub temperature: f32,
    /// 0 = off.
    pub top_k: u32,
    /// 1 = off.
    pub top_p: f32,
    /// 0 = off.
    pub min_p: f32,
    /// 1: top-p drops the token that crosses p.
    pub published: u32,
}

/// What became of one row.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SampledRow {
    /// Σ exp(x − max): the row's log-sum-exp is `max + ln(sum)`. 0 where it was not asked for.
    pub sum: f64,
    pub max: f32,
    pub token: u32,
    /// One of the constants below.
    pub status: u32,
    /// The most probable token, of equals the first.
    pub best: u32,
}

impl SampledRow {
    /// `token` was drawn.
    pub const DRAWN: u32 = 0;
    /// `token` is the first that is not a number.
    pub const NOT_A_NUMBER: u32 = 1;
    /// A logit is infinite.
    pub const INFINITE: u32 = 2;
    /// All logits are −∞.
    pub const NOTHING_POSSIBLE: u32 = 3;
    /// The draw reaches past the ranked tokens: the row's logits are wanted on the host.
    pub const NEEDS_HOST: u32 = 4;
}

/// The most tokens that can be ranked.
pub const MAX_RANKED: usize = 256;

/// Operands of [`sample`].
#[derive(Clone, Debug)]
pub struct SampleOperands {
    /// F32`[rows, vocab]`
    pub logits: Tensor,
    /// [`SampleRow`]s as U32`[rows, 9]`; none: the most probable tokens.
    pub rows: Option<Tensor>,
    /// The `k` ≤ [`MAX_RANKED`] most probable tokens, most probable first, −∞ past the last possible: U32 and F32 `[rows, k]`.
    pub ranked: Option<(Tensor, Tensor)>,
    /// Whether sums over the vocabulary are wanted: to draw without top-k.
    pub sums: bool,
    /// U32, as many elements as [`crate::backend::DrawTokens::scratch_len`] says.
    pub scratch: Tensor,
    /// [`SampledRow`]s as U32`[rows, 6]`
    pub out: Tensor,
}

/// Draws a token from each row of logits. False, and nothing is done, where the device does not draw.
pub fn sample(queue: &Queue, o: &SampleOperands) -> Result<bool, ShapeError> {
    const OP: &str = "sample";
    let Some(device) = queue.backend().draw_tokens() else { return Ok(false) };
    let (rows, vocab) = (o.logits.rows(), o.logits.row_len());
    check(OP, "logits", &o.logits, &[DType::F32], &[rows, vocab])?;
    check(OP, "out", &o.out, &[DType::U32], &[rows, size_of::<SampledRow>() / 4])?;
    if let Some(params) = &o.rows {
        check(OP, "rows", params, &[DType::U32], &[rows, size_of::<SampleRow>() / 4])?;
    }
    let k = o.ranked.as_ref().map_or(0, |(ids, _)| ids.row_len());
    if let Some((ids, values)) = &o.ranked {
        check(OP, "ranked.ids", ids, &[DType::U32], &[rows, k])?;
        check(OP, "ranked.values", values, &[DType::F32], &[rows, k])?;
    }
    let need = device.scratch_len(rows, vocab, k);
    if k > MAX_RANKED || o.scratch.elements() < need {
        return Err(ShapeError {
            op: OP,
            operand: "scratch",
            found: format!("{:?} to rank {k}", o.scratch),
            expected: format!("U32[≥ {need}] to rank at most {MAX_RANKED}"),
        });
    }
    check(OP, "scratch", &o.scratch, &[DType::U32], &[o.scratch.elements()])?;
    check_apart(OP, &o.out, &[("logits", &o.logits), ("scratch", &o.scratch)])?;
    device.sample(queue.id(), o);
    Ok(true)
}
