//! Adapters and prompts against what the published program makes of the same rows.

mod goldens;

use c2c::data::{Adapter, Origin, Place, PromptStyle, Row, templates};
use serde_json::Value;

fn example(adapter: Adapter, fields: &Value) -> c2c::data::Example {
    let fields = fields.as_object().unwrap().clone();
    let row = Row { fields, origin: Origin::new("golden", Place::Row(1)) };
    adapter.example(row, PromptStyle::Plain).unwrap()
}

#[test]
fn adapters_write_the_published_conversations() {
    let Some(golden) = goldens::json("dataset_adapters.json") else { return };
    let mut compared = 0;
    for (name, cases) in golden.as_object().unwrap() {
        // The golden has the name of the function that a data set without a class is formatted by.
        let adapter: Adapter = match name.as_str() {
            "longbench_chat_text" => Adapter::LongBench,
            name => name.parse().unwrap(),
        };
        for case in cases.as_array().unwrap() {
            let messages = example(adapter, &case["in"]).messages;
            assert_eq!(serde_json::to_value(messages).unwrap(), case["out"], "{name}: {}", case["in"]);
            compared += 1;
        }
    }
    assert!(compared >= 12, "only {compared} cases");
}

/// Question and choices of an example of the evaluated data sets; none for those without choices.
fn asked(example: &Value) -> Option<(String, Vec<String>)> {
    let text = |name: &str| example[name].as_str().map(str::to_owned);
    let question = text("question").or(text("Question")).or(text("question_stem"))?;
    let list = ["choices", "options"].iter().find_map(|name| {
        let list = example[*name].as_array().or(example[*name]["text"].as_array())?;
        Some(list.iter().map(|choice| choice.as_str().unwrap().to_owned()).collect::<Vec<_>>())
    });
    let named = |names: [&str; 4]| names.into_iter().map(text).collect::<Option<Vec<_>>>();
    let gpqa = ["Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"];
    Some((question, list.or_else(|| named(["A", "B", "C", "D"])).or_else(|| named(gpqa))?))
}

#[test]
fn prompts_are_the_published_ones() {
    let Some(golden) = goldens::json("eval/prompts.json") else { return };
    let mut compared = Vec::new();
    for (name, case) in golden["prompts"].as_object().unwrap() {
        let prompts = match asked(&case["example"]) {
            // Its order of choices is drawn; the golden's is the order of the fields.
            Some((question, choices)) => [
                ("prompt_cot0_template1", templates::direct(&question, &choices)),
                ("prompt_cot0_template0", templates::bare(&question, &choices)),
                ("prompt_cot1_template1", templates::chain_of_thought(&question, &choices)),
                ("prompt_cot1_template0", templates::bare(&question, &choices)),
            ],
            None => {
                let example = &case["example"];
                let problem = example["problem"].as_str().or(example["question"].as_str()).unwrap();
                [
                    "prompt_cot0_template1",
                    "prompt_cot0_template0",
                    "prompt_cot1_template1",
                    "prompt_cot1_template0",
                ]
                .map(|key| (key, templates::math(problem)))
            }
        };
        for (key, prompt) in prompts {
            assert_eq!(prompt, case[key].as_str().unwrap(), "{name}, {key}");
        }
        compared.push(name.as_str());
    }
    assert_eq!(compared.len(), 9, "{compared:?}");
}

#[test]
fn letters_are_scored_by_their_first_token() {
    for name in ["qwen3", "qwen2_5", "llama3_2", "gemma3"] {
        let Some((folder, _)) = goldens::tokenizer(name) else { continue };
        let tokenizer = c2c::tokenizer::Tokenizer::from_folder(&folder).unwrap();
        let tokens = templates::letter_tokens(&tokenizer, 10).unwrap();
        for (token, letter) in tokens.iter().zip('A'..) {
            let spelled = tokenizer.decode(&[*token], false);
            assert_eq!(spelled, format!(" {letter}"), "{name}");
        }
        assert!(templates::letter_tokens(&tokenizer, 27).unwrap_err().to_string().contains("27"));
    }
}
