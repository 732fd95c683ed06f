//! Route netlink (rtnetlink(7)): requests, lists, and reports of changes.

use std::{
    io,
    net::IpAddr,
    ops::ControlFlow,
    os::fd::{AsRawFd, RawFd},
};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteType},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// Multicast groups (rtnetlink.h): changes of interfaces, of their addresses, of routes, of rules, and of next hops.
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_IPV4_IFADDR: u32 = 5;
const RTNLGRP_IPV4_ROUTE: u32 = 7;
const RTNLGRP_IPV4_RULE: u32 = 8;
const RTNLGRP_IPV6_IFADDR: u32 = 9;
const RTNLGRP_IPV6_ROUTE: u32 = 11;
const RTNLGRP_IPV6_RULE: u32 = 19;
const RTNLGRP_NEXTHOP: u32 = 32;

/// Maximum number of reports that are read at once. The socket's buffer holds fewer, unless they arrive as fast as they are
/// read.
const MAX_REPORTS: usize = 1024;
/// TCP's number (RFC 9293), by which rules may choose a table.
const IPPROTO_TCP: u8 = 6;

/// Where the kernel sends packets.
pub(super) struct Route {
    /// Whether the netns delivers them to itself.
    pub(super) is_local: bool,
    /// The index of the interface that they leave by.
    pub(super) interface: Option<u32>,
}

/// A route netlink socket of the netns in which it was opened.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Opens a socket that reports changes of interfaces.
    pub(super) fn watch_links() -> io::Result<Self> {
        Self::watch(&[RTNLGRP_LINK])
    }

    /// Opens a socket that reports changes of the interfaces' addresses.
    pub(super) fn watch_addresses() -> io::Result<Self> {
        Self::watch(&[RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR])
    }

    /// Opens a socket that reports what may change where the netns sends packets. The kernel removes routes without a report if
    /// it reports why: an interface that goes down, or an address that is removed.
    pub(super) fn watch_routes() -> io::Result<Self> {
        Self::watch(&[
            RTNLGRP_LINK,
            RTNLGRP_IPV4_IFADDR,
            RTNLGRP_IPV4_ROUTE,
            RTNLGRP_IPV4_RULE,
            RTNLGRP_IPV6_IFADDR,
            RTNLGRP_IPV6_ROUTE,
            RTNLGRP_IPV6_RULE,
            RTNLGRP_NEXTHOP,
        ])
    }

    fn watch(groups: &[u32]) -> io::Result<Self> {
        let netlink = Self::open()?;
        for group in groups {
            netlink.socket.add_membership(*group)?;
        }
        netlink.socket.set_non_blocking(true)?;
        Ok(netlink)
    }

    /// Discards what was reported since the last call. Returns whether there was anything.
    pub(super) fn drain(&mut self) -> bool {
        let mut any = false;
        loop {
            match self.socket.recv(&mut &mut [0; 16][..], 0) {
                Ok(_) => any = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return any,
                // Reports were lost, so there were some.
                Err(_) => return true,
            }
        }
    }

    /// Shows what was reported since the last call to `visit`: `None` stands for reports that were lost or cannot be read.
    /// Returns whether that was all.
    pub(super) fn reports(&mut self, mut visit: impl FnMut(Option<RouteNetlinkMessage>)) -> bool {
        for _ in 0..MAX_REPORTS {
            let reported = match self.socket.recv_from_full() {
                Ok((reported, _)) => reported,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(_) => {
                    visit(None);
                    continue;
                }
            };
            let mut rest = reported.as_slice();
            while !rest.is_empty() {
                let Ok(message) = parse(rest) else {
                    visit(None);
                    break;
                };
                rest = after(rest, &message);
                if let NetlinkPayload::InnerMessage(message) = message.payload {
                    visit(Some(message));
                }
            }
        }
        false
    }

    /// Sends a request that is answered with one message, and returns it.
    pub(super) fn ask(&mut self, message: RouteNetlinkMessage) -> io::Result<RouteNetlinkMessage> {
        self.send(message, 0)?;
        let (answer, _) = self.socket.recv_from_full()?;
        match parse(&answer)?.payload {
            NetlinkPayload::InnerMessage(message) => Ok(message),
            NetlinkPayload::Error(error) => Err(error.to_io()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Returns the route of packets to `address` that have no mark.
    pub(super) fn route(&mut self, address: IpAddr) -> io::Result<Route> {
        let route = self.ask_for_route(request_route(address))?;
        let mut attributes = route.attributes.iter();
        Ok(Route {
            is_local: route.header.kind == RouteType::Local,
            interface: attributes.find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            }),
        })
    }

    /// Returns the entry of the routing tables for packets from `source` to `destination` that arrive by the interface with
    /// index `arrives_by` and have no mark. Fails with the kernel's error if it would not forward them.
    pub(super) fn forwarding_route(
        &mut self,
        source: IpAddr,
        destination: IpAddr,
        arrives_by: u32,
    ) -> io::Result<RouteMessage> {
        let mut request = request_route(destination);
        let (length, address) = whole(source);
        request.header.source_prefix_length = length;
        // All of its next hops, and not the one that the kernel would choose for one packet.
        request.header.flags = RouteFlags::FibMatch;
        request.attributes.extend([
            RouteAttribute::Source(address),
            RouteAttribute::Iif(arrives_by),
            RouteAttribute::IpProto(IPPROTO_TCP),
        ]);
        self.ask_for_route(request)
    }

    fn ask_for_route(&mut self, request: RouteMessage) -> io::Result<RouteMessage> {
        match self.ask(RouteNetlinkMessage::GetRoute(request))? {
            RouteNetlinkMessage::NewRoute(route) => Ok(route),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Sends a request that is answered with an acknowledgement.
    pub(super) fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, NLM_F_ACK | flags)?;
        let (answer, _) = self.socket.recv_from_full()?;
        match parse(&answer)?.payload {
            NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
            _ => Ok(()),
        }
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        Ok(())
    }
}

impl AsRawFd for Netlink {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn request_route(destination: IpAddr) -> RouteMessage {
    let mut message = RouteMessage::default();
    let (length, address) = whole(destination);
    message.header.address_family = match destination {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.destination_prefix_length = length;
    message.attributes = vec![RouteAttribute::Destination(address)];
    message
}

/// The prefix that contains `address` alone.
fn whole(address: IpAddr) -> (u8, RouteAddress) {
    match address {
        IpAddr::V4(v4) => (32, RouteAddress::Inet(v4)),
        IpAddr::V6(v6) => (128, RouteAddress::Inet6(v6)),
    }
}

/// Requests a list of the current netns, and shows its messages to `visit` until it breaks, which it must do in time: a pod
/// decides how long the lists of its netns are. What is left of the list would be taken for the answer to another request, so
/// the socket is used for this one only.
pub(super) fn dump<T>(
    message: RouteNetlinkMessage,
    mut visit: impl FnMut(RouteNetlinkMessage) -> ControlFlow<T>,
) -> io::Result<ControlFlow<T>> {
    let mut netlink = Netlink::open()?;
    netlink.send(message, NLM_F_DUMP)?;
    loop {
        let (part, _) = netlink.socket.recv_from_full()?;
        let mut rest = part.as_slice();
        while !rest.is_empty() {
            let message = parse(rest)?;
            rest = after(rest, &message);
            match message.payload {
                NetlinkPayload::InnerMessage(message) => {
                    let visited = visit(message);
                    if visited.is_break() {
                        return Ok(visited);
                    }
                }
                NetlinkPayload::Done(_) => return Ok(ControlFlow::Continue(())),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
        }
    }
}

/// Requests a list of the current netns, and returns what `pick` picks of its messages.
///
/// # Errors
/// [`io::ErrorKind::QuotaExceeded`] if there are more messages than `limit`. `what` names them.
pub(super) fn list<T>(
    message: RouteNetlinkMessage,
    limit: usize,
    what: &str,
    pick: impl Fn(RouteNetlinkMessage) -> Option<T>,
) -> io::Result<Vec<T>> {
    let (mut seen, mut picked) = (0, Vec::new());
    let visited = dump(message, |message| {
        if seen == limit {
            return ControlFlow::Break(());
        }
        seen += 1;
        picked.extend(pick(message));
        ControlFlow::Continue(())
    })?;
    match visited {
        ControlFlow::Continue(()) => Ok(picked),
        ControlFlow::Break(()) => Err(io::Error::new(
            io::ErrorKind::QuotaExceeded,
            format!("there are more than {limit} {what}"),
        )),
    }
}

/// What follows `message`, the first one of `bytes`.
fn after<'a>(bytes: &'a [u8], message: &NetlinkMessage<RouteNetlinkMessage>) -> &'a [u8] {
    let length = (message.header.length as usize).next_multiple_of(4);
    bytes.get(length..).unwrap_or_default()
}

fn parse(bytes: &[u8]) -> io::Result<NetlinkMessage<RouteNetlinkMessage>> {
    NetlinkMessage::deserialize(bytes).map_err(|error| io::Error::other(error.to_string()))
}
