//! HTTP requests by wrk, on one thread.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};

use super::load::{Measured, PATIENCE, per_thousand};
use crate::counters::Moved;
use crate::stage::Stage;
use crate::system::Way;
use crate::topology::NGINX_PORT;

/// Whether each request has its own connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Connections {
    Kept,
    ForEachRequest,
}

/// Requests on persistent connections: requests per second.
pub(super) fn rate(stage: &Stage, way: Way, time: Duration, connections: u32) -> Result<Measured> {
    let report = kept(stage, way, time, connections)?;
    Ok(report.measured(way, stage, vec![Some(report.rate)]))
}

/// Requests on one connection: latency, median and 99th percentile, in microseconds.
pub(super) fn latency(stage: &Stage, way: Way, time: Duration) -> Result<Measured> {
    let report = kept(stage, way, time, 1)?;
    Ok(report.measured(way, stage, vec![Some(report.p50), Some(report.p99)]))
}

/// One connection per request: requests per second, and the proxies' CPU seconds per 1,000 requests.
pub(super) fn each(stage: &Stage, way: Way, time: Duration, at_a_time: u32) -> Result<Measured> {
    let before = stage.proxies.cpu()?;
    let report = run(stage, way, time, at_a_time, Connections::ForEachRequest)?;
    let after = stage.proxies.cpu()?;
    let cpu = per_thousand(before, after, report.requests);
    let mut measured = report.measured(way, stage, vec![Some(report.rate), cpu]);
    measured.moved.connections = report.requests;
    Ok(measured)
}

/// Requests on persistent connections.
pub(super) fn kept(stage: &Stage, way: Way, time: Duration, connections: u32) -> Result<Report> {
    run(stage, way, time, connections, Connections::Kept)
}

fn run(
    stage: &Stage,
    way: Way,
    time: Duration,
    connections: u32,
    lives: Connections,
) -> Result<Report> {
    let server = SocketAddr::new(stage.server(way), NGINX_PORT);
    let mut arguments = vec![
        "-t1".to_owned(),
        format!("-c{connections}"),
        format!("-d{}s", time.as_secs()),
        "--latency".to_owned(),
        "--timeout".to_owned(),
        "10s".to_owned(),
    ];
    if lives == Connections::ForEachRequest {
        arguments.extend(["-H".to_owned(), "Connection: close".to_owned()]);
    }
    arguments.push(format!("http://{server}/"));
    let finished = stage
        .client()
        .spawn("wrk", &arguments)?
        .finish(time + PATIENCE)?
        .ok()?;
    let mut report = Report::parse(&finished.stdout)
        .with_context(|| format!("reading wrk's report {}", finished.stdout))?;
    report.connections = connections.into();
    Ok(report)
}

/// The summary that wrk prints.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Report {
    connections: u64,
    requests: u64,
    /// Requests per second.
    pub(super) rate: f64,
    /// Microseconds.
    p50: f64,
    /// Microseconds.
    pub(super) p99: f64,
    /// Lines that report errors.
    pub(super) complaints: Vec<String>,
}

impl Report {
    fn parse(text: &str) -> Option<Self> {
        let lines = || text.lines().map(str::trim);
        let after = |start: &str| {
            let line = lines().find_map(|line| line.strip_prefix(start))?;
            Some(line.trim())
        };
        let requests = lines().find_map(|line| line.split_once(" requests in "))?.0;
        let wrong = ["Socket errors:", "Non-2xx or 3xx responses:"];
        Some(Self {
            connections: 0,
            requests: requests.parse().ok()?,
            rate: after("Requests/sec:")?.parse().ok()?,
            p50: microseconds(after("50%")?)?,
            p99: microseconds(after("99%")?)?,
            complaints: lines()
                .filter(|line| wrong.iter().any(|start| line.starts_with(start)))
                .map(str::to_owned)
                .collect(),
        })
    }

    pub(super) fn measured(&self, way: Way, stage: &Stage, values: Vec<Option<f64>>) -> Measured {
        Measured {
            values,
            moved: Moved {
                connections: self.connections,
                bytes: 0,
            },
            server: SocketAddr::new(stage.server(way), NGINX_PORT),
            complaints: self.complaints.clone(),
        }
    }
}

/// Parses a time as wrk prints it: `73.00us`, `1.31ms`, `2.00s`, `1.50m`.
fn microseconds(text: &str) -> Option<f64> {
    let units = [("us", 1.0), ("ms", 1e3), ("s", 1e6), ("m", 6e7)];
    let (number, unit) = units
        .iter()
        .find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit)))?;
    Some(number.parse::<f64>().ok()? * unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
Running 5s test @ http://10.77.2.2:8080/
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   457.51us  194.57us   8.11ms   92.95%
    Req/Sec    70.86k     3.34k   74.35k    84.31%
  Latency Distribution
     50%  433.00us
     75%  490.00us
     90%  595.00us
     99%    1.25ms
  359432 requests in 5.10s, 53.13MB read
Requests/sec:  70478.19
Transfer/sec:     10.42MB
";

    #[test]
    fn a_report_is_read() {
        let report = Report::parse(GOOD).unwrap();
        assert_eq!((report.requests, report.rate), (359_432, 70_478.19));
        assert_eq!((report.p50, report.p99), (433.0, 1250.0));
        assert!(report.complaints.is_empty());
    }

    #[test]
    fn errors_are_told() {
        let bad = format!(
            "{GOOD}  Socket errors: connect 0, read 3, write 0, timeout 0\n  Non-2xx or 3xx responses: 7\n"
        );
        let report = Report::parse(&bad).unwrap();
        assert_eq!(
            report.complaints,
            [
                "Socket errors: connect 0, read 3, write 0, timeout 0",
                "Non-2xx or 3xx responses: 7"
            ]
        );
        assert_eq!(Report::parse("unable to connect"), None);
    }

    #[test]
    fn times_have_units() {
        assert_eq!(microseconds("73.00us"), Some(73.0));
        assert_eq!(microseconds("1.50ms"), Some(1500.0));
        assert_eq!(microseconds("2.00s"), Some(2e6));
        assert_eq!(microseconds("1.00m"), Some(6e7));
        assert_eq!(microseconds("12"), None);
    }
}
