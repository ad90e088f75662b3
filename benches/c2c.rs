//! Both prefills and the fuse of all layers, as they lie one after the other and overlapped, in BF16. Longer prompts,
//! f32, the phases and decoding: `cargo run --release --example pair`.

mod machine;
mod synthetic;

use c2c::{
    backend::DType,
    pipeline::{Overlap, WantedLogits},
};
use criterion::{Criterion, criterion_group, criterion_main};
use machine::{Machine, Work};
use synthetic::pair::Pair;

const TOKENS: usize = 128;

fn c2c(criterion: &mut Criterion) {
    let Some(machine) = Machine::open() else { return };
    let mut group = machine.group(criterion, "c2c");
    let tokens = if machine.smoke() { 40 } else { TOKENS };
    let pair = Pair::new(&machine.device, DType::Bf16, machine.smoke());
    let mut link = pair.link(tokens);
    pair.check(&mut link, tokens);

    // The check ends with the prompt that begins with 1.
    let mut run = 1;
    let times = [Overlap::Off, Overlap::Layers].map(|overlap| {
        link.overlap = overlap;
        let which = if overlap == Overlap::Off { "serial" } else { "overlapped" };
        let id = format!("prefill, prefill and fuse of {TOKENS} tokens, {which}");
        machine.bench(&mut group, &id, Work::Bf16(pair.c2c_flops(tokens)), || {
            // Another first token: nothing of the last run is reused.
            run += 1;
            link.prefill(&pair.prompt(tokens, run % 200), WantedLogits::Last).expect("a prefill");
        })
    });
    if let [Some(serial), Some(overlapped)] = times {
        let change = 100.0 * (overlapped.as_secs_f64() / serial.as_secs_f64() - 1.0);
        println!("overlapped over serial: {change:+.1} % time\n");
    }
    group.finish();
}

criterion_group!(benches, c2c);
criterion_main!(benches);
