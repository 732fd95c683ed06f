//! Peers that break the protocol or lie about who they are, and apps that try to connect past the daemon.

#[path = "../common/mod.rs"]
mod common;

mod certificates;
mod frames;
mod handshakes;
mod oddities;
mod raw_packets;
mod servers;
mod servers_frames;
mod sockets;
mod tampering;
