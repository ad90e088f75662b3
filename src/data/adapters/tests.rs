use super::*;
use crate::data::{Origin, Place};
use serde_json::json;

fn read(adapter: Adapter, fields: Value) -> Result<Example, BadRow> {
    let fields = fields.as_object().unwrap().clone();
    adapter.example(Row { fields, origin: Origin::new("x", Place::Line(1)) }, PromptStyle::Plain)
}

fn answer(adapter: Adapter, fields: Value) -> usize {
    read(adapter, fields).unwrap().question.unwrap().answer
}

fn reason(adapter: Adapter, fields: Value) -> Reason {
    read(adapter, fields).unwrap_err().reason
}

#[test]
fn names_in_any_spelling() {
    for adapter in Adapter::ALL {
        for name in adapter.aliases().iter().chain([&adapter.name()]) {
            assert_eq!(name.to_uppercase().parse::<Adapter>().unwrap(), adapter);
        }
        let choice = AdapterChoice::Named(adapter);
        assert_eq!(choice.to_string().parse::<AdapterChoice>().unwrap(), choice);
    }
    assert_eq!("MMLU_CoT".parse::<Adapter>().unwrap(), Adapter::MmluCot);
    assert_eq!("Auto".parse::<AdapterChoice>().unwrap(), AdapterChoice::Auto);
    let error = "openherms".parse::<AdapterChoice>().unwrap_err().to_string();
    assert!(error.contains("openherms") && error.contains("openhermes, mmlu"), "{error}");
}

#[test]
fn detected_by_fields() {
    for (adapter, fields) in [
        (Adapter::OpenHermes, vec!["conversations", "source", "id"]),
        (Adapter::Mmlu, vec!["question", "subject", "choices", "answer"]),
        (Adapter::MmluCot, vec!["question", "chain_of_thoughts", "answer"]),
        (Adapter::Mmmlu, vec!["Question", "A", "B", "C", "D", "Answer", "Subject"]),
        (Adapter::OpenBookQa, vec!["id", "question_stem", "choices", "answerKey"]),
        (Adapter::Arc, vec!["id", "question", "choices", "answerKey"]),
        (Adapter::Alpaca, vec!["instruction", "input", "output", "text"]),
        (Adapter::Alpaca, vec!["id", "instruction", "input", "response"]),
        (Adapter::Dolly, vec!["instruction", "context", "response", "category"]),
        (Adapter::Dolly, vec!["instruction", "response"]),
        (Adapter::LongBench, vec!["input", "context", "answers", "length", "_id"]),
        (Adapter::LlmGenerated, vec!["id", "input_text", "model_reasoning", "model_response"]),
        (Adapter::Messages, vec!["messages"]),
        (Adapter::Choices, vec!["id", "subject", "question", "choices", "answer_index", "split"]),
    ] {
        let row = fields.iter().map(|name| ((*name).to_owned(), Value::Null)).collect();
        assert_eq!(Adapter::detect(&row), Ok(adapter), "{fields:?}");
    }
    let row = ["messages", "conversations"].map(|name| (name.to_owned(), Value::Null)).into_iter().collect();
    let error = Adapter::detect(&row).unwrap_err().to_string();
    assert!(error.contains("openhermes or messages"), "{error}");
}

#[test]
fn answers_by_index_letter_and_label() {
    let mmlu = |answer| json!({"question": "q", "choices": ["a", "b", "c"], "answer": answer});
    for given in [json!(2), json!("2"), json!("C"), json!("c")] {
        assert_eq!(answer(Adapter::Mmlu, mmlu(given)), 2);
    }
    for given in [json!(3), json!(-1), json!(1.5), json!("D"), json!("")] {
        assert_eq!(reason(Adapter::Mmlu, mmlu(given)), Reason::AnswerOutside);
    }
    let arc = |labels: Value, key: &str| json!({"question": "q", "choices": {"text": ["a", "b", "c"], "label": labels}, "answerKey": key});
    assert_eq!(answer(Adapter::Arc, arc(json!(["A", "B", "C"]), "C")), 2);
    assert_eq!(answer(Adapter::Arc, arc(json!(["1", "2", "3"]), "3")), 2);
    assert_eq!(reason(Adapter::Arc, arc(json!(["1", "2", "3"]), "C")), Reason::AnswerOutside);
    assert!(matches!(
        reason(Adapter::Arc, arc(json!(["1", "2"]), "1")),
        Reason::Type { field: "choices", .. }
    ));
    // The authors' own files.
    let choices = json!([{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]);
    let own = json!({"id": "7", "question": {"stem": "q", "choices": choices}, "answerKey": "B"});
    for adapter in [Adapter::Arc, Adapter::OpenBookQa] {
        let example = read(adapter, own.clone()).unwrap();
        assert_eq!(example.messages[0].content, "Question: q\n\nChoices:\nA. a\nB. b");
        assert_eq!((example.question.unwrap().answer, example.id.as_deref()), (1, Some("7")));
    }
}

#[test]
fn choices_are_two_to_twenty_six() {
    let with = |n: usize| json!({"question": "q", "choices": vec!["x"; n], "answer_index": 0});
    for n in [0, 1, 27] {
        assert_eq!(reason(Adapter::Choices, with(n)), Reason::ChoiceCount);
    }
    for n in [2, 26] {
        assert_eq!(answer(Adapter::Choices, with(n)), 0);
    }
}

#[test]
fn a_context_comes_before_its_question() {
    let row = json!({"context": "c", "question": "q", "choices": ["no", "yes"], "answer_index": 1});
    let fields = row.as_object().unwrap().clone();
    let row = Row { fields, origin: Origin::new("x", Place::Line(1)) };
    let example = Adapter::Choices.example(row, PromptStyle::Template).unwrap();
    let prompt = &example.messages[0].content;
    assert!(prompt.starts_with("Accurately answer the following question:\n\nc\n\nq\n\nChoices:\nA. no\n"));
    assert!(prompt.ends_with("\n\nThe correct answer is"));
    assert_eq!(example.messages[1].content, "The correct answer is B.");
}

#[test]
fn instructions_with_their_inputs() {
    let alpaca = |input: Value| json!({"instruction": "do ", "input": input, "output": " done"});
    let messages = |fields| read(Adapter::Alpaca, fields).unwrap().messages;
    assert_eq!(messages(alpaca(json!("this")))[0].content, "do\n\nthis");
    for nothing in [json!(""), json!(null), json!(" ")] {
        assert_eq!(messages(alpaca(nothing))[0].content, "do");
    }
    assert_eq!(messages(alpaca(json!("")))[1].content, "done");
    assert_eq!(messages(json!({"instruction": "i", "input": "", "response": "r"}))[1].content, "r");
    let wrong = Reason::Type { field: "input", expected: "a text" };
    assert_eq!(reason(Adapter::Alpaca, alpaca(json!(3))), wrong);
}

#[test]
fn conversations_end_with_an_answer() {
    let say = |role: &str, text: &str| json!({"role": role, "content": text});
    for list in [
        json!([]),
        json!([say("user", "q")]),
        json!([say("assistant", "a")]),
        json!([say("user", "q"), say("assistant", " ")]),
        json!([say("user", "q"), say("assistant", "a"), say("user", "q")]),
    ] {
        assert_eq!(reason(Adapter::Messages, json!({"messages": list.clone()})), Reason::NoAnswer);
        assert_eq!(reason(Adapter::OpenHermes, json!({"conversations": list})), Reason::NoAnswer);
    }
    let good = json!([say("system", "s"), say("user", " q "), say("assistant", "a")]);
    let kept = read(Adapter::Messages, json!({"messages": good.clone()})).unwrap().messages;
    assert_eq!(serde_json::to_value(kept).unwrap(), good);
    let fields = json!({"messages": [say("narrator", "x"), say("assistant", "a")]});
    assert_eq!(reason(Adapter::Messages, fields), Reason::Speaker);
    let fields = json!({"conversations": [{"from": "function", "value": "x"}]});
    let error = read(Adapter::OpenHermes, fields).unwrap_err();
    assert_eq!(
        error.to_string(),
        "x:1: has a speaker that is neither system, user nor assistant: `function`"
    );
}

#[test]
fn what_is_missing_is_named() {
    assert_eq!(reason(Adapter::Dolly, json!({"instruction": "i"})), Reason::Missing("response"));
    assert_eq!(reason(Adapter::MmluCot, json!({"question": " "})), Reason::Empty("question"));
    assert_eq!(reason(Adapter::Choices, json!({"choices": null})), Reason::Empty("choices"));
    let wrong = Reason::Type { field: "choices", expected: "a list" };
    assert_eq!(reason(Adapter::Choices, json!({"choices": "a"})), wrong);
    let wrong = Reason::Type { field: "choices", expected: "a list of texts" };
    assert_eq!(reason(Adapter::Choices, json!({"choices": ["a", null]})), wrong);
}
