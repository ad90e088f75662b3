//! The CPU backend: a portable reference for every op, and vector kernels chosen at run time.

mod all_in_one;
mod attention;
mod blocks;
#[cfg(test)]
mod differences;
mod dropout;
mod executor;
mod fuse;
mod fuse_baseline;
mod fuse_training;
mod limits;
mod linear;
mod memory;
mod optimizer;
mod pointwise;
mod pointwise_backward;
mod rope;
mod rope_backward;
mod simd;
#[cfg(all(test, target_arch = "x86_64"))]
mod soft512;
mod team;
#[cfg(test)]
mod tests;
mod training;

pub use executor::{Event, Graph, Schedule};
pub use limits::Limits;
pub use memory::{Element, Memory, map_file};
pub use simd::Simd;

use super::{Backend, DType, Error, Event as AnyEvent, Graph as AnyGraph, Precision, Shape, Storage, Tensor};
use crate::ops;
use executor::Executor;
use memmap2::Mmap;
use std::sync::Arc;
use team::Team;

/// The host's processor.
pub struct Cpu {
    executor: Executor,
    simd: Simd,
    threads: usize,
}

impl Cpu {
    /// `threads` = 0: all cores.
    pub fn new(threads: usize) -> Arc<Cpu> {
        Self::with(threads, Simd::detect(), Schedule::Steady)
    }

    /// With a chosen instruction set (at most what the processor has) and schedule: for tests and benches.
    pub fn with(threads: usize, simd: Simd, schedule: Schedule) -> Arc<Cpu> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = if threads == 0 { cores } else { threads };
        Arc::new(Cpu { executor: Executor::new(threads, schedule), simd: simd.or_detected(), threads })
    }

    fn allocate(dtype: DType, dims: &[usize], what: &str) -> Result<Tensor, Error> {
        let shape = Shape::new(dims);
        let row = dims.last().copied().unwrap_or(1);
        let rows: usize = dims[..dims.len().saturating_sub(1)].iter().product();
        let bytes = dtype.row_bytes(row).and_then(|row| row.checked_mul(rows)).unwrap_or(usize::MAX);
        let memory = Memory::zeroed(bytes);
        let memory =
            memory.ok_or(Error::OutOfMemory { device: "cpu", requested: bytes, what: what.into() })?;
        Ok(Tensor::from_storage(Storage::Cpu(memory), dtype, shape, 0))
    }
}

impl Backend for Cpu {
    fn description(&self) -> String {
        format!("cpu ({} threads, {})", self.threads, self.simd)
    }

    fn device(&self) -> &'static str {
        "cpu"
    }

    fn threads(&self) -> usize {
        self.threads
    }

    fn memory_plan(&self) -> Option<String> {
        None
    }

    fn activation_dtype(&self, _: Precision) -> DType {
        DType::F32
    }

    fn scratch_len(&self, scratch: ops::Scratch) -> usize {
        match scratch {
            ops::Scratch::LinearGlu { tokens, width } => tokens * 2 * width,
            // Partial results live with the threads.
            ops::Scratch::Attention { .. } => 0,
            ops::Scratch::Fuse(extent) => fuse::scratch_len(extent),
            ops::Scratch::FuseSaved(extent) => fuse_training::saved_len(extent),
            ops::Scratch::FuseBackward(extent) => fuse_training::scratch_len(extent),
            // As in the forward pass.
            ops::Scratch::AttentionBackward { .. } => 0,
        }
    }

    fn alloc(&self, dtype: DType, dims: &[usize], what: &str) -> Result<Tensor, Error> {
        Self::allocate(dtype, dims, what)
    }

    fn map(
        &self,
        file: &Arc<Mmap>,
        offset: usize,
        dtype: DType,
        dims: &[usize],
        what: &str,
    ) -> Result<Tensor, Error> {
        let mapped =
            Tensor::from_storage(Storage::Cpu(Memory::mapped(file.clone())), dtype, Shape::new(dims), offset);
        if (file.as_ptr() as usize + offset).is_multiple_of(dtype.align()) {
            return Ok(mapped);
        }
        // A file may put a tensor at an odd address; such a one is copied.
        let copy = Self::allocate(dtype, dims, what)?;
        copy.host_bytes_mut().copy_from_slice(mapped.host_bytes());
        Ok(copy)
    }

    fn upload(&self, queue: usize, bytes: &[u8], tensor: &Tensor) {
        assert_eq!(bytes.len(), tensor.bytes(), "upload of the wrong size");
        let (bytes, tensor): (Box<[u8]>, _) = (bytes.into(), tensor.clone());
        self.executor.issue(queue, move |_| tensor.host_bytes_mut().copy_from_slice(&bytes));
    }

    fn download(&self, queue: usize, tensor: &Tensor, bytes: &mut [u8]) -> Result<(), Error> {
        self.executor.synchronize(queue)?;
        bytes.copy_from_slice(tensor.host_bytes());
        Ok(())
    }

    fn new_queue(&self) -> Result<usize, Error> {
        Ok(self.executor.new_queue())
    }

    fn release_queue(&self, queue: usize) {
        self.executor.release_queue(queue)
    }

    fn record(&self, queue: usize) -> AnyEvent {
        AnyEvent::Cpu(self.executor.record(queue))
    }

    fn wait(&self, queue: usize, event: &AnyEvent) {
        if let AnyEvent::Cpu(event) = event {
            self.executor.wait(queue, event)
        }
    }

    fn begin_capture(&self, queue: usize) -> Result<(), Error> {
        self.executor.begin_capture(queue)
    }

    fn end_capture(&self, queue: usize) -> Result<AnyGraph, Error> {
        Ok(AnyGraph::Cpu(self.executor.end_capture(queue)?))
    }

    fn replay(&self, queue: usize, graph: &AnyGraph) {
        if let AnyGraph::Cpu(graph) = graph {
            self.executor.replay(queue, graph)
        }
    }

    fn synchronize(&self, queue: usize) -> Result<(), Error> {
        self.executor.synchronize(queue)
    }

    fn embed(&self, queue: usize, p: ops::EmbedParams, ids: &Tensor, table: &Tensor, out: &Tensor) {
        let (ids, table, out) = (ids.clone(), table.clone(), out.clone());
        self.executor.issue(queue, move |team| pointwise::embed(team, p, &ids, &table, &out));
    }

    fn rms_norm(&self, queue: usize, p: ops::RmsNormParams, x: &Tensor, weight: &Tensor, out: &Tensor) {
        let (simd, x, weight, out) = (self.simd, x.clone(), weight.clone(), out.clone());
        self.executor.issue(queue, move |team| pointwise::rms_norm(team, simd, p, &x, &weight, &out));
    }

    fn linear(&self, queue: usize, p: ops::LinearParams, x: &Tensor, weight: &ops::Weight, out: &Tensor) {
        let (simd, x, weight, out) = (self.simd, x.clone(), weight.clone(), out.clone());
        self.executor.issue(queue, move |team| linear::linear(team, simd, p, &x, &weight, &out));
    }

    fn linear_glu(
        &self,
        queue: usize,
        p: ops::GluParams,
        x: &Tensor,
        gate_up: &ops::Weight,
        scratch: &Tensor,
        out: &Tensor,
    ) {
        let (simd, x, weight) = (self.simd, x.clone(), gate_up.clone());
        let (scratch, out) = (scratch.clone(), out.clone());
        self.executor
            .issue(queue, move |team| linear::linear_glu(team, simd, p, &x, &weight, &scratch, &out));
    }

    fn rope_kv_write(&self, queue: usize, p: ops::RopeParams, operands: &ops::RopeOperands) {
        let (simd, operands) = (self.simd, operands.clone());
        self.executor.issue(queue, move |team| rope::rope_kv_write(team, simd, p, &operands));
    }

    fn paged_attention(&self, queue: usize, p: ops::AttentionParams, operands: &ops::AttentionOperands) {
        let (simd, operands) = (self.simd, operands.clone());
        self.executor.issue(queue, move |team| attention::paged_attention(team, simd, p, &operands));
    }

    fn gather_rows(&self, queue: usize, x: &Tensor, rows: &Tensor, out: &Tensor) {
        let (x, rows, out) = (x.clone(), rows.clone(), out.clone());
        self.executor.issue(queue, move |_| pointwise::gather_rows(&x, &rows, &out));
    }

    fn copy_slots(
        &self,
        queue: usize,
        from: &ops::KvPages,
        from_slots: &Tensor,
        to: &ops::KvPages,
        to_slots: &Tensor,
    ) {
        let (from, from_slots, to, to_slots) =
            (from.clone(), from_slots.clone(), to.clone(), to_slots.clone());
        self.executor.issue(queue, move |_| rope::copy_slots(&from, &from_slots, &to, &to_slots));
    }

    fn soft_cap(&self, queue: usize, cap: f32, x: &Tensor) {
        let x = x.clone();
        self.executor.issue(queue, move |team| pointwise::soft_cap(team, cap, &x));
    }

    fn baselines(&self) -> Option<&dyn super::BaselineFusers> {
        Some(self)
    }

    fn training(&self) -> Option<&dyn super::Training> {
        Some(self)
    }

    fn fuse(&self, queue: usize, p: ops::FuseParams, _: ops::FuseExtent, operands: &ops::FuseOperands) {
        let (simd, operands) = (self.simd, operands.clone());
        self.executor.issue(queue, move |team| fuse::fuse(team, simd, p, &operands));
    }

    fn fuses_jointly(&self) -> bool {
        true
    }
}

impl super::BaselineFusers for Cpu {
    fn fuse_baseline(
        &self,
        queue: usize,
        tokens: usize,
        precision: Precision,
        operands: &ops::BaselineOperands,
    ) {
        let (simd, operands) = (self.simd, operands.clone());
        self.executor.issue(queue, move |team| fuse_baseline::fuse(team, simd, tokens, precision, &operands));
    }

    fn fuse_baseline_forward(
        &self,
        queue: usize,
        tokens: usize,
        p: ops::BaselineTraining,
        operands: &ops::BaselineOperands,
        tapes: &[ops::BaselineTape],
    ) {
        let (simd, operands, tapes) = (self.simd, operands.clone(), tapes.to_vec());
        self.executor
            .issue(queue, move |team| fuse_baseline::forward(team, simd, tokens, p, &operands, &tapes));
    }

    fn fuse_baseline_backward(
        &self,
        queue: usize,
        tokens: usize,
        p: ops::BaselineTraining,
        operands: &ops::BaselineOperands,
        tapes: &[ops::BaselineTape],
        grads: &[ops::BaselineGrads],
    ) {
        let (simd, operands, tapes, grads) = (self.simd, operands.clone(), tapes.to_vec(), grads.to_vec());
        self.executor.issue(queue, move |team| {
            fuse_baseline::backward(team, simd, tokens, p, &operands, &tapes, &grads);
        });
    }
}
