use super::{super::differences::*, *};

fn params(len: usize, t: i32) -> AdamwParams {
    let (beta1, beta2) = (0.9f32, 0.999f32);
    AdamwParams {
        len: len as u32,
        learning_rate: 1e-3,
        beta1,
        beta2,
        eps: 1e-8,
        weight_decay: 0.01,
        correction1: 1.0 - beta1.powi(t),
        correction2: 1.0 - beta2.powi(t),
        grad_scale: 0.7,
    }
}

/// Weights, m and v after three updates, the gradient being noise.
fn three_updates(threads: usize, simd: Simd, len: usize) -> [Vec<f32>; 3] {
    let [weights, m, v] = [noise(1, len), vec![0.0; len], vec![0.0; len]].map(|x| tensor(&x, &[len]));
    let grad = tensor(&vec![0.0; len], &[len]);
    let mut team = Team::new(threads);
    for t in 1..=3 {
        // What the last update left is zero.
        grad.host_mut::<f32>().iter_mut().zip(noise(10 + t, len)).for_each(|(grad, g)| *grad += g);
        adamw(&mut team, simd, params(len, t as i32), &weights, &grad, &m, &v);
        assert!(grad.host::<f32>().iter().all(|g| g.to_bits() == 0), "the gradient is not cleared");
    }
    [&weights, &m, &v].map(|tensor| tensor.host::<f32>().to_vec())
}

#[test]
fn updates_are_those_of_f64() {
    for len in [1, 7, 54, CHUNK + 7] {
        let (start, mut weights) = (wide(&noise(1, len)), wide(&noise(1, len)));
        let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
        for t in 1..=3 {
            let p = params(len, t as i32);
            let [lr, decay, eps, beta1, beta2] =
                [p.learning_rate, p.weight_decay, p.eps, p.beta1, p.beta2].map(f64::from);
            for (i, g) in wide(&noise(10 + t, len)).iter().enumerate() {
                let g = f64::from(p.grad_scale) * g;
                m[i] = beta1 * m[i] + (1.0 - beta1) * g;
                v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
                weights[i] -= lr * decay * weights[i];
                let [m, v] = [m[i] / f64::from(p.correction1), v[i] / f64::from(p.correction2)];
                weights[i] -= lr * m / (v.sqrt() + eps);
            }
        }
        for simd in Simd::testable() {
            let found = three_updates(2, simd, len);
            for i in 0..len {
                let (moved, exact) = (f64::from(found[0][i]) - start[i], weights[i] - start[i]);
                // Three roundings of the weight, and of the step.
                let allowed = 2e-7 * start[i].abs() + 1e-8;
                assert!((moved - exact).abs() <= allowed, "{simd}, {i} of {len}: {moved} instead of {exact}");
                assert!((f64::from(found[1][i]) - m[i]).abs() <= 1e-6 * m[i].abs().max(0.1));
                assert!((f64::from(found[2][i]) - v[i]).abs() <= 1e-6 * v[i]);
            }
        }
    }
}

#[test]
fn updates_and_norms_know_neither_threads_nor_levels() {
    let len = 3 * CHUNK + 54;
    let of = |threads, simd| {
        let [a, b, c] = three_updates(threads, simd, len).map(|x| bits(&x));
        let sum = tensor(&[f32::NAN], &[1]);
        sum_of_squares(&mut Team::new(threads), simd, &tensor(&noise(4, len), &[len]), &sum);
        [a, b, c, bits(sum.host())]
    };
    let expected = of(1, Simd::Portable);
    for simd in Simd::testable() {
        for threads in [1, 2, 3] {
            assert!(of(threads, simd) == expected, "{simd}, {threads} threads");
        }
    }
}

#[test]
fn sums_of_squares_are_rounded_once() {
    for len in [0, 1, 7, 54, 2 * CHUNK + 1] {
        let x = noise(5, len);
        let exact: f64 = wide(&x).iter().map(|x| x * x).sum();
        for simd in Simd::testable() {
            let out = tensor(&[f32::NAN], &[1]);
            sum_of_squares(&mut Team::new(2), simd, &tensor(&x, &[len]), &out);
            assert_eq!(out.host::<f32>()[0], exact as f32, "{len} on {simd}");
        }
    }
}
