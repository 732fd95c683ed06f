//! What the node and each pod use of their shares of the maps that record connections under way, and of the ring buffer EVENTS:
//! see auth-ebpf's `shares.rs`.

use std::sync::Mutex;

use auth_common::{Share, Unread};
use aya::{
    Ebpf,
    maps::{HashMap as BpfHashMap, MapData, MapError},
};

use super::kernel::{KernelError, lock, map_error, take_map};

/// Name of the map.
pub(super) const MAP: &str = "SHARES";
/// Name of the map of what pods use of EVENTS.
pub(super) const UNREAD: &str = "UNREAD";
/// Flag of `bpf(2)`: only insert an entry that does not exist.
const BPF_NOEXIST: u64 = 1;

/// The shares in use. The programs count; this only adds and removes entries.
pub struct Shares {
    shares: Mutex<BpfHashMap<MapData, u64, Share>>,
    unread: BpfHashMap<MapData, u64, Unread>,
}

impl Shares {
    pub(super) fn new(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        let shares = BpfHashMap::try_from(take_map(ebpf, MAP)?).map_err(map_error(MAP))?;
        let unread = BpfHashMap::try_from(take_map(ebpf, UNREAD)?).map_err(map_error(UNREAD))?;
        Ok(Self {
            shares: Mutex::new(shares),
            unread,
        })
    }

    /// Gives the netns with `cookie` a share, unless it has one.
    pub(super) fn add(&self, cookie: u64) -> Result<(), KernelError> {
        match lock(&self.shares).insert(cookie, Share::default(), BPF_NOEXIST) {
            Err(MapError::SyscallError(error))
                if error.io_error.kind() == std::io::ErrorKind::AlreadyExists =>
            {
                Ok(())
            }
            done => done.map_err(map_error(MAP)),
        }
    }

    /// What the netns with `cookie` uses. `None` if it has no share.
    pub fn of(&self, cookie: u64) -> Option<Share> {
        lock(&self.shares).get(&cookie, 0).ok()
    }

    /// Number of closed connections of the client in the netns with `cookie` whose event exceeded its share of EVENTS.
    pub fn lost_events(&self, cookie: u64) -> u64 {
        self.unread.get(&cookie, 0).map_or(0, |unread| unread.lost)
    }

    /// Number of connections under way, of all netns.
    pub fn under_way(&self) -> i64 {
        let map = lock(&self.shares);
        let shares = map.iter().flatten().map(|(_, share)| share);
        shares
            .map(|share| share.connects.entries + share.deliveries.entries)
            .sum()
    }

    /// Removes the shares of all netns for which `keeps` is false and that have no connection under way. The others' counts
    /// are still needed: the netns may be enrolled again, and its entries are then removed.
    pub(super) fn remove_unused(&self, keeps: impl Fn(u64) -> bool) {
        let mut map = lock(&self.shares);
        let unused: Vec<_> = map
            .iter()
            .flatten()
            .filter(|(_, share)| share.connects.entries == 0 && share.deliveries.entries == 0)
            .map(|(cookie, _)| cookie)
            .filter(|cookie| !keeps(*cookie))
            .collect();
        for cookie in unused {
            let _ = map.remove(&cookie);
        }
    }
}

impl std::fmt::Debug for Shares {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shares").finish_non_exhaustive()
    }
}
