//! The built-in pair: two tiny language models, the fuser between them, and the questions it is trained and measured on.
//!
//! They lie in `assets/pair` of the source tree ([docs/builtin_pair.md]). `C2C_ASSETS` names another folder for `assets`.

use std::{
    env,
    path::{Path, PathBuf},
};

/// Paths that begin so are of the built-in pair: `builtin:receiver`, `builtin:train.jsonl`.
const PREFIX: &str = "builtin:";

/// A file or folder of the pair.
pub fn path(name: &str) -> PathBuf {
    let assets = env::var_os("C2C_ASSETS").map(PathBuf::from);
    assets.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("assets")).join("pair").join(name)
}

/// `path`, where it is no `builtin:NAME`, else the place of that.
pub fn resolve(path: &Path) -> PathBuf {
    match path.to_str().and_then(|text| text.strip_prefix(PREFIX)) {
        Some(name) => self::path(name),
        None => path.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_builtin_paths_are_changed() {
        assert_eq!(resolve(Path::new("models/a.gguf")), Path::new("models/a.gguf"));
        assert!(resolve(Path::new("builtin:receiver")).ends_with("pair/receiver"));
    }
}
