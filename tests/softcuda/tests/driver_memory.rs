//! Memory through cudarc: allocation, its end, copies of every kind, page-locked buffers, pools.

mod card;

use card::{Card, code};
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUresult};
use softcuda::Status;

#[test]
fn copies_go_there_and_back() {
    let card = Card::new();
    let stream = card.context.default_stream();
    let bytes: Vec<u8> = (0..1000).map(|i| (i * 7) as u8).collect();
    let there = stream.clone_htod(&bytes).unwrap();
    let mut copy = stream.alloc_zeros::<u8>(1000).unwrap();
    stream.memcpy_dtod(&there.slice(1..998), &mut copy.slice_mut(3..)).unwrap();
    let back = stream.clone_dtoh(&copy).unwrap();
    assert_eq!(back[..3], [0; 3]);
    assert_eq!(back[3..], bytes[1..998]);
}

#[test]
fn every_copy_of_the_raw_interface() {
    let card = Card::new();
    card.context.bind_to_thread().unwrap();
    // SAFETY: raw driver calls on memory that lives through them.
    unsafe {
        let (a, b) = (result::malloc_sync(64).unwrap(), result::malloc_sync(64).unwrap());
        result::memcpy_htod_sync(a, &[1u32, 2, 3, 4]).unwrap();
        result::memcpy_dtod_sync(b, a, 16).unwrap();
        result::memset_d8_sync(b + 4, 0xff, 4).unwrap();
        let mut back = [0u32; 4];
        result::memcpy_dtoh_sync(&mut back, b).unwrap();
        assert_eq!(back, [1, u32::MAX, 3, 4]);
        assert_eq!(sys::cuMemsetD32_v2(a, 9, 4), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuMemsetD16_v2(a + 2, 5, 1), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuMemcpy(back.as_mut_ptr() as u64, a, 16), CUresult::CUDA_SUCCESS);
        assert_eq!(back, [5 << 16 | 9, 9, 9, 9]);
        assert_eq!(sys::cuMemsetD32_v2(a + 2, 9, 1), CUresult::CUDA_ERROR_INVALID_VALUE);
        let (mut base, mut size) = (0, 0);
        assert_eq!(sys::cuMemGetAddressRange_v2(&mut base, &mut size, b + 63), CUresult::CUDA_SUCCESS);
        assert_eq!((base, size), (b, 64));
        result::free_sync(a).unwrap();
        result::free_sync(b).unwrap();
        assert_eq!(code(result::free_sync(b)), CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    assert!(card.device.leaks().is_empty());
}

#[test]
fn a_copy_outside_an_allocation_is_refused() {
    let card = Card::new();
    let stream = card.stream();
    let x = stream.alloc_zeros::<u32>(4).unwrap();
    let at = cudarc::driver::DevicePtr::device_ptr(&x, &stream).0;
    // SAFETY: the addresses are wrong on purpose, and refused.
    unsafe {
        let copy = |to, len| result::memcpy_htod_async(to, &vec![0u8; len], stream.cu_stream());
        assert_eq!(code(copy(at, 17)), CUresult::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(code(copy(at + 12, 5)), CUresult::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(code(copy(64, 1)), CUresult::CUDA_ERROR_INVALID_VALUE);
        copy(at + 12, 4).unwrap();
    }
    let why = card.device.last_report().unwrap();
    assert!(why.message.contains("1 bytes at 0x40"), "{}", why.message);
    assert_eq!(stream.clone_dtoh(&x).unwrap(), [0; 4]);
}

#[test]
fn memory_runs_out_and_comes_back() {
    let card = Card::new();
    card.device.set_memory(1 << 20);
    let stream = card.stream();
    assert_eq!(card.context.total_mem().unwrap(), 1 << 20);
    let half = stream.alloc_zeros::<u8>(1 << 19).unwrap();
    assert_eq!(card.context.mem_get_info().unwrap(), (1 << 19, 1 << 20));
    // SAFETY: never read.
    let too_much = unsafe { stream.alloc::<u8>((1 << 19) + 1) };
    assert_eq!(code(too_much), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    let why = card.device.last_report().unwrap();
    assert_eq!(why.code, Status::OUT_OF_MEMORY);
    assert!(why.message.contains("524289 bytes asked for, 524288 free"), "{}", why.message);
    // The free is only queued: an allocation that needs its memory waits for it.
    drop(half);
    let whole = stream.alloc_zeros::<u8>(1 << 20).unwrap();
    drop(whole);
    card.context.synchronize().unwrap();
    assert_eq!(card.device.used_memory(), 0);
    assert_eq!(card.device.most_used_memory(), 1 << 20);
}

#[test]
fn empty_allocations_are_refused_and_empty_copies_do_nothing() {
    let card = Card::new();
    let stream = card.stream();
    card.context.bind_to_thread().unwrap();
    // SAFETY: nothing is touched.
    unsafe {
        assert_eq!(code(result::malloc_sync(0)), CUresult::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(code(result::malloc_async(stream.cu_stream(), 0)), CUresult::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(code(result::malloc_host(0, 0)), CUresult::CUDA_ERROR_INVALID_VALUE);
        result::memcpy_htod_sync::<u8>(0, &[]).unwrap();
        result::free_sync(0).unwrap();
    }
}

/// Copies a page-locked 1 to the device, and writes 2 into the buffer without waiting.
fn reuse_staging(card: &Card) -> Result<u32, cudarc::driver::DriverError> {
    let stream = card.stream();
    card.context.bind_to_thread()?;
    // SAFETY: raw copies; the buffer lives through them. That it is written meanwhile is the point.
    unsafe {
        let pinned = result::malloc_host(4, 0)?.cast::<u32>();
        let to = stream.alloc::<u32>(1)?;
        let at = cudarc::driver::DevicePtr::device_ptr(&to, &stream).0;
        *pinned = 1;
        result::memcpy_htod_async(at, std::slice::from_ref(&*pinned), stream.cu_stream())?;
        pinned.write_volatile(2);
        let seen = stream.clone_dtoh(&to)?[0];
        result::free_host(pinned.cast())?;
        Ok(seen)
    }
}

/// Page-locked memory is read when the copy runs, so it must not change before: found, unless the schedule
/// ran the copy at once.
#[test]
fn staging_that_is_reused_too_early_is_found() {
    let (mut found, mut lucky) = (0, 0);
    for seed in 0..=20 {
        let card = Card::new();
        card.device.set_seed(seed);
        match reuse_staging(&card) {
            Ok(seen) => {
                assert_eq!(seen, 1, "seed {seed}");
                lucky += 1;
            }
            Err(_) => {
                let fault = card.device.first_fault().unwrap();
                assert!(fault.message.contains("changed the page-locked source"), "{}", fault.message);
                found += 1;
            }
        }
        assert!(seed != 0 || found == 1, "nothing runs at once under seed 0");
    }
    assert!(found > 5 && lucky > 0, "{found} found, {lucky} lucky");
}

/// Pageable memory is read during the call.
#[test]
fn pageable_memory_may_change_after_the_call() {
    for seed in 0..=20 {
        let card = Card::new();
        card.device.set_seed(seed);
        let stream = card.stream();
        let mut to = stream.alloc_zeros::<u32>(4).unwrap();
        let mut from = vec![1u32; 4];
        stream.memcpy_htod(&from, &mut to).unwrap();
        from.fill(2);
        assert_eq!(stream.clone_dtoh(&to).unwrap(), [1; 4]);
    }
}

/// What the stream itself puts into the buffer before it is read may change it.
#[test]
fn staging_may_be_filled_in_stream_order() {
    unsafe extern "C" fn put_five(at: *mut std::ffi::c_void) {
        // SAFETY: the buffer outlives the stream's work.
        unsafe { at.cast::<u32>().write_volatile(5) };
    }
    for seed in 0..=20 {
        let card = Card::new();
        card.device.set_seed(seed);
        let stream = card.stream();
        card.context.bind_to_thread().unwrap();
        // SAFETY: raw copies in stream order; the buffer is freed after the wait.
        unsafe {
            let pinned = result::malloc_host(4, 0).unwrap().cast::<u32>();
            let to = stream.alloc_zeros::<u32>(1).unwrap();
            let at = cudarc::driver::DevicePtr::device_ptr(&to, &stream).0;
            let raw = stream.cu_stream();
            result::stream::launch_host_function(raw, put_five, pinned.cast()).unwrap();
            result::memcpy_htod_async(at, std::slice::from_ref(&*pinned), raw).unwrap();
            assert_eq!(stream.clone_dtoh(&to).unwrap(), [5]);
            let other = stream.clone_htod(&[7u32]).unwrap();
            let from = cudarc::driver::DevicePtr::device_ptr(&other, &stream).0;
            result::memcpy_dtoh_async(std::slice::from_mut(&mut *pinned), from, raw).unwrap();
            result::memcpy_htod_async(at, std::slice::from_ref(&*pinned), raw).unwrap();
            assert_eq!(stream.clone_dtoh(&to).unwrap(), [7]);
            stream.synchronize().unwrap();
            result::free_host(pinned.cast()).unwrap();
        }
        assert_eq!(card.device.reports(), [], "seed {seed}");
    }
}

#[test]
fn a_download_to_pinned_memory_is_there_after_the_wait_only() {
    let card = Card::new();
    let stream = card.stream();
    let from = stream.clone_htod(&[5u32; 8]).unwrap();
    // SAFETY: any bits are a number; nothing but these is expected before the wait.
    let mut pinned = unsafe { card.context.alloc_pinned_with_flags::<u32>(8, 0) }.unwrap();
    let early = pinned.as_mut_ptr().unwrap();
    stream.memcpy_dtoh(&from, &mut pinned).unwrap();
    // SAFETY: a peek, before the copy has run.
    assert_eq!(unsafe { early.read_volatile() }, u32::MAX);
    // cudarc's own wait is an event that it records only while it tracks events.
    assert_eq!(pinned.as_slice().unwrap(), [u32::MAX; 8]);
    stream.synchronize().unwrap();
    assert_eq!(pinned.as_slice().unwrap(), [5; 8]);
}

#[test]
fn freeing_a_pinned_buffer_in_use_is_a_fault() {
    let card = Card::new();
    let stream = card.stream();
    card.context.bind_to_thread().unwrap();
    let to = stream.alloc_zeros::<u32>(1).unwrap();
    // SAFETY: the buffer is freed too early, which is the point.
    unsafe {
        let at = cudarc::driver::DevicePtr::device_ptr(&to, &stream).0;
        let pinned = result::malloc_host(4, 0).unwrap().cast::<u32>();
        result::memcpy_htod_async(at, std::slice::from_ref(&*pinned), stream.cu_stream()).unwrap();
        assert_eq!(code(result::free_host(pinned.cast())), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    }
    assert!(card.device.first_fault().unwrap().message.contains("page-locked buffer of 4 bytes freed"));
}

#[test]
fn freed_too_early_is_found_out_when_a_copy_comes_later() {
    for seed in 0..8 {
        let card = Card::new();
        card.device.set_seed(seed);
        let (one, two) = (card.stream(), card.stream());
        let x = one.alloc_zeros::<u32>(4).unwrap();
        one.synchronize().unwrap();
        let at = cudarc::driver::DevicePtr::device_ptr(&x, &one).0;
        drop(x);
        // SAFETY: the memory is being freed on the other stream, which is the point.
        let copied = unsafe { result::memset_d8_async(at, 1, 16, two.cu_stream()) };
        // Refused, if the free ran already; a fault at the wait, if it is yet to come.
        let outcome = copied.and_then(|()| card.context.synchronize());
        assert!(outcome.is_err(), "seed {seed}");
    }
}

#[test]
fn what_is_not_given_back_is_told() {
    let card = Card::new();
    card.context.bind_to_thread().unwrap();
    let stream = card.stream();
    let event = card.context.new_event(None).unwrap();
    // SAFETY: leaked on purpose.
    let (memory, pinned) =
        unsafe { (result::malloc_sync(100).unwrap(), result::malloc_host(10, 0).unwrap()) };
    let leaks = card.device.leaks();
    let has = |what: &str| leaks.iter().any(|leak| leak.starts_with(what));
    assert_eq!(leaks.len(), 4, "{leaks:?}");
    assert!(
        has("device memory: 100 bytes")
            && has("page-locked memory: 10 bytes")
            && has("stream")
            && has("event")
    );
    drop((stream, event));
    let Card { context, device } = card;
    drop(context);
    // The context is gone; what it held was taken from it.
    assert_eq!(device.leaks().len(), 2);
    assert_eq!(device.used_memory(), 0);
    let context = cudarc::driver::CudaContext::new(device.ordinal).unwrap();
    context.bind_to_thread().unwrap();
    // SAFETY: stale addresses on purpose.
    unsafe {
        assert_eq!(code(result::free_sync(memory)), CUresult::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(code(result::free_host(pinned)), CUresult::CUDA_ERROR_INVALID_VALUE);
    }
}

#[test]
fn pools_take_from_the_devices_memory() {
    let card = Card::new();
    let stream = card.stream();
    // SAFETY: raw calls with valid arguments.
    unsafe {
        let own = result::device::get_default_mem_pool(card.context.cu_device()).unwrap();
        assert_eq!(result::device::get_mem_pool(card.context.cu_device()).unwrap(), own);
        let mut properties: sys::CUmemPoolProps = std::mem::zeroed();
        properties.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        properties.location.id = card.device.ordinal as i32;
        let pool = result::mem_pool::create(&properties).unwrap();
        let mut kept = u64::MAX;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, threshold, (&raw mut kept).cast()).unwrap();
        kept = 0;
        result::mem_pool::get_attribute(pool, threshold, (&raw mut kept).cast()).unwrap();
        assert_eq!(kept, u64::MAX);
        let memory = result::mem_pool::alloc_async(pool, 256, stream.cu_stream()).unwrap();
        let used = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT;
        result::mem_pool::get_attribute(pool, used, (&raw mut kept).cast()).unwrap();
        assert_eq!(kept, 256);
        result::free_async(memory, stream.cu_stream()).unwrap();
        result::mem_pool::trim_to(pool, 0).unwrap();
        result::mem_pool::destroy(pool).unwrap();
        assert_eq!(code(result::mem_pool::destroy(pool)), CUresult::CUDA_ERROR_INVALID_HANDLE);
    }
}

#[test]
fn managed_memory_is_not_there() {
    let card = Card::new();
    card.context.bind_to_thread().unwrap();
    let flags = sys::CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL;
    // SAFETY: refused.
    let refused = unsafe { result::malloc_managed(16, flags) };
    assert_eq!(code(refused), CUresult::CUDA_ERROR_NOT_SUPPORTED);
}
