//! A TCP server whose behaviour is a closure.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::place::Place;

/// A server in the test's own process, listening in a place. Each connection has a thread, which is not joined.
#[derive(Debug)]
pub struct InProcess {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    accepts: Option<JoinHandle<()>>,
}

impl InProcess {
    /// Listens on the address and passes every connection to `serve`. The server is listening when this returns.
    pub fn start(
        place: &Place,
        on: SocketAddr,
        serve: impl Fn(TcpStream, SocketAddr) + Send + Sync + 'static,
    ) -> Result<Self> {
        let listener = place.listen(on)?;
        listener
            .set_nonblocking(true)
            .context("making a listener non-blocking")?;
        let address = listener
            .local_addr()
            .context("asking for the listener's address")?;
        let stop = Arc::new(AtomicBool::new(false));
        let accepts = thread::Builder::new()
            .name(format!("server {address}"))
            .spawn({
                let stop = Arc::clone(&stop);
                let serve = Arc::new(serve);
                move || accept(&listener, &stop, &serve)
            })
            .context("starting the thread of a server")?;
        Ok(Self {
            address,
            stop,
            accepts: Some(accepts),
        })
    }

    /// The address that it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(accepts) = self.accepts.take() {
            let _ = accepts.join();
        }
    }
}

fn accept<F: Fn(TcpStream, SocketAddr) + Send + Sync + 'static>(
    listener: &TcpListener,
    stop: &AtomicBool,
    serve: &Arc<F>,
) {
    while !stop.load(Ordering::Acquire) {
        let _ = poll(
            &mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)],
            PollTimeout::from(STOP_LATENCY),
        );
        while let Ok((stream, peer)) = listener.accept() {
            let serve = Arc::clone(serve);
            thread::spawn(move || {
                if stream.set_nonblocking(false).is_ok() {
                    serve(stream, peer);
                }
            });
        }
    }
}

/// In milliseconds.
const STOP_LATENCY: u8 = 10;
