//! PINGs, which detect a peer that has vanished.

use h2::{Ping, PingPong};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{PING_INTERVAL, PING_TIMEOUT};

/// Pings the peer of one connection.
pub(super) struct KeepAlive {
    /// `None` if the connection does not allow it.
    pings: Option<PingPong>,
    /// When the next ping is due, or when the answer to the last one is.
    due: Instant,
    waits: bool,
}

impl KeepAlive {
    pub(super) fn new(pings: Option<PingPong>) -> Self {
        Self {
            pings,
            due: Instant::now() + PING_INTERVAL,
            waits: false,
        }
    }

    /// Returns once the peer leaves a ping unanswered. Cancel-safe. Something else must drive the connection.
    pub(super) async fn lost(&mut self) {
        let Some(pings) = &mut self.pings else {
            return std::future::pending().await;
        };
        loop {
            if self.waits {
                let answered = std::future::poll_fn(|context| pings.poll_pong(context));
                // A connection that has ended is reported by its driver.
                match timeout_at(self.due, answered).await {
                    Err(_) => return,
                    Ok(Err(_)) => return std::future::pending().await,
                    Ok(Ok(_)) => (self.waits, self.due) = (false, Instant::now() + PING_INTERVAL),
                }
            } else {
                sleep_until(self.due).await;
                if pings.send_ping(Ping::opaque()).is_err() {
                    return std::future::pending().await;
                }
                (self.waits, self.due) = (true, Instant::now() + PING_TIMEOUT);
            }
        }
    }
}
