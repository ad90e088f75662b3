//! The vocabulary: one file per op, with its parameters, its shape checks and the function everything above calls.
//!
//! Each function checks its operands, names op, operand and shapes if they don't fit, and issues the op on a
//! [`crate::backend::Queue`]. Outputs are allocated by the caller. An output shares no memory with an input, unless the op says
//! so. `*Params` structs are scalars: on a GPU the same struct is the kernel's argument.

mod attention;
pub mod cases;
mod dropout;
mod embed;
mod fuse;
mod fuse_baseline;
mod fuse_training;
mod gather;
mod glu;
mod linear;
mod loss;
mod norm;
mod optimizer;
mod rope;
mod sample;
mod scratch;

pub use attention::{
    AttentionGrads, AttentionOperands, AttentionParams, attention_backward, paged_attention,
};
pub use dropout::{DropoutParams, dropout};
pub use embed::{EmbedParams, embed, embed_backward};
pub(crate) use fuse::FUSE_CHUNK;
pub use fuse::{Ffn, FuseExtent, FuseLayer, FuseOperands, FuseParams, Projector, SourceStage, fuse};
pub use fuse_baseline::{
    AllInOne, Baseline, BaselineGrads, BaselineLayer, BaselineOperands, BaselineTape, BaselineTraining,
    Factor, Features, Granularity, LinearMap, Mlp, MlpLayer, Nonlinearity, SelfTerm, fuse_baseline,
    fuse_baseline_backward, fuse_baseline_forward,
};
pub use fuse_training::{FuseGrads, FuseTape, FuseTrainingParams, dropout_part, fuse_backward, fuse_forward};
pub use gather::{KvPages, MAX_HEAD_DIM, copy_slots, gather_rows};
pub use glu::{Activation, GluParams, glu, glu_backward, linear_glu, soft_cap};
pub use linear::{
    LinearBackwardParams, LinearParams, Pass, Weight, WeightPart, linear, linear_backward_input,
    linear_backward_weight,
};
pub use loss::{CrossEntropyParams, IGNORED, cross_entropy};
pub use norm::{NormOutput, RmsNormParams, rms_norm, rms_norm_backward};
pub use optimizer::{AdamwParams, adamw, sum_of_squares, zero};
pub use rope::{RopeBackwardOperands, RopeOperands, RopeParams, rope_backward, rope_kv_write};
pub use sample::{MAX_RANKED, SampleOperands, SampleRow, SampledRow, sample};
pub use scratch::Scratch;

use crate::backend::{DType, Precision, Queue, Tensor, Training};

/// An operand that does not fit its op.
#[derive(Debug, thiserror::Error)]
#[error("{op}: operand `{operand}` is {found}, expected {expected}")]
pub struct ShapeError {
    pub op: &'static str,
    pub operand: &'static str,
    pub found: String,
    pub expected: String,
}

fn check(
    op: &'static str,
    operand: &'static str,
    tensor: &Tensor,
    dtypes: &[DType],
    dims: &[usize],
) -> Result<(), ShapeError> {
    if dtypes.contains(&tensor.dtype()) && tensor.shape() == dims {
        return Ok(());
    }
    let types: Vec<String> = dtypes.iter().map(|d| d.to_string()).collect();
    Err(ShapeError {
        op,
        operand,
        found: format!("{tensor:?}"),
        expected: format!("{}{dims:?}", types.join("|")),
    })
}

/// Dtypes that activations between ops may have: F32, and what the device works with fastest.
fn activations(queue: &Queue) -> &'static [DType] {
    match queue.backend().activation_dtype(Precision::Fast) {
        DType::Bf16 => &[DType::F32, DType::Bf16],
        _ => &[DType::F32],
    }
}

/// The device's ops of training.
fn training<'q>(op: &'static str, queue: &'q Queue) -> Result<&'q dyn Training, ShapeError> {
    queue.backend().training().ok_or_else(|| ShapeError {
        op,
        operand: "device",
        found: queue.backend().description(),
        expected: "a device that trains".into(),
    })
}

/// Refuses an output that shares memory with an input: a kernel reads the one while it writes the other.
fn check_apart(op: &'static str, out: &Tensor, inputs: &[(&'static str, &Tensor)]) -> Result<(), ShapeError> {
    match inputs.iter().find(|(_, input)| out.overlaps(input)) {
        None => Ok(()),
        Some((operand, input)) => Err(ShapeError {
            op,
            operand,
            found: format!("{input:?} in the memory of the output"),
            expected: "memory of its own".into(),
        }),
    }
}

/// Dtypes a KV-cache page may have.
pub(crate) const KV_DTYPES: &[DType] = &[DType::F32, DType::Bf16];
const FLOATS: &[DType] = &[DType::F32, DType::Bf16, DType::F16];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{DeviceChoice, Precision, Queue, open};

    #[test]
    fn outputs_in_the_memory_of_inputs_are_refused() {
        let queue = Queue::new(&open(DeviceChoice::Cpu, 1).unwrap()).unwrap();
        let tensor = |dims: &[usize]| queue.backend().alloc(DType::F32, dims, "test").unwrap();
        let (x, weight) = (tensor(&[4, 8]), tensor(&[8]));
        let square = Weight::new(tensor(&[8, 8]));
        let part = |start| x.narrow(start, 2).unwrap();
        let product =
            |x: &Tensor, out: &Tensor| linear(&queue, Pass::Prefill, x, &square, Precision::F32, false, out);
        assert_eq!(product(&x, &x).unwrap_err().operand, "x");
        assert_eq!(product(&part(0), &part(1)).unwrap_err().operand, "x");
        product(&part(0), &part(2)).unwrap();
        let norm = |output, out: &Tensor| rms_norm(&queue, &part(0), &weight, 1e-6, 0.0, output, out);
        norm(NormOutput::Assign, &part(0)).unwrap();
        assert_eq!(norm(NormOutput::Add, &part(0)).unwrap_err().operand, "x");
        assert_eq!(norm(NormOutput::Assign, &part(1)).unwrap_err().operand, "x");
        let glu = |x: &Tensor, scratch: &Tensor, out: &Tensor| {
            let gate_up = Weight { parts: vec![square.parts[0].clone(), square.parts[0].clone()] };
            let (pass, precision) = (Pass::Prefill, Precision::F32);
            linear_glu(&queue, pass, x, &gate_up, precision, Activation::Silu, scratch, out)
        };
        let (wide, out) = (tensor(&[4, 16]), tensor(&[4, 8]));
        glu(&x, &wide, &out).unwrap();
        assert_eq!(glu(&x, &wide, &x).unwrap_err().operand, "x");
        assert_eq!(glu(&x, &x, &out).unwrap_err().operand, "scratch");
        let rows = queue.tensor(&[0u32, 1], &[2], "rows").unwrap();
        assert_eq!(gather_rows(&queue, &x, &rows, &part(0)).unwrap_err().operand, "x");
        let ids = queue.tensor(&[0u32, 1], &[2], "ids").unwrap();
        assert_eq!(embed(&queue, &ids, &x, 1.0, &part(0)).unwrap_err().operand, "table");
        queue.synchronize().unwrap();
    }
}
