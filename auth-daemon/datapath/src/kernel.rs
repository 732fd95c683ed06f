//! The eBPF programs, their maps and their pins.
//!
//! Everything is pinned below one folder, so that it stays in force while the daemon is down: captured connects are
//! then refused, and pods refuse inbound connections. The next daemon adopts the maps with their content, attaches its
//! own programs beside the old ones, and only then detaches the old ones. No connect escapes the capture in between.

mod error;
mod mesh;
mod pins;
mod programs;

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use auth_common::{
    Address, DELIVERY, Dialled, Inbound, LAYOUT, MAX_POD_ROOTS, MeshKind, NEIGHBOUR, NODE_CONNECT,
    Node, Pod, PodRoot, SocketKey, mapped,
};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap as BpfHashMap, Map, MapData, RingBuf, SkStorage, lpm_trie::LpmTrie},
};

use super::{
    Census, ExposedPorts, FirstSockets, Netns, PinLock, ProvenNodes, SameNode, Shares, census,
    exposed, flows,
    forwarding::ForwardProgram,
    gate::{self, Gate},
    inbound::{self, InboundProgram},
    node_cgroups::pod_roots,
    proven_nodes, shares,
};
use mesh::Mesh;
use pins::other_layouts;
use programs::{OBJECT, attach_to_cgroup, cgroup_programs, load_program, loader, programs};

pub use error::KernelError;
pub(super) use error::{link_error, map_error, program_error};
pub(super) use pins::{attached_programs, layouts, pinned_pods, remove_layout, replace_pin};
pub(super) use programs::program;
pub use programs::try_load;

const MAPS: [&str; 22] = [
    "PODS",
    "MESH",
    "PENDING",
    "DIALLED",
    "BYPASS",
    "OWN",
    "DELIVERIES",
    "NODE",
    "VERDICTS",
    "LEASE",
    "ADMITTED",
    "FLOWS",
    "EVENTS",
    "LOST",
    "REPORTED",
    "FIRST_SOCKETS",
    "UNDECIDED",
    gate::MAP,
    proven_nodes::MAP,
    exposed::MAP,
    shares::MAP,
    shares::UNREAD,
];
/// The loaded programs and their maps.
pub struct Kernel {
    pins: PathBuf,
    /// The cgroup that the programs are attached to.
    cgroup: PathBuf,
    non_tcp_denied: bool,
    /// The program for interfaces of pods, and the others of its object.
    pub(super) forward: Arc<ForwardProgram>,
    /// Loads inbound programs, with the pinned maps.
    loader: Mutex<EbpfLoader<'static>>,
    pods: Mutex<BpfHashMap<MapData, u64, Pod>>,
    mesh: Mutex<Mesh>,
    pending: Mutex<BpfHashMap<MapData, SocketKey, Dialled>>,
    bypass: Mutex<SkStorage<MapData, u32>>,
    own: Mutex<SkStorage<MapData, Dialled>>,
    /// Another handle of the map OWN, to read.
    dialled: SkStorage<MapData, Dialled>,
    /// More handles of the maps BYPASS and OWN.
    socket_maps: SocketMaps,
    node: Mutex<Array<MapData, Node>>,
    /// The pods' netns that are closed, and those that are known to be outside the mesh.
    pub gate: Gate,
    /// Pods that a daemon with another layout of the maps has enrolled.
    earlier: Vec<(u64, Pod)>,
    first_sockets: Mutex<Option<RingBuf<MapData>>>,
    /// Connections between two pods of this node.
    pub same_node: SameNode,
    /// The nodes that have, or once had, a ready daemon.
    pub proven_nodes: ProvenNodes,
    /// The ports at which pods and services of the mesh are exposed.
    pub exposed_ports: ExposedPorts,
    /// What the node and its pods use of their shares of the maps.
    pub shares: Shares,
    /// `None` after [`Kernel::release`].
    lock: Mutex<Option<PinLock>>,
}

/// Maps of socket storage, for queries.
pub(super) struct SocketMaps {
    pub(super) bypass: MapData,
    pub(super) own: MapData,
}

impl Kernel {
    /// Loads the programs, adopts or creates the maps, and attaches to `cgroup`.
    ///
    /// Pods enrolled by a previous daemon stay enrolled: see [`Kernel::enrolled`]. With `non_tcp_denied`, enrolled pods
    /// may send only TCP to the mesh.
    pub fn load(lock: PinLock, cgroup: &Path, non_tcp_denied: bool) -> Result<Self, KernelError> {
        let pins = lock.folder().join(LAYOUT);
        let maps = pins.join("maps");
        for folder in [
            &maps,
            &pins.join("links"),
            &pins.join("pods"),
            &pins.join("interfaces"),
        ] {
            fs::create_dir_all(folder).map_err(|error| KernelError::Pin {
                path: folder.clone(),
                error,
            })?;
        }
        let mut loader = loader();
        for name in MAPS {
            loader.map_pin_path(name, maps.join(name));
        }
        let mut ebpf = loader.load(OBJECT)?;
        let cgroup_file = File::open(cgroup).map_err(|error| KernelError::Pin {
            path: cgroup.to_owned(),
            error,
        })?;
        let pods = BpfHashMap::try_from(take_map(&mut ebpf, "PODS")?).map_err(map_error("PODS"))?;
        let mesh: LpmTrie<_, Address, u32> =
            LpmTrie::try_from(take_map(&mut ebpf, "MESH")?).map_err(map_error("MESH"))?;
        let entries = mesh
            .iter()
            .map(|entry| entry.map(|(key, kind)| ((key.data(), key.prefix_len()), kind)))
            .collect::<Result<_, _>>()
            .map_err(map_error("MESH"))?;
        let pending =
            BpfHashMap::try_from(take_map(&mut ebpf, "PENDING")?).map_err(map_error("PENDING"))?;
        let bypass =
            SkStorage::try_from(take_map(&mut ebpf, "BYPASS")?).map_err(map_error("BYPASS"))?;
        let own = SkStorage::try_from(take_map(&mut ebpf, "OWN")?).map_err(map_error("OWN"))?;
        let handle = |map| MapData::from_pin(maps.join(map)).map_err(map_error(map));
        let socket_maps = SocketMaps {
            bypass: handle("BYPASS")?,
            own: handle("OWN")?,
        };
        let dialled =
            SkStorage::try_from(Map::SkStorage(handle("OWN")?)).map_err(map_error("OWN"))?;
        let mut node: Array<_, Node> =
            Array::try_from(take_map(&mut ebpf, "NODE")?).map_err(map_error("NODE"))?;
        let same_node = SameNode::new(&mut ebpf)?;
        let proven_nodes = ProvenNodes::new(&mut ebpf)?;
        let exposed_ports = ExposedPorts::new(&mut ebpf)?;
        let shares = Shares::new(&mut ebpf)?;
        let first_sockets = RingBuf::try_from(take_map(&mut ebpf, "FIRST_SOCKETS")?)
            .map_err(map_error("FIRST_SOCKETS"))?;
        // Load all programs before any is attached, so that nothing has changed if the kernel rejects one.
        for name in programs() {
            load_program(&mut ebpf, name)?;
        }
        inbound::load(&mut loader)?;
        let gate = Gate::new(&mut ebpf)?;
        let roots = pod_roots(cgroup);
        set_node(&mut node, &roots, non_tcp_denied)?;
        let node_cookie = node.get(&0, 0).map_err(map_error("NODE"))?.netns_cookie;
        let enrolled = pods.keys().collect::<Result<Vec<u64>, _>>();
        for cookie in enrolled
            .map_err(map_error("PODS"))?
            .into_iter()
            .chain([node_cookie])
        {
            shares.add(cookie)?;
        }
        for name in cgroup_programs() {
            let link = attach_to_cgroup(&mut ebpf, name, &cgroup_file)?;
            replace_pin(&pins.join("links"), name, link)?;
        }
        gate.attach(&mut ebpf, &pins.join("links"), &roots)?;
        Ok(Self {
            cgroup: cgroup.to_owned(),
            non_tcp_denied,
            forward: Arc::new(ForwardProgram::new(ebpf, pins.join("interfaces"))),
            loader: Mutex::new(loader),
            pods: Mutex::new(pods),
            mesh: Mutex::new(Mesh { map: mesh, entries }),
            pending: Mutex::new(pending),
            bypass: Mutex::new(bypass),
            own: Mutex::new(own),
            dialled,
            socket_maps,
            node: Mutex::new(node),
            gate,
            earlier: other_layouts(lock.folder())
                .iter()
                .flat_map(|layout| pinned_pods(layout))
                .collect(),
            first_sockets: Mutex::new(Some(first_sockets)),
            same_node,
            proven_nodes,
            exposed_ports,
            shares,
            pins,
            lock: Mutex::new(Some(lock)),
        })
    }

    /// The cgroup that the programs are attached to. It contains all pods of the node.
    pub(super) fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Whether another daemon waits for this one to release the pins.
    pub fn is_awaited(&self) -> bool {
        lock(&self.lock).as_ref().is_some_and(PinLock::is_awaited)
    }

    /// Releases the pins to another daemon.
    pub fn release(&self) {
        lock(&self.lock).take();
    }

    /// Whether the pins have been released to another daemon.
    pub fn is_released(&self) -> bool {
        lock(&self.lock).is_none()
    }

    /// Netns cookies and entries of all enrolled pods, including those of a previous daemon.
    pub fn enrolled(&self) -> Vec<(u64, Pod)> {
        lock(&self.pods).iter().flatten().collect()
    }

    /// The entry that a previous daemon made for the pod whose netns has `cookie`.
    pub(super) fn enrolled_before(&self, cookie: u64) -> Option<Pod> {
        let current = lock(&self.pods).get(&cookie, 0).ok();
        current.or_else(|| {
            let mut earlier = self.earlier.iter();
            earlier
                .find(|(other, _)| *other == cookie)
                .map(|(_, pod)| *pod)
        })
    }

    /// Attaches an inbound program to `netns`, and replaces the one that a previous daemon attached. `admits` is what the
    /// program admits from the first SYN on: see [`InboundProgram::attach`].
    pub(super) fn attach_inbound(
        &self,
        netns: &Netns,
        admits: Option<(Inbound, &TcpListener)>,
    ) -> Result<InboundProgram, KernelError> {
        let (instance, link) = InboundProgram::attach(&mut lock(&self.loader), netns, admits)?;
        replace_pin(&self.pins.join("pods"), &netns.cookie().to_string(), link)?;
        Ok(instance)
    }

    /// Finds the cgroups of the node's pods again: the kubelet may have created them since. Returns whether there are any.
    pub fn find_pod_roots(&self) -> Result<bool, KernelError> {
        let roots = pod_roots(&self.cgroup);
        set_node(&mut lock(&self.node), &roots, self.non_tcp_denied)?;
        let links = self.pins.join("links");
        self.gate
            .attach(&mut lock(&self.forward.programs), &links, &roots)?;
        Ok(!roots.is_empty())
    }

    /// Closes every netns of a pod on which there is no verdict, from now on and for as long as the maps are pinned. To be
    /// called when the verdicts on the pods that run are written.
    pub fn close_undecided(&self) -> Result<(), KernelError> {
        let mut map = lock(&self.node);
        let node = map.get(&0, 0).map_err(map_error("NODE"))?;
        map.set(0, Node { gated: 1, ..node }, 0)
            .map_err(map_error("NODE"))
    }

    /// The netns in which pods have processes. Reads /proc, so call it on a thread that may block.
    pub fn census(&self) -> Census {
        census::take(&pod_roots(&self.cgroup), Census::LIMIT)
    }

    /// Detaches and removes what daemons with another layout of the maps have pinned. Until then the kernel runs their
    /// programs too, and refuses what those capture.
    pub fn remove_other_layouts(&self) {
        let Some(folder) = self.pins.parent() else {
            return;
        };
        for layout in other_layouts(folder) {
            match remove_layout(&layout) {
                Ok(()) => {
                    tracing::info!(pins = %layout.display(), "programs of an earlier version removed");
                }
                Err(error) => tracing::error!(
                    pins = %layout.display(), %error, "cannot remove the programs of an earlier version; connections are refused"
                ),
            }
        }
    }

    /// Starts capturing the connections of the pod whose netns has `cookie`.
    pub fn capture(&self, cookie: u64, pod: &Pod) -> Result<(), KernelError> {
        let mut pods = lock(&self.pods);
        self.shares.add(cookie)?;
        pods.insert(cookie, pod, 0).map_err(map_error("PODS"))
    }

    /// Undoes [`Kernel::capture`], and detaches the netns' own programs. It is not an error if they are already undone.
    pub fn forget(&self, cookie: u64) {
        let _ = lock(&self.pods).remove(&cookie);
        let _ = fs::remove_file(self.pins.join("pods").join(cookie.to_string()));
        self.forward.unpin(cookie);
    }

    /// Waits until a pod cannot be kept from forwarding connections, or can be again: see [`Enrolled::admit`]. There is only
    /// one waiter. Cancel-safe.
    ///
    /// [`Enrolled::admit`]: super::Enrolled::admit
    pub async fn forwarding_changed(&self) {
        self.forward.failures.notified().await;
    }

    /// Exempts a socket of the daemon from capture. `kind` is [`auth_common::DIAL`], [`auth_common::DELIVERY`] or
    /// [`auth_common::NEIGHBOUR`].
    pub fn exempt(&self, socket: &socket2::Socket, kind: u32) -> Result<(), KernelError> {
        lock(&self.bypass)
            .insert(socket, kind, 0)
            .map_err(map_error("BYPASS"))
    }

    /// Marks a listener of the daemon in a pod, and the connections that it will accept.
    pub(super) fn own(&self, listener: &socket2::Socket) -> Result<(), KernelError> {
        lock(&self.own)
            .insert(listener, Dialled::default(), 0)
            .map_err(map_error("OWN"))
    }

    pub(super) fn socket_maps(&self) -> &SocketMaps {
        &self.socket_maps
    }

    /// Returns the local and the peer address of the connections to pods that the daemon or the node itself has opened, in
    /// `netns` or the node's own. The kernel has recorded them.
    pub fn recorded(&self, netns: Option<&Netns>) -> io::Result<HashSet<(SocketAddr, SocketAddr)>> {
        let list = || {
            flows::with_value(&self.socket_maps.bypass, |value| {
                [DELIVERY, NEIGHBOUR, NODE_CONNECT].contains(&value)
            })
        };
        match netns {
            Some(netns) => netns.enter(list)?,
            None => list(),
        }
    }

    /// Returns the destination that the app dialled whose connection is `accepted`, by the daemon's outbound listener. `None` if
    /// the connection was not captured.
    pub fn dialled(&self, accepted: &impl AsRawFd) -> Option<SocketAddr> {
        let dialled = self.dialled.get(accepted, 0).ok()?;
        (dialled.port != 0).then(|| socket_address(dialled.address, dialled.port))
    }

    /// The cookie of the node's own netns, which has a share as each pod's. 0 if it cannot be read.
    pub fn node_cookie(&self) -> u64 {
        let node = lock(&self.node).get(&0, 0);
        node.map_or(0, |node| node.netns_cookie)
    }

    /// Removes the shares of netns that are no longer enrolled.
    pub fn sweep_shares(&self) {
        // Locked so that no pod is enrolled at the same time.
        let pods = lock(&self.pods);
        let node = self.node_cookie();
        self.shares
            .remove_unused(|cookie| cookie == node || pods.get(&cookie, 0).is_ok());
    }

    /// Events for sockets in netns of no enrolled pod, starting with those created while no daemon was running. There
    /// is only one reader.
    pub fn first_sockets(&self) -> io::Result<FirstSockets> {
        let ring = lock(&self.first_sockets).take();
        let ring = ring.ok_or_else(|| io::Error::other("they are being read already"))?;
        FirstSockets::new(ring, self.gate.knocks.clone())
    }

    /// Number of mesh addresses and networks, pending connections and pods in the maps. Addresses outside the mesh, and
    /// those that no object claims any more, do not count.
    pub fn occupancy(&self) -> (usize, usize, usize) {
        let others = [MeshKind::Outside, MeshKind::Gone, MeshKind::Asked].map(|kind| kind as u32);
        let mesh = lock(&self.mesh);
        let mesh_kinds = mesh.entries.values().filter(|kind| !others.contains(kind));
        (
            mesh_kinds.count(),
            lock(&self.pending).keys().flatten().count(),
            lock(&self.pods).keys().flatten().count(),
        )
    }
}

/// Writes the node's settings, and what distinguishes its processes from its pods.
fn set_node(
    node: &mut Array<MapData, Node>,
    roots: &[(PodRoot, PathBuf)],
    non_tcp_denied: bool,
) -> Result<(), KernelError> {
    let own = Path::new("/proc/self/ns/net");
    let netns = Netns::open(own).map_err(|error| KernelError::Pin {
        path: own.to_owned(),
        error,
    })?;
    let before = node.get(&0, 0).map_err(map_error("NODE"))?;
    let mut pod_roots = [PodRoot::default(); MAX_POD_ROOTS];
    for (entry, (root, _)) in pod_roots.iter_mut().zip(roots) {
        *entry = *root;
    }
    let wanted = Node {
        netns_cookie: netns.cookie(),
        pod_roots,
        non_tcp_denied: non_tcp_denied.into(),
        gated: before.gated,
    };
    if before != wanted {
        node.set(0, wanted, 0).map_err(map_error("NODE"))?;
    }
    Ok(())
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel")
            .field("pins", &self.pins)
            .finish_non_exhaustive()
    }
}

pub(super) fn take_map(ebpf: &mut Ebpf, name: &str) -> Result<Map, KernelError> {
    ebpf.take_map(name)
        .ok_or_else(|| KernelError::Missing(format!("map {name}")))
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The mutexes guard handles, so a panic elsewhere cannot leave one half-written.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Converts `address` to the maps' format.
pub(super) fn wire_address(address: IpAddr) -> Address {
    match address.to_canonical() {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// Converts an address and a port from the maps' format.
pub(super) fn socket_address(address: Address, port: u32) -> SocketAddr {
    SocketAddr::new(IpAddr::from(address).to_canonical(), port as u16)
}

pub(super) fn monotonic_nanoseconds() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map(|time| {
            let duration = std::time::Duration::from(time);
            u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
        })
        .unwrap_or(0)
}
