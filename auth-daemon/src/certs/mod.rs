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
use renewal::Schedule;
use rustls::{
    crypto::aws_lc_rs::sign::any_ecdsa_type,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    sign::CertifiedKey,
};
use tokio::{
    sync::{Notify, Semaphore},
    task::AbortHandle,
};

use crate::{
    ca::{IssueError, Issuer},
    mesh::Identity,
    tunnel::{svid::Svid, tls::Configs, trust::TrustStore},
};

/// How long one request to the CA may take.
const ISSUE_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests under way at once; others wait for their turn.
const MAX_REQUESTS: usize = 64;

/// The certificates of this node's workloads.
#[derive(Debug)]
pub struct Certificates {
    issuer: Arc<dyn Issuer>,
    /// For a place among the requests under way.
    queue: Arc<Semaphore>,
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
    key: Arc<CertifiedKey>,
    /// Whom the configurations believe.
    roots: Vec<CertificateDer<'static>>,
}

impl Current {
    fn new(
        svid: Svid,
        key: Arc<CertifiedKey>,
        trust: &Arc<TrustStore>,
    ) -> Result<Self, rustls::Error> {
        let roots = trust.current().bundle.roots.clone();
        let configs = Configs::new(key.clone(), trust.clone())?;
        Ok(Self {
            svid,
            configs,
            key,
            roots,
        })
    }
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

impl Certificate {
    /// Does what a change of trust asks for: believes the roots of now, and replaces what was revoked.
    fn follow(&self, trust: &Arc<TrustStore>, schedule: &mut Schedule) {
        let Some(current) = self.current.load_full() else {
            return;
        };
        let now = trust.current();
        if now.revoked.check(&current.svid).is_err() {
            schedule.revoked(SystemTime::now());
        }
        if now.bundle.roots == current.roots {
            return;
        }
        // Sessions and tickets go with the old ones: nobody comes back by a root that has left.
        match Current::new(current.svid.clone(), current.key.clone(), trust) {
            Ok(current) => self.current.store(Some(Arc::new(current))),
            Err(error) => tracing::error!(
                identity = %self.identity, %error, "cannot use the CA's new roots; going on with those before"
            ),
        }
    }
}

impl Certificates {
    /// Holds none yet.
    pub fn new(issuer: Arc<dyn Issuer>) -> Self {
        Self {
            issuer,
            queue: Arc::new(Semaphore::new(MAX_REQUESTS)),
            held: Mutex::default(),
        }
    }

    /// Whom the certificates' holders believe.
    pub fn trust(&self) -> &Arc<TrustStore> {
        self.issuer.trust()
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
        let renewal = tokio::spawn(keep_current(
            self.issuer.clone(),
            self.queue.clone(),
            certificate.clone(),
        ));
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

/// Requests, waits and requests again, for as long as somebody uses `certificate`, and keeps it true to whom the CA says
/// to believe.
async fn keep_current(
    issuer: Arc<dyn Issuer>,
    queue: Arc<Semaphore>,
    certificate: Arc<Certificate>,
) {
    let mut schedule = Schedule::new(SystemTime::now());
    let mut trust = issuer.trust().changes();
    loop {
        trust.borrow_and_update();
        certificate.follow(issuer.trust(), &mut schedule);
        let sleep = schedule.sleep(SystemTime::now());
        if !sleep.is_zero() {
            tokio::select! {
                () = tokio::time::sleep(sleep) => {}
                Ok(()) = trust.changed() => {}
            }
            continue;
        }
        // Closed never.
        let _place = queue.acquire().await;
        let request = request(&*issuer, &certificate.identity);
        let outcome = tokio::time::timeout(ISSUE_TIMEOUT, request)
            .await
            .unwrap_or_else(|_| Err(IssueError(format!("no answer within {ISSUE_TIMEOUT:?}"))));
        let now = SystemTime::now();
        match outcome {
            Ok(current) => {
                let delay = schedule.issued(&current.svid, now, rand::random());
                tracing::info!(
                    identity = %certificate.identity, serial = %current.svid.serial,
                    renew_in_seconds = delay.as_secs(), "certificate issued"
                );
                certificate.current.store(Some(Arc::new(current)));
                certificate.issued.notify_waiters();
            }
            Err(error) => {
                let delay = schedule.failed(now, rand::random());
                let going_on = certificate.current().is_some();
                tracing::error!(
                    identity = %certificate.identity, %error, retry_in_seconds = delay.as_secs(), going_on,
                    "no certificate issued{}",
                    if going_on { "" } else { "; connections of its pods are refused" }
                );
            }
        }
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
    let trust = issuer.trust();
    let leaf = issued
        .chain
        .first()
        .ok_or_else(|| IssueError("the CA answered without a certificate".into()))?;
    let trust_domain = trust.current().bundle.trust_domain.clone();
    let svid = Svid::parse(leaf, trust_domain.as_str()).map_err(|error| failed(&error))?;
    if svid.identity != *identity {
        return Err(IssueError(format!(
            "the CA answered with a certificate of {}",
            svid.identity
        )));
    }
    if svid.not_after <= SystemTime::now() {
        return Err(IssueError(
            "the CA answered with a certificate that has expired; compare the clocks (NTP)".into(),
        ));
    }
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let signing = any_ecdsa_type(&key).map_err(|error| failed(&error))?;
    let certified = CertifiedKey::new(issued.chain, signing);
    certified.keys_match().map_err(|error| failed(&error))?;
    Current::new(svid, Arc::new(certified), trust).map_err(|error| failed(&error))
}
