//! Requests beside a stream: what one transfer at full speed costs the other connections of its pods.

use std::thread;
use std::time::Duration;

use anyhow::Result;

use super::load::Measured;
use super::{iperf3, wrk};
use crate::stage::Stage;
use crate::system::Way;

/// Requests on kept connections, first alone and then beside a stream: requests per second beside it, their share of the rate
/// alone in percent, their 99th percentile in microseconds, and the stream's Gbit/s.
pub(super) fn run(stage: &Stage, way: Way, time: Duration, connections: u32) -> Result<Measured> {
    let alone = wrk::kept(stage, way, time, connections)?;
    let stream_time = time + 2 * AROUND;
    let stream = iperf3::start(stage, way, stream_time, 1)?;
    // Its window has grown by then.
    thread::sleep(AROUND);
    let beside = wrk::kept(stage, way, time, connections)?;
    let stream = iperf3::received(stream, stream_time)?;
    let values = vec![
        Some(beside.rate),
        Some(100.0 * beside.rate / alone.rate),
        Some(beside.p99),
        Some(stream.gigabits_per_second()),
    ];
    let mut measured = beside.measured(way, stage, values);
    measured.moved.connections += u64::from(connections);
    measured.complaints.extend(alone.complaints);
    Ok(measured)
}

/// How much earlier than the requests the stream begins, and how much later it ends.
const AROUND: Duration = Duration::from_secs(1);
