//! Tools of an attacker: certificates of any kind, a TLS peer with control over the bytes inside TLS, and checks of the
//! daemon's reaction.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use mesh_tests::{Context, Daemon, Place, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, Connection, DigitallySignedStruct, Error, ServerConfig,
    ServerConnection, SignatureScheme,
};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

#[allow(unused_imports, reason = "each test binary uses a part")]
pub(crate) use super::authority::{Authority, Presented, self_signed, spiffe, uri};

pub(crate) const ALPN: &[u8] = b"auth-daemon/1";
pub(crate) const CONNECT: u8 = 1;
pub(crate) const CONNECTED: u8 = 2;
pub(crate) const DATA: u8 = 3;
pub(crate) const END: u8 = 4;
pub(crate) const RESET: u8 = 5;
/// Longer than any timeout of the daemon: data that has not arrived by then never arrives.
pub(crate) const PATIENCE: Duration = Duration::from_secs(25);

/// A TLS 1.3 client configuration that trusts any server.
pub(crate) fn client_config(presented: Option<&Presented>, alpn: &[&[u8]]) -> Result<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(BelievesAll));
    let mut config = match presented {
        Some(presented) => builder.with_client_cert_resolver(presented.resolver()?),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.enable_sni = false;
    Ok(config)
}

/// A TLS 1.3 server configuration that requests no client certificate.
pub(crate) fn server_config(presented: &Presented, alpn: &[&[u8]]) -> Result<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(presented.resolver()?);
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Connects to `to` from a port of the place that was not used before, so that log lines of connections can be
/// distinguished.
pub(crate) fn dial(place: &Place, to: SocketAddr) -> Result<TcpStream> {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    let port = NEXT.fetch_add(1, Ordering::Relaxed);
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let tcp = place.enter(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(any, port).into())?;
        socket.connect_timeout(&to.into(), PATIENCE)?;
        io::Result::Ok(TcpStream::from(socket))
    })?;
    let tcp = tcp.with_context(|| format!("connecting to {to} from {}", place.name()))?;
    tcp.set_read_timeout(Some(PATIENCE))?;
    tcp.set_write_timeout(Some(PATIENCE))?;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

/// Opens many connections to `to` from the place, as fast as one thread can: the daemon does not wait forever for what
/// they send.
pub(crate) fn dial_many(place: &Place, to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    let dial = || -> io::Result<Vec<TcpStream>> {
        (0..count)
            .map(|_| {
                let tcp = TcpStream::connect_timeout(&to, PATIENCE)?;
                tcp.set_read_timeout(Some(PATIENCE))?;
                Ok(tcp)
            })
            .collect()
    };
    place
        .enter(dial)?
        .with_context(|| format!("connecting to {to} from {}", place.name()))
}

/// One end of a TLS connection that controls the frames inside.
pub(crate) struct Peer {
    pub(crate) tls: Connection,
    pub(crate) tcp: TcpStream,
    received: Vec<u8>,
}

/// How a connection ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Frames that arrived before the end: type and payload.
    pub(crate) frames: Vec<(u8, Vec<u8>)>,
    /// `None` after close_notify, otherwise the error.
    pub(crate) error: Option<io::Error>,
}

impl Peer {
    /// Performs a handshake as a client. Whether the server accepts the certificate shows only later.
    pub(crate) fn client(tcp: TcpStream, config: ClientConfig) -> io::Result<Self> {
        let server = tcp.peer_addr()?.ip();
        Self::client_of(tcp, config, server)
    }

    /// Like the above, with the stored sessions for `server`.
    pub(crate) fn client_of(
        tcp: TcpStream,
        config: ClientConfig,
        server: IpAddr,
    ) -> io::Result<Self> {
        let name = ServerName::IpAddress(server.into());
        let connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
        Self::shake_hands(tcp, connection.into())
    }

    /// Performs a handshake as a server.
    pub(crate) fn server(tcp: TcpStream, config: ServerConfig) -> io::Result<Self> {
        tcp.set_read_timeout(Some(PATIENCE))?;
        tcp.set_write_timeout(Some(PATIENCE))?;
        let connection = ServerConnection::new(Arc::new(config)).map_err(io::Error::other)?;
        Self::shake_hands(tcp, connection.into())
    }

    fn shake_hands(mut tcp: TcpStream, mut tls: Connection) -> io::Result<Self> {
        while tls.is_handshaking() {
            tls.complete_io(&mut tcp)?;
        }
        let mut peer = Self {
            tls,
            tcp,
            received: Vec::new(),
        };
        peer.flush()?;
        Ok(peer)
    }

    /// Its local address.
    pub(crate) fn local(&self) -> SocketAddr {
        self.tcp.local_addr().expect("a connected socket")
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.tcp)?;
        }
        Ok(())
    }

    /// Sends bytes inside TLS.
    pub(crate) fn send(&mut self, plain: &[u8]) -> io::Result<()> {
        for piece in plain.chunks(1 << 14) {
            self.tls.writer().write_all(piece)?;
            self.flush()?;
        }
        Ok(())
    }

    /// Returns the records that would carry the bytes, so that they can be modified first.
    pub(crate) fn seal(&mut self, plain: &[u8]) -> io::Result<Vec<u8>> {
        self.tls.writer().write_all(plain)?;
        let mut records = Vec::new();
        while self.tls.wants_write() {
            self.tls.write_tls(&mut records)?;
        }
        Ok(records)
    }

    /// Sends bytes outside TLS.
    pub(crate) fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.tcp.write_all(bytes)
    }

    /// Sends close_notify.
    pub(crate) fn close_notify(&mut self) -> io::Result<()> {
        self.tls.send_close_notify();
        self.flush()
    }

    /// Requests a key update from the other side, and updates its own key.
    pub(crate) fn update_keys(&mut self) -> Result<()> {
        match &mut self.tls {
            Connection::Client(tls) => tls.refresh_traffic_keys()?,
            Connection::Server(tls) => tls.refresh_traffic_keys()?,
        }
        self.flush()?;
        Ok(())
    }

    /// Opens an application connection as an honest client would, and waits for CONNECTED. Returns the application
    /// client's address, with a port of its own, because the tunnel's is taken.
    pub(crate) fn open(&mut self) -> Result<SocketAddr> {
        let local = self.local();
        let client = SocketAddr::new(local.ip(), local.port() + 20_000);
        self.send(&connect_frame(self.tcp.peer_addr()?, client))?;
        match self.frame()? {
            Some((CONNECTED, payload)) if payload.is_empty() => Ok(client),
            other => Err(io::Error::other(format!("{other:?} instead of CONNECTED")).into()),
        }
    }

    /// The next frame; `None` after close_notify.
    pub(crate) fn frame(&mut self) -> io::Result<Option<(u8, Vec<u8>)>> {
        loop {
            if let Some(header) = self.received.first_chunk::<5>() {
                let [kind, length @ ..] = *header;
                let end = 5 + u32::from_be_bytes(length) as usize;
                if self.received.len() >= end {
                    let payload = self.received[5..end].to_vec();
                    self.received.drain(..end);
                    return Ok(Some((kind, payload)));
                }
            }
            if !self.more()? {
                return Ok(None);
            }
        }
    }

    fn more(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 1 << 14];
        loop {
            match self.tls.reader().read(&mut buffer) {
                Ok(0) => return Ok(false),
                Ok(count) => {
                    self.received.extend_from_slice(&buffer[..count]);
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if self.tls.read_tls(&mut self.tcp)? == 0 {
                // Distinguishes a close_notify that came before from a truncation.
                self.tls.process_new_packets().map_err(io::Error::other)?;
                match self.tls.reader().read(&mut buffer) {
                    Ok(0) => return Ok(false),
                    _ => return Err(io::ErrorKind::UnexpectedEof.into()),
                }
            }
            let processed = self.tls.process_new_packets().map_err(io::Error::other);
            self.flush()
                .or_else(|error| processed.as_ref().map_or(Ok(()), |_| Err(error)))?;
            processed?;
        }
    }

    /// Reads DATA frames until this many bytes have arrived.
    pub(crate) fn read_data(&mut self, count: usize) -> Result<Vec<u8>> {
        let mut data = Vec::new();
        while data.len() < count {
            match self.frame()? {
                Some((DATA, payload)) => data.extend_from_slice(&payload),
                other => {
                    let got = data.len();
                    return Err(io::Error::other(format!("{other:?} after {got} bytes")).into());
                }
            }
        }
        Ok(data)
    }

    /// Reads to the end of the stream.
    pub(crate) fn end(mut self) -> Ended {
        let mut frames = Vec::new();
        loop {
            match self.frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => {
                    return Ended {
                        frames,
                        error: None,
                    };
                }
                Err(error) => {
                    return Ended {
                        frames,
                        error: Some(error),
                    };
                }
            }
        }
    }

    /// Shuts down the sending direction, outside TLS.
    pub(crate) fn finish_tcp(&self) -> io::Result<()> {
        self.tcp.shutdown(Shutdown::Write)
    }
}

/// Encodes a frame with a correct length.
pub(crate) fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    frame_of_length(kind, payload.len() as u32, payload)
}

/// Encodes a frame with a wrong length.
pub(crate) fn frame_of_length(kind: u8, length: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![kind];
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// Encodes an honest CONNECT.
pub(crate) fn connect_frame(dialled: SocketAddr, client: SocketAddr) -> Vec<u8> {
    frame(CONNECT, &connect_payload(1, dialled, client))
}

pub(crate) fn connect_payload(version: u8, dialled: SocketAddr, client: SocketAddr) -> Vec<u8> {
    let mut payload = vec![version];
    for address in [dialled, client] {
        match address.ip() {
            IpAddr::V4(ip) => {
                payload.push(4);
                payload.extend_from_slice(&ip.octets());
            }
            IpAddr::V6(ip) => {
                payload.push(6);
                payload.extend_from_slice(&ip.octets());
            }
        }
        payload.extend_from_slice(&address.port().to_be_bytes());
    }
    payload
}

/// Time limit from a connection's end to its line in the log.
const LOGGED: Duration = Duration::from_secs(30);

/// The access log's lines for the client's address, once there is at least one.
pub(crate) fn lines_of(daemon: &Daemon, client: SocketAddr) -> Result<Vec<Value>> {
    let client = client.to_string();
    daemon
        .wait_for_access(&format!("a line of {client}"), LOGGED, |line| {
            line["client"] == client.as_str()
        })
        .with_context(|| format!("the whole log: {}", daemon.log_text()))?;
    let lines = daemon.access_log().into_iter();
    Ok(lines
        .filter(|line| line["client"] == client.as_str())
        .collect())
}

/// Failed expectations, collected so that one run shows all of them.
#[derive(Default)]
pub(crate) struct Faults(Vec<String>);

impl Faults {
    /// Records a failure unless the condition holds.
    pub(crate) fn check(&mut self, holds: bool, fault: impl FnOnce() -> String) {
        if !holds {
            self.0.push(fault());
        }
    }

    /// Expects that the client's connection left one log line, with this result, and this text in the reason.
    pub(crate) fn expect_line(
        &mut self,
        what: &str,
        daemon: &Daemon,
        client: SocketAddr,
        (result, reason): (&str, &str),
    ) {
        let lines = match lines_of(daemon, client) {
            Ok(lines) => lines,
            Err(error) => return self.0.push(format!("{what}: {}", error.root_cause())),
        };
        let [line] = lines.as_slice() else {
            return self.0.push(format!("{what}: not one line but {lines:#?}"));
        };
        let logged = line["reason"].as_str().unwrap_or_default();
        println!("{what}: {} {logged}", line["result"]);
        self.check(line["result"] == result, || {
            format!("{what}: not {result}: {line}")
        });
        self.check(
            logged.to_lowercase().contains(&reason.to_lowercase()),
            || format!("{what}: the reason is to say {reason:?}: {line}"),
        );
        self.check(!logged.chars().any(char::is_control), || {
            format!("{what}: control characters in the log: {line}")
        });
    }

    /// # Panics
    /// If there are any.
    pub(crate) fn finish(self) {
        let faults = self.0.join("\n  ");
        assert!(faults.is_empty(), "\n  {faults}");
    }
}

/// Accepts every server certificate and every signature.
#[derive(Debug)]
struct BelievesAll;

impl ServerCertVerifier for BelievesAll {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}
