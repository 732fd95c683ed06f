//! Keeps the pods that this node serves in step with the registry: enrols those that appear, lets go of those that
//! leave, and tells the kernel's side which addresses the mesh has.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use auth_common::MeshKind;
use ipnet::IpNet;
use serde::Serialize;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::AbortHandle,
};

use super::{
    Node, Pod, Workers,
    connections::Connections,
    inbound, outbound, revocation,
    same_node::{self, Resident, Residents},
};
use crate::{
    datapath::{
        EnrolError, Enrolled, forget_others, open_netns,
        sockets::{Listeners, canonical},
    },
    mesh::{AddressKind, ObjectName, Snapshot, Workload},
    places::Place,
};

/// How often to look for namespaces made anew, idle tunnels and stale entries.
const TICK: Duration = Duration::from_secs(1);
/// How often a drain looks whether it is over.
const DRAIN_POLL: Duration = Duration::from_millis(20);
/// How long connections may take to end when they are cut.
const ABORT: Duration = Duration::from_secs(1);
/// After an accept failed for want of something: file descriptors, memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The pods of this node.
pub struct Enrolment {
    node: Arc<Node>,
    /// Where connections run.
    workers: Arc<Workers>,
    serving: HashMap<ObjectName, Serving>,
    failing: BTreeMap<ObjectName, Failing>,
    /// Which pod has each address; of two that claim one, the one that was first.
    owners: HashMap<IpAddr, ObjectName>,
    /// What the kernel's side was told the mesh's addresses are.
    told: Told,
}

/// The sources of the mesh's addresses, as they were when the kernel's side was told.
#[derive(Default)]
struct Told {
    /// `None`: not at all, or it could not be told.
    snapshot: Option<Arc<Snapshot>>,
    node_addresses: Vec<IpAddr>,
}

struct Serving {
    pod: Arc<Pod>,
    tasks: Vec<AbortHandle>,
    /// The pod's listeners once more: to be served for the pod that has the namespace next, and given addresses.
    listeners: Listeners,
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

impl Serving {
    fn cookie(&self) -> u64 {
        self.pod.enrolled.netns.cookie()
    }
}

impl Enrolment {
    /// Serves no pod yet; connections will run on `workers`.
    pub fn new(node: Arc<Node>, workers: Arc<Workers>) -> Self {
        Self {
            node,
            workers,
            serving: HashMap::new(),
            failing: BTreeMap::new(),
            owners: HashMap::new(),
            told: Told::default(),
        }
    }

    /// Follows the registry until `stop`, then drains: takes no more connections and waits for those under way, for
    /// as long as the configuration says.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut changes = self.node.registry.changes();
        let mut first = true;
        while !*stop.borrow() {
            // Before the snapshot: a change in between is seen again, never missed.
            changes.borrow_and_update();
            let snapshot = self.node.registry.snapshot();
            self.tell_addresses(&snapshot);
            self.reconcile(&snapshot);
            if first {
                first = false;
                self.node.same_node.adopt(&self.node);
                tokio::spawn(same_node::keep(self.node.clone()));
                tokio::spawn(revocation::keep(self.node.clone()));
                let worker = self.workers.next();
                worker
                    .runtime
                    .spawn(same_node::log_closed(self.node.clone()));
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
            tokio::time::sleep(DRAIN_POLL).await;
        }
        // The pods stay enrolled, so that the kernel refuses what nobody serves now.
        for task in tasks {
            task.abort();
        }
        // Each leaves its line in the log on its worker.
        let aborted = tokio::time::Instant::now();
        while self.node.live.count() > 0 && aborted.elapsed() < ABORT {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Tells the kernel's side which addresses the mesh has: what has changed, or, where the node's own have, all.
    fn tell_addresses(&mut self, snapshot: &Arc<Snapshot>) {
        let kernel = &self.node.kernel;
        let node_addresses = node_addresses();
        let told = match &self.told.snapshot {
            Some(before) if node_addresses == self.told.node_addresses => {
                if Arc::ptr_eq(before, snapshot) {
                    return;
                }
                let networks = &self.node.config.pod_networks;
                let changes = snapshot.addresses_since(before);
                let changes = changes
                    // The node's own say what they are, whatever else they may be.
                    .filter(|(address, _)| !node_addresses.contains(address))
                    .map(|(address, kind)| {
                        let network = IpNet::from(address);
                        let left = networks.contains(&network).then_some(MeshKind::PodNetwork);
                        (network, kind.map(mesh_kind).or(left))
                    });
                kernel.change_mesh(changes)
            }
            _ => kernel.set_mesh(&self.mesh_addresses(snapshot, &node_addresses)),
        };
        self.told = Told {
            snapshot: told.is_ok().then(|| snapshot.clone()),
            node_addresses,
        };
        if let Err(error) = told {
            tracing::error!(
                %error, "cannot tell the kernel's side the mesh's addresses; new ones are not captured"
            );
        }
    }

    fn reconcile(&mut self, snapshot: &Snapshot) {
        let wanted: BTreeMap<&ObjectName, &Arc<Workload>> = snapshot
            .on_node(&self.node.config.node_name)
            .map(|workload| (&workload.name, workload))
            .collect();
        let (staying, mut leaving): (HashMap<_, _>, HashMap<_, _>) =
            std::mem::take(&mut self.serving).into_iter().partition(
                |(name, serving): &(ObjectName, Serving)| {
                    !serving.pod.enrolled.netns.is_replaced()
                        && wanted
                            .get(name)
                            .is_some_and(|workload| is_same_pod(workload, &serving.pod.workload))
                },
            );
        self.serving = staying;
        self.failing.retain(|name, _| wanted.contains_key(name));
        for (name, workload) in wanted {
            if !self.serving.contains_key(name)
                && let Err(error) = self.serve(workload, &mut leaving)
            {
                self.note_failure(workload, error.to_string());
            }
        }
        for (_, serving) in leaving {
            self.release(serving);
        }
        // Those that cannot be served now stay in the kernel's hands, and are refused.
        let failing = self.failing.values().filter_map(|failing| {
            let netns = open_netns(&failing.workload).ok()?;
            Some(netns.cookie())
        });
        let kept = self.serving.values().map(Serving::cookie).chain(failing);
        forget_others(&self.node.kernel, &kept.collect());
        self.settle_addresses();
    }

    /// Begins to serve `workload`. A namespace that one of `leaving` had is handed over without a gap: it is never
    /// without a listener, nor out of the kernel's hands.
    fn serve(
        &mut self,
        workload: &Arc<Workload>,
        leaving: &mut HashMap<ObjectName, Serving>,
    ) -> Result<(), EnrolError> {
        let kernel = &self.node.kernel;
        let netns = open_netns(workload)?;
        let holds = |serving: &Serving| serving.cookie() == netns.cookie();
        if let Some(other) = self.serving.values().find(|serving| holds(serving)) {
            return Err(EnrolError::Taken {
                pod: workload.name.clone(),
                path: netns.path().to_owned(),
                other: other.pod.workload.name.clone(),
            });
        }
        let before = leaving
            .iter()
            .find(|(_, serving)| holds(serving))
            .map(|(name, _)| name.clone());
        let (enrolled, listeners) = match before.and_then(|name| leaving.remove(&name)) {
            Some(before) => match before.pod.enrolled.hand_over(kernel, workload) {
                Ok(enrolled) => {
                    let listeners = self.end(before);
                    (enrolled, listeners)
                }
                Err(error) => {
                    leaving.insert(before.pod.workload.name.clone(), before);
                    return Err(error);
                }
            },
            None => Enrolled::new(kernel, workload, netns)?,
        };
        // Without them it stays in the kernel's hands, and is refused until the next attempt.
        let to_watch = listeners.try_clone().map_err(|error| EnrolError::Setup {
            pod: workload.name.clone(),
            what: "cannot keep its listeners",
            error,
        })?;
        let certificate = self.node.certificates.acquire(&workload.identity);
        let pod = Arc::new(Pod::new((**workload).clone(), enrolled, certificate));
        let mut tasks = Vec::new();
        for listener in to_watch.outbound {
            tasks.push(self.listen(&pod, listener, Side::Outbound));
        }
        tasks.push(self.listen(&pod, to_watch.tunnel, Side::Inbound));
        tracing::info!(
            pod = %workload.name, identity = %workload.identity, addresses = ?workload.addresses, "pod enrolled"
        );
        self.failing.remove(&workload.name);
        let serving = Serving {
            pod,
            tasks,
            listeners,
        };
        self.serving.insert(workload.name.clone(), serving);
        Ok(())
    }

    fn note_failure(&mut self, workload: &Arc<Workload>, reason: String) {
        let known = self.failing.get(&workload.name);
        if known.is_none_or(|known| known.reason != reason) {
            tracing::error!("{reason}");
        }
        let workload = workload.clone();
        self.failing
            .insert(workload.name.clone(), Failing { workload, reason });
    }

    /// Takes a pod out of the mesh.
    fn release(&self, serving: Serving) {
        serving.pod.enrolled.remove(&self.node.kernel);
        tracing::info!(pod = %serving.pod.workload.name, "pod released");
        self.end(serving);
    }

    /// Ends what a pod has under way: connections end with a RST as their tasks are dropped.
    fn end(&self, serving: Serving) -> Listeners {
        for task in serving.tasks {
            task.abort();
        }
        self.node
            .certificates
            .release(&serving.pod.workload.identity);
        serving.listeners
    }

    /// Leads each address to the pod that has it, and says which pods there are.
    fn settle_addresses(&mut self) {
        let serving = &self.serving;
        let claims = |name: &ObjectName, address: &IpAddr| {
            serving
                .get(name)
                .is_some_and(|serving| serving.pod.workload.addresses.contains(address))
        };
        self.owners.retain(|address, name| claims(name, address));
        for (name, serving) in serving {
            for address in &serving.pod.workload.addresses {
                self.owners.entry(*address).or_insert_with(|| name.clone());
            }
        }
        let wanted = self
            .owners
            .iter()
            .filter_map(|(address, name)| Some((*address, &serving.get(name)?.listeners.tunnel)))
            .collect();
        let mode = self.node.inbound_mode();
        if let Err(error) = self.node.kernel.set_inbound(&wanted, mode) {
            tracing::error!(%error, "cannot tell the kernel's side what to admit");
        }
        let pods = self.serving.values().map(|serving| serving.pod.clone());
        self.node
            .same_node
            .settle(&self.node, self.residents(), pods.collect());
    }

    fn residents(&self) -> Residents {
        let by_cookie: HashMap<_, _> = self
            .serving
            .values()
            .map(|serving| {
                let workload = &serving.pod.workload;
                let resident = Resident {
                    cookie: serving.cookie(),
                    identity: workload.identity.clone(),
                    addresses: workload.addresses.clone(),
                };
                (resident.cookie, Arc::new(resident))
            })
            .collect();
        let by_address = self
            .owners
            .iter()
            .filter_map(|(address, name)| {
                let resident = by_cookie.get(&self.serving.get(name)?.cookie())?;
                Some((*address, resident.clone()))
            })
            .collect();
        Residents {
            by_cookie,
            by_address,
        }
    }

    /// Watches one of a pod's listeners.
    fn listen(&self, pod: &Arc<Pod>, listener: std::net::TcpListener, side: Side) -> AbortHandle {
        let acceptor = Acceptor {
            node: self.node.clone(),
            pod: pod.clone(),
            side,
            workers: self.workers.clone(),
            connections: Connections::default(),
        };
        let draining = self.node.draining.subscribe();
        let watch = async move {
            match TcpListener::from_std(listener) {
                Ok(listener) => acceptor.run(listener, draining).await,
                Err(error) => tracing::error!(%error, "cannot watch a listener"),
            }
        };
        self.workers.next().runtime.spawn(watch).abort_handle()
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
        for (address, kind) in snapshot.addresses() {
            addresses.insert(address.into(), mesh_kind(kind));
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

/// What the kernel's side calls it.
fn mesh_kind(kind: AddressKind) -> MeshKind {
    match kind {
        AddressKind::Pod => MeshKind::Pod,
        AddressKind::Service => MeshKind::Service,
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

/// Takes what comes to one of a pod's listeners. Dropped, it drops all its connections.
struct Acceptor {
    node: Arc<Node>,
    pod: Arc<Pod>,
    side: Side,
    workers: Arc<Workers>,
    connections: Connections,
}

impl Acceptor {
    /// Accepts until told to drain, then only waits for what is under way.
    async fn run(self, listener: TcpListener, mut draining: watch::Receiver<bool>) {
        while !*draining.borrow() {
            tokio::select! {
                accepted = listener.accept() => {
                    if let Err(error) = accepted.and_then(|(tcp, from)| self.take(tcp, from)) {
                        tracing::warn!(
                            pod = %self.pod.workload.name, %error, "cannot accept a connection"
                        );
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                _ = draining.changed() => {}
            }
        }
        drop(listener);
        while !self.connections.is_empty() {
            tokio::time::sleep(DRAIN_POLL).await;
        }
    }

    /// Gives a connection to the worker that has the fewest.
    fn take(&self, tcp: TcpStream, from: SocketAddr) -> io::Result<()> {
        let from = canonical(from);
        let place = match self.side {
            Side::Outbound => None,
            Side::Inbound => match self.pod.handshakes.admit(from.ip()) {
                Some(place) => Some(place),
                None => {
                    tracing::warn!(
                        pod = %self.pod.workload.name, client = %from,
                        "too many handshakes at once; refused"
                    );
                    return Ok(());
                }
            },
        };
        let worker = self.workers.idlest();
        let load = worker.count();
        let (node, pod) = (self.node.clone(), self.pod.clone());
        if worker.is_current() {
            self.connections.spawn(&worker.runtime, async move {
                serve(&node, &pod, tcp, from, place).await;
                drop(load);
            });
            return Ok(());
        }
        // It wakes the thread whose runtime knows it.
        let tcp = tcp.into_std()?;
        let elsewhere = async move {
            match TcpStream::from_std(tcp) {
                Ok(tcp) => serve(&node, &pod, tcp, from, place).await,
                Err(error) => tracing::warn!(
                    pod = %pod.workload.name, client = %from, %error, "cannot serve a connection"
                ),
            }
            drop(load);
        };
        self.connections.spawn(&worker.runtime, elsewhere);
        Ok(())
    }
}

/// One connection: of a pod that calls, or, with a `place` among the handshakes, of one that is called.
async fn serve(node: &Node, pod: &Pod, tcp: TcpStream, from: SocketAddr, place: Option<Place>) {
    match place {
        None => outbound::serve(node, pod, tcp, from).await,
        Some(place) => inbound::serve(node, pod, tcp, from, place).await,
    }
}
