//! Server side of the data path: serves a connection to a pod, from the first byte on the pod's tunnel listener to the
//! last byte of the last app connection that the tunnel carries.

mod hbone;

use std::{
    fmt::Display,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{
    FutureExt,
    future::{AbortHandle, Abortable},
};
use tokio::{
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};

use super::{
    Node, Pod,
    detect::{self, Detected},
    outbound::send_reset,
    plaintext as plain,
};
use crate::observe::{
    access_log::{Direction, Outcome, Path},
    connections::Guard,
};
use crate::proxy::{
    caller::{admit_source, check_trusted},
    handshakes::Place,
    pod::TunnelNote,
};
use auth_datapath::sockets::{self, end_in_good_order};
use auth_mesh::policy::Connection;
use auth_tunnel::{
    self, Channel, ChannelError, Ending,
    frame::{Connect, Event, ResetCode},
    relay,
    tls::svid::Svid,
};

/// Timeout from the start of a connection until its CONNECT is read.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a tunnel may stay idle between two app connections. The client's side closes it earlier.
const IDLE: Duration = Duration::from_secs(60);
/// Timeout for the app to accept a connection.
const APP_ANSWER: Duration = Duration::from_secs(2);

/// Serves one accepted connection. Completes when the connection has ended or was cut. If the future is dropped earlier,
/// its sockets are reset.
///
/// `place` is the connection's place among those that are still in their handshake.
///
/// The future is a large part of an idle connection's memory: an `async fn` would hold each argument twice, and all that is
/// awaited here without a box of its own takes its room for as long as the connection lasts.
pub(crate) fn serve(
    node: Arc<Node>,
    pod: Arc<Pod>,
    tcp: TcpStream,
    from: SocketAddr,
    place: Place,
) -> impl Future<Output = ()> + Send {
    let (cut, registration) = AbortHandle::new_pair();
    let serving = async move {
        let (node, pod) = (&*node, &*pod);
        let Some(Tunnel {
            mut channel,
            local,
            _note,
            mut connect,
            mut access,
        }) = begin(node, pod, tcp, from, place, cut.clone())
            .boxed()
            .await
        else {
            return;
        };
        // One app connection after another.
        loop {
            let admitted = admit(node, pod, channel.peer(), from, local, connect, &access);
            let mut app = match Box::pin(admitted).await {
                Ok(app) => app,
                Err((code, reason)) => {
                    send_reset(&mut channel, code, &reason).await;
                    return access.finish(Outcome::Refused, reason);
                }
            };
            if let Err(error) = channel.answer_connected().await {
                return access.finish(Outcome::Reset, error);
            }
            access.established();
            let ending = relay(&mut app, &mut channel, access.counters()).await;
            if !finish(app, &mut channel, ending, access).await {
                return;
            }
            let Some(event) = idle(node, &mut channel).await else {
                return channel.close();
            };
            let open = &node.connections;
            let cookie = pod.enrolled.netns.cookie();
            let next = open.open(Direction::Inbound, cookie, from, cut.clone());
            match accept(pod, &mut channel, local, connect_of(event), next).await {
                Some(next) => (connect, access) = next,
                None => return,
            }
        }
    };
    Abortable::new(serving, registration).map(drop)
}

/// A tunnel with its first app connection.
struct Tunnel<'a> {
    channel: Box<Channel>,
    /// The app's address.
    local: SocketAddr,
    _note: TunnelNote<'a>,
    connect: Connect,
    access: Guard<'a>,
}

/// Waits for a tunnel's first CONNECT. Returns `None` if the connection is refused, or when it has ended and was no tunnel of
/// the project's own framing.
async fn begin<'a>(
    node: &'a Node,
    pod: &'a Pod,
    tcp: TcpStream,
    from: SocketAddr,
    place: Place,
    cut: AbortHandle,
) -> Option<Tunnel<'a>> {
    let cookie = pod.enrolled.netns.cookie();
    let open = &node.connections;
    let access = open.open(Direction::Inbound, cookie, from, cut);
    let local = match tcp.local_addr() {
        Ok(local) => sockets::canonical(local),
        Err(error) => return refused(access, error),
    };
    access.learn(|details| {
        details.destination = Some(local);
        details.endpoint = Some(local);
        details.server_netns = Some(pod.enrolled.netns.cookie());
        details.server_identity = Some(pod.workload.identity.clone());
    });
    if !pod.enrolled.is_local(local.ip()) {
        let dialled = sockets::original_destination((&tcp).into());
        access.learn(|details| details.destination = dialled.or(Some(local)));
        return refused(access, forwarded(local));
    }
    let mut deadline = Instant::now() + HANDSHAKE;
    let in_plaintext = Connection {
        client: None,
        source: from.ip(),
        destination: local,
    };
    let plaintext_allowed = node
        .rules
        .current()
        .verdict(cookie, &in_plaintext)
        .is_ok_and(|verdict| verdict.allowed());
    let spoken = match plaintext_allowed {
        _ if local.port() == auth_common::TUNNEL_PORT => timeout_at(deadline, detect::hbone(&tcp))
            .await
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, late()))),
        false => timeout_at(deadline, detect::strict(&tcp))
            .await
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, late()))),
        true => {
            let dial = || dial_plain(node, pod, from, local);
            let spoken = Box::pin(detect::permissive(&tcp, dial)).await;
            // The caller may have been silent for a long time, so the handshake's time starts now.
            deadline = Instant::now() + HANDSHAKE;
            spoken
        }
    };
    match spoken {
        Ok(Detected::Tunnel) => {}
        Ok(Detected::Hbone) => {
            access.learn(|details| details.path = Path::Hbone);
            let first = First {
                access,
                deadline,
                place,
            };
            // Boxed so that connections of other protocols do not take as much memory.
            hbone::serve(node, pod, tcp, from, local, first)
                .boxed()
                .await;
            return None;
        }
        Ok(Detected::Plaintext(app)) => {
            access.learn(|details| details.path = Path::Plaintext);
            // Judge again for the log, now that the connection is known to be plaintext.
            if let Err(denied) = node.rules.judge(cookie, &in_plaintext, &access) {
                return refused(access, denied);
            }
            drop(place);
            Box::pin(plaintext(node, pod, tcp, app, from, local, access)).await;
            return None;
        }
        Err(error) => return refused(access, error),
    }
    let _note = pod.note_tunnel(from, local.port());
    let handshake = place.in_turns(handshake(node, pod, tcp).boxed());
    let mut channel = match timeout_at(deadline, handshake).await {
        Ok(Ok(channel)) => channel,
        Ok(Err(reason)) => return refused(access, reason),
        Err(_) => return refused(access, late()),
    };
    // Until it arrives, the tunnel counts as a handshake.
    let Ok(event) = timeout_at(deadline, channel.receive_control()).await else {
        return refused(access, late());
    };
    let connect = match event {
        Ok(None) | Err(ChannelError::Closed) => {
            Err("closed the tunnel without a CONNECT".to_owned())
        }
        event => connect_of(event),
    };
    let (connect, access) = accept(pod, &mut channel, local, connect, access).await?;
    Some(Tunnel {
        channel,
        local,
        _note,
        connect,
        access,
    })
}

/// Refuses a connection that is not a tunnel's yet.
fn refused<'a>(access: Guard<'_>, reason: impl Display) -> Option<Tunnel<'a>> {
    access.finish(Outcome::Refused, reason);
    None
}

/// Waits until something arrives on an idle tunnel. Returns `None` if it is to be closed: then no connection ends, and nothing
/// is logged.
async fn idle(node: &Node, channel: &mut Channel) -> Option<Result<Option<Event>, ChannelError>> {
    let mut draining = node.draining.subscribe();
    let event = tokio::select! {
        event = timeout(IDLE, channel.receive_control()) => event.ok()?,
        // The client's side then dials again, and the kernel refuses it.
        _ = draining.wait_for(|draining| *draining) => return None,
    };
    let has_ended = matches!(
        event,
        Ok(None) | Err(ChannelError::Io(_) | ChannelError::Closed)
    );
    (!has_ended).then_some(event)
}

/// The CONNECT that has arrived, or why the frame that has arrived is not one.
fn connect_of(event: Result<Option<Event>, ChannelError>) -> Result<Connect, String> {
    match event {
        Ok(Some(Event::Connect(connect))) => Ok(connect),
        Ok(_) => Err(ChannelError::OutOfTurn("a frame other than CONNECT").to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// Begins an app connection with what is known of it, unless there is no `connect`: then the tunnel ends.
async fn accept<'a>(
    pod: &Pod,
    channel: &mut Channel,
    local: SocketAddr,
    connect: Result<Connect, String>,
    access: Guard<'a>,
) -> Option<(Connect, Guard<'a>)> {
    access.learn(|details| {
        details.client_identity = Some(channel.peer().identity.clone());
        details.peer = Some(channel.peer().clone());
        details.key_exchange = channel.key_exchange();
        details.server_identity = Some(pod.workload.identity.clone());
        details.destination = Some(local);
        details.endpoint = Some(local);
        details.server_netns = Some(pod.enrolled.netns.cookie());
    });
    match connect {
        Ok(connect) => {
            access.learn(|details| details.destination = Some(connect.dialled));
            Some((connect, access))
        }
        Err(reason) => {
            send_reset(channel, ResetCode::Protocol, &reason).await;
            access.finish(Outcome::Refused, reason);
            None
        }
    }
}

/// An HBONE connection whose first CONNECT is due. Until it arrives, the connection counts as a handshake.
struct First<'a> {
    access: Guard<'a>,
    deadline: Instant,
    place: Place,
}

/// Why a connection is refused that the pod would forward to `local`.
fn forwarded(local: SocketAddr) -> String {
    format!(
        "the pod forwards it to {local}, in a network namespace nested in the pod, which cannot authenticate it; let the \
         app listen in the pod's own, or set the pod to PERMISSIVE"
    )
}

fn late() -> String {
    format!("no handshake within {HANDSHAKE:?}")
}

async fn handshake(node: &Node, pod: &Pod, tcp: TcpStream) -> Result<Box<Channel>, String> {
    let certificate = pod
        .certificate
        .obtain(HANDSHAKE)
        .await
        .ok_or_else(|| format!("no valid certificate for {}", pod.workload.identity))?;
    let config = certificate.configs.server.clone();
    auth_tunnel::handshake::accept(tcp, config, &node.config.trust_domain)
        .await
        .map(Box::new)
        .map_err(|error| error.to_string())
}

/// Closes or resets the app's side according to `ending`. Returns whether the tunnel can carry another connection.
async fn finish(app: TcpStream, channel: &mut Channel, ending: Ending, access: Guard<'_>) -> bool {
    match ending {
        Ending::Clean => match end_in_good_order((&app).into()) {
            Ok(()) => {
                access.finish(Outcome::Ok, "");
                true
            }
            Err(error) => {
                access.finish(Outcome::Reset, error);
                false
            }
        },
        Ending::App(error) => {
            send_reset(channel, ResetCode::App, &error.to_string()).await;
            access.finish(Outcome::Reset, format_args!("the server's app: {error}"));
            false
        }
        Ending::Peer(reset) => {
            sockets::reset_when_delivered(app).await;
            access.finish(
                Outcome::Reset,
                format_args!("the client's side: {:?} {}", reset.code, reset.reason),
            );
            false
        }
        Ending::Tunnel(error) => {
            sockets::reset_when_delivered(app).await;
            if matches!(
                error,
                ChannelError::Frame(_) | ChannelError::OutOfTurn(_) | ChannelError::Futile
            ) {
                send_reset(channel, ResetCode::Protocol, &error.to_string()).await;
            }
            access.finish(Outcome::Reset, error);
            false
        }
    }
}

/// Checks the caller, then connects to the app from the client's address.
async fn admit(
    node: &Node,
    pod: &Pod,
    peer: &Svid,
    from: SocketAddr,
    local: SocketAddr,
    connect: Connect,
    access: &Guard<'_>,
) -> Result<TcpStream, (ResetCode, String)> {
    if *node.draining.borrow() {
        return Err((
            ResetCode::Unreachable,
            "this node's daemon is ending".into(),
        ));
    }
    if local.port() == auth_common::TUNNEL_PORT {
        return Err((
            ResetCode::Protocol,
            "the tunnel goes to the app's own port, not to the daemon's".into(),
        ));
    }
    let Svid {
        identity,
        not_after,
        ..
    } = peer;
    // A tunnel may outlive the certificate of its handshake.
    if *not_after <= SystemTime::now() {
        return Err((
            ResetCode::Forbidden,
            format!("the certificate of {identity} has expired since the tunnel began"),
        ));
    }
    if let Some(lookups) = &node.lookups {
        // Whose address it is.
        let found = lookups.look_up(from.ip()).await;
        found.map_err(|unknown| (ResetCode::Unreachable, unknown.to_string()))?;
    }
    let snapshot = node.registry.snapshot();
    // The connection is registered by now, so a change of trust after this check cuts it.
    let trust = check_trusted(&snapshot, node.certificates.trust(), peer, from.ip())
        .map_err(|untrusted| (ResetCode::Forbidden, untrusted.to_string()))?;
    let own = trust.revoked.check_identity(&pod.workload.identity);
    own.map_err(|revoked| (ResetCode::Forbidden, revoked.to_string()))?;
    let claimed = connect.client.ip();
    admit_source(&snapshot, identity, from.ip(), claimed)
        .map_err(|denied| (ResetCode::Forbidden, denied.to_string()))?;
    // The claimed address is verified by now. Logging it earlier would let a caller write log lines for another client.
    access.learn(|details| details.client = connect.client);
    let asked = Connection {
        client: Some(identity),
        source: claimed,
        destination: local,
    };
    node.rules
        .judge(pod.enrolled.netns.cookie(), &asked, access)
        .map_err(|refused| (ResetCode::Forbidden, refused.to_string()))?;
    let keep_port = pod.is_free(connect.client, local.port());
    let netns = &pod.enrolled.netns;
    let dial = sockets::dial_app(&node.kernel, netns, connect.client, keep_port, local);
    match timeout(APP_ANSWER, dial).await {
        Ok(Ok(app)) => Ok(app),
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Err((ResetCode::Refused, format!("{local}: {error}")))
        }
        Ok(Err(error)) => Err((ResetCode::Unreachable, format!("{local}: {error}"))),
        Err(_) => Err((
            ResetCode::Unreachable,
            format!("{local}: no answer within {APP_ANSWER:?}"),
        )),
    }
}

/// Relays a plaintext caller of a PERMISSIVE pod to the app, from the caller's own address.
async fn plaintext(
    node: &Node,
    pod: &Pod,
    mut caller: TcpStream,
    app: Option<TcpStream>,
    from: SocketAddr,
    local: SocketAddr,
    access: Guard<'_>,
) {
    let mut app = match app {
        Some(app) => app,
        None => match dial_plain(node, pod, from, local).await {
            Ok(app) => app,
            Err(error) => return access.finish(Outcome::Refused, error),
        },
    };
    access.established();
    match plain::relay(&mut app, &mut caller, access.counters()).await {
        Ok(()) => access.finish(Outcome::Ok, ""),
        Err(error) => access.finish(Outcome::Reset, error),
    }
}

async fn dial_plain(
    node: &Node,
    pod: &Pod,
    from: SocketAddr,
    local: SocketAddr,
) -> io::Result<TcpStream> {
    if local.port() == auth_common::TUNNEL_PORT {
        return Err(io::Error::other("plaintext on the tunnel's own port"));
    }
    // The caller's port cannot be kept: its connection to the daemon uses it.
    let dial = sockets::dial_app(&node.kernel, &pod.enrolled.netns, from, false, local);
    timeout(APP_ANSWER, dial).await.unwrap_or_else(|_| {
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the app does not answer",
        ))
    })
}
