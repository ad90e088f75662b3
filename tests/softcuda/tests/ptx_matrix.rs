//! Fragments of `ldmatrix` and `mma.sync` against the ISA's figures (PTX ISA, "Warp-level Matrix
//! Instructions": the fragment tables of each shape), written out as (row, column) of each element.

mod run;

use run::{Card, call, parse};

/// Elements of a register: how many, and their bits.
#[derive(Clone, Copy, PartialEq)]
enum Element {
    Bf16,
    F16,
    Tf32,
    S8,
    U8,
    F32,
    S32,
}

use Element::*;

impl Element {
    fn bits(self) -> u32 {
        match self {
            Bf16 | F16 => 16,
            S8 | U8 => 8,
            Tf32 | F32 | S32 => 32,
        }
    }

    /// A small whole number, which every type holds exactly.
    fn encode(self, value: i32) -> u32 {
        match self {
            Bf16 => (value as f32).to_bits() >> 16,
            F16 => half::f16::from_f32(value as f32).to_bits().into(),
            Tf32 | F32 => (value as f32).to_bits(),
            S8 | U8 => value as u8 as u32,
            S32 => value as u32,
        }
    }
}

/// Where element `i` of a lane's fragment lies, by group (lane / 4) and thread in the group (lane % 4).
type Place = fn(group: usize, thread: usize, i: usize) -> (usize, usize);

struct Fragment {
    element: Element,
    rows: usize,
    columns: usize,
    /// Elements of a lane.
    count: usize,
    place: Place,
}

impl Fragment {
    fn registers(&self) -> usize {
        self.count * self.element.bits() as usize / 32
    }

    /// Each lane's registers, from a matrix by rows.
    fn spread(&self, matrix: &[i32]) -> Vec<u32> {
        let mut registers = Vec::new();
        for lane in 0..32 {
            let mut own = vec![0; self.registers()];
            for i in 0..self.count {
                let (row, column) = (self.place)(lane / 4, lane % 4, i);
                let at = i * self.element.bits() as usize;
                own[at / 32] |= self.element.encode(matrix[row * self.columns + column]) << (at % 32);
            }
            registers.extend(own);
        }
        registers
    }
}

/// a of m16n8k16, 16-bit elements: a0, a1, a4, a5 in the upper rows, a4 … a7 in the right columns.
fn a_16(group: usize, thread: usize, i: usize) -> (usize, usize) {
    let row = match i {
        0 | 1 | 4 | 5 => group,
        _ => group + 8,
    };
    (row, thread * 2 + i % 2 + if i < 4 { 0 } else { 8 })
}

fn b_16(group: usize, thread: usize, i: usize) -> (usize, usize) {
    (thread * 2 + i % 2 + if i < 2 { 0 } else { 8 }, group)
}

fn c_32(group: usize, thread: usize, i: usize) -> (usize, usize) {
    (if i < 2 { group } else { group + 8 }, thread * 2 + i % 2)
}

fn a_8(group: usize, thread: usize, i: usize) -> (usize, usize) {
    (if i < 2 { group } else { group + 8 }, thread * 2 + i % 2)
}

fn b_8(group: usize, thread: usize, i: usize) -> (usize, usize) {
    (thread * 2 + i, group)
}

/// a of m16n8k8 with tf32: a1 and a3 in the lower rows, a2 and a3 in the right columns.
fn a_tf32(group: usize, thread: usize, i: usize) -> (usize, usize) {
    (if i.is_multiple_of(2) { group } else { group + 8 }, if i < 2 { thread } else { thread + 4 })
}

fn b_tf32(group: usize, thread: usize, i: usize) -> (usize, usize) {
    (if i == 0 { thread } else { thread + 4 }, group)
}

/// a of m16n8k32, bytes.
fn a_bytes(group: usize, thread: usize, i: usize) -> (usize, usize) {
    let row = match i {
        0..4 | 8..12 => group,
        _ => group + 8,
    };
    (row, thread * 4 + i % 4 + if i < 8 { 0 } else { 16 })
}

fn b_bytes(group: usize, thread: usize, i: usize) -> (usize, usize) {
    (thread * 4 + i % 4 + if i < 4 { 0 } else { 16 }, group)
}

fn matrix(rows: usize, columns: usize, seed: i32, least: i32) -> Vec<i32> {
    (0..(rows * columns) as i32).map(|i| (i * 7 + i * i * 3 + seed) % 11 + least).collect()
}

/// Loads `registers` registers of each lane, runs the instruction on them, and gives back its results.
fn run(
    instruction: &str,
    fragments: [&[u32]; 3],
    counts: [usize; 3],
    results: usize,
    float: bool,
) -> Vec<u32> {
    let (names, ty) = (["a", "b", "c"], if float { "f32" } else { "b32" });
    let mut text = String::from(
        ".visible .entry k(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 d) {
  .reg .b32 %t;\n  .reg .b64 %p, %q;\n  .reg .b32 %a<8>, %b<8>;\n  mov.u32 %t, %tid.x;\n",
    );
    text += &format!("  .reg .{ty} %c<8>, %d<8>;\n");
    for (name, count) in names.iter().zip(counts) {
        text += &format!("  ld.param.u64 %p, [{name}];\n  mad.wide.u32 %p, %t, {}, %p;\n", 4 * count);
        let ty = if *name == "c" { ty } else { "b32" };
        for register in 0..count {
            text += &format!("  ld.global.{ty} %{name}{register}, [%p+{}];\n", 4 * register);
        }
    }
    let list = |name: &str, count: usize| {
        let all: Vec<String> = (0..count).map(|register| format!("%{name}{register}")).collect();
        format!("{{{}}}", all.join(", "))
    };
    let lists = [list("d", results), list("a", counts[0]), list("b", counts[1]), list("c", counts[2])];
    text += &format!("  {instruction} {};\n", lists.join(", "));
    text += &format!("  ld.param.u64 %q, [d];\n  mad.wide.u32 %q, %t, {}, %q;\n", 4 * results);
    for register in 0..results {
        text += &format!("  st.global.{ty} [%q+{}], %d{register};\n", 4 * register);
    }
    text += "  ret;\n}\n";
    let module = parse(&text);
    let mut card = Card::default();
    let mut params: Vec<u64> = Vec::new();
    for fragment in fragments {
        let bytes: Vec<u8> = fragment.iter().flat_map(|word| word.to_le_bytes()).collect();
        params.push(card.put(&bytes));
    }
    let out = card.room(32 * 4 * results);
    params.push(out);
    let counts =
        card.launch(&module, &call("k", 1, 32, &params)).unwrap_or_else(|fault| panic!("{fault}\n{text}"));
    assert_eq!(counts.mma.values().sum::<u64>(), 1);
    card.words(out, 32 * results)
}

fn product(instruction: &str, a: Fragment, b: Fragment, c: Fragment) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    let least = if a.element == U8 { 0 } else { -5 };
    let (x, y, z) = (matrix(m, k, 1, least), matrix(k, n, 5, least), matrix(m, n, 3, -5));
    let mut expected = z.clone();
    for row in 0..m {
        for column in 0..n {
            for inner in 0..k {
                expected[row * n + column] += x[row * k + inner] * y[inner * n + column];
            }
        }
    }
    let counts = [a.registers(), b.registers(), c.registers()];
    let found = run(
        instruction,
        [&a.spread(&x), &b.spread(&y), &c.spread(&z)],
        counts,
        c.registers(),
        c.element == F32,
    );
    assert_eq!(found, c.spread(&expected), "{instruction}");
}

#[test]
fn sixteen_by_eight_by_sixteen() {
    for (name, element) in [("bf16", Bf16), ("f16", F16)] {
        product(
            &format!("mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32"),
            Fragment { element, rows: 16, columns: 16, count: 8, place: a_16 },
            Fragment { element, rows: 16, columns: 8, count: 4, place: b_16 },
            Fragment { element: F32, rows: 16, columns: 8, count: 4, place: c_32 },
        );
    }
    product(
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16",
        Fragment { element: F16, rows: 16, columns: 16, count: 8, place: a_16 },
        Fragment { element: F16, rows: 16, columns: 8, count: 4, place: b_16 },
        Fragment { element: F16, rows: 16, columns: 8, count: 4, place: c_32 },
    );
}

#[test]
fn sixteen_by_eight_by_eight() {
    for (name, element) in [("bf16", Bf16), ("f16", F16)] {
        product(
            &format!("mma.sync.aligned.m16n8k8.row.col.f32.{name}.{name}.f32"),
            Fragment { element, rows: 16, columns: 8, count: 4, place: a_8 },
            Fragment { element, rows: 8, columns: 8, count: 2, place: b_8 },
            Fragment { element: F32, rows: 16, columns: 8, count: 4, place: c_32 },
        );
    }
}

#[test]
fn nineteen_bit_floats() {
    product(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
        Fragment { element: Tf32, rows: 16, columns: 8, count: 4, place: a_tf32 },
        Fragment { element: Tf32, rows: 8, columns: 8, count: 2, place: b_tf32 },
        Fragment { element: F32, rows: 16, columns: 8, count: 4, place: c_32 },
    );
}

#[test]
fn bytes() {
    for (a, b) in [("s8", "s8"), ("u8", "u8"), ("u8", "s8"), ("s8", "u8")] {
        let element = |name| if name == "s8" { S8 } else { U8 };
        // The values of a decide the sign of both, so a mixed pair is u8 where it may be.
        let both_unsigned = a == "u8" || b == "u8";
        let least = if both_unsigned { U8 } else { element(a) };
        product(
            &format!("mma.sync.aligned.m16n8k32.row.col.s32.{a}.{b}.s32"),
            Fragment { element: least, rows: 16, columns: 32, count: 16, place: a_bytes },
            Fragment { element: least, rows: 32, columns: 8, count: 8, place: b_bytes },
            Fragment { element: S32, rows: 16, columns: 8, count: 4, place: c_32 },
        );
    }
    // −1 as a signed byte is 255 as an unsigned one.
    let ones = |registers: usize| vec![0xffff_ffff; 32 * registers];
    let product = |kinds: &str| {
        let instruction = format!("mma.sync.aligned.m16n8k32.row.col.s32.{kinds}.s32");
        run(&instruction, [&ones(4), &ones(2), &vec![1; 128]], [4, 2, 4], 4, false)
    };
    assert_eq!(product("s8.s8"), vec![33; 128]);
    assert_eq!(product("u8.s8"), vec![(1 - 255 * 32) as u32; 128]);
    assert_eq!(product("u8.u8"), vec![1 + 255 * 255 * 32; 128]);
}

#[test]
fn infinities_and_nan_go_through() {
    let instruction = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32";
    // Row 0 of a: ∞ at column 0. Column 0 of b: 1, column 1: 0 at its row 0, which makes ∞ · 0.
    let (mut a, mut b) = (vec![0; 128], vec![0; 64]);
    a[0] = 0x7f80;
    b[0] = 0x3f80;
    let found = run(instruction, [&a, &b, &vec![0; 128]], [4, 2, 4], 4, true);
    assert_eq!((found[0], found[1]), (0x7f80_0000, 0x7fff_ffff));
    assert_eq!(found[2], 0);
}

/// What each lane gets of `matrices` matrices of 8 × 8 numbered halves, whose rows lie `stride` bytes apart.
fn load_matrix(matrices: usize, transposed: bool, stride: usize) -> Vec<Vec<u32>> {
    let trans = if transposed { ".trans" } else { "" };
    let list = |name: &str| {
        let all: Vec<String> = (0..matrices).map(|i| format!("%{name}{i}")).collect();
        format!("{{{}}}", all.join(", "))
    };
    let text = format!(
        ".visible .entry k(.param .u64 out) {{
  .reg .b32 %t, %s, %i, %r<4>;\n  .reg .b16 %h;\n  .reg .b64 %o;\n  .reg .pred %p;
  .shared .align 16 .b8 tile[8192];
  mov.u32 %t, %tid.x;\n  mov.u32 %s, tile;
  mad.lo.u32 %s, %t, {stride}, %s;
  mov.u32 %i, 0;
FILL:
  mad.lo.u32 %r0, %t, 8, %i;\n  cvt.u16.u32 %h, %r0;\n  mad.lo.u32 %r1, %i, 2, %s;\n  st.shared.u16 [%r1], %h;
  add.u32 %i, %i, 1;\n  setp.lt.u32 %p, %i, 8;\n  @%p bra FILL;
  bar.sync 0;
  ldmatrix.sync.aligned.m8n8.x{matrices}{trans}.shared.b16 {}, [%s];
  ld.param.u64 %o, [out];\n  mad.wide.u32 %o, %t, {}, %o;
",
        list("r"),
        4 * matrices
    );
    let stores: Vec<String> =
        (0..matrices).map(|i| format!("  st.global.u32 [%o+{}], %r{i};\n", 4 * i)).collect();
    let text = format!("{text}{}  ret;\n}}\n", stores.concat());
    let module = parse(&text);
    let mut card = Card::default();
    let out = card.room(128 * matrices);
    let counts =
        card.launch(&module, &call("k", 1, 32, &[out])).unwrap_or_else(|fault| panic!("{fault}\n{text}"));
    let conflicts = if stride.is_multiple_of(128) { 7 * matrices } else { 0 };
    assert_eq!(counts.shared_loads.conflicts, conflicts as u64);
    card.words(out, 32 * matrices).chunks(matrices).map(<[u32]>::to_vec).collect()
}

#[test]
fn rows_come_from_the_lanes_of_their_matrix() {
    for matrices in [1, 2, 4] {
        for stride in [16, 48, 128, 144] {
            for (lane, registers) in load_matrix(matrices, false, stride).into_iter().enumerate() {
                for (number, register) in registers.into_iter().enumerate() {
                    // Lane 8 · number + row gave the row's address; row i holds 8i … 8i + 7.
                    let first = ((8 * number + lane / 4) * 8 + lane % 4 * 2) as u32;
                    assert_eq!(register, first | (first + 1) << 16, "matrix {number}, lane {lane}");
                }
            }
        }
    }
}

#[test]
fn transposed_matrices() {
    for matrices in [1, 2, 4] {
        for (lane, registers) in load_matrix(matrices, true, 144).into_iter().enumerate() {
            for (number, register) in registers.into_iter().enumerate() {
                let element = |row: usize| ((8 * number + row) * 8 + lane / 4) as u32;
                let (low, high) = (element(lane % 4 * 2), element(lane % 4 * 2 + 1));
                assert_eq!(register, low | high << 16, "matrix {number}, lane {lane}");
            }
        }
    }
}

#[test]
fn lanes_of_the_first_figure() {
    // The corners of the figure for m16n8k16's a with 16-bit elements, as printed.
    for (lane, i, place) in [
        (0, 0, (0, 0)),
        (0, 1, (0, 1)),
        (3, 1, (0, 7)),
        (0, 4, (0, 8)),
        (3, 5, (0, 15)),
        (28, 0, (7, 0)),
        (0, 2, (8, 0)),
        (31, 7, (15, 15)),
    ] {
        assert_eq!(a_16(lane / 4, lane % 4, i), place);
    }
}
