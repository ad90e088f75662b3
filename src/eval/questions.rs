//! The questions of one task, rendered for the models that are to answer.

use super::{
    Error, Method, Mode, Options, Task, asking,
    items::{Excluded, Gold, Item, Items, letter},
    pair::Who,
    run::Models,
    samples::sha256,
};
use crate::{pipeline::t2t, tokenizer::Message};
use std::{collections::HashMap, path::PathBuf};

/// The questions of one task as they are asked.
pub(crate) struct Questions {
    pub task: Task,
    pub sha256: String,
    pub items: Vec<Item>,
    pub excluded: Vec<Excluded>,
    exemplars: Vec<Item>,
    /// Training questions of the router.
    pub lessons: Vec<Item>,
    /// The letters' tokens of Receiver and Sharers, where answers are letters.
    pub letters: HashMap<usize, Vec<u32>>,
    /// The user's message of each of `items`, then of each of `lessons`.
    pub prompts: HashMap<(bool, usize), Vec<Message>>,
}

/// `n` of `all`, evenly spaced.
fn evenly<T>(all: Vec<T>, n: usize) -> Vec<T> {
    let total = all.len();
    if n >= total {
        return all;
    }
    let mut kept = Vec::new();
    for (index, one) in all.into_iter().enumerate() {
        if kept.len() < n && index >= kept.len() * total / n {
            kept.push(one);
        }
    }
    kept
}

impl Questions {
    pub(crate) fn load(options: &Options, task: &Task) -> Result<Questions, Error> {
        let path = options.places.questions(task)?;
        let Items { items, excluded } = Items::load(task, &path)?;
        if items.is_empty() {
            let reason = excluded
                .first()
                .map_or("there is none".into(), |first| format!("{}: {}", first.origin, first.reason));
            return Err(Error::NothingToAsk { task: task.name.clone(), excluded: excluded.len(), reason });
        }
        let content: String = items.iter().map(|item| sha256(&item.doc.to_string())).collect();
        let items = match options.limit {
            Some(limit) => evenly(items, limit),
            None => items,
        };
        let others = |file: &Option<PathBuf>| -> Result<Vec<Item>, Error> {
            let Some(file) = file else { return Ok(Vec::new()) };
            Ok(Items::load(task, &options.places.find(task, file)?)?.items)
        };
        let exemplars = match options.few_shot {
            0 => Vec::new(),
            _ => others(&task.few_shot.clone().or(task.train.clone()))?,
        };
        let lessons = match options.modes.contains(&Mode::Router) {
            false => Vec::new(),
            true => evenly(others(&task.train)?, options.router_questions),
        };
        if options.modes.contains(&Mode::Router) && lessons.is_empty() {
            return Err(Error::NoTraining { task: task.name.clone() });
        }
        if options.few_shot > 0 && exemplars.len() <= options.few_shot {
            return Err(Error::Combination {
                what: "--few-shot",
                with: format!("task {}, which has no file of exemplars", task.name),
            });
        }
        let task = Task { context_tokens: options.context_tokens.or(task.context_tokens), ..task.clone() };
        Ok(Questions {
            sha256: sha256(&content),
            task,
            items,
            excluded,
            exemplars,
            lessons,
            letters: HashMap::new(),
            prompts: HashMap::new(),
        })
    }

    /// Renders prompts, and takes out what is longer than a model's context.
    pub(crate) fn prepare(&mut self, options: &Options, models: &Models) -> Result<(), Error> {
        let session = &models.pair.session;
        let parties: Vec<Who> = session
            .receiver
            .iter()
            .map(|_| Who::Receiver)
            .chain((0..session.sharers.len()).map(Who::Sharer))
            .collect();
        if options.method(&self.task) == Method::Logits {
            let most =
                self.items.iter().chain(&self.lessons).map(|item| item.choices.len()).max().unwrap_or(0);
            for &who in &parties {
                let model = models.pair.model(who)?;
                let tokens = asking::letters(model.tokenizer()?, most)
                    .map_err(|source| Error::Letters { model: model.path.display().to_string(), source })?;
                self.letters.insert(key(who), tokens);
            }
        }
        let response = options.response(&self.task);
        let more = options.more(&self.task);
        let background = options.modes.iter().any(|mode| matches!(mode, Mode::T2t(_)));
        let mut kept = [Vec::new(), Vec::new()];
        for (lesson, items) in
            [(false, std::mem::take(&mut self.items)), (true, std::mem::take(&mut self.lessons))]
        {
            for item in items {
                let (messages, question) = self.messages(options, &item, models)?;
                let mut problem = None;
                for &who in &parties {
                    let model = models.pair.model(who)?;
                    let tokenizer = model.tokenizer()?;
                    let (_, mut ids) = asking::alone(tokenizer, &messages, &response)?;
                    if background && who == Who::Receiver {
                        // The longest thing it reads: the request as well, and the prompt behind it.
                        let request = t2t::ask_briefly(&question);
                        let both = t2t::follow(request, "", &messages[messages.len() - 1].content);
                        ids = asking::alone(tokenizer, &both, &response)?.1;
                    }
                    let (tokens, limit) = (ids.len() + more, model.decoder.config.context_length);
                    if tokens > limit && problem.is_none() {
                        problem = Some(format!(
                            "{tokens} tokens with its answer are more than the context of {limit} of {}",
                            model.path.display()
                        ));
                    }
                }
                match problem {
                    Some(reason) if !lesson => self.excluded.push(Excluded { origin: item.origin, reason }),
                    Some(_) => {}
                    None => {
                        self.prompts.insert((lesson, item.number), messages);
                        kept[usize::from(lesson)].push(Item { question, ..item });
                    }
                }
            }
        }
        let [items, lessons] = kept;
        (self.items, self.lessons) = (items, lessons);
        if self.items.is_empty() {
            let reason = self
                .excluded
                .last()
                .map_or(String::new(), |last| format!("{}: {}", last.origin, last.reason));
            return Err(Error::NothingToAsk {
                task: self.task.name.clone(),
                excluded: self.excluded.len(),
                reason,
            });
        }
        Ok(())
    }

    /// The conversation before the answer, and the question as text-to-text's Sharer is asked it.
    fn messages(
        &self,
        options: &Options,
        item: &Item,
        models: &Models,
    ) -> Result<(Vec<Message>, String), Error> {
        let template = options.template(&self.task);
        let mut messages = Vec::new();
        let subject = |exemplar: &&Item| exemplar.subject == item.subject;
        let mut own: Vec<&Item> = self.exemplars.iter().filter(subject).collect();
        if own.len() <= options.few_shot {
            own = self.exemplars.iter().collect();
        }
        for exemplar in own.into_iter().filter(|exemplar| exemplar.doc != item.doc).take(options.few_shot) {
            messages.push(Message::new("user", template.ask(&exemplar.question, &exemplar.choices)));
            let answer = match &exemplar.gold {
                Gold::Choice(index) => format!("{} {}.", self.task.response, letter(*index)),
                Gold::Texts(_) => {
                    let worked = ["response", "answer"].iter().find_map(|name| exemplar.doc[*name].as_str());
                    worked.map_or_else(|| exemplar.target(), str::to_owned)
                }
            };
            messages.push(Message::new("assistant", answer));
        }
        let question = match &item.context {
            Some(context) => format!("{}\n\n{}", self.shortened(context, models)?, item.question),
            None => item.question.clone(),
        };
        messages.push(Message::new("user", template.ask(&question, &item.choices)));
        Ok((messages, question))
    }

    /// A context without its middle, where it has more than the task's `context_tokens`.
    fn shortened(&self, context: &str, models: &Models) -> Result<String, Error> {
        let Some(most) = self.task.context_tokens else { return Ok(context.into()) };
        let who = if models.pair.session.receiver.is_some() { Who::Receiver } else { Who::Sharer(0) };
        let tokenizer = models.pair.model(who)?.tokenizer()?;
        let ids = tokenizer.encode(context, false)?.ids;
        if ids.len() <= most {
            return Ok(context.into());
        }
        let (front, back) = (most / 2, most - most / 2);
        let front = tokenizer.decode(&ids[..front], true);
        Ok(front + &tokenizer.decode(&ids[ids.len() - back..], true))
    }
}

/// Where a model's letters are kept.
pub(crate) fn key(who: Who) -> usize {
    match who {
        Who::Sharer(index) => index + 1,
        _ => 0,
    }
}
