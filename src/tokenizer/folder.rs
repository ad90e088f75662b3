//! Hugging Face model folders.

use std::collections::BTreeMap;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokenizers::AddedToken;
use tokenizers::processors::template::TemplateProcessing;

use super::special::Specials;
use super::{Error, Tokenizer};

/// Uses of special tokens in the order of `all_special_ids`.
const USES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

pub(super) fn load(dir: &Path) -> Result<Tokenizer, Error> {
    let file = dir.join("tokenizer.json");
    if !file.is_file() {
        std::fs::read_dir(dir).map_err(|source| Error::Read { path: dir.into(), source })?;
        let hint = if dir.join("tokenizer.model").is_file() {
            ": the SentencePiece file tokenizer.model has to be converted first (transformers' AutoTokenizer saves a tokenizer.json)"
        } else if dir.join("vocab.json").is_file() {
            ": vocab.json and merges.txt have to be converted first (transformers' AutoTokenizer saves a tokenizer.json)"
        } else {
            ""
        };
        return Err(Error::NoTokenizer { dir: dir.into(), hint });
    }
    let mut inner = read_tokenizer(&file)?;
    let map: Map<String, Value> = read_json(&dir.join("special_tokens_map.json"))?.unwrap_or_default();
    let mut config: Map<String, Value> = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
    for (name, value) in map {
        config.entry(name).or_insert(value);
    }

    let declared = declared_tokens(&config);
    add_missing_tokens(&mut inner, &config, &declared, &dir.join("tokenizer_config.json"))?;
    surround_with_specials(&mut inner, &config)?;

    let stop = match read_json::<Map<String, Value>>(&dir.join("generation_config.json"))? {
        Some(generation) => id_list(&generation, "eos_token_id"),
        None => id_list(&read_json(&dir.join("config.json"))?.unwrap_or_default(), "eos_token_id"),
    };
    let specials = Specials::new(&inner, declared, &stop);
    let tokenizer = Tokenizer::assemble(inner, specials, dir.display().to_string());
    match chat_template(dir, &config)? {
        Some(source) => tokenizer.with_chat_template(&source),
        None => Ok(tokenizer),
    }
}

pub(super) fn load_file(file: &Path) -> Result<Tokenizer, Error> {
    let inner = read_tokenizer(file)?;
    let specials = Specials::new(&inner, Vec::new(), &[]);
    Ok(Tokenizer::assemble(inner, specials, file.display().to_string()))
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::Read { path: path.into(), source })
}

/// A file that may be missing.
fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    if !path.is_file() {
        return Ok(None);
    }
    serde_json::from_slice(&read(path)?).map(Some).map_err(|source| Error::Json { path: path.into(), source })
}

fn read_tokenizer(path: &Path) -> Result<tokenizers::Tokenizer, Error> {
    let parse_error = |reason: String| Error::Parse { path: path.into(), reason };
    let mut inner =
        tokenizers::Tokenizer::from_bytes(read(path)?).map_err(|error| parse_error(error.to_string()))?;
    // Some files carry the truncation of the run that wrote them; a text is never cut or filled up silently.
    inner.with_padding(None).with_truncation(None).map_err(|error| parse_error(error.to_string()))?;
    Ok(inner)
}

/// A token is written as its text or as an object with its `content`.
fn text_of(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

/// (use, text) of each declared special token: the seven uses, `additional_special_tokens`, then the model's own
/// names in `extra_special_tokens`.
fn declared_tokens(config: &Map<String, Value>) -> Vec<(String, String)> {
    let mut declared: Vec<(String, String)> = USES
        .iter()
        .filter_map(|&name| Some((name.to_string(), text_of(config.get(name)?)?.to_string())))
        .collect();
    let additional = config.get("additional_special_tokens").and_then(Value::as_array);
    for text in additional.into_iter().flatten().filter_map(text_of) {
        declared.push(("additional_special_tokens".into(), text.into()));
    }
    let extra = config.get("extra_special_tokens").and_then(Value::as_object);
    for (name, text) in extra.into_iter().flatten().filter_map(|(name, token)| Some((name, text_of(token)?)))
    {
        declared.push((name.clone(), text.into()));
    }
    declared
}

/// Tokens that only `tokenizer_config.json` knows are added, as transformers does: first those of
/// `added_tokens_decoder` by id, then declared ones.
fn add_missing_tokens(
    inner: &mut tokenizers::Tokenizer,
    config: &Map<String, Value>,
    declared: &[(String, String)],
    path: &Path,
) -> Result<(), Error> {
    let mut by_id: BTreeMap<u32, AddedToken> = BTreeMap::new();
    for (id, token) in config.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten() {
        let entry = id.parse().ok().zip(added_token(token));
        let (number, token) = entry.ok_or_else(|| Error::Parse {
            path: path.into(),
            reason: format!("added_tokens_decoder[{id:?}] is not an id with a token's content"),
        })?;
        by_id.insert(number, token);
    }
    let known = inner.get_added_vocabulary().get_vocab().clone();
    let mut missing: Vec<AddedToken> =
        by_id.into_values().filter(|token| !known.contains_key(&token.content)).collect();
    for (_, text) in declared {
        match missing.iter_mut().find(|token| token.content == *text) {
            Some(token) => token.special = true,
            None if !known.contains_key(text) => missing.push(AddedToken::from(text.clone(), true)),
            None => {}
        }
    }
    // In runs of one kind: each call rebuilds the matcher of added tokens.
    for run in missing.chunk_by(|a, b| a.special == b.special) {
        if run[0].special {
            inner.add_special_tokens(run);
        } else {
            inner.add_tokens(run);
        }
    }
    Ok(())
}

/// A token as `added_tokens_decoder` describes it.
fn added_token(entry: &Value) -> Option<AddedToken> {
    let flag = |name: &str, default: bool| entry.get(name).and_then(Value::as_bool).unwrap_or(default);
    let special = flag("special", false);
    let token = AddedToken::from(text_of(entry)?, special)
        .lstrip(flag("lstrip", false))
        .rstrip(flag("rstrip", false))
        .single_word(flag("single_word", false))
        .normalized(flag("normalized", !special));
    Some(token)
}

/// transformers' Llama and Gemma classes put BOS and EOS around a text by `add_bos_token` (default true) and
/// `add_eos_token` (default false), whatever tokenizer.json says.
fn surround_with_specials(
    inner: &mut tokenizers::Tokenizer,
    config: &Map<String, Value>,
) -> Result<(), Error> {
    let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    if !matches!(class.trim_end_matches("Fast"), "LlamaTokenizer" | "GemmaTokenizer" | "CodeLlamaTokenizer") {
        return Ok(());
    }
    let token = |flag: &str, default: bool, name: &str| {
        let wanted = config.get(flag).and_then(Value::as_bool).unwrap_or(default);
        let text = config.get(name).and_then(text_of).filter(|_| wanted)?;
        Some((text.to_string(), inner.token_to_id(text)?))
    };
    let bos = token("add_bos_token", true, "bos_token");
    let eos = token("add_eos_token", false, "eos_token");
    let processor = surround(bos, eos)?;
    inner.with_post_processor(processor);
    Ok(())
}

/// BOS before and EOS after a text, where given.
pub(super) fn surround(
    bos: Option<(String, u32)>,
    eos: Option<(String, u32)>,
) -> Result<Option<TemplateProcessing>, Error> {
    if bos.is_none() && eos.is_none() {
        return Ok(None);
    }
    let piece = |token: &Option<(String, u32)>| token.as_ref().map(|(text, _)| text.clone());
    let single: Vec<String> = [piece(&bos), Some("$A".into()), piece(&eos)].into_iter().flatten().collect();
    let mut tokens: Vec<(String, u32)> = bos.into_iter().chain(eos).collect();
    tokens.dedup();
    let unusable = |error: String| Error::Encode(format!("BOS or EOS cannot be added: {error}"));
    let processor = TemplateProcessing::builder()
        .try_single(single)
        .map_err(unusable)?
        .special_tokens(tokens)
        .build()
        .map_err(|error| unusable(error.to_string()))?;
    Ok(Some(processor))
}

/// An id or a list of ids; anything else counts as not given.
fn id_list(config: &Map<String, Value>, name: &str) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get(name) {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// `chat_template.jinja`, else `chat_template` of `tokenizer_config.json` (of several the one named "default"), else
/// `chat_template.json`.
fn chat_template(dir: &Path, config: &Map<String, Value>) -> Result<Option<String>, Error> {
    let file = dir.join("chat_template.jinja");
    if file.is_file() {
        let source = String::from_utf8(read(&file)?);
        return source
            .map(Some)
            .map_err(|error| Error::Parse { path: file, reason: format!("it is not UTF-8: {error}") });
    }
    if let Some(source) = config.get("chat_template").and_then(default_template) {
        return Ok(Some(source));
    }
    let beside: Map<String, Value> = read_json(&dir.join("chat_template.json"))?.unwrap_or_default();
    Ok(beside.get("chat_template").and_then(default_template))
}

fn default_template(template: &Value) -> Option<String> {
    match template {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default").or(named.first())?;
            default["template"].as_str().map(str::to_string)
        }
        _ => None,
    }
}
