//! The eBPF programs, one file a hook. The daemon attaches them to the cgroup root, except `gate`, which it attaches to the
//! cgroups that contain all pods, and `forward`, which it attaches to interfaces of enrolled netns. The program that it
//! attaches to each enrolled netns, `inbound`, is an object of its own.
#![no_std]
#![no_main]
// For atomic additions: see `shares`.
#![feature(asm_experimental_arch)]

// The hooks.
mod connect;
mod established;
mod exposed;
mod first_socket;
mod forward;
mod gate;
mod names;
mod non_tcp;

// What they share. Imports go one way: hooks, `node_connect` and `same_node`, `shares`, `maps`, `context`, `packet`, `shared`.
mod context;
mod license;
mod maps;
mod node_connect;
mod packet;
mod same_node;
mod shared;
mod shares;
