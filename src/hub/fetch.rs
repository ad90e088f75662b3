//! Finding a reference in the cache, and bringing there what is missing.
//!
//! Weights come last: a folder that has its weights has everything. All files are of the one commit that the revision meant when
//! the fetch began.

use super::{Error, Hub, Reference, is_name};
use crate::model::COMPANIONS;
use hf_hub::{
    Cache, CacheRepo, Repo, RepoType,
    api::{
        Progress,
        sync::{Api, ApiBuilder, ApiError, ApiRepo},
    },
};
use indicatif::ProgressBar;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::{
    cell::Cell,
    collections::BTreeSet,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    rc::Rc,
    thread,
    time::Duration,
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Either layout of a fuser: this program's and the published one.
const FUSER: &str = "fuser.safetensors";
const PROJECTORS: &str = "projector_config.json";

/// How often a transfer is taken up again.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(500);

impl Hub {
    /// A local folder or GGUF file with what `reference` means.
    pub fn fetch(&self, reference: &Reference) -> Result<PathBuf, Error> {
        let cache = Cache::new(self.cache.clone());
        let at = |revision: &str| {
            Repo::with_revision(reference.repository.clone(), RepoType::Model, revision.into())
        };
        if let Some(found) = cached(&cache.repo(at(&reference.revision)), reference) {
            return Ok(found);
        }
        if self.offline {
            return Err(Error::Offline { reference: reference.clone(), cache: self.cache.clone() });
        }
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_progress(false)
            .build()
            .map_err(|error| self.failed(reference, error))?;
        let info = api.repo(at(&reference.revision)).info().map_err(|error| self.failed(reference, error))?;
        if !is_name(&info.sha) {
            let (file, problem) = (reference.to_string(), format!("`{}` is no commit", info.sha));
            return Err(Error::Damaged { file, problem });
        }
        let source = Source {
            hub: self,
            reference,
            api: &api,
            repo: api.repo(at(&info.sha)),
            cache: cache.repo(at(&info.sha)),
        };
        let listing: Vec<String> = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        let place = source.bring(&listing)?;
        let named = cache.repo(at(&reference.revision)).create_ref(&info.sha);
        named.map_err(|source| Error::Cache { path: self.cache.clone(), source })?;
        Ok(place)
    }

    /// What an error of the Hub's client means, other than of a transfer.
    fn failed(&self, reference: &Reference, error: ApiError) -> Error {
        let (endpoint, reference) = (self.endpoint.clone(), reference.clone());
        match status(&error) {
            Some(status @ (401 | 403)) => {
                Error::Refused { endpoint, reference, status, token: self.token.is_some() }
            }
            Some(404) => Error::Unknown { endpoint, reference },
            Some(status) => Error::Server { endpoint, reference, status },
            None => match error {
                ApiError::LockAcquisition(path) => Error::Busy { path },
                ApiError::IoError(source) => Error::Cache { path: self.cache.clone(), source },
                error => Error::Unreachable { endpoint, reference, source: error.into() },
            },
        }
    }
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        _ => None,
    }
}

/// The folder or file that `reference` means, if the cache has all of it.
fn cached(repo: &CacheRepo, reference: &Reference) -> Option<PathBuf> {
    if let Some(file) = reference.file() {
        return repo.get(file);
    }
    let get = |file: &str| repo.get(&reference.in_folder(file));
    let parent = |path: PathBuf| path.parent().map(Path::to_path_buf);
    if let Some(fuser) = get(FUSER).or_else(|| get(PROJECTORS)) {
        return parent(fuser);
    }
    let config = get("config.json")?;
    let whole = match get(INDEX).filter(|_| get(SINGLE).is_none()) {
        Some(index) => shards(&index, INDEX).ok()?.iter().all(|shard| get(shard).is_some()),
        None => get(SINGLE).is_some(),
    };
    whole.then(|| parent(config))?
}

/// The files that a `model.safetensors.index.json` lists.
fn shards(path: &Path, file: &str) -> Result<BTreeSet<String>, Error> {
    let fail = |problem: String| Error::Index { file: file.into(), problem };
    let text = fs::read_to_string(path).map_err(|source| Error::Cache { path: path.into(), source })?;
    let index: Value = serde_json::from_str(&text).map_err(|error| fail(error.to_string()))?;
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| fail("there is no weight_map".into()))?;
    let shard = |value: &Value| match value.as_str() {
        Some(shard) if is_name(shard) => Ok(shard.to_string()),
        _ => Err(fail(format!("{value} is no file name"))),
    };
    map.values().map(shard).collect()
}

/// One repository at one commit.
struct Source<'a> {
    hub: &'a Hub,
    reference: &'a Reference,
    api: &'a Api,
    repo: ApiRepo,
    cache: CacheRepo,
}

impl Source<'_> {
    fn bring(&self, listing: &[String]) -> Result<PathBuf, Error> {
        let reference = || self.reference.clone();
        let others = || listing.iter().filter(|name| name.ends_with(".gguf")).take(20).cloned().collect();
        if let Some(file) = self.reference.file() {
            if !listing.iter().any(|name| name == file) {
                let (reference, file) = (reference(), file.to_string());
                return Err(Error::NoFile { reference, file, others: others() });
            }
            return self.file(file);
        }
        let folder = self.reference.in_folder("");
        let here: Vec<&str> = listing
            .iter()
            .filter_map(|name| name.strip_prefix(&folder))
            .filter(|name| is_name(name))
            .collect();
        let has = |name: &str| here.contains(&name);
        // Whatever else a repository keeps there (other formats of the same weights, pictures) is not read.
        let described = |name: &&&str| {
            let of_fuser =
                **name == "fuser.json" || (name.starts_with("projector_") && name.ends_with(".json"));
            COMPANIONS.contains(name) || of_fuser
        };
        let is_projector = |name: &&&str| {
            name.starts_with("projector_") && (name.ends_with(".pt") || name.ends_with(".safetensors"))
        };
        let whole = has(SINGLE)
            || has(INDEX)
            || has(FUSER)
            || (has(PROJECTORS) && here.iter().any(|name| is_projector(&name)));
        if !whole {
            return Err(Error::NoWeights { reference: reference(), others: others() });
        }
        let mut place = PathBuf::new();
        // What says that a published fuser is here comes after its projectors.
        for name in here.iter().filter(described).filter(|name| **name != PROJECTORS) {
            place = self.file(&self.reference.in_folder(name))?;
        }
        let weights: Vec<String> = if has(SINGLE) {
            vec![SINGLE.into()]
        } else if has(INDEX) {
            let index = self.file(&self.reference.in_folder(INDEX))?;
            shards(&index, INDEX)?.into_iter().collect()
        } else if has(FUSER) {
            vec![FUSER.into()]
        } else {
            let projectors = here.iter().filter(is_projector).map(|name| name.to_string());
            projectors.chain([PROJECTORS.to_string()]).collect()
        };
        for name in &weights {
            if !has(name) {
                let (reference, file) = (reference(), name.clone());
                return Err(Error::NoFile { reference, file, others: Vec::new() });
            }
            place = self.file(&self.reference.in_folder(name))?;
        }
        place.pop();
        Ok(place)
    }

    /// The place of one file in the cache.
    fn file(&self, name: &str) -> Result<PathBuf, Error> {
        if let Some(path) = self.cache.get(name) {
            return Ok(path);
        }
        log::info!("fetching {name} of {} from {}", self.reference.repository, self.hub.endpoint);
        let mut attempt = 1;
        loop {
            let size = Rc::new(Cell::new(0));
            let bar = self.hub.bars.then(|| ProgressBar::new(0));
            // The client's own retries do not know how far an appended file had come, so there are none.
            match self.repo.download_with_progress(name, Transfer { bar, size: size.clone() }) {
                Ok(path) => {
                    check(&path, name, size.get() as u64)?;
                    return Ok(path);
                }
                // The part that is there is the whole: the program ended before it was given its name.
                Err(error) if status(&error) == Some(416) && attempt < ATTEMPTS => self.forget_part(name)?,
                Err(error) if status(&error).is_none() && size.get() > 0 => {
                    if attempt == ATTEMPTS {
                        return Err(Error::Transfer { file: name.into(), source: error.into() });
                    }
                    log::warn!("the transfer of {name} broke ({error}), going on where it stopped");
                    thread::sleep(PAUSE * attempt);
                }
                Err(error) => return Err(self.hub.failed(self.reference, error)),
            }
            attempt += 1;
        }
    }

    fn forget_part(&self, name: &str) -> Result<(), Error> {
        let metadata = self.api.metadata(&self.repo.url(name));
        let metadata = metadata.map_err(|error| self.hub.failed(self.reference, error))?;
        let path = self.cache.blob_path(metadata.etag()).with_extension("part");
        fs::remove_file(&path).map_err(|source| Error::Cache { path, source })
    }
}

/// Whether `path` is what the Hub said it would be: its length, and its SHA-256 where that is its name in the cache (large
/// files). If not, it is removed.
fn check(path: &Path, name: &str, size: u64) -> Result<(), Error> {
    let fail = |source| Error::Cache { path: path.into(), source };
    let blob = path.canonicalize().map_err(fail)?;
    let mut file = File::open(&blob).map_err(fail)?;
    let found = file.metadata().map_err(fail)?.len();
    let expected = blob.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let mut problem = (found != size).then(|| format!("{found} bytes instead of {size}"));
    if problem.is_none() && expected.len() == 64 {
        let mut hash = Sha256::new();
        let mut part = vec![0; 1 << 20];
        loop {
            match file.read(&mut part).map_err(fail)? {
                0 => break,
                read => hash.update(&part[..read]),
            }
        }
        let digest: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        problem = (digest != expected).then(|| format!("its SHA-256 is {digest}, not {expected}"));
    }
    let Some(problem) = problem else { return Ok(()) };
    fs::remove_file(path).and_then(|()| fs::remove_file(&blob)).map_err(fail)?;
    Err(Error::Damaged { file: name.into(), problem })
}

/// What a download tells while it runs.
struct Transfer {
    bar: Option<ProgressBar>,
    /// Bytes of the whole file, once they are known.
    size: Rc<Cell<usize>>,
}

impl Progress for Transfer {
    fn init(&mut self, size: usize, filename: &str) {
        self.size.set(size);
        if let Some(bar) = &mut self.bar {
            bar.set_position(0);
            Progress::init(bar, size, filename);
        }
    }

    fn update(&mut self, size: usize) {
        if let Some(bar) = &mut self.bar {
            Progress::update(bar, size);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = &mut self.bar {
            Progress::finish(bar);
        }
    }
}
