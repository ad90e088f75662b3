//! Chat templates against Python's Jinja as Hugging Face sets it up.

use c2c::tokenizer::{ChatTemplate, Error, Message, TemplateOptions};
use serde_json::{Value, json};

fn template(source: &str) -> Result<ChatTemplate, Error> {
    ChatTemplate::new(source, [("bos_token".into(), "<s>".into())], "some/tokenizer_config.json")
}

fn render(source: &str, messages: &[Message], options: &TemplateOptions) -> String {
    template(source).unwrap().render(messages, options).unwrap()
}

/// `fixtures/jinja.json`: snippets and what jinja2 3.1 renders them to (null: it raises).
#[test]
fn same_text_as_jinja2() {
    let fixture: Value = serde_json::from_str(include_str!("fixtures/jinja.json")).unwrap();
    let messages: Vec<Message> = serde_json::from_value(fixture["messages"].clone()).unwrap();
    let options = TemplateOptions {
        add_generation_prompt: true,
        extra: fixture["context"].as_object().unwrap().clone(),
        ..Default::default()
    };
    let mut wrong = Vec::new();
    for case in fixture["cases"].as_array().unwrap() {
        let (source, expected) = (case[0].as_str().unwrap(), case[1].as_str());
        let text = template(source).and_then(|template| template.render(&messages, &options));
        if text.as_ref().ok().map(String::as_str) != expected {
            wrong.push(format!("{source}\n  {text:?}\n  {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn thinking_is_said_only_where_asked() {
    let source = "{{ enable_thinking is defined }} {{ enable_thinking }}";
    let with = |enable_thinking| TemplateOptions { enable_thinking, ..Default::default() };
    assert_eq!(render(source, &[], &with(None)), "False ");
    assert_eq!(render(source, &[], &with(Some(false))), "True False");
}

#[test]
fn generation_tags_render_their_body() {
    let source = "{% for m in messages %}{%- generation %}{{ m.content }}{% endgeneration -%}  {% endfor %}";
    assert_eq!(render(source, &[Message::new("assistant", "ok")], &TemplateOptions::default()), "ok");
}

#[test]
fn today_by_strftime() {
    let year = render("{{ strftime_now('%Y') }}", &[], &TemplateOptions::default());
    assert_eq!(year, chrono::Local::now().format("%Y").to_string());
    let broken = template("{{ strftime_now('%Q!') }}").unwrap().render(&[], &TemplateOptions::default());
    assert!(broken.unwrap_err().to_string().contains("%Q!"));
}

#[test]
fn human_assistant_as_published() {
    let messages =
        [Message::new("user", "Hi"), Message::new("assistant", "Hello"), Message::new("user", "Bye")];
    let text = ChatTemplate::human_assistant()
        .render(&messages, &TemplateOptions { add_generation_prompt: true, ..Default::default() })
        .unwrap();
    assert_eq!(text, "### Human: Hi\n    ### Assistant: Hello\n    ### Human: Bye\n    ### Assistant:");
}

#[test]
fn messages_keep_their_other_fields() {
    let text = r#"[{"role":"assistant","content":null,"tool_calls":[{"name":"f"}]},{"role":"tool"}]"#;
    let messages: Vec<Message> = serde_json::from_str(text).unwrap();
    assert_eq!(messages[0].content, "");
    assert_eq!(serde_json::to_value(&messages[0]).unwrap()["tool_calls"], json!([{"name": "f"}]));
    let source = "{% for m in messages %}{{ m.tool_calls[0].name if m.tool_calls }};{% endfor %}";
    assert_eq!(render(source, &messages, &TemplateOptions::default()), "f;;");
    assert!(serde_json::from_str::<Message>(r#"{"content":"no role"}"#).is_err());
}

#[test]
fn errors_name_the_file_and_the_reason() {
    for broken in ["{% if %}", "{% for m in messages %}", "{{ x ", "{% nonsense %}", "{{ 1 | nofilter }}"] {
        let error = match template(broken) {
            Err(error) => error,
            Ok(template) => template.render(&[], &TemplateOptions::default()).unwrap_err(),
        };
        assert!(error.to_string().contains("some/tokenizer_config.json"), "{error}");
    }
    let refusal = template("{{ raise_exception('roles must alternate') }}").unwrap();
    let error = refusal.render(&[], &TemplateOptions::default()).unwrap_err();
    assert!(
        matches!(error, Error::TemplateRender { .. }) && error.to_string().contains("roles must alternate")
    );
    for endless in
        ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(100000000) | list | length }}"]
    {
        assert!(template(endless).unwrap().render(&[], &TemplateOptions::default()).is_err(), "{endless}");
    }
}
