//! Stream capture and graphs: what is captured, what is refused, and that a replay is scheduled and checked
//! like streams.

mod card;

use std::sync::Arc;

use card::{Card, KERNELS, code, each, fill};
use cudarc::driver::sys::{self, CUgraphInstantiate_flags as Flags, CUresult, CUstreamCaptureMode as Mode};
use cudarc::driver::{CudaStream, PushKernelArg, result};

const SEEDS: std::ops::Range<u64> = 0..20;
const MODE: Mode = Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;

fn begin(stream: &CudaStream) {
    stream.begin_capture(MODE).unwrap();
}

fn end(stream: &Arc<CudaStream>) -> cudarc::driver::CudaGraph {
    stream.end_capture(Flags(0)).unwrap().unwrap()
}

#[test]
fn a_graph_repeats_what_was_captured() {
    for seed in SEEDS {
        let card = Card::new();
        card.device.set_seed(seed);
        let add = card.kernel("add_f32");
        let stream = card.stream();
        let x = stream.clone_htod(&[1f32; 64]).unwrap();
        let mut y = stream.alloc_zeros::<f32>(64).unwrap();
        begin(&stream);
        // SAFETY: 64 elements each.
        unsafe { stream.launch_builder(&add).arg(&mut y).arg(&x).arg(&64i32).launch(each(64)) }.unwrap();
        let graph = end(&stream);
        // Captured, not run.
        assert_eq!(stream.clone_dtoh(&y).unwrap(), [0f32; 64]);
        graph.upload().unwrap();
        for _ in 0..5 {
            graph.launch().unwrap();
        }
        assert_eq!(stream.clone_dtoh(&y).unwrap(), [5f32; 64], "seed {seed}");
        let counts = card.device.counts();
        assert_eq!((counts[0].kernel.as_str(), counts[0].launches), ("add_f32", 5));
        drop((graph, x, y, stream, add));
        card.context.synchronize().unwrap();
        assert_eq!(card.device.leaks(), Vec::<String>::new());
        assert_eq!(card.device.reports(), []);
    }
}

/// Captures y = 2·x on one stream and z = 3·x on another that is forked by an event, then y += z.
fn capture_fork(
    card: &Card,
    [one, two]: [&Arc<CudaStream>; 2],
    [x, y, z]: [&cudarc::driver::CudaSlice<f32>; 3],
    joined: bool,
) -> Result<Option<cudarc::driver::CudaGraph>, cudarc::driver::DriverError> {
    let (scale, add) = (card.kernel("scale_f32"), card.kernel("add_f32"));
    let n = x.len() as i32;
    begin(one);
    two.join(one)?;
    // SAFETY: all have n elements.
    unsafe {
        one.launch_builder(&scale).arg(y).arg(x).arg(&2f32).arg(&n).launch(each(x.len()))?;
        two.launch_builder(&scale).arg(z).arg(x).arg(&3f32).arg(&n).launch(each(x.len()))?;
        if joined {
            one.join(two)?;
        }
        one.launch_builder(&add).arg(y).arg(z).arg(&n).launch(each(x.len()))?;
    }
    one.end_capture(Flags(0))
}

#[test]
fn branches_of_a_graph_join() {
    for seed in SEEDS {
        let card = Card::new();
        card.device.set_seed(seed);
        let (one, two) = (card.stream(), card.stream());
        let x = one.clone_htod(&[1f32; 64]).unwrap();
        let (y, z) = (one.alloc_zeros::<f32>(64).unwrap(), one.alloc_zeros::<f32>(64).unwrap());
        let graph = capture_fork(&card, [&one, &two], [&x, &y, &z], true).unwrap().unwrap();
        assert_eq!(two.capture_status().unwrap(), sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE);
        for _ in 0..3 {
            graph.launch().unwrap();
        }
        assert_eq!(one.clone_dtoh(&y).unwrap(), [5f32; 64], "seed {seed}");
        assert_eq!(card.device.reports(), []);
    }
}

#[test]
fn a_fork_that_is_not_joined_is_refused() {
    let card = Card::new();
    let (one, two) = (card.stream(), card.stream());
    let x = one.clone_htod(&[1f32; 64]).unwrap();
    let (y, z) = (one.alloc_zeros::<f32>(64).unwrap(), one.alloc_zeros::<f32>(64).unwrap());
    let ended = capture_fork(&card, [&one, &two], [&x, &y, &z], false);
    assert_eq!(code(ended), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
    // Both are free again.
    fill_zero(&one);
    fill_zero(&two);
}

fn fill_zero(stream: &Arc<CudaStream>) {
    assert_eq!(stream.clone_dtoh(&stream.alloc_zeros::<u32>(4).unwrap()).unwrap(), [0; 4]);
}

/// Two branches of a graph that touch the same memory race, though no two streams are there at the replay.
#[test]
fn branches_that_share_memory_race() {
    for seed in SEEDS {
        let card = Card::new();
        card.device.set_seed(seed);
        let (scale, kernel) = (card.kernel("scale_f32"), card.kernel("fill_u32"));
        let (one, two) = (card.stream(), card.stream());
        let x = one.clone_htod(&[1f32; 64]).unwrap();
        let y = one.alloc_zeros::<u32>(64).unwrap();
        begin(&one);
        two.join(&one).unwrap();
        // SAFETY: 64 elements each; the race is the point.
        unsafe { two.launch_builder(&scale).arg(&y).arg(&x).arg(&2f32).arg(&64i32).launch(each(64)) }
            .unwrap();
        fill(&one, &kernel, &y, 1).unwrap();
        one.join(&two).unwrap();
        let graph = end(&one);
        graph.launch().unwrap();
        assert!(one.synchronize().is_err(), "seed {seed}");
        let fault = card.device.first_fault().unwrap();
        assert!(
            fault.message.contains("scale_f32") && fault.message.contains("fill_u32"),
            "{}",
            fault.message
        );
    }
}

/// A graph is ordered with what stands before and after it in the stream, and with its own last launch.
#[test]
fn launches_are_ordered_with_the_stream_and_each_other() {
    for seed in SEEDS {
        let card = Card::new();
        card.device.set_seed(seed);
        let kernel = card.kernel("fill_u32");
        let (one, two) = (card.stream(), card.stream());
        let x = one.alloc_zeros::<u32>(8).unwrap();
        begin(&one);
        fill(&one, &kernel, &x, 1).unwrap();
        let graph = end(&one);
        fill(&one, &kernel, &x, 2).unwrap();
        graph.launch().unwrap();
        // SAFETY: a live graph and stream. The launch waits for the other one of the same graph.
        unsafe { result::graph::launch(graph.cu_graph_exec(), two.cu_stream()) }.unwrap();
        fill(&two, &kernel, &x, 3).unwrap();
        assert_eq!(two.clone_dtoh(&x).unwrap(), [3; 8], "seed {seed}");
        assert_eq!(card.device.reports(), []);
    }
}

/// A copy from a page-locked buffer reads it anew at each launch.
#[test]
fn a_replayed_copy_reads_the_buffer_of_then() {
    let card = Card::new();
    let stream = card.stream();
    // SAFETY: written before it is read.
    let mut pinned = unsafe { card.context.alloc_pinned_with_flags::<u32>(4, 0) }.unwrap();
    pinned.as_mut_slice().unwrap().fill(1);
    let mut x = stream.alloc_zeros::<u32>(4).unwrap();
    begin(&stream);
    // SAFETY: the buffer outlives the graph; cudarc's own call would wait for an event of outside.
    unsafe {
        let at = cudarc::driver::DevicePtrMut::device_ptr_mut(&mut x, &stream).0;
        result::memcpy_htod_async(at, pinned.as_slice().unwrap(), stream.cu_stream()).unwrap();
    }
    let graph = end(&stream);
    for value in [5, 6] {
        pinned.as_mut_slice().unwrap().fill(value);
        graph.launch().unwrap();
        assert_eq!(stream.clone_dtoh(&x).unwrap(), [value; 4]);
        stream.synchronize().unwrap();
    }
}

#[test]
fn memsets_copies_and_host_functions_are_captured() {
    let card = Card::new();
    let stream = card.stream();
    let mut x = stream.clone_htod(&[9u32; 8]).unwrap();
    let mut y = stream.alloc_zeros::<u32>(8).unwrap();
    let mut called = 0u32;
    unsafe extern "C" fn count(calls: *mut std::ffi::c_void) {
        // SAFETY: the counter outlives the graph.
        unsafe { *calls.cast::<u32>() += 1 };
    }
    begin(&stream);
    stream.memset_zeros(&mut x.slice_mut(4..)).unwrap();
    stream.memcpy_dtod(&x, &mut y).unwrap();
    // SAFETY: as above.
    unsafe { result::stream::launch_host_function(stream.cu_stream(), count, (&raw mut called).cast()) }
        .unwrap();
    let graph = end(&stream);
    let mut nodes = 0;
    // SAFETY: only the count is asked for.
    let asked = unsafe { sys::cuGraphGetNodes(graph.cu_graph(), std::ptr::null_mut(), &mut nodes) };
    assert_eq!((asked, nodes), (CUresult::CUDA_SUCCESS, 3));
    graph.launch().unwrap();
    graph.launch().unwrap();
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [9, 9, 9, 9, 0, 0, 0, 0]);
    stream.synchronize().unwrap();
    assert_eq!(called, 2);
}

/// What a capture cannot hold is refused, and the capture is lost; afterwards the stream is as before.
#[test]
fn what_a_capture_cannot_hold_is_refused() {
    type Attempt = fn(&Card, &Arc<CudaStream>) -> CUresult;
    let unsupported = CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    let attempts: [(&str, Attempt, CUresult); 9] = [
        ("wait for the stream", |_, stream| code(stream.synchronize()), unsupported),
        (
            "ask the stream",
            // SAFETY: a live stream.
            |_, stream| unsafe { sys::cuStreamQuery(stream.cu_stream()) },
            unsupported,
        ),
        ("wait for the context", |card, _| code(card.context.synchronize()), unsupported),
        ("allocate in the stream", |_, stream| code(stream.alloc_zeros::<u8>(4)), unsupported),
        // SAFETY: refused.
        ("allocate", |_, _| code(unsafe { result::malloc_sync(4) }), unsupported),
        // SAFETY: refused.
        ("allocate on the host", |_, _| code(unsafe { result::malloc_host(4, 0) }), unsupported),
        (
            "load a module",
            |card, _| code(card.context.load_module(cudarc::nvrtc::Ptx::from_src(KERNELS))),
            unsupported,
        ),
        (
            "wait for an event of outside",
            |card, stream| {
                let outside = card.stream().record_event(None).unwrap();
                code(stream.wait(&outside))
            },
            CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION,
        ),
        (
            "wait for an event of inside",
            |_, stream| code(stream.record_event(None).unwrap().synchronize()),
            CUresult::CUDA_ERROR_CAPTURED_EVENT,
        ),
    ];
    for (name, attempt, expected) in attempts {
        let card = Card::new();
        let stream = card.stream();
        begin(&stream);
        assert_eq!(attempt(&card, &stream), expected, "{name}");
        assert_eq!(
            stream.capture_status().unwrap(),
            sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED,
            "{name}"
        );
        assert_eq!(
            code(stream.end_capture(Flags(0)).map(drop)),
            CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
            "{name}"
        );
        fill_zero(&stream);
    }
}

#[test]
fn a_copy_with_pageable_memory_is_not_captured() {
    let card = Card::new();
    let stream = card.stream();
    let mut x = stream.alloc_zeros::<u32>(4).unwrap();
    begin(&stream);
    let copied = stream.memcpy_htod(&[1u32; 4], &mut x);
    assert_eq!(code(copied), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    assert!(card.device.last_report().unwrap().message.contains("pageable"));
    assert!(stream.end_capture(Flags(0)).is_err());
}

#[test]
fn captures_keep_to_themselves() {
    let card = Card::new();
    let (one, two) = (card.stream(), card.stream());
    // Not the default stream, not twice, not ended elsewhere or when there is none.
    let null = card.context.default_stream();
    assert_eq!(code(null.begin_capture(MODE)), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    assert_eq!(code(one.end_capture(Flags(0)).map(drop)), CUresult::CUDA_ERROR_ILLEGAL_STATE);
    begin(&one);
    assert_eq!(code(one.begin_capture(MODE)), CUresult::CUDA_ERROR_INVALID_VALUE);
    let inside = one.record_event(None).unwrap();
    let elsewhere =
        std::thread::scope(|scope| scope.spawn(|| code(one.end_capture(Flags(0)).map(drop))).join().unwrap());
    assert_eq!(elsewhere, CUresult::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    begin(&two);
    assert_eq!(code(two.wait(&inside)), CUresult::CUDA_ERROR_STREAM_CAPTURE_MERGE);
    assert!(two.end_capture(Flags(0)).is_err());
    two.wait(&inside).unwrap();
    assert_eq!(code(two.end_capture(Flags(0)).map(drop)), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
    assert!(one.end_capture(Flags(0)).is_err());
    // The event's capture is over.
    assert_eq!(code(two.wait(&inside)), CUresult::CUDA_ERROR_CAPTURED_EVENT);
}

/// Only a global capture stops other threads; a relaxed one stops nobody.
#[test]
fn modes_say_who_may_allocate_meanwhile() {
    for (mode, here, there) in [
        (Mode::CU_STREAM_CAPTURE_MODE_GLOBAL, false, false),
        (Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, false, true),
        (Mode::CU_STREAM_CAPTURE_MODE_RELAXED, true, true),
    ] {
        for other_thread in [false, true] {
            let card = Card::new();
            let stream = card.stream();
            stream.begin_capture(mode).unwrap();
            let allocate = || {
                card.context.bind_to_thread().unwrap();
                // SAFETY: given back at once.
                unsafe { result::malloc_sync(4).and_then(|memory| result::free_sync(memory)) }
            };
            let done = if other_thread {
                std::thread::scope(|scope| scope.spawn(allocate).join().unwrap())
            } else {
                allocate()
            };
            let allowed = if other_thread { there } else { here };
            assert_eq!(done.is_ok(), allowed, "{mode:?}, other thread: {other_thread}");
            assert_eq!(stream.end_capture(Flags(0)).is_ok(), allowed);
        }
    }
}

#[test]
fn the_default_stream_may_not_wait_for_a_capture() {
    let card = Card::new();
    let null = card.context.default_stream();
    let mut x = null.alloc_zeros::<u32>(4).unwrap();
    let mut raw = std::ptr::null_mut();
    // SAFETY: a plain creation; destroyed below.
    unsafe {
        assert_eq!(sys::cuStreamCreate(&mut raw, 0), CUresult::CUDA_SUCCESS);
        result::stream::begin_capture(raw, MODE).unwrap();
        assert_eq!(code(null.memset_zeros(&mut x)), CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
        assert_eq!(code(result::stream::end_capture(raw)), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        result::stream::destroy(raw).unwrap();
    }
}

#[test]
fn an_empty_capture_is_an_empty_graph() {
    let card = Card::new();
    let stream = card.stream();
    begin(&stream);
    let graph = end(&stream);
    graph.launch().unwrap();
    stream.synchronize().unwrap();
    begin(&stream);
    let refused = stream.end_capture(Flags::CUDA_GRAPH_INSTANTIATE_FLAG_DEVICE_LAUNCH);
    assert_eq!(code(refused.map(drop)), CUresult::CUDA_ERROR_INVALID_VALUE);
    drop(graph);
    assert_eq!(card.device.leaks().len(), 1, "the stream: {:?}", card.device.leaks());
}
