//! `cargo xtask kind`: the Helm chart on a kind cluster, on machines with Docker, kind, kubectl and helm.

use std::process::Command;

use anyhow::{Result, bail};
use mesh_tests::{AUTH_DAEMON_IMAGE, auth_daemon_image};
use xtask_support::build;
use xtask_support::step::{output, programs, run, step, which, workspace};

/// What to do with the cluster.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Action {
    /// Create the cluster if it does not exist, load the daemon's image, and install the chart
    Up,
    /// Delete the cluster
    Down,
}

/// Runs the action.
///
/// # Errors
/// If kind, kubectl or helm is missing, or one of their commands fails.
pub(crate) fn act(action: &Action) -> Result<()> {
    for program in ["kind", "kubectl", "helm"] {
        if which(program).is_none() {
            bail!(
                "{program} is missing: see https://kind.sigs.k8s.io, https://kubernetes.io/docs/tasks/tools and https://helm.sh"
            );
        }
    }
    match action {
        Action::Up => up(),
        Action::Down => step("delete the cluster", || {
            run(Command::new("kind").args(["delete", "cluster", "--name", CLUSTER]))
        }),
    }
}

fn up() -> Result<()> {
    let archive = programs()?.join("auth-daemon.tar");
    build::daemon()?;
    step(&format!("write the image {AUTH_DAEMON_IMAGE}"), || {
        auth_daemon_image(&programs()?.join("auth-daemon"), &archive)
    })?;
    let deploy = workspace().join("deploy");
    let clusters = output(Command::new("kind").args(["get", "clusters"])).unwrap_or_default();
    if !clusters.lines().any(|name| name == CLUSTER) {
        step("create the cluster", || {
            let config = deploy.join("kind/config.yaml");
            let mut kind = Command::new("kind");
            kind.args(["create", "cluster", "--name", CLUSTER, "--config"]);
            run(kind.arg(config))
        })?;
    }
    step(&format!("load {AUTH_DAEMON_IMAGE} on its nodes"), || {
        let mut kind = Command::new("kind");
        kind.args(["load", "image-archive", "--name", CLUSTER]);
        run(kind.arg(archive))
    })?;
    step("install deploy/chart", || {
        let mut helm = Command::new("helm");
        helm.args(["--kube-context", &format!("kind-{CLUSTER}")]);
        helm.args(["upgrade", "--install", "auth-daemon"])
            .arg(deploy.join("chart"))
            .args(["--namespace", NAMESPACE, "--create-namespace"])
            .args(["--set", "mode=STRICT"]);
        run(&mut helm)?;
        // Pods of an earlier `up` still run another image of the same name.
        for what in ["deployment/auth-ca", "daemonset/auth-daemon"] {
            run(kubectl().args(["-n", NAMESPACE, "rollout", "restart", what]))?;
        }
        for what in ["deployment/auth-ca", "daemonset/auth-daemon"] {
            run(kubectl().args(["-n", NAMESPACE, "rollout", "status", "--timeout=5m", what]))?;
        }
        Ok(())
    })
}

fn kubectl() -> Command {
    let mut command = Command::new("kubectl");
    command.args(["--context", &format!("kind-{CLUSTER}")]);
    command
}

const CLUSTER: &str = "auth-daemon";
const NAMESPACE: &str = "auth-system";
