//! The doctor's findings on pairs that fit, that do not, and that are not there.

use c2c::{
    align::Alignment,
    builtin,
    fuser::GateOverride,
    pipeline::FuserChoice,
    serve::doctor::{Checkup, Pair, Verdict, examine},
};
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pair").join(name)
}

fn checkup(receiver: &Path, sharer: &Path, fuser: &FuserChoice, alignment: Alignment) -> Checkup {
    let gates = &GateOverride::Learned;
    examine(&Pair { receiver, sharer, fuser, alignment, gates }).expect("there is a CPU")
}

fn failing(checkup: &Checkup) -> Vec<&str> {
    let items = checkup.sections.iter().flat_map(|section| &section.items);
    items.filter(|item| item.verdict == Verdict::Fails).map(|item| item.name.as_str()).collect()
}

#[test]
fn the_builtin_pair_fits() {
    let fuser = FuserChoice::Load(builtin::path("fuser"));
    let found = checkup(&builtin::path("receiver"), &builtin::path("sharer"), &fuser, Alignment::Span);
    assert!(failing(&found).is_empty(), "{found}");
    let text = found.to_string();
    for said in ["receiver.kv_heads", "chat template", "open gates", "tokens of a question that are fused"] {
        assert!(text.contains(said), "{text}");
    }
    assert!(text.ends_with("can work.") || text.contains("see the notes"), "{text}");
}

#[test]
fn a_fuser_of_another_pair_is_told_item_by_item() {
    let fuser = FuserChoice::Load(builtin::path("fuser"));
    let swapped = checkup(&builtin::path("sharer"), &builtin::path("receiver"), &fuser, Alignment::Span);
    let failing = failing(&swapped);
    assert!(failing.contains(&"receiver.config") && failing.contains(&"sharer.config"), "{swapped}");
    assert!(swapped.to_string().contains("FAIL  receiver.config"), "{swapped}");
    assert!(swapped.to_string().ends_with("see FAIL above."), "{swapped}");
}

#[test]
fn what_is_missing_is_said_and_the_rest_is_looked_at() {
    let init = FuserChoice::Init { seed: 0 };
    let gone = checkup(&fixture("receiver"), Path::new("no/such/model"), &init, Alignment::Span);
    assert_eq!(failing(&gone), ["family", "tokenizer"], "{gone}");
    assert!(gone.to_string().contains("no/such/model"), "{gone}");

    let no_fuser = FuserChoice::Load("no/such/fuser".into());
    let found = checkup(&fixture("receiver"), &fixture("sharer"), &no_fuser, Alignment::Span);
    assert_eq!(failing(&found), ["weights"], "{found}");

    let untrained = checkup(&fixture("receiver"), &fixture("sharer"), &init, Alignment::Span);
    assert_eq!(untrained.verdict(), Verdict::Note, "{untrained}");
}

#[test]
fn ids_that_mean_something_else_fail() {
    let init = FuserChoice::Init { seed: 0 };
    let found = checkup(&fixture("receiver"), &fixture("sharer"), &init, Alignment::None);
    assert_eq!(failing(&found), ["characters read wrongly"], "{found}");
}
