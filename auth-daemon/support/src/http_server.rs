//! HTTP for those who only ask: short answers, to so many at once, each within a time.

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

/// Who asks at once; others are closed on.
const AT_ONCE: usize = 64;
/// How long a request may take to arrive.
const HEADERS: Duration = Duration::from_secs(5);
/// How long a connection may last.
const CONNECTION: Duration = Duration::from_secs(10);
/// After an accept failed for want of something: file descriptors, memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What Prometheus is told, in the OpenMetrics text format.
pub fn open_metrics(registry: &Registry) -> impl IntoResponse + use<> {
    let mut text = String::new();
    // Writing into a string does not fail.
    let _ = encode(&mut text, registry);
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, kind)], text)
}

/// Where requests come from.
pub trait Listener {
    /// What they come by.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Takes the next one.
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

/// Answers by `routes`, one request a connection, for ever.
pub async fn answer(listener: impl Listener, routes: Router) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut http = Builder::new(TokioExecutor::new());
    http.http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .keep_alive(false);
    let http = http.http1_only();
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
        let (http, service) = (http.clone(), TowerToHyperService::new(routes.clone()));
        tokio::spawn(async move {
            // Who asks badly, or slowly, gets no answer.
            let _ = timeout(
                CONNECTION,
                http.serve_connection(TokioIo::new(stream), service),
            )
            .await;
            drop(place);
        });
    }
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
            // A connection that gets no place is closed on: reset, when it has said something by then.
            let _ = tcp.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
            let mut said = String::new();
            let _ = tcp.read_to_string(&mut said).await;
            said
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
