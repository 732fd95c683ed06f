//! Streams at maximum speed, by iperf3.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::Process;
use serde::Deserialize;

use super::load::{Measured, PATIENCE};
use crate::counters::Moved;
use crate::stage::Stage;
use crate::system::Way;
use crate::topology::IPERF3_PORT;

/// Measures received Gbit/s, and the proxies' CPU seconds per GiB.
pub(super) fn run(stage: &Stage, way: Way, time: Duration, streams: u64) -> Result<Measured> {
    let before = stage.proxies.cpu()?;
    let received = received(start(stage, way, time, streams)?, time)?;
    let after = stage.proxies.cpu()?;
    let gib = received.bytes as f64 / f64::from(1 << 30);
    let cpu = before
        .zip(after)
        .map(|(before, after)| (after - before).as_secs_f64() / gib);
    Ok(Measured {
        values: vec![Some(received.gigabits_per_second()), cpu],
        // iperf3 has one connection more, its control connection.
        moved: Moved {
            connections: streams + 1,
            bytes: received.bytes,
        },
        server: server(stage, way),
        complaints: Vec::new(),
    })
}

/// Starts streams that last for `time`.
pub(super) fn start(stage: &Stage, way: Way, time: Duration, streams: u64) -> Result<Process> {
    let server = server(stage, way);
    let arguments = [
        "-J".to_owned(),
        "-c".to_owned(),
        server.ip().to_string(),
        "-p".to_owned(),
        server.port().to_string(),
        "-t".to_owned(),
        time.as_secs().to_string(),
        "-P".to_owned(),
        streams.to_string(),
    ];
    stage.client().spawn("iperf3", &arguments)
}

/// Waits for streams that last for `time`, and returns what they have received.
pub(super) fn received(streams: Process, time: Duration) -> Result<Sum> {
    parse(&streams.finish(time + PATIENCE)?.stdout)
}

fn server(stage: &Stage, way: Way) -> SocketAddr {
    SocketAddr::new(stage.server(way), IPERF3_PORT)
}

#[derive(Deserialize)]
struct Report {
    /// The reason why there are no results.
    error: Option<String>,
    end: Option<End>,
}

#[derive(Deserialize)]
struct End {
    sum_received: Option<Sum>,
}

/// The bytes received in all streams together.
#[derive(Debug, Deserialize)]
pub(super) struct Sum {
    bytes: u64,
    bits_per_second: f64,
}

impl Sum {
    pub(super) fn gigabits_per_second(&self) -> f64 {
        self.bits_per_second / 1e9
    }
}

fn parse(text: &str) -> Result<Sum> {
    let report: Report =
        serde_json::from_str(text).with_context(|| format!("reading iperf3's report {text:?}"))?;
    ensure!(
        report.error.is_none(),
        "iperf3: {}",
        report.error.unwrap_or_default()
    );
    let sum = report.end.and_then(|end| end.sum_received);
    let sum = sum.context("iperf3 reports nothing received")?;
    ensure!(sum.bytes > 0, "nothing arrived");
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arrived_is_read_and_errors_are_reported() {
        let good = r#"{"start": {}, "end": {"streams": [],
            "sum_received": {"start": 0, "seconds": 5.0, "bytes": 625, "bits_per_second": 1000.0}}}"#;
        let sum = parse(good).unwrap();
        assert_eq!((sum.bytes, sum.bits_per_second), (625, 1000.0));
        let refused = r#"{"start": {}, "end": {}, "error": "unable to connect to server"}"#;
        let error = parse(refused).unwrap_err().to_string();
        assert!(error.contains("unable to connect"), "{error}");
        assert!(parse(r#"{"end": {"sum_received": {"bytes": 0, "bits_per_second": 0}}}"#).is_err());
        assert!(parse("").is_err());
    }
}
