//! A long exchange with an `echo-server`.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use crate::peer::Target;
use crate::report::{At, Failure, Outcome, event};
use crate::server::ends;

/// Exchanges a few bytes repeatedly on one connection, and prints an event for each exchange
#[derive(Debug, Clone, Args)]
pub(crate) struct Chat {
    #[command(flatten)]
    target: Target,
    /// Number of rounds; without limit by default
    #[arg(long, default_value_t = u64::MAX)]
    rounds: u64,
    /// Milliseconds between rounds
    #[arg(long, default_value_t = 50)]
    interval: u64,
}

impl Chat {
    pub(crate) fn run(self) -> Outcome {
        let mut stream = self.target.connect()?;
        event("connected", ends(&stream)?);
        for round in 1..=self.rounds {
            let start = Instant::now();
            exchange(&mut stream, round)
                .map_err(|failure| failure.with(json!({"rounds": round - 1})))?;
            event(
                "round",
                json!({"round": round, "milliseconds": start.elapsed().as_secs_f64() * 1e3}),
            );
            if round < self.rounds {
                thread::sleep(Duration::from_millis(self.interval));
            }
        }
        Ok(json!({"rounds": self.rounds}))
    }
}

/// Sends a number and waits until the server echoes it.
pub(crate) fn exchange(stream: &mut TcpStream, number: u64) -> Result<(), Failure> {
    stream.write_all(&number.to_be_bytes()).at("write")?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer).at("read")?;
    if answer != number.to_be_bytes() {
        return Err(Failure::new(
            "compare",
            io::Error::new(io::ErrorKind::InvalidData, "another answer came"),
        ));
    }
    Ok(())
}
