//! Events for the first sockets in netns that belong to no enrolled pod.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use auth_common::FirstSocket;
use aya::maps::{MapData, RingBuf};
use tokio::sync::Notify;

use super::{events::Events, kernel::monotonic_nanoseconds};

/// Stream of the events, registered with the runtime that created it.
pub struct FirstSockets {
    events: Events,
    /// Notified of sockets that pods create.
    of_pods: Arc<Notify>,
}

impl FirstSockets {
    pub(super) fn new(ring: RingBuf<MapData>, of_pods: Arc<Notify>) -> io::Result<Self> {
        let events = Events::new(ring)?;
        Ok(Self { events, of_pods })
    }

    /// Waits for events and passes each to `take`: the cookie of the netns, and the time when the socket was created.
    /// Cancel-safe: no event is lost.
    pub async fn next(&mut self, mut take: impl FnMut(u64, Instant)) -> io::Result<()> {
        self.events
            .next(parse, |event| {
                if event.of_pod != 0 {
                    self.of_pods.notify_one();
                }
                let age = monotonic_nanoseconds().saturating_sub(event.at_nanoseconds);
                let now = Instant::now();
                let at = now.checked_sub(Duration::from_nanos(age));
                take(event.netns_cookie, at.unwrap_or(now));
            })
            .await
    }
}

fn parse(bytes: &[u8]) -> Option<FirstSocket> {
    let (cookie, rest) = bytes.split_first_chunk()?;
    let (at, of_pod) = rest.split_first_chunk()?;
    Some(FirstSocket {
        netns_cookie: u64::from_ne_bytes(*cookie),
        at_nanoseconds: u64::from_ne_bytes(*at),
        of_pod: u64::from_ne_bytes(of_pod.try_into().ok()?),
    })
}

impl std::fmt::Debug for FirstSockets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FirstSockets").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_its_three_words() {
        let bytes = [7_u64, 9, 1].map(u64::to_ne_bytes).concat();
        let event = FirstSocket {
            netns_cookie: 7,
            at_nanoseconds: 9,
            of_pod: 1,
        };
        assert_eq!(bytes.len(), size_of::<FirstSocket>());
        assert_eq!(parse(&bytes), Some(event));
        assert_eq!(parse(&bytes[1..]), None);
        assert_eq!(parse(&[bytes.as_slice(), &[0]].concat()), None);
    }
}
