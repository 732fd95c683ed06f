//! The CA of a trust domain, without a network: what it knows, and what it does when asked. Who may ask is decided
//! before.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use rustls::{pki_types::CertificateDer, sign::CertifiedKey};
use serde_json::json;
use tokio::sync::{Notify, watch};

pub use super::settings::{KeyAlgorithm, Root, Settings};
use super::{
    active::Active,
    csr::RequestedKey,
    live::Live,
    plugged::{self, PluggedIn},
    rotation::{self, Phase},
    signer::{self, SignError},
    state::{Core, RevokedSerial, Since, Stored},
    store::{Store, StoreError},
};
use crate::{
    mesh::Identity,
    tunnel::{
        tls::unix_seconds,
        trust::{Reason, Revoked},
    },
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
    /// Of a CA that is plugged in: the certificates between its lists' signer and the roots, that one first, DER.
    pub intermediates: Vec<CertificateDer<'static>>,
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

/// How often records of what has ended are given up, in seconds.
const PRUNED_EVERY: u64 = 600;
/// Longest sleep between two looks at the clock, which somebody may have set.
const LONGEST_SLEEP: u64 = 3600;
/// Longest wait after a failure, in seconds.
const LONGEST_RETRY: u64 = 60;
/// Longest name of a node that is revoked (a DNS subdomain, RFC 1123), in bytes.
const MAX_NODE: usize = 253;

/// The CA. Shares are cheap to clone.
#[derive(Clone)]
pub struct Authority {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<dyn Store>,
    settings: Settings,
    plugged: Option<PluggedIn>,
    clock: Clock,
    /// What was kept last. Held while something changes.
    core: tokio::sync::Mutex<Core>,
    /// What follows from it, for those who read.
    active: ArcSwap<Active>,
    live: Mutex<Live>,
    published: watch::Sender<Arc<Published>>,
    /// Something is due at another time than before.
    changed: Notify,
    schedule: Mutex<Schedule>,
}

/// What is due without anybody asking, in seconds of the Unix epoch.
#[derive(Clone, Copy, Debug, Default)]
struct Schedule {
    crls: u64,
    prune: u64,
}

/// Where the time comes from.
#[derive(Clone)]
pub(super) struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Clock {
    pub(super) fn new(now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    fn now(&self) -> u64 {
        unix_seconds((self.0)())
    }
}

impl Authority {
    /// Opens the CA that `store` keeps, making one where there is none.
    pub async fn open(store: Arc<dyn Store>, settings: Settings) -> Result<Self, UnusableCa> {
        Self::open_at(store, settings, Clock::new(SystemTime::now)).await
    }

    pub(super) async fn open_at(
        store: Arc<dyn Store>,
        settings: Settings,
        clock: Clock,
    ) -> Result<Self, UnusableCa> {
        let now = clock.now();
        settings.check()?;
        let plugged = match &settings.root {
            Root::SelfSigned { .. } => None,
            Root::PluggedIn { directory } => Some(
                plugged::load(directory, &settings.trust_domain, now)
                    .map_err(|faults| UnusableCa(faults.join("\n")))?,
            ),
        };
        let kept = store.load().await.map_err(|error| UnusableCa(error.0))?;
        let (core, issued) = match kept {
            Some(kept) => {
                let core = Core::from_json(&kept.core)
                    .map_err(|what| UnusableCa(format!("the CA's state {what}")))?;
                (core, kept.issued)
            }
            None => (settings.new_core(plugged.as_ref(), now)?, Vec::new()),
        };
        let mut core = settings.take_up(core, plugged.as_ref())?;
        // The lists are signed anew, so what is published changes.
        core.changed(now);
        let mut live = Live::default();
        for record in issued {
            live.insert(record, now);
        }
        let live = Mutex::new(live);
        let active = Active::new(&core, None, plugged.as_ref()).map_err(UnusableCa)?;
        let published = active
            .publish(&core, &live, now)
            .map_err(|error| UnusableCa(error.to_string()))?;
        store
            .keep(&core.to_json())
            .await
            .map_err(|error| UnusableCa(error.0))?;
        let inner = Inner {
            store,
            settings,
            plugged,
            clock,
            core: tokio::sync::Mutex::new(core),
            active: ArcSwap::from_pointee(active),
            live,
            published: watch::Sender::new(Arc::new(published)),
            changed: Notify::new(),
            schedule: Mutex::new(Schedule {
                crls: now + super::revocation::LIFE / 2,
                prune: now,
            }),
        };
        inner.show().await;
        if let Some(plugged) = &inner.plugged {
            plugged.warn_of_its_end(now);
        }
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Signs the key of `csr` (PKCS #10, DER; nothing else of it is used) for `identity`, for `lifetime` at most (the
    /// maximum if that is zero; at least ten seconds otherwise), and records it as given to `node`. Returns the leaf,
    /// then intermediates, without the root, once the record is safe.
    pub async fn issue(
        &self,
        identity: &Identity,
        csr: &[u8],
        lifetime: Duration,
        node: Option<&str>,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        let inner = &*self.inner;
        inner.check_trust_domain(identity)?;
        let lifetime = inner.settings.lifetime(lifetime)?;
        let active = inner.active.load_full();
        active.revocations.check_identity(identity)?;
        if let Some(node) = node {
            active.revocations.check_node(node)?;
        }
        let key =
            RequestedKey::from_csr(csr).map_err(|error| Refusal::Request(error.to_string()))?;
        if active.owns(&key.spki()) {
            return Err(Refusal::Request("the CSR's key is the CA's own".into()));
        }
        let now = inner.clock.now();
        let signer = active.signing();
        let leaf = signer.svid(identity, &key, lifetime, now)?;
        let record = IssuedRecord {
            serial: leaf.serial,
            not_after: leaf.not_after,
            signer: active.rotation.signing,
            identity: identity.clone(),
            node: node.map(str::to_owned),
        };
        inner.store.record(std::slice::from_ref(&record)).await?;
        inner.live().insert(record.clone(), inner.clock.now());
        // Whoever revokes looks for what is live after the revocation holds: either finds the other.
        let current = inner.active.load();
        current.check(&record)?;
        if !current.believes(record.signer) {
            return Err(Refusal::State(
                "the root was replaced while this was signed: ask again".into(),
            ));
        }
        Ok(signer.chain(&leaf))
    }

    /// Key and certificate for the CA's own server, for DNS names and IP addresses, and when to ask for the next one:
    /// at half-life, or when the root changes ([`Authority::published`]).
    pub fn serving_certificate(
        &self,
        names: &[String],
    ) -> Result<(Arc<CertifiedKey>, SystemTime), Refusal> {
        let inner = &*self.inner;
        let now = inner.clock.now();
        let active = inner.active.load();
        let lifetime = inner.settings.max_lifetime.as_secs();
        let (key, leaf) = active.signing().serving(names, lifetime, now)?;
        inner.live().note(active.rotation.signing, leaf.not_after);
        let half = now + (leaf.not_after - now) / 2;
        Ok((key, UNIX_EPOCH + Duration::from_secs(half)))
    }

    /// The record of a certificate that has not ended yet.
    pub fn issued(&self, serial: &[u8; 16]) -> Option<IssuedRecord> {
        let now = self.inner.clock.now();
        self.inner.live().get(serial, now).cloned()
    }

    /// Whether what `serial` belongs to, its identity and its node are free of revocation.
    pub fn check(&self, record: &IssuedRecord) -> Result<(), Revoked> {
        self.inner.active.load().check(record)
    }

    /// Revokes; returns how many certificates that have not ended that touches. What is revoked already gets the new
    /// reason.
    pub async fn revoke(&self, target: Target, reason: Reason) -> Result<u64, Refusal> {
        self.inner
            .change(move |core, inner, now| inner.revoke(core, target, reason, now))
            .await
    }

    /// Takes a revocation back.
    pub async fn unrevoke(&self, target: Target) -> Result<(), Refusal> {
        self.inner
            .change(move |core, _, _| {
                let found = match &target {
                    Target::Serial(serial) => core.serials.remove(serial).is_some(),
                    Target::Identity(identity) => core.identities.remove(identity).is_some(),
                    Target::Node(node) => core.nodes.remove(node).is_some(),
                };
                if found {
                    tracing::warn!(%target, "revocation taken back");
                    return Ok(());
                }
                Err(Refusal::State(format!(
                    "{target} is not revoked by itself: `auth-daemon ca status` lists what is"
                )))
            })
            .await
    }

    /// Starts the rotation of the root; returns the phase in words.
    pub async fn rotate_root(&self) -> Result<String, Refusal> {
        self.inner
            .change(|core, inner, now| {
                inner.start_rotation(core, now)?;
                Ok(Active::phase(core.rotation, |_| 0))
            })
            .await
    }

    /// What all may know, and each change of it.
    pub fn published(&self) -> watch::Receiver<Arc<Published>> {
        self.inner.published.subscribe()
    }

    /// For people and programs: phase, roots with serial, fingerprint and times, numbers of live and revoked.
    pub fn status(&self) -> serde_json::Value {
        let inner = &*self.inner;
        let active = inner.active.load();
        let now = inner.clock.now();
        let (issued, ends) = {
            let mut live = inner.live();
            live.forget(now, usize::MAX);
            let ends = active.rotation.due(|signer| live.last_end(signer));
            (live.iter(now).count(), ends)
        };
        let mut status = active.status();
        status["issued"] = json!(issued);
        status["phaseEnds"] = json!(ends.map(crate::tunnel::tls::rfc3339));
        status["trustDomain"] = json!(inner.settings.trust_domain.as_str());
        status["pluggedIn"] = json!(inner.plugged.is_some());
        status
    }

    /// Does what is due: steps of a rotation, new revocation lists before the old ones end, forgetting. Runs for ever.
    pub async fn keep_up(&self) {
        let mut failures = 0_u32;
        loop {
            let wait = match self.inner.catch_up().await {
                Ok(due) => {
                    failures = 0;
                    due.saturating_sub(self.inner.clock.now())
                        .min(LONGEST_SLEEP)
                }
                Err(error) => {
                    failures += 1;
                    let wait = LONGEST_RETRY.min(1 << failures.min(6));
                    tracing::error!(%error, retry_in_seconds = wait, "the CA cannot do what is due");
                    wait
                }
            };
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(wait)) => {}
                () = self.inner.changed.notified() => {}
            }
        }
    }
}

impl Inner {
    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn schedule(&self) -> MutexGuard<'_, Schedule> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state: what `change` makes of it is kept first, and holds then. Goes on to the end even if the caller
    /// does not wait for it.
    async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        change: impl FnOnce(&mut Core, &Self, u64) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let inner = self.clone();
        let task = tokio::spawn(async move {
            let mut core = inner.core.lock().await;
            let now = inner.clock.now();
            let mut next = core.clone();
            let answer = change(&mut next, &inner, now)?;
            next.changed(now);
            let active = Active::new(&next, Some(&inner.active.load()), inner.plugged.as_ref())
                .map_err(Refusal::State)?;
            inner.store.keep(&next.to_json()).await?;
            *core = next;
            inner.active.store(Arc::new(active));
            inner.announce(&core, now);
            inner.show().await;
            inner.changed.notify_one();
            Ok(answer)
        });
        task.await
            .unwrap_or_else(|error| Err(Refusal::State(format!("the change failed: {error}"))))
    }

    /// Signs the lists of what is revoked now, and tells everybody.
    fn announce(&self, core: &Core, now: u64) {
        let lists = self.active.load().publish(core, &self.live, now);
        match lists {
            Ok(published) => {
                self.schedule().crls = now + super::revocation::LIFE / 2;
                self.published.send_replace(Arc::new(published));
            }
            Err(error) => {
                tracing::error!(%error, "the revocation lists cannot be signed; daemons keep the last ones");
                self.schedule().crls = now + LONGEST_RETRY;
            }
        }
    }

    async fn show(&self) {
        let published = self.published.borrow().clone();
        if let Err(error) = self.store.publish(&published).await {
            tracing::warn!(%error, "what the CA publishes could not be written for people to see");
        }
    }

    fn check_trust_domain(&self, identity: &Identity) -> Result<(), Refusal> {
        let own = &self.settings.trust_domain;
        if identity.trust_domain() == own.as_str() {
            return Ok(());
        }
        Err(Refusal::Request(format!(
            "{identity} is not of trust domain {own}"
        )))
    }

    fn revoke(
        &self,
        core: &mut Core,
        target: Target,
        reason: Reason,
        now: u64,
    ) -> Result<u64, Refusal> {
        let live = self.live();
        let at = now;
        let touched = match &target {
            Target::Serial(serial) => {
                if self.active.load().is_own_serial(serial) {
                    return Err(Refusal::Request(
                        "that is the serial number of the CA's own certificate: rotate the root instead".into(),
                    ));
                }
                let record = live.get(serial, now);
                if record.is_none() {
                    tracing::warn!(
                        %target, "revoked, but no certificate that has not ended is known to have this serial number; \
                         it stays on the list until the revocation is taken back"
                    );
                }
                let revoked = core.serials.entry(*serial).or_insert(RevokedSerial {
                    since: Since { reason, at },
                    not_after: record.map(|record| record.not_after),
                    signer: record.map(|record| record.signer),
                });
                revoked.since.reason = reason;
                usize::from(record.is_some())
            }
            Target::Identity(identity) => {
                self.check_trust_domain(identity)?;
                let since = core.identities.entry(identity.clone());
                since.or_insert(Since { reason, at }).reason = reason;
                live.iter(now).filter(|r| r.identity == *identity).count()
            }
            Target::Node(node) => {
                if node.is_empty() || node.len() > MAX_NODE || node.chars().any(char::is_control) {
                    return Err(Refusal::Request(format!(
                        "{node:.64?} is not a node's name"
                    )));
                }
                let since = core.nodes.entry(node.clone());
                since.or_insert(Since { reason, at }).reason = reason;
                live.iter(now)
                    .filter(|r| r.node.as_ref() == Some(node))
                    .count()
            }
        };
        tracing::warn!(%target, %reason, certificates = touched, "revoked");
        Ok(touched as u64)
    }

    fn start_rotation(&self, core: &mut Core, now: u64) -> Result<(), Refusal> {
        let Root::SelfSigned {
            algorithm,
            lifetime,
            spread,
        } = &self.settings.root
        else {
            return Err(Refusal::State(
                "the signing certificate is plugged in: add the new root to root-cert.pem and restart, then replace \
                 ca-cert.pem, ca-key.pem and cert-chain.pem and restart, then take the old root out"
                    .into(),
            ));
        };
        let rotation = core.rotation;
        let under_way = || {
            let phase = Active::phase(rotation, |signer| self.live().last_end(signer));
            Refusal::State(format!(
                "a rotation is under way ({phase}): wait until `auth-daemon ca status` says steady"
            ))
        };
        if rotation.phase != Phase::Steady {
            return Err(under_way());
        }
        let root = signer::make_root(
            &self.settings.trust_domain,
            *algorithm,
            lifetime.as_secs(),
            now,
        )?;
        let end = self.active.load().signing().life().end;
        let next = core.add_signer(Stored::root(root).map_err(Refusal::State)?);
        core.rotation = rotation
            .start(next, now, spread.as_secs(), end)
            .ok_or_else(under_way)?;
        tracing::info!(
            root = next,
            "a new root is published; it will sign once all know it"
        );
        Ok(())
    }

    /// Does what is due now; returns when the next thing is.
    async fn catch_up(self: &Arc<Self>) -> Result<u64, Refusal> {
        loop {
            let now = self.clock.now();
            let active = self.active.load_full();
            let step = active.rotation.due(|signer| self.live().last_end(signer));
            let start = self.starts_by_itself(&active);
            let crls = self.schedule().crls;
            let due = [step, start, Some(crls)].into_iter().flatten().min();
            let due = due.unwrap_or(crls);
            if due > now {
                return Ok(due.min(self.prune(now).await?));
            }
            if let Some(plugged) = &self.plugged {
                plugged.warn_of_its_end(now);
            }
            self.change(move |core, inner, now| {
                let last_end = |signer| inner.live().last_end(signer);
                if let Some(next) = core.rotation.step(now, last_end) {
                    core.rotate(next);
                    tracing::info!(
                        phase = Active::phase(next, last_end),
                        "the root's rotation went on"
                    );
                } else if inner
                    .starts_by_itself(&inner.active.load())
                    .is_some_and(|due| due <= now)
                {
                    tracing::info!("the root nears its end and is replaced");
                    inner.start_rotation(core, now)?;
                }
                Ok(())
            })
            .await?;
        }
    }

    /// When the root that signs has to be replaced; never while that is under way, or where it is plugged in.
    fn starts_by_itself(&self, active: &Active) -> Option<u64> {
        match &self.settings.root {
            Root::SelfSigned { spread, .. } if active.rotation.phase == Phase::Steady => {
                Some(rotation::starts_by_itself(
                    active.signing().life(),
                    spread.as_secs(),
                    self.settings.max_lifetime.as_secs(),
                ))
            }
            _ => None,
        }
    }

    /// Gives up what has ended, now and then; returns when next.
    async fn prune(&self, now: u64) -> Result<u64, Refusal> {
        let due = self.schedule().prune;
        if now < due {
            return Ok(due);
        }
        self.live().forget(now, usize::MAX);
        self.store.prune(now).await?;
        let due = now + PRUNED_EVERY;
        self.schedule().prune = due;
        Ok(due)
    }
}

impl From<SignError> for Refusal {
    fn from(error: SignError) -> Self {
        match error {
            SignError::Name(_) | SignError::NoName => Self::Request(error.to_string()),
            error => Self::State(error.to_string()),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Serial(serial) => write!(f, "certificate {}", signer::hex(serial)),
            Self::Identity(identity) => write!(f, "{identity}"),
            Self::Node(node) => write!(f, "node {node}"),
        }
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("settings", &self.inner.settings)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
