//! Connections between two pods of this node that stay in the kernel, under a verdict of the daemon.
//!
//! The connect hook calls [`redirect`], which stores the connection's state on the client's socket (FLOWS). Before the SYN
//! leaves, [`connecting`] enters the 4-tuple in ADMITTED, where the inbound program finds it. [`accepted`] removes it when
//! the server's socket is established. [`closed`] sends the daemon an event for each end that closes.

use core::ptr::read_volatile;

use auth_common::{
    Address, Admitted, FLOW_CLIENT, FLOW_CLOSED, FLOW_DIALLED, FLOW_SERVER, Flow, FourTuple, Pod,
    SocketKey, Verdict, WITHDRAWN, closed as flag,
};
use aya_ebpf::{
    bindings::{BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG, BPF_SOCK_OPS_STATE_CB_FLAG},
    programs::{SockAddrContext, SockOpsContext},
};

use crate::{
    context::{
        SocketContext, TCP_CLOSE, enable_callbacks, four_tuple, is_mapped, now, read_address,
    },
    maps::{ADMITTED, EVENTS, FLOWS, LEASE, LOST, PODS, VERDICTS, new_flow},
    shares,
};

const TCP_FIN_WAIT1: u32 = 4;
const TCP_LAST_ACK: u32 = 9;
const TCP_FLAG_FIN: u8 = 1;
const TCP_HEADER_BYTES: usize = 20;

/// Reads a field of a context. The read is volatile because the verifier refuses larger loads there, and the compiler
/// would merge them.
macro_rules! field {
    ($ctx:ident.$field:ident) => {
        // SAFETY: the kernel passed this context to the program.
        unsafe { read_volatile(&raw const (*$ctx.ops).$field) }
    };
}

/// The verdict on a connection from the pod in the netns `cookie` to `destination`, if it is valid and the socket uses the
/// pod's own address. The connection's state is then stored on the socket.
#[inline(always)]
pub fn redirect(
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
    if !uses_address(ctx, own) {
        return None;
    }
    let mut entry = Flow {
        admitted: Admitted {
            dialled: *destination,
            client_cookie: cookie,
            server_cookie: verdict.server_cookie,
            verdict: verdict.id,
            started: now(),
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
    // SAFETY: the kernel passed this context to the program, and `entry` has the map's value type.
    let stored = unsafe { FLOWS.get_or_insert_ptr_mut(ctx, Some(&mut entry)) };
    (!stored.is_null()).then_some(verdict)
}

/// The verdict under which another daemon's program has already redirected the socket to `destination`, if it is valid.
#[inline(always)]
pub fn already_redirected(
    flow: &Flow,
    cookie: u64,
    destination: &Address,
    port: u32,
) -> Option<&'static Verdict> {
    let redirected =
        flow.role == FLOW_DIALLED && flow.endpoint_port == port && flow.endpoint == *destination;
    if !redirected {
        return None;
    }
    let admitted = &flow.admitted;
    let verdict = verdict(cookie, &admitted.dialled, admitted.dialled_port)?;
    (verdict.id == admitted.verdict).then_some(verdict)
}

/// The verdict for `destination` in the client's netns `cookie`, if the lease has not expired.
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
    (now() < *until).then_some(verdict)
}

/// Whether a socket that is about to connect is bound to no address, or to `own`.
#[inline(always)]
fn uses_address(ctx: &SockAddrContext, own: &Address) -> bool {
    let sk = ctx.socket();
    // Both are read in any case: to choose a field first would be to choose between two pointers, which the verifier refuses.
    // SAFETY: the kernel passed this context to the program, and its socket is never null in this hook.
    let (v4, v6) = unsafe {
        (
            read_volatile(&raw const (*sk).src_ip4),
            read_address(&raw const (*sk).src_ip6),
        )
    };
    if is_mapped(own) {
        v4 == 0 || auth_common::mapped(v4.to_ne_bytes()) == *own
    } else {
        v6 == [0; 16] || v6 == *own
    }
}

/// Enters a connection in ADMITTED before its SYN leaves, if it matches its verdict and comes from the pod's own address.
/// Without an entry, the server's netns treats it like any other connection.
#[inline(always)]
pub fn connecting(ctx: &SockOpsContext, flow: &mut Flow) {
    let Flow {
        admitted, endpoint, ..
    } = flow;
    // The daemon may have withdrawn it since.
    let Some(verdict) = verdict(
        admitted.client_cookie,
        &admitted.dialled,
        admitted.dialled_port,
    ) else {
        return;
    };
    let cookie = ctx.netns_cookie();
    // SAFETY: entries are written whole and freed after a grace period.
    let Some(pod) = (unsafe { PODS.get(cookie) }) else {
        return;
    };
    let connection = four_tuple(ctx, false);
    let matches = cookie == admitted.client_cookie
        && verdict.id == admitted.verdict
        && (connection.client == pod.v4 || connection.client == pod.v6)
        && connection.server == *endpoint
        && connection.server_port == flow.endpoint_port;
    if !matches || !shares::insert(shares::connects(cookie), &ADMITTED, &connection, admitted) {
        return;
    }
    flow.role = FLOW_CLIENT;
    enable_callbacks(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
}

/// Removes a connection that a server's socket has accepted from ADMITTED, if the socket is in the verdict's netns. In
/// another netns, or if the verdict has been withdrawn, the entry stays, so that the event of the client's end says that it was not claimed. Returns whether there
/// was an entry.
#[inline(always)]
pub fn accepted(ctx: &SockOpsContext, connection: &FourTuple) -> bool {
    // SAFETY: entries are replaced whole and freed after a grace period.
    let Some(admitted) = (unsafe { ADMITTED.get(connection) }) else {
        return false;
    };
    if ctx.netns_cookie() != admitted.server_cookie || admitted.verdict == WITHDRAWN {
        return true;
    }
    let client = admitted.client_cookie;
    // SAFETY: this program holds no other reference to the socket's entry.
    match unsafe { new_flow(ctx) } {
        Some(flow) => {
            flow.admitted = *admitted;
            flow.role = FLOW_SERVER;
            enable_callbacks(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
        }
        None => lost(),
    }
    shares::remove(|| shares::connects(client), &ADMITTED, connection);
    true
}

/// An end of such a connection changes its TCP state.
#[inline(always)]
pub fn state_changed(ctx: &SockOpsContext, flow: &mut Flow) {
    let (from, to) = (ctx.arg(0), ctx.arg(1));
    match to {
        // The socket is about to send its FIN. How the connection closes shows in the segments from here on.
        TCP_FIN_WAIT1 | TCP_LAST_ACK => {
            flow.segments = field!(ctx.segs_in);
            enable_callbacks(ctx, BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG);
        }
        TCP_CLOSE => {
            closed(ctx, flow, from);
            // The entry is removed with the socket: to delete it now would cost the kernel far more.
            flow.role = FLOW_CLOSED;
        }
        _ => {}
    }
}

/// A valid segment arrived after the socket sent its FIN. It is not a RST: the kernel does not call this program for one.
#[inline(always)]
pub fn segment(ctx: &SockOpsContext, flow: &mut Flow) {
    flow.segments = field!(ctx.segs_in);
    let length = field!(ctx.skb_len);
    // SAFETY: the kernel passed this context to the program; the header is read only up to its end.
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

/// Sends the event of an end that has closed. `from` is the TCP state before.
#[inline(always)]
fn closed(ctx: &SockOpsContext, flow: &Flow, from: u32) {
    let is_server = flow.role == FLOW_SERVER;
    let connection = four_tuple(ctx, is_server);
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
    let client = flow.admitted.client_cookie;
    if !is_server && shares::remove(|| shares::connects(client), &ADMITTED, &connection) {
        flags |= flag::UNCLAIMED;
    }
    if !shares::admits_event(client) {
        return lost();
    }
    let Some(mut room) = EVENTS.reserve(0) else {
        return lost();
    };
    let (acked, received) = (field!(ctx.bytes_acked), field!(ctx.bytes_received));
    // Written in place: the stack has no room for a copy.
    let event = room.as_mut_ptr();
    // SAFETY: the reservation has the event's size, and every field is written.
    unsafe {
        (*event).client = connection.client;
        (*event).server = connection.server;
        (*event).admitted = flow.admitted;
        (*event).ended = now();
        (*event).acked = acked;
        (*event).received = received;
        (*event).client_port = connection.client_port as u16;
        (*event).server_port = connection.server_port as u16;
        (*event).role = flow.role as u8;
        (*event).state = from as u8;
        (*event).flags = flags;
    }
    room.submit(0);
}

/// Counts an end without an event.
#[inline(always)]
fn lost() {
    if let Some(count) = LOST.get_ptr_mut(0) {
        // SAFETY: the slot belongs to this CPU, and this program does not interrupt itself there.
        unsafe { *count += 1 };
    }
}
