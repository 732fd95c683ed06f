//! Keeps track of which pods' links are private, by what the kernel reports of the node's interfaces.
//!
//! A pod with CAP_NET_ADMIN decides how often the kernel reports its link: it may set its end down and up again as fast as it
//! can. So a report is read, and no more is done if it changes no end of a link; and after a change the next ones wait.

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    time::{Duration, Instant},
};

use tokio::{io::unix::AsyncFd, time::sleep_until};

use super::{
    Netns,
    interfaces::NodeEnd,
    netlink::Netlink,
    pod_links::{NodeLinks, SharedLink},
};

/// Time after which a pod's own netns is read again, and the node's interfaces are listed again. The node is told of changes at
/// its end of a link, not in the pod.
const READ_AGAIN: Duration = Duration::from_secs(10);
/// The same while the pod's side is why the link is not private: its runtime may still be setting it up.
const READ_UNFINISHED: Duration = Duration::from_secs(1);
/// Maximum number of successive times that a private link may be unreadable. The kernel may lack memory for a moment, which is
/// no reason to end connections. No verdict is given meanwhile.
const MAX_UNREADABLE: u32 = 3;
/// Minimum time from one reading of reports to the next.
const PAUSE: Duration = Duration::from_millis(100);
/// Pause after the node's interfaces were listed, as a multiple of the time that it took.
const IDLE: u32 = 9;

/// Keeps track of which pods' links are private.
#[derive(Debug, Default)]
pub struct PodLinks {
    /// The node's netns, if it is not the daemon's own.
    #[cfg(test)]
    node_netns: Option<std::fs::File>,
    /// Reports changes of the node's interfaces.
    changes: Option<AsyncFd<Netlink>>,
    /// The node's ends of links, or why they are not known. `None` if they must be listed.
    node: Option<Result<NodeLinks, SharedLink>>,
    /// When they were last listed.
    listed: Option<Instant>,
    /// How often they were listed.
    #[cfg(test)]
    lists: u64,
    /// How often they have changed.
    version: u64,
    /// Until then, [`PodLinks::changed`] reads no report.
    rests_until: Option<Instant>,
    /// By the cookie of the pod's netns.
    known: HashMap<u64, Known>,
}

#[derive(Debug)]
struct Known {
    addresses: Vec<IpAddr>,
    /// The node's ends of the pod's links.
    ends: Result<Vec<NodeEnd>, SharedLink>,
    /// The version of the node's ends of links that they are from.
    version: u64,
    checked: Result<(), SharedLink>,
    /// How often it could not be read since it was found private.
    unreadable: u32,
    read: Instant,
}

impl Known {
    /// Whether the pod's own netns need not be read again.
    fn is_current(&self) -> bool {
        let for_long = match &self.checked {
            Ok(()) => self.unreadable == 0,
            Err(shared) => matches!(shared, SharedLink::Attached(_)),
        };
        let limit = if for_long {
            READ_AGAIN
        } else {
            READ_UNFINISHED
        };
        self.read.elapsed() < limit
    }

    /// Keeps what was found `before` if this could not be read, but not more than [`MAX_UNREADABLE`] times.
    fn after(self, before: &Self) -> Self {
        let is_kept = before.checked.is_ok() && before.unreadable < MAX_UNREADABLE;
        match self.checked {
            Err(SharedLink::Unreadable(_)) if is_kept => Self {
                ends: before.ends.clone(),
                checked: Ok(()),
                unreadable: before.unreadable + 1,
                ..self
            },
            _ => self,
        }
    }
}

impl PodLinks {
    /// Takes over what was reported of the node's interfaces, and lists them if that does not suffice. Forgets all pods but
    /// those whose cookie is `kept`. Must be called within the control plane's runtime.
    pub fn refresh(&mut self, kept: impl Fn(u64) -> bool) {
        self.known.retain(|cookie, _| kept(*cookie));
        if let Err(error) = self.update() {
            self.version += 1;
            self.node = Some(Err(error.into()));
        }
    }

    fn update(&mut self) -> io::Result<()> {
        match &mut self.changes {
            Some(changes) => {
                let (_, is_changed) = take(changes.get_mut(), &mut self.node);
                self.version += u64::from(is_changed);
            }
            None => {
                // Before the interfaces are listed, so that no change is missed.
                let netlink = self.node_netns()?.enter(Netlink::watch_links)??;
                // SAFETY: the socket owns its descriptor, always returns the same one, and closes it only when it is dropped.
                let changes = unsafe { AsyncFd::register(netlink) };
                self.changes = Some(changes.map_err(io::Error::from)?);
                self.node = None;
            }
        }
        let is_known = matches!(self.node, Some(Ok(_)));
        if is_known && self.listed.is_some_and(|at| at.elapsed() < READ_AGAIN) {
            return Ok(());
        }
        let began = Instant::now();
        let links = NodeLinks::list_in(self.node_netns()?)?;
        let is_same = matches!(&self.node, Some(Ok(before)) if links.is_same(before));
        self.version += u64::from(!is_same);
        self.node = Some(Ok(links));
        self.listed = Some(Instant::now());
        self.rests_until = self
            .rests_until
            .max(Some(Instant::now() + began.elapsed() * IDLE));
        #[cfg(test)]
        {
            self.lists += 1;
        }
        Ok(())
    }

    fn node_netns(&self) -> io::Result<Netns> {
        #[cfg(test)]
        if let Some(netns) = &self.node_netns {
            return Netns::nameless(netns.try_clone()?);
        }
        Netns::the_daemons()
    }

    /// Waits until the node's ends of links may have changed. Reads reports at most ten times a second.
    pub async fn changed(&mut self) {
        let Some(changes) = &mut self.changes else {
            return std::future::pending().await;
        };
        loop {
            if let Some(until) = self.rests_until {
                sleep_until(until.into()).await;
            }
            // An error of the descriptor is a reason to list the interfaces.
            let Ok(mut ready) = changes.readable_mut().await else {
                self.node = None;
                self.rests_until = Some(Instant::now() + PAUSE);
                return;
            };
            let (is_all, is_changed) = take(ready.get_inner_mut(), &mut self.node);
            if is_all {
                ready.clear_ready();
            }
            self.rests_until = Some(Instant::now() + PAUSE);
            if is_changed {
                self.version += 1;
                return;
            }
        }
    }

    /// Whether the link of the pod with these addresses in `pod` is private, as of the last call of [`PodLinks::refresh`].
    pub fn is_private(&mut self, pod: &Netns, addresses: &[IpAddr]) -> bool {
        let before = self.known.remove(&pod.cookie());
        let before = before.filter(|known| known.addresses == addresses);
        let known = match before {
            Some(known) if known.version == self.version && known.is_current() => known,
            before => self.read(pod, addresses, before),
        };
        let is_private = known.checked.is_ok();
        self.known.insert(pod.cookie(), known);
        is_private
    }

    fn read(&self, pod: &Netns, addresses: &[IpAddr], before: Option<Known>) -> Known {
        let ends = match &self.node {
            Some(Ok(node)) => node.ends_of(pod).map_err(SharedLink::from),
            Some(Err(error)) => Err(error.clone()),
            None => Err(SharedLink::Unreadable("they are not listed yet".into())),
        };
        let before = match before {
            Some(known) if known.ends == ends && known.is_current() => {
                let version = self.version;
                return Known { version, ..known };
            }
            before => before,
        };
        let checked = match (&self.node, &ends) {
            (Some(Ok(node)), Ok(ends)) => node.check_from(ends, pod, addresses),
            (_, ends) => ends.clone().map(drop),
        };
        let known = Known {
            addresses: addresses.to_vec(),
            ends,
            version: self.version,
            checked,
            unreadable: 0,
            read: Instant::now(),
        };
        match before {
            Some(before) => known.after(&before),
            None => known,
        }
    }

    /// The indices, in the node's netns, of the node's ends of the links to the pod in the netns with `cookie`.
    pub fn indices(&self, cookie: u64) -> Vec<u32> {
        let known = self.known.get(&cookie);
        let ends = known.and_then(|known| known.ends.as_ref().ok());
        ends.map_or_else(Vec::new, |ends| ends.iter().map(|end| end.index).collect())
    }

    /// Why the link of the pod in the netns with `cookie` is not private. `None` if it is, or if that was not asked yet.
    pub fn why_shared(&self, cookie: u64) -> Option<&SharedLink> {
        self.known.get(&cookie)?.checked.as_ref().err()
    }
}

/// Takes over what was reported. Returns whether that was all of it, and whether the node's ends of links may have changed.
fn take(changes: &mut Netlink, node: &mut Option<Result<NodeLinks, SharedLink>>) -> (bool, bool) {
    let mut is_changed = false;
    let is_all = changes.reports(|reported| {
        let learned = match (&mut *node, reported) {
            (Some(Ok(links)), Some(reported)) => links.learn(reported).ok(),
            // Reports are lost.
            (Some(Ok(_)), None) => None,
            // They will be listed, which is no news.
            _ => return,
        };
        is_changed |= learned != Some(false);
        if learned.is_none() {
            *node = None;
        }
    });
    (is_all, is_changed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_links::{ip, node_and_pod};

    const OWN: &str = "10.1.0.2";

    #[test]
    fn a_private_link_that_cannot_be_read_counts_as_private_for_a_few_times() {
        let known = |checked| Known {
            addresses: vec![],
            ends: Ok(vec![]),
            version: 0,
            checked,
            unreadable: 0,
            read: Instant::now(),
        };
        let unreadable = || known(Err(SharedLink::Unreadable("no memory".into())));
        let mut last = known(Ok(()));
        for _ in 0..MAX_UNREADABLE {
            last = unreadable().after(&last);
            assert_eq!(last.checked, Ok(()));
        }
        last = unreadable().after(&last);
        assert!(matches!(last.checked, Err(SharedLink::Unreadable(_))));
        assert!(unreadable().after(&last).checked.is_err());
        // A read that succeeds counts at once, and the count begins anew.
        assert_eq!(known(Ok(())).after(&last).unreadable, 0);
        let shared = known(Err(SharedLink::NoInterface)).after(&known(Ok(())));
        assert_eq!(shared.checked, Err(SharedLink::NoInterface));
        assert!(unreadable().after(&shared).checked.is_err());
    }

    /// A node with a private link to a pod that has the address [`OWN`], and what is known of it. `None` if `test` is skipped.
    fn linked(test: &str) -> Option<(Netns, Netns, PodLinks)> {
        let (node, pod) = node_and_pod(test)?;
        ip(
            &node,
            &pod,
            "link add p1 type veth peer name eth0 netns POD",
        );
        ip(&pod, &pod, &format!("addr add {OWN}/24 dev eth0"));
        let links = PodLinks {
            node_netns: Some(node.try_clone_file().unwrap()),
            ..PodLinks::default()
        };
        Some((node, pod, links))
    }

    #[tokio::test]
    async fn changes_of_the_nodes_interfaces_are_seen() {
        let Some((node, pod, mut links)) = linked("changes_of_the_nodes_interfaces_are_seen")
        else {
            return;
        };
        let own = [OWN.parse().unwrap()];
        assert!(!links.is_private(&pod, &own));
        links.refresh(|_| true);
        assert!(links.is_private(&pod, &own));
        assert_eq!(links.indices(pod.cookie()).len(), 1);
        ip(&node, &pod, "link add shared type bridge");
        // Until it is told, what is known holds.
        ip(&node, &pod, "link set p1 master shared");
        assert!(links.is_private(&pod, &own));
        links.changed().await;
        links.refresh(|_| true);
        assert!(!links.is_private(&pod, &own));
        assert!(
            links
                .why_shared(pod.cookie())
                .unwrap()
                .to_string()
                .contains("p1")
        );
        ip(&node, &pod, "link set p1 nomaster");
        links.changed().await;
        links.refresh(|_| true);
        assert!(links.is_private(&pod, &own));
        // Its index is another one then.
        ip(&node, &pod, "link del p1");
        links.changed().await;
        links.refresh(|_| true);
        assert!(!links.is_private(&pod, &own) && links.indices(pod.cookie()).is_empty());
        links.refresh(|_| false);
        assert_eq!(links.why_shared(pod.cookie()), None);
    }

    #[tokio::test]
    async fn a_link_that_goes_down_and_up_again_is_no_change() {
        let name = "a_link_that_goes_down_and_up_again_is_no_change";
        let Some((node, pod, mut links)) = linked(name) else {
            return;
        };
        let own = [OWN.parse().unwrap()];
        links.refresh(|_| true);
        assert!(links.is_private(&pod, &own));
        ip(&node, &pod, "link set p1 up");
        // No more than the socket's buffer holds.
        for _ in 0..5 {
            ip(&pod, &pod, "link set eth0 up");
            ip(&pod, &pod, "link set eth0 down");
        }
        let version = links.version;
        ip(&node, &pod, "link set p1 down");
        ip(&node, &pod, "link set p1 name p2");
        // It returns for the name alone.
        links.changed().await;
        assert_eq!(links.version, version + 1);
        links.refresh(|_| true);
        assert!(links.is_private(&pod, &own));
        assert_eq!((links.version, links.lists), (version + 1, 1));
    }
}
