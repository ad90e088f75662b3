//! `cvt` against results worked out by hand: rounding, clamping, NaN, widths (PTX ISA, "Data Movement and
//! Conversion Instructions: cvt").

mod run;

use run::Ty::*;
use run::{check, check_body, check_mixed, d, f, neg};

const ONES: u64 = 0xffff_ffff;
const TOP: u64 = 0x8000_0000;

#[test]
fn floats_to_whole_numbers() {
    let to = |instruction: &str, rows: &[[u64; 2]]| check_mixed(instruction, B32, [F32; 3], rows);
    to("cvt.rni.s32.f32", &[[f(2.5), 2], [f(3.5), 4], [f(-2.5), neg(-2)], [f(0.49), 0]]);
    to("cvt.rzi.s32.f32", &[[f(2.9), 2], [f(-2.9), neg(-2)]]);
    to("cvt.rmi.s32.f32", &[[f(2.9), 2], [f(-2.1), neg(-3)]]);
    to("cvt.rpi.s32.f32", &[[f(2.1), 3], [f(-2.9), neg(-2)]]);
    // Beyond the range: its end. NaN: 0.
    to(
        "cvt.rzi.s32.f32",
        &[
            [f(3e9), 0x7fff_ffff],
            [f(-3e9), TOP],
            [f(f32::INFINITY), 0x7fff_ffff],
            [f(f32::NEG_INFINITY), TOP],
            [f(f32::NAN), 0],
            [1, 0],
        ],
    );
    to("cvt.rzi.u32.f32", &[[f(-1.0), 0], [f(5e9), ONES], [f(3e9), 3_000_000_000], [f(f32::NAN), 0]]);
    to("cvt.rzi.ftz.u32.f32", &[[f(7.7), 7]]);
    check_mixed(
        "cvt.rzi.s64.f32",
        B64,
        [F32; 3],
        &[[f(-3e9), neg(-3_000_000_000)], [f(1e30), i64::MAX as u64]],
    );
    check_mixed("cvt.rzi.u64.f64", B64, [F64; 3], &[[d(1e19), 10_000_000_000_000_000_000], [d(-1.0), 0]]);
    check_mixed("cvt.rni.s32.f64", B32, [F64; 3], &[[d(-0.5), 0], [d(1.5), 2], [d(1e10), 0x7fff_ffff]]);
    check_mixed("cvt.rzi.s16.f32", B16, [F32; 3], &[[f(40000.0), 0x7fff], [f(-5.5), 0xfffb]]);
    check_mixed("cvt.rzi.u16.f32", B16, [F32; 3], &[[f(40000.0), 40000], [f(70000.0), 0xffff]]);
    check_mixed("cvt.rni.s32.f16", B32, [B16; 3], &[[0x4100, 2], [0xc300, neg(-4)]]);
    check_mixed("cvt.rzi.u8.f32", B32, [F32; 3], &[[f(300.0), 255], [f(-5.0), 0], [f(77.7), 77]]);
    check_mixed(
        "cvt.rni.s8.f32",
        B32,
        [F32; 3],
        &[[f(300.0), 127], [f(-300.0), neg(-128)], [f(-5.0), neg(-5)]],
    );
}

#[test]
fn whole_numbers_to_floats() {
    // 2²⁴ + 1 lies between two floats.
    check_mixed(
        "cvt.rn.f32.s32",
        F32,
        [B32; 3],
        &[
            [16_777_217, 0x4b80_0000],
            [16_777_219, 0x4b80_0002],
            [neg(-1), f(-1.0)],
            [TOP, f(-2_147_483_648.0)],
            [0, 0],
        ],
    );
    check_mixed("cvt.rz.f32.s32", F32, [B32; 3], &[[16_777_219, 0x4b80_0001]]);
    check_mixed("cvt.rp.f32.u32", F32, [B32; 3], &[[16_777_217, 0x4b80_0001], [ONES, f(4_294_967_296.0)]]);
    check_mixed("cvt.rm.f32.u32", F32, [B32; 3], &[[ONES, 0x4f7f_ffff]]);
    check_mixed("cvt.rn.f32.u64", F32, [B64; 3], &[[u64::MAX, f(18_446_744_073_709_551_616.0)]]);
    check_mixed(
        "cvt.rn.f64.s64",
        F64,
        [B64; 3],
        &[[neg(-5), d(-5.0)], [(1 << 53) + 1, d(9_007_199_254_740_992.0)]],
    );
    check_mixed("cvt.rn.f64.u32", F64, [B32; 3], &[[ONES, d(4_294_967_295.0)]]);
    check_mixed("cvt.rn.f32.s16", F32, [B16; 3], &[[0xffff, f(-1.0)]]);
    check_mixed("cvt.rn.f32.u16", F32, [B16; 3], &[[0xffff, f(65535.0)]]);
    check_mixed("cvt.rn.f32.s8", F32, [B32; 3], &[[0x80, f(-128.0)], [0x1ff, f(-1.0)]]);
    check_mixed("cvt.rn.f32.u8", F32, [B32; 3], &[[0x1ff, f(255.0)]]);
    check_mixed("cvt.rn.f16.s32", B16, [B32; 3], &[[2049, 0x6800], [neg(-3), 0xc200], [100_000, 0x7c00]]);
    check_mixed("cvt.rz.f16.u32", B16, [B32; 3], &[[100_000, 0x7bff]]);
}

#[test]
fn floats_to_whole_floats() {
    check("cvt.rni.f32.f32", F32, F32, &[[f(2.5), f(2.0)], [f(-0.4), f(-0.0)], [f(1e30), f(1e30)]]);
    check("cvt.rzi.f32.f32", F32, F32, &[[f(-2.9), f(-2.0)]]);
    check("cvt.rmi.f32.f32", F32, F32, &[[f(-2.1), f(-3.0)], [f(2.9), f(2.0)]]);
    check("cvt.rpi.f32.f32", F32, F32, &[[f(2.1), f(3.0)], [f(-0.5), f(-0.0)]]);
    check("cvt.rpi.f64.f64", F64, F64, &[[d(2.1), d(3.0)]]);
    check("cvt.sat.f32.f32", F32, F32, &[[f(2.0), f(1.0)], [f(-2.0), 0], [f(f32::NAN), 0], [f(0.3), f(0.3)]]);
    check("cvt.ftz.f32.f32", F32, F32, &[[1, 0], [TOP | 1, TOP]]);
}

#[test]
fn between_single_and_double() {
    check_mixed(
        "cvt.rn.f32.f64",
        F32,
        [F64; 3],
        &[
            [d(1.0 + 2f64.powi(-24)), f(1.0)],
            [d(1.0 + 3.0 * 2f64.powi(-24)), 0x3f80_0002],
            [d(1e300), f(f32::INFINITY)],
            [d(2f64.powi(-149)), 1],
            [d(2f64.powi(-150)), 0],
            [d(f64::NAN), 0x7fff_ffff],
            [d(-0.0), TOP],
        ],
    );
    check_mixed(
        "cvt.rz.f32.f64",
        F32,
        [F64; 3],
        &[[d(1e300), 0x7f7f_ffff], [d(1.0 + 2f64.powi(-23) * 1.5), 0x3f80_0001]],
    );
    check_mixed(
        "cvt.rp.f32.f64",
        F32,
        [F64; 3],
        &[[d(1.0 + 2f64.powi(-50)), 0x3f80_0001], [d(-1e300), 0xff7f_ffff]],
    );
    check_mixed("cvt.f64.f32", F64, [F32; 3], &[[f(0.1), d(f64::from(0.1f32))], [1, d(2f64.powi(-149))]]);
}

#[test]
fn halves() {
    check_mixed(
        "cvt.rn.f16.f32",
        B16,
        [F32; 3],
        &[
            [f(65519.0), 0x7bff],
            [f(65520.0), 0x7c00],
            [f(2f32.powi(-24)), 1],
            [f(2f32.powi(-25)), 0],
            [f(2f32.powi(-25)) + 1, 1],
            [f(-1.5), 0xbe00],
            [f(f32::NAN), 0x7fff],
            // 1 + 2⁻¹¹ and 1 + 3·2⁻¹¹: ties.
            [0x3f80_1000, 0x3c00],
            [0x3f80_3000, 0x3c02],
        ],
    );
    check_mixed("cvt.rz.f16.f32", B16, [F32; 3], &[[f(65520.0), 0x7bff], [0x3f80_3000, 0x3c01]]);
    check_mixed(
        "cvt.f32.f16",
        F32,
        [B16; 3],
        &[[0x3c00, f(1.0)], [1, f(2f32.powi(-24))], [0x83ff, 0xb87f_c000], [0xfc00, f(f32::NEG_INFINITY)]],
    );
    check_mixed("cvt.f64.f16", F64, [B16; 3], &[[0x3555, d(0.333_251_953_125)]]);
    check_mixed("cvt.rn.f16.f64", B16, [F64; 3], &[[d(1.0 + 2f64.powi(-11) + 2f64.powi(-40)), 0x3c01]]);
    check("cvt.rni.f16.f16", B16, B16, &[[0x4100, 0x4000]]);
}

#[test]
fn brain_floats() {
    check_mixed(
        "cvt.rn.bf16.f32",
        B16,
        [F32; 3],
        &[
            [0x3f80_8000, 0x3f80],
            [0x3f81_8000, 0x3f82],
            [0x3f80_8001, 0x3f81],
            [0x7f7f_ffff, 0x7f80],
            [f(f32::NAN), 0x7fff],
            [0xffc1_2345, 0x7fff],
            [0x0000_8000, 0],
            [0x0001_8000, 2],
            [0x8000_0000, 0x8000],
        ],
    );
    check_mixed("cvt.rz.bf16.f32", B16, [F32; 3], &[[0x3f81_ffff, 0x3f81], [0x7f7f_ffff, 0x7f7f]]);
    check_mixed("cvt.rn.relu.bf16.f32", B16, [F32; 3], &[[f(-1.0), 0], [f(1.0), 0x3f80]]);
    check_mixed("cvt.f32.bf16", F32, [B16; 3], &[[0x3f81, 0x3f81_0000]]);
    // The first operand goes to the upper half.
    check_mixed(
        "cvt.rn.bf16x2.f32",
        B32,
        [F32; 3],
        &[[f(1.0), f(-2.0), 0x3f80_c000], [0x3f80_8000, 0x3f81_8000, 0x3f80_3f82]],
    );
    check_mixed("cvt.rn.relu.bf16x2.f32", B32, [F32; 3], &[[f(1.0), f(-2.0), 0x3f80_0000]]);
    check_mixed("cvt.rz.bf16x2.f32", B32, [F32; 3], &[[0x3f80_ffff, 0x3f81_ffff, 0x3f80_3f81]]);
    check_mixed("cvt.rn.f16x2.f32", B32, [F32; 3], &[[f(1.0), f(-2.0), 0x3c00_c000]]);
    check_mixed("cvt.rz.f16x2.f32", B32, [F32; 3], &[[f(65520.0), f(1.0), 0x7bff_3c00]]);
}

#[test]
fn nineteen_bits() {
    // Ties away from zero at the last of ten fraction bits.
    check_mixed(
        "cvt.rna.tf32.f32",
        B32,
        [F32; 3],
        &[
            [0x3f80_1000, 0x3f80_2000],
            [0x3f80_0fff, 0x3f80_0000],
            [0xbf80_1000, 0xbf80_2000],
            [0x3f80_3000, 0x3f80_4000],
        ],
    );
}

#[test]
fn widths() {
    check_mixed("cvt.u32.u64", B32, [B64; 3], &[[0x1_2345_6789, 0x2345_6789]]);
    check_mixed("cvt.s64.s32", B64, [B32; 3], &[[ONES, u64::MAX], [5, 5]]);
    check_mixed("cvt.u64.u32", B64, [B32; 3], &[[ONES, ONES]]);
    check_mixed("cvt.u16.u32", B16, [B32; 3], &[[0x12345, 0x2345]]);
    check_mixed("cvt.s32.s16", B32, [B16; 3], &[[0x8000, neg(-32768)]]);
    check_mixed("cvt.u32.u16", B32, [B16; 3], &[[0x8000, 0x8000]]);
    check_mixed("cvt.s64.s16", B64, [B16; 3], &[[0xffff, u64::MAX]]);
    // Narrower types stand in wider registers: their low bits count, and a result is extended by its type.
    check("cvt.u32.u8", B32, B32, &[[0x1ff, 0xff]]);
    check("cvt.s32.s8", B32, B32, &[[0x180, neg(-128)], [0x7f, 0x7f]]);
    check("cvt.s8.s32", B32, B32, &[[0x1ff, ONES], [0x17f, 0x7f]]);
    check("cvt.u8.u32", B32, B32, &[[0x1ff, 0xff]]);
    check("cvt.s16.s8", B16, B16, &[[0x0080, 0xff80]]);
}

#[test]
fn saturated_widths() {
    check("cvt.sat.u8.s32", B32, B32, &[[300, 255], [neg(-5), 0], [77, 77]]);
    check("cvt.sat.s8.s32", B32, B32, &[[300, 127], [neg(-300), neg(-128)], [neg(-5), neg(-5)]]);
    check("cvt.sat.u32.s32", B32, B32, &[[neg(-1), 0], [5, 5]]);
    check("cvt.sat.s32.u32", B32, B32, &[[ONES, 0x7fff_ffff]]);
    check_mixed("cvt.sat.s32.s64", B32, [B64; 3], &[[1 << 40, 0x7fff_ffff], [neg(-(1 << 40)), TOP]]);
    check_mixed("cvt.sat.u16.s32", B16, [B32; 3], &[[70000, 0xffff], [neg(-1), 0]]);
}

#[test]
fn four_bytes_at_once() {
    // The saturated a in byte 1, b in byte 0, the low half of c above them.
    check_body(
        "cvt.pack.sat.u8.s32.b32 %d, %a, %b, %c;",
        B32,
        [B32; 3],
        &[[300, neg(-1), 0x1234, 0x1234_ff00]],
    );
}
