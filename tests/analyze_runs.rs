//! `analyze` as its user runs it: a process, its files, its errors, with the built-in pair. What comes out is held to what is known of it, or
//! to what `evaluate` says of the same questions.

use c2c::{
    align::LayerMapping,
    backend::{Precision, Queue},
    fuser::{Fuser, Kind},
    pipeline::Model,
};
use half::bf16;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

const EVALUATE: &str = env!("CARGO_BIN_EXE_evaluate");
const ANALYZE: &str = env!("CARGO_BIN_EXE_analyze");

fn run(program: &str, args: &[&str], out: &Path) -> Output {
    let mut command = Command::new(program);
    command.args(args).args(["--out", out.to_str().unwrap()]).env_remove("RUST_LOG");
    if args.first() != Some(&"tokenizers") {
        command.args(["--threads", "2"]);
    }
    command.output().unwrap()
}

/// Runs it and returns what it printed.
fn done(program: &str, args: &[&str], out: &Path) -> String {
    let output = run(program, args, out);
    assert!(output.status.success(), "{args:?}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs and expects a refusal that names all of `named`, and leaves no folder.
fn refused(args: &[&str], named: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let output = run(ANALYZE, args, &out);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && !told.contains("panicked"), "{args:?}\n{told}");
    assert!(told.contains("error: "), "{args:?}\n{told}");
    for name in named {
        assert!(told.contains(name), "{args:?}: `{told}` does not name `{name}`");
    }
    assert!(!out.exists(), "{args:?} left files");
}

/// The rows of a table by their heads.
struct Csv {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Csv {
    fn of(out: &Path, name: &str) -> Csv {
        let mut reader = csv::Reader::from_path(out.join(format!("{name}.csv"))).unwrap();
        let texts = |record: &csv::StringRecord| record.iter().map(String::from).collect();
        let head = texts(reader.headers().unwrap());
        let rows: Vec<Vec<String>> = reader.records().map(|record| texts(&record.unwrap())).collect();
        assert!(!rows.is_empty(), "{name} is empty");
        Csv { head, rows }
    }

    fn column(&self, name: &str) -> usize {
        self.head.iter().position(|head| head == name).unwrap_or_else(|| panic!("{name} in {:?}", self.head))
    }

    fn texts(&self, name: &str) -> Vec<&str> {
        let column = self.column(name);
        self.rows.iter().map(|row| row[column].as_str()).collect()
    }

    fn numbers(&self, name: &str) -> Vec<f64> {
        self.texts(name)
            .iter()
            .map(|text| text.parse().unwrap_or_else(|_| panic!("{name}: `{text}`")))
            .collect()
    }

    /// A cell of the row whose first cell is `row`.
    fn at(&self, row: &str, column: &str) -> &str {
        let column = self.column(column);
        let found = self.rows.iter().find(|cells| cells[0] == row);
        &found.unwrap_or_else(|| panic!("no row {row} in {:?}", self.rows))[column]
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn asset(name: &str) -> String {
    format!("{}/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Everything, on few questions: each figure and table is there, and the page needs nothing else.
#[test]
fn without_arguments_everything_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let printed = done(ANALYZE, &["--limit", "8"], &out);
    let (markdown, page) = (
        fs::read_to_string(out.join("report.md")).unwrap(),
        fs::read_to_string(out.join("report.html")).unwrap(),
    );
    for question in [
        "diagnose",
        "overlap",
        "rank",
        "attention",
        "gates",
        "weights",
        "layers",
        "oracle",
        "tsne",
        "tokenizers",
    ] {
        assert!(
            printed.contains(&format!("## {question}: ")) && page.contains(&format!("id=\"{question}\""))
        );
        let found = json(&out.join(format!("{question}.json")));
        assert_eq!(found["question"], question);
        for table in found["tables"].as_array().unwrap() {
            let name = table["name"].as_str().unwrap();
            let csv = Csv::of(&out, name);
            assert_eq!(csv.rows.len(), table["rows"].as_array().unwrap().len(), "{name}");
            assert!(markdown.contains(&format!("{name}.csv")), "{name}");
        }
    }
    let linked = markdown.split("](").skip(1).map(|rest| rest.split(')').next().unwrap());
    let linked: Vec<&str> = linked.collect();
    assert!(linked.iter().filter(|name| name.ends_with(".svg")).count() >= 10, "{linked:?}");
    for name in linked {
        let text = fs::read_to_string(out.join(name)).unwrap_or_else(|_| panic!("{name} is not there"));
        assert!(name.ends_with(".csv") || text.contains("<svg") && text.contains("</svg>"), "{name}");
    }
    // Nothing is fetched: the only address is the name of SVG.
    let page = page.replace("http://www.w3.org/2000/svg", "");
    for fetches in ["http", "src=", "url(", "@import", "<link", "<script"] {
        assert!(!page.contains(fetches), "{fetches}");
    }
}

/// Closed gates change nothing, whatever is looked at.
#[test]
fn closed_gates_leave_everything_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let out = |name: &str| folder.path().join(name);
    done(ANALYZE, &["attention", "--gates", "closed", "--limit", "4"], &out("attention"));
    let attention = Csv::of(&out("attention"), "attention");
    assert_eq!(attention.numbers("mean cosine"), [1.0; 3]);
    assert_eq!(attention.numbers("lowest"), [1.0; 3]);
    assert_eq!(attention.numbers("relative change"), [0.0; 3]);
    done(ANALYZE, &["rank", "--gates", "closed", "--limit", "4"], &out("rank"));
    let rank = Csv::of(&out("rank"), "rank");
    assert_eq!(rank.numbers("Receiver"), rank.numbers("fused"));
    assert_eq!(rank.numbers("projected"), [0.0; 6]);
    done(ANALYZE, &["diagnose", "--gates", "closed", "--limit", "10"], &out("diagnose"));
    let signs = Csv::of(&out("diagnose"), "diagnose");
    assert_eq!(signs.at("no gate is open", "found"), "yes");
    assert_eq!(signs.at("closed gates are not the Receiver", "found"), "no");
    assert_eq!(signs.at("accuracy below the Receiver's", "found"), "no");

    // Open, they do: layer 0 has the queries of before, and still says something else.
    done(ANALYZE, &["attention", "--limit", "4"], &out("open"));
    assert!(
        Csv::of(&out("open"), "attention").numbers("relative change").iter().all(|change| *change > 0.01)
    );
    done(ANALYZE, &["rank", "--limit", "20"], &out("open"));
    let rank = Csv::of(&out("open"), "rank");
    assert!(
        rank.numbers("Receiver").iter().chain(&rank.numbers("fused")).all(|rank| (2.0..32.0).contains(rank))
    );
    assert!(rank.numbers("Sharer").iter().all(|rank| (2.0..48.0).contains(rank)));
}

/// The same questions, asked by `evaluate`: who is right must agree, question by question.
#[test]
fn accuracies_are_those_of_evaluate() {
    let folder = tempfile::tempdir().unwrap();
    let out = |name: &str| folder.path().join(name);
    let evaluated = out("evaluated");
    done(EVALUATE, &["--limit", "40", "--modes", "receiver,sharer,c2c,c2c-open,t2t"], &evaluated);
    let summary = json(&evaluated.join("summary.json"));
    let right = |mode: &str| {
        let row = summary["rows"].as_array().unwrap().iter().find(|row| row["mode"] == mode).unwrap();
        row["correct"].to_string()
    };

    done(ANALYZE, &["overlap", "--limit", "40"], &out("asked"));
    done(ANALYZE, &["overlap", "--from", evaluated.to_str().unwrap()], &out("read"));
    let (asked, read) =
        (Csv::of(&out("asked"), "overlap_questions"), Csv::of(&out("read"), "overlap_questions"));
    assert_eq!(asked.rows, read.rows);
    let regions = Csv::of(&out("read"), "overlap");
    assert_eq!(regions.numbers("questions").iter().sum::<f64>(), 40.0);
    for mode in ["receiver", "sharer", "c2c"] {
        assert_eq!(read.numbers(mode).iter().sum::<f64>().to_string(), right(mode), "{mode}");
    }

    done(ANALYZE, &["layers", "--limit", "40", "--halves"], &out("layers"));
    let layers = Csv::of(&out("layers"), "layers");
    assert_eq!(layers.at("all closed", "right"), right("receiver"));
    assert_eq!(layers.at("as it is", "right"), right("c2c"));
    assert_eq!(layers.at("all open", "right"), right("c2c-open"));
    // Three layers: closed, open and learned, each alone and each left out, halves of each and of all.
    assert_eq!(layers.rows.len(), 3 + 6 + 6 + 2);

    // Nothing to enrich with is the plain Receiver in every row.
    done(ANALYZE, &["oracle", "--exemplars", "0", "--limit", "40"], &out("nothing"));
    for right_there in Csv::of(&out("nothing"), "oracle").texts("right") {
        assert_eq!(right_there, right("receiver"));
    }
    done(ANALYZE, &["oracle", "--background", "--limit", "40"], &out("oracle"));
    let oracle = Csv::of(&out("oracle"), "oracle_background");
    assert_eq!(oracle.at("plain", "right"), right("receiver"));
    // The Sharer's sentence in the context is text-to-text.
    assert_eq!(oracle.at("nothing dropped", "right"), right("t2t"));
    let tokens = Csv::of(&out("oracle"), "oracle_background_questions");
    assert!(tokens.numbers("dropped").iter().all(|dropped| *dropped > 10.0));
}

/// Weights of a text: one for each token, layer, half and head, of the words that were given.
#[test]
fn weights_belong_to_the_tokens_of_the_text() {
    let folder = tempfile::tempdir().unwrap();
    let text = "In which country is Grenoble: A Spain, B Poland, C Greece, D France?";
    done(ANALYZE, &["weights", "--text", text], folder.path());
    let weights = Csv::of(folder.path(), "weights");
    assert!(weights.numbers("weight").iter().all(|weight| (0.0..=1.0).contains(weight)));
    let mut spelled = String::new();
    let (tokens, words) = (weights.texts("token"), weights.texts("text"));
    for (at, word) in words.iter().enumerate() {
        if at == 0 || tokens[at] != tokens[at - 1] {
            spelled += word;
        }
    }
    let spelled = spelled.replace('␣', " ");
    assert!(
        text.starts_with(spelled.trim()) && spelled.contains("Grenoble") && spelled.contains("France"),
        "{spelled}"
    );
    let distinct = tokens.iter().collect::<std::collections::BTreeSet<_>>().len();
    // Three layers, keys and values, two heads.
    assert_eq!(weights.rows.len(), distinct * 3 * 2 * 2);

    done(ANALYZE, &["gates", "--limit", "5"], folder.path());
    let gates = Csv::of(folder.path(), "gates");
    assert_eq!(gates.rows.len(), 3 * 2 * 2);
    assert!(
        gates
            .numbers("logit")
            .iter()
            .zip(gates.numbers("gate"))
            .all(|(logit, gate)| (*logit > 0.0) == (gate == 1.0))
    );
}

/// What is wrong with a pair is found, and nothing else.
#[test]
fn each_signature_is_found_where_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let signs = |name: &str, args: &[&str]| {
        let out = folder.path().join(name);
        let mut all = vec!["diagnose", "--limit", "40"];
        all.extend(args);
        done(ANALYZE, &all, &out);
        Csv::of(&out, "diagnose")
    };
    let broken = [
        "the Sharer reads something else",
        "closed gates are not the Receiver",
        "accuracy below the Receiver's",
        "no gate is open",
        "gates open, weights near zero",
        "a gain that is no communication",
        "the Sharer knows no more than the Receiver",
    ];
    let found =
        |signs: &Csv| broken.into_iter().filter(|name| signs.at(name, "found") == "yes").collect::<Vec<_>>();
    assert!(found(&signs("healthy", &[])).is_empty());
    let foreign = signs("foreign", &["--alignment", "none"]);
    assert!(found(&foreign).contains(&broken[0]), "{}", foreign.at(broken[0], "evidence"));

    // The pair the other way round, with a fuser that was never trained and shouts: it spoils what the Receiver knows.
    let (knows, reads) = (asset("assets/pair/sharer"), asset("assets/pair/receiver"));
    let loud = folder.path().join("loud");
    untrained(&knows, &reads, &loud);
    set_biases(&loud, "value_proj_out.bias", 60.0);
    let loud = loud.to_str().unwrap();
    let spoilt =
        signs("spoilt", &["--receiver", &knows, "--sharer", &reads, "--fuser", loud, "--gates", "open"]);
    let evidence = spoilt.at(broken[2], "evidence");
    assert!(
        found(&spoilt).contains(&broken[2]) && evidence.contains("one layer open at a time"),
        "{evidence}"
    );
    assert!(found(&spoilt).contains(&broken[6]));

    // The trained one, its weights far below zero before they are squashed.
    let light = folder.path().join("light");
    fs::create_dir(&light).unwrap();
    for name in ["fuser.json", "fuser.safetensors"] {
        fs::copy(asset("assets/pair/fuser").to_owned() + "/" + name, light.join(name)).unwrap();
    }
    set_biases(&light, "scalar_head.bias", -60.0);
    let light = light.to_str().unwrap();
    let weighed = signs("weighed", &["--receiver", &reads, "--sharer", &knows, "--fuser", light]);
    assert_eq!(found(&weighed), [broken[4]]);
}

/// An untrained fuser in a folder.
fn untrained(receiver: &str, sharer: &str, folder: &Path) {
    let backend = c2c::backend::open(c2c::backend::DeviceChoice::Cpu, 2).unwrap();
    let load = |path: &str| Model::load(Path::new(path), &backend, Precision::F32, &|_, _| {}).unwrap();
    let (receiver, sharer) = (load(receiver), load(sharer));
    let config = receiver.fuser_config(&sharer, Kind::C2c, (32, 32), LayerMapping::LAST_ALIGNED);
    let fuser = Fuser::init(config, 1, &backend).unwrap();
    fuser.save(folder, &Queue::new(&backend).unwrap()).unwrap();
}

/// Sets all biases of a fuser's maps whose names end so.
fn set_biases(fuser: &Path, name: &str, value: f32) {
    let file = fuser.join("fuser.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let named: Vec<_> = metadata.tensors().into_iter().filter(|(tensor, _)| tensor.ends_with(name)).collect();
    assert!(!named.is_empty(), "{name}");
    for (_, info) in named {
        let place = 8 + header + info.data_offsets.0..8 + header + info.data_offsets.1;
        let number = match info.dtype {
            Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
            _ => value.to_le_bytes().to_vec(),
        };
        bytes[place].chunks_exact_mut(number.len()).for_each(|old| old.copy_from_slice(&number));
    }
    fs::write(file, bytes).unwrap();
}

#[test]
fn two_tokenizers_need_no_models() {
    let folder = tempfile::tempdir().unwrap();
    let out = |name: &str| folder.path().join(name);
    let (ours, theirs) = (asset("assets/pair/receiver"), asset("assets/pair/sharer/tokenizer.json"));
    let text = folder.path().join("text.txt");
    fs::write(&text, "In which country is Grenoble?\n\nIn which country is Paris?\n").unwrap();
    let text = text.to_str().unwrap();
    done(ANALYZE, &["tokenizers", &ours, &ours, "--text", text], &out("same"));
    let same = Csv::of(&out("same"), "tokenizers");
    assert_eq!(same.rows.len(), 6);
    for (column, value) in
        [("success, %", 100.0), ("one to one, %", 100.0), ("BLEU-4", 1.0), ("character error, %", 0.0)]
    {
        assert!(same.numbers(column).iter().all(|found| *found == value), "{column}");
    }
    let printed = done(ANALYZE, &["tokenizers", &ours, &theirs, "--text", text], &out("two"));
    assert!(printed.contains("receiver → sharer") && printed.contains("sharer → receiver"), "{printed}");
    let two = Csv::of(&out("two"), "tokenizers");
    let alignments = two.texts("alignment");
    assert_eq!(alignments, ["first", "longest", "span", "first", "longest", "span"]);
    // The Sharer's own tokenisation reads every character.
    assert_eq!(two.numbers("character error, %")[2], 0.0);
}

#[test]
fn what_cannot_be_analysed_is_refused_and_leaves_nothing() {
    refused(&["rank", "--limit", "0"], &["--limit"]);
    refused(
        &["tokenizers", "no/such/tokenizer.json", "neither.json"],
        &["no/such/tokenizer.json", "cannot read"],
    );
    let (pair, fuser) = (asset("tests/fixtures/pair"), asset("assets/pair/fuser"));
    let (receiver, sharer) = (format!("{pair}/receiver"), format!("{pair}/sharer"));
    refused(&["gates", "--receiver", &receiver, "--sharer", &sharer, "--fuser", &fuser], &["made for"]);
    refused(&["layers", "--task", "no_such_task"], &["no_such_task", "builtin"]);
    let folder = tempfile::tempdir().unwrap();
    refused(
        &["overlap", "--from", folder.path().to_str().unwrap()],
        &["no receiver answers", "--modes receiver,sharer,c2c"],
    );
    let task = folder.path().join("open.toml");
    let data: PathBuf = folder.path().join("open.jsonl");
    fs::write(&data, "{\"question\": \"Where is Grenoble?\", \"answer\": \"in France\"}\n").unwrap();
    fs::write(&task, format!("file = {data:?}\nscoring = \"text\"\nmethod = \"generate\"\n")).unwrap();
    refused(&["layers", "--task", task.to_str().unwrap()], &["layers", "no choices"]);
    refused(&["weights", "--text", ""], &["fused"]);
    let empty = folder.path().join("empty.txt");
    fs::write(&empty, "\n \n").unwrap();
    let tokenizer = asset("assets/pair/receiver");
    refused(&["tokenizers", &tokenizer, &tokenizer, "--text", empty.to_str().unwrap()], &["no line of text"]);
}
