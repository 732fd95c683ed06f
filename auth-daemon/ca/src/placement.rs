//! What an attested caller may have: its own identity, those of the pods on its node, or those that a person may act as.

use std::time::Duration;

use auth_mesh::{Identity, ObjectName, Registry, Snapshot, TrustDomain};
use tokio::time::{Instant, timeout_at};

use crate::attest::Caller;

/// How long to wait for the registry to learn of a pod: its node may know it a moment earlier.
const WAIT: Duration = Duration::from_secs(1);
/// Most pods that [`Grant::pods`] names.
const MAX_PODS: usize = 8;

/// What to issue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The identity of the certificate.
    pub identity: Identity,
    /// The node where it runs. Empty for a person.
    pub node: String,
    /// Pods of the identity on that node, for the audit log: at most eight. None for a person.
    pub pods: Vec<ObjectName>,
}

/// Why a caller is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// A node, or a person with more than one identity, that names none.
    #[error(
        "{0} does not name an identity: set metadata.ImpersonatedIdentity (for a JWT-SVID: identity) to a SPIFFE ID"
    )]
    Unnamed(String),
    /// A person who asks for an identity that no configuration or token allows.
    #[error("{person} may not act as {asked}: {}", allowed(.identities))]
    NotAllowed {
        /// The person.
        person: String,
        /// The identity that is asked for.
        asked: Identity,
        /// The identities that the person may act as.
        identities: Vec<Identity>,
    },
    /// An identity of another trust domain.
    #[error("{identity} is of another trust domain: this CA signs for {ours}")]
    TrustDomain {
        /// The identity.
        identity: Identity,
        /// This CA's.
        ours: TrustDomain,
    },
    /// A workload that asks for another identity.
    #[error("{caller} asks for {asked}: a workload gets its own identity only")]
    NotItself {
        /// The caller.
        caller: Identity,
        /// The identity that it asks for.
        asked: Identity,
    },
    /// No known pod of the identity runs on the node.
    #[error("no pod with {identity} is known to run on node {node}")]
    NotThere {
        /// The identity that it asks for.
        identity: Identity,
        /// The node.
        node: String,
    },
}

fn allowed(identities: &[Identity]) -> String {
    if identities.is_empty() {
        return "attestation.people.accounts maps neither the name nor a group of the token".into();
    }
    let identities: Vec<_> = identities.iter().map(Identity::as_str).collect();
    format!("only as {}", identities.join(", "))
}

/// Decides on a request of `caller` for `asked`, or for itself if that is `None`, by the pods in `snapshot`.
pub fn decide(
    caller: &Caller,
    asked: Option<&Identity>,
    trust_domain: &TrustDomain,
    snapshot: &Snapshot,
) -> Result<Grant, Denied> {
    let (identity, node) = match (caller, asked) {
        (Caller::Node { node }, Some(asked)) => (asked, Some(node)),
        (Caller::Node { .. }, None) => return Err(Denied::Unnamed(caller.to_string())),
        (Caller::Workload { identity, .. }, Some(asked)) if asked != identity => {
            return Err(Denied::NotItself {
                caller: identity.clone(),
                asked: asked.clone(),
            });
        }
        (Caller::Workload { identity, node }, _) => (identity, Some(node)),
        (
            Caller::Person {
                person, identities, ..
            },
            asked,
        ) => match (asked, &identities[..]) {
            (Some(asked), _) if identities.contains(asked) => (asked, None),
            (None, [only]) => (only, None),
            (None, _) => return Err(Denied::Unnamed(caller.to_string())),
            (Some(asked), _) => {
                return Err(Denied::NotAllowed {
                    person: person.clone(),
                    asked: asked.clone(),
                    identities: identities.clone(),
                });
            }
        },
    };
    if identity.trust_domain() != trust_domain.as_str() {
        return Err(Denied::TrustDomain {
            identity: identity.clone(),
            ours: trust_domain.clone(),
        });
    }
    let Some(node) = node else {
        return Ok(Grant {
            identity: identity.clone(),
            node: String::new(),
            pods: Vec::new(),
        });
    };
    let pods = snapshot.running(node, identity).take(MAX_PODS);
    let pods: Vec<_> = pods.map(|pod| pod.name.clone()).collect();
    if pods.is_empty() {
        return Err(Denied::NotThere {
            identity: identity.clone(),
            node: node.clone(),
        });
    }
    Ok(Grant {
        identity: identity.clone(),
        node: node.clone(),
        pods,
    })
}

/// Decides by what `registry` knows, and again at each change for up to a second while `may_change` holds of the error.
pub(crate) async fn settle<T, E>(
    registry: &Registry,
    decide: impl Fn(&Snapshot) -> Result<T, E>,
    may_change: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let mut changes = registry.changes();
    let deadline = Instant::now() + WAIT;
    loop {
        changes.borrow_and_update();
        match decide(&registry.snapshot()) {
            Err(error) if may_change(&error) => {
                if !matches!(timeout_at(deadline, changes.changed()).await, Ok(Ok(()))) {
                    return Err(error);
                }
            }
            decided => return decided,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use auth_mesh::{Inventory, Workload};

    const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";
    const API: &str = "spiffe://cluster.local/ns/default/sa/api";
    const FOREIGN: &str = "spiffe://example.org/ns/default/sa/web";

    fn pod(identity: &str, node: &str) -> Workload {
        let name = ObjectName {
            namespace: "default".into(),
            name: format!("on-{node}"),
        };
        Workload {
            node: node.into(),
            ..Workload::new(name, identity.parse().unwrap())
        }
    }

    fn node(node: &str) -> Caller {
        Caller::Node { node: node.into() }
    }

    fn workload(identity: &str, node: &str) -> Caller {
        Caller::Workload {
            identity: identity.parse().unwrap(),
            node: node.into(),
        }
    }

    #[test]
    fn callers_get_what_runs_on_their_node() {
        let snapshot = Snapshot::new(Inventory {
            workloads: vec![pod(WEB, "a"), pod(API, "b")],
            services: vec![],
        });
        for (caller, asked, expected) in [
            (node("a"), Some(WEB), Ok(pod(WEB, "a"))),
            (node("b"), Some(API), Ok(pod(API, "b"))),
            (node("a"), Some(API), Err("is known to run on node a")),
            (node("b"), Some(WEB), Err("is known to run on node b")),
            (node(""), Some(WEB), Err("is known to run on node ")),
            (node("a"), None, Err("does not name an identity")),
            (node("a"), Some(FOREIGN), Err("another trust domain")),
            (workload(WEB, "a"), None, Ok(pod(WEB, "a"))),
            (workload(WEB, "a"), Some(WEB), Ok(pod(WEB, "a"))),
            (workload(WEB, "b"), None, Err("is known to run on node b")),
            (workload(WEB, "a"), Some(API), Err("its own identity only")),
            (workload(FOREIGN, "a"), None, Err("another trust domain")),
        ] {
            let asked = asked.map(|uri| uri.parse().unwrap());
            let domain = "cluster.local".parse().unwrap();
            match (
                decide(&caller, asked.as_ref(), &domain, &snapshot),
                expected,
            ) {
                (Ok(grant), Ok(pod)) => {
                    assert_eq!((grant.identity, grant.node), (pod.identity, pod.node));
                    assert_eq!(grant.pods, [pod.name]);
                }
                (Err(denied), Err(why)) => assert!(denied.to_string().contains(why), "{denied}"),
                (decided, expected) => panic!("{caller}: {decided:?}, not {expected:?}"),
            }
        }
    }

    #[test]
    fn people_get_what_they_may_act_as() {
        let person = |identities: &[&str]| Caller::Person {
            person: "oidc:alice".into(),
            identities: identities.iter().map(|uri| uri.parse().unwrap()).collect(),
            counts_for: "oidc:alice".into(),
        };
        for (identities, asked, expected) in [
            (&[WEB][..], None, Ok(WEB)),
            (&[WEB, API], Some(API), Ok(API)),
            (&[WEB, API], None, Err("person oidc:alice does not name")),
            (
                &[WEB],
                Some(API),
                Err("may not act as spiffe://cluster.local/ns/default/sa/api"),
            ),
            (&[], Some(WEB), Err("maps neither the name nor a group")),
            (&[FOREIGN], None, Err("another trust domain")),
        ] {
            let asked = asked.map(|uri| uri.parse().unwrap());
            let domain = TrustDomain::default();
            // No pod of the account runs anywhere.
            let decided = decide(
                &person(identities),
                asked.as_ref(),
                &domain,
                &Snapshot::default(),
            );
            match (decided, expected) {
                (Ok(grant), Ok(uri)) => {
                    assert_eq!(grant.identity.as_str(), uri);
                    assert!(grant.node.is_empty() && grant.pods.is_empty());
                }
                (Err(denied), Err(why)) => assert!(denied.to_string().contains(why), "{denied}"),
                (decided, expected) => panic!("{decided:?}, not {expected:?}"),
            }
        }
    }
}
