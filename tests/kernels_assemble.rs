//! Every kernel assembles for every architecture it may meet, without spills, and blocks of the size it is launched
//! with fit on a multiprocessor. Prints a table: registers, shared memory, blocks a multiprocessor.

use c2c::backend::cuda::{MODULES, Module};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
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
    let path = |module: &Module| folder.path().join(module.file).with_extension("ptx");
    MODULES.iter().for_each(|module| fs::write(path(module), module.ptx).unwrap());
    // The largest first; every core takes the next.
    let mut jobs: Vec<(&Module, u32)> =
        MODULES.iter().flat_map(|module| ARCHITECTURES.map(|architecture| (module, architecture))).collect();
    jobs.sort_by_key(|(module, _)| module.ptx.len());
    let (jobs, done) = (Mutex::new(jobs), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let Some((module, architecture)) = jobs.lock().unwrap().pop() else { break };
                    let kernels = assemble(&ptxas, &path(module), architecture);
                    done.lock().unwrap().insert((module.file, architecture), kernels);
                }
            });
        }
    });
    let done = done.into_inner().unwrap();
    println!("Registers, static shared bytes, blocks a multiprocessor by registers.\n");
    println!("| kernel | threads | {} |", ARCHITECTURES.map(|n| format!("sm_{n}")).join(" | "));
    println!("|---|---|{}", "---|".repeat(ARCHITECTURES.len()));
    let mut wrong = Vec::new();
    for module in MODULES {
        for &name in module.kernels {
            let block = block(module.ptx, name);
            let mut row = vec![name.to_string(), block.to_string()];
            for architecture in ARCHITECTURES {
                let kernel = &done[&(module.file, architecture)][name];
                // Registers are handed out to warps in units of 256.
                let warp = (kernel.registers * 32).next_multiple_of(256);
                let by_registers = REGISTERS / (warp * block.div_ceil(32)).max(1);
                let blocks = by_registers.min(threads(architecture) / block);
                row.push(format!("{}, {}, {blocks}", kernel.registers, kernel.shared));
                if kernel.spilled > 0 || kernel.stack > 0 || blocks == 0 {
                    wrong.push(format!("`{name}` on sm_{architecture}: {kernel:?}"));
                }
            }
            println!("| {} |", row.join(" | "));
        }
    }
    assert!(
        wrong.is_empty(),
        "kernels that spill, keep arrays in local memory, or do not fit:\n{}",
        wrong.join("\n")
    );
}
