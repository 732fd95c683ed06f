//! Keeps a pod from forwarding connections that nobody judged, to network namespaces nested in it: attaches the `forward`
//! program to the interfaces that lead out of the pod's netns. See auth-ebpf's `forward.rs`, and the rules in `plumbing`.
//!
//! From Linux 6.6 on the program is attached as a tcx link, which is pinned and ends with the pin. Older kernels attach it as
//! a filter of the interface, which stays until it is removed.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    net::IpAddr,
    os::fd::AsRawFd,
    path::Path,
    sync::{Mutex, OnceLock},
    time::{Duration, Instant},
};

use aya::programs::{
    LinkOrder, ProgramError, SchedClassifier, TcAttachType,
    links::FdLink,
    tc::{
        NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
        qdisc_detach_program,
    },
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    nsid::{NsidAttribute, NsidMessage},
};

use super::{
    Kernel, KernelError, Netns, features,
    kernel::{lock, program, program_error, replace_pin},
    netns::open_the_nodes,
    plumbing::Netlink,
};

/// Name of the program.
pub(super) const PROGRAM: &str = "forward";
/// Minimum interval between two counts of refused packets.
const COUNT_INTERVAL: Duration = Duration::from_secs(10);
/// First kernel version with tcx links.
const TCX: (u32, u32) = (6, 6);
/// Priority and handle of the filter on older kernels.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 0x6d54);

/// Whether an enrolled netns forwards connections.
#[derive(Debug, Default)]
pub(super) struct Forwarding(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Reports changes of the interfaces.
    changes: Option<Netlink>,
    /// Interfaces with the program, by index.
    attached: HashSet<u32>,
    /// Whether there are interfaces to nested namespaces.
    has_nested: bool,
    /// Whether the netns refuses to forward, and for which addresses of the pod, as of the last success.
    done: Option<(bool, Vec<IpAddr>)>,
    /// Number of packets that the netns had refused when that was last counted.
    refused: u64,
    counted: Option<Instant>,
}

/// An interface that leads out of a netns.
struct Interface {
    index: u32,
    name: String,
}

impl Forwarding {
    /// Lets the netns forward connections from outside to namespaces nested in it, or not. Idempotent and cheap: without a
    /// change of the interfaces since the last call it does nothing. `addresses` are the pod's.
    pub(super) fn keep(
        &self,
        kernel: &Kernel,
        netns: &Netns,
        addresses: &[IpAddr],
        refuses: bool,
    ) -> Result<(), KernelError> {
        let mut state = lock(&self.0);
        let failed = |error| KernelError::Interfaces {
            netns: netns.path().to_owned(),
            error,
        };
        if state.changes.is_none() {
            // Before the interfaces are listed, so that none is missed.
            state.changes = Some(
                netns
                    .enter(Netlink::watch_links)
                    .flatten()
                    .map_err(failed)?,
            );
        }
        let changed = state.changes.as_mut().is_some_and(Netlink::drain);
        let is_done = |done: &(bool, Vec<IpAddr>)| done.0 == refuses && done.1 == addresses;
        if !changed && state.done.as_ref().is_some_and(is_done) {
            return Ok(());
        }
        state.done = None;
        if !refuses {
            kernel.detach_forward(netns)?;
            state.attached.clear();
        } else {
            let nodes = open_the_nodes();
            let (interfaces, has_nested) = netns
                .enter(|| leading_out(&nodes, addresses))
                .flatten()
                .map_err(failed)?;
            if state.attached.is_empty() {
                // Not what was refused before for other reasons.
                state.refused = netns.enter(packets_without_route).map_err(failed)?;
            }
            state.has_nested = has_nested;
            for interface in interfaces {
                if !state.attached.contains(&interface.index) {
                    kernel.attach_forward(netns, &interface)?;
                    state.attached.insert(interface.index);
                }
            }
        }
        state.done = Some((refuses, addresses.to_vec()));
        Ok(())
    }

    /// Number of packets that the netns has refused to forward since it was last counted. It is counted only where there are
    /// nested namespaces, and once in [`COUNT_INTERVAL`].
    pub(super) fn refused(&self, netns: &Netns) -> u64 {
        let mut state = lock(&self.0);
        let is_recent = state
            .counted
            .is_some_and(|at| at.elapsed() < COUNT_INTERVAL);
        let refuses = state.done.as_ref().is_some_and(|(refuses, _)| *refuses);
        if !refuses || !state.has_nested || is_recent {
            return 0;
        }
        state.counted = Some(Instant::now());
        match netns.enter(packets_without_route) {
            Ok(count) => count.saturating_sub(std::mem::replace(&mut state.refused, count)),
            Err(_) => 0,
        }
    }
}

impl Kernel {
    /// Attaches the forward program to an interface of `netns`, and replaces the one that a previous daemon attached.
    fn attach_forward(&self, netns: &Netns, interface: &Interface) -> Result<(), KernelError> {
        let mut ebpf = lock(&self.programs);
        let program: &mut SchedClassifier = program(&mut ebpf, PROGRAM)?;
        let link = netns
            .enter(|| attach(program, &interface.name))
            .map_err(ProgramError::from)
            .flatten()
            .map_err(program_error(PROGRAM))?;
        match link {
            Some(link) => {
                let pin = format!("{}-{}", netns.cookie(), interface.index);
                replace_pin(&self.interface_pins(), &pin, link)
            }
            None => Ok(()),
        }
    }

    /// Undoes [`Kernel::attach_forward`] for all interfaces of `netns`. It is not an error if it is already undone.
    fn detach_forward(&self, netns: &Netns) -> Result<(), KernelError> {
        unpin(&self.interface_pins(), netns.cookie());
        netns
            .enter(detach_filters)
            .flatten()
            .map_err(|error| KernelError::Interfaces {
                netns: netns.path().to_owned(),
                error,
            })
    }
}

/// Removes the pins of the links to interfaces of the netns with `cookie`, which ends the links.
pub(super) fn unpin(pins: &Path, cookie: u64) {
    let prefix = format!("{cookie}-");
    let pins = fs::read_dir(pins).into_iter().flatten();
    for pin in pins.flatten() {
        if pin.file_name().to_string_lossy().starts_with(&prefix) {
            let _ = fs::remove_file(pin.path());
        }
    }
}

/// Number of packets that arrived in the current netns and that it had no route for, of either family.
fn packets_without_route() -> u64 {
    let read =
        |name| fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
    let (netstat, snmp6) = (read("netstat"), read("snmp6"));
    let mut v4 = netstat
        .lines()
        .filter_map(|line| line.strip_prefix("IpExt: "));
    let v4 = v4.next().zip(v4.next()).and_then(|(names, values)| {
        let mut counters = names.split(' ').zip(values.split(' '));
        counters.find(|(name, _)| *name == "InNoRoutes")
    });
    let v6 = snmp6
        .lines()
        .filter_map(|line| line.split_once(char::is_whitespace))
        .find(|(name, _)| *name == "Ip6InNoRoutes");
    let counters = v4.into_iter().chain(v6);
    counters
        .filter_map(|(_, value)| value.trim().parse::<u64>().ok())
        .sum()
}

/// Attaches the program to an interface of the current netns. Returns the link to pin, if there is one to pin.
fn attach(program: &mut SchedClassifier, interface: &str) -> Result<Option<FdLink>, ProgramError> {
    if has_tcx() {
        // Before the pod's own programs, which could let a packet pass this one.
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = match program.attach_with_options(interface, TcAttachType::Ingress, options) {
            Ok(id) => id,
            // This daemon attached it before, for a pod that it could not serve. The link is pinned.
            Err(ProgramError::SyscallError(error))
                if error.io_error.kind() == io::ErrorKind::AlreadyExists =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let link = program.take_link(id)?.try_into();
        return link
            .map(Some)
            .map_err(|_| ProgramError::UnexpectedProgramType);
    }
    // It fails if the interface has it already. If it fails otherwise, so does what follows.
    let _ = qdisc_add_clsact(interface);
    let before =
        SchedClassifierLink::attached(interface, TcAttachType::Ingress, PRIORITY, HANDLE, None)?;
    // Replace the filter of a previous daemon without a gap, or else add one.
    let id = program.attach_to_link(before).or_else(|_| {
        let options = NlOptions {
            priority: PRIORITY,
            handle: HANDLE,
            classid: None,
        };
        program.attach_with_options(
            interface,
            TcAttachType::Ingress,
            TcAttachOptions::Netlink(options),
        )
    })?;
    // The filter outlives the daemon.
    std::mem::forget(program.take_link(id)?);
    Ok(None)
}

/// Removes the filters from all interfaces of the current netns, where links do not end with their pins.
pub(super) fn detach_filters() -> io::Result<()> {
    if has_tcx() {
        return Ok(());
    }
    for interface in nix::net::if_::if_nameindex()?.iter() {
        let name = interface.name().to_string_lossy();
        match qdisc_detach_program(&name, TcAttachType::Ingress, PROGRAM) {
            Ok(()) => {}
            // The interface has no such filter, or no filters at all.
            Err(TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => {}
            Err(TcError::NetlinkError(_)) => {}
            Err(error) => return Err(io::Error::other(error)),
        }
    }
    Ok(())
}

fn has_tcx() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| features::version() >= TCX)
}

/// Lists the interfaces of the current netns that lead out of it: whose other end, or lower device, is in the node's netns;
/// devices that are not virtual; and those with an address of the pod. What is left are the loopback and interfaces to nested
/// namespaces, whose own connections the pod may forward. Also returns whether there are any of the latter.
fn leading_out(nodes: &[File], addresses: &[IpAddr]) -> io::Result<(Vec<Interface>, bool)> {
    let mut netlink = Netlink::open()?;
    let links = netlink.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    // The kernel assigns numbers to other namespaces when it lists the links.
    let mut of_the_node = HashSet::new();
    for node in nodes {
        let mut message = NsidMessage::default();
        message.attributes = vec![NsidAttribute::Fd(node.as_raw_fd() as u32)];
        let answer = netlink.ask(RouteNetlinkMessage::GetNsId(message))?;
        if let RouteNetlinkMessage::NewNsId(answer) = answer {
            of_the_node.extend(answer.attributes.into_iter().filter_map(
                |attribute| match attribute {
                    NsidAttribute::Id(id) if id >= 0 => Some(id),
                    _ => None,
                },
            ));
        }
    }
    let mut holders: HashMap<String, Vec<IpAddr>> = HashMap::new();
    for interface in nix::ifaddrs::getifaddrs()? {
        let Some(storage) = interface.address else {
            continue;
        };
        let v4 = storage.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        let v6 = storage.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip()));
        holders
            .entry(interface.interface_name)
            .or_default()
            .extend(v4.or(v6));
    }
    let mut has_nested = false;
    let interfaces = links.into_iter().filter_map(|message| {
        let RouteNetlinkMessage::NewLink(link) = message else {
            return None;
        };
        if link.header.flags.contains(LinkFlags::Loopback) {
            return None;
        }
        let (mut name, mut is_virtual, mut other) = (None, false, None);
        for attribute in link.attributes {
            match attribute {
                LinkAttribute::IfName(text) => name = Some(text),
                LinkAttribute::LinkNetNsId(id) => other = Some(id),
                LinkAttribute::LinkInfo(info) => {
                    is_virtual = info.iter().any(|info| matches!(info, LinkInfo::Kind(_)));
                }
                _ => {}
            }
        }
        let name = name?;
        let holds = holders.get(&name);
        let leads_out = !is_virtual
            || other.is_some_and(|other| of_the_node.contains(&other))
            || holds.is_some_and(|held| held.iter().any(|held| addresses.contains(held)));
        has_nested |= !leads_out;
        leads_out.then_some(Interface {
            index: link.header.index,
            name,
        })
    });
    let interfaces = interfaces.collect();
    Ok((interfaces, has_nested))
}
