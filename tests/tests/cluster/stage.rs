//! The cluster with the chart installed, and the operations that steps share.

use std::env;
use std::time::Instant;

pub(crate) use mesh_tests::cluster::apps::{account, container, idle_pod, pod_running, role};
pub(crate) use mesh_tests::cluster::meshed::{
    APPS, CA, DAEMON, MeshedCluster as Stage, PATIENCE, SYSTEM, address, addresses, is_ready, name,
};
use mesh_tests::{ClusterOptions, Context, PodNetwork, ProxyMode, Result, eventually_ok};
use serde_json::Value;

/// The environment variable that chooses kube-proxy's mode: `nftables`, the default, or `iptables`.
const PROXY_MODE: &str = "KUBE_PROXY_MODE";
/// The environment variable that chooses how pods are connected: `bridge`, the default, or `routed`.
const NETWORK: &str = "KUBE_NETWORK";
/// The taint of nodes that no daemon serves.
pub(crate) const TAINT: &str = "auth-daemon.io/not-ready";
pub(crate) const NODES: [&str; 2] = ["node1", "node2"];

/// Starts the cluster and installs the chart.
pub(crate) fn set() -> Result<Stage> {
    let options = ClusterOptions {
        proxy: env::var(PROXY_MODE).map_or(Ok(ProxyMode::default()), |name| name.parse())?,
        network: env::var(NETWORK).map_or(Ok(PodNetwork::default()), |name| name.parse())?,
    };
    let start = Instant::now();
    let stage = Stage::start(&NODES, options)?;
    let version = stage.cluster.api().get("/version")?;
    let version = version.context("no version")?;
    println!(
        "Kubernetes {} is up, {options:?}: {:.1?}",
        version["gitVersion"].as_str().unwrap_or_default(),
        start.elapsed()
    );
    // As nodes that register with it.
    stage.kubectl(&format!("taint nodes --all {TAINT}=:NoSchedule"))?;
    // A later step installs the CRDs of policies, as Istio may do at any time.
    let people = "ca.config.attestation.kubernetes.people=allow";
    let options = ["--set", "daemon.nodeTaint=true", "--set", people];
    stage.install(&[&["--skip-crds"], options.as_slice()].concat())?;
    Ok(stage)
}

/// The status of a node's daemon.
pub(crate) fn status_of(stage: &Stage, node: &str) -> Result<Value> {
    let daemon = stage.daemon_on(node)?;
    let status = stage.kubectl(&format!(
        "exec -n {SYSTEM} {} -- auth-daemon status --json",
        name(&daemon)
    ))?;
    serde_json::from_str(&status).context("the daemon's status")
}

/// Fails with `evidence` unless the condition holds.
pub(crate) fn ensure(holds: bool, evidence: impl FnOnce() -> String) -> Result<()> {
    holds.then_some(()).with_context(evidence)
}

/// Waits until no pod with this label exists, not even one being deleted.
pub(crate) fn pods_are_gone(stage: &Stage, namespace: &str, label: &str) -> Result<()> {
    eventually_ok(PATIENCE, "the deletion of all pods", || {
        let list = stage.get(&format!("pods -n {namespace} -l {label}"))?;
        let left = list["items"].as_array().map_or(0, Vec::len);
        ensure(left == 0, || format!("{left} are left"))
    })
}

pub(crate) fn daemons_are_ready(stage: &Stage) -> Result<()> {
    stage.rolled_out(SYSTEM, "daemonset/auth-daemon")?;
    for node in NODES {
        eventually_ok(PATIENCE, "a ready daemon", || stage.daemon_on(node))?;
    }
    Ok(())
}
