//! Connections that a pod has forwarded to network namespaces nested in it.

use std::{collections::HashSet, io};

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
    /// Lists the connections from outside that the pod forwards to apps in network namespaces nested in it, whoever makes them.
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
            let mut connections = match self.contains(&netns) {
                Ok(true) => flows::accepted(&netns, &[])?,
                // It may be on its way out.
                Ok(false) | Err(_) => continue,
            };
            let is_outside = |connection: &Accepted| self.is_outside(connection, &leading_out);
            connections.retain(|connection| is_outside(connection).unwrap_or(true));
            if !connections.is_empty() {
                found.push(Nested { netns, connections });
            }
        }
        Ok(Some(found))
    }

    /// Whether an interface leads from `netns` to the pod's netns.
    fn contains(&self, netns: &Netns) -> io::Result<bool> {
        let outer = [self.netns.try_clone_file()?];
        match netns.enter(|| Interfaces::list(&outer, &[]))? {
            // One of the interfaces beyond the limit may lead there.
            Err(error) if error.kind() == io::ErrorKind::QuotaExceeded => Ok(true),
            interfaces => Ok(!interfaces?.leading_out.is_empty()),
        }
    }

    /// Whether the caller is neither the pod itself nor in a netns nested in it.
    fn is_outside(&self, connection: &Accepted, leading_out: &HashSet<u32>) -> io::Result<bool> {
        let caller = connection.peer.ip();
        let route = self.netns.enter(|| Netlink::open()?.route(caller))??;
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
