//! Trust received from the CA: root certificates and revocations.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
};

use arc_swap::ArcSwap;
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use super::svid::Svid;
use auth_jwt::JwtKeys;
use auth_mesh::{Identity, TrustDomain};

/// What verifies the SVIDs of a trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustBundle {
    /// Trust domain that the roots and keys belong to.
    pub trust_domain: TrustDomain,
    /// Root certificates, DER.
    pub roots: Vec<CertificateDer<'static>>,
    /// Keys that verify its JWT-SVIDs.
    pub jwt_keys: JwtKeys,
}

impl TrustBundle {
    /// Creates a bundle without keys for JWT-SVIDs.
    pub fn of_roots(trust_domain: TrustDomain, roots: Vec<CertificateDer<'static>>) -> Self {
        Self {
            trust_domain,
            roots,
            jwt_keys: JwtKeys::default(),
        }
    }
}

/// Trust published by the CA at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trust {
    /// Increases with each change if the CA counts them. 0 if it does not.
    pub version: u64,
    /// Trusted roots.
    pub bundle: TrustBundle,
    /// Certificates that are rejected although they chain to a trusted root.
    pub revoked: Revocations,
    /// Phase of a root rotation, for display.
    pub phase: String,
}

impl Trust {
    /// Trusts all roots of `bundle` permanently.
    pub fn fixed(bundle: TrustBundle) -> Self {
        Self {
            version: 0,
            bundle,
            revoked: Revocations::default(),
            phase: String::new(),
        }
    }
}

/// Bundles of foreign trust domains, by the trust domain's name. They are never merged: the roots and keys of a trust domain
/// verify its own names alone (SPIFFE Federation §4.2).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForeignBundles(BTreeMap<String, TrustBundle>);

/// The identity's trust domain is foreign, and none of its roots is trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} is of another trust domain, of which no root is trusted; is there a federation entry for it, and a bundle?"
)]
pub struct NotFederated(pub Identity);

impl ForeignBundles {
    /// Adds the bundle of a trust domain, or replaces it. A bundle without roots and keys says that nothing of the trust
    /// domain is to be trusted (SPIFFE Trust Domain and Bundle §4.1.3), as if there were none.
    pub fn insert(&mut self, bundle: TrustBundle) {
        self.0.insert(bundle.trust_domain.to_string(), bundle);
    }

    /// Returns the roots of a trust domain. `None` if none of its certificates is trusted.
    pub fn roots(&self, trust_domain: &str) -> Option<&[CertificateDer<'static>]> {
        let bundle = self.0.get(trust_domain)?;
        Some(&bundle.roots[..]).filter(|roots| !roots.is_empty())
    }

    /// Returns all trust domains whose certificates are trusted with their roots, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[CertificateDer<'static>])> {
        let all = self.0.iter();
        all.map(|(name, bundle)| (name.as_str(), &bundle.roots[..]))
            .filter(|(_, roots)| !roots.is_empty())
    }
}

/// Why something was revoked (RFC 5280 §5.3.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reason {
    /// No reason is given.
    #[default]
    Unspecified,
    /// The private key may be compromised.
    KeyCompromise,
    /// A CA's private key may be compromised.
    CaCompromise,
    /// The holder's name or role has changed.
    AffiliationChanged,
    /// Another certificate replaces it.
    Superseded,
    /// No longer needed.
    CessationOfOperation,
    /// Revoked temporarily.
    CertificateHold,
    /// A privilege of the holder was withdrawn.
    PrivilegeWithdrawn,
}

impl Reason {
    /// All reasons.
    pub const ALL: [Self; 8] = [
        Self::Unspecified,
        Self::KeyCompromise,
        Self::CaCompromise,
        Self::AffiliationChanged,
        Self::Superseded,
        Self::CessationOfOperation,
        Self::CertificateHold,
        Self::PrivilegeWithdrawn,
    ];

    /// Name of the reason in RFC 5280.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::KeyCompromise => "keyCompromise",
            Self::CaCompromise => "cACompromise",
            Self::AffiliationChanged => "affiliationChanged",
            Self::Superseded => "superseded",
            Self::CessationOfOperation => "cessationOfOperation",
            Self::CertificateHold => "certificateHold",
            Self::PrivilegeWithdrawn => "privilegeWithdrawn",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Reason {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|reason| reason.as_str() == name);
        found.ok_or_else(|| {
            let names: Vec<_> = Self::ALL.map(Self::as_str).into();
            format!("is none of {}", names.join(", "))
        })
    }
}

/// Certificates that are rejected although they chain to a trusted root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revocations {
    /// Certificates, by serial number in lower-case hexadecimal, as [`Svid::serial`].
    pub serials: HashMap<Box<str>, Reason>,
    /// Identities. Every certificate with one of them is rejected.
    pub identities: HashMap<Identity, Reason>,
    /// Nodes, by name. Every certificate issued to a pod on one of them is rejected.
    pub nodes: HashMap<String, Reason>,
}

/// What is revoked, with the reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Revoked {
    /// One certificate.
    #[error("certificate {serial} of {identity} is revoked ({reason})")]
    Certificate {
        /// Serial number.
        serial: Arc<str>,
        /// Identity in the certificate.
        identity: Identity,
        /// Reason of the revocation.
        reason: Reason,
    },
    /// An identity.
    #[error("{identity} is revoked ({reason})")]
    Identity {
        /// The identity.
        identity: Identity,
        /// Reason of the revocation.
        reason: Reason,
    },
    /// A node.
    #[error("node {node} is revoked ({reason})")]
    Node {
        /// Name of the node.
        node: String,
        /// Reason of the revocation.
        reason: Reason,
    },
}

/// Why a verified certificate is not accepted (any more).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Untrusted {
    /// It, its identity or its node is revoked.
    #[error(transparent)]
    Revoked(#[from] Revoked),
    /// It is of a foreign trust domain that is not trusted.
    #[error(transparent)]
    NotFederated(#[from] NotFederated),
}

impl Revocations {
    /// Whether nothing is revoked.
    pub fn is_empty(&self) -> bool {
        self.serials.is_empty() && self.identities.is_empty() && self.nodes.is_empty()
    }

    /// Fails if the certificate, its identity, or the node that it was issued to is revoked.
    pub fn check(&self, svid: &Svid) -> Result<(), Revoked> {
        self.check_identity(&svid.identity)?;
        if let Some(node) = &svid.node {
            self.check_node(node)?;
        }
        match self.serials.get(&*svid.serial) {
            Some(&reason) => Err(Revoked::Certificate {
                serial: svid.serial.clone(),
                identity: svid.identity.clone(),
                reason,
            }),
            None => Ok(()),
        }
    }

    /// Fails if `identity` is revoked.
    pub fn check_identity(&self, identity: &Identity) -> Result<(), Revoked> {
        match self.identities.get(identity) {
            Some(&reason) => Err(Revoked::Identity {
                identity: identity.clone(),
                reason,
            }),
            None => Ok(()),
        }
    }

    /// Fails if `node` is revoked.
    pub fn check_node(&self, node: &str) -> Result<(), Revoked> {
        match self.nodes.get(node) {
            Some(&reason) => Err(Revoked::Node {
                node: node.to_owned(),
                reason,
            }),
            None => Ok(()),
        }
    }
}

/// The current [`Trust`], set by the CA client, and the bundles of foreign trust domains. Read by all connections.
#[derive(Debug)]
pub struct TrustStore {
    current: ArcSwap<Trust>,
    foreign: ArcSwap<ForeignBundles>,
    changed: watch::Sender<u64>,
}

impl TrustStore {
    /// Creates a store that holds `trust`, and no foreign bundle.
    pub fn new(trust: Trust) -> Self {
        Self {
            current: ArcSwap::from_pointee(trust),
            foreign: ArcSwap::default(),
            changed: watch::Sender::new(0),
        }
    }

    /// Returns the current trust in the mesh's own trust domain.
    pub fn current(&self) -> Arc<Trust> {
        self.current.load_full()
    }

    /// Returns the current bundles of foreign trust domains.
    pub fn foreign(&self) -> Arc<ForeignBundles> {
        self.foreign.load_full()
    }

    /// Returns the roots of the trust domain of that name. `None` if it is neither the mesh's own nor trusted.
    pub fn roots(&self, trust_domain: &str) -> Option<Vec<CertificateDer<'static>>> {
        let own = self.current();
        match own.bundle.trust_domain.is_named(trust_domain) {
            true => Some(own.bundle.roots.clone()),
            false => self.foreign().roots(trust_domain).map(<[_]>::to_vec),
        }
    }

    /// Returns the keys that verify JWT-SVIDs, by the names of the trust domains, the mesh's own and foreign ones. A trust
    /// domain without such keys is left out.
    pub fn jwt_keys(&self) -> BTreeMap<String, JwtKeys> {
        let (own, foreign) = (self.current(), self.foreign());
        let all = foreign.0.values().chain([&own.bundle]);
        all.filter(|bundle| !bundle.jwt_keys.is_empty())
            .map(|bundle| (bundle.trust_domain.to_string(), bundle.jwt_keys.clone()))
            .collect()
    }

    /// Returns the keys that verify JWT-SVIDs of the trust domain of that name. `None` if there are none.
    pub fn jwt_keys_of(&self, trust_domain: &str) -> Option<JwtKeys> {
        let (own, foreign) = (self.current(), self.foreign());
        let bundle = match own.bundle.trust_domain.is_named(trust_domain) {
            true => Some(&own.bundle),
            false => foreign.0.get(trust_domain),
        };
        let keys = bundle.map(|bundle| bundle.jwt_keys.clone());
        keys.filter(|keys| !keys.is_empty())
    }

    /// Fails if `svid` is revoked, or of a foreign trust domain that is not trusted (any more). Returns the trust in the mesh's
    /// own trust domain that this was checked against.
    pub fn check(&self, svid: &Svid) -> Result<Arc<Trust>, Untrusted> {
        let own = self.current();
        let name = svid.identity.trust_domain();
        if name == own.bundle.trust_domain.as_str() {
            own.revoked.check(svid)?;
        } else if self.foreign.load().roots(name).is_none() {
            return Err(NotFederated(svid.identity.clone()).into());
        }
        Ok(own)
    }

    /// Replaces the trust and notifies the subscribers of [`TrustStore::changes`].
    pub fn publish(&self, trust: Trust) {
        self.current.store(Arc::new(trust));
        self.changed.send_modify(|count| *count += 1);
    }

    /// Replaces the bundles of foreign trust domains and notifies the subscribers of [`TrustStore::changes`].
    pub fn publish_foreign(&self, bundles: ForeignBundles) {
        self.foreign.store(Arc::new(bundles));
        self.changed.send_modify(|count| *count += 1);
    }

    /// Subscribes to a counter that increases with each publication.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revoked_node_revokes_the_certificates_issued_to_it() {
        let svid = |node: Option<&str>| Svid {
            identity: "spiffe://a/ns/b/sa/c".parse().unwrap(),
            serial: "01".into(),
            node: node.map(Into::into),
            person: None,
            not_before: std::time::UNIX_EPOCH,
            not_after: std::time::UNIX_EPOCH,
        };
        let nodes = HashMap::from([("a".to_owned(), Reason::KeyCompromise)]);
        let revoked = Revocations {
            nodes,
            ..Revocations::default()
        };
        let error = revoked.check(&svid(Some("a"))).unwrap_err();
        assert_eq!(error.to_string(), "node a is revoked (keyCompromise)");
        for other in [Some("b"), Some(""), None] {
            assert_eq!(revoked.check(&svid(other)), Ok(()));
        }
    }
}
