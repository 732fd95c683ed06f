//! A mesh of nodes and pods.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread;

use anyhow::{Context, Result, bail};

use crate::PodNetwork;
use crate::builder::MeshBuilder;
use crate::ca::{Ca, CaOptions};
use crate::daemon::{Daemon, LOG};
use crate::daemon_options::DaemonOptions;
use crate::id::MeshId;
use crate::kubernetes::Kubernetes;
use crate::manifests::Manifests;
use crate::netns::Netns;
use crate::node::Node;
use crate::place::Place;
use crate::pod::{self, Pod};
use crate::spec::{Family, PodSpec};
use crate::wire::Wire;
use crate::{cgroup, leftovers, plumbing};

/// Nodes, pods, the wire between them and a host outside. Dropping it removes all of them.
#[derive(Debug)]
pub struct Mesh {
    pub(crate) id: MeshId,
    /// How its pods are connected, except those of a cluster.
    pub(crate) network: PodNetwork,
    pub(crate) node_names: Vec<String>,
    pub(crate) nodes: BTreeMap<String, Node>,
    pub(crate) pods: Mutex<BTreeMap<String, Pod>>,
    pub(crate) outside: Place,
    pub(crate) wire: Wire,
    pub(crate) manifests: Manifests,
}

impl Mesh {
    /// Returns a builder for a mesh.
    pub fn builder() -> MeshBuilder {
        MeshBuilder::default()
    }

    /// Its ID, which distinguishes it from other meshes on the machine.
    pub fn id(&self) -> MeshId {
        self.id
    }

    /// The node of this name.
    ///
    /// # Panics
    /// If there is none.
    pub fn node(&self, name: &str) -> &Node {
        self.nodes
            .get(name)
            .unwrap_or_else(|| panic!("the mesh has no node {name}"))
    }

    /// All nodes, in the order of declaration.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.node_names.iter().map(|name| &self.nodes[name])
    }

    /// The pod of this name, `namespace/name` or, in namespace `default`, `name`.
    ///
    /// # Panics
    /// If there is none.
    pub fn pod(&self, name: &str) -> Pod {
        let pods = self.lock();
        pods.get(&full_name(name))
            .cloned()
            .unwrap_or_else(|| panic!("the mesh has no pod {name}"))
    }

    /// All pods, by namespace and name.
    pub fn pods(&self) -> Vec<Pod> {
        self.lock().values().cloned().collect()
    }

    /// The host on the wire that is not in the mesh.
    pub fn outside(&self) -> &Place {
        &self.outside
    }

    /// The outside host's IPv4 address.
    pub fn outside_ipv4(&self) -> Ipv4Addr {
        plumbing::OUTSIDE_IPV4
    }

    /// The outside host's IPv6 address.
    pub fn outside_ipv6(&self) -> Ipv6Addr {
        plumbing::OUTSIDE_IPV6
    }

    /// The link between the nodes.
    pub fn wire(&self) -> &Wire {
        &self.wire
    }

    /// The manifests of all nodes at once. See [`Node::manifests`] for those of one node.
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// Creates a pod and writes its manifest and its service account's for all nodes.
    pub fn add_pod(&self, spec: PodSpec) -> Result<Pod> {
        let pod = self.add_pod_quietly(spec)?;
        self.manifests
            .apply(&pod.spec().service_account_manifest())?;
        self.manifests.apply(&pod.manifest())?;
        Ok(pod)
    }

    /// Creates a pod without writing a manifest for it.
    pub fn add_pod_quietly(&self, spec: PodSpec) -> Result<Pod> {
        let node_name = spec.node.as_deref().unwrap_or(&self.node_names[0]);
        let node = self
            .nodes
            .get(node_name)
            .with_context(|| format!("there is no node {node_name}"))?;
        let number = node.next_pod();
        let ipv4 = match spec.ipv4 {
            Family::Chosen => Some(plumbing::pod_ipv4(node.number(), number)),
            Family::Given(address) => Some(address),
            Family::None => None,
        };
        let ipv6 = match spec.ipv6 {
            Family::Chosen => Some(plumbing::pod_ipv6(node.number(), number)),
            Family::Given(address) => Some(address),
            Family::None => None,
        };
        let addresses = ipv4
            .map(IpAddr::V4)
            .into_iter()
            .chain(ipv6.map(IpAddr::V6))
            .collect();
        let uid = self.next_uid();
        self.plug(spec, uid, node, format!("p{number}"), addresses)
    }

    /// Creates a namespace nested in a pod, as a container engine in the pod does, and lets the pod forward its traffic. Its
    /// processes are in the pod's cgroup. Returns it with its addresses.
    pub fn nest(&self, pod: &Pod) -> Result<(Place, Ipv4Addr, Ipv6Addr)> {
        let name = format!("nested-{}-{}", pod.namespace(), pod.name());
        let netns = Netns::create(&[self.id.netns_name(&name)])?.remove(0);
        plumbing::prepare(&netns, false)?;
        plumbing::nested(&netns, pod.netns())?;
        let place = Place::new(
            &format!("nested in {}", pod.full_name()),
            netns,
            pod.cgroup().join("nested"),
            pod.folder().to_owned(),
        )?;
        Ok((place, plumbing::NESTED_IPV4, plumbing::NESTED_IPV6))
    }

    /// Lets a pod be reached at another address of its namespace. Nothing is to be done where pods are on a bridge.
    pub fn route_to_pod(&self, pod: &Pod, address: IpAddr) -> Result<()> {
        let (node, link) = (self.node(pod.node()), &pod.state().link);
        plumbing::route_to_pod(node.netns(), node.number(), link, address, self.network)
    }

    /// Removes a pod as Kubernetes does: first its manifest, then its processes, link, namespace name and cgroup.
    pub fn remove_pod(&self, name: &str) -> Result<()> {
        let pod = self.pod(name);
        self.manifests.remove("Pod", pod.namespace(), pod.name())?;
        self.unplug(&pod)
    }

    /// Removes a pod's processes, link, namespace name and cgroup, and leaves its manifests as they are.
    pub fn remove_pod_quietly(&self, name: &str) -> Result<()> {
        self.unplug(&self.pod(name))
    }

    /// Removes a pod's processes and network and creates a new namespace with the same name and addresses. The manifest
    /// stays correct, but the namespace's cookie changes. Returns the new pod.
    pub fn recreate_pod(&self, name: &str) -> Result<Pod> {
        let pod = self.pod(name);
        self.unplug(&pod)?;
        let old = pod.state();
        let node = self.node(&old.node);
        self.plug(
            old.spec.clone(),
            old.uid.clone(),
            node,
            old.link.clone(),
            old.addresses.clone(),
        )
    }

    /// Ends everything on a node, as a power failure does: its processes, its cgroups and its network namespace with
    /// all that is in it. Then creates the cgroups and the namespace again, with the same addresses on the wire. The
    /// node's pods are not created again.
    pub fn reset(&self, node: &Node) -> Result<()> {
        cgroup::remove(node.cgroup())?;
        for place in [node.place(), node.daemon_place()] {
            cgroup::create(place.cgroup())?;
        }
        let netns = node.netns();
        netns.recreate()?;
        plumbing::prepare(netns, true)?;
        plumbing::attach_again(self.wire.place().netns(), node.number(), netns)?;
        let others: Vec<u8> = self
            .nodes()
            .map(Node::number)
            .filter(|number| *number != node.number())
            .collect();
        plumbing::node(netns, node.number(), &others)
    }

    /// Gives each pod and each node's daemon an equal share of its node's CPU time, and each node an equal share of the
    /// machine's, as if it were a machine. It applies to what is started there from now on. The kubelet does the same for pods.
    pub fn share_cpu(&self) -> Result<()> {
        let pods = self.pods();
        let pods = pods.iter().map(Pod::place);
        pods.chain(self.nodes().map(Node::daemon_place))
            .try_for_each(|place| place.limit(PROCESSES))
    }

    /// Starts a CA on the host outside, which issues what each node's pods need. Pass it to the daemons with
    /// [`DaemonOptions::ca`]. Only one runs at a time; the next one continues with its state.
    pub fn start_ca(&self, options: &CaOptions) -> Result<Ca> {
        Ca::spawn(self, options)
    }

    /// Starts an API server on the host outside, which the nodes reach. Nothing acts on its objects but what the test
    /// starts.
    pub fn start_api_server(&self) -> Result<Kubernetes> {
        let (ip, network) = (IpAddr::V4(self.outside_ipv4()), PodNetwork::default());
        Kubernetes::start_for_cluster(&self.outside, ip, network.services())
    }

    /// Starts an API server of a cluster of its own on `node`, as [`Mesh::start_api_server`] does
    /// on the host outside.
    pub fn start_api_server_on(&self, node: &Node) -> Result<Kubernetes> {
        let (ip, network) = (IpAddr::V4(node.ipv4()), PodNetwork::default());
        Kubernetes::start_for_cluster(node.place(), ip, network.services())
    }

    /// Starts a daemon with default options on every node, and waits until each is ready and has enrolled its pods.
    pub fn start_daemons(&self) -> Result<Vec<Daemon>> {
        self.start_daemons_with(&DaemonOptions::default())
    }

    /// Starts a daemon on every node, and waits until each is ready and has enrolled its pods of the mesh.
    pub fn start_daemons_with(&self, options: &DaemonOptions) -> Result<Vec<Daemon>> {
        let mut daemons = self
            .nodes()
            .map(|node| node.spawn_daemon(options.clone()))
            .collect::<Result<Vec<_>>>()?;
        for daemon in &mut daemons {
            daemon.wait_ready()?;
            let pods: Vec<String> = self
                .pods()
                .iter()
                .filter(|pod| pod.node() == daemon.node() && pod.spec().is_meshed())
                .map(Pod::full_name)
                .collect();
            daemon.wait_enrolled(&pods)?;
        }
        Ok(daemons)
    }

    fn plug(
        &self,
        spec: PodSpec,
        uid: String,
        node: &Node,
        link: String,
        addresses: Vec<IpAddr>,
    ) -> Result<Pod> {
        let key = format!("{}/{}", spec.namespace, spec.name);
        if self.lock().contains_key(&key) {
            bail!("there is a pod {key} already");
        }
        let file = format!("pod-{}-{}", spec.namespace, spec.name);
        let netns = Netns::create(&[self.id.netns_name(&file)])?.remove(0);
        plumbing::prepare(&netns, false)?;
        plumbing::pod(
            &netns,
            node.netns(),
            node.number(),
            &link,
            &addresses,
            self.network,
        )?;
        // Named as by the kubelet. Below its cgroup for pods, the kernel closes the pod until the daemon has found it.
        let parent = if spec.by_uid {
            "kubepods/besteffort"
        } else {
            ""
        };
        let cgroup = node.cgroup().join(parent).join(format!("pod{uid}"));
        let place = Place::new(&key, netns, cgroup, self.id.temporary_folder().join(file))?;
        let pod = Pod::new(pod::State {
            spec,
            uid,
            node: node.name().to_owned(),
            link,
            addresses,
            place,
        });
        self.lock().insert(key, pod.clone());
        Ok(pod)
    }

    fn unplug(&self, pod: &Pod) -> Result<()> {
        cgroup::remove(pod.cgroup())?;
        plumbing::unplug(self.node(pod.node()).netns(), &pod.state().link)?;
        Netns::remove(pod.netns().name())?;
        self.lock().remove(&pod.full_name());
        Ok(())
    }

    fn next_uid(&self) -> String {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        format!(
            "{:08x}-0000-4000-8000-{:012x}",
            self.id.pid(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        )
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Pod>> {
        self.pods.lock().expect("no holder of this lock panics")
    }

    /// Prints the daemons' last log lines, to explain a failed test.
    fn print_logs(&self) {
        for node in self.nodes() {
            let Ok(log) = std::fs::read_to_string(node.folder().join(LOG)) else {
                continue;
            };
            let lines: Vec<&str> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(LINES_OF_LOG)..];
            eprintln!(
                "---- last lines of the daemon's log on {}\n{}",
                node.name(),
                last.join("\n")
            );
        }
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if thread::panicking() {
            self.print_logs();
        }
        if let Err(error) = leftovers::remove(self.id) {
            eprintln!("removing mesh {}: {error:#}", self.id);
        }
    }
}

fn full_name(name: &str) -> String {
    if name.contains('/') {
        name.to_owned()
    } else {
        format!("default/{name}")
    }
}

const LINES_OF_LOG: usize = 60;
/// Processes and threads of a place: servers in pods have a thread for each connection.
const PROCESSES: u32 = 30_000;
