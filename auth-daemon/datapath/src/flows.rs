//! Finds and ends the connections that the kernel carries without the daemon: those between pods of this node, and
//! plaintext connections that a pod's app accepted because policy allowed it, or before the pod was enrolled. Connections are found in their netns, the former
//! by the socket storage of the eBPF programs (sock_diag with socket storage, Linux 5.7), and are ended there
//! (SOCK_DESTROY, Linux 4.5).

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd},
};

use auth_common::Flow;
use aya::maps::MapData;
use netlink_packet_core::{
    DefaultNla, Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR,
    NetlinkBuffer, NlasIterator,
};
use netlink_sys::{Socket, SocketAddr as NetlinkAddress, protocols::NETLINK_SOCK_DIAG};

use super::Netns;

// From the kernel's sock_diag.h and inet_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const INET_DIAG_REQ_SK_BPF_STORAGES: u16 = 2;
const SK_DIAG_BPF_STORAGE_REQ_MAP_FD: u16 = 1;
const INET_DIAG_SK_BPF_STORAGES: u16 = 20;
const SK_DIAG_BPF_STORAGE: u16 = 1;
const SK_DIAG_BPF_STORAGE_MAP_VALUE: u16 = 3;
/// Size of a netlink message's header, in bytes.
const HEADER: usize = 16;
/// Size of `struct inet_diag_req_v2`, in bytes.
const REQUEST: usize = 56;
/// Size of `struct inet_diag_sockid`, including the socket's cookie, in bytes.
const SOCKET_ID: usize = 48;
/// Size of `struct inet_diag_msg`, in bytes: family, state, two other fields, the socket's id, and counters.
const ANSWER: usize = 72;
const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];
const SYN_RECV: u8 = 3;
const LISTEN: u32 = 1 << 10;
const TIME_WAIT: u32 = 1 << 6;
/// All TCP states except LISTEN and TIME_WAIT, which carry no data.
const STATES: u32 = 0xfff & !LISTEN & !TIME_WAIT;

/// Ends the connections in `netns` whose entry in `flows` (the FLOWS map) meets `condition`. Both ends get a RST.
/// Returns the number of ended connections.
pub(super) fn end(
    netns: &Netns,
    flows: &MapData,
    condition: &dyn Fn(&Flow) -> bool,
) -> io::Result<usize> {
    netns.enter(|| {
        let mut ended = 0;
        for family in FAMILIES {
            let mut found = Vec::new();
            list(family, STATES, &storage_of(flows), |answer| {
                if let Some((id, flow)) = socket_with_flow(answer)
                    && condition(&flow)
                {
                    found.push(id);
                }
            })?;
            ended += destroy_all(family, found)?;
        }
        Ok(ended)
    })?
}

/// A connection to an app that the kernel passed to it: the app has accepted it, or can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// Address and port of the app.
    pub local: SocketAddr,
    /// Address and port of the caller.
    pub peer: SocketAddr,
    /// Whether the caller has not acknowledged it yet (SYN_RECV). It may then still be one of the daemon's listener.
    pub is_half_open: bool,
    family: u8,
    id: [u8; SOCKET_ID],
}

/// Lists the connections to apps in `netns`, except those whose sockets have an entry in one of `maps`, and those whose
/// other end is in the netns too.
pub(super) fn accepted(netns: &Netns, maps: &[&MapData]) -> io::Result<Vec<Accepted>> {
    netns.enter(|| {
        let mut listening = HashSet::new();
        for family in FAMILIES {
            list(family, LISTEN, &[], |answer| {
                listening.extend(ends(answer).map(|(_, local, _)| local.port()));
            })?;
        }
        let mut found = Vec::new();
        for family in FAMILIES {
            list(family, STATES, &[], |answer| {
                if let Some((id, local, peer)) = ends(answer)
                    && listening.contains(&local.port())
                {
                    found.push(Accepted {
                        local,
                        peer,
                        is_half_open: answer.get(1) == Some(&SYN_RECV),
                        family,
                        id,
                    });
                }
            })?;
        }
        // Each list goes through the kernel's whole table of connections.
        if found.is_empty() {
            return Ok(found);
        }
        // Afterwards, because a connection gets its entry, and has its other end, before it is found.
        let mut others = HashSet::new();
        let mut entered = HashSet::new();
        for family in FAMILIES {
            list(family, STATES, &[], |answer| {
                others.extend(ends(answer).map(|(_, local, peer)| (local, peer)));
            })?;
            for map in maps {
                list(family, STATES, &storage_of(map), |answer| {
                    if let Some((id, ..)) = ends(answer)
                        && value(answer).is_some()
                    {
                        entered.insert(id);
                    }
                })?;
            }
        }
        found.retain(|connection| {
            !entered.contains(&connection.id)
                && !others.contains(&(connection.peer, connection.local))
        });
        Ok(found)
    })?
}

/// Ends connections in `netns` with a RST. Returns the number of those that still existed.
pub(super) fn end_all(netns: &Netns, connections: &[Accepted]) -> io::Result<usize> {
    netns.enter(|| {
        let of = |family: u8| {
            let connections = connections.iter();
            let connections = connections.filter(move |connection| connection.family == family);
            connections.map(|connection| connection.id).collect()
        };
        FAMILIES
            .into_iter()
            .map(|family| destroy_all(family, of(family)))
            .sum()
    })?
}

/// Lists the local and the peer address of the connections in the current netns whose entry in `map`, a number, meets
/// `condition`.
pub(super) fn with_value(
    map: &MapData,
    condition: impl Fn(u32) -> bool,
) -> io::Result<HashSet<(SocketAddr, SocketAddr)>> {
    let mut found = HashSet::new();
    for family in FAMILIES {
        list(family, STATES, &storage_of(map), |answer| {
            let value = value(answer).and_then(|value| value.first_chunk());
            if value.is_some_and(|value| condition(u32::from_ne_bytes(*value))) {
                found.extend(ends(answer).map(|(_, local, peer)| (local, peer)));
            }
        })?;
    }
    Ok(found)
}

/// Returns the number of sockets that still existed.
fn destroy_all(family: u8, found: Vec<[u8; SOCKET_ID]>) -> io::Result<usize> {
    let mut ended = 0;
    for id in found {
        match destroy(family, id) {
            Ok(()) => ended += 1,
            // The connection has already ended.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(ended)
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&NetlinkAddress::new(0, 0))?;
    Ok(socket)
}

/// Passes the kernel's answer for each TCP socket in the current netns that is in one of `states` to `take`.
fn list(family: u8, states: u32, attributes: &[u8], mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let socket = open()?;
    let request = request(
        (SOCK_DIAG_BY_FAMILY, NLM_F_DUMP),
        family,
        states,
        [0; SOCKET_ID],
        attributes,
    );
    socket.send(&request, 0)?;
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = &datagram[..];
        while !rest.is_empty() {
            let message = NetlinkBuffer::new_checked(rest).map_err(garbled)?;
            match message.message_type() {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => return outcome(message.payload()),
                SOCK_DIAG_BY_FAMILY => take(message.payload()),
                _ => {}
            }
            let length = (message.length() as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}

fn destroy(family: u8, id: [u8; SOCKET_ID]) -> io::Result<()> {
    let socket = open()?;
    let request = request((SOCK_DESTROY, NLM_F_ACK), family, STATES, id, &[]);
    socket.send(&request, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let message = NetlinkBuffer::new_checked(&answer[..]).map_err(garbled)?;
    match message.message_type() {
        NLMSG_ERROR => outcome(message.payload()),
        _ => Err(garbled("no acknowledgement")),
    }
}

/// Encodes a `struct nlmsghdr`, a `struct inet_diag_req_v2` and attributes.
fn request(
    (kind, flags): (u16, u16),
    family: u8,
    states: u32,
    id: [u8; SOCKET_ID],
    attributes: &[u8],
) -> Vec<u8> {
    let length = HEADER + REQUEST + attributes.len();
    let mut bytes = Vec::with_capacity(length);
    // The cast cannot truncate, because a request is a few dozen bytes.
    bytes.extend((length as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, libc::IPPROTO_TCP as u8, 0, 0]);
    bytes.extend(states.to_ne_bytes());
    bytes.extend(id);
    bytes.extend(attributes);
    bytes
}

/// Encodes the request to report each socket's entry in `map`.
fn storage_of(map: &MapData) -> Vec<u8> {
    let fd = map.fd().as_fd().as_raw_fd().to_ne_bytes();
    let map = DefaultNla::new(SK_DIAG_BPF_STORAGE_REQ_MAP_FD, fd.into());
    emitted(&DefaultNla::new(
        INET_DIAG_REQ_SK_BPF_STORAGES,
        emitted(&map),
    ))
}

fn emitted(attribute: &DefaultNla) -> Vec<u8> {
    let mut bytes = vec![0; attribute.buffer_len()];
    attribute.emit(&mut bytes);
    bytes
}

/// Extracts the id, the local and the peer address of a socket.
fn ends(answer: &[u8]) -> Option<([u8; SOCKET_ID], SocketAddr, SocketAddr)> {
    let id: [u8; SOCKET_ID] = *answer.get(4..)?.first_chunk()?;
    let family = i32::from(*answer.first()?);
    let address = |port: usize, address: usize| {
        let port = u16::from_be_bytes(*id.get(port..)?.first_chunk()?);
        let ip = match family {
            libc::AF_INET => IpAddr::from(Ipv4Addr::from(*id.get(address..)?.first_chunk::<4>()?)),
            _ => IpAddr::from(Ipv6Addr::from(*id.get(address..)?.first_chunk::<16>()?)),
        };
        Some(SocketAddr::new(ip.to_canonical(), port))
    };
    Some((id, address(0, 4)?, address(2, 20)?))
}

/// Extracts the id of a socket and its entry in the FLOWS map. `None` if it has no entry.
fn socket_with_flow(answer: &[u8]) -> Option<([u8; SOCKET_ID], Flow)> {
    let id = *answer.get(4..)?.first_chunk()?;
    let value = value(answer)?;
    if value.len() < size_of::<Flow>() {
        return None;
    }
    // SAFETY: `value` has at least as many bytes as a `Flow`, and every bit pattern is a valid `Flow`.
    Some((id, unsafe {
        value.as_ptr().cast::<Flow>().read_unaligned()
    }))
}

/// Extracts a socket's entry in the map that was asked for. `None` if it has no entry.
fn value(answer: &[u8]) -> Option<&[u8]> {
    let storages = attribute(answer.get(ANSWER..)?, INET_DIAG_SK_BPF_STORAGES)?;
    let storage = attribute(storages, SK_DIAG_BPF_STORAGE)?;
    attribute(storage, SK_DIAG_BPF_STORAGE_MAP_VALUE)
}

fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    let mut attributes = NlasIterator::new(bytes).map_while(Result::ok);
    let found = attributes.find(|attribute| attribute.kind() == kind)?;
    let length = usize::from(found.length());
    found.into_inner().get(4..length)
}

/// Extracts the result from a `struct nlmsgerr`.
fn outcome(payload: &[u8]) -> io::Result<()> {
    let code = payload
        .first_chunk()
        .ok_or_else(|| garbled("no error code"))?;
    match i32::from_ne_bytes(*code) {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
    }
}

fn garbled(what: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("sock_diag: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_of_a_socket() {
        let mut answer = vec![libc::AF_INET as u8, 1, 0, 0];
        answer.extend([0x1f, 0x90, 0xc0, 0x01]);
        answer.extend([10, 0, 0, 1].into_iter().chain([0; 12]));
        answer.extend([192, 0, 2, 7].into_iter().chain([0; 12]));
        answer.extend([0; 12 + 16]);
        let (_, local, peer) = ends(&answer).unwrap();
        assert_eq!(local, "10.0.0.1:8080".parse().unwrap());
        assert_eq!(peer, "192.0.2.7:49153".parse().unwrap());
        answer[0] = libc::AF_INET6 as u8;
        answer[8..24].copy_from_slice(&Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets());
        let (_, local, _) = ends(&answer).unwrap();
        assert_eq!(
            local.ip(),
            IpAddr::from([10, 0, 0, 1]),
            "IPv4 in IPv6 is IPv4"
        );
        assert!(ends(&answer[..40]).is_none(), "cut short");
    }
}
