//! `cargo xtask kube-test`: the Helm chart on a real Kubernetes cluster of two nodes on this machine.

use anyhow::{Result, bail};
use test_runner as test;
use xtask_support::step::root;
use xtask_support::{build, kubernetes, setup};

/// Options of the test.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Environment:\n  KUBE_PROXY_MODE  kube-proxy's mode: nftables (default) or iptables\n  \
                  KUBE_CHURN_PODS  pods that one step creates and deletes (default: 100)\n  \
                  KUBE_STEPS       run only steps whose name contains this, and those that they need"
)]
pub(crate) struct Arguments {
    /// Test the existing build
    #[arg(long)]
    no_build: bool,
}

/// Installs and builds what the cluster and its pods need, and runs the tests that use it.
///
/// # Errors
/// If not root, if something does not build, or if a test fails. Where no cluster can run, the tests are reported as
/// skipped, with the reason.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if !root() {
        bail!(
            "the cluster's nodes are namespaces, which needs root (sudo -E cargo xtask kube-test)"
        );
    }
    setup::run()?;
    kubernetes::ensure_or_say();
    if !arguments.no_build {
        build::programs()?;
    }
    let targets = [
        "--package",
        "mesh-tests",
        "--test",
        "cluster",
        "--test",
        "istio",
    ];
    test::run_tests(&targets, &[]).map(drop)
}
