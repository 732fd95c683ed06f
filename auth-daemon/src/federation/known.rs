//! What is known of the foreign trust domains: their bundles, and whether these are current.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use serde::Serialize;
use tokio::{sync::watch, task::AbortHandle};

use super::sources;
use crate::config::{BundleSource, Federation};
use auth_federation::Bundle;
use auth_mesh::TrustDomain;
use auth_tunnel::tls::{
    rfc3339,
    trust::{ForeignBundles, TrustBundle, TrustStore},
    unix_seconds,
};

/// The foreign trust domains of the `federation` list. Publishes their bundles to the trust store.
#[derive(Debug)]
pub struct Federated {
    pub(super) trust: Arc<TrustStore>,
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    /// By the name of the trust domain.
    domains: BTreeMap<String, Domain>,
    entries: u64,
}

#[derive(Debug)]
struct Domain {
    /// Distinguishes an entry from an earlier one for the same trust domain.
    entry: u64,
    trust_domain: TrustDomain,
    source: BundleSource,
    bundle: Option<Bundle>,
    /// When the bundle was last known to be current.
    refreshed: Option<SystemTime>,
    /// Why it is not current, if so.
    error: Option<String>,
    failures: u64,
    task: AbortHandle,
}

impl Drop for Domain {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A foreign trust domain, as the daemon's status has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DomainStatus {
    /// Name of the trust domain.
    pub trust_domain: String,
    /// The URL or file of the bundle.
    pub source: String,
    /// Number of its trusted roots.
    pub roots: usize,
    /// The bundle's sequence number.
    pub sequence: Option<u64>,
    /// When the bundle was last known to be current, as RFC 3339 has it.
    pub refreshed: Option<String>,
    /// The same in seconds since the Unix epoch, 0 if never.
    #[serde(skip)]
    pub refreshed_at: u64,
    /// Why the bundle is not current.
    pub error: Option<String>,
    /// How often the bundle could not be read or fetched.
    pub failures: u64,
}

impl Federated {
    /// Knows no foreign trust domain yet. Publishes bundles to `trust`.
    pub fn new(trust: Arc<TrustStore>) -> Self {
        Self {
            trust,
            state: Mutex::default(),
            changed: watch::Sender::default(),
        }
    }

    /// Replaces the list of foreign trust domains. Those that are not in `wanted` are not trusted any more when this returns.
    /// Must be called within a tokio runtime, where the sources are followed.
    pub fn apply(self: &Arc<Self>, wanted: &Federation) {
        let mut state = self.lock();
        let State { domains, entries } = &mut *state;
        let mut removed = Vec::new();
        domains.retain(|name, known| {
            let stays = wanted.domains().iter().any(|domain| {
                domain.trust_domain == known.trust_domain && domain.source == known.source
            });
            if !stays {
                removed.push(name.clone());
            }
            stays
        });
        for domain in wanted.domains() {
            let name = domain.trust_domain.to_string();
            domains.entry(name.clone()).or_insert_with(|| {
                *entries += 1;
                tracing::info!(trust_domain = name, source = %domain.source, "federation entry added");
                let (entry, source) = (*entries, domain.source.clone());
                let follow = sources::follow(self.clone(), name, entry, source.clone());
                Domain {
                    entry,
                    trust_domain: domain.trust_domain.clone(),
                    source,
                    bundle: None,
                    refreshed: None,
                    error: None,
                    failures: 0,
                    task: tokio::spawn(follow).abort_handle(),
                }
            });
        }
        self.publish(&state);
        for trust_domain in removed {
            tracing::info!(trust_domain, "federation entry removed");
        }
        self.changed.send_replace(());
    }

    /// Returns a receiver that sees each [`Self::apply`].
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Reports whether the list has an entry for a trust domain.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.lock().domains.contains_key(name)
    }

    /// Takes the bundle of a trust domain from its source, if `entry` is still in the list. An older bundle than the one that is
    /// known is refused.
    pub(super) fn take(&self, name: &str, entry: u64, bundle: Bundle) -> Result<(), String> {
        let mut state = self.lock();
        let Some(domain) = find(&mut state, name, entry) else {
            return Ok(());
        };
        if let Some(known) = &domain.bundle {
            check_order(known, &bundle)?;
        }
        let is_new = domain.bundle.as_ref().is_none_or(|known| {
            (&known.roots, &known.jwt_keys) != (&bundle.roots, &bundle.jwt_keys)
        });
        let (roots, jwt_keys) = (bundle.roots.len(), bundle.jwt_keys.len());
        let sequence = bundle.sequence;
        domain.bundle = Some(bundle);
        domain.refreshed = Some(SystemTime::now());
        domain.error = None;
        self.publish(&state);
        if is_new {
            tracing::info!(
                trust_domain = name,
                roots,
                jwt_keys,
                sequence,
                "bundle of a foreign trust domain updated"
            );
        }
        Ok(())
    }

    /// Notes that the source still has the bundle that was taken from it.
    pub(super) fn confirm(&self, name: &str, entry: u64) {
        let mut state = self.lock();
        if let Some(domain) = find(&mut state, name, entry) {
            domain.refreshed = Some(SystemTime::now());
        }
    }

    /// Notes why the source has no bundle. Returns whether the reason is another one than before.
    pub(super) fn failed(&self, name: &str, entry: u64, why: &str) -> bool {
        let mut state = self.lock();
        let Some(domain) = find(&mut state, name, entry) else {
            return false;
        };
        domain.failures += 1;
        domain.error.replace(why.to_owned()).as_deref() != Some(why)
    }

    /// Withdraws all trust in a trust domain, because its source is gone.
    pub(super) fn withdraw(&self, name: &str, entry: u64) {
        let mut state = self.lock();
        if let Some(domain) = find(&mut state, name, entry) {
            domain.bundle = None;
            self.publish(&state);
        }
    }

    /// All foreign trust domains, in order.
    pub fn list(&self) -> Vec<DomainStatus> {
        let state = self.lock();
        let shown = state.domains.iter().map(|(name, domain)| {
            let refreshed_at = domain.refreshed.map(unix_seconds);
            DomainStatus {
                trust_domain: name.clone(),
                source: domain.source.to_string(),
                roots: domain
                    .bundle
                    .as_ref()
                    .map_or(0, |bundle| bundle.roots.len()),
                sequence: domain.bundle.as_ref().and_then(|bundle| bundle.sequence),
                refreshed: refreshed_at.map(rfc3339),
                refreshed_at: refreshed_at.unwrap_or(0),
                error: domain.error.clone(),
                failures: domain.failures,
            }
        });
        shown.collect()
    }

    #[cfg(test)]
    pub(super) fn refreshed(&self, name: &str) -> Option<SystemTime> {
        self.lock().domains[name].refreshed
    }

    fn publish(&self, state: &State) {
        let mut bundles = ForeignBundles::default();
        for domain in state.domains.values() {
            if let Some(bundle) = &domain.bundle {
                bundles.insert(TrustBundle {
                    trust_domain: domain.trust_domain.clone(),
                    roots: bundle.roots.clone(),
                    jwt_keys: bundle.jwt_keys.clone(),
                });
            }
        }
        if *self.trust.foreign() != bundles {
            self.trust.publish_foreign(bundles);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn find<'a>(state: &'a mut State, name: &str, entry: u64) -> Option<&'a mut Domain> {
    let domain = state.domains.get_mut(name)?;
    (domain.entry == entry).then_some(domain)
}

/// An endpoint that has lost state, or an attacker who replays an old answer, must not bring back roots.
fn check_order(known: &Bundle, new: &Bundle) -> Result<(), String> {
    match (known.sequence, new.sequence) {
        (Some(old), Some(new)) if new < old => Err(format!(
            "the bundle has the sequence number {new}, and had {old} before: was its publisher restored from a backup? The \
             known bundle stays in force until the number is larger, or this daemon is restarted"
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use auth_tunnel::tls::trust::Trust;
    use rustls::pki_types::CertificateDer;

    use super::*;
    use crate::config::ForeignDomain;

    fn federated() -> Arc<Federated> {
        let own = TrustBundle::of_roots("own.example".parse().unwrap(), vec![]);
        let trust = TrustStore::new(Trust::fixed(own));
        Arc::new(Federated::new(Arc::new(trust)))
    }

    fn list(names: &[(&str, &str)]) -> Federation {
        let domains = names.iter().map(|(name, file)| ForeignDomain {
            trust_domain: name.parse().unwrap(),
            source: BundleSource::File((*file).into()),
        });
        Federation::new(domains.collect())
    }

    fn bundle(sequence: u64, root: u8) -> Bundle {
        Bundle {
            sequence: Some(sequence),
            roots: vec![CertificateDer::from(vec![root])],
            ..Bundle::default()
        }
    }

    fn trusted(federated: &Federated) -> Vec<(String, Vec<u8>)> {
        let bundles = federated.trust.foreign();
        let all = bundles.iter();
        all.map(|(name, roots)| {
            (
                name.to_owned(),
                roots.iter().flat_map(|root| root.to_vec()).collect(),
            )
        })
        .collect()
    }

    #[tokio::test]
    async fn trusts_what_is_in_the_list_and_nothing_else() {
        let federated = federated();
        federated.apply(&list(&[("a", "/a"), ("b", "/b")]));
        assert_eq!(trusted(&federated), [], "no bundle yet");
        assert!(federated.has("b") && !federated.has("c"));
        federated.take("a", 1, bundle(1, 7)).unwrap();
        federated.take("b", 2, bundle(1, 8)).unwrap();
        federated.take("c", 3, bundle(1, 9)).unwrap();
        assert_eq!(
            trusted(&federated),
            [("a".into(), vec![7]), ("b".into(), vec![8])]
        );
        federated.apply(&list(&[("a", "/a"), ("b", "/other")]));
        assert_eq!(
            trusted(&federated),
            [("a".into(), vec![7])],
            "another source"
        );
        federated.take("b", 2, bundle(5, 6)).unwrap();
        assert_eq!(trusted(&federated).len(), 1, "of the source before");
        federated.withdraw("a", 1);
        assert_eq!(trusted(&federated), []);
        federated.take("a", 1, bundle(2, 7)).unwrap();
        let changes = federated.changes();
        federated.apply(&list(&[]));
        assert_eq!((trusted(&federated), federated.list()), (vec![], vec![]));
        assert!(changes.has_changed().unwrap() && !federated.has("a"));
    }

    #[tokio::test]
    async fn an_older_bundle_or_a_failure_changes_nothing() {
        let federated = federated();
        federated.apply(&list(&[("a", "/a")]));
        federated.take("a", 1, bundle(4, 7)).unwrap();
        let why = federated.take("a", 1, bundle(3, 8)).unwrap_err();
        assert!(why.contains("sequence number 3, and had 4 before"), "{why}");
        assert!(federated.failed("a", 1, &why));
        assert!(!federated.failed("a", 1, &why), "the same reason");
        assert_eq!(trusted(&federated), [("a".into(), vec![7])]);
        let [status] = &federated.list()[..] else {
            panic!("one");
        };
        assert_eq!(
            (status.sequence, status.failures, status.roots),
            (Some(4), 2, 1)
        );
        assert_eq!(status.error.as_ref(), Some(&why));
        let mut empty = bundle(4, 0);
        empty.roots.clear();
        federated.take("a", 1, empty).unwrap();
        assert_eq!(trusted(&federated), [], "all keys are withdrawn");
        assert_eq!(federated.list()[0].error, None);
    }
}
