//! Declares a mesh and starts it.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};

use crate::PodNetwork;
use crate::id::MeshId;
use crate::manifests::Manifests;
use crate::mesh::Mesh;
use crate::netns::Netns;
use crate::node::Node;
use crate::place::Place;
use crate::spec::{PodSpec, ServiceSpec};
use crate::wire::Wire;
use crate::{cgroup, leftovers, mounts, plumbing};

/// The contents of a mesh, see [`Mesh::builder`].
#[derive(Debug, Clone, Default)]
pub struct MeshBuilder {
    nodes: Vec<String>,
    pods: Vec<PodSpec>,
    services: Vec<ServiceSpec>,
    network: PodNetwork,
}

impl MeshBuilder {
    /// Adds a node. A mesh has at most 200 nodes.
    pub fn node(mut self, name: &str) -> Self {
        self.nodes.push(name.to_owned());
        self
    }

    /// Adds a pod.
    pub fn pod(mut self, pod: PodSpec) -> Self {
        self.pods.push(pod);
        self
    }

    /// Adds a service.
    pub fn service(mut self, service: ServiceSpec) -> Self {
        self.services.push(service);
        self
    }

    /// Connects each pod by a link of its own to its node, which routes between them. By default, pods of a node are on a
    /// bridge, where one can take another's address, so connections between them are not left to the kernel.
    pub fn routed(mut self) -> Self {
        self.network = PodNetwork::Routed;
        self
    }

    /// Starts the mesh: creates namespaces, links, cgroups, pods and all their manifests. Starts no daemon.
    ///
    /// First removes the leftovers of meshes whose processes have died. On an error, everything created for this mesh
    /// is removed.
    pub fn start(self) -> Result<Mesh> {
        if !nix::unistd::geteuid().is_root() {
            bail!("a mesh is made of network namespaces, which needs root");
        }
        if self.nodes.is_empty() || self.nodes.len() > MOST_NODES {
            bail!(
                "a mesh has 1 to {MOST_NODES} nodes, not {}",
                self.nodes.len()
            );
        }
        mounts::mount_bpffs()?;
        leftovers::remove_dead()?;
        let id = MeshId::next();
        // A dead process may have had the same process ID.
        leftovers::remove(id)?;
        self.bring_up(id)
            .with_context(|| format!("bringing up mesh {id}"))
    }

    fn bring_up(self, id: MeshId) -> Result<Mesh> {
        let guard = RemoveOnDrop(Some(id));
        let mesh = self.plumb(id)?;
        // From here on, dropping the mesh removes everything.
        guard.keep();
        for pod in self.pods {
            let name = pod.name.clone();
            mesh.add_pod(pod)
                .with_context(|| format!("adding pod {name}"))?;
        }
        for service in self.services {
            mesh.manifests().apply(&service.manifest())?;
        }
        Ok(mesh)
    }

    /// Creates everything except pods and services.
    fn plumb(&self, id: MeshId) -> Result<Mesh> {
        let folder = id.temporary_folder();
        let make = |path: &std::path::Path| DirBuilder::new().mode(0o700).create(path);
        make(&folder).with_context(|| format!("making {}", folder.display()))?;
        // Private, because the daemon refuses any other folder.
        make(&folder.join("ca")).context("making the folder of the CA")?;
        let tree = mounts::cgroup2()?.join(id.folder_name());
        cgroup::create(&tree)?;
        let pins = std::path::Path::new(mounts::BPFFS).join(id.folder_name());
        fs::create_dir(&pins).with_context(|| format!("making {}", pins.display()))?;

        let mut names = vec![id.netns_name("wire"), id.netns_name("outside")];
        names.extend(
            self.nodes
                .iter()
                .map(|name| id.netns_name(&format!("node-{name}"))),
        );
        let netns = Netns::create(&names)?;
        for (number, netns) in netns.iter().enumerate() {
            plumbing::prepare(netns, number >= 2)?;
        }
        let [wire, outside, node_netns @ ..] = netns.as_slice() else {
            unreachable!("two names and the nodes'")
        };
        let numbers: Vec<u8> = (1..).take(node_netns.len()).collect();
        let numbered: Vec<(u8, &Netns)> = numbers.iter().copied().zip(node_netns).collect();
        plumbing::wire(wire, &numbered, outside)?;
        for (number, netns) in &numbered {
            let others: Vec<u8> = numbers
                .iter()
                .copied()
                .filter(|other| other != number)
                .collect();
            plumbing::node(netns, *number, &others)?;
        }
        plumbing::outside(outside, &numbers)?;

        let mut nodes = BTreeMap::new();
        for (name, (number, netns)) in self.nodes.iter().zip(&numbered) {
            let node = Node::new(
                name,
                *number,
                (*netns).clone(),
                &id.folder_name(),
                tree.join(name),
                &folder,
            )?;
            if nodes.insert(name.clone(), node).is_some() {
                bail!("two nodes are called {name}");
            }
        }
        let folders = self
            .nodes
            .iter()
            .map(|name| nodes[name].manifests().folder().to_owned())
            .collect();
        Ok(Mesh {
            id,
            network: self.network,
            node_names: self.nodes.clone(),
            nodes,
            pods: Mutex::default(),
            outside: Place::new(
                "outside",
                outside.clone(),
                tree.join("outside"),
                folder.join("outside"),
            )?,
            wire: Wire::new(Place::new(
                "wire",
                wire.clone(),
                tree.join("wire"),
                folder.join("wire"),
            )?),
            manifests: Manifests::new(folders)?,
        })
    }
}

/// Removes a mesh that failed to start.
struct RemoveOnDrop(Option<MeshId>);

impl RemoveOnDrop {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        if let Some(id) = self.0.take()
            && let Err(error) = leftovers::remove(id)
        {
            eprintln!("removing mesh {id}: {error:#}");
        }
    }
}

/// The last byte of a node's address is 10 plus its number.
const MOST_NODES: usize = 200;
