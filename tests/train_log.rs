//! What a run leaves behind: log, event files, schedules.

mod goldens;

use c2c::train::{Annealing, Evaluation, LearningRate, Record, RunLog, Schedule, Update, events};
use serde_json::json;
use std::{fs, path::Path};

fn update(step: u64) -> Record {
    Record::Update(Update {
        step,
        epoch: 0.5,
        loss: 2.0 / step as f64,
        learning_rate: 1e-4,
        gradient_norm: 3.5,
        temperature: Some(0.25),
        gates_open: Some(0.75),
        tokens: 256,
        tokens_per_second: 100.0,
        seconds: step as f64,
    })
}

type Fields = Vec<(u64, Vec<u8>)>;

/// The fields of a protobuf message: number and content (varints and fixed numbers as their bits).
fn fields(mut bytes: &[u8]) -> Fields {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let length = match key & 7 {
            0 => {
                fields.push((key >> 3, varint(&mut bytes).to_le_bytes().to_vec()));
                continue;
            }
            1 => 8,
            2 => varint(&mut bytes) as usize,
            5 => 4,
            other => panic!("wire type {other}"),
        };
        let (content, rest) = bytes.split_at(length);
        fields.push((key >> 3, content.to_vec()));
        bytes = rest;
    }
    fields
}

/// CRC-32C bit by bit, masked as TFRecords have it.
fn masked(data: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in data {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    (!crc).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The events of all event files of a folder, checksums checked.
fn event_files(folder: &Path) -> Vec<Vec<Fields>> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> = names.filter(|path| path.to_string_lossy().contains("tfevents")).collect();
    paths.sort();
    let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
    paths
        .iter()
        .map(|path| {
            let bytes = fs::read(path).unwrap();
            let (mut rest, mut events) = (bytes.as_slice(), Vec::new());
            while !rest.is_empty() {
                let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
                assert_eq!(number(&rest[8..12]), masked(&rest[..8]));
                let content = &rest[12..12 + length];
                assert_eq!(number(&rest[12 + length..16 + length]), masked(content));
                events.push(fields(content));
                rest = &rest[16 + length..];
            }
            events
        })
        .collect()
}

fn field(event: &[(u64, Vec<u8>)], number: u64) -> Option<&[u8]> {
    event.iter().find(|(field, _)| *field == number).map(|(_, content)| content.as_slice())
}

fn scalars(event: &[(u64, Vec<u8>)]) -> Vec<(String, f32)> {
    let values = fields(field(event, 5).unwrap());
    let read = values.iter().map(|(number, value)| {
        assert_eq!(*number, 1);
        let value = fields(value);
        let bits = field(&value, 2).unwrap().try_into().unwrap();
        (String::from_utf8(field(&value, 1).unwrap().to_vec()).unwrap(), f32::from_le_bytes(bits))
    });
    read.collect()
}

#[test]
fn event_files_hold_what_was_logged() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = RunLog::create(folder.path()).unwrap();
    let records = [
        Record::Start { step: 0, manifest: json!({"seed": 7}) },
        update(300),
        Record::Evaluation(Evaluation { step: 300, loss: 1.5, accuracy: Some(0.5), seconds: 9.0 }),
        Record::Checkpoint { step: 300, path: "out/step-300".into() },
        Record::End { step: 300, reason: "finished".into() },
    ];
    for record in &records {
        log.add(record).unwrap();
    }
    assert_eq!(events::read(folder.path()).unwrap(), records);

    let [events] = &event_files(folder.path())[..] else { panic!("one file") };
    assert_eq!(events.len(), 3);
    assert_eq!(field(&events[0], 3), Some(&b"brain.Event:2"[..]));
    let time = f64::from_le_bytes(field(&events[1], 1).unwrap().try_into().unwrap());
    assert!(time > 1.7e9, "{time}");
    assert_eq!(field(&events[1], 2), Some(&300u64.to_le_bytes()[..]));
    let logged = scalars(&events[1]);
    for (tag, value) in [
        ("train/loss", 2.0 / 300.0),
        ("train/learning_rate", 1e-4),
        ("gates/temperature", 0.25),
        ("gates/open", 0.75),
    ] {
        assert!(logged.contains(&(tag.into(), value)), "{tag} in {logged:?}");
    }
    assert_eq!(scalars(&events[2]), [("held_out/loss".into(), 1.5), ("held_out/accuracy".into(), 0.5)]);
}

#[test]
fn a_resumed_log_forgets_what_came_after_the_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = RunLog::create(folder.path()).unwrap();
    for step in 1..=7 {
        log.add(&update(step)).unwrap();
    }
    drop(log);
    // The crash cut off a line, and the loss before it was no number.
    let path = folder.path().join(RunLog::FILE);
    let mut text = fs::read_to_string(&path).unwrap();
    let mut bad = update(8);
    if let Record::Update(update) = &mut bad {
        update.loss = f64::NAN;
    }
    text.push_str(&serde_json::to_string(&bad).unwrap());
    text.push_str("\n{\"record\":\"upd");
    fs::write(&path, &text).unwrap();
    let read = events::read(folder.path()).unwrap();
    assert!(matches!(&read[7], Record::Update(update) if update.loss.is_nan()));

    let mut log = RunLog::resume(folder.path(), 5).unwrap();
    log.add(&update(6)).unwrap();
    let steps: Vec<_> = events::read(folder.path()).unwrap().iter().map(Record::step).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
    let files = event_files(folder.path());
    assert_eq!(files.len(), 2);
    // The session starts anew at step 6.
    assert_eq!(field(&files[1][1], 7), Some(&[8, 1][..]));
    assert_eq!(field(&files[1][1], 2), Some(&6u64.to_le_bytes()[..]));

    fs::write(&path, "{\"record\":\"update\"}\n").unwrap();
    let error = RunLog::resume(folder.path(), 5).unwrap_err().to_string();
    assert!(error.contains("log.jsonl:1"), "{error}");
}

#[test]
fn learning_rates_are_the_published_ones() {
    let Some(golden) = goldens::json("train/lr_schedules.json") else { return };
    let (base, warmup) = (golden["base_lr"].as_f64().unwrap(), golden["warmup"].as_u64().unwrap());
    let total = golden["total"].as_u64().unwrap();
    let mut compared = 0;
    for (name, rates) in golden["lr_at_update_index"].as_object().unwrap() {
        let schedule: Schedule = serde_json::from_value(json!(name)).unwrap();
        assert_eq!(schedule.name(), name);
        let ours = LearningRate { schedule, base, warmup, total, final_ratio: 0.0 };
        for (update, rate) in (0..).zip(rates.as_array().unwrap()) {
            let (ours, rate) = (ours.at(update), rate.as_f64().unwrap());
            assert!(
                (ours - rate).abs() <= 1e-15 * base.max(1.0),
                "{name}, update {update}: {ours} for {rate}"
            );
            compared += 1;
        }
    }
    assert!(compared >= 84, "{compared}");
}

#[test]
fn temperatures_are_the_published_ones() {
    let Some(golden) = goldens::json("train/temperature_schedule.json") else { return };
    let number = |name: &str| golden[name].as_f64().unwrap();
    let annealing = Annealing {
        initial: number("initial"),
        final_: number("final"),
        steps: golden["anneal_steps"].as_u64().unwrap(),
    };
    for (step, temperature) in golden["temperature_after_step"].as_object().unwrap() {
        let ours = annealing.after(step.parse().unwrap());
        assert_eq!(ours, temperature.as_f64().unwrap() as f32, "after {step}");
    }
    assert!(golden["temperature_after_step"].as_object().unwrap().len() >= 9);
}
