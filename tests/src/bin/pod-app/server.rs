//! Accepting connections, with one thread per connection.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use clap::Args;
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

use crate::report::{At, Failure, Outcome, event, merge};

/// The address and port on which a server listens.
#[derive(Debug, Clone, Args)]
pub(crate) struct Listen {
    /// Port to listen on
    #[arg(long)]
    port: u16,
    /// Address to listen on: by default all, IPv4 and IPv6
    #[arg(long, default_value_t = IpAddr::V6(Ipv6Addr::UNSPECIFIED))]
    bind: IpAddr,
    /// Report only connections that failed
    #[arg(long)]
    quiet: bool,
    /// Accept Multipath TCP as well (RFC 8684)
    #[arg(long)]
    multipath: bool,
}

impl Listen {
    pub(crate) fn new(port: u16, bind: Option<IpAddr>, quiet: bool) -> Self {
        Self {
            port,
            bind: bind.unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
            quiet,
            multipath: false,
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        (self.bind, self.port).into()
    }

    /// Listens and passes each connection to `serve`, which returns what to report. Returns only on an error.
    pub(crate) fn serve<F>(&self, serve: F) -> Outcome
    where
        F: Fn(&mut TcpStream) -> Outcome + Send + Sync + 'static,
    {
        let listener = self.start()?;
        let serve = Arc::new(serve);
        let quiet = self.quiet;
        loop {
            let (stream, peer) = listener.accept().at("accept")?;
            let serve = Arc::clone(&serve);
            thread::Builder::new()
                .stack_size(STACK)
                .spawn(move || connection(stream, peer, quiet, &*serve))
                .at("starting a thread")?;
        }
    }

    /// Listens, and prints `listening`.
    pub(crate) fn start(&self) -> Result<TcpListener, Failure> {
        let listener = self.listener().at("listen")?;
        event(
            "listening",
            json!({"address": self.address(), "port": self.port}),
        );
        Ok(listener)
    }

    fn listener(&self) -> io::Result<TcpListener> {
        let address = self.address();
        let protocol = if self.multipath {
            Protocol::MPTCP
        } else {
            Protocol::TCP
        };
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(protocol))?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.bind(&address.into())?;
        socket.listen(4096)?;
        Ok(socket.into())
    }
}

fn connection(
    mut stream: TcpStream,
    peer: SocketAddr,
    quiet: bool,
    serve: &dyn Fn(&mut TcpStream) -> Outcome,
) {
    let mut fields =
        json!({"peer": canonical(peer), "local": stream.local_addr().ok().map(canonical)});
    if !quiet {
        event("accepted", fields.clone());
    }
    match serve(&mut stream) {
        Ok(_) if quiet => return,
        Ok(more) => merge(&mut fields, more),
        Err(failure) => merge(&mut fields, failure.fields()),
    }
    event("closed", fields);
}

/// Converts an IPv4-mapped IPv6 address, as an IPv6 socket reports it, to the IPv4 address.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    (address.ip().to_canonical(), address.port()).into()
}

/// Returns the addresses of both ends of a connection as fields of an event.
pub(crate) fn ends(stream: &TcpStream) -> Result<Value, Failure> {
    Ok(json!({
        "local": canonical(stream.local_addr().at("getsockname")?),
        "peer": canonical(peer(stream).at("getpeername")?),
    }))
}

/// Returns the peer's address. A connection that was reset meanwhile has no peer any more; the error is then the reset.
pub(crate) fn peer(stream: &TcpStream) -> io::Result<SocketAddr> {
    stream
        .peer_addr()
        .map_err(|error| match stream.take_error() {
            Ok(Some(why)) if error.kind() == io::ErrorKind::NotConnected => why,
            _ => error,
        })
}

/// Bytes; small because there may be thousands of threads.
pub(crate) const STACK: usize = 256 * 1024;
