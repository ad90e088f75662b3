//! The gated linear unit in training, and its backward: kernels/glu.cu.

use super::{Launch, launch::KernelArgs};
use crate::{
    backend::{DType, Tensor},
    ops::Activation,
};

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct GluArgs {
    gate_up: u64,
    out: u64,
    dout: u64,
    dgate_up: u64,
    elements: u64,
    width: u32,
    activation: u32,
}

// SAFETY: twin of `GluArgs` in kernels/glu.cu.
unsafe impl KernelArgs for GluArgs {}

pub(super) fn glu(activation: Activation, gate_up: &Tensor, out: &Tensor) -> (Launch, GluArgs) {
    let args = GluArgs { out: out.address(), ..args(activation, gate_up, out) };
    (launch("glu_f32", "glu_bf16", gate_up.dtype(), args.elements), args)
}

pub(super) fn glu_backward(
    activation: Activation,
    gate_up: &Tensor,
    dout: &Tensor,
    dgate_up: &Tensor,
) -> (Launch, GluArgs) {
    let (dout_at, dgate_up) = (dout.address(), dgate_up.address());
    let args = GluArgs { dout: dout_at, dgate_up, ..args(activation, gate_up, dout) };
    (launch("glu_backward_f32", "glu_backward_bf16", gate_up.dtype(), args.elements), args)
}

/// Of either direction; `half` has the shape of one half.
fn args(activation: Activation, gate_up: &Tensor, half: &Tensor) -> GluArgs {
    GluArgs {
        gate_up: gate_up.address(),
        out: 0,
        dout: 0,
        dgate_up: 0,
        elements: half.elements() as u64,
        width: half.row_len() as u32,
        activation: activation as u32,
    }
}

/// A thread an element.
fn launch(f32: &'static str, bf16: &'static str, dtype: DType, elements: u64) -> Launch {
    let kernel = if dtype == DType::Bf16 { bf16 } else { f32 };
    Launch { kernel, grid: (elements.div_ceil(256) as u32, 1, 1), block: 256, shared: 0 }
}
