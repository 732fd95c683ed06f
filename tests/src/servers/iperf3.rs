//! iperf3, for measurements.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::place::Place;
use crate::process::Process;

/// An iperf3 server.
#[derive(Debug)]
pub struct Iperf3 {
    process: Process,
    port: u16,
}

impl Iperf3 {
    /// Starts it and waits until it listens.
    pub fn start(place: &Place, port: u16) -> Result<Self> {
        let process = place.spawn("iperf3", ["-s", "-p", &port.to_string()])?;
        place
            .wait_listening(port)
            .with_context(|| format!("iperf3 said: {}", process.stderr()))?;
        Ok(Self { process, port })
    }

    /// Runs a client in `place` against `server` with more arguments, such as `["-t", "2", "-P", "8"]`, and returns its
    /// JSON report.
    pub fn measure(
        &self,
        place: &Place,
        server: std::net::IpAddr,
        arguments: &[&str],
    ) -> Result<Value> {
        let (server, port) = (server.to_string(), self.port.to_string());
        let base = ["-J", "-c", &server, "-p", &port];
        let output = place
            .run("iperf3", base.iter().chain(arguments))?
            .ok()?
            .stdout;
        serde_json::from_str(&output).with_context(|| format!("reading iperf3's report {output}"))
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
