//! Data files of every format, good and bad.

use c2c::data::{
    Adapter, AdapterChoice, Dataset, FileError, LoadError, Place, Problem, PromptStyle, Source, reader,
};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data").join(name)
}

fn source(path: impl AsRef<Path>) -> Source {
    let path = path.as_ref().into();
    Source { path, adapter: AdapterChoice::Auto, prompt: PromptStyle::Plain, ids: None, limit: None }
}

/// The rows of a file with this content: fields and place, or what is wrong.
fn rows(name: &str, content: impl AsRef<[u8]>) -> Vec<Result<(Value, Place), String>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    let without_folder =
        |problem: Problem| problem.to_string().replace(&format!("{}/", folder.path().display()), "");
    let mut rows = match reader::rows(&path) {
        Ok(rows) => rows,
        Err(error) => return vec![Err(without_folder(error.into()))],
    };
    let read = rows.by_ref().map(|row| match row {
        Ok(row) => Ok((Value::Object(row.fields), row.origin.place)),
        Err(problem) => Err(without_folder(problem)),
    });
    let read = read.collect();
    assert!(rows.next().is_none(), "the end is the end");
    read
}

#[test]
fn json_lines_go_on_after_a_bad_line() {
    let text = "\u{feff}{\"a\": 1}\n\n  \t\n[1]\r\n{\"a\": \n{\"a\": \"\u{e9}\"}\r\n{\"a\": 3}";
    assert_eq!(
        rows("x.jsonl", text),
        [
            Ok((json!({"a": 1}), Place::Line(1))),
            Err("x.jsonl:4: is no object with fields".into()),
            Err("x.jsonl:5: cannot be read: EOF while parsing a value at line 2 column 0".into()),
            Ok((json!({"a": "é"}), Place::Line(6))),
            Ok((json!({"a": 3}), Place::Line(7))),
        ]
    );
    let mut bytes = b"{\"a\": \"".to_vec();
    bytes.extend([0xff, b'"', b'}', b'\n']);
    bytes.extend(b"{\"a\": 2}");
    let read = rows("x.ndjson", bytes);
    assert!(read[0].as_ref().unwrap_err().starts_with("x.ndjson:1: cannot be read"), "{read:?}");
    assert_eq!(read[1], Ok((json!({"a": 2}), Place::Line(2))));
}

#[test]
fn json_in_all_its_forms() {
    let two = [Ok((json!({"a": 1, "b": [1, {"c": -2.5}]}), Place::Row(1))), Ok((json!({}), Place::Row(2)))];
    for text in [
        "[{\"a\": 1, \"b\": [1, {\"c\": -2.5}]}, {}]",
        "\u{feff} [ {\"a\":1,\"b\":[1,{\"c\":-2.5}]} ,\n {} ]\n",
        "{\"version\": 1, \"data\": [{\"a\": 1, \"b\": [1, {\"c\": -2.5}]}, {}], \"license\": -1}",
        "{\"data\":[{\"a\":1,\"b\":[1,{\"c\":-2.5}]},{}]}",
        "{\"a\": 1, \"b\": [1, {\"c\": -2.5}]}\n{}\n",
        "{\"a\":1,\"b\":[1,{\"c\":-2.5}]}{}",
    ] {
        assert_eq!(rows("x.json", text), two, "{text}");
    }
    assert_eq!(rows("x.json", "[]"), []);
    assert_eq!(rows("x.json", ""), []);
    assert_eq!(rows("x.json", "[1, 22,{}]")[1], Err("x.json, row 2: is no object with fields".into()));
    assert_eq!(rows("x.json", "[1, 22,{}]")[2], Ok((json!({}), Place::Row(3))));
}

#[test]
fn broken_json_names_the_row_and_ends() {
    for (text, good, problem) in [
        ("[{\"a\": 1}, {\"a\": }]", 1, "row 2: expected value"),
        ("[{\"a\": 1} {\"a\": 2}]", 1, "row 2: expected `,` or `]` after an element, found `{`"),
        ("[{\"a\": 1}, ", 1, "row 2: EOF while parsing a value"),
        ("[{\"a\": 1}", 1, "row 2: expected `,` or `]` after an element, but the file ends"),
        ("{\"data\": [{}], \"b\" 1}", 1, "row 2: expected `:`, found `1`"),
        ("{\"data\": [{}]", 1, "row 2: expected `,` or `}` after a member, but the file ends"),
        ("{\"a\": 1", 0, "row 1: expected `,` or `}` after a member, but the file ends"),
        ("question,answer\n", 0, "row 1: expected a list or an object, found `q`"),
        ("[{\"a\": \"\u{1}\"}]", 0, "row 1: control character"),
    ] {
        let read = rows("x.json", text);
        assert_eq!(read.len(), good + 1, "{text}: {read:?}");
        let error = read[good].as_ref().unwrap_err();
        assert!(error.contains(problem), "{error} should say {problem}");
    }
}

#[test]
fn csv_by_name_with_its_lines() {
    let text = b"question,choices,answer\n\"a, or\nb?\",\"[\"\"x\"\", \"\"y\"\"]\",1\nshort,row\nc?,\xff,0\nd?,e,0\n";
    let read = rows("x.csv", text);
    assert_eq!(
        read[0],
        Ok((json!({"question": "a, or\nb?", "choices": "[\"x\", \"y\"]", "answer": "1"}), Place::Line(2)))
    );
    assert_eq!(read[1], Err("x.csv:4: cannot be read: 2 values for 3 columns".into()));
    assert_eq!(read[2], Err("x.csv:5: cannot be read: column `choices` is not UTF-8".into()));
    assert_eq!(read[3], Ok((json!({"question": "d?", "choices": "e", "answer": "0"}), Place::Line(6))));
    assert_eq!(read.len(), 4);
    let tabs = rows("x.tsv", "\u{feff}a\tb\n1\t2,3\n");
    assert_eq!(tabs, [Ok((json!({"a": "1", "b": "2,3"}), Place::Line(2)))]);
}

#[test]
fn parquet_with_every_codec() {
    for codec in ["snappy", "zstd", "gzip", "none"] {
        let path = fixture(&format!("openhermes.{codec}.parquet"));
        let read: Vec<_> = reader::rows(&path).unwrap().map(|row| row.unwrap()).collect();
        assert_eq!(read.len(), 7, "{codec}");
        assert_eq!(
            Value::Object(read[1].fields.clone()),
            json!({
                "conversations": [
                    {"from": "system", "value": "Be brief.", "weight": null},
                    {"from": "human", "value": " Question 1? ", "weight": 0.0},
                    {"from": "gpt", "value": "Answer 1.", "weight": 1.0},
                ],
                "source": null,
                "idx": 1,
            }),
            "{codec}"
        );
        assert_eq!(read[4].fields["conversations"], json!([]), "{codec}");
        assert_eq!(read[5].fields["conversations"], Value::Null, "{codec}");
        assert_eq!(read[6].origin.place, Place::Row(7), "{codec}");

        let data = Dataset::load(&source(&path)).unwrap();
        assert_eq!((data.adapter, data.examples.len(), data.rejected.count()), (Adapter::OpenHermes, 5, 2));
        assert_eq!(data.examples[4].messages[0].content, "Question 6?");
        assert!(
            data.rejected.to_string().contains(&format!("openhermes.{codec}.parquet, row 5")),
            "{}",
            data.rejected
        );
    }
}

#[test]
fn parquet_with_lists_and_groups() {
    let data = Dataset::load(&source(fixture("mmlu.parquet"))).unwrap();
    assert_eq!(data.adapter, Adapter::Mmlu);
    let question = data.examples[0].question.as_ref().unwrap();
    assert_eq!(
        (question.choices.as_slice(), question.answer),
        (["3", "4", "5", "22"].map(String::from).as_slice(), 1)
    );
    assert_eq!(data.examples[1].subject.as_deref(), Some("food"));
    assert_eq!(data.examples[1].messages[1].content, "The correct answer is A.");

    let data = Dataset::load(&source(fixture("arc.parquet"))).unwrap();
    assert_eq!(data.adapter, Adapter::Arc);
    assert_eq!(data.examples[0].messages[1].content, "The correct answer is B.");
    // Choices labelled by numbers have letters as the others do.
    assert_eq!(data.examples[1].messages[1].content, "The correct answer is A.");
    assert_eq!(data.examples[1].id.as_deref(), Some("NYSEDREGENTS_1"));
}

/// Whatever is wrong with a file, there is an error or a row, no panic.
#[test]
fn broken_parquet_is_an_error() {
    assert!(rows("x.parquet", b"PAR1 is no file PAR1")[0].as_ref().unwrap_err().contains("x.parquet"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    let (mut errors, mut runs) = (0, 0);
    for name in
        ["openhermes.snappy.parquet", "openhermes.zstd.parquet", "openhermes.none.parquet", "arc.parquet"]
    {
        let good = fs::read(fixture(name)).unwrap();
        for position in (0..good.len()).step_by(7) {
            let mut bad = good.clone();
            bad[position] ^= 1 << (position % 8);
            fs::write(&path, &bad).unwrap();
            runs += 1;
            match reader::rows(&path) {
                Ok(rows) => errors += usize::from(rows.take(100).any(|row| row.is_err())),
                Err(_) => errors += 1,
            }
        }
        for length in (0..good.len()).step_by(101) {
            fs::write(&path, &good[..length]).unwrap();
            assert!(reader::rows(&path).unwrap().any(|row| row.is_err()), "{name} cut at {length}");
        }
    }
    assert!(errors > runs / 10, "{errors} of {runs}");
}

#[test]
fn a_folder_is_its_files_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    file("part-01.csv", "question,answer_index,choices\nq2,0,\"[\"\"a\"\",\"\"b\"\"]\"\n");
    file("part-00.jsonl", "{\"question\": \"q1\", \"choices\": [\"a\", \"b\"], \"answer_index\": 1}\n");
    file("dataset_info.json", "{}");
    file(".hidden.jsonl", "{}");
    file("README.md", "# no data");
    let data = Dataset::load(&source(folder.path())).unwrap();
    let asked: Vec<_> =
        data.examples.iter().map(|x| x.question.as_ref().unwrap().question.as_str()).collect();
    assert_eq!(asked, ["q1", "q2"]);
    assert!(data.rejected.is_empty());

    let hash = data.sha256.clone();
    assert_eq!(hash.len(), 64);
    assert_eq!(Dataset::load(&Source { limit: Some(1), ..source(folder.path()) }).unwrap().sha256, hash);
    file("part-01.csv", "question,answer_index,choices\nq3,0,\"[\"\"a\"\",\"\"b\"\"]\"\n");
    assert_ne!(Dataset::load(&source(folder.path())).unwrap().sha256, hash);
}

#[test]
fn limits_count_examples() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.jsonl");
    let rows = (0..10).map(|i| match i % 2 {
        0 => "{\"instruction\": \"\", \"output\": \"o\"}\n".to_owned(),
        _ => format!("{{\"instruction\": \"i{i}\", \"output\": \"o\"}}\n"),
    });
    fs::write(&path, rows.collect::<String>()).unwrap();
    let data = Dataset::load(&Source { limit: Some(2), ..source(&path) }).unwrap();
    assert_eq!(data.examples.len(), 2);
    assert_eq!(data.examples[1].messages[0].content, "i3");
    assert_eq!(data.rejected.to_string().matches("x.jsonl:").count(), 2);
}

#[test]
fn rows_by_their_ids() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let row = |id: &str| {
        let output = id.trim_matches('"');
        format!("{{\"id\": {id}, \"instruction\": \"i\", \"output\": \"{output}\"}}\n")
    };
    let rows: String = ["\"a-1\"", "\"a-2\"", "3", "\"a-4\""].map(row).concat();
    let data = file("x.jsonl", &format!("{rows}{{\"instruction\": \"i\", \"output\": \"no id\"}}\n"));
    let ids = Some(file("ids.txt", "a-4\n 3 \nof another file\na-1\n"));
    let chosen = Dataset::load(&Source { ids, ..source(&data) }).unwrap();
    let answers: Vec<_> = chosen.examples.iter().map(|x| x.messages[1].content.as_str()).collect();
    assert_eq!(answers, ["a-1", "3", "a-4"]);
    assert!(chosen.rejected.is_empty());
    assert_ne!(chosen.sha256, Dataset::load(&source(&data)).unwrap().sha256);

    let refused = |ids| Dataset::load(&Source { ids: Some(ids), ..source(&data) }).unwrap_err();
    assert!(matches!(refused(file("none.txt", "b\n")), LoadError::Nothing { .. }));
    let missing = folder.path().join("missing.txt");
    assert!(refused(missing.clone()).to_string().starts_with(&missing.display().to_string()));
}

#[test]
fn what_cannot_be_used_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let error = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        Dataset::load(&source(&path)).unwrap_err()
    };
    assert!(matches!(error("a.txt", ""), LoadError::File(FileError::Format { .. })));
    assert!(matches!(error("a.jsonl", ""), LoadError::Nothing { .. }));
    let unknown = error("b.jsonl", "{\"foo\": 1, \"bar\": 2}").to_string();
    for word in ["b.jsonl", "foo, bar", "openhermes", "choices"] {
        assert!(unknown.contains(word), "{unknown}");
    }
    let nothing = error("c.jsonl", "{\"messages\": []}\n{\"messages\": 3}\n").to_string();
    for word in ["no row can be used", "c.jsonl:1", "c.jsonl:2", "does not end with"] {
        assert!(nothing.contains(word), "{nothing}");
    }
    let missing = Dataset::load(&source(folder.path().join("none.jsonl"))).unwrap_err().to_string();
    assert!(missing.contains("none.jsonl"), "{missing}");
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(Dataset::load(&source(empty.path())), Err(LoadError::File(FileError::NoFiles { .. }))));
}
