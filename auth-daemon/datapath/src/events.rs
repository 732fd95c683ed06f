//! Rings that the programs tell the daemon through.

use std::io;

use aya::maps::{MapData, RingBuf};
use tokio::io::unix::AsyncFd;

/// One of them, on the runtime that it was made on.
pub(super) struct Events(AsyncFd<RingBuf<MapData>>);

impl Events {
    pub(super) fn new(ring: RingBuf<MapData>) -> io::Result<Self> {
        // SAFETY: the ring owns its descriptor, gives the same one each time, and closes it when it is dropped.
        Ok(Self(unsafe { AsyncFd::register(ring) }?))
    }

    /// Waits for events and hands over each. Dropped while it waits, it has lost none.
    pub(super) async fn next<T>(
        &mut self,
        parse: impl Fn(&[u8]) -> Option<T>,
        mut take: impl FnMut(T),
    ) -> io::Result<()> {
        let mut ready = self.0.readable_mut().await?;
        let ring = ready.get_inner_mut();
        while let Some(event) = ring.next() {
            match parse(&event) {
                Some(event) => take(event),
                None => tracing::warn!(bytes = event.len(), "the kernel's side sent no event"),
            }
        }
        ready.clear_ready();
        Ok(())
    }
}
