//! Connections that a pod has forwarded to network namespaces nested in it.

use std::{collections::HashSet, io, net::IpAddr};

use super::{
    Accepted, Enrolled, Netns, flows,
    interfaces::Interfaces,
    netlink::Netlink,
    netns::{self, open_the_nodes},
};

/// A network namespace nested in a pod, and the connections from outside that apps in it have accepted.
#[derive(Debug)]
pub struct Nested {
    netns: Netns,
    /// The connections, with the addresses that the app sees.
    pub connections: Vec<Accepted>,
}

impl Enrolled {
    /// Lists all connections from outside that the pod forwards to apps in network namespaces nested in it.
    /// Enters each netns of the node, unless the pod has no interface that may lead to a nested one. `None` while the pod may
    /// still forward new ones, although [`Enrolled::admit`] was called to prevent that.
    pub fn forwarded(&self) -> io::Result<Option<Vec<Nested>>> {
        match self.forwarding.has_nested() {
            Some(true) => {}
            Some(false) => return Ok(Some(Vec::new())),
            None => return Ok(None),
        }
        let nodes = open_the_nodes();
        let pod = || Interfaces::list(&nodes, self.addresses());
        let interfaces = self.netns.enter(pod)??;
        let leading_out = interfaces.leading_out.iter();
        let leading_out = leading_out.map(|interface| interface.index).collect();
        let mut found = Vec::new();
        for netns in netns::all() {
            if netns.is_the_nodes() || netns.cookie() == self.netns.cookie() {
                continue;
            }
            let contained = match self.contains(&netns) {
                // It may be about to disappear.
                Ok(Some(false)) | Err(_) => continue,
                Ok(contained) => contained.is_some(),
            };
            let mut connections = flows::accepted(&netns, &[])?;
            let leads_out = |address: IpAddr| self.leads_out(address, &leading_out);
            // If it may be the netns of others, these are only the ones that the pod would forward.
            connections.retain(|connection| {
                (contained || !leads_out(connection.local.ip()).unwrap_or(false))
                    && leads_out(connection.peer.ip()).unwrap_or(true)
            });
            if !connections.is_empty() {
                found.push(Nested { netns, connections });
            }
        }
        Ok(Some(found))
    }

    /// Whether an interface leads from `netns` to the pod's netns. `None` if it has too many to tell.
    fn contains(&self, netns: &Netns) -> io::Result<Option<bool>> {
        let outer = [self.netns.try_clone_file()?];
        match netns.enter(|| Interfaces::list(&outer, &[]))? {
            Err(error) if error.kind() == io::ErrorKind::QuotaExceeded => Ok(None),
            interfaces => Ok(Some(!interfaces?.leading_out.is_empty())),
        }
    }

    /// Whether what the pod sends to `address` leaves it, and does not go to a netns nested in it or to the pod itself.
    fn leads_out(&self, address: IpAddr, leading_out: &HashSet<u32>) -> io::Result<bool> {
        let route = self.netns.enter(|| Netlink::open()?.route(address))??;
        Ok(!route.is_local
            && route
                .interface
                .is_none_or(|index| leading_out.contains(&index)))
    }
}

impl Nested {
    /// Ends the connections with a RST to both ends. Returns the number of those that still existed.
    pub fn end(&self) -> io::Result<usize> {
        flows::end_all(&self.netns, &self.connections)
    }
}
