//! Modules, functions and launches: what loads, what is refused and why, parameters, shared memory, occupancy.

mod card;

use std::ffi::CString;

use card::{Card, KERNELS, code, each, grid};
use cudarc::driver::sys::{self, CUfunction_attribute_enum as Attribute, CUresult};
use cudarc::driver::{DeviceRepr, LaunchConfig, PushKernelArg, result};
use cudarc::nvrtc::Ptx;
use softcuda::{Kind, Status};

#[test]
fn kernels_run_with_their_parameters() {
    let card = Card::new();
    let stream = card.context.default_stream();
    let kernel = card.kernel("scale_f32");
    let x = stream.clone_htod(&[1f32, -2.0, 3.5]).unwrap();
    let mut y = stream.clone_htod(&[9f32; 4]).unwrap();
    // SAFETY: three elements are there. The grid has more threads, which the kernel sends home.
    unsafe { stream.launch_builder(&kernel).arg(&mut y).arg(&x).arg(&2f32).arg(&3i32).launch(each(3)) }
        .unwrap();
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [2.0, -4.0, 7.0, 9.0]);
    assert_eq!(card.device.counts()[0].kernel, "scale_f32");
    card.device.reset_counts();
    assert!(card.device.counts().is_empty());
}

#[repr(C)]
struct Shift {
    x: u64,
    y: u64,
    n: u32,
    step: u8,
}

// SAFETY: plain numbers, laid out as the kernel's struct.
unsafe impl DeviceRepr for Shift {}

#[test]
fn a_struct_by_value_is_one_parameter() {
    let card = Card::new();
    let stream = card.stream();
    let kernel = card.kernel("shift_u32");
    let x = stream.clone_htod(&[1u32, 2, 3]).unwrap();
    let y = stream.alloc_zeros::<u32>(3).unwrap();
    let at = |slice| cudarc::driver::DevicePtr::device_ptr(slice, &stream).0;
    let params = Shift { x: at(&x), y: at(&y), n: 3, step: 7 };
    // SAFETY: the struct names what is there.
    unsafe { stream.launch_builder(&kernel).arg(&params).launch(each(3)) }.unwrap();
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [8, 9, 10]);
}

/// `extra`: the parameters packed in a buffer, instead of a pointer to each.
#[test]
fn parameters_may_come_in_one_buffer() {
    let card = Card::new();
    let stream = card.stream();
    let kernel = card.kernel("fill_u32");
    let x = stream.alloc_zeros::<u32>(4).unwrap();
    let at = cudarc::driver::DevicePtr::device_ptr(&x, &stream).0;
    let packed = [at.to_le_bytes(), (4u64 << 32 | 6).to_le_bytes()].concat();
    let launch = |mut size: usize| {
        let mut extra: [*mut std::ffi::c_void; 5] =
            [1 as _, packed.as_ptr() as _, 2 as _, (&raw mut size).cast(), std::ptr::null_mut()];
        // SAFETY: a pointer, a value, a count, as the kernel has them.
        unsafe {
            sys::cuLaunchKernel(
                kernel.cu_function(),
                1,
                1,
                1,
                4,
                1,
                1,
                0,
                stream.cu_stream(),
                std::ptr::null_mut(),
                extra.as_mut_ptr(),
            )
        }
    };
    assert_eq!(launch(packed.len()), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.clone_dtoh(&x).unwrap(), [6; 4]);
    assert_eq!(launch(8), CUresult::CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn variables_of_a_module_can_be_written_and_read() {
    let card = Card::new();
    let stream = card.stream();
    let module = card.module();
    let kernel = module.load_function("lookup_u32").unwrap();
    let mut table = module.get_global("table", &stream).unwrap();
    assert_eq!(cudarc::driver::DeviceSlice::len(&table), 16);
    let bytes: Vec<u8> = [10u32, 20, 30, 40].iter().flat_map(|x| x.to_le_bytes()).collect();
    stream.memcpy_htod(&bytes, &mut table).unwrap();
    let mut y = stream.alloc_zeros::<u32>(6).unwrap();
    // SAFETY: six elements.
    unsafe { stream.launch_builder(&kernel).arg(&mut y).arg(&6i32).launch(each(6)) }.unwrap();
    // total begins as 7.
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [17, 27, 37, 47, 17, 27]);
    let total = module.get_global("total", &stream).unwrap();
    assert_eq!(stream.clone_dtoh(&total).unwrap(), 7u32.to_le_bytes());
    assert_eq!(code(module.get_global("none", &stream)), CUresult::CUDA_ERROR_NOT_FOUND);
    // Two modules of one text have variables of their own.
    let second = card.module();
    let other = second.get_global("table", &stream).unwrap();
    assert_eq!(stream.clone_dtoh(&other).unwrap(), [0; 16]);
    // Variables are the module's: freeing one is an error, and they end with it.
    let address = cudarc::driver::DevicePtr::device_ptr(&other, &stream).0;
    // SAFETY: refused.
    assert_eq!(code(unsafe { result::free_sync(address) }), CUresult::CUDA_ERROR_INVALID_VALUE);
    let used = card.device.used_memory();
    drop(second);
    assert_eq!(card.device.used_memory(), used - 20);
}

#[test]
fn images_that_do_not_load() {
    let card = Card::new();
    let load = |ptx: Ptx| code(card.context.load_module(ptx).map(drop));
    let why = || card.device.last_report().unwrap().message;
    assert_eq!(
        load(Ptx::from_binary(b"\x7fELF\x02\x01\x01".to_vec())),
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
    );
    assert_eq!(
        load(Ptx::from_binary(vec![0x50, 0xed, 0x55, 0xba, 1, 0])),
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
    );
    assert!(why().contains("machine code"));
    assert_eq!(load(Ptx::from_src("no PTX at all")), CUresult::CUDA_ERROR_INVALID_PTX);
    assert!(why().contains("PTX line 1"), "{}", why());
    assert_eq!(load(Ptx::from_src("")), CUresult::CUDA_ERROR_INVALID_PTX);
    assert_eq!(load(Ptx::from_file("/no/such/file.ptx")), CUresult::CUDA_ERROR_FILE_NOT_FOUND);
    let newer = KERNELS.replace(".version 9.0", ".version 9.1");
    assert_eq!(load(Ptx::from_src(newer)), CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
    let larger = KERNELS.replace(".target sm_80", ".target sm_90");
    assert_eq!(load(Ptx::from_src(larger)), CUresult::CUDA_ERROR_INVALID_PTX);
    assert!(why().contains("sm_90") && why().contains("sm_80"), "{}", why());
    assert_eq!(code(card.module().load_function("nothing")), CUresult::CUDA_ERROR_NOT_FOUND);
    // A cut-off file, anywhere: an error or a module, never a crash.
    for cut in (0..KERNELS.len()).step_by(97) {
        let _ = card.context.load_module(Ptx::from_src(&KERNELS[..cut]));
    }
    assert!(card.device.leaks().is_empty());
}

/// An older driver, and an older card.
#[test]
fn devices_can_be_older() {
    let card = Card::new();
    card.device.set_newest_ptx(8, 7);
    let refused = card.context.load_module(Ptx::from_src(KERNELS));
    assert_eq!(code(refused), CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
    card.device.set_newest_ptx(9, 0);
    card.device.set_compute_capability(7, 5);
    assert_eq!(card.context.compute_capability().unwrap(), (7, 5));
    assert_eq!(card.context.name().unwrap(), "softcuda sm_75");
    assert_eq!(code(card.context.load_module(Ptx::from_src(KERNELS))), CUresult::CUDA_ERROR_INVALID_PTX);
}

#[test]
fn a_file_of_ptx_loads() {
    let card = Card::new();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/ptx/driver.ptx");
    let module = card.context.load_module(Ptx::from_file(path)).unwrap();
    module.load_function("add_f32").unwrap();
    // The same function has the same handle.
    let (one, two) = (module.load_function("fill_u32").unwrap(), module.load_function("fill_u32").unwrap());
    assert_eq!(one.cu_function(), two.cu_function());
    let raw = one.cu_function();
    drop((one, two, module));
    // SAFETY: a stale handle on purpose.
    let stale =
        unsafe { result::function::get_function_attribute(raw, Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION) };
    assert_eq!(code(stale), CUresult::CUDA_ERROR_INVALID_HANDLE);
}

#[test]
fn launches_above_the_limits_are_refused() {
    let card = Card::new();
    let stream = card.stream();
    let kernel = card.kernel("fill_u32");
    let x = stream.alloc_zeros::<u32>(4).unwrap();
    let launch = |grid_dim, block_dim, shared_mem_bytes| {
        let shape = LaunchConfig { grid_dim, block_dim, shared_mem_bytes };
        // SAFETY: n = 0: no thread writes.
        unsafe { stream.launch_builder(&kernel).arg(&x).arg(&1u32).arg(&0i32).launch(shape) }
    };
    for (grid_dim, block_dim, shared, says) in [
        ((0, 1, 1), (1, 1, 1), 0, "grid"),
        ((1, 65536, 1), (1, 1, 1), 0, "grid"),
        ((1, 1, 65536), (1, 1, 1), 0, "grid"),
        ((1, 1, 1), (0, 1, 1), 0, "block"),
        ((1, 1, 1), (1025, 1, 1), 0, "block"),
        ((1, 1, 1), (1, 1, 65), 0, "block"),
        ((1, 1, 1), (32, 33, 1), 0, "block"),
        ((1, 1, 1), (1, 1, 1), (48 << 10) + 1, "shared"),
    ] {
        assert_eq!(code(launch(grid_dim, block_dim, shared)), CUresult::CUDA_ERROR_INVALID_VALUE, "{says}");
        let report = card.device.last_report().unwrap();
        assert!(report.message.contains("fill_u32") && report.message.contains(says), "{}", report.message);
        assert!(!report.sticky);
    }
    launch((3, 2, 2), (8, 4, 2), 48 << 10).unwrap();
    stream.synchronize().unwrap();
    // __launch_bounds__(128)
    let bounded = card.kernel("reverse_u32");
    // SAFETY: refused.
    let refused = unsafe { stream.launch_builder(&bounded).arg(&x).launch(grid(1, 129)) };
    assert_eq!(code(refused), CUresult::CUDA_ERROR_INVALID_VALUE);
    assert!(card.device.last_report().unwrap().message.contains("maxntid"));
}

#[test]
fn parameters_must_be_there() {
    let card = Card::new();
    let stream = card.stream();
    let kernel = card.kernel("fill_u32");
    // SAFETY: no parameters at all: refused.
    let none = unsafe {
        sys::cuLaunchKernel(
            kernel.cu_function(),
            1,
            1,
            1,
            1,
            1,
            1,
            0,
            stream.cu_stream(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    };
    assert_eq!(none, CUresult::CUDA_ERROR_INVALID_VALUE);
}

/// Above 48 KiB, dynamic shared memory must be asked for; a block can be given 163 KiB.
#[test]
fn dynamic_shared_memory_must_be_asked_for() {
    let card = Card::new();
    let stream = card.stream();
    let kernel = card.kernel("reverse_u32");
    let x = stream.clone_htod(&(0..256u32).collect::<Vec<_>>()).unwrap();
    let launch = |bytes| {
        let shape = LaunchConfig { grid_dim: (2, 1, 1), block_dim: (128, 1, 1), shared_mem_bytes: bytes };
        // SAFETY: two blocks of 128.
        unsafe { stream.launch_builder(&kernel).arg(&x).launch(shape) }
    };
    launch(512).unwrap();
    let expected: Vec<u32> = (0..128).rev().chain((128..256).rev()).collect();
    assert_eq!(stream.clone_dtoh(&x).unwrap(), expected);
    let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    let most = |kernel: &cudarc::driver::CudaFunction| kernel.get_attribute(attribute).unwrap();
    assert_eq!(most(&kernel), 48 << 10);
    assert_eq!(code(launch(100 << 10)), CUresult::CUDA_ERROR_INVALID_VALUE);
    kernel.set_attribute(attribute, 100 << 10).unwrap();
    assert_eq!(most(&kernel), 100 << 10);
    launch(100 << 10).unwrap();
    assert_eq!(code(launch((100 << 10) + 1)), CUresult::CUDA_ERROR_INVALID_VALUE);
    kernel.set_attribute(attribute, 163 << 10).unwrap();
    assert_eq!(code(kernel.set_attribute(attribute, (163 << 10) + 1)), CUresult::CUDA_ERROR_INVALID_VALUE);
    // As on sm_86: 99 KiB.
    card.device.set_attribute(97, 99 << 10);
    assert_eq!(code(kernel.set_attribute(attribute, 100 << 10)), CUresult::CUDA_ERROR_INVALID_VALUE);
    stream.synchronize().unwrap();
    assert!(card.device.first_fault().is_none());
}

#[test]
fn functions_say_what_they_are() {
    let card = Card::new();
    let (bounded, free) = (card.kernel("reverse_u32"), card.kernel("fill_u32"));
    let threads = Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
    assert_eq!(bounded.get_attribute(threads).unwrap(), 128);
    assert_eq!(free.get_attribute(threads).unwrap(), 1024);
    assert_eq!(free.get_attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES).unwrap(), 0);
    assert_eq!(free.get_attribute(Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION).unwrap(), 80);
    assert_eq!(free.get_attribute(Attribute::CU_FUNC_ATTRIBUTE_BINARY_VERSION).unwrap(), 80);
    // Only a card's compiler knows.
    let registers = free.get_attribute(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS);
    assert_eq!(code(registers), CUresult::CUDA_ERROR_NOT_SUPPORTED);
}

/// Hand-computed: 2048 threads, 32 blocks and 164 KiB of shared memory, 1 KiB of it a block's own.
#[test]
fn occupancy_is_by_threads_blocks_and_shared_memory() {
    let card = Card::new();
    let kernel = card.kernel("fill_u32");
    for (threads, shared, blocks) in [
        (32, 0, 32),
        (64, 0, 32),
        (128, 0, 16),
        (1024, 0, 2),
        (33, 0, 32),
        (96, 0, 21),
        (128, 40 << 10, 4),
        (128, 81 << 10, 2),
    ] {
        let fit = kernel.occupancy_max_active_blocks_per_multiprocessor(threads, shared, None).unwrap();
        assert_eq!(fit, blocks, "{threads} threads, {shared} bytes");
    }
    extern "C" fn none(_: std::ffi::c_int) -> usize {
        0
    }
    // All block sizes of full warps that divide 2048 fill the multiprocessor; the largest is taken.
    assert_eq!(kernel.occupancy_max_potential_block_size(none, 0, 0, None).unwrap(), (16, 1024));
    let bounded = card.kernel("reverse_u32");
    assert_eq!(bounded.occupancy_max_potential_block_size(none, 0, 0, None).unwrap(), (128, 128));
    assert_eq!(kernel.occupancy_available_dynamic_smem_per_block(2, 128).unwrap(), 81 << 10);
    assert_eq!(kernel.occupancy_available_dynamic_smem_per_block(1, 128).unwrap(), 163 << 10);
}

#[test]
fn cooperative_launches_must_fit_at_once() {
    let card = Card::new();
    let stream = card.stream();
    let kernel = card.kernel("fill_u32");
    let x = stream.alloc_zeros::<u32>(64).unwrap();
    let launch = |blocks| {
        // SAFETY: 64 elements.
        unsafe {
            stream
                .launch_builder(&kernel)
                .arg(&x)
                .arg(&3u32)
                .arg(&64i32)
                .launch_cooperative(grid(blocks, 1024))
        }
    };
    launch(16).unwrap();
    assert_eq!(stream.clone_dtoh(&x).unwrap(), [3; 64]);
    assert_eq!(code(launch(17)), CUresult::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE);
}

/// A module whose variables do not fit leaves nothing behind.
#[test]
fn loading_can_run_out_of_memory() {
    let card = Card::new();
    card.device.set_memory(19);
    let refused = card.context.load_module(Ptx::from_src(KERNELS));
    assert_eq!(code(refused), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    assert_eq!(card.device.used_memory(), 0);
    card.device.set_memory(20);
    card.device.fail(Kind::ModuleLoad, 1, Status::OUT_OF_MEMORY);
    assert_eq!(code(card.context.load_module(Ptx::from_src(KERNELS))), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    card.module();
}

/// Functions belong to their context.
#[test]
fn a_function_runs_in_streams_of_its_own_context() {
    let (card, other) = (Card::new(), Card::new());
    let kernel = card.kernel("fill_u32");
    let stream = other.stream();
    let x = stream.alloc_zeros::<u32>(4).unwrap();
    // SAFETY: refused.
    let refused = unsafe { stream.launch_builder(&kernel).arg(&x).arg(&1u32).arg(&4i32).launch(each(4)) };
    assert_eq!(code(refused), CUresult::CUDA_ERROR_INVALID_HANDLE);
    let name = CString::new("fill_u32").unwrap();
    // SAFETY: a null module on purpose.
    let refused = unsafe { result::module::get_function(std::ptr::null_mut(), name) };
    assert_eq!(code(refused), CUresult::CUDA_ERROR_INVALID_HANDLE);
}
