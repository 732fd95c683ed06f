//! A sidecar: Envoy in a pod, and the rules that redirect the pod's connections to it.

mod certificates;
mod config;
mod download;
mod redirect;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use mesh_tests::{Place, Pod, Process, TIMEOUT, eventually_ok};
use serde::Deserialize;

use super::counters::{Counters, Moved};
use super::peer;
use config::{ADMIN, IN, INBOUND, OUTBOUND, PASSTHROUGH};

pub(super) use certificates::Authority;
pub(super) use config::Server;
pub(super) use download::{VERSION, binary};

/// A running sidecar. Dropping it kills it; its rules stay in the pod.
pub(super) struct Sidecar {
    process: Process,
    pod: Place,
}

impl Sidecar {
    /// Starts the sidecar and waits until it is ready, then redirects the pod's connections to it.
    ///
    /// It ends with the thread that calls this.
    pub(super) fn start(
        binary: &Path,
        pod: &Pod,
        account: &str,
        authority: &Authority,
        servers: &[Server],
        ports: &[u16],
    ) -> Result<Self> {
        let place = pod.place().clone();
        let files = authority.issue(account, place.folder())?;
        let config = config::config(pod.name(), &files, servers, ports);
        let path = place.folder().join("envoy.json");
        fs::write(&path, config.to_string())
            .with_context(|| format!("writing {}", path.display()))?;
        // The sidecar has a group of its own, by which the rules distinguish it from the pod's application.
        let mut command = place.command("setpriv")?;
        command
            .args(["--regid", &redirect::GROUP.to_string(), "--clear-groups"])
            .arg(binary)
            .arg("--config-path")
            .arg(&path)
            // Istio's own default, on every machine.
            .args(["--concurrency", "2", "--disable-hot-restart"])
            .args(["--log-level", "error"]);
        let mut sidecar = Self {
            process: Process::spawn(command)?,
            pod: place,
        };
        sidecar
            .wait_ready()
            .with_context(|| format!("Envoy in {} said: {}", pod.name(), sidecar.said()))?;
        redirect::install(&sidecar.pod)?;
        Ok(sidecar)
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Its output, which is empty if there are no errors.
    pub(super) fn said(&self) -> String {
        self.process.stderr()
    }

    pub(super) fn counters(&self) -> Result<Counters> {
        let answer = self.ask("/stats?format=json&type=Counters")?;
        let stats: Stats = serde_json::from_str(&answer).context("reading Envoy's counters")?;
        let counted: BTreeMap<_, _> = stats
            .stats
            .into_iter()
            .filter_map(|stat| Some((stat.name?, stat.value?)))
            .collect();
        let of = |name: String| counted.get(&name).copied().unwrap_or(0);
        let handshakes = of("listener.inbound.ssl.handshake".to_owned());
        Ok(Counters {
            inbound: Moved {
                connections: of(format!("tcp.{IN}.downstream_cx_total")).min(handshakes),
                bytes: of(format!("tcp.{IN}.downstream_cx_rx_bytes_total"))
                    + of(format!("tcp.{IN}.downstream_cx_tx_bytes_total")),
            },
            passed: of(format!("tcp.{PASSTHROUGH}.downstream_cx_total")),
        })
    }

    fn wait_ready(&mut self) -> Result<()> {
        eventually_ok(TIMEOUT, "Envoy to be ready", || {
            if let Some(status) = self.process.ended()? {
                return Ok(Err(anyhow!("it ended with {status}")));
            }
            self.ask("/ready").map(|_| Ok(()))
        })??;
        self.pod.wait_listening(OUTBOUND)?;
        self.pod.wait_listening(INBOUND)
    }

    fn ask(&self, path: &str) -> Result<String> {
        peer::ask(&self.pod, ADMIN, path)
    }
}

#[derive(Deserialize)]
struct Stats {
    stats: Vec<Stat>,
}

/// Histograms, which have neither, stand among the counters.
#[derive(Deserialize)]
struct Stat {
    name: Option<String>,
    value: Option<u64>,
}
