//! The CUDA backend: hand-written kernels (`kernels/*.cu`) on an NVIDIA GPU, compute capability 8.0 or newer.
//!
//! One stream a [`crate::backend::Queue`], ordered by explicit events. An op computes its launches (grid, block, shared memory: one
//! place per op, without looking at the device's data) and issues them; what goes wrong in a launch is kept and told at
//! the next [`crate::backend::Queue::synchronize`] or download.

mod adamw;
mod arena;
mod attention;
mod attention_backward;
mod cross_entropy;
mod dropout;
mod embed;
mod event;
mod fuse;
mod fuse_training;
mod glu;
mod launch;
mod linear_backward;
mod linear_decode;
mod linear_prefill;
mod module;
mod nccl;
mod norm_backward;
mod pages;
mod pointwise;
mod rope;
mod rope_backward;
mod sample;
mod staging;
mod sums;
mod training;

pub use arena::Memory;
pub use event::{Event, Graph};
pub use launch::Launch;
pub use module::{MODULES, Module};

use super::{
    Backend, DType, DrawTokens, Error, Event as AnyEvent, Graph as AnyGraph, Precision, Shape, Storage,
    Tensor, Training,
};
use crate::ops;
use arena::Arena;
use cudarc::driver::{CudaContext, CudaStream, DriverError, sys};
use event::Epoch;
use launch::KernelArgs;
use memmap2::Mmap;
use module::Kernels;
use staging::Staging;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The oldest compute capability the kernels run on: bf16 tensor cores and cp.async.
const OLDEST: (i32, i32) = (8, 0);

/// An NVIDIA GPU.
pub struct Cuda {
    name: String,
    ordinal: usize,
    capability: (i32, i32),
    processors: u32,
    context: Arc<CudaContext>,
    // Dropped in this order: tensors may outlive the backend, and keep the arena and with it the context alive.
    kernels: Kernels,
    staging: Staging,
    arena: Arc<Arena>,
    epoch: Arc<Epoch>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    streams: Vec<Arc<CudaStream>>,
    released: Vec<usize>,
    /// The stream that is being captured.
    capturing: Option<usize>,
    /// The first failure, for whoever waits next. The driver's own errors stick to the context.
    failure: Option<(String, String)>,
}

/// How many CUDA devices there are; why not, if there is no knowing.
pub fn count() -> Result<usize, String> {
    if MODULES.is_empty() {
        return Err(
            "this build has no CUDA kernels: no nvcc was found (put one in PATH, NVCC, CUDA_HOME or \
                    /usr/local/cuda, or run scripts/nvcc.sh, and build again)"
                .into(),
        );
    }
    // SAFETY: opens the driver's library, whose initialisers are trusted.
    if !unsafe { sys::is_culib_present() } {
        return Err("no NVIDIA driver (libcuda.so) on this machine".into());
    }
    match CudaContext::device_count() {
        Ok(count) => Ok(count.max(0) as usize),
        Err(error) => Err(format!("the NVIDIA driver does not start: {error}")),
    }
}

impl Cuda {
    /// Opens device `ordinal`: probes the driver, the number of devices and the compute capability, then loads the kernels.
    pub fn open(ordinal: usize) -> Result<Arc<Cuda>, Error> {
        let device = format!("cuda:{ordinal}");
        let unavailable = |why: String| Error::Unavailable(device.clone(), why);
        let devices = count().map_err(unavailable)?;
        if ordinal >= devices {
            return Err(unavailable(format!("{devices} CUDA devices are there")));
        }
        let failed = |what: &str, error: DriverError| Error::Failed {
            device: device.clone(),
            what: what.into(),
            problem: error.to_string(),
        };
        let context = CudaContext::new(ordinal).map_err(|error| failed("opening the device", error))?;
        // SAFETY: this backend orders its streams by events of its own.
        unsafe { context.disable_event_tracking() };
        let capability =
            context.compute_capability().map_err(|error| failed("asking for the capability", error))?;
        if capability < OLDEST {
            let (major, minor) = capability;
            return Err(unavailable(format!("compute capability {major}.{minor} is below 8.0 (Ampere)")));
        }
        let processors = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(|error| failed("asking for the multiprocessors", error))?;
        let name = context.name().map_err(|error| failed("asking for the name", error))?;
        let kernels = Kernels::load(&context, &device)?;
        let epoch = Epoch::new(&context).map_err(|error| failed("recording the first event", error))?;
        Ok(Arc::new(Cuda {
            name,
            ordinal,
            capability,
            processors: processors as u32,
            kernels,
            staging: Staging::new(context.clone()),
            arena: Arena::new(context.clone()),
            epoch: Arc::new(epoch),
            context,
            state: Mutex::default(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stream(&self, queue: usize) -> Arc<CudaStream> {
        self.lock().streams[queue].clone()
    }

    fn failed(&self, what: impl Into<String>, problem: impl ToString) -> Error {
        let device = format!("cuda:{}", self.ordinal);
        Error::Failed { device, what: what.into(), problem: problem.to_string() }
    }

    /// Issues something, unless an earlier failure waits to be told: what would follow has no inputs. Keeps a failure for
    /// whoever waits next.
    fn issue<T>(
        &self,
        what: impl FnOnce() -> String,
        issue: impl FnOnce() -> Result<T, DriverError>,
    ) -> Option<T> {
        if self.lock().failure.is_some() {
            return None;
        }
        match issue() {
            Ok(value) => Some(value),
            Err(error) => {
                self.lock().failure.get_or_insert_with(|| (what(), error.to_string()));
                None
            }
        }
    }

    fn failure(&self) -> Result<(), Error> {
        match self.lock().failure.take() {
            None => Ok(()),
            Some((what, problem)) => Err(self.failed(what, problem)),
        }
    }

    fn launch<A: KernelArgs>(&self, queue: usize, launch: &Launch, args: &A) {
        if launch.is_empty() {
            return;
        }
        let stream = self.stream(queue);
        self.issue(
            || format!("launching `{}` as {launch}", launch.kernel),
            || launch.run(&self.kernels, &stream, args),
        );
    }

    fn wait_for(&self, queue: usize) -> Result<(), Error> {
        if self.lock().capturing == Some(queue) {
            return Err(Error::Capture("a queue cannot be waited for while it is captured".into()));
        }
        let done = self.stream(queue).synchronize();
        self.failure()?;
        done.map_err(|error| self.failed("an operation on the device", error))
    }
}

impl Backend for Cuda {
    fn description(&self) -> String {
        let (major, minor) = self.capability;
        format!(
            "cuda:{} ({}, sm_{major}{minor}, {} multiprocessors)",
            self.ordinal, self.name, self.processors
        )
    }

    fn device(&self) -> &'static str {
        "cuda"
    }

    fn threads(&self) -> usize {
        1
    }

    fn memory_plan(&self) -> Option<String> {
        let (free, total) = self.context.mem_get_info().unwrap_or_default();
        let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
        Some(format!("{}; {:.1} of {:.1} MiB are free", self.arena.plan(), mib(free), mib(total)))
    }

    fn activation_dtype(&self, precision: Precision) -> DType {
        match precision {
            Precision::F32 => DType::F32,
            Precision::Fast => DType::Bf16,
        }
    }

    fn scratch_len(&self, scratch: ops::Scratch) -> usize {
        match scratch {
            // Both products stay in registers.
            ops::Scratch::LinearGlu { .. } => 0,
            ops::Scratch::Attention { sequences, heads, head_dim, context } => {
                attention::scratch_len(sequences, heads, head_dim, context)
            }
            ops::Scratch::Fuse(extent) => {
                fuse::scratch_len(extent).max(fuse_training::forward_scratch_len(extent))
            }
            ops::Scratch::AttentionBackward { tokens, heads, .. } => {
                attention_backward::scratch_len(tokens, heads)
            }
            ops::Scratch::FuseSaved(extent) => fuse_training::saved_len(extent),
            ops::Scratch::FuseBackward(extent) => fuse_training::backward_scratch_len(extent),
        }
    }

    fn alloc(&self, dtype: DType, dims: &[usize], what: &str) -> Result<Tensor, Error> {
        let shape = Shape::new(dims);
        let row = dims.last().copied().unwrap_or(1);
        let rows: usize = dims[..dims.len().saturating_sub(1)].iter().product();
        let bytes = dtype.row_bytes(row).and_then(|row| row.checked_mul(rows)).unwrap_or(usize::MAX / 2);
        let memory = self.arena.alloc(bytes, what)?;
        Ok(Tensor::from_storage(Storage::Cuda(memory), dtype, shape, 0))
    }

    fn map(
        &self,
        file: &Arc<Mmap>,
        offset: usize,
        dtype: DType,
        dims: &[usize],
        what: &str,
    ) -> Result<Tensor, Error> {
        let tensor = self.alloc(dtype, dims, what)?;
        let stream = self.context.default_stream();
        let bytes = &file[offset..offset + tensor.bytes()];
        let copied =
            self.staging.upload(&stream, bytes, tensor.address()).and_then(|()| stream.synchronize());
        copied.map_err(|error| self.failed(format!("copying `{what}` to the device"), error))?;
        Ok(tensor)
    }

    fn upload(&self, queue: usize, bytes: &[u8], tensor: &Tensor) {
        assert_eq!(bytes.len(), tensor.bytes(), "upload of the wrong size");
        let stream = self.stream(queue);
        self.issue(
            || format!("uploading {tensor:?}"),
            || self.staging.upload(&stream, bytes, tensor.address()),
        );
    }

    fn download(&self, queue: usize, tensor: &Tensor, bytes: &mut [u8]) -> Result<(), Error> {
        self.wait_for(queue)?;
        let copied = self.staging.download(&self.stream(queue), tensor.address(), bytes);
        copied.map_err(|error| self.failed(format!("downloading {tensor:?}"), error))
    }

    fn new_queue(&self) -> Result<usize, Error> {
        if let Some(queue) = self.lock().released.pop() {
            return Ok(queue);
        }
        let stream = self.context.new_stream().map_err(|error| self.failed("making a stream", error))?;
        self.arena.watch(stream.clone());
        let mut state = self.lock();
        state.streams.push(stream);
        Ok(state.streams.len() - 1)
    }

    fn release_queue(&self, queue: usize) {
        self.lock().released.push(queue);
    }

    fn record(&self, queue: usize) -> AnyEvent {
        let stream = self.stream(queue);
        let event =
            self.issue(|| "recording an event".into(), || Event::record(&self.epoch, &self.context, &stream));
        AnyEvent::Cuda(event.unwrap_or_default())
    }

    fn wait(&self, queue: usize, event: &AnyEvent) {
        if let AnyEvent::Cuda(event) = event {
            let stream = self.stream(queue);
            self.issue(|| "waiting for an event".into(), || event.hold(&stream));
        }
    }

    fn synchronize(&self, queue: usize) -> Result<(), Error> {
        self.wait_for(queue)
    }

    fn begin_capture(&self, queue: usize) -> Result<(), Error> {
        {
            let mut state = self.lock();
            if state.capturing.is_some() {
                return Err(Error::Capture("another capture is under way".into()));
            }
            state.capturing = Some(queue);
        }
        self.arena.set_capturing(true);
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream(queue).begin_capture(mode).map_err(|error| {
            self.lock().capturing = None;
            self.arena.set_capturing(false);
            Error::Capture(error.to_string())
        })
    }

    fn end_capture(&self, queue: usize) -> Result<AnyGraph, Error> {
        if self.lock().capturing != Some(queue) {
            return Err(Error::Capture("this queue was not being captured".into()));
        }
        let graph = self.stream(queue).end_capture(sys::CUgraphInstantiate_flags(0));
        self.lock().capturing = None;
        self.arena.set_capturing(false);
        self.failure()?;
        match graph {
            Ok(Some(graph)) => Ok(AnyGraph::Cuda(Graph::new(graph))),
            Ok(None) => Err(Error::Capture("the driver gave no graph".into())),
            Err(error) => Err(Error::Capture(error.to_string())),
        }
    }

    fn replay(&self, queue: usize, graph: &AnyGraph) {
        debug_assert!(self.lock().capturing != Some(queue));
        if let AnyGraph::Cuda(graph) = graph {
            self.issue(|| "launching a graph".into(), || graph.launch());
        }
    }

    fn embed(&self, queue: usize, p: ops::EmbedParams, ids: &Tensor, table: &Tensor, out: &Tensor) {
        let (launch, args) = embed::embed(p, ids, table, out);
        self.launch(queue, &launch, &args);
    }

    fn rms_norm(&self, queue: usize, p: ops::RmsNormParams, x: &Tensor, weight: &Tensor, out: &Tensor) {
        let (launch, args) = pointwise::rms_norm(p, x, weight, out);
        self.launch(queue, &launch, &args);
    }

    fn linear(&self, queue: usize, p: ops::LinearParams, x: &Tensor, weight: &ops::Weight, out: &Tensor) {
        let launches = match (p.precision, p.pass) {
            (Precision::Fast, ops::Pass::Prefill) => {
                linear_prefill::linear(p, x, weight, out, self.processors)
            }
            _ => linear_decode::linear(p, x, weight, out),
        };
        launches.iter().for_each(|(launch, args)| self.launch(queue, launch, args));
    }

    fn linear_glu(
        &self,
        queue: usize,
        p: ops::GluParams,
        x: &Tensor,
        gate_up: &ops::Weight,
        _: &Tensor,
        out: &Tensor,
    ) {
        let (launch, args) = match (p.precision, p.pass) {
            (Precision::Fast, ops::Pass::Prefill) => {
                linear_prefill::linear_glu(p, x, gate_up, out, self.processors)
            }
            _ => linear_decode::linear_glu(p, x, gate_up, out),
        };
        self.launch(queue, &launch, &args);
    }

    fn rope_kv_write(&self, queue: usize, p: ops::RopeParams, operands: &ops::RopeOperands) {
        let (launch, args) = rope::rope_kv_write(p, operands);
        self.launch(queue, &launch, &args);
    }

    fn paged_attention(&self, queue: usize, p: ops::AttentionParams, operands: &ops::AttentionOperands) {
        let (launch, combine, args) = attention::paged_attention(p, operands, self.processors);
        self.launch(queue, &launch, &args);
        if let Some(combine) = combine {
            self.launch(queue, &combine, &args);
        }
    }

    fn gather_rows(&self, queue: usize, x: &Tensor, rows: &Tensor, out: &Tensor) {
        let (launch, args) = pages::gather_rows(x, rows, out);
        self.launch(queue, &launch, &args);
    }

    fn copy_slots(
        &self,
        queue: usize,
        from: &ops::KvPages,
        from_slots: &Tensor,
        to: &ops::KvPages,
        to_slots: &Tensor,
    ) {
        let (launch, args) = pages::copy_slots(from, from_slots, to, to_slots);
        self.launch(queue, &launch, &args);
    }

    fn soft_cap(&self, queue: usize, cap: f32, x: &Tensor) {
        let (launch, args) = pointwise::soft_cap(cap, x);
        self.launch(queue, &launch, &args);
    }

    fn fuse(&self, queue: usize, p: ops::FuseParams, extent: ops::FuseExtent, operands: &ops::FuseOperands) {
        let plan = fuse::fuse(p, extent, operands, self.processors);
        if !plan.table.is_empty() {
            let (stream, to) = (self.stream(queue), operands.scratch.address());
            self.issue(
                || "uploading the fuser's table".into(),
                || self.staging.upload(&stream, &plan.table, to),
            );
        }
        plan.launches.iter().for_each(|(launch, args)| self.launch(queue, launch, args));
        plan.copies.iter().for_each(|(launch, args)| self.launch(queue, launch, args));
    }

    fn training(&self) -> Option<&dyn Training> {
        Some(self)
    }

    fn draw_tokens(&self) -> Option<&dyn DrawTokens> {
        Some(self)
    }
}

impl DrawTokens for Cuda {
    fn scratch_len(&self, rows: usize, vocab: usize, k: usize) -> usize {
        sample::scratch_len(rows as u32, vocab as u32, k as u32)
    }

    fn sample(&self, queue: usize, operands: &ops::SampleOperands) {
        let (launches, args) = sample::sample(operands);
        launches.iter().for_each(|launch| self.launch(queue, launch, &args));
    }
}

impl Tensor {
    /// # Panics
    /// If the tensor lies on another device than the queue of the op that has it as an operand.
    fn device_memory(&self) -> &Memory {
        match self.storage() {
            Storage::Cuda(memory) => memory,
            Storage::Cpu(_) => panic!("{self:?} lies in host memory, the op runs on a GPU"),
        }
    }

    /// Device address of the first element.
    fn address(&self) -> u64 {
        let memory = self.device_memory();
        assert!(self.byte_offset() + self.bytes() <= memory.len(), "tensor {self:?} reaches past its memory");
        memory.address() + self.byte_offset() as u64
    }
}

/// What kernels call a dtype whose type is data. Twin of `DTypeCode` in kernels/common.cuh.
fn dtype_code(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Bf16 => 2,
        DType::U32 => 3,
        DType::Q4_0 => 4,
        DType::Q4_1 => 5,
        DType::Q5_0 => 6,
        DType::Q5_1 => 7,
        DType::Q8_0 => 8,
        DType::Q2K => 9,
        DType::Q3K => 10,
        DType::Q4K => 11,
        DType::Q5K => 12,
        DType::Q6K => 13,
        DType::Iq4Nl => 14,
    }
}
