//! Every kernel assembles for every architecture it may meet, without spills, and blocks of the size it is launched
//! with fit on a multiprocessor. Prints a table: registers, shared memory, blocks a multiprocessor.

use c2c::backend::cuda::MODULES;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];
/// Registers and threads of a multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
const REGISTERS: u32 = 65_536;

fn threads(architecture: u32) -> u32 {
    if matches!(architecture, 86 | 89 | 120) { 1536 } else { 2048 }
}

#[derive(Debug, Default)]
struct Kernel {
    registers: u32,
    shared: u32,
    spilled: u32,
    stack: u32,
}

fn ptxas() -> Option<PathBuf> {
    let nvcc = Path::new(env!("C2C_NVCC"));
    let ptxas = nvcc.with_file_name("ptxas");
    ptxas.is_file().then_some(ptxas)
}

/// The number before `word` in `line`.
fn number(line: &str, word: &str) -> u32 {
    let before = line.split(word).next().filter(|before| before.len() < line.len());
    let digits = before.map(|before| before.trim_end().rsplit(|c: char| !c.is_ascii_digit()).next());
    digits.flatten().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// What ptxas says of each kernel of a file.
fn assemble(ptxas: &Path, ptx: &Path, architecture: u32) -> BTreeMap<String, Kernel> {
    let run = Command::new(ptxas)
        .args(["-v", &format!("-arch=sm_{architecture}"), "-o", "/dev/null"])
        .arg(ptx)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stderr).into_owned() + &String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{} for sm_{architecture}:\n{said}", ptx.display());
    let mut kernels: BTreeMap<String, Kernel> = BTreeMap::new();
    let mut current = String::new();
    for line in said.lines() {
        if let Some(name) = line.split("Compiling entry function '").nth(1) {
            current = name.split('\'').next().unwrap().into();
            kernels.insert(current.clone(), Kernel::default());
        } else if let Some(name) = line.split("Function properties for ").nth(1) {
            current = name.trim().into();
        } else if let Some(kernel) = kernels.get_mut(&current) {
            if line.contains("spill") {
                kernel.stack = number(line, " bytes stack frame");
                kernel.spilled = number(line, " bytes spill stores") + number(line, " bytes spill loads");
            } else if line.contains("Used ") {
                kernel.registers = number(line, " registers");
                kernel.shared = number(line, " bytes smem");
            }
        }
    }
    kernels
}

/// Threads of a block, as the kernel's `.maxntid` says.
fn block(ptx: &str, kernel: &str) -> u32 {
    let body = ptx.split(&format!(".entry {kernel}(")).nth(1).unwrap();
    let head = body.split('{').next().unwrap();
    let numbers = head.split(".maxntid").nth(1).unwrap_or_else(|| panic!("`{kernel}` has no launch bounds"));
    let numbers = numbers.lines().next().unwrap().split('.').next().unwrap();
    numbers.split(',').map(|n| n.trim().parse::<u32>().unwrap()).product()
}

#[test]
fn every_kernel_assembles_without_spills() {
    let Some(ptxas) = ptxas() else {
        println!("skipped: built without nvcc, there are no CUDA kernels (scripts/nvcc.sh)");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    println!(
        "| kernel | threads | registers, static shared bytes, blocks a multiprocessor by registers: {ARCHITECTURES:?} |"
    );
    println!("|---|---|---|");
    for module in MODULES {
        let path = folder.path().join(module.file).with_extension("ptx");
        fs::write(&path, module.ptx).unwrap();
        let mut rows: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for architecture in ARCHITECTURES {
            let kernels = assemble(&ptxas, &path, architecture);
            for &name in module.kernels {
                let kernel = &kernels[name];
                assert_eq!(kernel.spilled, 0, "`{name}` spills on sm_{architecture}: {kernel:?}");
                assert_eq!(
                    kernel.stack, 0,
                    "`{name}` keeps arrays in local memory on sm_{architecture}: {kernel:?}"
                );
                let block = block(module.ptx, name);
                // Registers are handed out to warps in units of 256.
                let warp = (kernel.registers * 32).next_multiple_of(256);
                let by_registers = REGISTERS / (warp * block.div_ceil(32)).max(1);
                let blocks = by_registers.min(threads(architecture) / block);
                assert!(blocks > 0, "a block of `{name}` does not fit on sm_{architecture}: {kernel:?}");
                let row = rows.entry(name).or_insert_with(|| vec![name.into(), block.to_string()]);
                row.push(format!("{}, {}, {blocks}", kernel.registers, kernel.shared));
            }
        }
        rows.values().for_each(|row| println!("| {} |", row.join(" | ")));
    }
}
