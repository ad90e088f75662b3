//! How fast kernels run on one core, with every access checked: `cargo run --release -p softcuda --example rate`.
//! Seconds are the processor's, so that a busy machine counts little.

use softcuda::harness::{Harness, Params, Shape};

/// Loops of 1000 turns: arithmetic, shared memory, `mma`; what a matrix product does, with `cp.async`; and a copy of 16
/// bytes a thread.
const KERNELS: &str = r"
.version 8.0
.target sm_80
.address_size 64
.visible .entry arithmetic(.param .u64 y, .param .u64 x) {
  .reg .b32 %r<4>; .reg .f32 %f<4>; .reg .pred %p; .reg .b64 %rd<4>;
  mov.u32 %r1, %tid.x; cvt.rn.f32.u32 %f1, %r1; mov.f32 %f2, 0f3F800001; mov.u32 %r2, 0;
NEXT:
  fma.rn.f32 %f1, %f1, %f2, %f2; mul.f32 %f3, %f1, %f2; add.f32 %f1, %f3, %f2;
  mad.lo.u32 %r1, %r1, 5, %r2; xor.b32 %r1, %r1, %r2; shl.b32 %r3, %r1, 3; add.u32 %r1, %r1, %r3;
  add.u32 %r2, %r2, 1; setp.lt.u32 %p, %r2, 1000; @%p bra NEXT;
  ret;
}
.visible .entry shared(.param .u64 y, .param .u64 x) {
  .reg .b32 %r<8>; .reg .pred %p; .shared .align 16 .b8 s[1024];
  mov.u32 %r1, %tid.x; mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 4, %r2; mov.u32 %r4, 0; st.shared.u32 [%r3], %r1;
NEXT:
  bar.sync 0; xor.b32 %r5, %r1, 33; mad.lo.u32 %r5, %r5, 4, %r2; ld.shared.u32 %r6, [%r5];
  bar.sync 0; st.shared.u32 [%r3], %r6;
  add.u32 %r4, %r4, 1; setp.lt.u32 %p, %r4, 1000; @%p bra NEXT;
  ret;
}
.visible .entry mma(.param .u64 y, .param .u64 x) {
  .reg .b32 %r<8>; .reg .f32 %f<5>; .reg .pred %p;
  mov.u32 %r1, 0x3f803f80; mov.u32 %r2, 0; mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
NEXT:
  mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r1, %r1, %r1}, {%r1, %r1}, {%f1, %f2, %f3, %f4};
  add.u32 %r2, %r2, 1; setp.lt.u32 %p, %r2, 1000; @%p bra NEXT;
  ret;
}
.visible .entry product(.param .u64 y, .param .u64 x) {
  .reg .b32 %r<16>; .reg .f32 %f<5>; .reg .pred %p; .reg .b64 %rd<4>; .shared .align 128 .b8 tiles[8192];
  ld.param.u64 %rd1, [x]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd1, %r1, 16, %rd1;
  mov.u32 %r2, tiles; mad.lo.u32 %r3, %r1, 16, %r2; and.b32 %r4, %r1, 31; mad.lo.u32 %r4, %r4, 16, %r2; mov.u32 %r5, 0;
  mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
  cp.async.cg.shared.global [%r3], [%rd1], 16; cp.async.commit_group;
NEXT:
  and.b32 %r6, %r5, 1; shl.b32 %r6, %r6, 12; xor.b32 %r7, %r6, 4096; add.u32 %r7, %r3, %r7; add.u32 %r8, %r4, %r6;
  cp.async.cg.shared.global [%r7], [%rd1], 16; cp.async.commit_group; cp.async.wait_group 1; bar.sync 0;
  ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r9, %r10, %r11, %r12}, [%r8];
  mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r9, %r10, %r11, %r12}, {%r9, %r10}, {%f1, %f2, %f3, %f4};
  mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r9, %r10, %r11, %r12}, {%r11, %r12}, {%f1, %f2, %f3, %f4};
  bar.sync 0; add.u32 %r5, %r5, 1; setp.lt.u32 %p, %r5, 1000; @%p bra NEXT;
  cp.async.wait_all; ret;
}
.visible .entry copy(.param .u64 y, .param .u64 x) {
  .reg .b32 %r<8>; .reg .b64 %rd<4>;
  ld.param.u64 %rd1, [y]; ld.param.u64 %rd2, [x];
  mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x; mad.lo.u32 %r1, %r1, %r2, %r3;
  mad.wide.u32 %rd1, %r1, 16, %rd1; mad.wide.u32 %rd2, %r1, 16, %rd2;
  ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%rd2]; st.global.v4.u32 [%rd1], {%r4, %r5, %r6, %r7};
  ret;
}
";

const THREADS: u32 = 256;

fn main() {
    let mut card = Harness::new();
    let module = softcuda::ptx::parse(KERNELS).expect("the text is PTX");
    let module = card.load(module).expect("it has no variables");
    let blocks = 512;
    let bytes = (blocks * THREADS * 16) as usize;
    let (to, from) = (card.alloc(bytes), card.upload(&vec![1; bytes]));
    for (name, kernel, blocks) in [
        ("arithmetic", "arithmetic", 8),
        ("shared", "shared", 8),
        ("mma", "mma", 4),
        ("product", "product", 4),
        ("first touch", "copy", blocks),
        ("copy", "copy", blocks),
    ] {
        let params = Params::new().u64(to).u64(from);
        let start = seconds();
        let counts = card.launch(&module, kernel, Shape::line(blocks, THREADS), params.bytes());
        let counts = counts.unwrap_or_else(|fault| panic!("{fault}"));
        let seconds = seconds() - start;
        let rate = |count: u64| count as f64 / seconds / 1e6;
        let products = counts.mma.values().sum::<u64>();
        print!("{name:12} {:8.1} million lane instructions/s", rate(counts.lane_instructions));
        match products {
            0 => println!(),
            _ => println!(", {:.2} million matrix products/s", rate(products)),
        }
    }
}

/// Of the processor, for this process.
fn seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes to `time` alone.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    assert_eq!(failed, 0, "every Unix counts a process's time");
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
