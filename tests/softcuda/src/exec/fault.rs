//! What is wrong with a kernel or a copy, and where.

use std::fmt;

/// What an access was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
    Atomic,
    Free,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Access::Read => "read",
            Access::Write => "write",
            Access::Atomic => "atomic",
            Access::Free => "free",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("{access} of {bytes} bytes at {address:#x} of {space} memory: {nearest}")]
    OutOfBounds { access: Access, space: &'static str, address: u64, bytes: u64, nearest: String },
    #[error(
        "{access} of {bytes} bytes at {address:#x} of {space} memory, which is not a multiple of {bytes}"
    )]
    Misaligned { access: Access, space: &'static str, address: u64, bytes: u64 },
    #[error("read of bytes at {address:#x} of {space} memory that nobody wrote")]
    Uninitialised { space: &'static str, address: u64 },
    /// Two accesses, one of them a write, that nothing orders.
    #[error("race: {access} at {address:#x} of {space} memory, and {other}")]
    Race { access: Access, space: &'static str, address: u64, other: String },
    #[error("{what}: lanes {arrived:#010x} are here, lanes {missing:#010x} of the warp are not")]
    DivergentBarrier { what: &'static str, arrived: u32, missing: u32 },
    #[error("{access} of {bytes} bytes at {address:#x}, which {freed_by} freed")]
    UseAfterFree { access: Access, address: u64, bytes: u64, freed_by: String },
    #[error("{what}")]
    Trap { what: &'static str },
    #[error("{what}")]
    Assertion { what: String },
    #[error("deadlock: {what}")]
    Deadlock { what: String },
    /// The launch itself is wrong.
    #[error("{what}")]
    Launch { what: String },
}

/// A thread of a kernel, and the instruction it was at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub kernel: String,
    pub block: [u32; 3],
    pub thread: [u32; 3],
    /// Line of the PTX text.
    pub ptx_line: u32,
    /// File and line of the source, where the PTX has them.
    pub source: Option<(String, u32)>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Fault {
    pub problem: Problem,
    /// Name of the operation.
    pub operation: String,
    pub place: Option<Box<Place>>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.operation, self.problem)?;
        let Some(place) = &self.place else { return Ok(()) };
        let Place { block, thread, ptx_line, .. } = **place;
        write!(f, "; block {block:?}, thread {thread:?}, PTX line {ptx_line}")?;
        match &place.source {
            Some((file, line)) => write!(f, ", {file}:{line}"),
            None => Ok(()),
        }
    }
}
