//! cgroup/connect4 and connect6: turn a pod's connect to a mesh address to the daemon's listener on its loopback, or, where
//! a verdict of the daemon says that it may stay in the kernel, straight to a pod of this node.
//!
//! On the way of every connect on the node, so the cheap answers come first: not TCP, not an enrolled pod, not a mesh
//! address. Those keep the kernel's own path and leave nothing in any map.

use auth_common::{Address, Dialled, MeshKind, OUTBOUND_PORT, Verdict, mapped};
use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::{bpf_get_netns_cookie, bpf_ktime_get_ns, bpf_setsockopt},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};

use crate::{
    maps::{BYPASS, DIALLED, FLOWS, PODS, dialled, flow_or_closed, mesh_kind},
    same_node,
};

const REFUSE: i32 = 0;
const PROCEED: i32 = 1;
const IPPROTO_TCP: u32 = 6;
const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
/// Where the listeners are.
pub const LOOPBACK_V4: [u8; 4] = [127, 0, 0, 1];
/// Where the listeners are.
pub const LOOPBACK_V6: Address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    // SAFETY: the context is the kernel's; its fields are read and written as the words the verifier asks for.
    let destination = mapped(unsafe { (*sa).user_ip4 }.to_ne_bytes());
    let (address, port) = match route(&ctx, &destination) {
        Route::Leave => return PROCEED,
        Route::Refuse => return REFUSE,
        Route::Capture => (LOOPBACK_V4, OUTBOUND_PORT),
        Route::SameNode(verdict) => {
            let a = &verdict.endpoint;
            ([a[12], a[13], a[14], a[15]], verdict.port as u16)
        }
    };
    // SAFETY: as above.
    unsafe {
        (*sa).user_ip4 = u32::from_ne_bytes(address);
        (*sa).user_port = u32::from(port.to_be());
    }
    PROCEED
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    let destination = user_ip6(sa);
    let (address, port) = match route(&ctx, &destination) {
        Route::Leave => return PROCEED,
        Route::Refuse => return REFUSE,
        Route::Capture if is_mapped(&destination) => (mapped(LOOPBACK_V4), OUTBOUND_PORT),
        Route::Capture => (LOOPBACK_V6, OUTBOUND_PORT),
        Route::SameNode(verdict) => (verdict.endpoint, verdict.port as u16),
    };
    set_user_ip6(sa, &address);
    // SAFETY: the context is the kernel's; its fields are read and written as the words the verifier asks for.
    unsafe { (*sa).user_port = u32::from(port.to_be()) };
    PROCEED
}

enum Route {
    /// Not ours: the kernel's own path.
    Leave,
    /// Ours, but it cannot be captured: an error, never plaintext.
    Refuse,
    Capture,
    /// To a pod of this node, without the daemon.
    SameNode(&'static Verdict),
}

#[inline(always)]
fn route(ctx: &SockAddrContext, destination: &Address) -> Route {
    let sa = ctx.sock_addr;
    // SAFETY: the context is the kernel's.
    if unsafe { (*sa).protocol } != IPPROTO_TCP {
        return Route::Leave;
    }
    // SAFETY: the helper reads the socket of this context.
    let cookie = unsafe { bpf_get_netns_cookie(sa.cast()) };
    // SAFETY: entries are written once, at enrolment, and freed after a grace period.
    let Some(pod) = (unsafe { PODS.get(cookie) }) else {
        return Route::Leave;
    };
    // SAFETY: the context is the kernel's; the port is in network byte order in the low half.
    let port = u32::from(u16::from_be(unsafe { (*sa).user_port } as u16));
    // SAFETY: the context's socket, which the helpers take.
    unsafe {
        if !BYPASS.get_ptr_mut(ctx).is_null() {
            return Route::Leave;
        }
        let sk: *mut bpf_sock = (*sa).__bindgen_anon_1.sk;
        // A socket may be dialled again after a failure: forget what it dialled before.
        if dialled(sk).is_some() {
            let _ = DIALLED.delete(sk);
        }
        if let Some(flow) = flow_or_closed(sk) {
            // While one daemon takes over from another, both have their programs here.
            if let Some(verdict) = same_node::already_led(flow, cookie, destination, port) {
                return Route::SameNode(verdict);
            }
            let _ = FLOWS.delete(sk);
        }
    }
    let captured = match mesh_kind(*destination) {
        Some(kind) => kind == MeshKind::Pod as u32 || kind == MeshKind::Service as u32,
        None => false,
    };
    if !captured || *destination == pod.v4 || *destination == pod.v6 {
        return Route::Leave;
    }
    if pod.refused != 0 {
        return Route::Refuse;
    }
    if let Some(verdict) = same_node::dial(ctx, cookie, pod, destination, port) {
        return Route::SameNode(verdict);
    }
    let mut entry = Dialled {
        address: *destination,
        // SAFETY: a helper without arguments.
        at_nanoseconds: unsafe { bpf_ktime_get_ns() },
        port,
        padding: 0,
    };
    // SAFETY: the context's socket, and a value of the map's own type.
    if unsafe { DIALLED.get_or_insert_ptr_mut(ctx, Some(&mut entry)) }.is_null() {
        return Route::Refuse;
    }
    match unbind_interface(ctx) {
        Ok(()) => Route::Capture,
        Err(()) => Route::Refuse,
    }
}

/// Lets go of the interface that the app bound its socket to, if it did: the listener is on another one. The app's
/// packets never leave by this socket.
#[inline(always)]
fn unbind_interface(ctx: &SockAddrContext) -> Result<(), ()> {
    // SAFETY: the context's socket; the verifier knows it for one.
    let bound = unsafe { (*(*ctx.sock_addr).__bindgen_anon_1.sk).bound_dev_if };
    if bound == 0 {
        return Ok(());
    }
    let mut none = [0_u8; 4];
    // SAFETY: `none` is four readable bytes: an empty name.
    let result = unsafe {
        bpf_setsockopt(
            ctx.sock_addr.cast(),
            SOL_SOCKET,
            SO_BINDTODEVICE,
            (&raw mut none).cast(),
            size_of_val(&none) as i32,
        )
    };
    if result == 0 { Ok(()) } else { Err(()) }
}

/// The IPv6 address in the context: the destination of a connect, the answer of a getpeername or getsockname.
#[inline(always)]
pub fn user_ip6(sa: *const bpf_sock_addr) -> Address {
    // SAFETY: the context is the kernel's.
    words(unsafe { &raw const (*sa).user_ip6 })
}

/// An IPv6 address in a program's context, word by word: volatile, because the verifier takes no larger loads there and
/// the compiler would merge them.
#[inline(always)]
pub fn words(field: *const [u32; 4]) -> Address {
    // SAFETY: `field` is of a context that the kernel gave.
    let word = |word| unsafe { core::ptr::read_volatile(field.cast::<u32>().add(word)) };
    // As words: sixteen bytes would take sixteen registers, or as many places on the stack.
    let words = [word(0), word(1), word(2), word(3)];
    // SAFETY: both are sixteen plain bytes.
    unsafe { core::mem::transmute(words) }
}

/// Writes the IPv6 address in the context.
#[inline(always)]
pub fn set_user_ip6(sa: *mut bpf_sock_addr, address: &Address) {
    for word in 0..4 {
        let value = u32::from_ne_bytes([
            address[4 * word],
            address[4 * word + 1],
            address[4 * word + 2],
            address[4 * word + 3],
        ]);
        // SAFETY: as for reading.
        unsafe { core::ptr::write_volatile(&raw mut (*sa).user_ip6[word], value) };
    }
}

#[inline(always)]
pub fn is_mapped(address: &Address) -> bool {
    let mut zeros = true;
    let mut byte = 0;
    while byte < 10 {
        zeros &= address[byte] == 0;
        byte += 1;
    }
    zeros && address[10] == 0xff && address[11] == 0xff
}
