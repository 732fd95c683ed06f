//! Short connections at a steady pace, to measure what a client sees.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use crate::chat::exchange;
use crate::peer::Target;
use crate::report::{Failure, Outcome, event};

/// Opens one connection after another to an `echo-server`, exchanges a few bytes on each and closes it. Reports how long
/// connecting and the exchange took
#[derive(Debug, Clone, Args)]
pub(crate) struct Paced {
    #[command(flatten)]
    target: Target,
    /// Seconds to continue
    #[arg(long)]
    seconds: u64,
    /// Milliseconds from the start of one connection to the start of the next, unless it takes longer
    #[arg(long, default_value_t = 10)]
    interval: u64,
}

impl Paced {
    pub(crate) fn run(self) -> Outcome {
        let interval = Duration::from_millis(self.interval);
        let (start, duration) = (Instant::now(), Duration::from_secs(self.seconds));
        let (mut times, mut failed) = (Vec::new(), 0);
        while start.elapsed() < duration {
            let begin = Instant::now();
            match self.one(times.len() as u64) {
                Ok(()) => times.push(begin.elapsed().as_secs_f64() * 1e3),
                Err(failure) => {
                    failed += 1;
                    if failed <= MOST_REPORTED {
                        event("connection-failed", failure.fields());
                    }
                }
            }
            thread::sleep(interval.saturating_sub(begin.elapsed()));
        }
        let seconds = start.elapsed().as_secs_f64();
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times.get((times.len() as f64 * share) as usize).copied();
        let fields = json!({
            "connections": times.len(),
            "failed": failed,
            "perSecond": times.len() as f64 / seconds,
            "p50": at(0.5),
            "p99": at(0.99),
            "worst": times.last(),
        });
        match failed {
            0 => Ok(fields),
            _ => Err(Failure::new("connections", io::Error::other("some failed")).with(fields)),
        }
    }

    fn one(&self, number: u64) -> Result<(), Failure> {
        let mut stream = self.target.connect()?;
        exchange(&mut stream, number)
    }
}

const MOST_REPORTED: u64 = 20;
