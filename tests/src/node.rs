//! A running node of a mesh.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::Result;

use crate::capture::Capture;
use crate::daemon::Daemon;
use crate::daemon_options::DaemonOptions;
use crate::locate::auth_daemon;
use crate::manifests::Manifests;
use crate::place::Place;
use crate::process::{Finished, Process};
use crate::{mounts, plumbing};

/// A node: a [`Place`] for its own programs (not its pods') with an address on the wire and networks for pods. A clone
/// refers to the same node.
#[derive(Debug, Clone)]
pub struct Node(Arc<State>);

#[derive(Debug)]
struct State {
    name: String,
    number: u8,
    place: Place,
    daemon_place: Place,
    cgroup: PathBuf,
    mesh_folder: PathBuf,
    pins: PathBuf,
    manifests: Manifests,
    pods: AtomicU8,
}

impl Node {
    /// `mesh` is the name of the mesh's folders, `cgroup` the node's, `folder` the mesh's temporary folder.
    pub(crate) fn new(
        name: &str,
        number: u8,
        netns: crate::Netns,
        mesh: &str,
        cgroup: PathBuf,
        folder: &Path,
    ) -> Result<Self> {
        let own = folder.join(name);
        let place = Place::new(name, netns.clone(), cgroup.join("host"), own.clone())?;
        let daemon_place = Place::new(
            &format!("{name}, daemon"),
            netns,
            cgroup.join("daemon"),
            own.clone(),
        )?;
        Ok(Self(Arc::new(State {
            name: name.to_owned(),
            number,
            place,
            daemon_place,
            cgroup,
            mesh_folder: folder.to_owned(),
            pins: Path::new(mounts::BPFFS).join(mesh).join(name),
            manifests: Manifests::new(vec![own.join("manifests")])?,
            pods: AtomicU8::new(FIRST_POD),
        })))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its number, from 1 in the order of declaration: the N in its pods' networks.
    pub fn number(&self) -> u8 {
        self.0.number
    }

    /// Where the node's own programs run.
    pub fn place(&self) -> &Place {
        &self.0.place
    }

    /// Where its daemon runs: the node's namespace, but another cgroup.
    pub(crate) fn daemon_place(&self) -> &Place {
        &self.0.daemon_place
    }

    /// Creates a place for a pod with `hostNetwork`: the node's own network, and a cgroup as the kubelet names a pod's. No
    /// manifest of the pod is written.
    pub fn host_network_pod(&self, uid: &str) -> Result<Place> {
        Place::new(
            &format!("{}, pod {uid}", self.name()),
            self.place().netns().clone(),
            self.cgroup()
                .join(format!("kubepods/burstable/pod{uid}/container")),
            self.place().folder().to_owned(),
        )
    }

    /// The cgroup that holds its programs and, one below it for each, its pods: `kernel.cgroup` of its daemon.
    pub fn cgroup(&self) -> &Path {
        &self.0.cgroup
    }

    /// Where its daemon pins its programs and maps: `kernel.pins`.
    pub fn pins(&self) -> &Path {
        &self.0.pins
    }

    /// The folder that the daemons of this mesh share as their CA.
    pub fn ca_folder(&self) -> PathBuf {
        self.0.mesh_folder.join("ca")
    }

    /// The manifests that its daemon reads.
    pub fn manifests(&self) -> &Manifests {
        &self.0.manifests
    }

    /// Its IPv4 address on the wire, 172.31.0.(10 + number).
    pub fn ipv4(&self) -> Ipv4Addr {
        plumbing::node_ipv4(self.0.number)
    }

    /// Its IPv6 address on the wire.
    pub fn ipv6(&self) -> Ipv6Addr {
        plumbing::node_ipv6(self.0.number)
    }

    /// Captures all traffic on the links of its pods from now on, in both directions. What one pod of the node sends to
    /// another appears on both links.
    pub fn capture_pods(&self) -> Result<Capture> {
        Capture::of_pods(self.netns())
    }

    /// Starts its daemon with default options and waits until it is ready.
    pub fn start_daemon(&self) -> Result<Daemon> {
        self.start_daemon_with(DaemonOptions::default())
    }

    /// Starts its daemon and waits until it is ready.
    pub fn start_daemon_with(&self, options: DaemonOptions) -> Result<Daemon> {
        let mut daemon = self.spawn_daemon(options)?;
        daemon.wait_ready()?;
        Ok(daemon)
    }

    /// Starts its daemon and returns without waiting.
    pub fn spawn_daemon(&self, options: DaemonOptions) -> Result<Daemon> {
        Daemon::spawn(self, options)
    }

    /// Runs another command of the daemon's program on the node, as an operator would: `["status", "--json"]`.
    pub fn auth(&self, arguments: &[&str]) -> Result<Finished> {
        self.spawn_auth(arguments)?.finish(crate::TIMEOUT)
    }

    /// Like [`Self::auth`], but does not wait for its end.
    pub fn spawn_auth(&self, arguments: &[&str]) -> Result<Process> {
        let mut command = self.daemon_place().command(auth_daemon()?)?;
        command.args(arguments);
        Process::spawn(command)
    }

    /// Runs `auth-daemon unload` with the configuration that its last daemon had.
    pub fn unload(&self) -> Result<Finished> {
        let config = self.place().folder().join(crate::daemon::CONFIG);
        self.auth(&["unload", "--config", &config.display().to_string()])
    }

    /// Returns a number for another pod: part of its link's name and of its addresses.
    pub(crate) fn next_pod(&self) -> u8 {
        self.0.pods.fetch_add(1, Ordering::Relaxed)
    }
}

impl Deref for Node {
    type Target = Place;

    fn deref(&self) -> &Place {
        self.place()
    }
}

/// Number 1 is the node's own side.
const FIRST_POD: u8 = 2;
