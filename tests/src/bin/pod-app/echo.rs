//! A server that echoes what it receives.

use std::io::{Read, Write};
use std::net::TcpStream;

use clap::Args;
use serde_json::json;

use crate::report::{At, Outcome};
use crate::server::Listen;

/// Sends back every byte, and shuts down its sending direction after the client has shut down its own.
#[derive(Debug, Clone, Args)]
pub(crate) struct EchoServer {
    #[command(flatten)]
    listen: Listen,
}

impl EchoServer {
    pub(crate) fn run(self) -> Outcome {
        self.listen.serve(echo)
    }
}

fn echo(stream: &mut TcpStream) -> Outcome {
    stream.set_nodelay(true).at("set TCP_NODELAY")?;
    let mut buffer = [0; 64 * 1024];
    let mut bytes = 0;
    loop {
        let read = stream.read(&mut buffer).at("read")?;
        if read == 0 {
            break;
        }
        stream.write_all(&buffer[..read]).at("write")?;
        bytes += read;
    }
    crate::report::end_sending(stream).at("shutdown")?;
    Ok(json!({"bytes": bytes}))
}
