//! Pool of a pod's idle tunnels, kept for its next connections to the same endpoint.
//!
//! A tunnel carries one app connection at a time, so no connection waits behind another's bytes. The pool grows only by
//! use, is bounded, and drops tunnels that stay idle.

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use super::{Channel, tls::svid::Svid};
use auth_mesh::Identity;

/// Maximum number of idle tunnels to one endpoint.
const MAX_PER_ENDPOINT: usize = 64;
/// Maximum number of idle tunnels of one pod.
const MAX_PER_POD: usize = 512;
/// Idle time after which a tunnel is closed.
const IDLE: Duration = Duration::from_secs(30);
/// Maximum age of a tunnel that takes a new connection. Bounds the time until a renewed certificate is in use
/// everywhere.
pub(crate) const MAX_AGE: Duration = Duration::from_secs(10 * 60);
/// Time before a certificate expires from which its tunnels are no longer used, to allow for clock skew.
pub(crate) const VALIDITY_MARGIN: Duration = Duration::from_secs(2);

/// The idle tunnels of one pod. `P` is the permit that each of them holds while it is idle.
#[derive(Debug)]
pub struct Pool<P>(Mutex<State<P>>);

#[derive(Debug)]
struct State<P> {
    idle: HashMap<SocketAddr, Vec<Idle<P>>>,
    count: usize,
}

impl<P> Default for Pool<P> {
    fn default() -> Self {
        Self(Mutex::new(State {
            idle: HashMap::new(),
            count: 0,
        }))
    }
}

/// When a tunnel was established, and until when it may take connections.
#[derive(Clone, Copy, Debug)]
pub struct Made {
    /// Time of establishment.
    pub at: Instant,
    /// Time until which both certificates are valid. The peer takes no new connection after it.
    pub valid_until: SystemTime,
}

impl Made {
    /// Established now, with these two certificates.
    pub fn now(own: &Svid, peer: &Svid) -> Self {
        Self {
            at: Instant::now(),
            valid_until: own.not_after.min(peer.not_after),
        }
    }

    /// How long it may take connections from now on: until shortly before a certificate expires.
    pub fn usable_for(&self) -> Duration {
        let left = self.valid_until.duration_since(SystemTime::now());
        left.unwrap_or_default().saturating_sub(VALIDITY_MARGIN)
    }
}

/// A tunnel taken from the pool.
#[derive(Debug)]
pub struct Taken {
    /// The tunnel.
    pub channel: Channel,
    /// When it was established.
    pub made: Made,
    /// How long it was idle.
    pub idled: Duration,
}

#[derive(Debug)]
struct Idle<P> {
    channel: Channel,
    made: Made,
    since: Instant,
    _permit: P,
}

impl<P> Pool<P> {
    /// Takes an idle tunnel to `endpoint` whose peer is one of `identities`. Prefers the tunnel that the current thread
    /// used last over those of other threads.
    pub fn take(&self, endpoint: SocketAddr, identities: &BTreeSet<Identity>) -> Option<Taken> {
        loop {
            let mut state = self.lock();
            let idle = state.idle.get_mut(&endpoint)?;
            let own = idle.iter().rposition(|idle| idle.channel.is_at_home());
            let found = idle.remove(own.or(idle.len().checked_sub(1))?);
            if idle.is_empty() {
                state.idle.remove(&endpoint);
            }
            state.count -= 1;
            drop(state);
            let usable = found.made.at.elapsed() < MAX_AGE
                && !found.made.usable_for().is_zero()
                && identities.contains(&found.channel.peer().identity)
                && found.channel.is_quiet();
            if !usable {
                found.channel.close();
            } else if let Ok(channel) = found.channel.bring_home() {
                return Some(Taken {
                    channel,
                    made: found.made,
                    idled: found.since.elapsed(),
                });
            }
        }
    }

    /// Returns `channel` to the pool, or closes it if there is no permit or the pool is full.
    pub fn put(&self, endpoint: SocketAddr, mut channel: Channel, made: Made, permit: Option<P>) {
        let Some(permit) = permit else {
            return channel.close();
        };
        channel.rest();
        let mut state = self.lock();
        let full = state.count >= MAX_PER_POD
            || state
                .idle
                .get(&endpoint)
                .is_some_and(|idle| idle.len() >= MAX_PER_ENDPOINT);
        if full {
            drop(state);
            channel.close();
            return;
        }
        state.count += 1;
        let since = Instant::now();
        state.idle.entry(endpoint).or_default().push(Idle {
            channel,
            made,
            since,
            _permit: permit,
        });
    }

    /// Closes tunnels that have been idle for too long, and those whose peer closed the connection.
    pub fn sweep(&self) {
        self.close_if(|_, idle| idle.since.elapsed() >= IDLE || !idle.channel.is_quiet());
    }

    /// Closes the tunnels to `endpoint`.
    pub fn forget(&self, endpoint: SocketAddr) {
        self.close_if(|of, _| of == endpoint);
    }

    /// Closes the tunnels whose local port is `port`.
    pub fn forget_source(&self, port: u16) {
        self.close_if(|_, idle| {
            let local = idle.channel.local_address();
            local.is_ok_and(|local| local.port() == port)
        });
    }

    fn close_if(&self, mut condition: impl FnMut(SocketAddr, &Idle<P>) -> bool) {
        let mut gone = Vec::new();
        let mut state = self.lock();
        for (endpoint, idle) in &mut state.idle {
            gone.extend(idle.extract_if(.., |idle| condition(*endpoint, idle)));
        }
        state.idle.retain(|_, idle| !idle.is_empty());
        state.count -= gone.len();
        drop(state);
        for idle in gone {
            idle.channel.close();
        }
    }

    /// Number of idle tunnels.
    pub fn idle(&self) -> usize {
        self.lock().count
    }

    fn lock(&self) -> MutexGuard<'_, State<P>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
