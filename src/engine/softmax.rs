//! The exponential that softmax over a vocabulary needs: a polynomial in plain arithmetic.
//!
//! It vectorises, which libm's does not, and it has the same bits on every platform, so that a seed's text doesn't
//! depend on whose libm the program runs with.

use std::f32::consts::LOG2_E;

/// eˣ for x ≤ 0, within 2 units in the last place; 0 below −87, where normal numbers end.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2, where ln 2 comes in two parts so that n times the first is exact; the polynomial
/// for eʳ is that of Cephes' expf.
pub(super) fn exp(x: f32) -> f32 {
    /// Adding 1.5 · 2²³ leaves the nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let bounded = x.max(-87.0);
    let shifted = bounded * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = bounded - n * (355.0 / 512.0) + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + c;
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x < -87.0 { 0.0 } else { (p * r * r + r + 1.0) * power }
}

/// Σ exp((xᵢ − max) / temperature), the additions always in the same order.
pub(super) fn sum_exp(row: &[f32], max: f32, temperature: f32) -> f64 {
    let mut lanes = [0.0f64; 8];
    for chunk in row.chunks(lanes.len()) {
        lanes.iter_mut().zip(chunk).for_each(|(lane, &x)| *lane += f64::from(exp((x - max) / temperature)));
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        for i in 0..870_000 {
            let x = -(i as f32) * 1e-4;
            let (found, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found / exact - 1.0).abs() < 2.5e-7, "exp({x}) = {found}, not {exact}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-87.1), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::MIN), 0.0);
    }

    #[test]
    fn sums() {
        let row: Vec<f32> = (0..97).map(|i| (i as f32 * 0.7).sin() * 5.0).collect();
        let exact: f64 = row.iter().map(|&x| ((f64::from(x) - 5.0) / 0.7).exp()).sum();
        assert!((sum_exp(&row, 5.0, 0.7) / exact - 1.0).abs() < 1e-6);
    }
}
