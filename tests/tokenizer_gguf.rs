//! Vocabularies inside GGUF files against llama.cpp and against the models' tokenizer.json.
//!
//! `C2C_MODELS` is a folder with the GGUF files that `fixtures/llama_cpp_ids.json` names; what is not there is skipped.

mod goldens;

use c2c::{
    model::Gguf,
    tokenizer::{GgufVocab, Message, TemplateOptions, Tokenizer},
};
use serde_json::Value;

fn fixture() -> Value {
    serde_json::from_str(include_str!("fixtures/llama_cpp_ids.json")).unwrap()
}

fn texts() -> Vec<String> {
    serde_json::from_value(fixture()["texts"].clone()).unwrap()
}

/// The tokenizer inside a GGUF file.
fn from_gguf(file: &str) -> Option<Tokenizer> {
    let vocab = Gguf::open(&goldens::model(file)?).unwrap().vocab().unwrap();
    Some(Tokenizer::from_gguf(&vocab).unwrap())
}

fn from_shared(name: &str) -> Option<Tokenizer> {
    Some(Tokenizer::from_folder(&goldens::shared(&format!("tokenizers/{name}"))?).unwrap())
}

/// Texts that Qwen's composing normalisation changes; llama.cpp leaves that step out.
fn composes(text: &str) -> bool {
    text.chars().any(|char| ('\u{300}'..='\u{36F}').contains(&char) || "ΩK".contains(char))
}

#[test]
fn same_ids_as_llama_cpp() {
    for (file, expected) in fixture()["ids"].as_object().unwrap() {
        let Some(tokenizer) = from_gguf(file) else { continue };
        for (text, expected) in texts().iter().zip(expected.as_array().unwrap()) {
            if file.starts_with("qwen") && composes(text) {
                continue;
            }
            let expected: Vec<u32> = serde_json::from_value(expected.clone()).unwrap();
            assert_eq!(tokenizer.encode(text, false).unwrap().ids, expected, "{file}: {text:?}");
        }
    }
}

#[test]
fn same_ids_as_tokenizer_json() {
    for (file, name) in [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2"),
        ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "qwen2.5"),
        ("gemma-3-270m-q4_k_m.gguf", "gemma3"),
    ] {
        let (Some(gguf), Some(json)) = (from_gguf(file), from_shared(name)) else { continue };
        assert_eq!(gguf.vocab_size(), json.vocab_size() - usize::from(name == "gemma3"), "{file}");
        // Conversion to GGUF writes Gemma's tokens of several spaces as spaces, so a text that spells them with U+2581
        // itself is the one thing that cannot come out equal.
        for text in texts().into_iter().filter(|text| !text.contains("▁▁")) {
            let ours = gguf.encode(&text, false).unwrap();
            let theirs = json.encode(&text, false).unwrap();
            assert_eq!(ours, theirs, "{file}: {text:?}");
            assert_eq!(gguf.decode(&ours.ids, false), json.decode(&theirs.ids, false), "{file}: {text:?}");
        }
    }
}

/// One tokenizer has one fingerprint, wherever it was read from.
#[test]
fn same_fingerprint_as_tokenizer_json() {
    for (file, name) in [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2"),
        ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "qwen2.5"),
        ("gemma-3-270m-q4_k_m.gguf", "gemma3"),
    ] {
        let (Some(gguf), Some(json)) = (from_gguf(file), from_shared(name)) else { continue };
        let rows = gguf.vocab_size();
        assert_eq!(gguf.fingerprint(rows), json.fingerprint(rows), "{file}");
    }
}

#[test]
fn special_tokens_and_templates() {
    let gemma = from_gguf("gemma-3-270m-q4_k_m.gguf");
    if let Some(gemma) = gemma {
        assert_eq!(gemma.encode("a", true).unwrap().ids[0], 2);
        assert_eq!(gemma.special().eos, [1, 106]);
        assert!(gemma.chat_template().is_none());
        let error = gemma.render(&[], &TemplateOptions::default()).unwrap_err();
        assert!(error.to_string().contains("gemma-3-270m-q4_k_m.gguf"), "{error}");
    }
    if let Some(smollm) = from_gguf("SmolLM2-135M-Instruct.Q4_1.gguf") {
        assert_eq!(smollm.encode("a", true).unwrap().ids, smollm.encode("a", false).unwrap().ids);
        assert_eq!((smollm.special().bos, smollm.special().eos_token), (Some(1), Some(2)));
        assert_eq!(smollm.special().eos, [2, 0]);
        let options = TemplateOptions { add_generation_prompt: true, ..Default::default() };
        let text = smollm.render(&[Message::new("user", "Hi")], &options).unwrap();
        assert!(text.ends_with("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"), "{text}");
    }
}

/// The metadata that conversion to GGUF makes of a tokenizer.json.
fn converted(name: &str, pre: &str) -> Option<(GgufVocab, Tokenizer)> {
    let folder = goldens::shared(&format!("tokenizers/{name}"))?;
    let tokenizer = Tokenizer::from_folder(&folder).unwrap();
    let json: Value = serde_json::from_slice(&std::fs::read(folder.join("tokenizer.json")).unwrap()).unwrap();
    let model = &json["model"];
    let sentence_piece = model["byte_fallback"] == true;
    let added = json["added_tokens"].as_array().unwrap();
    let vocab = model["vocab"].as_object().unwrap();
    let ids = vocab.iter().map(|(token, id)| (token.as_str(), id));
    let ids = ids.chain(added.iter().map(|token| (token["content"].as_str().unwrap(), &token["id"])));
    let ids: Vec<(String, usize)> =
        ids.map(|(token, id)| (token.to_string(), id.as_u64().unwrap() as usize)).collect();
    let count = ids.iter().map(|(_, id)| id + 1).max().unwrap();
    let (mut tokens, mut kinds) = (vec![String::new(); count], vec![1; count]);
    for (token, id) in ids {
        if sentence_piece && token.starts_with("<0x") && token.len() == 6 {
            kinds[id] = 6;
        }
        tokens[id] = token;
    }
    for token in added {
        let id = token["id"].as_u64().unwrap() as usize;
        kinds[id] = if token["special"] == true { 3 } else { 4 };
    }
    let merges = model["merges"].as_array().unwrap().iter().map(|merge| match merge {
        Value::String(pair) => pair.clone(),
        pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
    });
    // SentencePiece's BPE trainer gives falling scores in order of the ids; runs of spaces come after everything else.
    let score = |(id, token): (usize, &String)| {
        let spaces = token.chars().count() > 1 && token.chars().all(|char| char == '▁');
        if spaces { -1e9 } else { -(id as f32) }
    };
    let vocab = GgufVocab {
        model: if sentence_piece { "llama" } else { "gpt2" }.into(),
        pre: Some(pre.into()),
        scores: sentence_piece.then(|| tokens.iter().enumerate().map(score).collect()),
        merges: (!sentence_piece).then(|| merges.collect()),
        tokens,
        token_types: Some(kinds),
        unk: tokenizer.special().unk,
        ..Default::default()
    };
    Some((vocab, tokenizer))
}

/// Each pre-tokenizer whose model's tokenizer.json is at hand, and the merges that SentencePiece's scores stand for.
#[test]
fn converted_tokenizers_stay_the_same() {
    for (name, pre) in [
        ("gpt2", "gpt-2"),
        ("smollm2", "smollm"),
        ("qwen3", "qwen2"),
        ("llama3", "llama-bpe"),
        ("gptoss", "gpt-4o"),
        ("llama2", "default"),
    ] {
        let Some((vocab, json)) = converted(name, pre) else { continue };
        let gguf = Tokenizer::from_gguf(&vocab).unwrap();
        for text in texts() {
            let ids = gguf.encode(&text, false).unwrap().ids;
            assert_eq!(ids, json.encode(&text, false).unwrap().ids, "{name}: {text:?}");
            assert_eq!(gguf.decode(&ids, false), json.decode(&ids, false), "{name}: {text:?}");
        }
        let rows = vocab.tokens.len();
        assert_eq!(gguf.fingerprint(rows), json.fingerprint(rows), "{name}");
    }
}
