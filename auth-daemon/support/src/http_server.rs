//! HTTP server for short responses, with limits on concurrent connections and their duration.

use std::{
    future::poll_fn,
    io,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, http::header::CONTENT_TYPE, response::IntoResponse};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::Semaphore,
    time::timeout,
};

/// Maximum number of concurrent connections. Further ones are closed.
const AT_ONCE: usize = 64;
/// Maximum time for a request's headers to arrive.
const HEADERS: Duration = Duration::from_secs(5);
/// Maximum duration of a connection.
const CONNECTION: Duration = Duration::from_secs(10);
/// Pause after a failed accept, which usually means a shortage of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Encodes the metrics of `registry` in the OpenMetrics text format.
pub fn open_metrics(registry: &Registry) -> impl IntoResponse + use<> {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = encode(&mut text, registry);
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, kind)], text)
}

/// A source of connections.
pub trait Listener {
    /// Type of a connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Accepts the next connection.
    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<Self::Stream>>;
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<TcpStream>> {
        Self::poll_accept(self, context).map_ok(|(stream, _)| stream)
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<UnixStream>> {
        Self::poll_accept(self, context).map_ok(|(stream, _)| stream)
    }
}

/// Serves `routes` indefinitely, with one request per connection.
pub async fn answer(listener: impl Listener, routes: Router) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let stream = match poll_fn(|context| listener.poll_accept(context)).await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a request");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            continue;
        };
        let routes = routes.clone();
        tokio::spawn(async move {
            answer_one(stream, routes).await;
            drop(place);
        });
    }
}

/// Answers one request on `stream`. A client with a malformed or slow request gets no response.
pub async fn answer_one(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    routes: Router,
) {
    let mut http = Builder::new(TokioExecutor::new());
    http.http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .keep_alive(false);
    let http = http.http1_only();
    let service = TowerToHyperService::new(routes);
    let served = http.serve_connection(TokioIo::new(stream), service);
    let _ = timeout(CONNECTION, served).await;
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    #[tokio::test]
    async fn so_many_may_ask_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(answer(
            listener,
            Router::new().route("/", get(async || "here\n")),
        ));
        let ask = async || {
            let mut tcp = TcpStream::connect(address).await.unwrap();
            // A connection over the limit is closed. If it has sent data by then, it is reset.
            let _ = tcp.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
            let mut response = String::new();
            let _ = tcp.read_to_string(&mut response).await;
            response
        };
        assert!(ask().await.ends_with("here\n"), "it answers, and closes");
        let mut silent = Vec::new();
        for _ in 0..AT_ONCE {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        assert_eq!(ask().await, "", "no place is left");
        drop(silent);
        while !ask().await.ends_with("here\n") {}
    }
}
