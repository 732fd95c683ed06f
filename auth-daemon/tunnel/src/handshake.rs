//! The TLS handshake, which turns a TCP connection into a [`Channel`]. rustls receives one record at a time, so that
//! every byte after the handshake is left for the channel.

use std::{io, sync::Arc};

use rustls::{
    ClientConfig, CommonState, Error, ExtractedSecrets, NamedGroup, ServerConfig,
    client::{ClientConnectionData, UnbufferedClientConnection},
    pki_types::ServerName,
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{
        ConnectionState, EncodeError, EncodeTlsData, UnbufferedConnectionCommon, UnbufferedStatus,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    ALPN,
    buffer::Buffer,
    channel::{Channel, Tickets},
    record::{HEADER_BYTES, MAX_RECORD_BYTES, Opener, Sealer},
    secrets::{FirstSecrets, TrafficSecret},
    tls,
    tls::svid::Svid,
};
use auth_mesh::TrustDomain;

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection broke.
    #[error("the connection broke during the handshake: {0}")]
    Io(#[from] io::Error),
    /// The TLS handshake failed, or the peer's certificate was rejected.
    #[error("{}", tls::explain(.0))]
    Tls(#[from] Error),
    /// The peer sent something other than a TLS record.
    #[error("the peer does not speak TLS: it answers in plaintext; is there a daemon on its node?")]
    NotTls,
    /// The peer speaks TLS, but not the tunnel's protocol.
    #[error("the peer does not speak {}", String::from_utf8_lossy(ALPN))]
    Protocol,
    /// The peer speaks TLS, but not HBONE.
    #[error("the peer does not speak HBONE")]
    NotHbone,
}

/// Opens a tunnel on `tcp` as a client. Drop the future to give up.
pub async fn connect(
    tcp: TcpStream,
    config: Arc<ClientConfig>,
    trust_domain: &TrustDomain,
) -> Result<Channel, HandshakeError> {
    let name = ServerName::IpAddress(tcp.peer_addr()?.ip().into());
    let connection = UnbufferedClientConnection::new(config, name)?;
    drive(tcp, Client(connection), trust_domain).await
}

/// Opens a tunnel on `tcp` as a server. Drop the future to give up.
pub async fn accept(
    tcp: TcpStream,
    config: Arc<ServerConfig>,
    trust_domain: &TrustDomain,
) -> Result<Channel, HandshakeError> {
    let connection = UnbufferedServerConnection::new(config)?;
    drive(tcp, Server(connection), trust_domain).await
}

/// The operations that differ between client and server.
trait Side {
    type Data;
    fn common(&mut self) -> &mut UnbufferedConnectionCommon<Self::Data>;
    fn process<'c, 'i>(&'c mut self, records: &'i mut [u8])
    -> UnbufferedStatus<'c, 'i, Self::Data>;
    /// Drops the state of the handshake, and continues with the secrets of both sides.
    fn finish(
        self,
        client: TrafficSecret,
        server: TrafficSecret,
    ) -> Result<(Sealer, Opener, Tickets), Error>;
}

struct Client(UnbufferedClientConnection);
struct Server(UnbufferedServerConnection);

impl Side for Client {
    type Data = ClientConnectionData;

    fn common(&mut self) -> &mut UnbufferedConnectionCommon<Self::Data> {
        &mut self.0
    }

    fn process<'c, 'i>(
        &'c mut self,
        records: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.0.process_tls_records(records)
    }

    fn finish(
        self,
        client: TrafficSecret,
        server: TrafficSecret,
    ) -> Result<(Sealer, Opener, Tickets), Error> {
        // Tickets that were received in the handshake are records, too.
        let (ExtractedSecrets { tx, rx }, connection) =
            self.0.dangerous_into_kernel_connection()?;
        let (sealer, opener) = (Sealer::new(tx.0, client), Opener::new(rx.0, server));
        Ok((sealer, opener, Tickets::Store(Box::new(connection))))
    }
}

impl Side for Server {
    type Data = ServerConnectionData;

    fn common(&mut self) -> &mut UnbufferedConnectionCommon<Self::Data> {
        &mut self.0
    }

    fn process<'c, 'i>(
        &'c mut self,
        records: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.0.process_tls_records(records)
    }

    fn finish(
        self,
        client: TrafficSecret,
        server: TrafficSecret,
    ) -> Result<(Sealer, Opener, Tickets), Error> {
        // Tickets that were sent are records, too.
        let (ExtractedSecrets { tx, rx }, _) = self.0.dangerous_into_kernel_connection()?;
        let (sealer, opener) = (Sealer::new(tx.0, server), Opener::new(rx.0, client));
        Ok((sealer, opener, Tickets::Refuse))
    }
}

/// Action after one step of the rustls state machine.
enum Step {
    Again,
    Write,
    Read,
    Fail(Error),
}

async fn drive<S: Side>(
    mut tcp: TcpStream,
    mut side: S,
    trust_domain: &TrustDomain,
) -> Result<Channel, HandshakeError> {
    let mut incoming = Buffer::default();
    // Number of bytes of `incoming` that are shown to rustls. Always ends at a record boundary.
    let mut visible = 0;
    let mut outgoing = Vec::new();
    let mut secrets = FirstSecrets::default();
    while side.common().is_handshaking() || side.common().wants_write() || !outgoing.is_empty() {
        let records = &mut incoming.filled_mut()[..visible];
        let status = secrets.take_from(|| side.process(records));
        let step = match status.state {
            Ok(ConnectionState::EncodeTlsData(data)) => {
                encode(data, &mut outgoing)?;
                Step::Again
            }
            Ok(ConnectionState::TransmitTlsData(data)) => {
                data.done();
                Step::Write
            }
            // A server may write before the client has authenticated, but has nothing to send yet.
            Ok(ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_)) => Step::Read,
            Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            // Early data is not offered, and rustls never sees application data.
            Ok(_) => return Err(HandshakeError::Protocol),
            Err(error) => Step::Fail(error),
        };
        let discard = status.discard;
        incoming.consume(discard);
        visible -= discard;
        match step {
            Step::Again => {}
            Step::Write => {
                tcp.write_all(&outgoing).await?;
                outgoing.clear();
            }
            Step::Fail(error) => {
                let rest = &mut incoming.filled_mut()[..visible];
                send_alert(&mut tcp, &mut side, rest).await;
                return Err(error.into());
            }
            Step::Read if !side.common().is_handshaking() => break,
            Step::Read => visible = next_record(&mut tcp, &mut incoming, visible).await?,
        }
    }
    let connection = side.common();
    if connection.alpn_protocol() != Some(ALPN) {
        return Err(HandshakeError::Protocol);
    }
    let peer = peer(connection, trust_domain)?;
    let key_exchange = key_exchange(connection);
    let suite = connection.negotiated_cipher_suite();
    let secrets = suite.and_then(|suite| secrets.of_suite(suite.tls13()?));
    let unknown = || Error::General("no traffic secrets of a known cipher suite".into());
    let (client, server) = secrets.ok_or_else(unknown)?;
    let (sealer, opener, tickets) = side.finish(client, server)?;
    let peer = (peer, key_exchange);
    Ok(Channel::new(tcp, sealer, opener, tickets, incoming, peer))
}

/// The key exchange of the handshake.
pub(crate) fn key_exchange(session: &CommonState) -> Option<NamedGroup> {
    session
        .negotiated_key_exchange_group()
        .map(|group| group.name())
}

/// The certificate that the peer has presented, in this session or in the one that it resumes. The configuration's verifier
/// has checked it against the bundle of its trust domain; `trust_domain` is the mesh's own.
pub(crate) fn peer(session: &CommonState, trust_domain: &TrustDomain) -> Result<Arc<Svid>, Error> {
    let leaf = session
        .peer_certificates()
        .and_then(|chain| chain.first())
        .ok_or(Error::NoCertificatesPresented)?;
    let peer = Svid::parse_of_any(leaf, trust_domain)
        .map_err(|error| Error::General(error.to_string()))?;
    // A resumed session presents no certificate, so rustls verifies none.
    tls::check_not_expired(peer.not_after)?;
    Ok(Arc::new(peer))
}

fn encode<D>(mut data: EncodeTlsData<'_, D>, outgoing: &mut Vec<u8>) -> Result<(), Error> {
    let start = outgoing.len();
    match data.encode(&mut []) {
        Err(EncodeError::InsufficientSize(room)) => outgoing.resize(start + room.required_size, 0),
        Ok(_) | Err(_) => return Ok(()),
    }
    let written = data
        .encode(&mut outgoing[start..])
        .map_err(|error| Error::General(error.to_string()))?;
    outgoing.truncate(start + written);
    Ok(())
}

/// Sends the alert that tells the peer why its handshake failed, if the socket accepts it without waiting.
///
/// `rest` is the remainder of the bytes that failed, in which rustls may hold positions of messages. It must not process
/// them again, because that may fail again, with a second alert.
async fn send_alert<S: Side>(tcp: &mut TcpStream, side: &mut S, rest: &mut [u8]) {
    let mut outgoing = Vec::new();
    while side.common().wants_write()
        && let Ok(ConnectionState::EncodeTlsData(data)) = side.process(rest).state
    {
        if encode(data, &mut outgoing).is_err() {
            break;
        }
    }
    if tcp.try_write(&outgoing).is_ok() {
        // A RST right after the alert would discard it if the peer has not read it yet.
        let _ = socket2::SockRef::from(&*tcp).set_linger(None);
        let _ = tcp.shutdown().await;
    }
}

/// Whether `bytes`, which may be incomplete, can be the header of a TLS record (RFC 8446 §5.1).
fn begins_record(bytes: &[u8]) -> bool {
    bytes.first().is_none_or(|kind| (20..=24).contains(kind))
        && bytes.get(1).is_none_or(|major| *major == 3)
}

/// Reads until `incoming` holds another complete record after the `visible` bytes. Returns where that record ends.
async fn next_record(
    tcp: &mut TcpStream,
    incoming: &mut Buffer,
    visible: usize,
) -> Result<usize, HandshakeError> {
    loop {
        let behind = &incoming.filled()[visible..];
        if !begins_record(behind) {
            return Err(HandshakeError::NotTls);
        }
        if let Some(header) = behind.first_chunk::<HEADER_BYTES>() {
            let length = HEADER_BYTES + usize::from(u16::from_be_bytes([header[3], header[4]]));
            if length > MAX_RECORD_BYTES + 256 {
                return Err(Error::InvalidMessage(rustls::InvalidMessage::MessageTooLarge).into());
            }
            if behind.len() >= length {
                return Ok(visible + length);
            }
        }
        if incoming.is_empty() {
            // Hold no buffer while waiting for a slow peer.
            incoming.release();
            tcp.readable().await?;
        }
        let spare = incoming.spare();
        if spare.is_empty() {
            return Err(
                Error::InvalidMessage(rustls::InvalidMessage::HandshakePayloadTooLarge).into(),
            );
        }
        let read = tcp.read(spare).await?;
        if read == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        incoming.extend(read);
    }
}
