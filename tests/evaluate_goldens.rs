//! Extraction and grading against what the published evaluation makes of the same texts.

mod goldens;

use c2c::eval::{
    Task, extract,
    items::{self, Gold, Items, letter},
    math::{self, Written},
};
use serde_json::{Value, json};
use std::fs;

/// Runs all cases of a list and tells all that differ at once.
fn compare(cases: &Value, least: usize, check: impl Fn(&Value) -> Result<(), String>) {
    let cases = cases.as_array().unwrap();
    assert!(cases.len() >= least, "only {} cases", cases.len());
    let wrong: Vec<String> = cases.iter().filter_map(|case| check(case).err()).collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

fn same(case: &Value, ours: Value, theirs: &Value) -> Result<(), String> {
    if ours == *theirs { Ok(()) } else { Err(format!("{case}: {ours}")) }
}

#[test]
fn letters_are_extracted_as_published() {
    let Some(golden) = goldens::json("eval/answer_extraction.json") else { return };
    compare(&golden["extract_answer_from_content"], 59, |case| {
        let ours =
            extract::choice(case["text"].as_str().unwrap(), 4).map(|choice| letter(choice).to_string());
        same(case, json!(ours), &case["extracted"])
    });
    compare(&golden["math500_simple"], 5, |case| {
        same(case, json!(extract::stated(case["text"].as_str().unwrap())), &case["extracted"])
    });
    compare(&golden["parse_answer_digits"], 6, |case| {
        let letters =
            extract::digits(case["text"].as_str().unwrap()).into_iter().map(|c| letter(c).to_string());
        same(case, json!(letters.collect::<Vec<_>>()), &case["out"])
    });
}

#[test]
fn mathematics_is_graded_as_published() {
    let Some(golden) = goldens::json("eval/math_grading.json") else { return };
    for (name, written, least) in [("gsm8k", Written::Plain, 20), ("math500", Written::Latex, 24)] {
        compare(&golden[name], least, |case| {
            let text = |field: &str| case[field].as_str().unwrap();
            let grade = math::grade(text("response"), text("gold"), written);
            same(case, json!(grade.correct), &case["correct"])
                .map_err(|said| format!("{said}, from {:?}", grade.extracted))
        });
    }
}

#[test]
fn gold_answers_are_read_as_published() {
    let Some(golden) = goldens::json("eval/prompts.json") else { return };
    compare(&golden["mmlu_redux_answers"], 8, |case| {
        let text = |field: &str| case[field].as_str().unwrap_or("");
        let ours =
            items::mmlu_redux_gold(text("error_type"), text("correct_answer"), case["answer"].as_u64());
        same(case, json!(ours.map(|choice| letter(choice).to_string())), &case["parsed"])
    });
    compare(&golden["gsm8k_answers"], 6, |case| {
        same(case, json!(extract::final_number(case["answer"].as_str().unwrap(), true)), &case["parsed"])
    });
    let folder = tempfile::tempdir().unwrap();
    compare(&golden["mmmlu_answers"], 6, |case| {
        let row = json!({ "question": "q", "options": ["a", "b", "c", "d"], "answer": case["Answer"] });
        let path = folder.path().join("row.jsonl");
        fs::write(&path, row.to_string()).unwrap();
        let items = Items::load(&Task::find("mmlu_pro").unwrap(), &path).unwrap().items;
        let ours = items.first().map(|item| match item.gold {
            Gold::Choice(choice) => letter(choice).to_string(),
            _ => panic!("{:?}", item.gold),
        });
        same(case, json!(ours), &case["parsed"])
    });
}

/// Real files, where they are: nearly every question can be asked, and the rest is accounted for.
#[test]
fn real_data_can_be_asked() {
    let Some(data) = goldens::shared("data") else { return };
    let places = c2c::eval::Places::new(&[data.display().to_string()]);
    for (name, questions, usable) in [
        ("arc_challenge", 596, 590),
        ("arc_easy", 1164, 1150),
        ("openbookqa", 241, 241),
        ("mmlu_redux", 2888, 2853),
        ("ceval", 686, 680),
        ("gsm8k", 665, 665),
        ("leval", 500, 300),
    ] {
        let task = Task::find(name).unwrap();
        let Items { items, excluded } = Items::load(&task, &places.questions(&task).unwrap()).unwrap();
        assert!(items.len() >= usable, "{name}: {}, {:?}", items.len(), excluded.first());
        assert!(items.len() + excluded.len() >= questions, "{name}: {} + {}", items.len(), excluded.len());
        for file in task.train.iter().chain(&task.few_shot) {
            let more = Items::load(&task, &places.find(&task, file).unwrap()).unwrap();
            assert!(more.items.len() > 100, "{name}: {}", file.display());
        }
    }
}
