//! One key and certificate for each identity on this node: requested when first needed, renewed before they expire, and
//! never written to a disk.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use rustls::{pki_types::CertificateDer, sign::CertifiedKey};
use tokio::{sync::Notify, task::AbortHandle};

use super::{
    CaHealth, IssueError, Issuer,
    jwt::JwtSvids,
    keeper::{Holder, Keeper, certified_key},
};
use auth_mesh::Identity;
use auth_tunnel::tls::{
    Configs,
    svid::Svid,
    trust::{ForeignBundles, TrustStore},
};
use auth_workload_api::X509Svid;

/// The certificates of this node's workloads.
#[derive(Debug)]
pub struct Certificates {
    pub(super) keeper: Arc<Keeper>,
    pub(super) jwts: Arc<JwtSvids>,
    held: Mutex<HashMap<Identity, Held>>,
}

#[derive(Debug)]
struct Held {
    users: usize,
    certificate: Arc<Certificate>,
    renewal: AbortHandle,
}

/// The current certificate of one identity. Handshakes use the current one; connections keep theirs.
#[derive(Debug)]
pub struct Certificate {
    /// The identity.
    pub identity: Identity,
    trust: Arc<TrustStore>,
    current: ArcSwapOption<Current>,
    issued: Notify,
}

/// A certificate in use.
#[derive(Debug)]
pub struct Current {
    /// Its content.
    pub svid: Svid,
    /// TLS configurations with it.
    pub configs: Configs,
    key: Arc<CertifiedKey>,
    /// The roots when the configurations were made.
    roots: Vec<CertificateDer<'static>>,
    /// The bundles of foreign trust domains at that time.
    foreign: Arc<ForeignBundles>,
}

impl Current {
    fn new(
        svid: Svid,
        key: Arc<CertifiedKey>,
        trust: &Arc<TrustStore>,
    ) -> Result<Self, rustls::Error> {
        // Before the configurations are made: a change in between is then applied once more.
        let roots = trust.current().bundle.roots.clone();
        let foreign = trust.foreign();
        let configs = Configs::new(key.clone(), trust.clone())?;
        Ok(Self {
            svid,
            configs,
            key,
            roots,
            foreign,
        })
    }

    /// Whether the roots are still those of `trust`.
    fn is_of(&self, trust: &TrustStore) -> bool {
        trust.current().bundle.roots == self.roots && trust.foreign() == self.foreign
    }
}

impl Certificate {
    fn none_of(identity: &Identity, trust: &Arc<TrustStore>) -> Self {
        Self {
            identity: identity.clone(),
            trust: trust.clone(),
            current: ArcSwapOption::empty(),
            issued: Notify::new(),
        }
    }

    /// The certificate, if there is a valid one. A handshake with its configurations resumes no session from before the last
    /// change of the roots.
    pub fn current(&self) -> Option<Arc<Current>> {
        let current = self.current.load_full()?;
        if current.svid.not_after <= SystemTime::now() {
            return None;
        }
        match current.is_of(&self.trust) {
            true => Some(current),
            false => Some(self.with_current_roots(current)),
        }
    }

    /// The same, but waits up to `patience` for one that is being requested: a pod's first connection may be that early.
    pub async fn obtain(&self, patience: Duration) -> Option<Arc<Current>> {
        let issued = self.issued.notified();
        if let Some(current) = self.current() {
            return Some(current);
        }
        let _ = tokio::time::timeout(patience, issued).await;
        self.current()
    }

    /// Replaces the configurations of `held`, and with them the sessions and tickets of peers whose root may be removed: TLS does
    /// not verify them again. Here and not in the keeper, which may be waiting for the CA.
    fn with_current_roots(&self, held: Arc<Current>) -> Arc<Current> {
        match Current::new(held.svid.clone(), held.key.clone(), &self.trust) {
            Ok(new) => {
                let new = Arc::new(new);
                // Unless another thread was faster, or another certificate was issued.
                self.current.compare_and_swap(&held, Some(new.clone()));
                new
            }
            Err(error) => {
                tracing::error!(
                    identity = %self.identity, %error,
                    "new roots cannot be used; handshakes with peers of that trust domain fail"
                );
                held
            }
        }
    }
}

impl Holder for Certificate {
    const PURPOSE: &'static str = "tunnels";
    const WITHOUT: &'static str = "; connections of its pods are refused";

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn held(&self) -> Option<Svid> {
        let current = self.current.load();
        current.as_ref().map(|current| current.svid.clone())
    }

    fn hold(&self, issued: X509Svid) -> Result<(), rustls::Error> {
        let key = Arc::new(certified_key(&issued)?);
        let current = Current::new(issued.svid, key, &self.trust)?;
        self.current.store(Some(Arc::new(current)));
        self.issued.notify_waiters();
        Ok(())
    }
}

impl Certificates {
    /// Holds no certificate yet.
    pub fn new(issuer: Arc<dyn Issuer>) -> Self {
        Self {
            jwts: Arc::new(JwtSvids::new(issuer.clone())),
            keeper: Arc::new(Keeper::new(issuer)),
            held: Mutex::default(),
        }
    }

    /// The trust bundle.
    pub fn trust(&self) -> &Arc<TrustStore> {
        self.keeper.issuer.trust()
    }

    /// Whether the CA answers.
    pub fn health(&self) -> &CaHealth {
        &self.keeper.health
    }

    /// The certificate of `identity`, which is requested if it is not held, and renewed until each `acquire` has its
    /// [`Certificates::release`]. Must be called within a tokio runtime, where renewals run.
    pub fn acquire(&self, identity: &Identity) -> Arc<Certificate> {
        let mut held = self.lock();
        if let Some(held) = held.get_mut(identity) {
            held.users += 1;
            return held.certificate.clone();
        }
        let certificate = Arc::new(Certificate::none_of(identity, self.trust()));
        self.keep(&mut held, &certificate);
        certificate
    }

    /// Requests a certificate of `identity`, and renews it until [`Certificates::release`]. Unlike
    /// [`Certificates::acquire`], fails if the first request does. Must be called within a tokio runtime.
    pub async fn request(&self, identity: &Identity) -> Result<Arc<Certificate>, IssueError> {
        let issued = self.keeper.request(identity, Duration::MAX).await?;
        let certificate = Arc::new(Certificate::none_of(identity, self.trust()));
        let held = certificate.hold(issued);
        held.map_err(|error| IssueError::from(error.to_string()))?;
        self.keep(&mut self.lock(), &certificate);
        Ok(certificate)
    }

    fn keep(&self, held: &mut HashMap<Identity, Held>, certificate: &Arc<Certificate>) {
        let renewal = tokio::spawn(self.keeper.clone().keep_current(certificate.clone()));
        held.insert(
            certificate.identity.clone(),
            Held {
                users: 1,
                certificate: certificate.clone(),
                renewal: renewal.abort_handle(),
            },
        );
    }

    /// Ends one [`Certificates::acquire`]. The last one drops key and certificate.
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

#[cfg(test)]
mod tests {
    use std::{
        future::pending,
        sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    };

    use super::*;
    use crate::issuer::{IssueFuture, keeper::MAX_REQUESTS};
    use auth_ca::embedded::EmbeddedCa;
    use auth_mesh::TrustDomain;
    use auth_tunnel::tls::trust::{Reason, Trust, TrustBundle};

    const PATIENCE: Duration = Duration::from_secs(10);

    fn domain() -> TrustDomain {
        "cluster.local".parse().unwrap()
    }

    /// Signs after a moment and counts requests. Fails as often as the test says, or does not answer at all.
    #[derive(Debug)]
    struct TestCa {
        _folder: tempfile::TempDir,
        ca: EmbeddedCa,
        asked: AtomicUsize,
        under_way: AtomicUsize,
        most: AtomicUsize,
        failures: AtomicUsize,
        hangs: AtomicBool,
    }

    impl TestCa {
        fn new(failures: usize) -> Arc<Self> {
            let folder = tempfile::tempdir().unwrap();
            let ca = EmbeddedCa::open(folder.path(), &domain(), Duration::from_secs(3600));
            Arc::new(Self {
                ca: ca.unwrap(),
                _folder: folder,
                asked: AtomicUsize::new(0),
                under_way: AtomicUsize::new(0),
                most: AtomicUsize::new(0),
                failures: AtomicUsize::new(failures),
                hangs: AtomicBool::new(false),
            })
        }

        fn asked(&self) -> usize {
            self.asked.load(Ordering::Relaxed)
        }

        fn change(&self, change: impl FnOnce(&mut Trust)) {
            let mut trust = (*self.trust().current()).clone();
            change(&mut trust);
            self.trust().publish(trust);
        }
    }

    impl Issuer for TestCa {
        fn issue_for<'a>(
            &'a self,
            identity: &'a Identity,
            csr: &'a [u8],
            lifetime: Duration,
        ) -> IssueFuture<'a> {
            Box::pin(async move {
                self.asked.fetch_add(1, Ordering::Relaxed);
                if self.hangs.load(Ordering::Relaxed) {
                    pending::<()>().await;
                }
                let now = self.under_way.fetch_add(1, Ordering::Relaxed) + 1;
                self.most.fetch_max(now, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(5)).await;
                self.under_way.fetch_sub(1, Ordering::Relaxed);
                let fails =
                    self.failures
                        .try_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                            left.checked_sub(1)
                        });
                if fails.is_ok() {
                    return Err("not today".to_owned().into());
                }
                Issuer::issue_for(&self.ca, identity, csr, lifetime).await
            })
        }

        fn trust(&self) -> &Arc<TrustStore> {
            self.ca.trust()
        }
    }

    async fn until<T>(what: impl Fn() -> Option<T>) -> T {
        let poll = async {
            loop {
                if let Some(value) = what() {
                    return value;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, poll).await.unwrap()
    }

    #[tokio::test]
    async fn requests_one_certificate_for_all_pods_of_an_identity() {
        let ca = TestCa::new(0);
        let certificates = Certificates::new(ca.clone());
        let identity = domain().identity("default", "web").unwrap();
        let (one, two) = (
            certificates.acquire(&identity),
            certificates.acquire(&identity),
        );
        let current = one.obtain(PATIENCE).await.unwrap();
        assert!(Arc::ptr_eq(&current, &two.current().unwrap()));
        assert_eq!(ca.asked(), 1);
        certificates.release(&identity);
        assert_eq!(certificates.list().len(), 1);
        certificates.release(&identity);
        assert!(certificates.list().is_empty());
    }

    #[tokio::test]
    async fn limits_requests_in_progress() {
        let ca = TestCa::new(0);
        let certificates = Certificates::new(ca.clone());
        let held: Vec<_> = (0..3 * MAX_REQUESTS)
            .map(|n| domain().identity("default", &format!("pod-{n}")).unwrap())
            .map(|identity| certificates.acquire(&identity))
            .collect();
        for certificate in &held {
            certificate.obtain(PATIENCE).await.unwrap();
        }
        assert_eq!(ca.asked(), 3 * MAX_REQUESTS);
        assert!(ca.most.load(Ordering::Relaxed) <= MAX_REQUESTS);
    }

    #[tokio::test]
    async fn retries_after_a_failure() {
        let ca = TestCa::new(1);
        let certificates = Certificates::new(ca.clone());
        let identity = domain().identity("default", "web").unwrap();
        let certificate = certificates.acquire(&identity);
        assert!(certificate.obtain(PATIENCE).await.is_some());
        assert_eq!(ca.asked(), 2);
    }

    #[tokio::test]
    async fn replaces_a_revoked_certificate() {
        let ca = TestCa::new(0);
        let certificates = Certificates::new(ca.clone());
        let identity = domain().identity("default", "web").unwrap();
        let certificate = certificates.acquire(&identity);
        let first = certificate.obtain(PATIENCE).await.unwrap();
        let serial = first.svid.serial.clone();
        ca.change(|trust| {
            let serials = &mut trust.revoked.serials;
            serials.insert((*serial).into(), Reason::Superseded);
        });
        let next = until(|| certificate.current().filter(|c| c.svid.serial != serial)).await;
        assert_eq!(next.svid.identity, identity);
        assert_eq!(ca.asked(), 2);
    }

    #[tokio::test]
    async fn trusts_new_roots_without_a_new_certificate() {
        let ca = TestCa::new(0);
        let other = TestCa::new(0);
        let certificates = Certificates::new(ca.clone());
        let identity = domain().identity("default", "web").unwrap();
        let certificate = certificates.acquire(&identity);
        let first = certificate.obtain(PATIENCE).await.unwrap();
        let TrustBundle { roots, .. } = other.trust().current().bundle.clone();
        ca.change(|trust| trust.bundle.roots.extend(roots));
        let next = certificate.current().unwrap();
        assert_eq!(next.svid, first.svid);
        assert_eq!(next.roots.len(), 2);
        assert!(!Arc::ptr_eq(&next.configs.server, &first.configs.server));
        assert!(Arc::ptr_eq(&next, &certificate.current().unwrap()), "once");
        assert_eq!(ca.asked(), 1);
    }

    #[tokio::test]
    async fn no_session_outlives_its_root_while_the_ca_hangs() {
        let ca = TestCa::new(0);
        let certificates = Certificates::new(ca.clone());
        let identity = domain().identity("default", "web").unwrap();
        let certificate = certificates.acquire(&identity);
        let first = certificate.obtain(PATIENCE).await.unwrap();
        ca.hangs.store(true, Ordering::Relaxed);
        ca.change(|trust| {
            let serials = &mut trust.revoked.serials;
            serials.insert((*first.svid.serial).into(), Reason::Superseded);
        });
        until(|| (ca.asked() == 2).then_some(())).await;
        let servers = || certificate.current().unwrap().configs.server.clone();
        let mut before = servers();
        let mut change = |what: &str, change: &dyn Fn()| {
            change();
            let now = servers();
            assert!(!Arc::ptr_eq(&now, &before), "{what}");
            before = now;
        };
        let foreign = TestCa::new(0).trust().current().bundle.clone();
        let mut bundles = ForeignBundles::default();
        bundles.insert(TrustBundle {
            trust_domain: "far.example".parse().unwrap(),
            ..foreign.clone()
        });
        let trust = ca.trust();
        change("a foreign root comes", &|| {
            trust.publish_foreign(bundles.clone())
        });
        change("and goes", &|| {
            trust.publish_foreign(ForeignBundles::default())
        });
        change("an own root comes", &|| {
            ca.change(|trust| trust.bundle.roots.extend(foreign.roots.clone()));
        });
        change("and goes", &|| {
            ca.change(|trust| drop(trust.bundle.roots.pop()))
        });
        assert_eq!(ca.asked(), 2, "the keeper still waits");
    }
}
