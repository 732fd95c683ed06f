//! Reads the connections of several daemons, each once, and merges them by time.

use std::{
    collections::VecDeque,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::bail;

use super::super::daemons::{Daemon, Daemons, Unanswered};
use crate::observe::flows::{Flow, PAGE, Page};

/// How often a follower asks a daemon for new connections.
const POLL: Duration = Duration::from_millis(250);
/// The same through an API server, and for each daemon if there are many: it serves at most ten requests a second.
const POLL_CLUSTER: Duration = Duration::from_secs(1);
const POLL_EACH: Duration = Duration::from_millis(100);
/// How often a follower looks for daemons that have joined or have been replaced.
const REFRESH: Duration = Duration::from_secs(10);
/// How long a follower waits while no daemon answers, before it gives up. Once one has answered, a restart takes that long.
const PATIENCE: Duration = Duration::from_secs(60);

/// The connections of all daemons.
pub(super) struct Merged {
    daemons: Daemons,
    readers: Vec<Reader>,
    /// When a daemon answered last.
    answered: Option<Instant>,
    refreshed: Instant,
}

/// What has been read of a daemon.
#[derive(Debug)]
struct Reader {
    daemon: Daemon,
    /// [`Page::started`] of the daemon that answered last.
    started: Option<u64>,
    next: u64,
    /// Connections that are read and not shown yet.
    waiting: VecDeque<Flow>,
    /// Whether the daemon may have more.
    more: bool,
    failed: bool,
}

impl Merged {
    pub(super) fn new(daemons: Daemons) -> Self {
        let readers = daemons.list().iter().cloned().map(Reader::new).collect();
        for missing in daemons.missing() {
            eprintln!("auth-daemon: {missing}");
        }
        Self {
            daemons,
            readers,
            answered: None,
            refreshed: Instant::now(),
        }
    }

    /// Shows what the daemons have, oldest first, of the connections for which `select` holds. Returns whether all daemons
    /// answered. Fails if none does, or if `show` does.
    pub(super) fn show(
        &mut self,
        select: impl Fn(&Flow) -> bool,
        mut show: impl FnMut(&Flow) -> anyhow::Result<()>,
    ) -> anyhow::Result<bool> {
        loop {
            self.read(&select)?;
            while let Some(flow) = earliest(&mut self.readers) {
                show(&flow)?;
            }
            if self.readers.iter().all(|reader| !reader.more) {
                let failed = self.readers.iter().any(|reader| reader.failed);
                return Ok(!failed && self.daemons.missing().is_empty());
            }
        }
    }

    /// Waits, and prepares the next [`Self::show`].
    pub(super) fn wait(&mut self) {
        let count = self.readers.len().try_into().unwrap_or(u32::MAX);
        sleep(match self.daemons.in_cluster() {
            true => POLL_CLUSTER.max(POLL_EACH.saturating_mul(count)),
            false => POLL,
        });
        if self.daemons.in_cluster() && self.refreshed.elapsed() >= REFRESH {
            self.refreshed = Instant::now();
            // If that fails, the known daemons are asked again.
            if self.daemons.refresh().is_ok() {
                self.take_daemons();
            }
        }
        for reader in &mut self.readers {
            reader.more = true;
        }
    }

    /// Replaces the readers by those of the daemons found now. Readers of the same node continue.
    fn take_daemons(&mut self) {
        let mut before = std::mem::take(&mut self.readers);
        for daemon in self.daemons.list() {
            let known = before
                .iter()
                .position(|reader| reader.daemon.name == daemon.name);
            self.readers.push(match known {
                Some(index) => Reader {
                    daemon: daemon.clone(),
                    ..before.swap_remove(index)
                },
                None => Reader::new(daemon.clone()),
            });
        }
    }

    /// Asks the daemons that may have more, of which nothing is waiting.
    fn read(&mut self, select: &impl Fn(&Flow) -> bool) -> anyhow::Result<()> {
        let due: Vec<_> = (self.readers.iter().enumerate())
            .filter(|(_, reader)| reader.more && reader.waiting.is_empty())
            .map(|(index, reader)| (index, reader.daemon.clone(), reader.next))
            .collect();
        let paths: Vec<_> = due
            .iter()
            .map(|(_, daemon, next)| (daemon, *next))
            .collect();
        let pages = self
            .daemons
            .ask_each(&paths, |next| format!("/flows/{next}"));
        let mut failures = Vec::new();
        for ((index, daemon, _), page) in due.iter().zip(pages) {
            let reader = &mut self.readers[*index];
            // After a restart, the daemon's numbers begin again.
            let page = page.and_then(|page: Page| match reader.is_restart(&page) {
                true => self.daemons.ask(daemon, "/flows/0"),
                false => Ok(page),
            });
            match page {
                Ok(page) => {
                    self.answered = Some(Instant::now());
                    reader.take(page, select);
                }
                Err(error) => {
                    let failure = Unanswered {
                        node: daemon.name.clone(),
                        reason: format!("{error:#}"),
                    };
                    reader.fail(&failure, paths.len() > 1);
                    failures.push(failure.reason);
                }
            }
        }
        let is_silent = self.readers.iter().all(|reader| reader.failed);
        let is_waiting = self
            .answered
            .is_some_and(|answered| answered.elapsed() < PATIENCE);
        if is_silent && !is_waiting {
            match failures.is_empty() {
                true => bail!("no daemon can be reached"),
                false => bail!("{}", failures.join("; ")),
            }
        }
        Ok(())
    }
}

impl Reader {
    fn new(daemon: Daemon) -> Self {
        Self {
            daemon,
            started: None,
            next: 0,
            waiting: VecDeque::new(),
            more: true,
            failed: false,
        }
    }

    fn is_restart(&self, page: &Page) -> bool {
        self.started.is_some_and(|started| started != page.started)
    }

    fn take(&mut self, page: Page, select: &impl Fn(&Flow) -> bool) {
        let name = &self.daemon.name;
        if self.is_restart(&page) {
            eprintln!(
                "auth-daemon: the daemon at {name} has restarted: connections that ended meanwhile may be missing"
            );
        } else if self.started.is_some() && page.lost > 0 {
            eprintln!(
                "auth-daemon: {} connections at {name} are missing: they ended faster than they could be read",
                page.lost
            );
        }
        if self.failed {
            eprintln!("auth-daemon: the daemon at {name} answers again");
        }
        self.failed = false;
        self.started = Some(page.started);
        self.next = page.next;
        self.more = page.flows.len() == PAGE;
        self.waiting.extend(page.flows.into_iter().filter(select));
    }

    /// Names the node once, unless the command ends with the same message.
    fn fail(&mut self, failure: &Unanswered, has_others: bool) {
        if !self.failed && (has_others || self.started.is_some()) {
            eprintln!("auth-daemon: {failure}");
        }
        self.failed = true;
        self.more = false;
    }
}

/// Removes and returns the earliest connection, unless a daemon may have an earlier one that is not read yet.
fn earliest(readers: &mut [Reader]) -> Option<Flow> {
    if readers
        .iter()
        .any(|reader| reader.more && reader.waiting.is_empty())
    {
        return None;
    }
    let first = |reader: &&mut Reader| reader.waiting.front().map(|flow| flow.time.clone());
    let reader = readers
        .iter_mut()
        .filter(|reader| !reader.waiting.is_empty())
        .min_by_key(first)?;
    reader.waiting.pop_front()
}
