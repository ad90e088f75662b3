//! Kernels' arguments are structs with a twin on each side. Every field of a struct in `kernels/` lies in its twin in Rust under the
//! same name, with the same type, at the same offset. (That compilers give a kernel's whole struct the same size is tested in
//! `backend::cuda::launch`.)
//!
//! Both languages lay structs out by C's rules, so offsets follow from the sources.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Name, type, elements of an array (1: none).
type Field = (String, String, usize);
type Structs = BTreeMap<String, Vec<Field>>;

/// A plain field in memory: path, type, offset, elements.
type Place = (String, String, usize, usize);

/// A struct's plain fields, its size and alignment.
fn layout(structs: &Structs, name: &str) -> (Vec<Place>, usize, usize) {
    let (mut all, mut end, mut most) = (Vec::new(), 0usize, 1);
    for (field, ty, count) in &structs[name] {
        let (inner, bytes, align) = match ty.as_str() {
            "u32" | "f32" => (None, 4, 4),
            "u64" | "f64" => (None, 8, 8),
            other => {
                assert!(structs.contains_key(other), "`{name}.{field}` has the type `{other}`");
                let (inner, bytes, align) = layout(structs, other);
                (Some(inner), bytes, align)
            }
        };
        let at = end.next_multiple_of(align);
        match inner {
            None => all.push((field.clone(), ty.clone(), at, *count)),
            Some(inner) => {
                // An op's parameters are fields of their own in the kernel's struct.
                let path = if ty.ends_with("Params") { String::new() } else { format!("{field}.") };
                all.extend(
                    inner
                        .into_iter()
                        .map(|(name, ty, offset, count)| (format!("{path}{name}"), ty, at + offset, count)),
                );
            }
        }
        end = at + bytes * count;
        most = most.max(align);
    }
    (all, end.next_multiple_of(most), most)
}

/// The files of a folder with one of the extensions, and below it.
fn files(folder: &str, extensions: &[&str]) -> Vec<PathBuf> {
    let mut all = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let fits = path.extension().is_some_and(|extension| extensions.iter().any(|e| extension == *e));
            match (path.is_dir(), fits) {
                (true, _) => folders.push(path),
                (false, true) => all.push(path),
                (false, false) => {}
            }
        }
    }
    all
}

/// Sizes of arrays, by name.
fn length(text: &str) -> usize {
    if text.trim() == "PARTS" { 3 } else { text.trim().parse().unwrap_or_else(|_| panic!("[{text}]")) }
}

/// `struct Name {` … `}` of a file, without comments: those that `wanted` picks.
fn bodies<'a>(
    text: &'a str,
    wanted: impl Fn(&str) -> bool + 'a,
) -> impl Iterator<Item = (String, String)> + 'a {
    let starts: Vec<usize> = text.match_indices("struct ").map(|(at, word)| at + word.len()).collect();
    starts.into_iter().filter_map(move |at| {
        let (name, rest) = text[at..].split_once(" {\n")?;
        let body = rest.split_once("\n}")?.0;
        let plain = body.lines().map(|line| line.split("//").next().unwrap_or_default());
        let is_name = name.chars().all(|c| c.is_alphanumeric() || c == '_');
        (is_name && wanted(&text[..at])).then(|| (name.to_string(), plain.collect::<Vec<_>>().join("\n")))
    })
}

fn rust() -> Structs {
    let mut structs = Structs::new();
    for path in files("src/backend/cuda", &["rs"]).into_iter().chain(files("src/ops", &["rs"])) {
        let text = fs::read_to_string(&path).unwrap();
        let is_c = |before: &str| {
            let attributes = before.rsplit("\n\n").next().unwrap_or_default();
            attributes.contains("#[repr(C)]")
        };
        for (name, body) in bodies(&text, is_c) {
            let fields = body.lines().filter_map(|line| line.trim().trim_end_matches(',').split_once(": "));
            let fields = fields.map(|(name, ty)| {
                let name = name.rsplit(' ').next().unwrap_or(name).to_string();
                match ty.trim_matches(['[', ']']).split_once("; ") {
                    Some((ty, n)) => (name, ty.to_string(), length(n)),
                    None => (name, ty.to_string(), 1),
                }
            });
            structs.insert(name, fields.collect());
        }
    }
    structs
}

/// Structs with a name in Rust, and all arguments.
fn cuda(rust: &Structs) -> Structs {
    let mut structs = Structs::new();
    for path in files("kernels", &["cu", "cuh"]) {
        let text = fs::read_to_string(&path).unwrap();
        for (name, body) in bodies(&text, |_| true) {
            if !rust.contains_key(&name) && !name.ends_with("Args") {
                continue;
            }
            let mut fields = Vec::new();
            for statement in body.split(';').map(str::trim).filter(|statement| !statement.is_empty()) {
                let statement = statement.strip_prefix("const ").unwrap_or(statement);
                let end = statement.find([' ', '*']).unwrap_or_else(|| panic!("{name}: {statement}"));
                let (base, declarators) = statement.split_at(end);
                for declarator in declarators.split(',').map(str::trim) {
                    let ty = match (declarator.starts_with('*'), base) {
                        (true, _) | (_, "uint64_t") => "u64",
                        (_, "uint32_t") => "u32",
                        (_, "float") => "f32",
                        (_, "double") => "f64",
                        (_, other) => other,
                    };
                    let declarator = declarator.trim_start_matches(['*', ' ']);
                    let (field, count) = match declarator.split_once('[') {
                        Some((field, count)) => (field, length(count.trim_end_matches(']'))),
                        None => (declarator, 1),
                    };
                    fields.push((field.to_string(), ty.to_string(), count));
                }
            }
            structs.insert(name, fields);
        }
    }
    structs
}

#[test]
fn arguments_of_kernels_are_the_same_on_both_sides() {
    let rust = rust();
    let cuda = cuda(&rust);
    let twins: Vec<&String> = rust.keys().filter(|name| cuda.contains_key(*name)).collect();
    let alone: Vec<&String> = rust
        .keys()
        .filter(|name| !name.ends_with("Params") && !cuda.contains_key(*name))
        .chain(cuda.keys().filter(|name| name.ends_with("Args") && !rust.contains_key(*name)))
        .collect();
    assert!(alone.is_empty(), "without a twin of the same name: {alone:?}");
    assert!(twins.len() >= 27, "only {twins:?} were found");
    for name in twins {
        assert_eq!(layout(&rust, name), layout(&cuda, name), "`{name}` in Rust, then in CUDA");
    }
}
