//! The maps. The daemon pins them, and the next daemon adopts them.
//!
//! The maps allocate memory as they fill, except for the bucket arrays of the hashes (4 MiB each for PENDING, DELIVERIES
//! and ADMITTED, 2 MiB for VERDICTS), the ring buffer EVENTS (1 MiB), REPORTED (1 MiB) and UNREAD (0.5 MiB).

use core::ffi::c_void;

use auth_common::{
    Closed, Dialled, EVENT_BYTES, Exposed, FIRST_SOCKET_BYTES, FLOW_CLOSED, FirstSocket, Flow,
    MAX_EXPOSED, MAX_OUTSIDE, MAX_PENDING, MAX_PODS, MAX_PROVEN_NODES, MAX_REPORTED, MAX_VERDICTS,
    NEIGHBOUR, NODE_CONNECT, Node, Pod, Share, SocketKey, SocketOrigin, Unread, Verdict,
};
use aya_ebpf::{
    bindings::{
        BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE,
        bpf_map_type::BPF_MAP_TYPE_SK_STORAGE,
    },
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf, SkStorage},
    helpers::generated::bpf_sk_storage_get,
    macros::btf_map,
};

pub use crate::shared::{ADMITTED, DELIVERIES, mesh_kind};
use crate::{context::SocketContext, shared::ON_DEMAND};

/// Enrolled pods by netns cookie.
#[btf_map]
pub static PODS: HashMap<u64, Pod, { MAX_PODS as usize }, ON_DEMAND> = HashMap::new();

/// What the node and each enrolled pod use of their shares, by netns cookie: see [`crate::shares`].
#[btf_map]
pub static SHARES: HashMap<u64, Share, { 2 * MAX_PODS as usize }, ON_DEMAND> = HashMap::new();

/// Netns of pods outside the mesh, by cookie. The value is always 1.
#[btf_map]
pub static OUTSIDE: HashMap<u64, u32, { MAX_OUTSIDE as usize }, ON_DEMAND> = HashMap::new();

/// On sockets that pods create or listen on in a netns without a verdict: the netns' cookie. It stays when there is one.
#[btf_map]
pub static UNDECIDED: SkStorage<u64> = SkStorage::new();

/// Ports at which pods and services of the mesh are exposed. The value is always 1.
#[btf_map]
pub static EXPOSED: HashMap<Exposed, u32, { MAX_EXPOSED as usize }, ON_DEMAND> = HashMap::new();

/// Nodes that have, or once had, a ready daemon: a hash of the name, and when that was noted. No program reads it: it is
/// here because the pinned maps survive the daemon.
#[btf_map]
pub static PROVEN_NODES: HashMap<[u8; 16], u64, { MAX_PROVEN_NODES as usize }, ON_DEMAND> =
    HashMap::new();

/// Destinations of captured connections that are not established yet. Only programs write here.
#[btf_map]
pub static PENDING: HashMap<SocketKey, Dialled, { MAX_PENDING as usize }, ON_DEMAND> =
    HashMap::new();

/// The same as storage of the app's socket, for as long as the socket exists: `getpeername` returns it.
#[btf_map]
pub static DIALLED: SkStorage<Dialled> = SkStorage::new();

/// The daemon's own sockets, which are never captured: `DIAL`, `DELIVERY` or `NEIGHBOUR`. Only a process with the map's file
/// descriptor can write here, so a pod cannot avoid capture as it could if a mark decided. Also the sockets with which the
/// node itself connects to a pod: `NODE_CONNECT`.
#[btf_map]
pub static BYPASS: SkStorage<u32> = SkStorage::new();

/// The daemon's listeners in pods, and the connections that they accept: what the app dialled, if the connection was captured,
/// else all zeros. The sweep for plaintext connections leaves them alone.
#[btf_map]
pub static OWN: InheritedStorage<Dialled> = InheritedStorage::new();

/// Socket storage that accepted sockets inherit from their listener (`BPF_F_CLONE`, Linux 5.4).
#[repr(C)]
pub struct InheritedStorage<T> {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: the fields only describe the map to the loader, and are never read.
unsafe impl<T> Sync for InheritedStorage<T> {}

impl<T> InheritedStorage<T> {
    const fn new() -> Self {
        Self {
            r#type: core::ptr::null(),
            key: core::ptr::null(),
            value: core::ptr::null(),
            max_entries: core::ptr::null(),
            map_flags: core::ptr::null(),
        }
    }
}

/// The daemon's verdicts on connections between two pods of this node, by the client's netns and the dialled destination.
#[btf_map]
pub static VERDICTS: HashMap<SocketKey, Verdict, { MAX_VERDICTS as usize }, ON_DEMAND> =
    HashMap::new();

/// When VERDICTS expire, in nanoseconds of `CLOCK_MONOTONIC`. A running daemon renews it.
#[btf_map]
pub static LEASE: Array<u64, 1> = Array::new();

/// State of such a connection, as storage of both ends' sockets. Removed with the socket, or when the app dials again.
#[btf_map]
pub static FLOWS: SkStorage<Flow> = SkStorage::new();

/// Events of closed ends, for the daemon's access log.
#[btf_map]
pub static EVENTS: RingBuf<Closed, { EVENT_BYTES as usize }> = RingBuf::new();

/// Each pod's share of EVENTS, by netns cookie: see [`crate::shares::admits_event`].
#[btf_map]
pub static UNREAD: LruHashMap<u64, Unread, { MAX_PODS as usize }> = LruHashMap::new();

/// Number of closed ends without an event, because the ring buffer was full or memory was short.
#[btf_map]
pub static LOST: PerCpuArray<u64, 1> = PerCpuArray::new();

/// Events of sockets created in a netns that is not an enrolled pod's. The daemon then scans for the pod.
#[btf_map]
pub static FIRST_SOCKETS: RingBuf<FirstSocket, { FIRST_SOCKET_BYTES as usize }> = RingBuf::new();

/// Time of the last event for each origin of such sockets.
#[btf_map]
pub static REPORTED: LruHashMap<SocketOrigin, u64, { MAX_REPORTED as usize }> = LruHashMap::new();

/// The destination that the app dialled on the context's socket, if the connection was captured.
#[inline(always)]
pub fn dialled(ctx: &impl SocketContext) -> Option<&Dialled> {
    // SAFETY: entries are written before the connection begins, and not changed while it exists.
    unsafe { storage(&DIALLED, ctx, 0).as_ref() }
}

/// The node's settings, and what tells its own processes from its pods. Written by the daemon.
#[btf_map]
pub static NODE: Array<Node, 1> = Array::new();

/// Whether the inbound program is to admit the connection of the context's socket: the daemon's to another pod's app, or the
/// node's own to a pod.
#[inline(always)]
pub fn is_admitted(ctx: &impl SocketContext) -> bool {
    // SAFETY: a single word, written before the socket connects.
    unsafe { storage(&BYPASS, ctx, 0).as_ref() }
        .is_some_and(|kind| *kind == NEIGHBOUR || *kind == NODE_CONNECT)
}

/// The state of the context's socket, if it is an open end of a connection between two pods of this node.
///
/// # Safety
///
/// The program must hold no other reference to the entry.
#[inline(always)]
pub unsafe fn flow<'a>(ctx: &impl SocketContext) -> Option<&'a mut Flow> {
    // SAFETY: the caller's promise.
    unsafe { flow_or_closed(ctx) }.filter(|flow| flow.role != FLOW_CLOSED)
}

/// As [`flow`], also for an end that has closed.
///
/// # Safety
///
/// As for [`flow`].
#[inline(always)]
pub unsafe fn flow_or_closed<'a>(ctx: &impl SocketContext) -> Option<&'a mut Flow> {
    // SAFETY: programs of one socket do not run at the same time, and the caller holds no other reference.
    unsafe { storage(&FLOWS, ctx, 0).as_mut() }
}

/// As [`flow_or_closed`]; a missing entry is created with all zeros. `None` if memory is short.
///
/// # Safety
///
/// As for [`flow`].
#[inline(always)]
pub unsafe fn new_flow<'a>(ctx: &impl SocketContext) -> Option<&'a mut Flow> {
    // SAFETY: as in `flow_or_closed`.
    unsafe { storage(&FLOWS, ctx, BPF_SK_STORAGE_GET_F_CREATE.into()).as_mut() }
}

/// Where the connection that the daemon's listener accepts on the context's socket notes what the app dialled. Null if the
/// listener is not the daemon's.
#[inline(always)]
pub fn accepted_by_daemon(ctx: &impl SocketContext) -> *mut Dialled {
    storage_in(core::ptr::from_ref(&OWN).cast(), ctx, 0).cast()
}

/// The entry of the context's socket in `map`; null if there is none.
#[inline(always)]
pub fn storage<T>(map: &'static SkStorage<T>, ctx: &impl SocketContext, flags: u64) -> *mut T {
    storage_in(core::ptr::from_ref(map).cast(), ctx, flags).cast()
}

#[inline(always)]
fn storage_in(map: *const c_void, ctx: &impl SocketContext, flags: u64) -> *mut c_void {
    let socket = ctx.socket();
    if socket.is_null() {
        return core::ptr::null_mut();
    }
    let map = map.cast_mut();
    // SAFETY: the kernel passed the socket to the program. With the create flag and no value, a new entry is all zeros.
    unsafe { bpf_sk_storage_get(map.cast(), socket.cast(), core::ptr::null_mut(), flags).cast() }
}
