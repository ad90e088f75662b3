//! `serve-local`: a pair of models behind OpenAI's protocol, and a page to ask them. Parses, calls the library, prints.

use axum::http::HeaderValue;
use c2c::{
    align::{Alignment, Fraction, LayerMapping},
    command::{self, LoadingBar, MachineFlags, NamedModels},
    engine::{Engine, EngineOptions},
    fuser::{FusionMode, GateOverride},
    pipeline::{FuserChoice, Mode, Overlap, Session, SessionOptions},
    serve::{self, Limits, Server, doctor},
};
use clap::{Parser, Subcommand};
use std::{error::Error, io::Write, net::IpAddr, process::ExitCode, sync::Arc, time::Duration};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
};

/// Serve a pair of language models that communicate through their KV-caches.
///
/// Open the address it prints in a browser, or point any OpenAI client at it (docs/serve.md). Models are Hugging Face
/// folders, .gguf files or hf:org/name. Without --receiver, --sharer and --fuser the small built-in pair answers.
///
/// Example:
///   serve-local --receiver smol.gguf --sharer qwen.gguf --fuser fuser/
#[derive(Parser)]
#[command(version, verbatim_doc_comment, args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    pair: PairArgs,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Tell whether two models and a fuser fit, item by item
    Doctor(PairArgs),
}

#[derive(clap::Args)]
struct PairArgs {
    #[command(flatten)]
    models: NamedModels,
    /// How sharer tokens are found for receiver tokens, unless a request says: span, first, longest or none
    #[arg(long, default_value_t, help_heading = "Fusing")]
    alignment: Alignment,
    /// learned, open, closed, a list of open layers such as 0-3,7, or a JSON file; unless a request says
    #[arg(long, default_value = "learned", value_name = "GATES", help_heading = "Fusing")]
    gates: GateOverride,
}

#[derive(clap::Args)]
struct ServerArgs {
    /// Which sharer layer feeds which receiver layer, for --fuser init: last_aligned, k_nearest, depth_normalized
    #[arg(long, default_value_t = LayerMapping::LAST_ALIGNED, help_heading = "Fusing")]
    mapping: LayerMapping,
    /// Fuse only this part of the prompt, unless a request says: 0.5, front:0.5 or back:0.5
    #[arg(long, value_name = "F", help_heading = "Fusing")]
    fraction: Option<Fraction>,
    /// Several sharers: each adds to the plain cache (parallel) or to what the one before made of it (sequential)
    #[arg(long, default_value_t, value_name = "parallel|sequential", help_heading = "Fusing")]
    multi_sharer: FusionMode,

    /// Address to listen at; any but this machine's own asks for --api-key
    #[arg(long, default_value = "127.0.0.1", value_name = "IP", help_heading = "Server")]
    host: IpAddr,
    /// 0 = any that is free
    #[arg(long, default_value_t = 8080, value_name = "N", help_heading = "Server")]
    port: u16,
    /// What clients must send as `Authorization: Bearer KEY`
    #[arg(long, env = "C2C_API_KEY", hide_env_values = true, value_name = "KEY", help_heading = "Server")]
    api_key: Option<String>,
    /// Let pages of this origin ask, such as https://example.org; * is all
    #[arg(long, value_name = "ORIGIN", help_heading = "Server")]
    cors: Option<HeaderValue>,
    /// Write what is asked to the log
    #[arg(long, help_heading = "Server")]
    log_prompts: bool,

    /// Most bytes of a request
    #[arg(long, default_value_t = 4 << 20, value_name = "BYTES", help_heading = "Limits")]
    max_body: usize,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 4096, value_name = "N", help_heading = "Limits")]
    max_tokens: usize,
    /// Most requests that wait; more are refused
    #[arg(long, default_value_t = 256, value_name = "N", help_heading = "Limits")]
    queue: usize,
    /// Most requests that are answered at a time
    #[arg(long, default_value_t = 64, value_name = "N", help_heading = "Limits")]
    batch: usize,
    /// Seconds that an answer may take
    #[arg(long, default_value_t = 600.0, value_name = "S", help_heading = "Limits")]
    request_timeout: f64,
    /// Cache blocks of 16 tokens for each model; else what fits in 1 GiB
    #[arg(long, value_name = "N", help_heading = "Limits")]
    kv_blocks: Option<usize>,

    #[command(flatten)]
    machine: MachineFlags,
    /// Run prefills and fuser one after the other (off) or layer by layer (layers); same result
    #[arg(long, value_enum, default_value = "layers", help_heading = "Machine")]
    overlap: Overlap,
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
        .format_timestamp(None)
        .init();
    let args = Args::parse();
    let done = match &args.command {
        Some(Command::Doctor(pair)) => examine(pair),
        None => run(&args).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| command::failure(error.as_ref()))
}

fn examine(pair: &PairArgs) -> Result<ExitCode, Box<dyn Error>> {
    let NamedModels { receiver, sharer: sharers, fuser: fusers } = pair.models.local()?;
    let (Some(receiver), [sharer]) = (&receiver, sharers.as_slice()) else {
        return Err("the doctor looks at one --receiver and one --sharer".into());
    };
    let untrained = FuserChoice::Init { seed: 0 };
    let fuser = fusers.first().unwrap_or(&untrained);
    let checkup = doctor::examine(&doctor::Pair {
        receiver,
        sharer,
        fuser,
        alignment: pair.alignment,
        gates: &pair.gates,
    })?;
    println!("{checkup}");
    Ok(if checkup.verdict() == doctor::Verdict::Fails { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn options(args: &Args) -> Result<SessionOptions, Box<dyn Error>> {
    let NamedModels { receiver, sharer: sharers, fuser: fusers } = args.pair.models.local()?;
    // Whatever of the pair is there can be asked for.
    let mode = match (&receiver, sharers.len(), fusers.len()) {
        (None, 1.., 0) => Mode::Sharer,
        (_, 0, _) => Mode::Receiver,
        (_, _, 0) => Mode::T2t,
        _ => Mode::C2c,
    };
    let (pair, server) = (&args.pair, &args.server);
    Ok(SessionOptions {
        mode,
        receiver,
        sharers,
        fusers,
        multi_sharer: server.multi_sharer,
        alignment: pair.alignment,
        mapping: server.mapping,
        gates: pair.gates.clone(),
        fraction: server.fraction,
        dtype: server.machine.dtype,
        device: server.machine.device,
        threads: server.machine.threads,
        overlap: server.overlap,
    })
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let flags = &args.server;
    if !flags.host.is_loopback() && flags.api_key.is_none() {
        let host = flags.host;
        return Err(
            format!("--host {host} lets other machines in: give --api-key KEY (or C2C_API_KEY)").into()
        );
    }
    let timeout = Duration::try_from_secs_f64(flags.request_timeout)
        .map_err(|_| "--request-timeout is no number of seconds above 0")?;
    let limits = Limits { body: flags.max_body, tokens: flags.max_tokens.max(1), timeout };
    let server = Arc::new(Server::new(limits, flags.api_key.clone(), flags.log_prompts));
    let runtime = Runtime::new()?;
    let listener = runtime.block_on(TcpListener::bind((flags.host, flags.port))).map_err(|error| {
        format!(
            "cannot listen at {}:{}: {error}; is another server there? try --port 0",
            flags.host, flags.port
        )
    })?;
    println!("http://{}", listener.local_addr()?);
    std::io::stdout().flush()?;
    let serving = runtime.spawn(serve::run(listener, server.clone(), flags.cors.clone(), stopped()));
    let bar = LoadingBar::default();
    let session = Session::open(options(args)?, &|path, done, total| bar.show(path, done, total))?;
    drop(bar);
    let engine = EngineOptions {
        kv_blocks: flags.kv_blocks,
        sequences: flags.batch,
        queue: flags.queue,
        ..EngineOptions::default()
    };
    server.ready(Arc::new(Engine::start(Arc::new(session), &engine)?));
    log::info!("ready");
    let ended = runtime.block_on(serving)?;
    // What is cut off has no time to end.
    runtime.shutdown_background();
    Ok(ended?)
}

/// Until Ctrl-C or SIGTERM. A second Ctrl-C does not wait.
async fn stopped() {
    let terminated = async {
        match signal(SignalKind::terminate()) {
            Ok(mut signals) => signals.recv().await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminated => {}
    }
    log::info!("stopping: what is being answered is finished; Ctrl-C again ends at once");
    tokio::spawn(async {
        if tokio::signal::ctrl_c().await.is_ok() {
            std::process::exit(130);
        }
    });
}
