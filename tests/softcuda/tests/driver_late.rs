//! In a process of its own: a driver is open already when softcuda is to be installed.

#[test]
fn installing_too_late_is_an_error() {
    // Another file with the driver's name inside.
    let library = std::env::current_exe().unwrap().with_file_name("libsoftcuda.so");
    let other = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("early-libcuda.so");
    std::fs::copy(library, &other).unwrap();
    let name = std::ffi::CString::new(other.to_str().unwrap()).unwrap();
    // SAFETY: the library does nothing when it is opened.
    assert!(!unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) }.is_null());
    let installed = softcuda::try_install();
    assert!(matches!(installed, Err(softcuda::InstallError::Late)));
    // Not even later.
    assert!(softcuda::try_install().is_err());
}
