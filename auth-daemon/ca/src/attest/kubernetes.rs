//! Service account tokens, which the cluster's API server reviews (TokenReview).

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use auth_ca_api::pem;
use auth_kubernetes::{Objects, objects::Pod, poster_of, printable};
use auth_mesh::{Identity, ObjectName, TrustDomain};
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

use super::{Attestor, Caller, Credentials, Unattested, service_account};

/// How long to wait for the API server in total.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long a review is reused: a deleted pod's token stays accepted for as long.
const REVIEW_LIFETIME: Duration = Duration::from_secs(10);
/// Most reviews that are cached.
const MAX_CACHED: usize = 4096;
/// Most reviews in progress.
const MAX_REVIEWS: usize = 32;

/// Prefix of the name of a person of whom only a token's ID is known.
const TOKEN_PREFIX: &str = "kubernetes-token";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
/// The ID of the token. The API server's audit log also has it, where it logs the token's issuance (Kubernetes 1.32).
const CREDENTIAL_ID: &str = "authentication.kubernetes.io/credential-id";
/// Since Kubernetes 1.30.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// Which tokens are accepted.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The trust domain of the identities.
    pub trust_domain: TrustDomain,
    /// The audience that tokens must be issued for.
    pub audience: String,
    /// The node daemons' service account. All others are workloads'.
    pub node_service_account: Option<ObjectName>,
    /// Whether tokens are accepted that are bound to no pod: whoever may create them acts as their account.
    pub people: bool,
}

/// Identifies callers by TokenReview.
pub struct TokenReviewer {
    settings: Settings,
    reviews: Objects<TokenReview>,
    client: Client,
    in_progress: Semaphore,
    cached: Mutex<HashMap<[u8; 32], Arc<CachedReview>>>,
}

/// The review of one token, done once for all who wait for it.
struct CachedReview {
    until: Instant,
    outcome: OnceCell<Result<Caller, Unattested>>,
}

/// The only claim that is read before the review.
#[derive(Deserialize)]
struct Claims {
    /// Seconds since the Unix epoch.
    exp: Option<u64>,
}

/// What a review says about the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Judged {
    Pod(Reviewed),
    /// The token is bound to nothing.
    Unbound {
        account: ObjectName,
        credential: Option<String>,
    },
}

/// The pod that a token is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reviewed {
    account: ObjectName,
    pod: String,
    pod_uid: String,
    node: Option<String>,
}

impl TokenReviewer {
    /// Uses the API server of `client`.
    pub fn new(client: Client, settings: Settings) -> Self {
        Self {
            settings,
            reviews: Objects::all(client.clone()),
            client,
            in_progress: Semaphore::new(MAX_REVIEWS),
            cached: Mutex::default(),
        }
    }

    async fn attest_token(&self, token: &str) -> Option<Result<Caller, Unattested>> {
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
        let cached = self.cached_review(key, lives.min(REVIEW_LIFETIME));
        let review = cached.outcome.get_or_init(|| self.review(token));
        let Ok(outcome) = timeout(DEADLINE, review).await else {
            return Some(refuse(format!(
                "the API server did not review the token within {DEADLINE:?}"
            )));
        };
        // Failures are not cached: the reason may be gone for the next caller.
        if outcome.is_err() {
            let mut all = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
            if all
                .get(&key)
                .is_some_and(|current| Arc::ptr_eq(current, &cached))
            {
                all.remove(&key);
            }
        }
        Some(outcome.clone())
    }

    /// The review of the token with this digest, done or not.
    fn cached_review(&self, key: [u8; 32], holds: Duration) -> Arc<CachedReview> {
        let now = Instant::now();
        let mut all = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = all.get(&key).filter(|found| found.until > now) {
            return found.clone();
        }
        let new = Arc::new(CachedReview {
            until: now + holds,
            outcome: OnceCell::new(),
        });
        if all.len() >= MAX_CACHED {
            all.retain(|_, found| found.until > now);
        }
        if all.len() < MAX_CACHED {
            all.insert(key, new.clone());
        }
        new
    }

    async fn review(&self, token: &str) -> Result<Caller, Unattested> {
        let Ok(_permit) = self.in_progress.acquire().await else {
            return refuse("the CA is stopping".into());
        };
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.to_owned(),
                audiences: Some(vec![self.settings.audience.clone()]),
            },
            ..TokenReview::default()
        };
        let answer = self.reviews.create(&review).await.map_err(|error| {
            Unattested(format!(
                "the token cannot be reviewed: {}",
                without(&error.to_string(), token)
            ))
        })?;
        let judged = judge(answer.status.unwrap_or_default(), &self.settings.audience)
            .map_err(|error| Unattested(without(&error, token)))?;
        let reviewed = match judged {
            Judged::Pod(reviewed) => reviewed,
            Judged::Unbound {
                account,
                credential,
            } => return self.person(&account, credential),
        };
        let node = match &reviewed.node {
            Some(node) => node.clone(),
            None => self.node_of(&reviewed).await?,
        };
        if self.settings.node_service_account.as_ref() == Some(&reviewed.account) {
            return Ok(Caller::Node { node });
        }
        let identity = self.identity(&reviewed.account)?;
        Ok(Caller::Workload { identity, node })
    }

    /// The holder of a token of `account` that is bound to no pod. Only the API server's audit log says who that is.
    fn person(
        &self,
        account: &ObjectName,
        credential: Option<String>,
    ) -> Result<Caller, Unattested> {
        if !self.settings.people {
            return refuse(
                "the token is bound to no pod: use a projected service account token, or let people act as service \
                 accounts (attestation.kubernetes.people)"
                    .into(),
            );
        }
        if self.settings.node_service_account.as_ref() == Some(account) {
            return refuse(format!(
                "nobody may act as {account}, the node daemons' account"
            ));
        }
        let identity = self.identity(account)?;
        let person = match credential {
            Some(id) => format!("{TOKEN_PREFIX}:{id}"),
            None => TOKEN_PREFIX.to_owned(),
        };
        Ok(Caller::Person {
            person,
            // Anybody who may create tokens of the account can have as many as they like.
            counts_for: identity.to_string(),
            identities: vec![identity],
        })
    }

    fn identity(&self, account: &ObjectName) -> Result<Identity, Unattested> {
        let ObjectName { namespace, name } = account;
        self.settings
            .trust_domain
            .identity(namespace, name)
            .map_err(|error| Unattested(format!("service account {account}: {error}")))
    }

    async fn node_of(&self, reviewed: &Reviewed) -> Result<String, Unattested> {
        let pods: Objects<Pod> = Objects::of(self.client.clone(), &reviewed.account.namespace);
        let pod = pods.get(&reviewed.pod).await.map_err(|error| {
            Unattested(format!(
                "pod {}/{} cannot be looked up: {error}",
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

#[tonic::async_trait]
impl Attestor for TokenReviewer {
    async fn attest(&self, credentials: Credentials<'_>) -> Option<Result<Caller, Unattested>> {
        self.attest_token(credentials.bearer?).await
    }

    /// The user who posted the CSR to the API server.
    async fn proved(&self, caller: &Caller, csr: &[u8]) -> Option<String> {
        match caller {
            Caller::Person { person, .. } if person.starts_with(TOKEN_PREFIX) => {}
            _ => return None,
        }
        let csr = pem::encode("CERTIFICATE REQUEST", csr);
        match timeout(DEADLINE, poster_of(&self.client, &csr)).await {
            Ok(Ok(user)) => user.map(|user| format!("kubernetes:{user}")),
            Ok(Err(error)) => {
                tracing::warn!(%caller, %error, "signing request cannot be looked up");
                None
            }
            Err(_) => None,
        }
    }
}

fn refuse<T>(why: String) -> Result<T, Unattested> {
    Err(Unattested(why))
}

/// The token's claims; `None` if it is not a JWT (RFC 7519 §3).
fn claims(token: &str) -> Option<Claims> {
    if token.split('.').count() != 3 || token.split('.').any(str::is_empty) {
        return None;
    }
    jsonwebtoken::dangerous::insecure_decode_claims(token).ok()
}

/// `text` without any part of `token`.
fn without(text: &str, token: &str) -> String {
    let mut text = text.replace(token, "(the token)");
    for part in token.split('.').filter(|part| !part.is_empty()) {
        text = text.replace(part, "(part of the token)");
    }
    printable(&text)
}

/// The caller, if the API server accepted the token for `audience`.
fn judge(status: TokenReviewStatus, audience: &str) -> Result<Judged, String> {
    if status.authenticated != Some(true) {
        let why = status.error.filter(|why| !why.is_empty());
        return Err(format!(
            "the API server does not accept the token for audience {audience:?}{}",
            why.map(|why| format!(": {why}")).unwrap_or_default()
        ));
    }
    // An API server without support for audiences accepts tokens for any of them, and lists none.
    let audiences = status.audiences.unwrap_or_default();
    if !audiences.iter().any(|found| found == audience) {
        return Err(format!("the token is not for audience {audience:?}"));
    }
    let UserInfo {
        username, extra, ..
    } = status.user.unwrap_or_default();
    let username = username.unwrap_or_default();
    let account = service_account(&username)
        .ok_or_else(|| format!("{:?} is not a service account", printable(&username)))?;
    let extra = extra.unwrap_or_default();
    let one = |key: &str| match extra.get(key).map(Vec::as_slice) {
        Some([value]) if object_name(value) => Ok(Some(value.clone())),
        None | Some([]) => Ok(None),
        Some(_) => Err(format!("the review's {key} is not a name")),
    };
    let node = one(NODE_NAME)?;
    match (one(POD_NAME)?, one(POD_UID)?) {
        (Some(pod), Some(pod_uid)) => Ok(Judged::Pod(Reviewed {
            account,
            pod,
            pod_uid,
            node,
        })),
        (None, None) if node.is_none() => Ok(Judged::Unbound {
            account,
            credential: credential(extra.get(CREDENTIAL_ID).map(Vec::as_slice))?,
        }),
        _ => Err(
            "the token is bound to a node, or half to a pod: use a projected service account token"
                .into(),
        ),
    }
}

/// The token's ID, of the form `JTI=5c2f…`.
fn credential(extra: Option<&[String]>) -> Result<Option<String>, String> {
    let Some([id]) = extra else {
        return Ok(None);
    };
    let id = id.strip_prefix("JTI=").unwrap_or(id);
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    match (1..=128).contains(&id.len()) && id.bytes().all(allowed) {
        true => Ok(Some(id.to_owned())),
        false => Err(format!("the review's {CREDENTIAL_ID} is not an ID")),
    }
}

/// Whether `name` can be a Kubernetes object's name. Another one could lead to another URL.
fn object_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 253
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
}

/// The node of the pod that the token is bound to.
fn node_of(pod: Option<Pod>, reviewed: &Reviewed) -> Result<String, &'static str> {
    let pod = pod.ok_or("does not exist")?;
    if pod.metadata.uid.as_deref() != Some(&reviewed.pod_uid) {
        return Err("was replaced since the token was issued");
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
        .ok_or("is not scheduled to a node yet")
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
        pod_of(status())
    }

    fn pod_of(status: TokenReviewStatus) -> Reviewed {
        match judge(status, "ca").unwrap() {
            Judged::Pod(reviewed) => reviewed,
            judged => panic!("{judged:?}"),
        }
    }

    #[test]
    fn identifies_a_pod_and_its_node() {
        assert_eq!(reviewed().account.to_string(), "shop/web");
        assert_eq!(reviewed().node, None);
        let mut says_node = status();
        says_node.user.as_mut().unwrap().extra =
            extra(&[(POD_NAME, "web-1"), (POD_UID, "u-1"), (NODE_NAME, "a")]);
        assert_eq!(pod_of(says_node).node.as_deref(), Some("a"));
    }

    #[test]
    fn recognises_tokens_that_are_bound_to_nothing() {
        let with = |values: Option<&[(&str, &str)]>| {
            let mut status = status();
            status.user.as_mut().unwrap().extra = values.and_then(extra);
            judge(status, "ca")
        };
        for (values, id) in [
            (None, None),
            (Some(&[][..]), None),
            (Some(&[(CREDENTIAL_ID, "JTI=5c2f-1")]), Some("5c2f-1")),
            (Some(&[(CREDENTIAL_ID, "5c2f")]), Some("5c2f")),
        ] {
            let Ok(Judged::Unbound {
                account,
                credential,
            }) = with(values)
            else {
                panic!("{values:?}");
            };
            assert_eq!(
                (&*account.to_string(), credential.as_deref()),
                ("shop/web", id)
            );
        }
        for (values, why) in [
            (&[(CREDENTIAL_ID, "JTI=a b")][..], "is not an ID"),
            (&[(CREDENTIAL_ID, "JTI=")], "is not an ID"),
            (&[(NODE_NAME, "a")], "bound to a node"),
            (&[(POD_NAME, "web-1")], "half to a pod"),
        ] {
            let error = with(Some(values)).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn refuses_tokens_that_the_api_server_does_not_accept() {
        type Change = fn(&mut TokenReviewStatus);
        let cases: [(Change, &str); 7] = [
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
            (|s| s.user = None, "\"\" is not a service account"),
            (
                |s| s.user.as_mut().unwrap().username = Some("system:node:a".into()),
                "\"system:node:a\" is not a service account",
            ),
            (
                |s| {
                    s.user.as_mut().unwrap().extra =
                        extra(&[(POD_NAME, "../../secrets/x"), (POD_UID, "u")]);
                },
                "is not a name",
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
    fn refuses_another_pod_than_the_tokens() {
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
    fn errors_contain_no_part_of_a_token() {
        let token = "eyJhbGciOi.eyJleHAiOj.c2lnbmF0dXJl";
        let text = without(&format!("cannot parse {token} nor c2lnbmF0dXJl"), token);
        assert_eq!(text, "cannot parse (the token) nor (part of the token)");
    }

    #[test]
    fn ignores_bearers_that_are_no_token() {
        assert!(claims("node-secret").is_none());
        assert!(claims("a.b").is_none());
        assert!(claims("..").is_none());
        assert!(claims("a.b.c").is_none());
        // {"exp":5}
        assert_eq!(claims("e30.eyJleHAiOjV9.x").unwrap().exp, Some(5));
    }

    proptest! {
        #[test]
        fn never_panics(token in "\\PC{0,40}(\\.\\PC{0,40}){0,3}") {
            let _ = claims(&token);
            let _ = without("text", &token);
        }
    }
}
