//! Workloads and nodes, identified by service account tokens that an OIDC issuer, such as a cluster, has signed.

use std::sync::Arc;

use auth_mesh::{Identity, ObjectName, Registry, Snapshot, TrustDomain};
use serde::Deserialize;

use super::{Attestor, Caller, Credentials, Unattested, oidc::Tokens, service_account};
use crate::{config::JwksAttestation, placement::settle};

/// Tolerated difference of the issuer's clock, in seconds.
const LEEWAY: u64 = 300;

/// Identifies the holders of one issuer's tokens.
#[derive(Debug)]
pub struct Jwks {
    tokens: Tokens,
    node_service_account: Option<ObjectName>,
    trust_domain: TrustDomain,
    registry: Arc<Registry>,
}

#[derive(Debug, Deserialize)]
struct Claims {
    sub: Option<String>,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Option<KubernetesClaims>,
}

#[derive(Debug, Deserialize)]
struct KubernetesClaims {
    namespace: String,
    serviceaccount: Named,
    pod: Option<Named>,
    node: Option<Named>,
}

#[derive(Debug, Deserialize)]
struct Named {
    name: String,
    #[serde(default)]
    uid: String,
}

impl Jwks {
    /// Accepts tokens of the issuer of `config`. `registry` says on which node a pod runs, if its token does not.
    ///
    /// Fails if the file with the issuer's keys cannot be used.
    pub fn open(
        config: JwksAttestation,
        trust_domain: TrustDomain,
        registry: Arc<Registry>,
    ) -> Result<Self, String> {
        let tokens = Tokens::open(config.issuer, LEEWAY)
            .map_err(|error| format!("attestation.jwks.jwksFile: {error}"))?;
        Ok(Self {
            tokens,
            node_service_account: config.node_service_account,
            trust_domain,
            registry,
        })
    }

    /// The caller that verified claims identify.
    async fn caller_of(&self, claims: &Claims) -> Result<Caller, Unattested> {
        let account = account(claims)?;
        let identity = self
            .trust_domain
            .identity(&account.namespace, &account.name)
            .map_err(|error| Unattested(format!("the token's service account: {error}")))?;
        let is_node = self.node_service_account.as_ref() == Some(&account);
        let kubernetes = claims.kubernetes.as_ref();
        let node = settle(
            &self.registry,
            |snapshot| node_of(kubernetes, &identity, is_node, snapshot),
            |unplaced| *unplaced == Unplaced::UnknownPod,
        )
        .await
        .map_err(|unplaced| Unattested(unplaced.to_string()))?;
        Ok(match is_node {
            true => Caller::Node { node },
            false => Caller::Workload { identity, node },
        })
    }
}

/// The service account of a token.
fn account(claims: &Claims) -> Result<ObjectName, Unattested> {
    let refused = |why: &str| Unattested(why.to_owned());
    match (&claims.kubernetes, &claims.sub) {
        (Some(kubernetes), _) => Ok(ObjectName {
            namespace: kubernetes.namespace.clone(),
            name: kubernetes.serviceaccount.name.clone(),
        }),
        (None, Some(subject)) => service_account(subject)
            .ok_or_else(|| refused("the token's subject is not a Kubernetes service account")),
        (None, None) => Err(refused("the token has no subject")),
    }
}

/// Why the node of a token's holder is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Unplaced {
    #[error("the token names neither a node nor a pod: use a projected service account token")]
    Unbound,
    #[error("the token's pod is not known to run: it was deleted or replaced, or has ended")]
    UnknownPod,
    #[error("the token's pod runs on another node than the token names")]
    AnotherNode,
}

/// The node where the holder of a token runs. A token that is bound to a pod is valid while that very pod runs.
fn node_of(
    claims: Option<&KubernetesClaims>,
    identity: &Identity,
    is_node: bool,
    snapshot: &Snapshot,
) -> Result<String, Unplaced> {
    let claims = claims.ok_or(Unplaced::Unbound)?;
    let claimed = claims.node.as_ref().map(|node| node.name.as_str());
    let claimed = claimed.filter(|node| !node.is_empty());
    match (&claims.pod, claimed) {
        // Manifests need not contain the daemons' own pods.
        (_, Some(node)) if is_node => Ok(node.to_owned()),
        (Some(pod), claimed) => {
            let name = ObjectName {
                namespace: claims.namespace.clone(),
                name: pod.name.clone(),
            };
            let same_uid =
                |uid: &str| uid.is_empty() || pod.uid.is_empty() || uid == pod.uid.as_str();
            let running = snapshot.any_pod(&name).filter(|known| {
                same_uid(&known.uid)
                    && !known.finished
                    && known.identity == *identity
                    && !known.node.is_empty()
            });
            let node = &running.ok_or(Unplaced::UnknownPod)?.node;
            match claimed {
                Some(claimed) if claimed != node => Err(Unplaced::AnotherNode),
                _ => Ok(node.clone()),
            }
        }
        (None, Some(node)) => Ok(node.to_owned()),
        (None, None) => Err(Unplaced::Unbound),
    }
}

#[tonic::async_trait]
impl Attestor for Jwks {
    async fn attest(&self, credentials: Credentials<'_>) -> Option<Result<Caller, Unattested>> {
        match self.tokens.verify(credentials.bearer?).await? {
            Ok(claims) => Some(self.caller_of(&claims).await),
            Err(unattested) => Some(Err(unattested)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use auth_mesh::{Inventory, Workload};
    use jsonwebtoken::{Algorithm, EncodingKey, Header, jwk::Jwk};
    use serde_json::{Value, json};

    use super::*;
    use crate::config::{JwksSource, OidcIssuer};

    const ISSUER: &str = "https://issuer.example";
    const K8S: &str = "kubernetes.io";

    /// An issuer with one key.
    struct Issuer {
        key: EncodingKey,
        jwk: Value,
        kid: &'static str,
    }

    impl Issuer {
        fn new(kid: &'static str) -> Self {
            let key = rcgen::KeyPair::generate().unwrap();
            let key = EncodingKey::from_ec_der(&key.serialize_der());
            let mut jwk = Jwk::from_encoding_key(&key, Algorithm::ES256).unwrap();
            jwk.common.key_id = Some(kid.into());
            Self {
                key,
                jwk: serde_json::to_value(jwk).unwrap(),
                kid,
            }
        }

        fn sign(&self, claims: &Value) -> String {
            let mut header = Header::new(Algorithm::ES256);
            header.kid = Some(self.kid.into());
            jsonwebtoken::encode(&header, claims, &self.key).unwrap()
        }
    }

    fn write_keys(path: &Path, issuers: &[&Issuer]) {
        let keys: Vec<_> = issuers.iter().map(|issuer| &issuer.jwk).collect();
        fs::write(path, json!({ "keys": keys }).to_string()).unwrap();
    }

    fn attestor(path: &Path) -> Jwks {
        let registry = Registry::new();
        registry.publish(pods());
        let config = JwksAttestation {
            issuer: OidcIssuer {
                issuer: ISSUER.into(),
                audience: "ca".into(),
                source: JwksSource::File(path.into()),
            },
            node_service_account: Some(ObjectName {
                namespace: "mesh".into(),
                name: "daemon".into(),
            }),
        };
        let domain = "cluster.local".parse().unwrap();
        Jwks::open(config, domain, Arc::new(registry)).unwrap()
    }

    fn pods() -> Snapshot {
        let pod = |name: &str, uid: &str, finished| Workload {
            uid: uid.into(),
            node: "a".into(),
            finished,
            ..Workload::new(
                ObjectName {
                    namespace: "default".into(),
                    name: name.into(),
                },
                "spiffe://cluster.local/ns/default/sa/web".parse().unwrap(),
            )
        };
        Snapshot::new(Inventory {
            workloads: vec![pod("web-0", "u1", false), pod("done", "u2", true)],
            services: vec![],
        })
    }

    fn claims(change: impl FnOnce(&mut Value)) -> Value {
        let now = jsonwebtoken::get_current_timestamp();
        let mut claims = json!({
            "iss": ISSUER, "aud": ["ca"], "exp": now + 600, "nbf": now,
            "sub": "system:serviceaccount:default:web",
            "kubernetes.io": {
                "namespace": "default", "serviceaccount": {"name": "web", "uid": "x"},
                "pod": {"name": "web-0", "uid": "u1"},
            },
        });
        change(&mut claims);
        claims
    }

    async fn attest(attestor: &Jwks, token: &str) -> Option<Result<Caller, Unattested>> {
        let credentials = Credentials {
            bearer: Some(token),
            certificate: None,
        };
        attestor.attest(credentials).await
    }

    #[tokio::test]
    async fn identifies_callers_by_good_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("jwks");
        let issuer = Issuer::new("one");
        write_keys(&path, &[&issuer]);
        let attestor = attestor(&path);
        let web = Some(Ok(Caller::Workload {
            identity: "spiffe://cluster.local/ns/default/sa/web".parse().unwrap(),
            node: "a".into(),
        }));
        let node = |node: &str| Some(Ok(Caller::Node { node: node.into() }));
        let now = jsonwebtoken::get_current_timestamp();
        let daemon = |c: &mut Value| {
            c[K8S]["namespace"] = "mesh".into();
            c[K8S]["serviceaccount"]["name"] = "daemon".into();
        };
        for (claims, expected) in [
            (claims(|_| {}), web.clone()),
            (claims(|c| c["aud"] = "ca".into()), web.clone()),
            // A clock that differs by less than five minutes.
            (claims(|c| c["exp"] = (now - 240).into()), web.clone()),
            (claims(|c| c["nbf"] = (now + 240).into()), web.clone()),
            (
                claims(|c| c[K8S]["node"] = json!({"name": "a"})),
                web.clone(),
            ),
            (claims(|c| c[K8S]["pod"]["uid"] = "".into()), web.clone()),
            (
                claims(|c| {
                    c[K8S]["pod"] = Value::Null;
                    c[K8S]["node"] = json!({"name": "a"});
                }),
                web,
            ),
            (
                claims(|c| {
                    daemon(c);
                    c[K8S]["node"] = json!({"name": "b"});
                }),
                node("b"),
            ),
        ] {
            let attested = attest(&attestor, &issuer.sign(&claims)).await;
            assert_eq!(attested, expected, "{claims}");
        }
    }

    #[tokio::test]
    async fn refuses_tokens_whose_holder_runs_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("jwks");
        let issuer = Issuer::new("one");
        write_keys(&path, &[&issuer]);
        let attestor = attestor(&path);
        let unknown = "is not known to run";
        type Change = fn(&mut Value);
        let cases: [(Change, &str); 5] = [
            (
                |c| c[K8S]["pod"] = json!({"name": "done", "uid": "u2"}),
                unknown,
            ),
            (|c| c[K8S]["serviceaccount"]["name"] = "api".into(), unknown),
            (|c| c[K8S]["node"] = json!({"name": "b"}), "another node"),
            (|c| c[K8S]["pod"] = Value::Null, "neither a node nor a pod"),
            (
                |c| {
                    c[K8S]["namespace"] = "mesh".into();
                    c[K8S]["serviceaccount"]["name"] = "daemon".into();
                },
                unknown,
            ),
        ];
        let attest = |change: fn(&mut Value)| {
            let token = issuer.sign(&claims(change));
            let attestor = &attestor;
            async move { attest(attestor, &token).await.unwrap().unwrap_err().0 }
        };
        let refused = cases.map(|(change, expected)| (attest(change), expected));
        for (refused, expected) in refused {
            let refused = refused.await;
            assert!(refused.contains(expected), "{refused}, not {expected}");
        }
    }

    #[tokio::test]
    async fn waits_a_moment_for_the_pod_of_a_token() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("jwks");
        let issuer = Issuer::new("one");
        write_keys(&path, &[&issuer]);
        let attestor = attestor(&path);
        attestor.registry.publish(Snapshot::default());
        let token = issuer.sign(&claims(|_| {}));
        let publish = async {
            tokio::task::yield_now().await;
            attestor.registry.publish(pods());
        };
        let (attested, ()) = tokio::join!(attest(&attestor, &token), publish);
        assert!(attested.unwrap().is_ok());
    }

    #[tokio::test]
    async fn refuses_bad_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("jwks");
        let issuer = Issuer::new("one");
        write_keys(&path, &[&issuer]);
        let attestor = attestor(&path);
        let good = claims(|_| {});
        let body = issuer.sign(&good);
        let body = body.split('.').nth(1).unwrap();
        // {"alg":"none"}, and HS256 with the key's id.
        let none = format!("eyJhbGciOiJub25lIn0.{body}.");
        let mut header = Header::new(Algorithm::HS256);
        header.kid = Some("one".into());
        let public = issuer.jwk["x"].as_str().unwrap();
        let hmac =
            jsonwebtoken::encode(&header, &good, &EncodingKey::from_secret(public.as_bytes()));
        let unknown = Issuer::new("two");
        let with = |change: fn(&mut Value)| issuer.sign(&claims(change));
        for (token, expected) in [
            (unknown.sign(&good), "does not publish"),
            (none, "not signed with"),
            (hmac.unwrap(), "not signed with"),
            (
                with(|c| drop(c.as_object_mut().unwrap().remove("aud"))),
                "has no aud",
            ),
            (with(|c| c["exp"] = "soon".into()), "has no exp"),
            (
                with(|c| c[K8S]["serviceaccount"]["name"] = "../x".into()),
                "service account",
            ),
            (
                with(|c| {
                    c[K8S] = Value::Null;
                    c["sub"] = "alice".into();
                }),
                "not a Kubernetes service account",
            ),
        ] {
            let refused = attest(&attestor, &token).await.unwrap().unwrap_err();
            assert!(refused.0.contains(expected), "{refused}, not {expected}");
        }
        for other in [
            issuer.sign(&claims(|c| c["iss"] = "https://other.example".into())),
            issuer.sign(&claims(|c| c["iss"] = json!([ISSUER]))),
            "x.y.z".into(),
            "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa".into(),
        ] {
            assert_eq!(attest(&attestor, &other).await, None);
        }
        assert_eq!(attestor.attest(Credentials::default()).await, None);
    }

    #[tokio::test]
    async fn finds_new_keys() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("jwks");
        let (one, two) = (Issuer::new("one"), Issuer::new("two"));
        write_keys(&path, &[&one]);
        let attestor = attestor(&path);
        let (first, second) = (one.sign(&claims(|_| {})), two.sign(&claims(|_| {})));
        assert!(attest(&attestor, &first).await.unwrap().is_ok());
        assert!(attest(&attestor, &second).await.unwrap().is_err());
        write_keys(&path, &[&two]);
        while attest(&attestor, &second).await.unwrap().is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        assert!(
            attest(&attestor, &first).await.unwrap().is_err(),
            "withdrawn"
        );
    }
}
