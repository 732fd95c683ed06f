//! A connection's life, from the app's `connect` to the last byte: `outbound` on the client's node, `inbound` on the
//! server's.

mod balance;
pub(crate) mod caller;
mod detect;
pub(crate) mod handshakes;
pub(crate) mod inbound;
pub(crate) mod local_pods;
pub mod lookups;
#[cfg(test)]
mod memory;
pub(crate) mod outbound;
mod path;
mod plaintext;
mod pod;
pub(crate) mod routes;
pub(crate) mod rules;
pub(crate) mod same_node;
pub(crate) mod shares;
pub(crate) mod unclaimed;
mod verdict;
pub(crate) mod work;

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::watch;

pub use pod::{Pod, PodStatus};
pub use same_node::SameNode;

use lookups::Lookups;
use rules::Rules;
use shares::Capacity;

use crate::{
    config::{Config, Metrics},
    federation::Federated,
    issuer::Certificates,
    observe::{
        connections::OpenConnections,
        istio::IstioMetrics,
        refusals::Refusals,
        remote_clusters::{ClusterGone, RemoteStatus, check_cluster},
    },
};
use auth_common::Inbound;
use auth_datapath::Kernel;
use auth_mesh::{Published, Registry, Workload, policy::Policies};

/// State shared by all connections on this node.
#[derive(Debug)]
pub struct Node {
    /// The daemon's configuration.
    pub config: Config,
    /// The model of the mesh.
    pub registry: Arc<Registry>,
    /// Names on demand: what the registry must ask for. `None` if it knows everything.
    pub(crate) lookups: Option<Arc<Lookups>>,
    /// The policies in force.
    pub policies: Arc<Published<Policies>>,
    /// Number of objects that stay in force although the API server lists no object of their kind any more.
    pub unconfirmed: Arc<AtomicUsize>,
    /// The policies of each pod of this node.
    pub(crate) rules: Rules,
    /// eBPF programs and maps.
    pub kernel: Kernel,
    /// The certificates of this node's pods.
    pub certificates: Certificates,
    /// The foreign trust domains.
    pub federation: Arc<Federated>,
    /// The remote clusters that discovery follows.
    pub remote: Arc<Published<Vec<RemoteStatus>>>,
    /// The open connections.
    pub connections: OpenConnections,
    /// What the pods' connections share.
    pub(crate) capacity: Arc<Capacity>,
    /// Connections that were refused because of a share.
    pub(crate) refusals: Refusals,
    /// The status of each pod of this node.
    pub pods: std::sync::Mutex<Vec<PodStatus>>,
    /// Connections between pods of this node that stay in the kernel.
    pub same_node: SameNode,
    /// The addresses that no object claims, and that are refused.
    pub(crate) unclaimed: unclaimed::Unclaimed,
    balance: balance::Balance,
    pub(crate) ready: AtomicBool,
    /// Set once: no connection is accepted afterwards.
    pub(crate) draining: watch::Sender<bool>,
    /// Each open listener holds a receiver.
    pub(crate) listening: watch::Sender<()>,
}

impl Node {
    /// Assembles the parts. Nothing runs yet.
    pub fn new(
        config: Config,
        registry: Arc<Registry>,
        lookups: Option<Arc<Lookups>>,
        policies: Arc<Published<Policies>>,
        unconfirmed: Arc<AtomicUsize>,
        kernel: Kernel,
        certificates: Certificates,
    ) -> Self {
        let mut connections =
            OpenConnections::new(registry.clone(), config.access_log, config.observe);
        if config.metrics == Metrics::Istio {
            let istio = IstioMetrics::new(config.cluster_id());
            connections.istio = Some(Arc::new(istio));
        }
        Self {
            config,
            connections,
            registry,
            lookups,
            policies,
            unconfirmed,
            rules: Rules::default(),
            kernel,
            federation: Arc::new(Federated::new(certificates.trust().clone())),
            remote: Arc::default(),
            certificates,
            capacity: Arc::new(Capacity::of_process()),
            refusals: Refusals::default(),
            pods: std::sync::Mutex::default(),
            same_node: SameNode::new(),
            unclaimed: unclaimed::Unclaimed::default(),
            balance: balance::Balance::default(),
            ready: AtomicBool::new(false),
            draining: watch::Sender::new(false),
            listening: watch::Sender::new(()),
        }
    }

    /// Uses `federation`, which runs already, for the foreign trust domains.
    pub fn with_federation(self, federation: Arc<Federated>) -> Self {
        Self { federation, ..self }
    }

    /// Uses `remote`, which discovery publishes, for the remote clusters.
    pub fn with_remote_clusters(self, remote: Arc<Published<Vec<RemoteStatus>>>) -> Self {
        Self { remote, ..self }
    }

    /// Fails if `pod` is of a remote cluster that is removed or replaced.
    pub(crate) fn check_cluster(&self, pod: &Workload) -> Result<(), ClusterGone> {
        check_cluster(&self.remote.load(), pod)
    }

    /// Reports whether workloads of the trust domain `name` may be trusted: it is the mesh's own, or has a federation entry.
    pub(crate) fn trusts(&self, name: &str) -> bool {
        self.config.trust_domain.is_named(name) || self.federation.has(name)
    }

    /// The pods of this node whose plaintext callers from outside the networks of pods stay in the kernel.
    pub(crate) fn with_unseen_callers(&self) -> Vec<String> {
        let (pods, rules) = (self.same_node.local_pods(), self.rules.current());
        let snapshot = self.registry.snapshot();
        let pods = pods.by_cookie.iter();
        let mut unseen: Vec<_> = pods
            .filter(|(cookie, _)| {
                let policy = rules.of(**cookie).ok();
                policy.is_some_and(|policy| rules::inbound(policy) == Inbound::Permissive)
            })
            .filter_map(|(_, pod)| snapshot.pod(*pod.addresses.first()?))
            .map(|pod| pod.name.to_string())
            .collect();
        unseen.sort();
        unseen
    }

    /// Whether all pods that can be enrolled have been enrolled once.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }
}
