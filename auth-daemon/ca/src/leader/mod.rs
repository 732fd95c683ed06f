//! Leader election among the replicas of a CA, by a Lease (coordination.k8s.io). Only the leader issues and writes.
//!
//! The Lease makes two leaders unlikely, not impossible: a process that was stopped for a while does not know that it
//! was replaced. The store makes its writes fail then ([`crate::store::secret`]).

pub mod election;
mod label;

use std::{pin::Pin, sync::Arc, time::Duration};

use auth_kubernetes::{ApiError, Objects};
use election::{Election, Move, Timing, View};
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{Client, api::ObjectMeta};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};

pub use label::LEADER_LABEL;

/// Pause after a conflicting write.
const SOON: Duration = Duration::from_millis(200);
/// How long a leader that failed leaves the Lease to others.
const AFTER_RESIGNING: Duration = Duration::from_secs(5);
/// How long a process that stops waits for the Lease's release.
const RELEASE: Duration = Duration::from_secs(3);

/// A replica that takes part in the election.
#[derive(Clone)]
pub struct Candidate {
    /// The cluster.
    pub client: Client,
    /// The namespace of the Lease and of the replicas' pods.
    pub namespace: String,
    /// The Lease's name.
    pub lease: String,
    /// This replica's pod, which has a label while it is the leader. `None` outside the cluster.
    pub pod: Option<String>,
    /// The times of the election.
    pub timing: Timing,
}

/// One term of a leader.
pub struct Term<T> {
    /// What the leader works with.
    pub value: Arc<T>,
    /// Becomes true when the term must end.
    pub lost: watch::Receiver<bool>,
    /// Runs during the term, which ends with it.
    pub work: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Candidate {
    /// Takes part in the election until `stop` is true, then releases the Lease. While this replica is the leader,
    /// `current` holds the value that `open` returned; it becomes `None` as soon as the term ends.
    pub async fn run<T, F>(
        self,
        open: impl Fn() -> F,
        current: watch::Sender<Option<Arc<T>>>,
        mut stop: watch::Receiver<bool>,
    ) where
        F: Future<Output = Result<Term<T>, String>>,
    {
        let (labelled, label) = watch::channel(false);
        let campaign = async {
            let mut campaign = Campaign::new(&self);
            loop {
                tokio::select! {
                    biased;
                    () = is_true(&mut stop) => break,
                    () = campaign.win() => {}
                }
                let failed = tokio::select! {
                    biased;
                    () = is_true(&mut stop) => None,
                    () = campaign.keep() => None,
                    why = run_term(&open, &current, &labelled) => Some(why),
                };
                current.send_replace(None);
                labelled.send_replace(false);
                if let Some(error) = failed {
                    tracing::error!(
                        error,
                        "term failed: the lease is left to other replicas for a while"
                    );
                    campaign.release().await;
                    campaign.next_round = Instant::now() + AFTER_RESIGNING;
                }
            }
            drop(labelled);
            campaign.release().await;
        };
        tokio::join!(
            campaign,
            label::follow(&self.client, &self.namespace, self.pod.as_deref(), label)
        );
    }

    fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.lease)
    }
}

/// Opens a term and runs it. Returns why it failed.
async fn run_term<T, F>(
    open: &impl Fn() -> F,
    current: &watch::Sender<Option<Arc<T>>>,
    labelled: &watch::Sender<bool>,
) -> String
where
    F: Future<Output = Result<Term<T>, String>>,
{
    let mut term = match open().await {
        Ok(term) => term,
        Err(error) => return error,
    };
    current.send_replace(Some(term.value));
    labelled.send_replace(true);
    let why = tokio::select! {
        biased;
        lost = term.lost.wait_for(|lost| *lost) => match lost {
            Ok(_) => "another CA has written the state",
            Err(_) => "the store has ended",
        },
        () = term.work => "the CA's work has ended",
    };
    why.to_owned()
}

/// A candidate's writes to the Lease.
struct Campaign<'a> {
    candidate: &'a Candidate,
    leases: Objects<Lease>,
    /// Unique to this process: a restarted container of the same pod is another candidate.
    name: String,
    election: Election,
    next_round: Instant,
}

impl<'a> Campaign<'a> {
    fn new(candidate: &'a Candidate) -> Self {
        let host = candidate.pod.as_deref().unwrap_or("outside");
        let name = format!("{host}_{:016x}", rand::random::<u64>());
        tracing::info!(
            lease = candidate.lease,
            candidate = name,
            "candidate started"
        );
        Self {
            candidate,
            leases: Objects::of(candidate.client.clone(), &candidate.namespace),
            election: Election::new(name.clone(), candidate.timing),
            name,
            next_round: Instant::now(),
        }
    }

    /// Waits for the Lease. Returns when this replica is the leader.
    async fn win(&mut self) {
        while !self.election.leads(Instant::now()) {
            self.round().await;
        }
    }

    /// Renews the Lease. Returns when this replica is not the leader any more.
    async fn keep(&mut self) {
        while let Some(until) = self.election.until() {
            tokio::select! {
                biased;
                () = sleep_until(until) => {
                    tracing::error!(
                        lease = self.candidate.lease,
                        "lease could not be renewed in time: this replica is not the leader any more"
                    );
                    self.election.step_down();
                }
                () = self.round() => {}
            }
        }
    }

    /// Reads and writes the Lease once, when that is due.
    async fn round(&mut self) {
        sleep_until(self.next_round).await;
        let pause = match self.try_round().await {
            Ok(()) => self.candidate.timing.renew,
            Err(error) if error.is_conflict() => SOON,
            Err(error) => {
                tracing::warn!(
                    lease = self.candidate.full_name(), %error, leads = self.election.until().is_some(),
                    "lease cannot be read or written"
                );
                self.candidate.timing.renew
            }
        };
        self.next_round = Instant::now() + pause;
    }

    async fn try_round(&mut self) -> Result<(), ApiError> {
        let (name, lease) = (&self.candidate.lease, self.candidate.full_name());
        let found = self.leases.get(name).await?;
        let view = found.as_ref().map(view);
        let sent = Instant::now();
        let next = self.election.next(sent, view.as_ref());
        match next {
            Move::Wait => return Ok(()),
            Move::StepDown => {
                tracing::warn!(
                    lease,
                    leader = view.unwrap_or_default().holder,
                    "lease was taken over: this replica is not the leader any more"
                );
                return Ok(());
            }
            Move::Create => self.leases.create(&self.claim(None)).await?,
            Move::Take | Move::Renew => self.leases.replace(name, &self.claim(found)).await?,
        };
        self.election.renewed(sent);
        if next != Move::Renew {
            tracing::info!(lease, "this replica is the leader");
        }
        Ok(())
    }

    fn claim(&self, found: Option<Lease>) -> Lease {
        let now = || Some(MicroTime(Timestamp::now()));
        let mut lease = found.unwrap_or_else(|| Lease {
            metadata: ObjectMeta {
                name: Some(self.candidate.lease.clone()),
                namespace: Some(self.candidate.namespace.clone()),
                ..ObjectMeta::default()
            },
            spec: None,
        });
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_deref() != Some(&*self.name) {
            spec.holder_identity = Some(self.name.clone());
            spec.acquire_time = now();
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0).saturating_add(1));
        }
        spec.renew_time = now();
        spec.lease_duration_seconds = i32::try_from(self.candidate.timing.lease.as_secs()).ok();
        lease
    }

    /// Releases the Lease, so that others need not wait until it expires.
    async fn release(&mut self) {
        self.election.step_down();
        let (leases, name) = (&self.leases, &self.candidate.lease);
        let release = async {
            let Some(mut lease) = leases.get(name).await? else {
                return Ok(());
            };
            if view(&lease).holder != self.name {
                return Ok(());
            }
            lease.spec = Some(LeaseSpec {
                holder_identity: Some(String::new()),
                lease_duration_seconds: Some(1),
                ..lease.spec.unwrap_or_default()
            });
            leases.replace(name, &lease).await?;
            tracing::info!(lease = self.candidate.full_name(), "lease released");
            Ok::<(), ApiError>(())
        };
        let failed = match timeout(RELEASE, release).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(_) => ApiError::TimedOut(RELEASE),
        };
        tracing::warn!(
            lease = self.candidate.full_name(), error = %failed,
            "lease cannot be released; another replica takes over when it expires"
        );
    }
}

fn view(lease: &Lease) -> View {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = u64::try_from(spec.lease_duration_seconds.unwrap_or(0)).unwrap_or(0);
    View {
        holder: spec.holder_identity.unwrap_or_default(),
        duration: Duration::from_secs(seconds),
        version: lease.metadata.resource_version.clone().unwrap_or_default(),
    }
}

/// Waits until `what` is true, or its sender is dropped.
async fn is_true(what: &mut watch::Receiver<bool>) {
    let _ = what.wait_for(|now| *now).await;
}
