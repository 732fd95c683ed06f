//! Serves the API of one workload on its listener and on connections from elsewhere, within limits.

use std::{convert::Infallible, io::ErrorKind, pin::pin, sync::Arc, time::Duration};

use auth_support::connection_limit::{ConnectionLimit, ConnectionPermit};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{Notify, mpsc},
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::{Status, body::Body, codegen::http, service::Routes};
use tower::{Service as TowerService, ServiceExt, service_fn as tower_fn};

use crate::{
    api::spiffe_workload_api_server::SpiffeWorkloadApiServer,
    path_authority::PathAuthority,
    service::{Served, Service},
};

/// Maximum number of open connections of a workload.
const MAX_CONNECTIONS: usize = 16;
/// Until the first request of a connection.
const FIRST_REQUEST: Duration = Duration::from_secs(5);
/// Until the answer to a request, or its beginning.
const REQUEST: Duration = Duration::from_secs(15);
/// A peer that does not react is detected within two of these.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Largest request, in bytes: a token and an audience.
const MAX_REQUEST: usize = 16 << 10;
/// Requests and streams of a connection at once.
const MAX_STREAMS: u32 = 16;
/// Unread bytes that are accepted on a stream and on a connection.
const WINDOW: u32 = 64 << 10;
/// Unsent bytes of a stream.
const MAX_UNSENT: usize = 64 << 10;
const MAX_HEADERS: u32 = 8 << 10;
/// Pause after a connection could not be accepted for lack of a resource.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a caller may stay connected whose requests are refused.
const REFUSED: Duration = Duration::from_secs(5);

/// A connection of the workload that another listener than its own has accepted.
#[derive(Debug)]
pub struct Attested {
    /// The connection.
    pub connection: UnixStream,
    /// The connection's place among those of that listener.
    pub permit: ConnectionPermit<u64>,
}

/// Serves the API on `listener` and on `attested` connections until the listener dies. All connections end when the future is
/// dropped.
pub async fn serve(listener: TcpListener, mut attested: mpsc::Receiver<Attested>, served: Served) {
    let identity = served.identity.clone();
    let service = SpiffeWorkloadApiServer::new(Service::new(served));
    let routes = Routes::new(service.max_decoding_message_size(MAX_REQUEST)).prepare();
    let limit = Arc::new(ConnectionLimit::new(MAX_CONNECTIONS, MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted.map(|(tcp, _)| Connection::Listener(tcp)),
            Some(attested) = attested.recv() => Ok(Connection::Attested(attested)),
            Some(_) = connections.join_next() => continue,
        };
        let connection = match accepted {
            Ok(accepted) => accepted,
            // The workload may have the right to close sockets of its netns (SOCK_DESTROY).
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                tracing::warn!(%identity, %error, "the workload API's listener was closed");
                return;
            }
            Err(error) => {
                tracing::warn!(%identity, %error, "a connection to the workload API cannot be accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(permit) = limit.admit(()) else {
            tracing::debug!(%identity, "a connection to the workload API is refused: {MAX_CONNECTIONS} are open");
            continue;
        };
        let routes = routes.clone();
        connections.spawn(async move {
            let served = match connection {
                Connection::Listener(tcp) => serve_connection(tcp, routes).await,
                Connection::Attested(attested) => {
                    let served =
                        serve_connection(PathAuthority::new(attested.connection), routes).await;
                    drop(attested.permit);
                    served
                }
            };
            if let Err(why) = served {
                tracing::debug!(why, "a connection to the workload API ended");
            }
            drop(permit);
        });
    }
}

enum Connection {
    Listener(TcpStream),
    Attested(Attested),
}

/// Answers each request on a connection with `status`, for at most five seconds.
pub async fn refuse(connection: UnixStream, status: Status) {
    let refusal = tower_fn(move |_| {
        let refused = status.clone().into_http();
        async move { Ok::<_, Infallible>(refused) }
    });
    let _ = timeout(
        REFUSED,
        serve_connection(PathAuthority::new(connection), refusal),
    )
    .await;
}

/// Serves HTTP/2 on a connection until it ends. Returns why it ended otherwise than by the peer's close.
async fn serve_connection<S>(
    connection: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    service: S,
) -> Result<(), String>
where
    S: TowerService<http::Request<Incoming>, Response = http::Response<Body>, Error = Infallible>
        + Clone,
    S::Future: Send + 'static,
    S: Send + 'static,
{
    let requested = Arc::new(Notify::new());
    let noted = requested.clone();
    let answer = service_fn(move |request: http::Request<_>| {
        noted.notify_one();
        let service = service.clone();
        async move {
            let answer = timeout(REQUEST, service.oneshot(request)).await;
            Ok::<_, Infallible>(match answer {
                Ok(Ok(answer)) => answer,
                Err(_) => {
                    Status::deadline_exceeded("the request was not complete in time").into_http()
                }
            })
        }
    });
    let served = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_send_buf_size(MAX_UNSENT)
        .max_header_list_size(MAX_HEADERS)
        .keep_alive_interval(Some(KEEPALIVE))
        .keep_alive_timeout(KEEPALIVE)
        .serve_connection(TokioIo::new(connection), answer);
    let mut served = pin!(served);
    tokio::select! {
        ended = served.as_mut() => return ended.map_err(|error| error.to_string()),
        first = timeout(FIRST_REQUEST, requested.notified()) => {
            first.map_err(|_| format!("no request within {FIRST_REQUEST:?}"))?;
        }
    }
    served.await.map_err(|error| error.to_string())
}
