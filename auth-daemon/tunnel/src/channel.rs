//! One tunnel connection after its handshake: frames over TLS records over TCP.
//!
//! The connection splits into two halves that share only the key schedule, so that [`super::relay`] can move both
//! directions concurrently.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    ops::Range,
    os::fd::AsRawFd,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
    thread::{self, ThreadId},
};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};
use rustls::{Error, NamedGroup, client::ClientConnectionData, kernel::KernelConnection};
use tokio::{
    io::{AsyncRead, AsyncWriteExt, ReadBuf},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
};

use super::{
    buffer::{Buffer, SMALL_BYTES},
    frame::{self, Connect, Decoder, Event, InvalidFrame, Reset},
    record::{
        self, ContentType, HEADER_BYTES, InvalidRecord, MAX_RECORD_BYTES, Opener, Sealer,
        TRAILER_BYTES,
    },
    tls,
    tls::svid::Svid,
};

/// Maximum number of records in a row that carry no frame, such as empty ones and key updates. As in BoringSSL.
const MAX_FUTILE: u32 = 32;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
const CLOSE_NOTIFY: [u8; 2] = [1, 0];

/// A tunnel connection, ready for the next app connection.
#[derive(Debug)]
pub struct Channel {
    tcp: TcpStream,
    /// The thread whose runtime watches `tcp`.
    home: ThreadId,
    sender: Sender,
    receiver: Receiver,
    update_requested: UpdateRequested,
    peer: Arc<Svid>,
    key_exchange: Option<NamedGroup>,
}

/// Why a tunnel connection ended, other than by a clean close between two app connections.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The connection broke.
    #[error("the tunnel broke: {0}")]
    Io(#[from] io::Error),
    /// The tunnel was closed in the middle of an app connection, or by TCP alone, which anyone on the path can forge.
    #[error("the peer closed the tunnel in the middle of a connection")]
    Closed,
    /// A record is malformed or forged.
    #[error("the peer broke TLS: {0}")]
    Record(#[from] InvalidRecord),
    /// A frame is malformed.
    #[error("the peer broke the framing: {0}")]
    Frame(#[from] InvalidFrame),
    /// A valid frame arrived in a state that does not allow it.
    #[error("the peer sent {0} out of turn")]
    OutOfTurn(&'static str),
    /// A TLS alert other than close_notify. This is how a server refuses a client's certificate (RFC 8446 §4.4.2.4).
    #[error("{}", tls::explain_alert((*.0).into()))]
    Alert(u8),
    /// A post-handshake message that is not supported.
    #[error("the peer sent post-handshake message {0}")]
    Handshake(u8),
    /// A session ticket that cannot be parsed (RFC 8446 §4.6.1).
    #[error("the peer sent a malformed session ticket: {0}")]
    Ticket(Error),
    /// Too many records in a row that are empty or only change keys. They cost the receiver more than the sender.
    #[error("the peer sent more than {MAX_FUTILE} records in a row without a frame")]
    Futile,
}

/// Whether the peer has requested an update of our sending key too (RFC 8446 §4.6.3). The receiving half signals this
/// to the sending half.
pub(super) type UpdateRequested = AtomicBool;

/// What becomes of session tickets that the peer sends (RFC 8446 §4.6.1).
pub(super) enum Tickets {
    /// A client stores them until the server's first frame. Daemons send them before it.
    Store(Box<KernelConnection<ClientConnectionData>>),
    /// From then on, it ignores them, and keeps no state for them.
    Ignore,
    /// A server gets none.
    Refuse,
}

impl std::fmt::Debug for Tickets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tickets(..)")
    }
}

impl Channel {
    pub(super) fn new(
        tcp: TcpStream,
        sealer: Sealer,
        opener: Opener,
        tickets: Tickets,
        incoming: Buffer,
        (peer, key_exchange): (Arc<Svid>, Option<NamedGroup>),
    ) -> Self {
        let slot_bytes = slot_bytes(socket2::SockRef::from(&tcp).tcp_mss().ok());
        Self {
            tcp,
            home: thread::current().id(),
            sender: Sender {
                sealer,
                outgoing: Buffer::default(),
                slot_bytes,
            },
            receiver: Receiver {
                opener,
                tickets,
                incoming,
                plain: 0..0,
                record_end: 0,
                decoder: Decoder::new(),
                futile: 0,
            },
            update_requested: UpdateRequested::new(false),
            peer,
            key_exchange,
        }
    }

    /// Identity and certificate of the peer.
    pub fn peer(&self) -> &Arc<Svid> {
        &self.peer
    }

    /// The key exchange of the handshake.
    pub fn key_exchange(&self) -> Option<NamedGroup> {
        self.key_exchange
    }

    /// Local address of the connection.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// The underlying socket, for setting options.
    pub fn socket(&self) -> socket2::SockRef<'_> {
        socket2::SockRef::from(&self.tcp)
    }

    /// Whether the current thread's runtime watches the socket.
    pub fn is_at_home(&self) -> bool {
        self.home == thread::current().id()
    }

    /// Moves the tunnel to the current thread's runtime.
    pub fn bring_home(self) -> io::Result<Self> {
        if self.is_at_home() {
            return Ok(self);
        }
        Ok(Self {
            tcp: TcpStream::from_std(self.tcp.into_std()?)?,
            home: thread::current().id(),
            ..self
        })
    }

    /// The two halves, which can be used concurrently.
    pub(super) fn split(
        &mut self,
    ) -> (
        (WriteHalf<'_>, &mut Sender),
        (ReadHalf<'_>, &mut Receiver),
        &UpdateRequested,
    ) {
        let (read, write) = self.tcp.split();
        (
            (write, &mut self.sender),
            (read, &mut self.receiver),
            &self.update_requested,
        )
    }

    /// Sends a CONNECT followed by the app's first bytes: none, or at most [`MAX_EARLY_BYTES`].
    pub async fn send_connect(
        &mut self,
        connect: &Connect,
        early: &[u8],
    ) -> Result<(), ChannelError> {
        self.send(|out| {
            frame::encode_connect(connect, out);
            frame::encode_data(early, out);
        })
        .await
    }

    /// Sends the app's first bytes, at most [`MAX_EARLY_BYTES`], after a CONNECT that was sent without them.
    pub async fn send_early(&mut self, early: &[u8]) -> Result<(), ChannelError> {
        self.send(|out| frame::encode_data(early, out)).await
    }

    /// Sends a CONNECTED.
    pub async fn send_connected(&mut self) -> Result<(), ChannelError> {
        self.send(frame::encode_connected).await
    }

    /// Like [`Channel::send_connected`], but if the client's first bytes are already here, and no further bytes wait
    /// for CONNECTED, the frame goes out with the answer of the server's app, or a moment later.
    pub async fn answer_connected(&mut self) -> Result<(), ChannelError> {
        if (1..MAX_EARLY_BYTES).contains(&self.receiver.plain.len()) {
            self.sender.push_frames(frame::encode_connected);
            return Ok(());
        }
        self.send_connected().await
    }

    /// Sends a RESET, the last frame of the tunnel, and waits for the peer to close in response.
    ///
    /// Until then, bytes from the peer are read and dropped. Closing a socket with unread bytes sends a RST, which
    /// would discard the RESET and its reason if the peer has not read them yet.
    pub async fn send_reset(&mut self, reset: &Reset) -> Result<(), ChannelError> {
        self.send(|out| frame::encode_reset(reset, out)).await?;
        self.tcp.shutdown().await?;
        loop {
            self.tcp.readable().await?;
            // Declared inside the loop so that it is not held across the await, where it would enlarge every
            // connection's future.
            let mut dropped = [0; 16 * 1024];
            match self.tcp.try_read(&mut dropped) {
                Ok(0) => return Ok(()),
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error.into()),
                _ => {}
            }
        }
    }

    async fn send(&mut self, encode: impl FnOnce(&mut Vec<u8>)) -> Result<(), ChannelError> {
        let (mut write, sender) = (self.tcp.split().1, &mut self.sender);
        sender.flush(&mut write).await?;
        if sender.is_key_change_due(&self.update_requested) {
            sender
                .change_key(&self.update_requested, &mut write)
                .await?;
        }
        sender.push_frames(encode);
        sender.flush(&mut write).await?;
        sender.outgoing.release();
        Ok(())
    }

    /// Waits for the next frame that is not DATA. Returns `None` if the peer closed the tunnel between two app
    /// connections with a close_notify, which nobody else can forge. Cancel-safe: received bytes are kept.
    pub async fn receive_control(&mut self) -> Result<Option<Event>, ChannelError> {
        let mut read = self.tcp.split().0;
        loop {
            match self.receiver.next_event(&self.update_requested)? {
                Next::Event(Event::Data(_)) => return Err(ChannelError::OutOfTurn("DATA")),
                Next::Event(event) => {
                    if let Tickets::Store(_) = self.receiver.tickets {
                        self.receiver.tickets = Tickets::Ignore;
                    }
                    return Ok(Some(event));
                }
                Next::Closed => return Ok(None),
                Next::Starved => {
                    if !self.receiver.fill(&mut read).await? {
                        return Err(ChannelError::Closed);
                    }
                }
            }
        }
    }

    /// Releases memory that is not needed until the next use.
    pub(super) fn rest(&mut self) {
        self.receiver.discard();
        self.receiver.incoming.release();
    }

    /// Whether an idle tunnel has nothing to read, and can therefore be reused.
    pub fn is_quiet(&self) -> bool {
        // Ask the socket itself, because the runtime may not have been notified yet.
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        self.receiver.incoming.is_empty()
            && recv(self.tcp.as_raw_fd(), &mut [0], peek) == Err(Errno::EAGAIN)
    }

    /// Closes the tunnel, with a close_notify if the socket accepts it without waiting.
    pub fn close(mut self) {
        if self.sender.outgoing.is_empty() {
            self.sender.push(ContentType::Alert, &CLOSE_NOTIFY);
            let _ = self.tcp.try_write(self.sender.outgoing.filled());
            let _ = self.socket().set_linger(None);
        }
    }
}

/// The sending half.
#[derive(Debug)]
pub(super) struct Sender {
    pub(super) sealer: Sealer,
    /// Sealed records that are not written yet.
    pub(super) outgoing: Buffer,
    /// Size of a stream's records, in bytes.
    pub(super) slot_bytes: usize,
}

/// Size of a stream's records, in bytes. Four records fill whole TCP segments and fit into the largest packet that the
/// kernel passes on in one piece. A remainder would travel as a packet of its own.
fn slot_bytes(mss: Option<u32>) -> usize {
    /// 64 KiB, less what the kernel reserves for headers (tcp_tso_autosize, Linux 6.18).
    const PIECE_BYTES: usize = 65_536 - 1 - 320;
    let mss = mss.map_or(0, |mss| mss as usize);
    match PIECE_BYTES.checked_rem(mss) {
        Some(rest) if rest < PIECE_BYTES => MAX_RECORD_BYTES.min((PIECE_BYTES - rest) / 4),
        _ => MAX_RECORD_BYTES,
    }
}

impl Sender {
    /// Writes all sealed records.
    pub(super) async fn flush(&mut self, write: &mut WriteHalf<'_>) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            let written = write.write(self.outgoing.filled()).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.outgoing.consume(written);
        }
        Ok(())
    }

    /// Seals one small record and queues it after the pending ones.
    pub(super) fn push(&mut self, kind: ContentType, plain: &[u8]) {
        let room = self
            .outgoing
            .spare_for(HEADER_BYTES + plain.len() + TRAILER_BYTES);
        room[HEADER_BYTES..HEADER_BYTES + plain.len()].copy_from_slice(plain);
        let sealed = self.sealer.seal(room, plain.len(), kind);
        self.outgoing.extend(sealed);
    }

    /// Seals small frames as one record.
    pub(super) fn push_frames(&mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        let mut plain = Vec::with_capacity(64);
        encode(&mut plain);
        self.push(ContentType::ApplicationData, &plain);
    }

    /// Whether the sending key must be updated before the next app byte: the key is close to its limit, or the peer
    /// requested an update (RFC 8446 §4.6.3).
    pub(super) fn is_key_change_due(&self, requested: &UpdateRequested) -> bool {
        requested.load(Ordering::Relaxed) || self.sealer.wants_new_key()
    }

    /// Updates the sending key, after writing the records sealed with the old one.
    pub(super) async fn change_key(
        &mut self,
        requested: &UpdateRequested,
        write: &mut WriteHalf<'_>,
    ) -> Result<(), ChannelError> {
        const UPDATE: [u8; 5] = [KEY_UPDATE, 0, 0, 1, 0];
        self.flush(write).await?;
        requested.store(false, Ordering::Relaxed);
        let mut record = [0; HEADER_BYTES + UPDATE.len() + TRAILER_BYTES];
        record[HEADER_BYTES..HEADER_BYTES + UPDATE.len()].copy_from_slice(&UPDATE);
        self.sealer
            .seal(&mut record, UPDATE.len(), ContentType::Handshake);
        write.write_all(&record).await?;
        self.sealer.update();
        Ok(())
    }
}

/// The receiving half.
#[derive(Debug)]
pub(super) struct Receiver {
    opener: Opener,
    tickets: Tickets,
    /// Bytes from the wire. The first record may already be decrypted.
    incoming: Buffer,
    /// Plaintext of the decrypted record that is not decoded yet, relative to the start of `incoming`.
    plain: Range<usize>,
    /// End of the decrypted records, relative to the start of `incoming`.
    record_end: usize,
    decoder: Decoder,
    /// Number of records in a row that carried no frame.
    futile: u32,
}

/// Result of decoding the received bytes.
pub(super) enum Next {
    /// An event. A DATA range is relative to the start of the incoming bytes, and is valid until [`Receiver::discard`].
    Event(Event),
    /// The peer closed the tunnel cleanly.
    Closed,
    /// More bytes are needed.
    Starved,
}

impl Receiver {
    /// Decrypts and decodes up to the next event, without I/O. DATA stays in place until [`Receiver::discard`].
    pub(super) fn next_event(
        &mut self,
        update_requested: &UpdateRequested,
    ) -> Result<Next, ChannelError> {
        loop {
            if !self.plain.is_empty() {
                let base = self.plain.start;
                let (taken, event) = self
                    .decoder
                    .decode(&self.incoming.filled()[self.plain.clone()])?;
                self.plain.start += taken;
                match event {
                    Some(Event::Data(range)) => {
                        return Ok(Next::Event(Event::Data(
                            base + range.start..base + range.end,
                        )));
                    }
                    Some(event) => return Ok(Next::Event(event)),
                    None => continue,
                }
            }
            let rest = &mut self.incoming.filled_mut()[self.record_end..];
            let Some(length) = record::complete(rest)? else {
                return Ok(Next::Starved);
            };
            let (kind, plain) = self.opener.open(&mut rest[..length])?;
            let start = self.record_end + HEADER_BYTES;
            let range = start..start + plain;
            self.record_end += length;
            if kind == ContentType::ApplicationData && plain > 0 {
                self.futile = 0;
            } else {
                self.futile += 1;
            }
            if self.futile > MAX_FUTILE {
                return Err(ChannelError::Futile);
            }
            match kind {
                ContentType::ApplicationData => self.plain = range,
                ContentType::Alert => {
                    return match self.incoming.filled()[range] {
                        [_, 0] if self.decoder.at_boundary() => Ok(Next::Closed),
                        [_, 0] => Err(ChannelError::Closed),
                        [_, alert] => Err(ChannelError::Alert(alert)),
                        _ => Err(ChannelError::Alert(0)),
                    };
                }
                ContentType::Handshake => self.post_handshake(range, update_requested)?,
            }
        }
    }

    fn post_handshake(
        &mut self,
        range: Range<usize>,
        update_requested: &UpdateRequested,
    ) -> Result<(), ChannelError> {
        let mut messages = &self.incoming.filled()[range];
        while let [NEW_SESSION_TICKET, a, b, c, rest @ ..] = messages
            && !matches!(self.tickets, Tickets::Refuse)
            && let Some((ticket, rest)) =
                rest.split_at_checked(u32::from_be_bytes([0, *a, *b, *c]) as usize)
        {
            if let Tickets::Store(store) = &mut self.tickets {
                let stored = store.handle_new_session_ticket(ticket);
                stored.map_err(ChannelError::Ticket)?;
            }
            if rest.is_empty() {
                return Ok(());
            }
            messages = rest;
        }
        let &[KEY_UPDATE, 0, 0, 1, requested @ (0 | 1)] = messages else {
            return Err(ChannelError::Handshake(
                messages.first().copied().unwrap_or(0),
            ));
        };
        if requested == 1 {
            update_requested.store(true, Ordering::Relaxed);
        }
        self.opener.update();
        Ok(())
    }

    /// The bytes of a DATA event.
    pub(super) fn bytes(&self, range: &Range<usize>) -> &[u8] {
        &self.incoming.filled()[range.clone()]
    }

    /// Discards records that are decrypted and decoded. Invalidates earlier DATA ranges.
    pub(super) fn discard(&mut self) {
        let done = if self.plain.is_empty() {
            self.record_end
        } else {
            self.plain.start
        };
        self.incoming.consume(done);
        self.plain = self.plain.start.saturating_sub(done)..self.plain.end.saturating_sub(done);
        self.record_end -= done;
    }

    /// Reads more from the wire. Holds no memory while it waits with an empty buffer. Returns `false` at end of stream.
    pub(super) async fn fill(&mut self, read: &mut ReadHalf<'_>) -> io::Result<bool> {
        self.discard();
        let (count, room) = poll_fn(|context| {
            // A record always fits, because the buffer holds at most part of one.
            let room = self.incoming.spare();
            let bytes = room.len();
            let mut room = ReadBuf::new(room);
            match Pin::new(&mut *read).poll_read(context, &mut room) {
                Poll::Ready(result) => Poll::Ready(result.map(|()| (room.filled().len(), bytes))),
                Poll::Pending => {
                    self.incoming.release();
                    Poll::Pending
                }
            }
        })
        .await?;
        self.incoming.extend(count);
        self.incoming
            .note_stream(count >= SMALL_BYTES || count == room);
        Ok(count > 0)
    }
}

/// Maximum number of app bytes sent with a CONNECT. One record holds both.
pub const MAX_EARLY_BYTES: usize = 8 * 1024;

const _: () = assert!(
    frame::MAX_CONTROL_BYTES + MAX_EARLY_BYTES + 2 * frame::HEADER_BYTES <= record::MAX_PLAIN_BYTES
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_records_of_a_stream_are_whole_segments() {
        for mss in [536, 1220, 1398, 1448, 8948, 32_000] {
            let slot = slot_bytes(Some(mss));
            let rest = 4 * slot % mss as usize;
            let short = (mss as usize - rest) % mss as usize;
            assert!(short < 4, "{mss}: {slot} leaves {short}");
            assert!(4 * slot <= 65_215, "{mss}: {slot}");
        }
    }

    #[test]
    fn a_segment_size_that_helps_nothing_is_left_alone() {
        for mss in [None, Some(0), Some(65_483), Some(u32::MAX)] {
            assert_eq!(slot_bytes(mss), MAX_RECORD_BYTES, "{mss:?}");
        }
        assert!((12_000..=MAX_RECORD_BYTES).contains(&slot_bytes(Some(1))));
    }
}
