//! A connection that follows a list of steps.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use socket2::SockRef;

use crate::peer::Peer;
use crate::report::{At, Failure, Outcome, event};
use crate::wait::{POLL, wait_for_file};

/// Performs the steps in order and closes the connection. Both sides may have steps.
#[derive(Debug, Clone, Args)]
pub(crate) struct Steps {
    #[command(flatten)]
    peer: Peer,
    /// Steps separated by commas: `send:N` and `read:N` bytes, `peek:N` (wait until so many bytes can be read), `end` (shut
    /// down the sending direction), `drain` (read to the end of the stream; a reset counts as its end), `wait:MS`,
    /// `file:PATH` (wait until there is such a file), `abort` (close with RST). Without any, the connection is only closed
    #[arg(long, value_delimiter = ',')]
    steps: Vec<Step>,
}

#[derive(Debug, Clone)]
enum Step {
    Send(usize),
    Read(usize),
    Peek(usize),
    End,
    Drain,
    Wait(u64),
    File(PathBuf),
    Abort,
}

impl FromStr for Step {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (word, rest) = text.split_once(':').unwrap_or((text, ""));
        if word == "file" {
            return Ok(Self::File(rest.into()));
        }
        let number = rest.parse::<usize>().ok();
        match (word, number) {
            ("send", Some(bytes)) => Ok(Self::Send(bytes)),
            ("read", Some(bytes)) => Ok(Self::Read(bytes)),
            ("peek", Some(bytes)) => Ok(Self::Peek(bytes)),
            ("wait", Some(milliseconds)) => Ok(Self::Wait(milliseconds as u64)),
            ("end", None) => Ok(Self::End),
            ("drain", None) => Ok(Self::Drain),
            ("abort", None) => Ok(Self::Abort),
            _ => Err(format!("{text:?} is no step")),
        }
    }
}

impl Steps {
    pub(crate) fn run(self) -> Outcome {
        let steps = self.steps;
        self.peer.run(move |stream, _| {
            let (mut sent, mut received) = (0, 0);
            for step in &steps {
                take(step, stream, &mut sent, &mut received)
                    .map_err(|failure| failure.with(json!({"sent": sent, "received": received})))?;
            }
            Ok(json!({"sent": sent, "received": received}))
        })
    }
}

fn take(
    step: &Step,
    stream: &mut TcpStream,
    sent: &mut usize,
    received: &mut usize,
) -> Result<(), Failure> {
    match *step {
        Step::Send(bytes) => {
            let chunk = vec![b's'; CHUNK.min(bytes)];
            let mut left = bytes;
            while left > 0 {
                let part = left.min(CHUNK);
                stream.write_all(&chunk[..part]).at("write")?;
                *sent += part;
                left -= part;
            }
        }
        Step::Read(bytes) => {
            let mut chunk = vec![0; CHUNK.min(bytes)];
            let mut left = bytes;
            while left > 0 {
                let part = left.min(CHUNK);
                stream.read_exact(&mut chunk[..part]).at("read")?;
                *received += part;
                left -= part;
            }
        }
        Step::Peek(bytes) => {
            let mut chunk = vec![0; bytes];
            loop {
                match stream.peek(&mut chunk).at("peek")? {
                    0 => return Err(Failure::new("peek", io::ErrorKind::UnexpectedEof)),
                    count if count < bytes => thread::sleep(POLL),
                    _ => break,
                }
            }
        }
        Step::Drain => {
            let mut chunk = vec![0; CHUNK];
            loop {
                match stream.read(&mut chunk) {
                    Ok(0) => break,
                    Ok(read) => *received += read,
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
                    Err(error) => return Err(error).at("read"),
                }
            }
        }
        Step::End => crate::report::end_sending(stream).at("shutdown")?,
        Step::Wait(milliseconds) => thread::sleep(Duration::from_millis(milliseconds)),
        Step::File(ref path) => wait_for_file(path),
        Step::Abort => SockRef::from(&*stream)
            .set_linger(Some(Duration::ZERO))
            .at("set SO_LINGER")?,
    }
    event("step", json!({"step": format!("{step:?}")}));
    Ok(())
}

/// Bytes.
const CHUNK: usize = 64 * 1024;
