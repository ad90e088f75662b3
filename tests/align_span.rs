//! Properties of alignment on real tokenizers and random text, for every pair of tokenizers in `<shared>/tokenizers`.
//! The seed is printed; `C2C_SEED` sets it.

mod goldens;

use c2c::{
    align::{AlignedPrompt, Aligner, Alignment, ChatOptions, Remark, report, span_columns},
    tokenizer::{Message, TemplateOptions, Tokenizer},
};
use std::{env, fs, path::PathBuf, sync::OnceLock};

/// All tokenizers at hand, by folder name. Those without a template of their own get a plain one.
fn tokenizers() -> &'static [(String, Tokenizer)] {
    static FOUND: OnceLock<Vec<(String, Tokenizer)>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let folder = goldens::shared("tokenizers").and_then(|folder| fs::read_dir(folder).ok());
        let entries = folder.into_iter().flatten().flatten().map(|entry| entry.path());
        let mut folders: Vec<PathBuf> =
            entries.filter(|path| path.join("tokenizer.json").is_file()).collect();
        folders.sort();
        let load = |path: &PathBuf| {
            let tokenizer =
                Tokenizer::from_folder(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            (name, tokenizer)
        };
        folders.iter().map(load).collect()
    })
}

const TRIMMING: &str = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[/{{ m.role }}]\n{% endfor %}\
                        {% if add_generation_prompt %}[assistant]{% endif %}";
const SHOUTING: &str = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}";

struct Random(u64);

impl Random {
    fn new() -> Random {
        let seed = env::var("C2C_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0x5EED);
        eprintln!("C2C_SEED={seed}");
        Random(seed)
    }

    fn below(&mut self, n: u64) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n
    }

    fn character(&mut self) -> char {
        let (low, high) = [
            (0x20, 0x7F),
            (0x61, 0x7B),
            (0x61, 0x7B),
            (0x0A, 0x0B),
            (0xA0, 0x250),
            (0x300, 0x370), // combining marks: normalisers compose them
            (0x370, 0x600),
            (0x900, 0xE80),
            (0x2000, 0x2070), // spaces of all kinds, zero-width ones included
            (0x3040, 0x30FF),
            (0x4E00, 0x9FFF),
            (0xAC00, 0xD7A3),
            (0xFB00, 0xFB4F),
            (0x1F300, 0x1FAFF),
            (0x20000, 0x2A6DF),
            (0, 0x110000),
        ][self.below(16) as usize];
        char::from_u32((low + self.below(high - low)) as u32).unwrap_or('\u{FFFD}')
    }

    fn text(&mut self, most: u64) -> String {
        const PHRASES: [&str; 10] = [
            " the ",
            "antidisestablishmentarianism",
            "1234567890",
            "    ",
            "👩\u{200D}👩\u{200D}👧 ",
            "北京",
            "<|im_start|>",
            "</s>",
            "e\u{301}",
            "\r\n\n",
        ];
        let mut text = String::new();
        for _ in 0..self.below(most) {
            match self.below(4) {
                0 => text.push_str(PHRASES[self.below(PHRASES.len() as u64) as usize]),
                _ => text.push(self.character()),
            }
        }
        text
    }
}

#[test]
fn span_columns_are_total_in_range_and_monotone() {
    let mut random = Random::new();
    let texts: Vec<String> = (0..60).map(|_| random.text(40)).collect();
    for text in &texts {
        let encodings: Vec<_> =
            tokenizers().iter().map(|(name, t)| (name, t.encode(text, true).expect("ids"))).collect();
        for (receiver, here) in &encodings {
            for (sharer, there) in &encodings {
                let what = format!("{receiver} <- {sharer}: {text:?}");
                let columns = span_columns(&here.offsets, &there.offsets);
                assert_eq!(columns.len(), here.ids.len(), "{what}");
                if there.ids.is_empty() {
                    assert!(columns.iter().all(Option::is_none), "{what}");
                    continue;
                }
                let columns: Vec<usize> = columns
                    .into_iter()
                    .map(|c| c.unwrap_or_else(|| panic!("{what}: no column")) as usize)
                    .collect();
                assert!(columns.iter().all(|&column| column < there.ids.len()), "{what}: out of range");
                assert!(columns.is_sorted(), "{what}: goes back");
                for (token, &column) in columns.iter().enumerate() {
                    let (start, end) = here.offsets[token];
                    let reads = |&&(from, to): &&(usize, usize)| from < to && from < end;
                    let last = there.offsets.iter().rposition(|offset| reads(&offset));
                    let piece = here.offsets.get(token + 1).is_some_and(|next| next.0 < end);
                    if let Some(last) = last.filter(|_| start < end && !piece) {
                        // The last token that has begun to read what the receiver's token ends with.
                        assert_eq!(column, last, "{what}: token {token}");
                    } else if let Some(last) = last.filter(|_| start < end) {
                        // Pieces of one character: a token that reads it, or nobody does.
                        let covers = |column: usize| there.offsets[column].1 >= end;
                        assert!(column == last || covers(column), "{what}: piece {token}");
                    }
                }
                if receiver == sharer {
                    for (token, &column) in columns.iter().enumerate() {
                        let (start, end) = here.offsets[token];
                        assert!(start == end || column == token, "{what}: token {token} has column {column}");
                    }
                }
            }
        }
    }
}

/// What every aligned prompt promises.
fn check(prompt: &AlignedPrompt, what: &str) {
    let tokens = prompt.receiver_ids.len();
    assert_eq!(prompt.sections.iter().map(|s| s.len).sum::<usize>(), tokens, "{what}");
    assert!(prompt.sections.iter().all(|s| s.len > 0), "{what}: an empty section");
    assert_eq!((prompt.message_mask.len(), prompt.receiver_positions.len()), (tokens, tokens), "{what}");
    assert!(prompt.receiver_positions.is_sorted_by(|a, b| a < b), "{what}");
    let mut at = 0;
    for segment in &prompt.segments {
        assert_eq!(segment.receiver.start, at, "{what}");
        at = segment.receiver.end;
    }
    assert_eq!(at, tokens, "{what}");
    for (s, sharer) in prompt.sharers.iter().enumerate() {
        assert_eq!((sharer.columns.len(), sharer.positions.len()), (tokens, sharer.ids.len()), "{what}");
        assert!(sharer.positions.is_sorted_by(|a, b| a < b), "{what}");
        let columns: Vec<u32> = sharer.columns.iter().flatten().copied().collect();
        assert!(columns.iter().all(|&column| (column as usize) < sharer.ids.len()), "{what}");
        assert!(columns.is_sorted(), "{what}: columns go back");
        let mut token = 0;
        for section in &prompt.sections {
            for column in &sharer.columns[token..token + section.len] {
                assert!(
                    section.sharer_mask >> s & 1 == 0 || column.is_some(),
                    "{what}: fused without a column"
                );
            }
            token += section.len;
        }
        assert!(prompt.columns_needed(s) <= sharer.ids.len(), "{what}");
    }
}

#[test]
fn random_conversations_align() {
    let mut random = Random::new();
    let with_template: Vec<(&str, Tokenizer)> = tokenizers()
        .iter()
        .flat_map(|(name, tokenizer)| {
            let trimming = tokenizer.clone().with_chat_template(TRIMMING).expect("a template");
            let own = tokenizer.chat_template().is_some().then(|| tokenizer.clone());
            own.into_iter().chain([trimming]).map(|tokenizer| (name.as_str(), tokenizer))
        })
        .collect();
    let mut fused = 0;
    for _ in 0..150 {
        if with_template.is_empty() {
            return;
        }
        let mut model = || &with_template[random.below(with_template.len() as u64) as usize];
        let (receiver, sharers) = (model(), [model(), model()]);
        let turns = 1 + 2 * random.below(2) as usize;
        let roles = ["user", "assistant"].into_iter().cycle();
        let messages: Vec<Message> =
            roles.take(turns).map(|role| Message::new(role, random.text(20))).collect();
        for alignment in [Alignment::None, Alignment::First, Alignment::Longest, Alignment::Span] {
            let what =
                format!("{} <- {} + {}, {alignment}: {messages:?}", receiver.0, sharers[0].0, sharers[1].0);
            let sharers = sharers.map(|(_, tokenizer)| tokenizer.clone());
            let aligner = Aligner::new(&receiver.1, &sharers, alignment).expect("an aligner");
            let template = TemplateOptions { add_generation_prompt: true, ..Default::default() };
            let options = ChatOptions { template, open_last: false };
            // Templates may refuse a conversation, but that is an error of theirs.
            if let Ok(prompt) = aligner.chat(&messages, &options) {
                check(&prompt, &what);
                fused += prompt.sections.iter().filter(|s| s.sharer_mask != 0).count();
                // Whatever a model does not have of a message is remarked.
                for (m, message) in messages.iter().enumerate().filter(|(_, m)| !m.content.is_empty()) {
                    let segment = prompt.segments.iter().find(|segment| segment.message == Some(m));
                    let all = segment.is_some_and(|segment| segment.sharer_mask == 3);
                    let remarked = prompt
                        .remarks
                        .iter()
                        .any(|r| matches!(r, Remark::MessageNotFused { message, .. } if *message == m));
                    assert!(
                        all != remarked || alignment == Alignment::None,
                        "{what}: {message:?} {remarked}"
                    );
                }
            }
            if let Ok(prompt) = aligner.raw(&messages[0].content) {
                check(&prompt, &what);
            }
        }
    }
    assert!(fused > 100, "only {fused} sections were fused");
}

fn named(name: &str) -> Option<Tokenizer> {
    let found = tokenizers().iter().find(|(n, _)| n == name).map(|(_, tokenizer)| tokenizer.clone());
    if found.is_none() {
        goldens::skipped(format_args!("there is no tokenizer {name}"));
    }
    found
}

#[test]
fn trimmed_and_changed_messages() {
    let (Some(receiver), Some(sharer)) = (named("qwen3"), named("llama3")) else { return };
    let options = ChatOptions::default();
    let messages = [Message::new("user", "  padded content \n"), Message::new("assistant", "user")];
    let prompt = |sharer: Tokenizer| {
        let aligner = Aligner::new(&receiver, &[sharer], Alignment::Span).expect("an aligner");
        aligner.chat(&messages, &options).expect("a prompt")
    };
    let trimmed = prompt(sharer.clone());
    check(&trimmed, "trimmed");
    assert_eq!(trimmed.remarks, []);
    let read: Vec<(String, String)> = trimmed
        .segments
        .iter()
        .filter(|segment| segment.message.is_some())
        .map(|segment| {
            let there = &trimmed.sharers[0].ids[segment.sharers[0].clone()];
            (
                receiver.decode(&trimmed.receiver_ids[segment.receiver.clone()], false),
                sharer.decode(there, false),
            )
        })
        .collect();
    // Tokens on the edges bring their spaces along; the role `user` is not taken for the message `user`.
    assert_eq!(read, [(" padded content".into(), "padded content".into()), ("user".into(), "user".into())]);
    assert!(trimmed.receiver_text.contains("  padded content \n"), "the receiver reads the message as it is");

    let changed = prompt(sharer.with_chat_template(SHOUTING).expect("a template"));
    check(&changed, "changed");
    let lost = |message| Remark::MessageNotFused { message, sharer: Some(0) };
    assert_eq!(changed.remarks, [lost(0), lost(1)]);
    assert!(changed.sections.iter().all(|section| section.sharer_mask == 0));
}

/// Qwen3's template drops the thoughts of earlier answers; the messages around them are fused all the same.
#[test]
fn a_changed_message_does_not_spoil_the_others() {
    let (Some(receiver), Some(sharer)) = (named("qwen3"), named("llama3")) else { return };
    let messages = [
        Message::new("user", "assistant."),
        Message::new("assistant", "<think>\nuser\n</think>\n\nParis"),
        Message::new("user", "."),
    ];
    let template = TemplateOptions { add_generation_prompt: true, ..Default::default() };
    let options = ChatOptions { template, open_last: false };
    for sharer in [sharer.clone(), receiver.clone()] {
        let aligner = Aligner::new(&receiver, &[sharer], Alignment::Span).expect("an aligner");
        let prompt = aligner.chat(&messages, &options).expect("a prompt");
        check(&prompt, "thoughts");
        assert!(
            prompt.remarks.contains(&Remark::MessageNotFused { message: 1, sharer: None }),
            "{:?}",
            prompt.remarks
        );
        let fused: Vec<Option<usize>> = prompt.segments.iter().map(|segment| segment.message).collect();
        assert_eq!(fused, [None, Some(0), None, Some(2), None]);
        let last = &prompt.segments[3];
        assert_eq!(receiver.decode(&prompt.receiver_ids[last.receiver.clone()], false), ".");
        assert!(prompt.receiver_text.contains("\nParis<"), "{}", prompt.receiver_text);
    }
}

#[test]
fn span_loses_nothing_and_tokens_do() {
    let (Some(receiver), Some(sharer)) = (named("qwen3"), named("llama3")) else { return };
    let texts = [
        "The quick brown fox jumps over the lazy dog.",
        "机器学习与自然语言处理的未来",
        "👩\u{200D}👩\u{200D}👧 antidisestablishmentarianism 12345678901234567890",
    ];
    let measure = |alignment| report::measure(&receiver, &sharer, alignment, &texts).expect("a report");
    let span = measure(Alignment::Span);
    assert_eq!((span.bleu, span.character_error_rate, span.failures.len()), (1.0, 0.0, 0));
    let first = measure(Alignment::First);
    let longest = measure(Alignment::Longest);
    eprintln!("{first}\n{longest}\n{span}");
    assert!(first.bleu < 1.0 && first.character_error_rate > 0.0, "{first}");
    assert!(longest.character_error_rate <= first.character_error_rate, "{longest}");
    assert_eq!((first.one_to_one, first.one_to_many), (longest.one_to_one, longest.one_to_many));
    let own = report::measure(&receiver, &receiver, Alignment::First, &texts[..2]).expect("a report");
    assert_eq!((own.one_to_one_rate(), own.bleu, own.failures.len()), (1.0, 1.0, 0), "{own}");
}
