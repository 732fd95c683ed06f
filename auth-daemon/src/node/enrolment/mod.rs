//! Keeps the pods that this node serves in step with the registry: enrols pods that appear, releases pods that leave,
//! and writes the mesh's addresses to the kernel's maps.

mod addresses;
mod ended;
mod local_pods;
mod outside;
mod pod_roots;
mod policies;
mod proven_nodes;
mod shares;
mod starting;
mod tampering;
mod workload_api;

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::{IpAddr, TcpListener},
    sync::{Arc, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use auth_common::Inbound;
use tokio::{
    sync::watch,
    task::{AbortHandle, JoinHandle},
    time::{MissedTickBehavior, timeout},
};

use super::{
    Workers,
    acceptor::{Accepting, DRAIN_POLL, Side, accept},
    remote_clusters, revocation,
};
use crate::proxy::{Node, Pod, PodStatus, routes, rules, same_node};
use addresses::Written;
use auth_datapath::{
    EnrolError, Enrolled, Kernel, Netns, NetnsDiscovery, NodeAddresses, PodLinks, open_netns,
    sockets::Listeners,
};
use auth_mesh::{ObjectName, Snapshot, Workload};
use ended::{Ended, EndedPods, Pods, shown};
use outside::OutsidePods;
use pod_roots::PodRoots;
use policies::Unchecked;
use shares::ExceededShares;
use starting::StartingPods;
use tampering::Tampering;
use workload_api::WorkloadApis;

/// Interval at which to check for recreated named netns, idle tunnels and stale entries.
const TICK: Duration = Duration::from_secs(1);
/// Maximum pause after a change has been applied.
const MAX_PAUSE: Duration = Duration::from_millis(100);
/// Timeout for connections to end after they are cut.
const ABORT: Duration = Duration::from_secs(1);
/// Timeout for listeners to close.
const CLOSE: Duration = Duration::from_secs(5);
/// Time for which a pod may have no process before that is logged.
const LATE: Duration = Duration::from_secs(60);

/// The pods of this node.
pub struct Enrolment {
    node: Arc<Node>,
    /// The threads that connections run on.
    workers: Arc<Workers>,
    /// By the cookie of their netns.
    serving: HashMap<u64, Serving>,
    failing: BTreeMap<ObjectName, Failing>,
    /// Finds netns that have no name.
    netns_discovery: NetnsDiscovery,
    /// Pods whose open plaintext connections are to be checked against policies, by cookie.
    unchecked: HashMap<u64, Unchecked>,
    /// Whether a tick has passed since the last sweep.
    is_tick: bool,
    /// Pods that are enrolled for their processes only.
    ended: EndedPods,
    /// Pods that are not in the mesh, whose netns the kernel must not close.
    outside: OutsidePods,
    /// Pods that the container runtime is about to start.
    starting: StartingPods,
    /// The pod that owns each address, by the cookie of its netns. If two pods claim an address, the first one owns it.
    owners: HashMap<IpAddr, u64>,
    /// The mesh addresses last written to the kernel.
    written: Written,
    node_addresses: NodeAddresses,
    pod_links: PodLinks,
    pod_roots: PodRoots,
    tampering: Tampering,
    exceeded_shares: ExceededShares,
    workload_apis: WorkloadApis,
    /// The other tasks that update the kernel's maps.
    keepers: Vec<JoinHandle<()>>,
}

struct Serving {
    pod: Arc<Pod>,
    /// The tasks that accept connections, one for each of the listeners.
    accepting: Vec<Accepting>,
    /// The tasks of listeners that have died. They serve the connections that they accepted.
    former: Vec<AbortHandle>,
    /// Duplicates of the pod's listeners, for handing over to the next pod of the netns and for learning addresses.
    listeners: Listeners,
    /// Set if the pod is served only because its netns has processes.
    ended: Option<Ended>,
    /// Why a listener that has died cannot be opened again.
    closed: Option<String>,
    /// Why the pod is refused in both directions, although it is served.
    refused: Option<String>,
}

struct Failing {
    workload: Arc<Workload>,
    reason: String,
    since: Instant,
    is_logged: bool,
}

impl Serving {
    fn cookie(&self) -> u64 {
        self.pod.enrolled.netns.cookie()
    }

    fn tasks(&self) -> impl Iterator<Item = &AbortHandle> {
        let accepting = self.accepting.iter().map(|accepting| &accepting.task);
        accepting.chain(&self.former)
    }

    /// Opens listeners again that have died, and replaces their tasks.
    fn revive(&mut self, node: &Arc<Node>, workers: &Arc<Workers>) {
        self.former.retain(|task| !task.is_finished());
        let revived = (0..self.accepting.len()).try_for_each(|index| {
            let enrolled = &self.pod.enrolled;
            let has_died = enrolled.reopen(&node.kernel, &mut self.listeners, index)?;
            let accepting = &mut self.accepting[index];
            if has_died || !accepting.is_accepting() {
                let side = side(index, &self.listeners);
                let listener = self.listeners.all().nth(index).map(TcpListener::try_clone);
                let listener = listener.ok_or(io::ErrorKind::NotFound)??;
                let new = accept(node, &self.pod, workers, listener, side);
                self.former.push(std::mem::replace(accepting, new).task);
                tracing::info!(pod = %self.pod.workload.name, "a listener is open again");
            }
            Ok(())
        });
        self.closed = revived.err().map(|error: io::Error| error.to_string());
    }

    /// Sets what the kernel admits to the pod.
    fn admit(&mut self, kernel: &Kernel, mode: Inbound) {
        let (pod, enrolled) = (&self.pod.workload.name, &self.pod.enrolled);
        let refused = match &self.closed {
            Some(error) => {
                enrolled.refuse(kernel);
                Some(error.clone())
            }
            None => {
                let admitted = enrolled.admit(kernel, mode, &self.listeners.tunnel);
                admitted.err().map(|error| error.to_string())
            }
        };
        match &refused {
            Some(error) if self.refused.as_ref() != Some(error) => tracing::error!(
                %pod, error, "a pod is refused in both directions: cannot set what it admits; retrying"
            ),
            None if self.refused.is_some() => tracing::info!(%pod, "a pod is no longer refused"),
            _ => {}
        }
        self.refused = refused;
    }
}

impl Enrolment {
    /// Creates an enrolment that serves no pod yet. Connections run on `workers`. Must be called within the control
    /// runtime.
    pub fn new(node: Arc<Node>, workers: Arc<Workers>) -> Self {
        Self {
            netns_discovery: NetnsDiscovery::new(&node.kernel),
            workers,
            serving: HashMap::new(),
            failing: BTreeMap::new(),
            unchecked: HashMap::new(),
            is_tick: false,
            ended: EndedPods::default(),
            outside: OutsidePods::default(),
            starting: StartingPods::new(node.config.nri.as_deref()),
            workload_apis: WorkloadApis::new(node.config.workload_api.socket.as_deref()),
            node,
            owners: HashMap::new(),
            written: Written::default(),
            node_addresses: NodeAddresses::default(),
            pod_links: PodLinks::default(),
            pod_roots: PodRoots::default(),
            tampering: Tampering::default(),
            exceeded_shares: ExceededShares::default(),
            keepers: Vec::new(),
        }
    }

    /// Follows the registry until `stop`, then drains: accepts no more connections and waits for the open ones, for at
    /// most the configured time.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut changes = self.node.registry.changes();
        let mut policies = self.node.policies.changes();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Until discovery has reported the pods, a previous daemon's pods stay as they are.
        while *changes.borrow() == 0 && !*stop.borrow() {
            tokio::select! {
                _ = changes.changed() => {}
                _ = stop.changed() => {}
            }
        }
        // Before a pod is served, so that no change is missed.
        let mut route_watch = Some(self.node.same_node.routes.watch());
        let mut first = true;
        while !*stop.borrow() {
            let started = Instant::now();
            // Before the snapshot, so that a change in between is seen again and never missed.
            changes.borrow_and_update();
            policies.borrow_and_update();
            let snapshot = self.node.registry.snapshot();
            self.remember_daemons(&snapshot);
            self.tell_addresses(&snapshot);
            if first {
                // Find the pods that a previous daemon served before any of them is released.
                let (running, finished) = pods_of(&snapshot, &self.node.config.node_name);
                self.look_for(&running, &finished);
                self.netns_discovery.look().await;
                self.outside.look(&self.node).await;
            }
            self.reconcile(&snapshot);
            if first {
                first = false;
                self.node.kernel.remove_other_layouts();
                self.node.same_node.adopt(&self.node).await;
                if let Some(watch) = route_watch.take() {
                    tokio::spawn(routes::keep(self.node.clone(), watch));
                }
                let keep = tokio::spawn(same_node::keep(self.node.clone()));
                tokio::spawn(revocation::keep(self.node.clone()));
                tokio::spawn(remote_clusters::keep(self.node.clone()));
                let worker = self.workers.next(false);
                let log = worker
                    .runtime
                    .spawn(same_node::log_closed(self.node.clone()));
                self.keepers.extend([keep, log]);
                self.node.ready.store(true, Ordering::Relaxed);
            }
            self.answer_starting(&snapshot);
            self.publish_status();
            // Changes that follow one another fast are applied together, and leave half of the processor's time to others.
            tokio::time::sleep(started.elapsed().min(MAX_PAUSE)).await;
            tokio::select! {
                _ = changes.changed() => {}
                _ = policies.changed() => {}
                _ = stop.changed() => {}
                () = self.netns_discovery.changed() => {}
                () = self.outside.changed(&self.node) => {}
                () = self.node.kernel.forwarding_changed() => {}
                () = self.pod_links.changed() => {}
                () = self.starting.changed() => {
                    self.netns_discovery.search_now();
                    self.outside.search_now();
                }
                _ = ticks.tick() => {
                    self.is_tick = true;
                    self.node.kernel.sweep_shares();
                    self.pod_roots.keep(&self.node);
                    self.tampering.check(&self.serving);
                    self.exceeded_shares.check(&self.node.kernel, &self.serving);
                    self.node.connections.tell_left_out(|cookie| {
                        let serving = self.serving.get(&cookie);
                        serving.map(|serving| serving.pod.workload.name.clone())
                    });
                    for serving in self.serving.values() {
                        serving.pod.pool.sweep();
                        serving.pod.hbone.sweep();
                    }
                }
            }
        }
        self.drain().await;
    }

    async fn drain(self) {
        self.node.ready.store(false, Ordering::Relaxed);
        self.node.draining.send_replace(true);
        // The runtime must not wait for this daemon any more.
        drop(self.starting);
        drop(self.workload_apis);
        // The connections that are open depend on it. It ends with them.
        let pods = self.serving.values().map(|serving| serving.pod.clone());
        let links = links_of_open(
            self.node.clone(),
            pods.collect(),
            self.owners,
            self.pod_links,
        );
        let links = tokio::spawn(links);
        // The listeners close when their accepting tasks see the drain, and their duplicates are dropped here.
        let tasks: Vec<_> = self
            .serving
            .into_values()
            .flat_map(|serving| serving.tasks().cloned().collect::<Vec<_>>())
            .collect();
        let started = tokio::time::Instant::now();
        // A caller that reads this line is refused, and the next daemon cannot open its listeners while these are open.
        if timeout(CLOSE, self.node.listening.closed()).await.is_err() {
            tracing::warn!(
                "listeners are still open after {CLOSE:?}: the data path's threads are busy; callers are accepted, and \
                 another daemon may have to try again"
            );
        }
        tracing::info!(connections = self.node.connections.count(), "draining");
        if self.node.kernel.is_awaited() {
            release(&self.node, self.keepers).await;
        }
        while self.node.connections.count() > 0 && started.elapsed() < self.node.config.drain {
            tokio::time::sleep(DRAIN_POLL).await;
        }
        links.abort();
        // The pods stay enrolled, so that the kernel refuses connections that no daemon serves.
        for task in tasks {
            task.abort();
        }
        // Each connection writes its access log line on its worker.
        let aborted = tokio::time::Instant::now();
        while self.node.connections.count() > 0 && aborted.elapsed() < ABORT {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn reconcile(&mut self, snapshot: &Snapshot) {
        let (running, finished) = pods_of(snapshot, &self.node.config.node_name);
        self.look_for(&running, &finished);
        let outside = self.open_outside(snapshot);
        let (mut staying, mut leaving): (HashMap<_, _>, HashMap<_, _>) =
            std::mem::take(&mut self.serving)
                .into_iter()
                .partition(|(_, serving)| {
                    let workload = running.get(&serving.pod.workload.name);
                    workload.is_some_and(|workload| self.is_served(workload, serving))
                });
        for serving in staying.values_mut() {
            serving.ended = None;
        }
        self.serving = staying;
        self.failing
            .retain(|name, _| running.contains_key(name) || finished.contains_key(name));
        let served: HashMap<_, _> = self
            .serving
            .values()
            .map(|serving| (serving.pod.workload.name.clone(), serving.cookie()))
            .collect();
        for (name, workload) in &running {
            let serving = served
                .get(*name)
                .and_then(|cookie| self.serving.get(cookie));
            if let Some(serving) = serving {
                self.learn_addresses(workload, serving);
            } else if let Err(error) = self.serve(workload, &mut leaving) {
                self.note_failure(workload, &error);
            }
        }
        self.serve_finished(&finished, &mut leaving);
        self.settle_leaving(snapshot, (&running, &finished), leaving);
        let before = self.settle_rules(&running);
        if self.netns_discovery.knows_all() {
            // Pods that cannot be served now stay enrolled in the kernel, which refuses their connections.
            let failing = self.failing.values().filter_map(|failing| {
                let netns = self.netns(&failing.workload).ok();
                netns
                    .map(|netns| netns.cookie())
                    .or_else(|| self.netns_discovery.shared(&failing.workload))
            });
            let kept = self.serving.keys().copied().chain(failing).collect();
            self.settle_unserved(snapshot, &kept);
        }
        self.close_undecided(&outside);
        self.hold_ended();
        self.settle_addresses();
        self.workload_apis.settle(&self.node, &self.serving);
        if let Some(before) = before {
            self.end_denied(&before);
        }
        self.sweep(snapshot);
    }

    /// Finds the netns of a pod that is not served, by the netns name or else by the pod's processes.
    fn netns(&self, workload: &Workload) -> Result<Arc<Netns>, EnrolError> {
        match &workload.netns {
            Some(path) => open_netns(&workload.name, path).map(Arc::new),
            None => self.netns_discovery.netns(workload),
        }
    }

    /// Whether `serving` serves `workload` in its current netns. Other changes do not affect its connections.
    fn is_served(&self, workload: &Workload, serving: &Serving) -> bool {
        let (pod, addresses) = (&serving.pod.workload, serving.pod.enrolled.addresses());
        let is_same = workload.uid == pod.uid
            && workload.identity == pod.identity
            && workload.netns == pod.netns
            // Addresses that become known are not a change.
            && (addresses.is_empty() || addresses == workload.addresses);
        is_same
            && match &workload.netns {
                Some(_) => !serving.pod.enrolled.netns.is_replaced(),
                None => match self.netns_discovery.netns(workload) {
                    Ok(netns) => netns.cookie() == serving.cookie(),
                    Err(error) => !matches!(error, EnrolError::Shared { .. }),
                },
            }
    }

    /// Sets the addresses of a pod that was enrolled before its addresses were known.
    fn learn_addresses(&self, workload: &Workload, serving: &Serving) {
        let enrolled = &serving.pod.enrolled;
        let addresses = &workload.addresses;
        if !enrolled.addresses().is_empty() || addresses.is_empty() {
            return;
        }
        match enrolled.learn_addresses(&self.node.kernel, addresses) {
            Ok(()) => {
                tracing::info!(pod = %workload.name, ?addresses, "a pod's addresses are known")
            }
            Err(error) => tracing::error!(
                pod = %workload.name, %error, "cannot write a pod's addresses to the kernel; retrying"
            ),
        }
    }

    /// Begins to serve `workload`. A netns that a pod of `leaving` had is handed over without a gap: it always has a
    /// listener and stays enrolled in the kernel. Returns its cookie.
    fn serve(
        &mut self,
        workload: &Arc<Workload>,
        leaving: &mut HashMap<u64, Serving>,
    ) -> Result<u64, EnrolError> {
        let kernel = &self.node.kernel;
        let netns = self.netns(workload)?;
        let cookie = netns.cookie();
        if let Some(other) = self.serving.get(&cookie) {
            return Err(EnrolError::Taken {
                pod: workload.name.clone(),
                path: netns.path().to_owned(),
                other: other.pod.workload.name.clone(),
            });
        }
        let (enrolled, listeners) = match leaving.remove(&cookie) {
            Some(before) => match before.pod.enrolled.hand_over(kernel, workload) {
                Ok(enrolled) => {
                    let listeners = self.end(before);
                    (enrolled, listeners)
                }
                Err(error) => {
                    leaving.insert(cookie, before);
                    return Err(error);
                }
            },
            None => {
                let mode = rules::inbound(&self.rules_of(workload));
                Enrolled::new(kernel, workload, netns, mode)?
            }
        };
        let unchecked = Unchecked {
            is_new: !enrolled.was_enrolled,
            ..Unchecked::default()
        };
        self.unchecked.insert(cookie, unchecked);
        // If this fails, the pod stays enrolled in the kernel and is refused until the next attempt.
        let to_watch: io::Result<Vec<_>> = listeners.all().map(TcpListener::try_clone).collect();
        let to_watch = to_watch.map_err(|error| EnrolError::Setup {
            pod: workload.name.clone(),
            what: "cannot keep its listeners",
            error,
        })?;
        let certificate = self.node.certificates.acquire(&workload.identity);
        // Before the pod can be called.
        let rules = self.rules_of(workload);
        self.node.rules.add(cookie, rules);
        let capacity = &self.node.capacity;
        let pod = Pod::new((**workload).clone(), enrolled, certificate, capacity);
        let pod = Arc::new(pod);
        let accepting = to_watch.into_iter().enumerate().map(|(index, listener)| {
            let side = side(index, &listeners);
            accept(&self.node, &pod, &self.workers, listener, side)
        });
        let accepting = accepting.collect();
        let unserved = self.netns_discovery.unserved(workload, cookie);
        tracing::info!(
            pod = %workload.name, identity = %workload.identity, addresses = ?workload.addresses,
            netns = %pod.enrolled.netns.path().display(), found_by = self.netns_discovery.proof(workload),
            unserved_microseconds = unserved.map(|time| time.as_micros() as u64),
            "pod enrolled"
        );
        self.failing.remove(&workload.name);
        let serving = Serving {
            pod,
            accepting,
            former: Vec::new(),
            listeners,
            ended: None,
            closed: None,
            refused: None,
        };
        self.serving.insert(cookie, serving);
        Ok(cookie)
    }

    fn note_failure(&mut self, workload: &Arc<Workload>, error: &EnrolError) {
        let reason = error.to_string();
        let known = self.failing.remove(&workload.name);
        let known = known.filter(|known| known.reason == reason);
        let since = known
            .as_ref()
            .map_or_else(Instant::now, |known| known.since);
        let mut is_logged = known.is_some_and(|known| known.is_logged);
        if !is_logged && matches!(error, EnrolError::NoProcess { .. }) {
            // Every pod starts without a process.
            is_logged = since.elapsed() > LATE;
            if is_logged {
                tracing::warn!(uid = %workload.uid, "{reason}, {LATE:?} after it was made known");
            }
        } else if !is_logged {
            is_logged = true;
            tracing::error!("{reason}");
        }
        let failing = Failing {
            workload: workload.clone(),
            reason,
            since,
            is_logged,
        };
        self.failing.insert(workload.name.clone(), failing);
    }

    /// Removes a pod from the mesh.
    fn release(&self, serving: Serving) {
        serving.pod.enrolled.remove(&self.node.kernel);
        tracing::info!(pod = %serving.pod.workload.name, "pod released");
        self.end(serving);
    }

    /// Ends a pod's connections, with a RST as their tasks are dropped.
    fn end(&self, serving: Serving) -> Listeners {
        for task in serving.tasks() {
            task.abort();
        }
        self.node
            .certificates
            .release(&serving.pod.workload.identity);
        serving.listeners
    }

    /// Assigns each address to the pod that owns it, and publishes the list of pods. A pod that has ended owns only what no
    /// other pod claims.
    fn settle_addresses(&mut self) {
        let serving = &self.serving;
        let is_running = |cookie: &u64| {
            let serving = serving.get(cookie);
            serving.is_some_and(|serving| serving.ended.is_none())
        };
        self.owners.retain(|address, cookie| {
            let serving = serving.get(cookie);
            serving.is_some_and(|serving| serving.pod.enrolled.addresses().contains(address))
        });
        for (cookie, serving) in serving {
            for address in serving.pod.enrolled.addresses() {
                let owner = self.owners.entry(*address).or_insert(*cookie);
                if !is_running(owner) && serving.ended.is_none() {
                    *owner = *cookie;
                }
            }
        }
        let rules = self.node.rules.current();
        for (cookie, serving) in &mut self.serving {
            let policy = rules.of(*cookie);
            let mode = policy.map_or(Inbound::Strict, |policy| rules::inbound(policy));
            if self.is_tick {
                serving.revive(&self.node, &self.workers);
            }
            serving.admit(&self.node.kernel, mode);
        }
        self.publish_local_pods();
    }

    fn publish_status(&self) {
        let served = self.serving.values().map(|serving| {
            let pod = &serving.pod;
            PodStatus {
                pod: pod.workload.name.to_string(),
                identity: pod.workload.identity.to_string(),
                addresses: pod.enrolled.addresses().to_vec(),
                netns: shown(pod.enrolled.netns.path()),
                found_by: self.netns_discovery.proof(&pod.workload),
                enrolled: serving.refused.is_none(),
                reason: match &serving.refused {
                    Some(reason) => format!("refused: {reason}"),
                    None => self.why_served(serving),
                },
                tampered: self.tampering.of(serving.cookie()),
                shared_link: self.shared_link(serving),
                over_share: self.exceeded_shares.of(serving.cookie()),
                idle_tunnels: pod.pool.idle(),
                refused: self.node.refusals.of(&pod.workload.name),
            }
        });
        let failing = self.failing.values().map(|failing| PodStatus {
            pod: failing.workload.name.to_string(),
            identity: failing.workload.identity.to_string(),
            addresses: failing.workload.addresses.clone(),
            netns: failing
                .workload
                .netns
                .as_deref()
                .map_or_else(String::new, shown),
            found_by: String::new(),
            enrolled: false,
            reason: failing.reason.clone(),
            tampered: String::new(),
            shared_link: String::new(),
            over_share: 0,
            idle_tunnels: 0,
            refused: BTreeMap::new(),
        });
        let mut pods: Vec<_> = served
            .chain(failing)
            .chain(self.unserved_status())
            .collect();
        pods.sort_by(|a, b| a.pod.cmp(&b.pod));
        self.node.refusals.retain(|name| {
            let mut serving = self.serving.values();
            serving.any(|serving| serving.pod.workload.name == *name)
        });
        *self
            .node
            .pods
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = pods;
    }
}

/// Follows the links of the pods that are served while their open connections drain.
async fn links_of_open(
    node: Arc<Node>,
    pods: Vec<Arc<Pod>>,
    owners: HashMap<IpAddr, u64>,
    mut pod_links: PodLinks,
) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = pod_links.changed() => {}
            _ = ticks.tick() => {}
        }
        let local_pods = local_pods::of(&pods, &owners, &mut pod_links);
        node.same_node.settle(&node, local_pods, pods.clone());
    }
}

/// Releases the pods and the kernel's maps to the standby daemon. Open connections need neither.
async fn release(node: &Node, keepers: Vec<JoinHandle<()>>) {
    for keeper in keepers {
        keeper.abort();
        let _ = keeper.await;
    }
    node.same_node.release();
    node.kernel.release();
    tracing::info!("another daemon takes over; draining the open connections");
}

/// Which connections the listener at `index` of a pod accepts.
fn side(index: usize, listeners: &Listeners) -> Side {
    if index < listeners.outbound.len() {
        Side::Outbound
    } else {
        Side::Inbound
    }
}

/// Returns the pods of this node that run, and those that have finished.
fn pods_of<'a>(snapshot: &'a Snapshot, node_name: &str) -> (Pods<'a>, Pods<'a>) {
    let workloads = snapshot.on_node(node_name);
    let workloads = workloads.map(|workload| (&workload.name, workload));
    let (finished, running) = workloads.partition(|(_, workload)| workload.finished);
    (running, finished)
}
