//! What all handlers share.

use super::error::ApiError;
use crate::engine::Engine;
use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

/// What a server lets clients have.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of a request.
    pub body: usize,
    /// Tokens of an answer.
    pub tokens: usize,
    /// Of a whole answer.
    pub timeout: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { body: 4 << 20, tokens: 4096, timeout: Duration::from_secs(600) }
    }
}

/// A server, whose models may still be loading.
pub struct Server {
    pub limits: Limits,
    /// Asked of every request but those for the page and its health.
    pub api_key: Option<String>,
    /// Whether what is asked is written to the log.
    pub log_prompts: bool,
    engine: OnceLock<Arc<Engine>>,
}

impl Server {
    pub fn new(limits: Limits, api_key: Option<String>, log_prompts: bool) -> Server {
        Server { limits, api_key, log_prompts, engine: OnceLock::new() }
    }

    /// The models are there. Has no effect a second time.
    pub fn ready(&self, engine: Arc<Engine>) {
        let _ = self.engine.set(engine);
    }

    /// # Errors
    /// While the models are loading, and if the engine has died.
    pub fn engine(&self) -> Result<&Arc<Engine>, ApiError> {
        let engine = self.engine.get().ok_or_else(ApiError::loading)?;
        if engine.is_alive() { Ok(engine) } else { Err(ApiError::dead()) }
    }
}
