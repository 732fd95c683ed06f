//! One key and certificate per identity on this node: made when first needed, renewed before they end, never written
//! anywhere.

mod renewal;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::{
    crypto::aws_lc_rs::sign::any_ecdsa_type,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    sign::CertifiedKey,
};
use tokio::{sync::Notify, task::AbortHandle};

use crate::{
    ca::{IssueError, Issuer},
    mesh::Identity,
    tunnel::{svid::Svid, tls::Configs},
};

/// How long one request to the CA may take.
const ISSUE_TIMEOUT: Duration = Duration::from_secs(10);

/// The certificates of this node's workloads.
#[derive(Debug)]
pub struct Certificates {
    issuer: Arc<dyn Issuer>,
    held: Mutex<HashMap<Identity, Held>>,
}

#[derive(Debug)]
struct Held {
    users: usize,
    certificate: Arc<Certificate>,
    renewal: AbortHandle,
}

/// The current certificate of one identity. Handshakes take what is current; connections keep what they began with.
#[derive(Debug)]
pub struct Certificate {
    /// Whose it is.
    pub identity: Identity,
    current: ArcSwapOption<Current>,
    issued: Notify,
}

/// A certificate in use.
#[derive(Debug)]
pub struct Current {
    /// What it says.
    pub svid: Svid,
    /// TLS with it.
    pub configs: Configs,
}

impl Certificate {
    /// The certificate, if there is one and it is still valid.
    pub fn current(&self) -> Option<Arc<Current>> {
        self.current
            .load_full()
            .filter(|current| current.svid.not_after > SystemTime::now())
    }

    /// The same, but waits up to `patience` for one that is on its way: a pod's first connection may be that early.
    pub async fn obtain(&self, patience: Duration) -> Option<Arc<Current>> {
        let issued = self.issued.notified();
        if let Some(current) = self.current() {
            return Some(current);
        }
        let _ = tokio::time::timeout(patience, issued).await;
        self.current()
    }
}

impl Certificates {
    /// Holds none yet.
    pub fn new(issuer: Arc<dyn Issuer>) -> Self {
        Self {
            issuer,
            held: Mutex::default(),
        }
    }

    /// The certificate of `identity`, requested if it is not held, kept and renewed until each `acquire` has its
    /// [`Certificates::release`]. Must be called within a tokio runtime, where renewals will run.
    pub fn acquire(&self, identity: &Identity) -> Arc<Certificate> {
        let mut held = self.lock();
        if let Some(held) = held.get_mut(identity) {
            held.users += 1;
            return held.certificate.clone();
        }
        let certificate = Arc::new(Certificate {
            identity: identity.clone(),
            current: ArcSwapOption::empty(),
            issued: Notify::new(),
        });
        let renewal = tokio::spawn(keep_current(self.issuer.clone(), certificate.clone()));
        held.insert(
            identity.clone(),
            Held {
                users: 1,
                certificate: certificate.clone(),
                renewal: renewal.abort_handle(),
            },
        );
        certificate
    }

    /// Ends one [`Certificates::acquire`]; the last one forgets key and certificate.
    pub fn release(&self, identity: &Identity) {
        let mut held = self.lock();
        if let Some(entry) = held.get_mut(identity) {
            entry.users -= 1;
            if entry.users == 0 {
                entry.renewal.abort();
                held.remove(identity);
            }
        }
    }

    /// All identities held, with their current SVIDs, in order.
    pub fn list(&self) -> Vec<(Identity, Option<Svid>)> {
        let held = self.lock();
        let mut list: Vec<_> = held
            .values()
            .map(|held| {
                let current = held.certificate.current.load_full();
                (
                    held.certificate.identity.clone(),
                    current.map(|current| current.svid.clone()),
                )
            })
            .collect();
        list.sort_by(|a, b| a.0.cmp(&b.0));
        list
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Identity, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Requests, waits and requests again, for as long as somebody uses `certificate`.
async fn keep_current(issuer: Arc<dyn Issuer>, certificate: Arc<Certificate>) {
    let mut failures = 0;
    loop {
        let request = request(&*issuer, &certificate.identity);
        let outcome = tokio::time::timeout(ISSUE_TIMEOUT, request)
            .await
            .unwrap_or_else(|_| Err(IssueError(format!("no answer within {ISSUE_TIMEOUT:?}"))));
        let delay = match outcome {
            Ok(current) => {
                failures = 0;
                let delay = renewal::renew_in(&current.svid, SystemTime::now(), rand::random());
                tracing::info!(
                    identity = %certificate.identity, serial = %current.svid.serial,
                    renew_in_seconds = delay.as_secs(), "certificate issued"
                );
                certificate.current.store(Some(Arc::new(current)));
                certificate.issued.notify_waiters();
                delay
            }
            Err(error) => {
                failures += 1;
                let delay = renewal::retry_in(failures, rand::random());
                let valid_until = certificate.current().map(|current| current.svid.not_after);
                tracing::error!(
                    identity = %certificate.identity, %error, retry_in_seconds = delay.as_secs(),
                    going_on = valid_until.is_some(), "no certificate issued"
                );
                delay
            }
        };
        tokio::time::sleep(delay).await;
    }
}

async fn request(issuer: &dyn Issuer, identity: &Identity) -> Result<Current, IssueError> {
    let failed = |error: &dyn std::fmt::Display| IssueError(error.to_string());
    let key = KeyPair::generate().map_err(|error| failed(&error))?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let csr = params
        .serialize_request(&key)
        .map_err(|error| failed(&error))?;
    let issued = issuer.issue(identity, csr.der()).await?;
    let bundle = &issuer.trust().current().bundle;
    let leaf = issued
        .chain
        .first()
        .ok_or_else(|| IssueError("the CA answered without a certificate".into()))?;
    let svid = Svid::parse(leaf, bundle.trust_domain.as_str()).map_err(|error| failed(&error))?;
    if svid.identity != *identity {
        return Err(IssueError(format!(
            "the CA answered with a certificate of {}",
            svid.identity
        )));
    }
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let signing = any_ecdsa_type(&key).map_err(|error| failed(&error))?;
    let certified = CertifiedKey::new(issued.chain, signing);
    certified.keys_match().map_err(|error| failed(&error))?;
    let configs = Configs::new(Arc::new(certified), bundle).map_err(|error| failed(&error))?;
    Ok(Current { svid, configs })
}
