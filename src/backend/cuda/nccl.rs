//! Sums over several GPUs, by NCCL's all-reduce.

use super::Cuda;
use crate::backend::{Communicator, Error};

#[cfg(not(feature = "nccl"))]
pub(super) fn join(
    cuda: &Cuda,
    _queue: usize,
    _rank: usize,
    _count: usize,
    _exchange: &mut dyn FnMut(&mut [u8]),
) -> Result<Option<Box<dyn Communicator>>, Error> {
    Err(Error::Unavailable(
        format!("cuda:{}", cuda.ordinal),
        "several GPUs train together over NCCL, which this build leaves out: build with --features nccl"
            .into(),
    ))
}

#[cfg(feature = "nccl")]
pub(super) use with_library::join;

#[cfg(feature = "nccl")]
mod with_library {
    use super::{Communicator, Cuda, Error};
    use crate::backend::{Backend, DType, Tensor};
    use cudarc::{
        driver::CudaStream,
        nccl::{
            result::{self, NcclError},
            sys,
        },
    };
    use std::{ffi::c_void, mem::MaybeUninit, sync::Arc};

    struct Nccl {
        comm: sys::ncclComm_t,
        device: String,
        stream: Arc<CudaStream>,
    }

    /// Meets the other processes: `exchange` carries rank 0's id to all.
    pub(in super::super) fn join(
        cuda: &Cuda,
        queue: usize,
        rank: usize,
        count: usize,
        exchange: &mut dyn FnMut(&mut [u8]),
    ) -> Result<Option<Box<dyn Communicator>>, Error> {
        // SAFETY: opens the library, whose initialisers are trusted.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Unavailable(
                format!("cuda:{}", cuda.ordinal),
                "several GPUs train together over NCCL: no libnccl.so on this machine; install it \
                 (such as pip install nvidia-nccl-cu12) and put its folder in LD_LIBRARY_PATH"
                    .into(),
            ));
        }
        let failed = |what: &str, error: NcclError| failed(&format!("cuda:{}", cuda.ordinal), what, &error);
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        if rank == 0 {
            id = result::get_uniqueid().map_err(|error| failed("making NCCL's id", error))?;
        }
        let mut bytes = id.internal.map(|byte| byte as u8);
        exchange(&mut bytes);
        id.internal = bytes.map(|byte| byte as _);
        cuda.context.bind_to_thread().map_err(|error| cuda.failed("binding the context", error))?;
        let mut comm = MaybeUninit::uninit();
        // SAFETY: `comm` is written where the call succeeds; the context of the device is current.
        let comm = unsafe {
            result::comm_init_rank(comm.as_mut_ptr(), count as i32, id, rank as i32)
                .map_err(|error| failed("meeting the other GPUs", error))?;
            comm.assume_init()
        };
        Ok(Some(Box::new(Nccl { comm, device: cuda.description(), stream: cuda.stream(queue) })))
    }

    fn failed(device: &str, what: &str, error: &NcclError) -> Error {
        Error::Failed { device: device.into(), what: what.into(), problem: format!("NCCL: {:?}", error.0) }
    }

    impl Communicator for Nccl {
        fn sum(&self, tensor: &Tensor) -> Result<(), Error> {
            assert_eq!(tensor.dtype(), DType::F32, "sums are of F32");
            let address = tensor.address() as *mut c_void;
            // SAFETY: the tensor's memory holds so many F32, and outlives what was issued on the stream; in place is allowed.
            let summed = unsafe {
                result::all_reduce(
                    address,
                    address,
                    tensor.elements(),
                    sys::ncclDataType_t::ncclFloat32,
                    sys::ncclRedOp_t::ncclSum,
                    self.comm,
                    self.stream.cu_stream().cast(),
                )
            };
            summed.map(|_| ()).map_err(|error| failed(&self.device, "adding up over GPUs", &error))
        }
    }

    impl Drop for Nccl {
        fn drop(&mut self) {
            // SAFETY: the communicator is not used afterwards.
            if let Err(error) = unsafe { result::comm_destroy(self.comm) } {
                log::warn!("{}: NCCL's communicator could not be ended: {:?}", self.device, error.0);
            }
        }
    }
}
