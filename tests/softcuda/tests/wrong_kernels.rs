//! Kernels that are wrong: each must be caught, at the right place.

mod run;

use run::{Call, Card, call, parse};
use softcuda::counters::Counts;
use softcuda::exec::{Fault, Problem};

const REGISTERS: &str =
    ".reg .b16 %h<8>;\n.reg .b32 %r<24>;\n.reg .f32 %f<8>;\n.reg .b64 %rd<16>;\n.reg .pred %p<4>;\n";

/// `%r1` is the thread, `%r2` the block, `%rd1` and `%rd2` the parameters; `%r3` is the address of 1 KiB of
/// shared memory.
fn text(body: &str) -> String {
    format!(
        ".visible .entry wrong(.param .u64 a, .param .u64 b) {{\n{REGISTERS}.shared .align 16 .b8 s[1024];
mov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\nld.param.u64 %rd1, [a];\nld.param.u64 %rd2, [b];\nmov.u32 %r3, s;
{body}\nret;\n}}\n"
    )
}

struct Run {
    blocks: u32,
    threads: u32,
    seed: u64,
}

/// One block of two warps.
const BLOCK: Run = Run { blocks: 1, threads: 64, seed: 0 };
const WARP: Run = Run { blocks: 1, threads: 32, seed: 0 };

impl Run {
    /// With 1 KiB of numbers at `a` and 1 KiB nobody wrote at `b`.
    fn run(&self, body: &str) -> Result<Counts, Fault> {
        let module = parse(&text(body));
        let mut card = Card { seed: self.seed, ..Card::default() };
        let a = card.put(&(0..=255u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
        let b = card.room(1024);
        card.launch(&module, &call("wrong", self.blocks, self.threads, &[a, b]))
    }

    #[track_caller]
    fn fault(&self, body: &str) -> Fault {
        match self.run(body) {
            Ok(_) => panic!("nothing found in\n{body}"),
            Err(fault) => fault,
        }
    }

    #[track_caller]
    fn is_fine(&self, body: &str) {
        if let Err(fault) = self.run(body) {
            panic!("{fault} in\n{body}");
        }
    }
}

/// Whatever order the warps run in.
fn any_order(run: impl Fn(Run)) {
    for seed in 0..8 {
        run(Run { seed, ..BLOCK });
    }
}

macro_rules! assert_problem {
    ($fault:expr, $pattern:pat) => {
        let fault = $fault;
        assert!(matches!(fault.problem, $pattern), "{fault}");
    };
}

const OWN_WORD: &str =
    "mad.wide.u32 %rd3, %r1, 4, %rd1; mad.wide.u32 %rd4, %r1, 4, %rd2; mad.lo.u32 %r4, %r1, 4, %r3;";

#[test]
fn a_fault_says_where() {
    let fault = WARP.fault("setp.ne.u32 %p1, %r1, 5;\n@%p1 bra OUT;\nmul.lo.u32 %r5, %r1, 1000;\ncvt.u64.u32 %rd3, %r5;\nadd.u64 %rd3, %rd3, %rd1;\nld.global.u32 %r6, [%rd3];\nOUT:");
    let place = fault.place.clone().unwrap();
    assert_eq!((place.kernel.as_str(), place.block, place.thread), ("wrong", [0; 3], [5, 0, 0]));
    let whole = format!("{}{}", run::HEAD, text("BODY"));
    let first = whole.lines().position(|line| line == "BODY").unwrap() as u32 + 1;
    assert_eq!(place.ptx_line, first + 5);
    let report = fault.to_string();
    assert!(report.contains("wrong") && report.contains(&place.ptx_line.to_string()), "{report}");
}

#[test]
fn the_source_line_is_known_where_the_text_has_it() {
    let text = format!("{}\n.file 1 \"bad.cu\"\n", text(".loc 1 42 7\nst.global.u32 [%rd1+4096], %r1;"));
    let module = parse(&text);
    let mut card = Card::default();
    let a = card.put(&[0; 1024]);
    let fault = card.launch(&module, &call("wrong", 1, 1, &[a, a])).unwrap_err();
    assert_eq!(fault.place.unwrap().source, Some(("bad.cu".to_owned(), 42)));
}

#[test]
fn out_of_bounds() {
    for body in [
        "ld.global.u32 %r5, [%rd1+1024];",
        "ld.global.u32 %r5, [%rd1-4];",
        "st.global.u8 [%rd1+1024], %r1;",
        "ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%rd1+1016-8+8+8];",
        "mov.u64 %rd3, 0; ld.global.u32 %r5, [%rd3];",
        "mad.wide.u32 %rd3, %r1, 64, %rd1; st.global.u32 [%rd3], %r1;",
        "mad.wide.u32 %rd3, %r1, 64, %rd1; red.global.add.u32 [%rd3], 1;",
        "ld.u32 %r5, [%rd1+1100];",
        "st.shared.u32 [%r3+1024], %r1;",
        "sub.u32 %r4, %r3, 4; st.shared.u32 [%r4], %r1;",
        "cp.async.ca.shared.global [%r3], [%rd1+1024], 4;",
        "cp.async.ca.shared.global [%r3+1024], [%rd1], 4;",
    ] {
        let body = body.replace("1016-8+8+8", "1024");
        assert_problem!(Run { threads: 17, ..WARP }.fault(&body), Problem::OutOfBounds { .. });
    }
    WARP.is_fine(&format!("{OWN_WORD} ld.global.u32 %r5, [%rd3]; st.global.u32 [%rd4], %r5;"));
}

#[test]
fn beyond_what_a_local_array_has() {
    let body = ".local .align 4 .b8 depot[16]; mov.u64 %rd3, depot; st.local.u32 [%rd3+16], %r1;";
    assert_problem!(WARP.fault(body), Problem::OutOfBounds { .. });
}

#[test]
fn misaligned() {
    for body in [
        "ld.global.u32 %r5, [%rd1+2];",
        "ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%rd1+8];",
        "ld.global.v2.u32 {%r5, %r6}, [%rd1+4];",
        "ld.global.u64 %rd3, [%rd1+4];",
        "st.global.u16 [%rd1+1], %h1;",
        "st.shared.u32 [%r3+2], %r1;",
        "st.shared.v2.u32 [%r3+4], {%r1, %r1};",
        "red.global.add.u32 [%rd1+2], 1;",
        "cp.async.cg.shared.global [%r3+8], [%rd1], 16;",
        "cp.async.cg.shared.global [%r3], [%rd1+8], 16;",
    ] {
        assert_problem!(Run { threads: 1, ..WARP }.fault(body), Problem::Misaligned { .. });
    }
}

#[test]
fn never_written() {
    for body in [
        "ld.global.u32 %r5, [%rd2];",
        "ld.shared.u32 %r5, [%r3];",
        // Half of a word was written.
        "st.global.u16 [%rd2], %h1; ld.global.u32 %r5, [%rd2];",
        "red.global.add.u32 [%rd2], 1;",
        "cp.async.ca.shared.global [%r3], [%rd2], 4;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r3];",
    ] {
        assert_problem!(WARP.fault(body), Problem::Uninitialised { .. } | Problem::Race { .. });
    }
    let single = Run { threads: 1, ..WARP };
    assert_problem!(single.fault("ld.global.u32 %r5, [%rd2];"), Problem::Uninitialised { .. });
    single.is_fine("st.global.u16 [%rd2], %h1; st.global.u8 [%rd2+2], %h1; st.global.u8 [%rd2+3], %h1; ld.global.u32 %r5, [%rd2];");
}

#[test]
fn shared_memory_is_new_in_each_block() {
    let body = format!(
        "{OWN_WORD} setp.ne.u32 %p1, %r2, 0; @%p1 bra READ; st.shared.u32 [%r4], %r1; READ: ld.shared.u32 %r5, [%r4];"
    );
    WARP.is_fine(&body);
    let fault = Run { blocks: 2, ..WARP }.fault(&body);
    assert_problem!(&fault, Problem::Uninitialised { .. });
    assert_eq!(fault.place.unwrap().block, [1, 0, 0]);
}

#[test]
fn a_barrier_is_missing() {
    let exchange = |barrier: &str| {
        format!(
            "{OWN_WORD} st.shared.u32 [%r4], %r1; {barrier} xor.b32 %r5, %r1, 32; mad.lo.u32 %r5, %r5, 4, %r3;
             ld.shared.u32 %r6, [%r5];"
        )
    };
    any_order(|run| {
        // Whoever is first reads what is not there yet.
        assert_problem!(run.fault(&exchange("")), Problem::Uninitialised { .. } | Problem::Race { .. });
        assert_problem!(
            run.fault(&exchange("bar.warp.sync -1;")),
            Problem::Uninitialised { .. } | Problem::Race { .. }
        );
        run.is_fine(&exchange("bar.sync 0;"));
    });
}

#[test]
fn a_barrier_before_writing_again_is_missing() {
    let again = |barrier: &str| {
        format!(
            "{OWN_WORD} st.shared.u32 [%r4], %r1; bar.sync 0; xor.b32 %r5, %r1, 32; mad.lo.u32 %r5, %r5, 4, %r3;
             ld.shared.u32 %r6, [%r5]; {barrier} st.shared.u32 [%r4], %r6;"
        )
    };
    any_order(|run| {
        assert_problem!(run.fault(&again("")), Problem::Race { .. });
        run.is_fine(&again("bar.sync 0;"));
    });
}

#[test]
fn lock_step_is_no_barrier() {
    let exchange = |barrier: &str| {
        format!(
            "{OWN_WORD} st.shared.u32 [%r4], %r1; {barrier} xor.b32 %r5, %r1, 1; mad.lo.u32 %r5, %r5, 4, %r3;
             ld.shared.u32 %r6, [%r5];"
        )
    };
    assert_problem!(WARP.fault(&exchange("")), Problem::Race { .. });
    WARP.is_fine(&exchange("bar.warp.sync 0xffffffff;"));
    WARP.is_fine(&exchange("bar.sync 0;"));
    let through_global = |barrier: &str| {
        format!(
            "{OWN_WORD} st.global.u32 [%rd4], %r1; {barrier} xor.b32 %r5, %r1, 1; mad.wide.u32 %rd5, %r5, 4, %rd2;
             ld.global.u32 %r6, [%rd5];"
        )
    };
    assert_problem!(WARP.fault(&through_global("")), Problem::Race { .. });
    WARP.is_fine(&through_global("bar.warp.sync 0xffffffff;"));
}

#[test]
fn two_lanes_write_one_word() {
    assert_problem!(WARP.fault("st.shared.u32 [%r3], %r1;"), Problem::Race { .. });
    assert_problem!(WARP.fault("st.global.u32 [%rd1], 7;"), Problem::Race { .. });
    // Halves of a word are two places.
    WARP.is_fine("mad.wide.u32 %rd3, %r1, 2, %rd1; cvt.u16.u32 %h1, %r1; st.global.u16 [%rd3], %h1;");
    WARP.is_fine("add.u32 %r4, %r3, %r1; st.shared.u8 [%r4], %r1;");
    let half = "mad.wide.u32 %rd3, %r1, 2, %rd1; cvt.u16.u32 %h1, %r1; st.global.u16 [%rd3], %h1;
                xor.b32 %r5, %r1, 1; mad.wide.u32 %rd4, %r5, 2, %rd1; ld.global.u16 %h2, [%rd4];";
    assert_problem!(WARP.fault(half), Problem::Race { .. });
}

#[test]
fn blocks_that_share_a_word() {
    let two = Run { blocks: 2, threads: 1, seed: 0 };
    assert_problem!(two.fault("st.global.u32 [%rd1], %r2;"), Problem::Race { .. });
    assert_problem!(
        two.fault(
            "setp.eq.u32 %p1, %r2, 0; @%p1 st.global.u32 [%rd1], %r2; @!%p1 ld.global.u32 %r5, [%rd1];"
        ),
        Problem::Race { .. }
    );
    assert_problem!(
        two.fault(
            "setp.eq.u32 %p1, %r2, 0; @!%p1 st.global.u32 [%rd1], %r2; @%p1 ld.global.u32 %r5, [%rd1];"
        ),
        Problem::Race { .. }
    );
    // Barriers are of one block.
    assert_problem!(
        two.fault("ld.global.u32 %r5, [%rd1]; bar.sync 0; st.global.u32 [%rd1], %r2;"),
        Problem::Race { .. }
    );
    two.is_fine("mad.wide.u32 %rd3, %r2, 4, %rd1; st.global.u32 [%rd3], %r2; ld.global.u32 %r5, [%rd1+100];");
}

#[test]
fn atomics_do_not_race_with_each_other() {
    let two = Run { blocks: 2, threads: 64, seed: 3 };
    two.is_fine("red.global.add.u32 [%rd1], 1; atom.global.max.u32 %r5, [%rd1], %r1;");
    assert_problem!(
        two.fault("red.global.add.u32 [%rd1], 1; ld.global.u32 %r5, [%rd1];"),
        Problem::Race { .. }
    );
    assert_problem!(
        BLOCK.fault(
            "setp.eq.u32 %p1, %r1, 0; @%p1 st.global.u32 [%rd1], 1; @!%p1 red.global.add.u32 [%rd1], 1;"
        ),
        Problem::Race { .. }
    );
}

#[test]
fn a_barrier_that_some_lanes_do_not_reach() {
    let body = "setp.lt.u32 %p1, %r1, 16; @!%p1 bra OUT; bar.sync 0; OUT: add.u32 %r5, %r1, 1; bar.sync 0;";
    assert_problem!(BLOCK.fault(body), Problem::DivergentBarrier { .. } | Problem::Deadlock { .. });
    let body = "setp.lt.u32 %p1, %r1, 16; @%p1 bar.sync 0; @!%p1 bar.sync 1;";
    assert_problem!(WARP.fault(body), Problem::DivergentBarrier { .. } | Problem::Deadlock { .. });
    let body = "setp.lt.u32 %p1, %r1, 32; @!%p1 bra OUT; bar.sync 1, 128; OUT:";
    assert_problem!(BLOCK.fault(body), Problem::Deadlock { .. });
    // One warp waits more often than the other.
    let body = "setp.lt.u32 %p1, %r1, 32; @!%p1 bra OUT; bar.sync 0; bar.sync 1; OUT: bar.sync 0;";
    assert_problem!(BLOCK.fault(body), Problem::DivergentBarrier { .. } | Problem::Deadlock { .. });
}

#[test]
fn warp_instructions_that_miss_lanes() {
    for instruction in [
        "shfl.sync.idx.b32 %r5, %r1, 0, 31, 0xffffffff;",
        "vote.sync.ballot.b32 %r5, %p1, 0xffffffff;",
        "bar.warp.sync 0xffffffff;",
    ] {
        let body = format!(
            "setp.lt.u32 %p1, %r1, 16; @!%p1 bra OTHER; {instruction} bra OUT; OTHER: bar.warp.sync 0xffff0000; shfl.sync.idx.b32 %r6, %r1, 0, 31, 0xffffffff; OUT:"
        );
        let run = WARP.run(&body);
        // Where both wait for all at the same kind of instruction, they may meet: only then is it right.
        match run {
            Ok(_) => assert!(instruction.starts_with("shfl"), "{instruction}"),
            Err(fault) => assert!(matches!(fault.problem, Problem::DivergentBarrier { .. }), "{fault}"),
        }
    }
    // A lane that is not in its own mask.
    assert!(WARP.run("shfl.sync.idx.b32 %r5, %r1, 0, 31, 0xffff;").is_err());
    // A source lane that takes no part.
    assert!(
        WARP.run("setp.lt.u32 %p1, %r1, 16; @!%p1 bra OUT; shfl.sync.idx.b32 %r5, %r1, 20, 31, 0xffff; OUT:")
            .is_err()
    );
}

#[test]
fn copies_read_too_early() {
    let copy = |wait: &str| {
        format!(
            "mad.wide.u32 %rd3, %r1, 16, %rd1; mad.lo.u32 %r4, %r1, 16, %r3;
             cp.async.cg.shared.global [%r4], [%rd3], 16; cp.async.commit_group; {wait}
             ld.shared.u32 %r5, [%r4];"
        )
    };
    assert_problem!(WARP.fault(&copy("")), Problem::Race { .. });
    assert_problem!(WARP.fault(&copy("cp.async.wait_group 1;")), Problem::Race { .. });
    assert_problem!(WARP.fault(&copy("bar.sync 0;")), Problem::Race { .. });
    WARP.is_fine(&copy("cp.async.wait_group 0;"));
    WARP.is_fine(&copy("cp.async.wait_all;"));
    // wait_group waits for what was committed.
    let open = copy("cp.async.wait_group 0;").replace("cp.async.commit_group;", "");
    assert_problem!(WARP.fault(&open), Problem::Race { .. });
}

#[test]
fn copies_of_other_threads_need_a_barrier_after_the_wait() {
    let copy = |wait: &str| {
        format!(
            "mad.wide.u32 %rd3, %r1, 16, %rd1; mad.lo.u32 %r4, %r1, 16, %r3;
             cp.async.cg.shared.global [%r4], [%rd3], 16; cp.async.commit_group; {wait}
             xor.b32 %r6, %r1, 32; mad.lo.u32 %r6, %r6, 16, %r3; ld.shared.u32 %r5, [%r6];"
        )
    };
    any_order(|run| {
        assert!(run.run(&copy("cp.async.wait_group 0;")).is_err());
        assert!(run.run(&copy("bar.sync 0; cp.async.wait_group 0;")).is_err());
        run.is_fine(&copy("cp.async.wait_group 0; bar.sync 0;"));
    });
}

#[test]
fn copies_into_what_is_still_read() {
    let copy = |barrier: &str| {
        format!(
            "{OWN_WORD} st.shared.u32 [%r4], %r1; bar.sync 0; xor.b32 %r6, %r1, 32; mad.lo.u32 %r6, %r6, 4, %r3;
             ld.shared.u32 %r5, [%r6]; {barrier}
             cp.async.ca.shared.global [%r4], [%rd3], 4; cp.async.wait_all;"
        )
    };
    any_order(|run| {
        assert_problem!(run.fault(&copy("")), Problem::Race { .. });
        run.is_fine(&copy("bar.sync 0;"));
    });
    let over = "cp.async.ca.shared.global [%r3], [%rd1], 4; st.shared.u32 [%r3], %r1; cp.async.wait_all;";
    assert_problem!(Run { threads: 1, ..WARP }.fault(over), Problem::Race { .. });
}

#[test]
fn traps_and_endless_loops() {
    assert_problem!(WARP.fault("setp.eq.u32 %p1, %r1, 3; @%p1 trap;"), Problem::Trap { .. });
    let fault = WARP.fault("AGAIN: add.u32 %r5, %r5, 1; bra AGAIN;");
    assert!(fault.to_string().contains("without ending"), "{fault}");
}

#[test]
fn used_after_it_was_freed() {
    let module = parse(&text("ld.global.u32 %r5, [%rd1];"));
    let mut card = Card::default();
    let (a, b) = (card.put(&[0; 64]), card.put(&[0; 64]));
    card.op("the free", |memory, op| memory.free(a, op)).unwrap();
    let fault = card.launch(&module, &call("wrong", 1, 1, &[a, b])).unwrap_err();
    assert!(matches!(fault.problem, Problem::UseAfterFree { .. }), "{fault}");
    assert!(fault.to_string().contains("the free"), "{fault}");
    assert!(card.op("again", |memory, op| memory.free(a, op)).is_err(), "freed twice");
    assert!(card.op("inside", |memory, op| memory.free(b + 4, op)).is_err(), "not the beginning");
    let mut back = [0; 4];
    assert!(card.op("read", |memory, op| memory.read(a, &mut back, op)).is_err());
    // What comes next lies elsewhere.
    for _ in 0..100 {
        assert_ne!(card.room(64), a);
    }
}

/// Two launches, of which the second is ordered after the first or not.
fn two_launches(first: &str, second: &str, ordered: bool) -> Result<Counts, Fault> {
    use softcuda::exec::{Launch, launch};
    use softcuda::memory::{DeviceMemory, Op};
    let mut memory = DeviceMemory::default();
    let (a, b) = (memory.alloc(1024), memory.alloc(1024));
    let before = |_: u32| true;
    memory.write(a, &[1; 1024], &Op { id: 0, happens_before: &before, name: "upload" }).unwrap();
    memory.set(b, &[0], 1024, &Op { id: 1, happens_before: &before, name: "memset" }).unwrap();
    let params: Vec<u8> = [a, b].iter().flat_map(|address| address.to_le_bytes()).collect();
    let mut result = None;
    for (id, body, name) in [(2, first, "sharer"), (3, second, "fuse")] {
        let module = parse(&text(body));
        let launched = Launch {
            module: &module,
            kernel: "wrong",
            globals: &Default::default(),
            grid: [1; 3],
            block: [32, 1, 1],
            dynamic_shared: 0,
            params: &params,
            seed: 0,
            budget: 1 << 20,
        };
        let after = |other: u32| other < 2 || ordered;
        let ran = launch(&launched, &mut memory, &Op { id, happens_before: &after, name });
        if id == 2 {
            ran.unwrap_or_else(|fault| panic!("{fault}"));
        } else {
            result = Some(ran);
        }
    }
    result.unwrap()
}

#[test]
fn operations_that_nothing_orders() {
    let write = format!("{OWN_WORD} st.global.u32 [%rd3], %r1;");
    let read = format!("{OWN_WORD} ld.global.u32 %r5, [%rd3];");
    let elsewhere = format!("{OWN_WORD} st.global.u32 [%rd4+512], %r1;");
    let add = "red.global.add.u32 [%rd1], 1;".to_owned();
    for (first, second, races) in [
        (&write, &read, true),
        (&read, &write, true),
        (&write, &write, true),
        (&read, &read, false),
        (&write, &elsewhere, false),
        (&write, &add, true),
        (&read, &add, true),
    ] {
        let run = two_launches(first, second, false);
        assert_eq!(run.is_err(), races, "{first} then {second}");
        if let Err(fault) = run {
            assert!(matches!(fault.problem, Problem::Race { .. }), "{fault}");
            let report = fault.to_string();
            assert!(report.contains("sharer") && report.contains("fuse"), "{report}");
        }
        two_launches(first, second, true).unwrap_or_else(|fault| panic!("{fault}"));
    }
}

#[test]
fn copies_and_kernels_that_nothing_orders() {
    use softcuda::exec::{Launch, launch};
    use softcuda::memory::{DeviceMemory, Op};
    let module = parse(&text(&format!("{OWN_WORD} st.global.u32 [%rd3], %r1;")));
    let mut memory = DeviceMemory::default();
    let a = memory.alloc(1024);
    let params: Vec<u8> = [a, a].iter().flat_map(|address| address.to_le_bytes()).collect();
    let alone = |_: u32| false;
    let launched = Launch {
        module: &module,
        kernel: "wrong",
        globals: &Default::default(),
        grid: [1; 3],
        block: [32, 1, 1],
        dynamic_shared: 0,
        params: &params,
        seed: 0,
        budget: 1 << 20,
    };
    launch(&launched, &mut memory, &Op { id: 0, happens_before: &alone, name: "kernel" }).unwrap();
    let mut back = [0; 4];
    let op = Op { id: 1, happens_before: &alone, name: "download" };
    assert!(memory.read(a + 124, &mut back, &op).is_err(), "the kernel may not be over");
    assert!(memory.write(a + 124, &back, &op).is_err());
    assert!(memory.free(a, &op).is_err(), "the kernel may still use it");
    assert!(
        memory.write(a + 512, &back, &Op { id: 2, happens_before: &alone, name: "upload" }).is_err(),
        "it was freed"
    );
}

#[test]
fn launches_that_cannot_be() {
    let module = parse(&text(""));
    let mut card = Card::default();
    let a = card.put(&[0; 64]);
    assert!(card.launch(&module, &call("wrong", 1, 2048, &[a, a])).is_err());
    assert!(card.launch(&module, &call("wrong", 0, 32, &[a, a])).is_err());
    assert!(card.launch(&module, &call("wrong", 1, 32, &[a])).is_err());
    assert!(card.launch(&module, &call("nothing", 1, 32, &[a, a])).is_err());
    card.launch(&module, &Call { shared: 1000, ..call("wrong", 1, 1024, &[a, a]) }).unwrap();
}
