//! When numbers in low precision are right.

use super::{Case, Made};

/// The largest difference, and the root mean square of `b`.
fn difference(a: &[f32], b: &[f32]) -> (f64, f64) {
    let pairs = || a.iter().zip(b).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    let most =
        pairs().map(|(a, b)| if a.is_finite() { (a - b).abs() } else { f64::INFINITY }).fold(0.0, f64::max);
    let size = (pairs().map(|(_, b)| b * b).sum::<f64>() / a.len().max(1) as f64).sqrt();
    (most, size)
}

/// |ours − f32| ≤ 2 (of gradients 3) · |the same op in that precision by plain arithmetic − f32|, and an allowance for sums in another
/// order.
///
/// # Errors
/// The output that is off, and by how much.
pub fn judge(case: &Case, reference: &[Made], plain: &[Made], ours: &[Made]) -> Result<(), String> {
    /// Of the output's size: rounding of f32 sums in another order.
    const ORDER: f64 = 5e-5;
    let lengths = |made: &[Made]| made.iter().map(|made| made.values.len()).collect::<Vec<_>>();
    if reference.is_empty() || lengths(reference) != lengths(ours) || lengths(reference) != lengths(plain) {
        return Err(format!("{case:?}: outputs of other lengths"));
    }
    for ((reference, plain), ours) in reference.iter().zip(plain).zip(ours) {
        let name = &ours.name;
        if !reference.values.iter().all(|x| x.is_finite()) {
            return Err(format!("{case:?}: {name} of the reference is not finite"));
        }
        let (allowed, _) = difference(&plain.values, &reference.values);
        let (found, size) = difference(&ours.values, &reference.values);
        // A plain fuser in bf16 would round the rows between its products too, which this one in f32 does not. On the way back
        // there are twice as many.
        let times = match case.op() {
            "fuse" => 4.0,
            "fuse_backward" => 8.0,
            _ if case.trains() => 3.0,
            _ => 2.0,
        };
        // Of a few numbers the plain ones may all be exact by luck.
        let luck = if allowed > 0.0 && ours.values.len() < 32 { size / 256.0 } else { 0.0 };
        let limit = times * allowed + ORDER * size + luck;
        if found > limit {
            return Err(format!(
                "{case:?}: {name} is off by {found:.3e}, allowed are {limit:.3e} (rms {size:.3e})"
            ));
        }
    }
    Ok(())
}
