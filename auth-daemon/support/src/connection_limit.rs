//! Limits the number of concurrent connections or handshakes, in total and for each source address, so that one source
//! cannot use up the limit. Callers need no identity, and a connection that counts costs nothing else.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A limit on concurrent connections. `S` identifies a source.
#[derive(Debug)]
pub struct ConnectionLimit<S: Copy + Eq + Hash = IpAddr> {
    max: usize,
    max_per_source: usize,
    taken: Mutex<Taken<S>>,
}

#[derive(Debug)]
struct Taken<S> {
    total: usize,
    by_source: HashMap<S, usize>,
}

impl<S: Copy + Eq + Hash> ConnectionLimit<S> {
    /// Creates a limit of `max` connections, of which one source may have at most `max_per_source`.
    pub fn new(max: usize, max_per_source: usize) -> Self {
        Self {
            max,
            max_per_source,
            taken: Mutex::new(Taken {
                total: 0,
                by_source: HashMap::new(),
            }),
        }
    }

    /// Admits a connection from `source`. It counts until the returned permit is dropped. `None` if a limit is reached.
    pub fn admit(self: &Arc<Self>, source: S) -> Option<ConnectionPermit<S>> {
        let mut taken = self.lock();
        let by_source = taken.by_source.get(&source).copied().unwrap_or(0);
        if taken.total >= self.max || by_source >= self.max_per_source {
            return None;
        }
        taken.total += 1;
        taken.by_source.insert(source, by_source + 1);
        Some(ConnectionPermit {
            places: self.clone(),
            source,
        })
    }

    /// Number of admitted connections.
    pub fn taken(&self) -> usize {
        self.lock().total
    }

    fn lock(&self) -> MutexGuard<'_, Taken<S>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The source that connections from `address` count for, if nothing else is known of it: the address itself if it is IPv4
/// (also mapped to IPv6), otherwise its /64 network, because one host can use all addresses of it (RFC 4291, section 2.5.1).
pub fn source_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

/// Permit for one connection. See [`ConnectionLimit::admit`].
#[derive(Debug)]
pub struct ConnectionPermit<S: Copy + Eq + Hash = IpAddr> {
    places: Arc<ConnectionLimit<S>>,
    source: S,
}

impl<S: Copy + Eq + Hash> Drop for ConnectionPermit<S> {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.total -= 1;
        if let Some(by_source) = taken.by_source.get_mut(&self.source) {
            *by_source -= 1;
            if *by_source == 0 {
                taken.by_source.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv6_addresses_of_a_network_are_one_source() {
        let source = |text: &str| source_of(text.parse().unwrap());
        assert_eq!(source("2001:db8:0:1::5"), source("2001:db8:0:1:ffff::6"));
        assert_ne!(source("2001:db8:0:1::5"), source("2001:db8:0:2::5"));
        assert_ne!(source("10.0.0.1"), source("10.0.0.2"));
        assert_ne!(source("::ffff:10.0.0.1"), source("::ffff:10.0.0.2"));
        assert_eq!(source("::ffff:10.0.0.1"), source("10.0.0.1"));
    }

    #[test]
    fn one_source_cannot_take_all() {
        const MAX: usize = 64;
        const MAX_PER_SOURCE: usize = 16;
        let places = Arc::new(ConnectionLimit::new(MAX, MAX_PER_SOURCE));
        let source = |last: u8| IpAddr::from([10, 0, 0, last]);
        let mut held: Vec<_> = (0..MAX_PER_SOURCE)
            .map(|_| places.admit(source(1)).unwrap())
            .collect();
        assert!(places.admit(source(1)).is_none());
        held.push(places.admit(source(2)).unwrap());
        drop(held.swap_remove(0));
        held.push(places.admit(source(1)).unwrap());
        for last in 3..=255 {
            held.extend((0..MAX_PER_SOURCE).map_while(|_| places.admit(source(last))));
        }
        assert_eq!(held.len(), MAX);
        drop(held);
        assert!(places.taken() == 0 && places.lock().by_source.is_empty());
    }
}
