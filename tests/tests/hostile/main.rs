//! Peers that violate the protocol or forge an identity, and apps that try to bypass the daemon.

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
