//! Many short connections, a limited number of them at the same time.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use clap::Args;
use serde_json::json;

use crate::chat::exchange;
use crate::pattern::expect_end;
use crate::peer::Target;
use crate::report::{At, Failure, Outcome, event};

/// Opens connections to an `echo-server`, exchanges a few bytes on each and closes it.
#[derive(Debug, Clone, Args)]
pub(crate) struct Churn {
    #[command(flatten)]
    target: Target,
    /// Number of connections in total
    #[arg(long)]
    connections: u64,
    /// Number of connections at the same time
    #[arg(long, default_value_t = 16)]
    concurrency: u64,
}

impl Churn {
    pub(crate) fn run(self) -> Outcome {
        let start = Instant::now();
        let (next, failed) = (AtomicU64::new(0), AtomicU64::new(0));
        thread::scope(|scope| {
            for _ in 0..self.concurrency {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= self.connections {
                            return;
                        }
                        if let Err(failure) = self.one(number)
                            && failed.fetch_add(1, Ordering::Relaxed) < MOST_REPORTED
                        {
                            event(
                                "connection-failed",
                                failure.with(json!({"number": number})).fields(),
                            );
                        }
                    }
                });
            }
        });
        let failed = failed.into_inner();
        let seconds = start.elapsed().as_secs_f64();
        let fields = json!({"connections": self.connections, "failed": failed, "seconds": seconds});
        match failed {
            0 => Ok(fields),
            _ => Err(Failure::new("connections", io::Error::other("some failed")).with(fields)),
        }
    }

    fn one(&self, number: u64) -> Result<(), Failure> {
        let mut stream = self.target.connect()?;
        exchange(&mut stream, number)?;
        crate::report::end_sending(&stream).at("shutdown")?;
        expect_end(&stream).at("read")
    }
}

const MOST_REPORTED: u64 = 20;
