//! The sampler and the penalties against recorded runs of the published program.

mod goldens;

use c2c::engine::{Rules, Sampler, SamplingParams, TokenCounts};
use goldens::{Tensors, difference};

fn ids(file: &Tensors, name: &str) -> Vec<u32> {
    file.integers(name).into_iter().map(|id| u32::try_from(id).unwrap()).collect()
}

#[test]
fn probabilities_of_the_published_sampler() {
    let Some(path) = goldens::find("sampling.safetensors") else { return };
    let file = Tensors::read(&path);
    let logits = file.rows("logits");
    let mut settings = 0;
    for (name, setting) in file.metadata().iter().filter(|(name, _)| name.as_str() != "note") {
        let setting: serde_json::Value = serde_json::from_str(setting).unwrap();
        let number =
            |key: &str, default: f64| setting.get(key).map_or(default, |v| v.as_f64().unwrap()) as f32;
        let params = SamplingParams {
            temperature: number("temperature", 1.0),
            top_k: setting.get("top_k").and_then(|k| usize::try_from(k.as_i64()?).ok()),
            top_p: number("top_p", 1.0),
            rules: Rules::Published,
            ..Default::default()
        };
        let mut sampler = Sampler::new(params.clone(), &[]).unwrap();
        let expected = format!("{name}.probs_given_to_multinomial");
        let expected = file.has(&expected).then(|| file.rows(&expected));
        let drawn = ids(&file, &format!("{name}.token_if_argmax_drawn"));
        for (row, logits) in logits.iter().enumerate() {
            let mut found = sampler.probabilities(logits).unwrap();
            let best = (0..found.len()).rev().max_by(|&a, &b| found[a].total_cmp(&found[b])).unwrap();
            assert_eq!(best as u32, drawn[row], "{name}, row {row}");
            match &expected {
                Some(expected) => {
                    if params.top_p < 1.0 {
                        // Such rows were recorded in the order of the published program's sort.
                        found.sort_by(|a, b| b.total_cmp(a));
                    }
                    let difference = difference(&found, &expected[row]);
                    assert!(difference < 1e-6, "{name}, row {row}: {difference}");
                }
                None => {
                    assert!(params.is_greedy(), "{name} has no probabilities");
                    assert_eq!(sampler.sample(logits).unwrap().token, drawn[row], "{name}, row {row}");
                }
            }
        }
        settings += 1;
    }
    assert!(settings > 0, "the file has settings in its metadata");
    eprintln!("{settings} settings × {} rows", logits.len());
}

#[test]
fn penalties_of_the_published_program() {
    let cases = goldens::cases("pairs");
    if cases.is_empty() {
        return;
    }
    let mut steps = 0;
    for case in cases {
        let Some(options) = case.get("options").and_then(|options| options.as_object()) else { continue };
        let name = case["file"].as_str().unwrap();
        let Some(path) = goldens::find(name) else { continue };
        let file = Tensors::read(&path);
        for (option, penalties) in options {
            let raw = format!("penalty_{option}.raw");
            if !file.has(&raw) {
                goldens::skipped(format_args!("{name} has no {raw}"));
                continue;
            }
            let raw = file.rows(&raw);
            let adjusted = file.rows(&format!("penalty_{option}.adjusted"));
            let sequence = ids(&file, &format!("penalty_{option}.sequences"));
            assert_eq!(raw.len(), adjusted.len());
            let (prompt, answer) = sequence.split_at(sequence.len() - raw.len());
            let params = parse_penalties(penalties.as_str().unwrap());
            let mut counts = TokenCounts::new(prompt);
            let mut sampler = Sampler::new(params.clone(), prompt).unwrap();
            for (step, &token) in answer.iter().enumerate() {
                let mut found = raw[step].clone();
                counts.penalise(&params, &mut found);
                let difference = difference(&found, &adjusted[step]);
                assert!(difference < 1e-6, "{name} {option}, step {step}: {difference}");
                assert_eq!(sampler.sample(&raw[step]).unwrap().token, token, "{name} {option}, step {step}");
                counts.push(token);
                steps += 1;
            }
        }
    }
    match steps {
        0 => goldens::skipped("no case of the manifest has penalties"),
        _ => eprintln!("{steps} steps"),
    }
}

/// `repetition 1.2 presence 0.7 frequency 0.3`
fn parse_penalties(text: &str) -> SamplingParams {
    let mut params = SamplingParams { rules: Rules::Published, ..Default::default() };
    let words: Vec<&str> = text.split_whitespace().collect();
    for pair in words.chunks(2) {
        let value: f32 = pair[1].parse().unwrap();
        match pair[0] {
            "repetition" => params.repetition_penalty = value,
            "presence" => params.presence_penalty = value,
            "frequency" => params.frequency_penalty = value,
            other => panic!("unknown penalty {other}"),
        }
    }
    params
}
