//! What nobody should send: each gets an error in OpenAI's shape, and the server goes on.

mod server;

use serde_json::{Value, json};
use server::{Server, chat, post, read, text};
use std::{
    io::{Read, Write},
    net::Shutdown,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Expects an error with this status that names `param`.
fn refused(server: &Server, path: &str, body: &[u8], status: u16, param: Option<&str>) {
    let answer = server.post_bytes(path, body);
    let sent = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
    assert_eq!(answer.status, status, "{path} {sent}\n{}", answer.body);
    let error = &answer.json()["error"];
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");
    assert!(error["type"].is_string() && error.get("code").is_some(), "{error}");
    assert_eq!(error["param"], param.map_or(Value::Null, Value::from), "{sent}: {error}");
}

#[test]
fn bad_requests_are_refused_by_name() {
    let server = Server::tiny(&["--max-body", "300000"]);
    const CHAT: &str = "/v1/chat/completions";
    const PLAIN: &str = "/v1/completions";
    for broken in [
        &b""[..],
        b"{",
        b"null",
        b"[]",
        b"\"text\"",
        b"{\"model\": \"receiver\", \"messages\": [\"\xff\xfe\"]}",
        b"\xc3\x28",
    ] {
        refused(&server, CHAT, broken, 400, None);
        refused(&server, "/tokenize", broken, 400, None);
    }
    let deep = "[".repeat(100_000);
    refused(&server, CHAT, format!("{{\"messages\": {deep}").as_bytes(), 400, None);
    let ask = |more: Value, status: u16, param: &str| {
        refused(&server, CHAT, chat("c2c", "Why?", more).to_string().as_bytes(), status, Some(param));
    };
    ask(json!({ "model": "gpt-9" }), 404, "model");
    ask(json!({ "model": 7 }), 400, "model");
    ask(json!({ "model": null }), 400, "model");
    ask(json!({ "messages": [] }), 400, "messages");
    ask(json!({ "messages": [{ "content": "no role" }] }), 400, "messages");
    ask(json!({ "messages": "Why?" }), 400, "messages");
    ask(json!({ "messages": [{ "role": "user", "content": "long ".repeat(5000) }] }), 400, "prompt");
    for (name, value) in [
        ("max_tokens", json!(1_000_000_000_000_u64)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(1.5)),
        ("max_completion_tokens", json!(1e300)),
        ("temperature", json!(-1)),
        ("temperature", json!(1e300)),
        ("temperature", json!("hot")),
        ("top_p", json!(0)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("n", json!(0)),
        ("n", json!(10_000)),
        ("seed", json!(1.5)),
        ("stop", json!("")),
        ("stop", json!(vec!["x"; 5000])),
        ("stop", json!(["x", 7])),
        ("stream", json!("yes")),
        ("top_logprobs", json!(3)),
        ("logprobs", json!(3)),
        ("c2c", json!("c2c")),
        ("cache_salt", json!(7)),
    ] {
        ask(json!({ name: value }), 400, name);
    }
    for (name, value) in [
        ("mode", json!("telepathy")),
        ("gates", json!("/etc/passwd")),
        ("gates", json!("99")),
        ("gates", json!([[1, 0]])),
        ("gates", json!([[1, 2], [0, 0], [0, 0], [0, 0]])),
        ("gates", json!({})),
        ("fraction", json!(7)),
        ("fraction", json!("middle:0.5")),
        ("alignment", json!("diagonal")),
        ("details", json!("all")),
    ] {
        ask(json!({ "c2c": { name: value } }), 400, &format!("c2c.{name}"));
    }
    ask(json!({ "model": "sharer", "c2c": { "mode": "c2c" } }), 400, "c2c.mode");
    let complete = |more: Value, param: &str| {
        let mut body = json!({ "model": "receiver", "prompt": "a", "max_tokens": 2 });
        more.as_object().expect("fields").iter().for_each(|(name, value)| body[name] = value.clone());
        refused(&server, PLAIN, body.to_string().as_bytes(), 400, Some(param));
    };
    complete(json!({ "prompt": [] }), "prompt");
    complete(json!({ "prompt": "" }), "prompt");
    complete(json!({ "prompt": ["a", ""] }), "prompt");
    complete(json!({ "prompt": [1, 4_000_000_000_u32] }), "prompt");
    complete(json!({ "prompt": [-1] }), "prompt");
    complete(json!({ "prompt": [1, "a"] }), "prompt");
    complete(json!({ "prompt": vec![1; 5000] }), "prompt");
    complete(json!({ "prompt": vec!["a"; 5000] }), "prompt");
    complete(json!({ "prompt": null }), "prompt");
    complete(json!({ "logprobs": 1000 }), "logprobs");
    complete(json!({ "max_tokens": 0 }), "max_tokens");
    complete(json!({ "model": "receiver+sharer", "prompt": [1, 2] }), "prompt");
    complete(json!({ "model": "receiver+sharer", "echo": true, "logprobs": 1 }), "echo");
    complete(json!({ "model": "receiver+sharer", "c2c": { "mode": "t2t" } }), "c2c.mode");
    refused(&server, "/detokenize", br#"{"tokens": [99999999]}"#, 400, Some("tokens"));
    refused(&server, "/detokenize", b"{}", 400, Some("tokens"));
    refused(&server, "/apply-template", b"{}", 400, Some("messages"));
    let large = format!("{{\"x\": \"{}\"}}", "x".repeat(400_000));
    refused(&server, CHAT, large.as_bytes(), 413, None);

    // What means nothing is ignored, and all of the above did no harm.
    let answer = server.ask(
        CHAT,
        chat("c2c", "Why?", json!({ "logit_bias": {}, "user": "me", "c2c": { "mode": "c2c", "x": 1 } })),
    );
    assert!(!text(&answer).is_empty());
    server.idle();
}

#[test]
fn broken_connections_do_no_harm() {
    let server = Server::tiny(&[]);
    let body = chat("c2c", "Why?", json!({ "max_tokens": 200 })).to_string();
    let whole = post("/v1/chat/completions", body.as_bytes(), "");
    for cut in [1, 20, whole.len() / 2, whole.len() - 1] {
        let mut stream = server.connect();
        stream.write_all(&whole[..cut]).expect("it takes what comes");
        drop(stream);
    }
    // Says that it sends nothing more, and waits for the answer, or does not.
    for wait in [true, false] {
        let mut stream = server.connect();
        stream.write_all(&whole).expect("it takes the request");
        stream.shutdown(Shutdown::Write).expect("half closed");
        if wait {
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
        }
    }
    let mut stream = server.connect();
    stream.write_all(b"\x16\x03\x01 this is not HTTP\r\n\r\n").expect("it takes what comes");
    assert_eq!(read(stream).status, 400);
    server.idle();
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn a_full_queue_and_slow_answers_are_told() {
    let server = Server::tiny(&["--queue", "2", "--batch", "1"]);
    let many = server.post("/v1/chat/completions", &chat("receiver", "Why?", json!({ "n": 3 })));
    assert_eq!((many.status, &many.json()["error"]["code"]), (429, &json!("queue_full")));
    drop(server);
    let hurried = Server::tiny(&["--request-timeout", "0.000001"]);
    let late = hurried.post("/v1/chat/completions", &chat("receiver", "Why?", json!({ "max_tokens": 400 })));
    assert_eq!((late.status, &late.json()["error"]["code"]), (504, &json!("timeout")));
    hurried.idle();
}

#[test]
fn other_machines_are_not_let_in_without_a_key() {
    let run =
        Command::new(env!("CARGO_BIN_EXE_serve-local")).args(["--host", "0.0.0.0", "--port", "0"]).output();
    let run = run.expect("the binary starts");
    assert!(!run.status.success());
    assert!(String::from_utf8_lossy(&run.stderr).contains("--api-key"), "{run:?}");
}

/// Sends a signal.
fn signal(server: &Server, name: &str) {
    let id = server.child.id().to_string();
    assert!(Command::new("kill").args([name, &id]).stderr(Stdio::null()).status().expect("kill").success());
}

#[test]
fn a_server_that_is_told_to_stop_finishes_first() {
    let mut server = Server::tiny(&[]);
    let body = chat("c2c", "Why is it so?", json!({ "max_tokens": 300, "stream": true })).to_string();
    let mut stream = server.connect();
    stream.write_all(&post("/v1/chat/completions", body.as_bytes(), "")).expect("it takes the request");
    // The answer has begun: it is no longer in the queue.
    let mut begun = Vec::new();
    let mut some = [0; 200];
    while String::from_utf8_lossy(&begun).matches("data: ").count() < 4 {
        let n = stream.read(&mut some).expect("an answer");
        assert!(n > 0, "it ended early");
        begun.extend_from_slice(&some[..n]);
    }
    signal(&server, "-TERM");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).expect("the whole answer");
    assert!(String::from_utf8_lossy(&rest).contains("data: [DONE]"));
    let start = Instant::now();
    let status = loop {
        if let Some(status) = server.child.try_wait().expect("a child") {
            break status;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
}
