//! Handles: what the driver gives out as `CUstream`, `CUevent`, … is a number here, never an address, so a
//! handle that is stale, of another kind or of another device is an error and not a crash.

/// The kinds of object that have handles.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    Context = 0xc1,
    Stream,
    Event,
    Module,
    Function,
    Graph,
    GraphExec,
    Pool,
}

/// An opaque pointer of the driver API: kind (8 bits), device (8 bits), serial number (40 bits).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct Handle(pub usize);

impl Handle {
    pub const NULL: Handle = Handle(0);

    pub fn new(kind: Kind, ordinal: u8, serial: u64) -> Handle {
        Handle((kind as usize) << 48 | (ordinal as usize) << 40 | serial as usize)
    }

    /// Device and serial number, if this is a handle of that kind.
    pub fn open(self, kind: Kind) -> Option<(u8, u64)> {
        (self.0 >> 48 == kind as usize).then_some(((self.0 >> 40) as u8, self.0 as u64 & ((1 << 40) - 1)))
    }
}
