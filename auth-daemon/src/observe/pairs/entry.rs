//! What is counted of connections before their workloads have names: by the thread that carried them, for a second.

use std::{
    cell::Cell,
    collections::{HashMap, hash_map},
    hash::{Hash, Hasher},
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use auth_mesh::Identity;
use rustls::NamedGroup;

use super::Counts;
use crate::observe::{
    access_log::{Direction, Finished, Outcome, Path},
    connections::Details,
    size::{HeapSize, in_table},
};

/// Threads that carry connections share the shards, in turns.
pub(super) const SHARDS: usize = 16;
/// The most different entries of a shard in a second.
const MAX_ENTRIES: usize = 256;
/// The most bytes that all shards take. An entry takes some 1.2 KiB.
pub(super) const MAX_BYTES: usize = 640 * 1024;
/// The most different entries of open connections, and a quarter of that of clients without an identity.
pub(crate) const MAX_OPEN_ENTRIES: usize = 1024;
/// How many of a shard's may be of clients without an identity, which may be anybody outside.
pub(super) const MAX_ANONYMOUS_ENTRIES: usize = 64;

/// The connections that ended on some threads since the counts were last moved.
#[derive(Debug, Default)]
pub(super) struct Shard {
    pub(super) entries: HashMap<Entry, Counts>,
    /// How much memory they take, in bytes.
    pub(super) bytes: usize,
    anonymous: usize,
    pub(super) uncounted: u64,
}

/// What connections have in common that are counted together, as far as it is at hand while they are open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pod: u64,
    pub(crate) direction: Direction,
    pub(crate) client: IpAddr,
    pub(crate) identity: Option<Identity>,
    pub(crate) server_identity: Option<Identity>,
    /// What a pod of this node dialled. Peers' claims about it are not counted by.
    dialled: Option<SocketAddr>,
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) path: Path,
    pub(crate) ending: Ending,
}

/// Whether a connection was established, or why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Ending {
    /// It was.
    Established,
    /// This node's policies denied it.
    Denied,
    /// It failed for another reason.
    Failed,
}

/// What of a connection has been counted while it was open.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Time from its start until it was established. `None` if it was not, or the time is unknown.
    connect_time: Option<Duration>,
    key_exchange: Option<NamedGroup>,
    is_counted: bool,
    bytes_to_server: u64,
    bytes_to_client: u64,
}

impl Shard {
    /// Counts a connection that has ended. `used` is how much memory all shards take, in bytes.
    pub(super) fn count(
        &mut self,
        finished: &Finished,
        progress: &mut Progress,
        used: &AtomicUsize,
    ) {
        let entry = Entry::of_ended(finished);
        let has_room = used.load(Ordering::Relaxed) < MAX_BYTES;
        let own = in_table(size_of::<(Entry, Counts)>()) + entry.heap_size();
        let is_anonymous = entry.identity.is_none();
        let is_full = self.entries.len() >= MAX_ENTRIES
            || is_anonymous && self.anonymous >= MAX_ANONYMOUS_ENTRIES;
        let (counts, before) = match self.entries.entry(entry) {
            hash_map::Entry::Occupied(known) => {
                let counts = known.into_mut();
                let before = own + counts.heap_size();
                (counts, before)
            }
            hash_map::Entry::Vacant(_) if is_full || !has_room => {
                self.uncounted += 1;
                return;
            }
            hash_map::Entry::Vacant(new) => {
                self.anonymous += usize::from(is_anonymous);
                (new.insert(Counts::default()), 0)
            }
        };
        counts.connections += 1;
        counts.resets += u64::from(finished.outcome == Outcome::Reset);
        counts.would_be_denied += u64::from(finished.would_be_denied());
        if has_room {
            counts.describe(finished);
        } else {
            progress.forget_details();
        }
        counts.advance(progress, finished.bytes_to_server, finished.bytes_to_client);
        let grown = (own + counts.heap_size()).saturating_sub(before);
        // All threads share `used`, so most connections only read it.
        if grown > 0 {
            self.bytes += grown;
            used.fetch_add(grown, Ordering::Relaxed);
        }
    }
}

impl Counts {
    /// Adds what is known of one of the connections, if nothing is yet: the first of a second stands for the others.
    fn describe(&mut self, finished: &Finished) {
        if self.reason.is_empty() {
            self.reason.clone_from(&finished.reason);
        }
        if self.policy.is_none() {
            self.policy.clone_from(&finished.judgement.policies);
        }
        if self.service.is_none() {
            self.service = finished.service.as_ref().map(ToString::to_string);
        }
    }
}

/// The shard of the thread that calls.
pub(super) fn shard_of_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static OWN: Cell<Option<usize>> = const { Cell::new(None) });
    OWN.with(|own| {
        let shard = own
            .get()
            .unwrap_or_else(|| NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS);
        own.set(Some(shard));
        shard
    })
}

impl Entry {
    fn of_ended(finished: &Finished) -> Self {
        Self {
            pod: finished.pod,
            direction: finished.direction,
            client: finished.client.ip(),
            identity: finished.client_identity.clone(),
            server_identity: finished.server_identity.clone(),
            dialled: dialled(finished.direction, finished.destination),
            endpoint: finished.endpoint.or(finished.destination),
            path: finished.path,
            ending: match finished.outcome {
                Outcome::Refused if finished.judgement.is_denied => Ending::Denied,
                Outcome::Refused => Ending::Failed,
                Outcome::Ok | Outcome::Reset => Ending::Established,
            },
        }
    }

    /// An established connection that is open. Once it ends, it has the same entry.
    pub(crate) fn of_open(pod: u64, direction: Direction, details: &Details) -> Self {
        Self {
            pod,
            direction,
            client: details.client.ip(),
            identity: details.client_identity.clone(),
            server_identity: details.server_identity.clone(),
            dialled: dialled(direction, details.destination),
            endpoint: details.endpoint.or(details.destination),
            path: details.path,
            ending: Ending::Established,
        }
    }
}

impl Hash for Entry {
    /// Hashes what differs between most entries: the identities are long, and follow from the addresses nearly always.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self {
            pod,
            client,
            dialled,
            endpoint,
            ..
        } = self;
        (pod, client, dialled, endpoint).hash(state);
    }
}

fn dialled(direction: Direction, destination: Option<SocketAddr>) -> Option<SocketAddr> {
    destination.filter(|_| direction == Direction::Outbound)
}

impl Ending {
    /// Whether the connection was refused.
    pub(crate) fn is_refused(self) -> bool {
        self != Self::Established
    }
}

impl HeapSize for Entry {
    fn heap_size(&self) -> usize {
        self.identity.heap_size() + self.server_identity.heap_size()
    }
}

impl Progress {
    /// Records that the connection is established, `after` its start, over a tunnel with this key exchange if there is one.
    pub(crate) fn establish(&mut self, after: Duration, key_exchange: Option<NamedGroup>) {
        self.connect_time = Some(after);
        self.key_exchange = key_exchange;
    }

    /// Does not count the fields that take memory.
    fn forget_details(&mut self) {
        (self.connect_time, self.key_exchange) = (None, None);
    }

    /// Whether the connection was established.
    pub(crate) fn is_established(&self) -> bool {
        self.connect_time.is_some()
    }

    /// The progress of the server's side, which has not been counted, of a connection between two pods of this node.
    pub(crate) fn of_other_side(&self) -> Self {
        Self {
            connect_time: self.connect_time,
            ..Self::default()
        }
    }
}

impl Counts {
    /// Counts what was not counted of a connection yet, which has carried so many bytes in all.
    pub(crate) fn advance(
        &mut self,
        progress: &mut Progress,
        bytes_to_server: u64,
        bytes_to_client: u64,
    ) {
        if !std::mem::replace(&mut progress.is_counted, true) {
            self.opened += 1;
            if let Some(time) = progress.connect_time {
                self.connect_times.count(time);
            }
            if let Some(group) = progress
                .key_exchange
                .filter(|_| self.key_exchange.is_none())
            {
                self.key_exchange = Some(format!("{group:?}"));
            }
        }
        self.bytes_to_server += bytes_to_server.saturating_sub(progress.bytes_to_server);
        self.bytes_to_client += bytes_to_client.saturating_sub(progress.bytes_to_client);
        progress.bytes_to_server = bytes_to_server;
        progress.bytes_to_client = bytes_to_client;
    }
}
