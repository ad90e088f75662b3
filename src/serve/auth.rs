//! The API key: `Authorization: Bearer KEY`.

use super::{error::ApiError, state::Server};
use axum::{
    extract::{Request, State},
    http::{StatusCode, header::AUTHORIZATION},
    middleware::Next,
    response::{IntoResponse, Response},
};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use subtle::ConstantTimeEq;

/// Lets through who has the key, or everybody where there is none.
pub async fn check(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let Some(key) = &server.api_key else { return next.run(request).await };
    let given =
        request.headers().get(AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    if given.is_some_and(|given| same(given, key.as_bytes())) {
        return next.run(request).await;
    }
    let message = "this server asks for a key: send the header `Authorization: Bearer KEY`";
    ApiError::new(StatusCode::UNAUTHORIZED, message).code("invalid_api_key").into_response()
}

/// In a time that tells nothing of where they differ, nor of the key's length.
fn same(given: &[u8], key: &[u8]) -> bool {
    Sha256::digest(given).ct_eq(&Sha256::digest(key)).into()
}

#[cfg(test)]
mod tests {
    use super::same;

    #[test]
    fn only_the_key_is_the_key() {
        assert!(same(b"secret", b"secret"));
        for wrong in [&b""[..], b"secre", b"secrets", b"Secret"] {
            assert!(!same(wrong, b"secret"));
        }
    }
}
