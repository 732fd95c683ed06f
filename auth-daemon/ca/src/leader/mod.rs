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
    sync::{Notify, watch},
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
        stop: watch::Receiver<bool>,
    ) where
        F: Future<Output = Result<Term<T>, String>>,
    {
        let (terms, term) = watch::channel(None);
        let (labelled, label) = watch::channel(false);
        let (ended, all_ended) = watch::channel(false);
        let resign = Notify::new();
        let terms_run = async {
            run_terms(open, &current, term, &labelled, &resign, stop).await;
            drop(labelled);
            ended.send_replace(true);
        };
        tokio::join!(
            terms_run,
            self.campaign(terms, &resign, all_ended),
            label::follow(&self.client, &self.namespace, self.pod.as_deref(), label)
        );
    }

    /// Holds the Lease, or waits for it. `terms` holds the number of the term while this replica is the leader.
    async fn campaign(
        &self,
        terms: watch::Sender<Option<u64>>,
        resign: &Notify,
        mut all_ended: watch::Receiver<bool>,
    ) {
        let leases: Objects<Lease> = Objects::of(self.client.clone(), &self.namespace);
        // A restarted container of the same pod is another candidate.
        let host = self.pod.as_deref().unwrap_or("outside");
        let name = format!("{host}_{:016x}", rand::random::<u64>());
        tracing::info!(lease = self.lease, candidate = name, "candidate started");
        let mut election = Election::new(name.clone(), self.timing);
        let mut term = 0;
        let mut next_round = Instant::now();
        loop {
            let until = election.until();
            let round = async {
                sleep_until(next_round).await;
                self.round(&leases, &name, &mut election).await
            };
            tokio::select! {
                biased;
                () = is_true(&mut all_ended) => {
                    self.release(&leases, &name).await;
                    return;
                }
                () = resign.notified() => {
                    election.step_down();
                    terms.send_replace(None);
                    self.release(&leases, &name).await;
                    next_round = Instant::now() + AFTER_RESIGNING;
                }
                () = sleep_until(until.unwrap_or(next_round)), if until.is_some() => {
                    tracing::error!(
                        lease = self.lease,
                        "lease could not be renewed in time: this replica is not the leader any more"
                    );
                    election.step_down();
                    terms.send_replace(None);
                }
                outcome = round => {
                    next_round = Instant::now() + match outcome {
                        Ok(()) => self.timing.renew,
                        Err(error) if error.is_conflict() => SOON,
                        Err(error) => {
                            tracing::warn!(
                                lease = self.full_name(), %error, leads = terms.borrow().is_some(),
                                "lease cannot be read or written"
                            );
                            self.timing.renew
                        }
                    };
                    let leads = election.leads(Instant::now());
                    terms.send_if_modified(|current| {
                        let changed = current.is_some() != leads;
                        if changed {
                            term += 1;
                            *current = leads.then_some(term);
                        }
                        changed
                    });
                }
            }
        }
    }

    /// Reads the Lease once, and writes it if that is due.
    async fn round(
        &self,
        leases: &Objects<Lease>,
        name: &str,
        election: &mut Election,
    ) -> Result<(), ApiError> {
        let found = leases.get(&self.lease).await?;
        let view = found.as_ref().map(view);
        let sent = Instant::now();
        let next = match (election.next(sent, view.as_ref()), found) {
            (Move::Wait, _) => return Ok(()),
            (Move::StepDown, _) => {
                tracing::warn!(
                    lease = self.full_name(),
                    leader = view.unwrap_or_default().holder,
                    "lease was taken over: this replica is not the leader any more"
                );
                return Ok(());
            }
            (next, None) => {
                leases.create(&self.claim(name, None)).await?;
                next
            }
            (next, found) => {
                leases
                    .replace(&self.lease, &self.claim(name, found))
                    .await?;
                next
            }
        };
        election.renewed(sent);
        if next != Move::Renew {
            tracing::info!(lease = self.full_name(), "this replica is the leader");
        }
        Ok(())
    }

    fn claim(&self, name: &str, found: Option<Lease>) -> Lease {
        let now = || Some(MicroTime(Timestamp::now()));
        let mut lease = found.unwrap_or_else(|| Lease {
            metadata: ObjectMeta {
                name: Some(self.lease.clone()),
                namespace: Some(self.namespace.clone()),
                ..ObjectMeta::default()
            },
            spec: None,
        });
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_deref() != Some(name) {
            spec.holder_identity = Some(name.to_owned());
            spec.acquire_time = now();
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0).saturating_add(1));
        }
        spec.renew_time = now();
        spec.lease_duration_seconds = i32::try_from(self.timing.lease.as_secs()).ok();
        lease
    }

    /// Releases the Lease, so that others need not wait until it expires.
    async fn release(&self, leases: &Objects<Lease>, name: &str) {
        let release = async {
            let Some(mut lease) = leases.get(&self.lease).await? else {
                return Ok(());
            };
            if view(&lease).holder != name {
                return Ok(());
            }
            lease.spec = Some(LeaseSpec {
                holder_identity: Some(String::new()),
                lease_duration_seconds: Some(1),
                ..lease.spec.unwrap_or_default()
            });
            leases.replace(&self.lease, &lease).await?;
            tracing::info!(lease = self.full_name(), "lease released");
            Ok::<(), ApiError>(())
        };
        let failed = match timeout(RELEASE, release).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(_) => ApiError::TimedOut(RELEASE),
        };
        tracing::warn!(
            lease = self.full_name(), error = %failed,
            "lease cannot be released; another replica takes over when it expires"
        );
    }

    fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.lease)
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

/// Runs one term after the other: `open` starts each.
async fn run_terms<T, F>(
    open: impl Fn() -> F,
    current: &watch::Sender<Option<Arc<T>>>,
    mut terms: watch::Receiver<Option<u64>>,
    labelled: &watch::Sender<bool>,
    resign: &Notify,
    mut stop: watch::Receiver<bool>,
) where
    F: Future<Output = Result<Term<T>, String>>,
{
    loop {
        let term = tokio::select! {
            biased;
            () = is_true(&mut stop) => return,
            term = terms.wait_for(Option::is_some) => match term {
                Ok(term) => *term,
                Err(_) => return,
            },
        };
        let opened = tokio::select! {
            biased;
            () = is_true(&mut stop) => return,
            () = term_ended(&mut terms, term) => continue,
            opened = open() => opened,
        };
        let why = match opened {
            Err(error) => Some(error),
            Ok(Term {
                value,
                mut lost,
                work,
            }) => {
                current.send_replace(Some(value));
                labelled.send_replace(true);
                let why = tokio::select! {
                    biased;
                    () = is_true(&mut stop) => None,
                    () = term_ended(&mut terms, term) => None,
                    lost = lost.wait_for(|lost| *lost) => Some(match lost {
                        Ok(_) => "another CA has written the state".to_owned(),
                        Err(_) => "the store has ended".to_owned(),
                    }),
                    () = work => Some("the CA's work has ended".to_owned()),
                };
                current.send_replace(None);
                labelled.send_replace(false);
                why
            }
        };
        if let Some(error) = why {
            tracing::error!(%error, "term failed: the lease is left to other replicas for a while");
            resign.notify_one();
            tokio::select! {
                biased;
                () = is_true(&mut stop) => return,
                () = term_ended(&mut terms, term) => {}
            }
        }
    }
}

/// Waits until `what` is true, or its sender is dropped.
async fn is_true(what: &mut watch::Receiver<bool>) {
    let _ = what.wait_for(|now| *now).await;
}

/// Waits until `term` has ended.
async fn term_ended(terms: &mut watch::Receiver<Option<u64>>, term: Option<u64>) {
    let _ = terms.wait_for(|now| *now != term).await;
}
