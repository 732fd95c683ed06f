//! Loads that no existing program can generate: connections that carry almost no data.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::load::{Measured, PATIENCE, per_thousand};
use crate::counters::Moved;
use crate::stage::Stage;
use crate::system::{Role, Way};
use crate::topology::ECHO_PORT;
use crate::usage;

/// One connection after the other: median microseconds from connect(2) to the echo of the first byte, and the proxies' CPU
/// seconds per 1,000 connections, which depend less on what else the machine does.
pub(super) fn set_up(stage: &Stage, way: Way, time: Duration) -> Result<Measured> {
    let server = SocketAddr::new(stage.server(way), ECHO_PORT);
    let before = stage.proxies.cpu()?;
    let done = stage
        .client()
        .app(&format!("set-up --to {server} --time {}", time.as_millis()))?
        .success(time + PATIENCE)?;
    let connections = done["connections"].as_u64().unwrap_or(0);
    ensure!(connections > 0, "no connection came about: {done}");
    let cpu = per_thousand(before, stage.proxies.cpu()?, connections);
    Ok(Measured {
        values: vec![Some(done["p50"].as_f64().context("no median")?), cpu],
        moved: Moved {
            connections,
            // One byte in each direction.
            bytes: 2 * connections,
        },
        server,
        complaints: Vec::new(),
    })
}

/// Idle connections: KiB of resident memory per connection, in the client's proxy and in the server's.
///
/// The proxies are fresh; otherwise memory that earlier loads freed would be reused and hide the cost. One-time
/// allocations happen for the first connections, which are not counted.
pub(super) fn idle(stage: &Stage, way: Way) -> Result<Measured> {
    let server = SocketAddr::new(stage.server(way), ECHO_PORT);
    let client = stage.client();
    let hold = |connections: u64| {
        let hold = PATIENCE.as_millis();
        let mut app = client.app(&format!(
            "many --to {server} --connections {connections} --hold {hold}"
        ))?;
        let open = app.event("open", PATIENCE)?;
        ensure!(open["failed"] == 0, "not all came about: {open}");
        anyhow::Ok(app)
    };
    let first = hold(FIRST)?;
    let before = resident(stage)?;
    let idle = hold(IDLE)?;
    let after = resident(stage)?;
    drop((first, idle));
    let each = before.into_iter().zip(after).map(|(before, after)| {
        let (before, after) = (before?, after?);
        Some((after as f64 - before as f64) / IDLE as f64)
    });
    Ok(Measured {
        values: each.collect(),
        moved: Moved {
            connections: FIRST + IDLE,
            bytes: 0,
        },
        server,
        complaints: Vec::new(),
    })
}

/// Resident memory in KiB of the client's and the server's proxy, once both are stable.
fn resident(stage: &Stage) -> Result<[Option<u64>; 2]> {
    let look = || -> Result<[Option<u64>; 2]> {
        let mut both = [None; 2];
        for (memory, role) in both.iter_mut().zip([Role::Client, Role::Server]) {
            if let Some(process) = stage.proxies.process(role) {
                *memory = Some(usage::memory(process)?.resident);
            }
        }
        Ok(both)
    };
    let (mut last, mut since) = (look()?, Instant::now());
    while since.elapsed() < STEADY {
        thread::sleep(LOOK);
        let now = look()?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    Ok(last)
}

const FIRST: u64 = 100;
const IDLE: u64 = 1000;
/// How long memory must be unchanged to count as stable.
const STEADY: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(50);
