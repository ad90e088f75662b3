//! An evaluation from its options to its report.

use super::{
    Error, Method, Mode, Places, PromptTemplate, Scoring, Task,
    answering::Asker,
    pair::{Pair, Who, ms},
    questions::Questions,
    report,
    results::{Manifest, Summary, TaskRun},
    router::Router,
    samples::{Sample, SampleFile},
};
use crate::{
    backend,
    durable::{self, WriteError},
    pipeline::{FuserChoice, SessionOptions},
};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

/// Everything that is asked of an evaluation.
#[derive(Clone, Debug)]
pub struct Options {
    pub title: String,
    pub tasks: Vec<Task>,
    pub places: Places,
    pub modes: Vec<Mode>,
    /// Models, fusers, alignment, machine; its mode is found from `modes`.
    pub session: SessionOptions,
    pub identical_fuser: Option<FuserChoice>,
    /// Instead of the tasks' own.
    pub method: Option<Method>,
    pub prompt: Option<PromptTemplate>,
    pub chain_of_thought: bool,
    /// Exemplars before each question.
    pub few_shot: usize,
    pub response: Option<String>,
    pub max_new_tokens: Option<usize>,
    /// Most tokens of text-to-text's background.
    pub background_tokens: usize,
    /// As many questions, evenly spaced over the file.
    pub limit: Option<usize>,
    pub context_tokens: Option<usize>,
    /// Training questions of the router.
    pub router_questions: usize,
    pub seed: u64,
    pub cache_sharer: Option<PathBuf>,
    pub out: PathBuf,
}

/// Who follows an evaluation.
pub trait Watcher {
    /// Something to read; may have several lines.
    fn say(&self, text: &str);
    fn loading(&self, _path: &Path, _done: u64, _total: u64) {}
    /// Answers of `total`, and the accuracy of each mode so far.
    fn progress(&self, _done: usize, _total: usize, _accuracy: &str) {}
}

/// Asks all questions in all modes, writes results and report. Questions that `out` holds the answers of are not asked again.
pub fn run(options: &Options, watcher: &dyn Watcher, stop: &AtomicBool) -> Result<Summary, Error> {
    let begin = Instant::now();
    options.check()?;
    let mut tasks = Vec::new();
    for task in &options.tasks {
        tasks.push(Questions::load(options, task)?);
    }
    let manifest =
        Manifest::open(options, &tasks.iter().map(|task| task.sha256.clone()).collect::<Vec<_>>())?;
    let backend = backend::open(options.session.device, options.session.threads)?;
    let mut models = Models::open(options, &backend, watcher)?;
    let mut runs = Vec::new();
    for questions in &mut tasks {
        questions.prepare(options, &models)?;
        runs.push(ask(options, questions, &mut models, &manifest, watcher, stop)?);
    }
    let seconds = begin.elapsed().as_secs_f64();
    let summary =
        Summary::new(options, &manifest, &backend.description(), &models.described(), runs, seconds);
    summary.write(&options.out)?;
    let page = report::write(&summary, &options.out)?;
    watcher.say(&format!("report: {}", page.display()));
    Ok(summary)
}

impl Options {
    pub(crate) fn check(&self) -> Result<(), Error> {
        let given = self.session.sharers.len();
        for mode in &self.modes {
            if mode.sharers() > given {
                return Err(Error::Sharers { mode: mode.to_string(), needed: mode.sharers(), given });
            }
        }
        if self.modes.contains(&Mode::Identical) && self.identical_fuser.is_none() {
            return Err(Error::NoIdenticalFuser);
        }
        if self.chain_of_thought && self.method == Some(Method::Logits) {
            return Err(Error::Combination { what: "chain of thought", with: "--method logits".into() });
        }
        for task in &self.tasks {
            if task.scoring != Scoring::Choice && self.method == Some(Method::Logits) {
                return Err(Error::Combination {
                    what: "--method logits",
                    with: format!("task {}, which has no choices", task.name),
                });
            }
        }
        Ok(())
    }

    pub(crate) fn method(&self, task: &Task) -> Method {
        match self.chain_of_thought {
            true => Method::Generate,
            false => self.method.unwrap_or(task.method),
        }
    }

    /// What an answer begins with: nothing where it is generated, unless asked for.
    pub(crate) fn response(&self, task: &Task) -> String {
        match (&self.response, self.method(task)) {
            (Some(response), _) => response.clone(),
            (None, Method::Logits) => task.response.clone(),
            (None, Method::Generate) => String::new(),
        }
    }

    pub(super) fn template<'a>(&'a self, task: &'a Task) -> &'a PromptTemplate {
        match &self.prompt {
            Some(prompt) => prompt,
            None if self.chain_of_thought && task.scoring == Scoring::Choice => {
                &PromptTemplate::ChainOfThought
            }
            None => &task.prompt,
        }
    }

    pub(super) fn max_new_tokens(&self, task: &Task) -> usize {
        let of_task = if self.chain_of_thought { task.max_new_tokens.max(512) } else { task.max_new_tokens };
        self.max_new_tokens.unwrap_or(of_task)
    }

    /// Tokens that may follow a prompt.
    pub(super) fn more(&self, task: &Task) -> usize {
        if self.method(task) == Method::Generate { self.max_new_tokens(task) } else { 0 }
    }
}

/// The models of all modes.
pub(crate) struct Models {
    pub pair: Pair,
    pub identical: Option<Pair>,
}

impl Models {
    pub(crate) fn open(
        options: &Options,
        backend: &std::sync::Arc<dyn backend::Backend>,
        watcher: &dyn Watcher,
    ) -> Result<Models, Error> {
        use crate::pipeline::Mode as Needs;
        let any = |test: &dyn Fn(&Mode) -> bool| options.modes.iter().any(test);
        let mode = if any(&|mode| mode.fuses() || matches!(mode, Mode::Sharer(1..))) {
            Needs::C2c
        } else if any(&|mode| matches!(mode, Mode::T2t(_) | Mode::Router)) {
            Needs::T2t
        } else {
            match (
                any(&|mode| matches!(mode, Mode::Receiver | Mode::Identical)),
                any(&|mode| matches!(mode, Mode::Sharer(_))),
            ) {
                (true, true) => Needs::T2t,
                (false, true) => Needs::Sharer,
                _ => Needs::Receiver,
            }
        };
        let loading = |path: &Path, done, total| watcher.loading(path, done, total);
        let cache = options.cache_sharer.as_deref();
        let own = SessionOptions { mode, ..options.session.clone() };
        let pair = Pair::open(own, backend, cache, &loading)?;
        let identical = match &options.identical_fuser {
            Some(fuser) if options.modes.contains(&Mode::Identical) => {
                let twice = SessionOptions {
                    mode: Needs::C2c,
                    sharers: options.session.receiver.iter().cloned().collect(),
                    fusers: vec![fuser.clone()],
                    ..options.session.clone()
                };
                Some(Pair::open(twice, backend, cache, &loading)?)
            }
            _ => None,
        };
        Ok(Models { pair, identical })
    }

    /// What results say of the models.
    pub(crate) fn described(&self) -> Value {
        let party = |model: &crate::pipeline::Model| serde_json::to_value(model.party()).unwrap_or_default();
        let session = &self.pair.session;
        json!({
            "receiver": session.receiver.as_ref().map(party),
            "sharers": session.sharers.iter().map(party).collect::<Vec<_>>(),
            "gates": session.gates,
            "fuser_bytes": session.fusers.iter().map(|fuser| fuser.bytes()).collect::<Vec<_>>(),
            "chat_template": session.receiver.as_ref().or(session.sharers.first())
                .and_then(|model| model.tokenizer.as_ref()?.chat_template().map(|template| template.source())),
        })
    }
}

/// Asks the questions of one task.
fn ask(
    options: &Options,
    questions: &Questions,
    models: &mut Models,
    manifest: &Manifest,
    watcher: &dyn Watcher,
    stop: &AtomicBool,
) -> Result<TaskRun, Error> {
    let mut files: Vec<SampleFile> = Vec::new();
    for mode in &options.modes {
        let folder = options.out.join(folder_of(mode));
        fs::create_dir_all(&folder).map_err(WriteError::at(&folder))?;
        files.push(SampleFile::open(&manifest.samples(&folder, &questions.task.name))?);
    }
    let missing = |files: &[SampleFile]| {
        questions.items.iter().any(|item| files.iter().any(|file| !file.has(item.number)))
    };
    let router_at = options.modes.iter().position(|mode| *mode == Mode::Router);
    let router = match router_at {
        Some(at) if missing(&files[at..=at]) => Some(fit_router(options, questions, models, watcher, stop)?),
        Some(_) => manifest.router(&questions.task.name),
        None => None,
    };
    if let Some(router) = &router {
        manifest.keep_router(&questions.task.name, router)?;
    }
    // What a Sharer reads to answer is still there when it is fused, unless it has read something else meanwhile.
    let mut order: Vec<usize> = (0..files.len()).collect();
    order.sort_by_key(|&at| match options.modes[at] {
        Mode::Sharer(_) | Mode::Router => 0,
        Mode::T2t(_) => 2,
        _ => 1,
    });
    let total = questions.items.len() * files.len();
    let mut done = 0;
    let mut asker = Asker::new(options, questions, models, router.as_ref());
    for (index, item) in questions.items.iter().enumerate() {
        for &at in &order {
            let (mode, file) = (&options.modes[at], &mut files[at]);
            if !file.has(item.number) {
                if stop.load(Ordering::Relaxed) {
                    return Err(Error::Interrupted);
                }
                let answered = asker.answer(*mode, false, index)?;
                file.add(Sample::new(item, &answered))?;
            }
            done += 1;
        }
        asker.forget();
        let rate = |file: &SampleFile| {
            let right = file.samples.iter().filter(|sample| sample.correct()).count();
            100.0 * right as f64 / file.samples.len().max(1) as f64
        };
        let accuracy: Vec<String> = options
            .modes
            .iter()
            .zip(&files)
            .map(|(mode, file)| format!("{mode} {:.1} %", rate(file)))
            .collect();
        watcher.progress(done, total, &format!("{}: {}", questions.task.name, accuracy.join(", ")));
    }
    let mut samples = Vec::new();
    for file in files {
        file.sync()?;
        let mut own = file.samples;
        own.retain(|sample| questions.items.iter().any(|item| item.number == sample.doc_id));
        own.sort_by_key(|sample| sample.doc_id);
        samples.push(own);
    }
    Ok(TaskRun {
        task: questions.task.clone(),
        method: options.method(&questions.task),
        prompt: options.template(&questions.task).clone(),
        response: options.response(&questions.task),
        excluded: questions.excluded.clone(),
        router,
        samples,
    })
}

/// A folder is named as the mode, without what file systems dislike.
pub fn folder_of(mode: &Mode) -> String {
    mode.to_string().replace([':', '@'], "_")
}

fn fit_router(
    options: &Options,
    questions: &Questions,
    models: &mut Models,
    watcher: &dyn Watcher,
    stop: &AtomicBool,
) -> Result<Router, Error> {
    let start = Instant::now();
    let mut asker = Asker::new(options, questions, models, None);
    let mut seen = Vec::new();
    for index in 0..questions.lessons.len() {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let receiver = asker.alone(Who::Receiver, true, index)?;
        let features = receiver.1;
        let sharer = asker.alone(Who::Sharer(0), true, index)?;
        seen.push((features, receiver.0.correct, sharer.0.correct));
        watcher.progress(
            index + 1,
            questions.lessons.len(),
            &format!("{}: training the router", questions.task.name),
        );
    }
    Ok(Router::fit(&seen, ms(start.elapsed())))
}

/// Writes a text file, whole or not at all.
pub(crate) fn write_text(path: &Path, text: &str) -> Result<(), WriteError> {
    durable::write(path, |out| out.write_all(text.as_bytes()).map_err(WriteError::at(path)))
}
