//! What an attested caller may have: its own identity, or those of the pods on its node.

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
    /// The node where it runs.
    pub node: String,
    /// Pods of the identity on that node, for the audit log: at most eight.
    pub pods: Vec<ObjectName>,
}

/// Why a caller is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// A node that names no identity.
    #[error(
        "node {0} does not name an identity: metadata.ImpersonatedIdentity must contain a SPIFFE ID"
    )]
    Unnamed(String),
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

/// Decides on a request of `caller` for `asked`, or for itself if that is `None`, by the pods in `snapshot`.
pub fn decide(
    caller: &Caller,
    asked: Option<&Identity>,
    trust_domain: &TrustDomain,
    snapshot: &Snapshot,
) -> Result<Grant, Denied> {
    let (identity, node) = match (caller, asked) {
        (Caller::Node { node }, Some(asked)) => (asked, node),
        (Caller::Node { node }, None) => return Err(Denied::Unnamed(node.clone())),
        (Caller::Workload { identity, .. }, Some(asked)) if asked != identity => {
            return Err(Denied::NotItself {
                caller: identity.clone(),
                asked: asked.clone(),
            });
        }
        (Caller::Workload { identity, node }, _) => (identity, node),
    };
    if identity.trust_domain() != trust_domain.as_str() {
        return Err(Denied::TrustDomain {
            identity: identity.clone(),
            ours: trust_domain.clone(),
        });
    }
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

    fn identity(account: &str) -> Identity {
        format!("spiffe://cluster.local/ns/default/sa/{account}")
            .parse()
            .unwrap()
    }

    fn pod(account: &str, node: &str) -> Workload {
        Workload {
            node: node.into(),
            ..Workload::new(
                ObjectName {
                    namespace: "default".into(),
                    name: format!("{account}-{node}"),
                },
                identity(account),
            )
        }
    }

    fn ask(caller: &Caller, asked: Option<&str>) -> Result<Grant, Denied> {
        let snapshot = Snapshot::new(Inventory {
            workloads: vec![pod("web", "a"), pod("api", "b")],
            services: vec![],
        });
        let asked = asked.map(|uri| uri.parse().unwrap());
        let domain = "cluster.local".parse().unwrap();
        decide(caller, asked.as_ref(), &domain, &snapshot)
    }

    fn node(node: &str) -> Caller {
        Caller::Node { node: node.into() }
    }

    fn workload(account: &str, node: &str) -> Caller {
        Caller::Workload {
            identity: identity(account),
            node: node.into(),
        }
    }

    const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";
    const API: &str = "spiffe://cluster.local/ns/default/sa/api";

    fn granted(account: &str, node: &str) -> Result<Grant, Denied> {
        Ok(Grant {
            identity: identity(account),
            node: node.into(),
            pods: vec![pod(account, node).name],
        })
    }

    #[test]
    fn a_node_gets_the_identities_of_its_pods() {
        assert_eq!(ask(&node("a"), Some(WEB)), granted("web", "a"));
        assert_eq!(ask(&node("b"), Some(API)), granted("api", "b"));
        for (name, asked) in [("a", API), ("b", WEB), ("c", WEB), ("", WEB)] {
            let denied = ask(&node(name), Some(asked)).unwrap_err();
            assert!(matches!(denied, Denied::NotThere { .. }), "{denied}");
        }
        assert_eq!(ask(&node("a"), None), Err(Denied::Unnamed("a".into())));
    }

    #[test]
    fn a_workload_gets_its_own_identity_while_it_runs() {
        for asked in [None, Some(WEB)] {
            assert_eq!(ask(&workload("web", "a"), asked), granted("web", "a"));
        }
        let denied = ask(&workload("web", "b"), None).unwrap_err();
        assert!(matches!(denied, Denied::NotThere { .. }), "{denied}");
        let denied = ask(&workload("web", "a"), Some(API)).unwrap_err();
        assert!(matches!(denied, Denied::NotItself { .. }), "{denied}");
    }

    #[test]
    fn refuses_other_trust_domains() {
        let foreign = "spiffe://example.org/ns/default/sa/web";
        let foreigner = Caller::Workload {
            identity: foreign.parse().unwrap(),
            node: "a".into(),
        };
        for (caller, asked) in [(node("a"), Some(foreign)), (foreigner, None)] {
            let denied = ask(&caller, asked).unwrap_err();
            assert!(matches!(denied, Denied::TrustDomain { .. }), "{denied}");
        }
    }
}
