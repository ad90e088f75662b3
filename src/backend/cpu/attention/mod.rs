//! Attention over pages.
//!
//! A call is cut into tasks that any thread may take. A sequence with many new tokens gives [`prefill`] tasks, each a
//! run of its tokens for one kv head; one with a few gives [`decode`] tasks, each a stretch of its keys for one kv
//! head, whose partial results the task that ends last combines. How a query's keys are cut and summed depends on its
//! own sequence alone, so its result has the same bits whatever the threads and the company.

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64 as isa;

    pub mod vector;
}
pub(super) mod backward;
mod decode;
mod plan;
mod portable;
mod prefill;
/// The source of `avx512` on instructions in software.
#[cfg(all(test, target_arch = "x86_64"))]
#[path = "avx512"]
#[allow(clippy::duplicate_mod, reason = "compiled twice to be tested")]
mod soft512 {
    use super::super::soft512 as isa;

    pub mod vector;
}
#[cfg(test)]
mod tests;
mod vector;

use super::{
    Element, Simd,
    team::{SendPtr, Team},
};
use crate::{
    backend::Tensor,
    ops::{AttentionOperands, AttentionParams, KvPages},
};
use backward::{Backward, Part};
use plan::{Plan, Reduction, Task, Work};
use std::{cell::RefCell, sync::atomic::Ordering::AcqRel};
use vector::{PageElement, Vector};

/// Multiplications, in registers, below which handing out tasks costs more than it gains.
const WORTH_SHARING: usize = 1 << 13;

pub(super) fn paged_attention(team: &mut Team, simd: Simd, p: AttentionParams, o: &AttentionOperands) {
    match Kernels::of(simd) {
        // The kernels look for the largest product, not score.
        Some(kernels) if p.scale > 0.0 => run(team, kernels, p, o),
        _ => portable::paged_attention(team, p, o),
    }
}

/// The kernels at one register width.
#[derive(Clone, Copy)]
struct Kernels {
    lanes: usize,
    prefill: unsafe fn(&Call, &Task, &mut Scratch),
    decode: unsafe fn(&Call, &Task, *mut f32, &mut Scratch),
    combine: unsafe fn(&Call, &Task, *const f32, &Reduction),
    measure: unsafe fn(&Backward, &Part, &mut Scratch),
    differentiate: unsafe fn(&Backward, &Part, &mut Scratch),
}

/// The kernels compiled for a [`Vector`] and the CPU features it needs.
#[cfg(target_arch = "x86_64")]
macro_rules! kernels {
    ($vector:ty, $features:literal) => {{
        #[target_feature(enable = $features)]
        unsafe fn prefill(call: &Call, task: &Task, scratch: &mut Scratch) {
            // SAFETY: the features are those of the vector type; the rest is the caller's promise.
            unsafe { prefill::prefill::<$vector>(call, task, scratch) }
        }
        #[target_feature(enable = $features)]
        unsafe fn decode(call: &Call, task: &Task, partial: *mut f32, scratch: &mut Scratch) {
            // SAFETY: as above.
            unsafe { decode::decode::<$vector>(call, task, partial, scratch) }
        }
        #[target_feature(enable = $features)]
        unsafe fn combine(call: &Call, task: &Task, partials: *const f32, reduction: &Reduction) {
            // SAFETY: as above.
            unsafe { decode::combine::<$vector>(call, task, partials, reduction) }
        }
        #[target_feature(enable = $features)]
        unsafe fn measure(backward: &Backward, part: &Part, scratch: &mut Scratch) {
            // SAFETY: as above.
            unsafe { backward::measure::<$vector>(backward, part, scratch) }
        }
        #[target_feature(enable = $features)]
        unsafe fn differentiate(backward: &Backward, part: &Part, scratch: &mut Scratch) {
            // SAFETY: as above.
            unsafe { backward::differentiate::<$vector>(backward, part, scratch) }
        }
        Kernels { lanes: <$vector>::LANES, prefill, decode, combine, measure, differentiate }
    }};
}

impl Kernels {
    #[cfg(target_arch = "x86_64")]
    fn of(simd: Simd) -> Option<Kernels> {
        match simd {
            Simd::Portable => None,
            Simd::Avx2 => Some(kernels!(vector::Avx2, "avx2,fma")),
            Simd::Avx512 | Simd::Avx512Bf16 => {
                Some(kernels!(avx512::vector::Avx512, "avx2,fma,avx512f,avx512dq"))
            }
            #[cfg(test)]
            Simd::Soft512 => Some(kernels!(soft512::vector::Avx512, "avx2,fma")),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn of(_simd: Simd) -> Option<Kernels> {
        None
    }
}

/// What the tasks of one call share.
struct Call<'a> {
    p: AttentionParams,
    dim: usize,
    /// Query heads of a kv head.
    group: usize,
    /// `dim` rounded up to whole registers.
    wide: usize,
    q: &'a [f32],
    cu_q: &'a [u32],
    context: &'a [u32],
    tables: &'a [u32],
    pages: &'a KvPages,
    /// `[tokens, heads · dim]`; each task writes its own tokens and heads.
    out: SendPtr<f32>,
}

/// The new tokens of one sequence.
#[derive(Clone, Copy)]
struct Sequence<'a> {
    /// Row of the first in q and out.
    row: usize,
    tokens: usize,
    /// Index of the first among the sequence's keys.
    at: usize,
    table: &'a [u32],
}

impl<'a> Call<'a> {
    /// # Panics
    /// If the call's index tensors contradict each other or the shapes.
    fn sequence(&self, s: usize) -> Sequence<'a> {
        let (row, end, context) =
            (self.cu_q[s] as usize, self.cu_q[s + 1] as usize, self.context[s] as usize);
        assert!(
            row <= end && end <= self.p.tokens as usize,
            "paged_attention: cu_q is not a list of row ranges"
        );
        assert!(end - row <= context, "paged_attention: sequence {s} has more new tokens than keys");
        let max_blocks = self.p.max_blocks as usize;
        assert!(
            context <= max_blocks * self.pages.block_size(),
            "paged_attention: sequence {s} has {context} keys, more than its block table holds"
        );
        let table = &self.tables[s * max_blocks..(s + 1) * max_blocks];
        Sequence { row, tokens: end - row, at: context - (end - row), table }
    }

    /// The first key that a query at key index `at` sees.
    fn first_key(&self, at: usize) -> usize {
        if self.p.window > 0 { (at + 1).saturating_sub(self.p.window as usize) } else { 0 }
    }

    /// `out[i]` = where key `start + i` of a sequence begins in the page tensors.
    ///
    /// # Panics
    /// If the block table names a block that does not exist: what is returned is in bounds.
    fn page_offsets(&self, sequence: &Sequence, kv_head: usize, start: usize, mut out: &mut [usize]) {
        let (size, blocks, kv_heads) = (self.pages.block_size(), self.pages.blocks(), self.pages.kv_heads());
        let (mut index, mut within) = (start / size, start % size);
        while !out.is_empty() {
            let block = sequence.table[index] as usize;
            assert!(block < blocks, "paged_attention: block {block} of {blocks} in a block table");
            let run = (size - within).min(out.len());
            let mut offset = ((block * kv_heads + kv_head) * size + within) * self.dim;
            let (now, later) = out.split_at_mut(run);
            for o in now {
                *o = offset;
                offset += self.dim;
            }
            (out, index, within) = (later, index + 1, 0);
        }
    }

    /// The query of a token (a row of q) and head.
    fn query(&self, row: usize, head: usize) -> &'a [f32] {
        &self.q[row * self.p.q_stride as usize + head * self.dim..][..self.dim]
    }

    /// Where the result of a token (a row of out) and head goes: `dim` elements.
    fn result(&self, row: usize, head: usize) -> *mut f32 {
        debug_assert!(row < self.p.tokens as usize && head < self.p.heads as usize);
        // SAFETY: out has tokens · heads · dim elements, and `sequence` checked the rows.
        unsafe { self.out.get().add((row * self.p.heads as usize + head) * self.dim) }
    }

    /// What a product of query and key is multiplied by to be an exponent of 2 with the soft cap between, if there is one.
    fn exponent(&self) -> Exponent {
        let log2_e = std::f32::consts::LOG2_E;
        match self.p.soft_cap {
            cap if cap > 0.0 => Exponent { inner: Some(self.p.scale / cap), outer: cap * log2_e },
            _ => Exponent { inner: None, outer: self.p.scale * log2_e },
        }
    }
}

/// `outer · x`, or with a soft cap `outer · tanh(inner · x)`. `outer` is positive.
///
/// It is applied last, in the same rounding as the difference to the maximum: scores of some hundreds would lose the
/// digits that matter if they were scaled and rounded before.
#[derive(Clone, Copy)]
struct Exponent {
    inner: Option<f32>,
    outer: f32,
}

/// The elements of a page tensor.
fn page_ptr<T: Element>(pages: &Tensor) -> *const T {
    pages.host::<T>().as_ptr()
}

/// Widens a row of `dim` elements.
///
/// # Safety
/// As of [`Vector`]; `from` and `to` are valid for `dim` elements.
#[inline(always)]
unsafe fn widen_row<V: Vector, T: PageElement>(from: *const T, dim: usize, to: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut i = 0;
        while i + V::LANES <= dim {
            T::load::<V>(from.add(i)).store(to.add(i));
            i += V::LANES;
        }
        while i < dim {
            *to.add(i) = (*from.add(i)).widen();
            i += 1;
        }
    }
}

/// A thread's working memory, kept between calls.
#[derive(Default)]
struct Scratch(Vec<CacheLine>);

#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct CacheLine([f32; 16]);

impl Scratch {
    /// `N` pieces of the given lengths, each aligned to a cache line, contents left from before.
    fn pieces<const N: usize>(&mut self, lens: [usize; N]) -> [&mut [f32]; N] {
        let lines: usize = lens.iter().map(|len| len.div_ceil(16)).sum();
        if self.0.len() < lines {
            self.0.resize(lines, CacheLine([0.0; 16]));
        }
        let mut rest = &mut self.0[..];
        lens.map(|len| {
            let (piece, later) = std::mem::take(&mut rest).split_at_mut(len.div_ceil(16));
            rest = later;
            &mut bytemuck::cast_slice_mut(piece)[..len]
        })
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static PLAN: RefCell<Plan> = RefCell::default();
}

fn run(team: &mut Team, kernels: Kernels, p: AttentionParams, o: &AttentionOperands) {
    let dim = p.head_dim as usize;
    if dim == 0 || o.pages.block_size() == 0 {
        return;
    }
    let call = Call {
        p,
        dim,
        group: (p.heads / p.kv_heads) as usize,
        wide: dim.next_multiple_of(kernels.lanes),
        q: o.q.host(),
        cu_q: o.cu_q.host(),
        context: o.context.host(),
        tables: o.block_tables.host(),
        pages: &o.pages,
        out: SendPtr(o.out.host_mut::<f32>().as_mut_ptr()),
    };
    PLAN.with_borrow_mut(|plan| {
        plan.make(&call, kernels.lanes, team.threads());
        let partials = SendPtr(plan.partials.as_mut_ptr());
        let plan = &*plan;
        let job = |index: usize| {
            let task = &plan.tasks[index];
            SCRATCH.with_borrow_mut(|scratch| match task.work {
                // SAFETY: `Kernels::of` was asked for a level this CPU has; tasks write disjoint parts of out.
                Work::Prefill => unsafe { (kernels.prefill)(&call, task, scratch) },
                Work::Decode { reduction, split } => {
                    let reduction = &plan.reductions[reduction];
                    // SAFETY: the plan made room for the partial result of every split, each its own.
                    let first = unsafe { partials.get().add(reduction.partials) };
                    // SAFETY: as above, for the CPU's level and the task's own partial.
                    unsafe { (kernels.decode)(&call, task, first.add(split * reduction.stride), scratch) };
                    if reduction.left.fetch_sub(1, AcqRel) == 1 {
                        // SAFETY: the other splits are done and their writes visible.
                        unsafe { (kernels.combine)(&call, task, first, reduction) };
                    }
                }
            });
        };
        if plan.multiplications < WORTH_SHARING * kernels.lanes {
            (0..plan.tasks.len()).for_each(job);
        } else {
            team.run(plan.tasks.len(), &job);
        }
    });
}
