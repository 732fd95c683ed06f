//! Requests certificates and renews them, within a limit of requests in progress.

use std::{
    fmt::Display,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::{
    crypto::aws_lc_rs::sign::any_ecdsa_type,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    sign::CertifiedKey,
};
use tokio::sync::Semaphore;

use super::{CaHealth, IssueError, Issuer, renewal::Schedule};
use auth_mesh::Identity;
use auth_tunnel::tls::svid::Svid;
use auth_workload_api::X509Svid;

/// How long one request to the CA may take.
const ISSUE_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests in progress at the same time; others wait.
pub(super) const MAX_REQUESTS: usize = 64;

/// Keeps certificates current.
#[derive(Debug)]
pub(super) struct Keeper {
    pub(super) issuer: Arc<dyn Issuer>,
    pub(super) health: Arc<CaHealth>,
    /// Limits the requests in progress.
    queue: Semaphore,
}

/// Holds one certificate, which a [`Keeper`] replaces.
pub(super) trait Holder: Send + Sync {
    /// What the certificate is for, in the log.
    const PURPOSE: &'static str;
    /// What follows from having none, in the log.
    const WITHOUT: &'static str;

    /// The certificate's identity.
    fn identity(&self) -> &Identity;
    /// The longest lifetime to request; the issuer's usual one, if that is shorter.
    fn lifetime(&self) -> Duration {
        Duration::MAX
    }
    /// The content of the certificate held.
    fn held(&self) -> Option<Svid>;
    /// Replaces the certificate.
    fn hold(&self, issued: X509Svid) -> Result<(), rustls::Error>;
}

impl Keeper {
    pub(super) fn new(issuer: Arc<dyn Issuer>) -> Self {
        Self {
            health: issuer.health().cloned().unwrap_or_default(),
            issuer,
            queue: Semaphore::new(MAX_REQUESTS),
        }
    }

    /// Requests and renews the certificate of `holder` until the task is aborted. Also renews it when it is revoked.
    pub(super) async fn keep_current<H: Holder>(self: Arc<Self>, holder: Arc<H>) {
        let store = self.issuer.trust();
        let mut schedule = Schedule::new(SystemTime::now());
        let mut trust = store.changes();
        let identity = holder.identity();
        if let Some(held) = holder.held() {
            schedule.issued(held.not_after, SystemTime::now(), rand::random());
        }
        loop {
            if trust.has_changed().unwrap_or(false) {
                trust.borrow_and_update();
                let revoked = &store.current().revoked;
                schedule.trust_changed(SystemTime::now(), rand::random());
                if holder
                    .held()
                    .is_some_and(|held| revoked.check(&held).is_err())
                {
                    schedule.revoked(SystemTime::now());
                }
            }
            let sleep = schedule.sleep(SystemTime::now());
            if !sleep.is_zero() {
                tokio::select! {
                    () = tokio::time::sleep(sleep) => {}
                    // `changed` has marked it as seen.
                    Ok(()) = trust.changed() => trust.mark_changed(),
                }
                continue;
            }
            let outcome = self
                .request(identity, holder.lifetime())
                .await
                .and_then(|issued| {
                    let svid = issued.svid.clone();
                    let held = holder.hold(issued);
                    held.map_err(|error| error.to_string())?;
                    Ok(svid)
                });
            let now = SystemTime::now();
            match outcome {
                Ok(svid) => {
                    self.health.issued();
                    let delay = schedule.issued(svid.not_after, now, rand::random());
                    tracing::info!(
                        %identity, serial = %svid.serial, purpose = H::PURPOSE, renew_in_seconds = delay.as_secs(),
                        "certificate issued"
                    );
                }
                Err(error) => {
                    self.health.not_issued(&error.why);
                    let delay = schedule.failed(now, rand::random(), error.retry_after);
                    let valid = holder.held().is_some_and(|held| held.not_after > now);
                    tracing::error!(
                        %identity, purpose = H::PURPOSE, %error, retry_in_seconds = delay.as_secs(),
                        still_valid = valid, "no certificate issued{}", if valid { "" } else { H::WITHOUT }
                    );
                }
            }
        }
    }

    /// Requests a certificate of `identity` with a new key.
    pub(super) async fn request(
        &self,
        identity: &Identity,
        lifetime: Duration,
    ) -> Result<X509Svid, IssueError> {
        // Never closed.
        let _permit = self.queue.acquire().await;
        let request = request(&*self.issuer, identity, lifetime);
        tokio::time::timeout(ISSUE_TIMEOUT, request)
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {ISSUE_TIMEOUT:?}").into()))
    }
}

async fn request(
    issuer: &dyn Issuer,
    identity: &Identity,
    lifetime: Duration,
) -> Result<X509Svid, IssueError> {
    let failed = |error: &dyn Display| IssueError::from(error.to_string());
    let key = KeyPair::generate().map_err(|error| failed(&error))?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let csr = params
        .serialize_request(&key)
        .map_err(|error| failed(&error))?;
    let issued = issuer.issue_for(identity, csr.der(), lifetime).await?;
    let trust = issuer.trust();
    let leaf = issued
        .chain
        .first()
        .ok_or_else(|| IssueError::from("the CA answered without a certificate".to_owned()))?;
    let trust_domain = trust.current().bundle.trust_domain.clone();
    let svid = Svid::parse(leaf, &trust_domain).map_err(|error| failed(&error))?;
    if svid.identity != *identity {
        return Err(format!("the CA answered with a certificate of {}", svid.identity).into());
    }
    if svid.not_after <= SystemTime::now() {
        let why = "the CA answered with a certificate that has expired; check the clocks (NTP)";
        return Err(why.to_owned().into());
    }
    Ok(X509Svid {
        svid,
        chain: issued.chain,
        key: PrivatePkcs8KeyDer::from(key.serialize_der()),
    })
}

/// Returns the key and the chain for TLS. Fails if they do not match.
pub(super) fn certified_key(issued: &X509Svid) -> Result<CertifiedKey, rustls::Error> {
    let key = PrivateKeyDer::from(issued.key.clone_key());
    let certified = CertifiedKey::new(issued.chain.clone(), any_ecdsa_type(&key)?);
    certified.keys_match()?;
    Ok(certified)
}
