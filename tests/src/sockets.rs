//! The TCP sockets of a namespace, read from its `/proc/net/tcp` and `/proc/net/tcp6`.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};

use crate::netns::Netns;

/// A TCP socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// Its local address.
    pub local: SocketAddr,
    /// Its peer's address; port 0 if the socket is listening.
    pub remote: SocketAddr,
    /// Its state.
    pub state: TcpState,
}

/// The states of RFC 9293, numbered as in the kernel's `include/net/tcp_states.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the RFC documents them")]
pub enum TcpState {
    Established,
    SynSent,
    SynReceived,
    FinWait1,
    FinWait2,
    TimeWait,
    Close,
    CloseWait,
    LastAck,
    Listen,
    Closing,
}

/// The number of sockets in a namespace, by state.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SocketCount(BTreeMap<TcpState, usize>);

impl SocketCount {
    /// The number of sockets in this state.
    pub fn of(&self, state: TcpState) -> usize {
        self.0.get(&state).copied().unwrap_or(0)
    }

    /// The number of sockets not in TIME-WAIT. Those in TIME-WAIT use almost no resources and expire within a minute.
    pub fn live(&self) -> usize {
        self.0
            .iter()
            .filter(|(state, _)| **state != TcpState::TimeWait)
            .map(|(_, count)| count)
            .sum()
    }
}

impl FromIterator<Endpoint> for SocketCount {
    fn from_iter<I: IntoIterator<Item = Endpoint>>(sockets: I) -> Self {
        let mut count = Self::default();
        for socket in sockets {
            *count.0.entry(socket.state).or_default() += 1;
        }
        count
    }
}

/// Lists all TCP sockets of a namespace, IPv4 first.
pub fn sockets(netns: &Netns) -> Result<Vec<Endpoint>> {
    netns
        .enter(|| {
            let mut sockets = Vec::new();
            for table in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
                let text = fs::read_to_string(table).with_context(|| format!("reading {table}"))?;
                for line in text.lines().skip(1) {
                    sockets
                        .push(parse(line).with_context(|| format!("reading {table}: {line:?}"))?);
                }
            }
            anyhow::Ok(sockets)
        })?
        .with_context(|| format!("in {}", netns.name()))
}

fn parse(line: &str) -> Option<Endpoint> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, remote) = (address(fields.next()?)?, address(fields.next()?)?);
    let state = match u8::from_str_radix(fields.next()?, 16).ok()? {
        1 => TcpState::Established,
        2 => TcpState::SynSent,
        // State 12 is a request socket, not yet a full socket.
        3 | 12 => TcpState::SynReceived,
        4 => TcpState::FinWait1,
        5 => TcpState::FinWait2,
        6 => TcpState::TimeWait,
        // State 13 is bound, but neither connected nor listening.
        7 | 13 => TcpState::Close,
        8 => TcpState::CloseWait,
        9 => TcpState::LastAck,
        10 => TcpState::Listen,
        11 => TcpState::Closing,
        _ => return None,
    };
    Some(Endpoint {
        local,
        remote,
        state,
    })
}

/// Parses an address as the kernel prints it: 32-bit words in the machine's byte order, in hexadecimal, then the port.
fn address(field: &str) -> Option<SocketAddr> {
    let (address, port) = field.split_once(':')?;
    let word = |start: usize| {
        let word = u32::from_str_radix(address.get(start..start + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let ip: IpAddr = if address.len() == 8 {
        Ipv4Addr::from(word(0)?).into()
    } else {
        let mut octets = [0; 16];
        for (number, part) in octets.chunks_exact_mut(4).enumerate() {
            part.copy_from_slice(&word(number * 8)?);
        }
        Ipv6Addr::from(octets).into()
    };
    Some((ip, u16::from_str_radix(port, 16).ok()?).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn lines_of_the_kernel_are_read() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1";
        let socket = parse(line).expect("a socket");
        assert_eq!(socket.local, "127.0.0.1:8080".parse().expect("an address"));
        assert_eq!(socket.state, TcpState::Listen);
        let line =
            " 1: B80D0120000000000000000001000000:0050 00000000000000000000000000000000:0000 01 0";
        assert_eq!(
            parse(line).expect("a socket").local,
            "[2001:db8::1]:80".parse().expect("an address")
        );
    }
}
