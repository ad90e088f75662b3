//! Randomness without state: Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy
//! as 1, 2, 3", SC'11).
//!
//! A number is a pure function of (seed, stream, step, index). So the same seed gives the same text whatever else is
//! in the batch, a backward pass sees its forward's noise, a resumed run goes on where it stopped, and every backend
//! draws the same numbers.

/// What the numbers are for: two purposes never share numbers.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Drawing tokens.
    Sampling = 0,
    /// Initial weights.
    Init = 1,
    /// Gumbel noise of the gates.
    Gate = 2,
    Dropout = 3,
    /// Order of training data.
    Shuffle = 4,
}

/// One sequence of numbers among those of a seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream {
    pub purpose: Purpose,
    /// Layer, parameter, or which of several answers to one request.
    pub part: u32,
}

impl Stream {
    pub const fn new(purpose: Purpose, part: u32) -> Stream {
        Stream { purpose, part }
    }
}

/// The numbers of one (seed, stream, step); `index` picks one.
#[derive(Clone, Copy, Debug)]
pub struct Rng {
    key: [u32; 2],
    stream: Stream,
    step: u32,
}

impl Rng {
    /// `step`: the token of the answer, or the update of the training run.
    pub const fn new(seed: u64, stream: Stream, step: u32) -> Rng {
        Rng { key: [seed as u32, (seed >> 32) as u32], stream, step }
    }

    fn block(&self, block: u32) -> [u32; 4] {
        philox4x32_10([block, self.step, self.stream.part, self.stream.purpose as u32], self.key)
    }

    /// 32 random bits.
    pub fn bits(&self, index: u32) -> u32 {
        self.block(index / 4)[index as usize % 4]
    }

    /// Uniform in the open interval (0, 1), a multiple of 2⁻²⁴: safe under a logarithm.
    pub fn uniform(&self, index: u32) -> f32 {
        open_unit(self.bits(index))
    }

    /// Uniform in [0, 1) with 53 bits, of its own index space's pairs: `index` uses the bits of `2·index` and
    /// `2·index + 1`.
    pub fn uniform_f64(&self, index: u32) -> f64 {
        let (block, half) = (self.block(index / 2), index as usize % 2 * 2);
        let bits = u64::from(block[half]) << 32 | u64::from(block[half + 1]);
        (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// `out[i] = uniform(start + i)`, four at a time.
    pub fn fill_uniform(&self, start: u32, out: &mut [f32]) {
        let mut current = None;
        for (index, x) in (start..).zip(out) {
            let block = match current {
                Some((number, block)) if number == index / 4 => block,
                _ => self.block(index / 4),
            };
            current = Some((index / 4, block));
            *x = open_unit(block[index as usize % 4]);
        }
    }
}

/// Normal numbers of mean 0 and deviation 1 (Box and Muller), for initial values and controls: keyed by (seed, part, index).
pub fn normal(seed: u64, part: u32, len: usize) -> Vec<f32> {
    let rng = Rng::new(seed, Stream::new(Purpose::Init, part), 1);
    let mut numbers = vec![0.0f32; len.next_multiple_of(2)];
    rng.fill_uniform(0, &mut numbers);
    for pair in numbers.chunks_exact_mut(2) {
        let radius = (-2.0 * pair[0].ln()).sqrt();
        let (sin, cos) = (std::f32::consts::TAU * pair[1]).sin_cos();
        (pair[0], pair[1]) = (radius * cos, radius * sin);
    }
    numbers.truncate(len);
    numbers
}

/// The upper 23 bits, centred in their interval.
fn open_unit(bits: u32) -> f32 {
    ((bits >> 9) as f32 + 0.5) * (1.0 / (1u32 << 23) as f32)
}

/// Philox4x32 with ten rounds: 128 counter bits and 64 key bits to 128 random bits.
pub const fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut c0, mut c1, mut c2, mut c3], [mut k0, mut k1]) = (counter, key);
    let mut round = 0;
    while round < 10 {
        let (a, b) = (0xD251_1F53 * c0 as u64, 0xCD9E_8D57 * c2 as u64);
        (c0, c1, c2, c3) = ((b >> 32) as u32 ^ c1 ^ k0, b as u32, (a >> 32) as u32 ^ c3 ^ k1, a as u32);
        (k0, k1) = (k0.wrapping_add(0x9E37_79B9), k1.wrapping_add(0xBB67_AE85));
        round += 1;
    }
    [c0, c1, c2, c3]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that come with the authors' Random123 library.
    #[test]
    fn philox_known_answers() {
        let pi = ([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]);
        for (counter, key, expected) in [
            ([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
            (pi.0, pi.1, [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]),
        ] {
            assert_eq!(philox4x32_10(counter, key), expected);
        }
    }

    #[test]
    fn uniform_is_open_and_even() {
        assert_eq!(open_unit(0), 2f32.powi(-24));
        assert_eq!(open_unit(u32::MAX), 1.0 - 2f32.powi(-24));
        let rng = Rng::new(7, Stream::new(Purpose::Gate, 3), 5);
        let mut x = vec![0.0; 100_000];
        rng.fill_uniform(1, &mut x);
        assert!(x.iter().zip(1..).all(|(&x, i)| x == rng.uniform(i)));
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / x.len() as f64;
        // Standard error of the mean is 9e-4.
        assert!((mean - 0.5).abs() < 5e-3, "{mean}");
        for tenth in 0..10 {
            let count = x.iter().filter(|&&x| (x * 10.0) as usize == tenth).count();
            assert!((9_500..10_500).contains(&count), "tenth {tenth}: {count}");
        }
    }

    #[test]
    fn every_coordinate_matters() {
        let base = (1, Stream::new(Purpose::Sampling, 0), 0);
        let draw = |(seed, stream, step): (u64, Stream, u32)| Rng::new(seed, stream, step).uniform_f64(0);
        let mut seen = vec![draw(base)];
        for other in [
            (2, base.1, 0),
            (1 << 40 | 1, base.1, 0),
            (1, Stream::new(Purpose::Gate, 0), 0),
            (1, Stream::new(Purpose::Sampling, 1), 0),
            (1, base.1, 1),
        ] {
            assert!(!seen.contains(&draw(other)), "{other:?}");
            seen.push(draw(other));
        }
        assert!(seen.iter().all(|u| (0.0..1.0).contains(u)));
    }
}
