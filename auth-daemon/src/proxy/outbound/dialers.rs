//! Reaches one endpoint by the path that was chosen for it.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{net::TcpStream, time::timeout};

use super::{Attempt, Call, Failure, Neighbour, Opened, Refusal, Tunnel};
use crate::observe::access_log::{Outcome, Path};
use crate::{
    issuer::Current,
    proxy::{
        Node,
        caller::check_trusted,
        local_pods::{Forbidden, LocalPod, permit},
    },
};
use auth_datapath::sockets;
use auth_mesh::{Destination, Identity, policy::Connection};
use auth_tunnel::{
    self, Channel, ChannelError, Made, Taken,
    frame::{Event, Reset, ResetCode},
    tls::{svid::Svid, trust::Untrusted},
};

/// How long to wait for a certificate that is being issued. Less than [`PATIENCE`], so that the access log names the
/// missing certificate.
const CERTIFICATE: Duration = Duration::from_secs(9);
/// Timeout for an endpoint to answer a SYN, while there is another endpoint to try.
const DIAL: Duration = Duration::from_secs(2);
/// Timeout for the TLS handshake, while there is another endpoint to try.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(3);
/// Timeout for the answer to CONNECT, while there is another endpoint to try. Longer than the server's daemon waits for
/// its app.
pub(super) const ANSWER: Duration = Duration::from_secs(3);
/// Idle time up to which a tunnel counts as fresh: its daemon is assumed to be alive, and the app's early bytes are
/// sent at once. On any other tunnel CONNECT is sent alone, so that the connection can be retried elsewhere if no
/// answer comes.
const FRESH: Duration = Duration::from_millis(5);

impl Call<'_> {
    /// Connects to the pod's own app.
    pub(super) async fn dial_itself(&self, attempt: &Attempt<'_>) -> Result<Opened, Refusal> {
        self.access.learn(|details| {
            details.path = Path::Itself;
            details.server_identity = Some(self.pod.workload.identity.clone());
        });
        match self.dial(attempt, attempt.address).await {
            Ok(server) => Ok(Opened::Plainly(server)),
            Err(why) => Err(attempt.failed(why)),
        }
    }

    /// Connects to the app of `server`, a pod of this node.
    pub(super) async fn dial_same_node(
        &self,
        attempt: &Attempt<'_>,
        server: &Arc<LocalPod>,
    ) -> Result<Opened, Refusal> {
        let Attempt {
            address, source, ..
        } = *attempt;
        self.access.learn(|details| {
            details.path = Path::SameNode;
            details.server_netns = Some(server.cookie);
        });
        let step = self.reach(attempt.destination, server, source, address);
        let tcp = within(attempt.limit(DIAL), step).await;
        if let Err(why) = &tcp {
            let servers_side = self.access.servers_side(server.cookie);
            servers_side.finish(Outcome::Refused, why);
        }
        self.access.learn(|details| {
            details.server_identity = Some(server.identity.clone());
        });
        // Checked again, now that the open connections name the identity: a later revocation cuts this one.
        let revoked = &self.node.certificates.trust().current().revoked;
        revoked.check_identity(&server.identity)?;
        Ok(Opened::SameNode(Neighbour {
            tcp: tcp.map_err(|why| attempt.failed(why))?,
            endpoint: address,
            pair: self.pair(attempt, server),
            local_pod: server.clone(),
        }))
    }

    /// Connects to the endpoint without TLS.
    pub(super) async fn dial_plaintext(
        &self,
        attempt: &Attempt<'_>,
        why: &'static str,
    ) -> Result<Opened, Refusal> {
        self.access.learn(|details| details.path = Path::Plaintext);
        tracing::debug!(client = %self.connect.client, endpoint = %attempt.address, why, "without TLS");
        let server = within(attempt.limit(DIAL), self.dial(attempt, attempt.address)).await;
        Ok(Opened::Plainly(server.map_err(|why| attempt.failed(why))?))
    }

    /// Sends CONNECT over an idle tunnel or, if none works, over a new one.
    pub(super) async fn dial_tunnel(&mut self, attempt: &Attempt<'_>) -> Result<Opened, Refusal> {
        let (node, pod, address) = (self.node, self.pod, attempt.address);
        let destination = attempt.destination;
        let failed = |why| attempt.failed(why);
        // An idle tunnel may have been closed by the other side a moment ago; then the next, then a new one.
        while let Some(taken) = pod.pool.take(address, &destination.identities) {
            let Taken {
                mut channel,
                made,
                idled,
            } = taken;
            if self.verify(channel.peer(), address).is_err() {
                channel.close();
                continue;
            }
            match within(ANSWER, self.establish(&mut channel, idled < FRESH)).await {
                Ok(()) => return Ok(self.opened(channel, address, made)),
                Err(Failure::App(error)) => return Err(Refusal::App(error)),
                Err(failure) if self.early.in_doubt => return Err(failed(failure)),
                Err(Failure::Channel(_) | Failure::Closed) => {}
                Err(Failure::Silent) => {
                    // The other idle tunnels to this address would time out too, but the endpoint may still answer on a
                    // new one.
                    pod.pool.forget(address);
                    if attempt.others {
                        return Err(failed(Failure::Silent));
                    }
                }
                Err(failure) => return Err(failed(failure)),
            }
        }
        let (certificate, tcp) = self.dial_with_certificate(attempt, address).await?;
        let handshake = handshake(node, tcp, &certificate, destination);
        let mut channel = within(attempt.limit(HANDSHAKE), handshake)
            .await
            .map_err(failed)?;
        self.verify(channel.peer(), address)
            .map_err(|untrusted| failed(untrusted.into()))?;
        let made = Made::now(&certificate.svid, channel.peer());
        match within(attempt.limit(ANSWER), self.establish(&mut channel, true)).await {
            Ok(()) => {}
            Err(Failure::App(error)) => return Err(Refusal::App(error)),
            Err(failure) => return Err(failed(failure)),
        }
        Ok(self.opened(channel, address, made))
    }

    /// Connects to `address`, and returns the certificate that the pod is to present there.
    pub(super) async fn dial_with_certificate(
        &self,
        attempt: &Attempt<'_>,
        address: SocketAddr,
    ) -> Result<(Arc<Current>, TcpStream), Refusal> {
        let pod = self.pod;
        let none = || Refusal::NoCertificate(pod.workload.identity.clone());
        let certificate = pod.certificate.obtain(CERTIFICATE).await;
        certificate.ok_or_else(none)?;
        let dial = within(attempt.limit(DIAL), self.dial(attempt, address)).await;
        let tcp = dial.map_err(|why| attempt.failed(why))?;
        // The handshake begins now: the roots may have changed meanwhile.
        Ok((pod.certificate.current().ok_or_else(none)?, tcp))
    }

    /// Connects to `address`, the endpoint's or its node's on the endpoint's address, from the pod's netns.
    pub(super) async fn dial(
        &self,
        attempt: &Attempt<'_>,
        address: SocketAddr,
    ) -> Result<TcpStream, Failure> {
        let (kernel, pod) = (&self.node.kernel, self.pod);
        sockets::dial_endpoint(
            kernel,
            &pod.enrolled.netns,
            attempt.source,
            &pod.source_ports,
            address,
        )
        .await
        .map_err(Failure::Dial)
    }

    /// Checks that the peer of a tunnel is not revoked, and that its trust domain is trusted, before anything is sent over it.
    /// The open connection names the peer by then, so a later change of trust cuts it.
    pub(super) fn verify(&self, peer: &Arc<Svid>, address: SocketAddr) -> Result<(), Untrusted> {
        self.access
            .learn(|details| details.peer = Some(peer.clone()));
        let (snapshot, trust) = (self.node.registry.load(), self.node.certificates.trust());
        check_trusted(&snapshot, trust, peer, address.ip()).map(drop)
    }

    /// Connects to the app of a pod on this node, in the same way as the client's pod would.
    async fn reach(
        &self,
        destination: &Destination,
        local_pod: &Arc<LocalPod>,
        source: IpAddr,
        address: SocketAddr,
    ) -> Result<TcpStream, Failure> {
        let (node, netns) = (self.node, &self.pod.enrolled.netns);
        let local_pods = node.same_node.local_pods();
        // Missing for a moment after the client pod changes, until its connections end.
        let client = local_pods.by_cookie.get(&netns.cookie());
        let client = client.ok_or(Failure::Closed)?;
        let (snapshot, trust) = (
            node.registry.snapshot(),
            node.certificates.trust().current(),
        );
        let claimed = self.connect.client;
        permit(
            &snapshot,
            &trust.revoked,
            client,
            source,
            claimed.ip(),
            destination,
            local_pod,
        )?;
        let asked = Connection {
            client: Some(&client.identity),
            source: claimed.ip(),
            destination: address,
        };
        node.rules
            .judge(local_pod.cookie, &asked, self.access)
            .map_err(Forbidden::from)?;
        let from = SocketAddr::new(source, claimed.port());
        sockets::dial_neighbour(&node.kernel, netns, from, address)
            .await
            .map_err(|error| {
                let code = match error.kind() {
                    io::ErrorKind::ConnectionRefused => ResetCode::Refused,
                    _ => ResetCode::Unreachable,
                };
                let reason = format!("{address}: {error}");
                Failure::Reset(Reset { code, reason })
            })
    }

    /// Sends CONNECT and waits for the server's answer. On a `fresh` tunnel, the app's early bytes are sent before the
    /// answer arrives.
    async fn establish(&mut self, channel: &mut Channel, fresh: bool) -> Result<(), Failure> {
        if fresh && self.early.bytes.is_empty() {
            match self.early.take(self.app) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                    return Err(Failure::App(error));
                }
                _ => {}
            }
        }
        let early: &[u8] = if fresh { &self.early.bytes } else { &[] };
        self.early.in_doubt = !early.is_empty();
        channel.send_connect(&self.connect, early).await?;
        let answer = if self.early.in_doubt || !fresh {
            channel.receive_control().await?
        } else {
            tokio::select! {
                biased;
                answer = channel.receive_control() => answer?,
                arrived = self.early.arrived(self.app) => {
                    arrived.map_err(Failure::App)?;
                    self.early.in_doubt = true;
                    channel.send_early(&self.early.bytes).await?;
                    channel.receive_control().await?
                }
            }
        };
        let answer = match answer {
            Some(Event::Connected) => Ok(()),
            Some(Event::Reset(reset)) => Err(Failure::Reset(reset)),
            Some(_) => return Err(ChannelError::OutOfTurn("a frame other than CONNECTED").into()),
            None => Err(Failure::Closed),
        };
        // The server's side has answered, so it is known what became of the connection.
        self.early.in_doubt = false;
        if !fresh && answer.is_ok() && !self.early.bytes.is_empty() {
            // Bytes left from an endpoint that refused the connection.
            self.early.in_doubt = true;
            channel.send_early(&self.early.bytes).await?;
        }
        answer
    }

    fn opened(&self, channel: Channel, endpoint: SocketAddr, made: Made) -> Opened {
        self.access.learn(|details| {
            details.server_identity = Some(channel.peer().identity.clone());
            details.key_exchange = channel.key_exchange();
        });
        Opened::Tunnel(Box::new(Tunnel {
            channel,
            endpoint,
            made,
        }))
    }
}

/// Runs `step` with a time limit. Not an `async fn`, whose future would hold `step` twice.
pub(super) fn within<T>(
    limit: Duration,
    step: impl Future<Output = Result<T, Failure>>,
) -> impl Future<Output = Result<T, Failure>> {
    timeout(limit, step).map(|outcome| outcome.unwrap_or(Err(Failure::Silent)))
}

/// Performs the TLS handshake and checks secure naming: the server's identity must be one that may serve the
/// destination.
async fn handshake(
    node: &Node,
    tcp: TcpStream,
    certificate: &Current,
    destination: &Destination,
) -> Result<Channel, Failure> {
    let config = certificate.configs.client.clone();
    let trust_domain = &node.config.trust_domain;
    let channel = auth_tunnel::handshake::connect(tcp, config, trust_domain).await?;
    check_naming(&channel.peer().identity, destination)?;
    Ok(channel)
}

/// Checks secure naming: the server's identity must be one that may serve the destination.
pub(super) fn check_naming(presented: &Identity, destination: &Destination) -> Result<(), Failure> {
    if destination.identities.contains(presented) {
        return Ok(());
    }
    Err(Failure::Naming {
        presented: presented.to_string(),
        allowed: destination.allowed(),
    })
}
