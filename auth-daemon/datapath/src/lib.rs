//! The daemon's interface to the kernel: programs, maps and pins; the network namespaces of pods, and the sockets and
//! routes inside them.

mod callers;
mod census;
mod cgroup_folders;
mod containers;
mod events;
mod exposed;
pub mod features;
mod first_socket;
mod flows;
mod forwarding;
mod gate;
mod hierarchies;
pub mod host;
mod inbound;
mod interfaces;
mod kept_links;
mod kernel;
pub mod mounts;
mod nested;
mod netlink;
mod netns;
mod netns_discovery;
mod node_cgroups;
mod pauses;
mod pin_lock;
mod plumbing;
mod pod_cgroups;
mod pod_links;
mod pod_routes;
mod pods;
mod processes;
mod proven_nodes;
mod same_node;
mod shares;
pub mod sockets;
#[cfg(test)]
mod test_links;
pub mod threads;
pub mod unload;

pub use callers::{Attestor, Caller, NotOfPod, listen_at};
pub use census::{Census, PodNetns};
pub use containers::{NoPodUid, PodUid};
pub use exposed::ExposedPorts;
pub use first_socket::FirstSockets;
pub use flows::Accepted;
pub use gate::Gate;
pub use interfaces::NodeAddresses;
pub use kept_links::PodLinks;
pub use kernel::{Kernel, KernelError, try_load};
pub use nested::Nested;
pub use netns::{Netns, socket_cookie};
pub use netns_discovery::NetnsDiscovery;
pub use pauses::Pauses;
pub use pin_lock::PinLock;
pub use pod_links::{NodeLinks, SharedLink};
pub use pod_routes::{Diverted, PodEnd, RouteChanges, RouteWatch, check_routes};
pub use pods::{EnrolError, Enrolled, Tampered, Unserved, open_netns, unserved};
pub use processes::{NetnsLocation, Residents};
pub use proven_nodes::ProvenNodes;
pub use same_node::{ClosedEvents, Closing, Ending, Grant, SameNode, Side};
pub use shares::Shares;

/// Prints that a unit test is skipped, if it does not run as root.
#[cfg(test)]
fn lacks_root(test: &str) -> bool {
    let lacks_root = !nix::unistd::geteuid().is_root();
    if lacks_root {
        println!("SKIPPED {test}: needs root");
    }
    lacks_root
}
