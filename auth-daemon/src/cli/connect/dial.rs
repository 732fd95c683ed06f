//! Opens a stream to a service: to one of its pods' port 15008, by HBONE, with the person's certificate.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kube::Client;
use rand::seq::SliceRandom;
use tokio::{net::TcpStream, task::JoinHandle, time::timeout};

use crate::issuer::{Certificate, Stream};
use auth_common::TUNNEL_PORT;
use auth_kubernetes::port_forward;
use auth_mesh::{Destination, Endpoint, TrustDomain};
use auth_tunnel::hbone::{self, LARGE_WINDOW};

/// Maximum time to connect to an endpoint's address.
const CONNECT: Duration = Duration::from_secs(3);
/// Maximum time for the handshake, and for the answer of the server's node. Through an API server, each takes a few round
/// trips.
const ANSWER: Duration = Duration::from_secs(10);
/// Number of endpoints that are tried.
const ATTEMPTS: usize = 3;

/// An open stream, and the task that drives its connection. The task ends once the stream is dropped and its end is sent.
pub(super) struct Opened {
    pub(super) stream: hbone::Stream,
    pub(super) driver: JoinHandle<()>,
}

/// Dials the endpoints of services.
pub(super) struct Dialer {
    trust_domain: TrustDomain,
    certificate: Arc<Certificate>,
    /// Where pods are not reached by their addresses.
    cluster: Option<Client>,
    /// Whether an address did not answer, so that others will not, either.
    unreachable: AtomicBool,
}

impl Dialer {
    /// Dials with `certificate`, through the API server of `cluster` if `always`, or if an address does not answer.
    pub(super) fn new(
        trust_domain: TrustDomain,
        certificate: Arc<Certificate>,
        cluster: Option<Client>,
        always: bool,
    ) -> Self {
        Self {
            trust_domain,
            certificate,
            cluster,
            unreachable: AtomicBool::new(always),
        }
    }

    /// Opens a stream to one of the endpoints of `destination`, whose identity must be one that may serve it.
    pub(super) async fn open(&self, destination: &Destination) -> Result<Opened, String> {
        let mut endpoints: Vec<_> = destination.endpoints.iter().collect();
        endpoints.shuffle(&mut rand::rng());
        let mut why = "there is no endpoint in the mesh".to_owned();
        for endpoint in endpoints.into_iter().take(ATTEMPTS) {
            match self.open_to(endpoint, destination).await {
                Ok(stream) => return Ok(stream),
                Err(error) => why = format!("{}: {error}", endpoint.address),
            }
        }
        Err(why)
    }

    async fn open_to(
        &self,
        endpoint: &Endpoint,
        destination: &Destination,
    ) -> Result<Opened, String> {
        let certificate = self
            .certificate
            .current()
            .ok_or("the certificate has expired, and the CA has issued no other")?;
        let stream = self.connect(endpoint).await?;
        let config = certificate.configs.hbone_client.clone();
        let ip = endpoint.address.ip();
        let handshake = hbone::connect_over(stream, ip, config, &self.trust_domain, LARGE_WINDOW);
        let (client, driver) = within(ANSWER, "the handshake is not finished", handshake).await?;
        // Secure naming, as in a daemon.
        let server = &client.peer().identity;
        if !destination.identities.contains(server) {
            return Err(format!(
                "the server is {server}, not {}",
                destination.allowed()
            ));
        }
        let driver = tokio::spawn(driver);
        let stream = within(ANSWER, "no answer", client.open(endpoint.address)).await?;
        Ok(Opened { stream, driver })
    }

    async fn connect(&self, endpoint: &Endpoint) -> Result<Box<dyn Stream>, String> {
        let address = SocketAddr::new(endpoint.address.ip(), TUNNEL_PORT);
        let mut direct = None;
        if !self.unreachable.load(Ordering::Relaxed) {
            let connect = async {
                let tcp = TcpStream::connect(address).await?;
                tcp.set_nodelay(true)?;
                io::Result::Ok(tcp)
            };
            match within(CONNECT, "no answer", connect).await {
                Ok(tcp) => return Ok(Box::new(tcp)),
                Err(why) => direct = Some(format!("{address}: {why}")),
            }
        }
        let (Some(client), Some(pod)) = (&self.cluster, &endpoint.workload) else {
            return Err(direct.unwrap_or_else(|| "it is not a known pod's".to_owned()));
        };
        let name = &pod.name;
        let forwarded = port_forward(client, &name.namespace, &name.name, TUNNEL_PORT).await;
        match forwarded {
            Ok(forwarded) => {
                self.unreachable.store(true, Ordering::Relaxed);
                Ok(Box::new(forwarded))
            }
            Err(error) => {
                let right = "get and create on pods/portforward";
                let why = super::access::refused(error, right, &name.namespace);
                let direct = direct
                    .map(|direct| format!("{direct}; "))
                    .unwrap_or_default();
                Err(format!("{direct}port-forward: {why}"))
            }
        }
    }
}

/// Waits for `work` for at most `limit`. `late` says what has not happened by then.
async fn within<T, E: std::fmt::Display>(
    limit: Duration,
    late: &str,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, String> {
    match timeout(limit, work).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err(format!("{late} within {limit:?}")),
    }
}
