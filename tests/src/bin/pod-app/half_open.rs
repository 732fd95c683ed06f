//! Connects that nobody waits for.

use std::io;
use std::thread;
use std::time::Duration;

use clap::Args;
use nix::libc;
use serde_json::json;

use crate::peer::Target;
use crate::report::{At, Outcome, event};

/// Begins many connections without waiting for any of them, and holds them until it is killed. Prints `begun` with the number
/// of connects that have succeeded or are under way, and of those that failed with EPERM and with another error
#[derive(Debug, Clone, Args)]
pub(crate) struct HalfOpen {
    #[command(flatten)]
    target: Target,
    /// Number of connections
    #[arg(long)]
    connections: u64,
}

impl HalfOpen {
    pub(crate) fn run(self) -> Outcome {
        let (mut held, mut refused, mut failed) = (Vec::new(), 0, 0);
        for _ in 0..self.connections {
            let socket = self.target.socket()?;
            socket.set_nonblocking(true).at("set O_NONBLOCK")?;
            match socket.connect(&self.target.to.into()) {
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => refused += 1,
                Err(error) if is_under_way(&error) => held.push(socket),
                Err(_) => failed += 1,
                Ok(()) => held.push(socket),
            }
        }
        event(
            "begun",
            json!({"held": held.len(), "refused": refused, "failed": failed}),
        );
        loop {
            thread::sleep(Duration::from_secs(3600));
        }
    }
}

fn is_under_way(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINPROGRESS)
}
