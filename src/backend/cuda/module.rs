//! The kernels that `build.rs` embedded, and the table of those loaded on a device.

use crate::backend::Error;
use cudarc::{
    driver::{CudaContext, CudaFunction, DriverError, sys},
    nvrtc::Ptx,
};
use std::{collections::HashMap, sync::Arc};

/// One `kernels/*.cu`.
pub struct Module {
    /// Name of the file, without extension.
    pub file: &'static str,
    pub ptx: &'static str,
    /// Names of its kernels.
    pub kernels: &'static [&'static str],
}

/// Empty where no nvcc was found when c2c was built.
pub static MODULES: &[Module] = include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Every kernel by name.
pub(super) struct Kernels(HashMap<&'static str, CudaFunction>);

impl Kernels {
    /// Hands every module to the driver, which compiles it for the card (and remembers it between runs).
    pub fn load(context: &Arc<CudaContext>, device: &str) -> Result<Kernels, Error> {
        let failed = |what: String, error: DriverError| {
            let problem = match error.0 {
                sys::cudaError_enum::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
                    "the driver is older than the kernels: CUDA 13.0 needs driver 580 or newer".into()
                }
                sys::cudaError_enum::CUDA_ERROR_NO_BINARY_FOR_GPU
                | sys::cudaError_enum::CUDA_ERROR_INVALID_PTX => {
                    format!("the driver cannot use the kernels ({error})")
                }
                _ => error.to_string(),
            };
            Error::Failed { device: device.into(), what, problem }
        };
        let mut all = HashMap::new();
        for module in MODULES {
            let loaded = context
                .load_module(Ptx::from_src(module.ptx))
                .map_err(|error| failed(format!("loading kernels/{}.cu", module.file), error))?;
            for &name in module.kernels {
                let function = loaded
                    .load_function(name)
                    .map_err(|error| failed(format!("finding kernel `{name}`"), error))?;
                all.insert(name, function);
            }
        }
        Ok(Kernels(all))
    }

    /// # Panics
    /// If there is no such kernel: launch tables are written by the programmer, a test goes through them.
    pub fn get(&self, name: &str) -> &CudaFunction {
        self.0.get(name).unwrap_or_else(|| panic!("there is no kernel `{name}`"))
    }
}
