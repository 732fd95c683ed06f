//! Which connects go to a port at which a pod or service of the mesh is exposed, on an address that is not its own.

use auth_common::{Address, Exposed, MeshKind};

use crate::maps::EXPOSED;

/// Whether a connect to an address of `kind` is captured.
#[inline(always)]
pub fn is_captured(kind: u32, destination: &Address, port: u32) -> bool {
    if !MeshKind::has_exposed_ports(kind) {
        return MeshKind::is_mesh(kind);
    }
    is_exposed(*destination, port) || (kind == MeshKind::Node as u32 && is_exposed([0; 16], port))
}

#[inline(always)]
fn is_exposed(address: Address, port: u32) -> bool {
    EXPOSED.get_ptr(Exposed { address, port }).is_some()
}
