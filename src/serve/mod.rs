//! Answers over HTTP: OpenAI's protocol, with a `c2c` object for what it does not know. docs/serve.md lists the endpoints.

mod answer;
mod auth;
mod chat;
mod completions;
mod details;
pub mod doctor;
mod error;
mod fields;
mod logprobs;
pub mod page;
mod request;
mod state;
mod stream;
mod tokens;

pub use details::{Details, TokenLinks};
pub use error::ApiError;
pub use state::{Limits, Server};

use crate::{engine::Engine, pipeline::Mode, tokenizer::Tokenizer};
use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State, rejection::BytesRejection},
    http::{HeaderValue, Method, StatusCode, header},
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::ListenerExt,
};
use serde_json::{Value, json};
use std::{future::Future, io, sync::Arc, time::Duration};
use tokio::net::TcpListener;
use tower_http::cors::{AllowOrigin, CorsLayer};

/// The description of all endpoints, for programs.
const OPENAPI: &str = include_str!("openapi.json");

/// Time that answers have to end in once a server is told to stop.
const GRACE: Duration = Duration::from_secs(30);

/// A request's body as it comes.
type Body = Result<Bytes, BytesRejection>;

/// All endpoints. `cors`: the origin whose pages may ask, or `*`.
pub fn router(server: Arc<Server>, cors: Option<HeaderValue>) -> Router {
    let api = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(model))
        .route("/v1/chat/completions", post(chat::complete))
        .route("/v1/completions", post(completions::complete))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/apply-template", post(tokens::apply_template))
        .route("/metrics", get(metrics))
        .route_layer(middleware::from_fn_with_state(server.clone(), auth::check));
    let open = Router::new()
        .route("/health", get(health))
        .route("/openapi.json", get(|| async { ([(header::CONTENT_TYPE, "application/json")], OPENAPI) }))
        .merge(page::routes());
    let router = api
        .merge(open)
        .fallback(|| async { ApiError::new(StatusCode::NOT_FOUND, "there is nothing at this address") })
        .method_not_allowed_fallback(|| async {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "this address takes another method")
        })
        .layer(DefaultBodyLimit::max(server.limits.body))
        .with_state(server);
    let Some(origin) = cors else { return router };
    let origin = if origin == "*" { AllowOrigin::any() } else { AllowOrigin::exact(origin) };
    let headers = [header::CONTENT_TYPE, header::AUTHORIZATION];
    router.layer(
        CorsLayer::new()
            .allow_origin(origin)
            .allow_methods([Method::GET, Method::POST])
            .allow_headers(headers),
    )
}

/// Serves until `stop`; then takes nothing more, lets answers end, and cuts off what has not ended in 30 seconds.
pub async fn run(
    listener: TcpListener,
    server: Arc<Server>,
    cors: Option<HeaderValue>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let (told, mut stopping) = tokio::sync::watch::channel(false);
    let draining = server.clone();
    let stop = async move {
        stop.await;
        if let Ok(engine) = draining.engine() {
            engine.drain();
        }
        let _ = told.send(true);
    };
    // A token is a small packet: Nagle's algorithm would hold it back until the one before it is acknowledged, 40 ms on a connection that is kept.
    let listener = listener.tap_io(|connection| {
        if let Err(error) = connection.set_nodelay(true) {
            log::warn!("a connection will wait for acknowledgements: {error}");
        }
    });
    let served = axum::serve(listener, router(server, cors)).with_graceful_shutdown(stop);
    let cut = async move {
        // Without a sender nobody stops it.
        if stopping.wait_for(|stopping| *stopping).await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        ended = served.into_future() => ended,
        () = cut => {
            log::warn!("answers that had not ended after {GRACE:?} were cut off");
            Ok(())
        }
    }
}

/// # Errors
/// If it is larger than allowed, or was cut off.
fn body(server: &Server, body: Body) -> Result<Bytes, ApiError> {
    body.map_err(|rejection| {
        let status = rejection.status();
        let message = match status {
            StatusCode::PAYLOAD_TOO_LARGE => {
                format!("the request has more than {} bytes", server.limits.body)
            }
            _ => rejection.body_text(),
        };
        ApiError::new(status, message)
    })
}

/// The tokenizer of who answers.
fn tokenizer(engine: &Engine, mode: Mode) -> Result<&Tokenizer, ApiError> {
    let session = engine.session();
    let model = if mode == Mode::Sharer { session.sharers.first() } else { session.receiver.as_ref() };
    let tokenizer = model.and_then(|model| model.tokenizer.as_ref());
    tokenizer.ok_or_else(|| ApiError::invalid("model", "the model has no tokenizer"))
}

async fn health(State(server): State<Arc<Server>>) -> Response {
    match server.engine() {
        Ok(_) => Json(json!({ "status": "ok" })).into_response(),
        Err(error) => error.into_response(),
    }
}

fn entry(engine: &Engine, id: &str) -> Value {
    let session = engine.session();
    let name = |model: &crate::pipeline::Model| {
        model.path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    };
    let receiver = session.receiver.as_ref().map(name);
    let sharers: Vec<String> = session.sharers.iter().map(name).collect();
    let parts = match id {
        "receiver" => json!({ "receiver": receiver }),
        "sharer" => json!({ "sharers": sharers.first() }),
        _ => json!({ "receiver": receiver, "sharers": sharers, "fused": !session.fusers.is_empty() }),
    };
    json!({ "id": id, "object": "model", "created": 0, "owned_by": "c2c", "parts": parts })
}

async fn models(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    let engine = server.engine()?;
    let data: Vec<Value> = request::models(engine).into_iter().map(|id| entry(engine, id)).collect();
    Ok(Json(json!({ "object": "list", "data": data })))
}

async fn model(
    State(server): State<Arc<Server>>,
    axum::extract::Path(id): axum::extract::Path<String>,
) -> Result<Json<Value>, ApiError> {
    let engine = server.engine()?;
    if request::models(engine).contains(&id.as_str()) {
        return Ok(Json(entry(engine, &id)));
    }
    let message = format!("there is no model `{}`", id.escape_debug());
    Err(ApiError::new(StatusCode::NOT_FOUND, message).code("model_not_found"))
}

async fn metrics(State(server): State<Arc<Server>>) -> Response {
    match server.engine() {
        Ok(engine) => {
            let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
            (kind, engine.metrics().text()).into_response()
        }
        Err(error) => error.into_response(),
    }
}
