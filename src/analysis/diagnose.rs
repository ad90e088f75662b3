//! Signatures of failure, each with the numbers that speak for it or against.

use super::{
    Error, Finding, Table,
    by_layer::Scored,
    finding::{chance, digits, percent},
    gates::Weights,
    layers::sweep_gates,
    probe::{Probe, fused_tokens},
};
use crate::{
    align::report::measure,
    eval::{Cost, Mode, answering::Asker, mode::Variant},
};
use serde_json::json;

/// Below, a weight adds next to nothing.
const LIGHT: f64 = 0.05;
/// Questions that are enough for weights, caches, and single layers.
const FEW: usize = 30;
/// More characters than this misread are no accident.
const MISREAD: f64 = 0.01;

/// A signature, and whether the pair bears it.
struct Sign {
    name: &'static str,
    found: bool,
    evidence: String,
    advice: String,
}

/// Answers of one mode.
struct Answers {
    scored: Scored,
    costs: Vec<Cost>,
}

impl Answers {
    fn of(probe: &mut Probe, sample: &[usize], modes: &[Mode]) -> Result<Vec<Answers>, Error> {
        let mut all: Vec<Answers> = modes
            .iter()
            .map(|mode| {
                let scored = Scored { name: mode.to_string(), right: Vec::new(), quiet: mode.is_control() };
                Answers { scored, costs: Vec::new() }
            })
            .collect();
        for (done, &index) in sample.iter().enumerate() {
            // What modes share of a question is computed once.
            let mut asker = Asker::new(&probe.options, &probe.questions, &mut probe.models, None);
            for (mode, answers) in modes.iter().zip(&mut all) {
                let answered = asker.answer(*mode, false, index)?;
                answers.scored.right.push(answered.correct);
                answers.costs.push(answered.cost);
            }
            probe.watcher.progress(done + 1, sample.len(), "answers");
        }
        Ok(all)
    }

    /// The middle of all questions: the first ones warm up.
    fn median(&self, of: impl Fn(&Cost) -> f64) -> f64 {
        let mut times: Vec<f64> = self.costs.iter().map(of).collect();
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or_default()
    }
}

pub(super) fn ask(probe: &mut Probe) -> Result<Finding, Error> {
    let sample = probe.sample();
    let control = |variant: Variant| Mode::C2c { sharer: None, variant };
    let modes = [
        Mode::Receiver,
        Mode::Sharer(0),
        Mode::C2C,
        control(Variant::Closed),
        control(Variant::Open),
        control(Variant::Swap),
    ];
    let answers = Answers::of(probe, &sample, &modes)?;
    let [receiver, sharer, c2c, closed, open, swap] = &answers[..] else {
        unreachable!("an answer for each mode")
    };
    let few: Vec<usize> = sample.iter().step_by(sample.len().div_ceil(FEW).max(1)).copied().collect();
    let weights = Weights::of(probe, &few)?;
    let mut signs = vec![
        alignment(probe, &sample)?,
        measurement(receiver, closed),
        below(probe, &few, receiver, c2c, open)?,
        shut(probe),
        light(probe, &weights, &few)?,
        communication(receiver, c2c, swap),
        Sign {
            name: "the Sharer knows no more than the Receiver",
            found: sharer.scored.rate() <= receiver.scored.rate(),
            evidence: format!(
                "Receiver {}, Sharer {}",
                percent(receiver.scored.rate()),
                percent(sharer.scored.rate())
            ),
            advice: "there is little to send: take a Sharer that is better at this task".into(),
        },
        slow(c2c),
    ];
    signs.sort_by_key(|sign| !sign.found);
    let mut table =
        Table::new("diagnose", "What was looked for.", &["signature", "found", "evidence", "what to do"]);
    let mut said = Vec::new();
    for sign in &signs {
        let advice = if sign.found { sign.advice.as_str() } else { "" };
        table.push([
            json!(sign.name),
            json!(if sign.found { "yes" } else { "no" }),
            json!(sign.evidence),
            json!(advice),
        ]);
        if sign.found {
            said.push(format!("{}: {}. {}", sign.name, sign.evidence, sign.advice));
        }
    }
    if said.is_empty() {
        said.push("none of the signatures is there".into());
    }
    let scored: Vec<Scored> = answers.into_iter().map(|answers| answers.scored).collect();
    Ok(Finding {
        question: "diagnose",
        title: "signatures of failure".into(),
        about: format!(
            "{} questions of {} for accuracies and times, {} for weights. Accuracy is said to be lower, or a gain to be there, where McNemar's test \
             says p < 0.05.",
            sample.len(),
            probe.questions.task.name,
            few.len()
        ),
        said,
        tables: vec![
            table,
            super::by_layer::table("diagnose_answers", "The answers behind it.", "mode", &scored),
        ],
        figures: Vec::new(),
    })
}

/// Whether the Sharer reads what the Receiver reads, and whose columns arrive.
fn alignment(probe: &Probe, sample: &[usize]) -> Result<Sign, Error> {
    let session = &probe.models.pair.session;
    let receiver = session.receiver.as_ref().ok_or(crate::eval::Error::NoReceiver)?;
    let texts: Vec<&str> =
        sample.iter().filter_map(|&index| Some(probe.messages(index).last()?.content.as_str())).collect();
    let alignment = probe.options.session.alignment;
    let report = measure(receiver.tokenizer()?, session.sharers[0].tokenizer()?, alignment, &texts)?;
    let (mut fused, mut within) = (0, 0);
    for &index in sample {
        let prompt = probe.prompt(index)?;
        fused += fused_tokens(&prompt).len();
        let sections = &prompt.sections[..prompt.sections.len().saturating_sub(1)];
        within += sections
            .iter()
            .filter(|section| section.sharer_mask != 0)
            .map(|section| section.len)
            .sum::<usize>();
    }
    let share = fused as f64 / within.max(1) as f64;
    Ok(Sign {
        name: "the Sharer reads something else",
        found: report.character_error_rate > MISREAD || share < 0.9,
        evidence: format!(
            "alignment {}: {} of the characters misread, {} of {} tokens without counterpart; {} of the {within} tokens to be fused take a column",
            report.alignment,
            percent(report.character_error_rate),
            report.failures.len(),
            report.receiver_tokens,
            percent(share)
        ),
        advice: "use --alignment span; see `analyze tokenizers`".into(),
    })
}

/// Closed gates are the Receiver: anything else is a fault of the measurement.
fn measurement(receiver: &Answers, closed: &Answers) -> Sign {
    let differ = receiver.scored.right.iter().zip(&closed.scored.right).filter(|(a, b)| a != b).count();
    Sign {
        name: "closed gates are not the Receiver",
        found: differ > 0,
        evidence: format!("{differ} of {} answers differ with all gates closed", receiver.scored.right.len()),
        advice: "the Receiver reads another prompt when it is fused: compare its templates and token ids"
            .into(),
    }
}

/// Accuracy below the Receiver's, and which of gates and projections it comes from.
fn below(
    probe: &mut Probe,
    few: &[usize],
    receiver: &Answers,
    c2c: &Answers,
    open: &Answers,
) -> Result<Sign, Error> {
    let (difference, low, high, p) = c2c.scored.versus(&receiver.scored);
    let found = difference < 0.0 && p < 0.05;
    let mut evidence = format!(
        "C2C {}, Receiver {}: {:+.1} points ({:+.1} … {:+.1}), {}; all gates open {}",
        percent(c2c.scored.rate()),
        percent(receiver.scored.rate()),
        100.0 * difference,
        100.0 * low,
        100.0 * high,
        chance(p),
        percent(open.scored.rate())
    );
    let mut advice = "look at the alignment first, then at gates".to_owned();
    if found {
        let swept = sweep_gates(probe, few)?;
        let worst = (0..swept.single.len()).min_by_key(|&layer| swept.single[layer].count()).unwrap_or(0);
        let rates: Vec<String> = swept.single.iter().map(|scored| percent(scored.rate())).collect();
        evidence += &format!(
            "; one layer open at a time, from layer 0, {} questions: {}",
            few.len(),
            rates.join(", ")
        );
        advice = format!(
            "where the alignment is sound it is the fuser: layer {worst} harms most by itself; try --gates without it, or train longer"
        );
    }
    Ok(Sign { name: "accuracy below the Receiver's", found, evidence, advice })
}

/// No gate is open.
fn shut(probe: &Probe) -> Sign {
    let gates = probe.gates();
    let all: usize = gates.iter().map(|gates| 2 * gates.len()).sum();
    let open = gates.iter().flatten().flatten().filter(|gate| **gate > 0.0).count();
    Sign {
        name: "no gate is open",
        found: open == 0,
        evidence: format!("{open} of {all} gates are open"),
        advice: "the fuser changes nothing: train it, or open gates by --gates".into(),
    }
}

/// Gates that are open on weights of nothing.
fn light(probe: &mut Probe, weights: &Weights, few: &[usize]) -> Result<Sign, Error> {
    let gates = probe.gates().to_vec();
    let (mut open, mut sum, mut heaviest) = (0usize, 0.0, 0.0f64);
    for (sharer, gates) in gates.iter().enumerate() {
        for (layer, halves) in gates.iter().enumerate() {
            for half in (0..2).filter(|&half| halves[half] > 0.0) {
                if let Some(mean) = weights.mean(sharer, layer, half) {
                    open += 1;
                    sum += mean;
                    heaviest = heaviest.max(mean);
                }
            }
        }
    }
    // How much the cache is changed by all of it.
    let (mut change, mut size) = (0.0f64, 0.0f64);
    for &index in few {
        let prompt = probe.prompt(index)?;
        let Some(caches) = probe.caches(&prompt)? else { continue };
        for (plain, fused) in caches.plain.iter().zip(&caches.fused) {
            for (plain, fused) in [(&plain.keys, &fused.keys), (&plain.values, &fused.values)] {
                for (plain, fused) in plain.iter().zip(fused) {
                    change += f64::from(fused - plain).powi(2);
                    size += f64::from(*plain).powi(2);
                }
            }
        }
    }
    Ok(Sign {
        name: "gates open, weights near zero",
        found: open > 0 && heaviest < LIGHT,
        evidence: format!(
            "{open} open gates with mean weight {} (heaviest {}); the fuse changes the cache by {} of its length",
            digits(sum / open.max(1) as f64),
            digits(heaviest),
            percent((change / size.max(f64::MIN_POSITIVE)).sqrt())
        ),
        advice: "the fuser says next to nothing through open gates: train it longer, or with a higher learning rate".into(),
    })
}

/// A gain that another question's cache brings as well.
fn communication(receiver: &Answers, c2c: &Answers, swap: &Answers) -> Sign {
    let (gain, _, _, p) = c2c.scored.versus(&receiver.scored);
    let (without, ..) = swap.scored.versus(&receiver.scored);
    Sign {
        name: "a gain that is no communication",
        found: gain > 0.0 && p < 0.05 && without > 0.25 * gain,
        evidence: format!(
            "C2C gains {:+.1} points ({}), with another question's Sharer cache {:+.1}",
            100.0 * gain,
            chance(p),
            100.0 * without
        ),
        advice: "a part comes without this question's cache: run evaluate's controls".into(),
    }
}

/// Time that goes into fusing.
fn slow(c2c: &Answers) -> Sign {
    let sharer = c2c.median(|cost| cost.sharer_ms.unwrap_or_default());
    let (receiver, fuse) = (c2c.median(|cost| cost.receiver_ms), c2c.median(|cost| cost.fuse_ms));
    Sign {
        name: "the fuser takes most of the time",
        found: fuse > sharer + receiver,
        evidence: format!(
            "medians of a prompt: fuse {} ms, Sharer {} ms, Receiver {} ms",
            digits(fuse),
            digits(sharer),
            digits(receiver)
        ),
        advice: "a fuser wide for its models: train a narrower one, or kind latent; close gates that do nothing (see `analyze layers`)"
            .into(),
    }
}
