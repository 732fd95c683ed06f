//! Bulk transfer in one direction. The receiver verifies the bytes and acknowledges their count.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use crate::pattern::{self, Header};
use crate::peer::Peer;
use crate::report::{At, Failure, Outcome, event};

/// Sends bytes to a `sink` or a `stall`, shuts down its sending direction and waits for the count.
#[derive(Debug, Clone, Args)]
pub(crate) struct Source {
    #[command(flatten)]
    peer: Peer,
    /// Bytes to send on each connection
    #[arg(long)]
    bytes: u64,
}

impl Source {
    pub(crate) fn run(self) -> Outcome {
        let length = self.bytes;
        self.peer.run(move |stream, number| {
            let header = Header {
                seed: number,
                length,
            };
            header.write(&*stream).at("write")?;
            pattern::send(&*stream, header.seed, length).at("write")?;
            crate::report::end_sending(stream).at("shutdown")?;
            let mut count = [0; 8];
            stream.read_exact(&mut count).at("read")?;
            if u64::from_be_bytes(count) != length {
                return Err(Failure::new(
                    "acknowledgment",
                    io::Error::other("another count than was sent"),
                ));
            }
            pattern::expect_end(&*stream).at("read")?;
            Ok(json!({"sent": length}))
        })
    }
}

/// Receives from a `source`, verifies every byte and answers with the count.
#[derive(Debug, Clone, Args)]
pub(crate) struct Sink {
    #[command(flatten)]
    peer: Peer,
}

impl Sink {
    pub(crate) fn run(self) -> Outcome {
        self.peer.run(|stream, _| receive(stream, None))
    }
}

/// A `sink` that stops reading for a while
#[derive(Debug, Clone, Args)]
pub(crate) struct Stall {
    #[command(flatten)]
    peer: Peer,
    /// Stop reading after this many bytes, rounded up to a chunk of 256 KiB
    #[arg(long, default_value_t = 1)]
    after: u64,
    /// Seconds to stop reading
    #[arg(long)]
    seconds: f64,
}

impl Stall {
    pub(crate) fn run(self) -> Outcome {
        let stall = (self.after, Duration::from_secs_f64(self.seconds));
        self.peer.run(move |stream, _| receive(stream, Some(stall)))
    }
}

fn receive(stream: &mut TcpStream, mut stall: Option<(u64, Duration)>) -> Outcome {
    let header = Header::read(&*stream).at("read")?;
    pattern::receive(&*stream, header.seed, header.length, |received| {
        if let Some((_, time)) = stall.take_if(|(after, _)| received >= *after) {
            event("stalled", json!({"received": received}));
            thread::sleep(time);
            event("resumed", json!({"received": received}));
        }
    })
    .at("read")?;
    pattern::expect_end(&*stream).at("read")?;
    stream.write_all(&header.length.to_be_bytes()).at("write")?;
    Ok(json!({"received": header.length}))
}
