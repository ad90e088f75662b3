//! Integer, logic and comparison instructions against results worked out by hand (PTX ISA, "Integer
//! Arithmetic", "Extended-Precision Integer Arithmetic", "Comparison and Selection", "Logic and Shift").

mod run;

use run::Ty::*;
use run::{check, check_body, check_mixed, f, neg};

const TOP: u64 = 0x8000_0000;
const ONES: u64 = 0xffff_ffff;
const TOP64: u64 = 1 << 63;

#[test]
fn sums_wrap_around() {
    check("add.u32", B32, B32, &[[ONES, 1, 0], [7, 8, 15], [TOP, TOP, 0]]);
    check("add.s32", B32, B32, &[[0x7fff_ffff, 1, TOP]]);
    check("sub.u32", B32, B32, &[[0, 1, ONES], [9, 4, 5]]);
    check("add.u16", B16, B16, &[[0xffff, 2, 1]]);
    check("sub.s16", B16, B16, &[[0x8000, 1, 0x7fff]]);
    check("add.s64", B64, B64, &[[u64::MAX, 1, 0], [ONES, 1, 1 << 32]]);
    check("sub.s64", B64, B64, &[[0, 1, u64::MAX]]);
}

#[test]
fn sums_saturate() {
    check(
        "add.sat.s32",
        B32,
        B32,
        &[[0x7fff_ffff, 1, 0x7fff_ffff], [TOP, ONES, TOP], [5, 6, 11], [ONES, 1, 0]],
    );
    check("sub.sat.s32", B32, B32, &[[TOP, 1, TOP], [0x7fff_ffff, ONES, 0x7fff_ffff], [3, 5, neg(-2)]]);
}

#[test]
fn carries_go_from_one_word_to_the_next() {
    // 128-bit sum of (1<<32 | 0xffffffff) parts: low words carry, high words take it.
    check_body(
        "add.cc.u32 %j, %a, %b; addc.u32 %d, %c, 0;",
        B32,
        [B32; 3],
        &[[ONES, 1, 7, 8], [ONES, 0, 7, 7], [TOP, TOP, ONES, 0], [1, 2, 3, 3]],
    );
    check_body(
        "sub.cc.u32 %j, %a, %b; subc.u32 %d, %c, 0;",
        B32,
        [B32; 3],
        &[[0, 1, 7, 6], [1, 1, 7, 7], [5, 6, 0, ONES]],
    );
    check_body(
        "add.cc.u32 %j, %a, %b; addc.cc.u32 %k, %c, %c; addc.u32 %d, 0, 0;",
        B32,
        [B32; 3],
        &[[ONES, 1, TOP, 1], [1, 1, TOP, 1], [ONES, 1, 0x7fff_ffff, 0]],
    );
    // mad.lo.cc's carry is that of its sum: 0x10000·0x10000 has low word 0.
    check_body(
        "mad.lo.cc.u32 %j, %a, %b, %c; addc.u32 %d, 0, 0;",
        B32,
        [B32; 3],
        &[[ONES, ONES, ONES, 1], [0x10000, 0x10000, ONES, 0], [2, TOP, 1, 0]],
    );
    check_body(
        "add.cc.u64 %x, %a, %b; addc.u64 %d, %c, 0;",
        B64,
        [B64; 3],
        &[[u64::MAX, 1, 7, 8], [TOP64, 1, 7, 7]],
    );
}

#[test]
fn products() {
    check("mul.lo.u32", B32, B32, &[[0x10001, 0x10001, 0x20001], [ONES, ONES, 1]]);
    check("mul.hi.u32", B32, B32, &[[ONES, ONES, 0xffff_fffe], [TOP, 2, 1], [3, 5, 0]]);
    check("mul.hi.s32", B32, B32, &[[ONES, ONES, 0], [TOP, 2, ONES], [TOP, TOP, 0x4000_0000]]);
    check_mixed("mul.wide.u32", B64, [B32; 3], &[[ONES, ONES, 0xffff_fffe_0000_0001]]);
    check_mixed("mul.wide.s32", B64, [B32; 3], &[[ONES, 2, neg(-2)], [TOP, TOP, 1 << 62], [3, 4, 12]]);
    check_mixed("mul.wide.u16", B32, [B16; 3], &[[0xffff, 0xffff, 0xfffe_0001]]);
    check_mixed("mul.wide.s16", B32, [B16; 3], &[[0xffff, 2, neg(-2)], [0x8000, 0x8000, 0x4000_0000]]);
    check("mul.lo.s16", B16, B16, &[[0x101, 0x101, 0x201]]);
    check("mul.hi.u16", B16, B16, &[[0xffff, 0xffff, 0xfffe]]);
    check("mul.hi.s16", B16, B16, &[[0x8000, 2, 0xffff]]);
    check("mul.lo.s64", B64, B64, &[[neg(-3), 5, neg(-15)], [1 << 40, 1 << 30, 0]]);
    check("mul.hi.u64", B64, B64, &[[u64::MAX, u64::MAX, u64::MAX - 1], [1 << 40, 1 << 30, 64]]);
    check("mul.hi.s64", B64, B64, &[[u64::MAX, 5, u64::MAX], [TOP64, TOP64, 1 << 62]]);
    check("mul24.lo.u32", B32, B32, &[[0xff00_0003, 0x0100_0005, 15], [0xff_ffff, 0xff_ffff, 0xfe00_0001]]);
    check("mul24.hi.u32", B32, B32, &[[0xff_ffff, 0xff_ffff, 0xffff_fe00]]);
    check("mul24.lo.s32", B32, B32, &[[0x00ff_ffff, 3, neg(-3)]]);
}

#[test]
fn products_with_a_sum() {
    check("mad.lo.s32", B32, B32, &[[neg(-3), 7, 1, neg(-20)], [ONES, ONES, ONES, 0]]);
    check("mad.hi.u32", B32, B32, &[[ONES, ONES, 3, 1]]);
    check("mad.hi.s32", B32, B32, &[[TOP, 2, 5, 4]]);
    check("mad.hi.sat.s32", B32, B32, &[[TOP, TOP, 0x7fff_ffff, 0x7fff_ffff], [TOP, 2, 5, 4]]);
    check_mixed("mad.wide.s32", B64, [B32, B32, B64], &[[ONES, 2, 1, neg(-1)], [3, 4, TOP64, TOP64 + 12]]);
    check_mixed("mad.wide.u32", B64, [B32, B32, B64], &[[ONES, 2, 1, 0x1_ffff_ffff]]);
    check_mixed("mad.wide.u16", B32, [B16, B16, B32], &[[0xffff, 2, 1, 0x1_ffff]]);
    check("mad.lo.s64", B64, B64, &[[neg(-3), 7, 1, neg(-20)]]);
    check("mad24.lo.u32", B32, B32, &[[0xff00_0003, 5, 1, 16]]);
    check("sad.u32", B32, B32, &[[3, 10, 100, 107], [10, 3, 100, 107], [ONES, 0, 1, 0]]);
    check("sad.s32", B32, B32, &[[neg(-3), 4, 100, 107], [4, neg(-3), 0, 7]]);
}

#[test]
fn quotients_and_rests() {
    check("div.u32", B32, B32, &[[ONES, 2, 0x7fff_ffff], [7, 7, 1], [6, 7, 0]]);
    check("div.s32", B32, B32, &[[neg(-7), 2, neg(-3)], [7, neg(-2), neg(-3)], [TOP, ONES, TOP]]);
    check("rem.u32", B32, B32, &[[ONES, 10, 5], [6, 7, 6]]);
    check("rem.s32", B32, B32, &[[neg(-7), 2, neg(-1)], [7, neg(-2), 1], [TOP, ONES, 0]]);
    check("div.s64", B64, B64, &[[neg(-7), 2, neg(-3)], [1 << 40, 1 << 20, 1 << 20]]);
    check("rem.u64", B64, B64, &[[u64::MAX, 10, 5]]);
    check("div.u16", B16, B16, &[[0xffff, 2, 0x7fff]]);
    check("div.s16", B16, B16, &[[0xfff9, 2, 0xfffd]]);
    check("rem.s16", B16, B16, &[[0xfff9, 2, 0xffff]]);
}

#[test]
fn extremes_and_signs() {
    check("min.u32", B32, B32, &[[ONES, 1, 1], [2, 3, 2]]);
    check("min.s32", B32, B32, &[[ONES, 1, ONES], [TOP, 0x7fff_ffff, TOP]]);
    check("max.u32", B32, B32, &[[ONES, 1, ONES]]);
    check("max.s32", B32, B32, &[[ONES, 1, 1]]);
    check("min.s16", B16, B16, &[[0xffff, 1, 0xffff]]);
    check("max.u16", B16, B16, &[[0xffff, 1, 0xffff]]);
    check("min.s64", B64, B64, &[[u64::MAX, 1, u64::MAX]]);
    check("max.u64", B64, B64, &[[u64::MAX, 1, u64::MAX]]);
    check("abs.s32", B32, B32, &[[neg(-5), 5], [5, 5], [TOP, TOP]]);
    check("abs.s64", B64, B64, &[[neg(-5), 5], [TOP64, TOP64]]);
    check("neg.s32", B32, B32, &[[5, neg(-5)], [0, 0], [TOP, TOP]]);
    check("neg.s16", B16, B16, &[[5, 0xfffb]]);
    check("neg.s64", B64, B64, &[[5, neg(-5)]]);
}

#[test]
fn bit_by_bit() {
    check("and.b32", B32, B32, &[[0b1100, 0b1010, 0b1000]]);
    check("or.b32", B32, B32, &[[0b1100, 0b1010, 0b1110]]);
    check("xor.b32", B32, B32, &[[0b1100, 0b1010, 0b0110]]);
    check("not.b32", B32, B32, &[[0, ONES], [0xf0f0_f0f0, 0x0f0f_0f0f]]);
    check("and.b16", B16, B16, &[[0xff0f, 0xf0ff, 0xf00f]]);
    check("not.b16", B16, B16, &[[0xff00, 0x00ff]]);
    check("xor.b64", B64, B64, &[[u64::MAX, 1, u64::MAX - 1]]);
    check("not.b64", B64, B64, &[[0, u64::MAX]]);
    check("cnot.b32", B32, B32, &[[0, 1], [1, 0], [TOP, 0]]);
    // The table's entry is a·4 + b·2 + c: 0x96 is a ^ b ^ c, 0xe8 the majority, 0xca a ? b : c.
    let (a, b, c) = (0xf0f0, 0xcccc, 0xaaaa);
    check_body("lop3.b32 %d, %a, %b, %c, 0x96;", B32, [B32; 3], &[[a, b, c, a ^ b ^ c]]);
    check_body("lop3.b32 %d, %a, %b, %c, 0xe8;", B32, [B32; 3], &[[a, b, c, 0xe8e8]]);
    check_body("lop3.b32 %d, %a, %b, %c, 0xca;", B32, [B32; 3], &[[a, b, c, 0xcaca]]);
    check_body("lop3.b32 %d, %a, %b, %c, 0x01;", B32, [B32; 3], &[[0, 0, 0, ONES], [1, 0, 0, ONES - 1]]);
}

#[test]
fn shifts_beyond_the_width() {
    check_mixed("shl.b32", B32, [B32; 3], &[[1, 31, TOP], [1, 32, 0], [1, ONES, 0], [ONES, 4, 0xffff_fff0]]);
    check_mixed("shr.u32", B32, [B32; 3], &[[TOP, 31, 1], [TOP, 32, 0], [TOP, 0x100, 0]]);
    check_mixed("shr.s32", B32, [B32; 3], &[[TOP, 31, ONES], [TOP, 99, ONES], [0x7fff_ffff, 32, 0]]);
    check_mixed("shl.b64", B64, [B64, B32, B32], &[[1, 63, TOP64], [1, 64, 0], [1, 0x1_0000, 0]]);
    check_mixed("shr.u64", B64, [B64, B32, B32], &[[TOP64, 63, 1], [TOP64, 64, 0]]);
    check_mixed("shr.s64", B64, [B64, B32, B32], &[[TOP64, 62, neg(-2)], [TOP64, 200, u64::MAX]]);
    check_mixed("shl.b16", B16, [B16, B32, B32], &[[1, 15, 0x8000], [1, 16, 0]]);
    check_mixed("shr.s16", B16, [B16, B32, B32], &[[0x8000, 15, 0xffff], [0x8000, 40, 0xffff]]);
    check_mixed("shr.u16", B16, [B16, B32, B32], &[[0x8000, 15, 1], [0x8000, 16, 0]]);
}

#[test]
fn funnel_shifts() {
    let (low, high) = (0x89ab_cdef, 0x0123_4567);
    check("shf.l.wrap.b32", B32, B32, &[[low, high, 8, 0x2345_6789], [low, high, 40, 0x2345_6789]]);
    check("shf.l.clamp.b32", B32, B32, &[[low, high, 8, 0x2345_6789], [low, high, 40, low]]);
    check("shf.r.wrap.b32", B32, B32, &[[low, high, 8, 0x6789_abcd], [low, high, 32, low]]);
    check("shf.r.clamp.b32", B32, B32, &[[low, high, 8, 0x6789_abcd], [low, high, 33, high]]);
}

#[test]
fn permuted_bytes() {
    let (a, b) = (0x3322_1100, 0x7766_5544);
    check(
        "prmt.b32",
        B32,
        B32,
        &[
            [a, b, 0x3210, a],
            [a, b, 0x7654, b],
            [a, b, 0x0123, 0x0011_2233],
            [a, b, 0x5410, 0x5544_1100],
            // The high bit of a nibble spreads the byte's sign.
            [0x0000_80ff, b, 0x9898, 0xffff_ffff],
            [0x0000_7fff, b, 0x9898, 0x00ff_00ff],
        ],
    );
    check("prmt.b32.f4e", B32, B32, &[[a, b, 0, a], [a, b, 1, 0x4433_2211], [a, b, 3, 0x6655_4433]]);
    check("prmt.b32.b4e", B32, B32, &[[a, b, 0, 0x5566_7700], [a, b, 3, 0x0011_2233]]);
    check("prmt.b32.rc8", B32, B32, &[[a, b, 2, 0x2222_2222]]);
    check("prmt.b32.ecl", B32, B32, &[[a, b, 1, 0x3322_1111], [a, b, 3, 0x3333_3333]]);
    check("prmt.b32.ecr", B32, B32, &[[a, b, 1, 0x1111_1100], [a, b, 2, 0x2222_1100]]);
    check("prmt.b32.rc16", B32, B32, &[[a, b, 0, 0x1100_1100], [a, b, 1, 0x3322_3322]]);
}

#[test]
fn bit_fields() {
    check(
        "bfe.u32",
        B32,
        B32,
        &[
            [0xabcd_1234, 8, 8, 0x12],
            [0xabcd_1234, 28, 8, 0xa],
            [0xabcd_1234, 32, 8, 0],
            [ONES, 0, 0, 0],
            [ONES, 0, 32, ONES],
            // Only the low eight bits of place and length count.
            [0xabcd_1234, 0x108, 0x108, 0x12],
        ],
    );
    check(
        "bfe.s32",
        B32,
        B32,
        &[
            [0x0000_8000, 8, 8, 0xffff_ff80],
            [0x0000_7f00, 8, 8, 0x7f],
            // Beyond the top the sign is the top bit.
            [TOP, 28, 8, 0xffff_fff8],
            [TOP, 40, 4, ONES],
            [ONES, 3, 0, 0],
        ],
    );
    check_mixed("bfe.u64", B64, [B64, B32, B32], &[[0xab << 40, 40, 8, 0xab]]);
    check_mixed("bfe.s64", B64, [B64, B32, B32], &[[0x80 << 40, 40, 8, neg(-128)]]);
    check_body(
        "mov.u32 %j, 8; bfi.b32 %d, %a, %b, %c, %j;",
        B32,
        [B32; 3],
        &[[0x1ff, 0, 8, 0xff00], [0, ONES, 4, 0xffff_f00f], [0xff, 0, 28, 0xf000_0000], [0xff, 5, 32, 5]],
    );
    check_body("mov.u32 %j, 0; bfi.b32 %d, %a, %b, %c, %j;", B32, [B32; 3], &[[ONES, 5, 4, 5]]);
    check_body(
        "mov.u32 %j, 4; bfi.b64 %d, %a, %b, %c, %j;",
        B64,
        [B64, B64, B32],
        &[[0xf, 0, 60, 0xf << 60]],
    );
}

#[test]
fn counted_bits() {
    check("popc.b32", B32, B32, &[[0, 0], [ONES, 32], [0x1010_0001, 3]]);
    check_mixed("popc.b64", B32, [B64; 3], &[[u64::MAX, 64]]);
    check("clz.b32", B32, B32, &[[0, 32], [1, 31], [ONES, 0]]);
    check_mixed("clz.b64", B32, [B64; 3], &[[0, 64], [1, 63]]);
    check("brev.b32", B32, B32, &[[1, TOP], [0x0000_00f1, 0x8f00_0000]]);
    check("brev.b64", B64, B64, &[[1, TOP64]]);
    check("bfind.u32", B32, B32, &[[0, ONES], [1, 0], [TOP, 31]]);
    check("bfind.s32", B32, B32, &[[0, ONES], [ONES, ONES], [TOP, 30], [5, 2]]);
    check("bfind.shiftamt.u32", B32, B32, &[[1, 31], [TOP, 0], [0, ONES]]);
    check_mixed("bfind.u64", B32, [B64; 3], &[[TOP64, 63]]);
    check("bmsk.clamp.b32", B32, B32, &[[4, 8, 0xff0], [28, 8, 0xf000_0000], [0, 0, 0], [33, 4, 0]]);
}

#[test]
fn dot_products() {
    // (1, 2, 3, −1)·(1, 1, 1, 1) and as unsigned bytes.
    check("dp4a.s32.s32", B32, B32, &[[0xff03_0201, 0x0101_0101, 10, 15]]);
    check("dp4a.u32.u32", B32, B32, &[[0xff03_0201, 0x0101_0101, 10, 271]]);
    check("dp4a.s32.u32", B32, B32, &[[0x0000_00ff, 0x0000_00ff, 0, neg(-255)]]);
    check("dp4a.u32.s32", B32, B32, &[[0x0000_00ff, 0x0000_00ff, 0, neg(-255)]]);
    // Halves of a with the low or the high two bytes of b.
    check("dp2a.lo.s32.s32", B32, B32, &[[0xffff_0002, 0x0504_0302, 1, 2]]);
    check("dp2a.hi.s32.s32", B32, B32, &[[0xffff_0002, 0x0504_0302, 1, 4]]);
    check("dp2a.lo.u32.u32", B32, B32, &[[0xffff_0002, 0x0504_0302, 0, 0xffff * 3 + 4]]);
}

#[test]
fn comparisons() {
    let body = |comparison: &str| format!("setp.{comparison} %p, %a, %b; selp.u32 %d, 1, 0, %p;");
    for (comparison, expected) in [
        ("eq.s32", [0, 0, 1]),
        ("ne.s32", [1, 1, 0]),
        ("lt.s32", [1, 0, 0]),
        ("le.s32", [1, 0, 1]),
        ("gt.s32", [0, 1, 0]),
        ("ge.s32", [0, 1, 1]),
        ("lt.u32", [0, 1, 0]),
        ("gt.u32", [1, 0, 0]),
        ("lo.u32", [0, 1, 0]),
        ("ls.u32", [0, 1, 1]),
        ("hi.u32", [1, 0, 0]),
        ("hs.u32", [1, 0, 1]),
    ] {
        let [a, b, c] = expected;
        check_body(&body(comparison), B32, [B32; 3], &[[ONES, 1, a], [1, ONES, b], [5, 5, c]]);
    }
    let wide = "setp.lt.s64 %p, %a, %b; selp.u32 %d, 1, 0, %p;";
    check_body(wide, B32, [B64; 3], &[[TOP64, 1, 1], [1, TOP64, 0]]);
    let narrow = "setp.lt.s16 %p, %a, %b; selp.u32 %d, 1, 0, %p;";
    check_body(narrow, B32, [B16; 3], &[[0x8000, 1, 1], [1, 0x8000, 0]]);
}

#[test]
fn comparisons_join_a_predicate() {
    // %q is a < b; the second result is the negated comparison joined likewise.
    let body = |joined: &str| {
        format!(
            "setp.lt.u32 %q, %a, %b; setp.{joined}.u32 %p|%out, %b, %c, %q;
             selp.u32 %j, 1, 0, %p; selp.u32 %k, 2, 0, %out; or.b32 %d, %j, %k;"
        )
    };
    // (a<b, b<c): (1,1) (1,0) (0,1) (0,0)
    let rows = [[1, 2, 3], [1, 2, 2], [2, 2, 3], [2, 2, 2]];
    let with = |expected: [u64; 4]| -> Vec<[u64; 4]> {
        rows.iter().zip(expected).map(|(row, e)| [row[0], row[1], row[2], e]).collect()
    };
    check_body(&body("lt.and"), B32, [B32; 3], &with([1, 2, 0, 0]));
    check_body(&body("lt.or"), B32, [B32; 3], &with([3, 3, 1, 2]));
    check_body(&body("lt.xor"), B32, [B32; 3], &with([2, 1, 1, 2]));
    let negated = "setp.lt.u32 %q, %a, %b; setp.lt.and.u32 %p, %b, %c, !%q; selp.u32 %d, 1, 0, %p;";
    check_body(negated, B32, [B32; 3], &with([0, 0, 1, 0]));
}

#[test]
fn predicates_have_a_logic() {
    let body = |logic: &str| {
        format!("setp.ne.u32 %p, %a, 0; setp.ne.u32 %q, %b, 0; {logic}; selp.u32 %d, 1, 0, %out;")
    };
    let rows = [[0, 0], [0, 1], [1, 0], [1, 1]];
    for (logic, expected) in [
        ("and.pred %out, %p, %q", [0, 0, 0, 1]),
        ("or.pred %out, %p, %q", [0, 1, 1, 1]),
        ("xor.pred %out, %p, %q", [0, 1, 1, 0]),
        ("not.pred %out, %p", [1, 1, 0, 0]),
        ("mov.pred %out, %q", [0, 1, 0, 1]),
    ] {
        let table: Vec<[u64; 3]> = rows.iter().zip(expected).map(|(row, e)| [row[0], row[1], e]).collect();
        check_body(&body(logic), B32, [B32; 3], &table);
    }
}

#[test]
fn set_and_selections() {
    check("set.lt.u32.s32", B32, B32, &[[ONES, 1, ONES], [1, ONES, 0]]);
    check_mixed("set.lt.f32.s32", F32, [B32; 3], &[[ONES, 1, f(1.0)], [1, ONES, 0]]);
    check_mixed("set.geu.u32.f32", B32, [F32; 3], &[[f(f32::NAN), 0, ONES], [f(1.0), f(2.0), 0]]);
    check("slct.u32.s32", B32, B32, &[[1, 2, 0, 1], [1, 2, ONES, 2], [1, 2, 0x7fff_ffff, 1]]);
    check_mixed(
        "slct.u32.f32",
        B32,
        [B32, B32, F32],
        &[[1, 2, f(-0.0), 1], [1, 2, f(-1.0), 2], [1, 2, f(f32::NAN), 2]],
    );
    check_body(
        "setp.eq.u32 %p, %c, 7; selp.b32 %d, %a, %b, %p;",
        B32,
        [B32; 3],
        &[[1, 2, 7, 1], [1, 2, 8, 2]],
    );
}

#[test]
fn a_guard_leaves_the_rest_alone() {
    check_body(
        "setp.eq.u32 %p, %a, 1; mov.u32 %d, %b; @%p add.u32 %d, %d, 1; @!%p mul.lo.u32 %d, %d, 3;",
        B32,
        [B32; 3],
        &[[1, 10, 11], [2, 10, 30]],
    );
}

#[test]
fn packing_and_unpacking() {
    check_body("mov.b64 %d, {%a, %b};", B64, [B32; 3], &[[1, 2, 0x2_0000_0001]]);
    check_body("mov.b32 %d, {%a, %b};", B32, [B16; 3], &[[1, 2, 0x2_0001]]);
    check_body("mov.b64 {%d, %j}, %a;", B32, [B64; 3], &[[0x2_0000_0001, 1]]);
    check_body("mov.b64 {_, %d}, %a;", B32, [B64; 3], &[[0x2_0000_0001, 2]]);
    check_body("mov.b32 {%h, %d}, %a;", B16, [B32; 3], &[[0x0002_0001, 2]]);
    check_body("mov.b64 {%h, %g, %d, %h}, %a;", B16, [B64; 3], &[[0x0004_0003_0002_0001, 3]]);
}
