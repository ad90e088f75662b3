//! A backend that forgets to wait for some events: what the sanitizer has to notice.

use c2c::{
    backend::{Backend, DType, Error, Event, Graph, Precision, Tensor},
    ops,
};
use memmap2::Mmap;
use std::sync::{Arc, Mutex};

/// Passes everything on but the waits that `forget(queue, n)` names: the n-th of that queue.
pub struct Forgetful<F> {
    inner: Arc<dyn Backend>,
    forget: F,
    /// Waits of each queue so far.
    pub waits: Mutex<Vec<usize>>,
}

impl<F: Fn(usize, usize) -> bool + Send + Sync> Forgetful<F> {
    pub fn new(inner: Arc<dyn Backend>, forget: F) -> Arc<Forgetful<F>> {
        Arc::new(Forgetful { inner, forget, waits: Mutex::default() })
    }
}

impl<F: Fn(usize, usize) -> bool + Send + Sync> Backend for Forgetful<F> {
    fn wait(&self, queue: usize, event: &Event) {
        let mut waits = self.waits.lock().unwrap();
        let len = waits.len().max(queue + 1);
        waits.resize(len, 0);
        waits[queue] += 1;
        if !(self.forget)(queue, waits[queue] - 1) {
            self.inner.wait(queue, event);
        }
    }

    fn description(&self) -> String {
        self.inner.description()
    }
    fn device(&self) -> &'static str {
        self.inner.device()
    }
    fn threads(&self) -> usize {
        self.inner.threads()
    }
    fn memory_plan(&self) -> Option<String> {
        self.inner.memory_plan()
    }
    fn activation_dtype(&self, precision: Precision) -> DType {
        self.inner.activation_dtype(precision)
    }
    fn scratch_len(&self, scratch: ops::Scratch) -> usize {
        self.inner.scratch_len(scratch)
    }
    fn alloc(&self, dtype: DType, dims: &[usize], what: &str) -> Result<Tensor, Error> {
        self.inner.alloc(dtype, dims, what)
    }
    fn map(
        &self,
        file: &Arc<Mmap>,
        offset: usize,
        dtype: DType,
        dims: &[usize],
        what: &str,
    ) -> Result<Tensor, Error> {
        self.inner.map(file, offset, dtype, dims, what)
    }
    fn upload(&self, queue: usize, bytes: &[u8], tensor: &Tensor) {
        self.inner.upload(queue, bytes, tensor)
    }
    fn download(&self, queue: usize, tensor: &Tensor, bytes: &mut [u8]) -> Result<(), Error> {
        self.inner.download(queue, tensor, bytes)
    }
    fn new_queue(&self) -> Result<usize, Error> {
        self.inner.new_queue()
    }
    fn release_queue(&self, queue: usize) {
        self.inner.release_queue(queue)
    }
    fn record(&self, queue: usize) -> Event {
        self.inner.record(queue)
    }
    fn synchronize(&self, queue: usize) -> Result<(), Error> {
        self.inner.synchronize(queue)
    }
    fn begin_capture(&self, queue: usize) -> Result<(), Error> {
        self.inner.begin_capture(queue)
    }
    fn end_capture(&self, queue: usize) -> Result<Graph, Error> {
        self.inner.end_capture(queue)
    }
    fn replay(&self, queue: usize, graph: &Graph) {
        self.inner.replay(queue, graph)
    }
    fn embed(&self, queue: usize, p: ops::EmbedParams, ids: &Tensor, table: &Tensor, out: &Tensor) {
        self.inner.embed(queue, p, ids, table, out)
    }
    fn rms_norm(&self, queue: usize, p: ops::RmsNormParams, x: &Tensor, weight: &Tensor, out: &Tensor) {
        self.inner.rms_norm(queue, p, x, weight, out)
    }
    fn linear(&self, queue: usize, p: ops::LinearParams, x: &Tensor, weight: &ops::Weight, out: &Tensor) {
        self.inner.linear(queue, p, x, weight, out)
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
        self.inner.linear_glu(queue, p, x, gate_up, scratch, out)
    }
    fn rope_kv_write(&self, queue: usize, p: ops::RopeParams, operands: &ops::RopeOperands) {
        self.inner.rope_kv_write(queue, p, operands)
    }
    fn paged_attention(&self, queue: usize, p: ops::AttentionParams, operands: &ops::AttentionOperands) {
        self.inner.paged_attention(queue, p, operands)
    }
    fn gather_rows(&self, queue: usize, x: &Tensor, rows: &Tensor, out: &Tensor) {
        self.inner.gather_rows(queue, x, rows, out)
    }
    fn copy_slots(
        &self,
        queue: usize,
        from: &ops::KvPages,
        from_slots: &Tensor,
        to: &ops::KvPages,
        to_slots: &Tensor,
    ) {
        self.inner.copy_slots(queue, from, from_slots, to, to_slots)
    }
    fn soft_cap(&self, queue: usize, cap: f32, x: &Tensor) {
        self.inner.soft_cap(queue, cap, x)
    }
    fn fuse(&self, queue: usize, p: ops::FuseParams, extent: ops::FuseExtent, operands: &ops::FuseOperands) {
        self.inner.fuse(queue, p, extent, operands)
    }
}
