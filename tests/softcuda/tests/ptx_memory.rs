//! Loads, stores, address spaces, atomics and asynchronous copies (PTX ISA, "Data Movement and Conversion
//! Instructions", "Parallel Synchronization and Communication Instructions").

mod run;

use run::{Call, Card, call, parse};

const REGISTERS: &str = ".reg .b16 %h<16>;\n.reg .b32 %r<24>;\n.reg .f32 %f<8>;\n.reg .b64 %rd<16>;\n.reg .f64 %fd<4>;\n.reg .pred %p<4>;\n";

/// Runs one warp whose `%rd1` and `%rd2` point to `input` and to 64-bit results, one a lane; `%r1` is the
/// lane, `%rd3` where its result goes.
fn run(declarations: &str, input: &[u8], body: &str) -> Vec<u64> {
    let text = format!(
        "{declarations}\n.visible .entry k(.param .u64 in, .param .u64 out) {{\n{REGISTERS}
  mov.u32 %r1, %tid.x;\n  ld.param.u64 %rd1, [in];\n  ld.param.u64 %rd2, [out];
  mad.wide.u32 %rd3, %r1, 8, %rd2;
  {body}
  ret;\n}}\n"
    );
    let module = parse(&text);
    let mut card = Card::default();
    let (from, to) = (card.put(input), card.put(&[0; 256]));
    let launched = card.launch(&module, &call("k", 1, 32, &[from, to]));
    launched.unwrap_or_else(|fault| panic!("{fault}\n{text}"));
    card.get(to, 256).chunks(8).map(|value| u64::from_le_bytes(value.try_into().unwrap())).collect()
}

fn lanes(f: impl Fn(u64) -> u64) -> Vec<u64> {
    (0..32).map(f).collect()
}

fn halves(values: impl IntoIterator<Item = u16>) -> Vec<u8> {
    values.into_iter().flat_map(u16::to_le_bytes).collect()
}

fn words(values: impl IntoIterator<Item = u32>) -> Vec<u8> {
    values.into_iter().flat_map(u32::to_le_bytes).collect()
}

#[test]
fn narrow_loads_are_extended() {
    let input: Vec<u8> = (0..32u8).map(|i| i.wrapping_add(0xf0)).collect();
    let load =
        |load: &str| run("", &input, &format!("cvt.u64.u32 %rd4, %r1; add.u64 %rd4, %rd4, %rd1; {load}"));
    let byte = |lane: u64| (0xf0 + lane) as u8;
    assert_eq!(
        load("ld.global.s8 %r2, [%rd4]; st.global.u32 [%rd3], %r2;"),
        lanes(|lane| (byte(lane) as i8 as i32 as u32).into())
    );
    assert_eq!(load("ld.global.u8 %r2, [%rd4]; st.global.u32 [%rd3], %r2;"), lanes(|lane| byte(lane).into()));
    assert_eq!(
        load("ld.global.s8 %rd5, [%rd4]; st.global.u64 [%rd3], %rd5;"),
        lanes(|lane| byte(lane) as i8 as u64)
    );
    assert_eq!(
        load("ld.global.s8 %h2, [%rd4]; st.global.u16 [%rd3], %h2;"),
        lanes(|lane| (byte(lane) as i8 as u16).into())
    );
    assert_eq!(
        load("ld.global.b8 %h2, [%rd4]; st.global.u8 [%rd3+1], %h2;"),
        lanes(|lane| u64::from(byte(lane)) << 8)
    );
    let input = halves((0..32).map(|i| 0x7ff0 + i));
    assert_eq!(
        run(
            "",
            &input,
            "mad.wide.u32 %rd4, %r1, 2, %rd1; ld.global.s16 %r2, [%rd4]; st.global.u32 [%rd3], %r2;"
        ),
        lanes(|lane| ((0x7ff0 + lane) as u16 as i16 as u32).into())
    );
    // A store of a wider register's low bits.
    assert_eq!(
        run("", &[0], "add.u32 %r2, %r1, 0x12345600; st.global.u8 [%rd3], %r2; st.global.u16 [%rd3+2], %r2;"),
        lanes(|lane| lane | (0x5600 + lane) << 16)
    );
}

#[test]
fn vectors() {
    let input = words((0..128).map(|i| i * 0x0101));
    assert_eq!(
        run(
            "",
            &input,
            "mad.wide.u32 %rd4, %r1, 16, %rd1;
             ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd4];
             add.u32 %r2, %r2, %r5; add.u32 %r3, %r3, %r4;
             st.global.v2.u32 [%rd3], {%r2, %r3};"
        ),
        lanes(|lane| ((8 * lane + 3) * 0x0101) | (((8 * lane + 3) * 0x0101) << 32))
    );
    assert_eq!(
        run(
            "",
            &input,
            "mad.wide.u32 %rd4, %r1, 8, %rd1;
             ld.global.nc.L1::no_allocate.L2::128B.v4.u16 {%h1, %h2, %h3, %h4}, [%rd4];
             st.global.cs.v4.u16 [%rd3], {%h3, %h4, %h1, %h2};"
        ),
        lanes(|lane| ((2 * lane * 0x0101) << 32) | ((2 * lane + 1) * 0x0101))
    );
    assert_eq!(
        run(
            "",
            &input,
            "mad.wide.u32 %rd4, %r1, 16, %rd1;
             ld.global.v2.f64 {%fd1, %fd2}, [%rd4]; st.global.f64 [%rd3], %fd2;"
        ),
        lanes(|lane| ((4 * lane + 2) * 0x0101) | (((4 * lane + 3) * 0x0101) << 32))
    );
    assert_eq!(
        run(
            "",
            &[1, 2, 3, 4],
            "ld.global.v4.s8 {%h1, %h2, %h3, %h4}, [%rd1]; st.global.v4.u8 [%rd3+4], {%h4, %h3, %h2, %h1};"
        ),
        lanes(|_| 0x0102_0304 << 32)
    );
}

#[test]
fn shared_arrays_and_dynamic_memory() {
    let module = parse(&format!(
        ".extern .shared .align 16 .b8 dynamic[];
.visible .entry k(.param .u64 out) {{\n{REGISTERS}
  .shared .align 4 .b8 first[128];\n  .shared .align 8 .b8 second[256];
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, %tid.x;\n  shl.b32 %r2, %r1, 2;
  mov.u32 %r3, first;\n  add.u32 %r3, %r3, %r2;\n  st.shared.u32 [%r3], %r1;
  mov.u32 %r4, second;\n  mad.lo.u32 %r4, %r1, 8, %r4;\n  mul.wide.u32 %rd2, %r1, 3;\n  st.shared.u64 [%r4], %rd2;
  mov.u32 %r5, dynamic;\n  add.u32 %r5, %r5, %r2;\n  st.shared.u32 [%r5+128], %r1;
  bar.sync 0;
  xor.b32 %r6, %r1, 31;
  mov.u64 %rd3, first;\n  cvta.shared.u64 %rd3, %rd3;\n  mad.wide.u32 %rd4, %r6, 4, %rd3;
  ld.u32 %r7, [%rd4];
  mov.u32 %r8, second;\n  mad.lo.u32 %r8, %r6, 8, %r8;\n  ld.shared.v2.u32 {{%r9, %r10}}, [%r8];
  mov.u32 %r11, dynamic;\n  mad.lo.u32 %r11, %r6, 4, %r11;\n  ld.shared.u32 %r12, [%r11+128];
  shl.b32 %r9, %r9, 8;\n  shl.b32 %r12, %r12, 16;\n  or.b32 %r7, %r7, %r9;\n  or.b32 %r7, %r7, %r12;
  mad.wide.u32 %rd5, %r1, 4, %rd1;\n  st.global.u32 [%rd5], %r7;
  mov.u32 %r13, dynamic;\n  and.b32 %r13, %r13, 15;\n  setp.ne.u32 %p1, %r13, 0;\n  @%p1 trap;
  ret;\n}}\n"
    ));
    let mut card = Card::default();
    let to = card.room(128);
    card.launch(&module, &Call { shared: 256, ..call("k", 1, 32, &[to]) }).unwrap();
    let expected: Vec<u32> =
        (0..32).map(|lane| lane ^ 31).map(|other| other | ((3 * other) << 8) | (other << 16)).collect();
    assert_eq!(card.words(to, 32), expected);
    assert_eq!(module.kernels[0].shared_bytes, 384);
}

#[test]
fn local_memory_is_a_threads_own() {
    assert_eq!(
        run(
            "",
            &[0],
            ".local .align 8 .b8 __local_depot0[64];
             mov.u64 %rd5, __local_depot0;
             cvta.local.u64 %rd6, %rd5;
             mad.wide.u32 %rd7, %r1, 1, 0;
             st.local.u64 [%rd5+8], %rd7;
             st.u32 [%rd6], %r1;
             and.b32 %r2, %r1, 3; mad.wide.u32 %rd8, %r2, 4, %rd6;
             add.u64 %rd8, %rd8, 16;
             st.u32 [%rd8], %r1;
             ld.u32 %r3, [%rd8];
             ld.u64 %rd9, [%rd6+8];
             ld.local.u32 %r4, [%rd5];
             cvt.u64.u32 %rd10, %r3; cvt.u64.u32 %rd11, %r4;
             add.u64 %rd9, %rd9, %rd10; add.u64 %rd9, %rd9, %rd11;
             st.global.u64 [%rd3], %rd9;"
        ),
        lanes(|lane| 3 * lane)
    );
}

#[test]
fn which_space_an_address_is_in() {
    let found = run(
        ".shared .align 4 .b8 s[16];",
        &[0],
        ".local .align 8 .b8 __local_depot0[64];
         mov.u64 %rd4, s; cvta.shared.u64 %rd4, %rd4;
         mov.u64 %rd5, __local_depot0; cvta.local.u64 %rd5, %rd5;
         mov.u32 %r2, 0;
         isspacep.shared %p1, %rd4; @%p1 add.u32 %r2, %r2, 1;
         isspacep.global %p1, %rd4; @%p1 add.u32 %r2, %r2, 2;
         isspacep.local %p1, %rd5; @%p1 add.u32 %r2, %r2, 4;
         isspacep.shared %p1, %rd5; @%p1 add.u32 %r2, %r2, 8;
         isspacep.global %p1, %rd1; @%p1 add.u32 %r2, %r2, 16;
         isspacep.local %p1, %rd1; @%p1 add.u32 %r2, %r2, 32;
         cvta.to.shared.u64 %rd6, %rd4; mov.u64 %rd7, s; setp.eq.u64 %p1, %rd6, %rd7; @%p1 add.u32 %r2, %r2, 64;
         st.global.u32 [%rd3], %r2;",
    );
    assert_eq!(found, lanes(|_| 1 + 4 + 16 + 64));
}

#[test]
fn variables_of_the_module() {
    let found = run(
        ".global .align 4 .u32 total = 7;
         .const .align 4 .b8 table[16] = {1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4};
         .global .align 4 .f32 half = 0f3F000000;
         .global .align 2 .u16 pair[2] = {0x1234, 5};",
        &[0],
        "and.b32 %r2, %r1, 3; mov.u64 %rd4, table; mad.wide.u32 %rd4, %r2, 4, %rd4;
         ld.const.u32 %r3, [%rd4];
         ld.global.u32 %r4, [total]; add.u32 %r3, %r3, %r4;
         ld.const.u32 %r5, [table+8]; mad.lo.u32 %r3, %r5, 16, %r3;
         ld.global.f32 %f1, [half]; cvt.rni.u32.f32 %r6, %f1; add.u32 %r3, %r3, %r6;
         ld.global.u16 %h1, [pair+2]; cvt.u32.u16 %r7, %h1; mad.lo.u32 %r3, %r7, 256, %r3;
         st.global.u32 [%rd3], %r3;",
    );
    assert_eq!(found, lanes(|lane| lane % 4 + 1 + 7 + 3 * 16 + 5 * 256));
}

#[test]
fn parameters_of_every_width() {
    let module = parse(&format!(
        ".visible .entry k(.param .u64 out, .param .u8 small, .param .align 8 .b8 pack[24], .param .u16 last) {{\n{REGISTERS}
  ld.param.u64 %rd1, [out];
  ld.param.u8 %r1, [small];
  ld.param.u32 %r2, [pack+4];
  ld.param.v2.u32 {{%r3, %r4}}, [pack+8];
  mov.b64 %rd2, pack;
  ld.param.s8 %r5, [%rd2+16];
  ld.param.u16 %r6, [last];
  st.global.v4.u32 [%rd1], {{%r1, %r2, %r3, %r4}};
  st.global.v2.u32 [%rd1+16], {{%r5, %r6}};
  ret;\n}}\n"
    ));
    let kernel = &module.kernels[0];
    let places: Vec<(u32, u32)> = kernel.params.iter().map(|param| (param.offset, param.size)).collect();
    assert_eq!(places, [(0, 8), (8, 1), (16, 24), (40, 2)]);
    assert_eq!(kernel.param_bytes, 42);
    let mut card = Card::default();
    let to = card.room(24);
    let mut params = to.to_le_bytes().to_vec();
    params.extend([9, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee]);
    params.extend(words([1, 2, 3, 4, 0xff, 6]));
    params.extend([0x34, 0x12]);
    card.launch_packed(&module, "k", params).unwrap();
    assert_eq!(card.words(to, 6), [9, 2, 3, 4, u32::MAX, 0x1234]);
}

/// The sum over lanes, and the final value, of an atomic instruction on a word that begins as `begin`.
fn atomic(instruction: &str, begin: u32) -> (Vec<u64>, u32) {
    let (mut olds, mut last) = (Vec::new(), Vec::new());
    for space in ["global", "shared"] {
        let instruction = instruction.replace("SPACE", space);
        let found = run(
            ".shared .align 8 .b8 s[8];",
            &words([begin, 0]),
            &format!(
                "mov.u64 %rd6, %rd1; setp.eq.u32 %p1, %r1, 0;
                 mov.u64 %rd7, s; ld.global.u32 %r5, [%rd1]; @%p1 st.shared.u32 [%rd7], %r5; @%p1 st.shared.u32 [%rd7+4], 0;
                 bar.warp.sync 0xffffffff;
                 {}
                 {instruction}
                 bar.warp.sync 0xffffffff;
                 ld.{space}.u32 %r7, [%rd6];
                 mov.b64 %rd8, {{%r6, %r7}};
                 st.global.u64 [%rd3], %rd8;",
                if space == "shared" { "mov.u64 %rd6, %rd7;" } else { "" },
            ),
        );
        let mut found_olds: Vec<u64> = found.iter().map(|value| value & 0xffff_ffff).collect();
        found_olds.sort_unstable();
        assert!(found.iter().all(|value| value >> 32 == found[0] >> 32));
        olds.push(found_olds);
        last.push((found[0] >> 32) as u32);
    }
    assert_eq!((&olds[0], last[0]), (&olds[1], last[1]), "global and shared");
    (olds.remove(0), last[0])
}

#[test]
fn atomics_on_integers() {
    let (olds, last) = atomic("atom.SPACE.add.u32 %r6, [%rd6], 2;", 5);
    assert_eq!((olds, last), (lanes(|lane| 5 + 2 * lane), 69));
    assert_eq!(atomic("atom.SPACE.max.s32 %r6, [%rd6], %r1;", u32::MAX).1, 31);
    assert_eq!(atomic("atom.SPACE.max.u32 %r6, [%rd6], %r1;", u32::MAX).1, u32::MAX);
    assert_eq!(atomic("atom.SPACE.min.u32 %r6, [%rd6], %r1;", 5).1, 0);
    assert_eq!(atomic("sub.u32 %r8, 3, %r1; atom.SPACE.min.s32 %r6, [%rd6], %r8;", 5).1, -28i32 as u32);
    assert_eq!(atomic("atom.SPACE.or.b32 %r6, [%rd6], %r1;", 64).1, 95);
    assert_eq!(atomic("or.b32 %r8, %r1, 0xe0; atom.SPACE.and.b32 %r6, [%rd6], %r8;", 0xffff).1, 0xe0);
    assert_eq!(atomic("atom.SPACE.xor.b32 %r6, [%rd6], %r1;", 7).1, 7);
    // inc: old >= b ? 0 : old + 1; dec: old == 0 or old > b ? b : old - 1.
    assert_eq!(atomic("atom.SPACE.inc.u32 %r6, [%rd6], 9;", 0).1, 2);
    assert_eq!(atomic("atom.SPACE.dec.u32 %r6, [%rd6], 9;", 0).1, 8);
    assert_eq!(atomic("red.SPACE.add.u32 [%rd6], 3; mov.u32 %r6, 0;", 1).1, 97);
    assert_eq!(atomic("red.SPACE.max.u32 [%rd6], %r1; mov.u32 %r6, 0;", 1).1, 31);
    assert_eq!(
        atomic("cvt.u64.u32 %rd9, %r1; atom.SPACE.add.u64 %rd10, [%rd6], %rd9; mov.u32 %r6, 0;", 1).1,
        497
    );
}

#[test]
fn exchanges() {
    let (olds, last) = atomic("add.u32 %r8, %r1, 1; atom.SPACE.exch.b32 %r6, [%rd6], %r8;", 0);
    let mut all: Vec<u64> = olds;
    all.push(last.into());
    all.sort_unstable();
    assert_eq!(all, (0..33).collect::<Vec<u64>>(), "each value is taken once");
    let (olds, last) = atomic("add.u32 %r8, %r1, 1; atom.SPACE.cas.b32 %r6, [%rd6], 0, %r8;", 0);
    assert_eq!(olds.iter().filter(|&&old| old == 0).count(), 1, "one lane wins");
    assert!((1..=32).contains(&last) && olds[1..].iter().all(|&old| old == u64::from(last)));
}

#[test]
fn atomics_on_floats() {
    assert_eq!(
        atomic(
            "mov.f32 %f1, 0f3F000000; atom.SPACE.add.f32 %f2, [%rd6], %f1; mov.b32 %r6, 0;",
            1f32.to_bits()
        )
        .1,
        17f32.to_bits()
    );
    assert_eq!(
        atomic("mov.f32 %f1, 0f3F000000; red.SPACE.add.f32 [%rd6], %f1; mov.b32 %r6, 0;", 1f32.to_bits()).1,
        17f32.to_bits()
    );
    // Pairs of halves: (1, 2) + 32·(0.5, 1) and the same as bf16.
    assert_eq!(
        atomic(
            "mov.b32 %r8, 0x38003c00; atom.SPACE.add.noftz.f16x2 %r6, [%rd6], %r8; mov.u32 %r6, 0;",
            0x3c00_4000
        )
        .1,
        0x4c40_5040
    );
    let found = run(
        "",
        &[0; 8],
        "mov.f64 %fd1, 0d3FE0000000000000; atom.global.add.f64 %fd2, [%rd1], %fd1; bar.warp.sync -1;
         ld.global.f64 %fd3, [%rd1]; st.global.f64 [%rd3], %fd3;",
    );
    assert_eq!(found, lanes(|_| 16f64.to_bits()));
}

#[test]
fn copies_that_are_waited_for() {
    for (bytes, cache) in [(4, "ca"), (8, "ca"), (16, "ca"), (16, "cg")] {
        let input = words(0..256);
        let found = run(
            ".shared .align 16 .b8 s[1024];",
            &input,
            &format!(
                "mad.wide.u32 %rd4, %r1, {bytes}, %rd1;
                 mov.u32 %r2, s; mad.lo.u32 %r3, %r1, {bytes}, %r2;
                 cp.async.{cache}.shared.global [%r3], [%rd4], {bytes};
                 cp.async.commit_group;
                 cp.async.wait_group 0;
                 bar.sync 0;
                 xor.b32 %r4, %r1, 1; mad.lo.u32 %r4, %r4, {bytes}, %r2;
                 ld.shared.u32 %r5, [%r4+{}]; st.global.u32 [%rd3], %r5;",
                bytes - 4
            ),
        );
        assert_eq!(found, lanes(|lane| ((lane ^ 1) + 1) * bytes / 4 - 1), "{bytes} {cache}");
    }
}

#[test]
fn copies_fill_with_zeros() {
    let found = run(
        ".shared .align 16 .b8 s[512];",
        &words(0..128),
        "mad.wide.u32 %rd4, %r1, 16, %rd1; mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 16, %r2;
         and.b32 %r4, %r1, 3; shl.b32 %r4, %r4, 2;
         cp.async.cg.shared.global [%r3], [%rd4], 16, %r4;
         cp.async.wait_all;
         ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r3];
         add.u32 %r5, %r5, %r6; add.u32 %r5, %r5, %r7; add.u32 %r5, %r5, %r8;
         st.global.u32 [%rd3], %r5;",
    );
    assert_eq!(found, lanes(|lane| (0..lane % 4).map(|word| 4 * lane + word).sum()));
    // Source size 0: the source is not read, so it need not be there.
    let found = run(
        ".shared .align 16 .b8 s[512];",
        &[0],
        "mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 16, %r2; mov.u64 %rd4, 0;
         cp.async.cg.shared.global [%r3], [%rd4], 16, 0;
         cp.async.wait_all; ld.shared.u32 %r5, [%r3]; st.global.u32 [%rd3], %r5;",
    );
    assert_eq!(found, lanes(|_| 0));
}

#[test]
fn older_groups_are_there_before_newer_ones() {
    let found = run(
        ".shared .align 16 .b8 s[1024];",
        &words(0..256),
        "mad.wide.u32 %rd4, %r1, 16, %rd1; mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 16, %r2;
         cp.async.cg.shared.global [%r3], [%rd4], 16; cp.async.commit_group;
         cp.async.cg.shared.global [%r3+512], [%rd4+512], 16; cp.async.commit_group;
         cp.async.wait_group 1;
         ld.shared.u32 %r4, [%r3];
         cp.async.wait_group 0;
         ld.shared.u32 %r5, [%r3+512];
         mov.b64 %rd5, {%r4, %r5}; st.global.u64 [%rd3], %rd5;",
    );
    assert_eq!(found, lanes(|lane| (4 * lane) | ((128 + 4 * lane) << 32)));
}

#[test]
fn sectors_and_bank_conflicts_are_counted() {
    let module = parse(&format!(
        ".visible .entry k(.param .u64 in, .param .u64 stride, .param .u64 bank) {{\n{REGISTERS}
  .shared .align 16 .b8 s[4096];
  mov.u32 %r1, %tid.x;\n  ld.param.u64 %rd1, [in];\n  ld.param.u32 %r2, [stride];\n  ld.param.u32 %r3, [bank];
  mul.lo.u32 %r4, %r1, %r2;\n  cvt.u64.u32 %rd2, %r4;\n  add.u64 %rd2, %rd2, %rd1;
  ld.global.u32 %r5, [%rd2];
  mov.u32 %r6, s;\n  mad.lo.u32 %r6, %r1, %r3, %r6;
  st.shared.u32 [%r6], %r5;
  ret;\n}}\n"
    ));
    // Bytes between lanes, sectors; bytes between lanes in shared memory, extra passes.
    for (stride, sectors, bank, conflicts) in
        [(4, 4, 4, 0), (8, 8, 8, 1), (32, 32, 128, 31), (4, 4, 12, 0), (16, 16, 16, 3), (36, 36, 64, 15)]
    {
        let mut card = Card::default();
        let from = card.put(&[1; 2048]);
        let counts = card.launch(&module, &call("k", 1, 32, &[from, stride, bank])).unwrap();
        let touched: std::collections::BTreeSet<u64> = (0..32).map(|lane| lane * stride / 32).collect();
        assert_eq!(counts.global_loads.sectors, touched.len() as u64, "{stride}");
        assert!(stride == 36 || touched.len() == sectors, "{stride}");
        assert_eq!(counts.global_loads.bytes, 128);
        assert_eq!(counts.shared_stores.conflicts, conflicts, "{bank}");
        assert_eq!(counts.shared_stores.instructions, 1);
    }
}

#[test]
fn wide_accesses_take_turns_by_quarters() {
    let module = parse(&format!(
        ".visible .entry k(.param .u64 width, .param .u64 stride) {{\n{REGISTERS}
  .shared .align 16 .b8 s[8192];
  mov.u32 %r1, %tid.x;\n  ld.param.u32 %r2, [width];\n  ld.param.u32 %r3, [stride];
  mov.u32 %r6, s;\n  mad.lo.u32 %r6, %r1, %r3, %r6;
  setp.eq.u32 %p1, %r2, 8;
  @%p1 st.shared.v2.u32 [%r6], {{%r1, %r1}};
  @!%p1 st.shared.v4.u32 [%r6], {{%r1, %r1, %r1, %r1}};
  ret;\n}}\n"
    ));
    for (width, stride, conflicts) in
        [(8, 8, 0), (16, 16, 0), (16, 32, 4), (8, 16, 2), (16, 128, 28), (16, 144, 0), (16, 80, 0)]
    {
        let mut card = Card::default();
        let counts = card.launch(&module, &call("k", 1, 32, &[width, stride])).unwrap();
        assert_eq!(counts.shared_stores.conflicts, conflicts, "{width} bytes every {stride}");
    }
}

#[test]
fn the_same_word_is_no_conflict() {
    let module = parse(&format!(
        ".visible .entry k() {{\n{REGISTERS}
  .shared .align 16 .b8 s[128];
  mov.u32 %r1, %tid.x;\n  mov.u32 %r2, s;\n  mad.lo.u32 %r3, %r1, 4, %r2;\n  st.shared.u32 [%r3], %r1;
  bar.sync 0;
  ld.shared.u32 %r4, [%r2+8];
  ret;\n}}\n"
    ));
    let counts = Card::default().launch(&module, &call("k", 1, 32, &[])).unwrap();
    assert_eq!((counts.shared_loads.instructions, counts.shared_loads.conflicts), (1, 0));
}

#[test]
fn grids_have_three_dimensions() {
    let module = parse(&format!(
        ".visible .entry k(.param .u64 out) {{\n{REGISTERS}
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, %ctaid.z;\n  mov.u32 %r2, %nctaid.y;\n  mov.u32 %r3, %ctaid.y;\n  mad.lo.u32 %r1, %r1, %r2, %r3;
  mov.u32 %r2, %nctaid.x;\n  mov.u32 %r3, %ctaid.x;\n  mad.lo.u32 %r1, %r1, %r2, %r3;
  mov.u32 %r2, %ntid.z;\n  mov.u32 %r3, %tid.z;\n  mad.lo.u32 %r1, %r1, %r2, %r3;
  mov.u32 %r2, %ntid.y;\n  mov.u32 %r3, %tid.y;\n  mad.lo.u32 %r1, %r1, %r2, %r3;
  mov.u32 %r2, %ntid.x;\n  mov.u32 %r3, %tid.x;\n  mad.lo.u32 %r1, %r1, %r2, %r3;
  mad.wide.u32 %rd2, %r1, 4, %rd1;\n  st.global.u32 [%rd2], %r1;
  ret;\n}}\n"
    ));
    let mut card = Card::default();
    let count = 2 * 3 * 2 * 5 * 3 * 2;
    let to = card.room(4 * count);
    card.launch_shaped(&module, "k", [2, 3, 2], [5, 3, 2], to.to_le_bytes().to_vec()).unwrap();
    assert_eq!(card.words(to, count), (0..count as u32).collect::<Vec<u32>>());
}
