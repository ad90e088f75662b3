//! Host memory behind a [`crate::backend::Tensor`]: owned and aligned, or a read-only window of a mapped file.

use crate::backend::{DType, Storage, Tensor};
use memmap2::Mmap;
use std::{alloc, cell::UnsafeCell, fs::File, path::Path, ptr::NonNull, sync::Arc};

/// Cache-line alignment, also the width of the widest vector register.
const ALIGN: usize = 64;

/// Maps a file for reading. It must not shrink while mapped.
pub fn map_file(path: &Path) -> std::io::Result<Arc<Mmap>> {
    let file = File::open(path)?;
    // SAFETY: the mapping is private to reading; a file that another process changes meanwhile yields other numbers,
    // never other types (`Element` is plain data and block formats take any bytes).
    unsafe { Mmap::map(&file) }.map(Arc::new)
}

/// Shared host memory. See [`Tensor`] for who may touch it when.
#[derive(Clone)]
pub struct Memory(Arc<Kind>);

enum Kind {
    Owned(Owned),
    Mapped(Arc<Mmap>),
}

struct Owned {
    /// What was allocated.
    allocation: NonNull<u8>,
    /// The first aligned byte of it.
    ptr: NonNull<UnsafeCell<u8>>,
    len: usize,
}

// SAFETY: the bytes are only reached through `Memory::{slice, slice_mut}`, whose contract makes the caller (the
// executor, one operation at a time) responsible for exclusion.
unsafe impl Send for Owned {}
// SAFETY: as above.
unsafe impl Sync for Owned {}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: allocated in `Memory::zeroed` with this very layout.
        unsafe { alloc::dealloc(self.allocation.as_ptr(), layout(self.len)) }
    }
}

/// Room to align `len` bytes. Asked for with a small alignment: the system then hands out fresh pages, which are zero
/// and cost nothing until they are used, where for a large one it would write every zero.
fn layout(len: usize) -> alloc::Layout {
    alloc::Layout::from_size_align(len + ALIGN, 16).expect("size checked against isize::MAX at allocation")
}

impl Memory {
    /// `len` zero bytes, aligned to a cache line; `None` if the system has no such memory.
    pub fn zeroed(len: usize) -> Option<Memory> {
        if len > isize::MAX as usize - 2 * ALIGN {
            return None;
        }
        // SAFETY: the layout's size is not 0.
        let allocation = NonNull::new(unsafe { alloc::alloc_zeroed(layout(len)) })?;
        // SAFETY: `ALIGN` bytes more than `len` were allocated.
        let ptr = unsafe { allocation.add(allocation.align_offset(ALIGN)) }.cast();
        Some(Memory(Arc::new(Kind::Owned(Owned { allocation, ptr, len }))))
    }

    /// A whole mapped file; tensors are windows into it.
    pub fn mapped(map: Arc<Mmap>) -> Memory {
        Memory(Arc::new(Kind::Mapped(map)))
    }

    pub fn len(&self) -> usize {
        match &*self.0 {
            Kind::Owned(owned) => owned.len,
            Kind::Mapped(map) => map.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether both are one allocation or one mapping.
    pub(in crate::backend) fn is_same(&self, other: &Memory) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub fn is_writable(&self) -> bool {
        matches!(&*self.0, Kind::Owned(_))
    }

    fn base(&self) -> *mut u8 {
        match &*self.0 {
            Kind::Owned(owned) => owned.ptr.as_ptr().cast(),
            Kind::Mapped(map) => map.as_ptr().cast_mut(),
        }
    }
}

/// Rust types that a tensor's elements can be viewed as.
pub trait Element: bytemuck::Pod + Send + Sync {
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for u32 {
    const DTYPE: DType = DType::U32;
}
impl Element for half::bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Element for half::f16 {
    const DTYPE: DType = DType::F16;
}

impl Tensor {
    /// # Panics
    /// If the tensor lies on another device than the queue of the op that has it as an operand.
    pub(in crate::backend::cpu) fn memory(&self) -> &Memory {
        match self.storage() {
            Storage::Cpu(memory) => memory,
            Storage::Cuda(_) => panic!("{self:?} lies on a GPU, the op runs on the CPU"),
        }
    }

    fn cpu_ptr(&self) -> *mut u8 {
        let memory = self.memory();
        assert!(self.byte_offset() + self.bytes() <= memory.len(), "tensor {self:?} reaches past its memory");
        // SAFETY: the sum was just checked to lie within the allocation.
        unsafe { memory.base().add(self.byte_offset()) }
    }

    /// The elements, for reading, from inside an operation that runs on this device's executor (which runs one at a
    /// time, so nothing writes meanwhile except through the operation's own output).
    ///
    /// # Panics
    /// If the dtype is not `T`'s: operand types were checked in `ops`.
    pub(in crate::backend::cpu) fn host<T: Element>(&self) -> &[T] {
        assert_eq!(self.dtype(), T::DTYPE, "operand read as the wrong dtype");
        let ptr = self.cpu_ptr();
        assert!(ptr.align_offset(align_of::<T>()) == 0, "misaligned tensor: copied at load");
        // SAFETY: in bounds (`cpu_ptr`), aligned, `T` is plain old data; exclusion as documented above.
        unsafe { std::slice::from_raw_parts(ptr.cast::<T>(), self.elements()) }
    }

    /// The raw bytes, for reading; same contract as [`Tensor::host`].
    pub(in crate::backend::cpu) fn host_bytes(&self) -> &[u8] {
        // SAFETY: in bounds (`cpu_ptr`); exclusion as documented at `host`.
        unsafe { std::slice::from_raw_parts(self.cpu_ptr(), self.bytes()) }
    }

    /// The raw bytes, for writing; same contract as [`Tensor::host_mut`].
    #[allow(clippy::mut_from_ref)]
    pub(in crate::backend::cpu) fn host_bytes_mut(&self) -> &mut [u8] {
        let memory = self.memory();
        assert!(memory.is_writable(), "a mapped file is never an output");
        // SAFETY: in bounds; exclusion as documented at `host_mut`.
        unsafe { std::slice::from_raw_parts_mut(self.cpu_ptr(), self.bytes()) }
    }

    /// The elements, for writing, from inside an operation on the executor: at most one live `host_mut` per element.
    ///
    /// # Panics
    /// If the dtype is not `T`'s or the memory is a mapped file.
    #[allow(clippy::mut_from_ref)]
    pub(in crate::backend::cpu) fn host_mut<T: Element>(&self) -> &mut [T] {
        let memory = self.memory();
        assert!(memory.is_writable(), "a mapped file is never an output");
        assert_eq!(self.dtype(), T::DTYPE, "operand written as the wrong dtype");
        // SAFETY: in bounds, aligned (owned memory is 64-byte aligned and offsets are whole elements); the executor
        // runs one operation at a time and `ops` refuses outputs that overlap inputs where the kernel can't bear it.
        unsafe { std::slice::from_raw_parts_mut(self.cpu_ptr().cast::<T>(), self.elements()) }
    }
}
