//! What an attested caller may have: its own identity, or those of the pods on its node.

use auth_mesh::{Identity, Snapshot, TrustDomain};

use crate::attest::Caller;

/// What to issue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The identity of the certificate.
    pub identity: Identity,
    /// The node where it runs, if that is known.
    pub node: Option<String>,
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
        (Caller::Node { node }, Some(asked)) => (asked, Some(node)),
        (Caller::Node { node }, None) => return Err(Denied::Unnamed(node.clone())),
        (Caller::Workload { identity, .. }, Some(asked)) if asked != identity => {
            return Err(Denied::NotItself {
                caller: identity.clone(),
                asked: asked.clone(),
            });
        }
        (Caller::Workload { identity, node }, _) => (identity, node.as_ref()),
    };
    if identity.trust_domain() != trust_domain.as_str() {
        return Err(Denied::TrustDomain {
            identity: identity.clone(),
            ours: trust_domain.clone(),
        });
    }
    match node {
        Some(node) if !snapshot.runs(node, identity) => Err(Denied::NotThere {
            identity: identity.clone(),
            node: node.clone(),
        }),
        node => Ok(Grant {
            identity: identity.clone(),
            node: node.cloned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use auth_mesh::{Inventory, ObjectName, Workload};

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

    fn workload(account: &str, node: Option<&str>) -> Caller {
        Caller::Workload {
            identity: identity(account),
            node: node.map(str::to_owned),
        }
    }

    const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";
    const API: &str = "spiffe://cluster.local/ns/default/sa/api";

    fn granted(account: &str, node: Option<&str>) -> Result<Grant, Denied> {
        Ok(Grant {
            identity: identity(account),
            node: node.map(str::to_owned),
        })
    }

    #[test]
    fn a_node_gets_the_identities_of_its_pods() {
        assert_eq!(ask(&node("a"), Some(WEB)), granted("web", Some("a")));
        assert_eq!(ask(&node("b"), Some(API)), granted("api", Some("b")));
        for (name, asked) in [("a", API), ("b", WEB), ("c", WEB), ("", WEB)] {
            let denied = ask(&node(name), Some(asked)).unwrap_err();
            assert!(matches!(denied, Denied::NotThere { .. }), "{denied}");
        }
        assert_eq!(ask(&node("a"), None), Err(Denied::Unnamed("a".into())));
    }

    #[test]
    fn a_workload_gets_its_own_identity_while_it_runs() {
        for asked in [None, Some(WEB)] {
            assert_eq!(
                ask(&workload("web", Some("a")), asked),
                granted("web", Some("a"))
            );
            assert_eq!(ask(&workload("web", None), asked), granted("web", None));
        }
        let denied = ask(&workload("web", Some("b")), None).unwrap_err();
        assert!(matches!(denied, Denied::NotThere { .. }), "{denied}");
        let denied = ask(&workload("web", Some("a")), Some(API)).unwrap_err();
        assert!(matches!(denied, Denied::NotItself { .. }), "{denied}");
    }

    #[test]
    fn refuses_other_trust_domains() {
        let foreign = "spiffe://example.org/ns/default/sa/web";
        let foreigner = Caller::Workload {
            identity: foreign.parse().unwrap(),
            node: None,
        };
        for (caller, asked) in [(node("a"), Some(foreign)), (foreigner, None)] {
            let denied = ask(&caller, asked).unwrap_err();
            assert!(matches!(denied, Denied::TrustDomain { .. }), "{denied}");
        }
    }
}
