//! Connections of the node itself to its pods, such as the kubelet's probes: pods admit them in every mode.
//!
//! Neither an address nor a port proves that the node connects: traffic that is translated to the node's address (NodePort)
//! and pods in the node's own netns (`hostNetwork`) have the same address. What proves it is that the socket is in the
//! node's netns and that the process which connects is in no pod's cgroup.

use auth_common::{Address, MeshKind, NODE_CONNECT, Node};
use aya_ebpf::{helpers::bpf_get_current_ancestor_cgroup_id, programs::SockAddrContext};

use crate::maps::{BYPASS, NODE, mesh_kind};

/// Whether there may be a pod at `destination` that judges connections, or whose netns has no verdict yet. The kubelet probes
/// a pod before its object has an address, so a pod's address may be in no map yet, or be that of a pod before it.
#[inline(always)]
fn may_be_a_pod(destination: &Address) -> bool {
    mesh_kind(*destination).is_none_or(MeshKind::may_be_a_pod)
}

/// Marks the socket of a connect to `destination`, from the netns `cookie`, if the node itself connects to a pod. The
/// sockops program then records the connection's 4-tuple.
#[inline(always)]
pub fn record(ctx: &SockAddrContext, cookie: u64, destination: &Address) {
    let Some(node) = NODE.get(0) else {
        return;
    };
    if cookie != node.netns_cookie || !may_be_a_pod(destination) || is_in_a_pod(node) {
        return;
    }
    let mut kind = NODE_CONNECT;
    // Without an entry the pod judges the connection as if somebody else made it.
    // SAFETY: the kernel passed this context to the program, and `kind` has the map's value type.
    let _ = unsafe { BYPASS.get_or_insert_ptr_mut(ctx, Some(&mut kind)) };
}

/// Whether the current process is in the cgroup of a pod.
#[inline(always)]
pub fn is_in_a_pod(node: &Node) -> bool {
    for root in &node.pod_roots {
        // SAFETY: a helper without pointers.
        let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(root.level as i32) };
        if root.cgroup != 0 && ancestor == root.cgroup {
            return true;
        }
    }
    false
}
