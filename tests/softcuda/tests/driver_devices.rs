//! Devices and contexts: what they say of themselves, and that devices have nothing to do with each other.

mod card;

use std::ffi::CStr;

use card::{Card, code, fill};
use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute, CUresult};
use cudarc::driver::{CudaContext, profiler_start, profiler_stop, result};

#[test]
fn the_driver_is_found_by_its_name() {
    let softcuda = softcuda::install();
    assert!(softcuda.path.ends_with("libsoftcuda.so"));
    // SAFETY: looks for the library.
    assert!(unsafe { sys::is_culib_present() });
    let mut version = 0;
    // SAFETY: a plain question; no initialisation needed.
    assert_eq!(unsafe { sys::cuDriverGetVersion(&mut version) }, CUresult::CUDA_SUCCESS);
    assert_eq!(version, 13000);
    assert_eq!(CudaContext::device_count().unwrap(), 256);
    assert_eq!(code(CudaContext::new(256)), CUresult::CUDA_ERROR_INVALID_DEVICE);
}

/// Every function that cudarc 0.19.10 calls for any CUDA version from 12.0 on; one that lacked would be a panic.
#[test]
fn every_function_that_cudarc_calls_is_there() {
    let names = "cuCtxCreate_v3 cuCtxCreate_v4 cuCtxDestroy_v2 cuCtxGetCacheConfig cuCtxGetCurrent cuCtxGetLimit
        cuCtxGetStreamPriorityRange cuCtxSetCacheConfig cuCtxSetCurrent cuCtxSetFlags cuCtxSetLimit
        cuCtxSynchronize cuDestroyExternalMemory cuDeviceGet cuDeviceGetAttribute cuDeviceGetCount
        cuDeviceGetDefaultMemPool cuDeviceGetMemPool cuDeviceGetName cuDeviceGetUuid cuDeviceGetUuid_v2
        cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxRetain cuDeviceSetMemPool cuDeviceTotalMem_v2
        cuEventCreate cuEventDestroy_v2 cuEventElapsedTime cuEventElapsedTime_v2 cuEventQuery cuEventRecord
        cuEventSynchronize cuExternalMemoryGetMappedBuffer cuFuncGetAttribute cuFuncSetAttribute
        cuFuncSetCacheConfig cuGetErrorName cuGetErrorString cuGraphDestroy cuGraphExecDestroy
        cuGraphInstantiateWithFlags cuGraphLaunch cuGraphUpload cuImportExternalMemory cuInit
        cuLaunchCooperativeKernel cuLaunchHostFunc cuLaunchKernel cuMemAdvise_v2 cuMemAllocAsync
        cuMemAllocFromPoolAsync cuMemAllocManaged cuMemAlloc_v2 cuMemFreeAsync cuMemFreeHost cuMemFree_v2
        cuMemGetInfo_v2 cuMemHostAlloc cuMemPoolCreate cuMemPoolDestroy cuMemPoolGetAttribute
        cuMemPoolSetAttribute cuMemPoolTrimTo cuMemPrefetchAsync_v2 cuMemcpyDtoDAsync_v2 cuMemcpyDtoD_v2
        cuMemcpyDtoHAsync_v2 cuMemcpyDtoH_v2 cuMemcpyHtoDAsync_v2 cuMemcpyHtoD_v2 cuMemcpyPeerAsync
        cuMemsetD8Async cuMemsetD8_v2 cuModuleGetFunction cuModuleGetGlobal_v2 cuModuleLoad cuModuleLoadData
        cuModuleUnload cuOccupancyAvailableDynamicSMemPerBlock cuOccupancyMaxActiveBlocksPerMultiprocessor
        cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags cuOccupancyMaxActiveClusters
        cuOccupancyMaxPotentialBlockSize cuOccupancyMaxPotentialBlockSizeWithFlags
        cuOccupancyMaxPotentialClusterSize cuProfilerStart cuProfilerStop cuStreamAttachMemAsync
        cuStreamBeginCapture_v2 cuStreamCreate cuStreamCreateWithPriority cuStreamDestroy_v2 cuStreamEndCapture
        cuStreamIsCapturing cuStreamSynchronize cuStreamWaitEvent";
    softcuda::install();
    for name in names.split_whitespace() {
        // SAFETY: only asked for, not called.
        let found = unsafe { sys::culib().get::<*const ()>(name.as_bytes()).is_ok() };
        assert!(found, "{name}");
    }
}

/// A folder with a library that bears the driver's file name and is none.
fn impostor() -> std::path::PathBuf {
    let folder = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("impostor");
    std::fs::create_dir_all(&folder).unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let some =
        maps.lines().find_map(|line| line.split_whitespace().nth(5).filter(|path| path.contains("libgcc_s")));
    std::fs::copy(some.expect("a test has libgcc_s loaded"), folder.join("libcuda.so")).unwrap();
    folder
}

/// A process that finds the impostor where it looks for libraries, as one with a real driver installed does.
#[test]
fn a_driver_on_the_machine_is_not_taken() {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_driver_is_found_by_its_name"])
        .env("LD_LIBRARY_PATH", impostor())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
fn errors_have_names_and_sentences() {
    softcuda::install();
    for (code, name, text) in [
        (CUresult::CUDA_SUCCESS, c"CUDA_SUCCESS", c"no error"),
        (CUresult::CUDA_ERROR_OUT_OF_MEMORY, c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
        (
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
            c"CUDA_ERROR_ILLEGAL_ADDRESS",
            c"an illegal memory access was encountered",
        ),
    ] {
        let error = cudarc::driver::DriverError(code);
        assert_eq!((error.error_name().unwrap(), error.error_string().unwrap()), (name, text));
    }
    let mut text = c"unset".as_ptr();
    // A code that the library does not know: an error, and no text.
    // SAFETY: 808 is a code of the enumeration.
    let answer = unsafe { sys::cuGetErrorName(CUresult::CUDA_ERROR_MPS_MAX_CLIENTS_REACHED, &mut text) };
    assert_eq!(answer, CUresult::CUDA_ERROR_INVALID_VALUE);
    assert!(text.is_null());
}

#[test]
fn a_device_says_what_it_is() {
    let card = Card::new();
    assert_eq!(card.context.name().unwrap(), "softcuda sm_80");
    assert_eq!(card.context.compute_capability().unwrap(), (8, 0));
    assert_eq!(card.context.total_mem().unwrap(), 4 << 30);
    let get = |attribute| card.context.attribute(attribute).unwrap();
    assert_eq!(get(Attribute::CU_DEVICE_ATTRIBUTE_WARP_SIZE), 32);
    assert_eq!(get(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT), 8);
    assert_eq!(get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN), 163 << 10);
    assert_eq!(get(Attribute::CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY), 0);
    card.device.set_attribute(16, 108);
    assert_eq!(get(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT), 108);
    assert!(card.context.has_async_alloc());
    let other = Card::new();
    assert_ne!(card.context.uuid().unwrap().bytes, other.context.uuid().unwrap().bytes);
    // A name that does not fit is cut off, and ends all the same.
    let mut name = [1i8; 5];
    // SAFETY: room for five.
    unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), 5, card.context.cu_device()) };
    // SAFETY: zero-terminated.
    assert_eq!(unsafe { CStr::from_ptr(name.as_ptr()) }, c"soft");
}

/// Without pools cudarc takes the synchronous calls.
#[test]
fn a_device_without_pools() {
    let device = softcuda::install().fresh_device();
    device.set_attribute(115, 0);
    let context = CudaContext::new(device.ordinal).unwrap();
    assert!(!context.has_async_alloc());
    let stream = context.default_stream();
    let x = stream.clone_htod(&[1u32, 2]).unwrap();
    assert_eq!(stream.clone_dtoh(&x).unwrap(), [1, 2]);
    drop(x);
    context.check_err().unwrap();
    assert_eq!(device.used_memory(), 0);
}

#[test]
fn devices_are_independent() {
    let cards: Vec<Card> = (0..6).map(|_| Card::new()).collect();
    cards[1].device.set_memory(1 << 16);
    let threads: Vec<_> = cards
        .into_iter()
        .enumerate()
        .map(|(number, card)| {
            std::thread::spawn(move || {
                card.device.set_seed(number as u64);
                let kernel = card.kernel("fill_u32");
                let stream = card.stream();
                let big = stream.alloc_zeros::<u8>(1 << 17);
                assert_eq!(big.is_ok(), number != 1);
                let x = stream.alloc_zeros::<u32>(100).unwrap();
                fill(&stream, &kernel, &x, number as u32).unwrap();
                if number == 2 {
                    let nine = 109i32;
                    // SAFETY: astray on purpose.
                    let launched = unsafe {
                        use cudarc::driver::PushKernelArg;
                        stream.launch_builder(&kernel).arg(&x).arg(&1u32).arg(&nine).launch(card::each(109))
                    };
                    launched.unwrap();
                    assert!(stream.synchronize().is_err());
                } else {
                    assert_eq!(stream.clone_dtoh(&x).unwrap(), [number as u32; 100]);
                    assert!(card.device.first_fault().is_none());
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

/// An address means memory of one device only.
#[test]
fn addresses_of_another_device_are_refused() {
    let (a, b) = (Card::new(), Card::new());
    let (here, there) = (a.stream(), b.stream());
    let x = here.alloc_zeros::<u32>(64).unwrap();
    here.synchronize().unwrap();
    let at = cudarc::driver::DevicePtr::device_ptr(&x, &here).0;
    b.context.bind_to_thread().unwrap();
    // SAFETY: refused.
    let refused = unsafe { result::memset_d8_async(at, 1, 4, there.cu_stream()) };
    assert_eq!(code(refused), CUresult::CUDA_ERROR_INVALID_VALUE);
    fill(&there, &b.kernel("fill_u32"), &x, 1).unwrap();
    assert_eq!(code(there.synchronize()), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert_eq!(here.clone_dtoh(&x).unwrap(), [0; 64]);
}

/// A given-back device is lent again as new.
#[test]
fn a_device_comes_back_as_new() {
    for _ in 0..300 {
        let card = Card::new();
        assert_eq!(card.context.compute_capability().unwrap(), (8, 0));
        assert_eq!(card.device.used_memory(), 0);
        assert_eq!(card.device.calls_of(softcuda::Kind::Any), 0);
        card.device.set_compute_capability(7, 0);
        let stream = card.stream();
        stream.alloc_zeros::<u8>(100).unwrap();
    }
}

#[test]
fn copies_between_devices_wait_for_each_other() {
    for seed in 0..10 {
        let (a, b) = (Card::tracked(), Card::tracked());
        a.device.set_seed(seed);
        b.device.set_seed(seed + 100);
        let kernel = a.kernel("fill_u32");
        let (here, there) = (a.stream(), b.stream());
        let x = here.alloc_zeros::<u32>(64).unwrap();
        fill(&here, &kernel, &x, 7).unwrap();
        let y = there.clone_dtod(&x).unwrap();
        assert_eq!(there.clone_dtoh(&y).unwrap(), [7; 64], "seed {seed}");
        let back = here.clone_dtod(&y).unwrap();
        assert_eq!(here.clone_dtoh(&back).unwrap(), [7; 64], "seed {seed}");
        assert_eq!(a.device.reports(), []);
        assert_eq!(b.device.reports(), []);
    }
    let mut can = 1;
    // SAFETY: a plain question.
    assert_eq!(unsafe { sys::cuDeviceCanAccessPeer(&mut can, 1, 2) }, CUresult::CUDA_SUCCESS);
    assert_eq!(can, 0);
}

/// A copy from a device that nothing ordered with its writer.
#[test]
fn a_copy_between_devices_can_race() {
    let (a, b) = (Card::new(), Card::new());
    let kernel = a.kernel("fill_u32");
    let (here, there) = (a.stream(), b.stream());
    let x = here.alloc_zeros::<u32>(64).unwrap();
    let y = there.alloc_zeros::<u32>(64).unwrap();
    here.synchronize().unwrap();
    fill(&here, &kernel, &x, 7).unwrap();
    let at = |slice, stream| cudarc::driver::DevicePtr::device_ptr(slice, stream).0;
    // SAFETY: memory of 256 bytes each.
    unsafe {
        result::memcpy_peer_async(
            b.context.cu_ctx(),
            at(&y, &there),
            a.context.cu_ctx(),
            at(&x, &here),
            256,
            there.cu_stream(),
        )
        .unwrap();
    }
    let outcome = there.synchronize().and_then(|()| here.synchronize());
    assert!(outcome.is_err());
    let fault = a.device.first_fault().or(b.device.first_fault()).unwrap();
    assert!(fault.message.contains("fill_u32"), "{}", fault.message);
}

#[test]
fn contexts_nest_and_end() {
    let device = softcuda::install().fresh_device();
    let ordinal = device.ordinal as i32;
    result::init().unwrap();
    let mut contexts = [std::ptr::null_mut(); 2];
    let current = || result::ctx::get_current().unwrap();
    // SAFETY: raw calls with live handles, and stale ones where it says so.
    unsafe {
        for context in &mut contexts {
            assert_eq!(sys::cuCtxCreate_v2(context, 0, ordinal), CUresult::CUDA_SUCCESS);
            assert_eq!(current(), Some(*context));
        }
        let mut popped = std::ptr::null_mut();
        assert_eq!(sys::cuCtxPopCurrent_v2(&mut popped), CUresult::CUDA_SUCCESS);
        assert_eq!((popped, current()), (contexts[1], Some(contexts[0])));
        assert_eq!(sys::cuCtxPushCurrent_v2(contexts[1]), CUresult::CUDA_SUCCESS);
        let mut found = 0;
        assert_eq!(sys::cuCtxGetDevice(&mut found), CUresult::CUDA_SUCCESS);
        assert_eq!(found, ordinal);
        assert_eq!(sys::cuCtxDestroy_v2(contexts[1]), CUresult::CUDA_SUCCESS);
        assert_eq!(current(), Some(contexts[0]));
        // Stale.
        assert_eq!(code(result::ctx::set_current(contexts[1])), CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED);
        assert_eq!(sys::cuCtxDestroy_v2(contexts[1]), CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED);
        result::ctx::set_current(std::ptr::null_mut()).unwrap();
        assert_eq!(current(), None);
        assert_eq!(code(result::malloc_sync(4)), CUresult::CUDA_ERROR_INVALID_CONTEXT);
        assert_eq!(sys::cuCtxDestroy_v2(contexts[0]), CUresult::CUDA_SUCCESS);
        // The primary context ends when all who retained it have released it.
        let device = result::device::get(ordinal).unwrap();
        let primary = result::primary_ctx::retain(device).unwrap();
        assert_eq!(result::primary_ctx::retain(device).unwrap(), primary);
        assert_eq!(sys::cuCtxDestroy_v2(primary), CUresult::CUDA_ERROR_INVALID_CONTEXT);
        result::primary_ctx::release(device).unwrap();
        result::ctx::set_current(primary).unwrap();
        result::primary_ctx::release(device).unwrap();
        assert_eq!(code(result::primary_ctx::release(device)), CUresult::CUDA_ERROR_INVALID_CONTEXT);
        assert_eq!(code(result::ctx::synchronize()), CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED);
        assert_ne!(result::primary_ctx::retain(device).unwrap(), primary);
        result::primary_ctx::release(device).unwrap();
    }
}

#[test]
fn limits_caches_and_the_profiler() {
    let card = Card::new();
    let stack = sys::CUlimit::CU_LIMIT_STACK_SIZE;
    card.context.set_limit(stack, 4096).unwrap();
    assert_eq!(card.context.get_limit(stack).unwrap(), 4096);
    let depth = sys::CUlimit::CU_LIMIT_DEV_RUNTIME_SYNC_DEPTH;
    assert_eq!(code(card.context.get_limit(depth)), CUresult::CUDA_ERROR_UNSUPPORTED_LIMIT);
    card.context.set_cache_config(sys::CUfunc_cache::CU_FUNC_CACHE_PREFER_SHARED).unwrap();
    assert_eq!(card.context.get_cache_config().unwrap(), sys::CUfunc_cache::CU_FUNC_CACHE_PREFER_SHARED);
    profiler_start().unwrap();
    profiler_stop().unwrap();
}
