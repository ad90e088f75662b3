use super::{super::differences::*, *};

fn norm_forward(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let rows = x.chunks_exact(weight.len());
    rows.flat_map(|row| {
        let r = 1.0 / (dot(row, row) / row.len() as f64 + eps).sqrt();
        row.iter().zip(weight).map(|(x, w)| x * r * w).collect::<Vec<f64>>()
    })
    .collect()
}

struct Norm {
    rows: usize,
    cols: usize,
    x: Vec<f32>,
    weight: Vec<f32>,
    dy: Vec<f32>,
}

const OFFSET: f32 = 1.0;
const EPS: f32 = 1e-6;

impl Norm {
    fn new(rows: usize, cols: usize) -> Norm {
        let n = rows * cols;
        Norm { rows, cols, x: noise(1, n), weight: noise(2, cols), dy: noise(3, n) }
    }

    /// dx and dweight, added to the given ones or, assigned, in the memory of dy.
    fn run(
        &self,
        threads: usize,
        simd: Simd,
        output: NormOutput,
        dx: &[f32],
        dweight: &[f32],
    ) -> [Vec<f32>; 2] {
        let dims = [self.rows, self.cols];
        let (x, weight) = (tensor(&self.x, &dims), tensor(&self.weight, &[self.cols]));
        let (dy, dweight) = (tensor(&self.dy, &dims), tensor(dweight, &[self.cols]));
        let dx = if output == NormOutput::Assign { dy.clone() } else { tensor(dx, &dims) };
        let (rows, cols) = (self.rows as u32, self.cols as u32);
        let p = RmsNormParams { rows, cols, eps: EPS, offset: OFFSET, output };
        rms_norm(&mut Team::new(threads), simd, p, &x, &weight, &dy, &dx, Some(&dweight));
        [&dx, &dweight].map(|tensor| tensor.host::<f32>().to_vec())
    }
}

#[test]
fn norms_gradients_are_the_differences() {
    for (rows, cols) in [(1, 1), (1, 7), (7, 54), (67, 7), (2, 97)] {
        let norm = Norm::new(rows, cols);
        let weight: Vec<f64> = norm.weight.iter().map(|&w| f64::from(w) + f64::from(OFFSET)).collect();
        let (x, dy) = (wide(&norm.x), wide(&norm.dy));
        let dx = gradient(&x, |x| dot(&norm_forward(x, &weight, EPS.into()), &dy));
        let dweight = gradient(&weight, |weight| dot(&norm_forward(&x, weight, EPS.into()), &dy));
        // Of the two terms whose difference dx is: of few columns, nothing but rounding is left of it.
        let terms = x.chunks_exact(cols).zip(dy.chunks_exact(cols)).flat_map(|(x, dy)| {
            let r = 1.0 / (dot(x, x) / cols as f64 + f64::from(EPS)).sqrt();
            dy.iter().zip(&weight).map(|(dy, w)| r * w * dy).collect::<Vec<f64>>()
        });
        let allowed = 1e-6 * largest(&terms.collect::<Vec<f64>>());
        for simd in Simd::testable() {
            let what = format!("{rows} × {cols} on {simd}");
            let zeros = vec![0.0; cols];
            let found = norm.run(2, simd, NormOutput::Assign, &[], &zeros);
            assert_within(&found[0], &dx, allowed, &what);
            assert_close(&found[1], &dweight, 1e-6, &what);
            let (base, base_weight) = (noise(4, rows * cols), noise(5, cols));
            let added = norm.run(2, simd, NormOutput::Add, &base, &base_weight);
            let sums =
                |a: &[f32], b: &[f64]| a.iter().zip(b).map(|(&a, b)| f64::from(a) + b).collect::<Vec<f64>>();
            let size = largest(&wide(&base));
            assert_within(&added[0], &sums(&base, &dx), allowed + 1e-7 * size, &what);
            assert_close(&added[1], &sums(&base_weight, &dweight), 1e-6, &what);
        }
    }
}

#[test]
fn norms_without_a_weights_gradient_are_the_same() {
    let norm = Norm::new(7, 54);
    let expected = norm.run(2, Simd::detect(), NormOutput::Assign, &[], &[0.0; 54]);
    let (x, weight, dx) =
        (tensor(&norm.x, &[7, 54]), tensor(&norm.weight, &[54]), tensor(&norm.dy, &[7, 54]));
    let p = RmsNormParams { rows: 7, cols: 54, eps: EPS, offset: OFFSET, output: NormOutput::Assign };
    rms_norm(&mut Team::new(2), Simd::detect(), p, &x, &weight, &dx.clone(), &dx, None);
    assert_eq!(bits(dx.host::<f32>()), bits(&expected[0]));
}

#[test]
fn threads_and_levels_leave_no_trace() {
    let norm = Norm::new(150, 54);
    let expected = norm.run(1, Simd::Portable, NormOutput::Assign, &[], &[0.5; 54]).map(|x| bits(&x));
    for simd in Simd::testable() {
        for threads in [1, 2, 3] {
            let found = norm.run(threads, simd, NormOutput::Assign, &[], &[0.5; 54]).map(|x| bits(&x));
            assert_eq!(found, expected, "{simd}, {threads} threads");
        }
    }
}

/// The error function by its series, exact to f64 where |x| < 4.
fn exact_erf(x: f64) -> f64 {
    if x.abs() > 4.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..120 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}

fn exact_activation(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
        Activation::GeluErf => 0.5 * x * (1.0 + exact_erf(x / 2f64.sqrt())),
    }
}

#[test]
fn glus_gradients_are_the_differences() {
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf] {
        for (tokens, width) in [(1, 1), (7, 54), (3, 7)] {
            let gate_up = noise(6, tokens * 2 * width);
            let dout = noise(7, tokens * width);
            let forward = |x: &[f64]| {
                let rows = x.chunks_exact(2 * width).zip(dout.chunks_exact(width));
                rows.map(|(row, dout)| {
                    let (gate, up) = row.split_at(width);
                    let pairs = gate.iter().zip(up).zip(dout);
                    pairs.map(|((&g, u), &d)| f64::from(d) * u * exact_activation(activation, g)).sum::<f64>()
                })
                .sum()
            };
            let exact = gradient(&wide(&gate_up), forward);
            for simd in Simd::testable() {
                let dgate_up = tensor(&vec![f32::NAN; gate_up.len()], &[tokens, 2 * width]);
                let (x, dout) = (tensor(&gate_up, &[tokens, 2 * width]), tensor(&dout, &[tokens, width]));
                glu(&mut Team::new(2), simd, activation, &x, &dout, &dgate_up);
                assert_close(dgate_up.host(), &exact, 1e-6, &format!("{activation:?} of {width} on {simd}"));
            }
        }
    }
}

#[test]
fn slopes_far_out_are_those_of_lines() {
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf] {
        for x in [30.0, 88.0, 1e4, 1e12] {
            assert_eq!(slope(activation, x), 1.0, "{activation:?} at {x}");
            assert!(slope(activation, -x).abs() < 1e-10, "{activation:?} at −{x}");
        }
    }
}

#[test]
fn a_token_that_comes_twice_gets_both_gradients() {
    let (ids, hidden) = ([3u32, 0, 3, 2, 3], 7);
    let (dout, before) = (noise(8, 5 * hidden), noise(9, 4 * hidden));
    let dtable = tensor(&before, &[4, hidden]);
    let p = EmbedParams { tokens: 5, hidden: hidden as u32, scale: 1.5 };
    embed(p, &tensor(&ids, &[5]), &tensor(&dout, &[5, hidden]), &dtable);
    let mut exact = wide(&before);
    for (&id, row) in ids.iter().zip(dout.chunks_exact(hidden)) {
        let sums = exact[id as usize * hidden..].iter_mut().zip(row);
        sums.for_each(|(sum, &d)| *sum += 1.5 * f64::from(d));
    }
    assert_close(dtable.host(), &exact, 2e-7, "dtable");
    assert_eq!(
        dtable.host::<f32>()[hidden..2 * hidden],
        before[hidden..2 * hidden],
        "a token that does not come"
    );
}

/// Loss of each row with a label, in f64, from logits before the cap.
fn losses(x: &[f64], vocab: usize, labels: &[u32], cap: f64) -> Vec<f64> {
    let rows = x.chunks_exact(vocab).zip(labels);
    rows.map(|(row, &label)| {
        if label == IGNORED {
            return 0.0;
        }
        let capped: Vec<f64> =
            row.iter().map(|x| if cap > 0.0 { cap * (x / cap).tanh() } else { *x }).collect();
        let max = capped.iter().copied().fold(f64::MIN, f64::max);
        capped.iter().map(|x| (x - max).exp()).sum::<f64>().ln() + max - capped[label as usize]
    })
    .collect()
}

/// Loss, and the gradient that took the place of the capped logits.
fn entropy(
    threads: usize,
    simd: Simd,
    logits: &[f32],
    labels: &[u32],
    scale: f32,
    soft_cap: f32,
) -> [Vec<f32>; 2] {
    let (rows, vocab) = (labels.len(), logits.len() / labels.len());
    let logits = tensor(logits, &[rows, vocab]);
    let loss = tensor(&vec![f32::NAN; rows], &[rows]);
    let p = CrossEntropyParams { rows: rows as u32, vocab: vocab as u32, scale, soft_cap };
    cross_entropy(&mut Team::new(threads), simd, p, &logits, &tensor(labels, &[rows]), &loss);
    [&loss, &logits].map(|tensor| tensor.host::<f32>().to_vec())
}

#[test]
fn the_loss_and_its_gradient_are_those_of_f64() {
    for (rows, vocab) in [(1usize, 1usize), (7, 54), (3, 7), (2, 1500)] {
        for soft_cap in [0.0f32, 5.0] {
            let x = noise(10, rows * vocab);
            let labels: Vec<u32> =
                (0..rows).map(|row| if row % 3 == 1 { IGNORED } else { (row * 5 % vocab) as u32 }).collect();
            let exact = losses(&wide(&x), vocab, &labels, soft_cap.into());
            let scale = 0.25f32;
            let gradient = gradient(&wide(&x), |x| {
                0.25 * losses(x, vocab, &labels, soft_cap.into()).iter().sum::<f64>()
            });
            let cap = |x: &f32| if soft_cap > 0.0 { soft_cap * (x / soft_cap).tanh() } else { *x };
            let logits: Vec<f32> = x.iter().map(cap).collect();
            for simd in Simd::testable() {
                let what = format!("{rows} × {vocab}, cap {soft_cap}, on {simd}");
                let found = entropy(2, simd, &logits, &labels, scale, soft_cap);
                assert_close(&found[0], &exact, 1e-6, &what);
                // With one word nothing can be learned: the gradient is 0 but for rounding.
                if vocab > 1 {
                    assert_close(&found[1], &gradient, 1e-6, &what);
                }
                for (row, _) in labels.iter().enumerate().filter(|(_, label)| **label == IGNORED) {
                    assert_eq!(found[0][row].to_bits(), 0, "loss of an ignored row");
                    assert!(found[1][row * vocab..(row + 1) * vocab].iter().all(|x| x.to_bits() == 0));
                }
            }
        }
    }
}

#[test]
fn a_whole_vocabulary_keeps_its_digits() {
    const VOCAB: usize = 151_936;
    // Alike but for the outliers: each counts, and an f32 sum of them all would lose some.
    let logits: Vec<f32> = noise(11, VOCAB).iter().map(|x| 0.5 * x + 20.0).collect();
    let label = 77u32;
    let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    let [loss, gradient] = entropy(1, Simd::detect(), &logits, &[label], 1.0, 0.0);
    let exact = total.ln() - f64::from(logits[label as usize]);
    assert!((f64::from(loss[0]) - exact).abs() < 1e-6 * exact, "{} instead of {exact}", loss[0]);
    for (i, (&found, &x)) in gradient.iter().zip(&logits).enumerate() {
        let exact = f64::from(x).exp() / total - if i == label as usize { 1.0 } else { 0.0 };
        assert!((f64::from(found) - exact).abs() <= 1e-6 * exact.abs(), "{i}: {found} instead of {exact}");
    }
    let all: f64 = gradient.iter().map(|&x| f64::from(x)).sum();
    assert!(all.abs() < 1e-6, "gradients of a row sum to {all}");
}

#[test]
fn losses_know_neither_threads_nor_levels() {
    let (logits, labels) = (noise(12, 7 * 2100), [3, 2099, IGNORED, 0, 54, 7, 1]);
    let of = |threads, simd| entropy(threads, simd, &logits, &labels, 0.2, 13.0).map(|x| bits(&x));
    let expected = of(1, Simd::Portable);
    for simd in Simd::testable() {
        for threads in [1, 2, 3] {
            assert_eq!(of(threads, simd), expected, "{simd}, {threads} threads");
        }
    }
}
