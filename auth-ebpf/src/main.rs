//! The eBPF programs, one file a hook. The daemon loads all of them and attaches them to the cgroup root, except
//! `inbound`, which it attaches to each enrolled pod's netns.
#![no_std]
#![no_main]

// The hooks.
mod connect;
mod established;
mod first_socket;
mod inbound;
mod names;

// What they share. Imports go one way: hooks, `same_node`, `maps`, `context`.
mod context;
mod maps;
mod same_node;

/// The kernel reserves some helpers for programs with a licence compatible with the GPL.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier refuses a program that can get here.
    loop {}
}
