//! The step that creates and deletes many pods and compares what the daemons hold before and after.

use std::env;
use std::fs;

use mesh_tests::{Context, KernelStatus, Result, Status, eventually_ok};
use serde_json::{Value, json};

use crate::stage::{
    APPS, NODES, PATIENCE, Stage, account, container, ensure, pods_are_gone, status_of,
};

/// The environment variable with the number of pods, by default [`DEFAULT_PODS`].
const CHURN_PODS: &str = "KUBE_CHURN_PODS";
const DEFAULT_PODS: usize = 100;
/// The number of pods that exist at the same time, on both nodes together.
const AT_ONCE: usize = 50;
/// How much a daemon's memory may grow, in KiB: the allocator keeps some of what the first pods needed.
const GROWTH: u64 = 16 << 10;

/// What a daemon holds.
#[derive(Debug)]
pub(crate) struct Footprint {
    files: usize,
    /// The daemon's own count of its entries in kernel maps.
    kernel: KernelStatus,
    certificates: usize,
    /// Whether its connection to the CA is open, which is one of the files.
    watches_ca: bool,
    /// Resident memory in KiB.
    memory: u64,
}

impl Footprint {
    pub(crate) fn of(stage: &Stage, node: &str) -> Result<Self> {
        let daemon = stage.daemon_on(node)?;
        let status = status_of(stage, node)?;
        let watches_ca = status["ca"]["reachable"] == true;
        let status: Status = serde_json::from_value(status).context("the daemon's status")?;
        let process = format!("/proc/{}", stage.process(&daemon, "container")?);
        let memory = fs::read_to_string(format!("{process}/status"))?;
        let memory = memory
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        Ok(Self {
            files: fs::read_dir(format!("{process}/fd"))?.count(),
            kernel: status.kernel,
            certificates: status.certificates.len(),
            watches_ca,
            memory: memory.context("no VmRSS")?.parse()?,
        })
    }

    /// That of a daemon that has released the pods of earlier steps: `client-N` and `web-N` are left. An earlier step may have
    /// replaced the CA's leader.
    pub(crate) fn at_rest(stage: &Stage, node: &str) -> Result<Self> {
        eventually_ok(PATIENCE, "a daemon with two pods", || {
            let found = Self::of(stage, node)?;
            ensure(found.kernel.pods == 2 && found.watches_ca, || {
                format!("{node}: {found:?}")
            })?;
            Ok(found)
        })
    }

    /// Whether this is at most `before`, apart from memory.
    pub(crate) fn is_within(&self, before: &Self) -> bool {
        self.files <= before.files
            && self.kernel.pods <= before.kernel.pods
            && self.kernel.mesh_addresses <= before.kernel.mesh_addresses
            && self.kernel.originals <= before.kernel.originals
            && self.certificates <= before.certificates
    }
}

pub(crate) fn many_pods(stage: &Stage) -> Result<()> {
    let pods = match env::var(CHURN_PODS) {
        Ok(number) => number.parse().context(CHURN_PODS)?,
        Err(_) => DEFAULT_PODS,
    };
    stage.apply(&[account("churn"), deployment()])?;
    // The first pods fill pools and caches.
    round(stage, NODES.len())?;
    let before: Vec<Footprint> = NODES
        .into_iter()
        .map(|node| Footprint::at_rest(stage, node))
        .collect::<Result<_>>()?;
    let mut left = pods;
    while left > 0 {
        let now = left.min(AT_ONCE);
        round(stage, now)?;
        left -= now;
    }
    for (node, before) in NODES.into_iter().zip(&before) {
        let after = eventually_ok(PATIENCE, "a daemon that holds no more than before", || {
            let after = Footprint::of(stage, node)?;
            ensure(after.is_within(before), || {
                format!("{node}: {after:?} after {before:?}")
            })?;
            Ok(after)
        })?;
        let growth = after.memory.saturating_sub(before.memory);
        println!(
            "    {node}: {} files and {} KiB before {pods} pods, {} and {} after",
            before.files, before.memory, after.files, after.memory
        );
        ensure(growth < GROWTH, || format!("{node}: {growth} KiB more"))?;
    }
    stage
        .kubectl(&format!(
            "delete -n {APPS} deployment/churn serviceaccount/churn"
        ))
        .map(drop)
}

/// Creates this many pods, and deletes them.
fn round(stage: &Stage, pods: usize) -> Result<()> {
    scale(stage, pods)?;
    stage.rolled_out(APPS, "deployment/churn")?;
    scale(stage, 0)?;
    pods_are_gone(stage, APPS, "app=churn")
}

/// Sets the number of these pods.
pub(crate) fn scale(stage: &Stage, replicas: usize) -> Result<()> {
    let scale = format!("scale -n {APPS} deployment/churn --replicas={replicas}");
    stage.kubectl(&scale).map(drop)
}

/// Pods on both nodes.
pub(crate) fn deployment() -> Value {
    let labels = json!({"app": "churn"});
    let spread = json!([{
        "maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": labels},
    }]);
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "churn", "namespace": APPS},
        "spec": {
            "replicas": 0, "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {
                "serviceAccountName": "churn", "terminationGracePeriodSeconds": 0,
                "topologySpreadConstraints": spread,
                "containers": [container("exec httpd -f -p 8080")],
            }},
        },
    })
}
