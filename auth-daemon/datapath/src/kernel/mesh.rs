//! The map MESH: the addresses and networks of the mesh.

use std::{collections::HashMap, net::IpAddr};

use auth_common::{Address, MeshKind};
use aya::maps::{
    MapData,
    lpm_trie::{Key, LpmTrie},
};
use ipnet::IpNet;

use super::{Kernel, KernelError, lock, map_error, wire_address};

/// The map, and what is in it.
pub(super) struct Mesh {
    pub(super) map: LpmTrie<MapData, Address, u32>,
    /// Content of the map.
    pub(super) entries: HashMap<(Address, u32), u32>,
}

impl Mesh {
    fn set(&mut self, key: (Address, u32), kind: u32) -> Result<(), KernelError> {
        if self.entries.get(&key) != Some(&kind) {
            self.map
                .insert(&Key::new(key.1, key.0), kind, 0)
                .map_err(map_error("MESH"))?;
            self.entries.insert(key, kind);
        }
        Ok(())
    }

    fn remove(&mut self, key: (Address, u32)) -> Result<(), KernelError> {
        if self.entries.contains_key(&key) {
            self.map
                .remove(&Key::new(key.1, key.0))
                .map_err(map_error("MESH"))?;
            self.entries.remove(&key);
        }
        Ok(())
    }
}

impl Kernel {
    /// Sets the mesh's addresses and networks to `wanted`. Writes only the differences.
    pub fn set_mesh(&self, wanted: &HashMap<IpNet, MeshKind>) -> Result<(), KernelError> {
        let wanted: HashMap<(Address, u32), u32> = wanted
            .iter()
            .map(|(net, kind)| (trie_key(net), *kind as u32))
            .collect();
        let mut mesh = lock(&self.mesh);
        for (key, kind) in &wanted {
            mesh.set(*key, *kind)?;
        }
        let gone: Vec<_> = mesh
            .entries
            .keys()
            .filter(|key| !wanted.contains_key(*key))
            .copied()
            .collect();
        for key in gone {
            mesh.remove(key)?;
        }
        Ok(())
    }

    /// Returns the addresses whose kind in the map is one of `kinds`, including those that a previous daemon wrote.
    /// Networks are left out.
    pub fn mesh_addresses(&self, kinds: &[MeshKind]) -> Vec<IpAddr> {
        let mesh = lock(&self.mesh);
        let entries = mesh.entries.iter().filter(|((_, prefix), kind)| {
            *prefix == 128 && kinds.iter().any(|wanted| *wanted as u32 == **kind)
        });
        entries
            .map(|((address, _), _)| IpAddr::from(*address).to_canonical())
            .collect()
    }

    /// Changes the kind of some mesh addresses. `None` removes the address from the mesh.
    pub fn change_mesh(
        &self,
        changes: impl Iterator<Item = (IpNet, Option<MeshKind>)>,
    ) -> Result<(), KernelError> {
        let mut mesh = lock(&self.mesh);
        for (net, kind) in changes {
            match kind {
                Some(kind) => mesh.set(trie_key(&net), kind as u32)?,
                None => mesh.remove(trie_key(&net))?,
            }
        }
        Ok(())
    }
}

fn trie_key(net: &IpNet) -> (Address, u32) {
    let extra = if net.addr().is_ipv4() { 96 } else { 0 };
    (
        wire_address(net.network()),
        extra + u32::from(net.prefix_len()),
    )
}
