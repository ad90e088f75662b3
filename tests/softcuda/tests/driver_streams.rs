//! Streams and events: order where CUDA promises it under every schedule, a race reported where it does not.

mod card;

use std::sync::atomic::{AtomicU32, Ordering};

use card::{Card, code, each, fill, grid};
use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, PushKernelArg, result};

const SEEDS: std::ops::Range<u64> = 0..20;

#[test]
fn a_stream_keeps_its_order() {
    for seed in SEEDS {
        let card = Card::new();
        card.device.set_seed(seed);
        let (add, scale) = (card.kernel("add_f32"), card.kernel("scale_f32"));
        let streams = [card.stream(), card.stream(), card.stream()];
        let x = streams[0].clone_htod(&[1f32; 200]).unwrap();
        streams[0].synchronize().unwrap();
        let n = 200i32;
        let results: Vec<_> = streams
            .iter()
            .map(|stream| {
                let mut y = stream.alloc_zeros::<f32>(200).unwrap();
                for _ in 0..5 {
                    // SAFETY: both have n elements.
                    unsafe {
                        stream.launch_builder(&add).arg(&mut y).arg(&x).arg(&n).launch(each(200)).unwrap();
                        stream
                            .launch_builder(&scale)
                            .arg(&y)
                            .arg(&y)
                            .arg(&2f32)
                            .arg(&n)
                            .launch(each(200))
                            .unwrap();
                    }
                }
                y
            })
            .collect();
        for (stream, y) in streams.iter().zip(&results).rev() {
            // ((((0 + 1) · 2 + 1) · 2 + 1) · 2 + 1) · 2 + 1) · 2 = 62
            assert_eq!(stream.clone_dtoh(y).unwrap(), [62f32; 200], "seed {seed}");
        }
        assert_eq!(card.device.reports(), []);
    }
}

/// Two streams pass a buffer back and forth by events.
#[test]
fn events_order_streams_under_every_schedule() {
    for seed in SEEDS {
        let card = Card::new();
        card.device.set_seed(seed);
        let add = card.kernel("add_f32");
        let (one, two) = (card.stream(), card.stream());
        let mut y = one.alloc_zeros::<f32>(64).unwrap();
        let x = one.clone_htod(&[1f32; 64]).unwrap();
        for turn in 0..6 {
            let (from, to) = if turn % 2 == 0 { (&one, &two) } else { (&two, &one) };
            // Waits for what `from` has done, not for what it does later.
            to.wait(&from.record_event(None).unwrap()).unwrap();
            // SAFETY: 64 elements each.
            unsafe { to.launch_builder(&add).arg(&mut y).arg(&x).arg(&64i32).launch(each(64)) }.unwrap();
        }
        assert_eq!(one.clone_dtoh(&y).unwrap(), [6f32; 64], "seed {seed}");
        assert_eq!(card.device.reports(), []);
    }
}

/// The event between two kernels is missing: found whichever way the scheduler goes, both kernels named.
#[test]
fn a_missing_event_is_a_race() {
    for seed in SEEDS {
        let card = Card::new();
        card.device.set_seed(seed);
        let (write, add) = (card.kernel("scale_f32"), card.kernel("add_f32"));
        let (one, two) = (card.stream(), card.stream());
        let x = one.clone_htod(&[1f32; 64]).unwrap();
        let mut y = one.alloc_zeros::<f32>(64).unwrap();
        let mut z = one.alloc_zeros::<f32>(64).unwrap();
        one.synchronize().unwrap();
        // SAFETY: 64 elements each; the race is the point.
        let outcome = unsafe {
            let first =
                one.launch_builder(&write).arg(&mut y).arg(&x).arg(&3f32).arg(&64i32).launch(each(64));
            let second = two.launch_builder(&add).arg(&mut z).arg(&y).arg(&64i32).launch(each(64));
            first.and(second).map(drop).and_then(|()| card.context.synchronize())
        };
        assert!(outcome.is_err(), "seed {seed}");
        let fault = card.device.first_fault().unwrap();
        assert!(
            fault.message.contains("scale_f32") && fault.message.contains("add_f32"),
            "{}",
            fault.message
        );
    }
}

/// An event says what was enqueued before it was recorded; waiting for an older record is not enough.
#[test]
fn a_stale_event_is_a_race() {
    let card = Card::new();
    let kernel = card.kernel("fill_u32");
    let (one, two) = (card.stream(), card.stream());
    let x = one.alloc_zeros::<u32>(8).unwrap();
    let event = one.record_event(None).unwrap();
    fill(&one, &kernel, &x, 1).unwrap();
    two.wait(&event).unwrap();
    fill(&two, &kernel, &x, 2).unwrap();
    assert!(card.context.synchronize().is_err());
    assert!(card.device.first_fault().is_some());
}

#[test]
fn an_event_is_what_it_last_recorded() {
    for seed in SEEDS {
        let card = Card::new();
        card.device.set_seed(seed);
        let kernel = card.kernel("fill_u32");
        let (one, two) = (card.stream(), card.stream());
        let x = one.alloc_zeros::<u32>(8).unwrap();
        let event = card.context.new_event(None).unwrap();
        // Never recorded: there is nothing to wait for.
        two.wait(&event).unwrap();
        assert!(event.try_is_complete().unwrap());
        fill(&one, &kernel, &x, 1).unwrap();
        event.record(&one).unwrap();
        fill(&one, &kernel, &x, 2).unwrap();
        event.record(&one).unwrap();
        two.wait(&event).unwrap();
        fill(&two, &kernel, &x, 3).unwrap();
        assert_eq!(two.clone_dtoh(&x).unwrap(), [3; 8], "seed {seed}");
    }
}

/// Waiting orders what the host enqueues afterwards, on whatever stream.
#[test]
fn the_host_orders_streams_by_waiting() {
    for seed in SEEDS {
        let card = Card::new();
        card.device.set_seed(seed);
        let kernel = card.kernel("fill_u32");
        let (one, two) = (card.stream(), card.stream());
        let x = one.alloc_zeros::<u32>(8).unwrap();
        for (round, wait) in ["stream", "event", "context", "query"].into_iter().enumerate() {
            fill(&one, &kernel, &x, round as u32).unwrap();
            let event = one.record_event(None).unwrap();
            match wait {
                "stream" => one.synchronize().unwrap(),
                "event" => event.synchronize().unwrap(),
                "context" => card.context.synchronize().unwrap(),
                _ => while !event.try_is_complete().unwrap() {},
            }
            fill(&two, &kernel, &x, 100 + round as u32).unwrap();
            assert_eq!(two.clone_dtoh(&x).unwrap(), [100 + round as u32; 8], "seed {seed}, {wait}");
            two.synchronize().unwrap();
        }
        assert_eq!(card.device.reports(), []);
    }
}

/// The legacy default stream waits for blocking streams, and they for it; not so the non-blocking ones.
#[test]
fn the_default_stream_orders_blocking_streams() {
    for (flags, blocking) in [(0, true), (1, false)] {
        for seed in SEEDS {
            let card = Card::new();
            card.device.set_seed(seed);
            let kernel = card.kernel("fill_u32");
            let null = card.context.default_stream();
            let x = null.alloc_zeros::<u32>(8).unwrap();
            null.synchronize().unwrap();
            let mut raw = std::ptr::null_mut();
            // SAFETY: a plain creation; destroyed below.
            let stream = unsafe {
                assert_eq!(sys::cuStreamCreate(&mut raw, flags), CUresult::CUDA_SUCCESS);
                card.context.wrap_borrowed_stream(raw)
            };
            let enqueue = || {
                fill(&stream, &kernel, &x, 1)?;
                fill(&null, &kernel, &x, 2)?;
                fill(&stream, &kernel, &x, 3)?;
                card.context.synchronize()
            };
            assert_eq!(enqueue().is_ok(), blocking, "seed {seed}");
            if blocking {
                assert_eq!(stream.clone_dtoh(&x).unwrap(), [3; 8]);
            } else {
                assert!(card.device.first_fault().is_some());
            }
            // SAFETY: made above.
            unsafe { sys::cuStreamDestroy_v2(raw) };
        }
    }
}

#[test]
fn the_threads_own_stream_is_one_of_each_thread() {
    let card = Card::new();
    let kernel = card.kernel("fill_u32");
    let own = card.context.per_thread_stream();
    let x = own.alloc_zeros::<u32>(8).unwrap();
    own.synchronize().unwrap();
    fill(&own, &kernel, &x, 1).unwrap();
    // It is a blocking stream: the default one waits for it.
    assert_eq!(card.context.default_stream().clone_dtoh(&x).unwrap(), [1; 8]);
    fill(&own, &kernel, &x, 2).unwrap();
    let raced = std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            // The same handle, another stream: nothing orders the two.
            fill(&card.context.per_thread_stream(), &kernel, &x, 3)?;
            card.context.synchronize()
        });
        other.join().unwrap()
    });
    assert!(raced.is_err());
}

/// With seed 0 nothing runs before it is waited for; other seeds let streams run ahead, each its own way.
#[test]
fn seeds_give_different_schedules_and_the_same_seed_the_same() {
    let order = |seed| {
        let card = Card::new();
        card.device.set_seed(seed);
        static TICKET: AtomicU32 = AtomicU32::new(0);
        static ORDER: std::sync::Mutex<Vec<usize>> = std::sync::Mutex::new(Vec::new());
        unsafe extern "C" fn note(which: *mut std::ffi::c_void) {
            TICKET.fetch_add(1, Ordering::Relaxed);
            ORDER.lock().unwrap().push(which as usize);
        }
        ORDER.lock().unwrap().clear();
        let streams: Vec<_> = (0..4).map(|_| card.stream()).collect();
        for round in 0..4 {
            for (number, stream) in streams.iter().enumerate() {
                let which = (round * 4 + number) as *mut std::ffi::c_void;
                // SAFETY: the function only notes the number.
                unsafe { result::stream::launch_host_function(stream.cu_stream(), note, which) }.unwrap();
            }
        }
        for stream in &streams {
            stream.synchronize().unwrap();
        }
        ORDER.lock().unwrap().clone()
    };
    let orders: Vec<_> = (0..10).map(order).collect();
    for order in &orders {
        assert_eq!(order.len(), 16);
        for stream in 0..4 {
            let own: Vec<usize> = order.iter().copied().filter(|which| which % 4 == stream).collect();
            assert!(own.is_sorted(), "{order:?}");
        }
    }
    // Waited for in turn, and nothing else runs.
    assert!(orders[0].iter().map(|which| which % 4).is_sorted());
    let mut distinct = orders.clone();
    distinct.sort();
    distinct.dedup();
    assert!(distinct.len() > 5, "{orders:?}");
    assert_eq!((0..10).map(order).collect::<Vec<_>>(), orders);
}

#[test]
fn a_query_says_not_ready_until_the_work_is_done() {
    let card = Card::new();
    let kernel = card.kernel("fill_u32");
    let stream = card.stream();
    let x = stream.alloc_zeros::<u32>(8).unwrap();
    for value in 0..8 {
        fill(&stream, &kernel, &x, value).unwrap();
    }
    // SAFETY: a live stream.
    let query = || unsafe { sys::cuStreamQuery(stream.cu_stream()) };
    assert_eq!(query(), CUresult::CUDA_ERROR_NOT_READY);
    let mut asked = 1;
    while query() == CUresult::CUDA_ERROR_NOT_READY {
        asked += 1;
    }
    assert!((2..100).contains(&asked), "{asked}");
    assert_eq!(query(), CUresult::CUDA_SUCCESS);
}

#[test]
fn events_measure_time_only_if_they_may() {
    let card = Card::new();
    let stream = card.stream();
    let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let start = stream.record_event(timed).unwrap();
    let kernel = card.kernel("fill_u32");
    let x = stream.alloc_zeros::<u32>(64).unwrap();
    fill(&stream, &kernel, &x, 1).unwrap();
    let end = stream.record_event(timed).unwrap();
    // SAFETY: live events.
    let early = unsafe { result::event::elapsed(start.cu_event(), end.cu_event()) };
    assert_eq!(code(early), CUresult::CUDA_ERROR_NOT_READY);
    let elapsed = start.elapsed_ms(&end).unwrap();
    assert!(elapsed > 0.0);
    assert!(end.elapsed_ms(&start).unwrap() < 0.0);
    let untimed = stream.record_event(None).unwrap();
    assert_eq!(code(start.elapsed_ms(&untimed)), CUresult::CUDA_ERROR_INVALID_HANDLE);
    let never = card.context.new_event(timed).unwrap();
    assert_eq!(code(start.elapsed_ms(&never)), CUresult::CUDA_ERROR_INVALID_HANDLE);
}

#[test]
fn a_destroyed_stream_does_its_work_all_the_same() {
    for seed in SEEDS {
        let card = Card::new();
        card.device.set_seed(seed);
        let kernel = card.kernel("fill_u32");
        let main = card.stream();
        let x = main.alloc_zeros::<u32>(8).unwrap();
        main.synchronize().unwrap();
        let stream = card.stream();
        fill(&stream, &kernel, &x, 5).unwrap();
        let raw = stream.cu_stream();
        drop(stream);
        // SAFETY: a stale handle on purpose.
        assert_eq!(code(unsafe { result::stream::synchronize(raw) }), CUresult::CUDA_ERROR_INVALID_HANDLE);
        card.context.synchronize().unwrap();
        assert_eq!(main.clone_dtoh(&x).unwrap(), [5; 8]);
    }
}

#[test]
fn a_host_function_runs_in_order_and_may_block_while_others_go_on() {
    let card = Card::new();
    let kernel = card.kernel("fill_u32");
    let (one, two) = (card.stream(), card.stream());
    let x = one.alloc_zeros::<u32>(8).unwrap();
    let y = two.alloc_zeros::<u32>(8).unwrap();
    type Gate = (std::sync::mpsc::Receiver<()>, CUresult);
    let (open, wait) = std::sync::mpsc::channel();
    let mut gate: Gate = (wait, CUresult::CUDA_SUCCESS);
    unsafe extern "C" fn pass(gate: *mut std::ffi::c_void) {
        // SAFETY: the gate outlives the stream's work.
        let gate = unsafe { &mut *gate.cast::<Gate>() };
        gate.0.recv().unwrap();
        // SAFETY: a plain call, which is forbidden here.
        gate.1 = unsafe { sys::cuCtxSynchronize() };
    }
    fill(&one, &kernel, &x, 1).unwrap();
    // SAFETY: as above.
    unsafe { result::stream::launch_host_function(one.cu_stream(), pass, (&raw mut gate).cast()) }.unwrap();
    fill(&one, &kernel, &x, 2).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| one.synchronize());
        // The other stream is not held up by a function that waits for this thread.
        fill(&two, &kernel, &y, 7).unwrap();
        assert_eq!(two.clone_dtoh(&y).unwrap(), [7; 8]);
        open.send(()).unwrap();
        waiting.join().unwrap().unwrap();
    });
    assert_eq!(gate.1, CUresult::CUDA_ERROR_NOT_PERMITTED);
    assert_eq!(one.clone_dtoh(&x).unwrap(), [2; 8]);
}

#[test]
fn priorities_and_flags_are_kept() {
    let card = Card::new();
    let (least, greatest) = result::stream::get_priority_range().unwrap();
    assert!(greatest < least);
    let stream = card.context.new_stream_with_priority(greatest - 100).unwrap();
    let (mut priority, mut flags) = (1, 9);
    // SAFETY: live handles.
    unsafe {
        assert_eq!(sys::cuStreamGetPriority(stream.cu_stream(), &mut priority), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuStreamGetFlags(stream.cu_stream(), &mut flags), CUresult::CUDA_SUCCESS);
    }
    assert_eq!((priority, flags), (greatest, 1));
}

/// cudarc's own event tracking orders its streams: no race, whichever stream uses what.
#[test]
fn cudarcs_event_tracking_holds_under_every_schedule() {
    for seed in SEEDS {
        let card = Card::tracked();
        card.device.set_seed(seed);
        let add = card.kernel("add_f32");
        let streams = [card.stream(), card.stream(), card.stream()];
        let x = streams[0].clone_htod(&[1f32; 64]).unwrap();
        let mut y = streams[1].alloc_zeros::<f32>(64).unwrap();
        for turn in 0..9 {
            let stream = &streams[turn % 3];
            // SAFETY: 64 elements each.
            unsafe { stream.launch_builder(&add).arg(&mut y).arg(&x).arg(&64i32).launch(grid(1, 64)) }
                .unwrap();
        }
        assert_eq!(streams[2].clone_dtoh(&y).unwrap(), [9f32; 64]);
        drop((x, y, streams, add));
        card.context.synchronize().unwrap();
        assert_eq!(card.device.reports(), []);
        assert_eq!(card.device.used_memory(), 0);
    }
}

#[test]
fn contexts_of_one_device_have_streams_of_their_own() {
    let card = Card::new();
    let other = CudaContext::new_non_primary(card.device.ordinal, 0).unwrap();
    let stream = other.new_stream().unwrap();
    let event = card.context.new_event(None).unwrap();
    // An event belongs to the context it was made in.
    // SAFETY: live handles.
    let recorded = unsafe { result::event::record(event.cu_event(), stream.cu_stream()) };
    assert_eq!(code(recorded), CUresult::CUDA_ERROR_INVALID_HANDLE);
    drop(stream);
    drop(other);
    assert_eq!(card.device.leaks().len(), 1, "the event of the first context: {:?}", card.device.leaks());
}

/// Threads of the host use one device at a time, each its own streams, whatever they wait for.
#[test]
fn threads_share_a_device() {
    for seed in 0..5 {
        let card = Card::new();
        card.device.set_seed(seed);
        let kernel = card.kernel("fill_u32");
        std::thread::scope(|scope| {
            for thread in 0..4u32 {
                let (card, kernel) = (&card, &kernel);
                scope.spawn(move || {
                    let (one, two) = (card.stream(), card.stream());
                    let x = one.alloc_zeros::<u32>(16).unwrap();
                    for round in 0..20 {
                        fill(&one, kernel, &x, 100 * thread + round).unwrap();
                        two.join(&one).unwrap();
                        assert_eq!(two.clone_dtoh(&x).unwrap(), [100 * thread + round; 16]);
                        one.join(&two).unwrap();
                    }
                });
            }
        });
        assert_eq!(card.device.reports(), [], "seed {seed}");
    }
}
