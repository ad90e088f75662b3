//! Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`.

use crate::{
    engine::{Failure, Refused, SamplingError},
    pipeline,
};
use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

/// An answer that is none.
#[derive(Clone, Debug)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// What kind of mistake it is, for programs.
    pub code: Option<&'static str>,
}

impl ApiError {
    /// The request cannot be answered as it is.
    pub fn invalid(param: &str, message: impl Into<String>) -> ApiError {
        let param = Some(param.to_string());
        ApiError { status: StatusCode::BAD_REQUEST, message: message.into(), param, code: None }
    }

    pub fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), param: None, code: None }
    }

    pub fn code(self, code: &'static str) -> ApiError {
        ApiError { code: Some(code), ..self }
    }

    pub fn loading() -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the models are still loading")
    }

    pub fn timeout(seconds: f64) -> ApiError {
        let message = format!("the answer was not complete within {seconds} seconds");
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, message).code("timeout")
    }

    /// The engine's thread is gone.
    pub fn dead() -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "the engine has stopped: see the server's log")
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            503 => "unavailable_error",
            400..500 => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// The object that answers carry.
    pub fn body(&self) -> Value {
        let (message, param, code) = (&self.message, &self.param, self.code);
        json!({ "error": { "message": message, "type": self.kind(), "param": param, "code": code } })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(self.body())).into_response()
    }
}

impl From<SamplingError> for ApiError {
    fn from(error: SamplingError) -> ApiError {
        let message = error.to_string();
        match error {
            SamplingError::Param { field, .. } => {
                ApiError::invalid(if field == "max_new_tokens" { "max_tokens" } else { field }, message)
            }
            SamplingError::Logits { .. } => ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message),
        }
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> ApiError {
        let message = refused.to_string();
        match refused {
            Refused::QueueFull(_) => ApiError::new(StatusCode::TOO_MANY_REQUESTS, message).code("queue_full"),
            Refused::ShuttingDown => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message),
            Refused::NoModel(_) => ApiError::invalid("model", message).code("model_not_found"),
            Refused::TooLong { .. } => ApiError::invalid("prompt", message).code("context_length_exceeded"),
            Refused::EmptyPrompt | Refused::UnknownToken { .. } => ApiError::invalid("prompt", message),
            Refused::FusedLogprobs => ApiError::invalid("echo", message),
            Refused::Sampling(error) => error.into(),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> ApiError {
        let status = match failure {
            Failure::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
            Failure::Pipeline(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        ApiError::new(status, failure.to_string())
    }
}

/// While a question is read: what is wrong with it is the client's to mend, what is wrong with the machine is not.
impl From<pipeline::Error> for ApiError {
    fn from(error: pipeline::Error) -> ApiError {
        use pipeline::Error as E;
        let message = error.to_string();
        match error {
            E::MissingModel { .. } | E::FuserCount { .. } | E::NoTokenizer { .. } | E::Contract(_) => {
                ApiError::invalid("model", message).code("model_not_found")
            }
            E::EmptyPrompt | E::Tokenizer(_) | E::Align(_) | E::T2tNeedsChat => {
                ApiError::invalid("messages", message)
            }
            E::Fuser(_) => ApiError::invalid("c2c.gates", message),
            E::ContextExceeded { .. } => {
                ApiError::invalid("messages", message).code("context_length_exceeded")
            }
            E::Sampling(error) => error.into(),
            _ => ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message),
        }
    }
}
