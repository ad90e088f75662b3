//! Pinned host memory between the host and the device: copies from it are asynchronous, and each buffer is used again
//! once the copy is done.

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};
use std::{
    ffi::c_void,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Bytes of a buffer; longer copies take several.
pub(super) const BUFFER: usize = 4 << 20;

struct Buffer {
    context: Arc<CudaContext>,
    ptr: *mut c_void,
    len: usize,
    /// Done when the device no longer reads the buffer.
    event: Option<CudaEvent>,
}

// SAFETY: pinned memory may be used from any thread; the pool hands a buffer to one at a time.
unsafe impl Send for Buffer {}

impl Buffer {
    fn new(context: &Arc<CudaContext>, len: usize) -> Result<Buffer, DriverError> {
        context.bind_to_thread()?;
        // SAFETY: a plain allocation in the context bound above. Flags 0: not write-combined, the host reads it too.
        let ptr = unsafe { result::malloc_host(len, 0)? };
        Ok(Buffer { context: context.clone(), ptr, len, event: None })
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `len` bytes were allocated; the pool lent the buffer to this thread only, and no copy is under way.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.cast(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(event) = &self.event {
            self.context.record_err(event.synchronize());
        }
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: allocated by `malloc_host`, and no copy is under way.
        self.context.record_err(unsafe { result::free_host(self.ptr) });
    }
}

pub(super) struct Staging {
    context: Arc<CudaContext>,
    buffers: Mutex<Vec<Buffer>>,
}

impl Staging {
    pub fn new(context: Arc<CudaContext>) -> Staging {
        Staging { context, buffers: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Buffer>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of at least `len` bytes (at most [`BUFFER`]) that nothing uses.
    fn take(&self, len: usize) -> Result<Buffer, DriverError> {
        let idle = |buffer: &Buffer| buffer.event.as_ref().is_none_or(CudaEvent::is_complete);
        let mut buffers = self.lock();
        let found = buffers.iter().position(|buffer| buffer.len >= len && idle(buffer));
        match found {
            Some(found) => Ok(buffers.swap_remove(found)),
            None => {
                drop(buffers);
                // Small ones are for the inputs of a step, of which there are several under way at once.
                Buffer::new(&self.context, if len <= 1 << 16 { 1 << 16 } else { BUFFER })
            }
        }
    }

    /// Copies `bytes` to device memory at `to`, in stream order; `bytes` is free for other use on return.
    pub fn upload(&self, stream: &CudaStream, bytes: &[u8], to: sys::CUdeviceptr) -> Result<(), DriverError> {
        for (index, part) in bytes.chunks(BUFFER).enumerate() {
            let mut buffer = self.take(part.len())?;
            buffer.bytes()[..part.len()].copy_from_slice(part);
            let to = to + (index * BUFFER) as sys::CUdeviceptr;
            self.context.bind_to_thread()?;
            // SAFETY: `to` has room for `bytes` (the tensor's size was compared), and the buffer is left alone until the
            // event recorded below is done.
            unsafe { result::memcpy_htod_async(to, &buffer.bytes()[..part.len()], stream.cu_stream())? };
            buffer.event = Some(stream.record_event(None)?);
            self.lock().push(buffer);
        }
        Ok(())
    }

    /// Waits for the stream and copies device memory at `from` to `bytes`.
    pub fn download(
        &self,
        stream: &CudaStream,
        from: sys::CUdeviceptr,
        bytes: &mut [u8],
    ) -> Result<(), DriverError> {
        for (index, part) in bytes.chunks_mut(BUFFER).enumerate() {
            let mut buffer = self.take(part.len())?;
            let from = from + (index * BUFFER) as sys::CUdeviceptr;
            self.context.bind_to_thread()?;
            // SAFETY: `from` holds as many bytes; the stream is waited for before the buffer is read.
            unsafe {
                result::memcpy_dtoh_async(&mut buffer.bytes()[..part.len()], from, stream.cu_stream())?;
            }
            stream.synchronize()?;
            part.copy_from_slice(&buffer.bytes()[..part.len()]);
            buffer.event = None;
            self.lock().push(buffer);
        }
        Ok(())
    }
}
