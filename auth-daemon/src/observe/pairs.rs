//! Which workloads call each other, at which port and how, since the daemon started.
//!
//! A connection that ends is counted in a shard of the thread that carried it, which no other thread locks while it carries
//! connections. Once a second, the counts move from the shards to the pairs, where workloads have names. Connections that are
//! open are counted when a query arrives.

mod entry;

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use auth_mesh::{Identity, Snapshot, Workload, policy::suggest};
use serde::{Deserialize, Serialize};

pub(crate) use self::entry::{Ending, Entry, MAX_OPEN_ENTRIES, Progress};
use self::entry::{SHARDS, Shard, shard_of_thread};
use super::{
    access_log::{Direction, Finished, Path},
    bounded::{Limit, drop_oldest},
    connect_times::ConnectTimes,
    flows::{Verdict, format_time},
    istio::IstioMetrics,
    size::{BLOCK, HeapSize, in_table},
};

/// The most pairs that are kept. One takes some 1.5 KiB.
const MAX_PAIRS: Limit = Limit {
    entries: 4096,
    bytes: 2 * 1024 * 1024,
};
/// How many of them may have a client without an identity.
const MAX_ANONYMOUS_PAIRS: Limit = Limit {
    entries: 1024,
    bytes: MAX_PAIRS.bytes / 3,
};
/// The most namespaces whose plaintext connections are counted separately. Those of further ones count under an empty name.
const MAX_NAMESPACES: usize = 1024;

/// The pairs of one node, in answer to `GET /pairs`. Its JSON form is stable: later versions only add fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The node.
    pub node: String,
    /// When the daemon started to count: UTC, in the format of RFC 3339.
    pub since: String,
    /// How long that is ago, in seconds.
    pub seconds: u64,
    /// Connections that are in no pair, because too many different ones ended in a second.
    pub uncounted: u64,
    /// Pairs that were dropped for newer ones: first those without an identity, and of these the one that called longest
    /// ago.
    pub dropped: u64,
    /// Pods of this node whose plaintext callers from outside the networks of pods stay in the kernel, and are not counted.
    pub unseen: Vec<String>,
    /// The pairs.
    pub pairs: Vec<Pair>,
}

/// Connections of the same kind between two workloads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// Whether a pod of the node is the client or the server. A connection between two pods of a node is counted for both.
    pub direction: Direction,
    /// The client.
    pub client: Party,
    /// The server.
    pub server: Party,
    /// The app's own port.
    pub port: u16,
    /// How they reach the server, as in the access log.
    pub path: String,
    /// Whether they were established.
    pub verdict: Verdict,
    /// What was counted.
    #[serde(flatten)]
    pub counts: Counts,
    /// Connections that are open now.
    #[serde(default)]
    pub open: u64,
    /// When the first of them ended, or was first seen open.
    pub first: String,
    /// When the last of them ended, or was last seen open.
    pub last: String,
}

impl Pair {
    /// Connections that ended, and those that are open.
    pub(crate) fn seen(&self) -> u64 {
        self.counts.connections + self.open
    }
}

/// What is counted of connections of the same kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Connections that ended.
    pub connections: u64,
    /// Connections that were established, open ones included, and those that were refused.
    #[serde(default)]
    pub opened: u64,
    /// How many of them were reset.
    pub resets: u64,
    /// How many of them a dry-run policy would have refused.
    pub would_be_denied: u64,
    /// Bytes that clients sent, so far.
    pub bytes_to_server: u64,
    /// Bytes that servers sent, so far.
    pub bytes_to_client: u64,
    /// How long connections took until they were established. Those that the kernel carries between two pods of a node do not
    /// count.
    #[serde(default)]
    pub connect_times: ConnectTimes,
    /// Why the last one was refused or reset. Empty if none was.
    pub reason: String,
    /// The policies that decided about the last one, or that audited it.
    pub policy: Option<String>,
    /// The Service that the last one was for, as `namespace/name`.
    pub service: Option<String>,
    /// The TLS key exchange of the last one, such as `X25519MLKEM768`.
    #[serde(default)]
    pub key_exchange: Option<String>,
}

/// One side of a pair.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Party {
    /// The namespace, if the workload or its identity is known.
    pub namespace: Option<String>,
    /// The workload's name: that of its pods, without what is generated.
    pub workload: Option<String>,
    /// The SPIFFE ID, if proven.
    pub identity: Option<String>,
    /// The address, if there is no identity.
    pub address: Option<IpAddr>,
    /// Labels that select the workload's pods. Only of servers.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// Counts connections by pairs.
#[derive(Debug)]
pub struct Pairs {
    since: SystemTime,
    shards: [Mutex<Shard>; SHARDS],
    /// How much memory the shards take, in bytes.
    used: AtomicUsize,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    pairs: HashMap<Box<Key>, Box<Seen>>,
    /// Plaintext connections to servers in each namespace, by whether they were refused.
    plaintext: BTreeMap<(String, bool), u64>,
    uncounted: u64,
    dropped: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    direction: Direction,
    client: Party,
    server: Party,
    port: u16,
    path: Path,
    refused: bool,
}

#[derive(Debug)]
struct Seen {
    counts: Counts,
    open: u64,
    first: SystemTime,
    last: SystemTime,
}

impl Default for Pairs {
    fn default() -> Self {
        Self {
            since: SystemTime::now(),
            shards: Default::default(),
            used: AtomicUsize::new(0),
            known: Mutex::default(),
        }
    }
}

impl Pairs {
    /// Counts a connection that has ended, except for what was counted while it was open.
    pub(crate) fn count(&self, finished: &Finished, progress: &mut Progress) {
        lock(&self.shards[shard_of_thread()]).count(finished, progress, &self.used);
    }

    /// Moves the counts from the shards to the pairs, with the names of workloads from `snapshot`, and to `istio`.
    pub(crate) fn settle(
        &self,
        snapshot: &Snapshot,
        now: SystemTime,
        istio: Option<&IstioMetrics>,
    ) {
        for shard in &self.shards {
            let shard = std::mem::take(&mut *lock(shard));
            if shard.entries.is_empty() && shard.uncounted == 0 {
                continue;
            }
            let mut known = lock(&self.known);
            known.uncounted += shard.uncounted;
            if let Some(istio) = istio {
                istio.add(&shard.entries, snapshot, now);
            }
            for (entry, counts) in shard.entries {
                known.add(entry.key(snapshot), counts, now);
            }
            known.shrink();
            self.used.fetch_sub(shard.bytes, Ordering::Relaxed);
        }
    }

    /// Replaces what is known of open connections: their number, and what was not counted of them yet.
    pub(crate) fn settle_open(
        &self,
        open: HashMap<Entry, (u64, Counts)>,
        snapshot: &Snapshot,
        now: SystemTime,
        istio: Option<&IstioMetrics>,
    ) {
        if let Some(istio) = istio {
            let entries = open.iter().map(|(entry, (_, counts))| (entry, counts));
            istio.add(entries, snapshot, now);
        }
        let mut known = lock(&self.known);
        for seen in known.pairs.values_mut() {
            seen.open = 0;
        }
        for (entry, (number, counts)) in open {
            known.add(entry.key(snapshot), counts, now).open += number;
        }
        known.shrink();
    }

    /// Returns the number of plaintext connections to servers in each namespace, by whether they were refused.
    pub(crate) fn plaintext(&self) -> BTreeMap<(String, bool), u64> {
        lock(&self.known).plaintext.clone()
    }

    /// Returns the pairs, the latest last.
    pub(crate) fn answer(&self, node: &str, unseen: Vec<String>) -> Answer {
        let known = lock(&self.known);
        let mut pairs: Vec<_> = known
            .pairs
            .iter()
            .map(|(key, seen)| key.pair(seen))
            .collect();
        pairs.sort_by(|a, b| (&a.last, &a.client).cmp(&(&b.last, &b.client)));
        Answer {
            node: node.to_owned(),
            since: format_time(self.since),
            seconds: self.since.elapsed().unwrap_or_default().as_secs(),
            uncounted: known.uncounted,
            dropped: known.dropped,
            unseen,
            pairs,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Entry {
    fn key(self, snapshot: &Snapshot) -> Key {
        let client_pod = snapshot.pod(self.client);
        let server_pod = self.endpoint.and_then(|at| snapshot.pod(at.ip()));
        let mut client = Party::new(client_pod.map(|pod| &**pod), self.identity, self.client);
        client.labels.clear();
        let server_address = self.endpoint.map_or(self.client, |at| at.ip());
        let server = Party::new(
            server_pod.map(|pod| &**pod),
            self.server_identity,
            server_address,
        );
        Key {
            direction: self.direction,
            client,
            server,
            port: self.endpoint.map_or(0, |at| at.port()),
            path: self.path,
            refused: self.ending.is_refused(),
        }
    }
}

impl Party {
    fn new(pod: Option<&Workload>, identity: Option<Identity>, address: IpAddr) -> Self {
        let namespace = match (pod, &identity) {
            (Some(pod), _) => Some(pod.name.namespace.clone()),
            (None, Some(identity)) => Some(identity.namespace().to_owned()),
            (None, None) => None,
        };
        Self {
            namespace,
            workload: pod.map(|pod| suggest::workload_name(pod).to_owned()),
            address: identity.is_none().then_some(address),
            identity: identity.map(|identity| identity.to_string()),
            labels: pod
                .map(|pod| suggest::selecting_labels(&pod.labels))
                .unwrap_or_default(),
        }
    }
}

impl Known {
    fn add(&mut self, key: Key, counts: Counts, now: SystemTime) -> &mut Seen {
        let is_plaintext = key.path == Path::Plaintext && key.direction == Direction::Inbound;
        if let Some(namespace) = key.server.namespace.as_ref().filter(|_| is_plaintext) {
            let mut plaintext = (namespace.clone(), key.refused);
            let is_full = self.plaintext.len() >= 2 * MAX_NAMESPACES;
            if is_full && !self.plaintext.contains_key(&plaintext) {
                plaintext.0 = String::new();
            }
            *self.plaintext.entry(plaintext).or_default() += counts.connections;
        }
        let seen = self.pairs.entry(Box::new(key)).or_insert_with(|| {
            Box::new(Seen {
                counts: Counts::default(),
                open: 0,
                first: now,
                last: now,
            })
        });
        seen.last = now;
        seen.counts.add(counts);
        seen
    }

    /// Drops the pairs that called longest ago, beyond the limits. Callers from outside cannot displace pairs with
    /// identities.
    fn shrink(&mut self) {
        for (limit, of) in [
            (MAX_ANONYMOUS_PAIRS, Key::is_anonymous as fn(&Key) -> bool),
            (MAX_PAIRS, |_| true),
        ] {
            self.dropped += drop_oldest(
                &mut self.pairs,
                limit,
                |key| of(key),
                |seen| seen.last,
                |key, seen| size(key, seen),
            );
        }
    }
}

impl Counts {
    /// Adds later counts.
    pub(crate) fn add(&mut self, later: Self) {
        self.connections += later.connections;
        self.opened += later.opened;
        self.connect_times.add(&later.connect_times);
        self.resets += later.resets;
        self.would_be_denied += later.would_be_denied;
        self.bytes_to_server += later.bytes_to_server;
        self.bytes_to_client += later.bytes_to_client;
        if !later.reason.is_empty() {
            self.reason = later.reason;
        }
        self.policy = later.policy.or(self.policy.take());
        self.service = later.service.or(self.service.take());
        self.key_exchange = later.key_exchange.or(self.key_exchange.take());
    }
}

/// The memory that a pair takes, in bytes.
fn size(key: &Key, seen: &Seen) -> usize {
    let table = in_table(2 * size_of::<usize>());
    let inline = size_of::<Key>() + size_of::<Seen>() + 2 * BLOCK;
    let texts = key.client.heap_size() + key.server.heap_size();
    table + inline + texts + seen.counts.heap_size()
}

impl HeapSize for Party {
    fn heap_size(&self) -> usize {
        self.namespace.heap_size()
            + self.workload.heap_size()
            + self.identity.heap_size()
            + self.labels.heap_size()
    }
}

impl HeapSize for Counts {
    fn heap_size(&self) -> usize {
        self.connect_times.heap_size()
            + self.reason.heap_size()
            + self.policy.heap_size()
            + self.service.heap_size()
            + self.key_exchange.heap_size()
    }
}

impl Key {
    fn is_anonymous(&self) -> bool {
        self.client.identity.is_none()
    }

    fn pair(&self, seen: &Seen) -> Pair {
        Pair {
            direction: self.direction,
            client: self.client.clone(),
            server: self.server.clone(),
            port: self.port,
            path: self.path.name().to_owned(),
            verdict: match self.refused {
                true => Verdict::Denied,
                false => Verdict::Allowed,
            },
            counts: seen.counts.clone(),
            open: seen.open,
            first: format_time(seen.first),
            last: format_time(seen.last),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{entry::MAX_ANONYMOUS_ENTRIES, *};

    fn finished(client: IpAddr, identity: bool) -> Finished {
        Finished {
            client: (client, 4000).into(),
            endpoint: Some(([10, 0, 0, 2], 8080).into()),
            client_identity: identity.then(|| "spiffe://cluster.local/ns/a/sa/b".parse().unwrap()),
            ..Finished::example()
        }
    }

    fn address(number: u32) -> IpAddr {
        IpAddr::from(number.to_be_bytes())
    }

    fn now(second: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(second)
    }

    #[test]
    fn counts_connections_of_a_pair() {
        let (pairs, snapshot) = (Pairs::default(), Snapshot::default());
        for second in 1..=3 {
            pairs.count(&finished(address(1), true), &mut Progress::default());
            pairs.count(&finished(address(1), true), &mut Progress::default());
            pairs.settle(&snapshot, now(second), None);
        }
        let answer = pairs.answer("n", Vec::new());
        let [pair] = answer.pairs.as_slice() else {
            panic!("{answer:?}")
        };
        assert_eq!(
            (pair.counts.connections, pair.counts.bytes_to_server),
            (6, 18)
        );
        assert_eq!(
            (&pair.first, &pair.last),
            (&format_time(now(1)), &format_time(now(3)))
        );
        assert_eq!(pair.client.namespace.as_deref(), Some("a"));
        assert_eq!((pair.port, pair.client.address), (8080, None));
    }

    #[test]
    fn anybody_outside_takes_a_bounded_part() {
        let (pairs, snapshot) = (Pairs::default(), Snapshot::default());
        pairs.count(&finished(address(1), true), &mut Progress::default());
        pairs.settle(&snapshot, now(1), None);
        let (mut sent, per_second) = (0, 100);
        for second in 0..100 {
            for number in 0..per_second {
                let finished = finished(address(second * per_second + number), false);
                pairs.count(&finished, &mut Progress::default());
                sent += 1;
            }
            pairs.settle(&snapshot, now(u64::from(second) + 2), None);
        }
        let answer = pairs.answer("n", Vec::new());
        let anonymous = answer
            .pairs
            .iter()
            .filter(|pair| pair.client.identity.is_none());
        assert_eq!(anonymous.count(), MAX_ANONYMOUS_PAIRS.entries);
        assert_eq!(
            answer.pairs.len(),
            MAX_ANONYMOUS_PAIRS.entries + 1,
            "the pair with an identity stays"
        );
        let counted = 100 * MAX_ANONYMOUS_ENTRIES as u64;
        assert_eq!(answer.uncounted, sent - counted);
        assert_eq!(answer.dropped, counted - MAX_ANONYMOUS_PAIRS.entries as u64);
        let oldest = answer
            .pairs
            .iter()
            .find(|pair| pair.client.identity.is_none());
        assert!(
            oldest.unwrap().last > format_time(now(80)),
            "the latest stay"
        );
    }
}
