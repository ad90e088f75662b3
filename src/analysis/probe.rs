//! The models and questions of an analysis, and the caches it looks at.

use super::{Error, Options};
use crate::{
    cache::KvColumns,
    eval::{
        self, Method, Mode, Scoring, Watcher, asking,
        items::Gold,
        mode::Variant,
        pair::{Pair, Who},
        questions::{Questions, key},
        run::Models,
    },
    fuser::Gates,
    pipeline::{Lane, Prompt},
    tokenizer::Message,
};
use serde_json::Value;

/// A pair with the questions of a task.
pub(super) struct Probe<'a> {
    pub options: eval::Options,
    pub models: Models,
    pub questions: Questions,
    pub watcher: &'a dyn Watcher,
    /// At most so many questions are looked at.
    pub limit: usize,
}

/// Keys and values of the Receiver's tokens of one question that take a column of the first Sharer.
pub(super) struct Caches {
    /// By Receiver layer: before and after fusing.
    pub plain: Vec<KvColumns>,
    pub fused: Vec<KvColumns>,
    /// The columns that they take; `None`: no projector.
    pub source: Vec<Option<KvColumns>>,
}

impl<'a> Probe<'a> {
    pub fn open(options: &Options, watcher: &'a dyn Watcher) -> Result<Probe<'a>, Error> {
        let scores = options.questions.iter().find(|question| question.scores());
        if let Some(question) = scores.filter(|_| options.task.scoring != Scoring::Choice) {
            return Err(Error::NoChoices { question: question.name(), task: options.task.name.clone() });
        }
        let options = eval::Options {
            title: options.title.clone(),
            tasks: vec![options.task.clone()],
            places: options.places.clone(),
            modes: vec![Mode::Receiver, Mode::Sharer(0), Mode::C2C],
            session: options.session.clone(),
            identical_fuser: None,
            method: scores.map(|_| Method::Logits),
            prompt: None,
            chain_of_thought: false,
            few_shot: 0,
            response: None,
            max_new_tokens: None,
            background_tokens: 256,
            // Each question of the analysis takes its own share.
            limit: None,
            context_tokens: None,
            router_questions: 0,
            seed: options.seed,
            cache_sharer: None,
            out: options.out.clone(),
        };
        options.check()?;
        let mut questions = Questions::load(&options, &options.tasks[0])?;
        let backend = crate::backend::open(options.session.device, options.session.threads)
            .map_err(eval::Error::from)?;
        let models = Models::open(&options, &backend, watcher)?;
        questions.prepare(&options, &models)?;
        Ok(Probe { options, models, questions, watcher, limit: usize::MAX })
    }

    pub fn described(&self) -> Value {
        self.models.described()
    }

    pub fn pair(&mut self) -> &mut Pair {
        &mut self.models.pair
    }

    /// Layers of the Receiver.
    pub fn layers(&self) -> usize {
        self.models.pair.session.receiver.as_ref().map_or(0, |model| model.decoder.config.layers)
    }

    /// The gates that the pair answers with, as trained or as `--gates` says.
    pub fn gates(&self) -> &[Gates] {
        &self.models.pair.session.gates
    }

    /// The questions that are looked at, evenly spaced.
    pub fn sample(&self) -> Vec<usize> {
        let (total, n) = (self.questions.items.len(), self.limit.min(self.questions.items.len()));
        (0..n).map(|i| i * total / n.max(1)).collect()
    }

    pub fn messages(&self, index: usize) -> &[Message] {
        &self.questions.prompts[&(false, self.questions.items[index].number)]
    }

    /// What an answer begins with.
    pub fn response(&self) -> String {
        self.options.response(&self.questions.task)
    }

    /// A question as Receiver and Sharers read it.
    pub fn prompt(&self, index: usize) -> Result<Prompt, Error> {
        Ok(self.models.pair.align(self.messages(index), &self.response(), None)?)
    }

    /// Whether the letter that `who` gives is the gold answer.
    pub fn right(&self, who: Who, logits: &[f32], index: usize) -> bool {
        let item = &self.questions.items[index];
        let letters = &self.questions.letters[&key(who)];
        item.gold == Gold::Choice(asking::best_choice(logits, letters, item.choices.len()))
    }

    /// Fuses a prompt with other gates than the pair's.
    pub fn fuse_with(&mut self, prompt: &Prompt, gates: Vec<Gates>) -> Result<Vec<f32>, Error> {
        let own = std::mem::replace(&mut self.pair().session.gates, gates);
        let fused = self.pair().fuse(prompt.clone(), None, None, Variant::Plain, 0, 0);
        self.pair().session.gates = own;
        Ok(fused?.logits)
    }

    /// Fuses a prompt, or leaves it as the Receiver alone reads it; returns the logits.
    pub fn fuse(&mut self, prompt: &Prompt, variant: Variant) -> Result<Vec<f32>, Error> {
        Ok(self.pair().fuse(prompt.clone(), None, None, variant, 0, 0)?.logits)
    }

    /// The caches of a prompt; `None` where none of its tokens is fused.
    pub fn caches(&mut self, prompt: &Prompt) -> Result<Option<Caches>, Error> {
        let aligned = fused_tokens(prompt);
        if aligned.is_empty() {
            return Ok(None);
        }
        let layers = self.layers();
        let (ours, theirs): (Vec<usize>, Vec<usize>) = aligned.into_iter().unzip();
        self.fuse(prompt, Variant::Closed)?;
        let receiver = |pair: &Pair| -> Result<Vec<KvColumns>, Error> {
            let link = pair.link().ok_or(eval::Error::NoReceiver)?;
            (0..layers).map(|layer| columns(&link.receiver, layer, &ours)).collect()
        };
        let plain = receiver(&self.models.pair)?;
        self.fuse(prompt, Variant::Plain)?;
        let fused = receiver(&self.models.pair)?;
        let link = self.models.pair.link().ok_or(eval::Error::NoReceiver)?;
        let source = |layer: usize| {
            link.fusers[0]
                .sharer_layer(layer)
                .map(|from| columns(&link.sharers[0], from, &theirs))
                .transpose()
        };
        let source = (0..layers).map(source).collect::<Result<_, Error>>()?;
        Ok(Some(Caches { plain, fused, source }))
    }

    /// Calls `look` with the caches of each question of the sample.
    pub fn each(&mut self, mut look: impl FnMut(&Caches)) -> Result<usize, Error> {
        let sample = self.sample();
        let mut seen = 0;
        for (done, &index) in sample.iter().enumerate() {
            let prompt = self.prompt(index)?;
            if let Some(caches) = self.caches(&prompt)? {
                look(&caches);
                seen += 1;
            }
            self.watcher.progress(done + 1, sample.len(), "caches");
        }
        if seen == 0 { Err(self.nothing_fused()) } else { Ok(seen) }
    }

    pub fn nothing_fused(&self) -> Error {
        Error::NothingFused { what: format!("task {}", self.questions.task.name) }
    }
}

/// The Receiver's tokens that take a column of the first Sharer, and which.
pub(super) fn fused_tokens(prompt: &Prompt) -> Vec<(usize, usize)> {
    let mut aligned = Vec::new();
    let mut start = 0;
    let fused = prompt.sections.len().saturating_sub(1);
    for (index, section) in prompt.sections.iter().enumerate() {
        let tokens = start..start + section.len;
        start = tokens.end;
        if index < fused && section.sharer_mask & 1 == 1 {
            let column =
                |token: usize| Some((token, prompt.sharers.first()?.columns.get(token).copied()?? as usize));
            aligned.extend(tokens.filter_map(column));
        }
    }
    aligned
}

/// Some tokens of a lane.
fn columns(lane: &Lane, layer: usize, tokens: &[usize]) -> Result<KvColumns, Error> {
    let slots: Vec<u32> = tokens.iter().map(|&token| lane.slots()[token]).collect();
    Ok(lane.kv.read(&lane.queue, layer, &slots)?)
}

/// The built-in pair, exact, for tests.
#[cfg(test)]
pub(super) fn builtin() -> crate::pipeline::Session {
    use crate::{align, backend::cpu, builtin, fuser, pipeline};
    let options = pipeline::SessionOptions {
        mode: pipeline::Mode::C2c,
        receiver: Some(builtin::path("receiver")),
        sharers: vec![builtin::path("sharer")],
        fusers: vec![pipeline::FuserChoice::Load(builtin::path("fuser"))],
        multi_sharer: fuser::FusionMode::Parallel,
        alignment: align::Alignment::Span,
        mapping: align::LayerMapping::LAST_ALIGNED,
        gates: fuser::GateOverride::Learned,
        fraction: None,
        dtype: pipeline::ComputeType::F32,
        device: crate::backend::DeviceChoice::Cpu,
        threads: 2,
        overlap: pipeline::Overlap::Layers,
    };
    let backend = cpu::Cpu::with(2, cpu::Simd::detect(), cpu::Schedule::Steady);
    pipeline::Session::open_on(backend, options, &|_, _, _| {}).expect("the pair opens")
}
