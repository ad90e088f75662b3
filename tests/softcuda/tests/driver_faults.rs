//! What goes wrong on purpose: faults of kernels are sticky, calls fail on demand, and the walk through all
//! of a program's calls.

mod card;

use card::{Card, code, each, fill, grid};
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, DriverError, PushKernelArg, result};
use cudarc::nvrtc::Ptx;
use softcuda::{Kind, Status};

/// A store outside of all memory: the launch is fine, the wait is not, nor is anything after it.
#[test]
fn a_kernels_fault_is_sticky() {
    for seed in 0..8 {
        let card = Card::new();
        card.device.set_seed(seed);
        let stream = card.stream();
        let kernel = card.kernel("fill_u32");
        let x = stream.alloc_zeros::<u32>(8).unwrap();
        // SAFETY: nine elements of eight, which is the point.
        unsafe { stream.launch_builder(&kernel).arg(&x).arg(&1u32).arg(&9i32).launch(each(9)) }.unwrap();
        let bad = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS;
        assert_eq!(code(stream.synchronize()), bad);
        let fault = card.device.first_fault().unwrap();
        assert_eq!(fault.code, Status::ILLEGAL_ADDRESS);
        assert!(fault.sticky && fault.message.contains("fill_u32"), "{}", fault.message);
        assert_eq!(code(stream.synchronize()), bad);
        assert_eq!(code(card.context.synchronize()), bad);
        assert_eq!(code(card.context.new_stream()), bad);
        assert_eq!(code(card.context.new_event(None)), bad);
        assert_eq!(code(stream.alloc_zeros::<u8>(1)), bad);
        assert_eq!(code(fill(&stream, &kernel, &x, 1)), bad);
        assert_eq!(code(card.context.load_module(Ptx::from_src(card::KERNELS))), bad);
        // Giving back works, though it says the same; then the device starts afresh.
        drop((x, kernel, stream));
        assert_eq!(card.device.used_memory(), 0, "seed {seed}");
        let Card { context, device } = card;
        drop(context);
        assert_eq!(device.leaks(), Vec::<String>::new());
        let context = CudaContext::new(device.ordinal).unwrap();
        assert_eq!(context.default_stream().clone_htod(&[1u8]).unwrap().len(), 1);
    }
}

#[test]
fn faults_have_the_drivers_codes() {
    let card = Card::new();
    let stream = card.stream();
    let kernel = card.kernel("store_at_u32");
    let x = stream.alloc_zeros::<u8>(16).unwrap();
    // SAFETY: not aligned, which is the point.
    unsafe { stream.launch_builder(&kernel).arg(&x).arg(&2i32).launch(grid(1, 1)) }.unwrap();
    assert_eq!(code(stream.synchronize()), CUresult::CUDA_ERROR_MISALIGNED_ADDRESS);
    assert_eq!(card.device.first_fault().unwrap().code, Status::MISALIGNED_ADDRESS);
}

/// The kernel that uses freed memory is at fault, not the free.
#[test]
fn use_after_free_is_found() {
    let card = Card::new();
    let stream = card.stream();
    let kernel = card.kernel("store_at_u32");
    let x = stream.alloc_zeros::<u8>(16).unwrap();
    let at = cudarc::driver::DevicePtr::device_ptr(&x, &stream).0;
    drop(x);
    // SAFETY: freed, which is the point.
    unsafe { stream.launch_builder(&kernel).arg(&at).arg(&0i32).launch(grid(1, 1)) }.unwrap();
    assert_eq!(code(stream.synchronize()), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    let fault = card.device.first_fault().unwrap();
    assert!(fault.message.contains("store_at_u32"), "{}", fault.message);
}

/// After a fault nothing more is done, in any stream of the context.
#[test]
fn work_behind_a_fault_is_dropped() {
    let card = Card::new();
    let (one, two) = (card.stream(), card.stream());
    let kernel = card.kernel("store_at_u32");
    let x = one.alloc_zeros::<u8>(16).unwrap();
    unsafe extern "C" fn count(calls: *mut std::ffi::c_void) {
        // SAFETY: the counter outlives the stream's work.
        unsafe { *calls.cast::<u32>() += 1 };
    }
    let mut called = 0u32;
    // SAFETY: as above; the store goes astray, which is the point.
    unsafe {
        one.launch_builder(&kernel).arg(&x).arg(&(1i32 << 20)).launch(grid(1, 1)).unwrap();
        two.join(&one).unwrap();
        result::stream::launch_host_function(two.cu_stream(), count, (&raw mut called).cast()).unwrap();
    }
    assert!(two.synchronize().is_err());
    assert_eq!(called, 0);
    assert_eq!(card.device.counts().len(), 0);
}

#[test]
fn the_nth_call_of_a_kind_fails_with_the_given_code() {
    let card = Card::new();
    let stream = card.stream();
    card.device.fail(Kind::Alloc, 2, Status::OUT_OF_MEMORY);
    // SAFETY: never read.
    let allocate = || unsafe { stream.alloc::<u8>(16) };
    allocate().unwrap();
    assert_eq!(code(allocate()), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    allocate().unwrap();
    assert_eq!(card.device.calls_of(Kind::Alloc), 3);
    let kernel = card.kernel("fill_u32");
    let x = stream.alloc_zeros::<u32>(4).unwrap();
    card.device.fail(Kind::Launch, 1, Status::LAUNCH_OUT_OF_RESOURCES);
    assert_eq!(code(fill(&stream, &kernel, &x, 1)), CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
    // That was no fault of a kernel: the context is as good as ever.
    fill(&stream, &kernel, &x, 2).unwrap();
    assert_eq!(stream.clone_dtoh(&x).unwrap(), [2; 4]);
    let planned = |kind, code| card.device.fail(kind, 1, code);
    planned(Kind::StreamCreate, Status::OUT_OF_MEMORY);
    assert_eq!(code(card.context.new_stream()), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    planned(Kind::EventCreate, Status::OUT_OF_MEMORY);
    assert_eq!(code(card.context.new_event(None)), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    planned(Kind::Copy, Status::INVALID_VALUE);
    assert_eq!(code(stream.clone_dtoh(&x)), CUresult::CUDA_ERROR_INVALID_VALUE);
    card.device.fail_usual(Kind::HostAlloc, 1);
    // SAFETY: refused.
    let pinned = unsafe { card.context.alloc_pinned_with_flags::<u8>(4, 0) };
    assert_eq!(code(pinned), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    // A kernel that fails midway, found at the wait.
    planned(Kind::Kernel, Status::LAUNCH_FAILED);
    fill(&stream, &kernel, &x, 3).unwrap();
    assert_eq!(code(stream.synchronize()), CUresult::CUDA_ERROR_LAUNCH_FAILED);
}

/// A small program: everything that can fail, once.
fn program(ordinal: usize) -> Result<Vec<u32>, DriverError> {
    let context = CudaContext::new(ordinal)?;
    // SAFETY: one stream.
    unsafe { context.disable_event_tracking() };
    let kernel = context.load_module(Ptx::from_src(card::KERNELS))?.load_function("fill_u32")?;
    let stream = context.new_stream()?;
    // SAFETY: any bits are a number.
    let mut pinned = unsafe { context.alloc_pinned_with_flags::<u32>(64, 0) }?;
    let mut x = stream.alloc_zeros::<u32>(64)?;
    stream.memcpy_htod(&pinned, &mut x)?;
    fill(&stream, &kernel, &x, 4)?;
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let captured = fill(&stream, &kernel, &x, 5);
    let graph = stream.end_capture(CUgraphInstantiate_flags(0));
    captured?;
    graph?.expect("a capture gives a graph").launch()?;
    stream.memcpy_dtoh(&x, &mut pinned)?;
    let event = stream.record_event(None)?;
    event.synchronize()?;
    Ok(pinned.as_slice()?.to_vec())
}

/// Every call of the program is made to fail, one after the other: an error each time, and nothing leaks.
#[test]
fn walking_through_all_failures() {
    let device = softcuda::install().fresh_device();
    assert_eq!(program(device.ordinal).unwrap(), [5; 64]);
    for kind in Kind::ALL {
        device.reset_failures();
        program(device.ordinal).unwrap();
        let calls = device.calls_of(kind);
        assert!(calls > 0, "{kind:?} is never called");
        for n in 1..=calls {
            device.reset_failures();
            device.clear_reports();
            device.fail_usual(kind, n);
            let failed = program(device.ordinal);
            assert!(failed.is_err(), "{kind:?} {n}");
            let first = &device.reports()[0];
            assert!(first.message.starts_with("fault injection"), "{kind:?} {n}: {}", first.message);
            assert_eq!(device.leaks(), Vec::<String>::new(), "{kind:?} {n}");
            assert_eq!(device.used_memory(), 0);
        }
    }
    device.reset_failures();
    assert_eq!(program(device.ordinal).unwrap(), [5; 64]);
}
