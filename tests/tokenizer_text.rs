//! Small vocabularies made here: round trips, decoding token by token, and files that are broken.

use c2c::tokenizer::{Error, GgufVocab, Message, TemplateOptions, Tokenizer};
use serde_json::{Value, json};

/// GPT-2's alphabet, a few merges (one of them inside "é"), a control and a user-defined token.
fn byte_level() -> GgufVocab {
    let mut alphabet: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut tokens: Vec<String> = alphabet.iter().map(char::to_string).collect();
    let merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ã ©", "ð Ł", "Ġ ðŁ"];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let normal = tokens.len();
    tokens.extend(["<|end|>".into(), "<tool>".into(), "[PAD266]".into(), String::new()]);
    let mut token_types = vec![1; normal];
    token_types.extend([3, 4, 5, 5]);
    GgufVocab {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens,
        token_types: Some(token_types),
        merges: Some(merges.map(String::from).to_vec()),
        eos: Some(normal as u32),
        origin: "small.gguf".into(),
        ..Default::default()
    }
}

/// Llama's layout: unknown, BOS, EOS, 256 bytes, pieces by falling score.
fn sentence_piece() -> GgufVocab {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    let pieces = [
        "he", "ll", "hell", "▁hell", "▁hello", "hello", "▁▁", "▁", "h", "e", "l", "o", "w", "r", "d", "é",
        ".",
    ];
    tokens.extend(pieces.map(String::from));
    let mut token_types = vec![2, 3, 3];
    token_types.extend([6; 256]);
    token_types.extend([1; 17]);
    let scores = (0..tokens.len()).map(|id| if id < 259 { 0.0 } else { 258.0 - id as f32 }).collect();
    GgufVocab {
        model: "llama".into(),
        tokens,
        scores: Some(scores),
        token_types: Some(token_types),
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        origin: "small.gguf".into(),
        ..Default::default()
    }
}

fn build(vocab: &GgufVocab) -> Tokenizer {
    Tokenizer::from_gguf(vocab).unwrap()
}

fn words(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Vec<String> {
    let ids = tokenizer.encode(text, add_special).unwrap().ids;
    ids.into_iter().map(|id| tokenizer.token_of(id).unwrap()).collect()
}

/// splitmix64: the same texts in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }

    fn text(&mut self) -> String {
        const PARTS: [&str; 18] = [
            " ",
            "  ",
            "\n",
            "hello",
            "he",
            "l",
            "é",
            "e\u{301}",
            "北",
            "京",
            "🚀",
            "👩‍👩‍👧",
            "\u{10FFFF}",
            "ß",
            "Ж",
            "0",
            ".",
            "\t",
        ];
        (0..self.below(12)).map(|_| PARTS[self.below(PARTS.len())]).collect()
    }
}

fn one_by_one(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut detokenizer = tokenizer.detokenizer().keep_special();
    let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
    pieces.push(detokenizer.finish());
    pieces
}

#[test]
fn any_text_comes_back() {
    let mut random = Random(1);
    let spaceless = GgufVocab { add_space_prefix: Some(false), ..sentence_piece() };
    for tokenizer in [build(&byte_level()), build(&sentence_piece()), build(&spaceless)] {
        for _ in 0..300 {
            let text = random.text();
            let encoding = tokenizer.encode(&text, false).unwrap();
            assert_eq!(tokenizer.decode(&encoding.ids, false), text, "{tokenizer:?}");
            let pieces = one_by_one(&tokenizer, &encoding.ids);
            assert_eq!(pieces.concat(), text, "{tokenizer:?}");
            // Offsets cover the text from left to right and never cut a character.
            let mut last = 0;
            for &(start, end) in &encoding.offsets {
                assert!(text.get(start..end).is_some(), "{text:?}: {start}..{end}");
                assert!(start >= last && start <= end, "{text:?}: {:?}", encoding.offsets);
                last = start;
            }
        }
    }
}

/// A model may write any sequence of ids. Byte-level pieces are then still together what decoding all at once gives.
#[test]
fn any_ids_decode() {
    let mut random = Random(2);
    let tokenizer = build(&byte_level());
    for _ in 0..2000 {
        let ids: Vec<u32> = (0..random.below(9)).map(|_| random.below(300) as u32).collect();
        assert_eq!(one_by_one(&tokenizer, &ids).concat(), tokenizer.decode(&ids, false), "{ids:?}");
    }
    let tokenizer = build(&sentence_piece());
    for _ in 0..2000 {
        let ids: Vec<u32> = (0..random.below(9)).map(|_| random.below(300) as u32).collect();
        let whole = tokenizer.decode(&ids, false);
        let pieces = one_by_one(&tokenizer, &ids).concat();
        if !whole.contains(char::REPLACEMENT_CHARACTER) {
            assert_eq!(pieces, whole, "{ids:?}");
        }
    }
}

#[test]
fn half_characters_wait() {
    let tokenizer = build(&byte_level());
    let ids = tokenizer.encode("a🚀é", false).unwrap().ids;
    let pieces = one_by_one(&tokenizer, &ids);
    // 🚀 is the bytes F0 9F (one token), 9A, 80.
    assert_eq!(pieces, ["a", "", "", "🚀", "é", ""]);
    // The first token of an emoji followed by a letter can never become one.
    let pieces = one_by_one(&tokenizer, &[ids[1], ids[0]]);
    assert_eq!(pieces, ["", "\u{FFFD}a", ""]);
    // The end of the answer inside a character.
    assert_eq!(one_by_one(&tokenizer, &ids[..3]), ["a", "", "", "\u{FFFD}"]);

    let tokenizer = build(&sentence_piece());
    let ids = tokenizer.encode("北 hello", false).unwrap().ids;
    assert_eq!(one_by_one(&tokenizer, &ids), ["", "", "", "北", " hello", ""]);
    assert_eq!(one_by_one(&tokenizer, &ids[..3]), ["", "", "", "\u{FFFD}\u{FFFD}"]);
}

#[test]
fn detokenizer_hides_special_tokens() {
    let tokenizer = build(&byte_level());
    let ids = tokenizer.encode("he<|end|>llo<tool>", false).unwrap().ids;
    let mut detokenizer = tokenizer.detokenizer();
    let text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
    assert_eq!(text + &detokenizer.finish(), "hello<tool>");
    assert_eq!(tokenizer.decode(&ids, true), "hello<tool>");
}

#[test]
fn sentence_piece_merges_by_score() {
    let tokenizer = build(&sentence_piece());
    assert_eq!(words(&tokenizer, "hello", false), ["▁hello"]);
    assert_eq!(words(&tokenizer, "hello", true), ["<s>", "▁hello"]);
    // "▁hell" scores above "hello".
    assert_eq!(words(&tokenizer, "hello  hellow", false), ["▁hello", "▁", "▁hello", "w"]);
    assert_eq!(words(&tokenizer, "é🚀", false), ["▁", "é", "<0xF0>", "<0x9F>", "<0x9A>", "<0x80>"]);
    assert_eq!(words(&tokenizer, "h</s>h", false), ["▁", "h", "</s>", "▁", "h"]);
    let flags = GgufVocab {
        add_bos: Some(false),
        add_eos: Some(true),
        add_space_prefix: Some(false),
        ..sentence_piece()
    };
    assert_eq!(words(&build(&flags), "hello", true), ["hello", "</s>"]);
}

#[test]
fn special_tokens_of_gguf() {
    let vocab = GgufVocab { bos: Some(264), add_bos: Some(true), ..byte_level() };
    let tokenizer = build(&vocab);
    assert_eq!(tokenizer.special().eos, [264]);
    assert_eq!(words(&tokenizer, "he", true), ["<|end|>", "he"]);
    assert!(tokenizer.is_special(264) && !tokenizer.is_special(265));
    assert_eq!(tokenizer.special_ids(), [264]);
    // Rows that fill the embedding up are no tokens.
    assert_eq!(tokenizer.vocab_size(), 266);
    assert_eq!(
        (tokenizer.token_of(266), tokenizer.token_of(267), tokenizer.token_of(u32::MAX)),
        (None, None, None)
    );
    assert_eq!(tokenizer.decode(&[u32::MAX, 266], false), "");
}

#[test]
fn fingerprints_tell_tokenizers_apart() {
    let same = build(&GgufVocab { chat_template: Some("x".into()), origin: "other".into(), ..byte_level() });
    let mut swapped = byte_level();
    swapped.merges.as_mut().unwrap().swap(0, 1);
    let mut renamed = byte_level();
    renamed.tokens[0] = "<|start|>".into();
    let tokenizer = build(&byte_level());
    let rows = byte_level().tokens.len();
    assert_eq!(tokenizer.fingerprint(rows), same.fingerprint(rows));
    for other in [build(&swapped), build(&renamed), build(&sentence_piece())] {
        assert_ne!(tokenizer.fingerprint(rows), other.fingerprint(rows));
    }
    // What a model has no embedding for does not count.
    let mut longer = sentence_piece();
    let rows = longer.tokens.len();
    longer.tokens.push("<image>".into());
    longer.scores.as_mut().unwrap().push(0.0);
    longer.token_types.as_mut().unwrap().push(3);
    let (short, longer) = (build(&sentence_piece()), build(&longer));
    assert_eq!(short.fingerprint(rows), longer.fingerprint(rows));
    assert_ne!(short.fingerprint(rows), longer.fingerprint(rows + 1));
    // A piece of spaces may be spelled either way, a piece of anything else not.
    let spelled = |piece: &str| {
        let mut vocab = sentence_piece();
        vocab.tokens.push(piece.into());
        vocab.scores.as_mut().unwrap().push(0.0);
        vocab.token_types.as_mut().unwrap().push(4);
        build(&vocab).fingerprint(rows + 1)
    };
    assert_eq!(spelled("   "), spelled("▁▁▁"));
    assert_ne!(spelled("   "), spelled("▁▁▁▁"));
}

#[test]
fn bad_gguf_vocabularies() {
    let cases: [(&str, GgufVocab); 13] = [
        ("unigram", GgufVocab { model: "unigram".into(), ..byte_level() }),
        ("smollm, starcoder", GgufVocab { pre: Some("new-pre".into()), ..byte_level() }),
        ("tokens is missing", GgufVocab { tokens: Vec::new(), ..byte_level() }),
        ("merges, which is missing", GgufVocab { merges: None, ..byte_level() }),
        ("merges[0] is \"he\"", GgufVocab { merges: Some(vec!["he".into()]), ..byte_level() }),
        ("does not fit", GgufVocab { merges: Some(vec!["x unknown".into()]), ..byte_level() }),
        ("eos_token_id is 4000000000", GgufVocab { eos: Some(4_000_000_000), ..byte_level() }),
        ("padding_token_id is 267", GgufVocab { pad: Some(267), ..byte_level() }),
        ("token_type has 1 entries", GgufVocab { token_types: Some(vec![1]), ..byte_level() }),
        ("token_type[0] is 77", GgufVocab { token_types: Some(vec![77; 268]), ..byte_level() }),
        ("scores, which is missing", GgufVocab { scores: None, ..sentence_piece() }),
        ("scores has 1 entries", GgufVocab { scores: Some(vec![0.0]), ..sentence_piece() }),
        ("small.gguf", GgufVocab { chat_template: Some("{% if %}".into()), ..byte_level() }),
    ];
    for (part, vocab) in cases {
        let error = Tokenizer::from_gguf(&vocab).expect_err(part).to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
    // Scores that are no numbers, tokens that occur twice: odd, but no reason to refuse or to panic.
    let odd = GgufVocab { scores: Some(vec![f32::NAN; 276]), ..sentence_piece() };
    build(&odd).encode("hello", true).unwrap();
    let mut twice = byte_level();
    twice.tokens[1] = twice.tokens[0].clone();
    build(&twice).encode("hello", true).unwrap();
}

/// A tokenizer.json of three words.
fn small_json() -> Value {
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [{"id": 3, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "b": 2}, "unk_token": "<unk>"},
    })
}

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

#[test]
fn what_stands_beside_tokenizer_json() {
    let config = json!({
        "bos_token": null,
        "eos_token": {"content": "<end>", "lstrip": false},
        "pad_token": "<pad>",
        "additional_special_tokens": ["<x>", "<end>"],
        "extra_special_tokens": {"image_token": "<image>"},
        "added_tokens_decoder": {"5": {"content": "<y>", "special": false}, "4": {"content": "<x>", "special": false}},
        "chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "{{ image_token }}{{ eos_token }}{{ bos_token }}"}],
    });
    let dir = folder(&[
        ("tokenizer.json", &small_json().to_string()),
        ("tokenizer_config.json", &config.to_string()),
        ("special_tokens_map.json", r#"{"eos_token": "b", "unk_token": "<unk>"}"#),
        ("generation_config.json", r#"{"eos_token_id": [2, 3, 2]}"#),
        ("config.json", r#"{"eos_token_id": 1}"#),
    ]);
    let tokenizer = Tokenizer::from_folder(dir.path()).unwrap();
    let special = tokenizer.special();
    assert_eq!((special.bos, special.eos_token, special.unk), (None, Some(3), Some(0)));
    assert_eq!(special.eos, [2, 3]);
    assert_eq!(tokenizer.id_of("<x>"), Some(4));
    assert_eq!(tokenizer.id_of("<y>"), Some(5));
    assert_eq!(special.pad, tokenizer.id_of("<pad>"));
    // eos, unk, pad, additional, extra.
    let texts = ["<end>", "<unk>", "<pad>", "<x>", "<image>"];
    assert_eq!(tokenizer.special_ids(), texts.map(|text| tokenizer.id_of(text).unwrap()));
    assert!(tokenizer.is_special(4) && !tokenizer.is_special(5));
    // The truncation that the file carries is not applied.
    assert_eq!(tokenizer.encode("a b<x>a", false).unwrap().ids, [1, 2, 4, 1]);
    assert_eq!(tokenizer.render(&[], &TemplateOptions::default()).unwrap(), "<image><end>");

    std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages[0].content }}!").unwrap();
    let tokenizer = Tokenizer::from_folder(dir.path()).unwrap();
    assert_eq!(tokenizer.render(&[Message::new("user", "hi")], &TemplateOptions::default()).unwrap(), "hi!");

    std::fs::remove_file(dir.path().join("generation_config.json")).unwrap();
    assert_eq!(Tokenizer::from_folder(dir.path()).unwrap().special().eos, [1, 3]);
}

/// transformers' Llama class adds BOS whatever tokenizer.json says.
#[test]
fn llama_class_adds_bos() {
    let json = small_json().to_string();
    for (config, expected) in [
        (json!({"tokenizer_class": "LlamaTokenizer", "bos_token": "<end>"}), vec![3, 1]),
        (
            json!({"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<end>", "add_bos_token": false}),
            vec![1],
        ),
        (
            json!({"tokenizer_class": "LlamaTokenizer", "eos_token": "<end>", "add_eos_token": true}),
            vec![1, 3],
        ),
        (json!({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<end>"}), vec![1]),
    ] {
        let dir = folder(&[("tokenizer.json", &json), ("tokenizer_config.json", &config.to_string())]);
        let tokenizer = Tokenizer::from_folder(dir.path()).unwrap();
        assert_eq!(tokenizer.encode("a", true).unwrap().ids, expected, "{config}");
        assert_eq!(tokenizer.encode("a", false).unwrap().ids, [1], "{config}");
    }
}

#[test]
fn bad_folders() {
    let json = small_json().to_string();
    let good = ("tokenizer.json", json.as_str());
    let cases: [(&str, Vec<(&str, &str)>); 9] = [
        ("no tokenizer.json", vec![]),
        ("tokenizer.model has to be converted", vec![("tokenizer.model", "")]),
        ("tokenizer.json is not", vec![("tokenizer.json", "{")]),
        ("tokenizer.json is not", vec![("tokenizer.json", &json[..json.len() / 2])]),
        ("tokenizer.json is not", vec![("tokenizer.json", r#"{"model": {"type": "Nonsense"}}"#)]),
        ("tokenizer_config.json is not valid JSON", vec![good, ("tokenizer_config.json", "[1, 2")]),
        ("generation_config.json is not valid JSON", vec![good, ("generation_config.json", "[]")]),
        (
            "added_tokens_decoder[\"x\"]",
            vec![good, ("tokenizer_config.json", r#"{"added_tokens_decoder": {"x": {"content": "y"}}}"#)],
        ),
        ("chat template", vec![good, ("chat_template.jinja", "{% if %}")]),
    ];
    for (part, files) in cases {
        let dir = folder(&files);
        let error = Tokenizer::from_folder(dir.path()).expect_err(part).to_string();
        assert!(error.contains(part), "{part}: {error}");
        assert!(error.contains(dir.path().to_str().unwrap()), "{error}");
    }
    let dir = folder(&[good]);
    std::fs::write(dir.path().join("chat_template.jinja"), b"\xff").unwrap();
    assert!(Tokenizer::from_folder(dir.path()).unwrap_err().to_string().contains("UTF-8"));

    let missing = dir.path().join("nowhere");
    assert!(matches!(Tokenizer::from_folder(&missing), Err(Error::Read { .. })));
    assert!(matches!(Tokenizer::from_file(&missing), Err(Error::Read { .. })));

    let dir = folder(&[good]);
    let error =
        Tokenizer::from_folder(dir.path()).unwrap().render(&[], &TemplateOptions::default()).unwrap_err();
    assert!(matches!(&error, Error::NoTemplate { origin } if origin == dir.path().to_str().unwrap()));
}

/// A tokenizer.json with a part of every kind that language models use.
fn rich_json() -> Value {
    let added = |id: u32, content: &str, special: bool| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": !special, "special": special});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [added(0, "<unk>", true), added(6, "<s>", true), added(7, "user", false)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"}, {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}| ?\\p{L}+"}, "behavior": "Isolated", "invert": false},
            {"type": "Digits", "individual_digits": true},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true},
        ]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [6], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "▁": 4, "▁ab": 5, "<0x0A>": 8}, "merges": [["a", "b"], ["▁", "ab"]]},
    })
}

/// Replaces, removes or empties something inside `value`.
fn mutate(value: &mut Value, random: &mut Random) {
    let odd = [
        json!(null),
        json!(-1),
        json!(4294967295u32),
        json!(""),
        json!("ab"),
        json!([]),
        json!({}),
        json!(true),
    ];
    let deeper = random.below(6) > 0;
    match value {
        Value::Object(map) if deeper && !map.is_empty() => {
            let key = map.keys().nth(random.below(map.len())).unwrap().clone();
            if random.below(8) == 0 {
                map.shift_remove(&key);
            } else {
                mutate(&mut map[&key], random);
            }
        }
        Value::Array(items) if deeper && !items.is_empty() => {
            let at = random.below(items.len());
            if random.below(8) == 0 {
                items.remove(at);
            } else {
                mutate(&mut items[at], random);
            }
        }
        _ => *value = odd[random.below(odd.len())].clone(),
    }
}

/// Every kind of damage to a tokenizer.json gives an error or a tokenizer, never a panic.
#[test]
fn damaged_json_never_panics() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokenizer.json");
    let mut random = Random(3);
    let (mut loaded, mut refused) = (0, 0);
    let mut check = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        match Tokenizer::from_file(&file) {
            Ok(tokenizer) => {
                loaded += 1;
                tokenizer.fingerprint(usize::MAX);
                if let Ok(encoding) = tokenizer.encode("user ab 12 <s>\n é", true) {
                    tokenizer.decode(&encoding.ids, true);
                    one_by_one(&tokenizer, &encoding.ids);
                }
            }
            Err(_) => refused += 1,
        }
    };
    for json in [small_json(), rich_json()] {
        let text = json.to_string().into_bytes();
        for _ in 0..100 {
            check(&text[..random.below(text.len())]);
            let mut bytes = text.clone();
            let at = random.below(bytes.len());
            bytes[at] = b"\"{}[]:,0129abz\xff\0 -."[random.below(19)];
            check(&bytes);
        }
        for _ in 0..500 {
            let mut damaged = json.clone();
            for _ in 0..1 + random.below(2) {
                mutate(&mut damaged, &mut random);
            }
            check(damaged.to_string().as_bytes());
        }
    }
    assert!(loaded > 100 && refused > 100, "{loaded} loaded, {refused} refused");
}
