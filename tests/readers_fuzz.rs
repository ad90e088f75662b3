//! Seeded mutations of model files: whatever the bytes, loading returns, and memory stays bounded by the file's size.
//!
//! Runs for `C2C_FUZZ_SECONDS` (default 3). Mutant n depends on n alone: a failure names it, and
//! `C2C_FUZZ_START=n` begins with it.

mod readers;

use c2c::{
    backend::{self, DeviceChoice},
    model::{self, Source},
};
use readers::*;
use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// Numbers where readers go wrong.
const EDGES: [u64; 14] = [
    0,
    1,
    2,
    9,
    31,
    127,
    255,
    65_535,
    (1 << 31) - 1,
    u32::MAX as u64,
    1 << 32,
    1 << 40,
    i64::MAX as u64,
    u64::MAX,
];

/// Changes `bytes` in its first `header` bytes, mostly, in one to four places.
fn mutate(bytes: &mut Vec<u8>, header: usize, random: &mut Random) {
    for _ in 0..1 + random.below(4) {
        let reach = if random.below(8) == 0 { bytes.len() } else { header.min(bytes.len()) };
        let at = random.below(reach);
        let edge = EDGES[random.below(EDGES.len())];
        match random.below(8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = edge as u8,
            2 if at + 4 <= bytes.len() => bytes[at..at + 4].copy_from_slice(&(edge as u32).to_le_bytes()),
            3 if at + 8 <= bytes.len() => bytes[at..at + 8].copy_from_slice(&edge.to_le_bytes()),
            4 if random.below(4) == 0 => bytes.truncate(at),
            5 => {
                let end = (at + random.below(40)).min(bytes.len());
                bytes.drain(at.min(end)..end);
            }
            6 => {
                let end = (at + random.below(40)).min(bytes.len());
                let copy = bytes[at.min(end)..end].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, copy);
            }
            // A number of a text format.
            _ => {
                let Some(digit) = (at..reach.min(bytes.len())).find(|&i| bytes[i].is_ascii_digit()) else {
                    continue;
                };
                let end = (digit..bytes.len()).find(|&i| !bytes[i].is_ascii_digit()).unwrap_or(bytes.len());
                let sign = if random.below(4) == 0 { "-" } else { "" };
                bytes.splice(digit..end, format!("{sign}{edge}").into_bytes());
            }
        }
    }
}

/// Most address space this process has had, in bytes, where the system tells.
fn peak_address_space() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmPeak:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

fn seconds() -> Duration {
    let seconds = std::env::var("C2C_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs_f64(seconds.unwrap_or(3.0))
}

#[test]
fn mutated_files_never_panic() {
    let backend = backend::open(DeviceChoice::Cpu, 1).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let gguf_path = folder.path().join("model.gguf");
    let (single, sharded) = (folder.path().join("single"), folder.path().join("sharded"));
    fs::create_dir(&single).unwrap();
    fs::create_dir(&sharded).unwrap();
    let index = write_sharded(&sharded);
    let config = config_json().to_string().into_bytes();
    let tensors = safetensors(&hugging_face_tensors());
    let header = 8 + u64::from_le_bytes(tensors[..8].try_into().unwrap()) as usize;
    let (gguf, gguf_header) = GgufFile::llama().bytes();
    fs::write(single.join("config.json"), &config).unwrap();
    fs::write(single.join("model.safetensors"), &tensors).unwrap();
    // The file to write, its sound content, how much of that is header, what to load.
    let targets = [
        (gguf_path.clone(), gguf, gguf_header, gguf_path),
        (single.join("model.safetensors"), tensors, header, single.clone()),
        (single.join("config.json"), config.clone(), config.len(), single),
        (sharded.join("model.safetensors.index.json"), index.clone(), index.len(), sharded),
    ];
    let load = |path| {
        let loaded = model::load(path, &backend, &|_, _| {})?;
        if let Source::Gguf(gguf) = &loaded.source {
            // The tokenizer's metadata is read later; an error is as good as a vocabulary.
            _ = gguf.vocab();
        }
        Ok::<_, model::Error>(())
    };
    for (file, sound, _, path) in &targets {
        fs::write(file, sound).unwrap();
        load(path).expect("the sound file loads");
    }
    let before = peak_address_space();
    let start: u64 = std::env::var("C2C_FUZZ_START").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let until = Instant::now() + seconds();
    let (mut accepted, mut refused) = ([0; 4], [0; 4]);
    for n in start.. {
        if Instant::now() >= until && n - start >= 400 {
            break;
        }
        let mut random = Random(n);
        let which = random.below(targets.len());
        let (file, sound, header, path) = &targets[which];
        let mut bytes = sound.clone();
        mutate(&mut bytes, *header, &mut random);
        fs::write(file, &bytes).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| load(path)));
        let result = result.unwrap_or_else(|_| panic!("mutant {n} of {file:?} panicked"));
        match result {
            Ok(()) => accepted[which] += 1,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused[which] += 1;
            }
        }
        fs::write(file, sound).unwrap();
    }
    eprintln!("gguf, safetensors, config, index: {accepted:?} accepted, {refused:?} refused");
    // Some mutations hit nothing that matters, most do: a reader that takes all or none is not being tested.
    for which in 0..targets.len() {
        assert!(accepted[which] > 0 && refused[which] > 0, "target {which}: {accepted:?}, {refused:?}");
    }
    if let (Some(before), Some(after)) = (before, peak_address_space()) {
        assert!(
            after - before < 256 << 20,
            "address space grew by {} bytes for files of a few KiB",
            after - before
        );
    }
}
