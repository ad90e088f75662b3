//! How a kernel is launched. The numbers come from a pure function per op, so that a test can go through all of them
//! without a card.

use super::module::Kernels;
use cudarc::driver::{CudaStream, DriverError, result, sys};
use std::{ffi::c_void, fmt};

/// Shared memory that a block gets without asking.
const DEFAULT_SHARED: u32 = 48 << 10;

/// One launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    pub kernel: &'static str,
    /// Blocks.
    pub grid: (u32, u32, u32),
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

/// The one argument of a kernel: a `#[repr(C)]` struct of device addresses and scalars, whose twin stands in the kernel's `.cu`.
///
/// # Safety
/// Layout and meaning are those of the struct that the kernel takes.
pub(super) unsafe trait KernelArgs: Copy {}

impl Launch {
    /// A launch of no blocks is nothing to do, which the driver would refuse.
    pub fn is_empty(&self) -> bool {
        self.grid.0 == 0 || self.grid.1 == 0 || self.grid.2 == 0
    }

    pub(super) fn run<A: KernelArgs>(
        &self,
        kernels: &Kernels,
        stream: &CudaStream,
        args: &A,
    ) -> Result<(), DriverError> {
        let function = kernels.get(self.kernel);
        if self.shared > DEFAULT_SHARED {
            let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(most, self.shared as i32)?;
        }
        stream.context().bind_to_thread()?;
        let mut params = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
        // SAFETY: the driver copies the arguments before it returns. They are those of this kernel (`KernelArgs`), their
        // addresses lie in tensors whose shapes `ops` checked, and memory that a tensor lets go of is not used again
        // before this stream has done what was issued on it until then.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                self.grid,
                (self.block, 1, 1),
                self.shared,
                stream.cu_stream(),
                &mut params,
            )
        }
    }
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (x, y, z) = self.grid;
        write!(f, "{x}×{y}×{z} blocks of {} threads with {} bytes", self.block, self.shared)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        adamw, attention, attention_backward, cross_entropy, dropout, embed, fuse, fuse_training, glu,
        linear_backward, linear_decode, module::MODULES, norm_backward, pages, pointwise, rope,
        rope_backward, sample, sums,
    };

    /// The size of a kernel's one parameter, as the compiler of the other side laid it out.
    fn parameter_bytes(ptx: &str, kernel: &str) -> usize {
        let body = ptx.split(&format!(".entry {kernel}(")).nth(1).expect("the kernel is in its file");
        let parameter = body.split(')').next().expect("a list of parameters");
        assert_eq!(parameter.matches(".param").count(), 1, "`{kernel}` takes one struct");
        let size = parameter.rsplit('[').next().and_then(|rest| rest.split(']').next());
        size.and_then(|size| size.trim().parse().ok()).expect("an array of bytes")
    }

    #[test]
    fn arguments_are_as_large_on_both_sides() {
        // Of two that fit, the first.
        let sizes = [
            ("adamw", size_of::<adamw::AdamwArgs>()),
            ("attention_backward_", size_of::<attention_backward::AttentionBackwardArgs>()),
            ("attention_", size_of::<attention::AttentionArgs>()),
            ("copy_slots_", size_of::<pages::CopySlotsArgs>()),
            ("cross_entropy", size_of::<cross_entropy::CrossEntropyArgs>()),
            ("dropout", size_of::<dropout::DropoutArgs>()),
            ("embed_backward", size_of::<embed::EmbedBackwardArgs>()),
            ("embed_", size_of::<embed::EmbedArgs>()),
            ("fuse_training_", size_of::<fuse_training::FuseTrainingArgs>()),
            ("fuse_", size_of::<fuse::FuseArgs>()),
            ("gather_rows_", size_of::<pages::GatherRowsArgs>()),
            ("gemv_", size_of::<linear_decode::PartsArgs>()),
            ("glu_", size_of::<glu::GluArgs>()),
            ("linear_backward_", size_of::<linear_backward::LinearBackwardArgs>()),
            ("linear_", size_of::<linear_decode::PartsArgs>()),
            ("rms_norm_backward", size_of::<norm_backward::RmsNormBackwardArgs>()),
            ("rms_norm_", size_of::<pointwise::RmsNormArgs>()),
            ("rope_backward", size_of::<rope_backward::RopeBackwardArgs>()),
            ("rope_", size_of::<rope::RopeArgs>()),
            ("sample_", size_of::<sample::SampleArgs>()),
            ("soft_cap", size_of::<pointwise::SoftCapArgs>()),
            ("sum_of_squares", size_of::<sums::SumOfSquaresArgs>()),
            ("sum_rows", size_of::<sums::SumRowsArgs>()),
        ];
        for module in MODULES {
            for kernel in module.kernels {
                let (_, bytes) = sizes
                    .iter()
                    .find(|(prefix, _)| kernel.starts_with(prefix))
                    .unwrap_or_else(|| panic!("`{kernel}` has no twin in this table"));
                assert_eq!(parameter_bytes(module.ptx, kernel), *bytes, "{kernel}");
            }
        }
    }
}
