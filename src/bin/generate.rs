//! `generate`: two models, one fused cache, an answer. Parses, calls the library, prints.

use c2c::{
    align::Fraction,
    command::{self, FusingFlags, LoadingBar, MachineFlags, NamedModels},
    engine::{Rules, SamplingParams},
    hub,
    pipeline::{self, Answer, Mode, Overlap, Question, Session, SessionOptions},
    tokenizer::{Message, TemplateOptions},
};
use clap::{ArgGroup, Parser};
use std::{error::Error, io::Write, path::PathBuf, process::ExitCode};

/// Ask a pair of language models that communicate through their KV-caches.
///
/// The Sharer and the Receiver read the same prompt; a fuser adds what the Sharer's cache knows to the Receiver's;
/// the Receiver answers. Models are Hugging Face folders (config.json, tokenizer.json, *.safetensors) or GGUF files, or
/// hf:org/name[@revision] and hf:org/name/file.gguf, which are fetched from the Hub (HF_HOME, HF_ENDPOINT, HF_TOKEN).
/// Without --receiver, --sharer and --fuser the small built-in pair answers.
///
/// Example:
///   generate --receiver smol.gguf --sharer qwen.gguf --fuser fuser/ --prompt "Why is the sky blue?"
#[derive(Parser)]
#[command(version, verbatim_doc_comment, group = ArgGroup::new("question").required(true))]
struct Args {
    #[command(flatten)]
    models: NamedModels,
    /// Who answers
    #[arg(long, value_enum, default_value = "c2c", help_heading = "Models")]
    mode: Mode,

    /// The question, as one user message
    #[arg(long, value_name = "TEXT", group = "question", help_heading = "Question")]
    prompt: Option<String>,
    /// A conversation: a JSON list of {"role", "content"} objects
    #[arg(long, value_name = "FILE.json", group = "question", help_heading = "Question")]
    messages: Option<PathBuf>,
    /// Recorded token ids, masks, positions and sections (see docs/replay.md)
    #[arg(long, value_name = "FILE.safetensors", group = "question", help_heading = "Question")]
    input: Option<PathBuf>,
    /// A system message before --prompt
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["messages", "input"], help_heading = "Question")]
    system: Option<String>,
    /// Continue --prompt as plain text, without a chat template
    #[arg(long, conflicts_with_all = ["messages", "input"], help_heading = "Question")]
    raw: bool,
    /// Let models that can think do so (sets enable_thinking in the chat template)
    #[arg(long, help_heading = "Question")]
    thinking: bool,

    #[command(flatten)]
    fusing: FusingFlags,
    /// Fuse only this part of the prompt: 0.5, front:0.5 or back:0.5
    #[arg(long, value_name = "F", help_heading = "Fusing")]
    fraction: Option<Fraction>,
    /// Fuse the answer's own tokens too: three passes a token, sharers that have the receiver's tokenizer
    #[arg(long, help_heading = "Fusing")]
    include_response: bool,

    /// Most tokens of the answer
    #[arg(long, default_value_t = 256, value_name = "N", help_heading = "Answer")]
    max_new_tokens: usize,
    /// 0 = always the most probable token
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "T",
        allow_negative_numbers = true,
        help_heading = "Answer"
    )]
    temperature: f32,
    /// Draw from the K most probable tokens only
    #[arg(long, value_name = "K", help_heading = "Answer")]
    top_k: Option<usize>,
    /// Draw from the most probable tokens that together reach P
    #[arg(
        long,
        default_value_t = 1.0,
        value_name = "P",
        allow_negative_numbers = true,
        help_heading = "Answer"
    )]
    top_p: f32,
    /// Drop tokens less probable than P times the most probable
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "P",
        allow_negative_numbers = true,
        help_heading = "Answer"
    )]
    min_p: f32,
    /// Divide the logits of seen tokens; 1 = off
    #[arg(
        long,
        default_value_t = 1.0,
        value_name = "R",
        allow_negative_numbers = true,
        help_heading = "Answer"
    )]
    repetition_penalty: f32,
    /// Subtract from the logits of seen tokens
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "P",
        allow_negative_numbers = true,
        help_heading = "Answer"
    )]
    presence_penalty: f32,
    /// Subtract from the logits of seen tokens, once each time they were seen
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "P",
        allow_negative_numbers = true,
        help_heading = "Answer"
    )]
    frequency_penalty: f32,
    /// Penalties and top-p exactly as in the published program
    #[arg(long, help_heading = "Answer")]
    published_sampling: bool,
    /// Same seed, same answer
    #[arg(long, default_value_t = 0, help_heading = "Answer")]
    seed: u64,
    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT", help_heading = "Answer")]
    stop: Vec<String>,
    /// End at this token id, besides the tokenizer's own; may be given several times
    #[arg(long, value_name = "ID", help_heading = "Answer")]
    eos: Vec<u32>,
    /// Go on past end tokens
    #[arg(long, help_heading = "Answer")]
    ignore_eos: bool,
    /// With --json: log-probabilities of each token and of the N most probable ones
    #[arg(long, value_name = "N", help_heading = "Answer")]
    logprobs: Option<usize>,

    #[command(flatten)]
    machine: MachineFlags,
    /// Run prefills and fuser one after the other (off) or layer by layer (layers); same result
    #[arg(long, value_enum, default_value = "layers", help_heading = "Machine")]
    overlap: Overlap,

    /// Print one JSON object instead of text (see docs/answer.md)
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Write ids, logits, caches and sequences of --input
    #[arg(long, value_name = "FILE.safetensors", conflicts_with_all = ["prompt", "messages"], help_heading = "Output")]
    dump: Option<PathBuf>,
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
        .format_timestamp(None)
        .init();
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => command::failure(error.as_ref()),
    }
}

fn run(args: Args) -> Result<(), Box<dyn Error>> {
    let params = sampling(&args);
    // A recording may be replayed without generating anything.
    let least = usize::from(args.input.is_some());
    SamplingParams { max_new_tokens: params.max_new_tokens.max(least), ..params.clone() }.validate()?;
    let question = question(&args)?;
    let bar = LoadingBar::default();
    let mut session = Session::open(options(&args)?, &|path, done, total| bar.show(path, done, total))?;
    drop(bar);
    if args.include_response {
        session = session.including_response()?;
    }
    let Some(question) = question else {
        return replay(&args, &session, &params);
    };
    let mut out = std::io::stdout();
    let quiet = args.json;
    let mut broken = None;
    let answer = session.answer(&question, &params, &mut |text| {
        if !quiet && broken.is_none() {
            broken = out.write_all(text.as_bytes()).and_then(|()| out.flush()).err();
        }
    })?;
    if let Some(error) = broken {
        return Err(format!("cannot write the answer: {error}").into());
    }
    if args.json {
        println!("{}", serde_json::to_string(&answer)?);
    } else {
        println!();
        eprintln!("{}", timing_line(&answer));
    }
    Ok(())
}

fn replay(args: &Args, session: &Session, params: &SamplingParams) -> Result<(), Box<dyn Error>> {
    let input = args.input.as_deref().ok_or("there is no question")?;
    let dump = pipeline::replay(session, input, params)?;
    if let Some(path) = &args.dump {
        dump.write(path)?;
    }
    let (shape, sequences) = dump.integer("generate.sequences").unwrap_or((&[0, 0], &[]));
    let rows: Vec<&[i64]> = sequences.chunks_exact(shape[1].max(1)).collect();
    if args.json {
        let loss = dump.float("loss").map(|(_, loss)| loss[0]);
        println!("{}", serde_json::json!({ "sequences": rows, "loss": loss }));
    } else {
        for row in rows {
            println!("{}", row.iter().map(i64::to_string).collect::<Vec<_>>().join(" "));
        }
    }
    Ok(())
}

fn options(args: &Args) -> Result<SessionOptions, hub::Error> {
    let NamedModels { receiver, sharer, fuser } = args.models.local()?;
    Ok(SessionOptions {
        mode: args.mode,
        receiver,
        sharers: sharer,
        fusers: fuser,
        multi_sharer: args.fusing.multi_sharer,
        alignment: args.fusing.alignment,
        mapping: args.fusing.mapping,
        gates: args.fusing.gates.clone(),
        fraction: args.fraction,
        dtype: args.machine.dtype,
        device: args.machine.device,
        threads: args.machine.threads,
        overlap: args.overlap,
    })
}

fn sampling(args: &Args) -> SamplingParams {
    SamplingParams {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
        presence_penalty: args.presence_penalty,
        frequency_penalty: args.frequency_penalty,
        rules: if args.published_sampling { Rules::Published } else { Rules::Standard },
        seed: args.seed,
        stop: args.stop.clone(),
        eos: args.eos.clone(),
        ignore_eos: args.ignore_eos,
        max_new_tokens: args.max_new_tokens,
        logprobs: args.logprobs,
        ..SamplingParams::default()
    }
}

/// `None`: recorded ids.
fn question(args: &Args) -> Result<Option<Question>, Box<dyn Error>> {
    let template = TemplateOptions {
        add_generation_prompt: true,
        enable_thinking: Some(args.thinking),
        ..TemplateOptions::default()
    };
    if let Some(path) = &args.messages {
        let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let messages: Vec<Message> = serde_json::from_str(&text).map_err(|error| {
            format!(
                "{}: {error}; expected a list such as [{{\"role\": \"user\", \"content\": \"…\"}}]",
                path.display()
            )
        })?;
        if messages.is_empty() {
            return Err(format!("{}: the conversation is empty: nothing to answer", path.display()).into());
        }
        return Ok(Some(Question::Chat { messages, template }));
    }
    let Some(prompt) = &args.prompt else { return Ok(None) };
    if prompt.is_empty() {
        return Err("the prompt is empty: nothing to answer".into());
    }
    if args.raw {
        return Ok(Some(Question::Raw(prompt.clone())));
    }
    let system = args.system.iter().map(|text| Message::new("system", text));
    let messages = system.chain([Message::new("user", prompt)]).collect();
    Ok(Some(Question::Chat { messages, template }))
}

fn timing_line(answer: &Answer) -> String {
    let t = &answer.timings_ms;
    let mut line = format!("load {:.0} ms", t.load);
    let phases = [
        ("align", t.align),
        ("tokenize", t.tokenize),
        ("sharer", t.sharer_prefill),
        ("receiver", t.receiver_prefill),
        ("fuse", t.fuse),
        ("first token", t.first_token),
        ("total", t.total),
    ];
    for (name, time) in phases {
        if time > 0.0 {
            line += &format!(" · {name} {time:.1} ms");
        }
    }
    if let Some(rate) = answer.tokens_per_s.decode {
        line += &format!(" · {} tokens at {rate:.1}/s", answer.tokens.len());
    }
    line
}
