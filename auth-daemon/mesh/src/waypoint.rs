//! Waypoints: proxies of an Istio mesh that all traffic of a workload or service goes through.

use std::{fmt, net::IpAddr};

use super::ObjectName;

/// The proxy that all connections to a workload or service go through, by HBONE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waypoint {
    /// Where it is.
    pub at: WaypointAt,
    /// Its port for HBONE.
    pub port: u16,
}

/// Where a waypoint is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaypointAt {
    /// Behind an address of a service or pod.
    Address(IpAddr),
    /// Behind a service.
    Service(ObjectName),
}

impl fmt::Display for Waypoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.at {
            WaypointAt::Address(address) => write!(f, "{address}"),
            WaypointAt::Service(service) => write!(f, "{service}"),
        }
    }
}
