//! The tunnel: TLS 1.3 between two nodes, and inside it one app connection after another.
//!
//! [`handshake`] turns a TCP connection into a [`Channel`]; [`Channel`] exchanges control frames; [`relay`] carries an
//! app connection's bytes. [`hbone`] is Istio's protocol instead, which other daemons speak. [`frame`], [`record`] and [`hello`] are the formats, without I/O.

mod aead;
mod buffer;
mod channel;
pub mod frame;
pub mod handshake;
pub mod hbone;
pub mod hello;
mod pool;
pub mod record;
mod relay;
pub mod secrets;
pub mod tls;

pub use channel::{Channel, ChannelError, MAX_EARLY_BYTES};
pub use handshake::HandshakeError;
pub use pool::{Made, Pool, Taken};
pub use relay::{Counters, Ending, relay};
pub use tls::ALPN;
