//! One stream, which carries one app connection.

use std::{
    future::poll_fn,
    io,
    pin::pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
};

use crate::relay::{Counters, Flag};

/// Maximum number of bytes that are read from the app at once.
const CHUNK: usize = 64 << 10;
/// Number of bytes up to which what was read is copied, so that it does not occupy a whole chunk while it waits.
const SMALL: usize = 16 << 10;

/// An open stream. Dropping it resets it (RST_STREAM), unless both directions have ended.
#[derive(Debug)]
pub struct Stream {
    pub(super) send: SendStream<Bytes>,
    pub(super) receive: RecvStream,
}

impl Stream {
    /// Sends the app's first bytes, which were read before the stream was open: at most
    /// [`MAX_EARLY_BYTES`](crate::MAX_EARLY_BYTES), because they wait in memory until the peer takes them.
    pub fn send_early(&mut self, bytes: &[u8]) -> Result<(), h2::Error> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.send.send_data(Bytes::copy_from_slice(bytes), false)
    }
}

/// How a stream ended.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// Both directions ended with END_STREAM.
    #[error("in order")]
    Clean,
    /// The app's connection broke, usually by a RST.
    #[error("{0}")]
    App(io::Error),
    /// The peer sent RST_STREAM.
    #[error("{0}")]
    Peer(Reason),
    /// The connection broke, or a peer broke the protocol.
    #[error("the HBONE connection broke: {0}")]
    Broken(h2::Error),
}

/// Relays until the stream ends. Unless the result is [`Ended::Clean`], the caller resets the app's connection; the stream
/// is reset already.
pub async fn relay(app: &mut TcpStream, stream: &mut Stream, counters: &Counters) -> Ended {
    let (mut app_read, mut app_write) = app.split();
    let Stream { send, receive } = stream;
    let (up_ended, down_ended) = (Flag::default(), Flag::default());
    let ended = {
        let up = async {
            up(&mut app_read, send, &counters.up).await?;
            up_ended.raise();
            // The app may still reset its reading direction, which would otherwise go unnoticed until the next byte for it.
            tokio::select! {
                () = down_ended.raised() => Ok(()),
                broken = broken(&app_read) => Err(broken),
            }
        };
        let down = async {
            down(receive, &mut app_write, &counters.down).await?;
            down_ended.raise();
            Ok(())
        };
        tokio::try_join!(up, down)
    };
    match ended {
        Ok(_) => Ended::Clean,
        Err(ended) => {
            send.send_reset(Reason::CANCEL);
            ended
        }
    }
}

/// Carries the app's bytes. Holds no memory while it waits for the app, or for the peer to take them.
async fn up(
    app: &mut ReadHalf<'_>,
    send: &mut SendStream<Bytes>,
    count: &AtomicU64,
) -> Result<(), Ended> {
    loop {
        if !readable(app, send).await? {
            return Ok(());
        }
        send.reserve_capacity(CHUNK);
        let room = tokio::select! {
            room = poll_fn(|context| poll_room(send, context)) => room?,
            broken = broken(app) => return Err(broken),
        };
        let mut chunk = BytesMut::with_capacity(room.min(CHUNK));
        let read = app.try_read_buf(&mut chunk);
        if let Ok(read) = read {
            count.fetch_add(read as u64, Ordering::Relaxed);
            let bytes = match read {
                0..SMALL => Bytes::copy_from_slice(&chunk),
                _ => chunk.freeze(),
            };
            send.send_data(bytes, read == 0).map_err(broke)?;
        }
        // What is reserved and not needed would be kept from the other streams.
        send.reserve_capacity(0);
        match read {
            Ok(0) => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                return Err(Ended::App(error));
            }
            _ => {}
        }
    }
}

/// Waits until the app has sent something. Returns `false` if the peer has ended its own direction and wants no more
/// bytes (RFC 9113 §8.1).
async fn readable(app: &ReadHalf<'_>, send: &mut SendStream<Bytes>) -> Result<bool, Ended> {
    let mut readable = pin!(app.as_ref().readable());
    poll_fn(|context| {
        if let Poll::Ready(reset) = send.poll_reset(context) {
            return Poll::Ready(match reset.map_err(broke)? {
                Reason::NO_ERROR => Ok(false),
                reason => Err(Ended::Peer(reason)),
            });
        }
        readable
            .as_mut()
            .poll(context)
            .map(|ready| ready.map(|()| true).map_err(Ended::App))
    })
    .await
}

/// Number of bytes that the peer is ready to take.
fn poll_room(
    send: &mut SendStream<Bytes>,
    context: &mut Context<'_>,
) -> Poll<Result<usize, Ended>> {
    loop {
        let room = send.capacity();
        if room > 0 {
            return Poll::Ready(Ok(room));
        }
        match ready!(send.poll_capacity(context)) {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Poll::Ready(Err(broke(error))),
            None => {
                let reset = ready!(send.poll_reset(context));
                return Poll::Ready(Err(reset.map_or_else(broke, Ended::Peer)));
            }
        }
    }
}

async fn down(
    receive: &mut RecvStream,
    app: &mut WriteHalf<'_>,
    count: &AtomicU64,
) -> Result<(), Ended> {
    while let Some(bytes) = receive.data().await {
        let bytes = bytes.map_err(broke)?;
        app.write_all(&bytes).await.map_err(Ended::App)?;
        count.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        // The peer may send as much as the app has taken.
        receive
            .flow_control()
            .release_capacity(bytes.len())
            .map_err(broke)?;
    }
    app.shutdown().await.map_err(Ended::App)
}

/// Returns once the app's connection is broken.
async fn broken(app: &ReadHalf<'_>) -> Ended {
    let broken = app.as_ref().ready(Interest::ERROR).await;
    Ended::App(
        broken
            .err()
            .unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
    )
}

fn broke(error: h2::Error) -> Ended {
    match error.reason() {
        Some(reason) if error.is_reset() => Ended::Peer(reason),
        _ => Ended::Broken(error),
    }
}
