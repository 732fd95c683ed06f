//! UDP, which the mesh does not intercept.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use clap::Args;
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};

use crate::report::{At, Outcome, event};
use crate::server::canonical;

/// Sends back every datagram.
#[derive(Debug, Clone, Args)]
pub(crate) struct UdpEcho {
    /// Port to receive on
    #[arg(long)]
    port: u16,
    /// Address to receive on: by default all, IPv4 and IPv6
    #[arg(long, default_value_t = IpAddr::V6(Ipv6Addr::UNSPECIFIED))]
    bind: IpAddr,
}

impl UdpEcho {
    pub(crate) fn run(self) -> Outcome {
        let socket = UdpSocket::bind((self.bind, self.port)).at("bind")?;
        event(
            "listening",
            json!({"address": SocketAddr::from((self.bind, self.port)), "port": self.port}),
        );
        let mut buffer = vec![0; 65_536];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).at("receive")?;
            event(
                "datagram",
                json!({"peer": canonical(from), "bytes": length}),
            );
            socket.send_to(&buffer[..length], from).at("send")?;
        }
    }
}

/// Sends datagrams one at a time and waits for the reply to each.
#[derive(Debug, Clone, Args)]
pub(crate) struct UdpSend {
    /// Send to this address and port
    #[arg(long)]
    to: SocketAddr,
    /// Text to send
    #[arg(long, default_value = "datagram")]
    message: String,
    /// Number of datagrams
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Milliseconds to wait for a reply
    #[arg(long, default_value_t = 10_000)]
    timeout: u64,
    /// Name the destination with each datagram instead of connecting the socket
    #[arg(long)]
    unconnected: bool,
    /// Use UDP-Lite (RFC 3828)
    #[arg(long)]
    lite: bool,
}

/// The protocol's number (IANA, "Protocol Numbers").
const UDP_LITE: i32 = 136;

impl UdpSend {
    pub(crate) fn run(self) -> Outcome {
        let any: IpAddr = if self.to.is_ipv4() {
            [0; 4].into()
        } else {
            [0_u16; 8].into()
        };
        let protocol = self.lite.then(|| Protocol::from(UDP_LITE));
        let domain = Domain::for_address(self.to);
        let socket = Socket::new(domain, Type::DGRAM, protocol).at("socket")?;
        let from = SocketAddr::from((any, 0));
        socket.bind(&from.into()).at("bind")?;
        let socket = UdpSocket::from(socket);
        if !self.unconnected {
            socket.connect(self.to).at("connect")?;
        }
        socket
            .set_read_timeout(Some(Duration::from_millis(self.timeout)))
            .at("set SO_RCVTIMEO")?;
        let mut buffer = vec![0; 65_536];
        for _ in 0..self.count {
            let message = self.message.as_bytes();
            match self.unconnected {
                true => socket.send_to(message, self.to).at("send")?,
                false => socket.send(message).at("send")?,
            };
            let length = socket.recv(&mut buffer).at("receive")?;
            event(
                "answer",
                json!({"bytes": length, "text": String::from_utf8_lossy(&buffer[..length])}),
            );
        }
        Ok(json!({
            "count": self.count,
            "local": socket.local_addr().at("getsockname")?,
            "peer": self.to,
        }))
    }
}
