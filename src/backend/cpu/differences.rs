//! What tests of backward ops compare with: differences of the forward in f64.

use super::{Cpu, Element};
use crate::{
    backend::Tensor,
    rng::{Purpose, Rng, Stream},
};

/// Derivatives of `f` at `x` by its elements `indices`, from four-point central differences: exact to about ten digits.
pub(super) fn gradient_at(x: &[f64], indices: &[usize], mut f: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 5e-4;
    let mut x = x.to_vec();
    let derivative = |&i: &usize| {
        let center = x[i];
        let mut at = |steps: f64| {
            x[i] = center + steps * STEP;
            let y = f(&x);
            x[i] = center;
            y
        };
        (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * STEP)
    };
    indices.iter().map(derivative).collect()
}

pub(super) fn gradient(x: &[f64], f: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    gradient_at(x, &(0..x.len()).collect::<Vec<usize>>(), f)
}

/// Numbers in ±1, some far out as activations have them.
pub(super) fn noise(seed: u32, len: usize) -> Vec<f32> {
    let mut x = vec![0.0; len];
    Rng::new(20_260_101, Stream::new(Purpose::Init, seed), 0).fill_uniform(0, &mut x);
    x.iter_mut().for_each(|x| *x = 2.0 * *x - 1.0);
    x.iter_mut().skip(3).step_by(37).for_each(|x| *x *= 12.0);
    x
}

pub(super) fn tensor<T: Element>(data: &[T], dims: &[usize]) -> Tensor {
    let tensor = Cpu::allocate(T::DTYPE, dims, "test").expect("memory");
    tensor.host_mut::<T>().copy_from_slice(data);
    tensor
}

pub(super) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

pub(super) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The largest magnitude.
pub(super) fn largest(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |most: f64, x| most.max(x.abs()))
}

/// Every element of `found` within `share` of the largest of `exact`.
#[track_caller]
pub(super) fn assert_close(found: &[f32], exact: &[f64], share: f64, what: &str) {
    assert_within(found, exact, share * largest(exact).max(1e-30), what)
}

#[track_caller]
pub(super) fn assert_within(found: &[f32], exact: &[f64], allowed: f64, what: &str) {
    assert_eq!(found.len(), exact.len(), "{what}");
    for (i, (&found, exact)) in found.iter().zip(exact).enumerate() {
        let off = (f64::from(found) - exact).abs();
        assert!(
            off <= allowed,
            "{what}, element {i}: {found}, expected {exact}, off by {off:e}, allowed {allowed:e}"
        );
    }
}
