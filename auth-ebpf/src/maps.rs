//! The maps, all pinned by the daemon and adopted by the next one. None takes its memory up front but for the bucket
//! arrays of the hashes (2 MiB each for PENDING, DELIVERIES, VERDICTS and ADMITTED), the ring of EVENTS (1 MiB) and TOLD
//! (1 MiB); the trie and the other hashes allocate as they fill.

use auth_common::{
    Address, Admitted, Closed, DELIVERY, Delivery, Dialled, EVENT_BYTES, FIRST_SOCKET_BYTES,
    FLOW_CLOSED, FirstSocket, Flow, MAX_MESH_ADDRESSES, MAX_PENDING, MAX_PODS, MAX_TOLD,
    MAX_VERDICTS, Pod, SocketKey, SocketOrigin, Verdict,
};
use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::{
        Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SkStorage, SockHash,
        lpm_trie::Key,
    },
    helpers::generated::bpf_sk_storage_get,
    macros::btf_map,
};

const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

/// Enrolled pods by netns cookie.
#[btf_map]
pub static PODS: HashMap<u64, Pod, { MAX_PODS as usize }, ON_DEMAND> = HashMap::new();

/// What each mesh address is: a `MeshKind`.
#[btf_map]
pub static MESH: LpmTrie<Address, u32, { MAX_MESH_ADDRESSES as usize }> = LpmTrie::new();

/// Captured connections that the daemon has not accepted yet, and where they were going.
#[btf_map]
pub static PENDING: HashMap<SocketKey, Dialled, { MAX_PENDING as usize }, ON_DEMAND> =
    HashMap::new();

/// The same on the app's own socket, for as long as it lives: what `getpeername` answers with.
#[btf_map]
pub static DIALLED: SkStorage<Dialled> = SkStorage::new();

/// The daemon's own sockets, which must never be captured. Only its file descriptor can write here, so no pod can
/// slip out by setting a mark.
#[btf_map]
pub static BYPASS: SkStorage<u32> = SkStorage::new();

/// Connections of the daemon to pods' own apps, until they stand: what the inbound program lets through.
#[btf_map]
pub static DELIVERIES: HashMap<Delivery, u32, { MAX_PENDING as usize }, ON_DEMAND> = HashMap::new();

/// Each enrolled pod's tunnel listener by the pod's address.
#[btf_map]
pub static TUNNELS: SockHash<Address, { 2 * MAX_PODS as usize }> = SockHash::new();

/// What each enrolled pod's address admits: an `Inbound`. Outlives the daemon, unlike TUNNELS, whose entries go with
/// their sockets: so a dead daemon's pods refuse.
#[btf_map]
pub static INBOUND: HashMap<Address, u32, { 2 * MAX_PODS as usize }, ON_DEMAND> = HashMap::new();

/// What the daemon decided on connections between two pods of this node: by the client's netns and what it dials.
#[btf_map]
pub static VERDICTS: HashMap<SocketKey, Verdict, { MAX_VERDICTS as usize }, ON_DEMAND> =
    HashMap::new();

/// Until when VERDICTS hold, by `CLOCK_MONOTONIC`, in nanoseconds. The daemon renews it for as long as it lives.
#[btf_map]
pub static LEASE: Array<u64, 1> = Array::new();

/// Connections under a verdict, from before their SYN leaves until the server's socket stands: what the inbound program
/// lets through.
#[btf_map]
pub static ADMITTED: HashMap<Delivery, Admitted, { MAX_VERDICTS as usize }, ON_DEMAND> =
    HashMap::new();

/// Both ends' sockets of such connections: it goes with them, or when they are dialled again.
#[btf_map]
pub static FLOWS: SkStorage<Flow> = SkStorage::new();

/// How they closed, for the daemon's log.
#[btf_map]
pub static EVENTS: RingBuf<Closed, { EVENT_BYTES as usize }> = RingBuf::new();

/// How many ends of connections will leave no line: the ring was full.
#[btf_map]
pub static LOST: PerCpuArray<u64, 1> = PerCpuArray::new();

/// Sockets made where no pod is known, for the daemon to look whose they are.
#[btf_map]
pub static FIRST_SOCKETS: RingBuf<FirstSocket, { FIRST_SOCKET_BYTES as usize }> = RingBuf::new();

/// When each origin of such sockets was told of last.
#[btf_map]
pub static TOLD: LruHashMap<SocketOrigin, u64, { MAX_TOLD as usize }> = LruHashMap::new();

/// What `address` is in the mesh; `None` for the world outside.
#[inline(always)]
pub fn mesh_kind(address: Address) -> Option<u32> {
    MESH.get(&Key::new(128, address)).copied()
}

/// What the app behind `sk` dialled, if that connection was captured.
///
/// # Safety
///
/// `sk` is a socket pointer that the kernel gave to this program's context.
#[inline(always)]
pub unsafe fn dialled<'a>(sk: *mut bpf_sock) -> Option<&'a Dialled> {
    // SAFETY: the caller's.
    unsafe { stored(&DIALLED, sk) }
}

/// Whether `sk` is a connection of the daemon's to a pod's own app.
///
/// # Safety
///
/// As for [`dialled`].
#[inline(always)]
pub unsafe fn is_delivery(sk: *mut bpf_sock) -> bool {
    // SAFETY: the caller's.
    unsafe { stored(&BYPASS, sk) }.is_some_and(|kind| *kind == DELIVERY)
}

/// What is kept on `sk`, if it is an end of a connection between two pods of this node.
///
/// # Safety
///
/// As for [`dialled`].
#[inline(always)]
pub unsafe fn flow<'a>(sk: *mut bpf_sock) -> Option<&'a mut Flow> {
    // SAFETY: the caller's.
    unsafe { flow_or_closed(sk) }.filter(|flow| flow.role != FLOW_CLOSED)
}

/// The same, or what is left of one that has closed.
///
/// # Safety
///
/// As for [`dialled`].
#[inline(always)]
pub unsafe fn flow_or_closed<'a>(sk: *mut bpf_sock) -> Option<&'a mut Flow> {
    // SAFETY: the caller's.
    unsafe { storage(&FLOWS, sk, core::ptr::null_mut(), 0).as_mut() }
}

/// The same, all zeros where there was none. `None` when there is no memory for it.
///
/// # Safety
///
/// As for [`dialled`].
#[inline(always)]
pub unsafe fn new_flow<'a>(sk: *mut bpf_sock) -> Option<&'a mut Flow> {
    let create = BPF_SK_STORAGE_GET_F_CREATE.into();
    // SAFETY: the caller's.
    unsafe { storage(&FLOWS, sk, core::ptr::null_mut(), create).as_mut() }
}

#[inline(always)]
unsafe fn stored<'a, T>(map: &'static SkStorage<T>, sk: *mut bpf_sock) -> Option<&'a T> {
    // SAFETY: the caller's.
    unsafe { storage(map, sk, core::ptr::null_mut(), 0).as_ref() }
}

#[inline(always)]
unsafe fn storage<T>(
    map: &'static SkStorage<T>,
    sk: *mut bpf_sock,
    value: *mut T,
    flags: u64,
) -> *mut T {
    if sk.is_null() {
        return core::ptr::null_mut();
    }
    let map = core::ptr::from_ref(map).cast_mut();
    // SAFETY: the verifier knows `sk` for a socket; without the create flag the helper only looks up.
    unsafe { bpf_sk_storage_get(map.cast(), sk.cast(), value.cast(), flags).cast() }
}
