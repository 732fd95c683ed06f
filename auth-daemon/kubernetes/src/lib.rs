//! Client for the cluster's API server. Each call has a size limit and a deadline.
//!
//! Calls do not use [`kube::Api`], because it reads a response of any length, has no deadline, and logs the whole of a
//! response that it cannot parse, including tokens and keys.

mod follow;
mod kubeconfig;
mod limits;
pub mod objects;
mod port_forward;
mod signing_request;
mod token;

use std::{env, error::Error, fmt::Debug, marker::PhantomData, path::Path, time::Duration};

use axum::body::{Body, to_bytes};
use k8s_openapi::NamespaceResourceScope;
use kube::{
    Client, Config, Resource,
    api::{DeleteParams, GetParams, ListParams, Patch, PatchParams, PostParams, Preconditions},
    client::{Body as ClientBody, ClientBuilder},
    config::{KubeConfigOptions, Kubeconfig},
    core::{ObjectList, Request, Status},
};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

pub use follow::{follow, follow_or_fail};
pub use kubeconfig::{MAX_KUBECONFIG_BYTES, WATCH_SECONDS, connect_by};
pub use port_forward::{Forwarded, port_forward};
pub use signing_request::{post_signing_request, poster_of};
pub use token::request_token;

/// Maximum duration of one call, including its response.
pub const DEADLINE: Duration = Duration::from_secs(5);
/// Maximum size of a response, in bytes. A page of a list fits, because an object has at most 1.5 MiB.
const MAX_ANSWER_BYTES: usize = 32 << 20;
/// Maximum length of a text from the API server in an error, in characters.
const MAX_TEXT: usize = 300;
/// Number of objects in one page of a list.
const PAGE: u32 = 20;
/// Why the cluster's API cannot be used at all. The message names the setting to change.
#[derive(Debug, thiserror::Error)]
#[error("kubernetes: {0}")]
pub struct NoCluster(String);

/// Creates a client for the cluster of `$KUBECONFIG`. If that is not set, uses the cluster that this process runs in as
/// a pod. Sends nothing yet.
pub async fn connect() -> Result<Client, NoCluster> {
    let config = if env::var_os("KUBECONFIG").is_some() {
        Config::from_kubeconfig(&KubeConfigOptions::default())
            .await
            .map_err(|error| NoCluster(format!("$KUBECONFIG: {}", with_causes(&error))))?
    } else {
        Config::incluster().map_err(|error| {
            NoCluster(format!(
                "$KUBECONFIG is not set, and this is no pod with a service account: {}",
                with_causes(&error)
            ))
        })?
    };
    client(config)
}

/// Creates a client for a user's cluster: that of the file `kubeconfig`, else of `$KUBECONFIG`, else of `~/.kube/config`, in
/// `context` or the current one. Sends nothing yet.
pub async fn connect_as_user(
    kubeconfig: Option<&Path>,
    context: Option<&str>,
) -> Result<Client, NoCluster> {
    let options = KubeConfigOptions {
        context: context.map(str::to_owned),
        ..KubeConfigOptions::default()
    };
    let config = async {
        match kubeconfig {
            Some(file) => {
                Config::from_custom_kubeconfig(Kubeconfig::read_from(file)?, &options).await
            }
            None => Config::from_kubeconfig(&options).await,
        }
    };
    let config = config.await.map_err(|error| {
        let file = kubeconfig.map_or("kubeconfig".to_owned(), |file| file.display().to_string());
        NoCluster(format!("{file}: {}", with_causes(&error)))
    })?;
    client(config)
}

/// Whether there is a kubeconfig that [`connect_as_user`] finds without being given one.
pub fn has_kubeconfig() -> bool {
    env::var_os("KUBECONFIG").is_some_and(|files| !files.is_empty())
        || env::home_dir().is_some_and(|home| home.join(".kube/config").is_file())
}

/// Whether [`connect`] treats this process as a pod of the cluster.
pub fn is_pod() -> bool {
    env::var_os("KUBECONFIG").is_none()
}

/// Creates a client for the API server in `config`. Fails if the server's certificate would not be verified.
pub fn client(config: Config) -> Result<Client, NoCluster> {
    let builder = ClientBuilder::try_from(verifying(config)?);
    let builder = builder.map_err(|error| NoCluster(with_causes(&error)))?;
    Ok(builder.build())
}

/// Completes `config`, if the server's certificate will be verified.
fn verifying(mut config: Config) -> Result<Config, NoCluster> {
    // kube takes its TLS implementation from the process-wide default. Only the first provider that is installed
    // counts, so it must be this one.
    if CryptoProvider::get_default().is_none() {
        let _ = aws_lc_rs::default_provider().install_default();
    }
    if config.accept_invalid_certs || config.cluster_url.scheme_str() != Some("https") {
        return Err(NoCluster(format!(
            "{}: the API server says who may have which certificate, so its own must be checked: use https, with \
             certificate-authority and without insecure-skip-tls-verify",
            config.cluster_url
        )));
    }
    config.connect_timeout = Some(DEADLINE);
    // The caller knows better whether a call may be retried.
    config.default_retry = false;
    Ok(config)
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// No response before the deadline.
    #[error("the API server did not answer within {0:?}")]
    TimedOut(Duration),
    /// The connection failed or broke.
    #[error("the API server cannot be reached: {0}")]
    Unreachable(String),
    /// The API server rejected the request.
    #[error("the API server refuses: {message} ({reason}, HTTP {code})")]
    Refused {
        /// HTTP status code.
        code: u16,
        /// Machine-readable reason: one word.
        reason: String,
        /// Human-readable message: one sentence.
        message: String,
    },
    /// The response is too long, or is not of the expected form.
    #[error("the API server's answer is not understood: {0}")]
    Answer(String),
}

impl ApiError {
    /// Whether the object already exists, or has changed since it was read.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Refused { code: 409, .. })
    }

    /// Whether the object does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: 404, .. })
    }

    /// Whether the request may have been executed, or may still be.
    pub fn is_uncertain(&self) -> bool {
        match self {
            Self::TimedOut(_) | Self::Unreachable(_) | Self::Answer(_) => true,
            Self::Refused { code, .. } => *code >= 500,
        }
    }
}

/// Objects of one kind, in one namespace or in all namespaces.
#[derive(Clone)]
pub struct Objects<K> {
    client: Client,
    request: Request,
    kind: PhantomData<fn() -> K>,
}

impl<K> std::fmt::Debug for Objects<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Objects")
            .field("path", &self.request.url_path)
            .finish_non_exhaustive()
    }
}

impl<K: Resource<DynamicType = ()> + DeserializeOwned + Clone> Objects<K> {
    /// Objects in `namespace`.
    pub fn of(client: Client, namespace: &str) -> Self
    where
        K: Resource<Scope = NamespaceResourceScope>,
    {
        Self::at(client, K::url_path(&(), Some(namespace)))
    }

    /// Objects in the whole cluster.
    pub fn all(client: Client) -> Self {
        Self::at(client, K::url_path(&(), None))
    }

    fn at(client: Client, path: String) -> Self {
        Self {
            client,
            request: Request::new(path),
            kind: PhantomData,
        }
    }

    /// Returns the object, or `None` if it does not exist.
    pub async fn get(&self, name: &str) -> Result<Option<K>, ApiError> {
        match self
            .call(self.request.get(name, &GetParams::default()))
            .await
        {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns all objects that match the label selector `labels`.
    pub async fn list(&self, labels: &str) -> Result<Vec<K>, ApiError> {
        let mut parameters = ListParams::default().labels(labels).limit(PAGE);
        let mut objects = Vec::new();
        loop {
            let page: ObjectList<K> = self.call(self.request.list(&parameters)).await?;
            objects.extend(page.items);
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => parameters.continue_token = Some(token),
                None => return Ok(objects),
            }
        }
    }

    /// Creates an object. Returns it as it was stored.
    pub async fn create(&self, object: &K) -> Result<K, ApiError>
    where
        K: Serialize,
    {
        let body = serialize(object)?;
        self.call(self.request.create(&PostParams::default(), body))
            .await
    }

    /// Replaces an object if its resource version is still that of `object`.
    pub async fn replace(&self, name: &str, object: &K) -> Result<K, ApiError>
    where
        K: Serialize,
    {
        let body = serialize(object)?;
        self.call(self.request.replace(name, &PostParams::default(), body))
            .await
    }

    /// Changes fields of an object by a JSON merge patch (RFC 7396).
    pub async fn merge(&self, name: &str, change: &Value) -> Result<K, ApiError> {
        let patch = Patch::Merge(change);
        self.call(self.request.patch(name, &PatchParams::default(), &patch))
            .await
    }

    /// Deletes the object, if `uid` is `None` or matches. It is not an error if the object does not exist.
    pub async fn delete(&self, name: &str, uid: Option<String>) -> Result<(), ApiError> {
        let parameters = DeleteParams {
            preconditions: uid.map(|uid| Preconditions {
                uid: Some(uid),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        // The response is the object or a status, depending on finalizers.
        match self
            .call::<Value>(self.request.delete(name, &parameters))
            .await
        {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    async fn call<T: DeserializeOwned>(
        &self,
        request: Result<axum::http::Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<T, ApiError> {
        let request = request.map_err(|error| ApiError::Answer(error.to_string()))?;
        tokio::time::timeout(DEADLINE, exchange(&self.client, request))
            .await
            .unwrap_or(Err(ApiError::TimedOut(DEADLINE)))
    }
}

/// Returns the first of `versions` in which the API server serves the resource `plural` of `group`. `None` if it serves
/// it in none of them.
pub async fn served<'a>(
    client: &Client,
    group: &str,
    versions: &[&'a str],
    plural: &str,
) -> Result<Option<&'a str>, ApiError> {
    for version in versions {
        let request = axum::http::Request::get(format!("/apis/{group}/{version}"))
            .body(Vec::new())
            .map_err(|error| ApiError::Answer(error.to_string()))?;
        let answer = tokio::time::timeout(DEADLINE, exchange::<Value>(client, request)).await;
        match answer.unwrap_or(Err(ApiError::TimedOut(DEADLINE))) {
            Ok(kinds) => {
                let mut kinds = kinds["resources"].as_array().into_iter().flatten();
                if kinds.any(|kind| kind["name"] == plural) {
                    return Ok(Some(version));
                }
            }
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Reports whether the cluster defines the custom resource `plural` of `group`. An API server that has just started does
/// not serve it yet.
pub async fn is_defined(client: &Client, group: &str, plural: &str) -> Result<bool, ApiError> {
    let path = format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{plural}.{group}");
    let request = axum::http::Request::get(path)
        .body(Vec::new())
        .map_err(|error| ApiError::Answer(error.to_string()))?;
    let answer = tokio::time::timeout(DEADLINE, exchange::<Value>(client, request)).await;
    match answer.unwrap_or(Err(ApiError::TimedOut(DEADLINE))) {
        Ok(_) => Ok(true),
        Err(error) if error.is_not_found() => Ok(false),
        Err(error) => Err(error),
    }
}

async fn exchange<T: DeserializeOwned>(
    client: &Client,
    request: axum::http::Request<Vec<u8>>,
) -> Result<T, ApiError> {
    let answer = client
        .send(request.map(ClientBody::from))
        .await
        .map_err(|error| ApiError::Unreachable(with_causes(&error)))?;
    let code = answer.status().as_u16();
    let body = to_bytes(Body::new(answer.into_body()), MAX_ANSWER_BYTES)
        .await
        .map_err(|error| ApiError::Answer(with_causes(&error)))?;
    if (200..300).contains(&code) {
        // serde_json's errors may quote the content, so report only the position.
        return serde_json::from_slice(&body).map_err(|error| {
            ApiError::Answer(format!(
                "not the object that was asked for (line {}, column {})",
                error.line(),
                error.column()
            ))
        });
    }
    let status: Status = serde_json::from_slice(&body).unwrap_or_default();
    Err(ApiError::Refused {
        code,
        reason: printable(&status.reason),
        message: printable(&status.message),
    })
}

fn serialize(object: &impl Serialize) -> Result<Vec<u8>, ApiError> {
    serde_json::to_vec(object).map_err(|error| ApiError::Answer(error.to_string()))
}

/// Makes a text of another process safe for one line of a log: replaces control characters and limits the length.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_TEXT)
        .collect()
}

/// Formats an error with all its causes on one line.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let next_text = next.to_string();
        // The errors of many libraries already include their cause.
        if !text.contains(&next_text) {
            text = format!("{text}: {next_text}");
        }
        cause = next.source();
    }
    printable(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_have_been_done() {
        let refused = |code| ApiError::Refused {
            code,
            reason: String::new(),
            message: String::new(),
        };
        assert!(refused(409).is_conflict() && !refused(409).is_uncertain());
        assert!(refused(404).is_not_found() && !refused(403).is_uncertain());
        assert!(refused(504).is_uncertain() && ApiError::TimedOut(DEADLINE).is_uncertain());
    }

    #[test]
    fn texts_from_elsewhere_stay_on_their_line() {
        assert_eq!(printable("a\nb\u{1b}[1m"), "a b [1m");
        assert_eq!(printable(&"x".repeat(5000)).len(), MAX_TEXT);
    }

    #[test]
    fn causes_are_reported_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("inner"));
        assert_eq!(with_causes(&error), "outer: inner");
    }
}
