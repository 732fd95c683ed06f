//! Routes and sysctls that let the daemon connect from a client's address inside the server pod's netns, without
//! netfilter rules.
//!
//! The daemon connects to the pod's app from the client's address, with a firewall mark. The app replies to that
//! address, which is not the pod's own. The replies inherit the mark: through `tcp_fwmark_accept` for connections, and
//! through `fwmark_reflect` for the RSTs and ICMP errors that the kernel sends without a connection. A rule routes
//! marked packets to the loopback, where the daemon's socket is. Marks do not cross the border of a netns, so nothing
//! from outside carries one.

use std::{fs, io};

use auth_common::{ORIGINAL_SOURCE_MARK, ORIGINAL_SOURCE_TABLE};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::Netns;

/// Sysctls switched on in each pod's netns. Their order is stored in pinned maps: only append.
const SYSCTLS: [&str; 3] = [
    "/proc/sys/net/ipv4/tcp_fwmark_accept",
    "/proc/sys/net/ipv4/fwmark_reflect",
    "/proc/sys/net/ipv6/fwmark_reflect",
];
const RULE_PREFERENCE: u32 = 100;
const LOOPBACK_INDEX: u32 = 1;

/// Sets up `netns`. Idempotent. Returns a bit mask of the sysctls that were switched on, for [`tear_down`].
pub(super) fn set_up(netns: &Netns) -> io::Result<u32> {
    netns.enter(|| {
        let mut switched_on = 0;
        for (bit, path) in SYSCTLS.into_iter().enumerate() {
            let named = |error: io::Error| io::Error::new(error.kind(), format!("{path}: {error}"));
            match fs::read_to_string(path) {
                Ok(value) if value.trim() == "0" => {
                    fs::write(path, "1").map_err(named)?;
                    switched_on |= 1 << bit;
                }
                Ok(_) => {}
                // The kernel has no IPv6.
                Err(error) if error.kind() == io::ErrorKind::NotFound && path.contains("ipv6") => {}
                Err(error) => return Err(named(error)),
            }
        }
        let mut netlink = Netlink::open()?;
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        netlink.request(RouteNetlinkMessage::SetLink(loopback_up()), 0)?;
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            for message in [
                RouteNetlinkMessage::NewRoute(local_route(family)),
                RouteNetlinkMessage::NewRule(mark_rule(family)),
            ] {
                match netlink.request(message, flags) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    // Without IPv6, or with IPv6 disabled in this netns, it is not needed.
                    Err(error) if family == AddressFamily::Inet6 && lacks_ipv6(&error) => {}
                    result => result?,
                }
            }
        }
        Ok(switched_on)
    })?
}

/// Undoes [`set_up`] in `netns`. It is not an error if it is already undone.
pub(super) fn tear_down(netns: &Netns, switched_on: u32) -> io::Result<()> {
    netns.enter(|| {
        for (bit, path) in SYSCTLS.into_iter().enumerate() {
            if switched_on & 1 << bit != 0 {
                fs::write(path, "0")?;
            }
        }
        let mut netlink = Netlink::open()?;
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            for message in [
                RouteNetlinkMessage::DelRule(mark_rule(family)),
                RouteNetlinkMessage::DelRoute(local_route(family)),
            ] {
                match netlink.request(message, 0) {
                    Err(error)
                        if matches!(
                            error.raw_os_error(),
                            Some(
                                libc::ENOENT
                                    | libc::ESRCH
                                    | libc::EAFNOSUPPORT
                                    | libc::EOPNOTSUPP
                                    | libc::ENODEV
                            )
                        ) => {}
                    result => result?,
                }
            }
        }
        Ok(())
    })?
}

/// Lists the routing rules of both families. A kernel without policy routing returns an error.
pub(super) fn list_rules() -> io::Result<()> {
    for (family, name) in [
        (AddressFamily::Inet, "IPv4"),
        (AddressFamily::Inet6, "IPv6"),
    ] {
        let mut message = RuleMessage::default();
        message.header.family = family;
        Netlink::open()?
            .request(RouteNetlinkMessage::GetRule(message), NLM_F_DUMP)
            .map_err(|error| {
                io::Error::new(error.kind(), format!("{name} route rules: {error}"))
            })?;
    }
    Ok(())
}

fn lacks_ipv6(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::EACCES | libc::ENODEV | libc::EINVAL)
    )
}

fn loopback_up() -> netlink_packet_route::link::LinkMessage {
    use netlink_packet_route::link::{LinkFlags, LinkMessage};
    let mut message = LinkMessage::default();
    message.header.index = LOOPBACK_INDEX;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message
}

/// `ip route add local default dev lo table T`
fn local_route(family: AddressFamily) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family,
        table: RouteHeader::RT_TABLE_UNSPEC,
        protocol: RouteProtocol::Static,
        scope: RouteScope::Host,
        kind: RouteType::Local,
        ..RouteHeader::default()
    };
    message.attributes = vec![
        RouteAttribute::Table(ORIGINAL_SOURCE_TABLE),
        RouteAttribute::Oif(LOOPBACK_INDEX),
    ];
    message
}

/// `ip rule add fwmark M lookup T pref P`
fn mark_rule(family: AddressFamily) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family;
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(RULE_PREFERENCE),
        RuleAttribute::FwMark(ORIGINAL_SOURCE_MARK),
        RuleAttribute::FwMask(u32::MAX),
        RuleAttribute::Table(ORIGINAL_SOURCE_TABLE),
    ];
    message
}

/// A route netlink socket of the netns in which it was opened.
struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let (answer, _) = self.socket.recv_from_full()?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
            .map_err(|error| io::Error::other(error.to_string()))?;
        match answer.payload {
            NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
            _ => Ok(()),
        }
    }
}
