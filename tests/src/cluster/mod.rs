//! A real Kubernetes of several nodes on one machine: etcd, API server, controllers and scheduler on the host outside of
//! a mesh; containerd, kubelet and kube-proxy on each of its nodes. Pods are what kubelet makes of them.
//!
//! ```no_run
//! let cluster = mesh_tests::Cluster::start(&["node1", "node2"])?;
//! cluster.kubectl(["get", "nodes"])?.ok()?;
//! # anyhow::Ok(())
//! ```

mod images;
mod node;
mod oci;

use std::env;
use std::ffi::OsStr;
use std::net::IpAddr;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cgroup::Hierarchy;
use crate::kubernetes::{self, Kubernetes};
use crate::mesh::Mesh;
use crate::plumbing;
use crate::process::{Finished, Process};
use crate::wire::Wire;

pub use images::{AUTH_DAEMON_IMAGE, TOOLS, auth_daemon_image};
pub use node::ClusterNode;

/// Programs that start one after the other, on a machine that builds meanwhile.
const START: Duration = Duration::from_secs(180);
/// How long the programs of a node are given to say why a test failed.
const LINES_OF_LOG: usize = 20;

/// A running cluster. Dropping it ends all of it and removes its traces; what a killed process left is removed by the next
/// one that starts.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<ClusterNode>,
    _controllers: Vec<Process>,
    api: Kubernetes,
    // Last: it takes what is left.
    mesh: Mesh,
}

impl Cluster {
    /// What has to be installed before one can run, or why none can.
    pub fn missing() -> Option<String> {
        if let Some(why) = Kubernetes::missing() {
            return Some(why);
        }
        for name in [
            "kube-controller-manager",
            "kube-scheduler",
            "kubelet",
            "kube-proxy",
        ] {
            let path = kubernetes::program(name);
            if !path.is_file() {
                return Some(format!(
                    "there is no {}: `cargo xtask kubernetes` makes it, or says why it cannot",
                    path.display()
                ));
            }
        }
        let path = env::var_os("PATH").unwrap_or_default();
        for name in [
            "containerd",
            "ctr",
            "runc",
            "iptables",
            "conntrack",
            "busybox",
        ] {
            if !env::split_paths(&path).any(|folder| folder.join(name).is_file()) {
                return Some(format!(
                    "there is no {name}: `cargo xtask kubernetes` installs it"
                ));
            }
        }
        if !Path::new(node::PLUGINS).join("bridge").is_file() {
            return Some(format!(
                "there are no CNI plugins in {}: `cargo xtask kubernetes` installs them",
                node::PLUGINS
            ));
        }
        let hierarchies = Hierarchy::all().unwrap_or_default();
        if !hierarchies.iter().any(|one| one.options == "memory") {
            return Some(
                "this machine has no cgroup v1 hierarchy for memory, and nodes are only made of those"
                    .to_owned(),
            );
        }
        None
    }

    /// Starts one of these nodes and waits until all are ready.
    pub fn start(nodes: &[&str]) -> Result<Self> {
        let mesh = nodes
            .iter()
            .fold(Mesh::builder(), |mesh, node| mesh.node(node))
            .start()?;
        plumbing::outside_is_default_route(mesh.nodes().map(|node| node.netns()))?;
        let outside = mesh.outside();
        let api = Kubernetes::start_for_cluster(outside, IpAddr::V4(mesh.outside_ipv4()))?;
        let controllers = start_controllers(&mesh, &api)?;
        let mut cluster = Self {
            nodes: Vec::new(),
            _controllers: controllers,
            api,
            mesh,
        };
        let mesh_folder = cluster.mesh.id().folder_name();
        let images = [
            images::pause(cluster.mesh.outside().folder())?,
            images::tools(cluster.mesh.outside().folder())?,
        ];
        for node in cluster.mesh.nodes() {
            let mut node = ClusterNode::start(node, &mesh_folder)?;
            for image in &images {
                node.load(image)?;
            }
            node.join(&cluster.api)?;
            cluster.nodes.push(node);
        }
        for node in &mut cluster.nodes {
            node.wait_ready(&cluster.api)?;
        }
        Ok(cluster)
    }

    /// Its API server.
    pub fn api(&self) -> &Kubernetes {
        &self.api
    }

    /// The link between the nodes and the host of the API server.
    pub fn wire(&self) -> &Wire {
        self.mesh.wire()
    }

    /// Its nodes, in order.
    pub fn nodes(&self) -> &[ClusterNode] {
        &self.nodes
    }

    /// The node of this name.
    ///
    /// # Panics
    /// When there is none.
    pub fn node(&self, name: &str) -> &ClusterNode {
        self.nodes
            .iter()
            .find(|node| node.name() == name)
            .unwrap_or_else(|| panic!("the cluster has no node {name}"))
    }

    /// Gives all nodes an image, from an OCI archive.
    pub fn load(&self, archive: &Path) -> Result<()> {
        self.nodes.iter().try_for_each(|node| node.load(archive))
    }

    /// Starts `kubectl`, as the cluster's administrator.
    pub fn start_kubectl<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Process> {
        let mut command = self.api.client("kubectl")?;
        command.args(arguments);
        Process::spawn(command)
    }

    /// Runs `kubectl` to its end, at most two minutes. That it failed is no error: see [`Finished::ok`].
    pub fn kubectl<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Finished> {
        self.api.kubectl(arguments)
    }

    /// What went on, for whoever has to find out why a test failed.
    pub fn print_state(&self) {
        for arguments in [
            "get pods --all-namespaces -o wide",
            "get events --all-namespaces",
        ] {
            match self.kubectl(arguments.split(' ')) {
                Ok(said) => eprintln!("---- kubectl {arguments}\n{}{}", said.stdout, said.stderr),
                Err(error) => eprintln!("---- kubectl {arguments}: {error:#}"),
            }
        }
        for node in &self.nodes {
            eprintln!("{}", node.last_words(LINES_OF_LOG));
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

/// What makes pods of Deployments, and finds nodes for them.
fn start_controllers(mesh: &Mesh, api: &Kubernetes) -> Result<Vec<Process>> {
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
        .arg(format!("--cluster-cidr={}", plumbing::POD_NETWORKS))
        .args([
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            "--port=0",
        ])
        // An API server that is away is no fault of the nodes.
        .arg("--node-monitor-grace-period=5m");
    let mut scheduler = outside.command(kubernetes::program("kube-scheduler"))?;
    scheduler
        .arg(format!("--kubeconfig={}", api.kubeconfig().display()))
        .args([
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            "--port=0",
        ]);
    [manager, scheduler]
        .into_iter()
        .map(|mut command| {
            // They say much, and nobody asks.
            command
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null());
            Process::spawn_as_is(command).context("on the host outside")
        })
        .collect()
}
