//! What a test uses: [`install`] the driver, take a device of one's own, tell it what to do, ask what it saw.

use std::ffi::{CStr, CString, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::counters::Counts;
use crate::driver::abi::control::{Record, STICKY, Sink};
pub use crate::driver::inject::Kind;
pub use crate::driver::status::Status;

/// Why the software driver could not take the real one's place.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error(
        "libsoftcuda.so is not beside the test ({0:?}): name softcuda among the dev-dependencies, or run `cargo build -p softcuda`"
    )]
    NotBuilt(PathBuf),
    #[error("{0}")]
    Open(String),
    #[error(
        "another libcuda.so was opened before softcuda::install: it must come before the first CUDA call"
    )]
    Late,
}

/// The functions of `driver::abi::control`, as the opened library has them.
macro_rules! calls {
    ($($name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        struct Calls { $($name: extern "C" fn($($argument),*) $(-> $result)?,)* }

        impl Calls {
            fn of(library: *mut c_void) -> Result<Calls, InstallError> {
                Ok(Calls { $($name: {
                    let symbol = concat!("softcuda_", stringify!($name), "\0");
                    // SAFETY: the text is zero-terminated.
                    let found = unsafe { libc::dlsym(library, symbol.as_ptr().cast()) };
                    if found.is_null() {
                        return Err(InstallError::Open(format!("the library has no {symbol}")));
                    }
                    // SAFETY: the function has this type where it is defined, in this very crate.
                    unsafe {
                        std::mem::transmute::<*mut c_void, extern "C" fn($($argument),*) $(-> $result)?>(found)
                    }
                },)* })
            }
        }
    };
}

calls! {
    fresh_device() -> c_int;
    give_back(u8);
    set_seed(u8, u64);
    set_memory(u8, u64);
    set_attribute(u8, c_int, c_int);
    set_newest_ptx(u8, u32, u32);
    fail(u8, u32, u64, u32);
    calls(u8, u32) -> u64;
    reset_faults(u8);
    counts(u8, Sink, *mut c_void);
    reset_counts(u8);
    reports(u8, Sink, *mut c_void);
    clear_reports(u8);
    leaks(u8, Sink, *mut c_void);
    memory(u8, bool) -> u64;
}

/// The installed driver.
pub struct SoftCuda {
    calls: Calls,
    /// The library it came from.
    pub path: PathBuf,
}

/// [`try_install`], for tests: panics with the reason.
pub fn install() -> &'static SoftCuda {
    try_install().unwrap_or_else(|error| panic!("{error}"))
}

/// Makes softcuda this process's `libcuda.so`. Must come before the first CUDA call; may be called again.
///
/// The library is opened by its path and bears the name `libcuda.so` inside, so the loader hands it to
/// whoever asks for that name later, whether a real driver is installed or not.
pub fn try_install() -> Result<&'static SoftCuda, &'static InstallError> {
    static INSTALLED: OnceLock<Result<SoftCuda, InstallError>> = OnceLock::new();
    INSTALLED.get_or_init(open).as_ref()
}

/// Cargo puts the library among the dependencies: beside a test, one up and down from an example or binary.
fn find() -> Result<PathBuf, InstallError> {
    let program = std::env::current_exe().map_err(|error| InstallError::Open(error.to_string()))?;
    let folder = program.parent().unwrap_or(Path::new("/"));
    let places = ["libsoftcuda.so", "deps/libsoftcuda.so", "../deps/libsoftcuda.so", "../libsoftcuda.so"];
    let found = places.iter().map(|place| folder.join(place)).find(|path| path.is_file());
    found.ok_or_else(|| InstallError::NotBuilt(folder.to_owned()))
}

fn open() -> Result<SoftCuda, InstallError> {
    let path = find()?;
    let name =
        CString::new(path.as_os_str().as_bytes()).map_err(|error| InstallError::Open(error.to_string()))?;
    // SAFETY: opening a library runs its initialisers; this one has none beyond the standard library's.
    let (library, seen) = unsafe {
        let library = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL);
        (library, libc::dlopen(c"libcuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD))
    };
    if library.is_null() {
        // SAFETY: a failed dlopen leaves its reason, as zero-terminated text.
        let reason = unsafe { CStr::from_ptr(libc::dlerror()) };
        return Err(InstallError::Open(reason.to_string_lossy().into_owned()));
    }
    if library != seen {
        return Err(InstallError::Late);
    }
    Ok(SoftCuda { calls: Calls::of(library)?, path })
}

impl SoftCuda {
    /// A device in its first state that no one else has; given back when dropped.
    ///
    /// Panics if all 255 are taken.
    pub fn fresh_device(&'static self) -> Device {
        let ordinal = (self.calls.fresh_device)();
        let ordinal = u8::try_from(ordinal).expect("all 255 software devices are taken");
        Device { softcuda: self, ordinal: ordinal.into() }
    }

    /// Device 0, the one that programs take by default. Never lent by [`SoftCuda::fresh_device`], so it is
    /// shared by all who ask for it.
    pub fn default_device(&'static self) -> Device {
        Device { softcuda: self, ordinal: 0 }
    }
}

/// Why a call was refused, or a context is of no use any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub code: Status,
    /// Whether it made the context useless: a kernel or a copy went wrong.
    pub sticky: bool,
    pub message: String,
}

/// What the launches of one kernel that ran did.
#[derive(Clone, Debug)]
pub struct KernelCounts {
    pub kernel: String,
    pub launches: u64,
    pub counts: Counts,
}

/// One software device, by its ordinal: what CUDA calls get it by.
pub struct Device {
    softcuda: &'static SoftCuda,
    pub ordinal: usize,
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.ordinal != 0 {
            (self.calls().give_back)(self.number());
        }
    }
}

extern "C" fn collect(to: *mut c_void, record: *const Record) {
    // SAFETY: `to` is the vector that `Device::ask` lends for the call, `record` and its text live as long.
    unsafe {
        let record = &*record;
        let text = std::slice::from_raw_parts(record.text, record.len);
        let counts = record.counts.as_ref().cloned();
        let entries = &mut *to.cast::<Vec<(String, u64, Option<Counts>)>>();
        entries.push((String::from_utf8_lossy(text).into_owned(), record.number, counts));
    }
}

impl Device {
    fn calls(&self) -> &Calls {
        &self.softcuda.calls
    }

    fn number(&self) -> u8 {
        self.ordinal as u8
    }

    fn ask(&self, question: extern "C" fn(u8, Sink, *mut c_void)) -> Vec<(String, u64, Option<Counts>)> {
        let mut entries = Vec::new();
        question(self.number(), collect, (&raw mut entries).cast());
        entries
    }

    /// The seed of the schedule. 0, as at first: nothing runs before it is waited for. Any other: how far
    /// each stream runs ahead, and in which order, is drawn from it.
    pub fn set_seed(&self, seed: u64) {
        (self.calls().set_seed)(self.number(), seed);
    }

    /// Device memory, bytes; at first 4 GiB. The host's memory is taken only as it is allocated.
    pub fn set_memory(&self, bytes: u64) {
        (self.calls().set_memory)(self.number(), bytes);
    }

    /// A `CUdevice_attribute`, such as 16, the number of multiprocessors.
    pub fn set_attribute(&self, attribute: i32, value: i32) {
        (self.calls().set_attribute)(self.number(), attribute, value);
    }

    /// At first 8.0. PTX for more is refused.
    pub fn set_compute_capability(&self, major: i32, minor: i32) {
        self.set_attribute(75, major);
        self.set_attribute(76, minor);
    }

    /// The newest PTX ISA version the driver takes; at first 9.0, that of CUDA 13.0.
    pub fn set_newest_ptx(&self, major: u32, minor: u32) {
        (self.calls().set_newest_ptx)(self.number(), major, minor);
    }

    /// The `n`-th call of `kind` from now, counted from 1, fails with `code`.
    pub fn fail(&self, kind: Kind, n: u64, code: Status) {
        (self.calls().fail)(self.number(), kind as u32, n, code.0);
    }

    /// The same, with the code that is usual for the call that it hits ([`Kind::usual`]).
    pub fn fail_usual(&self, kind: Kind, n: u64) {
        (self.calls().fail)(self.number(), kind as u32, n, 0);
    }

    /// How many calls of `kind` there were: fail each of them in turn to walk through them all.
    pub fn calls_of(&self, kind: Kind) -> u64 {
        (self.calls().calls)(self.number(), kind as u32)
    }

    /// Forgets the planned failures and counts calls from 0.
    pub fn reset_failures(&self) {
        (self.calls().reset_faults)(self.number());
    }

    /// What each kernel did, by name, since the beginning or the last [`Device::reset_counts`].
    pub fn counts(&self) -> Vec<KernelCounts> {
        let entries = self.ask(self.calls().counts).into_iter();
        let with_counts = entries.filter_map(|(kernel, launches, counts)| {
            counts.map(|counts| KernelCounts { kernel, launches, counts })
        });
        with_counts.collect()
    }

    pub fn reset_counts(&self) {
        (self.calls().reset_counts)(self.number());
    }

    /// Every refused call and every fault, in order (the first thousand).
    pub fn reports(&self) -> Vec<Report> {
        let entries = self.ask(self.calls().reports).into_iter();
        entries
            .map(|(message, number, _)| Report {
                code: Status(number as u32),
                sticky: number & STICKY != 0,
                message,
            })
            .collect()
    }

    /// The first fault: what went wrong in a kernel or a copy. What follows in a useless context is dropped.
    pub fn first_fault(&self) -> Option<Report> {
        self.reports().into_iter().find(|report| report.sticky)
    }

    /// Why the last call that failed did.
    pub fn last_report(&self) -> Option<Report> {
        self.reports().pop()
    }

    pub fn clear_reports(&self) {
        (self.calls().clear_reports)(self.number());
    }

    /// What ended contexts did not give back, and what living ones hold now: one line each.
    pub fn leaks(&self) -> Vec<String> {
        self.ask(self.calls().leaks).into_iter().map(|entry| entry.0).collect()
    }

    /// Device memory in use, bytes.
    pub fn used_memory(&self) -> u64 {
        (self.calls().memory)(self.number(), false)
    }

    /// The most device memory there was in use at once, bytes.
    pub fn most_used_memory(&self) -> u64 {
        (self.calls().memory)(self.number(), true)
    }
}
