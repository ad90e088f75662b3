//! Several sharers, one fuser each, into one receiver.

use super::{FuseCall, Fuser, Gates};
use crate::{
    backend::{Precision, Queue, Tensor},
    ops::{self, KvPages, ShapeError},
};
use std::{fmt, str::FromStr};

/// How the fusers of several sharers meet (spec 1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FusionMode {
    /// Every fuser reads the receiver's plain cache; what they add is summed: `base` is `out` from the second on.
    Parallel,
    /// Each fuser reads what the one before left: `target` and `base` are `out` from the second on.
    #[default]
    Sequential,
}

impl FromStr for FusionMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "parallel" => Ok(FusionMode::Parallel),
            "sequential" => Ok(FusionMode::Sequential),
            _ => Err(format!("unknown fusion mode `{text}`: use parallel or sequential")),
        }
    }
}

impl fmt::Display for FusionMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FusionMode::Parallel => "parallel",
            FusionMode::Sequential => "sequential",
        })
    }
}

/// The fusers of one receiver, in the order of its sharers.
#[derive(Clone)]
pub struct FuserSet {
    pub fusers: Vec<Fuser>,
    pub mode: FusionMode,
}

/// One sharer's part in [`FuserSet::issue_layer`].
#[derive(Clone, Copy)]
pub struct SharerColumns<'a> {
    /// Of its layer [`Fuser::sharer_layer`].
    pub pages: &'a KvPages,
    /// U32`[tokens]`: for each fused token the column aligned with it.
    pub slots: &'a Tensor,
    pub gates: &'a Gates,
}

/// The receiver's part: the plain columns and where the fused ones go. `out` may be `plain` with the same slots, except
/// with several parallel sharers.
#[derive(Clone, Copy)]
pub struct ReceiverColumns<'a> {
    pub plain: &'a KvPages,
    pub plain_slots: &'a Tensor,
    pub out: &'a KvPages,
    pub out_slots: &'a Tensor,
}

impl FuserSet {
    /// Elements of F32 scratch that [`FuserSet::issue_layer`] needs.
    pub fn scratch_len(&self, tokens: usize) -> usize {
        self.fusers.iter().map(|fuser| fuser.scratch_len(tokens)).max().unwrap_or(0)
    }

    /// Issues the fusion of receiver layer `layer` with every sharer of `sharers` that is `Some` (the sharers that a
    /// section's mask selects, in the order of [`FuserSet::fusers`]). With none, the plain columns are copied.
    pub fn issue_layer(
        &self,
        queue: &Queue,
        layer: usize,
        sharers: &[Option<SharerColumns>],
        receiver: ReceiverColumns,
        scratch: &Tensor,
        precision: Precision,
    ) -> Result<(), ShapeError> {
        let ReceiverColumns { plain, plain_slots, out, out_slots } = receiver;
        let mut first = true;
        for (fuser, sharer) in self.fusers.iter().zip(sharers) {
            let Some(sharer) = sharer else { continue };
            let left = if first { (plain, plain_slots) } else { (out, out_slots) };
            let target = match self.mode {
                FusionMode::Parallel => (plain, plain_slots),
                FusionMode::Sequential => left,
            };
            let call = FuseCall {
                source: sharer.pages,
                source_slots: sharer.slots,
                target: target.0,
                target_slots: target.1,
                base: left.0,
                base_slots: left.1,
                out,
                out_slots,
                scratch,
                precision,
                gates: sharer.gates.get(layer).copied().unwrap_or_default(),
            };
            fuser.issue_layer(queue, layer, call)?;
            first = false;
        }
        if first {
            ops::copy_slots(queue, plain, plain_slots, out, out_slots)?;
        }
        Ok(())
    }
}
