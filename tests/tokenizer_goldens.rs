//! Real tokenizers against ids and texts made by transformers.
//!
//! Goldens: `<shared>/goldens/align` (or `C2C_GOLDENS`). Tokenizers: the folders of `C2C_TOKENIZERS`, named as in the
//! goldens, else those of `<shared>/tokenizers`, where two differ from the goldens' own: `llama3` is Llama 3, not 3.2,
//! and `qwen2.5` is a bare tokenizer.json with its template in `meta.json`.

mod goldens;

use std::collections::BTreeMap;

use c2c::tokenizer::{Message, TemplateOptions, Tokenizer};
use serde_json::Value;

const OWN_FILES: &str = "set C2C_TOKENIZERS to the goldens' own files";

struct Found {
    tokenizer: Tokenizer,
    /// The very files the goldens were made with.
    exact: bool,
}

/// The tokenizer that the goldens call `name`.
fn tokenizer(name: &str) -> Option<Found> {
    let (dir, exact) = goldens::tokenizer(name)?;
    let mut tokenizer = Tokenizer::from_folder(&dir).unwrap();
    if let Ok(meta) = std::fs::read(dir.join("meta.json")) {
        let meta: Value = serde_json::from_slice(&meta).unwrap();
        tokenizer = tokenizer.with_chat_template(meta["chat_template"].as_str().unwrap()).unwrap();
    }
    Some(Found { tokenizer, exact })
}

/// Cases by tokenizer.
fn by_tokenizer(cases: &Value) -> BTreeMap<&str, Vec<&Value>> {
    let mut groups: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for case in cases.as_array().unwrap() {
        groups.entry(case["tokenizer"].as_str().unwrap()).or_default().push(case);
    }
    groups
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn token_ids() {
    let Some(cases) = goldens::json("align/tokenize.json") else { return };
    for (name, cases) in by_tokenizer(&cases) {
        let Some(Found { tokenizer, exact }) = tokenizer(name) else { continue };
        if !exact {
            goldens::skipped(format_args!("{name}: ids with special tokens; {OWN_FILES}"));
        }
        for case in cases {
            let text = case["text"].as_str().unwrap();
            let encoding = tokenizer.encode(text, false).unwrap();
            assert_eq!(encoding.ids, ids(&case["ids"]), "{name}: {text:?}");
            assert_eq!(encoding.offsets.len(), encoding.ids.len());
            for &(start, end) in &encoding.offsets {
                assert!(
                    text.get(start..end).is_some(),
                    "{name}: {text:?}: {start}..{end} is not a range of it"
                );
            }
            if exact {
                let with_special = tokenizer.encode(text, true).unwrap().ids;
                let expected = ids(&case["ids_with_special"]);
                assert_eq!(with_special[..expected.len()], expected, "{name}: {text:?}");
            }
        }
    }
}

#[test]
fn chat_templates() {
    let Some(cases) = goldens::json("align/chat_templates.json") else { return };
    for (name, cases) in by_tokenizer(&cases) {
        let Some(Found { tokenizer, exact }) = tokenizer(name) else { continue };
        if name == "llama3_2" && !exact {
            goldens::skipped(format_args!("{name}: the template of Llama 3.2; {OWN_FILES}"));
            continue;
        }
        for case in cases {
            let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
            let mut options = TemplateOptions {
                add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
                enable_thinking: case["enable_thinking"].as_bool(),
                ..Default::default()
            };
            // The day on which the goldens were made, which the template prints.
            options.extra.insert("date_string".into(), "24 Nov 2026".into());
            let text = tokenizer.render(&messages, &options).unwrap();
            assert_eq!(text, case["text"].as_str().unwrap(), "{name}: {}", case["conv"]);
        }
    }
}

#[test]
fn special_tokens() {
    let Some(golden) = goldens::json("align/align_tokens.json") else { return };
    for (name, expected) in golden["tokenizers"].as_object().unwrap() {
        let Some(Found { tokenizer, exact: true }) = tokenizer(name) else {
            goldens::skipped(format_args!("{name}: special tokens; {OWN_FILES}"));
            continue;
        };
        let id = |field: &str| expected[field].as_u64().map(|id| id as u32);
        let special = tokenizer.special();
        assert_eq!(special.bos, id("bos"), "{name}");
        assert_eq!(special.eos_token, id("eos"), "{name}");
        assert_eq!(special.pad, id("pad_before_aligner"), "{name}");
        assert_eq!(special.unk, id("unk"), "{name}");
        assert!(special.eos.contains(&special.eos_token.unwrap()));
        assert_eq!(tokenizer.vocab_size() as u64, expected["len"].as_u64().unwrap(), "{name}");
        let mut all = tokenizer.special_ids().to_vec();
        all.sort_unstable();
        assert_eq!(all, ids(&expected["all_special_ids"]), "{name}");
    }
}

/// Decoding gives the text back, at once and token by token, and no piece has half a character.
#[test]
fn round_trips() {
    let Some(cases) = goldens::json("align/tokenize.json") else { return };
    for (name, cases) in by_tokenizer(&cases) {
        let Some(Found { tokenizer, .. }) = tokenizer(name) else { continue };
        for text in cases.iter().map(|case| case["text"].as_str().unwrap()) {
            let ids = tokenizer.encode(text, false).unwrap().ids;
            assert_eq!(tokenizer.decode(&ids, false), text, "{name}");
            let mut detokenizer = tokenizer.detokenizer().keep_special();
            let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
            pieces.push(detokenizer.finish());
            assert!(
                pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)),
                "{name}: {pieces:?}"
            );
            assert_eq!(pieces.concat(), text, "{name}");
        }
    }
}
