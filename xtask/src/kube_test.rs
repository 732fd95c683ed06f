//! `cargo xtask kube-test`: the Helm chart on a real Kubernetes cluster of two nodes on this machine.

use std::env;
use std::process::Command;

use anyhow::{Context, Result, bail};
use mesh_tests::GoModule;
use test_runner as test;
use xtask_support::step::{self, root};
use xtask_support::{build, kubernetes, setup};

/// Options of the test.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Environment:\n  KUBE_PROXY_MODE  kube-proxy's mode: nftables (default) or iptables\n  \
                  KUBE_NETWORK     how pods are connected: bridge (default), or routed: by links of their own,\n                   \
                  with IPv4 and IPv6\n  \
                  KUBE_CHURN_PODS  pods that one step creates and deletes (default: 100)\n  \
                  KUBE_MEASURE     measure the start of this many pods instead, without and with the runtime's plugin\n  \
                  KUBE_STEPS       run only steps whose name contains this, or one of several texts separated by\n                   \
                  commas, and those that they need"
)]
pub(crate) struct Arguments {
    /// Test the existing build
    #[arg(long)]
    no_build: bool,
    /// Use this minor version of Kubernetes instead of the newest: 1.35, the oldest that is supported upstream. Its first
    /// build takes minutes
    #[arg(long, value_parser = older)]
    version: Option<&'static GoModule>,
}

fn older(version: &str) -> Result<&'static GoModule, String> {
    GoModule::older(version).ok_or_else(|| "there is no such version in tests/tools".to_owned())
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
    if let Some(older) = arguments.version
        && env::var_os(GoModule::VERSION).is_none()
    {
        // The tests inherit the environment.
        let mut again = Command::new(env::current_exe().context("finding this program")?);
        again.args(env::args_os().skip(1));
        again.env(GoModule::VERSION, older.minor_version());
        return step::run(&mut again);
    }
    setup::run()?;
    kubernetes::ensure_or_say();
    if let Some(older) = arguments.version {
        kubernetes::build(&[older])?;
    }
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
