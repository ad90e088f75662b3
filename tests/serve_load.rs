//! Many clients, some of which vanish or hardly read: everybody gets the answer due, and nothing stays behind.

mod server;

use serde_json::json;
use server::{Server, chat, post, read, text};
use std::{
    io::{Read, Write},
    thread,
    time::Duration,
};

const STREAMS: usize = 64;
const MODES: [&str; 4] = ["c2c", "receiver", "sharer", "t2t"];

fn question(client: usize) -> String {
    format!("Why is the answer {} and not the rain in the north?", client % 8)
}

/// 64 streams at once. Every fourth client vanishes in the middle, every fourth reads a byte now and then.
fn storm(server: &Server) -> Vec<Option<String>> {
    thread::scope(|scope| {
        let clients: Vec<_> = (0..STREAMS)
            .map(|client| {
                scope.spawn(move || {
                    let more = json!({ "stream": true, "max_tokens": 40 });
                    let body = chat(MODES[client / 4 % 4], &question(client), more).to_string();
                    let mut stream = server.connect();
                    stream
                        .write_all(&post("/v1/chat/completions", body.as_bytes(), ""))
                        .expect("it is taken");
                    match client % 4 {
                        1 => {
                            let mut some = [0; 700];
                            let _ = stream.read_exact(&mut some[..100 + 10 * client % 600]);
                            None
                        }
                        2 => {
                            let mut first = [0; 1];
                            for _ in 0..20 {
                                stream.read_exact(&mut first).expect("it goes on");
                                thread::sleep(Duration::from_millis(20));
                            }
                            let mut rest = String::new();
                            stream.read_to_string(&mut rest).expect("the rest");
                            assert!(rest.contains("[DONE]"));
                            None
                        }
                        _ => {
                            let answer = read(stream);
                            assert_eq!(answer.status, 200, "{}", answer.body);
                            let events = answer.events();
                            let texts =
                                events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str());
                            Some(texts.collect())
                        }
                    }
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().expect("a client")).collect()
    })
}

#[test]
fn nothing_stays_behind_after_a_storm() {
    // Fewer blocks than all of them would need at once.
    let server = Server::tiny(&["--kv-blocks", "400"]);
    let alone: Vec<String> = (0..STREAMS)
        .map(|client| {
            if client % 4 == 1 || client % 4 == 2 {
                return String::new();
            }
            let body = chat(MODES[client / 4 % 4], &question(client), json!({ "max_tokens": 40 }));
            text(&server.ask("/v1/chat/completions", body)).to_string()
        })
        .collect();
    let mut memory = Vec::new();
    for _ in 0..3 {
        for (found, alone) in storm(&server).iter().zip(&alone) {
            if let Some(found) = found {
                assert_eq!(found, alone);
            }
        }
        server.idle();
        memory.push(server.memory());
    }
    // The first storm makes all that is kept: stacks, batches of every size.
    assert!(memory[2] < memory[0] + memory[0] / 4 + (16 << 20), "memory grows: {memory:?}");
    assert!(server.metric("c2c:decode_batch_size_sum") > server.metric("c2c:decode_batch_size_count"));
}
