//! How well can one model read what another one's tokenizer wrote?
//! `cargo run --example alignment -- RECEIVER SHARER [TEXTFILE]`: each a folder, a tokenizer.json or a .gguf file.

use c2c::{
    align::{Alignment, report},
    model::Gguf,
    tokenizer::Tokenizer,
};
use std::{error::Error, path::Path, process::ExitCode};

const SAMPLES: [&str; 6] = [
    "Why is the sky blue? Air scatters short waves more than long ones, so blue light reaches us from everywhere.",
    "fn main() {\n    let total: f64 = (1..=100).map(f64::from).sum();\n    println!(\"{total:.3}\");\n}",
    "Am 3. Oktober 1990 wurde Deutschland wiedervereinigt; über 80 Millionen Menschen lebten nun in einem Staat.",
    "北京是中国的首都，人口超过两千万。東京は日本の首都です。",
    "∫₀^∞ e^(−x²) dx = √π/2 ≈ 0.886227, and 12 × 12 = 144.",
    "See you at 17:30 👩‍🚀🚀 — bring the café menu!",
];

fn tokenizer(path: &Path) -> Result<Tokenizer, Box<dyn Error>> {
    if path.is_dir() {
        return Ok(Tokenizer::from_folder(path)?);
    }
    if path.extension().is_some_and(|extension| extension == "json") {
        return Ok(Tokenizer::from_file(path)?);
    }
    Ok(Tokenizer::from_gguf(&Gguf::open(path)?.vocab()?)?)
}

fn run() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (receiver, sharer, file) = match &args[..] {
        [receiver, sharer] => (receiver, sharer, None),
        [receiver, sharer, file] => (receiver, sharer, Some(file)),
        _ => return Err("usage: alignment RECEIVER SHARER [TEXTFILE]".into()),
    };
    let named = |path: &str, error: Box<dyn Error>| format!("{path}: {error}");
    let receiver = tokenizer(receiver.as_ref()).map_err(|error| named(receiver, error))?;
    let sharer = tokenizer(sharer.as_ref()).map_err(|error| named(sharer, error))?;
    let texts = match file {
        Some(file) => {
            let text = std::fs::read_to_string(file).map_err(|error| named(file, error.into()))?;
            // One text a paragraph.
            text.split("\n\n").filter(|text| !text.trim().is_empty()).map(str::to_string).collect()
        }
        None => SAMPLES.map(str::to_string).to_vec(),
    };
    for alignment in [Alignment::First, Alignment::Longest, Alignment::Span] {
        println!("{}\n", report::measure(&receiver, &sharer, alignment, &texts)?);
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
