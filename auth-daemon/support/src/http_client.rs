//! HTTP/1.1 client for one request over an existing connection.

use axum::{
    body::Body,
    http::{Method, Request, Uri, header::HOST},
};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

/// Sends a GET request for `uri`. Returns the status and the body. Fails if the body exceeds `limit` bytes.
pub async fn get(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    uri: &Uri,
    limit: usize,
) -> Result<(u16, Vec<u8>), String> {
    request(stream, Method::GET, uri, Vec::new(), limit).await
}

/// Sends a POST request with the JSON `body` to `uri`. Otherwise like [`get`].
pub async fn post(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    uri: &Uri,
    body: Vec<u8>,
    limit: usize,
) -> Result<(u16, Vec<u8>), String> {
    request(stream, Method::POST, uri, body, limit).await
}

async fn request(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    method: Method,
    uri: &Uri,
    body: Vec<u8>,
    limit: usize,
) -> Result<(u16, Vec<u8>), String> {
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    let authority = uri.authority().map_or("localhost", |name| name.as_str());
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, authority)
        .header("content-type", "application/json")
        .body(Body::from(body))
        .map_err(|error| failed(&error))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failed(&error))?;
    let connection = tokio::spawn(connection);
    let answer = async {
        let answer = sender.send_request(request).await;
        let answer = answer.map_err(|error| failed(&error))?;
        let status = answer.status().as_u16();
        let body = axum::body::to_bytes(Body::new(answer.into_body()), limit).await;
        let body = body.map_err(|error| failed(&error))?;
        Ok((status, body.to_vec()))
    };
    let answer = answer.await;
    connection.abort();
    answer
}
