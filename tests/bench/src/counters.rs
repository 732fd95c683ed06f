//! The proxies' counters, and what a load has transferred.

/// What a sidecar or a ztunnel has counted since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    /// Connections under TLS, to its pods.
    pub(super) inbound: Moved,
    /// Connections of its pods to hosts outside of the mesh.
    pub(super) passed: u64,
}

/// The minimum that a load has transferred.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moved {
    /// Established connections.
    pub(super) connections: u64,
    /// Bytes that arrived, in both directions together.
    pub(super) bytes: u64,
}
