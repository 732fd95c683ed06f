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
use crate::mesh::Identity;

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

#[derive(Debug)]
struct Idle {
    channel: Channel,
    made: Made,
    since: Instant,
}

impl Pool {
    /// An idle tunnel to `endpoint`, the one used last, whose peer is among `identities`.
    pub fn take(
        &self,
        endpoint: SocketAddr,
        identities: &BTreeSet<Identity>,
    ) -> Option<(Channel, Made)> {
        loop {
            let mut state = self.lock();
            let idle = state.idle.get_mut(&endpoint)?;
            let found = idle.pop();
            if idle.is_empty() {
                state.idle.remove(&endpoint);
            }
            let found = found?;
            state.count -= 1;
            drop(state);
            let usable = found.made.at.elapsed() < MAX_AGE
                && found.made.valid_until > SystemTime::now() + VALIDITY_MARGIN
                && identities.contains(&found.channel.peer().identity)
                && found.channel.is_quiet();
            if usable {
                return Some((found.channel, found.made));
            }
            found.channel.close();
        }
    }

    /// Keeps `channel` unless there are enough.
    pub fn put(&self, endpoint: SocketAddr, channel: Channel, made: Made) {
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
