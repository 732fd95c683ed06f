//! Streams at maximum speed, by iperf3.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::load::{Measured, PATIENCE};
use crate::counters::Moved;
use crate::stage::Stage;
use crate::system::Way;
use crate::topology::IPERF3_PORT;

/// Measures received Gbit/s, and the proxies' CPU seconds per GiB.
pub(super) fn run(stage: &Stage, way: Way, time: Duration, streams: u64) -> Result<Measured> {
    let server = SocketAddr::new(stage.server(way), IPERF3_PORT);
    let arguments = [
        "-J".to_owned(),
        "-c".to_owned(),
        server.ip().to_string(),
        "-p".to_owned(),
        IPERF3_PORT.to_string(),
        "-t".to_owned(),
        time.as_secs().to_string(),
        "-P".to_owned(),
        streams.to_string(),
    ];
    let before = stage.proxies.cpu()?;
    let finished = stage
        .client()
        .spawn("iperf3", &arguments)?
        .finish(time + PATIENCE)?;
    let after = stage.proxies.cpu()?;
    let received = received(&finished.stdout)?;
    let gib = received.bytes as f64 / f64::from(1 << 30);
    let cpu = before
        .zip(after)
        .map(|(before, after)| (after - before).as_secs_f64() / gib);
    Ok(Measured {
        values: vec![Some(received.bits_per_second / 1e9), cpu],
        // iperf3 has one connection more, its control connection.
        moved: Moved {
            connections: streams + 1,
            bytes: received.bytes,
        },
        server,
        complaints: Vec::new(),
    })
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
struct Sum {
    bytes: u64,
    bits_per_second: f64,
}

fn received(text: &str) -> Result<Sum> {
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
        let sum = received(good).unwrap();
        assert_eq!((sum.bytes, sum.bits_per_second), (625, 1000.0));
        let refused = r#"{"start": {}, "end": {}, "error": "unable to connect to server"}"#;
        let error = received(refused).unwrap_err().to_string();
        assert!(error.contains("unable to connect"), "{error}");
        assert!(
            received(r#"{"end": {"sum_received": {"bytes": 0, "bits_per_second": 0}}}"#).is_err()
        );
        assert!(received("").is_err());
    }
}
