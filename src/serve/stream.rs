//! Server-sent events: `data: {…}` for each chunk, `data: [DONE]` at the end, `data: {"error": …}` where it breaks.

use super::error::ApiError;
use axum::response::{
    IntoResponse, Response,
    sse::{Event, Sse},
};
use serde_json::Value;
use std::{
    convert::Infallible,
    future::Future,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{SystemTime, UNIX_EPOCH},
};
use tokio::sync::mpsc::{Receiver, Sender, channel};

/// Chunks that wait for a slow reader; more wait in the engine, as tokens.
const AHEAD: usize = 16;

/// Where chunks are sent.
#[derive(Clone)]
pub struct Chunks(Sender<Event>);

/// Why a stream ended before its answer did.
pub enum Broken {
    /// The client went away.
    Gone,
    Failed(ApiError),
}

impl From<ApiError> for Broken {
    fn from(error: ApiError) -> Broken {
        Broken::Failed(error)
    }
}

impl Chunks {
    pub async fn send(&self, chunk: Value) -> Result<(), Broken> {
        self.data(chunk.to_string()).await
    }

    async fn data(&self, text: String) -> Result<(), Broken> {
        self.0.send(Event::default().data(text)).await.map_err(|_| Broken::Gone)
    }

    /// `work`, which is dropped as soon as the client is gone.
    pub async fn unless_gone<T>(&self, work: impl Future<Output = T>) -> Result<T, Broken> {
        tokio::select! {
            done = work => Ok(done),
            () = self.0.closed() => Err(Broken::Gone),
        }
    }
}

/// A response whose chunks `write` sends.
pub fn respond<F>(write: impl FnOnce(Chunks) -> F) -> Response
where
    F: Future<Output = Result<(), Broken>> + Send + 'static,
{
    let (sender, receiver) = channel(AHEAD);
    let written = write(Chunks(sender.clone()));
    tokio::spawn(async move {
        let chunks = Chunks(sender);
        // Whoever is gone is not told.
        let _ = match written.await {
            Ok(()) => chunks.data("[DONE]".into()).await,
            Err(Broken::Failed(error)) => chunks.send(error.body()).await,
            Err(Broken::Gone) => Ok(()),
        };
    });
    let next = |mut receiver: Receiver<Event>| async move {
        let event = receiver.recv().await?;
        Some((Ok::<_, Infallible>(event), receiver))
    };
    Sse::new(futures_util::stream::unfold(receiver, next)).into_response()
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A name that no other answer has.
pub fn id(kind: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    format!("{kind}-{nanos:016x}{:04x}", COUNT.fetch_add(1, Relaxed) & 0xffff)
}
