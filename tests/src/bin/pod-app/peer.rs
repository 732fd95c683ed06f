//! Behaviours that both sides of a connection can have.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};

use crate::report::{At, Failure, Outcome, event};
use crate::server::{Listen, STACK, ends};

/// The destination and source of a client's connections.
#[derive(Debug, Clone, Args)]
pub(crate) struct Target {
    /// Connect to this address and port
    #[arg(long)]
    pub(crate) to: SocketAddr,
    #[command(flatten)]
    from: From,
}

/// The source of a client's connections.
#[derive(Debug, Clone, Args)]
pub(crate) struct From {
    /// Bind this source port first
    #[arg(long)]
    source_port: Option<u16>,
    /// Bind this source address first. For a server: listen on this address only
    #[arg(long)]
    bind: Option<IpAddr>,
    /// Timeout for connecting, in milliseconds
    #[arg(long, default_value_t = 30_000)]
    timeout: u64,
    /// Use Multipath TCP (RFC 8684). A server does not accept it
    #[arg(long)]
    multipath: bool,
}

impl Target {
    /// Connects; the error is that of connect(2).
    pub(crate) fn connect(&self) -> Result<TcpStream, Failure> {
        self.from.connect(self.to)
    }

    /// Returns the unconnected socket, bound as the options say.
    pub(crate) fn socket(&self) -> Result<Socket, Failure> {
        self.from.socket(self.to)
    }

    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_millis(self.from.timeout)
    }
}

impl From {
    fn connect(&self, to: SocketAddr) -> Result<TcpStream, Failure> {
        let socket = self.socket(to)?;
        socket
            .connect_timeout(&to.into(), Duration::from_millis(self.timeout))
            .at("connect")?;
        let stream = TcpStream::from(socket);
        stream.set_nodelay(true).at("set TCP_NODELAY")?;
        Ok(stream)
    }

    fn socket(&self, to: SocketAddr) -> Result<Socket, Failure> {
        let protocol = if self.multipath {
            Protocol::MPTCP
        } else {
            Protocol::TCP
        };
        let socket =
            Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol)).at("socket")?;
        if self.bind.is_some() || self.source_port.is_some() {
            let any: IpAddr = if to.is_ipv4() {
                [0; 4].into()
            } else {
                [0_u16; 8].into()
            };
            let from = SocketAddr::new(self.bind.unwrap_or(any), self.source_port.unwrap_or(0));
            socket.set_reuse_address(true).at("set SO_REUSEADDR")?;
            socket.bind(&from.into()).at("bind")?;
        }
        Ok(socket)
    }
}

/// One side of a connection or, as a client, of several connections.
#[derive(Debug, Clone, Args)]
pub(crate) struct Peer {
    /// As a client: connect to this address and port
    #[arg(long, conflicts_with = "port", required_unless_present = "port")]
    to: Option<SocketAddr>,
    /// As a server: listen on this port
    #[arg(long)]
    port: Option<u16>,
    #[command(flatten)]
    from: From,
    /// As a client: number of connections at the same time
    #[arg(long, default_value_t = 1)]
    streams: u64,
    /// As a server: report only connections that failed
    #[arg(long)]
    quiet: bool,
}

impl Peer {
    pub(crate) fn is_client(&self) -> bool {
        self.to.is_some()
    }

    /// Calls `behave` forevery connection. Its second argument is the connection's number, 0 for a server's.
    ///
    /// A client reports the sums of the fields `sent` and `received`.
    pub(crate) fn run<F>(&self, behave: F) -> Outcome
    where
        F: Fn(&mut TcpStream, u64) -> Outcome + Send + Sync + 'static,
    {
        let Some(to) = self.to else {
            let port = self
                .port
                .ok_or_else(|| Failure::new("arguments", io::Error::other("no port")))?;
            return Listen::new(port, self.from.bind, self.quiet)
                .serve(move |stream| behave(stream, 0));
        };
        let start = Instant::now();
        let behave = Arc::new(behave);
        let streams: Vec<_> = (0..self.streams)
            .map(|number| {
                let (from, behave) = (self.from.clone(), Arc::clone(&behave));
                let work = move || {
                    let mut stream = from.connect(to)?;
                    event("connected", ends(&stream)?);
                    behave(&mut stream, number)
                };
                thread::Builder::new()
                    .stack_size(STACK)
                    .spawn(work)
                    .at("starting a thread")
            })
            .collect::<Result<_, _>>()?;
        let (mut sent, mut received) = (0, 0);
        for stream in streams {
            let fields = stream
                .join()
                .map_err(|_| Failure::new("thread", io::Error::other("it panicked")))??;
            sent += fields["sent"].as_u64().unwrap_or(0);
            received += fields["received"].as_u64().unwrap_or(0);
            event("stream", fields);
        }
        let seconds = start.elapsed().as_secs_f64();
        Ok(json!({"streams": self.streams, "sent": sent, "received": received, "seconds": seconds}))
    }
}
