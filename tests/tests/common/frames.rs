//! Ethernet frames that a test writes itself.

use std::os::fd::AsRawFd;

use mesh_tests::{Context, Place, Result};
use nix::errno::Errno;
use nix::libc;

/// The hardware address of an interface.
pub(crate) fn hardware_address(place: &Place, interface: &str) -> Result<[u8; 6]> {
    let links = place
        .run("ip", ["-br", "link", "show", interface])?
        .ok()?
        .stdout;
    let text = links
        .split_ascii_whitespace()
        .find(|word| word.matches(':').count() == 5)
        .context("no hardware address")?;
    let mut address = [0; 6];
    for (byte, text) in address.iter_mut().zip(text.split(':')) {
        *byte = u8::from_str_radix(text, 16)?;
    }
    Ok(address)
}

/// Sends an Ethernet frame through an interface of the calling thread's netns.
pub(crate) fn send_frame(interface: &str, frame: &[u8]) -> nix::Result<()> {
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Packet,
        nix::sys::socket::SockType::Raw,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let index = nix::net::if_::if_nametoindex(interface)?;
    let to = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0; 8],
    };
    // SAFETY: the kernel reads `frame` and `to`, each with its own length, and both outlive the call.
    let result = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of_val(&to) as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop)
}
