//! The CA of a trust domain, without a network: what it knows, and what it does when asked. Who may ask is decided
//! before.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{pki_types::CertificateDer, sign::CertifiedKey};
use tokio::sync::watch;

use super::store::{Store, StoreError};
use crate::{
    mesh::{Identity, TrustDomain},
    tunnel::trust::Reason,
};

/// One certificate that was issued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuedRecord {
    /// Serial number, big-endian.
    pub serial: [u8; 16],
    /// Not valid after, in seconds since the Unix epoch.
    pub not_after: u64,
    /// Which of the CA's signing certificates stands behind it: counts from 1 over the CA's life.
    pub signer: u32,
    /// Whose it is.
    pub identity: Identity,
    /// The node that it was given to, where that is known.
    pub node: Option<String>,
}

/// Whence the CA has its signing key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    /// It makes a root of its own.
    SelfSigned {
        /// Of new keys.
        algorithm: KeyAlgorithm,
        /// Of new roots.
        lifetime: Duration,
        /// How long a new root is only published before it signs.
        spread: Duration,
    },
    /// An intermediate CA in Istio's layout (ca-cert.pem, ca-key.pem, root-cert.pem, cert-chain.pem).
    PluggedIn {
        /// The folder.
        directory: std::path::PathBuf,
    },
}

/// Kinds of keys that the CA makes for itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyAlgorithm {
    /// ECDSA on P-256.
    #[default]
    P256,
    /// ECDSA on P-384.
    P384,
    /// Ed25519.
    Ed25519,
}

/// What an operator decides on.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Whose CA this is.
    pub trust_domain: TrustDomain,
    /// Whence the signing key.
    pub root: Root,
    /// Longest life of a certificate.
    pub max_lifetime: Duration,
}

/// What to revoke.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// One certificate.
    Serial([u8; 16]),
    /// All of an identity, those to come included.
    Identity(Identity),
    /// All that a node got, and all that its pods show.
    Node(String),
}

/// What all may know: pushed to daemons at each change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Published {
    /// Grows with each change, over restarts too.
    pub version: u64,
    /// Root certificates, DER.
    pub roots: Vec<CertificateDer<'static>>,
    /// Revocation lists, one per signing certificate, DER.
    pub crls: Vec<Vec<u8>>,
    /// Denied identities.
    pub identities: Vec<(Identity, Reason)>,
    /// Denied nodes.
    pub nodes: Vec<(String, Reason)>,
    /// Where a rotation stands, in words.
    pub phase: String,
}

/// Why the CA does not do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The request itself: malformed, a weak key, a CSR that its key did not sign, another trust domain.
    #[error("{0}")]
    Request(String),
    /// What was revoked gets nothing more.
    #[error("{0}")]
    Revoked(#[from] crate::tunnel::trust::Revoked),
    /// The state could not be kept, so nothing was done.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// The operation does not fit the CA's state.
    #[error("{0}")]
    State(String),
}

/// Why a CA cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UnusableCa(pub String);

/// The CA.
#[derive(Debug)]
pub struct Authority {}

impl Authority {
    /// Opens the CA that `store` keeps, making one where there is none.
    pub async fn open(_store: Arc<dyn Store>, _settings: Settings) -> Result<Self, UnusableCa> {
        unimplemented!()
    }

    /// Signs the key of `csr` (PKCS #10, DER; nothing else of it is used) for `identity`, for `lifetime` at most, and
    /// records it as given to `node`. Returns the leaf, then intermediates, without the root, once the record is safe.
    pub async fn issue(
        &self,
        _identity: &Identity,
        _csr: &[u8],
        _lifetime: Duration,
        _node: Option<&str>,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        unimplemented!()
    }

    /// Key and certificate for the CA's own server, for DNS names and IP addresses, and when to ask for the next one:
    /// at half-life, or when the root changes ([`Authority::published`]).
    pub fn serving_certificate(
        &self,
        _names: &[String],
    ) -> Result<(Arc<CertifiedKey>, SystemTime), Refusal> {
        unimplemented!()
    }

    /// The record of a certificate that has not ended yet.
    pub fn issued(&self, _serial: &[u8; 16]) -> Option<IssuedRecord> {
        unimplemented!()
    }

    /// Whether what `serial` belongs to, its identity and its node are free of revocation.
    pub fn check(&self, _record: &IssuedRecord) -> Result<(), crate::tunnel::trust::Revoked> {
        unimplemented!()
    }

    /// Revokes; returns how many certificates that have not ended that touches.
    pub async fn revoke(&self, _target: Target, _reason: Reason) -> Result<u64, Refusal> {
        unimplemented!()
    }

    /// Takes a revocation back.
    pub async fn unrevoke(&self, _target: Target) -> Result<(), Refusal> {
        unimplemented!()
    }

    /// Starts the rotation of the root; returns the phase in words.
    pub async fn rotate_root(&self) -> Result<String, Refusal> {
        unimplemented!()
    }

    /// What all may know, and each change of it.
    pub fn published(&self) -> watch::Receiver<Arc<Published>> {
        unimplemented!()
    }

    /// For people and programs: phase, roots with serial, fingerprint and times, numbers of live and revoked.
    pub fn status(&self) -> serde_json::Value {
        unimplemented!()
    }

    /// Does what is due: steps of a rotation, new revocation lists before the old ones end, forgetting. Runs for ever.
    pub async fn keep_up(&self) {
        unimplemented!()
    }
}
