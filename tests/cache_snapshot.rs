//! Snapshots of a sequence's cache: there and back, and every way a file can be wrong.

use c2c::{
    backend::{Backend, DType, Queue, cpu::Cpu},
    cache::{
        BlockTable, CacheShape, Content, Domain, Error, Fingerprint, KeyForm, KeyPositions, KvColumns,
        PagedKv, Rotation, Snapshot, SnapshotError,
    },
    rng::{Purpose, Rng, Stream},
};
use std::{fs, path::Path, sync::Arc};

const SHAPE: CacheShape = CacheShape { layers: 3, kv_heads: 2, head_dim: 4 };
const TOKENS: usize = 11;

fn keys() -> KeyForm {
    KeyForm::PostRope(vec![Rotation { inv_freq: vec![1.0, 0.017_3], scale: 1.0 }])
}

fn domain(model: &str) -> Domain {
    let print = |text: &str| Fingerprint::of([text.as_bytes()]);
    let content = Content::Fused {
        fuser: print("fuser"),
        sharers: vec![print("sharer")],
        settings: "alignment=span".into(),
    };
    Domain {
        model: print(model),
        tokenizer: print("tokenizer"),
        content,
        keys: KeyPositions::PostRope,
        salt: "a\"b".into(),
    }
}

fn cache(backend: &Arc<dyn Backend>, dtype: DType) -> PagedKv {
    PagedKv::new(backend, SHAPE, keys(), 6, 4, dtype).unwrap()
}

/// A sequence with random columns that doesn't start at the first block.
fn sequence(kv: &PagedKv, queue: &Queue) -> BlockTable {
    let _other = kv.pool().allocate(2).unwrap();
    let mut table = BlockTable::new(kv.pool());
    let slots = kv.append(queue, &mut table, TOKENS).unwrap();
    for layer in 0..SHAPE.layers {
        let column = |part| {
            let mut x = vec![0.0; TOKENS * SHAPE.width()];
            Rng::new(4, Stream::new(Purpose::Init, part), layer as u32).fill_uniform(0, &mut x);
            x
        };
        kv.write(queue, layer, &slots, &KvColumns { keys: column(0), values: column(1) }).unwrap();
    }
    table
}

fn snapshot(dtype: DType) -> Snapshot {
    let backend: Arc<dyn Backend> = Cpu::new(1);
    let (kv, queue) = (cache(&backend, dtype), Queue::new(&backend).unwrap());
    let table = sequence(&kv, &queue);
    let (ids, positions): (Vec<u32>, Vec<u32>) = (0..TOKENS as u32).map(|i| (1000 + i, 40 + i)).unzip();
    Snapshot::capture(&kv, &queue, &table, domain("m"), &ids, &positions).unwrap()
}

#[test]
fn there_and_back() {
    for dtype in [DType::F32, DType::Bf16] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chat.safetensors");
        let saved = snapshot(dtype);
        // Once more over an existing file.
        saved.save(&path).unwrap();
        saved.save(&path).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
        let loaded = Snapshot::load(&path, &domain("m")).unwrap();
        assert_eq!(loaded, saved);

        let backend: Arc<dyn Backend> = Cpu::new(1);
        let (kv, queue) = (cache(&backend, dtype), Queue::new(&backend).unwrap());
        let table = loaded.restore(&kv, &queue).unwrap();
        assert_eq!(table.len(), TOKENS);
        for (layer, columns) in saved.layers.iter().enumerate() {
            assert_eq!(kv.read(&queue, layer, &table.slots(0..TOKENS).unwrap()).unwrap(), *columns);
        }
        drop(table);
        assert_eq!(kv.pool().used(), 0);
    }
}

#[test]
fn the_file_is_plain_safetensors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat.safetensors");
    let saved = snapshot(DType::F32);
    saved.save(&path).unwrap();
    let bytes = fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let value = file.tensor("value.2").unwrap();
    assert_eq!(value.shape(), [TOKENS, 2, 4]);
    let last = value.data().chunks_exact(4).last().unwrap();
    assert_eq!(f32::from_le_bytes(last.try_into().unwrap()), *saved.layers[2].values.last().unwrap());
    assert_eq!(file.tensor("token_ids").unwrap().data()[..4], 1000u32.to_le_bytes());
}

#[test]
fn another_domain_is_refused_by_field() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat.safetensors");
    snapshot(DType::F32).save(&path).unwrap();
    for (expected, name) in [
        (domain("other"), "model"),
        (Domain { content: Content::Plain, ..domain("m") }, "content"),
        (Domain { keys: KeyPositions::PreRope, ..domain("m") }, "keys"),
        (Domain { salt: String::new(), ..domain("m") }, "salt"),
    ] {
        match Snapshot::load(&path, &expected) {
            Err(SnapshotError::Domain { field, .. }) => assert_eq!(field, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    assert!(Snapshot::inspect(&path).is_ok());
}

#[test]
fn a_cache_of_another_kind_is_refused() {
    let saved = snapshot(DType::Bf16);
    let backend: Arc<dyn Backend> = Cpu::new(1);
    let queue = Queue::new(&backend).unwrap();
    let new = |shape, keys, blocks, dtype| PagedKv::new(&backend, shape, keys, blocks, 4, dtype).unwrap();
    for (kv, name) in [
        (new(SHAPE, keys(), 6, DType::F32), "dtype of the snapshot"),
        (new(SHAPE, KeyForm::PreRope, 6, DType::Bf16), "key form of the snapshot"),
        (new(CacheShape { layers: 2, ..SHAPE }, keys(), 6, DType::Bf16), "shape of the snapshot"),
    ] {
        match saved.restore(&kv, &queue) {
            Err(Error::Mismatch { what, .. }) => assert_eq!(what, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    let small = new(SHAPE, keys(), 2, DType::Bf16);
    assert!(matches!(
        saved.restore(&small, &queue),
        Err(Error::OutOfBlocks { wanted: 3, free: 2, total: 2 })
    ));
}

#[test]
fn damaged_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat.safetensors");
    snapshot(DType::Bf16).save(&path).unwrap();
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let broken = folder.path().join("broken.safetensors");
    let load = |bytes: &[u8]| {
        fs::write(&broken, bytes).unwrap();
        Snapshot::inspect(&broken)
    };
    for len in (0..whole.len()).step_by(17) {
        assert!(matches!(load(&whole[..len]), Err(SnapshotError::Format { .. })), "cut to {len}");
    }
    for at in (0..whole.len()).step_by(5) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        let result = load(&bytes);
        if at >= header {
            assert!(matches!(result, Err(SnapshotError::Checksum { .. })), "byte {at}");
        } else if let Ok(loaded) = result {
            // Only padding after the JSON may change without notice.
            assert_eq!(loaded, snapshot(DType::Bf16), "byte {at}: {:?}", whole[at] as char);
        }
    }
    let longer = [&whole[..], &[0]].concat();
    assert!(matches!(load(&longer), Err(SnapshotError::Format { .. })));
    let text = |from: &str, to: &str| {
        let (from, to) = (from.as_bytes(), to.as_bytes());
        assert_eq!(from.len(), to.len());
        let at = whole.windows(from.len()).position(|window| window == from).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to);
        load(&bytes)
    };
    assert!(matches!(text(r#""version":"1""#, r#""version":"2""#), Err(SnapshotError::Version { .. })));
    assert!(matches!(text("c2c.kv", "c3c.kv"), Err(SnapshotError::Format { .. })));
    // The domain in the file is under the checksum too.
    assert!(matches!(text("alignment=span", "alignment=spam"), Err(SnapshotError::Checksum { .. })));
    assert!(matches!(text(r#"\"layers\":3"#, r#"\"layers\":9"#), Err(SnapshotError::Format { .. })));
    assert!(matches!(text(r#"\"head_dim\":4"#, r#"\"head_dim\":8"#), Err(SnapshotError::Format { .. })));
}

#[test]
fn unwritable_places_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("none/chat.safetensors");
    let saved = snapshot(DType::F32);
    match saved.save(&missing) {
        Err(SnapshotError::Write(error)) => assert_eq!(error.path, missing),
        other => panic!("{other:?}"),
    }
    assert!(matches!(saved.save(Path::new("/")), Err(SnapshotError::Write(_))));
    assert!(matches!(Snapshot::load(&missing, &domain("m")), Err(SnapshotError::Io { .. })));
}
