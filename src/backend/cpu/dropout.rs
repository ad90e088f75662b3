//! Dropout of single elements.

use super::team::Team;
use crate::{backend::Tensor, ops::DropoutParams};

/// Elements of a task.
const CHUNK: usize = 1 << 14;
/// Elements whose numbers are drawn at once.
const DRAWN: usize = 256;

pub(super) fn dropout(team: &mut Team, p: DropoutParams, x: &Tensor, out: &Tensor) {
    let (x, rng, kept) = (x.host::<f32>(), p.rng(), 1.0 / (1.0 - p.probability));
    team.chunks_mut(out.host_mut::<f32>(), CHUNK, |task, out| {
        let mut noise = [0.0; DRAWN];
        for (number, out) in out.chunks_mut(DRAWN).enumerate() {
            let first = task * CHUNK + number * DRAWN;
            let noise = &mut noise[..out.len()];
            rng.fill_uniform(first as u32, noise);
            for ((out, &x), &u) in out.iter_mut().zip(&x[first..]).zip(&*noise) {
                let y = if u < p.probability { 0.0 } else { x * kept };
                *out = if p.accumulate { *out + y } else { y };
            }
        }
    });
}
