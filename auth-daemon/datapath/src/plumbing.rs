//! Routes and sysctls that let the daemon connect from a client's address inside the server pod's netns, and that keep
//! the pod from forwarding unjudged connections, without netfilter rules.
//!
//! The daemon connects to the pod's app from the client's address, with a firewall mark. The app replies to that
//! address, which is not the pod's own. The replies inherit the mark: through `tcp_fwmark_accept` for connections, and
//! through `fwmark_reflect` for the RSTs and ICMP errors that the kernel sends without a connection. A rule routes
//! marked packets to the loopback, where the daemon's socket is. Marks do not cross the border of a netns, so nothing
//! from outside carries one.
//!
//! Packets that the `forward` program has marked belong to a connection to the pod. Those for another address than the pod's
//! own, which the pod would forward, are routed to the loopback, too: the `inbound` program judges them. A socket that they
//! reach inherits the mark: another rule exempts what sockets send.

use std::{fs, io, ops::ControlFlow};

use auth_common::{FORWARD_MARK, ORIGINAL_SOURCE_MARK, ORIGINAL_SOURCE_TABLE};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};

use super::{
    Netns, forwarding,
    netlink::{self, Netlink},
};

/// Sysctls switched on in each pod's netns. Their order is stored in pinned maps: only append.
const SYSCTLS: [&str; 3] = [
    "/proc/sys/net/ipv4/tcp_fwmark_accept",
    "/proc/sys/net/ipv4/fwmark_reflect",
    "/proc/sys/net/ipv6/fwmark_reflect",
];
const RULE_PREFERENCE: u32 = 100;
const FORWARD_PREFERENCE: u32 = 99;
const FORWARD_EXEMPTION_PREFERENCE: u32 = 98;
/// Maximum number of rules that may precede those of [`set_up`] although none of them leads packets elsewhere. The kernel
/// and the daemon have three. A pod can add a million more, and nobody reads them all.
const MAX_PRECEDING: usize = 64;
const LOOPBACK: &str = "lo";
const LOOPBACK_INDEX: u32 = 1;

/// What [`set_up`] did.
#[derive(Debug, Default)]
pub(super) struct SetUp {
    /// Bit mask of the sysctls that were switched on, for [`tear_down`].
    pub(super) switched_on: u32,
    /// What was missing: sysctls, routes and rules.
    pub(super) missing: Vec<&'static str>,
}

/// Sets up `netns`. Idempotent.
pub(super) fn set_up(netns: &Netns) -> io::Result<SetUp> {
    netns.enter(|| {
        let mut done = SetUp::default();
        for (bit, path) in SYSCTLS.into_iter().enumerate() {
            let named = |error: io::Error| io::Error::new(error.kind(), format!("{path}: {error}"));
            match fs::read_to_string(path) {
                Ok(value) if value.trim() == "0" => {
                    fs::write(path, "1").map_err(named)?;
                    done.switched_on |= 1 << bit;
                    done.missing.push(path);
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
            let is_v4 = family == AddressFamily::Inet;
            let named = |v4: &'static str, v6: &'static str| if is_v4 { v4 } else { v6 };
            for (message, name) in [
                (
                    RouteNetlinkMessage::NewRoute(local_route(family)),
                    named("IPv4 route", "IPv6 route"),
                ),
                (
                    RouteNetlinkMessage::NewRule(mark_rule(family)),
                    named("IPv4 rule", "IPv6 rule"),
                ),
                (
                    RouteNetlinkMessage::NewRule(forward_exemption_rule(family)),
                    named("IPv4 forwarding exemption", "IPv6 forwarding exemption"),
                ),
                (
                    RouteNetlinkMessage::NewRule(forward_rule(family)),
                    named("IPv4 forwarding rule", "IPv6 forwarding rule"),
                ),
            ] {
                match netlink.request(message, flags) {
                    Ok(()) => done.missing.push(name),
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    // Without IPv6, or with IPv6 disabled in this netns, it is not needed.
                    Err(error) if family == AddressFamily::Inet6 && lacks_ipv6(&error) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(done)
    })?
}

/// Whether a rule in `netns` precedes those of [`set_up`]: it may lead packets elsewhere. The pod has made it.
pub(super) fn is_preceded(netns: &Netns) -> io::Result<bool> {
    netns.enter(|| {
        if has_preceding(AddressFamily::Inet)? {
            return Ok(true);
        }
        match has_preceding(AddressFamily::Inet6) {
            Err(error) if lacks_ipv6(&error) => Ok(false),
            found => found,
        }
    })?
}

/// [`is_preceded`] for one family, in the current netns.
fn has_preceding(family: AddressFamily) -> io::Result<bool> {
    let mut message = RuleMessage::default();
    message.header.family = family;
    let mut seen = 0;
    let decided = netlink::dump(RouteNetlinkMessage::GetRule(message), |answer| {
        let RouteNetlinkMessage::NewRule(rule) = answer else {
            return ControlFlow::Continue(());
        };
        // The kernel lists them by their preference.
        if preference(&rule) >= RULE_PREFERENCE {
            return ControlFlow::Break(false);
        }
        seen += 1;
        if precedes(&rule) || seen > MAX_PRECEDING {
            return ControlFlow::Break(true);
        }
        ControlFlow::Continue(())
    })?;
    Ok(decided == ControlFlow::Break(true))
}

fn precedes(rule: &RuleMessage) -> bool {
    let is_marked = |mark| rule.attributes.contains(&RuleAttribute::FwMark(mark));
    match preference(rule) {
        // The kernel's own, for the local table.
        0 => rule.header.table != libc::RT_TABLE_LOCAL,
        FORWARD_PREFERENCE | FORWARD_EXEMPTION_PREFERENCE => !is_marked(FORWARD_MARK),
        preference => preference < RULE_PREFERENCE,
    }
}

fn preference(rule: &RuleMessage) -> u32 {
    let mut attributes = rule.attributes.iter();
    let preference = attributes.find_map(|attribute| match attribute {
        RuleAttribute::Priority(preference) => Some(*preference),
        _ => None,
    });
    // The kernel leaves it out if it is 0.
    preference.unwrap_or_default()
}

/// Undoes [`set_up`] in `netns`. It is not an error if it is already undone.
pub(super) fn tear_down(netns: &Netns, switched_on: u32) -> io::Result<()> {
    netns.enter(|| {
        for (bit, path) in SYSCTLS.into_iter().enumerate() {
            if switched_on & 1 << bit != 0 {
                fs::write(path, "0")?;
            }
        }
        forwarding::detach_filters()?;
        let mut netlink = Netlink::open()?;
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            for message in [
                RouteNetlinkMessage::DelRule(forward_rule(family)),
                RouteNetlinkMessage::DelRule(forward_exemption_rule(family)),
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
    lookup_rule(family, RULE_PREFERENCE, ORIGINAL_SOURCE_MARK)
}

fn lookup_rule(family: AddressFamily, preference: u32, mark: u32) -> RuleMessage {
    let mut message = rule(family, preference, mark);
    message.header.action = RuleAction::ToTable;
    message
        .attributes
        .push(RuleAttribute::Table(ORIGINAL_SOURCE_TABLE));
    message
}

/// `ip rule add fwmark M lookup T pref P`. The local table precedes it.
fn forward_rule(family: AddressFamily) -> RuleMessage {
    lookup_rule(family, FORWARD_PREFERENCE, FORWARD_MARK)
}

/// `ip rule add fwmark M iif lo goto G pref P`: packets of the pod's own sockets skip [`forward_rule`].
fn forward_exemption_rule(family: AddressFamily) -> RuleMessage {
    let mut message = rule(family, FORWARD_EXEMPTION_PREFERENCE, FORWARD_MARK);
    message.header.action = RuleAction::Goto;
    message.attributes.extend([
        RuleAttribute::Iifname(LOOPBACK.into()),
        RuleAttribute::Goto(RULE_PREFERENCE),
    ]);
    message
}

fn rule(family: AddressFamily, preference: u32, mark: u32) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family;
    message.attributes = vec![
        RuleAttribute::Priority(preference),
        RuleAttribute::FwMark(mark),
        RuleAttribute::FwMask(u32::MAX),
    ];
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More than a few parts of a list.
    const MANY: usize = 2000;

    /// Adds [`MANY`] rules with `preference` that lead to `table`.
    fn add_rules(netns: &Netns, preference: u32, table: u8) {
        let added = netns.enter(|| {
            let mut netlink = Netlink::open()?;
            for mark in 1..=MANY as u32 {
                let mut message = rule(AddressFamily::Inet, preference, mark);
                message.header.action = RuleAction::ToTable;
                message.header.table = table;
                netlink.request(RouteNetlinkMessage::NewRule(message), NLM_F_CREATE)?;
            }
            io::Result::Ok(())
        });
        added.unwrap().unwrap();
    }

    /// A new netns that is set up. `None` if `test` is skipped, because it does not run as root.
    fn prepared(test: &str) -> Option<Netns> {
        if crate::lacks_root(test) {
            return None;
        }
        let netns = Netns::create().unwrap();
        set_up(&netns).unwrap();
        Some(netns)
    }

    #[test]
    fn rules_that_follow_are_not_in_the_way_however_many() {
        let Some(netns) = prepared("rules_that_follow_are_not_in_the_way_however_many") else {
            return;
        };
        assert!(!is_preceded(&netns).unwrap());
        add_rules(&netns, RULE_PREFERENCE + 1, libc::RT_TABLE_MAIN);
        assert!(!is_preceded(&netns).unwrap());
    }

    #[test]
    fn one_of_many_rules_that_precede_is_enough() {
        let Some(netns) = prepared("one_of_many_rules_that_precede_is_enough") else {
            return;
        };
        add_rules(&netns, RULE_PREFERENCE - 50, libc::RT_TABLE_MAIN);
        assert!(is_preceded(&netns).unwrap());
        assert!(set_up(&netns).unwrap().missing.is_empty());
    }

    #[test]
    fn rules_that_hide_others_precede() {
        let Some(netns) = prepared("rules_that_hide_others_precede") else {
            return;
        };
        // Each is like the kernel's own.
        add_rules(&netns, 0, libc::RT_TABLE_LOCAL);
        assert!(is_preceded(&netns).unwrap());
    }
}
