//! Floating-point instructions against results worked out by hand: ties, subnormals, signed zeros, NaN
//! (PTX ISA, "Floating Point Instructions", "Half Precision Floating Point Instructions").

mod run;

use run::Ty::*;
use run::{check, check_body, check_mixed, d, eval, f};

const NAN: u64 = 0x7fff_ffff;
/// A NaN that is not the canonical one.
const OTHER_NAN: u64 = 0xffc1_2345;
const INF: u64 = 0x7f80_0000;
const MINUS_INF: u64 = 0xff80_0000;
const MINUS_ZERO: u64 = 0x8000_0000;
const ONE: u64 = 0x3f80_0000;
/// The smallest subnormal, the largest subnormal, the smallest normal number, the largest.
const TINY: u64 = 1;
const SUBNORMAL: u64 = 0x007f_ffff;
const NORMAL: u64 = 0x0080_0000;
const LARGEST: u64 = 0x7f7f_ffff;
/// 2⁻²⁴: half of the last place of 1.
const HALF_PLACE: u64 = 0x3380_0000;

#[test]
fn sums_round_to_even() {
    let rows = [
        [ONE, HALF_PLACE, ONE],
        [ONE + 1, HALF_PLACE, ONE + 2],
        [ONE, HALF_PLACE + 1, ONE + 1],
        [f(1.5), f(2.25), f(3.75)],
        [TINY, SUBNORMAL, NORMAL],
        [LARGEST, LARGEST, INF],
        [INF, MINUS_INF, NAN],
        [OTHER_NAN, ONE, NAN],
        [ONE, OTHER_NAN, NAN],
        [0, MINUS_ZERO, 0],
        [MINUS_ZERO, MINUS_ZERO, MINUS_ZERO],
        [ONE, f(-1.0), 0],
    ];
    check("add.f32", F32, F32, &rows);
    check("add.rn.f32", F32, F32, &rows);
    check("sub.f32", F32, F32, &[[0, 0, 0], [MINUS_ZERO, 0, MINUS_ZERO], [NORMAL, TINY, SUBNORMAL]]);
}

#[test]
fn sums_round_as_told() {
    let minus_one = f(-1.0);
    let minus_half_place = HALF_PLACE | MINUS_ZERO;
    check(
        "add.rz.f32",
        F32,
        F32,
        &[[ONE + 1, HALF_PLACE, ONE + 1], [minus_one, minus_half_place, minus_one]],
    );
    check(
        "add.rm.f32",
        F32,
        F32,
        &[
            [ONE, TINY, ONE],
            [minus_one, TINY | MINUS_ZERO, minus_one + 1],
            // x − x is −0 when rounding down.
            [ONE, minus_one, MINUS_ZERO],
            [LARGEST, LARGEST, LARGEST],
        ],
    );
    check("add.rp.f32", F32, F32, &[[ONE, TINY, ONE + 1], [minus_one, minus_half_place, minus_one]]);
    check("mul.rz.f32", F32, F32, &[[ONE + 1, ONE + 1, ONE + 2], [LARGEST, f(2.0), LARGEST]]);
    check("mul.rp.f32", F32, F32, &[[ONE + 1, ONE + 1, ONE + 3], [TINY, f(0.25), TINY]]);
    check("mul.rm.f32", F32, F32, &[[TINY | MINUS_ZERO, f(0.25), TINY | MINUS_ZERO]]);
    // 1·1 + 2⁻¹⁴⁹
    check("fma.rp.f32", F32, F32, &[[ONE, ONE, TINY, ONE + 1]]);
    check("fma.rz.f32", F32, F32, &[[ONE, ONE, TINY | MINUS_ZERO, ONE - 1]]);
    check("fma.rm.f32", F32, F32, &[[ONE, minus_one, ONE, MINUS_ZERO]]);
    check("div.rz.f32", F32, F32, &[[ONE, f(3.0), 0x3eaa_aaaa]]);
    check("div.rp.f32", F32, F32, &[[f(-1.0), f(3.0), 0xbeaa_aaaa]]);
    check("div.rm.f32", F32, F32, &[[f(-1.0), f(3.0), 0xbeaa_aaab]]);
    check("sqrt.rz.f32", F32, F32, &[[f(2.0), 0x3fb5_04f3]]);
    check("sqrt.rp.f32", F32, F32, &[[f(2.0), 0x3fb5_04f4]]);
    check("rcp.rz.f32", F32, F32, &[[f(3.0), 0x3eaa_aaaa]]);
}

#[test]
fn products() {
    check(
        "mul.f32",
        F32,
        F32,
        &[
            // (1 + 2⁻²³)² = 1 + 2⁻²² + 2⁻⁴⁶
            [ONE + 1, ONE + 1, ONE + 2],
            [TINY, f(0.5), 0],
            [TINY + 2, f(0.5), 2],
            [NORMAL, f(0.5), 0x0040_0000],
            [f(-0.0), f(5.0), MINUS_ZERO],
            [0, INF, NAN],
            [LARGEST, f(-2.0), MINUS_INF],
        ],
    );
}

#[test]
fn fused_products_round_once() {
    let rows = [
        // (1 + 2⁻²³)² − (1 + 2⁻²²) = 2⁻⁴⁶
        [ONE + 1, ONE + 1, (ONE + 2) | MINUS_ZERO, 0x2880_0000],
        [f(2.0), f(3.0), f(4.0), f(10.0)],
        [LARGEST, f(2.0), LARGEST | MINUS_ZERO, LARGEST],
        [0, INF, ONE, NAN],
        [INF, ONE, MINUS_INF, NAN],
        [OTHER_NAN, ONE, ONE, NAN],
        [MINUS_ZERO, ONE, 0, 0],
        [MINUS_ZERO, ONE, MINUS_ZERO, MINUS_ZERO],
        // A tie of the sum that the product's last bits break: 1 + 2⁻²⁴·(1 + 2⁻²³).
        [HALF_PLACE, ONE + 1, ONE, ONE + 1],
        [HALF_PLACE, ONE, ONE, ONE],
    ];
    check("fma.rn.f32", F32, F32, &rows);
    check("mad.rn.f32", F32, F32, &rows);
}

#[test]
fn subnormals_flush_only_if_told() {
    check(
        "add.ftz.f32",
        F32,
        F32,
        &[
            [SUBNORMAL, SUBNORMAL, 0],
            [SUBNORMAL | MINUS_ZERO, MINUS_ZERO, MINUS_ZERO],
            [NORMAL, NORMAL, NORMAL + NORMAL],
            // Normal operands, subnormal result: 1.25 · 2⁻¹²⁶ − 2⁻¹²⁶.
            [0x00a0_0000, 0x8080_0000, 0],
        ],
    );
    check("mul.ftz.f32", F32, F32, &[[NORMAL, f(-0.5), MINUS_ZERO], [SUBNORMAL, f(1e30), 0]]);
    check("fma.rn.ftz.f32", F32, F32, &[[SUBNORMAL, f(1e30), ONE, ONE], [NORMAL, f(0.5), 0, 0]]);
    check("abs.ftz.f32", F32, F32, &[[SUBNORMAL | MINUS_ZERO, 0]]);
    check("neg.ftz.f32", F32, F32, &[[SUBNORMAL, MINUS_ZERO]]);
    check("max.ftz.f32", F32, F32, &[[SUBNORMAL, MINUS_ZERO, 0]]);
    check_body("setp.eq.ftz.f32 %p, %a, %b; selp.u32 %d, 1, 0, %p;", B32, [F32; 3], &[[TINY, 0, 1]]);
    check_body("setp.eq.f32 %p, %a, %b; selp.u32 %d, 1, 0, %p;", B32, [F32; 3], &[[TINY, 0, 0]]);
    check("sqrt.rn.ftz.f32", F32, F32, &[[SUBNORMAL, 0]]);
    check("rcp.approx.ftz.f32", F32, F32, &[[SUBNORMAL, INF], [f(1.5e38), 0]]);
}

#[test]
fn saturation_gives_zero_to_one() {
    check(
        "add.sat.f32",
        F32,
        F32,
        &[
            [f(0.5), f(0.25), f(0.75)],
            [f(2.0), f(3.0), ONE],
            [f(-2.0), ONE, 0],
            [NAN, ONE, 0],
            [MINUS_ZERO, MINUS_ZERO, 0],
        ],
    );
    check("mul.sat.f32", F32, F32, &[[f(0.5), f(0.5), f(0.25)], [f(-1.0), f(4.0), 0]]);
    check("fma.rn.sat.f32", F32, F32, &[[f(2.0), f(2.0), f(-3.5), f(0.5)], [f(2.0), f(2.0), 0, ONE]]);
}

#[test]
fn extremes() {
    check(
        "min.f32",
        F32,
        F32,
        &[
            [ONE, f(-1.0), f(-1.0)],
            [NAN, ONE, ONE],
            [ONE, OTHER_NAN, ONE],
            [OTHER_NAN, NAN, NAN],
            [0, MINUS_ZERO, MINUS_ZERO],
            [MINUS_ZERO, 0, MINUS_ZERO],
            [TINY, NORMAL, TINY],
        ],
    );
    check(
        "max.f32",
        F32,
        F32,
        &[[ONE, f(-1.0), ONE], [NAN, f(-1.0), f(-1.0)], [0, MINUS_ZERO, 0], [MINUS_ZERO, 0, 0]],
    );
    check("min.NaN.f32", F32, F32, &[[NAN, ONE, NAN], [ONE, OTHER_NAN, NAN], [ONE, f(2.0), ONE]]);
    check("max.NaN.f32", F32, F32, &[[OTHER_NAN, ONE, NAN], [ONE, f(2.0), f(2.0)]]);
    check("min.f64", F64, F64, &[[d(1.0), d(f64::NAN), d(1.0)], [d(0.0), d(-0.0), d(-0.0)]]);
    check("max.f64", F64, F64, &[[d(1.0), d(2.0), d(2.0)]]);
}

#[test]
fn signs() {
    check("abs.f32", F32, F32, &[[f(-2.5), f(2.5)], [MINUS_ZERO, 0], [MINUS_INF, INF]]);
    check("neg.f32", F32, F32, &[[f(2.5), f(-2.5)], [0, MINUS_ZERO], [TINY, TINY | MINUS_ZERO]]);
    check("neg.f64", F64, F64, &[[d(0.0), d(-0.0)]]);
    // The first operand's sign, the second one's magnitude.
    check("copysign.f32", F32, F32, &[[f(-1.0), f(2.0), f(-2.0)], [0, f(-3.0), f(3.0)]]);
    check("copysign.f64", F64, F64, &[[d(-1.0), d(2.0), d(-2.0)]]);
}

#[test]
fn quotients_and_roots_are_exactly_rounded() {
    check(
        "div.rn.f32",
        F32,
        F32,
        &[
            [ONE, f(3.0), 0x3eaa_aaab],
            [f(2.0), f(3.0), 0x3f2a_aaab],
            [ONE, 0, INF],
            [ONE, MINUS_ZERO, MINUS_INF],
            [0, 0, NAN],
            [INF, INF, NAN],
            [NORMAL, f(2.0), 0x0040_0000],
            [TINY, f(2.0), 0],
            [3, f(2.0), 2],
        ],
    );
    check(
        "sqrt.rn.f32",
        F32,
        F32,
        &[
            [f(2.0), 0x3fb5_04f3],
            [f(9.0), f(3.0)],
            [MINUS_ZERO, MINUS_ZERO],
            [f(-1.0), NAN],
            [INF, INF],
            // √2⁻¹⁴⁹ = 2⁻⁷⁵·√2, 2⁻¹⁴⁸: 2⁻⁷⁴
            [2, 0x1a80_0000],
        ],
    );
    check(
        "rcp.rn.f32",
        F32,
        F32,
        &[[f(3.0), 0x3eaa_aaab], [MINUS_ZERO, MINUS_INF], [INF, 0], [f(4.0), f(0.25)]],
    );
    check("div.rn.f64", F64, F64, &[[d(1.0), d(3.0), 0x3fd5_5555_5555_5555]]);
    check("sqrt.rn.f64", F64, F64, &[[d(2.0), 0x3ff6_a09e_667f_3bcd]]);
    check("rcp.rn.f64", F64, F64, &[[d(3.0), 0x3fd5_5555_5555_5555]]);
}

#[test]
fn double_precision() {
    check(
        "add.f64",
        F64,
        F64,
        &[[d(1.0), d(f64::EPSILON / 2.0), d(1.0)], [d(0.1), d(0.2), 0x3fd3_3333_3333_3334]],
    );
    check("sub.rn.f64", F64, F64, &[[d(1.0), d(1.0), 0]]);
    check("mul.f64", F64, F64, &[[d(0.1), d(10.0), d(1.0)]]);
    let e = f64::EPSILON;
    check("fma.rn.f64", F64, F64, &[[d(1.0 + e), d(1.0 + e), d(-(1.0 + 2.0 * e)), d(e * e)]]);
}

/// Whether each result of the approximation is within so many last places of the truth; exact where the
/// ISA gives the result.
fn near(instruction: &str, rows: &[[u64; 2]], places: u64) {
    let operands: Vec<[u64; 3]> = rows.iter().map(|row| [row[0], 0, 0]).collect();
    for (row, found) in rows.iter().zip(eval(&format!("{instruction} %d, %a;"), F32, [F32; 3], &operands)) {
        assert!(
            found.abs_diff(row[1]) <= places,
            "{instruction} of {:#x} is {found:#x}, not {:#x}",
            row[0],
            row[1]
        );
    }
}

#[test]
fn approximations() {
    near("ex2.approx.f32", &[[f(3.0), f(8.0)], [f(-1.0), f(0.5)], [MINUS_INF, 0], [INF, INF], [0, ONE]], 0);
    near("ex2.approx.f32", &[[f(0.5), 0x3fb5_04f3], [f(-126.5), 0x005a_827a]], 2);
    near("ex2.approx.ftz.f32", &[[f(-140.0), 0], [NAN, NAN], [SUBNORMAL, ONE], [f(128.0), INF]], 0);
    near(
        "lg2.approx.f32",
        &[[f(8.0), f(3.0)], [0, MINUS_INF], [MINUS_ZERO, MINUS_INF], [INF, INF], [f(-1.0), NAN]],
        0,
    );
    near("sin.approx.f32", &[[0, 0], [MINUS_ZERO, MINUS_ZERO], [INF, NAN]], 0);
    near("sin.approx.f32", &[[f(1.0), f(0.841_470_96)]], 8);
    near("cos.approx.f32", &[[0, ONE], [INF, NAN]], 0);
    near("tanh.approx.f32", &[[0, 0], [INF, ONE], [MINUS_INF, f(-1.0)]], 0);
    near("tanh.approx.f32", &[[f(0.5), f(0.462_117_16)]], 1 << 13);
    near("rcp.approx.f32", &[[f(4.0), f(0.25)], [0, INF], [MINUS_ZERO, MINUS_INF], [INF, 0]], 0);
    near("rcp.approx.f32", &[[f(3.0), 0x3eaa_aaab]], 1);
    near(
        "rsqrt.approx.f32",
        &[[f(4.0), f(0.5)], [0, INF], [MINUS_ZERO, MINUS_INF], [f(-1.0), NAN], [INF, 0]],
        0,
    );
    near("sqrt.approx.f32", &[[f(4.0), f(2.0)], [MINUS_ZERO, MINUS_ZERO], [f(-1.0), NAN]], 0);
    check("div.approx.f32", F32, F32, &[[f(6.0), f(2.0), f(3.0)], [ONE, 0, INF], [0, 0, NAN]]);
    check("div.full.f32", F32, F32, &[[f(6.0), f(2.0), f(3.0)]]);
}

#[test]
fn comparisons_of_what_has_no_order() {
    let rows = [[ONE, f(2.0)], [f(2.0), ONE], [ONE, ONE], [NAN, ONE], [0, MINUS_ZERO]];
    for (comparison, expected) in [
        ("eq", [0, 0, 1, 0, 1]),
        ("ne", [1, 1, 0, 0, 0]),
        ("lt", [1, 0, 0, 0, 0]),
        ("le", [1, 0, 1, 0, 1]),
        ("gt", [0, 1, 0, 0, 0]),
        ("ge", [0, 1, 1, 0, 1]),
        ("equ", [0, 0, 1, 1, 1]),
        ("neu", [1, 1, 0, 1, 0]),
        ("ltu", [1, 0, 0, 1, 0]),
        ("leu", [1, 0, 1, 1, 1]),
        ("gtu", [0, 1, 0, 1, 0]),
        ("geu", [0, 1, 1, 1, 1]),
        ("num", [1, 1, 1, 0, 1]),
        ("nan", [0, 0, 0, 1, 0]),
    ] {
        let table: Vec<[u64; 3]> = rows.iter().zip(expected).map(|(row, e)| [row[0], row[1], e]).collect();
        check_body(
            &format!("setp.{comparison}.f32 %p, %a, %b; selp.u32 %d, 1, 0, %p;"),
            B32,
            [F32; 3],
            &table,
        );
    }
    check_body(
        "setp.ltu.f64 %p, %a, %b; selp.u32 %d, 1, 0, %p;",
        B32,
        [F64; 3],
        &[[d(f64::NAN), 0, 1], [d(1.0), d(2.0), 1], [d(2.0), d(1.0), 0]],
    );
}

#[test]
fn kinds_of_numbers() {
    let numbers = [ONE, INF, NAN, TINY, 0];
    for (kind, expected) in [
        ("finite", [1, 0, 0, 1, 1]),
        ("infinite", [0, 1, 0, 0, 0]),
        ("number", [1, 1, 0, 1, 1]),
        ("notanumber", [0, 0, 1, 0, 0]),
        ("subnormal", [0, 0, 0, 1, 0]),
    ] {
        let table: Vec<[u64; 2]> = numbers.iter().zip(expected).map(|(&number, e)| [number, e]).collect();
        check_body(&format!("testp.{kind}.f32 %p, %a; selp.u32 %d, 1, 0, %p;"), B32, [F32; 3], &table);
    }
}

#[test]
fn half_precision() {
    // 1, 2⁻¹¹ (half of the last place of 1), 65504 (the largest), 16 (half of its last place).
    let rows = [
        [0x3c00, 0x1000, 0x3c00],
        [0x3c01, 0x1000, 0x3c02],
        [0x7bff, 0x4c00, 0x7c00],
        [0x7bff, 0x4b80, 0x7bff],
        [0x0001, 0x03ff, 0x0400],
        [0x7c00, 0xfc00, 0x7fff],
        [0xfe01, 0x3c00, 0x7fff],
    ];
    check("add.f16", B16, B16, &rows);
    check("add.rn.f16", B16, B16, &rows);
    check("sub.f16", B16, B16, &[[0x3c00, 0x3c00, 0], [0x4000, 0x3c00, 0x3c00]]);
    check("mul.f16", B16, B16, &[[0x4000, 0x4200, 0x4600], [0x0001, 0x3800, 0], [0x0003, 0x3800, 2]]);
    // (1 + 2⁻¹⁰)² − (1 + 2⁻⁹) = 2⁻²⁰
    check("fma.rn.f16", B16, B16, &[[0x3c01, 0x3c01, 0xbc02, 0x0010]]);
    check("fma.rn.relu.f16", B16, B16, &[[0x3c00, 0xbc00, 0, 0], [0x3c00, 0x3c00, 0, 0x3c00]]);
    check("add.f16x2", B32, B32, &[[0x3c00_4000, 0x4000_4000, 0x4200_4400]]);
    check("fma.rn.f16x2", B32, B32, &[[0x4000_3c00, 0x4000_3c00, 0x3c00_0000, 0x4500_3c00]]);
    check("min.f16x2", B32, B32, &[[0x3c00_fe00, 0x4000_3c00, 0x3c00_3c00]]);
    check("max.f16", B16, B16, &[[0x8000, 0, 0], [0x7e00, 0x7e00, 0x7fff]]);
    check("max.NaN.f16", B16, B16, &[[0x7e00, 0x3c00, 0x7fff]]);
    check("neg.f16", B16, B16, &[[0x3c00, 0xbc00]]);
    check("abs.f16x2", B32, B32, &[[0xbc00_3c00, 0x3c00_3c00]]);
    check_body(
        "setp.lt.f16 %p, %a, %b; selp.u32 %d, 1, 0, %p;",
        B32,
        [B16; 3],
        &[[0x3c00, 0x4000, 1], [0x7e00, 0, 0]],
    );
    check("ex2.approx.f16", B16, B16, &[[0x4200, 0x4800]]);
    check("tanh.approx.f16", B16, B16, &[[0, 0], [0x7c00, 0x3c00]]);
}

#[test]
fn brain_floats() {
    // 1 + 2⁻⁸, half of the last place: to even.
    check(
        "fma.rn.bf16",
        B16,
        B16,
        &[
            [0x3f80, 0x3f80, 0x3b80, 0x3f80],
            [0x3f81, 0x3f80, 0x3b80, 0x3f82],
            // The product's last bits break the tie: 2⁻⁸·(1 + 2⁻⁷) + 1.
            [0x3b80, 0x3f81, 0x3f80, 0x3f81],
            [0x7f7f, 0x4000, 0, 0x7f80],
            [0x7fc1, 0x3f80, 0, 0x7fff],
        ],
    );
    check("fma.rn.relu.bf16", B16, B16, &[[0xbf80, 0x3f80, 0, 0]]);
    check("fma.rn.bf16x2", B32, B32, &[[0x3f80_4000, 0x4000_4000, 0x0000_3f80, 0x4000_40a0]]);
    check("add.bf16", B16, B16, &[[0x3f80, 0x3b80, 0x3f80], [0x3f80, 0x4000, 0x4040]]);
    check("mul.bf16x2", B32, B32, &[[0x3f80_4000, 0x4000_4040, 0x4000_40c0]]);
    check("sub.bf16", B16, B16, &[[0x4040, 0x3f80, 0x4000]]);
    check("min.bf16", B16, B16, &[[0x3f80, 0xbf80, 0xbf80], [0x7fc0, 0x3f80, 0x3f80]]);
    check("max.bf16x2", B32, B32, &[[0x3f80_bf80, 0x4000_0000, 0x4000_0000]]);
    check("neg.bf16x2", B32, B32, &[[0x3f80_bf80, 0xbf80_3f80]]);
    check("abs.bf16", B16, B16, &[[0xbf80, 0x3f80]]);
    check("ex2.approx.ftz.bf16", B16, B16, &[[0x4040, 0x4100]]);
    check_mixed("set.lt.u32.bf16", B32, [B16; 3], &[[0x3f80, 0x4000, 0xffff_ffff], [0x4000, 0x3f80, 0]]);
}
