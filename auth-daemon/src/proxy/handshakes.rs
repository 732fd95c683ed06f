//! How many callers of a pod may be in their handshake at once: strangers cost nothing but a place, and places are
//! counted by where they call from, so that one of them cannot take all.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

const MAX: usize = 8192;
const MAX_PER_SOURCE: usize = 1024;

/// The places of one pod.
#[derive(Debug, Default)]
pub(super) struct Handshakes(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    total: usize,
    by_source: HashMap<IpAddr, usize>,
}

impl Handshakes {
    /// A place for a caller from `source`, kept until it is dropped. `None`: there is none left.
    pub(super) fn admit(self: &Arc<Self>, source: IpAddr) -> Option<Place> {
        let mut state = self.lock();
        let taken = state.by_source.get(&source).copied().unwrap_or(0);
        if state.total >= MAX || taken >= MAX_PER_SOURCE {
            return None;
        }
        state.total += 1;
        state.by_source.insert(source, taken + 1);
        Some(Place {
            handshakes: self.clone(),
            source,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Handshakes::admit`].
#[derive(Debug)]
pub(super) struct Place {
    handshakes: Arc<Handshakes>,
    source: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.handshakes.lock();
        state.total -= 1;
        if let Some(taken) = state.by_source.get_mut(&self.source) {
            *taken -= 1;
            if *taken == 0 {
                state.by_source.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_cannot_take_all() {
        let handshakes = Arc::new(Handshakes::default());
        let source = |last: u8| IpAddr::from([10, 0, 0, last]);
        let mut held: Vec<_> = (0..MAX_PER_SOURCE)
            .map(|_| handshakes.admit(source(1)).unwrap())
            .collect();
        assert!(handshakes.admit(source(1)).is_none());
        held.push(handshakes.admit(source(2)).unwrap());
        drop(held.swap_remove(0));
        held.push(handshakes.admit(source(1)).unwrap());
        for last in 3..=255 {
            held.extend((0..MAX_PER_SOURCE).map_while(|_| handshakes.admit(source(last))));
        }
        assert_eq!(held.len(), MAX);
        drop(held);
        let state = handshakes.lock();
        assert!(state.total == 0 && state.by_source.is_empty());
    }
}
