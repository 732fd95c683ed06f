//! Keeps the pods that this node serves in step with the registry: enrols those that appear, lets go of those that
//! leave, and tells the kernel's side which addresses the mesh has.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use auth_common::MeshKind;
use ipnet::IpNet;
use serde::Serialize;
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Handle,
    sync::watch,
    task::{AbortHandle, JoinSet},
};

use super::{Node, Pod, inbound, outbound};
use crate::{
    datapath::{Enrolled, forget_others, sockets::canonical},
    mesh::{ObjectName, Snapshot, Workload},
};

/// How often to look for namespaces made anew, idle tunnels and stale entries.
const TICK: Duration = Duration::from_secs(1);
/// After an accept failed for want of something: file descriptors, memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The pods of this node.
pub struct Enrolment {
    node: Arc<Node>,
    /// Where connections run.
    data_path: Handle,
    serving: HashMap<ObjectName, Serving>,
    failing: BTreeMap<ObjectName, Failing>,
    /// What the kernel's side was told the mesh's addresses are.
    told: Told,
}

/// The sources of the mesh's addresses, as they were when the kernel's side was told.
#[derive(Default, PartialEq, Eq)]
struct Told {
    registry_version: Option<u64>,
    node_addresses: Vec<IpAddr>,
}

struct Serving {
    pod: Arc<Pod>,
    tasks: Vec<AbortHandle>,
    /// The tunnel listener once more, to be given an address that another pod let go of.
    tunnel: std::net::TcpListener,
}

struct Failing {
    workload: Arc<Workload>,
    reason: String,
}

/// A pod of this node, for `auth-daemon status`.
#[derive(Clone, Debug, Serialize)]
pub struct PodStatus {
    /// Namespace and name.
    pub pod: String,
    /// Its SPIFFE ID.
    pub identity: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its network namespace.
    pub netns: String,
    /// Whether its connections go through the daemon.
    pub enrolled: bool,
    /// Why not.
    pub reason: String,
    /// Tunnels that idle.
    #[serde(rename = "idleTunnels")]
    pub idle_tunnels: usize,
}

impl Enrolment {
    /// Serves no pod yet; connections will run on `data_path`.
    pub fn new(node: Arc<Node>, data_path: Handle) -> Self {
        Self {
            node,
            data_path,
            serving: HashMap::new(),
            failing: BTreeMap::new(),
            told: Told::default(),
        }
    }

    /// Follows the registry until `stop`, then drains: takes no more connections and waits for those under way, for
    /// as long as the configuration says.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut changes = self.node.registry.changes();
        let mut first = true;
        while !*stop.borrow() {
            // The version before the snapshot: a change in between is seen again, never missed.
            let version = *changes.borrow_and_update();
            let snapshot = self.node.registry.snapshot();
            self.tell_addresses(version, &snapshot);
            self.reconcile(&snapshot);
            if first {
                first = false;
                let served = self.serving.values().map(|serving| &serving.pod.enrolled);
                forget_others(&self.node.kernel, served);
                self.node.ready.store(true, Ordering::Relaxed);
            }
            self.publish_status();
            tokio::select! {
                _ = changes.changed() => {}
                _ = stop.changed() => {}
                () = tokio::time::sleep(TICK) => {
                    self.node.kernel.sweep_pending();
                    for serving in self.serving.values() {
                        serving.pod.pool.sweep();
                    }
                }
            }
        }
        self.drain().await;
    }

    async fn drain(self) {
        self.node.ready.store(false, Ordering::Relaxed);
        self.node.draining.send_replace(true);
        // The listeners close as their accepting tasks hear of it, and their copies here.
        let tasks: Vec<_> = self
            .serving
            .into_values()
            .flat_map(|serving| serving.tasks)
            .collect();
        let started = tokio::time::Instant::now();
        tracing::info!(connections = self.node.live.count(), "draining");
        while self.node.live.count() > 0 && started.elapsed() < self.node.config.drain {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // The pods stay enrolled, so that the kernel refuses what nobody serves now.
        for task in tasks {
            task.abort();
        }
    }

    /// Tells the kernel's side which addresses the mesh has, when that may have changed.
    fn tell_addresses(&mut self, registry_version: u64, snapshot: &Snapshot) {
        let now = Told {
            registry_version: Some(registry_version),
            node_addresses: node_addresses(),
        };
        if now == self.told {
            return;
        }
        let kernel = &self.node.kernel;
        let told = kernel
            .set_mesh(&self.mesh_addresses(snapshot, &now.node_addresses))
            .and_then(|()| kernel.set_default_inbound(self.node.inbound_mode()));
        match told {
            Ok(()) => self.told = now,
            Err(error) => tracing::error!(
                %error, "cannot tell the kernel's side the mesh's addresses; new ones are not captured"
            ),
        }
    }

    fn reconcile(&mut self, snapshot: &Snapshot) {
        let wanted: HashMap<&ObjectName, &Arc<Workload>> = snapshot
            .workloads()
            .iter()
            .filter(|workload| workload.node == self.node.config.node_name)
            .map(|workload| (&workload.name, workload))
            .collect();
        let leaving: Vec<_> = self
            .serving
            .iter()
            .filter(|(name, serving)| {
                !serving.pod.enrolled.netns.is_current()
                    || wanted
                        .get(name)
                        .is_none_or(|workload| !is_same_pod(workload, &serving.pod.workload))
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in leaving {
            self.release(&name);
        }
        self.failing.retain(|name, _| wanted.contains_key(name));
        for (name, workload) in wanted {
            if !self.serving.contains_key(name) {
                self.enrol(workload);
            }
        }
    }

    fn enrol(&mut self, workload: &Arc<Workload>) {
        let node = &self.node;
        let enrolled = Enrolled::new(&node.kernel, workload, node.inbound_mode());
        let (enrolled, listeners) = match enrolled {
            Ok(enrolled) => enrolled,
            Err(error) => {
                let reason = error.to_string();
                let known = self.failing.get(&workload.name);
                if known.is_none_or(|known| known.reason != reason) {
                    tracing::error!("{reason}");
                }
                let workload = workload.clone();
                self.failing
                    .insert(workload.name.clone(), Failing { workload, reason });
                return;
            }
        };
        self.failing.remove(&workload.name);
        let certificate = node.certificates.acquire(&workload.identity);
        let pod = Arc::new(Pod::new((**workload).clone(), enrolled, certificate));
        let _runtime = self.data_path.enter();
        let mut tasks = Vec::new();
        for listener in listeners.outbound {
            tasks.push(self.listen(&pod, listener, Side::Outbound));
        }
        let tunnel = match listeners.tunnel.try_clone() {
            Ok(tunnel) => tunnel,
            Err(error) => {
                tracing::error!(pod = %workload.name, %error, "cannot keep its listener; trying again");
                pod.enrolled.remove(&node.kernel);
                node.certificates.release(&workload.identity);
                return;
            }
        };
        tasks.push(self.listen(&pod, listeners.tunnel, Side::Inbound));
        tracing::info!(
            pod = %workload.name, identity = %workload.identity, addresses = ?workload.addresses, "pod enrolled"
        );
        self.serving
            .insert(workload.name.clone(), Serving { pod, tasks, tunnel });
    }

    fn listen(&self, pod: &Arc<Pod>, listener: std::net::TcpListener, side: Side) -> AbortHandle {
        let (node, pod) = (self.node.clone(), pod.clone());
        let draining = self.node.draining.subscribe();
        self.data_path
            .spawn(async move {
                match TcpListener::from_std(listener) {
                    Ok(listener) => accept(node, pod, listener, side, draining).await,
                    Err(error) => tracing::error!(%error, "cannot watch a listener"),
                }
            })
            .abort_handle()
    }

    fn release(&mut self, name: &ObjectName) {
        let Some(Serving { pod, tasks, .. }) = self.serving.remove(name) else {
            return;
        };
        // Connections end with a RST as their tasks are dropped.
        for task in tasks {
            task.abort();
        }
        pod.enrolled.remove(&self.node.kernel);
        self.node.certificates.release(&pod.workload.identity);
        // An address in dispute goes to the pod that is left with it.
        for other in self.serving.values() {
            let mut shared = other.pod.workload.addresses.clone();
            shared.retain(|address| pod.workload.addresses.contains(address));
            let mode = self.node.inbound_mode();
            if let Err(error) = self.node.kernel.admit(&shared, &other.tunnel, mode) {
                tracing::error!(pod = %other.pod.workload.name, %error, "cannot give it its address back");
            }
        }
        tracing::info!(pod = %name, "pod released");
    }

    fn mesh_addresses(
        &self,
        snapshot: &Snapshot,
        node_addresses: &[IpAddr],
    ) -> HashMap<IpNet, MeshKind> {
        let mut addresses = HashMap::new();
        for network in &self.node.config.pod_networks {
            addresses.insert(network.trunc(), MeshKind::PodNetwork);
        }
        for address in snapshot.service_addresses() {
            addresses.insert(address.into(), MeshKind::Service);
        }
        for address in snapshot.pod_addresses() {
            addresses.insert(address.into(), MeshKind::Pod);
        }
        for address in node_addresses {
            addresses.insert((*address).into(), MeshKind::Node);
        }
        addresses
    }

    fn publish_status(&self) {
        let status = |workload: &Workload, reason: &str, idle_tunnels| PodStatus {
            pod: workload.name.to_string(),
            identity: workload.identity.to_string(),
            addresses: workload.addresses.clone(),
            netns: workload
                .netns
                .as_ref()
                .map(|path| path.display().to_string())
                .unwrap_or_default(),
            enrolled: reason.is_empty(),
            reason: reason.to_owned(),
            idle_tunnels,
        };
        let mut pods: Vec<_> = self
            .serving
            .values()
            .map(|serving| status(&serving.pod.workload, "", serving.pod.pool.idle()))
            .chain(
                self.failing
                    .values()
                    .map(|failing| status(&failing.workload, &failing.reason, 0)),
            )
            .collect();
        pods.sort_by(|a, b| a.pod.cmp(&b.pod));
        *self
            .node
            .pods
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = pods;
    }
}

/// Whether `new` is the pod that was enrolled as `old`: what else changed does not touch its connections.
fn is_same_pod(new: &Workload, old: &Workload) -> bool {
    new.uid == old.uid
        && new.identity == old.identity
        && new.addresses == old.addresses
        && new.netns == old.netns
}

/// The addresses of this node, where probes come from, in order.
fn node_addresses() -> Vec<IpAddr> {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    let mut addresses: Vec<_> = interfaces
        .filter_map(|interface| {
            let storage = interface.address?;
            let v4 = storage.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            let v6 = storage.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip()));
            v4.or(v6)
        })
        .filter(|address| !address.is_loopback())
        .collect();
    addresses.sort();
    addresses.dedup();
    addresses
}

#[derive(Clone, Copy)]
enum Side {
    Outbound,
    Inbound,
}

/// Accepts until told to drain, then only waits for what is under way. Dropped, it drops all its connections.
async fn accept(
    node: Arc<Node>,
    pod: Arc<Pod>,
    listener: TcpListener,
    side: Side,
    mut draining: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    while !*draining.borrow() {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((tcp, from)) => {
                    let (node, pod) = (node.clone(), pod.clone());
                    match side {
                        Side::Outbound => {
                            connections.spawn(async move {
                                outbound::serve(&node, &pod, tcp, canonical(from)).await;
                            });
                        }
                        Side::Inbound => spawn_inbound(&mut connections, node, pod, tcp, from),
                    }
                }
                Err(error) => {
                    tracing::warn!(pod = %pod.workload.name, %error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
            _ = draining.changed() => {}
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

fn spawn_inbound(
    connections: &mut JoinSet<()>,
    node: Arc<Node>,
    pod: Arc<Pod>,
    tcp: TcpStream,
    from: SocketAddr,
) {
    let from = canonical(from);
    match pod.handshakes.clone().try_acquire_owned() {
        Ok(permit) => {
            connections.spawn(async move {
                inbound::serve(&node, &pod, tcp, from, permit).await;
            });
        }
        Err(_) => {
            tracing::warn!(pod = %pod.workload.name, client = %from, "too many handshakes at once; refused");
            let _ = crate::datapath::sockets::end_with_reset((&tcp).into());
        }
    }
}
