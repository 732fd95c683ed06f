//! Client side of the data path: serves an app's captured connection, from `accept` on the pod's loopback to its end.

mod dialers;
pub(crate) mod hbone;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::{
    FutureExt,
    future::{AbortHandle, Abortable},
};
use nix::sys::socket::{MsgFlags, recv};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::TcpStream,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    Node, Pod,
    local_pods::{Forbidden, LocalPod},
    lookups::{Found, NotFound},
    path::{ChosenPath, NoPath, View, choose_path},
    plaintext as plain,
    routes::Pair,
    unclaimed,
};
use crate::config::SameNode;
use crate::observe::{
    access_log::{Direction, Outcome},
    connections::Guard,
    remote_clusters::ClusterGone,
};
use auth_datapath::sockets::{self, end_in_good_order};
use auth_mesh::{Destination, Endpoint, NoWaypoint, Unreachable};
use auth_tunnel::{
    self, Channel, ChannelError, Ending, HandshakeError, MAX_EARLY_BYTES, Made,
    frame::{Connect, Reset, ResetCode},
    hbone::OpenError,
    relay,
    tls::trust::{Revoked, Untrusted},
};

/// Maximum time until the app's connection is established or refused.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an address that no object claims may take to become known. A pod may be dialled a moment before the watch
/// reports it.
const LEARN: Duration = Duration::from_secs(1);
/// How soon istiod is asked again meanwhile.
const ASK_AGAIN: Duration = Duration::from_millis(250);
/// Timeout for sending a RESET.
const SEND_RESET: Duration = Duration::from_secs(1);
/// Maximum number of endpoints tried for one connection.
const MAX_ATTEMPTS: usize = 3;

/// Serves one accepted connection. Completes when the connection has ended or was cut. If the future is dropped earlier,
/// `app` is reset.
///
/// The future is a large part of an idle connection's memory: an `async fn` would hold each argument twice, and all that is
/// awaited here without a box of its own takes its room for as long as the connection lasts.
pub(crate) fn serve(
    node: Arc<Node>,
    pod: Arc<Pod>,
    mut app: TcpStream,
    from: SocketAddr,
) -> impl Future<Output = ()> + Send {
    let (cut, registration) = AbortHandle::new_pair();
    let serving = async move {
        let (node, pod) = (&*node, &*pod);
        let cookie = pod.enrolled.netns.cookie();
        let dialled = node.kernel.dialled(&app);
        let client = own_address(pod, from, dialled);
        let open = &node.connections;
        let access = open.open(Direction::Outbound, cookie, client, cut);
        access.learn(|details| details.client_identity = Some(pod.workload.identity.clone()));
        let Some(dialled) = dialled else {
            return access.finish(
                Outcome::Refused,
                "not a captured connection: the app dialled the daemon's own port",
            );
        };
        access.learn(|details| details.destination = Some(dialled));
        let reserved = pod.source_ports.reserve(from.port());
        if reserved.is_some() {
            // The server's app could not see this source port if an idle tunnel used it.
            pod.pool.forget_source(from.port());
        }
        let call = Call {
            node,
            pod,
            app: &app,
            connect: Connect { dialled, client },
            access: &access,
            early: Early::default(),
        };
        let mut tunnel = match call.begin().boxed().await {
            Ok((Opened::Tunnel(tunnel), _)) => tunnel,
            Ok((Opened::Hbone(stream), _)) => {
                let _load = node.balance.count(stream.endpoint);
                return Box::pin(hbone::carry(app, stream, access)).await;
            }
            Ok((Opened::Plainly(server), early)) => {
                return Box::pin(carry_plaintext(app, server, early, access)).await;
            }
            Ok((Opened::SameNode(neighbour), early)) => {
                if let Err(exposed) = node.same_node.remember(node, cookie, dialled).await {
                    return access.finish(Outcome::Reset, exposed);
                }
                return Box::pin(carry_same_node(node, app, neighbour, early, access)).await;
            }
            Err(gone @ Refusal::App(_)) => return access.finish(Outcome::Reset, gone),
            Err(refusal) => return access.finish(Outcome::Refused, refusal),
        };
        let _load = node.balance.count(tunnel.endpoint);
        let ending = relay(&mut app, &mut tunnel.channel, access.counters()).await;
        finish(pod, app, tunnel, ending, access).await;
    };
    Abortable::new(serving, registration).map(drop)
}

/// Relays without TLS. `early` holds bytes that were read from the app for an endpoint that refused the connection.
async fn carry_plaintext(
    mut app: TcpStream,
    mut server: TcpStream,
    early: Vec<u8>,
    access: Guard<'_>,
) {
    match relay_plaintext(&mut app, &mut server, &early, &access).await {
        Ok(()) => access.finish(Outcome::Ok, ""),
        Err(error) => access.finish(Outcome::Reset, error),
    }
}

/// Like [`carry_plainly`], to another pod of this node, until one of the two is gone or has no private link any more, or until
/// their packets leave these links.
async fn carry_same_node(
    node: &Node,
    mut app: TcpStream,
    mut neighbour: Neighbour,
    early: Vec<u8>,
    access: Guard<'_>,
) {
    let _load = node.balance.count(neighbour.endpoint);
    let servers_side = access.servers_side(neighbour.local_pod.cookie);
    let relayed = relay_plaintext(&mut app, &mut neighbour.tcp, &early, &access);
    let ended = tokio::select! {
        // First, so that nothing is relayed if that is known before the first byte.
        biased;
        link = node.same_node.gone(&neighbour.pair, &neighbour.local_pod) => match link {
            Some(shared) => Err(io::Error::other(shared)),
            None => return,
        },
        ended = relayed => ended,
    };
    for access in [access, servers_side] {
        match &ended {
            Ok(()) => access.finish(Outcome::Ok, ""),
            Err(error) => access.finish(Outcome::Reset, error),
        }
    }
}

async fn relay_plaintext(
    app: &mut TcpStream,
    server: &mut TcpStream,
    early: &[u8],
    access: &Guard<'_>,
) -> io::Result<()> {
    server.write_all(early).await?;
    plain::relay(app, server, access.counters()).await
}

/// An established connection to the server.
enum Opened {
    Tunnel(Box<Tunnel>),
    /// A stream of an HBONE connection.
    Hbone(Box<hbone::Stream>),
    /// The pod's own app, which needs no tunnel, or a server that is reached in plaintext.
    Plainly(TcpStream),
    /// The app of another pod on this node.
    SameNode(Neighbour),
}

struct Neighbour {
    tcp: TcpStream,
    endpoint: SocketAddr,
    pair: Pair,
    local_pod: Arc<LocalPod>,
}

struct Tunnel {
    channel: Channel,
    endpoint: SocketAddr,
    made: Made,
}

/// Bytes that the app sends before the server's app has accepted. They are sent with CONNECT, which saves a round trip.
///
/// They are sent only to an authenticated daemon that may serve the destination, and at most once to a daemon that may
/// have delivered them: after that the connection fails instead of being retried elsewhere.
#[derive(Debug, Default)]
struct Early {
    bytes: Vec<u8>,
    in_doubt: bool,
}

impl Early {
    /// Reads what the app has sent so far. Returns `false` if the app has closed its direction, which the relay detects
    /// again.
    fn take(&mut self, app: &TcpStream) -> io::Result<bool> {
        let mut bytes = [0; MAX_EARLY_BYTES];
        let count = recv(app.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT)?;
        self.bytes = bytes[..count].to_vec();
        Ok(count > 0)
    }

    /// Waits until the app has sent something. Never returns if the app closes its direction without sending anything.
    async fn arrived(&mut self, app: &TcpStream) -> io::Result<()> {
        loop {
            app.readable().await?;
            match app.try_io(Interest::READABLE, || self.take(app)) {
                Ok(true) => return Ok(()),
                Ok(false) => return std::future::pending().await,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// An app's connection that is being established.
struct Call<'a> {
    node: &'a Node,
    pod: &'a Pod,
    app: &'a TcpStream,
    connect: Connect,
    access: &'a Guard<'a>,
    early: Early,
}

/// One endpoint that is tried.
struct Attempt<'a> {
    destination: &'a Destination,
    address: SocketAddr,
    /// The pod's address that the connection comes from.
    source: IpAddr,
    /// Whether further endpoints can be tried.
    others: bool,
}

impl Attempt<'_> {
    /// The time limit of a step. The last endpoint may take as long as the app waits.
    fn limit(&self, step: Duration) -> Duration {
        if self.others { step } else { PATIENCE }
    }

    fn failed(&self, why: Failure) -> Refusal {
        Refusal::Endpoint {
            endpoint: self.address,
            why,
        }
    }
}

/// Why a connection is refused, for the log.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
    #[error(transparent)]
    Unclaimed(#[from] unclaimed::Refused),
    #[error(transparent)]
    NotFound(#[from] NotFound),
    #[error("no valid certificate for {0}; see the daemon's log for why the CA gives none")]
    NoCertificate(auth_mesh::Identity),
    #[error("{endpoint}: {why}")]
    Endpoint { endpoint: SocketAddr, why: Failure },
    #[error(transparent)]
    Revoked(#[from] Revoked),
    #[error("its traffic goes through a waypoint: {0}")]
    Waypoint(#[from] NoWaypoint),
    #[error("no endpoint answered within {PATIENCE:?}")]
    Late,
    #[error("it has internalTrafficPolicy Local, and no ready endpoint on this node")]
    NoneHere,
    #[error("the pod has no address of the family of {0}")]
    Family(SocketAddr),
    #[error("the client's app: {0}")]
    App(io::Error),
}

/// Reason for which an attempt to reach one endpoint failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("cannot connect: {0}")]
    Dial(std::io::Error),
    #[error("does not answer")]
    Silent,
    #[error(transparent)]
    NoPath(#[from] NoPath),
    #[error(transparent)]
    ClusterGone(#[from] ClusterGone),
    #[error("{0}")]
    Forbidden(#[from] Forbidden),
    #[error("{0}")]
    Handshake(#[from] HandshakeError),
    #[error("secure naming: it presents {presented}, but may only be {allowed}")]
    Naming { presented: String, allowed: String },
    #[error("{0}")]
    Untrusted(#[from] Untrusted),
    #[error("{0}")]
    Channel(#[from] ChannelError),
    #[error("{0}")]
    Hbone(#[from] OpenError),
    #[error("{}{}", refused_by(.0.code), if .0.reason.is_empty() { String::new() } else { format!(": {}", .0.reason) })]
    Reset(Reset),
    #[error("closed the tunnel instead of answering")]
    Closed,
    /// The client's app failed, not the endpoint.
    #[error("the client's app: {0}")]
    App(io::Error),
}

fn refused_by(code: ResetCode) -> &'static str {
    match code {
        ResetCode::Refused => "its app refuses the connection",
        ResetCode::Unreachable => "its app does not answer",
        ResetCode::Forbidden => "its node forbids it",
        ResetCode::App => "its app reset the connection",
        ResetCode::Protocol => "its node calls it a breach of protocol",
        ResetCode::Internal => "its node is in trouble",
    }
}

impl Call<'_> {
    /// Establishes the connection. Returns it, and the bytes that the app has sent so far and that were counted.
    async fn begin(mut self) -> Result<(Opened, Vec<u8>), Refusal> {
        let opened = self.open().await?;
        self.access.established();
        let Early { bytes, .. } = self.early;
        let counters = self.access.counters();
        counters.up.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok((opened, bytes))
    }

    /// Tries endpoints until one accepts the connection. Sends none of the app's bytes to an endpoint that may not
    /// serve the destination.
    async fn open(&mut self) -> Result<Opened, Refusal> {
        let deadline = Instant::now() + PATIENCE;
        let mut destination = self.resolve().await?;
        let revoked = &self.node.certificates.trust().current().revoked;
        revoked.check_identity(&self.pod.workload.identity)?;
        let mut through_waypoint = None;
        if let Some(waypoint) = &destination.waypoint {
            let asked = destination.own_address.unwrap_or(self.connect.dialled);
            let snapshot = self.node.registry.snapshot();
            destination = snapshot.waypoint(waypoint, asked.ip())?;
            through_waypoint = Some(asked);
        }
        let (own, local) = (&self.node.config.node_name, destination.local);
        let endpoints = destination.endpoints.iter();
        let endpoints: Vec<_> = endpoints
            .filter(|endpoint| !local || endpoint.is_on(own))
            .collect();
        if endpoints.is_empty() {
            return Err(Refusal::NoneHere);
        }
        let client = destination.sticky.then(|| self.connect.client.ip());
        let mut tried = Vec::new();
        let mut last = None;
        while tried.len() < MAX_ATTEMPTS
            && let Some(endpoint) = self.node.balance.pick(&endpoints, &tried, client)
        {
            let address = endpoint.address;
            tried.push(address);
            let pod = endpoint.workload.as_ref();
            let remote_server = pod.filter(|pod| pod.name.cluster().is_some()).cloned();
            self.access.learn(|details| {
                details.endpoint = Some(address);
                details.remote_server = remote_server;
                // Of the endpoint before, which refused.
                details.server_identity = None;
            });
            // The last endpoint may use all the time that is left.
            let others = tried.len() < endpoints.len().min(MAX_ATTEMPTS);
            let attempt = self.attempt(&destination, endpoint, through_waypoint, others);
            match timeout_at(deadline, attempt).await {
                Ok(Ok(opened)) => return Ok(opened),
                Ok(Err(refusal @ Refusal::App(_))) => return Err(refusal),
                Ok(Err(refusal)) if self.early.in_doubt => return Err(refusal),
                Ok(Err(refusal)) => last = Some(refusal),
                Err(_) => return Err(last.unwrap_or(Refusal::Late)),
            }
            if let Some(refusal) = &last {
                let Connect { client, dialled } = self.connect;
                tracing::debug!(%client, %dialled, %refusal, "trying another endpoint");
            }
        }
        Err(last.unwrap_or(Refusal::Late))
    }

    /// Resolves the dialled address, with names on demand once it is known what has it.
    async fn resolve(&self) -> Result<Destination, Refusal> {
        let Some(lookups) = &self.node.lookups else {
            return self.resolve_known().await;
        };
        let (registry, dialled) = (&self.node.registry, self.connect.dialled);
        // It may be an exposed port of a service, which is known by its own address alone.
        let known = registry.snapshot().resolve(dialled).ok();
        let own_address = known.and_then(|known| known.own_address);
        let asked = own_address.unwrap_or(dialled).ip();
        if registry.snapshot().node_at(asked).is_some() {
            return self.resolve_known().await;
        }
        let deadline = Instant::now() + LEARN;
        let mut is_doubted = false;
        loop {
            let found = lookups.look_up(asked).await?;
            if registry.snapshot().kind(asked).is_some() {
                break;
            }
            // What had the address is gone since.
            if found == Found::Known && !std::mem::replace(&mut is_doubted, true) {
                lookups.doubt(asked);
                continue;
            }
            if self.node.unclaimed.refuse(asked).is_none() {
                return Ok(Destination::outside(dialled));
            }
            // An address of the mesh's networks, which a pod may be about to get.
            if Instant::now() >= deadline {
                break;
            }
            sleep(ASK_AGAIN).await;
        }
        self.resolve_known().await
    }

    /// Resolves the dialled address. Waits for a moment if no object claims it yet.
    async fn resolve_known(&self) -> Result<Destination, Refusal> {
        let (registry, dialled) = (&self.node.registry, self.connect.dialled);
        let deadline = Instant::now() + LEARN;
        let mut changes = registry.changes();
        let resolved = loop {
            changes.borrow_and_update();
            let snapshot = registry.snapshot();
            let ip = dialled.ip();
            // An address that is refused stays refused where a port of it is exposed.
            let resolved =
                if snapshot.kind(ip).is_none() && self.node.unclaimed.refuse(ip).is_some() {
                    Err(Unreachable::Unknown(ip))
                } else {
                    snapshot.resolve(dialled)
                };
            let is_known = !matches!(resolved, Err(Unreachable::Unknown(_)));
            if is_known || !matches!(timeout_at(deadline, changes.changed()).await, Ok(Ok(()))) {
                break resolved;
            }
        };
        self.access.learn(|details| {
            details.service = match &resolved {
                Ok(destination) => destination.service.clone(),
                Err(unreachable) => unreachable.service().cloned(),
            };
        });
        resolved.map_err(|unreachable| match unreachable {
            Unreachable::Unknown(address) => match self.node.unclaimed.refuse(address) {
                Some(refused) => refused.into(),
                None => unreachable.into(),
            },
            _ => unreachable.into(),
        })
    }

    /// Connects to `endpoint` by the path that [`choose_path`] chooses. `others` says whether further endpoints can be
    /// tried.
    async fn attempt(
        &mut self,
        destination: &Destination,
        endpoint: &Endpoint,
        through_waypoint: Option<SocketAddr>,
        others: bool,
    ) -> Result<Opened, Refusal> {
        let address = endpoint.address;
        let pod = endpoint.workload.as_ref();
        // The open connection names the pod by now, so a later removal of its cluster cuts it.
        if let Some(Err(gone)) = pod.map(|pod| self.node.check_cluster(pod)) {
            return Err(Refusal::Endpoint {
                endpoint: address,
                why: gone.into(),
            });
        }
        let source = self.source(address).map_err(|error| Refusal::Endpoint {
            endpoint: address,
            why: Failure::Dial(error),
        })?;
        let attempt = Attempt {
            destination,
            address,
            source: source.ok_or(Refusal::Family(address))?,
            others,
        };
        let mut path = self.choose(endpoint, through_waypoint, true);
        if let Ok(ChosenPath::SameNode(server)) = &path {
            let pair = self.pair(&attempt, server);
            let same_node = &self.node.same_node;
            if !same_node.routes.is_direct(&pair)
                && let Err(why) = Box::pin(same_node.check_route(pair)).await
            {
                tracing::debug!(client = %self.connect.client, endpoint = %address, %why, "not in the kernel");
                path = self.choose(endpoint, through_waypoint, false);
            }
        }
        match path.map_err(|why| attempt.failed(why.into()))? {
            ChosenPath::Itself => self.dial_itself(&attempt).await,
            ChosenPath::SameNode(server) => self.dial_same_node(&attempt, &server).await,
            ChosenPath::Plaintext(why) => self.dial_plaintext(&attempt, why).await,
            ChosenPath::Tunnel => self.dial_tunnel(&attempt).await,
            ChosenPath::Hbone(to) => self.dial_hbone(&attempt, to).await,
        }
    }

    /// The pod's address that a connection to `address` comes from. `None` if it has none of that family.
    fn source(&self, address: SocketAddr) -> io::Result<Option<IpAddr>> {
        let enrolled = &self.pod.enrolled;
        match enrolled.address_like(address.ip()) {
            None if enrolled.addresses().is_empty() => {
                sockets::source_towards(&enrolled.netns, address).map(Some)
            }
            own => Ok(own),
        }
    }

    /// The client's pod and `server`, another one of this node.
    fn pair(&self, attempt: &Attempt<'_>, server: &LocalPod) -> Pair {
        Pair {
            client: self.pod.enrolled.netns.cookie(),
            server: server.cookie,
            source: attempt.source,
            address: attempt.address.ip(),
        }
    }

    /// Chooses the path to `endpoint`. `directly` says whether pods of this node may be reached without TLS.
    fn choose(
        &self,
        endpoint: &Endpoint,
        through_waypoint: Option<SocketAddr>,
        directly: bool,
    ) -> Result<ChosenPath, NoPath> {
        let node = self.node;
        let directly = directly && node.config.same_node == SameNode::Kernel;
        let local_pods = directly.then(|| node.same_node.local_pods());
        let cookie = self.pod.enrolled.netns.cookie();
        let local_pods = local_pods.filter(|pods| {
            let client = pods.by_cookie.get(&cookie);
            client.is_some_and(|client| client.has_private_link)
        });
        let snapshot = node.registry.load();
        choose_path(
            endpoint,
            &View {
                own_addresses: self.pod.enrolled.addresses(),
                through_waypoint,
                local_pods: local_pods.as_deref(),
                node_name: &node.config.node_name,
                snapshot: &snapshot,
                unclaimed: &node.unclaimed,
                had_daemon: &|name| {
                    snapshot.had_daemon(name) || node.kernel.proven_nodes.contains(name)
                },
                policies: &node.policies,
            },
        )
    }
}

/// Closes or resets both sides according to `ending`, and returns the tunnel to the pool if it can be reused.
async fn finish(
    pod: &Pod,
    app: TcpStream,
    mut tunnel: Box<Tunnel>,
    ending: Ending,
    access: Guard<'_>,
) {
    match ending {
        Ending::Clean => {
            let ended = end_in_good_order((&app).into());
            let permit = pod.outbound.idle_tunnel();
            pod.pool
                .put(tunnel.endpoint, tunnel.channel, tunnel.made, permit);
            match ended {
                Ok(()) => access.finish(Outcome::Ok, ""),
                Err(error) => access.finish(Outcome::Reset, error),
            }
        }
        Ending::App(error) => {
            send_reset(&mut tunnel.channel, ResetCode::App, &error.to_string()).await;
            access.finish(Outcome::Reset, format_args!("the client's app: {error}"));
        }
        Ending::Peer(reset) => access.finish(
            Outcome::Reset,
            format_args!("the server's side: {:?} {}", reset.code, reset.reason),
        ),
        Ending::Tunnel(error) => access.finish(Outcome::Reset, error),
    }
}

/// Sends RESET to the peer, if the tunnel can still carry it.
pub(crate) async fn send_reset(channel: &mut Channel, code: ResetCode, reason: &str) {
    let reset = Reset {
        code,
        reason: reason.to_owned(),
    };
    // If the RESET cannot be sent, the tunnel ends with a RST, which means the same.
    // In a box, because it takes more room than the relay before it.
    let sending = Box::pin(channel.send_reset(&reset));
    if let Ok(Ok(())) = timeout(SEND_RESET, sending).await {
        let _ = end_in_good_order(channel.socket());
    }
}

/// Returns the client's address as the server's app sees it. The app's own socket may be bound to the loopback by now.
/// If the pod's addresses are not known, returns the address that the pod's kernel would choose.
fn own_address(pod: &Pod, from: SocketAddr, dialled: Option<SocketAddr>) -> SocketAddr {
    if !from.ip().is_loopback() {
        return from;
    }
    let own = pod.enrolled.address_like(from.ip()).or_else(|| {
        let remote = dialled.filter(|_| pod.enrolled.addresses().is_empty())?;
        sockets::source_towards(&pod.enrolled.netns, remote).ok()
    });
    own.map_or(from, |ip| SocketAddr::new(ip, from.port()))
}
