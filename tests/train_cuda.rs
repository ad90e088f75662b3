//! Training runs from configuration to result on the software GPU: losses and gradients are the CPU's.

mod device;

use c2c::{
    backend::DeviceChoice,
    train::{
        ConfigLayers, Record, TrainConfig, events,
        run::{self, Watcher},
    },
};
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::atomic::AtomicBool,
};

fn model(name: &str) -> String {
    format!("{}/tests/fixtures/pair/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Two updates of two short samples each.
fn config(folder: &Path, what: &str, dtype: &str) -> String {
    let rows = ["Why?", "rain?", "42?", "the north?"].iter().enumerate().map(|(i, question)| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "{question}"}}, {{"role": "assistant", "content": "{i} the"}}]}}"#
        ) + "\n"
    });
    let data = folder.join("rows.jsonl");
    fs::write(&data, rows.collect::<String>()).unwrap();
    // The receiver's template thinks before it answers, which no model learns alone.
    let (receiver, sharers) = match what {
        "fuser" => (model("receiver"), format!("[{:?}]", model("sharer"))),
        _ => (model("sharer"), "[]".into()),
    };
    format!(
        "what = {what:?}\nreceiver = {receiver:?}\nsharers = {sharers}\ndtype = {dtype:?}\nthreads = 1\neval_every = 0\nsave_every = 0\n\
         [fuser]\nhidden = 16\nintermediate = 24\n[lora]\nrank = 3\n[length]\nsteps = 2\n[batch]\nsamples = 2\n[optimizer]\nlearning_rate = 1e-3\n\
         warmup_ratio = 0.0\n[[data]]\npath = {data:?}\n"
    )
}

struct Nobody;

impl Watcher for Nobody {
    fn say(&self, _: &str) {}
}

/// Losses and norms, of weights that the first update has changed in the second.
fn train(folder: &Path, what: &str, dtype: &str, device: DeviceChoice) -> Result<Vec<[f64; 2]>, String> {
    let (config, _) =
        ConfigLayers::default().text("test", &config(folder, what, dtype)).unwrap().finish().unwrap();
    let out = folder.join(format!("{device:?}"));
    let config = TrainConfig { device, out: out.clone(), ..config };
    let outcome = run::run(config, None, &Nobody, &AtomicBool::new(false));
    outcome.map_err(|error| error.to_string())?;
    let update = |record| match record {
        Record::Update(update) => Some([update.loss, update.gradient_norm]),
        _ => None,
    };
    Ok(events::read(&out).unwrap().into_iter().filter_map(update).collect())
}

#[test]
fn a_run_on_a_gpu_is_a_run_on_a_cpu() {
    let mut faults = Vec::new();
    for (what, dtype, tolerance) in
        [("fuser", "f32", 1e-4), ("lora", "f32", 1e-4), ("model", "f32", 1e-4), ("fuser", "bf16", 2e-2)]
    {
        let Some(soft) = device::soft() else { return };
        let folder = tempfile::tempdir().unwrap();
        let cpu = train(folder.path(), what, dtype, DeviceChoice::Cpu).unwrap();
        let cuda = train(folder.path(), what, dtype, DeviceChoice::Cuda(soft.ordinal));
        if let Some(fault) = soft.first_fault() {
            faults.push(format!("{what} in {dtype}: {}", fault.message));
            continue;
        }
        let cuda = cuda.unwrap_or_else(|error| panic!("{what} in {dtype}: {error}"));
        assert_eq!((cpu.len(), cuda.len()), (2, 2), "{what}");
        for (cpu, cuda) in cpu.iter().flatten().zip(cuda.iter().flatten()) {
            assert!(
                (cpu - cuda).abs() <= tolerance * cpu.abs(),
                "{what} in {dtype}: {cpu} on the CPU, {cuda} on the GPU"
            );
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// Each process of several must have a GPU that adds up with the others': refused where that is not built in or there is no library.
#[test]
fn several_gpus_without_nccl_are_refused() {
    if !device::kernels() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    fs::write(&file, config(folder.path(), "fuser", "f32")).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let processes = ["0", "1"].map(|rank| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_train"));
        command.arg("--config").arg(&file).args(["--device", "cuda", "--set", "batch.accumulate=2", "--out"]);
        command.arg(folder.path().join("out")).env("LD_PRELOAD", &softcuda::install().path);
        command.env("WORLD_SIZE", "2").env("RANK", rank).env("MASTER_ADDR", "127.0.0.1");
        command.env("MASTER_PORT", port.to_string()).stderr(Stdio::piped()).spawn().unwrap()
    });
    for process in processes {
        let output = process.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("NCCL") && !said.contains("panicked"), "{said}");
    }
}
