//! Tokens of service accounts (TokenRequest).

use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use kube::{Client, api::PostParams};

use crate::{ApiError, Objects, objects::ServiceAccount, serialize};

/// Requests a token of the service account `name` for `audience`, bound to no pod. Needs the right `create` on
/// `serviceaccounts/token`. An API server issues none for less than ten minutes.
pub async fn request_token(
    client: &Client,
    namespace: &str,
    name: &str,
    audience: &str,
    lifetime: Duration,
) -> Result<String, ApiError> {
    let wanted = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: Some(vec![audience.to_owned()]),
            expiration_seconds: i64::try_from(lifetime.as_secs()).ok(),
            ..TokenRequestSpec::default()
        }),
        ..TokenRequest::default()
    };
    let accounts = Objects::<ServiceAccount>::of(client.clone(), namespace);
    let request = accounts.request.create_subresource(
        "token",
        name,
        &PostParams::default(),
        serialize(&wanted)?,
    );
    let answer: TokenRequest = accounts.call(request).await?;
    answer
        .status
        .and_then(|status| status.token)
        .ok_or_else(|| ApiError::Answer("a TokenRequest without a token".to_owned()))
}
