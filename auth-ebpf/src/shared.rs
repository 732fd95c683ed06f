//! What the programs of both objects share: maps that judge inbound connections, and access to addresses.

use core::{mem::transmute, ptr::read_volatile};

use auth_common::{Address, Admitted, FourTuple, MAX_MESH_ADDRESSES, MAX_PENDING, WITHDRAWN};
use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{HashMap, LpmTrie, lpm_trie::Key},
    macros::btf_map,
};

pub const AF_INET: u32 = 2;
pub const IPPROTO_TCP: u32 = 6;

pub const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

/// The `MeshKind` of each address and network of the mesh.
#[btf_map]
pub static MESH: LpmTrie<Address, u32, { MAX_MESH_ADDRESSES as usize }> = LpmTrie::new();

/// The connections to pods' apps that the daemon makes from other pods, and that the node itself makes, while they are not
/// established yet, with the cookie of the netns that they are made from. The inbound program admits them.
#[btf_map]
pub static DELIVERIES: HashMap<FourTuple, u64, { MAX_PENDING as usize }, ON_DEMAND> =
    HashMap::new();

/// Connections under a verdict, from before their SYN leaves until the server's socket is established. The inbound program
/// admits them.
#[btf_map]
pub static ADMITTED: HashMap<FourTuple, Admitted, { MAX_PENDING as usize }, ON_DEMAND> =
    HashMap::new();

/// The `MeshKind` of `address`, or `None` if it is not in the mesh.
#[inline(always)]
pub fn mesh_kind(address: Address) -> Option<u32> {
    MESH.get(&Key::new(128, address)).copied()
}

/// Whether the kernel has recorded the connection: as the daemon's or the node's own, or as one between two pods of this node
/// under a verdict.
#[inline(always)]
pub fn is_recorded(connection: &FourTuple) -> bool {
    DELIVERIES.get_ptr(connection).is_some()
        // SAFETY: entries are replaced whole and freed after a grace period.
        || unsafe { ADMITTED.get(connection) }.is_some_and(|entry| entry.verdict != WITHDRAWN)
}

/// Reads an IPv6 address from a program's context, word by word. The reads are volatile because the verifier refuses
/// larger loads there, and the compiler would merge them.
///
/// # Safety
///
/// `field` must be a field of a context, or of a context's socket, that the kernel passed to the program.
#[inline(always)]
pub unsafe fn read_address(field: *const [u32; 4]) -> Address {
    // SAFETY: the caller passes a valid field of four words.
    let word = |word| unsafe { read_volatile(field.cast::<u32>().add(word)) };
    // Kept as words: 16 single bytes would need 16 registers or stack slots.
    let words = [word(0), word(1), word(2), word(3)];
    // SAFETY: both types are 16 bytes, and every byte pattern is valid.
    unsafe { transmute(words) }
}
