//! The share that each pod has of the ring buffer EVENTS.

/// A pod's events in EVENTS: the value of the UNREAD map, whose key is the netns cookie of the client. The events of both ends
/// of a connection count for its client, which made it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Unread {
    /// Number of events since the daemon had last read all of them.
    pub events: i64,
    /// Position in the ring behind the last of them.
    pub until: u64,
    /// Number of events that were left out because there were too many.
    pub lost: u64,
}
