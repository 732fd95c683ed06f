//! The CA of a trust domain, without a network: it issues, revokes, and rotates its root. Its callers decide who may ask.

mod joining;
mod jwt;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use auth_mesh::{Identity, SpiffeId};
use auth_tunnel::tls::{
    rfc3339,
    svid::Svid,
    trust::{Reason, Revoked},
    unix_seconds,
};
use rustls::{pki_types::CertificateDer, sign::CertifiedKey};
use tokio::sync::{Notify, watch};

use self::joining::NodeCertificates;
pub(crate) use self::jwt::IssuedJwt;
use crate::{
    config::{MIN_LIFETIME, Root, RootSettings, Settings},
    csr::RequestedKey,
    intermediate::Intermediate,
    rotation::{self, Phase, Rotation},
    signer::{self, Leaf, SignError},
    state::{CaState, Revocation, StoredSigner, Text},
    status::{AuthorityStatus, RootStatus},
    store::{Store, StoreError, Stored},
    view::CaView,
};
pub use crate::{signer::Holder, state::Serial, view::Published};

/// The authority, while this replica is the leader.
pub type Leader = watch::Receiver<Option<Arc<Authority>>>;

/// Runs `work` with the authority whenever this replica is the leader, until `leader`'s sender is dropped. The work may be
/// dropped at any point: the next leader starts from what exists.
pub(crate) async fn while_leading<F: Future<Output = ()>>(
    mut leader: Leader,
    work: impl Fn(Arc<Authority>) -> F,
) {
    loop {
        let now = leader.wait_for(Option::is_some).await;
        let Ok(Some(authority)) = now.map(|now| now.clone()) else {
            return;
        };
        tokio::select! {
            biased;
            changed = leader.changed() => if changed.is_err() { return },
            () = work(authority) => {}
        }
    }
}

/// What [`Authority::issue`] returns.
#[derive(Debug)]
pub struct Issued {
    /// The leaf and its intermediates, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// All trusted roots, that of the certificate first.
    pub roots: Vec<CertificateDer<'static>>,
}

/// What to revoke.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// One certificate.
    Serial(Serial),
    /// An identity: refuses all of its certificates, and it gets no new ones.
    Identity(Identity),
    /// A node: refuses all certificates that it got and all of its pods, and it gets no new ones.
    Node(String),
}

/// Why the CA refuses a request.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The request is wrong: malformed, a weak key, a CSR that its key did not sign, another trust domain.
    #[error("{0}")]
    Request(String),
    /// The identity or the node is revoked.
    #[error("{0}")]
    Revoked(#[from] Revoked),
    /// The state could not be stored, so nothing was done.
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

/// Longest sleep before the clock is read again, because it may be set, in seconds.
const LONGEST_SLEEP: u64 = 3600;
/// Longest wait after a failure, in seconds.
const LONGEST_RETRY: u64 = 60;
/// Longest name of a node (a DNS subdomain, RFC 1123), in bytes.
const MAX_NODE: usize = 253;

/// The CA.
pub struct Authority {
    store: Arc<dyn Store>,
    settings: Settings,
    keys: KeySource,
    clock: Clock,
    /// The stored state. Locked during a change.
    state: tokio::sync::Mutex<CaState>,
    /// The view of it, for readers.
    view: ArcSwap<CaView>,
    published: watch::Sender<Arc<Published>>,
    node_certificates: NodeCertificates,
    /// Wakes [`Authority::run`] when something becomes due at another time.
    changed: Notify,
}

/// Where signing keys come from.
enum KeySource {
    /// The CA makes roots.
    Own(RootSettings),
    Intermediate(Intermediate),
}

impl KeySource {
    fn intermediate(&self) -> Option<&Intermediate> {
        match self {
            Self::Own(_) => None,
            Self::Intermediate(intermediate) => Some(intermediate),
        }
    }
}

/// The source of the current time.
#[derive(Clone)]
pub(crate) struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Clock {
    pub(crate) fn new(now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    fn now(&self) -> u64 {
        unix_seconds((self.0)())
    }
}

impl Authority {
    /// Opens the CA of `store`, or creates one if there is none.
    pub async fn open(store: Arc<dyn Store>, settings: Settings) -> Result<Arc<Self>, UnusableCa> {
        Self::open_at(store, settings, Clock::new(SystemTime::now)).await
    }

    pub(crate) async fn open_at(
        store: Arc<dyn Store>,
        settings: Settings,
        clock: Clock,
    ) -> Result<Arc<Self>, UnusableCa> {
        let now = clock.now();
        check_settings(&settings)?;
        let keys = match &settings.root {
            Root::SelfSigned(roots) => KeySource::Own(*roots),
            Root::Intermediate(directory) => KeySource::Intermediate(
                Intermediate::load(directory, &settings.trust_domain, now)
                    .map_err(|errors| UnusableCa(errors.join("\n")))?,
            ),
        };
        let stored = store.load().await.map_err(|error| UnusableCa(error.0))?;
        let in_state = |what| UnusableCa(format!("the CA's state {what}"));
        let state = match stored {
            Stored::State(json) => CaState::from_json(&json, now).map_err(in_state)?,
            Stored::EmbeddedRoot(pem) => CaState::with_embedded_root(&pem)
                .map_err(|what| UnusableCa(format!("the embedded CA's root {what}")))?,
            Stored::Nothing => new_state(&settings, &keys, now)?,
        };
        let mut state = check_state(state, &settings, keys.intermediate())?;
        let made = state.make_jwt_keys();
        made.map_err(|error| UnusableCa(error.to_string()))?;
        // The lists are signed anew, so what is published changes.
        state.changed(now);
        Self::report_expired(&state.joins.expire(now));
        let view = CaView::new(&state, None, keys.intermediate(), now).map_err(UnusableCa)?;
        let written = store.replace(&state.to_json()).await;
        written.map_err(|error| UnusableCa(error.0))?;
        let authority = Self {
            store,
            settings,
            keys,
            clock,
            state: tokio::sync::Mutex::new(state),
            published: watch::Sender::new(view.published.clone()),
            view: ArcSwap::from_pointee(view),
            node_certificates: NodeCertificates::default(),
            changed: Notify::new(),
        };
        authority.write_published().await;
        if let Some(intermediate) = authority.keys.intermediate() {
            intermediate.warn_before_expiry(now);
        }
        Ok(Arc::new(authority))
    }

    /// Signs the key of `csr` (PKCS #10, DER; everything else in it is ignored) for `identity`. The certificate names
    /// `holder`, and is valid for `lifetime`, at most for the maximum; zero asks for the maximum, and less than ten seconds
    /// is refused.
    pub fn issue(
        &self,
        identity: &Identity,
        csr: &[u8],
        lifetime: Duration,
        holder: Holder<'_>,
    ) -> Result<Issued, Refusal> {
        self.check_trust_domain(identity)?;
        let lifetime = self.lifetime(lifetime)?;
        let view = self.view.load_full();
        view.check(identity, holder)?;
        let key =
            RequestedKey::from_csr(csr).map_err(|error| Refusal::Request(error.to_string()))?;
        key.check_names(identity.as_str())
            .map_err(|error| Refusal::Request(error.to_string()))?;
        if view.owns_key(&key.spki()) {
            return Err(Refusal::Request("the CSR's key is the CA's own".into()));
        }
        let now = self.clock.now();
        let signer = &view.signing;
        let leaf = signer.svid(identity, &key, Some(holder), lifetime, now)?;
        // The state may have changed meanwhile.
        let current = self.view.load();
        current.check(identity, holder)?;
        check_signing(&view, &current)?;
        Ok(Issued {
            chain: signer.chain(&leaf),
            roots: current.published.roots.clone(),
        })
    }

    /// Key and certificate for the CA's own server, for DNS names and IP addresses, and when to renew it: at half of its
    /// life, or when the roots change ([`Authority::published`]).
    pub fn server_certificate(
        &self,
        names: &[String],
    ) -> Result<(Arc<CertifiedKey>, SystemTime), Refusal> {
        let now = self.clock.now();
        let lifetime = self.settings.max_lifetime.as_secs();
        let view = self.view.load();
        let (key, leaf) = view.signing.server_certificate(names, lifetime, now)?;
        Ok((key, half_life(&leaf, now)))
    }

    /// Key and X.509-SVID for a server of the CA's own, with the SPIFFE ID `id`. Otherwise like
    /// [`Authority::server_certificate`].
    pub fn server_svid(&self, id: &SpiffeId) -> Result<(Arc<CertifiedKey>, SystemTime), Refusal> {
        let now = self.clock.now();
        let lifetime = self.settings.max_lifetime.as_secs();
        let view = self.view.load();
        let (key, leaf) = view.signing.server_svid(id.as_str(), lifetime, now)?;
        Ok((key, half_life(&leaf, now)))
    }

    /// The content of `certificate` (DER), if this CA issued it to a workload, and it is neither expired nor revoked.
    pub fn verify(&self, certificate: &[u8]) -> Result<Svid, String> {
        let svid = Svid::parse(certificate, &self.settings.trust_domain)
            .map_err(|error| error.to_string())?;
        let view = self.view.load();
        if !view.issued(certificate) {
            return Err(format!("{} was not issued by this CA", svid.serial));
        }
        if unix_seconds(svid.not_after) < self.clock.now() {
            return Err(format!("{} has expired", svid.serial));
        }
        let checked = view.published.revoked.check(&svid);
        checked.map_err(|revoked| revoked.to_string())?;
        Ok(svid)
    }

    /// Revokes `target`. If it is revoked already, that gets the new reason.
    pub async fn revoke(self: &Arc<Self>, target: Target, reason: Reason) -> Result<(), Refusal> {
        let wanted = target.clone();
        self.change(move |state, authority, now| {
            authority.add_revocation(state, wanted, reason, now)
        })
        .await?;
        tracing::warn!(%target, %reason, "revoked");
        Ok(())
    }

    /// Withdraws a revocation.
    pub async fn unrevoke(self: &Arc<Self>, target: Target) -> Result<(), Refusal> {
        let wanted = target.clone();
        self.change(move |state, _, _| {
            let revoked = &mut state.revoked;
            let found = match &wanted {
                Target::Serial(serial) => revoked.serials.remove(&Text(*serial)),
                Target::Identity(identity) => revoked.identities.remove(&Text(identity.clone())),
                Target::Node(node) => revoked.nodes.remove(node),
            };
            if found.is_none() {
                return Err(Refusal::State(format!(
                    "{wanted} itself is not revoked: `auth-daemon ca status` lists revocations"
                )));
            }
            Ok(())
        })
        .await?;
        tracing::warn!(%target, "revocation withdrawn");
        Ok(())
    }

    /// Starts to rotate the root. Returns the phase, for people.
    pub async fn rotate_root(self: &Arc<Self>) -> Result<String, Refusal> {
        self.change(|state, authority, now| {
            authority.start_rotation(state, now)?;
            Ok(state.rotation.to_string())
        })
        .await
    }

    /// What is published, and each change of it.
    pub fn published(&self) -> watch::Receiver<Arc<Published>> {
        self.published.subscribe()
    }

    /// The status of the CA.
    pub fn status(&self) -> AuthorityStatus {
        let view = self.view.load();
        let published = &view.published;
        let roots = published.roots.iter().enumerate();
        AuthorityStatus {
            trust_domain: self.settings.trust_domain.to_string(),
            phase: view.rotation.phase.name().into(),
            phase_ends: view.rotation.due().map(rfc3339),
            version: published.version,
            algorithm: view.signing.algorithm(),
            intermediate: self.keys.intermediate().is_some(),
            roots: roots
                .filter_map(|(index, root)| RootStatus::new(root, index == 0))
                .collect(),
            revoked: (&published.revoked).into(),
            join_tokens: view.joins.tokens().map(Into::into).collect(),
            joined_nodes: self.node_certificates.status(&view),
        }
    }

    /// Does what becomes due: the steps of a rotation, and new revocation lists before the old ones expire. Runs for
    /// ever.
    pub async fn run(self: &Arc<Self>) {
        let mut failures = 0_u32;
        loop {
            let wait = match self.do_due().await {
                Ok(due) => {
                    failures = 0;
                    due.saturating_sub(self.clock.now()).min(LONGEST_SLEEP)
                }
                Err(error) => {
                    failures += 1;
                    let wait = LONGEST_RETRY.min(1 << failures.min(6));
                    tracing::error!(%error, retry_in_seconds = wait, "CA state cannot be advanced");
                    wait
                }
            };
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(wait)) => {}
                () = self.changed.notified() => {}
            }
        }
    }

    /// Changes the state: the result of `change` is stored first, and takes effect then. Completes even if the caller
    /// stops waiting.
    async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        change: impl FnOnce(&mut CaState, &Self, u64) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let authority = self.clone();
        let task = tokio::spawn(async move {
            let mut state = authority.state.lock().await;
            let now = authority.clock.now();
            let mut next = state.clone();
            // First, so that an expired token blocks nothing.
            let expired = next.joins.expire(now);
            let answer = change(&mut next, &authority, now)?;
            next.changed(now);
            let previous = authority.view.load_full();
            let view = CaView::new(&next, Some(&previous), authority.keys.intermediate(), now)
                .map_err(Refusal::State)?;
            authority.store.replace(&next.to_json()).await?;
            *state = next;
            Self::report_expired(&expired);
            let published = view.published.clone();
            authority.view.store(Arc::new(view));
            authority.published.send_replace(published);
            authority.write_published().await;
            authority.changed.notify_one();
            Ok(answer)
        });
        task.await
            .unwrap_or_else(|error| Err(Refusal::State(format!("the change failed: {error}"))))
    }

    async fn write_published(&self) {
        let published = self.published.borrow().clone();
        let written = self.store.publish(&published.roots, &published.crls).await;
        if let Err(error) = written {
            tracing::warn!(%error, "published roots and revocation lists cannot be written");
        }
    }

    fn lifetime(&self, wanted: Duration) -> Result<u64, Refusal> {
        let most = self.settings.max_lifetime;
        if wanted.is_zero() {
            return Ok(most.as_secs());
        }
        if wanted < MIN_LIFETIME {
            return Err(Refusal::Request(format!(
                "a lifetime of {wanted:?} is asked for; the shortest is {MIN_LIFETIME:?}"
            )));
        }
        Ok(wanted.min(most).as_secs())
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

    fn add_revocation(
        &self,
        state: &mut CaState,
        target: Target,
        reason: Reason,
        now: u64,
    ) -> Result<(), Refusal> {
        let new = Revocation { reason, at: now };
        let revoked = &mut state.revoked;
        let entry = match &target {
            Target::Serial(serial) => {
                if self.view.load().owns_serial(*serial) {
                    return Err(Refusal::Request(
                        "this is the serial number of the CA's own certificate: rotate the root instead".into(),
                    ));
                }
                revoked.serials.entry(Text(*serial)).or_insert(new)
            }
            Target::Identity(identity) => {
                self.check_trust_domain(identity)?;
                let identities = revoked.identities.entry(Text(identity.clone()));
                identities.or_insert(new)
            }
            Target::Node(node) => {
                if node.is_empty() || node.len() > MAX_NODE || node.chars().any(char::is_control) {
                    return Err(Refusal::Request(format!("{node:.64?} is not a node name")));
                }
                // Its machine cannot return with its key, not even after the revocation is withdrawn.
                state.joins.forget(node);
                revoked.nodes.entry(node.clone()).or_insert(new)
            }
        };
        entry.reason = reason;
        Ok(())
    }

    fn start_rotation(&self, state: &mut CaState, now: u64) -> Result<(), Refusal> {
        let KeySource::Own(roots) = &self.keys else {
            return Err(Refusal::State(
                "the CA signs as an intermediate (pluggedIn): add the new root to root-cert.pem and restart, then \
                 replace ca-cert.pem, ca-key.pem and cert-chain.pem and restart, then remove the old root"
                    .into(),
            ));
        };
        let rotation = state.rotation;
        let in_progress = || {
            Refusal::State(format!(
                "a rotation is in progress ({}): wait until `auth-daemon ca status` shows steady",
                rotation
            ))
        };
        if rotation.phase != Phase::Steady {
            return Err(in_progress());
        }
        let root = signer::make_root(&self.settings.trust_domain, roots, now)?;
        let end = self.view.load().signing.life().end;
        let lifetime = self.settings.max_lifetime.as_secs();
        let next = state.add_signer(StoredSigner::root(&root, lifetime));
        state.make_jwt_keys()?;
        state.rotation = rotation
            .start(next, now, roots.spread.as_secs(), end)
            .ok_or_else(in_progress)?;
        tracing::info!(root = next, "new root published; it does not sign yet");
        Ok(())
    }

    /// Does what is due now; returns when the next thing is due.
    async fn do_due(self: &Arc<Self>) -> Result<u64, Refusal> {
        loop {
            let now = self.clock.now();
            let view = self.view.load_full();
            let others = [
                view.rotation.due(),
                self.rotation_starts(&view),
                view.joins.expiry(),
            ];
            let due = others.into_iter().flatten().fold(view.lists_due, u64::min);
            if due > now {
                return Ok(due);
            }
            if let Some(intermediate) = self.keys.intermediate() {
                intermediate.warn_before_expiry(now);
            }
            self.change(move |state, authority, now| {
                if let Some(next) = state.rotation.step(now, state.longest_lifetime()) {
                    state.rotate(next);
                    tracing::info!(phase = %next, "root rotation advanced");
                } else if authority
                    .rotation_starts(&authority.view.load())
                    .is_some_and(|due| due <= now)
                {
                    tracing::info!("root expires soon and is replaced");
                    authority.start_rotation(state, now)?;
                }
                Ok(())
            })
            .await?;
        }
    }

    /// When a rotation starts automatically; `None` during a rotation, and for an intermediate.
    fn rotation_starts(&self, view: &CaView) -> Option<u64> {
        match &self.keys {
            KeySource::Own(roots) if view.rotation.phase == Phase::Steady => {
                let (spread, lifetime) = (roots.spread, self.settings.max_lifetime);
                let life = view.signing.life();
                let starts = rotation::starts_by_itself(life, spread.as_secs(), lifetime.as_secs());
                Some(starts)
            }
            _ => None,
        }
    }
}

/// Fails if another root signs in `current` than in `view`: one that stopped signing is only needed for what it signed
/// before.
fn check_signing(view: &CaView, current: &CaView) -> Result<(), Refusal> {
    if current.rotation.signing == view.rotation.signing {
        return Ok(());
    }
    Err(Refusal::State(
        "the root was replaced while this was signed: retry".into(),
    ))
}

/// Refuses settings that cannot work, with all errors.
fn check_settings(settings: &Settings) -> Result<(), UnusableCa> {
    let mut errors = Vec::new();
    let longest = settings.max_lifetime;
    if longest < MIN_LIFETIME {
        errors.push(format!(
            "the longest lifetime of a certificate is {longest:?}; it is at least {MIN_LIFETIME:?}"
        ));
    }
    if let Root::SelfSigned(RootSettings {
        lifetime, spread, ..
    }) = &settings.root
    {
        let least = 2 * rotation::least_left(spread.as_secs(), longest.as_secs());
        if lifetime.as_secs() < least {
            errors.push(format!(
                "a root's lifetime of {lifetime:?} is too short to replace it in time: with certificates of \
                 {longest:?} and a spread of {spread:?} it is at least {least} s"
            ));
        }
    }
    if errors.is_empty() {
        return Ok(());
    }
    Err(UnusableCa(errors.join("\n")))
}

/// When half of the life of a certificate that is issued `now` is over.
fn half_life(leaf: &Leaf, now: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(now + (leaf.not_after - now) / 2)
}

fn new_state(settings: &Settings, keys: &KeySource, now: u64) -> Result<CaState, UnusableCa> {
    let (domain, longest) = (&settings.trust_domain, settings.max_lifetime.as_secs());
    let signer = match keys {
        KeySource::Intermediate(intermediate) => {
            StoredSigner::intermediate(&intermediate.signer, longest)
        }
        KeySource::Own(roots) => {
            let root = signer::make_root(domain, roots, now)
                .map_err(|error| UnusableCa(error.to_string()))?;
            StoredSigner::root(&root, longest)
        }
    };
    Ok(CaState::new(domain, signer))
}

/// Checks that the stored state belongs to these settings, and makes the configured intermediate the signer.
fn check_state(
    mut state: CaState,
    settings: &Settings,
    intermediate: Option<&Intermediate>,
) -> Result<CaState, UnusableCa> {
    if state.trust_domain != settings.trust_domain {
        return Err(UnusableCa(format!(
            "the CA's state is of trust domain {}, but trustDomain is {}: each needs a place of its own",
            state.trust_domain, settings.trust_domain
        )));
    }
    let longest = settings.max_lifetime.as_secs();
    for signer in state.signers.values_mut() {
        signer.max_lifetime = signer.max_lifetime.max(longest);
    }
    let own_root = state.signers.values().any(|signer| signer.key.is_some());
    match (own_root, intermediate) {
        (true, Some(_)) => Err(UnusableCa(
            "the CA's state has a root of its own, but an intermediate (pluggedIn) is configured: use a new place for \
             the state, and keep the old root beside the new one in root-cert.pem until its last certificate has expired"
                .into(),
        )),
        (false, None) => Err(UnusableCa(
            "the CA's state is of an intermediate (pluggedIn), but none is configured: configure it, or use a new \
             place for the state"
                .into(),
        )),
        (true, None) => Ok(state),
        (false, Some(intermediate)) => {
            let certificate = intermediate.signer.certificate();
            let before = &state.signers[&state.rotation.signing];
            if before.certificate != *certificate {
                let mut signer = StoredSigner::intermediate(&intermediate.signer, longest);
                // A new key would sign before all recipients know it.
                signer.jwt_key.clone_from(&before.jwt_key);
                let number = state.add_signer(signer);
                state.rotate(Rotation::steady(number));
                tracing::info!("another intermediate is configured");
            }
            Ok(state)
        }
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
            Self::Serial(serial) => write!(f, "certificate {serial}"),
            Self::Identity(identity) => write!(f, "{identity}"),
            Self::Node(node) => write!(f, "node {node}"),
        }
    }
}

#[cfg(test)]
mod tests;
