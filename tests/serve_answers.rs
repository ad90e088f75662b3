//! What the server answers, endpoint by endpoint. The models are tiny random ones, so what counts is what must be equal.

#[path = "command/mod.rs"]
mod command;
mod server;

use serde_json::{Value, json};
use server::{Server, chat, text};

const QUESTION: &str = "Why is the sky blue, and what is the rain in the north?";
const MODES: [&str; 4] = ["receiver", "sharer", "t2t", "c2c"];

/// What `generate` answers.
fn generated(mode: &str) -> Value {
    let mut args = command::line("--receiver {r} --sharer {s} --json --ignore-eos --max-new-tokens 12", &[]);
    args.extend(["--mode".into(), mode.into(), "--prompt".into(), QUESTION.into()]);
    if mode == "c2c" {
        args.extend(command::line("--fuser init:3 --gates open", &[]));
    }
    let run = command::generate(&args);
    assert!(run.ok, "{}", run.stderr);
    serde_json::from_str(&run.stdout).expect("JSON")
}

#[test]
fn all_modes_answer_as_generate_does_whole_and_streamed() {
    let server = Server::tiny(&[]);
    for mode in MODES {
        let expected = generated(mode);
        let whole = server.ask("/v1/chat/completions", chat(mode, QUESTION, json!({})));
        assert_eq!(whole["object"], "chat.completion");
        assert_eq!(text(&whole), expected["text"], "{mode}");
        assert_eq!(whole["choices"][0]["finish_reason"], "length");
        let prompt =
            if mode == "sharer" { &expected["sharer_prompt_tokens"][0] } else { &expected["prompt_tokens"] };
        assert_eq!(whole["usage"]["prompt_tokens"], *prompt);
        assert_eq!(whole["usage"]["completion_tokens"], 12);
        let c2c = &whole["c2c"];
        assert_eq!(c2c["mode"], mode);
        for phase in [
            "tokenize",
            "align",
            "sharer_prefill",
            "receiver_prefill",
            "fuse",
            "first_token",
            "decode",
            "total",
        ] {
            assert!(c2c["timings_ms"][phase].as_f64().is_some_and(|ms| ms >= 0.0), "{phase}: {c2c}");
        }
        match mode {
            "t2t" => assert_eq!(c2c["sharer_text"], expected["background"]),
            "c2c" => {
                assert_eq!(c2c["gates"], json!([[true, true], [true, true], [true, true], [true, true]]));
                assert_eq!(c2c["aligned_tokens"], expected["fused_tokens"]);
                assert!(c2c["bytes_communicated"].as_u64().is_some_and(|bytes| bytes > 0));
                assert!(c2c["mean_weights"].is_null());
            }
            _ => assert!(c2c["gates"].is_null()),
        }

        let options = json!({ "stream": true, "stream_options": { "include_usage": true } });
        let events = server.post("/v1/chat/completions", &chat(mode, QUESTION, options)).events();
        let streamed: String =
            events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(streamed, text(&whole), "{mode}");
        assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
        assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk"));
        let (last, before) = events.split_last().expect("events");
        assert_eq!(last["choices"], json!([]));
        assert_eq!(last["usage"]["completion_tokens"], 12);
        assert_eq!(last["c2c"]["mode"], mode);
        assert_eq!(before[before.len() - 1]["choices"][0]["finish_reason"], "length");
    }
    server.idle();
}

#[test]
fn details_tell_of_alignment_and_weights() {
    let server = Server::tiny(&[]);
    let ask = |more: Value| {
        let mut c2c = json!({ "mode": "c2c" });
        for (name, value) in more.as_object().expect("fields") {
            c2c[name] = value.clone();
        }
        server.ask("/v1/chat/completions", chat("c2c", QUESTION, json!({ "c2c": c2c })))
    };
    let detailed = ask(json!({ "details": true }));
    let plain = ask(json!({}));
    assert_eq!(text(&detailed), text(&plain));
    let alignment = &detailed["c2c"]["alignment"];
    let list = |name: &str| alignment[name].as_array().expect("a list").clone();
    assert_eq!(list("columns").len(), list("receiver_tokens").len());
    let aligned = list("columns").iter().filter(|column| !column.is_null()).count() as u64;
    assert_eq!(detailed["c2c"]["aligned_tokens"].as_u64(), Some(aligned));
    assert_eq!(detailed["c2c"]["mean_weights"].as_array().map(Vec::len), Some(4));
    // Without the fuser's part it is the receiver alone; half of it is in between.
    let alone = text(&server.ask("/v1/chat/completions", chat("receiver", QUESTION, json!({})))).to_string();
    let closed = ask(json!({ "gates": "closed" }));
    assert_eq!(text(&closed), alone);
    assert_eq!(closed["c2c"]["bytes_communicated"], 0);
    assert_eq!(
        ask(json!({ "gates": "0,2k" }))["c2c"]["gates"],
        json!([[true, true], [false, false], [true, false], [false, false]])
    );
    let half = ask(json!({ "fraction": 0.5 }))["c2c"]["aligned_tokens"].as_u64();
    assert!(half.is_some_and(|half| half > 0 && half < aligned));
    assert_eq!(ask(json!({ "fraction": "back:0" }))["c2c"]["aligned_tokens"], 0);
    ask(json!({ "alignment": "longest" }));
}

#[test]
fn completions_continue_echo_and_score() {
    let server = Server::tiny(&[]);
    let ask = |body: Value| server.ask("/v1/completions", body);
    let prompt = "the rain in the north";
    let one = ask(json!({ "model": "receiver", "prompt": prompt, "max_tokens": 5, "ignore_eos": true }));
    assert_eq!(one["object"], "text_completion");
    let ids = server.ask("/tokenize", json!({ "content": prompt }))["tokens"].clone();
    let by_ids = ask(json!({ "model": "receiver", "prompt": ids, "max_tokens": 5, "ignore_eos": true }));
    assert_eq!(text(&one), text(&by_ids));
    // As lm-eval asks.
    let scored = ask(json!({
        "model": "receiver", "prompt": [ids, ids], "max_tokens": 1, "temperature": 0, "logprobs": 1, "seed": 1234, "echo": true,
    }));
    let n = ids.as_array().expect("ids").len();
    assert_eq!(scored["choices"].as_array().map(Vec::len), Some(2));
    for choice in scored["choices"].as_array().expect("choices") {
        let lists = &choice["logprobs"];
        for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(lists[name].as_array().map(Vec::len), Some(n + 1), "{name}");
        }
        assert!(lists["token_logprobs"][0].is_null());
        for token in 1..=n {
            let logprob = lists["token_logprobs"][token].as_f64().expect("a number");
            let best = lists["top_logprobs"][token].as_object().expect("a map").values().next();
            assert!(logprob <= 0.0 && best.and_then(Value::as_f64).is_some_and(|best| best >= logprob));
        }
        assert!(choice["text"].as_str().is_some_and(|text| text.starts_with(prompt)));
    }
    let only_scored =
        ask(json!({ "model": "sharer", "prompt": prompt, "max_tokens": 0, "logprobs": 0, "echo": true }));
    assert_eq!(text(&only_scored), prompt);
    assert_eq!(only_scored["usage"]["completion_tokens"], 0);
    let several = ask(
        json!({ "model": "receiver", "prompt": ["a b", "c"], "n": 2, "max_tokens": 3, "temperature": 1, "seed": 5 }),
    );
    let indices: Vec<&Value> =
        several["choices"].as_array().expect("choices").iter().map(|c| &c["index"]).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    let fused = json!({ "model": "receiver+sharer", "prompt": prompt, "max_tokens": 5, "ignore_eos": true });
    let fused = ask(fused);
    assert_eq!(fused["c2c"]["mode"], "c2c");
    let streamed = json!({ "model": "receiver", "prompt": prompt, "max_tokens": 5, "ignore_eos": true, "stream": true, "echo": true, "logprobs": 1 });
    let events = server.post("/v1/completions", &streamed).events();
    let whole: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(whole, format!("{prompt}{}", text(&one)));
    assert!(events[0]["choices"][0]["logprobs"]["token_logprobs"][0].is_null());
}

#[test]
fn sampling_is_as_asked() {
    let server = Server::tiny(&[]);
    let ask = |more: Value| server.ask("/v1/chat/completions", chat("c2c", QUESTION, more));
    let drawn = |seed: u64| text(&ask(json!({ "temperature": 1.5, "seed": seed }))).to_string();
    assert_eq!(drawn(7), drawn(7));
    assert_ne!(drawn(7), drawn(8));
    let several = ask(json!({ "temperature": 1.5, "seed": 7, "n": 3 }));
    let texts: Vec<&Value> =
        several["choices"].as_array().expect("choices").iter().map(|c| &c["message"]["content"]).collect();
    assert!(texts.len() == 3 && texts[0] != texts[1]);
    assert_eq!(texts[0], &drawn(7));
    let scored = ask(json!({ "logprobs": true, "top_logprobs": 3 }));
    let content = scored["choices"][0]["logprobs"]["content"].as_array().expect("a list").clone();
    assert_eq!((content.len(), content[0]["top_logprobs"].as_array().map(Vec::len)), (12, Some(3)));
    assert_eq!(content[0]["logprob"], content[0]["top_logprobs"][0]["logprob"]);
    // Ends before a piece of its own text.
    let whole = text(&ask(json!({}))).to_string();
    let stop: String = whole.chars().skip(3).take(2).collect();
    let cut = ask(json!({ "stop": stop }));
    assert_eq!(text(&cut), &whole[..whole.find(&stop).expect("it is there")]);
    assert_eq!(cut["choices"][0]["finish_reason"], "stop");
}

#[test]
fn the_rest_of_the_endpoints() {
    let server = Server::tiny(&[]);
    let ids: Vec<Value> = server.get("/v1/models").json()["data"]
        .as_array()
        .expect("models")
        .iter()
        .map(|m| m["id"].clone())
        .collect();
    assert_eq!(ids, ["receiver", "sharer", "receiver+sharer"]);
    assert_eq!(server.get("/v1/models/sharer").json()["id"], "sharer");
    assert_eq!(server.get("/v1/models/none").status, 404);
    for model in ["receiver", "sharer"] {
        let text = "Rain, 北京!";
        let tokens =
            server.ask("/tokenize", json!({ "model": model, "content": text, "add_special": false }));
        assert_eq!(tokens["count"].as_u64(), tokens["tokens"].as_array().map(|tokens| tokens.len() as u64));
        let back = server.ask("/detokenize", json!({ "model": model, "tokens": tokens["tokens"] }));
        assert_eq!(back["content"], text);
        let messages = json!([{ "role": "user", "content": "Rain?" }]);
        let template = server.ask("/apply-template", json!({ "model": model, "messages": messages }));
        assert!(template["prompt"].as_str().is_some_and(|prompt| prompt.contains("Rain?")));
    }
    let document = server.get("/openapi.json").json();
    for (path, methods) in document["paths"].as_object().expect("paths") {
        let path = path.replace("{id}", "receiver");
        let answer = match methods.get("get") {
            Some(_) => server.get(&path),
            None => server.post_bytes(&path, b"{}"),
        };
        assert!([200, 400].contains(&answer.status), "{path}: {}", answer.body);
    }
    assert!(server.get("/").body.contains("<html"));
    assert_eq!(server.get("/nowhere").json()["error"]["type"], "not_found_error");
    assert_eq!(server.get("/v1/completions").status, 405);
}

#[test]
fn a_key_is_asked_for_where_there_is_one() {
    let server = Server::tiny(&["--api-key", "secret"]);
    let body = chat("receiver", QUESTION, json!({})).to_string();
    let with = |headers: &str| server.raw(&server::post("/v1/chat/completions", body.as_bytes(), headers));
    assert_eq!(with("Authorization: Bearer secret\r\n").status, 200);
    for headers in ["", "Authorization: Bearer wrong\r\n", "Authorization: secret\r\n"] {
        let answer = with(headers);
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (401, &json!("invalid_api_key")));
    }
    assert_eq!(server.get("/v1/models").status, 401);
    assert_eq!(server.get("/").status, 200);
}
