//! `cargo xtask <command>`: everything a contributor runs. The work is done in library crates: `xtask-support` builds and
//! installs, `test-runner`, `mesh-demo`, `mesh-bench` and `vm-tests` run meshes and machines.
#![forbid(unsafe_code)]

mod chart;
mod ci;
mod clippy_ebpf;
mod deb;
mod deny;
mod fuzz;
mod image;
mod kind;
mod kube_test;
mod sbom;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xtask_support::{build, build_ebpf, kubernetes, peers, setup};

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
    Test(test_runner::Arguments),
    /// Show on two nodes of network namespaces what the daemon does, with evidence
    Demo(mesh_demo::Arguments),
    /// Measure it against plain connections and Envoy sidecars, side by side on this machine
    Bench(mesh_bench::Arguments),
    /// Write a container image of the daemon as an OCI archive, without Docker
    Image(image::Arguments),
    /// Write a Debian package of the daemon, for machines outside Kubernetes
    Deb(deb::Arguments),
    /// Render deploy/auth-daemon.yaml from the Helm chart
    Chart,
    /// Show the Helm chart on a real Kubernetes of two nodes on this machine; `test` runs the same
    KubeTest(kube_test::Arguments),
    /// Run the redirection and traffic tests on other kernels, in virtual machines
    VmTest(vm_tests::Arguments),
    /// Install the Helm chart on a cluster of kind, for those who have it
    #[command(subcommand)]
    Kind(kind::Action),
    /// Install what tests, demo and bench run (nginx, iperf3, Kubernetes, …), where it is missing
    Setup,
    /// Build Kubernetes, istiod and SPIRE into $KUBE or /opt/kube, for the tests that need them
    Kubernetes,
    /// Run clippy on the eBPF programs
    ClippyEbpf(build_ebpf::Arguments),
    /// Check licences, sources and duplicates of dependencies; advisories where their database can be reached
    Deny,
    /// Search for input that breaks a parser, with libFuzzer (needs a nightly toolchain)
    Fuzz(fuzz::Arguments),
    /// Run what continuous integration runs: .ci/run
    Ci,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::BuildEbpf(arguments) => build_ebpf::run(&arguments),
        Command::Build => build::run(),
        Command::Test(arguments) => test_runner::run(&arguments),
        Command::Demo(arguments) => mesh_demo::run(&arguments),
        Command::Bench(arguments) => mesh_bench::run(&arguments),
        Command::Image(arguments) => image::run(&arguments),
        Command::Deb(arguments) => deb::run(&arguments),
        Command::Chart => chart::run(),
        Command::KubeTest(arguments) => kube_test::run(&arguments),
        Command::VmTest(arguments) => vm_tests::run(&arguments),
        Command::Kind(action) => kind::act(&action),
        Command::Setup => setup::run().map(|()| {
            peers::ensure_or_say();
            kubernetes::ensure_or_say();
        }),
        Command::Kubernetes => kubernetes::ensure(),
        Command::ClippyEbpf(arguments) => clippy_ebpf::run(&arguments),
        Command::Deny => deny::run(),
        Command::Fuzz(arguments) => fuzz::run(&arguments),
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
