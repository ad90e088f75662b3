//! Events and graphs.

use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaStream, DriverError, sys};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// With timing.
const TIMED: Option<sys::CUevent_flags> = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);

/// A moment known on both clocks.
pub(super) struct Epoch {
    at: Instant,
    event: CudaEvent,
}

impl Epoch {
    pub fn new(context: &Arc<CudaContext>) -> Result<Epoch, DriverError> {
        let event = context.default_stream().record_event(TIMED)?;
        event.synchronize()?;
        Ok(Epoch { at: Instant::now(), event })
    }
}

/// A point in a stream.
#[derive(Clone, Default)]
pub struct Event(Option<Arc<(CudaEvent, Arc<Epoch>)>>);

impl Event {
    pub(super) fn record(
        epoch: &Arc<Epoch>,
        context: &Arc<CudaContext>,
        stream: &CudaStream,
    ) -> Result<Event, DriverError> {
        let event = context.new_event(TIMED)?;
        event.record(stream)?;
        Ok(Event(Some(Arc::new((event, epoch.clone())))))
    }

    /// Lets `stream` wait. An event that failed to be recorded was reported then.
    pub(super) fn hold(&self, stream: &CudaStream) -> Result<(), DriverError> {
        self.0.as_ref().map_or(Ok(()), |event| stream.wait(&event.0))
    }

    fn done(&self) -> Option<&(CudaEvent, Arc<Epoch>)> {
        self.0.as_deref().filter(|event| event.0.is_complete())
    }

    /// `None` until both are done.
    pub fn elapsed_since(&self, earlier: &Event) -> Option<Duration> {
        milliseconds(&earlier.done()?.0, &self.done()?.0)
    }

    /// On the host's clock; `None` until then.
    pub fn done_at(&self) -> Option<Instant> {
        let (event, epoch) = self.done()?;
        Some(epoch.at + milliseconds(&epoch.event, event)?)
    }
}

fn milliseconds(from: &CudaEvent, to: &CudaEvent) -> Option<Duration> {
    Some(Duration::from_secs_f64(f64::from(from.elapsed_ms(to).ok()?.max(0.0)) / 1e3))
}

/// A captured stream.
#[derive(Clone)]
pub struct Graph(Arc<Exclusive>);

/// The driver's graphs are not for two threads at once.
struct Exclusive(Mutex<CudaGraph>);

// SAFETY: the handles in it may be used from any thread, one at a time, which the mutex sees to.
unsafe impl Send for Exclusive {}
// SAFETY: as above.
unsafe impl Sync for Exclusive {}

impl Graph {
    pub(super) fn new(graph: CudaGraph) -> Graph {
        Graph(Arc::new(Exclusive(Mutex::new(graph))))
    }

    /// On the stream that was captured.
    pub(super) fn launch(&self) -> Result<(), DriverError> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).launch()
    }
}
