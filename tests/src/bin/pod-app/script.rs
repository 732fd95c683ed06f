//! Connections one after another, each driven by a script: what to write when, in which pieces, and how to close.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use socket2::SockRef;

use crate::peer::Target;
use crate::report::{At, Failure, Outcome, event, merge};

/// Plays a script. A connection named N sends "N|" followed by letters that depend on their position, so that the
/// receiver can tell whether the data is complete and which connection it belongs to. Every connection is reported with
/// an event `spoke`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Script {
    #[command(flatten)]
    target: Target,
    /// Name of the first connection
    #[arg(long, default_value = "it")]
    name: String,
    /// Steps, separated by commas: `send:N` in one write, `drip:N:MICROSECONDS` byte by byte, `urgent` one byte out of
    /// band, `pause:MILLISECONDS`, `end` to shut down the sending direction, `read:N`, `rest` to read until the server
    /// shuts down its direction, `close`, `reset`, and `again:NAME` or `again:NAME:ADDRESS` to open another connection
    /// at once
    #[arg(long, value_delimiter = ',', required = true)]
    steps: Vec<Step>,
}

#[derive(Debug, Clone)]
enum Step {
    Send(usize),
    Drip(usize, Duration),
    Urgent,
    Pause(Duration),
    End,
    Read(usize),
    Rest,
    Close,
    Reset,
    Again(String, Option<SocketAddr>),
}

impl FromStr for Step {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown = || format!("no such step: {text}");
        let (step, rest) = text.split_once(':').unwrap_or((text, ""));
        let number = |text: &str| text.parse::<usize>().map_err(|_| unknown());
        let time = |text: &str| text.parse::<u64>().map_err(|_| unknown());
        Ok(match step {
            "send" => Self::Send(number(rest)?),
            "drip" => {
                let (count, pause) = rest.split_once(':').ok_or_else(unknown)?;
                Self::Drip(number(count)?, Duration::from_micros(time(pause)?))
            }
            "urgent" => Self::Urgent,
            "pause" => Self::Pause(Duration::from_millis(time(rest)?)),
            "end" => Self::End,
            "read" => Self::Read(number(rest)?),
            "rest" => Self::Rest,
            "close" => Self::Close,
            "reset" => Self::Reset,
            "again" => match rest.split_once(':') {
                Some((name, to)) => {
                    Self::Again(name.to_owned(), Some(to.parse().map_err(|_| unknown())?))
                }
                None => Self::Again(rest.to_owned(), None),
            },
            _ => return Err(unknown()),
        })
    }
}

/// One connection of the script.
struct Connection {
    name: String,
    to: SocketAddr,
    stream: Option<TcpStream>,
    local: Option<SocketAddr>,
    start: Instant,
    sent: usize,
    received: Vec<u8>,
    ended: bool,
    failure: Option<Failure>,
}

impl Script {
    pub(crate) fn run(self) -> Outcome {
        let mut target = self.target;
        let mut connection = Connection::open(&target, self.name);
        let mut count = 1;
        for step in self.steps {
            if let Step::Again(name, to) = step {
                // Delay the previous connection's event: printing takes time.
                target.to = to.unwrap_or(target.to);
                let next = Connection::open(&target, name);
                std::mem::replace(&mut connection, next).tell();
                count += 1;
            } else {
                connection.play(step);
            }
        }
        connection.tell();
        Ok(json!({"connections": count}))
    }
}

impl Connection {
    fn open(target: &Target, name: String) -> Self {
        let start = Instant::now();
        let mut connection = Self {
            name,
            to: target.to,
            stream: None,
            local: None,
            start,
            sent: 0,
            received: Vec::new(),
            ended: false,
            failure: None,
        };
        match target.socket() {
            Ok(socket) => {
                // Blocking: on the loopback interface nothing comes between connecting and a reset of the connection.
                let connected = socket.connect(&target.to.into());
                connection.local = socket.local_addr().ok().and_then(|it| it.as_socket());
                match connected.and_then(|()| socket.set_tcp_nodelay(true)) {
                    Ok(()) => connection.stream = Some(socket.into()),
                    Err(error) => connection.failure = Some(Failure::new("connect", error)),
                }
            }
            Err(failure) => connection.failure = Some(failure),
        }
        connection
    }

    fn play(&mut self, step: Step) {
        if self.failure.is_none()
            && let Err(failure) = self.try_play(step)
        {
            self.failure = Some(failure);
        }
    }

    fn try_play(&mut self, step: Step) -> Result<(), Failure> {
        if let Step::Pause(time) = step {
            thread::sleep(time);
            return Ok(());
        }
        let Some(stream) = &mut self.stream else {
            return Err(Failure::new("script", io::ErrorKind::NotConnected));
        };
        match step {
            Step::Send(count) => {
                stream
                    .write_all(&piece(&self.name, self.sent, count))
                    .at("write")?;
                self.sent += count;
            }
            Step::Drip(count, pause) => {
                for _ in 0..count {
                    stream
                        .write_all(&piece(&self.name, self.sent, 1))
                        .at("write")?;
                    self.sent += 1;
                    thread::sleep(pause);
                }
            }
            Step::Urgent => {
                SockRef::from(&*stream)
                    .send_out_of_band(&piece(&self.name, self.sent, 1))
                    .at("write")?;
                self.sent += 1;
            }
            Step::End => crate::report::end_sending(stream).at("shutdown")?,
            Step::Read(count) => {
                let before = self.received.len();
                let read = stream
                    .take(count as u64)
                    .read_to_end(&mut self.received)
                    .at("read")?;
                self.ended = read < count;
                if self.ended {
                    self.received.truncate(before + read);
                    return Err(Failure::new("read", io::ErrorKind::UnexpectedEof));
                }
            }
            Step::Rest => {
                stream.read_to_end(&mut self.received).at("read")?;
                self.ended = true;
            }
            Step::Close => self.stream = None,
            Step::Reset => {
                SockRef::from(&*stream)
                    .set_linger(Some(Duration::ZERO))
                    .at("set SO_LINGER")?;
                self.stream = None;
            }
            Step::Pause(_) | Step::Again(..) => unreachable!("these need no connection"),
        }
        Ok(())
    }

    fn tell(self) {
        let echoed = self.received == piece(&self.name, 0, self.received.len());
        let mut fields = json!({
            "name": self.name,
            "local": self.local,
            "to": self.to,
            "sent": self.sent,
            "received": self.received.len(),
            "echoed": echoed,
            "ended": self.ended,
            "milliseconds": self.start.elapsed().as_millis() as u64,
        });
        if let Some(failure) = self.failure {
            merge(&mut fields, failure.fields());
        }
        event("spoke", fields);
    }
}

/// Returns `count` bytes of what the connection of this name sends, beginning with byte `start`.
fn piece(name: &str, start: usize, count: usize) -> Vec<u8> {
    let head = name.as_bytes();
    let byte = |place: usize| match place.checked_sub(head.len()) {
        None => head[place],
        Some(0) => b'|',
        Some(_) => b'a' + ((place ^ (place >> 8)) * 31 % 26) as u8,
    };
    (start..start + count).map(byte).collect()
}
