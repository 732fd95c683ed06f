//! ztunnel on a node, as in Istio's ambient mode: it has sockets in the pods' own namespaces, and uses HBONE to the
//! other node's ztunnel.
//!
//! Its certificates come from our own CA, which implements istiod's protocol. A file replaces what istiod would send
//! about the pods.

mod agent;
mod redirect;

use std::fs::{self, File};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::ask;
use crate::ca::Ca;
use crate::eventually::{TIMEOUT, eventually_ok};
use crate::mesh::Mesh;
use crate::node::Node;
use crate::place::Place;
use crate::process::Process;
use agent::{Agent, Workload};

/// Settings of a ztunnel besides the mesh's pods.
#[derive(Debug, Clone, Default)]
pub struct ZtunnelOptions {
    /// Serve IPv6, too.
    pub ipv6: bool,
    /// Ports of its pods that a policy denies to everyone.
    pub denied_ports: Vec<u16>,
}

/// A running ztunnel. Dropping it kills it; its rules stay in the pods.
#[derive(Debug)]
pub struct Ztunnel {
    process: Process,
    place: Place,
    log: PathBuf,
    /// ztunnel is not ready without an agent.
    _agent: Agent,
}

impl Ztunnel {
    /// Starts it, passes it the node's pods, and waits until it is ready. Then redirects the pods' connections to it. May
    /// be called again after it has ended.
    ///
    /// # Errors
    /// If it ends, or is not ready in time: the error has its log.
    pub fn start(
        binary: &Path,
        mesh: &Mesh,
        node: &Node,
        ca: &Ca,
        options: &ZtunnelOptions,
    ) -> Result<Self> {
        let place = node.place().clone();
        let folder = place.folder().join("ztunnel");
        for (from, to) in [
            (ca.roots(), ROOTS),
            (ca.token(node.name()), "tokens/istio-token"),
        ] {
            copy(&from, &folder.join(SECRETS).join(to))?;
        }
        let workloads = folder.join("workloads.yaml");
        // JSON is YAML.
        fs::write(&workloads, local_config(mesh, options).to_string())
            .with_context(|| format!("writing {}", workloads.display()))?;
        let socket = folder.join("agent.sock");
        let mut agent = Agent::listen(&socket)?;
        let log = folder.join("log");
        let to = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("opening {}", log.display()))?;
        let mut command = place.command(binary)?;
        command
            .arg("proxy")
            .current_dir(&folder)
            .env_remove("RUST_LOG")
            .env("NODE_NAME", node.name())
            .env("IPV6_ENABLED", options.ipv6.to_string())
            .env("XDS_ADDRESS", "")
            .env("LOCAL_XDS_PATH", &workloads)
            .env("CA_ADDRESS", format!("https://{}", ca.address()))
            .env("INPOD_UDS", &socket)
            .stdout(to.try_clone().context("sharing ztunnel's log")?)
            .stderr(to);
        let mut process = Process::spawn_as_is(command)?;
        let mut pods = mesh.pods();
        pods.retain(|pod| pod.node() == node.name());
        let ready = agent
            .introduce(pods.iter().map(Workload::from), &mut process)
            .and_then(|()| wait_ready(&place, &mut process));
        let ztunnel = Self {
            process,
            place,
            log,
            _agent: agent,
        };
        ready.with_context(|| format!("ztunnel on {} said: {}", node.name(), ztunnel.output()))?;
        for pod in pods {
            for port in [redirect::OUTBOUND, redirect::INBOUND, redirect::HBONE] {
                pod.place().wait_listening(port)?;
            }
            redirect::install(pod.place(), options.ipv6)?;
        }
        Ok(ztunnel)
    }

    /// Replaces its roots by those that the CA has now, as the kubelet does for a mounted ConfigMap.
    pub fn update_roots(&self, ca: &Ca) -> Result<()> {
        let roots = self
            .place
            .folder()
            .join("ztunnel")
            .join(SECRETS)
            .join(ROOTS);
        let next = roots.with_extension("next");
        copy(&ca.roots(), &next)?;
        fs::rename(&next, &roots).with_context(|| format!("replacing {}", roots.display()))
    }

    /// Its process ID.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Its log, and that of those before it on the node, without the lines about connections.
    pub fn output(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines = text.lines().filter(|line| !is_access(line));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// The lines of its log about connections that have ended, as text.
    pub fn access_log(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines = text.lines().filter(|line| is_access(line));
        lines.map(str::to_owned).collect()
    }

    /// Its metrics, in the text format of Prometheus.
    pub fn metrics(&self) -> Result<String> {
        ask(&self.place, METRICS, "/metrics")
    }

    /// Sends SIGTERM and waits until it has exited.
    pub fn terminate(mut self, deadline: Duration) -> Result<ExitStatus> {
        self.process.signal(Signal::SIGTERM)?;
        let ended = self.process.wait(deadline);
        ended.with_context(|| format!("ztunnel said: {}", self.output()))
    }
}

/// The binary that `ZTUNNEL` names; `None` if it is not set.
///
/// # Errors
/// If the file does not exist.
pub fn named() -> Result<Option<PathBuf>> {
    let Some(path) = std::env::var_os("ZTUNNEL") else {
        return Ok(None);
    };
    let path = Path::new(&path);
    let found = path.canonicalize().with_context(|| {
        format!(
            "ZTUNNEL={}: set it to the path of a ztunnel binary, or unset it",
            path.display()
        )
    })?;
    ensure!(found.is_file(), "ZTUNNEL={}: not a file", found.display());
    Ok(Some(found))
}

/// The version that the binary reports: the first field of its build information.
pub fn version(binary: &Path) -> String {
    let stdout = Command::new(binary).arg("version").output();
    let stdout = stdout.map_or_else(|_| Vec::new(), |output| output.stdout);
    let stdout = String::from_utf8_lossy(&stdout);
    stdout.split('"').nth(1).unwrap_or("unknown").to_owned()
}

/// Describes the mesh's pods and the policies, in the form of `LOCAL_XDS_PATH`.
fn local_config(mesh: &Mesh, options: &ZtunnelOptions) -> Value {
    let pods = mesh.pods();
    let workloads: Vec<Value> = pods
        .iter()
        .map(|pod| {
            workload(
                pod.name(),
                pod.namespace(),
                pod.spec().account(),
                pod.node(),
                pod.addresses(),
            )
        })
        .collect();
    let mut policies = Vec::new();
    if !options.denied_ports.is_empty() {
        policies.push(json!({
            "name": "denied-ports",
            "namespace": "default",
            "scope": "Namespace",
            "action": "Deny",
            "dryRun": false,
            "rules": [[[{"destinationPorts": options.denied_ports}]]],
        }));
    }
    json!({"workloads": workloads, "policies": policies, "services": []})
}

fn workload(name: &str, namespace: &str, account: &str, node: &str, addresses: &[IpAddr]) -> Value {
    json!({
        "uid": format!("Kubernetes//Pod/{namespace}/{name}"),
        "name": name,
        "namespace": namespace,
        "serviceAccount": account,
        // The trust domain of its certificates: ztunnel uses the identities from a file unchanged.
        "trustDomain": TRUST_DOMAIN,
        "workloadIps": addresses,
        "node": node,
        "network": "",
        "protocol": "HBONE",
        "services": {},
    })
}

fn wait_ready(place: &Place, process: &mut Process) -> Result<()> {
    eventually_ok(TIMEOUT, "ztunnel to be ready", || {
        if let Some(status) = process.ended()? {
            return Ok(Err(anyhow!("it ended with {status}")));
        }
        ask(place, READINESS, "/healthz/ready").map(|_| Ok(()))
    })?
}

fn is_access(line: &str) -> bool {
    line.contains("\taccess\t")
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().context("a file in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    fs::copy(from, to)
        .with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// Where it looks for credentials by default, relative to its working directory.
const SECRETS: &str = "var/run/secrets";
/// The roots of its CA, below that.
const ROOTS: &str = "istio/root-cert.pem";
/// The trust domain of the mesh's CA.
const TRUST_DOMAIN: &str = "cluster.local";
/// The port where a node's ztunnel serves metrics.
const METRICS: u16 = 15020;
/// The port where it reports readiness.
const READINESS: u16 = 15021;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_has_all_that_its_identity_is_made_of() {
        let workload = workload("web", "shop", "cashier", "node-b", &[]);
        let part = |field: &str| workload[field].as_str().expect("a string").to_owned();
        let identity = format!(
            "spiffe://{}/ns/{}/sa/{}",
            part("trustDomain"),
            part("namespace"),
            part("serviceAccount")
        );
        assert_eq!(identity, "spiffe://cluster.local/ns/shop/sa/cashier");
    }
}
