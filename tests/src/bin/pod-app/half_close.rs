//! A connection with one direction shut down long before the other.

use std::io::{Read, Write};
use std::net::TcpStream;

use clap::Args;
use serde_json::json;

use crate::peer::Peer;
use crate::report::{At, Outcome};

/// Sends a message, shuts down its sending direction, then reads to the end of the stream. With --after-end it reads to
/// the end first and then sends; give that option to one side only.
#[derive(Debug, Clone, Args)]
pub(crate) struct HalfClose {
    #[command(flatten)]
    peer: Peer,
    /// Send only after the other side has shut down its sending direction
    #[arg(long)]
    after_end: bool,
    /// Text to send
    #[arg(long, default_value = "half")]
    message: String,
}

impl HalfClose {
    pub(crate) fn run(self) -> Outcome {
        let Self {
            peer,
            after_end,
            message,
        } = self;
        peer.run(move |stream, _| {
            if after_end {
                let received = read(stream)?;
                send(stream, &message)?;
                Ok(json!({"sent": message.len(), "received": received.len(), "text": received}))
            } else {
                send(stream, &message)?;
                let received = read(stream)?;
                Ok(json!({"sent": message.len(), "received": received.len(), "text": received}))
            }
        })
    }
}

fn send(stream: &mut TcpStream, message: &str) -> Result<(), crate::report::Failure> {
    stream.write_all(message.as_bytes()).at("write")?;
    crate::report::end_sending(stream).at("shutdown")
}

fn read(stream: &mut TcpStream) -> Result<String, crate::report::Failure> {
    let mut received = Vec::new();
    stream.read_to_end(&mut received).at("read")?;
    Ok(String::from_utf8_lossy(&received).into_owned())
}
