//! Connections made in unusual ways.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use clap::Args;
use nix::errno::Errno;
use nix::libc;
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

use crate::given;
use crate::report::{At, Failure, Outcome, event};
use crate::wait::wait_for_file;

/// Connects, sends, shuts down its sending direction and reads to the end of the stream. Reports addresses as
/// getsockname(2) and getpeername(2) return them: the IPv4 address of an IPv6 socket is reported mapped.
#[derive(Debug, Clone, Args)]
pub(crate) struct Dial {
    /// Connect to this address and port; an IPv4-mapped address makes an IPv6 socket
    #[arg(long)]
    to: SocketAddr,
    /// First connect the same socket to this address, which must fail
    #[arg(long)]
    first: Option<SocketAddr>,
    /// Bind this source address first
    #[arg(long)]
    bind: Option<IpAddr>,
    /// Bind this source port first
    #[arg(long, default_value_t = 0)]
    source_port: u16,
    /// Bind to this interface first (SO_BINDTODEVICE)
    #[arg(long)]
    device: Option<String>,
    /// Connect with the first bytes: sendto(2) with MSG_FASTOPEN instead of connect(2) and send(2)
    #[arg(long)]
    fast_open: bool,
    /// Have connect(2) wait for the first bytes and send them in the SYN if the kernel has a cookie
    /// (TCP_FASTOPEN_CONNECT)
    #[arg(long)]
    fast_open_connect: bool,
    /// Use Multipath TCP (RFC 8684)
    #[arg(long)]
    multipath: bool,
    /// Mark the packets (SO_MARK), which needs CAP_NET_ADMIN
    #[arg(long)]
    mark: Option<u32>,
    /// Leave the choice of the source port to connect(2) (IP_BIND_ADDRESS_NO_PORT)
    #[arg(long)]
    port_at_connect: bool,
    /// Use the socket that `give-socket` gives away at this path
    #[arg(long)]
    given: Option<PathBuf>,
    /// Print `socket` once there is a socket, and connect when there is a file at this path
    #[arg(long)]
    after: Option<PathBuf>,
    /// Text to send
    #[arg(long, default_value = "hello")]
    send: String,
}

impl Dial {
    pub(crate) fn run(self) -> Outcome {
        let socket = match &self.given {
            Some(path) => given::receive(path)?,
            None => self.socket()?,
        };
        if let Some(path) = &self.after {
            event("socket", json!({}));
            wait_for_file(path);
        }
        let mut fields = json!({});
        if let Some(first) = self.first {
            fields["first"] = fail(&socket, first)?;
        }
        let bytes = self.send.as_bytes();
        let sent = if self.fast_open {
            let flags = libc::MSG_FASTOPEN | libc::MSG_NOSIGNAL;
            socket
                .send_to_with_flags(bytes, &self.to.into(), flags)
                .at("connect")?
        } else {
            socket.connect(&self.to.into()).at("connect")?;
            0
        };
        let mut stream = TcpStream::from(socket);
        stream.write_all(&bytes[sent..]).at("write")?;
        fields["local"] = json!(stream.local_addr().at("getsockname")?);
        fields["peer"] = json!(crate::server::peer(&stream).at("getpeername")?);
        crate::report::end_sending(&stream).at("shutdown")?;
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            // A multipath socket may return this instead of end of file once the connection is closed (mptcp_recvmsg,
            // Linux 6.12).
            Err(error) if self.multipath && error.raw_os_error() == Some(libc::ENOTCONN) => {}
            outcome => {
                outcome.at("read")?;
            }
        }
        fields["text"] = json!(String::from_utf8_lossy(&answer));
        Ok(fields)
    }

    fn socket(&self) -> Result<Socket, Failure> {
        let protocol = if self.multipath {
            Protocol::MPTCP
        } else {
            Protocol::TCP
        };
        let domain = Domain::for_address(self.to);
        let socket = Socket::new(domain, Type::STREAM, Some(protocol)).at("socket")?;
        if let Some(device) = &self.device {
            socket
                .bind_device(Some(device.as_bytes()))
                .at("set SO_BINDTODEVICE")?;
        }
        if let Some(mark) = self.mark {
            socket.set_mark(mark).at("set SO_MARK")?;
        }
        if self.fast_open_connect {
            set(&socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT)
                .at("set TCP_FASTOPEN_CONNECT")?;
        }
        if self.port_at_connect {
            set(&socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT)
                .at("set IP_BIND_ADDRESS_NO_PORT")?;
        }
        if self.bind.is_some() || self.source_port != 0 {
            let any: IpAddr = if self.to.is_ipv4() {
                [0; 4].into()
            } else {
                [0_u16; 8].into()
            };
            let from = SocketAddr::new(self.bind.unwrap_or(any), self.source_port);
            socket.set_reuse_address(true).at("set SO_REUSEADDR")?;
            socket.bind(&from.into()).at("bind")?;
        }
        Ok(socket)
    }
}

/// Sets a boolean option.
fn set(socket: &Socket, level: libc::c_int, name: libc::c_int) -> nix::Result<()> {
    let yes: libc::c_int = 1;
    // SAFETY: the kernel reads one c_int at the pointer, which is valid during the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const yes).cast(),
            size_of_val(&yes) as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop)
}

/// Makes a connection that must fail in connect(2) itself.
fn fail(socket: &Socket, to: SocketAddr) -> Result<Value, Failure> {
    match socket.connect(&to.into()) {
        Ok(()) => Err(Failure::new(
            "first",
            io::Error::other("it connected, which it was not to do"),
        )),
        Err(error) => Ok(json!(crate::report::errno_name(&error))),
    }
}
