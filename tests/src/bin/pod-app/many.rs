//! Many connections at the same time.

use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{io, iter, thread};

use clap::Args;
use serde_json::json;

use crate::chat::exchange;
use crate::peer::Target;
use crate::report::{At, Failure, Outcome, event};
use crate::server::STACK;
use crate::wait::wait_for_file;

/// Opens many connections to an `echo-server` and exchanges a few bytes on each. When all are open, prints
/// `open`, holds them, exchanges again on each, and closes them.
#[derive(Debug, Clone, Args)]
pub(crate) struct Many {
    #[command(flatten)]
    target: Target,
    /// Number of connections
    #[arg(long)]
    connections: u64,
    /// How many to open at the same time; all by default
    #[arg(long)]
    at_a_time: Option<u64>,
    /// Milliseconds to hold the connections open
    #[arg(long, default_value_t = 0)]
    hold: u64,
    /// Hold them open until there is a file at this path
    #[arg(long)]
    until: Option<PathBuf>,
}

impl Many {
    pub(crate) fn run(self) -> Outcome {
        let start = Instant::now();
        let next = AtomicU64::new(0);
        let openers = self
            .at_a_time
            .unwrap_or(self.connections)
            .min(self.connections);
        let opened = thread::scope(|scope| {
            let openers: Vec<_> = (0..openers)
                .map(|_| {
                    thread::Builder::new()
                        .stack_size(STACK)
                        .spawn_scoped(scope, || self.open(&next))
                        .at("starting a thread")
                })
                .collect::<Result<_, _>>()?;
            openers
                .into_iter()
                .map(|opener| {
                    let panicked = |_| Failure::new("thread", io::Error::other("it panicked"));
                    opener.join().map_err(panicked)
                })
                .collect::<Result<Vec<_>, _>>()
        })?;
        let mut streams = Vec::new();
        let mut failures = 0;
        for outcome in opened.into_iter().flatten() {
            match outcome {
                Ok(stream) => streams.push(stream),
                Err(failure) => {
                    failures += 1;
                    event("connection-failed", failure.fields());
                }
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        event(
            "open",
            json!({"connections": streams.len(), "failed": failures, "seconds": seconds}),
        );
        thread::sleep(Duration::from_millis(self.hold));
        if let Some(path) = &self.until {
            wait_for_file(path);
        }
        for (number, stream) in (0..).zip(&mut streams) {
            if let Err(failure) = exchange(stream, number) {
                failures += 1;
                event("connection-failed", failure.fields());
            }
        }
        let fields = json!({"connections": streams.len(), "failed": failures});
        match failures {
            0 => Ok(fields),
            _ => Err(Failure::new("connections", io::Error::other("some failed")).with(fields)),
        }
    }

    /// Opens one connection after the other, until enough are open together with those of other threads.
    fn open(&self, next: &AtomicU64) -> Vec<Result<TcpStream, Failure>> {
        let numbers = iter::from_fn(|| {
            let number = next.fetch_add(1, Ordering::Relaxed);
            (number < self.connections).then_some(number)
        });
        numbers
            .map(|number| {
                let mut stream = self.target.connect()?;
                exchange(&mut stream, number)?;
                Ok(stream)
            })
            .collect()
    }
}
