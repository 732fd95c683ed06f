//! Connections between two pods of this node, by verdicts of the daemon: they stay in the kernel.
//!
//! connect asks [`dial`]; from there on the connection is told by its sockets' storage, FLOWS. Before the SYN leaves,
//! [`connecting`] enters its exact four in ADMITTED, where the inbound program finds it; [`accepted`] takes it out again
//! when the server's socket stands. [`closed`] tells the daemon how each end closed.

use core::ptr::read_volatile;

use auth_common::{
    Address, Admitted, Delivery, FLOW_CLIENT, FLOW_CLOSED, FLOW_DIALLED, FLOW_SERVER, Flow, Pod,
    SocketKey, Verdict, closed as flag,
};
use aya_ebpf::{
    bindings::{BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG, BPF_SOCK_OPS_STATE_CB_FLAG, bpf_sock},
    helpers::{bpf_get_netns_cookie, bpf_ktime_get_ns},
    programs::{SockAddrContext, SockOpsContext},
};

use crate::{
    connect::{is_mapped, words},
    established::{four, watch},
    maps::{ADMITTED, EVENTS, FLOWS, LEASE, LOST, PODS, VERDICTS, flow, new_flow},
};

const TCP_FIN_WAIT1: u32 = 4;
const TCP_CLOSE: u32 = 7;
const TCP_LAST_ACK: u32 = 9;
const TCP_FLAG_FIN: u8 = 1;
const TCP_HEADER_BYTES: usize = 20;

/// A field of a context. Volatile, because the verifier takes no larger loads there and the compiler would merge them.
macro_rules! field {
    ($ctx:ident.$field:ident) => {
        // SAFETY: the context is the kernel's.
        unsafe { read_volatile(&raw const (*$ctx.ops).$field) }
    };
}

/// The verdict on a connection of the pod in `cookie` to `destination`, if it holds and the socket speaks as the pod.
/// What it needs later is on the socket then.
#[inline(always)]
pub fn dial(
    ctx: &SockAddrContext,
    cookie: u64,
    pod: &Pod,
    destination: &Address,
    port: u32,
) -> Option<&'static Verdict> {
    let verdict = verdict(cookie, destination, port)?;
    let own = if is_mapped(destination) {
        &pod.v4
    } else {
        &pod.v6
    };
    // SAFETY: the context's socket; its fields are read as the words the verifier asks for.
    if !speaks_as(unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }, own) {
        return None;
    }
    let mut entry = Flow {
        admitted: Admitted {
            dialled: *destination,
            client_cookie: cookie,
            server_cookie: verdict.server_cookie,
            verdict: verdict.id,
            // SAFETY: a helper without arguments.
            started: unsafe { bpf_ktime_get_ns() },
            dialled_port: port,
            padding: 0,
        },
        endpoint: verdict.endpoint,
        endpoint_port: verdict.port,
        role: FLOW_DIALLED,
        segments: 0,
        fin: 0,
        fin_seen: 0,
        padding: 0,
    };
    // SAFETY: the context's socket, and a value of the map's own type.
    let kept = unsafe { FLOWS.get_or_insert_ptr_mut(ctx, Some(&mut entry)) };
    (!kept.is_null()).then_some(verdict)
}

/// The verdict by which a program before this one has led the socket to `destination`, if it holds.
#[inline(always)]
pub fn already_led(
    flow: &Flow,
    cookie: u64,
    destination: &Address,
    port: u32,
) -> Option<&'static Verdict> {
    let led =
        flow.role == FLOW_DIALLED && flow.endpoint_port == port && flow.endpoint == *destination;
    if !led {
        return None;
    }
    let admitted = &flow.admitted;
    let verdict = verdict(cookie, &admitted.dialled, admitted.dialled_port)?;
    (verdict.id == admitted.verdict).then_some(verdict)
}

#[inline(always)]
fn verdict(cookie: u64, destination: &Address, port: u32) -> Option<&'static Verdict> {
    let key = SocketKey {
        netns_cookie: cookie,
        address: *destination,
        port,
        padding: 0,
    };
    // SAFETY: entries are replaced whole and freed after a grace period.
    let verdict = unsafe { VERDICTS.get(key) }?;
    let until = LEASE.get(0)?;
    // SAFETY: a helper without arguments.
    (unsafe { bpf_ktime_get_ns() } < *until).then_some(verdict)
}

/// Whether a socket that is about to connect is bound to no address, or to `own`.
#[inline(always)]
fn speaks_as(sk: *const bpf_sock, own: &Address) -> bool {
    // Both are read, whichever counts: a choice between two fields would be one of addresses, which the verifier refuses.
    // SAFETY: the caller's context gave the socket.
    let (v4, v6) = unsafe {
        (
            read_volatile(&raw const (*sk).src_ip4),
            words(&raw const (*sk).src_ip6),
        )
    };
    if is_mapped(own) {
        v4 == 0 || auth_common::mapped(v4.to_ne_bytes()) == *own
    } else {
        v6 == [0; 16] || v6 == *own
    }
}

/// Enters a connection in ADMITTED before its SYN leaves, if it is what the verdict was on and comes from the pod's own
/// address. Else there is no record, and the server's side treats it as anybody's.
#[inline(always)]
pub fn connecting(ctx: &SockOpsContext, flow: &mut Flow) {
    let Flow {
        admitted, endpoint, ..
    } = flow;
    // It may have been taken back since.
    let Some(verdict) = verdict(
        admitted.client_cookie,
        &admitted.dialled,
        admitted.dialled_port,
    ) else {
        return;
    };
    // SAFETY: the helper reads the socket of this context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.ops.cast()) };
    // SAFETY: entries of pods are written whole and freed after a grace period.
    let Some(pod) = (unsafe { PODS.get(cookie) }) else {
        return;
    };
    let four = four(ctx, false);
    let genuine = cookie == admitted.client_cookie
        && verdict.id == admitted.verdict
        && (four.client == pod.v4 || four.client == pod.v6)
        && four.server == *endpoint
        && four.server_port == flow.endpoint_port;
    if !genuine || ADMITTED.insert(four, *admitted, 0).is_err() {
        return;
    }
    flow.role = FLOW_CLIENT;
    watch(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
}

/// Takes a connection that a server's socket has accepted out of ADMITTED, if that socket is where the verdict says.
/// In another namespace it stays there: then the client's end tells that nobody took it. Whether it was there.
#[inline(always)]
pub fn accepted(ctx: &SockOpsContext, four: &Delivery) -> bool {
    // SAFETY: an entry is not written to once it is there.
    let Some(admitted) = (unsafe { ADMITTED.get(four) }) else {
        return false;
    };
    // SAFETY: the helper reads the socket of this context.
    if unsafe { bpf_get_netns_cookie(ctx.ops.cast()) } != admitted.server_cookie {
        return true;
    }
    // SAFETY: the context's own socket.
    match unsafe { new_flow(socket(ctx)) } {
        Some(flow) => {
            flow.admitted = *admitted;
            flow.role = FLOW_SERVER;
            watch(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
        }
        None => lost(),
    }
    let _ = ADMITTED.remove(four);
    true
}

/// Follows the states of an end of such a connection.
#[inline(always)]
pub fn state_changed(ctx: &SockOpsContext, flow: &mut Flow) {
    let (from, to) = (ctx.arg(0), ctx.arg(1));
    match to {
        // The own FIN is about to leave. How the connection closes shows in the segments from here on.
        TCP_FIN_WAIT1 | TCP_LAST_ACK => {
            flow.segments = field!(ctx.segs_in);
            watch(ctx, BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG);
        }
        TCP_CLOSE => {
            closed(ctx, flow, from);
            // It goes with the socket: to take it away now would cost the kernel far more.
            flow.role = FLOW_CLOSED;
        }
        _ => {}
    }
}

/// Looks at a valid segment that comes in after the own FIN has left. It is no RST: those never get here.
#[inline(always)]
pub fn segment(ctx: &SockOpsContext, flow: &mut Flow) {
    flow.segments = field!(ctx.segs_in);
    let length = field!(ctx.skb_len);
    // SAFETY: the context is the kernel's; the header is read below its end.
    unsafe {
        let header = (*ctx.ops).__bindgen_anon_3.skb_data.cast::<u8>();
        let end = (*ctx.ops).__bindgen_anon_4.skb_data_end.cast::<u8>();
        if header.add(TCP_HEADER_BYTES) > end || *header.add(13) & TCP_FLAG_FIN == 0 {
            return;
        }
        let sequence = u32::from_be_bytes([
            *header.add(4),
            *header.add(5),
            *header.add(6),
            *header.add(7),
        ]);
        let header_bytes = u32::from(*header.add(12) >> 4) * 4;
        flow.fin = sequence
            .wrapping_add(length.wrapping_sub(header_bytes))
            .wrapping_add(1);
        flow.fin_seen = 1;
    }
}

#[inline(always)]
fn closed(ctx: &SockOpsContext, flow: &Flow, from: u32) {
    let is_server = flow.role == FLOW_SERVER;
    let four = four(ctx, is_server);
    let segments = field!(ctx.segs_in);
    let mut flags = 0;
    if field!(ctx.snd_una) == field!(ctx.snd_nxt) {
        flags |= flag::ALL_ACKED;
    }
    if segments == flow.segments {
        flags |= flag::IN_ORDER;
    }
    if flow.fin_seen != 0 && flow.fin == field!(ctx.rcv_nxt) {
        flags |= flag::FIN_RECEIVED;
    }
    if segments != 0 {
        flags |= flag::ANSWERED;
    }
    if !is_server && ADMITTED.remove(four).is_ok() {
        flags |= flag::UNCLAIMED;
    }
    let Some(mut room) = EVENTS.reserve(0) else {
        return lost();
    };
    let (acked, received) = (field!(ctx.bytes_acked), field!(ctx.bytes_received));
    // Written where it is to be: the stack has no room for one more.
    let event = room.as_mut_ptr();
    // SAFETY: the room is of this size, and every field is written.
    unsafe {
        (*event).client = four.client;
        (*event).server = four.server;
        (*event).admitted = flow.admitted;
        (*event).ended = bpf_ktime_get_ns();
        (*event).acked = acked;
        (*event).received = received;
        (*event).client_port = four.client_port as u16;
        (*event).server_port = four.server_port as u16;
        (*event).role = flow.role as u8;
        (*event).state = from as u8;
        (*event).flags = flags;
    }
    room.submit(0);
}

/// Counts an end of a connection that will leave no line.
#[inline(always)]
fn lost() {
    if let Some(count) = LOST.get_ptr_mut(0) {
        // SAFETY: this CPU's own slot, and programs of one kind are not interrupted by their like on it.
        unsafe { *count += 1 };
    }
}

/// The storage of the context's own socket, if it is of such a connection.
#[inline(always)]
pub fn flow_of<'a>(ctx: &SockOpsContext) -> Option<&'a mut Flow> {
    // SAFETY: the context's own socket; while a program of it runs, no other does.
    unsafe { flow(socket(ctx)) }
}

#[inline(always)]
fn socket(ctx: &SockOpsContext) -> *mut bpf_sock {
    // SAFETY: the context is the kernel's.
    unsafe { (*ctx.ops).__bindgen_anon_2.sk }
}
