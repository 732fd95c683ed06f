//! The connections that ended in the last minutes, for `auth-daemon observe`.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use auth_mesh::{FullName, Snapshot};
use auth_tunnel::tls::rfc3339;
use serde::{Deserialize, Serialize};

use super::{
    access_log::{Direction, Finished, Outcome},
    size::{BLOCK, HeapSize},
};

/// The number of connections that are kept, if they take no more than [`MAX_BYTES`].
const KEPT: usize = 8192;
/// The most bytes that they take. One takes some 500.
const MAX_BYTES: usize = 3328 * 1024;
/// The most connections in one answer.
pub const PAGE: usize = 1000;

/// A connection that has ended. Its JSON form is stable: later versions only add fields. Those that the access log has, too,
/// have the same names and meanings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// When it ended: UTC, in the format of RFC 3339, with milliseconds.
    pub time: String,
    /// The node that saw it.
    pub node: String,
    /// Whether a pod of that node is the client or the server.
    pub direction: Direction,
    /// Whether it was established.
    pub verdict: Verdict,
    /// How it reached the server: `tunnel`, `same-node`, `plaintext` or `self`.
    pub path: String,
    /// The client's address and port.
    pub client: SocketAddr,
    /// The pod with that address, as `namespace/name`.
    pub client_pod: Option<String>,
    /// The workload that the pod belongs to, as `namespace/name`.
    #[serde(default)]
    pub client_workload: Option<String>,
    /// The client's SPIFFE ID.
    pub client_identity: Option<String>,
    /// The address and port that the client dialled.
    pub destination: Option<SocketAddr>,
    /// The Service that the destination belongs to, as `namespace/name`.
    pub service: Option<String>,
    /// The server's own address and port.
    pub endpoint: Option<SocketAddr>,
    /// The pod with that address, as `namespace/name`.
    pub server_pod: Option<String>,
    /// The workload that the pod belongs to, as `namespace/name`.
    #[serde(default)]
    pub server_workload: Option<String>,
    /// The server's SPIFFE ID.
    pub server_identity: Option<String>,
    /// Bytes that the client's app sent.
    pub bytes_to_server: u64,
    /// Bytes that the server's app sent.
    pub bytes_to_client: u64,
    /// From its start to its end, in milliseconds.
    pub duration_ms: u64,
    /// How it ended: `ok`, `refused` or `reset`.
    pub result: String,
    /// Why it was refused or reset. Empty for `ok`.
    pub reason: String,
    /// The policies that decided, or that audited it.
    pub policy: Option<String>,
    /// Whether it was allowed, and would not be if all dry-run policies were enforced.
    #[serde(default)]
    pub would_be_denied: bool,
    /// The person who acts as the client, from its certificate.
    #[serde(default)]
    pub client_person: Option<String>,
}

/// Whether a connection was established.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It was.
    Allowed,
    /// It was refused, by a policy or for another reason that [`Flow::reason`] gives.
    Denied,
}

/// An answer to the question which connections ended after another one.
#[derive(Debug, Serialize, Deserialize)]
pub struct Page {
    /// When the daemon started, in milliseconds since the Unix epoch. After a restart, numbers begin again.
    pub started: u64,
    /// The number to ask for next.
    pub next: u64,
    /// How many connections ended since the one that was asked for, but are not kept any more.
    pub lost: u64,
    /// The connections, in the order in which they ended: at most [`PAGE`].
    pub flows: Vec<Flow>,
}

/// The connections of this node that ended last.
#[derive(Debug)]
pub struct Flows {
    started: SystemTime,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// With the memory that each takes, in bytes.
    flows: VecDeque<(Arc<Ended>, usize)>,
    /// How much memory they take together, in bytes.
    bytes: usize,
    /// The number of connections that have ended.
    count: u64,
}

#[derive(Debug)]
struct Ended {
    at: SystemTime,
    finished: Finished,
    /// As the registry had them then: a pod may be gone when a query arrives.
    client_pod: Option<FullName>,
    server_pod: Option<FullName>,
}

impl Default for Flows {
    fn default() -> Self {
        Self {
            started: SystemTime::now(),
            kept: Mutex::default(),
        }
    }
}

impl Flows {
    /// Adds a connection that has ended now.
    pub(crate) fn add(&self, finished: Finished, snapshot: &Snapshot) {
        let pod = |address: SocketAddr| Some(snapshot.pod(address.ip())?.full_name().clone());
        let ended = Arc::new(Ended {
            at: SystemTime::now(),
            client_pod: pod(finished.client),
            server_pod: finished.endpoint.or(finished.destination).and_then(pod),
            finished,
        });
        let size = ended.size();
        // All threads that end connections share the lock, so what is old is neither read nor freed under it.
        let mut oldest = Vec::new();
        let mut kept = self.lock();
        kept.bytes += size;
        while kept.flows.len() == KEPT || kept.bytes > MAX_BYTES {
            let Some((first, size)) = kept.flows.pop_front() else {
                break;
            };
            kept.bytes -= size;
            oldest.push(first);
        }
        kept.flows.push_back((ended, size));
        kept.count += 1;
        drop(kept);
        drop(oldest);
    }

    /// Returns the connections that ended as number `after` or later, where the first has the number 0.
    pub fn after(&self, after: u64, node: &str) -> Page {
        let kept = self.lock();
        let oldest = kept.count - kept.flows.len() as u64;
        let first = after.clamp(oldest, kept.count);
        let skipped = (first - oldest) as usize;
        let page = kept.flows.range(skipped..).take(PAGE);
        let page: Vec<_> = page.map(|(ended, _)| ended.clone()).collect();
        drop(kept);
        let flows: Vec<_> = page.iter().map(|ended| ended.flow(node)).collect();
        Page {
            started: since_epoch(self.started).as_millis() as u64,
            next: first + flows.len() as u64,
            lost: first.saturating_sub(after),
            flows,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ended {
    /// The memory that it takes, in bytes. Identities that others share count, too.
    fn size(&self) -> usize {
        let Finished {
            service,
            client_identity,
            server_identity,
            reason,
            judgement,
            client_person,
            ..
        } = &self.finished;
        // Two counters precede it, and the ring has a pointer to it, and this number.
        size_of::<Self>()
            + 4 * size_of::<usize>()
            + BLOCK
            + service.heap_size()
            + client_identity.heap_size()
            + server_identity.heap_size()
            + reason.heap_size()
            + judgement.policies.heap_size()
            + client_person.heap_size()
            + self.client_pod.heap_size()
            + self.server_pod.heap_size()
    }

    fn flow(&self, node: &str) -> Flow {
        let finished = &self.finished;
        let identity = |identity: &auth_mesh::Identity| identity.to_string();
        let pod = |name: &FullName| name.pod().to_string();
        let workload = |name: &FullName| name.workload().to_owned();
        Flow {
            time: format_time(self.at),
            node: node.to_owned(),
            direction: finished.direction,
            verdict: match finished.outcome {
                Outcome::Refused => Verdict::Denied,
                Outcome::Ok | Outcome::Reset => Verdict::Allowed,
            },
            path: finished.path.name().to_owned(),
            client: finished.client,
            client_pod: self.client_pod.as_ref().map(pod),
            client_workload: self.client_pod.as_ref().map(workload),
            client_identity: finished.client_identity.as_ref().map(identity),
            destination: finished.destination,
            service: finished.service.as_ref().map(ToString::to_string),
            endpoint: finished.endpoint,
            server_pod: self.server_pod.as_ref().map(pod),
            server_workload: self.server_pod.as_ref().map(workload),
            server_identity: finished.server_identity.as_ref().map(identity),
            bytes_to_server: finished.bytes_to_server,
            bytes_to_client: finished.bytes_to_client,
            duration_ms: finished.duration.as_millis() as u64,
            result: finished.outcome.name().to_owned(),
            reason: finished.reason.clone(),
            policy: finished.judgement.policies.clone(),
            would_be_denied: finished.would_be_denied(),
            client_person: finished.client_person.as_deref().map(str::to_owned),
        }
    }
}

/// Formats a time as [`Flow::time`]. All such texts have the same length, so that they sort as the times do.
pub fn format_time(time: SystemTime) -> String {
    let since = since_epoch(time);
    let seconds = rfc3339(since.as_secs());
    let seconds = seconds.trim_end_matches('Z');
    format!("{seconds}.{:03}Z", since.subsec_millis())
}

fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(port: u16, outcome: Outcome) -> Finished {
        Finished {
            direction: Direction::Outbound,
            client: ([10, 0, 0, 1], port).into(),
            destination: Some(([10, 96, 0, 1], 80).into()),
            outcome,
            ..Finished::example()
        }
    }

    fn ports(page: &Page) -> Vec<u16> {
        page.flows.iter().map(|flow| flow.client.port()).collect()
    }

    #[test]
    fn a_reader_gets_each_connection_once() {
        let (flows, snapshot) = (Flows::default(), Snapshot::default());
        assert!(flows.after(0, "a").flows.is_empty());
        flows.add(finished(1, Outcome::Ok), &snapshot);
        flows.add(finished(2, Outcome::Refused), &snapshot);
        let page = flows.after(0, "a");
        assert_eq!((ports(&page), page.next, page.lost), (vec![1, 2], 2, 0));
        assert_eq!(page.flows[0].verdict, Verdict::Allowed);
        assert_eq!(page.flows[1].verdict, Verdict::Denied);
        flows.add(finished(3, Outcome::Reset), &snapshot);
        let page = flows.after(page.next, "a");
        assert_eq!((ports(&page), page.next), (vec![3], 3));
    }

    #[test]
    fn keeps_the_last_and_counts_what_a_reader_missed() {
        let (flows, snapshot) = (Flows::default(), Snapshot::default());
        for _ in 0..KEPT + 10 {
            flows.add(finished(1, Outcome::Ok), &snapshot);
        }
        let page = flows.after(4, "a");
        assert_eq!((page.lost, page.flows.len()), (6, PAGE));
        assert_eq!(page.next, 10 + PAGE as u64);
        let (mut next, mut read) = (page.next, PAGE);
        while next < (KEPT + 10) as u64 {
            let page = flows.after(next, "a");
            assert_eq!(page.lost, 0);
            (next, read) = (page.next, read + page.flows.len());
        }
        assert_eq!(read, KEPT);
    }

    #[test]
    fn a_number_from_before_a_restart_is_no_error() {
        let page = Flows::default().after(u64::MAX, "a");
        assert_eq!((page.next, page.lost, page.flows.len()), (0, 0, 0));
    }

    #[test]
    fn times_sort_as_text() {
        let at = |millis| format_time(UNIX_EPOCH + Duration::from_millis(millis));
        assert_eq!(at(1_700_000_000_007), "2023-11-14T22:13:20.007Z");
        assert!(at(1_700_000_000_999) < at(1_700_000_001_000));
    }
}
