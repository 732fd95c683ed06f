//! The model of the mesh: who is who, what runs where. No I/O, no clock, no kernel.

mod identity;
mod registry;
mod service;
mod workload;

pub use identity::{Identity, InvalidIdentity, TrustDomain};
pub use registry::{Destination, Endpoint, Inventory, Registry, Snapshot, Unreachable};
pub use service::{Port, Service, TargetPort};
pub use workload::{ObjectName, Workload};
