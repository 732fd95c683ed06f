//! A real Kubernetes cluster of several nodes on one machine: etcd, API server, controllers and scheduler on the host
//! outside of a mesh; containerd, kubelet and kube-proxy on each node. The kubelets run the pods.
//!
//! ```no_run
//! use mesh_tests::{Cluster, ProxyMode};
//!
//! let cluster = Cluster::start(&["node1", "node2"], ProxyMode::Nftables)?;
//! cluster.kubectl(["get", "nodes"])?.ok()?;
//! # anyhow::Ok(())
//! ```

pub mod apps;
mod images;
pub mod meshed;
mod node;
mod oci;

use std::ffi::OsStr;
use std::net::IpAddr;
use std::path::Path;
use std::process::Stdio;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::cgroup::Hierarchy;
use crate::kubernetes::{self, Kubernetes};
use crate::mesh::Mesh;
use crate::process::{Finished, Process};
use crate::wire::Wire;
use crate::{cgroup, mounts, plumbing};

pub use images::{AUTH_DAEMON_IMAGE, AuthDaemonImage, TOOLS, auth_daemon_image};
pub use node::ClusterNode;

/// A running cluster. Dropping it stops its programs and removes everything they created. What a killed process left
/// behind is removed by the next cluster that starts.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<ClusterNode>,
    controllers: Mutex<Vec<Process>>,
    api: Kubernetes,
    network: PodNetwork,
    // Last: it removes the namespaces, cgroups and folders that the others use.
    mesh: Mesh,
}

/// How kube-proxy programs services into the kernel of a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ProxyMode {
    /// As nftables rules; stable since Kubernetes 1.33.
    #[default]
    Nftables,
    /// As iptables rules, kube-proxy's own default on Linux.
    Iptables,
}

impl ProxyMode {
    /// The value of kube-proxy's `--proxy-mode`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

impl FromStr for ProxyMode {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        [Self::Nftables, Self::Iptables]
            .into_iter()
            .find(|mode| mode.as_str() == name)
            .with_context(|| format!("kube-proxy has no mode {name:?}: use nftables or iptables"))
    }
}

/// How pods are connected to their node and to each other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PodNetwork {
    /// By a bridge on each node, over IPv4.
    #[default]
    Bridge,
    /// Each by a link of its own to its node, which has a route to each of its addresses, as in most clouds; over IPv4 and
    /// IPv6, and so are Services.
    Routed,
}

impl PodNetwork {
    /// The networks of Services.
    pub(crate) fn services(self) -> &'static str {
        match self {
            Self::Bridge => "10.96.0.0/16",
            Self::Routed => "10.96.0.0/16,fd96::/112",
        }
    }

    /// The networks of all pods.
    pub(super) fn pods(self) -> String {
        match self {
            Self::Bridge => plumbing::POD_NETWORKS.to_owned(),
            Self::Routed => format!("{},{}", plumbing::POD_NETWORKS, plumbing::POD_NETWORKS6),
        }
    }
}

impl FromStr for PodNetwork {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "bridge" => Ok(Self::Bridge),
            "routed" => Ok(Self::Routed),
            _ => Err(anyhow!("no pod network {name:?}: use bridge or routed")),
        }
    }
}

/// What a cluster consists of.
#[derive(Debug, Clone, Copy, Default)]
pub struct ClusterOptions {
    /// How Services are programmed into the kernel.
    pub proxy: ProxyMode,
    /// How pods are connected.
    pub network: PodNetwork,
}

impl From<ProxyMode> for ClusterOptions {
    fn from(proxy: ProxyMode) -> Self {
        Self {
            proxy,
            ..Self::default()
        }
    }
}

impl Cluster {
    /// Why no cluster can run here: the first program that is missing, or what the machine lacks.
    pub fn missing() -> Option<String> {
        let programs = kubernetes::first_missing(&BUILT, &INSTALLED);
        if let Some(why) = Kubernetes::missing().or(programs) {
            return Some(why);
        }
        let hierarchies = Hierarchy::all().unwrap_or_default();
        let is_v1 = hierarchies.iter().any(|one| one.options == "memory");
        if !is_v1 && !Self::pods_are_in_cgroup2() {
            return Some(
                "this machine's cgroups have no controllers for memory and the like, which kubelets need"
                    .to_owned(),
            );
        }
        None
    }

    /// Whether the nodes' kubelets use cgroup version 2. Otherwise they use version 1, with version 2 beside it.
    pub fn pods_are_in_cgroup2() -> bool {
        mounts::cgroup2()
            .and_then(|mount| cgroup::has_controllers(&mount))
            .unwrap_or(false)
    }

    /// Starts a cluster of these nodes and waits until all are ready.
    pub fn start(nodes: &[&str], options: impl Into<ClusterOptions>) -> Result<Self> {
        let options = options.into();
        let mesh = nodes
            .iter()
            .fold(Mesh::builder(), |mesh, node| mesh.node(node))
            .start()?;
        plumbing::outside_is_default_route(mesh.nodes().map(|node| node.netns()))?;
        let outside = mesh.outside();
        let ip = IpAddr::V4(mesh.outside_ipv4());
        let api = Kubernetes::start_for_cluster(outside, ip, options.network.services())?;
        let controllers = start_controllers(&mesh, &api, options.network)?;
        let images = [
            images::pause(outside.folder())?,
            images::tools(outside.folder())?,
        ];
        let mesh_folder = mesh.id().folder_name();
        // Start the nodes in parallel.
        let nodes = thread::scope(|scope| {
            let starting: Vec<_> = mesh
                .nodes()
                .map(|node| {
                    scope.spawn(|| {
                        let node = ClusterNode::start(node, &mesh_folder, options)?;
                        for image in &images {
                            node.load(image)?;
                        }
                        node.join(&api)?;
                        node.wait_ready(&api)?;
                        Ok(node)
                    })
                })
                .collect();
            starting
                .into_iter()
                .map(|node| {
                    node.join()
                        .map_err(|_| anyhow!("starting a node panicked"))?
                })
                .collect::<Result<Vec<_>>>()
        })?;
        Ok(Self {
            nodes,
            controllers: Mutex::new(controllers),
            api,
            network: options.network,
            mesh,
        })
    }

    /// Its API server.
    pub fn api(&self) -> &Kubernetes {
        &self.api
    }

    /// The link between the nodes and the host of the API server.
    pub fn wire(&self) -> &Wire {
        self.mesh.wire()
    }

    /// The mesh whose nodes the cluster's nodes are, and whose host outside runs the API server.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// How its pods are connected.
    pub fn network(&self) -> PodNetwork {
        self.network
    }

    /// Its nodes, in order.
    pub fn nodes(&self) -> &[ClusterNode] {
        &self.nodes
    }

    /// The node of this name.
    ///
    /// # Panics
    /// If there is none.
    pub fn node(&self, name: &str) -> &ClusterNode {
        self.nodes
            .iter()
            .find(|node| node.name() == name)
            .unwrap_or_else(|| panic!("the cluster has no node {name}"))
    }

    /// Replaces kube-controller-manager and kube-scheduler by new processes.
    pub fn restart_controllers(&self) -> Result<()> {
        let mut controllers = self
            .controllers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        controllers.clear();
        *controllers = start_controllers(&self.mesh, &self.api, self.network)?;
        Ok(())
    }

    /// Reboots a node: ends everything on it as a power failure does, and starts it again in a new network namespace, with
    /// an empty disk. Its name, addresses and images stay. Waits until it is ready.
    ///
    /// # Panics
    /// If there is no such node.
    pub fn reboot(&self, node: &str) -> Result<()> {
        self.node(node).reboot(&self.mesh, &self.api)
    }

    /// Imports an image from an OCI archive on every node.
    pub fn load(&self, archive: &Path) -> Result<()> {
        self.nodes.iter().try_for_each(|node| node.load(archive))
    }

    /// Starts `kubectl` as the cluster's administrator.
    pub fn start_kubectl<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Process> {
        let mut command = self.api.client("kubectl")?;
        command.args(arguments);
        Process::spawn(command)
    }

    /// Runs `kubectl` as the cluster's administrator, for at most two minutes. A failure of kubectl is not an error here:
    /// see [`Finished::ok`].
    pub fn kubectl<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Finished> {
        self.api.kubectl(arguments)
    }

    /// Runs `helm` as the cluster's administrator, for at most `patience`, and returns its output.
    pub fn helm<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
        patience: Duration,
    ) -> Result<String> {
        let mut command = self.api.client("helm")?;
        command.args(arguments);
        Ok(Process::spawn(command)?.finish(patience)?.ok()?.stdout)
    }

    /// Prints pods, warnings and the last log lines of each node's programs, to explain a failed test.
    pub fn print_state(&self) {
        for arguments in [
            "get pods --all-namespaces -o wide",
            "get events --all-namespaces --field-selector type=Warning",
        ] {
            match self.kubectl(arguments.split(' ')) {
                Ok(finished) => eprintln!(
                    "---- kubectl {arguments}\n{}{}",
                    finished.stdout, finished.stderr
                ),
                Err(error) => eprintln!("---- kubectl {arguments}: {error:#}"),
            }
        }
        for node in &self.nodes {
            eprintln!("{}", node.last_log_lines(LOG_LINES));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if thread::panicking() {
            self.print_state();
        }
    }
}

/// Starts kube-controller-manager and kube-scheduler.
fn start_controllers(mesh: &Mesh, api: &Kubernetes, network: PodNetwork) -> Result<Vec<Process>> {
    let outside = mesh.outside();
    let mut manager = outside.command(kubernetes::program("kube-controller-manager"))?;
    manager
        .arg(format!("--kubeconfig={}", api.kubeconfig().display()))
        .arg(format!(
            "--service-account-private-key-file={}",
            api.accounts_key().display()
        ))
        .arg(format!(
            "--root-ca-file={}",
            api.certificate_authority().display()
        ))
        .arg(format!("--cluster-cidr={}", network.pods()))
        .args(["--leader-elect=false", "--bind-address=127.0.0.1"])
        // Nodes must stay ready while a test stops the API server, which they report to.
        .arg("--node-monitor-grace-period=5m");
    let mut scheduler = outside.command(kubernetes::program("kube-scheduler"))?;
    scheduler
        .arg(format!("--kubeconfig={}", api.kubeconfig().display()))
        .args(["--leader-elect=false", "--bind-address=127.0.0.1"]);
    [manager, scheduler]
        .into_iter()
        .map(|mut command| {
            command.stdout(Stdio::null()).stderr(Stdio::null());
            Process::spawn_as_is(command).context("on the host outside")
        })
        .collect()
}

/// Programs of a cluster that `cargo xtask kubernetes` builds, besides those of an API server alone.
const BUILT: [&str; 13] = [
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "bridge",
    "host-local",
    "loopback",
    "portmap",
    "ptp",
    "helm",
];
/// Programs of a cluster that come from the distribution.
const INSTALLED: [&str; 5] = ["runc", "nft", "iptables", "conntrack", "busybox"];
/// Time limit for each program's start. Generous, because the machine may be compiling meanwhile.
const START: Duration = Duration::from_secs(180);
/// Lines of each program's log that [`Cluster::print_state`] prints.
const LOG_LINES: usize = 20;
