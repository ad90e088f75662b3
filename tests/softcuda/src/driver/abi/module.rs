//! Modules from PTX text, their functions and variables.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use crate::driver::handle::{Handle, Kind};
use crate::driver::inject::Kind as Call;
use crate::driver::limits::Needs;
use crate::driver::machine::{Allocation, Function, Machine, Module};
use crate::driver::status::{Outcome, Status};
use crate::driver::{Entered, answer, enter, enter_object, put};
use crate::{exec, ptx};

/// The first bytes of images that are machine code of a card: ELF (cubin) and the fat binary's magic.
const MACHINE_CODE: [[u8; 4]; 3] = [*b"\x7fELF", [0x50, 0xed, 0x55, 0xba], [0xb1, 0x43, 0x62, 0x46]];

/// # Safety
/// `image` is zero-terminated text, or begins with four bytes that say it is machine code.
unsafe fn load(module: *mut Handle, image: *const c_void) -> Outcome {
    let mut entered = enter()?;
    entered.machine.no_capture_forbids("loading a module")?;
    if image.is_null() {
        return Err(Status::INVALID_VALUE);
    }
    entered.machine.inject(Call::ModuleLoad)?;
    // The comparison stops at the first byte that differs, so text shorter than four bytes is not overrun.
    // SAFETY: as the caller promises.
    let starts = |magic: &[u8; 4]| (0..4).all(|at| unsafe { *image.cast::<u8>().add(at) } == magic[at]);
    if MACHINE_CODE.iter().any(starts) {
        return entered.machine.refuse(
            Status::NO_BINARY_FOR_GPU,
            "the image is machine code of a card; softcuda runs PTX text only",
        );
    }
    // SAFETY: not machine code, so zero-terminated text.
    let text = unsafe { CStr::from_ptr(image.cast()) };
    let Ok(text) = text.to_str() else {
        return entered.machine.refuse(Status::INVALID_IMAGE, "the image is neither machine code nor text");
    };
    let context = entered.context;
    let serial = entered.machine.load(text, context)?;
    // SAFETY: forwarded.
    unsafe { put(module, entered.handle(Kind::Module, serial)) }
}

/// `.version`, if the text has one.
fn version_of(text: &str) -> Option<(u32, u32)> {
    let mut lines = text.lines().filter_map(|line| line.trim_start().strip_prefix(".version"));
    let (major, minor) = lines.next()?.split("//").next()?.trim().split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The parsed text. A process loads few texts, and each for many devices, so they are kept.
fn parse(text: &str) -> Result<Arc<ptx::Module>, String> {
    static PARSED: Mutex<BTreeMap<String, Arc<ptx::Module>>> = Mutex::new(BTreeMap::new());
    let parsed = || PARSED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(ptx) = parsed().get(text) {
        return Ok(ptx.clone());
    }
    let ptx = ptx::parse(text).map_err(|error| error.to_string())?;
    if version_of(text).is_none() || ptx.target == 0 {
        return Err("PTX line 1: PTX text has a .version and a .target".into());
    }
    let ptx = Arc::new(ptx);
    parsed().insert(text.to_owned(), ptx.clone());
    Ok(ptx)
}

impl Machine {
    fn load(&mut self, text: &str, context: u64) -> Outcome<u64> {
        // Before all else, as a newer text may well hold what this one cannot read.
        if version_of(text).is_some_and(|version| version > self.newest_ptx) {
            let message = format!("the PTX is newer than this driver's {:?}", self.newest_ptx);
            return self.refuse(Status::UNSUPPORTED_PTX_VERSION, message);
        }
        let ptx = match parse(text) {
            Ok(ptx) => ptx,
            Err(message) => return self.refuse(Status::INVALID_PTX, message),
        };
        let (major, minor) = self.limits.capability();
        if ptx.target > (major * 10 + minor) as u32 {
            let message = format!("the PTX is for sm_{}, and the device is sm_{major}{minor}", ptx.target);
            return self.refuse(Status::INVALID_PTX, message);
        }
        let globals = self.place_variables(&ptx, context)?;
        let serial = self.new_serial();
        let module = Module { context, ptx, globals: Arc::new(globals), functions: BTreeMap::new() };
        self.modules.insert(serial, module);
        Ok(serial)
    }

    /// Memory for the module's variables, filled with what they begin as.
    fn place_variables(&mut self, ptx: &ptx::Module, context: u64) -> Outcome<BTreeMap<String, (u64, u64)>> {
        self.require_room(ptx.variables.iter().map(|variable| variable.bytes).sum())?;
        let placed = match self.as_host("module load", |memory, op| exec::place_variables(ptx, memory, op)) {
            Ok(placed) => placed,
            Err(fault) => return self.refuse(Status::INVALID_PTX, fault.to_string()),
        };
        for &(address, bytes) in placed.values() {
            self.book(address, Allocation { context, bytes, variable: true });
        }
        Ok(placed)
    }

    fn release_variables(&mut self, placed: &BTreeMap<String, (u64, u64)>) {
        for &(address, _) in placed.values() {
            self.release_memory(address);
        }
    }

    fn function_of(&mut self, module: u64, name: &str) -> Outcome<u64> {
        let found = &self.modules[&module];
        if let Some(&serial) = found.functions.get(name) {
            return Ok(serial);
        }
        let Some(header) = found.ptx.kernel(name) else {
            return self.refuse(Status::NOT_FOUND, format!("the module has no kernel {name}"));
        };
        let needs = Needs {
            static_shared: header.shared_bytes,
            max_block: header.maxntid,
            required_block: header.reqntid,
            dynamic_shared_limit: None,
        };
        let function = Function {
            context: found.context,
            module,
            ptx: found.ptx.clone(),
            globals: found.globals.clone(),
            name: name.to_owned(),
            needs,
        };
        let serial = self.new_serial();
        self.functions.insert(serial, Arc::new(function));
        self.modules.get_mut(&module).expect("found above").functions.insert(name.to_owned(), serial);
        Ok(serial)
    }
}

/// # Safety
/// `module` may be written; `image` as the driver API wants it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut Handle, image: *const c_void) -> Status {
    // SAFETY: forwarded.
    answer(|| unsafe { load(module, image) })
}

/// The compiler's options say nothing to an interpreter.
///
/// # Safety
/// As for `cuModuleLoadData`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadDataEx(
    module: *mut Handle,
    image: *const c_void,
    _count: c_uint,
    _options: *mut c_int,
    _values: *mut *mut c_void,
) -> Status {
    // SAFETY: forwarded.
    unsafe { cuModuleLoadData(module, image) }
}

/// # Safety
/// `module` may be written; `path` is zero-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoad(module: *mut Handle, path: *const c_char) -> Status {
    answer(|| {
        if path.is_null() {
            return Err(Status::INVALID_VALUE);
        }
        // SAFETY: forwarded.
        let path = unsafe { CStr::from_ptr(path) }.to_str().map_err(|_| Status::FILE_NOT_FOUND)?;
        let mut image = std::fs::read(path).map_err(|_| Status::FILE_NOT_FOUND)?;
        image.extend([0; 4]);
        // SAFETY: the image ends in zeros.
        unsafe { load(module, image.as_ptr().cast()) }
    })
}

fn enter_module(module: Handle) -> Outcome<(Entered, u64)> {
    enter_object(module, Kind::Module, |machine, serial| {
        machine.modules.get(&serial).map(|module| module.context)
    })
}

pub(crate) fn enter_function(function: Handle) -> Outcome<(Entered, u64)> {
    enter_object(function, Kind::Function, |machine, serial| {
        machine.functions.get(&serial).map(|function| function.context)
    })
}

/// Waits for the context's work, which may be using the module's variables.
#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(module: Handle) -> Status {
    answer(|| {
        let (mut entered, serial) = enter_module(module)?;
        entered.machine.no_capture_forbids("unloading a module")?;
        let pending = entered.machine.pending(entered.context);
        entered.machine = entered.device.finish(entered.machine, &pending);
        if let Some(module) = entered.machine.modules.remove(&serial) {
            entered.machine.release_variables(&module.globals);
            entered.machine.functions.retain(|_, function| function.module != serial);
        }
        entered.healthy()
    })
}

/// # Safety
/// `text` is null or zero-terminated.
unsafe fn name_of<'a>(text: *const c_char) -> Outcome<&'a str> {
    if text.is_null() {
        return Err(Status::INVALID_VALUE);
    }
    // SAFETY: forwarded.
    unsafe { CStr::from_ptr(text) }.to_str().map_err(|_| Status::NOT_FOUND)
}

/// # Safety
/// `function` may be written; `name` is zero-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut Handle,
    module: Handle,
    name: *const c_char,
) -> Status {
    answer(|| {
        let (mut entered, module) = enter_module(module)?;
        entered.healthy()?;
        // SAFETY: forwarded.
        let serial = entered.machine.function_of(module, unsafe { name_of(name) }?)?;
        // SAFETY: forwarded.
        unsafe { put(function, entered.handle(Kind::Function, serial)) }
    })
}

/// # Safety
/// `address` and `bytes` are null or may be written; `name` is zero-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetGlobal_v2(
    address: *mut u64,
    bytes: *mut usize,
    module: Handle,
    name: *const c_char,
) -> Status {
    answer(|| {
        let (mut entered, module) = enter_module(module)?;
        entered.healthy()?;
        // SAFETY: forwarded.
        let name = unsafe { name_of(name) }?;
        let Some(&(at, size)) = entered.machine.modules[&module].globals.get(name) else {
            return entered.machine.refuse(Status::NOT_FOUND, format!("the module has no variable {name}"));
        };
        // SAFETY: forwarded.
        unsafe {
            if !address.is_null() {
                put(address, at)?;
            }
            if !bytes.is_null() {
                put(bytes, size as usize)?;
            }
        }
        Ok(())
    })
}
