//! The command line. Each subcommand has a file.

mod ca;
mod check;
mod connect;
mod daemons;
mod embedded_ca;
mod manifests;
mod observe;
mod pairs;
mod policy;
mod policy_diff;
mod policy_suggest;
pub(crate) mod probe;
mod run;
mod service_manager;
mod standby;
mod status;
mod strict_readiness;
mod top;
mod ui;
mod uninstall;
mod unload;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Mutual TLS forevery pod on this node, without a sidecar.
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
    /// Show the status of the cluster's daemons, or of this node's. Exit code 0: all is well, 1: something is wrong or a node
    /// cannot be reached, 2: no daemon can be reached.
    Status(status::Arguments),
    /// Show the connections of the cluster, or of this node, that ended in the last minutes, and follow new ones.
    Observe(observe::Arguments),
    /// Show a live table of who talks to whom: connections, bytes, how they are encrypted, and refusals.
    Top(top::Arguments),
    /// Show the mesh in a browser: a map of who calls whom, how it is encrypted, what was refused and why. Serves a page on
    /// this machine's loopback, and prints its address.
    Ui(ui::Arguments),
    /// Reach a service of the mesh from this machine, as a service account: forwards a local port to it, or runs a program
    /// that uses it.
    Connect(Box<connect::Arguments>),
    /// Say who would be cut off if ports accepted mutual TLS only. Exit code 0: nobody, 1: somebody, 2: unknown.
    StrictReadiness(strict_readiness::Arguments),
    /// Explain which calls the policies allow, compare policies, and suggest some.
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
            Command::Status(arguments) => return Ok(status::status(&arguments)),
            Command::Observe(arguments) => return observe::observe(&arguments),
            Command::Top(arguments) => top::top(&arguments),
            Command::Ui(arguments) => ui::ui(&arguments),
            Command::Connect(arguments) => return connect::connect(&arguments),
            Command::StrictReadiness(arguments) => {
                return Ok(strict_readiness::strict_readiness(&arguments));
            }
            Command::Policy(arguments) => return Ok(policy::policy(&arguments)),
            Command::Unload(arguments) => unload::unload(&arguments),
            Command::Uninstall(arguments) => uninstall::uninstall(&arguments),
        }?;
        Ok(ExitCode::SUCCESS)
    }
}
