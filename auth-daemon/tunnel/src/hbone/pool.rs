//! Pool of a pod's HBONE connections, which its app connections share.
//!
//! All have the pod's identity and address; the key is the server's address, and the identity that the server has
//! proved must be one of the destination's.

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::Client;
use crate::{Made, pool::MAX_AGE};
use auth_mesh::Identity;

/// Time without a stream after which a connection is closed.
const IDLE: Duration = Duration::from_secs(60);

/// The HBONE connections of one pod. `P` is the permit that each of them holds.
#[derive(Debug)]
pub struct Pool<P>(Mutex<HashMap<SocketAddr, Arc<Connections<P>>>>);

/// The connections to one address.
#[derive(Debug)]
pub struct Connections<P> {
    /// Held while connecting, so that connections that begin at the same time share one.
    pub dialing: tokio::sync::Mutex<()>,
    open: Mutex<Vec<Pooled<P>>>,
}

#[derive(Debug)]
struct Pooled<P> {
    client: Client,
    made: Made,
    /// Each stream holds a clone.
    streams: Arc<()>,
    used: Instant,
    _permit: P,
}

/// The place of one stream on a connection. Dropping it makes room for another.
#[derive(Debug)]
pub struct Place {
    of: Arc<()>,
}

impl<P> Default for Pool<P> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<P> Pool<P> {
    /// The connections to `address`.
    pub fn connections(&self, address: SocketAddr) -> Arc<Connections<P>> {
        let mut servers = lock(&self.0);
        let server = servers.entry(address).or_insert_with(|| {
            Arc::new(Connections {
                dialing: tokio::sync::Mutex::default(),
                open: Mutex::default(),
            })
        });
        server.clone()
    }

    /// Closes connections that have had no stream for too long, and those that cannot take one any more.
    pub fn sweep(&self) {
        lock(&self.0).retain(|_, server| {
            let mut connections = lock(&server.open);
            connections.retain_mut(|pooled| {
                if pooled.open_streams() > 0 {
                    pooled.used = Instant::now();
                }
                pooled.is_usable() && pooled.used.elapsed() < IDLE
            });
            !connections.is_empty() || Arc::strong_count(server) > 1
        });
    }

    /// Number of connections.
    pub fn count(&self) -> usize {
        let servers = lock(&self.0);
        servers
            .values()
            .map(|server| lock(&server.open).len())
            .sum()
    }
}

impl<P> Connections<P> {
    /// Takes a place on a connection whose server is one of `identities`.
    pub fn take(&self, identities: &BTreeSet<Identity>) -> Option<(Client, Place)> {
        let mut connections = lock(&self.open);
        // Those that are dropped here end when their streams have ended.
        connections.retain(Pooled::is_usable);
        let fitting = connections.iter_mut().find(|pooled| {
            pooled.open_streams() < pooled.client.room()
                && identities.contains(&pooled.client.peer().identity)
        })?;
        fitting.used = Instant::now();
        Some((fitting.client.clone(), fitting.place()))
    }

    /// Adds a connection, and takes a place on it.
    pub fn put(&self, client: Client, made: Made, permit: P) -> Place {
        let pooled = Pooled {
            client,
            made,
            streams: Arc::default(),
            used: Instant::now(),
            _permit: permit,
        };
        let place = pooled.place();
        lock(&self.open).push(pooled);
        place
    }

    /// Removes a connection that has failed to open a stream.
    pub fn forget(&self, place: &Place) {
        lock(&self.open).retain(|pooled| !Arc::ptr_eq(&pooled.streams, &place.of));
    }
}

impl<P> Pooled<P> {
    fn place(&self) -> Place {
        Place {
            of: self.streams.clone(),
        }
    }

    fn open_streams(&self) -> usize {
        Arc::strong_count(&self.streams) - 1
    }

    fn is_usable(&self) -> bool {
        !self.client.has_ended()
            && self.made.at.elapsed() < MAX_AGE
            && !self.made.usable_for().is_zero()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
