//! `serve-local` as its users meet it: a process, a port, HTTP.

// Each test binary uses its part.
#![allow(dead_code)]

use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// A running server, ended when dropped.
pub struct Server {
    pub child: Child,
    pub address: SocketAddr,
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The data of a stream of events: objects, of which the last was `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        let data: Vec<&str> = self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let (last, objects) = data.split_last().unwrap_or_else(|| panic!("no events: {}", self.body));
        assert_eq!(*last, "[DONE]", "{}", self.body);
        objects.iter().map(|text| serde_json::from_str(text).expect("an event is JSON")).collect()
    }
}

impl Server {
    /// On a free port, with the tiny random pair of the fixtures, its gates open; ready.
    pub fn tiny(args: &[&str]) -> Server {
        let pair = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/pair/");
        let (receiver, sharer) = (format!("{pair}receiver"), format!("{pair}sharer"));
        let models = ["--receiver", &receiver, "--sharer", &sharer, "--fuser", "init:3", "--gates", "open"];
        Server::start(&[&models, args].concat())
    }

    /// With the arguments that it is given; ready.
    pub fn start(args: &[&str]) -> Server {
        let server = Server::launch(args);
        let start = Instant::now();
        while server.get("/health").status != 200 {
            assert!(start.elapsed() < Duration::from_secs(60), "it does not become ready");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// As soon as it listens.
    pub fn launch(args: &[&str]) -> Server {
        let mut child = Command::new(env!("CARGO_BIN_EXE_serve-local"))
            .args(["--port", "0", "--threads", "2"])
            .args(args)
            .env("RUST_LOG", "warn")
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("it says where");
        let address = line.trim().strip_prefix("http://").and_then(|address| address.parse().ok());
        let address = address.unwrap_or_else(|| panic!("no address: `{line}`"));
        Server { child, address }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        stream
    }

    /// Sends bytes as they are and reads until the server closes.
    pub fn raw(&self, request: &[u8]) -> Answer {
        let mut stream = self.connect();
        stream.write_all(request).expect("it takes the request");
        read(stream)
    }

    pub fn get(&self, path: &str) -> Answer {
        self.raw(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())
    }

    pub fn post_bytes(&self, path: &str, body: &[u8]) -> Answer {
        self.raw(&post(path, body, ""))
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_bytes(path, body.to_string().as_bytes())
    }

    /// Asks and gets the object.
    pub fn ask(&self, path: &str, body: Value) -> Value {
        let answer = self.post(path, &body);
        assert_eq!(answer.status, 200, "{body}\n{}", answer.body);
        answer.json()
    }

    /// A number of `/metrics`.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no `{name}` in\n{text}"))
    }

    /// Waits until nothing runs and no block is held.
    pub fn idle(&self) {
        let start = Instant::now();
        let names = [
            "c2c:num_requests_running",
            "c2c:num_requests_waiting",
            "c2c:kv_cache_used_blocks{model=\"receiver\"}",
            "c2c:kv_cache_used_blocks{model=\"sharer\"}",
        ];
        let busy = || names.map(|name| self.metric(name));
        while busy() != [0.0; 4] {
            assert!(start.elapsed() < Duration::from_secs(30), "still busy: {:?}", busy());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Resident memory in bytes.
    pub fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().expect("a number");
        kib * 1024
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A request with `headers`, each ended by CR LF.
pub fn post(path: &str, body: &[u8], headers: &str) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n{headers}Content-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// Reads an answer to its end.
pub fn read(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or(bytes.len());
    let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no answer: `{head}`"));
    let body = bytes.get(end + 4..).unwrap_or_default();
    let body = if head.contains("transfer-encoding: chunked") { unchunked(body) } else { body.to_vec() };
    Answer { status, body: String::from_utf8(body).expect("an answer is UTF-8") }
}

fn unchunked(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = rest.windows(2).position(|two| two == b"\r\n") {
        let size = std::str::from_utf8(&rest[..end]).ok().and_then(|hex| usize::from_str_radix(hex, 16).ok());
        let Some(size) = size.filter(|&size| size > 0) else { break };
        let chunk = &rest[end + 2..];
        body.extend_from_slice(&chunk[..size.min(chunk.len())]);
        rest = chunk.get(size + 2..).unwrap_or_default();
    }
    body
}

pub fn chat(mode: &str, question: &str, more: Value) -> Value {
    let mut body = json!({
        "model": "receiver+sharer",
        "messages": [{ "role": "user", "content": question }],
        "c2c": { "mode": mode },
        "max_tokens": 12,
        "ignore_eos": true,
    });
    for (name, value) in more.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body
}

/// The text of the first choice.
pub fn text(answer: &Value) -> &str {
    let choice = &answer["choices"][0];
    choice["message"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_else(|| panic!("{answer}"))
}
