//! The eBPF programs, one file a hook. The daemon loads them all and attaches them to the cgroup root, but for
//! `inbound`, which is attached to each enrolled pod's netns.
#![no_std]
#![no_main]

mod connect;
mod established;
mod first_socket;
mod inbound;
mod maps;
mod names;
mod same_node;

/// The kernel refuses GPL-only helpers to programs of another licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses a program that can get here.
    loop {}
}
