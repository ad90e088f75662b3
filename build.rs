//! Compiles `kernels/*.cu` to PTX for compute_80 and embeds it; the driver compiles it for the card it finds.
//!
//! nvcc is looked for in `NVCC`, `PATH`, `CUDA_HOME`, `CUDA_PATH`, the usual folders, and `target/nvcc`, where
//! `scripts/nvcc.sh` puts it. Without nvcc the crate builds and asking for a CUDA device is an error; an nvcc that
//! fails is a build error. Needs neither a GPU nor the network. PTX whose source, headers and compiler are as they were is
//! kept.

use std::{
    env,
    error::Error,
    fmt::Write as _,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Device code runs from Ampere on.
const ARCH: &str = "compute_80";

fn main() -> Result<()> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let kernels = root.join("kernels");
    println!("cargo::rerun-if-changed={}", kernels.display());
    println!("cargo::rerun-if-changed=build.rs");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    // Not watched: cargo runs a script again on every build while a file that it watches is missing.
    // scripts/nvcc.sh touches this file instead.
    let wheel = root.join("target/nvcc/nvidia/cu13/bin/nvcc");

    let mut table = String::from("&[\n");
    let nvcc = find_nvcc(&wheel);
    // Tests assemble the kernels with the ptxas beside it.
    println!("cargo::rustc-env=C2C_NVCC={}", nvcc.as_deref().unwrap_or(Path::new("")).display());
    if let Some(nvcc) = nvcc {
        let mut sources: Vec<PathBuf> = fs::read_dir(&kernels)?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
            .collect();
        sources.sort();
        let ptx = compile_all(&nvcc, &sources, &out)?;
        for (source, ptx) in sources.iter().zip(&ptx) {
            let name = source.file_stem().and_then(|stem| stem.to_str()).ok_or("a kernel file's name")?;
            writeln!(
                table,
                "    Module {{ file: {name:?}, ptx: include_str!({ptx:?}), kernels: &{:?} }},",
                entries(ptx)?
            )?;
        }
    }
    table.push(']');
    fs::write(out.join("kernels.rs"), table)?;
    Ok(())
}

/// As many at once as cargo allows this build. Returns the PTX of each source.
fn compile_all(nvcc: &Path, sources: &[PathBuf], out: &Path) -> Result<Vec<PathBuf>> {
    const ARGS: [&str; 5] = ["-ptx", "-O3", "-std=c++17", "-lineinfo", "--expt-relaxed-constexpr"];
    let run = |args: &[&str]| {
        let mut command = Command::new(nvcc);
        command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let cannot_run = |error| format!("cannot run {}: {error}", nvcc.display());
    let version = run(&["--version"]).output().map_err(cannot_run)?.stdout;
    let mut all = Vec::new();
    let mut stale = Vec::new();
    for source in sources {
        let ptx = out.join(source.file_name().unwrap_or_default()).with_extension("ptx");
        let mut hasher = DefaultHasher::new();
        (&version, ARGS, ARCH).hash(&mut hasher);
        hash_source(source, &mut hasher)?;
        let (made_from, stamp) = (hasher.finish().to_string(), ptx.with_extension("made-from"));
        if !ptx.is_file() || fs::read_to_string(&stamp).ok().as_ref() != Some(&made_from) {
            stale.push((source, ptx.clone(), stamp, made_from));
        }
        all.push(ptx);
    }
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1).max(1);
    for group in stale.chunks(jobs) {
        let running = group.iter().map(|kernel| {
            let (source, ptx, ..) = kernel;
            let mut command = run(&ARGS);
            command.arg(format!("-arch={ARCH}")).arg("-o").arg(ptx).arg(source);
            Ok((kernel, command.spawn().map_err(cannot_run)?))
        });
        for running in running.collect::<Vec<Result<_>>>() {
            let ((source, _, stamp, made_from), child) = running?;
            let output = child.wait_with_output()?;
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                let said = said + &String::from_utf8_lossy(&output.stdout);
                return Err(format!("{} does not compile:\n{said}", source.display()).into());
            }
            fs::write(stamp, made_from)?;
        }
    }
    Ok(all)
}

/// The text of a source and of every header of ours that it includes.
fn hash_source(path: &Path, hasher: &mut impl Hasher) -> Result<()> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    text.hash(hasher);
    for header in text.lines().filter_map(|line| line.strip_prefix("#include \"")?.strip_suffix('"')) {
        hash_source(&path.with_file_name(header), hasher)?;
    }
    Ok(())
}

/// Names of the kernels in a PTX file.
fn entries(ptx: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(ptx)?;
    let names = text.lines().filter_map(|line| line.split(".entry ").nth(1));
    Ok(names.map(|name| name.trim_end_matches('(').trim().to_string()).collect())
}

fn find_nvcc(wheel: &Path) -> Option<PathBuf> {
    if let Some(named) = env::var_os("NVCC").filter(|named| !named.is_empty()) {
        // Named but absent is an error of the build, not a reason to look elsewhere: `compile_all` will say so.
        return Some(named.into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let usual = ["/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda"].into_iter().map(PathBuf::from);
    env::split_paths(&path)
        .map(|folder| folder.join("nvcc"))
        .chain(homes.chain(usual).map(|home| home.join("bin/nvcc")))
        .chain([wheel.to_path_buf()])
        .find(|candidate| candidate.is_file())
}
