//! Callers by their service account tokens, which the cluster's API server reviews.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::digest::{SHA256, digest};
use k8s_openapi::api::authentication::v1::{
    TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo,
};
use kube::Client;
use serde::Deserialize;
use tokio::{
    sync::{OnceCell, Semaphore},
    time::{Instant, timeout},
};

use super::{Attestation, Attestor, Caller, Credentials, Unattested};
use crate::{
    kubernetes::{Objects, objects::Pod, printable},
    mesh::{ObjectName, TrustDomain},
};

/// Longest token that is reviewed, in bytes. Those of the API server have one or two thousand.
const MAX_TOKEN_BYTES: usize = 16 << 10;
/// How long to wait for the API server in all.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long a review holds: a deleted pod's token is good for as long.
const REVIEW_HOLDS: Duration = Duration::from_secs(10);
/// Most reviews that are remembered.
const MAX_REMEMBERED: usize = 4096;
/// Most reviews under way.
const MAX_REVIEWS: usize = 32;

const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
/// Since Kubernetes 1.30.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const ACCOUNT_PREFIX: &str = "system:serviceaccount:";

/// Whose tokens are taken, and what they say.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Of the identities.
    pub trust_domain: TrustDomain,
    /// What tokens must be made for.
    pub audience: String,
    /// The node daemons' service account, where there are any: all others are workloads.
    pub node_service_account: Option<ObjectName>,
}

/// Attests by TokenReview.
pub struct TokenReviewer {
    settings: Settings,
    reviews: Objects<TokenReview>,
    client: Client,
    under_way: Semaphore,
    remembered: Mutex<HashMap<[u8; 32], Arc<Remembered>>>,
}

/// One token's review: made once, by the first of those who wait for it.
struct Remembered {
    until: Instant,
    outcome: OnceCell<Result<Caller, Unattested>>,
}

/// What this side needs to know of a token, before its signature is checked.
#[derive(Deserialize)]
struct Claims {
    /// Seconds since the Unix epoch.
    exp: Option<u64>,
}

/// What a review says of the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reviewed {
    account: ObjectName,
    pod: String,
    pod_uid: String,
    node: Option<String>,
}

impl TokenReviewer {
    /// Asks the API server of `client`.
    pub fn new(client: Client, settings: Settings) -> Self {
        Self {
            settings,
            reviews: Objects::all(client.clone()),
            client,
            under_way: Semaphore::new(MAX_REVIEWS),
            remembered: Mutex::default(),
        }
    }

    async fn attest_token(&self, token: &str) -> Option<Result<Caller, Unattested>> {
        if token.len() > MAX_TOKEN_BYTES {
            return Some(refuse(format!(
                "the token has {} bytes; at most {MAX_TOKEN_BYTES} are taken",
                token.len()
            )));
        }
        let claims = claims(token)?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let lives = match claims.exp {
            None => {
                return Some(refuse(
                    "the token never expires: use a projected service account token".into(),
                ));
            }
            Some(exp) => Duration::from_secs(exp).saturating_sub(now),
        };
        if lives.is_zero() {
            return Some(refuse("the token has expired".into()));
        }
        let key: [u8; 32] = digest(&SHA256, token.as_bytes()).as_ref().try_into().ok()?;
        let remembered = self.remember(key, lives.min(REVIEW_HOLDS));
        let review = remembered.outcome.get_or_init(|| self.review(token));
        let Ok(outcome) = timeout(DEADLINE, review).await else {
            return Some(refuse(format!(
                "the API server did not review the token within {DEADLINE:?}"
            )));
        };
        // The next caller asks again: what was wrong may be right by then.
        if outcome.is_err() {
            let mut all = self
                .remembered
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if all
                .get(&key)
                .is_some_and(|current| Arc::ptr_eq(current, &remembered))
            {
                all.remove(&key);
            }
        }
        Some(outcome.clone())
    }

    /// The review of the token with this digest, made or still to be made.
    fn remember(&self, key: [u8; 32], holds: Duration) -> Arc<Remembered> {
        let now = Instant::now();
        let mut all = self
            .remembered
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = all.get(&key).filter(|found| found.until > now) {
            return found.clone();
        }
        let new = Arc::new(Remembered {
            until: now + holds,
            outcome: OnceCell::new(),
        });
        if all.len() >= MAX_REMEMBERED {
            all.retain(|_, found| found.until > now);
        }
        if all.len() < MAX_REMEMBERED {
            all.insert(key, new.clone());
        }
        new
    }

    async fn review(&self, token: &str) -> Result<Caller, Unattested> {
        let Ok(_permit) = self.under_way.acquire().await else {
            return refuse("the CA is stopping".into());
        };
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.to_owned(),
                audiences: Some(vec![self.settings.audience.clone()]),
            },
            ..TokenReview::default()
        };
        let answer = self.reviews.create(&review).await.map_err(|fault| {
            Unattested(format!(
                "the token cannot be reviewed: {}",
                without(&fault.to_string(), token)
            ))
        })?;
        let reviewed = judge(answer.status.unwrap_or_default(), &self.settings.audience)
            .map_err(|error| Unattested(without(&error, token)))?;
        let node = match &reviewed.node {
            Some(node) => node.clone(),
            None => self.node_of(&reviewed).await?,
        };
        let ObjectName { namespace, name } = &reviewed.account;
        if self.settings.node_service_account.as_ref() == Some(&reviewed.account) {
            return Ok(Caller::Node { node });
        }
        let identity = self
            .settings
            .trust_domain
            .identity(namespace, name)
            .map_err(|error| Unattested(format!("service account {namespace}/{name}: {error}")))?;
        Ok(Caller::Workload {
            identity,
            node: Some(node),
        })
    }

    async fn node_of(&self, reviewed: &Reviewed) -> Result<String, Unattested> {
        let pods: Objects<Pod> = Objects::of(self.client.clone(), &reviewed.account.namespace);
        let pod = pods.get(&reviewed.pod).await.map_err(|fault| {
            Unattested(format!(
                "pod {}/{} cannot be looked up: {fault}",
                reviewed.account.namespace, reviewed.pod
            ))
        })?;
        node_of(pod, reviewed).map_err(|why| {
            Unattested(format!(
                "pod {}/{} {why}",
                reviewed.account.namespace, reviewed.pod
            ))
        })
    }
}

impl Attestor for TokenReviewer {
    fn attest<'a>(&'a self, credentials: Credentials<'a>) -> Attestation<'a> {
        Box::pin(async move { self.attest_token(credentials.bearer?).await })
    }
}

impl fmt::Debug for TokenReviewer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenReviewer")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

fn refuse<T>(why: String) -> Result<T, Unattested> {
    Err(Unattested(why))
}

/// What the token says of itself; `None` for what is no JWT (RFC 7519 §3).
fn claims(token: &str) -> Option<Claims> {
    if token.split('.').count() != 3 || token.split('.').any(str::is_empty) {
        return None;
    }
    jsonwebtoken::dangerous::insecure_decode_claims(token).ok()
}

/// `text` with no part of `token` in it.
fn without(text: &str, token: &str) -> String {
    let mut text = text.replace(token, "(the token)");
    for part in token.split('.').filter(|part| !part.is_empty()) {
        text = text.replace(part, "(part of the token)");
    }
    printable(&text)
}

/// Who the API server says the caller is, if it has looked at the audience.
fn judge(status: TokenReviewStatus, audience: &str) -> Result<Reviewed, String> {
    if status.authenticated != Some(true) {
        let why = status.error.filter(|why| !why.is_empty());
        return Err(format!(
            "the API server does not accept the token for audience {audience:?}{}",
            why.map(|why| format!(": {why}")).unwrap_or_default()
        ));
    }
    // An API server that knows nothing of audiences accepts tokens for any of them, and lists none.
    let audiences = status.audiences.unwrap_or_default();
    if !audiences.iter().any(|found| found == audience) {
        return Err(format!("the token is not for audience {audience:?}"));
    }
    let UserInfo {
        username, extra, ..
    } = status.user.unwrap_or_default();
    let username = username.unwrap_or_default();
    let account = username
        .strip_prefix(ACCOUNT_PREFIX)
        .and_then(|name| name.split_once(':'))
        .filter(|(namespace, name)| !namespace.is_empty() && !name.is_empty())
        .ok_or_else(|| format!("{:?} is no service account", printable(&username)))?;
    let extra = extra.unwrap_or_default();
    let one = |key: &str| match extra.get(key).map(Vec::as_slice) {
        Some([value]) if object_name(value) => Ok(Some(value.clone())),
        None | Some([]) => Ok(None),
        Some(_) => Err(format!("the review's {key} is no name")),
    };
    let (Some(pod), Some(pod_uid)) = (one(POD_NAME)?, one(POD_UID)?) else {
        return Err("the token is bound to no pod: use a projected service account token".into());
    };
    Ok(Reviewed {
        account: ObjectName {
            namespace: account.0.to_owned(),
            name: account.1.to_owned(),
        },
        pod,
        pod_uid,
        node: one(NODE_NAME)?,
    })
}

/// Whether Kubernetes could call something so; what is none would lead to another URL.
fn object_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 253
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
}

/// The node that runs the pod which the token is bound to.
fn node_of(pod: Option<Pod>, reviewed: &Reviewed) -> Result<String, &'static str> {
    let pod = pod.ok_or("does not exist (any more)")?;
    if pod.metadata.uid.as_deref() != Some(&reviewed.pod_uid) {
        return Err("was made anew since the token was given to it");
    }
    if pod.metadata.deletion_timestamp.is_some() {
        return Err("is being deleted");
    }
    let phase = pod.status.phase.unwrap_or_default();
    if phase == "Succeeded" || phase == "Failed" {
        return Err("has ended");
    }
    let spec = pod.spec;
    if spec.service_account_name.as_deref() != Some(&reviewed.account.name) {
        return Err("has another service account");
    }
    spec.node_name
        .filter(|node| !node.is_empty())
        .ok_or("is on no node yet")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn extra(values: &[(&str, &str)]) -> Option<BTreeMap<String, Vec<String>>> {
        let values = values.iter();
        Some(
            values
                .map(|(key, value)| ((*key).to_owned(), vec![(*value).to_owned()]))
                .collect(),
        )
    }

    fn status() -> TokenReviewStatus {
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec!["ca".into()]),
            error: None,
            user: Some(UserInfo {
                username: Some("system:serviceaccount:shop:web".into()),
                extra: extra(&[(POD_NAME, "web-1"), (POD_UID, "u-1")]),
                ..UserInfo::default()
            }),
        }
    }

    fn reviewed() -> Reviewed {
        judge(status(), "ca").unwrap()
    }

    #[test]
    fn a_pod_and_its_node() {
        assert_eq!(reviewed().account.to_string(), "shop/web");
        assert_eq!(reviewed().node, None);
        let mut says_node = status();
        says_node.user.as_mut().unwrap().extra =
            extra(&[(POD_NAME, "web-1"), (POD_UID, "u-1"), (NODE_NAME, "a")]);
        assert_eq!(judge(says_node, "ca").unwrap().node.as_deref(), Some("a"));
    }

    #[test]
    fn refuses_what_the_api_server_does_not_vouch_for() {
        type Change = fn(&mut TokenReviewStatus);
        let cases: [(Change, &str); 8] = [
            (
                |s| s.authenticated = Some(false),
                "does not accept the token",
            ),
            (|s| s.authenticated = None, "does not accept the token"),
            (|s| s.audiences = None, "is not for audience \"ca\""),
            (
                |s| s.audiences = Some(vec!["https://kubernetes.default.svc".into()]),
                "is not for audience \"ca\"",
            ),
            (|s| s.user = None, "\"\" is no service account"),
            (
                |s| s.user.as_mut().unwrap().username = Some("system:node:a".into()),
                "\"system:node:a\" is no service account",
            ),
            (|s| s.user.as_mut().unwrap().extra = None, "bound to no pod"),
            (
                |s| {
                    s.user.as_mut().unwrap().extra =
                        extra(&[(POD_NAME, "../../secrets/x"), (POD_UID, "u")]);
                },
                "is no name",
            ),
        ];
        for (change, expected) in cases {
            let mut status = status();
            change(&mut status);
            let error = judge(status, "ca").unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn refuses_a_pod_that_is_not_the_tokens_own() {
        let pod = |value: serde_json::Value| -> Pod { serde_json::from_value(value).unwrap() };
        let good = json!({
            "metadata": {"name": "web-1", "uid": "u-1"},
            "spec": {"nodeName": "a", "serviceAccountName": "web", "containers": []},
            "status": {"phase": "Running"},
        });
        assert_eq!(
            node_of(Some(pod(good.clone())), &reviewed()),
            Ok("a".into())
        );
        assert!(node_of(None, &reviewed()).is_err());
        for (pointer, value) in [
            ("/metadata/uid", json!("u-2")),
            ("/metadata/deletionTimestamp", json!("2026-01-01T00:00:00Z")),
            ("/status/phase", json!("Succeeded")),
            ("/spec/serviceAccountName", json!("other")),
            ("/spec/nodeName", json!("")),
        ] {
            let mut bad = good.clone();
            let (parent, field) = pointer.rsplit_once('/').unwrap();
            bad.pointer_mut(parent).unwrap()[field] = value;
            assert!(node_of(Some(pod(bad)), &reviewed()).is_err(), "{pointer}");
        }
    }

    #[test]
    fn errors_hold_no_part_of_a_token() {
        let token = "eyJhbGciOi.eyJleHAiOj.c2lnbmF0dXJl";
        let text = without(&format!("cannot parse {token} nor c2lnbmF0dXJl"), token);
        assert_eq!(text, "cannot parse (the token) nor (part of the token)");
    }

    #[test]
    fn what_is_no_token_is_not_asked_about() {
        assert!(claims("node-secret").is_none());
        assert!(claims("a.b").is_none());
        assert!(claims("..").is_none());
        assert!(claims("a.b.c").is_none());
        // {"exp":5}
        assert_eq!(claims("e30.eyJleHAiOjV9.x").unwrap().exp, Some(5));
    }

    proptest! {
        #[test]
        fn no_bearer_panics(token in "\\PC{0,40}(\\.\\PC{0,40}){0,3}") {
            let _ = claims(&token);
            let _ = without("text", &token);
        }
    }
}
