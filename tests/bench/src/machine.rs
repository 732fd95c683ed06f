//! The machine of a measurement: absolute numbers mean nothing without it.

use std::fs;
use std::path::Path;
use std::process::Command;

use mesh_tests::Package;
use mesh_tests::peers::ztunnel::version;
use serde::Serialize;

use xtask_support::step::output;

/// The machine and the programs.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    processor: String,
    cores: usize,
    kernel: String,
    /// Load average of the last minute at the start, caused by other programs.
    load: String,
    commit: String,
    envoy: &'static str,
    /// As it calls itself, where one is measured.
    ztunnel: Option<String>,
    nginx: String,
    iperf3: String,
    wrk: String,
}

/// A program's name and version, without the text that follows.
fn words(line: &str) -> String {
    line.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

impl Machine {
    pub(super) fn look(ztunnel: Option<&Path>) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let processor = read("/proc/cpuinfo");
        let processor = processor
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let printed = |program: &str, argument: &str| {
            // Some programs print it on standard error, and wrk exits with an error after it.
            let script = format!("{program} {argument} 2>&1; true");
            let text = output(Command::new("sh").args(["-c", &script])).unwrap_or_default();
            text.lines().next().unwrap_or_default().to_owned()
        };
        Self {
            processor: processor.map_or("unknown", |(_, name)| name).to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load: read("/proc/loadavg")
                .split(' ')
                .next()
                .unwrap_or_default()
                .to_owned(),
            commit: output(
                Command::new("git")
                    .args(["describe", "--always", "--dirty"])
                    .current_dir(xtask_support::step::workspace()),
            )
            .unwrap_or_default()
            .trim()
            .to_owned(),
            envoy: Package::ENVOY.version,
            ztunnel: ztunnel.map(version),
            nginx: printed("nginx", "-v").replace("nginx version: ", ""),
            iperf3: words(&printed("iperf3", "--version")),
            wrk: words(&printed("wrk", "--version")),
        }
    }

    /// Whether other programs used a significant part of the machine at the start.
    pub(super) fn busy(&self) -> bool {
        let load: f64 = self.load.parse().unwrap_or(0.0);
        load > self.cores as f64 / 2.0
    }

    /// A description in one line.
    pub(super) fn line(&self) -> String {
        let ztunnel = self.ztunnel.as_ref();
        let ztunnel = ztunnel.map_or_else(String::new, |version| format!("ztunnel {version}, "));
        format!(
            "{}, {} cores, Linux {}, load {} at the start; auth-daemon {}, Envoy {}, {ztunnel}{}, {}, {}",
            self.processor,
            self.cores,
            self.kernel,
            self.load,
            self.commit,
            self.envoy,
            self.nginx,
            self.iperf3,
            self.wrk
        )
    }
}
