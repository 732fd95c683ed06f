//! A protocol in which the server speaks first.

use std::io::{Read, Write};
use std::net::TcpStream;

use clap::Args;
use serde_json::json;

use crate::report::{At, Outcome};
use crate::server::Listen;

/// Sends a line before it reads anything, reads until the client shuts down its sending direction, and reports what it
/// received.
#[derive(Debug, Clone, Args)]
pub(crate) struct Greeter {
    #[command(flatten)]
    listen: Listen,
    /// The line to send
    #[arg(long, default_value = "220-ready")]
    greeting: String,
}

impl Greeter {
    pub(crate) fn run(self) -> Outcome {
        let greeting = format!("{}\n", self.greeting);
        self.listen.serve(move |stream| greet(stream, &greeting))
    }
}

fn greet(stream: &mut TcpStream, greeting: &str) -> Outcome {
    stream.write_all(greeting.as_bytes()).at("write")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).at("read")?;
    Ok(json!({"received": answer.len(), "text": String::from_utf8_lossy(&answer)}))
}
