//! Where a sample is cut in two: what is fused, and what is learned from.

use super::{Error, Sample};
use crate::align::Fraction;
use std::ops::Range;

/// Where a sample is cut: its prompt up to the end of the fused section, and the rest.
pub(super) struct Cut {
    pub fused: Range<usize>,
    pub mask: u32,
}

/// `fraction`: the part of its fused section that is.
pub(super) fn cut(sample: &Sample, fraction: Option<Fraction>) -> Result<Cut, Error> {
    let bad = |problem: &str| Err(Error::Sample { origin: sample.origin.clone(), problem: problem.into() });
    let sections = &sample.prompt.sections;
    let mut found = None;
    let mut start = 0;
    for section in &sections[..sections.len().saturating_sub(1)] {
        let range = start..start + section.len;
        start = range.end;
        if section.sharer_mask == 0 {
            continue;
        }
        if found.is_some() {
            return bad(
                "has several fused sections: the receiver's tokens of a later one depend on the fuser through an \
                 earlier one, which the backward pass does not follow; keep to one message before the answer",
            );
        }
        found = Some(Cut { fused: range, mask: section.sharer_mask });
    }
    let Some(mut cut) = found else { return bad("has nothing to fuse before its answer") };
    if let Some(fraction) = fraction {
        let Range { start, end } = cut.fused;
        let kept = fraction.of(end - start);
        cut.fused = start + kept.start..start + kept.end;
        if cut.fused.is_empty() {
            return Err(Error::Sample {
                origin: sample.origin.clone(),
                problem: format!(
                    "has {} tokens to fuse, of which the fraction {fraction} leaves none",
                    end - start
                ),
            });
        }
    }
    Ok(cut)
}
