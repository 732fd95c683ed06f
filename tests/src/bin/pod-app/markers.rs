//! Connections that carry markers, so that a reader of one knows which connection it belongs to.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use clap::Args;
use nix::time::{ClockId, clock_gettime};
use serde_json::json;

use crate::report::{At, Failure, Outcome, errno_name, event};
use crate::server::{Listen, STACK, ends};

/// Reads markers, and answers each with the same marker in the other direction. Reports each with an event `read`, and
/// anything else that arrives with an event `foreign`, which ends the connection.
#[derive(Debug, Clone, Args)]
pub(crate) struct MarkerServer {
    /// Port to listen on, on all addresses; may be repeated
    #[arg(long, required = true)]
    port: Vec<u16>,
}

impl MarkerServer {
    pub(crate) fn run(self) -> Outcome {
        let listeners: Vec<_> = self
            .port
            .into_iter()
            .map(|port| thread::spawn(move || Listen::new(port, None, true).serve(answer)))
            .collect();
        // Each returns only on an error.
        for listener in listeners {
            listener.join().map_err(|_| panicked())??;
        }
        Ok(json!({}))
    }
}

fn answer(stream: &mut TcpStream) -> Outcome {
    let seen = ends(stream)?;
    stream.set_nodelay(true).at("set TCP_NODELAY")?;
    loop {
        let mut bytes = [0; MARKER];
        let (count, end) = fill(stream, &mut bytes);
        let at = now();
        let Some((id, round)) = parse(&bytes, b'>') else {
            if count > 0 {
                let bytes = bytes[..count].escape_ascii().to_string();
                event("foreign", json!({"bytes": bytes, "ends": seen, "at": at}));
            }
            end.at("read")?;
            return Ok(json!({}));
        };
        event(
            "read",
            json!({"id": id, "round": round, "peer": seen["peer"], "local": seen["local"], "at": at}),
        );
        stream.write_all(&marker(id, round, b'<')).at("write")?;
    }
}

/// Reads until the buffer is full, or the connection ends. Returns how much was read, and the error that ended it.
fn fill(stream: &mut TcpStream, buffer: &mut [u8]) -> (usize, io::Result<()>) {
    let mut count = 0;
    while count < buffer.len() {
        match stream.read(&mut buffer[count..]) {
            Ok(0) => break,
            Ok(read) => count += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return (count, Err(error)),
        }
    }
    (count, Ok(()))
}

/// Makes the connections of a plan, each on a thread of its own, and exchanges markers on them. Reports each with an
/// event `call` when it has ended, with the times of its rounds in nanoseconds of CLOCK_MONOTONIC.
#[derive(Debug, Clone, Args)]
pub(crate) struct MarkerCalls {
    /// File with one connection a line: its number, where to, milliseconds until it begins, its number of rounds, and
    /// the milliseconds between two of them
    #[arg(long)]
    plan: PathBuf,
    /// Limit for connecting and for each answer, in milliseconds
    #[arg(long, default_value_t = 5000)]
    timeout: u64,
}

impl MarkerCalls {
    pub(crate) fn run(self) -> Outcome {
        let plan = fs::read_to_string(&self.plan).at("read the plan")?;
        let calls: Vec<Call> = plan
            .lines()
            .map(Call::from_str)
            .collect::<Result<_, _>>()
            .map_err(|line| Failure::new("parse the plan", io::Error::other(line)))?;
        event("started", json!({"calls": calls.len()}));
        let timeout = Duration::from_millis(self.timeout);
        let callers: Vec<_> = calls
            .into_iter()
            .map(|call| {
                thread::Builder::new()
                    .stack_size(STACK)
                    .spawn(move || call.make(timeout))
                    .at("starting a thread")
            })
            .collect::<Result<_, _>>()?;
        for caller in callers {
            caller.join().map_err(|_| panicked())?;
        }
        Ok(json!({}))
    }
}

struct Call {
    id: u32,
    to: SocketAddr,
    delay: Duration,
    rounds: u8,
    interval: Duration,
}

impl FromStr for Call {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let mut words = line.split(' ');
        let mut call = || {
            let id = words.next()?.parse().ok()?;
            let to = words.next()?.parse().ok()?;
            let delay = Duration::from_millis(words.next()?.parse().ok()?);
            let rounds = words.next()?.parse().ok()?;
            let interval = Duration::from_millis(words.next()?.parse().ok()?);
            Some(Self {
                id,
                to,
                delay,
                rounds,
                interval,
            })
        };
        call().ok_or_else(|| format!("not a connection: {line:?}"))
    }
}

impl Call {
    fn make(self, timeout: Duration) {
        thread::sleep(self.delay);
        let start = now();
        // When each round's marker was sent, and when it was answered.
        let (mut sent, mut answered) = (Vec::new(), Vec::new());
        let failure = self.talk(timeout, &mut sent, &mut answered).err();
        let failure = failure.map(|(stage, error)| json!([stage, errno_name(&error)]));
        event(
            "call",
            json!({"id": self.id, "start": start, "end": now(), "sent": sent, "answered": answered, "failure": failure}),
        );
    }

    fn talk(
        &self,
        timeout: Duration,
        sent: &mut Vec<u64>,
        answered: &mut Vec<u64>,
    ) -> Result<(), (&'static str, io::Error)> {
        let mut stream =
            TcpStream::connect_timeout(&self.to, timeout).map_err(|error| ("connect", error))?;
        let set = stream
            .set_nodelay(true)
            .and_then(|()| stream.set_read_timeout(Some(timeout)));
        set.map_err(|error| ("set options", error))?;
        for round in 0..self.rounds {
            if round > 0 {
                thread::sleep(self.interval);
            }
            sent.push(now());
            stream
                .write_all(&marker(self.id, round, b'>'))
                .map_err(|error| ("write", error))?;
            let mut bytes = [0; MARKER];
            stream
                .read_exact(&mut bytes)
                .map_err(|error| ("read", error))?;
            if bytes != marker(self.id, round, b'<') {
                let other = bytes.escape_ascii().to_string();
                return Err(("another answer", io::Error::other(other)));
            }
            answered.push(now());
        }
        Ok(())
    }
}

/// `Mark`, the direction, nine digits of the connection's number and two of the round.
fn marker(id: u32, round: u8, direction: u8) -> [u8; MARKER] {
    let text = format!("Mark{}{id:09}{round:02}", char::from(direction));
    text.as_bytes()
        .try_into()
        .expect("a number below 10^9 and a round below 100 make 16 bytes")
}

fn parse(bytes: &[u8; MARKER], direction: u8) -> Option<(u32, u8)> {
    let digits = bytes.strip_prefix(b"Mark")?.strip_prefix(&[direction])?;
    let digits = str::from_utf8(digits).ok()?;
    Some((digits[..9].parse().ok()?, digits[9..].parse().ok()?))
}

/// Nanoseconds of CLOCK_MONOTONIC, which is the same for all processes of the machine.
fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the clock exists");
    Duration::from(time).as_nanos() as u64
}

fn panicked() -> Failure {
    Failure::new("thread", io::Error::other("it panicked"))
}

/// In bytes.
const MARKER: usize = 16;
