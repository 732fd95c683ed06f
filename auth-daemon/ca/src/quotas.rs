//! Quotas of callers, so that one node cannot take the CA from the others. They count what each node asks for, what each
//! identity on a node gets, and the failed attempts of each address. What is counted is known to exist (an attested node,
//! an identity that runs there), and is forgotten once it no longer affects a decision.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use auth_mesh::Identity;
use governor::{
    Quota as GovernorQuota, RateLimiter,
    clock::{Clock, DefaultClock},
    state::keyed::HashMapStateStore,
};

use crate::{attest::Caller, status::NodeQuotaStatus};

/// For how long an identity counts as one of its node's distinct identities.
const WINDOW: Duration = Duration::from_secs(3600);
/// How often expired counts are forgotten: not more often, because that reads the counts of every caller.
const SWEEP: Duration = Duration::from_secs(60);
/// Lines of the audit log per minute about one caller that is over its quota, or about an unknown one.
const REPORTS: NonZeroU32 = NonZeroU32::new(6).unwrap();
/// Least retry time, so that a caller does not come back for one request at a time.
const LEAST_RETRY: Duration = Duration::from_secs(1);
/// Most addresses whose failures are counted.
const MAX_SOURCES: usize = 16_384;
/// Most nodes in the status.
const MAX_LISTED: usize = 10;

/// The quotas.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests of one node.
    pub node: Rate,
    /// Requests of one node in progress.
    pub concurrent: usize,
    /// Certificates and JWT-SVIDs of one identity on one node.
    pub identity: Rate,
    /// Distinct identities of one node in an hour.
    pub identities: usize,
    /// Failed attestations from one source that are answered at once.
    pub failures: Rate,
}

/// A rate of requests.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// Requests at once.
    pub burst: NonZeroU32,
    /// Requests per second in the long run.
    pub per_second: NonZeroU32,
}

impl Rate {
    /// `burst` requests at once, and `per_second` in the long run. Zero counts as one.
    pub fn new(burst: u32, per_second: u32) -> Self {
        let positive = |number| NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN);
        Self {
            burst: positive(burst),
            per_second: positive(per_second),
        }
    }
}

impl Default for Limits {
    /// Enough for a node that starts with several hundred service accounts, and for certificates of ten seconds.
    fn default() -> Self {
        Self {
            node: Rate::new(1000, 50),
            concurrent: 128,
            identity: Rate::new(30, 2),
            identities: 1024,
            failures: Rate::new(30, 2),
        }
    }
}

/// One of the [`Limits`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Quota {
    NodeRate,
    NodeConcurrent,
    NodeIdentities,
    IdentityRate,
}

impl Quota {
    pub(crate) const ALL: [Self; 4] = [
        Self::NodeRate,
        Self::NodeConcurrent,
        Self::NodeIdentities,
        Self::IdentityRate,
    ];

    /// The name in metrics and the status.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::NodeRate => "nodeRate",
            Self::NodeConcurrent => "nodeConcurrent",
            Self::NodeIdentities => "nodeIdentities",
            Self::IdentityRate => "identityRate",
        }
    }
}

/// A quota is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exceeded {
    pub(crate) quota: Quota,
    /// When to try again.
    pub(crate) retry: Duration,
    limit: u64,
}

impl fmt::Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { limit, retry, .. } = self;
        let what = match self.quota {
            Quota::NodeRate => "requests per second of one node",
            Quota::NodeConcurrent => "requests of one node in progress",
            Quota::NodeIdentities => "distinct identities of one node in an hour",
            Quota::IdentityRate => {
                "certificates and JWT-SVIDs per second of one identity on one node"
            }
        };
        let seconds = retry.as_secs_f64().ceil();
        write!(
            f,
            "the quota of {limit} {what} is used up; retry in {seconds} s"
        )
    }
}

type Keyed<K> = RateLimiter<K, HashMapStateStore<K>, DefaultClock>;

/// What callers have used of their quotas.
#[derive(Debug)]
pub(crate) struct Quotas {
    limits: Limits,
    requests: Keyed<String>,
    certificates: Keyed<(String, Identity)>,
    failures: Keyed<String>,
    reports: Keyed<String>,
    nodes: Mutex<Nodes>,
}

#[derive(Debug)]
struct Nodes {
    by_name: HashMap<String, Node>,
    /// The nodes of `by_name` by the address of their daemon.
    by_address: HashMap<IpAddr, Arc<str>>,
    swept: Instant,
}

/// What one node has used.
#[derive(Debug)]
struct Node {
    /// Where its daemon called from last.
    address: Option<IpAddr>,
    in_progress: usize,
    identities: HashSet<Identity>,
    /// When counting `identities` and `refused` began.
    since: Instant,
    refused: u64,
}

/// A request in progress, until it is dropped.
#[derive(Debug)]
pub(crate) struct InProgress {
    quotas: Arc<Quotas>,
    node: String,
}

impl Quotas {
    pub(crate) fn new(limits: Limits) -> Self {
        let keyed = |rate: Rate| GovernorQuota::per_second(rate.per_second).allow_burst(rate.burst);
        Self {
            limits,
            requests: RateLimiter::hashmap(keyed(limits.node)),
            certificates: RateLimiter::hashmap(keyed(limits.identity)),
            failures: RateLimiter::hashmap(keyed(limits.failures)),
            reports: RateLimiter::hashmap(GovernorQuota::per_minute(REPORTS)),
            nodes: Mutex::new(Nodes {
                by_name: HashMap::new(),
                by_address: HashMap::new(),
                swept: Instant::now(),
            }),
        }
    }

    /// Counts a request of `node`, a name that was attested.
    pub(crate) fn request(self: &Arc<Self>, node: &str) -> Result<InProgress, Exceeded> {
        let most = self.limits.concurrent;
        self.forget_if_due();
        let mut nodes = self.lock();
        let used = nodes.of(node);
        if used.in_progress >= most {
            return Err(used.exceed(Quota::NodeConcurrent, LEAST_RETRY, most as u64));
        }
        let name = node.to_owned();
        if let Err(until) = self.requests.check_key(&name) {
            let wait = until.wait_time_from(DefaultClock::default().now());
            let limit = self.limits.node.per_second.get().into();
            return Err(used.exceed(Quota::NodeRate, wait, limit));
        }
        used.in_progress += 1;
        Ok(InProgress {
            quotas: self.clone(),
            node: name,
        })
    }

    /// The daemon of `node` was attested, and calls from `address`.
    pub(crate) fn attested(&self, node: &str, address: IpAddr) {
        let nodes = &mut *self.lock();
        let before = nodes.of(node).address.replace(address);
        let is_at = |known: &Nodes, address: &IpAddr| {
            let found = known.by_address.get(address);
            found.is_some_and(|known| **known == *node)
        };
        if is_at(nodes, &address) {
            return;
        }
        if let Some(before) = before.filter(|before| is_at(nodes, before)) {
            nodes.by_address.remove(&before);
        }
        nodes.by_address.insert(address, node.into());
    }

    /// The node whose daemon called from `address` last.
    pub(crate) fn node_at(&self, address: IpAddr) -> Option<Arc<str>> {
        self.lock().by_address.get(&address).cloned()
    }

    /// Counts a certificate of `identity`, which runs on `node`.
    pub(crate) fn certificate(&self, node: &str, identity: &Identity) -> Result<(), Exceeded> {
        let most = self.limits.identities;
        let mut nodes = self.lock();
        let used = nodes.of(node);
        if !used.identities.contains(identity) && used.identities.len() >= most {
            let rest = WINDOW.saturating_sub(used.since.elapsed());
            return Err(used.exceed(Quota::NodeIdentities, rest, most as u64));
        }
        let key = (node.to_owned(), identity.clone());
        if let Err(until) = self.certificates.check_key(&key) {
            let wait = until.wait_time_from(DefaultClock::default().now());
            let limit = self.limits.identity.per_second.get().into();
            return Err(used.exceed(Quota::IdentityRate, wait, limit));
        }
        used.identities.insert(key.1);
        Ok(())
    }

    /// Counts a failed attestation from `source`. Returns whether it may be answered at once.
    pub(crate) fn failure(&self, source: &str) -> bool {
        self.check_bounded(&self.failures, source)
    }

    /// Whether to log a refusal of `caller`: a node over its quota, or a source whose caller is not known.
    pub(crate) fn report(&self, caller: &str) -> bool {
        self.check_bounded(&self.reports, caller)
    }

    /// The nodes that were refused most, then those with most identities.
    pub(crate) fn status(&self) -> Vec<NodeQuotaStatus> {
        let nodes = self.lock();
        let mut list: Vec<_> = nodes
            .by_name
            .iter()
            .map(|(name, node)| NodeQuotaStatus {
                node: name.clone(),
                in_progress: node.in_progress,
                identities: node.identities.len(),
                refused: node.refused,
            })
            .collect();
        list.sort_by(|a, b| {
            let by_use = (b.refused, b.identities).cmp(&(a.refused, a.identities));
            by_use.then_with(|| a.node.cmp(&b.node))
        });
        list.truncate(MAX_LISTED);
        list
    }

    /// Checks `key`, which anybody can choose. While too many are counted, others have no quota.
    fn check_bounded(&self, rates: &Keyed<String>, key: &str) -> bool {
        self.forget_if_due();
        rates.len() < MAX_SOURCES && rates.check_key(&key.to_owned()).is_ok()
    }

    fn forget_if_due(&self) {
        let due = self.lock().swept.elapsed() >= SWEEP;
        if due {
            self.forget(Instant::now());
        }
    }

    /// Forgets what no longer affects a decision at `now`: full quotas, and nodes whose window has ended.
    fn forget(&self, now: Instant) {
        let nodes = &mut *self.lock();
        nodes.swept = now;
        let counts = |node: &Node| node.in_progress > 0 || now.duration_since(node.since) < WINDOW;
        nodes.by_name.retain(|_, node| counts(node));
        let (names, addresses) = (&nodes.by_name, &mut nodes.by_address);
        addresses.retain(|_, node| names.contains_key(&**node));
        self.requests.retain_recent();
        self.certificates.retain_recent();
        self.failures.retain_recent();
        self.reports.retain_recent();
    }

    fn lock(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last refusal on a connection because its node was over its rate. Until the retry time, the rate would refuse the
/// same credentials again, so they need no attestation.
#[derive(Debug, Default)]
pub(crate) struct OverRate {
    hasher: RandomState,
    refused: Mutex<Option<RefusedCaller>>,
}

#[derive(Debug)]
struct RefusedCaller {
    credentials: u64,
    caller: Caller,
    exceeded: Exceeded,
    until: Instant,
}

impl OverRate {
    /// `caller`, who has shown `credentials`, has `exceeded` a quota.
    pub(crate) fn note(&self, credentials: &[u8], caller: &Caller, exceeded: Exceeded) {
        if exceeded.quota == Quota::NodeRate {
            *self.lock() = Some(RefusedCaller {
                credentials: self.hasher.hash_one(credentials),
                caller: caller.clone(),
                exceeded,
                until: Instant::now() + exceeded.retry,
            });
        }
    }

    /// The refusal of the caller with these credentials, if it still holds.
    pub(crate) fn still(&self, credentials: &[u8]) -> Option<(Caller, Exceeded)> {
        let refused = self.lock();
        let now = Instant::now();
        let found = refused.as_ref().filter(|found| {
            found.until > now && found.credentials == self.hasher.hash_one(credentials)
        })?;
        let exceeded = Exceeded {
            retry: found.until.duration_since(now).max(LEAST_RETRY),
            ..found.exceeded
        };
        Some((found.caller.clone(), exceeded))
    }

    fn lock(&self) -> MutexGuard<'_, Option<RefusedCaller>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Nodes {
    fn of(&mut self, node: &str) -> &mut Node {
        let used = self.by_name.entry(node.to_owned()).or_insert_with(|| Node {
            address: None,
            in_progress: 0,
            identities: HashSet::new(),
            since: Instant::now(),
            refused: 0,
        });
        if used.since.elapsed() >= WINDOW {
            used.identities.clear();
            used.refused = 0;
            used.since = Instant::now();
        }
        used
    }
}

impl Node {
    fn exceed(&mut self, quota: Quota, wait: Duration, limit: u64) -> Exceeded {
        self.refused += 1;
        Exceeded {
            quota,
            retry: wait.max(LEAST_RETRY),
            limit,
        }
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        if let Some(node) = self.quotas.lock().by_name.get_mut(&self.node) {
            node.in_progress -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn quotas(change: impl FnOnce(&mut Limits)) -> Arc<Quotas> {
        let mut limits = Limits::default();
        change(&mut limits);
        Arc::new(Quotas::new(limits))
    }

    fn identity(number: usize) -> Identity {
        format!("spiffe://cluster.local/ns/default/sa/a{number}")
            .parse()
            .unwrap()
    }

    #[test]
    fn a_node_has_its_own_rate_and_concurrency() {
        let quotas = quotas(|limits| {
            limits.node = Rate::new(3, 1);
            limits.concurrent = 2;
        });
        let held = [quotas.request("a").unwrap(), quotas.request("a").unwrap()];
        let exceeded = quotas.request("a").unwrap_err();
        assert_eq!(exceeded.quota, Quota::NodeConcurrent);
        drop(held);
        quotas.request("a").unwrap();
        let exceeded = quotas.request("a").unwrap_err();
        assert_eq!(exceeded.quota, Quota::NodeRate);
        assert!(exceeded.retry >= LEAST_RETRY && exceeded.retry < 2 * LEAST_RETRY);
        quotas.request("b").unwrap();
        let status = quotas.status();
        assert_eq!((&*status[0].node, status[0].refused), ("a", 2));
        assert_eq!(status[0].in_progress, 0);
    }

    #[test]
    fn limits_the_certificates_of_an_identity_on_one_node_only() {
        let quotas = quotas(|limits| limits.identity = Rate::new(2, 1));
        for _ in 0..2 {
            quotas.certificate("a", &identity(0)).unwrap();
        }
        let exceeded = quotas.certificate("a", &identity(0)).unwrap_err();
        assert_eq!(exceeded.quota, Quota::IdentityRate);
        quotas.certificate("a", &identity(1)).unwrap();
        quotas.certificate("b", &identity(0)).unwrap();
    }

    #[test]
    fn limits_the_distinct_identities_of_a_node() {
        let quotas = quotas(|limits| limits.identities = 2);
        for number in [0, 1, 0, 1] {
            quotas.certificate("a", &identity(number)).unwrap();
        }
        let exceeded = quotas.certificate("a", &identity(2)).unwrap_err();
        assert_eq!(exceeded.quota, Quota::NodeIdentities);
        assert!(exceeded.retry > WINDOW - Duration::from_secs(60));
        quotas.certificate("b", &identity(2)).unwrap();
        quotas.certificate("a", &identity(0)).unwrap();
    }

    #[test]
    fn remembers_credentials_over_their_rate_until_the_retry_time() {
        let caller = Caller::Node { node: "a".into() };
        let exceeded = |quota, retry| Exceeded {
            quota,
            retry,
            limit: 1,
        };
        let over = OverRate::default();
        // Another identity of the node may be below its quota.
        over.note(b"a", &caller, exceeded(Quota::IdentityRate, WINDOW));
        assert_eq!(over.still(b"a"), None);
        over.note(b"a", &caller, exceeded(Quota::NodeRate, WINDOW));
        let (remembered, quota) = over.still(b"a").unwrap();
        assert_eq!((remembered, quota.quota), (caller.clone(), Quota::NodeRate));
        assert_eq!(over.still(b"b"), None);
        over.note(b"a", &caller, exceeded(Quota::NodeRate, Duration::ZERO));
        assert_eq!(over.still(b"a"), None, "the retry time has come");
    }

    #[test]
    fn reports_a_flood_in_a_few_lines() {
        let quotas = quotas(|_| {});
        let reports = (0..1000).filter(|_| quotas.report("a"));
        assert_eq!(reports.count(), REPORTS.get() as usize);
        assert!(quotas.report("b"));
    }

    #[test]
    fn forgets_what_no_longer_counts() {
        // Full again after a microsecond.
        let fast = Rate::new(1, 1_000_000);
        let quotas = quotas(|limits| {
            (limits.node, limits.identity, limits.failures) = (fast, fast, fast);
        });
        for number in 0..5000 {
            let node = format!("node-{number}");
            quotas.request(&node).unwrap();
            quotas.certificate(&node, &identity(number)).unwrap();
            quotas.attested(&node, Ipv4Addr::from_bits(number as u32).into());
            quotas.failure(&node);
        }
        quotas.forget(Instant::now() + WINDOW);
        let nodes = quotas.lock();
        assert!(nodes.by_name.is_empty() && nodes.by_address.is_empty());
        let left = quotas.requests.len() + quotas.certificates.len() + quotas.failures.len();
        assert!(left < 10, "{left} rates are kept");
    }

    #[test]
    fn counts_the_failures_of_a_bounded_number_of_sources() {
        let quotas = quotas(|limits| limits.failures = Rate::new(1, 1));
        assert!(quotas.failure("10.0.0.1"));
        assert!(!quotas.failure("10.0.0.1"));
        for number in 0..2 * MAX_SOURCES {
            quotas.failure(&number.to_string());
        }
        assert!(quotas.failures.len() <= MAX_SOURCES);
        // After a second they no longer count. No attested caller is needed to forget them.
        let forgotten = (0..3000).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            quotas.lock().swept -= SWEEP;
            quotas.failure("10.0.0.2")
        });
        assert!(forgotten && quotas.failures.len() < MAX_SOURCES);
    }
}
