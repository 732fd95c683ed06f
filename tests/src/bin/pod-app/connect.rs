//! One connection, reported in detail.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::time::Instant;

use clap::Args;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};
use socket2::SockRef;

use crate::peer::Target;
use crate::report::{At, Failure, Outcome, event, merge};
use crate::server::ends;

/// Connects and reports the results of getsockname(2) and getpeername(2). Then reads a line, sends, and reads to the
/// end of the stream, in this order, as the options say.
#[derive(Debug, Clone, Args)]
pub(crate) struct Connect {
    #[command(flatten)]
    target: Target,
    /// Connect without blocking: connect(2) must return EINPROGRESS, then poll(2) waits for the outcome
    #[arg(long)]
    non_blocking: bool,
    /// Wait for a line from the server before sending anything
    #[arg(long)]
    read_line: bool,
    /// Send this text
    #[arg(long)]
    send: Option<String>,
    /// Shut down the sending direction after that
    #[arg(long)]
    shutdown: bool,
    /// Read until the server shuts down its sending direction
    #[arg(long)]
    read: bool,
}

impl Connect {
    pub(crate) fn run(self) -> Outcome {
        let start = Instant::now();
        let mut stream = if self.non_blocking {
            self.connect_without_blocking()?
        } else {
            self.target.connect()?
        };
        let mut fields = ends(&stream)?;
        let seen = fields.clone();
        merge(
            &mut fields,
            json!({"milliseconds": start.elapsed().as_secs_f64() * 1e3}),
        );
        event("connected", fields);
        let more = self
            .talk(&mut stream)
            .map_err(|failure| failure.with(seen.clone()))?;
        let mut fields = seen;
        merge(&mut fields, more);
        Ok(fields)
    }

    fn talk(&self, stream: &mut TcpStream) -> Outcome {
        let mut fields = json!({});
        if self.read_line {
            merge(&mut fields, json!({"line": read_line(stream)?}));
        }
        if let Some(text) = &self.send {
            stream.write_all(text.as_bytes()).at("write")?;
        }
        if self.shutdown {
            crate::report::end_sending(stream).at("shutdown")?;
        }
        if self.read {
            merge(&mut fields, read_to_end(stream)?);
        }
        Ok(fields)
    }

    fn connect_without_blocking(&self) -> Result<TcpStream, Failure> {
        let socket = self.target.socket()?;
        socket.set_nonblocking(true).at("set O_NONBLOCK")?;
        match socket.connect(&self.target.to.into()) {
            Err(error) if error.raw_os_error() == Some(Errno::EINPROGRESS as i32) => {}
            Err(error) => return Err(Failure::new("connect", error)),
            // Linux does so only for what is not TCP; a scenario that cares reads the event.
            Ok(()) => event("connected-at-once", json!({})),
        }
        let mut waits = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
        let timeout = PollTimeout::try_from(self.target.timeout()).unwrap_or(PollTimeout::MAX);
        if poll(&mut waits, timeout).at("poll")? == 0 {
            return Err(Failure::new("connect", Errno::ETIMEDOUT));
        }
        if let Some(error) = socket.take_error().at("get SO_ERROR")? {
            return Err(Failure::new("connect", error));
        }
        socket.set_nonblocking(false).at("clear O_NONBLOCK")?;
        Ok(socket.into())
    }
}

fn read_line(stream: &mut TcpStream) -> Result<String, Failure> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte).at("read")?;
        if byte[0] == b'\n' {
            return Ok(String::from_utf8_lossy(&line).into_owned());
        }
        line.push(byte[0]);
    }
}

/// Reads to the end of the stream. A failure includes what was read before the error.
fn read_to_end(stream: &mut TcpStream) -> Result<Value, Failure> {
    let mut received = Vec::new();
    let result = stream.read_to_end(&mut received).at("read");
    let text = String::from_utf8_lossy(&received[..received.len().min(TEXT)]).into_owned();
    let fields = json!({"received": received.len(), "text": text});
    match result {
        Ok(_) => Ok(fields),
        Err(failure) => {
            // No more data will come, and what the socket still holds for the peer is of no use.
            let _ = SockRef::from(&*stream).shutdown(Shutdown::Both);
            Err(failure.with(fields))
        }
    }
}

/// Maximum bytes of the received data that an event shows.
const TEXT: usize = 4096;
