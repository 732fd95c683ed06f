//! A Kubernetes cluster in a machine, whose kubelets use cgroup version 2: the cluster test's programs, and those of its
//! steps that show tunnels, refusals and the first moments of pods.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use mesh_tests::vm::{Cgroups, Step};
use mesh_tests::{FileTree, GoModule, chart, programs_folder};
use test_runner::binaries::{self, Binary};
use xtask_support::step::which;

use super::programs::OURS;

/// Programs of Debian's that a cluster and its nodes run, in addition to those of all machines.
const PROGRAMS: [&str; 9] = [
    "busybox",
    "conntrack",
    "grep",
    "ip6tables",
    "iptables",
    "ldd",
    "nsenter",
    "runc",
    "strip",
];
/// The folder of the plugins of iptables.
const IPTABLES_PLUGINS: &str = "/usr/lib/x86_64-linux-gnu/xtables";
/// Modules of Go programs that a cluster does not run.
const UNUSED: [&str; 2] = ["istio", "spire"];
/// The test in the binary `cluster`, and texts in the names of its steps that run, besides those that these need.
const TEST: &str = "chart_on_a_cluster_of_two_nodes";
const STEPS: &str = "with TLS 1.3 between nodes,the access log names,pods outside the mesh are refused,without a daemon is closed";
/// Memory of the machine, in MiB: its files, and the processes of two nodes and an API server.
pub(super) const MEMORY: u32 = 8192;
/// Time limit of the test, in seconds.
const SECONDS: u64 = 5400;

/// Builds the test.
///
/// # Errors
/// If it does not build.
pub(super) fn build() -> Result<Vec<Binary>> {
    binaries::build(&["--package", "mesh-tests", "--test", "cluster"])
}

/// Adds what a cluster needs to the contents of a machine.
///
/// # Errors
/// If a program is missing: `cargo xtask kubernetes` builds or installs it.
pub(super) fn add(tree: &mut FileTree, kube_node: &Path) -> Result<()> {
    for name in PROGRAMS {
        let path = which(name).with_context(|| {
            format!("there is no {name} here, which `cargo xtask kubernetes` installs")
        })?;
        let path = path.canonicalize().unwrap_or(path);
        tree.program(Path::new("/usr/bin").join(name), &path)?;
    }
    // Each node mounts a /run of its own, and containerd makes a socket in /var/run.
    tree.link("/var/run", "/run")?;
    if Path::new(IPTABLES_PLUGINS).is_dir() {
        tree.copy(Path::new(IPTABLES_PLUGINS), Path::new(IPTABLES_PLUGINS))?;
    }
    let modules = GoModule::ALL
        .iter()
        .filter(|module| !UNUSED.contains(&module.name));
    for name in modules.flat_map(|module| module.programs) {
        let path = programs_folder().join(name);
        fs::metadata(&path)
            .with_context(|| format!("{}: `cargo xtask kubernetes` builds it", path.display()))?;
        tree.file(Path::new(KUBE).join(name), &path)?;
    }
    tree.program(Path::new(OURS).join("kube-node"), kube_node)?;
    tree.copy(&Path::new(DEPLOY).join("chart"), &chart::folder())
}

/// The test, as a machine's only step.
pub(super) fn step() -> Step {
    Step {
        name: "kubernetes".to_owned(),
        cgroups: Cgroups::V2,
        command: [
            &format!("{OURS}/tests/cluster"),
            "--nocapture",
            "--exact",
            TEST,
        ]
        .map(|word: &str| word.to_owned())
        .to_vec(),
        environment: [
            ("KUBE", KUBE),
            ("KUBE_STEPS", STEPS),
            (chart::FOLDER, DEPLOY),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec(),
        seconds: SECONDS,
    }
}

/// The folders of Kubernetes' programs and of the chart in a machine.
const KUBE: &str = "/opt/kube";
const DEPLOY: &str = "/opt/auth-daemon/deploy";

#[cfg(test)]
mod tests {
    use super::*;
    use xtask_support::step::workspace;

    #[test]
    fn steps_exist() {
        let test = fs::read_to_string(workspace().join("tests/tests/cluster/main.rs")).unwrap();
        assert!(test.contains(&format!("fn {TEST}(")));
        for step in STEPS.split(',') {
            assert!(test.contains(step), "{step}");
        }
    }
}
