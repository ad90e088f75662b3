//! One question in one mode: what is read, what comes out, whether it is right.

use super::{
    Cost, Error, Method, Mode, Options, Scoring, asking, extract,
    items::{Gold, Item, letter},
    math::{self, Written},
    mode::{Background, Variant},
    pair::{Prompted, Who},
    questions::{Questions, key},
    router::{self, Router},
    run::Models,
    samples::Answered,
};
use crate::{
    pipeline::{Prompt, t2t},
    tokenizer::Message,
};
use std::{collections::HashMap, rc::Rc, time::Instant};

/// An answer and the router's features of its question.
type Known = Rc<(Answered, [f64; router::FEATURES])>;

/// Asks one question after the other; what several modes need of a question is computed once.
pub(crate) struct Asker<'a> {
    options: &'a Options,
    questions: &'a Questions,
    models: &'a mut Models,
    router: Option<&'a Router>,
    memory: HashMap<usize, Known>,
}

impl<'a> Asker<'a> {
    pub fn new(
        options: &'a Options,
        questions: &'a Questions,
        models: &'a mut Models,
        router: Option<&'a Router>,
    ) -> Asker<'a> {
        Asker { options, questions, models, router, memory: HashMap::new() }
    }

    /// The next question is another one.
    pub fn forget(&mut self) {
        self.memory.clear();
    }

    fn item(&self, lesson: bool, index: usize) -> &'a Item {
        let items = if lesson { &self.questions.lessons } else { &self.questions.items };
        &items[index]
    }

    fn messages(&self, lesson: bool, index: usize) -> &'a [Message] {
        &self.questions.prompts[&(lesson, self.item(lesson, index).number)]
    }

    pub fn answer(&mut self, mode: Mode, lesson: bool, index: usize) -> Result<Answered, Error> {
        let response = self.options.response(&self.questions.task);
        let more = self.options.more(&self.questions.task);
        match mode {
            Mode::Receiver | Mode::Sharer(_) => {
                let who = if let Mode::Sharer(which) = mode { Who::Sharer(which) } else { Who::Receiver };
                let known = self.alone(who, lesson, index)?;
                Ok(copied(&known.0))
            }
            Mode::Router => {
                let receiver = self.alone(Who::Receiver, lesson, index)?;
                let routed = self.router.is_some_and(|router| router.picks_sharer(&receiver.1));
                if !routed {
                    return Ok(Answered { note: Some("receiver".into()), ..copied(&receiver.0) });
                }
                let sharer = self.alone(Who::Sharer(0), lesson, index)?;
                let mut answered = Answered { note: Some("sharer".into()), ..copied(&sharer.0) };
                // The Receiver had to read the question for the features.
                let asked = receiver.0.cost.receiver_ms;
                answered.cost.receiver_ms = asked;
                answered.cost.first_token_ms = answered.cost.first_token_ms.map(|time| time + asked);
                answered.cost.total_ms = answered.cost.total_ms.map(|time| time + asked);
                Ok(answered)
            }
            Mode::T2t(background) => self.text_to_text(background, lesson, index),
            Mode::C2c { sharer, variant } => {
                let messages = self.messages(lesson, index);
                let part = if let Variant::Fraction(part) = variant { Some(part) } else { None };
                let start = Instant::now();
                let prompt = self.models.pair.align(messages, &response, part)?;
                let aligned = start.elapsed();
                let other = match variant {
                    Variant::Swap => {
                        let before = asking::swapped_with(index, self.questions.items.len());
                        Some(self.models.pair.align(self.messages(false, before), &response, None)?)
                    }
                    _ => None,
                };
                let seed = self.options.seed.wrapping_add(self.item(lesson, index).number as u64);
                let mut prompted =
                    self.models.pair.fuse(prompt, other.as_ref(), sharer, variant, seed, more)?;
                prompted.charge(aligned);
                self.finish(Ask::pair(Who::Fused), prompted, lesson, index)
            }
            Mode::Identical => {
                let messages = self.messages(lesson, index).to_vec();
                let pair = self.models.identical.as_mut().ok_or(Error::NoIdenticalFuser)?;
                let start = Instant::now();
                let prompt: Prompt = pair.align(&messages, &response, None)?;
                let aligned = start.elapsed();
                let mut prompted = pair.fuse(prompt, None, None, Variant::Plain, 0, more)?;
                prompted.charge(aligned);
                self.finish(Ask { identical: true, ..Ask::pair(Who::Fused) }, prompted, lesson, index)
            }
        }
    }

    /// One model on its own, with the router's features of it.
    pub fn alone(&mut self, who: Who, lesson: bool, index: usize) -> Result<Known, Error> {
        if let (false, Some(known)) = (lesson, self.memory.get(&key(who))) {
            return Ok(known.clone());
        }
        let response = self.options.response(&self.questions.task);
        let tokenizer = self.models.pair.model(who)?.tokenizer()?;
        let start = Instant::now();
        let (text, ids) = asking::alone(tokenizer, self.messages(lesson, index), &response)?;
        let tokenised = start.elapsed();
        let mut prompted = self.models.pair.read(who, &ids, self.options.more(&self.questions.task))?;
        prompted.charge(tokenised);
        let letters = self.questions.letters.get(&key(who));
        let of_letters = |tokens: &Vec<u32>| {
            let choices = self.item(lesson, index).choices.len();
            tokens.iter().take(choices).map(|&token| prompted.logits[token as usize]).collect::<Vec<f32>>()
        };
        let scores = letters.map_or_else(|| prompted.logits.clone(), of_letters);
        let features = router::features(&scores, ids.len());
        let answered = self.finish(Ask { text: Some(text), ..Ask::pair(who) }, prompted, lesson, index)?;
        let known = Rc::new((answered, features));
        if !lesson {
            self.memory.insert(key(who), known.clone());
        }
        Ok(known)
    }

    fn text_to_text(
        &mut self,
        background: Background,
        lesson: bool,
        index: usize,
    ) -> Result<Answered, Error> {
        let response = self.options.response(&self.questions.task);
        let more = self.options.more(&self.questions.task);
        let question = self.item(lesson, index).question.clone();
        let request = match background {
            Background::Sentence => t2t::ask(&question),
            Background::Brief => t2t::ask_briefly(&question),
        };
        let start = Instant::now();
        let sharer = self.models.pair.model(Who::Sharer(0))?;
        let (_, ids) = asking::alone(sharer.tokenizer()?, &request, "")?;
        let left = sharer.decoder.config.context_length.saturating_sub(ids.len());
        let most = self.options.background_tokens.min(left).max(1);
        let tokenised = start.elapsed();
        let mut first = self.models.pair.read(Who::Sharer(0), &ids, most)?;
        first.charge(tokenised);
        let (written, first) = self.models.pair.generate(first, most)?;
        let start = Instant::now();
        let mut text = written.text.trim().to_owned();
        let messages = self.messages(lesson, index).to_vec();
        let receiver = self.models.pair.model(Who::Receiver)?;
        let limit = receiver.decoder.config.context_length.saturating_sub(more);
        let (rendered, ids) = loop {
            let mut conversation = messages[..messages.len() - 1].to_vec();
            conversation.extend(t2t::follow(request.clone(), &text, &messages[messages.len() - 1].content));
            let found = asking::alone(receiver.tokenizer()?, &conversation, &response)?;
            if found.1.len() <= limit || text.is_empty() {
                break found;
            }
            // A background that leaves no room for the question loses its end.
            let shorter = text.chars().count() * 3 / 4;
            text = text.chars().take(shorter).collect();
        };
        let tokenised = start.elapsed();
        let mut prompted = self.models.pair.read(Who::Receiver, &ids, more)?;
        prompted.charge(tokenised);
        let cost = &mut prompted.cost;
        let spent = first.total_ms.unwrap_or_default();
        cost.sharer_ms = first.sharer_ms;
        cost.bytes = text.len() as u64;
        cost.tokens = first.tokens;
        let mut answered =
            self.finish(Ask { text: Some(rendered), ..Ask::pair(Who::Receiver) }, prompted, lesson, index)?;
        let later = |time: Option<f64>| time.map(|time| time + spent);
        answered.cost.first_token_ms = later(answered.cost.first_token_ms);
        answered.cost.total_ms = later(answered.cost.total_ms);
        answered.note = Some(text);
        Ok(answered)
    }

    /// From the logits behind a prompt to a graded answer.
    fn finish(
        &mut self,
        ask: Ask,
        prompted: Prompted,
        lesson: bool,
        index: usize,
    ) -> Result<Answered, Error> {
        let task = &self.questions.task;
        let item = self.item(lesson, index);
        let text = match &ask.text {
            Some(text) => text.clone(),
            None => {
                let tokenizer = self.models.pair.model(Who::Receiver)?.tokenizer()?;
                asking::text(tokenizer, self.messages(lesson, index), &self.options.response(task))?
            }
        };
        if self.options.method(task) == Method::Logits {
            let letters = &self.questions.letters[&key(ask.who)];
            let best = asking::best_choice(&prompted.logits, letters, item.choices.len());
            let scores = log_probabilities(&prompted.logits, &letters[..item.choices.len()]);
            return Ok(Answered {
                prompt: text,
                letters: Some(scores),
                text: None,
                most_tokens: 0,
                prediction: Some(letter(best).to_string()),
                correct: item.gold == Gold::Choice(best),
                cost: prompted.cost,
                note: None,
            });
        }
        let most = self.options.max_new_tokens(task);
        let pair = match (ask.identical, &mut self.models.identical) {
            (true, Some(identical)) => identical,
            _ => &mut self.models.pair,
        };
        let (answer, cost): (_, Cost) = pair.generate(prompted, most)?;
        let item = self.item(lesson, index);
        let (prediction, correct) = graded(task.scoring, item, &answer.text);
        Ok(Answered {
            prompt: text,
            letters: None,
            text: Some(answer.text),
            most_tokens: most,
            prediction,
            correct,
            cost,
            note: None,
        })
    }
}

/// Whose logits are to be read.
struct Ask {
    who: Who,
    identical: bool,
    /// What the answering model read.
    text: Option<String>,
}

impl Ask {
    fn pair(who: Who) -> Ask {
        Ask { who, identical: false, text: None }
    }
}

fn copied(answered: &Answered) -> Answered {
    Answered {
        prompt: answered.prompt.clone(),
        letters: answered.letters.clone(),
        text: answered.text.clone(),
        most_tokens: answered.most_tokens,
        prediction: answered.prediction.clone(),
        correct: answered.correct,
        cost: answered.cost.clone(),
        note: answered.note.clone(),
    }
}

/// What a generated text says, and whether that is right.
fn graded(scoring: Scoring, item: &Item, text: &str) -> (Option<String>, bool) {
    match (&item.gold, scoring) {
        (Gold::Choice(gold), _) => {
            let choice =
                extract::choice(text, item.choices.len()).filter(|choice| *choice < item.choices.len());
            (choice.map(|choice| letter(choice).to_string()), choice == Some(*gold))
        }
        (Gold::Texts(answers), Scoring::Number | Scoring::Latex) => {
            let written = if scoring == Scoring::Latex { Written::Latex } else { Written::Plain };
            let grades = answers.iter().map(|answer| math::grade(text, answer, written)).collect::<Vec<_>>();
            let extracted = grades.first().and_then(|grade| grade.extracted.clone());
            (extracted, grades.iter().any(|grade| grade.correct))
        }
        (Gold::Texts(answers), _) => (Some(text.trim().to_owned()), extract::gives(text, answers)),
    }
}

/// Of some tokens among all, and whether each is the most probable of all.
fn log_probabilities(logits: &[f32], tokens: &[u32]) -> Vec<(f64, bool)> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - top).exp()).sum();
    let of = |&token: &u32| {
        let logit = logits[token as usize];
        (f64::from(logit - top) - sum.ln(), logit == top)
    };
    tokens.iter().map(of).collect()
}
