//! The maps, all pinned by the daemon and adopted by the next one. None takes its memory up front but for the bucket
//! arrays of the hashes (2 MiB each for PENDING and DELIVERIES); the trie and the hashes allocate as they fill.

use auth_common::{
    Address, DELIVERY, Delivery, Dialled, MAX_MESH_ADDRESSES, MAX_PENDING, MAX_PODS, Pod, SocketKey,
};
use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, bpf_sock},
    btf_maps::{HashMap, LpmTrie, SkStorage, SockHash, lpm_trie::Key},
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

#[inline(always)]
unsafe fn stored<'a, T>(map: &'static SkStorage<T>, sk: *mut bpf_sock) -> Option<&'a T> {
    if sk.is_null() {
        return None;
    }
    let map = core::ptr::from_ref(map).cast_mut();
    // SAFETY: the verifier knows `sk` for a socket; without the create flag the helper only looks up.
    unsafe {
        bpf_sk_storage_get(map.cast(), sk.cast(), core::ptr::null_mut(), 0)
            .cast::<T>()
            .as_ref()
    }
}
