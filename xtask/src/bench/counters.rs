//! What proxies count, and what a load has moved.

/// What a sidecar or a ztunnel has counted since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    /// Under TLS, to its pods.
    pub(super) inbound: Moved,
    /// Connections of its pods to the rest of the world.
    pub(super) passed: u64,
}

/// What a load has moved at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moved {
    /// Connections that came about.
    pub(super) connections: u64,
    /// Bytes that arrived, both ways together.
    pub(super) bytes: u64,
}
