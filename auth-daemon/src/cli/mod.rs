//! The command line. Each subcommand has a file.

mod ca;
mod check;
mod daemon_client;
mod embedded_ca;
mod manifests;
mod observe;
mod policy;
mod policy_diff;
pub(crate) mod probe;
mod run;
mod standby;
mod status;
mod uninstall;
mod unload;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Mutual TLS for every pod on this node, without a sidecar.
#[derive(Debug, Parser)]
#[command(name = "auth-daemon", version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the node daemon.
    Run(run::Arguments),
    /// Run the trust domain's CA, or query a running one.
    Ca(ca::Arguments),
    /// Check whether this machine meets the daemon's requirements.
    Check(check::Arguments),
    /// Query the health of the daemon in this container, for the kubelet.
    Probe(probe::Arguments),
    /// Show the status of this node's daemon.
    Status(status::Arguments),
    /// Show the connections of this node that ended in the last minutes, and follow new ones.
    Observe(observe::Arguments),
    /// Explain which calls the policies allow, and compare policies.
    Policy(policy::Arguments),
    /// Remove everything that a stopped daemon leaves in the kernel.
    Unload(unload::Arguments),
    /// Stop all daemons of the cluster and wait for their end; `helm uninstall` runs it.
    Uninstall(uninstall::Arguments),
}

impl Cli {
    /// Executes the subcommand.
    pub fn execute(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Run(arguments) => run::run(&arguments),
            Command::Ca(arguments) => ca::ca(arguments),
            Command::Check(arguments) => check::check(&arguments),
            Command::Probe(arguments) => probe::probe(&arguments),
            Command::Status(arguments) => status::status(&arguments),
            Command::Observe(arguments) => observe::observe(&arguments),
            Command::Policy(arguments) => return Ok(policy::policy(&arguments)),
            Command::Unload(arguments) => unload::unload(&arguments),
            Command::Uninstall(arguments) => uninstall::uninstall(&arguments),
        }?;
        Ok(ExitCode::SUCCESS)
    }
}
