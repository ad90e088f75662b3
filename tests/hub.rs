//! `hf:` paths against a hub of the test's own, on loopback: what is fetched, what is found again, what goes on after a broken
//! transfer, and what is said when something is wrong.

use c2c::hub::{Error, Hub, Reference};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex},
    thread,
};
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

#[derive(Clone, Default)]
struct Served {
    files: BTreeMap<&'static str, Vec<u8>>,
    /// Weights are cut off after so many bytes, as many times.
    cut: usize,
    cuts: usize,
    /// Status of everything.
    status: Option<u16>,
    /// Whether what arrives has the digest that the hub told.
    damaged: bool,
    ignore_ranges: bool,
    token: Option<&'static str>,
}

/// A hub with one repository, `org/pair`.
struct MockHub {
    endpoint: String,
    served: Arc<Mutex<Served>>,
    /// `GET path range` of each request that asked for more than a byte.
    asked: Arc<Mutex<Vec<String>>>,
}

impl MockHub {
    fn new(served: Served) -> MockHub {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let (served, asked) = (Arc::new(Mutex::new(served)), Arc::new(Mutex::new(Vec::new())));
        let hub = MockHub { endpoint, served: served.clone(), asked: asked.clone() };
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (served, asked) = (served.clone(), asked.clone());
                thread::spawn(move || answer(&stream, &served, &asked));
            }
        });
        hub
    }

    fn client(&self, cache: &TempDir) -> Hub {
        Hub {
            endpoint: self.endpoint.clone(),
            cache: cache.path().join("hub"),
            token: None,
            offline: false,
            bars: false,
        }
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().expect("no panic"))
    }
}

fn answer(stream: &TcpStream, served: &Mutex<Served>, asked: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let header = |name: &str| {
        let of = |line: &String| {
            Some(line.split_once(": ").filter(|(n, _)| n.eq_ignore_ascii_case(name))?.1.to_string())
        };
        headers.iter().find_map(of)
    };
    let path = first.split(' ').nth(1).unwrap_or_default().to_string();
    let mut state = served.lock().expect("no panic");
    let range = header("range").and_then(|range| Some(range.strip_prefix("bytes=")?.to_string()));
    if range.as_deref() != Some("0-0") {
        asked.lock().expect("no panic").push(format!("{path} {}", range.as_deref().unwrap_or("all")));
    }
    let mut out = stream;
    let mut reply = |status: u16, headers: &str, length: usize, body: &[u8]| {
        let head =
            format!("HTTP/1.1 {status} .\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n");
        let _ = out.write_all(head.as_bytes()).and_then(|()| out.write_all(body));
        let _ = stream.shutdown(Shutdown::Write);
    };
    if state.token.is_some_and(|token| header("authorization") != Some(format!("Bearer {token}"))) {
        return reply(401, "", 0, b"");
    }
    if let Some(status) = state.status {
        return reply(status, "", 0, b"");
    }
    if path == "/api/models/org/pair/revision/main" {
        let siblings: Vec<_> =
            state.files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        let info = serde_json::json!({ "siblings": siblings, "sha": COMMIT }).to_string();
        return reply(200, "", info.len(), info.as_bytes());
    }
    let name = path.strip_prefix(&format!("/org/pair/resolve/{COMMIT}/"));
    let Some(file) = name.and_then(|name| state.files.get(name)).cloned() else {
        return reply(404, "", 0, b"");
    };
    let etag: String =
        match name.is_some_and(|name| name.ends_with(".safetensors") || name.ends_with(".gguf")) {
            true => Sha256::digest(&file).iter().map(|byte| format!("{byte:02x}")).collect(),
            false => format!("{:040x}", file.len()),
        };
    let mut bytes = file.clone();
    if state.damaged {
        bytes.iter_mut().for_each(|byte| *byte ^= 1);
    }
    let size = bytes.len();
    let (start, end) = match range.as_deref().and_then(|range| range.split_once('-')) {
        Some((start, end)) if !state.ignore_ranges || end == "0" => {
            let number = |text: &str| text.parse::<usize>().ok();
            (number(start).unwrap_or(0), number(end).map_or(size, |end| end + 1).min(size))
        }
        _ => (0, size),
    };
    if start >= size {
        return reply(416, "", 0, b"");
    }
    let body = &bytes[start..end];
    let told = format!(
        "ETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {start}-{}/{size}\r\n",
        end - 1
    );
    let sent = match state.cuts {
        cuts if cuts > 0 && body.len() > state.cut => {
            state.cuts = cuts - 1;
            &body[..state.cut]
        }
        _ => body,
    };
    reply(206, &told, body.len(), sent);
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * i % 251) as u8).collect()
}

fn model() -> Served {
    let files = [
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{ }".to_vec()),
        ("README.md", b"not needed".to_vec()),
        ("onnx/model.onnx", bytes(10)),
        ("pytorch_model.bin", bytes(10)),
        ("model.safetensors", bytes(100_000)),
    ];
    Served { files: files.into(), ..Served::default() }
}

fn fetch(hub: &Hub, text: &str) -> Result<std::path::PathBuf, Error> {
    hub.fetch(&text.parse::<Reference>().expect("a reference"))
}

fn named(path: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(path)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn a_model_is_fetched_once_and_found_again_without_the_hub() {
    let (hub, cache) = (MockHub::new(model()), tempfile::tempdir().expect("a folder"));
    let client = hub.client(&cache);
    let place = fetch(&client, "hf:org/pair").expect("it is fetched");
    assert_eq!(named(&place), ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(fs::read(place.join("model.safetensors")).expect("it reads"), bytes(100_000));
    let asked = hub.asked();
    assert!(
        asked.last().is_some_and(|last| last.contains("model.safetensors")),
        "weights come last: {asked:?}"
    );
    assert_eq!(fetch(&client, "hf:org/pair").expect("it is found"), place);
    assert_eq!(fetch(&Hub { offline: true, ..client.clone() }, "hf:org/pair").expect("it is found"), place);
    assert!(hub.asked().is_empty(), "the hub was asked again");
    // Another program may have left a snapshot without weights.
    fs::remove_file(place.join("model.safetensors")).expect("removed");
    fetch(&client, "hf:org/pair").expect("what is missing is fetched");
    assert_eq!(hub.asked().iter().filter(|asked| asked.contains("resolve")).count(), 1);
}

#[test]
fn shards_files_and_fusers() {
    let index = br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;
    let files = [
        ("config.json", b"{}".to_vec()),
        ("model.safetensors.index.json", index.to_vec()),
        ("model-1.safetensors", bytes(300)),
        ("model-2.safetensors", bytes(200)),
        ("other.safetensors", bytes(100)),
        ("quantised/q4.gguf", bytes(500)),
        ("pair/projector_0.pt", bytes(50)),
        ("pair/projector_0.json", b"{}".to_vec()),
        ("pair/projector_config.json", b"{}".to_vec()),
    ];
    let hub = MockHub::new(Served { files: files.into(), ..Served::default() });
    let cache = tempfile::tempdir().expect("a folder");
    let client = hub.client(&cache);
    let place = fetch(&client, "hf:org/pair").expect("shards are fetched");
    let expected =
        ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"];
    assert_eq!(named(&place), expected);
    let gguf = fetch(&client, "hf:org/pair/quantised/q4.gguf").expect("a file is fetched");
    assert_eq!(fs::read(gguf).expect("it reads"), bytes(500));
    let fuser = fetch(&client, "hf:org/pair/pair").expect("a fuser is fetched");
    assert_eq!(named(&fuser), ["projector_0.json", "projector_0.pt", "projector_config.json"]);
    let asked = hub.asked();
    for text in ["hf:org/pair", "hf:org/pair/quantised/q4.gguf", "hf:org/pair/pair"] {
        fetch(&client, text).expect("it is found");
    }
    assert!(hub.asked().is_empty() && asked.iter().all(|asked| !asked.contains("other")));
    let error = fetch(&client, "hf:org/pair/q8.gguf").expect_err("there is no such file").to_string();
    assert!(error.contains("q8.gguf") && error.contains("quantised/q4.gguf"), "{error}");
}

#[test]
fn a_list_of_shards_cannot_lead_out_of_the_cache() {
    let index = br#"{"weight_map": {"a": "../../../../escaped.safetensors"}}"#;
    let files = [
        ("config.json", b"{}".to_vec()),
        ("model.safetensors.index.json", index.to_vec()),
        ("../../../../escaped.safetensors", bytes(30)),
    ];
    let hub = MockHub::new(Served { files: files.into(), ..Served::default() });
    let cache = tempfile::tempdir().expect("a folder");
    let error = fetch(&hub.client(&cache), "hf:org/pair").expect_err("it is refused");
    assert!(matches!(error, Error::Index { .. }), "{error}");
    assert!(!cache.path().join("escaped.safetensors").exists());
}

#[test]
fn a_broken_transfer_goes_on_where_it_stopped() {
    let (hub, cache) =
        (MockHub::new(Served { cut: 40_000, cuts: 1, ..model() }), tempfile::tempdir().expect("a folder"));
    let place = fetch(&hub.client(&cache), "hf:org/pair").expect("it is taken up again");
    assert_eq!(fs::read(place.join("model.safetensors")).expect("it reads"), bytes(100_000));
    let asked: Vec<_> = hub.asked().into_iter().filter(|asked| asked.contains("model.safetensors")).collect();
    assert!(asked.len() == 2 && asked[0].ends_with(" 0-") && asked[1].ends_with(" 40000-"), "{asked:?}");
}

#[test]
fn a_transfer_that_keeps_breaking_is_kept_for_the_next_run() {
    let (hub, cache) =
        (MockHub::new(Served { cut: 20_000, cuts: 3, ..model() }), tempfile::tempdir().expect("a folder"));
    let error = fetch(&hub.client(&cache), "hf:org/pair").expect_err("it breaks three times");
    assert!(matches!(error, Error::Transfer { .. }), "{error}");
    assert!(error.to_string().contains("goes on where it stopped"), "{error}");
    hub.asked();
    let place = fetch(&hub.client(&cache), "hf:org/pair").expect("the next run");
    assert_eq!(fs::read(place.join("model.safetensors")).expect("it reads"), bytes(100_000));
    let asked = hub.asked();
    assert!(asked.iter().any(|asked| asked.ends_with("model.safetensors 60000-")), "{asked:?}");
}

#[test]
fn a_part_that_is_complete_is_fetched_anew() {
    let (hub, cache) = (MockHub::new(model()), tempfile::tempdir().expect("a folder"));
    let client = hub.client(&cache);
    let place = fetch(&client, "hf:org/pair").expect("it is fetched").join("model.safetensors");
    let blob = place.canonicalize().expect("a blob");
    fs::remove_file(&place).expect("removed");
    fs::rename(&blob, blob.with_extension("part")).expect("renamed");
    fetch(&client, "hf:org/pair").expect("it is fetched again");
    assert_eq!(fs::read(place).expect("it reads"), bytes(100_000));
}

#[test]
fn what_arrives_damaged_is_not_kept() {
    let cache = tempfile::tempdir().expect("a folder");
    for served in
        [Served { damaged: true, ..model() }, Served { cut: 40_000, cuts: 1, ignore_ranges: true, ..model() }]
    {
        let hub = MockHub::new(served);
        let error = fetch(&hub.client(&cache), "hf:org/pair").expect_err("it is damaged");
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
        *hub.served.lock().expect("no panic") = model();
        let place = fetch(&hub.client(&cache), "hf:org/pair").expect("it is fetched again");
        assert_eq!(fs::read(place.join("model.safetensors")).expect("it reads"), bytes(100_000));
        fs::remove_dir_all(cache.path().join("hub")).expect("removed");
    }
}

#[test]
fn errors_say_what_to_do() {
    let cache = tempfile::tempdir().expect("a folder");
    let said = |served: Served| {
        let hub = MockHub::new(served);
        fetch(&hub.client(&cache), "hf:org/pair").expect_err("something is wrong").to_string()
    };
    let error = said(Served { status: Some(404), ..model() });
    assert!(error.contains("hf:org/pair") && error.contains("check the name"), "{error}");
    let error = said(Served { status: Some(503), ..model() });
    assert!(error.contains("503") && error.contains("try again later"), "{error}");
    let error = said(Served { token: Some("secret"), ..model() });
    assert!(error.contains("set HF_TOKEN") && !error.contains("secret"), "{error}");
    let files = [("config.json", b"{}".to_vec()), ("pytorch_model.bin", bytes(9)), ("q4.gguf", bytes(9))];
    let error = said(Served { files: files.into(), ..Served::default() });
    assert!(error.contains("no weights") && error.contains("q4.gguf"), "{error}");

    let private = MockHub::new(Served { token: Some("secret"), ..model() });
    let client = private.client(&cache);
    let token = |token: &str| Hub { token: Some(token.into()), ..client.clone() };
    let error = fetch(&token("wrong"), "hf:org/pair").expect_err("it is refused").to_string();
    assert!(error.contains("another HF_TOKEN"), "{error}");
    fetch(&token("secret"), "hf:org/pair").expect("the token opens it");

    let file = cache.path().join("file");
    fs::write(&file, "").expect("written");
    let blocked = Hub { cache: file.clone(), ..token("secret") };
    let error = fetch(&blocked, "hf:org/pair").expect_err("there is no folder");
    assert!(matches!(&error, Error::Cache { path, .. } if *path == file), "{error}");

    let nobody = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let gone = Hub { endpoint: format!("http://{nobody}"), ..client };
    let error = fetch(&gone, "hf:org/other").expect_err("nobody is there");
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("local folder"), "{error}");
    let error = fetch(&Hub { offline: true, ..gone }, "hf:org/other").expect_err("it is not there");
    assert!(
        matches!(error, Error::Offline { .. }) && error.to_string().contains("HF_HUB_OFFLINE"),
        "{error}"
    );
}
