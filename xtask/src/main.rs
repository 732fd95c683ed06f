//! Everything a contributor runs: `cargo xtask <command>`. One file a command; the helpers they share are
//! [`step`] (a long step with its progress), [`page`] (a table in the documentation), [`apt`] and [`toolchain`].
#![forbid(unsafe_code)]

mod apt;
mod bench;
mod build;
mod build_ebpf;
mod cargo_install;
mod ci;
mod clippy_ebpf;
mod demo;
mod deny;
mod image;
mod kind;
mod kube_test;
mod kubernetes;
mod page;
mod setup;
mod step;
mod test;
mod toolchain;
mod vm_test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Build, test and check this project.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build the eBPF objects that the daemon embeds, in target/bpf
    BuildEbpf(build_ebpf::Arguments),
    /// Build everything, optimised: the eBPF object, then the workspace
    Build,
    /// Run all tests as root, or those whose name contains a filter
    Test(test::Arguments),
    /// Show on two nodes of network namespaces what the daemon does, with evidence
    Demo(demo::Arguments),
    /// Measure it against plain connections and Envoy sidecars, side by side on this machine
    Bench(bench::Arguments),
    /// Write a container image of the daemon as an OCI archive, without Docker
    Image(image::Arguments),
    /// Show deploy/ on a real Kubernetes of two nodes on this machine; `test` runs the same
    KubeTest(kube_test::Arguments),
    /// Run the redirection and traffic tests on other kernels, in virtual machines
    VmTest(vm_test::Arguments),
    /// Put deploy/ on a cluster of kind, for those who have it
    #[command(subcommand)]
    Kind(kind::Action),
    /// Install what tests, demo and bench run (nginx, iperf3, Kubernetes, …), where it is missing
    Setup,
    /// Build Kubernetes into $KUBE or /opt/kube, for the tests that need an API server or nodes
    Kubernetes,
    /// Run clippy on the eBPF programs
    ClippyEbpf(build_ebpf::Arguments),
    /// Check licences, sources and duplicates of dependencies; advisories where their database can be reached
    Deny,
    /// Run what continuous integration runs: .ci/run
    Ci,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::BuildEbpf(arguments) => build_ebpf::run(&arguments),
        Command::Build => build::run(),
        Command::Test(arguments) => test::run(&arguments),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Image(arguments) => image::run(&arguments),
        Command::KubeTest(arguments) => kube_test::run(&arguments),
        Command::VmTest(arguments) => vm_test::run(&arguments),
        Command::Kind(action) => kind::act(&action),
        Command::Setup => setup::run().map(|()| kubernetes::ensure_or_say()),
        Command::Kubernetes => kubernetes::ensure(),
        Command::ClippyEbpf(arguments) => clippy_ebpf::run(&arguments),
        Command::Deny => deny::run(),
        Command::Ci => ci::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Without anyhow's backtrace: the programs that ran have already printed what matters.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
