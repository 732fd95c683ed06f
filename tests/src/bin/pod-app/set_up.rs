//! The time it takes to set up a connection.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use crate::peer::Target;
use crate::report::{At, Failure, Outcome};

/// Repeatedly connects to an `echo-server`, exchanges one byte and closes. Reports how long that took, in microseconds.
#[derive(Debug, Clone, Args)]
pub(crate) struct SetUp {
    #[command(flatten)]
    target: Target,
    /// Duration in milliseconds
    #[arg(long)]
    time: u64,
}

impl SetUp {
    pub(crate) fn run(self) -> Outcome {
        let end = Instant::now() + Duration::from_millis(self.time);
        let mut times = Vec::new();
        while Instant::now() < end {
            times.push(self.one()?.as_secs_f64() * 1e6);
        }
        times.sort_by(f64::total_cmp);
        let at = |share: usize| times.get(times.len() * share / 100);
        Ok(json!({"connections": times.len(), "p50": at(50), "p99": at(99)}))
    }

    fn one(&self) -> Result<Duration, Failure> {
        let start = Instant::now();
        let mut stream = self.target.connect()?;
        stream.write_all(b"x").at("write")?;
        stream.read_exact(&mut [0]).at("read")?;
        drop(stream);
        Ok(start.elapsed())
    }
}
