//! State of a pod on this node that its connections share.

use std::{
    collections::{BTreeMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    handshakes,
    outbound::hbone::Charged,
    shares::{Capacity, Permit, Share},
    work::Work,
};
use crate::issuer::Certificate;
use serde::Serialize;

use auth_datapath::{Enrolled, sockets::SourcePorts};
use auth_mesh::Workload;
use auth_support::connection_limit::ConnectionLimit;
use auth_tunnel::{Pool, hbone};

/// An enrolled pod.
#[derive(Debug)]
pub struct Pod {
    /// The pod as discovery reports it.
    pub workload: Workload,
    /// The pod's state in the kernel.
    pub enrolled: Enrolled,
    /// Certificate of the pod's identity.
    pub certificate: Arc<Certificate>,
    /// Idle tunnels of the pod's connections.
    pub(crate) pool: Pool<Permit>,
    /// The HBONE connections that the pod's connections share.
    pub(crate) hbone: hbone::Pool<Charged>,
    pub(crate) source_ports: SourcePorts,
    /// What the pod's connections take of the daemon's capacity: those that it opens, and idle tunnels.
    pub(crate) outbound: Arc<Share>,
    /// What the connections to the pod take.
    pub(crate) inbound: Arc<Share>,
    pub(crate) handshakes: Arc<ConnectionLimit>,
    /// What the data path does for the connections that the pod opens.
    pub(crate) outbound_work: Arc<Work>,
    /// What it does for the connections to the pod.
    pub(crate) inbound_work: Arc<Work>,
    tunnels: Mutex<HashSet<(SocketAddr, u16)>>,
}

impl Pod {
    pub(crate) fn new(
        workload: Workload,
        enrolled: Enrolled,
        certificate: Arc<Certificate>,
        capacity: &Arc<Capacity>,
    ) -> Self {
        Self {
            workload,
            enrolled,
            certificate,
            pool: Pool::default(),
            hbone: hbone::Pool::default(),
            source_ports: SourcePorts::default(),
            outbound: Share::of(capacity),
            inbound: Share::of(capacity),
            handshakes: Arc::new(ConnectionLimit::new(
                handshakes::MAX,
                handshakes::MAX_PER_SOURCE,
            )),
            outbound_work: Arc::default(),
            inbound_work: Arc::default(),
            tunnels: Mutex::default(),
        }
    }

    /// Records a tunnel from `peer` to this pod's `port`, until the guard is dropped.
    pub(crate) fn note_tunnel(&self, peer: SocketAddr, port: u16) -> TunnelNote<'_> {
        self.tunnels().insert((peer, port));
        TunnelNote {
            pod: self,
            key: (peer, port),
        }
    }

    /// Whether `client` may be the source of a connection to the app on `port`. It may not if a tunnel has the same
    /// 4-tuple, because the tunnel would receive the connection's packets.
    pub(crate) fn is_free(&self, client: SocketAddr, port: u16) -> bool {
        !SourcePorts::contain(client.port()) || !self.tunnels().contains(&(client, port))
    }

    fn tunnels(&self) -> std::sync::MutexGuard<'_, HashSet<(SocketAddr, u16)>> {
        self.tunnels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Guard returned by [`Pod::note_tunnel`].
pub(crate) struct TunnelNote<'a> {
    pod: &'a Pod,
    key: (SocketAddr, u16),
}

impl Drop for TunnelNote<'_> {
    fn drop(&mut self) {
        self.pod.tunnels().remove(&self.key);
    }
}

/// A pod of this node, for `auth-daemon status`.
#[derive(Clone, Debug, Serialize)]
pub struct PodStatus {
    /// Namespace and name.
    pub pod: String,
    /// Its SPIFFE ID.
    pub identity: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its network namespace.
    pub netns: String,
    /// The process by which its network namespace was found, and why that is the pod's own. Empty if a manifest names it.
    #[serde(rename = "foundBy", skip_serializing_if = "String::is_empty")]
    pub found_by: String,
    /// Whether the daemon handles its connections.
    pub enrolled: bool,
    /// Why the pod is not enrolled, or why it is although it has ended. Empty otherwise.
    pub reason: String,
    /// What the pod has changed of the daemon's set-up in its netns, which the daemon has restored. Empty if nothing.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub tampered: String,
    /// Why its link is not private, so that its connections with pods of this node use the tunnel. Empty if it is, or if all
    /// use it.
    #[serde(rename = "sharedLink", skip_serializing_if = "String::is_empty")]
    pub shared_link: String,
    /// Number of connections that were refused because the pod had as many under way as its share of the kernel's maps.
    #[serde(rename = "overShare", skip_serializing_if = "is_zero")]
    pub over_share: u64,
    /// Number of idle tunnels.
    #[serde(rename = "idleTunnels")]
    pub idle_tunnels: usize,
    /// Number of connections that were refused because the pod or a peer took more than its share, by reason.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub refused: BTreeMap<&'static str, u64>,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}
