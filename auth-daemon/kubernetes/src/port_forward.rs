//! Connections to ports of pods through the API server, as `kubectl port-forward` makes them.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, client::UpgradeConnectionError};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

use crate::{ApiError, DEADLINE, printable, with_causes};

/// A connection to a port of a pod. Dropping it ends the connection.
pub struct Forwarded {
    stream: DuplexStream,
    /// Why the node's kubelet could not connect, or ended the connection.
    failure: Pin<Box<dyn Future<Output = Option<String>> + Send>>,
}

impl std::fmt::Debug for Forwarded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forwarded").finish_non_exhaustive()
    }
}

/// Connects to `port` on the loopback of the pod's network namespace. Needs the rights `get` and `create` on
/// `pods/portforward`. Times out after [`DEADLINE`].
///
/// The API server answers before the kubelet has connected. If the kubelet fails, the first read returns the reason.
pub async fn port_forward(
    client: &Client,
    namespace: &str,
    pod: &str,
    port: u16,
) -> Result<Forwarded, ApiError> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let ports = [port];
    let opened = tokio::time::timeout(DEADLINE, pods.portforward(pod, &ports))
        .await
        .map_err(|_| ApiError::TimedOut(DEADLINE))?;
    let mut forwarder = opened.map_err(explain)?;
    let missing = || ApiError::Answer("it forwards another port than asked for".to_owned());
    let failure = forwarder.take_error(port).ok_or_else(missing)?;
    Ok(Forwarded {
        stream: forwarder.take_stream(port).ok_or_else(missing)?,
        failure: Box::pin(failure),
    })
}

fn explain(error: kube::Error) -> ApiError {
    match error {
        kube::Error::Api(status) => ApiError::Refused {
            code: status.code,
            reason: printable(&status.reason),
            message: printable(&status.message),
        },
        kube::Error::UpgradeConnection(UpgradeConnectionError::ProtocolSwitch(status)) => {
            ApiError::Refused {
                code: status.as_u16(),
                reason: "NoUpgrade".to_owned(),
                message: "it does not forward ports over WebSocket".to_owned(),
            }
        }
        error => ApiError::Unreachable(with_causes(&error)),
    }
}

impl AsyncRead for Forwarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        let is_end = matches!(read, Poll::Ready(Ok(()))) && buffer.filled().len() == before;
        // At the end of the stream, the reason has arrived if there is one.
        if is_end
            && buffer.remaining() > 0
            && let Poll::Ready(Some(reason)) = self.failure.as_mut().poll(context)
        {
            self.failure = Box::pin(std::future::ready(None));
            return Poll::Ready(Err(io::Error::other(printable(&reason))));
        }
        read
    }
}

impl AsyncWrite for Forwarded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
