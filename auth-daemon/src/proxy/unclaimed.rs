//! Addresses that no known object claims, and that are refused: those in the networks of pods and services, and those that
//! were an address of the mesh.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use auth_common::MeshKind;
use ipnet::IpNet;

/// How long an address stays refused after its last claim. A server may outlive its object, but not for that long.
const LIFE: Duration = Duration::from_secs(24 * 60 * 60);
/// Maximum number of addresses that stay refused after their last claim, besides those of a previous daemon.
const MAX_GONE: usize = 16_384;

/// Why an address that no known object claims is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    /// An object claimed the address before.
    #[error(
        "{address} was the address of {was} until {seconds} s ago, and no object claims it now; \
         the client should resolve the server's name again"
    )]
    Gone {
        address: IpAddr,
        /// The object.
        was: String,
        seconds: u64,
    },
    /// An object claimed the address before this daemon started.
    #[error(
        "{0} was an address of the mesh before this daemon started, and no object claims it now; \
         the client should resolve the server's name again"
    )]
    GoneBefore(IpAddr),
    /// The address is in a network of pods or services.
    #[error(
        "no known pod or service has {address}, which is in {network}; \
         check the server's object, or exclude the address from podNetworks and serviceNetworks"
    )]
    InNetwork { address: IpAddr, network: IpNet },
}

/// The addresses and networks in which what no object claims is refused.
#[derive(Debug, Default)]
pub(crate) struct Unclaimed {
    networks: ArcSwap<HashMap<IpNet, MeshKind>>,
    gone: Mutex<GoneAddresses>,
}

impl Unclaimed {
    /// Returns why `address` is refused, or `None` if it is in no network of the mesh and was no address of it. Only for an
    /// address that no known object claims.
    pub(crate) fn refuse(&self, address: IpAddr) -> Option<Refused> {
        if let Some(gone) = self.gone().get(address) {
            return Some(match &gone.was {
                Some(was) => Refused::Gone {
                    address,
                    was: was.clone(),
                    seconds: gone.since.elapsed().as_secs(),
                },
                None => Refused::GoneBefore(address),
            });
        }
        let networks = self.networks.load();
        let network = networks.keys().find(|network| network.contains(&address))?;
        Some(Refused::InNetwork {
            address,
            network: *network,
        })
    }

    /// Sets the networks, and what each contains.
    pub(crate) fn set_networks(&self, networks: HashMap<IpNet, MeshKind>) {
        self.networks.store(networks.into());
    }

    /// The addresses that no object claims any more.
    pub(crate) fn gone(&self) -> MutexGuard<'_, GoneAddresses> {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An address that was the mesh's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gone {
    /// The object that claimed it last. `None` if that was before this daemon started.
    pub(crate) was: Option<String>,
    /// Whether it was the address of a service.
    pub(crate) is_service: bool,
    /// When its last claim ended, or when this daemon started.
    pub(crate) since: Instant,
}

/// The addresses that were the mesh's and that no object claims any more.
#[derive(Debug, Default)]
pub(crate) struct GoneAddresses {
    by_address: HashMap<IpAddr, Gone>,
    /// Those of this daemon's time.
    oldest_first: BTreeSet<(Instant, IpAddr)>,
    /// Those that a previous daemon has left.
    adopted: BTreeSet<(Instant, IpAddr)>,
    /// How many were dropped because there were too many.
    dropped: u64,
}

impl GoneAddresses {
    pub(crate) fn get(&self, address: IpAddr) -> Option<&Gone> {
        self.by_address.get(&address)
    }

    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.by_address.keys().copied()
    }

    pub(crate) fn len(&self) -> usize {
        self.by_address.len()
    }

    /// How many addresses were dropped because there were too many.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Adds an address that a previous daemon has left in the kernel's map. None is dropped to make room for others: after a
    /// start these may be the addresses of a whole cluster that cannot be read yet, and the map limits their number.
    pub(crate) fn adopt(&mut self, address: IpAddr, gone: Gone) {
        self.claim(address);
        self.adopted.insert((gone.since, address));
        self.by_address.insert(address, gone);
    }

    /// Adds `address`. If there are too many of this daemon's time, returns the oldest of them, which is dropped.
    pub(crate) fn add(&mut self, address: IpAddr, gone: Gone) -> Option<IpAddr> {
        self.claim(address);
        self.oldest_first.insert((gone.since, address));
        self.by_address.insert(address, gone);
        if self.oldest_first.len() <= MAX_GONE {
            return None;
        }
        let (_, oldest) = self.oldest_first.pop_first()?;
        self.by_address.remove(&oldest);
        self.dropped += 1;
        Some(oldest)
    }

    /// Removes `address`, because an object claims it.
    pub(crate) fn claim(&mut self, address: IpAddr) {
        if let Some(gone) = self.by_address.remove(&address) {
            let entry = (gone.since, address);
            self.adopted.remove(&entry);
            self.oldest_first.remove(&entry);
        }
    }

    /// Removes and returns the addresses whose time is over at `now`.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<IpAddr> {
        let mut expired = Vec::new();
        for entries in [&mut self.adopted, &mut self.oldest_first] {
            while let Some((since, address)) = entries.first().copied()
                && now.saturating_duration_since(since) >= LIFE
            {
                entries.pop_first();
                self.by_address.remove(&address);
                expired.push(address);
            }
        }
        expired
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(number: u32) -> IpAddr {
        IpAddr::from(number.to_be_bytes())
    }

    fn gone(since: Instant) -> Gone {
        Gone {
            was: Some("pod default/web".into()),
            is_service: false,
            since,
        }
    }

    #[test]
    fn says_what_an_address_was_or_which_network_it_is_in() {
        let unclaimed = Unclaimed::default();
        let address: IpAddr = "10.1.2.3".parse().unwrap();
        assert_eq!(unclaimed.refuse(address), None);
        let network = "10.1.0.0/16".parse().unwrap();
        unclaimed.set_networks([(network, MeshKind::PodNetwork)].into());
        let refused = unclaimed.refuse(address).unwrap().to_string();
        assert!(
            refused.starts_with("no known pod or service has 10.1.2.3, which is in 10.1.0.0/16; "),
            "{refused}"
        );
        let since = Instant::now() - Duration::from_secs(12);
        unclaimed.gone().add(address, gone(since));
        let refused = unclaimed.refuse(address).unwrap().to_string();
        assert!(
            refused.starts_with("10.1.2.3 was the address of pod default/web until 12 s ago"),
            "{refused}"
        );
        assert_eq!(unclaimed.refuse("192.0.2.1".parse().unwrap()), None);
    }

    #[test]
    fn an_address_ends_when_it_is_claimed_or_after_a_day() {
        let mut all = GoneAddresses::default();
        let start = Instant::now();
        for second in 0..3 {
            all.add(ip(second), gone(start + Duration::from_secs(second.into())));
        }
        all.claim(ip(1));
        assert!(all.get(ip(1)).is_none());
        // It was claimed again in between, so its time starts again.
        all.add(ip(0), gone(start + LIFE / 2));
        assert!(all.expire(start + LIFE).is_empty());
        assert_eq!(all.expire(start + LIFE + Duration::from_secs(2)), [ip(2)]);
        assert_eq!(all.expire(start + LIFE + LIFE / 2), [ip(0)]);
        assert_eq!(all.len(), 0);
    }

    #[test]
    fn the_oldest_is_dropped_when_there_are_too_many() {
        let mut all = GoneAddresses::default();
        let start = Instant::now();
        for number in 0..MAX_GONE as u32 {
            let since = start + Duration::from_millis(number.into());
            assert_eq!(all.add(ip(number), gone(since)), None);
        }
        let last = gone(start + LIFE);
        assert_eq!(all.add(ip(5), last.clone()), None, "it was there before");
        assert_eq!(all.add(ip(1 << 24), last), Some(ip(0)));
        assert_eq!((all.len(), all.dropped()), (MAX_GONE, 1));
        assert!(all.get(ip(5)).is_some());
    }

    #[test]
    fn all_that_a_previous_daemon_has_left_stay() {
        let mut all = GoneAddresses::default();
        let start = Instant::now();
        let left = 2 * MAX_GONE as u32;
        for number in 0..left {
            all.adopt(ip(number), gone(start));
        }
        let later = start + Duration::from_secs(1);
        for number in left..left + MAX_GONE as u32 {
            assert_eq!(all.add(ip(number), gone(later)), None);
        }
        assert_eq!((all.len(), all.dropped()), (3 * MAX_GONE, 0));
        assert_eq!(all.add(ip(1 << 24), gone(later)), Some(ip(left)));
        assert_eq!(all.expire(start + LIFE).len(), 2 * MAX_GONE);
    }

    #[test]
    fn those_of_a_previous_daemon_make_room_for_no_others_once_they_have_ended() {
        let mut all = GoneAddresses::default();
        let start = Instant::now();
        let later = start + LIFE / 2;
        for number in 0..4 {
            all.adopt(ip(number), gone(start));
        }
        all.claim(ip(0));
        // It is this daemon's now.
        all.add(ip(1), gone(later));
        assert_eq!(all.expire(start + LIFE), [ip(2), ip(3)]);
        for number in 4..2 * MAX_GONE as u32 {
            all.add(ip(number), gone(later));
        }
        assert_eq!(all.len(), MAX_GONE);
    }
}
