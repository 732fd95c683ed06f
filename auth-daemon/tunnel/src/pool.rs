//! Idle tunnels of one pod, kept for its next connections to the same endpoint.
//!
//! A tunnel carries one app connection at a time: no connection waits behind another's bytes. The pool grows by use
//! only, is bounded, and forgets.

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use super::Channel;
use auth_mesh::Identity;

/// Idle tunnels kept to one endpoint.
const MAX_PER_ENDPOINT: usize = 64;
/// Idle tunnels kept by one pod.
const MAX_PER_POD: usize = 512;
/// How long a tunnel idles before it is closed.
const IDLE: Duration = Duration::from_secs(30);
/// How old a tunnel may be when it takes a connection: a renewed certificate is in use everywhere soon after.
const MAX_AGE: Duration = Duration::from_secs(10 * 60);
/// How long before the end of a certificate a tunnel is not used any more: clocks differ a little.
const VALIDITY_MARGIN: Duration = Duration::from_secs(2);

/// The idle tunnels of one pod.
#[derive(Debug, Default)]
pub struct Pool(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    idle: HashMap<SocketAddr, Vec<Idle>>,
    count: usize,
}

/// How a tunnel began.
#[derive(Clone, Copy, Debug)]
pub struct Made {
    /// When.
    pub at: Instant,
    /// Until when both ends' certificates are valid: the other end takes nothing new after it.
    pub valid_until: SystemTime,
}

/// A tunnel that was idle.
#[derive(Debug)]
pub struct Taken {
    /// The tunnel.
    pub channel: Channel,
    /// How it began.
    pub made: Made,
    /// For how long it idled.
    pub idled: Duration,
}

#[derive(Debug)]
struct Idle {
    channel: Channel,
    made: Made,
    since: Instant,
}

impl Pool {
    /// An idle tunnel to `endpoint` whose peer is among `identities`: the one that this thread used last, else another
    /// thread's.
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
                && found.made.valid_until > SystemTime::now() + VALIDITY_MARGIN
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

    /// Keeps `channel` unless there are enough.
    pub fn put(&self, endpoint: SocketAddr, mut channel: Channel, made: Made) {
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
        });
    }

    /// Closes tunnels that have idled for long or whose peer has gone.
    pub fn sweep(&self) {
        self.close_if(|_, idle| idle.since.elapsed() >= IDLE || !idle.channel.is_quiet());
    }

    /// Closes the tunnels to `endpoint`.
    pub fn forget(&self, endpoint: SocketAddr) {
        self.close_if(|of, _| of == endpoint);
    }

    /// Closes the tunnels that come from `port`.
    pub fn forget_source(&self, port: u16) {
        self.close_if(|_, idle| {
            let local = idle.channel.local_address();
            local.is_ok_and(|local| local.port() == port)
        });
    }

    fn close_if(&self, mut condition: impl FnMut(SocketAddr, &Idle) -> bool) {
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

    /// How many tunnels idle.
    pub fn idle(&self) -> usize {
        self.lock().count
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
