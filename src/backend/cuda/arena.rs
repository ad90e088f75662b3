//! Device memory: blocks from the driver, kept when a tensor lets go of them and handed out again once every stream has
//! passed the point where that happened. The driver's own free would wait for the whole device.

use crate::backend::Error;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Sizes are rounded up so that a block serves tensors of about its size again.
fn rounded(bytes: usize) -> usize {
    let step = (bytes.next_power_of_two() / 8).max(256);
    bytes.max(1).next_multiple_of(step)
}

struct Block {
    address: sys::CUdeviceptr,
    capacity: usize,
}

/// A block that nobody holds, usable once these events are done.
struct Pending {
    block: Block,
    events: Vec<CudaEvent>,
}

#[derive(Default)]
struct State {
    free: Vec<Block>,
    pending: Vec<Pending>,
    /// Bytes held, by what they are for.
    plan: BTreeMap<String, usize>,
    /// Streams on which work may be under way.
    streams: Vec<Arc<CudaStream>>,
    /// While a stream is captured nothing may be allocated or given back: addresses are burnt into the graph.
    capturing: bool,
    /// Let go of during a capture.
    held: Vec<Block>,
}

pub(super) struct Arena {
    context: Arc<CudaContext>,
    device: &'static str,
    state: Mutex<State>,
}

/// A piece of device memory, shared by the tensors that are views of it.
#[derive(Clone)]
pub struct Memory(Arc<Owned>);

struct Owned {
    arena: Arc<Arena>,
    block: Option<Block>,
    bytes: usize,
    what: String,
}

impl Memory {
    /// Of the first byte; 256-byte aligned.
    pub(super) fn address(&self) -> sys::CUdeviceptr {
        self.0.block.as_ref().map_or(0, |block| block.address)
    }

    pub fn len(&self) -> usize {
        self.0.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.0.bytes == 0
    }

    pub(in crate::backend) fn is_same(&self, other: &Memory) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.arena.give_back(block, self.bytes, &self.what);
        }
    }
}

impl Arena {
    pub fn new(context: Arc<CudaContext>) -> Arc<Arena> {
        Arc::new(Arena { context, device: "cuda", state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks let go of from now on wait for this stream too.
    pub fn watch(&self, stream: Arc<CudaStream>) {
        self.lock().streams.push(stream);
    }

    pub fn set_capturing(&self, capturing: bool) {
        let held = {
            let mut state = self.lock();
            state.capturing = capturing;
            std::mem::take(&mut state.held)
        };
        held.into_iter().for_each(|block| self.retire(block));
    }

    /// `bytes` of uninitialised memory. `what` is what the plan calls it.
    pub fn alloc(self: &Arc<Self>, bytes: usize, what: &str) -> Result<Memory, Error> {
        let capacity = rounded(bytes);
        if self.lock().capturing {
            return Err(Error::Capture(format!("`{what}` would be allocated inside a graph")));
        }
        let block = match self.take_free(capacity) {
            Some(block) => block,
            None => self.driver_alloc(capacity).map_err(|error| self.out_of_memory(bytes, what, error))?,
        };
        *self.lock().plan.entry(what.to_string()).or_default() += bytes;
        Ok(Memory(Arc::new(Owned { arena: self.clone(), block: Some(block), bytes, what: what.into() })))
    }

    fn take_free(&self, capacity: usize) -> Option<Block> {
        let mut state = self.lock();
        let (done, pending) = std::mem::take(&mut state.pending)
            .into_iter()
            .partition(|pending: &Pending| pending.events.iter().all(CudaEvent::is_complete));
        state.pending = pending;
        state.free.extend(done.into_iter().map(|pending| pending.block));
        let fits = |block: &Block| block.capacity >= capacity && block.capacity <= capacity + capacity / 4;
        let found = state.free.iter().position(fits)?;
        Some(state.free.swap_remove(found))
    }

    fn driver_alloc(&self, capacity: usize) -> Result<Block, DriverError> {
        self.context.bind_to_thread()?;
        // SAFETY: a plain allocation in the context bound above.
        let allocated = unsafe { result::malloc_sync(capacity) };
        let address = match allocated {
            Err(DriverError(sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY)) => {
                // What is kept for later may be just what is missing.
                self.release_unused();
                // SAFETY: as above.
                unsafe { result::malloc_sync(capacity)? }
            }
            other => other?,
        };
        Ok(Block { address, capacity })
    }

    /// Gives blocks that no tensor holds back to the driver.
    pub fn release_unused(&self) {
        let (free, pending) = {
            let mut state = self.lock();
            (std::mem::take(&mut state.free), std::mem::take(&mut state.pending))
        };
        for event in pending.iter().flat_map(|pending| &pending.events) {
            self.context.record_err(event.synchronize());
        }
        for block in free.into_iter().chain(pending.into_iter().map(|pending| pending.block)) {
            self.free_to_driver(block);
        }
    }

    fn free_to_driver(&self, block: Block) {
        let freed = self.context.bind_to_thread().and_then(|()| {
            // SAFETY: the block came from `malloc_sync`, is held by no tensor, and no stream uses it any more.
            unsafe { result::free_sync(block.address) }
        });
        if let Err(error) = freed {
            log::warn!("{}: memory was not given back: {error}", self.device);
        }
    }

    fn give_back(&self, block: Block, bytes: usize, what: &str) {
        {
            let mut state = self.lock();
            if let Some(held) = state.plan.get_mut(what) {
                *held -= bytes;
                if *held == 0 {
                    state.plan.remove(what);
                }
            }
            if state.capturing {
                return state.held.push(block);
            }
        }
        self.retire(block);
    }

    /// The block is free once every stream has done what was issued so far.
    fn retire(&self, block: Block) {
        let streams = self.lock().streams.clone();
        let events: Result<Vec<CudaEvent>, DriverError> =
            streams.iter().map(|stream| stream.record_event(None)).collect();
        match events {
            Ok(events) => self.lock().pending.push(Pending { block, events }),
            // Without events there is no telling when: the driver's own free waits.
            Err(_) => self.free_to_driver(block),
        }
    }

    fn out_of_memory(&self, requested: usize, what: &str, error: DriverError) -> Error {
        if error.0 != sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY {
            let what = format!("allocating {requested} bytes for {what}");
            return Error::Failed { device: self.device.into(), what, problem: error.to_string() };
        }
        let free = self.context.mem_get_info().map_or(0, |(free, _)| free);
        let what = format!("{what} ({free} bytes are free; held: {})", self.plan());
        Error::OutOfMemory { device: self.device, requested, what }
    }

    /// What memory is held for: the largest uses first, in MiB.
    pub fn plan(&self) -> String {
        let mut uses: Vec<(usize, String)> =
            self.lock().plan.iter().map(|(what, &bytes)| (bytes, kind(what))).collect();
        let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
        uses.drain(..).for_each(|(bytes, kind)| *kinds.entry(kind).or_default() += bytes);
        let mut kinds: Vec<(String, usize)> = kinds.into_iter().collect();
        kinds.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        let total: usize = kinds.iter().map(|(_, bytes)| bytes).sum();
        let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
        let mut text = format!("{:.1} MiB", mib(total));
        for (kind, bytes) in kinds.iter().take(8) {
            let _ = write!(text, ", {kind} {:.1}", mib(*bytes));
        }
        text
    }
}

/// Names of weights are one kind.
fn kind(what: &str) -> String {
    if what.contains('.') { "weights".into() } else { what.into() }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.release_unused();
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_are_rounded_by_at_most_an_eighth() {
        for bytes in [1, 255, 256, 257, 1000, 4097, 1 << 20, (1 << 20) + 1, 300 << 20] {
            let rounded = super::rounded(bytes);
            assert!(rounded >= bytes && rounded.is_multiple_of(256), "{bytes} -> {rounded}");
            assert!(rounded <= bytes + (bytes / 4).max(256), "{bytes} -> {rounded}");
        }
    }
}
