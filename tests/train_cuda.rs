//! `train --device cuda` as its user runs it, from end to end on the software driver, which is preloaded: its losses, gradients and
//! results are the CPU's.

mod device;

use c2c::train::{Record, events};
use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

fn model(name: &str) -> String {
    format!("{}/tests/fixtures/pair/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Two updates of two short samples each.
fn train(folder: &Path, what: &str, device: &str, dtype: &str) -> Output {
    let rows = ["Why?", "rain?", "42?", "the north?"].iter().enumerate().map(|(i, question)| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "{question}"}}, {{"role": "assistant", "content": "{i} the"}}]}}"#
        ) + "\n"
    });
    let data = folder.join("rows.jsonl");
    fs::write(&data, rows.collect::<String>()).unwrap();
    let sharers = if what == "fuser" { format!("[{:?}]", model("sharer")) } else { "[]".into() };
    let config = format!(
        "what = {what:?}\nreceiver = {:?}\nsharers = {sharers}\ndtype = {dtype:?}\ndevice = {device:?}\nthreads = 1\neval_every = 0\nsave_every = 0\n\
         [fuser]\nhidden = 16\nintermediate = 24\n[lora]\nrank = 3\n[length]\nsteps = 2\n[batch]\nsamples = 2\n[optimizer]\nlearning_rate = 1e-3\n\
         warmup_ratio = 0.0\n[[data]]\npath = {data:?}\n",
        model("receiver")
    );
    let file = folder.join("run.toml");
    fs::write(&file, config).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_train"));
    command.args(["--config", file.to_str().unwrap(), "--out", folder.join(device).to_str().unwrap()]);
    command.env("RUST_LOG", "info");
    if device == "cuda" {
        command.env("LD_PRELOAD", &softcuda::install().path);
    }
    command.output().unwrap()
}

/// Losses and norms.
fn updates(folder: &Path) -> Vec<[f64; 2]> {
    let records = events::read(folder).unwrap().into_iter();
    let update = |record| match record {
        Record::Update(update) => Some([update.loss, update.gradient_norm]),
        _ => None,
    };
    records.filter_map(update).collect()
}

#[test]
fn a_run_on_a_gpu_is_a_run_on_a_cpu() {
    if !device::kernels() {
        return;
    }
    // The second update's loss is that of weights which the first one has changed.
    for (what, dtype, tolerance) in
        [("fuser", "f32", 1e-4), ("lora", "f32", 1e-4), ("model", "f32", 1e-4), ("fuser", "bf16", 2e-2)]
    {
        let folder = tempfile::tempdir().unwrap();
        for device in ["cpu", "cuda"] {
            let output = train(folder.path(), what, device, dtype);
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{what} on {device}: {said}");
            assert!(device == "cpu" || said.contains("device: cuda:0 (softcuda"), "{said}");
        }
        let [cpu, cuda] = ["cpu", "cuda"].map(|device| updates(&folder.path().join(device)));
        assert_eq!((cpu.len(), cuda.len()), (2, 2), "{what}");
        for (cpu, cuda) in cpu.iter().flatten().zip(cuda.iter().flatten()) {
            assert!(
                (cpu - cuda).abs() <= tolerance * cpu.abs(),
                "{what} in {dtype}: {cpu} on the CPU, {cuda} on the GPU"
            );
        }
    }
}

/// Each process of several must have a GPU that adds up with the others': refused where that is not built in or there is no library.
#[test]
fn several_gpus_without_nccl_are_refused() {
    if !device::kernels() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    assert!(train(folder.path(), "fuser", "cpu", "f32").status.success());
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let processes: Vec<_> = ["0", "1"]
        .iter()
        .map(|rank| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_train"));
            command.arg("--config").arg(folder.path().join("run.toml")).args(["--device", "cuda"]);
            command.args(["--set", "batch.accumulate=2", "--out"]).arg(folder.path().join("several"));
            command.env("WORLD_SIZE", "2").env("RANK", rank).env("LD_PRELOAD", &softcuda::install().path);
            command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
            command.stderr(std::process::Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for process in processes {
        let output = process.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("NCCL") && !said.contains("panicked"), "{said}");
    }
}
