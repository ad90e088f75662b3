//! Runs recorded token ids through the pipeline and writes everything it computed: the road from any other
//! implementation of C2C to this one, tensor by tensor.
//!
//! Names and shapes are those of `docs/replay.md`. Rows of a batch run one after the other; masked tokens are left
//! out (nothing attends to them) and stay zero in the dump.

use super::{
    Error, Lane, Mode, Prompt, Session, SharerPrompt, Stream, WantedLogits, generate, session::capped,
};
use crate::{
    align::Section,
    cache::KvColumns,
    durable::{OutgoingTensor, write_safetensors},
    engine::SamplingParams,
};
use safetensors::{Dtype, SafeTensors};
use std::{collections::BTreeMap, path::Path};

/// Token ids, masks, positions and sections of a batch.
#[derive(Clone, Debug)]
pub struct ReplayInput {
    rows: usize,
    width: usize,
    /// Per model (receiver first), `[rows, width]`. One entry: all models read the same.
    ids: Vec<Vec<i64>>,
    masks: Vec<Vec<bool>>,
    positions: Option<Vec<i64>>,
    sections: Vec<Section>,
    labels: Option<Vec<i64>>,
}

/// Tensors by name, f32 or i64.
#[derive(Debug, Default)]
pub struct Dump {
    floats: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    integers: BTreeMap<String, (Vec<usize>, Vec<i64>)>,
}

/// Shape and elements.
type Numbers = (Vec<usize>, Vec<i64>);

fn malformed(path: &Path, reason: impl Into<String>) -> Error {
    Error::Replay { path: path.display().to_string(), reason: reason.into() }
}

impl ReplayInput {
    /// Reads `input_ids` (or `input_ids.0`, `.1`, …), `attention_mask[.i]`, `position_ids`, `sections`, `labels`.
    pub fn read(path: &Path) -> Result<ReplayInput, Error> {
        let bytes = std::fs::read(path).map_err(|error| malformed(path, error.to_string()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|error| malformed(path, error.to_string()))?;
        // The only error is that there is no such tensor: all of them are optional here.
        let find = |name: &str| file.tensor(name).ok();
        let numbers = |name: &str| -> Result<Option<Numbers>, Error> {
            let Some(view) = find(name) else { return Ok(None) };
            let data = view.data();
            let values = match view.dtype() {
                Dtype::I64 => {
                    data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes"))).collect()
                }
                Dtype::I32 => data
                    .chunks_exact(4)
                    .map(|b| i32::from_le_bytes(b.try_into().expect("4 bytes")) as i64)
                    .collect(),
                Dtype::F32 => data
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes")) as i64)
                    .collect(),
                Dtype::BOOL | Dtype::U8 => data.iter().map(|&b| i64::from(b)).collect(),
                other => return Err(malformed(path, format!("`{name}` is {other:?}, expected integers"))),
            };
            Ok(Some((view.shape().to_vec(), values)))
        };
        // One tensor for all models, or one a model.
        let per_model = |name: &str| -> Result<Vec<Numbers>, Error> {
            if let Some(one) = numbers(name)? {
                return Ok(vec![one]);
            }
            let mut all = Vec::new();
            while let Some(next) = numbers(&format!("{name}.{}", all.len()))? {
                all.push(next);
            }
            Ok(all)
        };
        let ids = per_model("input_ids")?;
        let shape = ids.first().ok_or_else(|| malformed(path, "there is no `input_ids`"))?.0.clone();
        let &[rows, width] = &shape[..] else {
            return Err(malformed(path, "`input_ids` must be [batch, tokens]"));
        };
        if rows == 0 || width == 0 {
            return Err(Error::EmptyPrompt);
        }
        let masks = per_model("attention_mask")?;
        let positions = numbers("position_ids")?;
        let labels = numbers("labels")?;
        for (name, found) in
            ids.iter().map(|x| ("input_ids", &x.0)).chain(masks.iter().map(|x| ("attention_mask", &x.0)))
        {
            if *found != shape {
                return Err(malformed(path, format!("`{name}` is {found:?}, expected {shape:?}")));
            }
        }
        for (name, found) in [("position_ids", &positions), ("labels", &labels)] {
            if let Some((found, _)) = found
                && *found != shape
            {
                return Err(malformed(path, format!("`{name}` is {found:?}, expected {shape:?}")));
            }
        }
        if let Some((_, positions)) = &positions
            && positions.iter().any(|&position| !(0..1 << 31).contains(&position))
        {
            return Err(malformed(path, "`position_ids` must not be negative"));
        }
        let sections = match numbers("sections")? {
            None => vec![Section { len: width, sharer_mask: 0 }],
            Some((shape, values)) => {
                if shape.len() != 2
                    || shape[1] != 2
                    || values.chunks_exact(2).any(|s| !(0..=width as i64).contains(&s[0]))
                {
                    return Err(malformed(path, "`sections` must be [n, 2]: length and sharer mask of each"));
                }
                values.chunks_exact(2).map(|s| Section::from_published(s[0] as usize, s[1])).collect()
            }
        };
        let covered: usize = sections.iter().map(|section| section.len).sum();
        if covered != width {
            return Err(Error::SectionLength { sections: covered, tokens: width });
        }
        let flags = |(_, values): Numbers| values.iter().map(|&v| v != 0).collect();
        Ok(ReplayInput {
            rows,
            width,
            ids: ids.into_iter().map(|(_, values)| values).collect(),
            masks: masks.into_iter().map(flags).collect(),
            positions: positions.map(|(_, values)| values),
            sections,
            labels: labels.map(|(_, values)| values),
        })
    }

    /// Where the last section begins.
    fn last_start(&self) -> usize {
        self.width - self.sections.last().map_or(0, |section| section.len)
    }

    fn at<T>(list: &[Vec<T>], model: usize) -> Option<&[T]> {
        list.get(model).or(list.first()).map(Vec::as_slice)
    }

    /// Columns of `row` that model `model` reads.
    fn kept(&self, model: usize, row: usize, end: usize) -> Vec<usize> {
        let mask = Self::at(&self.masks, model);
        (0..end).filter(|&column| mask.is_none_or(|mask| mask[row * self.width + column])).collect()
    }

    fn read_row(
        &self,
        path: &Path,
        model: usize,
        row: usize,
        kept: &[usize],
    ) -> Result<(Vec<u32>, Vec<u32>), Error> {
        let ids = Self::at(&self.ids, model).unwrap_or_default();
        let id = |&column: &usize| {
            let id = ids[row * self.width + column];
            u32::try_from(id).map_err(|_| malformed(path, format!("token id {id} is out of range")))
        };
        let position = |&column: &usize| match &self.positions {
            Some(positions) => positions[row * self.width + column] as u32,
            None => column as u32,
        };
        Ok((kept.iter().map(id).collect::<Result<_, _>>()?, kept.iter().map(position).collect()))
    }

    /// Without sharers nothing is fused, whatever the sections say.
    fn prompt(&self, path: &Path, row: usize, sharers: usize) -> Result<Row, Error> {
        let kept = self.kept(0, row, self.width);
        let (ids, positions) = self.read_row(path, 0, row, &kept)?;
        let mut start = 0;
        let sections = self.sections.iter().map(|section| {
            let range = start..start + section.len;
            start = range.end;
            let len = kept.iter().filter(|&column| range.contains(column)).count();
            Section { len, sharer_mask: if sharers == 0 { 0 } else { section.sharer_mask } }
        });
        let mut prompt = Prompt { ids, positions, sections: sections.collect(), sharers: Vec::new() };
        let mut read = Vec::new();
        for model in 1..=sharers {
            let theirs = self.kept(model, row, self.last_start());
            let (ids, positions) = self.read_row(path, model, row, &theirs)?;
            let columns =
                kept.iter().map(|column| theirs.binary_search(column).ok().map(|index| index as u32));
            prompt.sharers.push(SharerPrompt { ids, positions, columns: columns.collect() });
            read.push(theirs);
        }
        // An all-masked last section would leave nothing to read logits from.
        if prompt.sections.last().is_none_or(|section| section.len == 0) {
            return Err(malformed(path, format!("row {row} has no token in its last section")));
        }
        Ok(Row { prompt, kept, read })
    }
}

/// One row of a batch without its padding.
struct Row {
    prompt: Prompt,
    /// Columns of the input that the receiver reads.
    kept: Vec<usize>,
    /// The same for each sharer, before the last section.
    read: Vec<Vec<usize>>,
}

/// Replays the file `path` in mode c2c or receiver (then nothing is fused, whatever its sections say);
/// `params.max_new_tokens` = 0 leaves out generation.
pub fn replay(session: &Session, path: &Path, params: &SamplingParams) -> Result<Dump, Error> {
    if !matches!(session.mode(), Mode::C2c | Mode::Receiver) {
        return Err(Error::ReplayMode(session.mode()));
    }
    let input = ReplayInput::read(path)?;
    let mut dump = Dump::default();
    let (rows, width) = (input.rows, input.width);
    let last = input.last_start();
    for (model, ids) in input.ids.iter().enumerate() {
        let name = if input.ids.len() == 1 { "input_ids".into() } else { format!("input_ids.{model}") };
        dump.integers.insert(name, (vec![rows, width], ids.clone()));
    }
    let sections = input.sections.iter().flat_map(|s| [s.len as i64, s.published_mask()]).collect();
    dump.integers.insert("sections".into(), (vec![input.sections.len(), 2], sections));
    let (mut loss, mut targets) = (0.0f64, 0usize);
    let mut sequences = Vec::new();
    for row in 0..rows {
        let Row { prompt, kept, read } = input.prompt(path, row, session.sharers.len())?;
        let room = capped(prompt.ids.len(), params, session.receiver()?);
        let mut link = session.conversation(&prompt, room)?;
        plain_receiver(session, &prompt, &kept, row, &input, &mut dump)?;
        let (logits, _) = link.prefill(&prompt, WantedLogits::LastSection)?;
        let vocab = link.link().receiver.decoder.weights.lm_head.rows();
        let tail: Vec<usize> = kept.iter().copied().filter(|&column| column >= last).collect();
        let places: Vec<usize> = tail.iter().map(|column| row * (width - last) + column - last).collect();
        dump.scatter("logits", &[rows, width - last, vocab], &places, &logits);
        if let Some(labels) = &input.labels {
            for (i, pair) in tail.windows(2).enumerate() {
                let label = labels[row * width + pair[1]];
                if label >= 0 && (label as usize) < vocab {
                    loss += cross_entropy(&logits[i * vocab..(i + 1) * vocab], label as usize);
                    targets += 1;
                }
            }
        }
        let whole = Place { rows, width, row, kept: &kept };
        dump.caches("fused", &link.link().receiver, whole)?;
        if let Some(clean) = link.clean() {
            dump.caches("clean_receiver", clean, whole)?;
        }
        for (index, (lane, theirs)) in link.link().sharers.iter().zip(&read).enumerate() {
            // A sharer that reads the answer too reads the receiver's tokens from the last section on.
            let theirs: Vec<usize> = match link.clean() {
                Some(_) => theirs.iter().chain(&tail).copied().collect(),
                None => theirs.clone(),
            };
            let width = if link.clean().is_some() { width } else { last };
            let place = Place { rows, width, row, kept: &theirs };
            dump.caches(&format!("sharer{}", index + 1), lane, place)?;
        }
        if params.max_new_tokens > 0 {
            let at = logits.len() - vocab;
            // As the published program: decoded tokens sit behind the whole row, masked tokens included.
            link.continue_at(width as u32);
            let stream = Stream { detokenizer: None, on_text: &mut |_| {}, keep_scores: true };
            let answer = generate(&mut *link, logits[at..].to_vec(), params, stream)?;
            sequences.push((row, answer));
        }
    }
    if targets > 0 {
        dump.floats.insert("loss".into(), (vec![], vec![(loss / targets as f64) as f32]));
    }
    dump.sequences(&input, &sequences);
    Ok(dump)
}

/// The receiver alone on the tokens before the last section.
fn plain_receiver(
    session: &Session,
    prompt: &Prompt,
    kept: &[usize],
    row: usize,
    input: &ReplayInput,
    dump: &mut Dump,
) -> Result<(), Error> {
    let last = input.last_start();
    let before = kept.iter().filter(|&&column| column < last).count();
    if before == 0 {
        return Ok(());
    }
    let unfused = Prompt {
        ids: prompt.ids[..before].to_vec(),
        positions: prompt.positions[..before].to_vec(),
        sections: vec![Section { len: before, sharer_mask: 0 }],
        sharers: vec![
            SharerPrompt { columns: vec![None; before], ..SharerPrompt::default() };
            session.sharers.len()
        ],
    };
    let mut link = session.link(before, &vec![0; session.sharers.len()])?;
    link.prefill(&unfused, WantedLogits::Last)?;
    let place = Place { rows: input.rows, width: last, row, kept: &kept[..before] };
    dump.caches("plain_receiver", &link.receiver, place)
}

/// Where tokens of one row of the batch stand in a dumped tensor: in which columns, of how many.
#[derive(Clone, Copy)]
struct Place<'a> {
    rows: usize,
    width: usize,
    row: usize,
    kept: &'a [usize],
}

/// `−log softmax(logits)[label]`
fn cross_entropy(logits: &[f32], label: usize) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    sum.ln() + f64::from(max - logits[label])
}

impl Dump {
    pub fn float(&self, name: &str) -> Option<(&[usize], &[f32])> {
        self.floats.get(name).map(|(shape, data)| (&shape[..], &data[..]))
    }

    pub fn integer(&self, name: &str) -> Option<(&[usize], &[i64])> {
        self.integers.get(name).map(|(shape, data)| (&shape[..], &data[..]))
    }

    /// Puts `data`, rows of the innermost dimension, at row indices `places` of tensor `name`.
    fn scatter(&mut self, name: &str, shape: &[usize], places: &[usize], data: &[f32]) {
        let inner = shape[shape.len() - 1];
        let (_, all) = self
            .floats
            .entry(name.into())
            .or_insert_with(|| (shape.to_vec(), vec![0.0; shape.iter().product()]));
        for (&place, row) in places.iter().zip(data.chunks_exact(inner)) {
            all[place * inner..(place + 1) * inner].copy_from_slice(row);
        }
    }

    /// The first tokens of `lane`, `[tokens, kv_heads, head_dim]`, into `{prefix}.key.{l}` and `{prefix}.value.{l}`,
    /// `[rows, kv_heads, width, head_dim]`, at their place.
    fn caches(&mut self, prefix: &str, lane: &Lane, place: Place) -> Result<(), Error> {
        let (heads, dim) = (lane.decoder.config.kv_heads, lane.decoder.config.head_dim);
        let Place { rows, width, row, kept } = place;
        let places: Vec<usize> = (kept.iter())
            .flat_map(|&column| (0..heads).map(move |head| (row * heads + head) * width + column))
            .collect();
        for layer in 0..lane.kv.layers().len() {
            let KvColumns { keys, values } = lane.read(layer, 0, kept.len())?;
            for (what, data) in [("key", keys), ("value", values)] {
                self.scatter(&format!("{prefix}.{what}.{layer}"), &[rows, heads, width, dim], &places, &data);
            }
        }
        Ok(())
    }

    fn sequences(&mut self, input: &ReplayInput, answers: &[(usize, super::Generation)]) {
        let Some(longest) = answers.iter().map(|(_, answer)| answer.tokens.len()).max() else { return };
        let mut all = Vec::new();
        for (row, answer) in answers {
            all.extend(&input.ids[0][row * input.width..(row + 1) * input.width]);
            all.extend(answer.tokens.iter().map(|&id| i64::from(id)));
            // Rows that ended early are filled with −1: the published program's choice of a pad id is not ours.
            all.resize((row + 1) * (input.width + longest), -1);
        }
        self.integers.insert("generate.sequences".into(), (vec![input.rows, input.width + longest], all));
        if let [(_, answer)] = answers
            && longest > 0
        {
            let vocab = answer.scores.len() / longest;
            self.floats.insert("generate.scores".into(), (vec![1, longest, vocab], answer.scores.clone()));
        }
    }

    /// Writes a safetensors file: all of it or, on failure, nothing (the old file stays).
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let floats = self.floats.iter().map(|(name, (shape, data))| outgoing(name, Dtype::F32, shape, data));
        let integers =
            self.integers.iter().map(|(name, (shape, data))| outgoing(name, Dtype::I64, shape, data));
        write_safetensors(path, &[], &floats.chain(integers).collect::<Vec<_>>())
    }
}

fn outgoing<'a, T: bytemuck::NoUninit>(
    name: &str,
    dtype: Dtype,
    shape: &[usize],
    data: &'a [T],
) -> OutgoingTensor<'a, Error> {
    let bytes = || Ok(bytemuck::cast_slice(data).to_vec());
    OutgoingTensor { name: name.into(), dtype, shape: shape.to_vec(), bytes: Box::new(bytes) }
}
