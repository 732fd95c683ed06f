//! Two meshes on one wire, each with a trust domain of its own.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::app::App;
use crate::ca::{Ca, CaOptions};
use crate::daemon::Daemon;
use crate::daemon_options::DaemonOptions;
use crate::eventually::{TIMEOUT, eventually_ok};
use crate::manifests::Manifests;
use crate::mesh::Mesh;
use crate::pod::Pod;
use crate::spec::PodSpec;

/// The trust domain of node a, whose daemon signs with the embedded CA.
pub const NEAR: &str = "near.example";
/// The trust domain of node b. Its CA, on the host outside, serves the trust domain's bundle.
pub const FAR: &str = "far.example";
/// The address at which pods of node a reach the pod `far-web`.
pub const FAR_SERVICE: &str = "10.96.0.7:7";
/// The address at which pods of node b reach the pod `near-web`.
pub const NEAR_SERVICE: &str = "10.96.0.8:7";

/// Node a with the pods `near`, `near-web` and `a/other`, and node b with `far`, `far-web` and `b/other`, each of the service
/// account of its name. Each node knows its own pods, and the other's server as a service of the other trust domain.
///
/// Fields are dropped in this order: the programs, then the mesh.
#[derive(Debug)]
pub struct TwoDomains {
    _servers: [App; 2],
    /// The daemon of node a.
    pub near: Daemon,
    /// The daemon of node b.
    pub far: Daemon,
    /// The CA of [`FAR`].
    pub ca: Ca,
    /// Both nodes.
    pub mesh: Mesh,
}

impl TwoDomains {
    /// Starts both meshes. Neither trusts the other.
    pub fn start() -> Result<Self> {
        // The CA reads the first node's manifests.
        let mesh = Mesh::builder().node("b").node("a").start()?;
        for (node, namespace, name) in [
            ("a", "default", "near"),
            ("a", "default", "near-web"),
            ("a", "a", "other"),
            ("b", "default", "far"),
            ("b", "default", "far-web"),
            ("b", "b", "other"),
        ] {
            let spec = PodSpec::new(name).namespace(namespace).on(node);
            let pod = mesh.add_pod_quietly(spec.service_account(name))?;
            mesh.node(node).manifests().apply(&pod.manifest())?;
        }
        introduce(&mesh, "a", FAR_SERVICE, "far-web", FAR)?;
        introduce(&mesh, "b", NEAR_SERVICE, "near-web", NEAR)?;
        let endpoint = format!("{}:8443", mesh.outside_ipv4());
        let endpoint = json!({"listen": endpoint, "refreshHint": "1s"});
        let options = CaOptions::default()
            .setting("trustDomain", FAR.into())
            .setting("bundleEndpoint", endpoint);
        let ca = mesh.start_ca(&options)?;
        let near = DaemonOptions::default().trust_domain(NEAR);
        let far = DaemonOptions::default().trust_domain(FAR).ca(&ca);
        let near = start_daemon(&mesh, "a", near)?;
        let far = start_daemon(&mesh, "b", far)?;
        let serve = |name| mesh.pod(name).app("echo-server --port 7")?.listening();
        Ok(Self {
            _servers: [serve("near-web")?, serve("far-web")?],
            near,
            far,
            ca,
            mesh,
        })
    }

    /// The entry by which node a trusts [`FAR`].
    pub fn far_entry(&self) -> Value {
        json!({
            "trustDomain": FAR,
            "bundleEndpoint": {
                "url": format!("https://{}:8443/", self.mesh.outside_ipv4()),
                "profile": "https_spiffe",
                "spiffeId": format!("spiffe://{FAR}/auth-daemon/bundle-endpoint"),
            },
            "bundleFile": self.ca.roots(),
        })
    }

    /// The bundle file of the entry by which node b trusts [`NEAR`].
    pub fn near_bundle(&self) -> PathBuf {
        self.mesh.node("b").place().folder().join("near.pem")
    }

    /// Makes each trust domain trust the other.
    pub fn federate(&self) -> Result<()> {
        write_root(&self.mesh.node("a").ca_folder(), &self.near_bundle())?;
        let entry = json!({"trustDomain": NEAR, "bundleFile": self.near_bundle()});
        self.near
            .edit_config(|config| config["federation"] = json!([self.far_entry()]))?;
        self.far
            .edit_config(|config| config["federation"] = json!([entry]))
    }

    /// Whether `text` that a pod sends to `to` comes back.
    pub fn echoes(&self, from: &str, to: &str, text: &str) -> Result<bool> {
        let command = format!("connect --to {to} --send {text} --shutdown --read");
        let ended = self.mesh.pod(from).app(&command)?.finish(TIMEOUT)?;
        let events = ended.json_lines();
        Ok(events.last().is_some_and(|last| last["text"] == text))
    }

    /// Whether `text` comes back from node b to node a, and from node a to node b.
    pub fn both_echo(&self, text: &str) -> Result<[bool; 2]> {
        Ok([
            self.echoes("near", FAR_SERVICE, text)?,
            self.echoes("far", NEAR_SERVICE, text)?,
        ])
    }

    /// Waits until [`TwoDomains::both_echo`] is as expected.
    pub fn wait_both_echo(&self, text: &str, expected: [bool; 2]) -> Result<()> {
        let what = format!("pods to reach each other: {expected:?}");
        eventually_ok(TIMEOUT, &what, || {
            let echo = self.both_echo(text)?;
            anyhow::ensure!(echo == expected, "{echo:?}");
            Ok(())
        })
    }

    /// Starts an exchange between a pod and `to` that continues until it is interrupted.
    pub fn chat(&self, from: &str, to: &str) -> Result<App> {
        let mut chat = self
            .mesh
            .pod(from)
            .app(&format!("chat --to {to} --interval 50"))?;
        chat.event("connected", TIMEOUT)?;
        Ok(chat)
    }
}

fn start_daemon(mesh: &Mesh, node: &str, options: DaemonOptions) -> Result<Daemon> {
    let mut daemon = mesh.node(node).spawn_daemon(options)?;
    daemon.wait_ready()?;
    let pods = mesh.pods();
    let own = pods.iter().filter(|pod| pod.node() == node);
    daemon.wait_enrolled(&own.map(Pod::full_name).collect::<Vec<_>>())?;
    Ok(daemon)
}

/// Writes a service at `address` to the manifests of `node`, whose endpoint is a pod of another trust domain.
fn introduce(mesh: &Mesh, node: &str, address: &str, pod: &str, trust_domain: &str) -> Result<()> {
    let address = address.parse().context("an address")?;
    let identity = format!("spiffe://{trust_domain}/ns/default/sa/{pod}");
    let endpoint = (mesh.pod(pod).ipv4(), 7).into();
    foreign_service(mesh.node(node).manifests(), address, &identity, endpoint)
}

/// Writes the service `partner` at `address`, which `identity` runs at the IPv4 address `endpoint`, outside of the cluster.
pub fn foreign_service(
    manifests: &Manifests,
    address: SocketAddr,
    identity: &str,
    endpoint: SocketAddr,
) -> Result<()> {
    manifests.apply(&json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": "partner", "namespace": "default",
            "annotations": {"auth-daemon.io/service-accounts": identity},
        },
        "spec": {"clusterIP": address.ip(), "ports": [{"name": "echo", "port": address.port()}]},
    }))?;
    manifests.apply(&json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": "partner-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "partner"},
        },
        "addressType": "IPv4", "ports": [{"name": "echo", "port": endpoint.port()}],
        "endpoints": [{"addresses": [endpoint.ip()]}],
    }))
}

/// Writes the root certificate of the daemons that sign with the folder `ca` to `file`, without its key.
pub fn write_root(ca: &Path, file: &Path) -> Result<()> {
    const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
    const END: &str = "-----END CERTIFICATE-----";
    let pem = fs::read_to_string(ca.join("root.pem")).context("reading the root")?;
    let (_, rest) = pem.split_once(BEGIN).context("no certificate")?;
    let (root, _) = rest.split_once(END).context("no certificate")?;
    let new = file.with_extension("new");
    fs::write(&new, format!("{BEGIN}{root}{END}\n")).context("writing the root")?;
    fs::rename(&new, file).context("renaming the root")
}
