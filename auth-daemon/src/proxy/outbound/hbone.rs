//! Reaches an endpoint whose node speaks HBONE, or a waypoint: over a stream of a connection that the pod's connections share.

use std::net::SocketAddr;

use tokio::net::TcpStream;

use super::{
    Attempt, Call, Failure, Opened, Refusal,
    dialers::{ANSWER, HANDSHAKE, check_naming, within},
};
use crate::{
    observe::{
        access_log::{Outcome, Path},
        connections::Guard,
    },
    proxy::{path::Hbone, shares::Permit},
};
use auth_datapath::sockets::end_in_good_order;
use auth_tunnel::{
    Made,
    hbone::{self, Client, Connections, Ended, LARGE_WINDOW, OpenError, Place, SMALL_WINDOW},
};

/// What a pooled connection is charged: its descriptor, and its window if that is a large one.
pub(crate) type Charged = (Permit, Option<Permit>);

/// An open stream to an endpoint.
pub(super) struct Stream {
    stream: hbone::Stream,
    pub(super) endpoint: SocketAddr,
    /// `None` if the connection is this stream's alone.
    _place: Option<Place>,
}

impl Call<'_> {
    /// Opens a stream over a pooled connection or, if none has room, over a new one.
    pub(super) async fn dial_hbone(
        &self,
        attempt: &Attempt<'_>,
        to: Hbone,
    ) -> Result<Opened, Refusal> {
        self.access.learn(|details| details.path = Path::Hbone);
        let identities = &attempt.destination.identities;
        let pooled = self.pod.hbone.connections(to.at);
        // The server may have closed a pooled connection a moment ago; then the next, then a new one.
        while let Some((client, place)) = pooled.take(identities) {
            match self.open_stream(&client, attempt, to).await {
                Ok(stream) => return Ok(opened(stream, attempt, Some(place))),
                Err(Failure::Hbone(OpenError::Broken(_)) | Failure::Untrusted(_)) => {
                    pooled.forget(&place);
                }
                Err(why) => return Err(attempt.failed(why)),
            }
        }
        let dialing = pooled.dialing.lock().await;
        let (client, place) = match pooled.take(identities) {
            // Another connection of the pod has dialled meanwhile.
            Some((client, place)) => (client, Some(place)),
            None => self.connect(attempt, to.at, &pooled).await?,
        };
        drop(dialing);
        let stream = self.open_stream(&client, attempt, to).await;
        let stream = stream.map_err(|why| attempt.failed(why))?;
        Ok(opened(stream, attempt, place))
    }

    /// Connects to the endpoint's node, and adds the connection to the pool if the pod's share has room for it.
    async fn connect(
        &self,
        attempt: &Attempt<'_>,
        address: SocketAddr,
        pooled: &Connections<Charged>,
    ) -> Result<(Client, Option<Place>), Refusal> {
        let (node, pod) = (self.node, self.pod);
        let (certificate, tcp) = self.dial_with_certificate(attempt, address).await?;
        let permit = pod.outbound.idle_tunnel();
        let large = permit
            .as_ref()
            .and_then(|_| pod.outbound.large_window(None));
        let window = large.as_ref().map_or(SMALL_WINDOW, |_| LARGE_WINDOW);
        let config = certificate.configs.hbone_client.clone();
        let trust_domain = &node.config.trust_domain;
        let handshake = async {
            let (client, driver) = hbone::connect(tcp, config, trust_domain, window).await?;
            check_naming(&client.peer().identity, attempt.destination)?;
            Ok((client, driver))
        };
        let (client, driver) = within(attempt.limit(HANDSHAKE), Box::pin(handshake))
            .await
            .map_err(|why| attempt.failed(why))?;
        // It ends with its last stream, or when the peer no longer answers.
        tokio::spawn(driver);
        let made = Made::now(&certificate.svid, client.peer());
        let place = permit.map(|permit| pooled.put(client.clone(), made, (permit, large)));
        Ok((client, place))
    }

    async fn open_stream(
        &self,
        client: &Client,
        attempt: &Attempt<'_>,
        to: Hbone,
    ) -> Result<hbone::Stream, Failure> {
        // First, so that the log names a server that refuses, and a revocation from now on cuts the connection.
        self.access.learn(|details| {
            details.server_identity = Some(client.peer().identity.clone());
            details.key_exchange = client.key_exchange();
        });
        self.verify(client.peer(), to.at)?;
        let open = async { Ok(client.open(to.authority).await?) };
        let mut stream = within(attempt.limit(ANSWER), open).await?;
        // Bytes left from an endpoint that refused the connection by our own framing.
        stream
            .send_early(&self.early.bytes)
            .map_err(|error| OpenError::Broken(error).into())
            .map(|()| stream)
    }
}

fn opened(stream: hbone::Stream, attempt: &Attempt<'_>, place: Option<Place>) -> Opened {
    Opened::Hbone(Box::new(Stream {
        stream,
        endpoint: attempt.address,
        _place: place,
    }))
}

/// Relays until the connection ends, and closes or resets the app's side accordingly.
pub(super) async fn carry(mut app: TcpStream, mut open: Box<Stream>, access: Guard<'_>) {
    match hbone::relay(&mut app, &mut open.stream, access.counters()).await {
        Ended::Clean => match end_in_good_order((&app).into()) {
            Ok(()) => access.finish(Outcome::Ok, ""),
            Err(error) => access.finish(Outcome::Reset, error),
        },
        Ended::App(error) => {
            access.finish(Outcome::Reset, format_args!("the client's app: {error}"));
        }
        ended @ (Ended::Peer(_) | Ended::Broken(_)) => {
            access.finish(Outcome::Reset, format_args!("the server's side: {ended}"));
        }
    }
}
