//! The addresses and ports at which pods and services of the mesh are exposed, for the programs that capture connects.

use std::{collections::HashSet, sync::Mutex};

use auth_common::{Exposed, MAX_EXPOSED};
use auth_mesh::ExposedAt;
use aya::{
    Ebpf,
    maps::{HashMap, MapData},
};

use super::kernel::{KernelError, lock, map_error, take_map, wire_address};

pub(super) const MAP: &str = "EXPOSED";

/// The map of exposed ports.
pub struct ExposedPorts {
    map: Mutex<HashMap<MapData, Exposed, u32>>,
}

impl ExposedPorts {
    pub(super) fn new(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        let map = HashMap::try_from(take_map(ebpf, MAP)?).map_err(map_error(MAP))?;
        Ok(Self {
            map: Mutex::new(map),
        })
    }

    /// Sets the exposed ports to `wanted`. Writes only the differences. Returns how many are left out, the last ones,
    /// because the map holds [`MAX_EXPOSED`].
    pub fn set(&self, wanted: impl Iterator<Item = ExposedAt>) -> Result<usize, KernelError> {
        let mut wanted = wanted.map(key);
        let kept: HashSet<_> = wanted.by_ref().take(MAX_EXPOSED as usize).collect();
        let left_out = wanted.count();
        let mut map = lock(&self.map);
        let known: HashSet<_> = map.keys().flatten().collect();
        for gone in known.difference(&kept) {
            map.remove(gone).map_err(map_error(MAP))?;
        }
        for new in kept.difference(&known) {
            map.insert(new, 1, 0).map_err(map_error(MAP))?;
        }
        Ok(left_out)
    }
}

fn key(at: ExposedAt) -> Exposed {
    Exposed {
        address: at.address.map_or([0; 16], wire_address),
        port: at.port.into(),
    }
}
