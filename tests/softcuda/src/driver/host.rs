//! The host's side: what it has waited for, and its page-locked memory.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use super::clock::{Clock, Stamp};
use super::machine::DEVICES;
use super::queue::device_of;

/// What the host has seen end, by device. One clock for all its threads: how they order themselves among
/// each other is not seen here, and a race is reported only where there is one for certain.
static KNOWN: LazyLock<Vec<Mutex<Clock>>> =
    LazyLock::new(|| (0..DEVICES).map(|_| Mutex::default()).collect());

/// Page-locked buffers by address.
static PINNED: Mutex<BTreeMap<usize, Arc<Pinned>>> = Mutex::new(BTreeMap::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What operations enqueued now on the device start after.
pub fn known(ordinal: u8) -> Clock {
    lock(&KNOWN[ordinal as usize]).clone()
}

/// The host has waited for all this, which operations of the device and of those it dealt with are part of.
pub fn learn(ordinal: u8, past: &Clock) {
    lock(&KNOWN[ordinal as usize]).merge(past);
    let mut told = ordinal;
    for other in past.marks().map(device_of).filter(|&other| other != ordinal) {
        // Lanes are in the order of devices, so one device's come together.
        if other != told {
            lock(&KNOWN[other as usize]).merge(past);
            told = other;
        }
    }
}

/// Whether the host has waited for all these.
fn is_known(marks: &Clock) -> bool {
    marks.marks().all(|mark| known(device_of(mark)).knows(mark))
}

pub fn fingerprint(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// A page-locked host buffer. Its memory lives as long as an operation holds it, so a use after
/// `cuMemFreeHost` is found and reported, not suffered.
pub struct Pinned {
    pub address: usize,
    pub bytes: usize,
    pub ordinal: u8,
    pub context: u64,
    layout: Layout,
    freed: AtomicBool,
    /// The operations that read or write it.
    uses: Mutex<Clock>,
    /// Those of them that write it.
    writes: Mutex<Clock>,
}

/// What a new buffer holds: no number, read as a float of any width, so that relying on zeros shows.
const UNWRITTEN: u8 = 0xff;

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: `alloc` gave the address for this layout, and this is its only owner.
        unsafe { dealloc(self.address as *mut u8, self.layout) }
    }
}

impl Pinned {
    /// A new buffer of `bytes` > 0, page-aligned, whose content is nothing to rely on; none if the host has no memory left.
    pub fn allocate(bytes: usize, ordinal: u8, context: u64) -> Option<Arc<Pinned>> {
        let layout = Layout::from_size_align(bytes, 4096).ok()?;
        // SAFETY: `bytes` is not zero, as the caller checks.
        let memory = unsafe { alloc(layout) };
        if memory.is_null() {
            return None;
        }
        // SAFETY: as many bytes were allocated.
        unsafe { memory.write_bytes(UNWRITTEN, bytes) };
        let address = memory as usize;
        let (freed, uses, writes) = (AtomicBool::new(false), Mutex::default(), Mutex::default());
        let buffer = Arc::new(Pinned { address, bytes, ordinal, context, layout, freed, uses, writes });
        lock(&PINNED).insert(address, buffer.clone());
        Some(buffer)
    }

    /// The buffer that holds all of `[address, address + bytes)`.
    pub fn around(address: usize, bytes: usize) -> Option<Arc<Pinned>> {
        let table = lock(&PINNED);
        let (_, buffer) = table.range(..=address).next_back()?;
        (address - buffer.address + bytes <= buffer.bytes).then(|| buffer.clone())
    }

    pub fn note_read(&self, stamp: &Stamp) {
        lock(&self.uses).add(stamp.mark);
    }

    pub fn note_write(&self, stamp: &Stamp) {
        lock(&self.uses).add(stamp.mark);
        lock(&self.writes).add(stamp.mark);
    }

    /// Whether the host has waited for every operation that writes it: only the host can change it now.
    pub fn is_settled(&self) -> bool {
        is_known(&lock(&self.writes))
    }

    /// A number for the bytes from `offset` on: other bytes have another.
    pub fn fingerprint(&self, offset: usize, bytes: usize) -> u64 {
        // SAFETY: the range was checked to lie in the buffer. A host thread that writes meanwhile is a bug that
        // the number shows.
        fingerprint(unsafe { std::slice::from_raw_parts((self.address + offset) as *const u8, bytes) })
    }

    pub fn is_freed(&self) -> bool {
        self.freed.load(Ordering::Relaxed)
    }

    /// Takes the buffer that starts at `address` out of the table. Also says whether the host has waited
    /// for every operation that uses it.
    pub fn free(address: usize) -> Option<(Arc<Pinned>, bool)> {
        let buffer = lock(&PINNED).remove(&address)?;
        buffer.freed.store(true, Ordering::Relaxed);
        let idle = is_known(&lock(&buffer.uses));
        Some((buffer, idle))
    }

    /// The buffers of a context.
    pub fn of_context(ordinal: u8, context: u64) -> Vec<Arc<Pinned>> {
        let belongs = |buffer: &&Arc<Pinned>| buffer.ordinal == ordinal && buffer.context == context;
        lock(&PINNED).values().filter(belongs).cloned().collect()
    }
}
