//! Models from the Hugging Face Hub: `hf:org/name` wherever the path of a model or a fuser is expected.
//!
//! Files go to the Hub's usual cache (`HF_HOME`, else `~/.cache/huggingface`), which other programs share. What lies there is
//! used without asking the Hub; what does not is fetched from `HF_ENDPOINT`, with the token of `HF_TOKEN` or of the Hub's own
//! `login`, and a transfer that broke goes on where it stopped. `HF_HUB_OFFLINE=1` forbids fetching.

mod fetch;

use crate::builtin;
use std::{
    env, fmt,
    io::{self, IsTerminal},
    path::{Component, Path, PathBuf},
    str::FromStr,
};

/// Paths that begin so are of the Hub.
const PREFIX: &str = "hf:";
const ENDPOINT: &str = "https://huggingface.co";

/// What keeps a model of the Hub from being used. All but the last few end at the user, so they say what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "`{0}` names nothing on the Hub: expected hf:org/name, hf:org/name@revision or hf:org/name/file.gguf"
    )]
    Reference(String),
    #[error("there is no home folder for the Hub's cache: set HF_HOME")]
    NoHome,
    #[error(
        "{reference} is not in the cache {} and HF_HUB_OFFLINE forbids to fetch it: unset it, or name a local folder or \
         .gguf file", cache.display()
    )]
    Offline { reference: Reference, cache: PathBuf },
    #[error(
        "cannot reach {endpoint} for {reference}: {source}. Offline, name a local folder or .gguf file; HF_ENDPOINT names \
         a mirror"
    )]
    Unreachable { endpoint: String, reference: Reference, source: Box<hf_hub::api::sync::ApiError> },
    #[error(
        "{endpoint} refuses {reference} (status {status}): the name is wrong, or the model is private or gated: {}",
        if *token { "the token in use has no access; accept the model's terms on its page, or use another HF_TOKEN" }
        else { "accept its terms on its page and set HF_TOKEN" }
    )]
    Refused { endpoint: String, reference: Reference, status: u16, token: bool },
    #[error("{endpoint} knows no {reference} (status 404): check the name and the revision")]
    Unknown { endpoint: String, reference: Reference },
    #[error("{reference}: no `{file}` there{}", listed(.others))]
    NoFile { reference: Reference, file: String, others: Vec<String> },
    #[error(
        "{reference}: no weights there that this program reads (model.safetensors, its shards, or a fuser){}",
        listed(.others)
    )]
    NoWeights { reference: Reference, others: Vec<String> },
    #[error("{endpoint} answers status {status} for {reference}: try again later")]
    Server { endpoint: String, reference: Reference, status: u16 },
    #[error("the transfer of {file} broke: {source}. Run again: it goes on where it stopped")]
    Transfer { file: String, source: Box<hf_hub::api::sync::ApiError> },
    #[error("{file} arrived damaged ({problem}) and was removed: run again")]
    Damaged { file: String, problem: String },
    #[error("{file}: not a list of shards: {problem}")]
    Index { file: String, problem: String },
    #[error("{}: another program is fetching this file: wait for it, then run again", path.display())]
    Busy { path: PathBuf },
    #[error("the Hub's cache {}: {source}", path.display())]
    Cache { path: PathBuf, source: io::Error },
}

fn listed(others: &[String]) -> String {
    match others {
        [] => String::new(),
        others => format!("; GGUF files there are {}", others.join(", ")),
    }
}

/// What an `hf:` path names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// `org/name`
    pub repository: String,
    /// A GGUF file, or a folder such as a fuser's; `None`: the repository's top folder.
    pub inside: Option<String>,
    pub revision: String,
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.repository)?;
        if let Some(inside) = &self.inside {
            write!(f, "/{inside}")?;
        }
        if self.revision == MAIN { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

const MAIN: &str = "main";

impl FromStr for Reference {
    type Err = Error;

    /// `hf:org/name[/file or folder][@revision]`
    fn from_str(text: &str) -> Result<Reference, Error> {
        let fail = || Error::Reference(text.into());
        let rest = text.strip_prefix(PREFIX).ok_or_else(fail)?;
        let (path, revision) = rest.rsplit_once('@').unwrap_or((rest, MAIN));
        let parts: Vec<&str> = path.split('/').collect();
        let revision_parts = revision.split('/');
        if parts.len() < 2 || !parts.iter().copied().chain(revision_parts).all(is_name) {
            return Err(fail());
        }
        let inside = (parts.len() > 2).then(|| parts[2..].join("/"));
        Ok(Reference { repository: parts[..2].join("/"), inside, revision: revision.into() })
    }
}

/// Whether `part` is one plain part of a path: these become paths of the cache.
fn is_name(part: &str) -> bool {
    let mut components = Path::new(part).components();
    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
    plain && !part.chars().any(|c| c.is_control() || c.is_whitespace() || "\\?#%:".contains(c))
}

impl Reference {
    /// The GGUF file that is meant, if one is.
    fn file(&self) -> Option<&str> {
        self.inside.as_deref().filter(|inside| inside.ends_with(".gguf"))
    }

    /// The name of `file` of the folder that is meant.
    fn in_folder(&self, file: &str) -> String {
        match &self.inside {
            Some(folder) => format!("{folder}/{file}"),
            None => file.into(),
        }
    }
}

/// Where models come from and go to.
#[derive(Clone, Debug)]
pub struct Hub {
    pub endpoint: String,
    /// Holds `models--org--name` folders.
    pub cache: PathBuf,
    pub token: Option<String>,
    /// Whether only the cache may be used.
    pub offline: bool,
    /// Whether bars are drawn on standard error.
    pub bars: bool,
}

impl Hub {
    /// As the Hub's own variables say.
    pub fn from_env() -> Result<Hub, Error> {
        let set = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let home = match set("HF_HOME") {
            Some(home) => PathBuf::from(home),
            None => env::home_dir().ok_or(Error::NoHome)?.join(".cache/huggingface"),
        };
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into());
        let saved = || {
            let text = std::fs::read_to_string(home.join("token")).ok()?;
            Some(text.trim().to_string()).filter(|token| !token.is_empty())
        };
        Ok(Hub {
            endpoint: endpoint.trim_end_matches('/').into(),
            token: set("HF_TOKEN").or_else(saved),
            cache: home.join("hub"),
            offline: set("HF_HUB_OFFLINE").is_some_and(|value| value != "0"),
            bars: io::stderr().is_terminal(),
        })
    }
}

/// The place of a model or fuser that was named on a command line or in a configuration: `hf:…` is fetched where the cache does
/// not have it, `builtin:…` is of the built-in pair, anything else is a path already.
pub fn local(path: &Path) -> Result<PathBuf, Error> {
    match path.to_str().filter(|text| text.starts_with(PREFIX)) {
        Some(text) => Hub::from_env()?.fetch(&text.parse()?),
        None => Ok(builtin::resolve(path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references() {
        let read = |text: &str| text.parse::<Reference>();
        let of = |repository: &str, inside: Option<&str>, revision: &str| Reference {
            repository: repository.into(),
            inside: inside.map(Into::into),
            revision: revision.into(),
        };
        for (text, expected) in [
            ("hf:org/name", of("org/name", None, "main")),
            ("hf:org/name@v1.0", of("org/name", None, "v1.0")),
            ("hf:org/name@refs/pr/3", of("org/name", None, "refs/pr/3")),
            ("hf:org/name/q4.gguf", of("org/name", Some("q4.gguf"), "main")),
            ("hf:org/name/sub/q4.gguf@abc", of("org/name", Some("sub/q4.gguf"), "abc")),
            ("hf:org/fusers/pair/final", of("org/fusers", Some("pair/final"), "main")),
        ] {
            let found = read(text).unwrap();
            assert_eq!((&found, found.to_string().as_str()), (&expected, text));
        }
        for bad in [
            "hf:",
            "hf:name",
            "hf:org/",
            "hf:/name",
            "org/name",
            "hf:org/..",
            "hf:org/name@",
            "hf:org/name@../x",
            "hf:org/name/../../x.gguf",
            "hf:org//x.gguf",
            "hf:org/na me",
            "hf:org/name?x",
            "hf:org/name/./x.gguf",
            "hf:org/name@a@b c",
        ] {
            assert!(matches!(read(bad), Err(Error::Reference(_))), "{bad}");
        }
    }

    #[test]
    fn other_paths_stay() {
        assert_eq!(local(Path::new("models/a.gguf")).unwrap(), Path::new("models/a.gguf"));
        assert_eq!(local(Path::new("builtin:sharer")).unwrap(), builtin::path("sharer"));
    }
}
