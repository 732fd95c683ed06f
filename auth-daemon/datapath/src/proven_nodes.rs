//! The nodes that have, or once had, a ready daemon. A pinned map holds them, so that a restart of this daemon forgets none:
//! their pods are not reached in plaintext again.

use std::sync::Mutex;

use aws_lc_rs::digest::{SHA256, digest};
use aya::{
    Ebpf,
    maps::{HashMap, MapData},
};

use super::kernel::{KernelError, lock, map_error, monotonic_nanoseconds, take_map};

pub(super) const MAP: &str = "PROVEN_NODES";

/// The first 16 bytes of the SHA-256 of a node's name.
type Key = [u8; 16];

/// The nodes that have, or once had, a ready daemon.
pub struct ProvenNodes {
    /// The value is the time of [`ProvenNodes::add`], in nanoseconds of `CLOCK_MONOTONIC`.
    map: Mutex<HashMap<MapData, Key, u64>>,
}

impl ProvenNodes {
    pub(super) fn new(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        let map = HashMap::try_from(take_map(ebpf, MAP)?).map_err(map_error(MAP))?;
        Ok(Self {
            map: Mutex::new(map),
        })
    }

    /// Whether `node` was added and not removed since.
    pub fn contains(&self, node: &str) -> bool {
        lock(&self.map).get(&key(node), 0).is_ok()
    }

    /// Adds `node`. If the map is full, the node that was added first is removed.
    pub fn add(&self, node: &str) -> Result<(), KernelError> {
        let mut map = lock(&self.map);
        let key = key(node);
        if map.get(&key, 0).is_ok() {
            return Ok(());
        }
        let now = monotonic_nanoseconds();
        if map.insert(key, now, 0).is_ok() {
            return Ok(());
        }
        if let Some((oldest, _)) = map.iter().flatten().min_by_key(|(_, added)| *added) {
            let _ = map.remove(&oldest);
        }
        map.insert(key, now, 0).map_err(map_error(MAP))
    }

    /// Removes `node`. It is not an error if it is not there.
    pub fn remove(&self, node: &str) {
        let _ = lock(&self.map).remove(&key(node));
    }
}

fn key(node: &str) -> Key {
    let hash = digest(&SHA256, node.as_bytes());
    let mut key = Key::default();
    key.copy_from_slice(&hash.as_ref()[..size_of::<Key>()]);
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_the_start_of_the_names_hash() {
        // FIPS 180-4, the example for "abc".
        let expected = 0xba78_16bf_8f01_cfea_4141_40de_5dae_2223_u128;
        assert_eq!(key("abc"), expected.to_be_bytes());
        assert_ne!(key("node-1"), key("node-2"));
    }
}
