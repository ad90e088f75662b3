//! The cache-enrichment oracle: a question's cache as it is after something was read before it, without what was read.
//!
//! The Receiver reads exemplars, then the question; the exemplars' columns are dropped, the question's stay, moved back to where they would be
//! without exemplars. What is left has the length of the plain cache and other contents: all that enriching a cache can give without another
//! model. The last section is read anew on it, as behind a fused cache.

use super::{
    Enrichment, Error, Figure, Finding,
    by_layer::{Scored, asks, sweep, table},
    finding::{Table, chance, percent},
    probe::Probe,
};
use crate::{
    cache::{Content, Domain, Fingerprint, KeyPositions, KvColumns, Snapshot},
    eval::{self, asking, figures::bars, pair::Who, questions::Questions},
    model::Goal,
    pipeline::{Lane, t2t},
    tokenizer::Message,
};
use serde_json::json;

/// A question read alone, and behind what enriches it.
struct Reading {
    index: usize,
    plain: Vec<u32>,
    enriched: Vec<u32>,
    /// Tokens of the plain prompt before the enriching text: its beginning is the same.
    head: usize,
    /// Tokens of the plain prompt that are read on the enriched cache.
    last: usize,
}

impl Reading {
    /// `None` where the plain prompt is not the enriched one with a piece taken out.
    fn new(index: usize, plain: Vec<u32>, enriched: Vec<u32>, last: usize) -> Option<Reading> {
        let tail = plain.iter().rev().zip(enriched.iter().rev()).take_while(|(a, b)| a == b).count();
        let head = plain.len() - tail;
        let last = last.clamp(1, plain.len());
        // The last section is read on the cache: it is no part of it.
        let fits = plain[..head] == enriched[..head.min(enriched.len())]
            && tail >= last
            && enriched.len() >= plain.len();
        fits.then_some(Reading { index, plain, enriched, head, last })
    }

    fn dropped(&self) -> usize {
        self.enriched.len() - self.plain.len()
    }
}

/// Both caches of a question, without its last section.
struct Caches {
    plain: Snapshot,
    enriched: Vec<KvColumns>,
}

/// Reads `ids` into a lane that forgets all else.
fn begin(lane: &mut Lane, ids: &[u32], goal: Goal) -> Result<(), Error> {
    lane.truncate(0, 0);
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    lane.append(ids, &positions, goal, |_, _| {})?;
    Ok(())
}

/// Reads a question both ways, in `lane`.
fn read(lane: &mut Lane, reading: &Reading) -> Result<Caches, Error> {
    let keep = reading.plain.len() - reading.last;
    let layers = lane.kv.layers().len();
    let dropped = reading.dropped();
    begin(lane, &reading.enriched[..keep + dropped], Goal::Cache)?;
    let width = lane.kv.shape().width();
    let dim = lane.kv.shape().head_dim;
    let mut enriched = Vec::new();
    for layer in 0..layers {
        let all = lane.read(layer, 0, keep + dropped)?;
        let cut = |rows: &[f32]| {
            [&rows[..reading.head * width], &rows[(reading.head + dropped) * width..]].concat()
        };
        let (mut keys, values) = (cut(&all.keys), cut(&all.values));
        if let Some(rotation) = lane.kv.keys().rotation(layer).filter(|_| dropped > 0) {
            for (position, row) in keys.chunks_exact_mut(width).enumerate().skip(reading.head) {
                for head in row.chunks_exact_mut(dim) {
                    rotation.undo(head, (position + dropped) as u32);
                    rotation.apply(head, position as u32);
                }
            }
        }
        enriched.push(KvColumns { keys, values });
    }
    begin(lane, &reading.plain[..keep], Goal::Cache)?;
    let domain = Domain {
        // Of this run's memory alone.
        model: Fingerprint::of([]),
        tokenizer: Fingerprint::of([]),
        content: Content::Plain,
        keys: KeyPositions::PostRope,
        salt: String::new(),
    };
    let positions: Vec<u32> = (0..keep as u32).collect();
    Ok(Caches { plain: lane.capture(domain, &positions)?, enriched })
}

/// Logits after the last section, on the plain cache with the layers marked enriched.
fn answer(lane: &mut Lane, reading: &Reading, caches: &Caches, layers: &[bool]) -> Result<Vec<f32>, Error> {
    let mut cache = caches.plain.clone();
    for ((own, enriched), _) in
        cache.layers.iter_mut().zip(&caches.enriched).zip(layers).filter(|(_, set)| **set)
    {
        own.clone_from(enriched);
    }
    lane.restore(&cache)?;
    let keep = reading.plain.len() - reading.last;
    let positions: Vec<u32> = (keep as u32..reading.plain.len() as u32).collect();
    lane.append(&reading.plain[keep..], &positions, Goal::Hidden, |_, _| {})?;
    Ok(lane.logits()?)
}

/// What the Sharer writes when it is asked for background, as text-to-text asks.
fn background(probe: &mut Probe, index: usize) -> Result<Vec<Message>, Error> {
    let request = t2t::ask(&probe.questions.items[index].question);
    let sharer = probe.models.pair.model(Who::Sharer(0))?;
    let (_, ids) = asking::alone(sharer.tokenizer()?, &request, "").map_err(eval::Error::from)?;
    let room = sharer.decoder.config.context_length.saturating_sub(ids.len());
    let most = probe.options.background_tokens.min(room).max(1);
    let first = probe.pair().read(Who::Sharer(0), &ids, most)?;
    let (written, _) = probe.pair().generate(first, most)?;
    let messages = probe.messages(index);
    let mut conversation = messages[..messages.len() - 1].to_vec();
    conversation.extend(t2t::follow(request, written.text.trim(), &messages[messages.len() - 1].content));
    Ok(conversation)
}

pub(super) fn ask(probe: &mut Probe, enrichment: Enrichment) -> Result<Finding, Error> {
    let sample = probe.sample();
    let few_shot = match enrichment {
        Enrichment::Exemplars(count) => {
            let options = eval::Options { few_shot: count, ..probe.options.clone() };
            let mut questions = Questions::load(&options, &options.tasks[0])?;
            questions.prepare(&options, &probe.models)?;
            Some(questions)
        }
        Enrichment::Background => None,
    };
    let response = probe.response();
    let context = probe.models.pair.model(Who::Receiver)?.decoder.config.context_length;
    let (mut readings, mut other, mut long) = (Vec::new(), 0, 0);
    for &index in &sample {
        let enriched = match &few_shot {
            // What is too long with exemplars is not among its questions.
            Some(few_shot) => few_shot.prompts.get(&(false, probe.questions.items[index].number)).cloned(),
            None => Some(background(probe, index)?),
        };
        let last = probe.prompt(index)?.sections.last().map_or(1, |section| section.len);
        let tokenizer = probe.models.pair.model(Who::Receiver)?.tokenizer()?;
        let ids = |messages: &[Message]| -> Result<Vec<u32>, Error> {
            Ok(asking::alone(tokenizer, messages, &response).map_err(eval::Error::from)?.1)
        };
        let enriched = enriched.map(|messages| ids(&messages)).transpose()?;
        let Some(enriched) = enriched.filter(|enriched| enriched.len() <= context) else {
            long += 1;
            continue;
        };
        match Reading::new(index, ids(probe.messages(index))?, enriched, last) {
            Some(reading) => readings.push(reading),
            None => other += 1,
        }
    }
    if readings.is_empty() {
        let reason =
            if long > 0 { "or they are longer than the context" } else { "the template changes them" };
        return Err(Error::NothingEnriched { asked: sample.len(), reason });
    }
    let (layers, longest) =
        (probe.layers(), readings.iter().map(|reading| reading.enriched.len()).max().unwrap_or(1));
    let receiver = probe.models.pair.model(Who::Receiver)?;
    let mut lane = probe.models.pair.session.lane(receiver, longest)?;
    // The whole enriched prompt, exemplars kept: what dropping them costs.
    let places: Vec<usize> = (0..readings.len()).collect();
    let kept = Scored::of("nothing dropped", &places, |at| {
        let reading = &readings[at];
        begin(&mut lane, &reading.enriched, Goal::Hidden)?;
        Ok(probe.right(Who::Receiver, &lane.logits()?, reading.index))
    })?
    .quiet();
    let (mut done, total) = (0, asks(readings.len()));
    let swept = sweep(layers, &places, &mut |at, sets| {
        done += 1;
        probe.watcher.progress(done, total, "oracle");
        let reading = &readings[at];
        let caches = read(&mut lane, reading)?;
        let each = sets.iter().map(|set| {
            let logits = answer(&mut lane, reading, &caches, set)?;
            Ok(probe.right(Who::Receiver, &logits, reading.index))
        });
        each.collect()
    })?;
    let mut scored = vec![
        Scored { name: "plain".into(), ..swept.none.clone() },
        Scored { name: "all layers".into(), ..swept.all.clone() },
        kept.clone(),
    ];
    scored.extend(swept.single.iter().cloned());
    let mean = |of: &dyn Fn(&Reading) -> usize| {
        readings.iter().map(of).sum::<usize>() as f64 / readings.len() as f64
    };
    let (stem, by) = match enrichment {
        Enrichment::Exemplars(count) => ("oracle", format!("{count} exemplars of the task")),
        Enrichment::Background => {
            ("oracle_background", "the Sharer's sentence, which text-to-text would send".into())
        }
    };
    let mut sizes = Table::new(
        &format!("{stem}_questions"),
        "Tokens of each question.",
        &["question", "tokens", "dropped", "last section"],
    )
    .long();
    for reading in &readings {
        let number = probe.questions.items[reading.index].number;
        sizes.push([
            json!(number),
            json!(reading.plain.len()),
            json!(reading.dropped()),
            json!(reading.last),
        ]);
    }
    let (_, _, _, p) = swept.all.versus(&swept.none);
    let mut said = vec![format!(
        "plain {}, enriched at the same length {} ({}), with nothing dropped {}",
        percent(swept.none.rate()),
        percent(swept.all.rate()),
        chance(p),
        percent(kept.rate())
    )];
    said.push(format!(
        "layers by what they gain alone, by every second question: {}",
        swept.order.iter().map(usize::to_string).collect::<Vec<_>>().join(" > ")
    ));
    if other + long > 0 {
        said.push(format!(
            "left out: {long} longer than the context, {other} whose tokens are others behind exemplars"
        ));
    }
    let drawn: Vec<_> = scored.iter().chain(&swept.chosen[2..]).map(Scored::bar).collect();
    Ok(Finding {
        question: "oracle",
        title: format!("a cache enriched by {by}"),
        about: format!(
            "The Receiver alone: {by}, then the question ({:.0} and {:.0} tokens); what came before the question is dropped from the cache, the \
             question's keys are turned back to where they would be without it, and the last section is read on that. Then single layers of \
             the plain cache are enriched, and the best and worst, chosen on every second question and scored on the rest.",
            mean(&Reading::dropped),
            mean(&|reading: &Reading| reading.plain.len())
        ),
        said,
        tables: vec![
            table(stem, "Accuracy by what is enriched.", "enriched", &scored),
            table(
                &format!("{stem}_chosen"),
                "The best and the worst layers, on the questions that had no say.",
                "enriched",
                &swept.chosen,
            ),
            sizes,
        ],
        figures: vec![Figure::new(stem, "Accuracy by what is enriched", |ground| bars(&drawn, ground))?],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_is_found() {
        let found = |plain: &[u32], enriched: &[u32], last: usize| {
            Reading::new(0, plain.to_vec(), enriched.to_vec(), last).map(|r| (r.head, r.dropped()))
        };
        // Begin of text, exemplar 7 8 9, question.
        assert_eq!(found(&[1, 5, 6], &[1, 7, 8, 9, 5, 6], 1), Some((1, 3)));
        assert_eq!(found(&[5, 6], &[7, 8, 5, 6], 1), Some((0, 2)));
        assert_eq!(found(&[1, 5, 6], &[1, 5, 6], 2), Some((0, 0)));
        // Another beginning; a question cut into other tokens; a last section that reaches before it.
        assert_eq!(found(&[1, 5, 6], &[2, 7, 5, 6], 1), None);
        assert_eq!(found(&[1, 5, 6], &[1, 7, 55, 6], 1), None);
        assert_eq!(found(&[1, 5, 6], &[1, 7, 5, 6], 3), None);
    }

    /// Keys and values of layer 0 depend on a token and its place alone: behind exemplars, and moved back, they are what they were. Those of
    /// later layers have seen the exemplars.
    #[test]
    fn moved_back_the_first_layer_is_the_plain_one() {
        let session = crate::analysis::probe::builtin();
        let receiver = session.receiver.as_ref().unwrap();
        let mut lane = session.lane(receiver, 64).unwrap();
        let ids = |range: std::ops::Range<u32>| range.collect::<Vec<u32>>();
        let plain = [ids(1..3), ids(100..120)].concat();
        let enriched = [ids(1..3), ids(30..53), ids(100..120)].concat();
        let reading = Reading::new(0, plain, enriched, 4).unwrap();
        assert_eq!((reading.head, reading.dropped()), (2, 23));
        let caches = read(&mut lane, &reading).unwrap();
        let furthest = |layer: usize| {
            let (plain, enriched) = (&caches.plain.layers[layer], &caches.enriched[layer]);
            assert_eq!((plain.keys.len(), plain.values.len()), (18 * 32, 18 * 32));
            assert_eq!((enriched.keys.len(), enriched.values.len()), (18 * 32, 18 * 32));
            let far = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            far(&plain.keys, &enriched.keys).max(far(&plain.values, &enriched.values))
        };
        assert!(furthest(0) < 1e-4, "{}", furthest(0));
        assert!(furthest(1) > 0.05 && furthest(2) > 0.05);

        // Nothing enriched is the whole prompt read at once, to the bit; the first layer alone changes next to nothing.
        let nothing = answer(&mut lane, &reading, &caches, &[false; 3]).unwrap();
        let first = answer(&mut lane, &reading, &caches, &[true, false, false]).unwrap();
        let all = answer(&mut lane, &reading, &caches, &[true; 3]).unwrap();
        begin(&mut lane, &reading.plain, Goal::Hidden).unwrap();
        assert_eq!(nothing, lane.logits().unwrap());
        let far = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far(&nothing, &first) < 1e-3 && far(&nothing, &all) > 0.05);
    }
}
