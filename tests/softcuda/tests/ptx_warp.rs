//! What lanes of a warp do together, and what becomes of lanes that part (PTX ISA, "shfl.sync",
//! "vote.sync", "match.sync", "redux.sync", "activemask", "Control Flow Instructions").

mod run;

use run::{Card, call, parse};

/// What each of `threads` threads leaves in `%d`, which `body` makes of its number `%t` and `%x`, the value
/// that `input` gives it.
fn threads(threads: u32, input: impl Fn(u32) -> u32, body: &str) -> Vec<u32> {
    let text = format!(
        ".visible .entry k(.param .u64 in, .param .u64 out) {{
  .reg .b32 %t, %x, %d, %i, %j, %k;\n  .reg .b64 %a, %b, %w;\n  .reg .pred %p, %q, %r;
  mov.u32 %t, %tid.x;
  ld.param.u64 %a, [in];\n  ld.param.u64 %b, [out];
  mad.wide.u32 %a, %t, 4, %a;\n  mad.wide.u32 %b, %t, 4, %b;
  ld.global.u32 %x, [%a];
  {body}
  st.global.u32 [%b], %d;
  ret;
}}\n"
    );
    let module = parse(&text);
    let mut card = Card::default();
    let bytes: Vec<u8> = (0..threads).flat_map(|thread| input(thread).to_le_bytes()).collect();
    let (from, to) = (card.put(&bytes), card.put(&bytes));
    let launched = card.launch(&module, &call("k", 1, threads, &[from, to]));
    launched.unwrap_or_else(|fault| panic!("{fault}\n{text}"));
    card.words(to, threads as usize)
}

fn warp(input: impl Fn(u32) -> u32, body: &str) -> Vec<u32> {
    threads(32, input, body)
}

fn lanes(f: impl Fn(u32) -> u32) -> Vec<u32> {
    (0..32).map(f).collect()
}

#[test]
fn shuffles_within_the_warp() {
    let value = |lane| 100 + lane;
    assert_eq!(
        warp(value, "shfl.sync.up.b32 %d, %x, 1, 0, 0xffffffff;"),
        lanes(|lane| if lane == 0 { 100 } else { 99 + lane })
    );
    assert_eq!(
        warp(value, "shfl.sync.down.b32 %d, %x, 2, 31, 0xffffffff;"),
        lanes(|lane| if lane >= 30 { 100 + lane } else { 102 + lane })
    );
    assert_eq!(warp(value, "shfl.sync.bfly.b32 %d, %x, 5, 31, 0xffffffff;"), lanes(|lane| 100 + (lane ^ 5)));
    assert_eq!(warp(value, "shfl.sync.idx.b32 %d, %x, 7, 31, 0xffffffff;"), lanes(|_| 107));
    // Each lane chooses: the lane number is taken modulo 32.
    assert_eq!(
        warp(value, "mad.lo.u32 %i, %t, 3, 32; shfl.sync.idx.b32 %d, %x, %i, 31, 0xffffffff;"),
        lanes(|lane| 100 + lane * 3 % 32)
    );
}

#[test]
fn shuffles_within_segments() {
    let value = |lane| 100 + lane;
    // c: the segment's mask in bits 8 to 12, the clamp in 0 to 4. Width 8: (32 − 8) << 8.
    assert_eq!(
        warp(value, "shfl.sync.idx.b32 %d, %x, 11, 0x181f, 0xffffffff;"),
        lanes(|lane| 100 + (lane & 24) + 3)
    );
    assert_eq!(
        warp(value, "shfl.sync.up.b32 %d, %x, 3, 0x1800, 0xffffffff;"),
        lanes(|lane| if lane % 8 < 3 { 100 + lane } else { 97 + lane })
    );
    assert_eq!(
        warp(value, "shfl.sync.down.b32 %d, %x, 3, 0x181f, 0xffffffff;"),
        lanes(|lane| if lane % 8 > 4 { 100 + lane } else { 103 + lane })
    );
    // The predicate says whether the source was in range.
    assert_eq!(
        warp(value, "shfl.sync.down.b32 %i|%p, %x, 3, 0x181f, 0xffffffff; selp.u32 %d, 1, 0, %p;"),
        lanes(|lane| (lane % 8 <= 4).into())
    );
    assert_eq!(
        warp(value, "shfl.sync.bfly.b32 %d|%p, %x, 16, 0x101f, 0xffffffff; @!%p mov.u32 %d, 1;"),
        // Segments of 16 lanes: lanes of the upper one reach the lower, and those of the lower one do not
        // reach the upper.
        lanes(|lane| if lane >= 16 { 84 + lane } else { 1 })
    );
}

#[test]
fn shuffles_of_some_lanes() {
    // Even lanes only: their mask, their partners.
    assert_eq!(
        warp(
            |lane| lane,
            "mov.u32 %d, 77; and.b32 %i, %t, 1; setp.eq.u32 %p, %i, 0;
             @!%p bra PAST;
             shfl.sync.bfly.b32 %d, %x, 2, 31, 0x55555555;
             PAST:"
        ),
        lanes(|lane| if lane % 2 == 0 { lane ^ 2 } else { 77 })
    );
}

#[test]
fn votes() {
    let odd = "and.b32 %i, %x, 1; setp.eq.u32 %p, %i, 1;";
    let vote = |input: fn(u32) -> u32, vote: &str| warp(input, &format!("{odd} {vote}"));
    assert_eq!(vote(|lane| lane, "vote.sync.ballot.b32 %d, %p, 0xffffffff;"), lanes(|_| 0xaaaa_aaaa));
    assert_eq!(vote(|lane| lane, "vote.sync.ballot.b32 %d, !%p, 0xffffffff;"), lanes(|_| 0x5555_5555));
    let all = "vote.sync.all.pred %q, %p, 0xffffffff; selp.u32 %d, 1, 0, %q;";
    assert_eq!(vote(|lane| lane, all), lanes(|_| 0));
    assert_eq!(vote(|_| 3, all), lanes(|_| 1));
    let any = "vote.sync.any.pred %q, %p, 0xffffffff; selp.u32 %d, 1, 0, %q;";
    assert_eq!(vote(|lane| (lane == 9).into(), any), lanes(|_| 1));
    assert_eq!(vote(|_| 2, any), lanes(|_| 0));
    let uniform = "vote.sync.uni.pred %q, %p, 0xffffffff; selp.u32 %d, 1, 0, %q;";
    assert_eq!(vote(|_| 2, uniform), lanes(|_| 1));
    assert_eq!(vote(|lane| lane, uniform), lanes(|_| 0));
    // Of some lanes: those outside give no bit, and keep their result.
    assert_eq!(
        warp(
            |lane| lane,
            "mov.u32 %d, 7; setp.lt.u32 %p, %t, 8; setp.ne.u32 %q, %t, 3;
             @%p vote.sync.ballot.b32 %d, %q, 0xff;"
        ),
        lanes(|lane| if lane < 8 { 0xf7 } else { 7 })
    );
}

#[test]
fn lanes_with_the_same_value() {
    assert_eq!(
        warp(|lane| lane % 3, "match.any.sync.b32 %d, %x, 0xffffffff;"),
        lanes(|lane| (0..32).filter(|other| other % 3 == lane % 3).fold(0, |mask, other| mask | 1 << other))
    );
    assert_eq!(
        warp(|_| 5, "match.all.sync.b32 %d|%p, %x, 0xffffffff; @!%p mov.u32 %d, 9;"),
        lanes(|_| 0xffff_ffff)
    );
    assert_eq!(
        warp(|lane| lane / 31, "match.all.sync.b32 %d|%p, %x, 0xffffffff; @!%p add.u32 %d, %d, 9;"),
        lanes(|_| 9)
    );
    assert_eq!(
        warp(
            |lane| lane & 1,
            "cvt.u64.u32 %w, %x; shl.b64 %w, %w, 40; match.any.sync.b64 %d, %w, 0xffffffff;"
        ),
        lanes(|lane| if lane & 1 == 1 { 0xaaaa_aaaa } else { 0x5555_5555 })
    );
}

#[test]
fn reductions() {
    assert_eq!(warp(|lane| lane, "redux.sync.add.u32 %d, %x, 0xffffffff;"), lanes(|_| 496));
    assert_eq!(
        warp(|lane| lane.wrapping_sub(5), "redux.sync.min.s32 %d, %x, 0xffffffff;"),
        lanes(|_| -5i32 as u32)
    );
    assert_eq!(warp(|lane| lane.wrapping_sub(5), "redux.sync.min.u32 %d, %x, 0xffffffff;"), lanes(|_| 0));
    assert_eq!(warp(|lane| lane.wrapping_sub(5), "redux.sync.max.s32 %d, %x, 0xffffffff;"), lanes(|_| 26));
    assert_eq!(warp(|lane| 0xf0 | lane, "redux.sync.and.b32 %d, %x, 0xffffffff;"), lanes(|_| 0xf0));
    assert_eq!(warp(|lane| lane, "redux.sync.or.b32 %d, %x, 0xffffffff;"), lanes(|_| 31));
    assert_eq!(warp(|lane| 1 << (lane % 3), "redux.sync.xor.b32 %d, %x, 0xffffffff;"), lanes(|_| 0b011));
}

#[test]
fn lanes_part_and_meet() {
    let body = "setp.lt.u32 %p, %t, 10;
        @%p bra LOW;
        activemask.b32 %i;
        mul.lo.u32 %d, %t, 2;
        bra MEET;
        LOW: activemask.b32 %i;
        mul.lo.u32 %d, %t, 3;
        MEET: activemask.b32 %j;";
    let tripled = |lane: u32| if lane < 10 { lane * 3 } else { lane * 2 };
    assert_eq!(warp(|lane| lane, body), lanes(tripled));
    assert_eq!(
        warp(|lane| lane, &format!("{body} mov.u32 %d, %i;")),
        lanes(|lane| if lane < 10 { 0x3ff } else { 0xffff_fc00 })
    );
    assert_eq!(warp(|lane| lane, &format!("{body} mov.u32 %d, %j;")), lanes(|_| 0xffff_ffff));
}

#[test]
fn loops_of_different_lengths() {
    // Collatz steps of lane + 1.
    let steps = |mut n: u32| {
        let mut count = 0;
        while n != 1 {
            n = if n.is_multiple_of(2) { n / 2 } else { 3 * n + 1 };
            count += 1;
        }
        count
    };
    let found = warp(
        |lane| lane + 1,
        "mov.u32 %d, 0;
         NEXT: setp.eq.u32 %p, %x, 1;
         @%p bra DONE;
         add.u32 %d, %d, 1;
         and.b32 %i, %x, 1;
         setp.eq.u32 %q, %i, 0;
         @%q bra EVEN;
         mad.lo.u32 %x, %x, 3, 1;
         bra.uni NEXT;
         EVEN: shr.u32 %x, %x, 1;
         bra NEXT;
         DONE: activemask.b32 %k; setp.ne.u32 %p, %k, 0xffffffff; @%p mov.u32 %d, 999;",
    );
    assert_eq!(found, lanes(|lane| steps(lane + 1)));
}

#[test]
fn lanes_that_end_early_are_not_waited_for() {
    let found = threads(
        48,
        |thread| thread,
        "mov.u32 %d, 1; setp.lt.u32 %p, %t, 40; @%p bra GO; ret;
         GO: bar.sync 0; activemask.b32 %i; popc.b32 %d, %i;",
    );
    let expected = |thread| match thread {
        0..32 => 32,
        32..40 => 8,
        _ => thread,
    };
    assert_eq!(found, (0..48).map(expected).collect::<Vec<u32>>());
}

#[test]
fn branches_by_a_table() {
    let found = warp(
        |lane| lane % 3,
        "TABLE: .branchtargets ZERO, ONE, TWO;
         brx.idx %x, TABLE;
         ZERO: mov.u32 %d, 10; bra DONE;
         ONE: mov.u32 %d, 20; bra DONE;
         TWO: mov.u32 %d, 30;
         DONE:",
    );
    assert_eq!(found, lanes(|lane| 10 * (lane % 3 + 1)));
}

#[test]
fn registers_that_say_who_one_is() {
    let special = |register: &str| threads(64, |_| 0, &format!("mov.u32 %d, {register};"));
    let each = |f: fn(u32) -> u32| (0..64).map(f).collect::<Vec<u32>>();
    assert_eq!(special("%laneid"), each(|thread| thread % 32));
    assert_eq!(special("%warpid"), each(|thread| thread / 32));
    assert_eq!(special("%ntid.x"), each(|_| 64));
    assert_eq!(special("%ntid.y"), each(|_| 1));
    assert_eq!(special("%tid.z"), each(|_| 0));
    assert_eq!(special("%nctaid.x"), each(|_| 1));
    assert_eq!(special("%lanemask_eq"), each(|thread| 1 << (thread % 32)));
    assert_eq!(special("%lanemask_lt"), each(|thread| (1 << (thread % 32)) - 1));
    assert_eq!(special("%lanemask_le"), each(|thread| ((2u64 << (thread % 32)) - 1) as u32));
    assert_eq!(special("%lanemask_gt"), each(|thread| !((2u64 << (thread % 32)) - 1) as u32));
    assert_eq!(special("%lanemask_ge"), each(|thread| !((1 << (thread % 32)) - 1)));
    assert_eq!(special("WARP_SZ"), each(|_| 32));
}

#[test]
fn time_goes_on() {
    let found =
        warp(|_| 0, "mov.u32 %i, %clock; mov.u32 %j, %clock; setp.ge.s32 %p, %j, %i; selp.u32 %d, 1, 0, %p;");
    assert_eq!(found, lanes(|_| 1));
    let found =
        warp(|_| 0, "mov.u64 %w, %clock64; mov.u64 %a, %globaltimer; nanosleep.u32 20; mov.u32 %d, 3;");
    assert_eq!(found, lanes(|_| 3));
}

#[test]
fn barriers_that_count() {
    let popc =
        threads(96, |thread| thread, "and.b32 %i, %x, 1; setp.eq.u32 %p, %i, 1; bar.red.popc.u32 %d, 0, %p;");
    assert_eq!(popc, vec![48; 96]);
    let and = "setp.lt.u32 %p, %x, 95; bar.red.and.pred %q, 0, %p; selp.u32 %d, 1, 0, %q;";
    assert_eq!(threads(96, |thread| thread, and), vec![0; 96]);
    assert_eq!(threads(64, |thread| thread, and), vec![1; 64]);
    let or = "setp.eq.u32 %p, %x, 95; bar.red.or.pred %q, 0, %p; selp.u32 %d, 1, 0, %q;";
    assert_eq!(threads(96, |thread| thread, or), vec![1; 96]);
    assert_eq!(threads(64, |thread| thread, or), vec![0; 64]);
}

#[test]
fn functions_that_were_not_inlined() {
    let module = parse(
        ".func (.param .b32 result) twice(.param .b32 x) {
  .reg .b32 %r<3>;
  ld.param.u32 %r1, [x];
  add.u32 %r2, %r1, %r1;
  st.param.b32 [result+0], %r2;
  ret;
}
.visible .entry k(.param .u64 out) {
  .reg .b32 %r<6>;\n  .reg .b64 %rd<3>;\n  .reg .pred %p;
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, %tid.x;
  mov.u32 %r3, %r1;
  setp.lt.u32 %p, %r1, 16;
  @%p bra SKIP;
  {
    .param .b32 param0;
    st.param.b32 [param0+0], %r1;
    .param .b32 retval0;
    call.uni (retval0), twice, (param0);
    ld.param.b32 %r2, [retval0+0];
  }
  {
    .param .b32 param0;
    st.param.b32 [param0+0], %r2;
    .param .b32 retval0;
    call.uni (retval0), twice, (param0);
    ld.param.b32 %r3, [retval0+0];
  }
SKIP:
  mad.wide.u32 %rd2, %r1, 4, %rd1;
  st.global.u32 [%rd2], %r3;
  ret;
}\n",
    );
    let mut card = Card::default();
    let to = card.room(128);
    card.launch(&module, &call("k", 1, 32, &[to])).unwrap();
    assert_eq!(card.words(to, 32), lanes(|lane| if lane < 16 { lane } else { 4 * lane }));
}

#[test]
fn unknown_instructions_are_named_at_load() {
    let text = |instruction: &str| {
        format!("{}.visible .entry k() {{\n.reg .b32 %r<2>;\n{instruction}\nret;\n}}\n", run::HEAD)
    };
    for instruction in [
        "wgmma.fence.sync.aligned;",
        "add.rn.u32 %r1, %r0, %r0;",
        "shfl.sync.zigzag.b32 %r1, %r0, 1, 31, -1;",
    ] {
        let error = softcuda::ptx::parse(&text(instruction)).unwrap_err().to_string();
        let opcode = instruction.split([' ', ';']).next().unwrap();
        assert!(error.contains(opcode) && error.contains("line 6"), "{error}");
    }
}

const SAID: &str = ".extern .func (.param .b32 func_retval0) vprintf(.param .b64 a, .param .b64 b);
.extern .func __assertfail(.param .b64 a, .param .b64 b, .param .b32 c, .param .b64 d, .param .b64 e);
.global .align 1 .b8 format[10] = {37, 100, 32, 37, 115, 32, 37, 102, 10};
.global .align 1 .b8 word[6] = {104, 101, 108, 108, 111};
.global .align 1 .b8 condition[6] = {110, 32, 60, 32, 57};
.global .align 1 .b8 file[7] = {98, 97, 100, 46, 99, 117};
.visible .entry k(.param .u64 out, .param .u64 n) {
  .reg .b32 %r<6>;\n  .reg .b64 %rd<10>;\n  .reg .pred %p;
  .local .align 8 .b8 depot[24];
  ld.param.u64 %rd1, [out];\n  ld.param.u32 %r1, [n];\n  mov.u32 %r2, %tid.x;
  setp.lt.u32 %p, %r2, %r1;\n  @%p bra FINE;
  mov.u64 %rd2, condition;\n  mov.u64 %rd3, file;
  {
    .param .b64 p0;\n st.param.b64 [p0+0], %rd2;\n .param .b64 p1;\n st.param.b64 [p1+0], %rd3;
    .param .b32 p2;\n st.param.b32 [p2+0], 42;\n .param .b64 p3;\n st.param.b64 [p3+0], %rd2;
    .param .b64 p4;\n st.param.b64 [p4+0], 1;
    call.uni __assertfail, (p0, p1, p2, p3, p4);
  }
FINE:
  mov.u64 %rd4, depot;\n  cvta.local.u64 %rd5, %rd4;\n  mov.u64 %rd6, word;\n  cvta.global.u64 %rd6, %rd6;
  st.local.u32 [%rd4], %r2;\n  st.local.u64 [%rd4+8], %rd6;\n  mov.u64 %rd7, 0d3FF8000000000000;\n  st.local.u64 [%rd4+16], %rd7;
  mov.u64 %rd8, format;\n  cvta.global.u64 %rd8, %rd8;
  {
    .param .b64 p0;\n st.param.b64 [p0+0], %rd8;\n .param .b64 p1;\n st.param.b64 [p1+0], %rd5;
    .param .b32 retval0;
    call.uni (retval0), vprintf, (p0, p1);
    ld.param.b32 %r3, [retval0+0];
  }
  mad.wide.u32 %rd9, %r2, 4, %rd1;\n  st.global.u32 [%rd9], %r3;
  ret;
}\n";

#[test]
fn what_kernels_say() {
    let module = parse(SAID);
    let mut card = Card::default();
    let to = card.room(16);
    card.launch(&module, &call("k", 1, 4, &[to, 9])).unwrap();
    assert_eq!(card.words(to, 4), [3; 4], "arguments printed");
    let fault = card.launch(&module, &call("k", 1, 4, &[to, 3])).unwrap_err();
    assert!(fault.to_string().contains("bad.cu:42: n < 9: `n < 9` failed"), "{fault}");
    assert_eq!(fault.place.unwrap().thread, [3, 0, 0]);
}
