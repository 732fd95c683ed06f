//! Connections as fast as possible, by a malicious client.

use std::io::{self, Read};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use crate::peer::Target;
use crate::report::{At, Outcome, event};

/// Connects and closes as fast as it can, on several threads, until it is killed. Prints `flooding` with its counts every
/// second
#[derive(Debug, Clone, Args)]
pub(crate) struct Flood {
    #[command(flatten)]
    target: Target,
    /// Number of threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

impl Flood {
    pub(crate) fn run(self) -> Outcome {
        let (connected, failed) = (AtomicU64::new(0), AtomicU64::new(0));
        thread::scope(|scope| {
            for _ in 0..self.threads {
                scope.spawn(|| {
                    loop {
                        let counter = match self.target.connect() {
                            Ok(_) => &connected,
                            Err(_) => &failed,
                        };
                        counter.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            loop {
                thread::sleep(Duration::from_secs(1));
                let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
                event(
                    "flooding",
                    json!({"connected": count(&connected), "failed": count(&failed)}),
                );
            }
        })
    }
}

/// Opens connections as fast as it can and holds them without sending a byte, until it is killed. Prints `opened`, and
/// then `holding` every second, with the number that the other side has not closed or reset
#[derive(Debug, Clone, Args)]
pub(crate) struct Hoard {
    #[command(flatten)]
    target: Target,
    /// Number of connections to open
    #[arg(long)]
    connections: u64,
}

impl Hoard {
    pub(crate) fn run(self) -> Outcome {
        let start = Instant::now();
        let (mut held, mut failed) = (Vec::new(), 0);
        for _ in 0..self.connections {
            match self.target.connect() {
                Ok(stream) => {
                    stream.set_nonblocking(true).at("set O_NONBLOCK")?;
                    held.push(stream);
                }
                Err(_) => failed += 1,
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        event(
            "opened",
            json!({"connections": held.len(), "failed": failed, "seconds": seconds}),
        );
        loop {
            held.retain(is_open);
            event("holding", json!({"connections": held.len()}));
            thread::sleep(Duration::from_secs(1));
        }
    }
}

fn is_open(mut stream: &TcpStream) -> bool {
    matches!(stream.read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}
