//! Each pod's share of what the daemon has for connections: file descriptors, memory and tasks.
//!
//! The unit is a descriptor. A connection takes two, and is charged when it is accepted, before anything is done for it. It is
//! one task, and its memory is bounded, so this one limit bounds all three.
//!
//! The rule: **a pod may hold less than what is still free.** One greedy pod gets half of the node's capacity, two get
//! a third each, and n leave 1/(n+1) of it to the rest. Within a pod, the same rule holds for each source of connections to it,
//! and within the node, for what a source holds with all pods together.
//! Both directions of a pod are counted separately, so that its callers cannot keep it from connecting itself.

use std::{
    collections::HashMap,
    fs,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::sys::resource::{Resource, getrlimit};

use super::handshakes::Source;
use crate::observe::refusals::Refusal;

/// Descriptors of one connection: its socket on either side.
const CONNECTION: usize = 2;
/// Descriptors of an idle tunnel.
const IDLE_TUNNEL: usize = 1;
/// Memory that a connection needs at most, in bytes: two peers that stall fill a large buffer of the relay in each direction,
/// of 130 KiB, and its state takes a few more.
const CONNECTION_BYTES: u64 = 272 * 1024;
/// What the unread data of an HBONE connection with a large window costs, in descriptors: as much as connections of that memory.
const LARGE_WINDOW: usize =
    CONNECTION * (auth_tunnel::hbone::LARGE_WINDOW as usize / CONNECTION_BYTES as usize);
/// Maximum number of descriptors in the reserve. Four thousand pods need that many, with listeners, links and namespaces.
const MAX_RESERVE: usize = 8192;

/// The capacity of this node's daemon for connections.
#[derive(Debug)]
pub(crate) struct Capacity {
    /// In descriptors.
    total: usize,
    taken: Mutex<Held>,
}

impl Capacity {
    /// Derives the capacity from the limits of this process: the limit of open files less a reserve, which is a quarter of it
    /// but at most 8192, and no more than two descriptors for each 272 KiB of its memory limit.
    ///
    /// Only the daemon itself uses the reserve: for manifests, the API server, the CA, the pods' listeners and namespaces.
    pub(crate) fn of_process() -> Self {
        // A limit that cannot be read is taken for the usual one.
        let (descriptors, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
        Self::new(derive(descriptors, memory_limit()))
    }

    fn new(total: usize) -> Self {
        Self {
            total,
            taken: Mutex::default(),
        }
    }

    /// Number of connections that fit.
    pub(crate) fn connections(&self) -> usize {
        self.total / CONNECTION
    }

    /// Descriptors that connections and idle tunnels hold.
    pub(crate) fn taken(&self) -> usize {
        lock(&self.taken).total
    }
}

/// The capacity in descriptors.
fn derive(descriptors: u64, memory: u64) -> usize {
    let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
    let reserve = (descriptors / 4).min(MAX_RESERVE);
    let by_memory = usize::try_from(memory / CONNECTION_BYTES).unwrap_or(usize::MAX);
    (descriptors - reserve).min(by_memory.saturating_mul(CONNECTION))
}

/// The memory that this process may use, in bytes: its container's limit, or else the machine's memory.
fn memory_limit() -> u64 {
    let limits = CONTAINER_LIMITS.iter();
    let limits = limits.filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok());
    limits.chain(machine_memory()).min().unwrap_or(u64::MAX)
}

fn machine_memory() -> Option<u64> {
    let table = fs::read_to_string("/proc/meminfo").ok()?;
    let total = table
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = total.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Where a container finds its memory limit, with version 2 and version 1 of cgroups. Without a limit, they hold `max` or more
/// than any machine has.
const CONTAINER_LIMITS: [&str; 2] = [
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
];

/// Why a connection is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Exceeded {
    /// The pod holds its share.
    Pod,
    /// The source of the connection holds its share of the pod's, or of the node's.
    Peer,
}

impl From<Exceeded> for Refusal {
    /// Of a connection to the pod.
    fn from(exceeded: Exceeded) -> Self {
        match exceeded {
            Exceeded::Pod => Self::Inbound,
            Exceeded::Peer => Self::Peer,
        }
    }
}

/// What connections hold, in descriptors.
#[derive(Debug, Default)]
struct Held {
    total: usize,
    /// Of connections to pods, by where they come from.
    by_source: HashMap<Source, usize>,
}

impl Held {
    fn of(&self, source: Source) -> usize {
        self.by_source.get(&source).copied().unwrap_or(0)
    }

    fn add(&mut self, cost: usize, source: Option<Source>) {
        self.total += cost;
        if let Some(source) = source {
            *self.by_source.entry(source).or_default() += cost;
        }
    }

    fn remove(&mut self, cost: usize, source: Option<Source>) {
        self.total -= cost;
        if let Some(source) = source
            && let Some(held) = self.by_source.get_mut(&source)
        {
            *held -= cost;
            if *held == 0 {
                self.by_source.remove(&source);
            }
        }
    }
}

/// What one pod holds in one direction.
#[derive(Debug)]
pub(crate) struct Share {
    capacity: Arc<Capacity>,
    held: Mutex<Held>,
}

impl Share {
    pub(crate) fn of(capacity: &Arc<Capacity>) -> Arc<Self> {
        Arc::new(Self {
            capacity: capacity.clone(),
            held: Mutex::default(),
        })
    }

    /// Charges a connection, until the permit is dropped. Inbound, it comes from `source`.
    pub(crate) fn connection(self: &Arc<Self>, source: Option<Source>) -> Result<Permit, Exceeded> {
        self.charge(CONNECTION, source, 1)
    }

    /// Charges an idle tunnel, until the permit is dropped. Idle tunnels take at most half of a share, because a connection
    /// is worth more. `None` if there is no room.
    pub(crate) fn idle_tunnel(self: &Arc<Self>) -> Option<Permit> {
        self.charge(IDLE_TUNNEL, None, 2).ok()
    }

    /// Charges the large window of an HBONE connection, until the permit is dropped. Large windows take at most a ninth of the
    /// capacity, because connections are worth more. `None` if there is no room: the connection then gets a small window.
    pub(crate) fn large_window(self: &Arc<Self>, source: Option<Source>) -> Option<Permit> {
        self.charge(LARGE_WINDOW, source, 8).ok()
    }

    /// Charges `cost` if what is held, `weight` times, is less than what is free.
    fn charge(
        self: &Arc<Self>,
        cost: usize,
        source: Option<Source>,
        weight: usize,
    ) -> Result<Permit, Exceeded> {
        let mut held = lock(&self.held);
        let mut taken = lock(&self.capacity.taken);
        let free = self.capacity.total - taken.total;
        if held.total * weight >= free || free < cost {
            return Err(Exceeded::Pod);
        }
        if let Some(source) = source
            && (held.of(source) >= free - held.total || taken.of(source) >= free)
        {
            return Err(Exceeded::Peer);
        }
        taken.add(cost, source);
        held.add(cost, source);
        Ok(Permit {
            share: self.clone(),
            cost,
            source,
        })
    }
}

/// What [`Share::connection`] or [`Share::idle_tunnel`] has charged.
#[derive(Debug)]
pub(crate) struct Permit {
    share: Arc<Share>,
    cost: usize,
    source: Option<Source>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        lock(&self.share.held).remove(self.cost, self.source);
        lock(&self.share.capacity.taken).remove(self.cost, self.source);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(share: &Arc<Share>, source: Option<Source>) -> (Vec<Permit>, Exceeded) {
        let mut permits = Vec::new();
        loop {
            match share.connection(source) {
                Ok(permit) => permits.push(permit),
                Err(exceeded) => return (permits, exceeded),
            }
        }
    }

    #[test]
    fn a_greedy_pod_leaves_half_to_the_others() {
        let capacity = Arc::new(Capacity::new(6000));
        let (first, exceeded) = fill(&Share::of(&capacity), None);
        assert_eq!((first.len(), exceeded), (1500, Exceeded::Pod));
        let (second, _) = fill(&Share::of(&capacity), None);
        assert_eq!(second.len(), 750);
        let (third, _) = fill(&Share::of(&capacity), None);
        assert_eq!(third.len(), 375);
        drop((first, second, third));
        assert_eq!(capacity.taken(), 0);
    }

    #[test]
    fn a_greedy_source_leaves_room_to_the_pods_others() {
        let capacity = Arc::new(Capacity::new(6000));
        let share = Share::of(&capacity);
        let source = |last: u8| Some(Source::from([10, 0, 0, last]));
        let (first, exceeded) = fill(&share, source(1));
        assert_eq!((first.len(), exceeded), (1000, Exceeded::Peer));
        let (second, exceeded) = fill(&share, source(2));
        assert!(second.len() > 300 && exceeded == Exceeded::Peer);
        assert!(share.connection(source(3)).is_ok());
        drop((first, second));
        assert!(lock(&share.held).by_source.is_empty() && capacity.taken() == 0);
    }

    #[test]
    fn a_source_that_connects_to_all_pods_leaves_room_to_others() {
        let capacity = Arc::new(Capacity::new(6000));
        let shares: Vec<_> = (0..20).map(|_| Share::of(&capacity)).collect();
        let source = |last: u8| Some(Source::from([10, 0, 0, last]));
        let held: Vec<_> = shares.iter().map(|share| fill(share, source(1))).collect();
        assert_eq!(capacity.taken(), 3000);
        assert!(held.iter().all(|(_, exceeded)| *exceeded == Exceeded::Peer));
        assert!(
            shares
                .iter()
                .all(|share| share.connection(source(2)).is_ok())
        );
        drop(held);
        assert!(lock(&capacity.taken).by_source.is_empty());
    }

    #[test]
    fn idle_tunnels_never_fill_a_share() {
        let capacity = Arc::new(Capacity::new(600));
        let share = Share::of(&capacity);
        let idle: Vec<_> = std::iter::from_fn(|| share.idle_tunnel()).collect();
        assert_eq!(idle.len(), 200);
        assert!(share.connection(None).is_ok());
    }

    #[test]
    fn capacity_follows_descriptors_and_memory() {
        const MUCH: u64 = 1 << 40;
        assert_eq!(derive(1024, MUCH), 768);
        assert_eq!(derive(20_000, MUCH), 15_000);
        assert_eq!(derive(1 << 20, MUCH), (1 << 20) - 8192);
        assert_eq!(derive(1 << 20, 2 << 30), 2 * 7710);
    }
}
