//! A plugin of the Node Resource Interface (NRI), by which containerd 2 and CRI-O report each pod before its first
//! container starts.
//!
//! The runtime waits for the plugin's answer. The daemon answers when the pod is enrolled, so that the first instruction
//! of the first init container finds everything in place. This crate speaks the protocol; it does not know what a pod
//! needs before it may start.
//!
//! The protocol is ttrpc over a Unix socket that carries two connections (`mux`): one on which the plugin registers,
//! and one on which the runtime calls it (NRI v0.6 and later, `pkg/api/api.proto`).
#![forbid(unsafe_code)]

mod messages;
mod mux;
mod plugin;

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// A pod whose containers have not started yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sandbox {
    /// The UID of the Pod object.
    pub uid: String,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
}

/// A pod that the runtime is about to start, and that waits.
#[derive(Debug)]
pub struct Starting {
    /// The pod.
    pub sandbox: Sandbox,
    /// Lets the pod start, when it is used or dropped. At the deadline the pod starts without it.
    pub ready: oneshot::Sender<()>,
}

/// Why the plugin does not serve, or no longer.
#[derive(Debug, Error)]
pub enum Error {
    /// The runtime does not run, or has NRI turned off.
    #[error(
        "cannot connect to {path}: {source}; does the container runtime run, with NRI enabled?"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The runtime did not accept the plugin.
    #[error("the container runtime does not register the plugin: {0}")]
    Register(String),
    /// The connection ended: the runtime stopped, or dropped the plugin because it answered too late.
    #[error("the container runtime closed the connection")]
    Closed,
    /// What the runtime sent is not NRI.
    #[error("the container runtime sent something that is not NRI: {0}")]
    Protocol(io::Error),
}

/// Connects to the runtime's socket, registers, and passes each pod that starts to `starting`, until the connection
/// ends. No pod waits longer than `deadline`, nor than half of the time after which the runtime would drop the plugin.
///
/// # Errors
/// If the runtime cannot be reached, refuses the plugin, or ends the connection.
pub async fn serve(
    socket: &Path,
    deadline: Duration,
    starting: mpsc::Sender<Starting>,
) -> Result<Infallible, Error> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source| Error::Connect {
            path: socket.into(),
            source,
        })?;
    let (connections, trunk) = mux::split(stream);
    let serving = plugin::serve(connections, deadline, starting);
    tokio::select! {
        error = trunk => Err(match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Error::Closed,
            _ => Error::Protocol(error),
        }),
        error = serving => Err(error),
    }
}

/// Waits for `ready`, but no longer than `limit`. Returns whether it came in time.
async fn wait(ready: oneshot::Receiver<()>, limit: Duration) -> bool {
    timeout(limit, ready).await.is_ok()
}
