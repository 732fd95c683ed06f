//! A connection's life, from the app's `connect` to the last byte: `outbound` on the client's node, `inbound` on
//! the server's. Nothing of the kernel and nothing of TLS's insides.

mod acceptor;
pub mod access;
mod balance;
mod caller;
mod connections;
mod enrolment;
mod inbound;
mod opening;
mod outbound;
mod plain;
mod pod;
mod pulse;
mod residents;
mod revocation;
mod rules;
mod same_node;
mod totals;
mod verdict;
mod workers;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::watch;

pub use enrolment::{Enrolment, PodStatus};
pub use pod::Pod;
pub use pulse::Pulse;
pub use same_node::SameNode;
pub use totals::Totals;
pub use workers::Workers;

use rules::Rules;

use crate::{config::Config, issuer::Certificates};
use auth_datapath::Kernel;
use auth_mesh::{Published, Registry, policy::Policies};

/// What all connections on this node share.
#[derive(Debug)]
pub struct Node {
    /// The configuration it runs by.
    pub config: Config,
    /// Who is who.
    pub registry: Arc<Registry>,
    /// Who may call whom.
    pub policies: Arc<Published<Policies>>,
    /// What that comes to for each pod of this node.
    rules: Rules,
    /// Programs and maps.
    pub kernel: Kernel,
    /// This node's workloads' certificates.
    pub certificates: Certificates,
    /// Connections under way.
    pub live: access::Live,
    /// Pods as they stand.
    pub pods: std::sync::Mutex<Vec<PodStatus>>,
    /// Connections between pods of this node that the kernel carries.
    pub same_node: SameNode,
    balance: balance::Balance,
    ready: AtomicBool,
    /// Raised once: from then on no connection begins.
    draining: watch::Sender<bool>,
    /// Each listener that is open has a receiver of it.
    listening: watch::Sender<()>,
}

impl Node {
    /// Brings the parts together; nothing runs yet.
    pub fn new(
        config: Config,
        registry: Arc<Registry>,
        policies: Arc<Published<Policies>>,
        kernel: Kernel,
        certificates: Certificates,
    ) -> Self {
        Self {
            config,
            registry,
            policies,
            rules: Rules::default(),
            kernel,
            certificates,
            live: access::Live::default(),
            pods: std::sync::Mutex::default(),
            same_node: SameNode::new(),
            balance: balance::Balance::default(),
            ready: AtomicBool::new(false),
            draining: watch::Sender::new(false),
            listening: watch::Sender::new(()),
        }
    }

    /// Whether the node's pods have been enrolled once, as far as they can be.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }
}
