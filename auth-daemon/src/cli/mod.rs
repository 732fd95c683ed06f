//! The command line. Each subcommand has a file.

mod ask_daemon;
mod ca;
mod check;
mod embedded_ca;
mod manifests;
mod policy;
mod policy_diff;
pub(crate) mod probe;
mod run;
mod standby;
mod status;
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
    /// Run the trust domain's CA, or ask the one that runs.
    Ca(ca::Arguments),
    /// Say whether this machine has what the daemon needs.
    Check(check::Arguments),
    /// Ask the daemon that runs in this container how it is, for the kubelet.
    Probe(probe::Arguments),
    /// Show what the daemon on this node is doing.
    Status(status::Arguments),
    /// Say who may call whom, and why, from manifests alone.
    Policy(policy::Arguments),
    /// Remove everything that a stopped daemon leaves in the kernel.
    Unload(unload::Arguments),
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
            Command::Policy(arguments) => return Ok(policy::policy(&arguments)),
            Command::Unload(arguments) => unload::unload(&arguments),
        }?;
        Ok(ExitCode::SUCCESS)
    }
}
