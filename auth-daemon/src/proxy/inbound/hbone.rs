//! Serves a peer that speaks HBONE: a connection to the pod's port 15008 with a stream for each app connection. Each
//! stream is judged, delivered, cut and logged separately, like an app connection of our own framing.

use std::{
    future::poll_fn,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures_util::{
    StreamExt,
    future::{AbortHandle, Abortable, Either, select},
    stream::FuturesUnordered,
};
use rustls::NamedGroup;
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, sleep_until, timeout_at},
};

use super::{First, HANDSHAKE, Node, Pod, admit, late};
use crate::observe::{
    access_log::{Direction, Outcome, Path},
    connections::Guard,
    refusals::Refusal,
};
use crate::proxy::handshakes::Source;
use auth_datapath::sockets::{self, end_in_good_order};
use auth_mesh::Snapshot;
use auth_tunnel::{
    Made,
    frame::{Connect, ResetCode},
    hbone::{self, Ended, LARGE_WINDOW, MAX_STREAMS_ACCEPTED, Request, SMALL_WINDOW, Server},
    tls::svid::Svid,
};

/// How long a connection may stay without a stream. Longer than clients keep it.
const IDLE: Duration = Duration::from_secs(10 * 60);
/// Number of requests that a peer may reset before they are answered, less the number of those that it did not. Then it is
/// taken for an attacker (rapid reset, CVE-2023-44487).
const MAX_ABANDONED: usize = 200;

/// Serves a connection, from its handshake to the end of its last stream.
pub(super) async fn serve(
    node: &Node,
    pod: &Pod,
    tcp: TcpStream,
    from: SocketAddr,
    local: SocketAddr,
    first: First<'_>,
) {
    let source = first.place.source;
    let mut large = None;
    let window = || {
        large = pod.inbound.large_window(Some(source));
        large.as_ref().map_or(SMALL_WINDOW, |_| LARGE_WINDOW)
    };
    let handshake = Box::pin(handshake(node, pod, tcp, window));
    let handshake = first.place.in_turns(handshake);
    let (mut server, made) = match timeout_at(first.deadline, handshake).await {
        Ok(Ok(made)) => made,
        Ok(Err(reason)) => return first.access.finish(Outcome::Refused, reason),
        Err(_) => return first.access.finish(Outcome::Refused, late()),
    };
    let peer = (server.peer().clone(), server.key_exchange());
    first.access.learn(|details| {
        details.client_identity = Some(peer.0.identity.clone());
        details.peer = Some(peer.0.clone());
    });
    let mut deadline = first.deadline;
    let mut first = Some(first);
    let mut streams = FuturesUnordered::new();
    let mut abandoned = 0_usize;
    let mut draining = node.draining.subscribe();
    let mut drains = false;
    // Streams are refused from then on, and a client may keep a connection for longer than its certificate.
    let mut expires = Box::pin(sleep(made.usable_for()));
    let ended = loop {
        tokio::select! {
            request = server.next() => match request {
                Some(Ok(request)) => {
                    if let Some(First { access, .. }) = first.take() {
                        // Each stream has a line of its own.
                        access.discard();
                    }
                    if streams.len() >= MAX_STREAMS_ACCEPTED as usize {
                        request.turn_away();
                        continue;
                    }
                    streams.push(stream(node, pod, &peer, from, source, local, request));
                }
                Some(Err(error)) => break Err(error),
                None => break Ok(()),
            },
            Some(answered) = streams.next() => {
                abandoned = match answered {
                    Answered::Yes => abandoned.saturating_sub(1),
                    Answered::Abandoned => abandoned + 1,
                };
                if abandoned == MAX_ABANDONED {
                    tracing::warn!(
                        pod = %pod.workload.name, client = %from, identity = %peer.0.identity,
                        "HBONE connection closed: the client resets its requests before they are answered"
                    );
                    server.calm();
                }
                deadline = Instant::now() + IDLE;
            }
            _ = draining.wait_for(|draining| *draining), if !drains => {
                drains = true;
                server.drain();
            }
            () = sleep_until(deadline), if streams.is_empty() && !drains => {
                drains = true;
                server.drain();
            }
            // Not before the request for which the connection was made.
            () = &mut expires, if first.is_none() && !drains => {
                drains = true;
                server.drain();
            }
        }
    };
    if let Some(First { access, .. }) = first {
        let reason = match ended {
            Err(error) => error.to_string(),
            Ok(()) => "closed the connection without a CONNECT".to_owned(),
        };
        access.finish(Outcome::Refused, reason);
    }
    drop(server);
    // They end with the connection, and write their lines.
    while streams.next().await.is_some() {}
}

async fn handshake(
    node: &Node,
    pod: &Pod,
    tcp: TcpStream,
    window: impl FnOnce() -> u32,
) -> Result<(Server, Made), String> {
    let certificate = pod
        .certificate
        .obtain(HANDSHAKE)
        .await
        .ok_or_else(|| format!("no valid certificate for {}", pod.workload.identity))?;
    let config = certificate.configs.hbone_server.clone();
    let server = hbone::accept(tcp, config, &node.config.trust_domain, window)
        .await
        .map_err(|error| error.to_string())?;
    let made = Made::now(&certificate.svid, server.peer());
    Ok((server, made))
}

/// What became of a request.
enum Answered {
    Yes,
    /// The client reset it first.
    Abandoned,
}

/// Serves one stream. Its resources are charged to the pod as those of any connection.
async fn stream(
    node: &Node,
    pod: &Pod,
    (peer, key_exchange): &(Arc<Svid>, Option<NamedGroup>),
    from: SocketAddr,
    source: Source,
    local: SocketAddr,
    request: Request,
) -> Answered {
    let permit = match pod.inbound.connection(Some(source)) {
        Ok(permit) => permit,
        Err(exceeded) => {
            let refusal = Refusal::from(exceeded);
            node.refusals.note(&pod.workload.name, refusal, from);
            request.refuse(status(ResetCode::Unreachable));
            return Answered::Yes;
        }
    };
    let (cut, registration) = AbortHandle::new_pair();
    let cookie = pod.enrolled.netns.cookie();
    let access = node.connections.open(Direction::Inbound, cookie, from, cut);
    access.learn(|details| {
        details.path = Path::Hbone;
        details.client_identity = Some(peer.identity.clone());
        details.peer = Some(peer.clone());
        details.key_exchange = *key_exchange;
        details.server_identity = Some(pod.workload.identity.clone());
        details.server_netns = Some(cookie);
        details.destination = Some(local);
        details.endpoint = Some(local);
    });
    let one = Box::pin(one(node, pod, peer, from, local, request, access));
    let answered = Abortable::new(one, registration).await;
    drop(permit);
    answered.unwrap_or(Answered::Yes)
}

async fn one(
    node: &Node,
    pod: &Pod,
    peer: &Svid,
    from: SocketAddr,
    local: SocketAddr,
    mut request: Request,
    access: Guard<'_>,
) -> Answered {
    let deliver = Box::pin(deliver(
        node,
        pod,
        peer,
        from,
        local.ip(),
        request.destination(),
        &access,
    ));
    let abandoned = poll_fn(|context| request.poll_abandoned(context));
    let delivered = match select(deliver, abandoned).await {
        Either::Left((delivered, _)) => Some(delivered),
        Either::Right(((), _)) => None,
    };
    let mut app = match delivered {
        None => {
            access.finish(Outcome::Reset, "the client reset the stream");
            return Answered::Abandoned;
        }
        Some(Ok(app)) => app,
        Some(Err((code, reason))) => {
            request.refuse(status(code));
            access.finish(Outcome::Refused, reason);
            return Answered::Yes;
        }
    };
    let mut stream = match request.accept() {
        Ok(stream) => stream,
        Err(error) => {
            access.finish(Outcome::Reset, error);
            return Answered::Abandoned;
        }
    };
    access.established();
    match hbone::relay(&mut app, &mut stream, access.counters()).await {
        Ended::Clean => match end_in_good_order((&app).into()) {
            Ok(()) => access.finish(Outcome::Ok, ""),
            Err(error) => access.finish(Outcome::Reset, error),
        },
        Ended::App(error) => {
            access.finish(Outcome::Reset, format_args!("the server's app: {error}"));
        }
        ended @ (Ended::Peer(_) | Ended::Broken(_)) => {
            sockets::reset_when_delivered(app).await;
            access.finish(Outcome::Reset, format_args!("the client's side: {ended}"));
        }
    }
    Answered::Yes
}

/// Checks the caller and what it asks for, then connects to the app from the client's address.
async fn deliver(
    node: &Node,
    pod: &Pod,
    peer: &Svid,
    from: SocketAddr,
    local: IpAddr,
    asked: Result<SocketAddr, String>,
    access: &Guard<'_>,
) -> Result<TcpStream, (ResetCode, String)> {
    let malformed = |reason| (ResetCode::Protocol, reason);
    let dialled = asked.map_err(malformed)?;
    access.learn(|details| details.destination = Some(dialled));
    let is_own = |ip| ip == local || pod.enrolled.addresses().contains(&ip);
    if let Some(lookups) = node.lookups.as_ref().filter(|_| !is_own(dialled.ip())) {
        let found = lookups.look_up(dialled.ip()).await;
        found.map_err(|unknown| (ResetCode::Unreachable, unknown.to_string()))?;
    }
    let server = serves(&node.registry.snapshot(), dialled, is_own).map_err(malformed)?;
    if server.is_ipv4() != local.is_ipv4() {
        // The app would not see the client's address.
        return Err(malformed(format!(
            "{dialled} is of another address family than the connection from {}",
            from.ip()
        )));
    }
    access.learn(|details| details.endpoint = Some(server));
    let connect = Connect {
        dialled,
        // HBONE does not carry the client's port.
        client: SocketAddr::new(from.ip(), 0),
    };
    let app = admit(node, pod, peer, from, server, connect, access).await?;
    access.learn(|details| {
        // As the app sees it.
        details.client = app.local_addr().map_or(from, sockets::canonical);
    });
    Ok(app)
}

/// The pod's own address and port that `dialled` leads to. It is the pod's own, or a service's that the pod is behind.
fn serves(
    snapshot: &Snapshot,
    dialled: SocketAddr,
    is_own: impl Fn(IpAddr) -> bool,
) -> Result<SocketAddr, String> {
    if is_own(dialled.ip()) {
        return Ok(dialled);
    }
    let behind = snapshot.resolve(dialled).ok().and_then(|destination| {
        let mut endpoints = destination.endpoints.iter();
        endpoints
            .find(|endpoint| is_own(endpoint.address.ip()))
            .map(|endpoint| endpoint.address)
    });
    behind.ok_or_else(|| {
        format!("{dialled} is neither an address of this pod, nor of a service in front of it")
    })
}

/// The answer by which a client learns why its stream is refused.
fn status(code: ResetCode) -> hbone::StatusCode {
    match code {
        ResetCode::Protocol => hbone::StatusCode::BAD_REQUEST,
        ResetCode::Forbidden => hbone::StatusCode::UNAUTHORIZED,
        ResetCode::Refused | ResetCode::Unreachable | ResetCode::App | ResetCode::Internal => {
            hbone::StatusCode::SERVICE_UNAVAILABLE
        }
    }
}
