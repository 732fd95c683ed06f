//! A sidecar: Envoy in a pod, and the rules that redirect the pod's connections to it.

mod certificates;
mod config;
mod redirect;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use mesh_tests::{Envoy, Pod};
use serde::Deserialize;

use super::counters::{Counters, Moved};
use config::{IN, INBOUND, OUTBOUND, PASSTHROUGH};

pub(super) use certificates::Authority;
pub(super) use config::Server;

/// A running sidecar. Dropping it kills it; its rules stay in the pod.
pub(super) struct Sidecar(Envoy);

impl Sidecar {
    /// Starts the sidecar and waits until it is ready, then redirects the pod's connections to it.
    ///
    /// It ends with the thread that calls this.
    pub(super) fn start(
        pod: &Pod,
        account: &str,
        authority: &Authority,
        servers: &[Server],
        ports: &[u16],
    ) -> Result<Self> {
        let place = pod.place();
        let files = authority.issue(account, place.folder())?;
        let config = config::config(pod.name(), &files, servers, ports);
        // The sidecar has a group of its own, by which the rules distinguish it from the pod's application.
        let envoy = Envoy::start(place, config, redirect::GROUP)?;
        place.wait_listening(OUTBOUND)?;
        place.wait_listening(INBOUND)?;
        redirect::install(place)?;
        Ok(Self(envoy))
    }

    pub(super) fn pid(&self) -> u32 {
        self.0.pid()
    }

    /// Its output, which is empty if there are no errors.
    pub(super) fn output(&self) -> String {
        self.0.output()
    }

    pub(super) fn counters(&self) -> Result<Counters> {
        let answer = self.0.ask("/stats?format=json&type=Counters")?;
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
