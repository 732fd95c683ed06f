//! Peers that break the protocol or lie about who they are.

#[path = "../common/mod.rs"]
mod common;

mod certificates;
mod frames;
mod handshakes;
mod oddities;
mod servers;
mod servers_frames;
mod tampering;
