//! The fuser against the authors' program: projectors alone, and their checkpoints.

mod goldens;

use c2c::{
    backend::{Backend, DType, Precision, Queue, Tensor, cpu::Cpu},
    fuser::{
        FuseCall, Fuser, FuserConfig, FuserError, Kind, LayerCall, Mapping, Party, Training, require_contract,
    },
    ops::KvPages,
    train::{FuseRequest, GateNoise, TrainedFuser, config::Decay},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    sync::Arc,
};

fn backend() -> Arc<dyn Backend> {
    Cpu::new(2)
}

/// A tensor of a file as f32.
struct Array {
    shape: Vec<usize>,
    data: Vec<f32>,
    dtype: Dtype,
    bytes: Vec<u8>,
}

fn read(path: &Path) -> BTreeMap<String, Array> {
    let file = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let array = |view: &TensorView| {
        let bytes = view.data();
        let data = match view.dtype() {
            Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            Dtype::BF16 => {
                let bits =
                    bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes(b.try_into().unwrap())));
                bits.map(|bits| f32::from_bits(bits << 16)).collect()
            }
            other => panic!("golden of type {other:?}"),
        };
        Array { shape: view.shape().to_vec(), data, dtype: view.dtype(), bytes: bytes.to_vec() }
    };
    tensors.tensors().iter().map(|(name, view)| (name.clone(), array(view))).collect()
}

const BLOCK: usize = 4;

/// A cache golden `[batch, heads, tokens, dim]` in pages, a slot for each (batch, token) in an order of its own, all
/// other slots NaN.
struct Paged {
    pages: KvPages,
    slots: Tensor,
    order: Vec<usize>,
    dims: [usize; 4],
}

impl Paged {
    fn new(queue: &Queue, keys: &Array, values: &Array, stride: usize, dtype: DType) -> Paged {
        let dims: [usize; 4] = keys.shape.clone().try_into().unwrap();
        let [batch, heads, tokens, dim] = dims;
        let blocks = (batch * tokens).div_ceil(BLOCK) + 2;
        let slots = blocks * BLOCK;
        // A stride prime to the number of slots visits each slot once.
        let order: Vec<usize> = (0..batch * tokens).map(|i| (i * stride + 3) % slots).collect();
        assert_eq!(
            order.iter().collect::<BTreeSet<_>>().len(),
            order.len(),
            "the stride is prime to {slots}"
        );
        let page = |array: &Array| {
            let mut page = vec![f32::NAN; slots * heads * dim];
            for (i, &slot) in order.iter().enumerate() {
                for head in 0..heads {
                    let from = ((i / tokens * heads + head) * tokens + i % tokens) * dim;
                    let to = ((slot / BLOCK * heads + head) * BLOCK + slot % BLOCK) * dim;
                    page[to..to + dim].copy_from_slice(&array.data[from..from + dim]);
                }
            }
            let shape = [blocks, heads, BLOCK, dim];
            if dtype == DType::Bf16 {
                let page: Vec<half::bf16> = page.iter().map(|&x| half::bf16::from_f32(x)).collect();
                return queue.tensor(&page, &shape, "page").unwrap();
            }
            queue.tensor(&page, &shape, "page").unwrap()
        };
        let pages = KvPages { keys: page(keys), values: page(values) };
        let slots: Vec<u32> = order.iter().map(|&slot| slot as u32).collect();
        let slots = queue.tensor(&slots, &[slots.len()], "slots").unwrap();
        Paged { pages, slots, order, dims }
    }

    /// Keys and values back as `[batch, heads, tokens, dim]`.
    fn gather(&self, queue: &Queue) -> [Vec<f32>; 2] {
        let [batch, heads, tokens, dim] = self.dims;
        [&self.pages.keys, &self.pages.values].map(|page| {
            let page = queue.download_f32(page).unwrap();
            let mut out = vec![0.0; batch * heads * tokens * dim];
            for (i, &slot) in self.order.iter().enumerate() {
                for head in 0..heads {
                    let to = ((i / tokens * heads + head) * tokens + i % tokens) * dim;
                    let from = ((slot / BLOCK * heads + head) * BLOCK + slot % BLOCK) * dim;
                    out[to..to + dim].copy_from_slice(&page[from..from + dim]);
                }
            }
            out
        })
    }
}

/// The golden's parameters as a checkpoint of one layer, read through the front door.
fn load(golden: &BTreeMap<String, Array>, kind: Kind, backend: &Arc<dyn Backend>) -> Fuser {
    let param = |name: &str| &golden[&format!("param.{name}")];
    let shape = |name: &str| {
        let dims = &golden[name].shape;
        Party::new(1, dims[1], dims[3])
    };
    let w1 = &param("key_mlp1.blocks.0.w1.weight").shape;
    let blocks =
        (0..).take_while(|i| golden.contains_key(&format!("param.key_proj_mlp2.blocks.{i}.norm.weight")));
    let config = FuserConfig {
        num_layers: blocks.count() + 2,
        dtype: if param("key_in.weight").dtype == Dtype::BF16 { DType::Bf16 } else { DType::F32 },
        training: Training::default(),
        ..FuserConfig::new(
            kind,
            w1[1],
            w1[0],
            Mapping::Custom,
            &[0],
            shape("target_key"),
            shape("source_key"),
        )
    };
    let folder = tempfile::tempdir().unwrap();
    let tensors = golden.iter().filter_map(|(name, array)| {
        let name = format!("projector_0.{}", name.strip_prefix("param.")?);
        Some((name, TensorView::new(array.dtype, array.shape.clone(), &array.bytes).unwrap()))
    });
    fs::write(folder.path().join("fuser.safetensors"), safetensors::serialize(tensors, None).unwrap())
        .unwrap();
    fs::write(folder.path().join("fuser.json"), serde_json::to_string(&config).unwrap()).unwrap();
    Fuser::load(folder.path(), backend).unwrap()
}

/// Runs the layer on the golden's caches and returns keys and values; `in_place` writes over the target.
fn run(
    golden: &BTreeMap<String, Array>,
    fuser: &Fuser,
    gates: [f32; 2],
    in_place: bool,
    (pages, precision): (DType, Precision),
    backend: &Arc<dyn Backend>,
) -> [Vec<f32>; 2] {
    let queue = Queue::new(backend).unwrap();
    let (source, target) =
        ((&golden["source_key"], &golden["source_value"]), (&golden["target_key"], &golden["target_value"]));
    let source = Paged::new(&queue, source.0, source.1, 5, pages);
    let target = Paged::new(&queue, target.0, target.1, 7, pages);
    let zeros = Array {
        data: vec![0.0; golden["target_key"].data.len()],
        shape: target.dims.to_vec(),
        dtype: Dtype::F32,
        bytes: vec![],
    };
    let fresh = Paged::new(&queue, &zeros, &zeros, 11, pages);
    let out = if in_place { &target } else { &fresh };
    let scratch = vec![f32::NAN; fuser.scratch_len(queue.backend().as_ref(), 1, target.order.len())];
    let scratch = queue.tensor(&scratch, &[scratch.len()], "scratch").unwrap();
    let layer = LayerCall {
        layer: 0,
        gates,
        source: &source.pages,
        target: &target.pages,
        base: &target.pages,
        out: &out.pages,
    };
    let call = FuseCall {
        layers: &[layer],
        source_slots: &source.slots,
        target_slots: &target.slots,
        base_slots: &target.slots,
        out_slots: &out.slots,
        scratch: &scratch,
        precision,
    };
    fuser.issue(&queue, call).unwrap();
    out.gather(&queue)
}

/// (gates, name of the output before `key`) of every evaluation in a golden.
fn evaluations(golden: &BTreeMap<String, Array>, fuser: &Fuser) -> Vec<([f32; 2], String)> {
    let hard = |text: &str| if text.parse::<f32>().unwrap() > 0.0 { 1.0 } else { 0.0 };
    let mut all: Vec<_> = golden
        .keys()
        .filter_map(|name| {
            let gates = name.strip_prefix("eval_kg")?.strip_suffix(".out_key")?;
            let (key, value) = gates.split_once("_vg").unwrap();
            Some(([hard(key), hard(value)], name.strip_suffix("key").unwrap().to_string()))
        })
        .collect();
    if golden.contains_key("out_key") {
        all.push((fuser.gates()[0], "out_".into()));
    }
    all
}

fn kind(case: &serde_json::Value) -> Option<Kind> {
    let flag = |name: &str| case["metadata"][name].as_str() != Some("False");
    match case["type"].as_str()? {
        "C2CProjector" => Some(Kind::C2c),
        "AblationProjector" => {
            let flags = (flag("use_scalar_weights"), flag("use_gates"), flag("use_target"));
            (0..=4).map(Kind::Ablation).find(|k| (k.has_scalar(), k.has_gates(), k.has_target()) == flags)
        }
        _ => None,
    }
}

#[test]
fn projectors_agree_with_the_reference() {
    let Some(manifest) = goldens::json("manifest.json") else { return };
    let backend = backend();
    let mut cases = 0;
    for case in manifest["projectors"].as_array().unwrap() {
        let file = case["file"].as_str().unwrap();
        // `all_in_one_projectors_agree_with_the_reference`
        let Some(kind) = kind(case) else { continue };
        let golden = read(&goldens::find(file).unwrap());
        if golden["source_key"].dtype != Dtype::F32 {
            continue; // `a_bf16_projector_is_as_good_as_the_reference`
        }
        let fuser = load(&golden, kind, &backend);
        for (gates, name) in evaluations(&golden, &fuser) {
            for in_place in [false, true] {
                let ours = run(&golden, &fuser, gates, in_place, (DType::F32, Precision::F32), &backend);
                for (ours, half) in ours.iter().zip(["key", "value"]) {
                    let worst = goldens::difference(ours, &golden[&format!("{name}{half}")].data);
                    assert!(worst < 2e-5, "{file} {name}{half}: off by {worst}");
                }
                cases += 1;
            }
        }
    }
    assert!(cases > 0, "the manifest lists no projector that is built");
}

/// Sequence `row` of a golden's caches alone: gates and weights may be computed from a whole section.
fn sequence(golden: &BTreeMap<String, Array>, row: usize) -> BTreeMap<String, Array> {
    let columns = ["source_key", "source_value", "target_key", "target_value"];
    let made = ["out_key", "out_value", "train.out_key", "train.out_value", "train.u"];
    let cut = |name: &str| {
        let Array { shape, data, dtype, .. } = &golden[name];
        let len = data.len() / shape[0];
        let data = data[row * len..(row + 1) * len].to_vec();
        let shape = [&[1], &shape[1..]].concat();
        Array { shape, data, dtype: *dtype, bytes: vec![] }
    };
    columns.iter().chain(&made).map(|&name| (name.to_string(), cut(name))).collect()
}

/// Noise as a golden has it, `[1, heads, tokens, dim]`, for each element.
struct ElementNoise<'a>(&'a Array);

impl GateNoise for ElementNoise<'_> {
    fn fill(&self, _: usize, _: usize, out: &mut [f32]) {
        let Array { shape, data, .. } = self.0;
        let (heads, tokens, dim) = (shape[1], shape[2], shape[3]);
        for (i, out) in out.iter_mut().enumerate() {
            let (token, head) = (i / dim / heads, i / dim % heads);
            *out = data[(head * tokens + token) * dim + i % dim];
        }
    }
}

/// Keys and values with soft gates at temperature 1.
fn run_soft(golden: &BTreeMap<String, Array>, fuser: &Fuser, backend: &Arc<dyn Backend>) -> [Vec<f32>; 2] {
    let queue = Queue::new(backend).unwrap();
    let source = Paged::new(&queue, &golden["source_key"], &golden["source_value"], 5, DType::F32);
    let target = Paged::new(&queue, &golden["target_key"], &golden["target_value"], 7, DType::F32);
    let mut fuser = TrainedFuser::new(fuser, &queue, Decay::All).unwrap();
    fuser.temperature = 1.0;
    let pages = &target.pages;
    let layer = LayerCall {
        layer: 0,
        gates: [1.0; 2],
        source: &source.pages,
        target: pages,
        base: pages,
        out: pages,
    };
    let request = FuseRequest {
        layers: &[layer],
        source_slots: source.slots.clone(),
        target_slots: target.slots.clone(),
        precision: Precision::F32,
        dropout: 0.0,
        seed: 0,
        step: 0,
        noise: &ElementNoise(&golden["train.u"]),
    };
    fuser.forward(&queue, request).unwrap();
    target.gather(&queue)
}

/// Read from the published layout, run, written in both layouts and run again.
#[test]
fn all_in_one_projectors_agree_with_the_reference() {
    let Some(manifest) = goldens::json("manifest.json") else { return };
    let backend = backend();
    let queue = Queue::new(&backend).unwrap();
    let (mut cases, mut soft) = (0, 0);
    for case in manifest["projectors"].as_array().unwrap() {
        if case["type"] != "AllInOneProjector" {
            continue;
        }
        let file = case["file"].as_str().unwrap();
        let golden = read(&goldens::find(file).unwrap());
        let folder = tempfile::tempdir().unwrap();
        let args: serde_json::Value =
            serde_json::from_str(case["metadata"]["config"].as_str().unwrap()).unwrap();
        let write = |name: &str, json: serde_json::Value| {
            fs::write(folder.path().join(name), json.to_string()).unwrap();
        };
        write("projector_0.json", serde_json::json!({"class": "AllInOneProjector", "init_args": args}));
        write("projector_config.json", serde_json::json!({"0": {"1": {"0": [[0, 0]]}}}));
        let tensors = golden.iter().filter_map(|(name, array)| {
            let name = format!("projector_0.{}", name.strip_prefix("param.")?);
            Some((name, TensorView::new(array.dtype, array.shape.clone(), &array.bytes).unwrap()))
        });
        let weights = safetensors::serialize(tensors, None).unwrap();
        fs::write(folder.path().join("projectors.safetensors"), weights).unwrap();
        let fuser = Fuser::load(folder.path(), &backend).unwrap();
        assert_eq!(fuser.config().kind, Kind::AllInOne);
        if fuser.config().all_in_one.as_ref().unwrap().is_trainable() {
            for row in 0..golden["out_key"].shape[0] {
                let golden = sequence(&golden, row);
                let ours = run_soft(&golden, &fuser, &backend);
                for (ours, name) in ours.iter().zip(["train.out_key", "train.out_value"]) {
                    let worst = goldens::difference(ours, &golden[name].data);
                    assert!(worst < 2e-5, "{file} {name} of sequence {row}: off by {worst}");
                }
                soft += 1;
            }
        }
        let (ours, published) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fuser.save(ours.path(), &queue).unwrap();
        fuser.save_published(published.path(), &queue).unwrap();
        let again = [&ours, &published].map(|folder| Fuser::load(folder.path(), &backend).unwrap());
        for fuser in [&fuser].into_iter().chain(&again) {
            for row in 0..golden["out_key"].shape[0] {
                let golden = sequence(&golden, row);
                for in_place in [false, true] {
                    let exact = (DType::F32, Precision::F32);
                    let ours = run(&golden, fuser, [1.0; 2], in_place, exact, &backend);
                    for (ours, name) in ours.iter().zip(["out_key", "out_value"]) {
                        let worst = goldens::difference(ours, &golden[name].data);
                        assert!(worst < 2e-5, "{file} {name} of sequence {row}: off by {worst}");
                    }
                    let closed = run(&golden, fuser, [0.0; 2], in_place, exact, &backend);
                    for (ours, name) in closed.iter().zip(["target_key", "target_value"]) {
                        assert_eq!(ours, &golden[name].data, "{file}: closed by hand");
                    }
                    cases += 1;
                }
            }
        }
    }
    assert!(cases > 0 && soft > 0, "the manifest lists no AllInOneProjector");
}

/// |ours − f32| ≤ 2 · |theirs − f32|: the f32 run has the same bf16 parameters and inputs.
#[test]
fn a_bf16_projector_is_as_good_as_the_reference() {
    let Some(path) = goldens::find("projector/c2c_bf16.safetensors") else { return };
    let (golden, backend) = (read(&path), backend());
    let fuser = load(&golden, Kind::C2c, &backend);
    let gates = fuser.gates()[0];
    let exact = run(&golden, &fuser, gates, false, (DType::F32, Precision::F32), &backend);
    let fast = run(&golden, &fuser, gates, false, (DType::F32, Precision::Fast), &backend);
    for (half, name) in [(0, "out_key"), (1, "out_value")] {
        let theirs = goldens::difference(&golden[name].data, &exact[half]);
        let ours = goldens::difference(&fast[half], &exact[half]);
        assert!(ours <= 2.0 * theirs, "{name}: off by {ours}, the reference by {theirs}");
    }
}

/// Every parameter's bytes by name, scalars included.
fn contents(fuser: &Fuser, queue: &Queue) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for (i, projector) in fuser.projectors().iter().enumerate() {
        for (name, tensor) in projector.tensors() {
            let bytes = queue.download(tensor).unwrap();
            all.insert(format!("projector_{i}.{name}"), bytes);
        }
        let scalars = [projector.gate_logits[0], projector.gate_logits[1], projector.temperature];
        for (name, scalar) in ["key_gate_logit", "value_gate_logit", "gate_temperature"].iter().zip(scalars) {
            all.insert(format!("projector_{i}.{name}"), scalar.to_le_bytes().to_vec());
        }
    }
    all
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &to.join(entry.file_name()));
        } else {
            // Contents only: the source may be read-only.
            fs::write(to.join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
        }
    }
}

fn model_shape(folder: &Path) -> Party {
    let text = fs::read_to_string(folder.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    let number = |name: &str| config[name].as_u64().map(|n| n as usize);
    let heads = number("num_attention_heads").unwrap();
    let dim = number("head_dim").unwrap_or_else(|| number("hidden_size").unwrap() / heads);
    Party::new(number("num_hidden_layers").unwrap(), number("num_key_value_heads").unwrap_or(heads), dim)
}

#[test]
fn checkpoints_load_in_every_layout() {
    let Some(manifest) = goldens::json("manifest.json") else { return };
    let backend = backend();
    let queue = Queue::new(&backend).unwrap();
    for case in manifest["checkpoints"].as_array().unwrap() {
        let folder = goldens::find(case["folder"].as_str().unwrap()).unwrap();
        let fuser = Fuser::load(&folder, &backend).unwrap();
        let expected: BTreeMap<String, Vec<u8>> = read(&folder.join("projectors.safetensors"))
            .into_iter()
            .map(|(name, array)| (name, array.bytes))
            .collect();
        assert!(contents(&fuser, &queue) == expected, "{}: safetensors", folder.display());

        let receiver = model_shape(&goldens::find(case["receiver"].as_str().unwrap()).unwrap());
        let sharer = model_shape(&goldens::find(case["sharer"].as_str().unwrap()).unwrap());
        require_contract(fuser.config(), &receiver, &sharer).unwrap();
        assert!(require_contract(fuser.config(), &sharer, &receiver).is_err(), "the models swapped");
        assert_eq!(fuser.layers(), receiver.layers.unwrap());
        let mut open = 0;
        for (layer, gates) in fuser.gates().iter().enumerate() {
            for (half, gate) in ["key", "value"].iter().zip(gates) {
                let logit = &expected[&format!("projector_{layer}.{half}_gate_logit")];
                let logit = f32::from_le_bytes(logit[..].try_into().unwrap());
                assert_eq!(*gate == 1.0, logit > 0.0, "layer {layer} {half}");
                open += usize::from(logit > 0.0);
            }
        }
        assert!(open > 0 && open < 2 * fuser.layers(), "the golden has gates of both kinds");

        let scratch = tempfile::tempdir().unwrap();
        if case["published_pickle"].as_bool() == Some(true) {
            let pickled = scratch.path().join("pickled");
            copy_folder(&folder.join("final"), &pickled);
            let pickled = Fuser::load(&pickled, &backend).unwrap();
            assert!(contents(&pickled, &queue) == expected, "{}: pickles", folder.display());
            assert_eq!(pickled.fingerprint(&queue).unwrap(), {
                let bare = scratch.path().join("bare");
                copy_folder(&folder.join("final"), &bare);
                fs::copy(folder.join("projectors.safetensors"), bare.join("projectors.safetensors")).unwrap();
                Fuser::load(&bare, &backend).unwrap().fingerprint(&queue).unwrap()
            });
        }

        let own = scratch.path().join("own");
        fuser.save(&own, &queue).unwrap();
        for path in [own.clone(), own.join("fuser.json"), own.join("fuser.safetensors")] {
            let again = Fuser::load(&path, &backend).unwrap();
            assert!(contents(&again, &queue) == expected, "{}: own format", path.display());
            assert_eq!(again.config(), fuser.config());
        }
        let published = scratch.path().join("published");
        fuser.save_published(&published, &queue).unwrap();
        for path in [published.clone(), published.join("final"), published.join("projectors.safetensors")] {
            let again = Fuser::load(&path, &backend).unwrap();
            assert!(contents(&again, &queue) == expected, "{}: published layout", path.display());
            assert_eq!(again.config(), fuser.config());
            assert_eq!(again.fingerprint(&queue).unwrap(), fuser.fingerprint(&queue).unwrap());
        }
        let json = |folder: &Path, name: &str| -> serde_json::Value {
            serde_json::from_str(&fs::read_to_string(folder.join("final").join(name)).unwrap()).unwrap()
        };
        for name in ["projector_config.json", "projector_0.json"] {
            assert_eq!(json(&published, name), json(&folder, name), "{}: {name}", folder.display());
        }
    }
}

#[test]
fn a_pickle_that_wants_more_is_refused_by_name() {
    let Some(folder) = goldens::find("ckpt/qwen3_from_qwen2/final") else { return };
    let backend = backend();
    let scratch = tempfile::tempdir().unwrap();
    copy_folder(&folder, scratch.path());
    let path = scratch.path().join("projector_1.pt");
    let mut bytes = fs::read(&path).unwrap();
    let (from, to) = (b"torch._utils\n_rebuild_tensor_v2\n", b"torch._utils\n_rebuild_tensor_v3\n");
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to);
    fs::write(&path, bytes).unwrap();
    let error = Fuser::load(scratch.path(), &backend).err().unwrap();
    assert!(matches!(error, FuserError::Pickle { .. }), "{error}");
    let error = error.to_string();
    assert!(error.contains("projector_1.pt") && error.contains("_rebuild_tensor_v3"), "{error}");
}
