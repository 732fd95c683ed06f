//! A minimal HTTP client, for the daemon's endpoints.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::eventually::slowdown;
use crate::netns::Netns;

/// A response: the status code and the body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status code, such as 200.
    pub status: u16,
    /// Everything after the header.
    pub body: String,
}

/// Sends a GET request for `path` from inside a namespace, with HTTP/1.0 and a timeout of 5 seconds, multiplied by
/// [`slowdown`], for each step.
pub fn http_get(netns: &Netns, server: SocketAddr, path: &str) -> Result<Response> {
    netns
        .enter(|| {
            let step = STEP * slowdown();
            let mut stream = TcpStream::connect_timeout(&server, step)?;
            stream.set_read_timeout(Some(step))?;
            stream.set_write_timeout(Some(step))?;
            write!(stream, "GET {path} HTTP/1.0\r\nHost: {server}\r\n\r\n")?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            parse(&String::from_utf8_lossy(&answer))
        })?
        .with_context(|| format!("asking http://{server}{path} in {}", netns.name()))
}

fn parse(answer: &str) -> Result<Response> {
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("no HTTP answer: {answer:?}"))?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    Ok(Response {
        status: status.with_context(|| format!("no HTTP status: {head:?}"))?,
        body: body.to_owned(),
    })
}

const STEP: Duration = Duration::from_secs(5);
