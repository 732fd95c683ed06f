//! Names on demand: addresses that connections of this node ask the control plane about, because it reports no others.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout_at},
};

use auth_xds::Answer;

/// Maximum time that a connection waits for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the answer counts that nothing, or nothing usable, has an address: istiod does not report when this changes.
const BRIEF: Duration = Duration::from_millis(200);
/// Age from which an address in use is asked about again, while connections use the old answer: istiod does not report
/// a service's new endpoints.
const REFRESH: Duration = Duration::from_secs(5);
/// Maximum number of addresses that wait for an answer.
const MAX_WAITING: usize = 1024;
/// Maximum number of addresses with an answer. The least recently used ones are forgotten beyond it.
const MAX_ANSWERED: usize = 65_536;

/// The addresses that were asked for. Nobody holds the lock across an await.
#[derive(Debug)]
pub struct Lookups {
    table: Mutex<Table>,
    /// How long an address is known after it was last used.
    idle: Duration,
    /// Wakes the task that asks.
    queued: Notify,
    /// Wakes the connections that wait.
    answered: watch::Sender<()>,
}

/// What has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// A workload or service, which the registry knows by now.
    Known,
    /// Nothing in the mesh.
    Absent,
}

/// Why a connection to or from an address is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotFound {
    /// The control plane is unavailable, or slow.
    #[error(
        "istiod has not said within {PATIENCE:?} what has {0}; see the daemon's log for why it does not answer"
    )]
    Late(IpAddr),
    /// Too many others wait.
    #[error(
        "istiod cannot be asked what has {0}: {MAX_WAITING} other addresses wait for its answer"
    )]
    TooMany(IpAddr),
    /// The control plane's answer cannot be used.
    #[error("what istiod says of {0} cannot be used: {1}")]
    Rejected(IpAddr, String),
}

#[derive(Debug, Default)]
struct Table {
    entries: HashMap<IpAddr, Entry>,
    queue: Vec<IpAddr>,
    /// Number of entries that are asked for.
    waiting: usize,
}

#[derive(Debug)]
struct Entry {
    /// The last answer, and since when it counts.
    answer: Option<(Answer, Instant)>,
    is_asked: bool,
    /// Whether the address is needed without being dialled.
    is_pinned: bool,
    used: Instant,
}

/// How a connection continues.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Take(Answer),
    Wait,
    Refuse,
}

impl Lookups {
    /// Creates a table that forgets an address which was not used for `idle`.
    pub fn new(idle: Duration) -> Self {
        Self {
            table: Mutex::default(),
            idle,
            queued: Notify::new(),
            answered: watch::Sender::new(()),
        }
    }

    /// Asks what has `address`, unless an answer counts, and waits for the answer.
    pub async fn look_up(&self, address: IpAddr) -> Result<Found, NotFound> {
        let start = Instant::now();
        let mut answered = self.answered.subscribe();
        loop {
            answered.borrow_and_update();
            let step = self.table().need(address, start, Instant::now());
            self.queued.notify_one();
            match step {
                Step::Take(Answer::Known) => return Ok(Found::Known),
                Step::Take(Answer::Absent) => return Ok(Found::Absent),
                Step::Take(Answer::Rejected(why)) => return Err(NotFound::Rejected(address, why)),
                Step::Refuse => return Err(NotFound::TooMany(address)),
                Step::Wait => {}
            }
            let changed = timeout_at(start + PATIENCE, answered.changed());
            if !matches!(changed.await, Ok(Ok(()))) {
                return Err(NotFound::Late(address));
            }
        }
    }

    /// Lets the next connection ask for `address` again, because the registry does not know what the answer was about.
    pub(crate) fn doubt(&self, address: IpAddr) {
        if let Some(entry) = self.table().entries.get_mut(&address) {
            entry.answer = None;
        }
    }

    /// Waits until addresses are to be asked for, and takes them.
    pub async fn queued(&self) -> Vec<IpAddr> {
        loop {
            let queue = std::mem::take(&mut self.table().queue);
            if !queue.is_empty() {
                return queue;
            }
            self.queued.notified().await;
        }
    }

    /// Takes the answers, which the registry holds by now.
    pub fn answer(&self, answers: impl IntoIterator<Item = (IpAddr, Answer)>) {
        self.table().answer(answers, Instant::now());
        self.answered.send_replace(());
    }

    /// Makes `addresses` those that are known even if nobody dials them.
    pub fn pin(&self, addresses: &HashSet<IpAddr>) {
        self.table().pin(addresses, Instant::now());
        self.queued.notify_one();
    }

    /// Forgets what is idle, asks again for pinned addresses that nothing has, and returns the addresses in use.
    pub fn in_use(&self) -> HashSet<IpAddr> {
        let used = self.table().in_use(Instant::now(), self.idle);
        self.queued.notify_one();
        used
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Each change is whole, even if a thread panics afterwards.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Asks for `address` if no answer counts for a connection that has waited since `start`.
    fn need(&mut self, address: IpAddr, start: Instant, now: Instant) -> Step {
        if !self.entries.contains_key(&address) {
            self.make_room();
            if self.waiting >= MAX_WAITING {
                return Step::Refuse;
            }
        }
        let entry = self.entries.entry(address).or_insert(Entry::new(now));
        entry.used = now;
        let (counts, is_old) = match &entry.answer {
            Some((Answer::Known, since)) => (true, now.duration_since(*since) >= REFRESH),
            Some((_, since)) => {
                let counts = *since >= start || now.duration_since(*since) < BRIEF;
                (counts, !counts)
            }
            None => (false, true),
        };
        if is_old && !entry.is_asked {
            if self.waiting < MAX_WAITING {
                entry.is_asked = true;
                self.waiting += 1;
                self.queue.push(address);
            } else if !counts {
                return Step::Refuse;
            }
        }
        match &entry.answer {
            Some((answer, _)) if counts => Step::Take(answer.clone()),
            _ => Step::Wait,
        }
    }

    fn answer(&mut self, answers: impl IntoIterator<Item = (IpAddr, Answer)>, now: Instant) {
        for (address, answer) in answers {
            if let Some(entry) = self.entries.get_mut(&address) {
                self.waiting -= usize::from(std::mem::take(&mut entry.is_asked));
                entry.answer = Some((answer, now));
            }
        }
    }

    fn pin(&mut self, addresses: &HashSet<IpAddr>, now: Instant) {
        for (address, entry) in &mut self.entries {
            entry.is_pinned = addresses.contains(address);
        }
        for address in addresses {
            let entry = self.entries.entry(*address).or_insert(Entry::new(now));
            entry.is_pinned = true;
            if entry.answer.is_none() && !std::mem::replace(&mut entry.is_asked, true) {
                self.waiting += 1;
                self.queue.push(*address);
            }
        }
    }

    fn in_use(&mut self, now: Instant, idle: Duration) -> HashSet<IpAddr> {
        let mut again = Vec::new();
        self.entries.retain(|address, entry| {
            let is_known = matches!(entry.answer, Some((Answer::Known, _)));
            let life = if is_known { idle } else { BRIEF };
            if entry.is_pinned && !entry.is_asked && !is_known {
                let since = entry.answer.as_ref().map_or(now, |(_, since)| *since);
                entry.is_asked = now.duration_since(since) >= REFRESH;
                again.extend(entry.is_asked.then_some(*address));
            }
            entry.is_asked || entry.is_pinned || now.duration_since(entry.used) < life
        });
        self.waiting += again.len();
        self.queue.extend(again);
        self.entries.keys().copied().collect()
    }

    /// Makes room for another entry: forgets the quarter of the answers that were used longest ago.
    fn make_room(&mut self) {
        if self.entries.len() < MAX_ANSWERED {
            return;
        }
        let entries = self.entries.iter();
        let idle = entries.filter(|(_, entry)| !entry.is_asked && !entry.is_pinned);
        let mut idle: Vec<_> = idle
            .map(|(address, entry)| (entry.used, *address))
            .collect();
        idle.sort_unstable();
        for (_, address) in idle.iter().take(MAX_ANSWERED / 4) {
            self.entries.remove(address);
        }
    }
}

impl Entry {
    fn new(now: Instant) -> Self {
        Self {
            answer: None,
            is_asked: false,
            is_pinned: false,
            used: now,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(number: u32) -> IpAddr {
        IpAddr::from(number.to_be_bytes())
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn an_address_is_asked_for_once_until_its_answer_is_old() {
        let (mut table, start) = (Table::default(), Instant::now());
        assert_eq!(table.need(ip(1), start, start), Step::Wait);
        assert_eq!(table.need(ip(1), start, start), Step::Wait);
        assert_eq!(std::mem::take(&mut table.queue), [ip(1)]);
        table.answer([(ip(1), Answer::Known)], start);
        let later = start + REFRESH - SECOND;
        let take = Step::Take(Answer::Known);
        assert_eq!(table.need(ip(1), later, later), take);
        assert!(table.queue.is_empty());
        let later = start + REFRESH;
        assert_eq!(table.need(ip(1), later, later), take, "it need not wait");
        assert_eq!(std::mem::take(&mut table.queue), [ip(1)]);
        assert_eq!(table.need(ip(1), later, later), take);
        assert!(table.queue.is_empty(), "it is asked for already");
    }

    #[test]
    fn that_nothing_has_an_address_counts_for_those_who_waited() {
        let (mut table, start) = (Table::default(), Instant::now());
        table.need(ip(1), start, start);
        let answered = start + SECOND;
        table.answer([(ip(1), Answer::Absent)], answered);
        let absent = Step::Take(Answer::Absent);
        let late = answered + SECOND;
        assert_eq!(table.need(ip(1), start, late), absent);
        table.queue.clear();
        assert_eq!(table.need(ip(1), late, late), Step::Wait);
        assert_eq!(std::mem::take(&mut table.queue), [ip(1)]);
        // A moment later, a new connection takes the same answer.
        table.answer([(ip(1), Answer::Absent)], late);
        let soon = late + BRIEF / 2;
        assert_eq!(table.need(ip(1), soon, soon), absent);
    }

    #[test]
    fn what_is_idle_is_forgotten_unless_it_is_pinned() {
        let (mut table, start) = (Table::default(), Instant::now());
        table.pin(&[ip(1)].into(), start);
        for number in 2..5 {
            table.need(ip(number), start, start);
        }
        assert_eq!(table.in_use(start + 9 * SECOND, SECOND).len(), 4, "asked");
        let known = (1..4).map(|number| (ip(number), Answer::Known));
        table.answer(known.chain([(ip(4), Answer::Absent)]), start);
        let later = start + 9 * SECOND;
        table.need(ip(2), later, later);
        table.answer([(ip(2), Answer::Known)], later);
        assert_eq!(table.in_use(later, 10 * SECOND).len(), 3, "nothing has 4");
        let used = table.in_use(later + 2 * SECOND, 10 * SECOND);
        assert_eq!(used, [ip(1), ip(2)].into());
        table.queue.clear();
        table.answer([(ip(1), Answer::Absent)], later);
        table.in_use(later + REFRESH, 10 * SECOND);
        assert_eq!(table.queue, [ip(1)], "something may have it by now");
        table.answer([(ip(1), Answer::Known)], later + REFRESH);
        table.pin(&HashSet::new(), later);
        assert!(table.in_use(later + 20 * SECOND, 10 * SECOND).is_empty());
        assert_eq!(table.waiting, 0);
    }

    #[test]
    fn the_table_is_bounded() {
        let (mut table, start) = (Table::default(), Instant::now());
        for number in 0..MAX_WAITING as u32 {
            assert_eq!(table.need(ip(number), start, start), Step::Wait);
        }
        assert_eq!(table.need(ip(1 << 24), start, start), Step::Refuse);
        assert_eq!(table.entries.len(), MAX_WAITING);
        let queue = std::mem::take(&mut table.queue);
        table.answer(queue.into_iter().map(|it| (it, Answer::Known)), start);
        for number in 0..(2 * MAX_ANSWERED) as u32 {
            let now = start + SECOND * (number >> 10);
            table.need(ip(number), now, now);
            table.answer([(ip(number), Answer::Known)], now);
            table.queue.clear();
        }
        assert!(table.entries.len() <= MAX_ANSWERED);
        let last = (2 * MAX_ANSWERED) as u32 - 1;
        assert!(table.entries.contains_key(&ip(last)));
    }

    #[tokio::test]
    async fn a_connection_waits_for_the_answer() {
        let lookups = Lookups::new(SECOND);
        let answer = async {
            let queued = lookups.queued().await;
            lookups.answer(queued.into_iter().map(|it| (it, Answer::Known)));
        };
        let (found, ()) = tokio::join!(lookups.look_up(ip(1)), answer);
        assert_eq!(found, Ok(Found::Known));
        let both = async {
            let queued = lookups.queued().await;
            let answer = Answer::Rejected("it is in another network".into());
            lookups.answer(queued.into_iter().map(|it| (it, answer.clone())));
        };
        let (refused, ()) = tokio::join!(lookups.look_up(ip(2)), both);
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("another network"), "{refused}");
    }
}
