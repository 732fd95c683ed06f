//! Many connections at the same time.

use std::io;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use crate::chat::exchange;
use crate::peer::Target;
use crate::report::{At, Failure, Outcome, event};
use crate::server::STACK;
use crate::wait::wait_for_file;

/// Opens many connections to an `echo-server` at once and exchanges a few bytes on each. When all are open, prints
/// `open`, holds them, exchanges again on each, and closes them.
#[derive(Debug, Clone, Args)]
pub(crate) struct Many {
    #[command(flatten)]
    target: Target,
    /// Number of connections
    #[arg(long)]
    connections: u64,
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
        let openers: Vec<_> = (0..self.connections)
            .map(|number| {
                let target = self.target.clone();
                let open = move || {
                    let mut stream = target.connect()?;
                    exchange(&mut stream, number)?;
                    Ok::<_, Failure>(stream)
                };
                thread::Builder::new()
                    .stack_size(STACK)
                    .spawn(open)
                    .at("starting a thread")
            })
            .collect::<Result<_, _>>()?;
        let mut streams = Vec::new();
        let mut failures = 0;
        for opener in openers {
            match opener
                .join()
                .map_err(|_| Failure::new("thread", io::Error::other("it panicked")))?
            {
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
}
