//! The model of the mesh: identities, pods, services, policies. No I/O, no clock, no kernel.

mod claims;
mod cluster;
mod edit;
mod exposed;
mod identity;
mod membership;
mod node;
pub mod policy;
mod registry;
mod resolved;
mod service;
mod slice;
mod snapshot;
mod waypoint;
mod workload;

pub use claims::AddressKind;
pub use cluster::ClusterName;
pub use edit::Edit;
pub use exposed::{ExposedAt, HostPort};
pub use identity::{Identity, InvalidIdentity, SpiffeId, TrustDomain};
pub use membership::{Membership, Memberships, MeshDefault};
pub use node::{Networks, Node};
pub use registry::{Published, Registry};
pub use resolved::{Destination, Endpoint};
pub use service::{Port, Service, TargetPort};
pub use slice::{Slice, SliceEndpoint};
pub use snapshot::{Inventory, Snapshot, Unreachable};
pub use waypoint::{NoWaypoint, Waypoint, WaypointAt};
pub use workload::{Cached, FullName, Hbone, ObjectName, Workload};
