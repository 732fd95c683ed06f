//! Looks for the network namespaces of the pods that only their UIDs tell of: often while one is not found, at once when
//! the kernel tells of a socket in a namespace that nobody knows, and now and then in any case, for a sandbox may have
//! been made anew.

use std::{
    collections::HashMap,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::task::JoinHandle;

use crate::{EnrolError, FirstSockets, Kernel, Netns, NetnsLocation, PodUid, Scan, find};
use auth_mesh::{ObjectName, Workload};

/// Until the next look after one that left a pod unfound, doubled each time. A sandbox is there some hundred milliseconds
/// before its app is.
const FIRST: Duration = Duration::from_millis(20);
/// And at most.
const MOST: Duration = Duration::from_secs(1);
/// Between looks when all are found.
const SLOW: Duration = Duration::from_secs(10);
/// Likewise, when the kernel tells of a namespace: it may be the new sandbox of a pod that is found.
const TOLD: Duration = Duration::from_secs(1);
/// A look is followed by so many times the processor's time that it took.
const REST: u32 = 4;
/// How long one look may take.
const LIMIT: Duration = Duration::from_secs(5);
/// Namespaces whose first socket is remembered.
const REMEMBERED: usize = 4096;

/// The search, on the control plane's runtime. It reads /proc on threads of its own.
pub struct NetnsDiscovery {
    sockets: Option<FirstSockets>,
    /// Cookies of the node's own namespaces, whose sockets say nothing.
    nodes: Vec<u64>,
    first_sockets: HashMap<u64, Instant>,
    sought: HashMap<PodUid, Sought>,
    schedule: Schedule,
    look: Option<JoinHandle<io::Result<Scan>>>,
    /// Whether that one is for all pods, or only for those that are not found.
    is_full: bool,
    last: Last,
}

struct Sought {
    /// One, unless two objects say that they are the same pod.
    pods: Vec<ObjectName>,
    since: Instant,
    found: Option<NetnsLocation>,
}

/// What came of the last look.
enum Last {
    /// There was none.
    None,
    Done {
        /// Whether any process is a pod's.
        pods_seen: bool,
    },
    Failed(String),
}

impl Sought {
    /// The namespace that its processes are in, whoever else's are.
    fn netns(&self) -> Option<&Arc<Netns>> {
        match &self.found {
            Some(NetnsLocation::In(netns) | NetnsLocation::Shared(netns, _)) => Some(netns),
            _ => None,
        }
    }
}

impl NetnsDiscovery {
    /// Seeks nothing yet. Called once, within the control runtime.
    pub fn new(kernel: &Kernel) -> Self {
        let sockets = kernel.first_sockets().map_err(|error| {
            tracing::error!(%error, "cannot hear of new pods from the kernel; they are found a little later");
        });
        let nodes = ["/proc/self/ns/net", "/proc/1/ns/net"];
        let nodes = nodes.map(|path| Netns::open(path.as_ref()).ok());
        Self {
            sockets: sockets.ok(),
            nodes: nodes.iter().flatten().map(Netns::cookie).collect(),
            first_sockets: HashMap::new(),
            sought: HashMap::new(),
            schedule: Schedule::default(),
            look: None,
            is_full: false,
            last: Last::None,
        }
    }

    /// Seeks these from now on, and no others. Those that have namespaces with a name are passed over.
    pub fn want<'a>(&mut self, workloads: impl Iterator<Item = &'a Workload>) {
        for sought in self.sought.values_mut() {
            sought.pods.clear();
        }
        let now = Instant::now();
        for workload in workloads.filter(|workload| workload.netns.is_none()) {
            let Ok(uid) = workload.uid.parse() else {
                continue;
            };
            let sought = self.sought.entry(uid).or_insert_with(|| {
                self.schedule.news();
                Sought {
                    pods: Vec::new(),
                    since: now,
                    found: None,
                }
            });
            sought.pods.push(workload.name.clone());
        }
        self.sought.retain(|_, sought| !sought.pods.is_empty());
    }

    /// The namespace of a pod that is sought, or why it is not known.
    pub fn netns(&self, workload: &Workload) -> Result<Arc<Netns>, EnrolError> {
        let pod = workload.name.clone();
        let uid: PodUid = workload.uid.parse().map_err(|error| EnrolError::NoNetns {
            pod: pod.clone(),
            uid: workload.uid.clone(),
            error,
        })?;
        let Some(sought) = self.sought.get(&uid) else {
            let why = "it is not looked for yet".to_owned();
            return Err(EnrolError::NoProcess { pod, why });
        };
        if let Some(other) = sought.pods.iter().find(|name| **name != pod) {
            let other = other.to_string();
            return Err(EnrolError::Shared { pod, other });
        }
        match &sought.found {
            Some(NetnsLocation::In(netns)) => Ok(netns.clone()),
            Some(NetnsLocation::Shared(_, other)) => Err(EnrolError::Shared {
                pod,
                other: self.name(*other),
            }),
            Some(NetnsLocation::Hidden { pid, error }) => Err(EnrolError::Hidden {
                pod,
                pid: *pid,
                error: error.clone(),
            }),
            Some(NetnsLocation::Node) => Err(EnrolError::NoProcess {
                pod,
                why: "all its processes are in the node's own network namespace".into(),
            }),
            None => Err(EnrolError::NoProcess {
                pod,
                why: self.why_none(),
            }),
        }
    }

    fn name(&self, uid: PodUid) -> String {
        let sought = self.sought.get(&uid);
        let name = sought.and_then(|sought| sought.pods.first());
        name.map_or_else(|| uid.to_string(), ObjectName::to_string)
    }

    fn why_none(&self) -> String {
        match &self.last {
            Last::None => "its processes have not been looked for yet".into(),
            Last::Failed(error) => format!("cannot look for its processes: {error}"),
            Last::Done { pods_seen: false } => {
                "no process on this node is any pod's: does the daemon see the node's processes (hostPID: true)?".into()
            }
            Last::Done { pods_seen: true } => "it has no process yet".into(),
        }
    }

    /// The namespace of the pod that another one's processes are in, too.
    pub fn shared(&self, workload: &Workload) -> Option<u64> {
        let uid = workload.uid.parse().ok()?;
        let sought = self.sought.get(&uid)?;
        match &sought.found {
            Some(NetnsLocation::Shared(netns, _)) => Some(netns.cookie()),
            // Two objects say that they are the pod in it.
            Some(NetnsLocation::In(netns)) if sought.pods.len() > 1 => Some(netns.cookie()),
            _ => None,
        }
    }

    /// Whether all namespaces of pods that have processes are known. While that is not so, one that a daemon before this
    /// one knew may be any pod's.
    pub fn knows_all(&self) -> bool {
        let hidden = |sought: &Sought| matches!(sought.found, Some(NetnsLocation::Hidden { .. }));
        self.sought.is_empty()
            || matches!(self.last, Last::Done { .. }) && !self.sought.values().any(hidden)
    }

    /// How long `workload`, whose namespace this is, has been making sockets unserved: since the kernel told of the first
    /// one, or, if that was later, since the pod is known. `None` when it has made none.
    pub fn unserved(&mut self, workload: &Workload, cookie: u64) -> Option<Duration> {
        let first = self.first_sockets.remove(&cookie)?;
        let sought = self.sought.get(&workload.uid.parse().ok()?)?;
        Some(sought.since.max(first).elapsed())
    }

    /// Looks once, if there is anything to look for.
    pub async fn look(&mut self) {
        if self.sought.is_empty() {
            return;
        }
        self.begin();
        let done = finished(&mut self.look).await;
        self.take(done);
    }

    /// Looks when it is time to, and returns when that has changed anything. Dropped while it waits, it has lost nothing.
    pub async fn changed(&mut self) {
        loop {
            let due = self.schedule.due(self.is_missing());
            let mut told = Vec::new();
            let may_begin = self.look.is_none() && !self.sought.is_empty();
            tokio::select! {
                done = finished(&mut self.look) => if self.take(done) {
                    return;
                },
                () = sleep_until(due), if may_begin => self.begin(),
                heard = hear(&mut self.sockets, &mut told) => {
                    if let Err(error) = heard {
                        tracing::error!(%error, "cannot hear of new pods from the kernel any more; they are found a little later");
                        self.sockets = None;
                    }
                    for (cookie, at) in told {
                        self.told(cookie, at);
                    }
                }
            }
        }
    }

    fn is_missing(&self) -> bool {
        self.sought.values().any(|sought| sought.netns().is_none())
    }

    fn begin(&mut self) {
        self.is_full = self.schedule.begun(Instant::now(), self.is_missing());
        let sought: HashMap<_, _> = self
            .sought
            .iter()
            .map(|(uid, sought)| (*uid, sought.netns().cloned()))
            .filter(|(_, netns)| self.is_full || netns.is_none())
            .collect();
        self.look = Some(tokio::task::spawn_blocking(move || find(&sought, LIMIT)));
    }

    /// Takes what a look has shown. Returns whether that is any news.
    fn take(&mut self, done: io::Result<Scan>) -> bool {
        self.look = None;
        // One that failed may have taken as long as it could.
        let effort = done.as_ref().map_or(LIMIT, |scan| scan.effort);
        self.schedule.ended(Instant::now(), effort);
        let mut scan = match done {
            Ok(scan) => scan,
            Err(error) => {
                let reason = error.to_string();
                let known = matches!(&self.last, Last::Failed(before) if *before == reason);
                if !known {
                    tracing::error!(%error, "cannot look for pods' processes; new pods are not enrolled");
                }
                self.last = Last::Failed(reason);
                return !known;
            }
        };
        tracing::debug!(
            processes = scan.processes, of_pods = scan.of_pods, effort = ?scan.effort,
            "looked for pods' processes"
        );
        let mut news = !matches!(self.last, Last::Done { .. });
        self.last = Last::Done {
            pods_seen: scan.of_pods > 0,
        };
        let held: HashMap<u64, PodUid> = self
            .sought
            .iter()
            .filter_map(|(uid, sought)| Some((sought.netns()?.cookie(), *uid)))
            .collect();
        for (uid, sought) in &mut self.sought {
            if !self.is_full && sought.netns().is_some() {
                continue;
            }
            let now = after(sought.found.as_ref(), scan.pods.remove(uid));
            news |= !is_same(sought.found.as_ref(), now.as_ref());
            sought.found = now;
            let cookie = sought.netns().map(|netns| netns.cookie());
            if cookie.is_some_and(|cookie| held.get(&cookie).is_some_and(|owner| owner != uid)) {
                // One look at both is to tell whose it is.
                self.schedule.doubt();
            }
        }
        news
    }

    /// The kernel has told of a socket in the namespace with `cookie`.
    fn told(&mut self, cookie: u64, at: Instant) {
        let known = |sought: &Sought| matches!(&sought.found, Some(NetnsLocation::In(netns)) if netns.cookie() == cookie);
        if self.nodes.contains(&cookie) || self.sought.values().any(known) {
            return;
        }
        self.schedule.told();
        if self.first_sockets.len() >= REMEMBERED {
            // They are for the log only, and of most nobody will ever ask.
            self.first_sockets.clear();
        }
        self.first_sockets.entry(cookie).or_insert(at);
    }
}

async fn finished(look: &mut Option<JoinHandle<io::Result<Scan>>>) -> io::Result<Scan> {
    match look {
        Some(look) => look.await.map_err(io::Error::other)?,
        None => std::future::pending().await,
    }
}

async fn sleep_until(due: Option<Instant>) {
    if let Some(due) = due {
        tokio::time::sleep_until(due.into()).await;
    }
}

async fn hear(
    sockets: &mut Option<FirstSockets>,
    told: &mut Vec<(u64, Instant)>,
) -> io::Result<()> {
    match sockets {
        Some(sockets) => sockets.next(|cookie, at| told.push((cookie, at))).await,
        None => std::future::pending().await,
    }
}

/// What is known of a pod that was `before`, after a look that has shown `seen`. A namespace that was found is the pod's
/// until another one is found: between two containers there may be no process, or none that can be seen.
fn after(before: Option<&NetnsLocation>, seen: Option<NetnsLocation>) -> Option<NetnsLocation> {
    match (before, seen) {
        (_, Some(found @ (NetnsLocation::In(_) | NetnsLocation::Shared(..)))) => Some(found),
        (Some(held @ NetnsLocation::In(_)), _) => Some(held.clone()),
        (_, seen) => seen,
    }
}

fn is_same(one: Option<&NetnsLocation>, other: Option<&NetnsLocation>) -> bool {
    match (one, other) {
        (Some(NetnsLocation::In(one)), Some(NetnsLocation::In(other))) => {
            one.cookie() == other.cookie()
        }
        (Some(NetnsLocation::Shared(one, with)), Some(NetnsLocation::Shared(other, also))) => {
            (one.cookie(), with) == (other.cookie(), also)
        }
        (Some(NetnsLocation::Node), Some(NetnsLocation::Node)) | (None, None) => true,
        (
            Some(NetnsLocation::Hidden { error: one, .. }),
            Some(NetnsLocation::Hidden { error: other, .. }),
        ) => one.kind() == other.kind(),
        _ => false,
    }
}

/// When to look.
#[derive(Debug, Default)]
struct Schedule {
    /// When the last look ended, and how much effort it was.
    last: Option<(Instant, Duration)>,
    /// Looks since something was new.
    looks: u32,
    /// Whether the kernel has told of anything since the last look began.
    told: bool,
    /// When the last look for all pods began; none, when one is due.
    full: Option<Instant>,
}

impl Schedule {
    /// There is a pod that was not looked for before.
    fn news(&mut self) {
        self.looks = 0;
    }

    fn told(&mut self) {
        self.told = true;
        self.looks = 0;
    }

    /// What was found may be another pod's, too.
    fn doubt(&mut self) {
        self.full = None;
    }

    /// Returns whether the look that begins is for all pods.
    fn begun(&mut self, now: Instant, missing: bool) -> bool {
        self.told = false;
        let is_full = !missing || self.full.is_none_or(|full| now - full >= SLOW);
        if is_full {
            self.full = Some(now);
        }
        is_full
    }

    fn ended(&mut self, now: Instant, effort: Duration) {
        self.last = Some((now, effort));
        self.looks = self.looks.saturating_add(1);
    }

    /// When to look next, given whether a pod is not found; `None` for at once.
    fn due(&self, missing: bool) -> Option<Instant> {
        let (ended, effort) = self.last?;
        let pause = match (missing, self.told) {
            (true, true) => Duration::ZERO,
            _ if self.full.is_none() => Duration::ZERO,
            (true, false) => FIRST
                .saturating_mul(1 << self.looks.saturating_sub(1).min(16))
                .min(MOST),
            (false, true) => TOLD,
            (false, false) => SLOW,
        };
        Some(ended + pause.max(effort * REST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn looks_often_for_what_is_missing_and_less_often_in_time() {
        let mut schedule = Schedule::default();
        assert_eq!(schedule.due(true), None, "at once");
        let now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..9 {
            schedule.begun(now, true);
            schedule.ended(now, MS(1));
            pauses.push(schedule.due(true).unwrap() - now);
        }
        let expected = [20, 40, 80, 160, 320, 640, 1000, 1000, 1000];
        assert_eq!(pauses, expected.map(MS));
        assert_eq!(schedule.due(false), Some(now + SLOW));
        // Another pod is waited for: from the beginning.
        schedule.news();
        assert_eq!(schedule.due(true), Some(now + FIRST));
    }

    #[test]
    fn what_the_kernel_tells_is_looked_at_at_once() {
        let mut schedule = Schedule::default();
        let now = Instant::now();
        for _ in 0..9 {
            schedule.begun(now, true);
            schedule.ended(now, MS(2));
        }
        schedule.told();
        assert_eq!(schedule.due(true), Some(now + MS(8)), "but for the rest");
        assert_eq!(schedule.due(false), Some(now + TOLD));
        // Told while a look is under way: that one may have come too early.
        schedule.begun(now, true);
        schedule.told();
        schedule.ended(now, MS(2));
        assert_eq!(schedule.due(true), Some(now + MS(8)));
        schedule.begun(now, true);
        schedule.ended(now, MS(2));
        assert_eq!(schedule.due(true), Some(now + MS(40)));
    }

    #[test]
    fn found_pods_are_looked_at_again_now_and_then() {
        let mut schedule = Schedule::default();
        let now = Instant::now();
        assert!(schedule.begun(now, true), "the first is for all");
        schedule.ended(now, MS(1));
        assert!(!schedule.begun(now + MS(20), true));
        assert!(schedule.begun(now + MS(30), false));
        assert!(!schedule.begun(now + SLOW, true));
        assert!(schedule.begun(now + SLOW + MS(30), true));
        schedule.doubt();
        assert_eq!(schedule.due(false), Some(now + MS(4)), "soon");
        assert!(schedule.begun(now + SLOW + MS(40), true));
    }

    #[test]
    fn looking_leaves_most_of_the_time() {
        let mut schedule = Schedule::default();
        let now = Instant::now();
        schedule.begun(now, true);
        schedule.told();
        schedule.ended(now, Duration::from_secs(4));
        assert_eq!(schedule.due(true), Some(now + Duration::from_secs(16)));
    }

    #[test]
    fn what_was_found_is_held_until_something_else_is() {
        let found = |cookie| NetnsLocation::In(Arc::new(Netns::imagined(cookie)));
        let cookie = |now: Option<NetnsLocation>| match now {
            Some(NetnsLocation::In(netns)) => Some(netns.cookie()),
            _ => None,
        };
        assert_eq!(cookie(after(None, Some(found(1)))), Some(1));
        assert_eq!(cookie(after(Some(&found(1)), None)), Some(1));
        assert_eq!(
            cookie(after(Some(&found(1)), Some(NetnsLocation::Node))),
            Some(1)
        );
        assert_eq!(cookie(after(Some(&found(1)), Some(found(2)))), Some(2));
        assert!(after(Some(&NetnsLocation::Node), None).is_none());
        let other = "11111111-2222-4333-8444-555555555555".parse().unwrap();
        let shared = NetnsLocation::Shared(Arc::new(Netns::imagined(1)), other);
        let now = after(Some(&found(1)), Some(shared.clone()));
        assert!(is_same(now.as_ref(), Some(&shared)), "neither is believed");
        assert!(after(Some(&shared), None).is_none());
    }
}
