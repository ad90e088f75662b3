//! Which vector instructions the kernels may use, found once at start.

use std::fmt;

/// In rising order: each level implies the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Simd {
    /// Plain Rust: the reference the others are tested against.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// The same and AVX512-BF16.
    Avx512Bf16,
    /// The kernels of [`Simd::Avx512Bf16`] on the instructions of `soft512`; all else as with AVX2.
    #[cfg(test)]
    Soft512,
}

impl Simd {
    /// The best level of this processor.
    pub fn detect() -> Simd {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            if avx2 && avx512 && is_x86_feature_detected!("avx512bf16") {
                return Simd::Avx512Bf16;
            }
            if avx2 && avx512 {
                return Simd::Avx512;
            }
            if avx2 {
                return Simd::Avx2;
            }
        }
        Simd::Portable
    }

    /// This level where the processor has it, else the best that it has.
    pub(super) fn or_detected(self) -> Simd {
        #[cfg(test)]
        if Simd::testable().contains(&self) {
            return self;
        }
        self.min(Simd::detect())
    }

    /// What tests run: the levels of this processor, and AVX-512 in software.
    #[cfg(test)]
    pub(super) fn testable() -> Vec<Simd> {
        let all = [Simd::Portable, Simd::Avx2, Simd::Avx512, Simd::Avx512Bf16];
        let mut levels: Vec<Simd> = all.into_iter().filter(|&level| level <= Simd::detect()).collect();
        if Simd::detect() >= Simd::Avx2 {
            levels.push(Simd::Soft512);
        }
        levels
    }
}

/// Defines a function of plain Rust that is compiled once per level, so that its loops use the level's registers, and
/// takes the level as an argument before its own. What it calls must be `#[inline(always)]`. Same results on every
/// level: nothing is contracted or reordered.
macro_rules! vectorized {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        $vis fn $name(simd: $crate::backend::cpu::Simd, $($arg: $type),*) {
            #[inline(always)]
            fn portable($($arg: $type),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2($($arg: $type),*) {
                portable($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512($($arg: $type),*) {
                portable($($arg),*)
            }
            match simd {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: a level is at most what the processor was found to have.
                $crate::backend::cpu::Simd::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                $crate::backend::cpu::Simd::Avx512 | $crate::backend::cpu::Simd::Avx512Bf16 => unsafe {
                    avx512($($arg),*)
                },
                _ => portable($($arg),*),
            }
        }
    };
}
pub(super) use vectorized;

impl fmt::Display for Simd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Simd::Portable => "portable",
            Simd::Avx2 => "AVX2",
            Simd::Avx512 => "AVX-512",
            Simd::Avx512Bf16 => "AVX-512 with BF16",
            #[cfg(test)]
            Simd::Soft512 => "AVX-512 in software",
        })
    }
}
