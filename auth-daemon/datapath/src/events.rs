//! Ring buffers with events from the eBPF programs to the daemon.

use std::io;

use aya::maps::{MapData, RingBuf};
use tokio::io::unix::AsyncFd;

/// A ring buffer, registered with the runtime that created it.
pub(super) struct Events(AsyncFd<RingBuf<MapData>>);

impl Events {
    pub(super) fn new(ring: RingBuf<MapData>) -> io::Result<Self> {
        // SAFETY: the ring owns its descriptor, always returns the same one, and closes it only when it is dropped.
        Ok(Self(unsafe { AsyncFd::register(ring) }?))
    }

    /// Waits for events and passes each to `take`. Cancel-safe: no event is lost.
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
                None => tracing::warn!(
                    bytes = event.len(),
                    "the kernel sent a record that is no event"
                ),
            }
        }
        ready.clear_ready();
        Ok(())
    }
}
