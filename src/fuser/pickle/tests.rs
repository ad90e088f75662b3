//! Friendly and hostile archives, and a seeded mutator.

use super::*;
use crate::rng::{Purpose, Rng, Stream};
use memmap2::MmapMut;
use std::{
    io::Write,
    time::{Duration, Instant},
};
use zip::{ZipWriter, write::SimpleFileOptions};

fn map(bytes: &[u8]) -> Arc<Mmap> {
    let mut map = MmapMut::map_anon(bytes.len().max(1)).unwrap();
    map[..bytes.len()].copy_from_slice(bytes);
    Arc::new(map.make_read_only().unwrap())
}

fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in entries {
        zip.start_file(*name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn int(number: i32) -> Vec<u8> {
    [b"J", &number.to_le_bytes()[..]].concat()
}

/// `torch._utils._rebuild_tensor_v2(…)` as PyTorch pickles it.
fn tensor(kind: &str, key: &str, elements: i32, offset: i32, shape: &[i32], strides: &[i32]) -> Vec<u8> {
    let tuple = |numbers: &[i32]| {
        [b"(".to_vec(), numbers.iter().flat_map(|&n| int(n)).collect(), b"t".to_vec()].concat()
    };
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
        text("storage"),
        format!("ctorch\n{kind}\n").into_bytes(),
        text(key),
        text("cpu"),
        int(elements),
        b"tQ".to_vec(),
        int(offset),
        tuple(shape),
        tuple(strides),
        b"\x89ccollections\nOrderedDict\n)RtR".to_vec(),
    ]
    .concat()
}

/// An ordered dict of `items`, name and pickled value, with PyTorch's `_metadata`.
fn state_dict(items: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut pickle = b"\x80\x02ccollections\nOrderedDict\n)Rq\x00(".to_vec();
    for (name, value) in items {
        pickle.extend(text(name));
        pickle.extend(value);
    }
    pickle.extend(b"u}q\x01");
    pickle.extend(text("_metadata"));
    pickle.extend(b"ccollections\nOrderedDict\n)Rsb.");
    pickle
}

fn two_tensors() -> Vec<u8> {
    state_dict(&[
        ("a.weight", tensor("FloatStorage", "0", 6, 0, &[2, 3], &[3, 1])),
        ("gate", tensor("BFloat16Storage", "1", 1, 0, &[], &[])),
    ])
}

fn two_tensor_archive() -> Vec<u8> {
    let floats: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
    archive(&[
        ("p/data.pkl", &two_tensors()),
        ("p/byteorder", b"little"),
        ("p/data/0", &floats),
        ("p/data/1", &[0x80, 0x3f]),
    ])
}

#[test]
fn a_state_dict_is_read_where_it_lies() {
    let entries = read_state_dict(&map(&two_tensor_archive())).unwrap();
    assert_eq!(entries.keys().collect::<Vec<_>>(), ["a.weight", "gate"]);
    let a = &entries["a.weight"];
    assert_eq!((a.dtype, &a.shape[..]), (DType::F32, &[2, 3][..]));
    assert_eq!(a.bytes()[20..], 5.0f32.to_le_bytes());
    let gate = &entries["gate"];
    assert_eq!((gate.dtype, gate.shape.len(), gate.bytes()), (DType::Bf16, 0, &[0x80, 0x3f][..]));
}

fn refused(pickle: &[u8], word: &str) {
    let data = [0u8; 24];
    let archive = archive(&[("p/data.pkl", pickle), ("p/data/0", &data), ("p/data/1", &data)]);
    let error = match read_state_dict(&map(&archive)) {
        Ok(_) => panic!("accepted, should complain of {word}"),
        Err(error) => error.to_string(),
    };
    assert!(error.contains(word), "`{error}` should complain of {word}");
}

#[test]
fn nothing_but_tensors_is_built() {
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch", "DoubleStorage"),
        ("torch._utils", "_rebuild_parameter"),
        ("collections", "OrderedDict.__init__"),
    ] {
        let function = format!("c{module}\n{name}\n");
        let pickle = [b"\x80\x02", function.as_bytes(), &text("id"), b"\x85R."].concat();
        refused(&pickle, &format!("{module}.{name}"));
    }
    // OrderedDict called with something, a tensor called, an attribute set.
    refused(b"\x80\x02ccollections\nOrderedDict\n)\x85R.", "arguments");
    refused(b"\x80\x02(t)R.", "a tuple is called");
    let mut pickle = b"\x80\x02}}".to_vec();
    pickle.extend([text("__class__"), b"Nsb.".to_vec()].concat());
    refused(&pickle, "__class__");
}

#[test]
fn other_instructions_are_named() {
    // Protocol 4, INST, OBJ, NEWOBJ, EXT1, STACK_GLOBAL, LIST, POP.
    refused(b"\x80\x04.", "protocol 4");
    for instruction in [b'i', b'o', 0x81, 0x82, 0x93, b'l', b'0', b'P'] {
        refused(&[0x80, 2, instruction, 1, 1, b'\n', b'.'], &format!("{instruction:#04x}"));
    }
}

#[test]
fn nesting_and_sharing_cost_nothing() {
    // A million tuples in each other.
    let mut deep = b"\x80\x02)".to_vec();
    deep.resize(MAX_PICKLE as usize - 1, 0x85);
    deep.push(b'.');
    refused(&deep, "it is a tuple");
    // Each tuple holds the one before twice: 2^n of them if anyone unfolded it.
    let mut laughs = b"\x80\x02)".to_vec();
    for i in 0..200u8 {
        laughs.extend([b'q', i, b'h', i, 0x86]);
    }
    laughs.push(b'.');
    refused(&laughs, "it is a tuple");
    // A dict that contains itself.
    refused(&[b"\x80\x02}q\x00", &text("a")[..], b"h\x00s."].concat(), "`a` is a dict");
}

#[test]
fn sizes_that_lie() {
    let one = |value: Vec<u8>| state_dict(&[("x", value)]);
    let float = "FloatStorage";
    refused(&one(tensor(float, "0", 7, 0, &[7], &[1])), "24 bytes");
    refused(&one(tensor(float, "0", i32::MAX, 0, &[7], &[1])), "24 bytes");
    refused(&one(tensor(float, "0", -1, 0, &[7], &[1])), "storage");
    refused(&one(tensor(float, "0", 6, 0, &[7], &[1])), "past its storage");
    refused(&one(tensor(float, "0", 6, 1, &[6], &[1])), "past its storage");
    refused(&one(tensor(float, "0", 6, -1, &[6], &[1])), "negative");
    refused(&one(tensor(float, "0", 6, 0, &[-6], &[1])), "negative");
    let huge = [i32::MAX; 4];
    refused(&one(tensor(float, "0", 6, 0, &huge, &huge)), "past its storage");
    refused(&one(tensor(float, "0", 6, 0, &[0, i32::MAX, i32::MAX, i32::MAX], &huge)), "empty");
    refused(&one(tensor(float, "0", 6, 0, &[1; 5], &[1; 5])), "4 dimensions");
    refused(&one(tensor(float, "0", 6, 0, &[2, 3], &[1, 2])), "not contiguous");
    refused(&one(tensor(float, "0", 6, 0, &[6], &[0])), "not contiguous");
    refused(&one(tensor(float, "9", 6, 0, &[6], &[1])), "`data/9` is not in the archive");
    refused(&one(tensor(float, "../../../etc/passwd", 6, 0, &[6], &[1])), "etc/passwd");
    let shared = tensor(float, "0", 6, 0, &[6], &[1]);
    refused(&state_dict(&[("x", shared.clone()), ("y", shared.clone())]), "shares its storage");
    refused(&state_dict(&[("x", shared.clone()), ("x", shared)]), "twice");
    refused(&one(text("no tensor")), "`x` is a text");
    refused(b"\x80\x02X\xff\xff\xff\xff", "in the middle");
}

#[test]
fn archives_that_lie() {
    let broken = |bytes: &[u8], word: &str| {
        let error = read_state_dict(&map(bytes)).err().map(|error| error.to_string());
        let error = error.unwrap_or_else(|| panic!("accepted, should complain of {word}"));
        assert!(error.contains(word), "`{error}` should complain of {word}");
    };
    let pickle = two_tensors();
    broken(b"", "not a PyTorch archive");
    broken(b"PK\x03\x04", "not a PyTorch archive");
    broken(&archive(&[("p/other", b"")]), "no data.pkl");
    broken(&archive(&[("data.pkl", &pickle)]), "outside");
    broken(&archive(&[("p/data.pkl", &pickle), ("q/data/0", b"")]), "second folder");
    broken(&archive(&[("p/data.pkl", &pickle), ("p/byteorder", b"big")]), "little-endian");
    broken(&archive(&[("p/data.pkl", &vec![b'N'; MAX_PICKLE as usize + 1])]), "at most");
    let good = two_tensor_archive();
    for len in 0..good.len() {
        assert!(read_state_dict(&map(&good[..len])).is_err(), "the first {len} bytes");
    }
    // Compression method and sizes in the central directory, where readers look.
    let directory = good.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
    let mut deflated = good.clone();
    deflated[directory + 10] = 8;
    broken(&deflated, "compressed");
    let mut long = good.clone();
    long[directory + 20..directory + 28].copy_from_slice(&[0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff, 0x7f]);
    assert!(read_state_dict(&map(&long)).is_err());
}

/// Seconds that each fuzz test may take.
fn budget() -> Duration {
    let seconds = std::env::var("C2C_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs_f64(seconds.unwrap_or(3.0) / 2.0)
}

/// One to four edits: a bit, a byte, a number's edge, a cut, a repeat, a piece moved.
fn mutate(rng: &Rng, seed: &[u8]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    let below = |index: u32, limit: usize| rng.bits(index) as usize % limit.max(1);
    for edit in 0..1 + below(0, 4) as u32 {
        let at = below(8 * edit + 2, bytes.len());
        let len = below(8 * edit + 3, 16).min(bytes.len() - at);
        match below(8 * edit + 1, 6) {
            _ if bytes.is_empty() => {}
            0 => bytes[at] ^= 1 << below(8 * edit + 4, 8),
            1 => bytes[at] = rng.bits(8 * edit + 4) as u8,
            2 => bytes[at..at + len].fill([0, 0x7f, 0x80, 0xff][below(8 * edit + 4, 4)]),
            3 => drop(bytes.drain(at..at + len)),
            4 => {
                let piece = bytes[at..at + len].repeat(1 + below(8 * edit + 4, 40));
                bytes.splice(at..at, piece);
            }
            _ => {
                let piece: Vec<u8> = bytes.drain(at..at + len).collect();
                let to = below(8 * edit + 5, bytes.len() + 1);
                bytes.splice(to..to, piece);
            }
        }
    }
    bytes
}

/// Calls `check` on mutants of `seed` until the time is over. A panic's output ends with the round that reproduces it.
fn fuzz(name: &str, seed: &[u8], mut check: impl FnMut(&[u8])) {
    struct Round<'a>(&'a str, u32);
    impl Drop for Round<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("{}: failed in round {}", self.0, self.1);
            }
        }
    }
    let start = Instant::now();
    let mut round = Round(name, 0);
    while start.elapsed() < budget() {
        check(&mutate(&Rng::new(20251003, Stream::new(Purpose::Shuffle, 0), round.1), seed));
        round.1 += 1;
    }
    assert!(round.1 > 0);
}

#[test]
fn mutated_pickles_never_panic() {
    let mut accepted = 0;
    fuzz("pickle", &two_tensors(), |pickle| {
        if let Ok(tensors) = unpickle(pickle) {
            accepted += 1;
            assert!(tensors.iter().all(|(_, view)| view.shape.len() == view.strides.len()));
        }
    });
    assert!(accepted > 0, "mutants so far from a pickle test little");
}

#[test]
fn mutated_archives_never_panic() {
    let mut accepted = 0;
    fuzz("archive", &two_tensor_archive(), |bytes| {
        if let Ok(entries) = read_state_dict(&map(bytes)) {
            accepted += 1;
            // Slicing out of the file would panic.
            let total: usize = entries.values().map(|entry| entry.bytes().len()).sum();
            assert!(total <= bytes.len());
        }
    });
    assert!(accepted > 0, "mutants so far from an archive test little");
}
