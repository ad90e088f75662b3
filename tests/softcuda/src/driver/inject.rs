//! Faults on demand: the n-th call of a kind fails, and the calls are counted so that a test can walk
//! through them all.

use super::status::Status;

/// The kinds of driver call that can be made to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u32)]
pub enum Kind {
    /// Device memory: `cuMemAlloc`, `cuMemAllocAsync`, `cuMemAllocFromPoolAsync`.
    Alloc,
    /// Page-locked host memory: `cuMemHostAlloc`, `cuMemAllocHost`.
    HostAlloc,
    /// `cuLaunchKernel`, `cuLaunchCooperativeKernel`: the call itself fails.
    Launch,
    /// A kernel fails while it runs (launches from graphs too): the error is found later, and is sticky.
    Kernel,
    /// Every copy and fill.
    Copy,
    ModuleLoad,
    StreamCreate,
    EventCreate,
    /// `cuStreamBeginCapture` and `cuStreamEndCapture`.
    Capture,
    GraphInstantiate,
    GraphLaunch,
    /// Waiting for a stream, an event or a context.
    Synchronize,
    /// Any of the above.
    Any,
}

impl Kind {
    pub const ALL: [Kind; 13] = [
        Kind::Alloc,
        Kind::HostAlloc,
        Kind::Launch,
        Kind::Kernel,
        Kind::Copy,
        Kind::ModuleLoad,
        Kind::StreamCreate,
        Kind::EventCreate,
        Kind::Capture,
        Kind::GraphInstantiate,
        Kind::GraphLaunch,
        Kind::Synchronize,
        Kind::Any,
    ];

    /// The code a card gives when a call of this kind fails for want of something.
    pub fn usual(self) -> Status {
        match self {
            Kind::Launch => Status::LAUNCH_OUT_OF_RESOURCES,
            Kind::Kernel | Kind::Synchronize => Status::LAUNCH_FAILED,
            Kind::Copy => Status::INVALID_VALUE,
            Kind::Capture => Status::STREAM_CAPTURE_INVALIDATED,
            _ => Status::OUT_OF_MEMORY,
        }
    }
}

#[derive(Default)]
pub struct Injector {
    calls: [u64; Kind::ALL.len()],
    /// (kind, which call of it, counted from the start, code); no code: the usual one of the call's kind.
    plans: Vec<(Kind, u64, Option<Status>)>,
}

impl Injector {
    /// The `n`-th call of `kind` from now, counted from 1, fails with `code`.
    pub fn fail(&mut self, kind: Kind, n: u64, code: Option<Status>) {
        self.plans.push((kind, self.calls[kind as usize] + n, code));
    }

    pub fn calls(&self, kind: Kind) -> u64 {
        self.calls[kind as usize]
    }

    /// Forgets the plans and starts counting anew.
    pub fn reset(&mut self) {
        *self = Injector::default();
    }

    /// Counts a call of `kind`, and says whether it is one that shall fail.
    pub fn call(&mut self, kind: Kind) -> Result<(), Status> {
        self.calls[kind as usize] += 1;
        self.calls[Kind::Any as usize] += 1;
        let calls = self.calls;
        let due = |&(planned, n, _): &(Kind, u64, Option<Status>)| {
            (planned == kind || planned == Kind::Any) && calls[planned as usize] == n
        };
        match self.plans.iter().position(due) {
            Some(at) => Err(self.plans.swap_remove(at).2.unwrap_or(kind.usual())),
            None => Ok(()),
        }
    }
}
