//! Chooses the endpoint of a connection: of two random endpoints, the one with fewer of this node's connections. With
//! session affinity, the client's address determines the endpoint.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, SocketAddr},
    sync::{Mutex, MutexGuard, PoisonError},
};

use auth_mesh::Endpoint;

/// Number of this node's connections, by endpoint.
#[derive(Debug, Default)]
pub(super) struct Balance(Mutex<HashMap<SocketAddr, usize>>);

impl Balance {
    /// Picks one of `endpoints` that is not in `tried`, or returns `None` if all are. With a `client` address, the same
    /// client gets the same endpoint for as long as that endpoint exists.
    pub(super) fn pick<'a>(
        &self,
        endpoints: &[&'a Endpoint],
        tried: &[SocketAddr],
        client: Option<IpAddr>,
    ) -> Option<&'a Endpoint> {
        if tried.is_empty() && endpoints.len() == 1 {
            return endpoints.first().copied();
        }
        let left: Vec<_> = endpoints
            .iter()
            .filter(|endpoint| !tried.contains(&endpoint.address))
            .copied()
            .collect();
        match (left.len(), client) {
            (0, _) => None,
            (1, _) => Some(left[0]),
            (_, Some(client)) => left
                .into_iter()
                .max_by_key(|endpoint| affinity(client, endpoint.address)),
            (count, None) => {
                let first = rand::random_range(0..count);
                // One of the other endpoints, with equal probability.
                let second = (first + rand::random_range(1..count)) % count;
                let (first, second) = (left[first], left[second]);
                let loads = self.lock();
                let load = |endpoint: &Endpoint| loads.get(&endpoint.address).copied().unwrap_or(0);
                Some(if load(second) < load(first) {
                    second
                } else {
                    first
                })
            }
        }
    }

    /// Counts a connection to `endpoint` until the guard is dropped.
    pub(super) fn count(&self, endpoint: SocketAddr) -> Counted<'_> {
        *self.lock().entry(endpoint).or_insert(0) += 1;
        Counted {
            balance: self,
            endpoint,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SocketAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Weight of `endpoint` for `client` (rendezvous hashing): when an endpoint appears or disappears, clients of the other
/// endpoints keep theirs.
fn affinity(client: IpAddr, endpoint: SocketAddr) -> u64 {
    let mut hasher = DefaultHasher::new();
    (client, endpoint).hash(&mut hasher);
    hasher.finish()
}

/// Guard returned by [`Balance::count`].
#[derive(Debug)]
pub(super) struct Counted<'a> {
    balance: &'a Balance,
    endpoint: SocketAddr,
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        let mut loads = self.balance.lock();
        if let Some(load) = loads.get_mut(&self.endpoint) {
            *load -= 1;
            if *load == 0 {
                loads.remove(&self.endpoint);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use auth_mesh::{ObjectName, Workload};

    fn endpoints(count: u8) -> Vec<Endpoint> {
        (1..=count)
            .map(|number| Endpoint {
                workload: Some(Arc::new(Workload::new(
                    ObjectName {
                        namespace: "default".into(),
                        name: number.to_string(),
                    },
                    "spiffe://a/ns/b/sa/c".parse().unwrap(),
                ))),
                address: SocketAddr::from(([10, 0, 0, number], 80)),
                meshed: true,
                foreign: false,
                node: None,
            })
            .collect()
    }

    #[test]
    fn of_two_the_less_loaded_is_picked() {
        let balance = Balance::default();
        let endpoints = endpoints(2);
        let refs: Vec<_> = endpoints.iter().collect();
        let held = balance.count(endpoints[0].address);
        for _ in 0..50 {
            let picked = balance.pick(&refs, &[], None).unwrap();
            assert_eq!(picked.address, endpoints[1].address);
        }
        drop(held);
        assert!(balance.lock().is_empty());
    }

    #[test]
    fn what_was_tried_is_left_out() {
        let balance = Balance::default();
        let endpoints = endpoints(3);
        let refs: Vec<_> = endpoints.iter().collect();
        let mut tried = Vec::new();
        while let Some(endpoint) = balance.pick(&refs, &tried, None) {
            assert!(!tried.contains(&endpoint.address));
            tried.push(endpoint.address);
        }
        assert_eq!(tried.len(), 3);
    }

    #[test]
    fn load_spreads() {
        let balance = Balance::default();
        let endpoints = endpoints(5);
        let refs: Vec<_> = endpoints.iter().collect();
        let held: Vec<_> = (0..500)
            .map(|_| balance.count(balance.pick(&refs, &[], None).unwrap().address))
            .collect();
        let loads = balance.lock().clone();
        let (most, least) = (loads.values().max().unwrap(), loads.values().min().unwrap());
        assert!(most - least <= 10, "{loads:?}");
        drop(held);
    }

    #[test]
    fn a_client_keeps_its_endpoint_while_others_come_and_go() {
        let balance = Balance::default();
        let endpoints = endpoints(9);
        let all: Vec<_> = endpoints.iter().collect();
        let mut seen = std::collections::BTreeSet::new();
        for last in 0..200 {
            let client = Some(IpAddr::from([10, 1, 0, last]));
            let first = balance.pick(&all, &[], client).unwrap();
            seen.insert(first.address);
            for gone in &endpoints {
                let left: Vec<_> = endpoints
                    .iter()
                    .filter(|e| e.address != gone.address)
                    .collect();
                let now = balance.pick(&left, &[], client).unwrap();
                assert!(now.address == first.address || gone.address == first.address);
            }
        }
        assert_eq!(seen.len(), 9, "each has a client");
    }
}
