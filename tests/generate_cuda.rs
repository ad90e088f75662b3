//! `generate --device cuda` as its user runs it. The software driver is preloaded: the binary knows nothing of it.

mod command;
mod device;

use command::*;
use serde_json::Value;

/// Runs on device 0 of the software driver; `None`, visibly, where there are no kernels.
fn on_cuda(template: &str) -> Option<(Value, String)> {
    if !device::kernels() {
        return None;
    }
    let library = softcuda::install().path.to_str().expect("a path of text");
    let mut args = line(&format!("{template} --json --ignore-eos --max-new-tokens 6 --device cuda"), &[]);
    args.extend(["--prompt".into(), PROMPT.into()]);
    let run = generate_with(&args, &[("LD_PRELOAD", library), ("RUST_LOG", "info")]);
    assert!(run.ok, "{args:?}\n{}", run.stderr);
    Some((serde_json::from_str(&run.stdout).expect("stdout is JSON"), run.stderr))
}

fn on_cpu(template: &str) -> Value {
    let mut args = line(&format!("{template} --json --ignore-eos --max-new-tokens 6 --device cpu"), &[]);
    args.extend(["--prompt".into(), PROMPT.into()]);
    let run = generate(&args);
    assert!(run.ok, "{args:?}\n{}", run.stderr);
    serde_json::from_str(&run.stdout).expect("stdout is JSON")
}

#[test]
fn every_mode_answers_as_on_the_cpu() {
    for template in [
        "--mode receiver --receiver {r} --dtype f32",
        "--mode sharer --sharer {s} --dtype f32",
        "--receiver {r} --sharer {s} --fuser init:3 --gates open --dtype f32",
        "--receiver {r} --sharer {s} --fuser init:3 --gates open --dtype f32 --overlap off",
        "--receiver {r} --sharer {s} --sharer {s} --fuser init:3 --fuser init:4 --gates open --multi-sharer parallel --dtype f32",
    ] {
        let Some((found, log)) = on_cuda(template) else { return };
        let expected = on_cpu(template);
        assert_eq!(found["tokens"], expected["tokens"], "{template}");
        assert_eq!((&found["device"], &expected["device"]), (&"cuda".into(), &"cpu".into()));
        assert!(log.contains("device: cuda:0 (softcuda"), "{log}");
        assert!(log.contains("memory of cuda:0") && log.contains("weights"), "{log}");
    }
}

#[test]
fn bf16_and_sampling_run() {
    let template = "--receiver {r} --sharer {s} --fuser init:3 --gates open --temperature 0.8 --seed 5";
    let Some((first, _)) = on_cuda(template) else { return };
    assert_eq!(first["tokens"].as_array().map(Vec::len), Some(6));
    assert_eq!(first["tokens"], on_cuda(template).unwrap().0["tokens"], "the same seed");
}
