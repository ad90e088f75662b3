//! The one trait that executes the vocabulary of [`crate::ops`], and what it is written in: [`Tensor`], [`Queue`],
//! [`Event`].
//!
//! Operations are issued on a [`Queue`] and run in its order; two queues are ordered only by events. The host sees
//! results after [`Queue::synchronize`] or a download. Shapes were checked in `ops`: a backend may assume them.

pub mod cpu;
pub mod cuda;
mod dtype;
mod tensor;
mod training;

pub use dtype::DType;
pub use tensor::{Shape, Storage, Tensor};
pub use training::{Communicator, Training};

use crate::ops;
use memmap2::Mmap;
use std::{fmt, str::FromStr, sync::Arc, time::Duration};

/// What can go wrong on a device, shapes aside.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("out of {device} memory: {requested} bytes requested for {what}")]
    OutOfMemory { device: &'static str, requested: usize, what: String },
    #[error("device `{0}` is not available: {1}")]
    Unavailable(String, String),
    #[error("unknown device `{0}`: use auto, cpu, cuda or cuda:N")]
    UnknownDevice(String),
    #[error("queues wait for each other: an event was waited for that no queue will record")]
    Deadlock,
    #[error("capture of a queue: {0}")]
    Capture(String),
    /// Every later use of the device may fail too.
    #[error("{device}: {what} failed: {problem}")]
    Failed { device: String, what: String, problem: String },
}

/// `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    #[default]
    Auto,
    Cpu,
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text.split_once(':') {
            None if text == "auto" => Ok(DeviceChoice::Auto),
            None if text == "cpu" => Ok(DeviceChoice::Cpu),
            None if text == "cuda" => Ok(DeviceChoice::Cuda(0)),
            Some(("cuda", n)) => {
                n.parse().map(DeviceChoice::Cuda).map_err(|_| Error::UnknownDevice(text.into()))
            }
            _ => Err(Error::UnknownDevice(text.into())),
        }
    }
}

/// Opens the chosen device once, at start, and logs which and why. `threads` = 0 means all cores.
pub fn open(choice: DeviceChoice, threads: usize) -> Result<Arc<dyn Backend>, Error> {
    let (device, why): (Arc<dyn Backend>, String) = match choice {
        DeviceChoice::Cuda(n) => (cuda::Cuda::open(n)?, "asked for".into()),
        DeviceChoice::Cpu => (cpu::Cpu::new(threads), "asked for".into()),
        DeviceChoice::Auto => match cuda::count() {
            Ok(0) => (cpu::Cpu::new(threads), "the NVIDIA driver knows no device".into()),
            Ok(_) => match cuda::Cuda::open(0) {
                Ok(device) => (device, "the first NVIDIA GPU".into()),
                Err(error) => {
                    log::warn!("a GPU is there but cannot be used: {error}");
                    (cpu::Cpu::new(threads), error.to_string())
                }
            },
            Err(why) => (cpu::Cpu::new(threads), why),
        },
    };
    log::info!("device: {} ({why})", device.description());
    Ok(device)
}

/// An ordered list of operations. Cloning names the same queue.
#[derive(Clone)]
pub struct Queue(Arc<OpenQueue>);

struct OpenQueue {
    backend: Arc<dyn Backend>,
    id: usize,
}

impl Drop for OpenQueue {
    fn drop(&mut self) {
        self.backend.release_queue(self.id);
    }
}

impl Queue {
    pub fn new(backend: &Arc<dyn Backend>) -> Result<Queue, Error> {
        Ok(Queue(Arc::new(OpenQueue { backend: backend.clone(), id: backend.new_queue()? })))
    }

    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.0.backend
    }

    pub fn id(&self) -> usize {
        self.0.id
    }

    /// Marks this point of the queue: the event is done when everything issued before is.
    pub fn record(&self) -> Event {
        self.backend().record(self.id())
    }

    /// Nothing issued on this queue after this call starts before `event` is done.
    pub fn wait(&self, event: &Event) {
        self.backend().wait(self.id(), event)
    }

    /// Blocks until everything issued on this queue is done.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.backend().synchronize(self.id())
    }

    /// Records the operations that `issue` issues on this queue, without running them. Uploads, downloads, events and
    /// allocations are no part of a graph; what the operations read and write is fixed, its contents are not.
    pub fn capture<E: From<Error>>(&self, issue: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        self.backend().begin_capture(self.id())?;
        let issued = issue();
        let graph = self.backend().end_capture(self.id());
        issued.and(graph.map_err(E::from))
    }

    /// Issues all operations of a graph that this queue captured.
    pub fn replay(&self, graph: &Graph) {
        self.backend().replay(self.id(), graph)
    }
}

/// Operations recorded by [`Queue::capture`].
#[derive(Clone)]
pub enum Graph {
    Cpu(cpu::Graph),
    Cuda(cuda::Graph),
}

/// A point in a queue.
#[derive(Clone)]
pub enum Event {
    Cpu(cpu::Event),
    Cuda(cuda::Event),
}

impl Event {
    /// Time that the queue which recorded both events spent between them: on a CPU at work, on a GPU also waiting. `None`
    /// until both are done.
    pub fn elapsed_since(&self, earlier: &Event) -> Option<Duration> {
        match (self, earlier) {
            (Event::Cpu(later), Event::Cpu(earlier)) => later.busy_since(earlier),
            (Event::Cuda(later), Event::Cuda(earlier)) => later.elapsed_since(earlier),
            _ => None,
        }
    }

    /// When the event was done, on the host's clock; `None` until then.
    pub fn done_at(&self) -> Option<std::time::Instant> {
        match self {
            Event::Cpu(event) => event.done_at(),
            Event::Cuda(event) => event.done_at(),
        }
    }
}

/// How exact an operation has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32 operands throughout (quantised weights are expanded exactly): what goldens are compared in.
    F32,
    /// What the weights' format allows: bf16 products for bf16 weights, int8 activations for block formats; always
    /// with f32 accumulation.
    Fast,
}

/// A device that executes the vocabulary of [`crate::ops`].
///
/// One method per op; operands are described at the op's function in `ops`, which checks them and is the only caller.
pub trait Backend: Send + Sync {
    /// For logs: `cpu (2 threads, AVX2)`.
    fn description(&self) -> String;
    fn device(&self) -> &'static str;
    fn threads(&self) -> usize;
    /// What activations between ops are kept in; the residual stream and logits are F32 always.
    fn activation_dtype(&self, precision: Precision) -> DType;
    /// What its memory is held for, in words; `None` where the system sees to that.
    fn memory_plan(&self) -> Option<String>;
    /// F32 elements of scratch that an op needs.
    fn scratch_len(&self, scratch: ops::Scratch) -> usize;

    // Memory.
    fn alloc(&self, dtype: DType, dims: &[usize], what: &str) -> Result<Tensor, Error>;
    /// A tensor that lies at `offset` in a mapped file. Stays in the file where the device can read it there.
    fn map(
        &self,
        file: &Arc<Mmap>,
        offset: usize,
        dtype: DType,
        dims: &[usize],
        what: &str,
    ) -> Result<Tensor, Error>;
    /// Copies `bytes` (exactly [`Tensor::bytes`]) into `tensor`, in queue order.
    fn upload(&self, queue: usize, bytes: &[u8], tensor: &Tensor);
    /// Waits for the queue and copies `tensor` to `bytes` (exactly [`Tensor::bytes`]).
    fn download(&self, queue: usize, tensor: &Tensor, bytes: &mut [u8]) -> Result<(), Error>;

    // Order.
    fn new_queue(&self) -> Result<usize, Error>;
    /// Nobody holds the queue any more; what was issued on it still runs.
    fn release_queue(&self, queue: usize);
    fn record(&self, queue: usize) -> Event;
    fn wait(&self, queue: usize, event: &Event);
    fn synchronize(&self, queue: usize) -> Result<(), Error>;
    /// Operations issued on `queue` until [`Backend::end_capture`] are recorded instead of run.
    fn begin_capture(&self, queue: usize) -> Result<(), Error>;
    fn end_capture(&self, queue: usize) -> Result<Graph, Error>;
    fn replay(&self, queue: usize, graph: &Graph);

    // The vocabulary.
    fn embed(&self, queue: usize, p: ops::EmbedParams, ids: &Tensor, table: &Tensor, out: &Tensor);
    fn rms_norm(&self, queue: usize, p: ops::RmsNormParams, x: &Tensor, weight: &Tensor, out: &Tensor);
    fn linear(&self, queue: usize, p: ops::LinearParams, x: &Tensor, weight: &ops::Weight, out: &Tensor);
    fn linear_glu(
        &self,
        queue: usize,
        p: ops::GluParams,
        x: &Tensor,
        gate_up: &ops::Weight,
        scratch: &Tensor,
        out: &Tensor,
    );
    fn rope_kv_write(&self, queue: usize, p: ops::RopeParams, operands: &ops::RopeOperands);
    fn paged_attention(&self, queue: usize, p: ops::AttentionParams, operands: &ops::AttentionOperands);
    fn gather_rows(&self, queue: usize, x: &Tensor, rows: &Tensor, out: &Tensor);
    fn copy_slots(
        &self,
        queue: usize,
        from: &ops::KvPages,
        from_slots: &Tensor,
        to: &ops::KvPages,
        to_slots: &Tensor,
    );
    fn soft_cap(&self, queue: usize, cap: f32, x: &Tensor);
    fn fuse(&self, queue: usize, p: ops::FuseParams, extent: ops::FuseExtent, operands: &ops::FuseOperands);
    /// Whether the fuser's ops take projectors that read keys and values, see [`ops::Projector::input`].
    fn fuses_jointly(&self) -> bool {
        false
    }

    /// Fusers that others are compared with; `None` where the device runs none.
    fn baselines(&self) -> Option<&dyn BaselineFusers> {
        None
    }

    /// The ops of training; `None` where the device has none.
    fn training(&self) -> Option<&dyn Training> {
        None
    }

    /// Drawing tokens on the device; `None` where logits lie with the host, which then draws.
    fn draw_tokens(&self) -> Option<&dyn DrawTokens> {
        None
    }
}

/// A device that runs baseline fusers, see [`ops::fuse_baseline()`].
pub trait BaselineFusers {
    fn fuse_baseline(
        &self,
        queue: usize,
        tokens: usize,
        precision: Precision,
        operands: &ops::BaselineOperands,
    );
    fn fuse_baseline_forward(
        &self,
        queue: usize,
        tokens: usize,
        p: ops::BaselineTraining,
        operands: &ops::BaselineOperands,
        tapes: &[ops::BaselineTape],
    );
    fn fuse_baseline_backward(
        &self,
        queue: usize,
        tokens: usize,
        p: ops::BaselineTraining,
        operands: &ops::BaselineOperands,
        tapes: &[ops::BaselineTape],
        grads: &[ops::BaselineGrads],
    );
}

/// A device that draws tokens itself: a token is shorter to carry than a row of logits.
pub trait DrawTokens {
    /// U32 elements of scratch to draw from `rows` rows of logits and rank `k` tokens of each.
    fn scratch_len(&self, rows: usize, vocab: usize, k: usize) -> usize;
    fn sample(&self, queue: usize, operands: &ops::SampleOperands);
}

/// Typed host access through a queue.
impl Queue {
    /// Allocates a tensor and fills it with `data`, in queue order.
    pub fn tensor<T: cpu::Element>(&self, data: &[T], dims: &[usize], what: &str) -> Result<Tensor, Error> {
        let tensor = self.backend().alloc(T::DTYPE, dims, what)?;
        self.upload(data, &tensor);
        Ok(tensor)
    }

    /// # Panics
    /// If `data` has another type or length than `tensor`.
    pub fn upload<T: cpu::Element>(&self, data: &[T], tensor: &Tensor) {
        assert_eq!(
            (T::DTYPE, data.len()),
            (tensor.dtype(), tensor.elements()),
            "upload of the wrong size or type"
        );
        self.backend().upload(self.id(), bytemuck::cast_slice(data), tensor)
    }

    /// Waits for the queue and copies the bytes of `tensor` out.
    pub fn download(&self, tensor: &Tensor) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; tensor.bytes()];
        self.backend().download(self.id(), tensor, &mut bytes)?;
        Ok(bytes)
    }

    /// Waits for the queue and reads `tensor` as f32 (bf16 and f16 are widened).
    pub fn download_f32(&self, tensor: &Tensor) -> Result<Vec<f32>, Error> {
        if tensor.dtype() == DType::F32 {
            let mut values = vec![0.0f32; tensor.elements()];
            self.backend().download(self.id(), tensor, bytemuck::cast_slice_mut(&mut values))?;
            return Ok(values);
        }
        let bytes = self.download(tensor)?;
        let halves = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        Ok(match tensor.dtype() {
            DType::Bf16 => halves().map(|h| half::bf16::from_bits(h).to_f32()).collect(),
            DType::F16 => halves().map(|h| half::f16::from_bits(h).to_f32()).collect(),
            other => panic!("a {other} tensor has no plain f32 reading"),
        })
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Queue {} on {}", self.id(), self.backend().description())
    }
}
