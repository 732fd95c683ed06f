//! HBONE, the tunnel of Istio's ambient mesh: HTTP/2 CONNECT over mutual TLS to port 15008, with one stream for each app
//! connection.
//!
//! [`accept`] and [`connect`] turn a TCP connection into a [`Server`] or a [`Client`], which give out [`Stream`]s, and
//! [`relay`] carries an app connection's bytes over one of them. The limits are those of ztunnel.

mod authority;
mod client;
mod keep_alive;
mod pool;
mod server;
mod stream;
mod tls;

use std::time::Duration;

pub use http::StatusCode;

pub use authority::{InvalidAuthority, parse as parse_authority};
pub use client::{Client, OpenError, connect, connect_over};
pub use pool::{Connections, Place, Pool};
pub use server::{Request, Server, accept};
pub use stream::{Ended, Stream, relay};

/// The ALPN protocol.
pub const ALPN: &[u8] = b"h2";
/// Maximum number of streams that a peer may have open on one connection.
pub const MAX_STREAMS_ACCEPTED: u32 = 200;
/// Maximum number of streams that a client opens on one connection.
pub const MAX_STREAMS_OPENED: usize = 100;
/// Window of a connection that may hold much unread data, in bytes.
pub const LARGE_WINDOW: u32 = 16 << 20;
/// Window of a connection that may hold as much as any other, in bytes.
pub const SMALL_WINDOW: u32 = 128 << 10;

/// Window of a stream, in bytes. A connection's window also limits each of its streams.
const STREAM_WINDOW: u32 = 4 << 20;
/// Maximum size of a frame, in bytes.
const MAX_FRAME: u32 = 1 << 20;
/// Maximum size of a request's or answer's headers, decoded, in bytes.
const MAX_HEADERS: u32 = 16 << 10;
/// Maximum number of streams that a peer may make us reset by its errors, before the connection is closed.
const MAX_ERRORS: usize = 100;
/// Time without an answer after which the peer is pinged.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// Time within which a ping must be answered.
const PING_TIMEOUT: Duration = Duration::from_secs(20);
