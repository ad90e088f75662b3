//! The whole road on a GPU, on the fixture pair: the CPU's numbers, whatever the streams' order; a forgotten event is a race; every
//! failure of the driver is an error that leaks nothing.

mod device;

use c2c::{
    align::{Alignment, LayerMapping, Section},
    backend::{
        Backend, DeviceChoice,
        cpu::{Cpu, Schedule, Simd},
        cuda::Cuda,
    },
    engine::{Rules, SamplingParams},
    fuser::{FusionMode, GateOverride},
    model::Goal,
    pipeline::{
        ComputeType, Error, FuserChoice, Link, Mode, Overlap, Prompt, Session, SessionOptions, SharerPrompt,
        Stream, WantedLogits, generate,
    },
};
use device::forgetful::Forgetful;
use softcuda::{Device, Kind, Status};
use std::{path::Path, sync::Arc};

const ROOM: usize = 96;

fn options(dtype: ComputeType, overlap: Overlap) -> SessionOptions {
    let pair = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pair");
    SessionOptions {
        mode: Mode::C2c,
        receiver: Some(pair.join("receiver")),
        sharers: vec![pair.join("sharer")],
        fusers: vec![FuserChoice::Init { seed: 3 }],
        multi_sharer: FusionMode::Sequential,
        alignment: Alignment::None,
        mapping: LayerMapping::LAST_ALIGNED,
        gates: GateOverride::Open,
        fraction: None,
        dtype,
        device: DeviceChoice::Cpu,
        threads: 1,
        overlap,
    }
}

/// 45 tokens in three sections, of which the first two are fused; the sharer reads a few more.
fn prompt() -> Prompt {
    let ids: Vec<u32> = (0..45).map(|i| (i * 37 + 11) % 200).collect();
    let theirs: Vec<u32> = (0..48).map(|i| (i * 23 + 5) % 200).collect();
    let section = |len, sharer_mask| Section { len, sharer_mask };
    Prompt {
        positions: (0..45).collect(),
        sharers: vec![SharerPrompt {
            positions: (0..48).collect(),
            columns: (0..45).map(|token| (token % 5 != 3).then_some(token + 2)).collect(),
            ids: theirs,
        }],
        ids,
        sections: vec![section(30, 1), section(9, 1), section(6, 0)],
    }
}

/// Logits after the prompt, every cache, and the tokens of an answer.
struct Run {
    values: Vec<(String, Vec<f32>)>,
    answer: Vec<u32>,
}

fn run(backend: &Arc<dyn Backend>, dtype: ComputeType, overlap: Overlap) -> Result<Run, Error> {
    let session = Session::open_on(backend.clone(), options(dtype, overlap), &|_, _, _| {})?;
    let mut link = session.link(ROOM, &[ROOM])?;
    let (logits, _) = link.prefill(&prompt(), WantedLogits::Last)?;
    let mut values = vec![("logits".to_string(), logits.clone())];
    values.extend(caches(&link)?);
    let params = SamplingParams { max_new_tokens: 8, ..SamplingParams::default() };
    let stream = Stream { detokenizer: None, on_text: &mut |_| {}, keep_scores: false };
    let answer = generate(&mut link.receiver, logits, &params, stream)?.tokens;
    Ok(Run { values, answer })
}

fn caches(link: &Link) -> Result<Vec<(String, Vec<f32>)>, Error> {
    let mut all = Vec::new();
    for (lane, name) in [(&link.receiver, "receiver"), (&link.sharers[0], "sharer")] {
        for layer in 0..lane.kv.layers().len() {
            let read = lane.read(layer, 0, lane.ids().len())?;
            all.push((format!("{name} keys of layer {layer}"), read.keys));
            all.push((format!("{name} values of layer {layer}"), read.values));
        }
    }
    Ok(all)
}

fn plain_cpu() -> Arc<dyn Backend> {
    Cpu::with(1, Simd::Portable, Schedule::Steady)
}

/// Largest difference in parts of the largest number.
fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let off = |(a, b): (&f32, &f32)| if (a - b).is_finite() { (a - b).abs() } else { f32::INFINITY };
    found.iter().zip(expected).map(off).fold(0.0, f32::max) / largest
}

#[test]
fn the_road_on_a_gpu_is_the_cpus() {
    let Some(gpu) = device::gpu() else { return };
    let expected = run(&plain_cpu(), ComputeType::F32, Overlap::Off).unwrap();
    // In bf16 every layer rounds: what the plain CPU's bf16 caches alone change is 0.01.
    for (dtype, tolerance) in [(ComputeType::F32, 2e-5), (ComputeType::Bf16, 0.05)] {
        let found = run(&gpu.backend, dtype, Overlap::Layers);
        assert_eq!(gpu.fault(), None);
        let found = found.unwrap();
        for ((name, found), (_, expected)) in found.values.iter().zip(&expected.values) {
            let off = difference(found, expected);
            assert!(off <= tolerance, "{dtype:?}: {name} is off by {off}");
        }
        if dtype == ComputeType::F32 {
            assert_eq!(found.answer, expected.answer);
        }
    }
}

#[test]
fn the_order_of_streams_changes_nothing() {
    let Some(soft) = device::soft() else { return };
    let backend: Arc<dyn Backend> = Cuda::open(soft.ordinal).unwrap();
    let serial = run(&backend, ComputeType::Bf16, Overlap::Off).unwrap();
    for seed in 1..=20 {
        soft.set_seed(seed);
        let overlapped = run(&backend, ComputeType::Bf16, Overlap::Layers).unwrap();
        assert_eq!(soft.first_fault(), None, "seed {seed}");
        assert_eq!(overlapped.answer, serial.answer, "seed {seed}");
        for ((name, found), (_, expected)) in overlapped.values.iter().zip(&serial.values) {
            assert!(found == expected, "seed {seed}: {name} differs");
        }
    }
}

#[test]
fn a_replayed_graph_is_the_pass_itself() {
    let Some(gpu) = device::gpu() else { return };
    let session =
        Session::open_on(gpu.backend.clone(), options(ComputeType::Bf16, Overlap::Off), &|_, _, _| {});
    let session = session.unwrap();
    let lane = || {
        let mut lane = session.lane(session.receiver.as_ref().unwrap(), ROOM).unwrap();
        let ids: Vec<u32> = (1..20).collect();
        lane.append(&ids, &(0..19).collect::<Vec<u32>>(), Goal::Hidden, |_, _| {}).unwrap();
        lane
    };
    let (mut replayed, mut issued) = (lane(), lane());
    // Past the end of a block, so that the block table grows.
    for id in 20..40 {
        let graph = replayed.step(id).unwrap();
        let position = issued.next_position();
        issued.append(&[id], &[position], Goal::Hidden, |_, _| {}).unwrap();
        assert!(graph == issued.logits().unwrap(), "token {id}");
    }
    assert_eq!(gpu.fault(), None);
}

#[test]
fn a_forgotten_event_is_a_race() {
    // Waits of the fuser's queue: for the receiver's layer, then for the sharer's.
    for forgotten in 0..2 {
        let Some(soft) = device::soft() else { return };
        let backend: Arc<dyn Backend> = Cuda::open(soft.ordinal).unwrap();
        let watched = Forgetful::new(backend.clone(), |_, _| false);
        let whole: Arc<dyn Backend> = watched.clone();
        run(&whole, ComputeType::Bf16, Overlap::Layers).unwrap();
        assert_eq!(soft.first_fault(), None);
        let waits = watched.waits.lock().unwrap().clone();
        let fuser = (0..waits.len()).max_by_key(|&queue| waits[queue]).unwrap();
        let backend: Arc<dyn Backend> =
            Forgetful::new(backend, move |queue, n| queue == fuser && n % 2 == forgotten);
        // The race poisons the device, as on a card; which call notices first is open.
        let _ = run(&backend, ComputeType::Bf16, Overlap::Layers);
        let fault = soft.first_fault().expect("a race to be reported");
        assert!(fault.message.to_lowercase().contains("race"), "{}", fault.message);
    }
}

fn reach(soft: &Device) -> Result<Vec<u32>, String> {
    let backend: Arc<dyn Backend> = Cuda::open(soft.ordinal).map_err(|error| error.to_string())?;
    run(&backend, ComputeType::Bf16, Overlap::Layers).map(|run| run.answer).map_err(|error| error.to_string())
}

#[test]
fn every_failure_of_the_driver_is_an_error_or_made_good_and_leaks_nothing() {
    let Some(soft) = device::soft() else { return };
    let expected = reach(&soft).unwrap();
    let calls = Kind::ALL.map(|kind| (kind, soft.calls_of(kind)));
    assert_eq!(soft.leaks(), Vec::<String>::new());
    drop(soft);
    for (kind, calls) in calls.into_iter().filter(|&(kind, _)| kind != Kind::Alloc) {
        let mut errors = 0;
        // Every one of the first, then ever fewer: layers make the same calls again and again.
        let mut n = 1;
        while n <= calls {
            let soft = device::soft().unwrap();
            soft.fail_usual(kind, n);
            match reach(&soft) {
                Ok(answer) => assert_eq!(answer, expected, "{kind:?} {n} of {calls}"),
                Err(error) => {
                    errors += 1;
                    assert!(error.to_lowercase().contains("cuda"), "{kind:?} {n} of {calls}: {error}");
                }
            }
            // After a fault in a kernel the driver refuses to free: what is left goes with the context.
            if soft.first_fault().is_none() {
                assert_eq!(soft.leaks(), Vec::<String>::new(), "{kind:?} {n} of {calls}");
            }
            n += 1 + n / 2;
        }
        assert!(errors > 0 || calls == 0, "no failing {kind:?} was noticed");
    }
}

#[test]
fn running_out_of_memory_at_any_allocation_is_an_error_that_leaks_nothing() {
    let Some(soft) = device::soft() else { return };
    reach(&soft).unwrap();
    for n in 1..=soft.calls_of(Kind::Alloc) {
        let soft = device::soft().unwrap();
        // The first time, memory that is kept for later goes back, and it is tried again.
        soft.fail_usual(Kind::Alloc, n);
        soft.fail_usual(Kind::Alloc, n + 1);
        let error = reach(&soft).expect_err("no memory");
        assert!(error.to_lowercase().contains("memory"), "allocation {n}: {error}");
        assert_eq!(soft.leaks(), Vec::<String>::new(), "allocation {n}");
    }
}

#[test]
fn the_device_goes_on_after_a_launch_that_failed() {
    let Some(soft) = device::soft() else { return };
    let expected = reach(&soft).unwrap();
    let launches = soft.calls_of(Kind::Launch);
    let soft = device::soft().unwrap();
    let backend: Arc<dyn Backend> = Cuda::open(soft.ordinal).unwrap();
    soft.fail_usual(Kind::Launch, launches / 2);
    let error =
        run(&backend, ComputeType::Bf16, Overlap::Layers).map(|run| run.answer).unwrap_err().to_string();
    assert!(error.contains("launching `") && error.contains("blocks of"), "{error}");
    // The next answer on the same device is whole.
    assert_eq!(run(&backend, ComputeType::Bf16, Overlap::Layers).unwrap().answer, expected);
}

#[test]
fn out_of_memory_says_what_was_planned_and_what_was_free() {
    let Some(soft) = device::soft() else { return };
    soft.set_memory(600 << 10);
    let error = reach(&soft).unwrap_err();
    assert!(error.contains("out of cuda memory") && error.contains("weights"), "{error}");
    assert!(error.contains("bytes are free"), "{error}");
}

#[test]
fn unfit_devices_are_refused_with_the_reason() {
    let Some(soft) = device::soft() else { return };
    soft.set_compute_capability(7, 5);
    let error = reach(&soft).unwrap_err();
    assert!(error.contains("compute capability 7.5") && error.contains("8.0"), "{error}");
    let soft = device::soft().unwrap();
    soft.set_newest_ptx(8, 0);
    let error = reach(&soft).unwrap_err();
    assert!(error.contains("driver is older"), "{error}");
    assert_eq!(soft.leaks(), Vec::<String>::new());
    // No image of a kernel for this card: whichever module it is, the error names its file.
    for (n, file) in [(1, "kernels/adamw.cu"), (2, "kernels/attention_backward.cu")] {
        for code in [Status::NO_BINARY_FOR_GPU, Status::INVALID_PTX] {
            let soft = device::soft().unwrap();
            soft.fail(Kind::ModuleLoad, n, code);
            let error = reach(&soft).unwrap_err();
            assert!(error.contains(file) && error.contains("cannot use the kernels"), "{error}");
            assert_eq!(soft.leaks(), Vec::<String>::new());
        }
    }
}

#[test]
fn a_gpu_draws_what_the_host_would() {
    let Some(gpu) = device::gpu() else { return };
    let session =
        Session::open_on(gpu.backend.clone(), options(ComputeType::Bf16, Overlap::Off), &|_, _, _| {});
    let session = session.unwrap();
    let plain = SamplingParams { max_new_tokens: 12, ignore_eos: true, ..SamplingParams::default() };
    let warm = SamplingParams { temperature: 1.3, seed: 11, ..plain.clone() };
    let published = Rules::Published;
    for params in [
        plain,
        warm.clone(),
        SamplingParams { top_k: Some(7), ..warm.clone() },
        SamplingParams { top_p: 0.8, ..warm.clone() },
        SamplingParams { top_k: Some(40), top_p: 0.6, min_p: 0.05, ..warm.clone() },
        SamplingParams { top_p: 0.5, rules: published, ..warm.clone() },
        SamplingParams { min_p: 0.2, temperature: 0.7, ..warm.clone() },
        // Beyond what the device ranks: drawn on the host.
        SamplingParams { top_p: 0.9999, temperature: 20.0, ..warm.clone() },
        SamplingParams { repetition_penalty: 1.2, ..warm },
    ] {
        // The host draws where scores are kept.
        let [drawn, host] = [false, true].map(|keep_scores| {
            let mut link = session.link(ROOM, &[ROOM]).unwrap();
            let (logits, _) = link.prefill(&prompt(), WantedLogits::Last).unwrap();
            let stream = Stream { detokenizer: None, on_text: &mut |_| {}, keep_scores };
            generate(&mut link.receiver, logits, &params, stream).unwrap().tokens
        });
        assert_eq!(gpu.fault(), None, "{params:?}");
        assert_eq!(drawn, host, "{params:?}");
    }
}
