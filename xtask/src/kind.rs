//! `cargo xtask kind up`: deploy/ on a cluster of kind, for those who have it.

use std::process::Command;

use anyhow::{Result, bail};
use mesh_tests::AUTH_DAEMON_IMAGE;

use crate::image;
use crate::step::{output, programs, run, step, which, workspace};

/// What is to be done.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Action {
    /// Make a cluster where there is none, give it the image, and apply deploy/overlays/kind
    Up,
    /// Delete the cluster
    Down,
}

/// Does it.
///
/// # Errors
/// When kind or kubectl is missing, or one of their steps fails.
pub(crate) fn act(action: &Action) -> Result<()> {
    for program in ["kind", "kubectl"] {
        if which(program).is_none() {
            bail!(
                "there is no {program}: see https://kind.sigs.k8s.io and https://kubernetes.io/docs/tasks/tools"
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
    image::write(None, &archive)?;
    let deploy = workspace().join("deploy");
    let clusters = output(Command::new("kind").args(["get", "clusters"])).unwrap_or_default();
    if !clusters.lines().any(|name| name == CLUSTER) {
        step("make a cluster", || {
            let config = deploy.join("kind/config.yaml");
            let mut kind = Command::new("kind");
            kind.args(["create", "cluster", "--name", CLUSTER, "--config"]);
            run(kind.arg(config))
        })?;
    }
    step(&format!("give its nodes {AUTH_DAEMON_IMAGE}"), || {
        let mut kind = Command::new("kind");
        kind.args(["load", "image-archive", "--name", CLUSTER]);
        run(kind.arg(archive))
    })?;
    step("apply deploy/overlays/kind", || {
        run(kubectl()
            .args(["apply", "-k"])
            .arg(deploy.join("overlays/kind")))?;
        // Of an earlier `up`: the same name, another image.
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
