//! The proxies' memory after all loads.

use std::net::SocketAddr;

use anyhow::Result;

use super::load::Measured;
use crate::counters::Moved;
use crate::stage::Stage;
use crate::system::{Role, Way};
use crate::topology::NGINX_PORT;
use crate::usage::memory;

/// Current and peak resident memory in MiB, of the client's proxy and of the server's.
pub(super) fn run(stage: &Stage, way: Way) -> Result<Measured> {
    let mut values = Vec::new();
    for role in [Role::Client, Role::Server] {
        let memory = stage.proxies.process(role).map(memory).transpose()?;
        let mib = |kib: u64| kib as f64 / 1024.0;
        values.push(memory.map(|memory| mib(memory.resident)));
        values.push(memory.map(|memory| mib(memory.peak)));
    }
    Ok(Measured {
        values,
        moved: Moved::default(),
        server: SocketAddr::new(stage.server(way), NGINX_PORT),
        complaints: Vec::new(),
    })
}
