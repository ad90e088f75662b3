//! Alignment between small tokenizers made here: what every case must give is written out by hand.

use c2c::{
    align::{AlignedPrompt, Aligner, Alignment, ChatOptions, Error, Remark, Section, TokenAligner, report},
    tokenizer::{Message, TemplateOptions, Tokenizer},
};
use serde_json::{Map, Value, json};

/// A tokenizer of single bytes, the given words (built from left to right) and special tokens; `<bos>` is put before
/// a text if it is among them.
fn tokenizer(words: &[&str], specials: &[&str], config: Value, template: &str) -> Tokenizer {
    let spelled = |word: &str| word.replace(' ', "Ġ").replace('\n', "Ċ");
    let mut vocab = Map::new();
    let mut add = |token: String| {
        let id = vocab.len();
        vocab.entry(token).or_insert(id.into());
    };
    // GPT-2's printable stand-ins for bytes.
    let printable = |b: u32| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    (0..256).filter(|&b| printable(b)).for_each(|b| add(char::from_u32(b).expect("Latin-1").to_string()));
    (0..256 - 188).for_each(|n| add(char::from_u32(256 + n).expect("a letter").to_string()));
    let mut merges: Vec<String> = Vec::new();
    for word in words.iter().map(|word| spelled(word)) {
        for (end, c) in word.char_indices().skip(1) {
            let merge = format!("{} {c}", &word[..end]);
            if !merges.contains(&merge) {
                merges.push(merge);
            }
            add(word[..end + c.len_utf8()].to_string());
        }
    }
    let first_special = vocab.len();
    let added: Vec<Value> = specials
        .iter()
        .enumerate()
        .map(|(i, content)| {
            json!({"id": first_special + i, "content": content, "special": true, "single_word": false,
                   "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let bos = specials.iter().position(|s| *s == "<bos>").map(|i| first_special + i);
    let post = bos.map(|id| {
        json!({"type": "TemplateProcessing",
               "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
               "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
               "special_tokens": {"<bos>": {"id": "<bos>", "ids": [id], "tokens": ["<bos>"]}}})
    });
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "post_processor": post,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    });
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, value: &Value| std::fs::write(folder.path().join(name), value.to_string());
    write("tokenizer.json", &file).expect("written");
    write("tokenizer_config.json", &config).expect("written");
    let tokenizer = Tokenizer::from_folder(folder.path()).expect("a tokenizer");
    tokenizer.with_chat_template(template).expect("a template")
}

const TEMPLATE: &str = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<e>{% endfor %}\
                        {% if add_generation_prompt %}<s>assistant\n{% endif %}";

fn receiver() -> Tokenizer {
    let words = ["user", "assistant", "The", " cat", " sat", "padded"];
    tokenizer(
        &words,
        &["<s>", "<e>", "<only>"],
        json!({"eos_token": "<e>", "additional_special_tokens": ["<only>"]}),
        TEMPLATE,
    )
}

/// Trims, and speaks of `Human`.
fn sharer() -> Tokenizer {
    let template = "<bos>{% for m in messages %}{% if m.role == 'user' %}[Human]{% else %}[Model]{% endif %}\
                    {{ m.content | trim }}</e>{% endfor %}{% if add_generation_prompt %}[Model]{% endif %}";
    let words = ["Th", "e cat", " s", "at", "Human", "pad", "ded"];
    let config = json!({"bos_token": "<bos>", "eos_token": "</e>", "pad_token": "<pad>"});
    tokenizer(&words, &["<bos>", "</e>", "<pad>"], config, template)
}

/// Drops what users say.
fn deaf() -> Tokenizer {
    let template = "{% for m in messages %}{% if m.role == 'user' %}<s>?{% else %}<s>{{ m.content }}{% endif %}{% endfor %}<s>";
    tokenizer(&[], &["<s>"], json!({"eos_token": "<s>"}), template)
}

fn align(sharers: &[Tokenizer], alignment: Alignment, messages: &[(&str, &str)]) -> AlignedPrompt {
    let aligner = Aligner::new(&receiver(), sharers, alignment).expect("an aligner");
    let messages: Vec<Message> =
        messages.iter().map(|(role, content)| Message::new(*role, *content)).collect();
    aligner.chat(&messages, &generating()).expect("a prompt")
}

fn generating() -> ChatOptions {
    ChatOptions {
        template: TemplateOptions { add_generation_prompt: true, ..Default::default() },
        open_last: false,
    }
}

/// Text of each receiver token with the text of its column.
fn pairs(prompt: &AlignedPrompt, message: usize, sharer: &Tokenizer) -> Vec<(String, String)> {
    let segment =
        prompt.segments.iter().find(|segment| segment.message == Some(message)).expect("the message");
    let text = |tokenizer: &Tokenizer, id: u32| tokenizer.decode(&[id], false);
    let pair = |token: usize| {
        let column = prompt.sharers[0].columns[token].expect("a column");
        let there = prompt.sharers[0].ids[column as usize];
        (text(&receiver(), prompt.receiver_ids[token]), text(sharer, there))
    };
    segment.receiver.clone().map(pair).collect()
}

fn texts(pairs: &[(String, String)]) -> Vec<(&str, &str)> {
    pairs.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect()
}

fn lengths(prompt: &AlignedPrompt) -> Vec<(usize, u32)> {
    prompt.sections.iter().map(|section| (section.len, section.sharer_mask)).collect()
}

#[test]
fn span_reads_the_text_in_the_sharers_own_tokens() {
    let prompt = align(&[sharer()], Alignment::Span, &[("user", "The cat sat")]);
    assert_eq!(prompt.receiver_text, "<s>user\nThe cat sat<e><s>assistant\n");
    assert_eq!(prompt.sharers[0].text, "<bos>[Human]The cat sat</e>[Model]");
    let own = sharer().encode(&prompt.sharers[0].text, false).expect("ids").ids;
    assert_eq!(prompt.sharers[0].ids, own);
    // The sharer's pre-tokeniser cuts before the space, so its words are Th|e| |c|at| s|at.
    assert_eq!(texts(&pairs(&prompt, 0, &sharer())), [("The", "e"), (" cat", "at"), (" sat", "at")]);
    // <s> user \n | The cat sat | <e> <s> assistant \n
    assert_eq!(lengths(&prompt), [(3, 0), (3, 1), (4, 0)]);
    assert_eq!(prompt.receiver_positions, (0..10).collect::<Vec<u32>>());
    assert_eq!(prompt.columns_needed(0), prompt.segments[1].sharers[0].end);
}

#[test]
fn token_alignment_gives_one_sharer_token_each_and_counts_padding() {
    let prompt = align(&[sharer()], Alignment::First, &[("user", "The cat sat")]);
    assert_eq!(texts(&pairs(&prompt, 0, &sharer())), [("The", "Th"), (" cat", " "), (" sat", " s")]);
    let longest = align(&[sharer()], Alignment::Longest, &[("user", "The cat sat")]);
    assert_eq!(texts(&pairs(&longest, 0, &sharer())), [("The", "Th"), (" cat", "at"), (" sat", " s")]);
    // The sharer's template is longer before the message: <bos>[Human], and the receiver's place is padded there.
    let before = prompt.segments[0].sharers[0].len() as u32;
    assert!(before > 3, "{before}");
    assert_eq!(prompt.receiver_positions[..6], [0, 1, 2, before, before + 1, before + 2]);
    assert_eq!(prompt.sharers[0].positions[before as usize..][..3], [before, before + 1, before + 2]);
    let aligner = Aligner::new(&receiver(), &[sharer()], Alignment::First).expect("an aligner");
    let padded = aligner.padded(&prompt).expect("padding");
    let pad = receiver().id_of("<e>").expect("the end token pads where there is no padding token");
    assert_eq!(padded.ids[0][3..before as usize], vec![pad; before as usize - 3]);
    assert_eq!(padded.ids[0].len(), padded.ids[1].len());
}

#[test]
fn a_trimmed_message_is_fused_without_its_spaces() {
    for alignment in [Alignment::Span, Alignment::First] {
        let prompt = align(&[sharer()], alignment, &[("user", " padded\n")]);
        assert_eq!(prompt.remarks, [], "{alignment}");
        let pairs = pairs(&prompt, 0, &sharer());
        let there = if alignment == Alignment::Span { "ded" } else { "pad" };
        assert_eq!(texts(&pairs), [("padded", there)], "{alignment}");
    }
    let blank = align(&[sharer()], Alignment::Span, &[("user", "  \n")]);
    assert!(blank.sections.iter().all(|section| section.sharer_mask == 0));
    assert_eq!(blank.remarks.len(), 2, "{:?}", blank.remarks);
}

#[test]
fn each_sharer_is_fused_with_what_it_has_read() {
    let messages = [("user", "The cat"), ("assistant", "sat"), ("user", "The")];
    let prompt = align(&[sharer(), deaf()], Alignment::Span, &messages);
    let masks: Vec<(Option<usize>, u32)> =
        prompt.segments.iter().map(|segment| (segment.message, segment.sharer_mask)).collect();
    assert_eq!(masks, [(None, 0), (Some(0), 1), (None, 0), (Some(1), 3), (None, 0), (Some(2), 1), (None, 0)]);
    let unheard = |message| Remark::MessageNotFused { message, sharer: Some(1) };
    assert_eq!(prompt.remarks, [unheard(0), unheard(2)]);
    let alone = align(&[deaf()], Alignment::First, &[("user", "The cat")]);
    assert_eq!(lengths(&alone), [(alone.receiver_ids.len(), 0)]);
    assert_eq!(alone.columns_needed(0), 0);
}

/// `user` is also what the template calls the role, and `e>` how its tokens end.
#[test]
fn contents_are_not_confused_with_the_template() {
    for content in ["user", "s", "e>", "\n", "<e>", "assistant"] {
        let prompt = align(&[receiver()], Alignment::Span, &[("user", content), ("assistant", content)]);
        assert_eq!(prompt.remarks, [], "{content:?}");
        for message in 0..2 {
            let pairs = pairs(&prompt, message, &receiver());
            assert!(pairs.iter().all(|(here, there)| here == there), "{content:?}: {pairs:?}");
            assert_eq!(pairs.iter().map(|pair| pair.0.as_str()).collect::<String>(), content);
        }
    }
}

#[test]
fn an_open_last_message_is_the_last_section() {
    let aligner = Aligner::new(&receiver(), &[sharer()], Alignment::Span).expect("an aligner");
    let messages = [Message::new("user", "The"), Message::new("assistant", "cat sat")];
    let open = ChatOptions { open_last: true, ..Default::default() };
    let prompt = aligner.chat(&messages, &open).expect("a prompt");
    assert_eq!(prompt.receiver_text, "<s>user\nThe<e><s>assistant\ncat sat");
    assert_eq!(prompt.sharers[0].text, "<bos>[Human]The</e>[Model]cat sat");
    // c a t| sat; the last section is read on top of the fused cache, whatever its mask.
    assert_eq!(lengths(&prompt), [(3, 0), (1, 1), (4, 0), (4, 1)]);
    assert_eq!(prompt.columns_needed(0), prompt.segments[1].sharers[0].end);

    let both = ChatOptions { open_last: true, ..generating() };
    assert!(matches!(aligner.chat(&messages, &both), Err(Error::OpenLastWithGenerationPrompt)));
    assert!(matches!(aligner.chat(&messages[..1], &open), Err(Error::NothingToLeaveOpen)));
    assert!(matches!(aligner.chat(&[], &open), Err(Error::NothingToLeaveOpen)));
}

#[test]
fn without_alignment_the_sharer_reads_the_receivers_ids() {
    let prompt = align(&[sharer(), deaf()], Alignment::None, &[("user", "The cat")]);
    let tokens = prompt.receiver_ids.len();
    assert_eq!(lengths(&prompt), [(tokens - 1, 3), (1, 0)]);
    for sharer in &prompt.sharers {
        assert_eq!(sharer.ids, prompt.receiver_ids);
        assert_eq!(sharer.columns, (0..tokens as u32).map(Some).collect::<Vec<_>>());
    }
    assert_eq!(prompt.remarks, []);
}

#[test]
fn plain_text_is_fused_up_to_its_last_token() {
    let raw = |alignment| {
        Aligner::new(&receiver(), &[sharer()], alignment)
            .expect("an aligner")
            .raw("The cat sat")
            .expect("a prompt")
    };
    let span = raw(Alignment::Span);
    assert_eq!(span.sections, [Section { len: 2, sharer_mask: 1 }, Section { len: 1, sharer_mask: 0 }]);
    let bos = sharer().id_of("<bos>").expect("bos");
    assert_eq!(span.sharers[0].ids[0], bos, "the sharer's own beginning of a text");
    // <bos>|Th|e| |c|at| s|at
    assert_eq!(span.sharers[0].columns, [Some(2), Some(5), Some(7)]);
    let first = raw(Alignment::First);
    assert_eq!(first.sharers[0].ids.len(), 3);
    assert_eq!(raw(Alignment::None).sharers[0].ids, first.receiver_ids);

    let empty = Aligner::new(&receiver(), &[sharer()], Alignment::Span).expect("an aligner").raw("");
    assert!(matches!(empty, Err(Error::EmptyPrompt)));
    let many = vec![deaf(); 33];
    assert!(matches!(Aligner::new(&receiver(), &many, Alignment::Span), Err(Error::TooManySharers(33))));
}

#[test]
fn specials_without_counterpart_are_id_0_and_reported() {
    let strategy = Alignment::First.strategy().expect("a strategy");
    let aligner = TokenAligner::new(&receiver(), &sharer(), strategy);
    let only = receiver().id_of("<only>").expect("a special");
    let end = receiver().id_of("<e>").expect("a special");
    assert_eq!(
        aligner.align_tokens(&[only, end]).expect("ids"),
        [0, sharer().id_of("</e>").expect("its end")]
    );
    let prompt = align(&[sharer()], Alignment::First, &[("user", "a<only>b<only>")]);
    assert_eq!(prompt.remarks, [Remark::UnknownSpecial { sharer: 0, receiver_id: only }]);
    let found =
        report::measure(&receiver(), &sharer(), Alignment::First, &["a<only>b", "é"]).expect("a report");
    assert_eq!(found.failures.len(), 3, "one special, two halves of a letter: {found:?}");
    let span = report::measure(&receiver(), &sharer(), Alignment::Span, &["The cat é"]).expect("a report");
    assert_eq!((span.bleu, span.character_error_rate, span.failures.len()), (1.0, 0.0, 0));
    for name in ["", "prefix", "Span"] {
        assert!(name.parse::<Alignment>().is_err());
    }
}
