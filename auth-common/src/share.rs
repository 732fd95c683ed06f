//! The share that each netns has of the maps that record connections under way: PENDING, ADMITTED and DELIVERIES.

/// Maximum number of entries in each of those maps.
pub const MAX_PENDING: u32 = 262_144;
/// Number of netns whose full shares fit into a map. By default a kubelet runs at most 110 pods.
pub const SHARES: u32 = 128;
/// Maximum number of connections under way for each netns, in each direction. A connection is under way from before its SYN
/// leaves until the server's socket is established.
pub const SHARE: u32 = MAX_PENDING / SHARES;

/// What a netns uses of its share: the value of the SHARES map, whose key is the netns cookie. There is an entry for each
/// enrolled pod, and for the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Share {
    /// Connections that the netns makes: its entries in PENDING and ADMITTED.
    pub connects: Usage,
    /// Connections that the daemon makes from the netns to another pod's app, and that the node makes: entries in DELIVERIES.
    pub deliveries: Usage,
}

/// What a netns uses of its share in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Usage {
    /// Number of entries.
    pub entries: i64,
    /// Number of connections that were refused because there were [`SHARE`] entries.
    pub refused: u64,
}
