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
use std::process::Command;

use anyhow::{Context, Result, anyhow, ensure};
use mesh_tests::{Ca, Mesh, Node, Place, Process, TIMEOUT, eventually_ok};
use serde_json::{Value, json};

use super::counters::Counters;
use super::peer;
use agent::{Agent, Workload};
use xtask_support::step::output;

/// A running ztunnel. Dropping it kills it; its rules stay in the pods.
pub(super) struct Ztunnel {
    process: Process,
    place: Place,
    log: PathBuf,
    /// ztunnel is not ready without an agent.
    _agent: Agent,
}

impl Ztunnel {
    /// Starts it, passes it the node's pods, and waits until it is ready. Then redirects the pods' connections to it.
    pub(super) fn start(binary: &Path, mesh: &Mesh, node: &Node, ca: &Ca) -> Result<Self> {
        let place = node.place().clone();
        let folder = place.folder().join("ztunnel");
        // The path where it looks by itself, relative to its working directory.
        let secrets = folder.join("var/run/secrets");
        for (from, to) in [
            (ca.roots(), "istio/root-cert.pem"),
            (ca.token(node.name()), "tokens/istio-token"),
        ] {
            copy(&from, &secrets.join(to))?;
        }
        let workloads = folder.join("workloads.yaml");
        // JSON is YAML.
        fs::write(&workloads, workloads_of(mesh).to_string())
            .with_context(|| format!("writing {}", workloads.display()))?;
        let socket = folder.join("agent.sock");
        let mut agent = Agent::listen(&socket)?;
        let log = folder.join("log");
        let to = File::create(&log).with_context(|| format!("making {}", log.display()))?;
        let mut command = place.command(binary)?;
        command
            .arg("proxy")
            .current_dir(&folder)
            .env_remove("RUST_LOG")
            .env("NODE_NAME", node.name())
            .env("IPV6_ENABLED", "false")
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
        ready.with_context(|| format!("ztunnel on {} said: {}", node.name(), ztunnel.said()))?;
        for pod in pods {
            for port in [redirect::OUTBOUND, redirect::INBOUND, redirect::HBONE] {
                pod.place().wait_listening(port)?;
            }
            redirect::install(pod.place())?;
        }
        Ok(ztunnel)
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Its log without the lines about connections.
    pub(super) fn said(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines = text.lines().filter(|line| !line.contains("access"));
        lines.collect::<Vec<_>>().join("\n")
    }

    pub(super) fn counters(&self) -> Result<Counters> {
        let metrics = peer::ask(&self.place, METRICS, "/metrics")?;
        Ok(counters(&metrics))
    }
}

/// The binary that `ZTUNNEL` names; `None` if it is not set.
///
/// # Errors
/// If the file does not exist.
pub(super) fn named() -> Result<Option<PathBuf>> {
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

/// The version that the binary reports.
pub(super) fn version(binary: &Path) -> String {
    let said = output(Command::new(binary).arg("version")).unwrap_or_default();
    said.lines().next().unwrap_or("unknown").to_owned()
}

/// Describes the node's pods and those that they may call, in the form of `LOCAL_XDS_PATH`.
fn workloads_of(mesh: &Mesh) -> Value {
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
    json!({"workloads": workloads, "policies": [], "services": []})
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
        peer::ask(place, READINESS, "/healthz/ready").map(|_| Ok(()))
    })?
}

/// Sums the relevant metrics from their text.
fn counters(metrics: &str) -> Counters {
    let mut counters = Counters::default();
    for line in metrics.lines() {
        let Some((name, rest)) = line.split_once('{') else {
            continue;
        };
        let Some((labels, value)) = rest.rsplit_once("} ") else {
            continue;
        };
        let has = |label: &str| labels.split(',').any(|one| one == label);
        let tls = has("connection_security_policy=\"mutual_tls\"");
        let to_pods = has("reporter=\"destination\"");
        let value = value.trim().parse().unwrap_or(0);
        match name {
            "istio_tcp_connections_opened_total" if to_pods && tls => {
                counters.inbound.connections += value;
            }
            "istio_tcp_connections_opened_total" if !to_pods && !tls => counters.passed += value,
            "istio_tcp_received_bytes_total" | "istio_tcp_sent_bytes_total" if to_pods && tls => {
                counters.inbound.bytes += value;
            }
            _ => {}
        }
    }
    counters
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().context("a file in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    fs::copy(from, to)
        .with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// The trust domain of the mesh's CA.
const TRUST_DOMAIN: &str = "cluster.local";
/// The port where a node's ztunnel serves metrics.
const METRICS: u16 = 15020;
/// The port where it reports readiness.
const READINESS: u16 = 15021;

#[cfg(test)]
mod tests {
    use super::super::counters::Moved;
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

    #[test]
    fn connections_to_pods_under_tls_are_told_from_those_that_pass() {
        let metrics = "\
# TYPE istio_tcp_connections_opened counter
istio_tcp_connections_opened_total{reporter=\"source\",connection_security_policy=\"mutual_tls\"} 100
istio_tcp_connections_opened_total{reporter=\"source\",connection_security_policy=\"unknown\",x=\"a\"} 3
istio_tcp_connections_opened_total{reporter=\"source\",connection_security_policy=\"unknown\",x=\"b\"} 4
istio_tcp_connections_opened_total{reporter=\"destination\",connection_security_policy=\"mutual_tls\"} 20
istio_tcp_connections_opened_total{reporter=\"destination\",connection_security_policy=\"unknown\"} 1
istio_tcp_received_bytes_total{reporter=\"destination\",connection_security_policy=\"mutual_tls\"} 1000
istio_tcp_sent_bytes_total{reporter=\"destination\",connection_security_policy=\"mutual_tls\"} 2000
istio_tcp_sent_bytes_total{reporter=\"source\",connection_security_policy=\"mutual_tls\"} 7
workload_manager_active_proxy_count 2
";
        let expected = Counters {
            inbound: Moved {
                connections: 20,
                bytes: 3000,
            },
            passed: 7,
        };
        assert_eq!(counters(metrics), expected);
    }
}
