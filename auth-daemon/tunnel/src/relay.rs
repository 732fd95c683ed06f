//! Relays the bytes of one app connection between the app's socket and the tunnel, in both directions concurrently,
//! until both directions have ended or one connection breaks.
//!
//! From the app to the tunnel, bytes are read directly to where they are sealed. From the tunnel to the app, they are
//! written directly from the decrypted records. Buffers are held only while bytes are in flight.

use std::{
    future::poll_fn,
    io::{self, IoSlice, IoSliceMut},
    ops::Range,
    os::fd::AsRawFd,
    pin::Pin,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    task::Poll,
    time::Duration,
};

use nix::sys::socket::{MsgFlags, recv};
use tokio::{
    io::{AsyncRead, AsyncWriteExt, Interest, ReadBuf},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::Notify,
};

use super::{
    buffer::{Buffer, RECORDS, SMALL_BYTES},
    channel::{Channel, ChannelError, Next, Receiver, Sender, UpdateRequested},
    frame::{self, Event, Reset},
    record::{ContentType, HEADER_BYTES, TRAILER_BYTES},
};

/// Offset of the app's bytes in a record.
const CHUNK_START: usize = HEADER_BYTES + frame::HEADER_BYTES;
/// Bytes of a record other than the app's, if one DATA frame fills the record.
const OVERHEAD_BYTES: usize = CHUNK_START + TRAILER_BYTES;
/// How long CONNECTED waits for app bytes to share a record with.
const CONNECTED_WAITS: Duration = Duration::from_millis(1);
/// Maximum number of DATA frames per write to the app.
const MAX_SLICES: usize = 16;

/// Number of bytes relayed so far, updated while the connection runs.
#[derive(Debug, Default)]
pub struct Counters {
    /// From the app to the tunnel.
    pub up: AtomicU64,
    /// From the tunnel to the app.
    pub down: AtomicU64,
}

/// How an app connection ended. The tunnel can be reused only after [`Ending::Clean`].
#[derive(Debug)]
pub enum Ending {
    /// Both directions ended with END. The tunnel can carry the next connection.
    Clean,
    /// The app's connection broke, usually by a RST.
    App(io::Error),
    /// The peer sent a RESET.
    Peer(Reset),
    /// The tunnel broke.
    Tunnel(ChannelError),
}

/// Relays until the connection ends. Unless the result is [`Ending::Clean`], the caller resets the remaining
/// connections.
pub async fn relay(app: &mut TcpStream, channel: &mut Channel, counters: &Counters) -> Ending {
    let (mut app_read, mut app_write) = app.split();
    let ((mut tunnel_write, sender), (mut tunnel_read, receiver), updates) = channel.split();
    let (up_ended, down_ended) = (Flag::default(), Flag::default());
    let up = async {
        up(
            &mut app_read,
            &mut tunnel_write,
            sender,
            updates,
            &counters.up,
        )
        .await?;
        up_ended.raise();
        // The app may still reset its reading direction, which would otherwise go unnoticed until the next byte for it.
        tokio::select! {
            () = down_ended.raised() => Ok(()),
            broken = app_read.as_ref().ready(Interest::ERROR) => Err(Ending::App(
                broken.err().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
            )),
        }
    };
    let down = async {
        down(
            &mut tunnel_read,
            receiver,
            updates,
            &mut app_write,
            &counters.down,
            &up_ended,
        )
        .await?;
        down_ended.raise();
        await_reset(&mut tunnel_read, receiver, updates, &up_ended).await
    };
    match tokio::try_join!(up, down) {
        Ok(_) => Ending::Clean,
        Err(ending) => ending,
    }
}

async fn up(
    app: &mut ReadHalf<'_>,
    tunnel: &mut WriteHalf<'_>,
    sender: &mut Sender,
    updates: &UpdateRequested,
    count: &AtomicU64,
) -> Result<(), Ending> {
    let slot = sender.slot_bytes;
    loop {
        let mut read = if sender.outgoing.is_empty() {
            read_app(app, &mut sender.outgoing, slot).await?
        } else {
            // CONNECTED waits for the app's first bytes, but not for long.
            tokio::select! {
                biased;
                read = read_app(app, &mut sender.outgoing, slot) => read?,
                () = tokio::time::sleep(CONNECTED_WAITS) => {
                    sender.flush(tunnel).await.map_err(broken_tunnel)?;
                    continue;
                }
            }
        };
        let room = sender.outgoing.spare();
        let chunk = chunk_bytes(room, slot);
        let streams = read == chunk || read >= SMALL_BYTES;
        // If the app's FIN has already arrived, END is sent with the last bytes.
        let ended = read == 0 || read < chunk && has_ended(app)?;
        if read == slot - OVERHEAD_BYTES {
            read += read_more(app, room, slot).map_err(Ending::App)?;
        }
        count.fetch_add(read as u64, Ordering::Relaxed);
        if sender.is_key_change_due(updates) {
            // Rare. Records sealed with the old key are sent first, from the same buffer.
            let unsealed = sender.outgoing.spare().to_vec();
            sender
                .change_key(updates, tunnel)
                .await
                .map_err(Ending::Tunnel)?;
            sender.outgoing.spare()[..unsealed.len()].copy_from_slice(&unsealed);
        }
        let room = sender.outgoing.spare();
        let mut sealed = 0;
        while read > 0 {
            let chunk = read.min(slot - OVERHEAD_BYTES);
            let record = &mut room[sealed..];
            record[HEADER_BYTES..CHUNK_START].copy_from_slice(&frame::data_header(chunk));
            sealed += sender.sealer.seal(
                record,
                frame::HEADER_BYTES + chunk,
                ContentType::ApplicationData,
            );
            read -= chunk;
        }
        sender.outgoing.extend(sealed);
        sender.outgoing.note_stream(streams);
        if ended {
            sender.push_frames(frame::encode_end);
        }
        sender.flush(tunnel).await.map_err(broken_tunnel)?;
        sender.outgoing.release();
        if ended {
            return Ok(());
        }
    }
}

/// Waits for bytes from the app, and holds no memory meanwhile. Returns the number of bytes. They lie in the buffer's
/// spare room, at the payload of a record's first frame.
async fn read_app(
    app: &mut ReadHalf<'_>,
    buffer: &mut Buffer,
    slot: usize,
) -> Result<usize, Ending> {
    let read = poll_fn(|context| {
        let room = buffer.spare();
        let chunk = chunk_bytes(room, slot);
        let mut room = ReadBuf::new(&mut room[CHUNK_START..CHUNK_START + chunk]);
        match Pin::new(&mut *app).poll_read(context, &mut room) {
            Poll::Ready(result) => Poll::Ready(result.map(|()| room.filled().len())),
            Poll::Pending => {
                buffer.release();
                Poll::Pending
            }
        }
    });
    read.await.map_err(Ending::App)
}

/// Number of app bytes that fit into the first record in `room`, for records of `slot` bytes.
fn chunk_bytes(room: &[u8], slot: usize) -> usize {
    slot.min(room.len()) - OVERHEAD_BYTES
}

/// Whether the app has sent a FIN and all its bytes are read. A short read alone does not show that, because a read
/// also stops at urgent data.
fn has_ended(app: &ReadHalf<'_>) -> Result<bool, Ending> {
    let app = app.as_ref();
    let peek = app.try_io(Interest::READABLE, || {
        Ok(recv(app.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK)?)
    });
    match peek {
        Ok(count) => Ok(count == 0),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(Ending::App(error)),
    }
}

/// Reads the bytes that are available after a full record, to send them in the same write. A stream that fills a record
/// usually has more.
fn read_more(app: &ReadHalf<'_>, room: &mut [u8], slot: usize) -> io::Result<usize> {
    let mut slots = room
        .chunks_exact_mut(slot)
        .skip(1)
        .map(|record| IoSliceMut::new(&mut record[CHUNK_START..slot - TRAILER_BYTES]));
    let mut slots: [IoSliceMut<'_>; RECORDS - 1] =
        std::array::from_fn(|_| slots.next().unwrap_or_else(|| IoSliceMut::new(&mut [])));
    match app.try_read_vectored(&mut slots) {
        // An end of stream is left for the next read.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        result => result,
    }
}

async fn down(
    tunnel: &mut ReadHalf<'_>,
    receiver: &mut Receiver,
    updates: &UpdateRequested,
    app: &mut WriteHalf<'_>,
    count: &AtomicU64,
    up_ended: &Flag,
) -> Result<(), Ending> {
    loop {
        let (behind, mut unwritten) = {
            let mut ranges = [const { 0..0 }; MAX_SLICES];
            let mut gathered = 0;
            let behind = loop {
                match receiver.next_event(updates).map_err(Ending::Tunnel)? {
                    Next::Event(Event::Data(range)) => {
                        ranges[gathered] = range;
                        gathered += 1;
                        if gathered == MAX_SLICES {
                            break None;
                        }
                    }
                    other => break Some(other),
                }
            };
            let ranges = &mut ranges[..gathered];
            let unwritten = write_now(app, receiver, ranges, count).map_err(Ending::App)?;
            // In memory of its own, and only if the app does not keep up: an idle connection's future has no room for it.
            (behind, unwritten.to_vec())
        };
        let mut unwritten = &mut unwritten[..];
        while !unwritten.is_empty() {
            app.writable().await.map_err(Ending::App)?;
            unwritten = write_now(app, receiver, unwritten, count).map_err(Ending::App)?;
        }
        match behind {
            None => receiver.discard(),
            Some(Next::Starved) => {
                if !receiver.fill(tunnel).await.map_err(broken_tunnel)? {
                    return Err(Ending::Tunnel(ChannelError::Closed));
                }
            }
            Some(Next::Closed) => return Err(Ending::Tunnel(ChannelError::Closed)),
            Some(Next::Event(Event::End)) => {
                receiver.discard();
                // If the app has also finished sending, the socket is about to be closed, which has the same effect.
                return if up_ended.is_raised() {
                    Ok(())
                } else {
                    app.shutdown().await.map_err(Ending::App)
                };
            }
            Some(Next::Event(Event::Reset(reset))) => return Err(Ending::Peer(reset)),
            Some(Next::Event(Event::Connect(_))) => {
                return Err(Ending::Tunnel(ChannelError::OutOfTurn("CONNECT")));
            }
            Some(Next::Event(Event::Connected)) => {
                return Err(Ending::Tunnel(ChannelError::OutOfTurn("CONNECTED")));
            }
            Some(Next::Event(Event::Data(_))) => unreachable!("gathered above"),
        }
    }
}

/// Waits for a RESET after the peer's direction has ended and ours has not. No other frame is allowed.
async fn await_reset(
    tunnel: &mut ReadHalf<'_>,
    receiver: &mut Receiver,
    updates: &UpdateRequested,
    up_ended: &Flag,
) -> Result<(), Ending> {
    loop {
        // After both directions have ended, further bytes belong to the next connection and must not be read here.
        if up_ended.is_raised() {
            return Ok(());
        }
        match receiver.next_event(updates).map_err(Ending::Tunnel)? {
            Next::Starved => tokio::select! {
                biased;
                () = up_ended.raised() => return Ok(()),
                filled = receiver.fill(tunnel) => if !filled.map_err(broken_tunnel)? {
                    return Err(Ending::Tunnel(ChannelError::Closed));
                }
            },
            Next::Closed => return Err(Ending::Tunnel(ChannelError::Closed)),
            Next::Event(Event::Reset(reset)) => return Err(Ending::Peer(reset)),
            Next::Event(_) => {
                return Err(Ending::Tunnel(ChannelError::OutOfTurn("a frame after END")));
            }
        }
    }
}

/// Notifies one direction that the other has ended.
#[derive(Default)]
pub(crate) struct Flag {
    raised: AtomicBool,
    notify: Notify,
}

impl Flag {
    pub(crate) fn raise(&self) {
        self.raised.store(true, Ordering::Relaxed);
        self.notify.notify_one();
    }

    fn is_raised(&self) -> bool {
        self.raised.load(Ordering::Relaxed)
    }

    pub(crate) async fn raised(&self) {
        while !self.is_raised() {
            self.notify.notified().await;
        }
    }
}

/// Writes what the app accepts at once of the received bytes in `ranges`, at most [`MAX_SLICES`]. Returns the rest of them.
fn write_now<'a>(
    app: &WriteHalf<'_>,
    receiver: &Receiver,
    mut ranges: &'a mut [Range<usize>],
    count: &AtomicU64,
) -> io::Result<&'a mut [Range<usize>]> {
    while !ranges.is_empty() {
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        for (slice, range) in slices.iter_mut().zip(&*ranges) {
            *slice = IoSlice::new(receiver.bytes(range));
        }
        let written = match &slices[..ranges.len()] {
            [slice] => app.try_write(slice),
            slices => app.try_write_vectored(slices),
        };
        let mut written = match written {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            result => result?,
        };
        count.fetch_add(written as u64, Ordering::Relaxed);
        let partial = ranges.iter().position(|range| {
            let behind = written.checked_sub(range.len());
            written = behind.unwrap_or(written);
            behind.is_none()
        });
        let whole = partial.unwrap_or(ranges.len());
        ranges = &mut std::mem::take(&mut ranges)[whole..];
        if let [first, ..] = ranges {
            first.start += written;
        }
    }
    Ok(ranges)
}

fn broken_tunnel(error: io::Error) -> Ending {
    Ending::Tunnel(ChannelError::Io(error))
}
