//! Of several CAs of one trust domain, one leads: it alone issues and writes. Which one is decided by a Lease of the
//! cluster (coordination.k8s.io).
//!
//! The Lease makes two leaders unlikely, not impossible: a process that was stopped for a while does not know that it
//! has been replaced. What makes its writes fail then is the store ([`super::store::secret`]).

pub mod election;
mod label;

use std::{fmt, pin::Pin, sync::Arc, time::Duration};

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

use crate::kubernetes::{Fault, Objects};

/// How soon to look again after somebody else has written in between.
const SOON: Duration = Duration::from_millis(200);
/// How long a leader that could not go on leaves it to others.
const AFTER_RESIGNING: Duration = Duration::from_secs(5);
/// How long a process that ends waits for the Lease's release.
const RELEASE: Duration = Duration::from_secs(3);

/// One CA that would lead.
#[derive(Clone)]
pub struct Candidate {
    /// The cluster.
    pub client: Client,
    /// Of the Lease, and of the CAs' pods.
    pub namespace: String,
    /// The Lease's name.
    pub lease: String,
    /// The pod that this process runs in: labelled while it leads. None outside of the cluster.
    pub pod: Option<String>,
    /// How long all takes.
    pub timing: Timing,
}

/// What a leader does while it leads.
pub struct Tenure<T> {
    /// What it leads with.
    pub value: Arc<T>,
    /// Becomes true when it must not go on.
    pub lost: watch::Receiver<bool>,
    /// Has to be done all the time. Ends only where the tenure has to.
    pub work: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl<T> fmt::Debug for Tenure<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tenure").finish_non_exhaustive()
    }
}

impl fmt::Debug for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Candidate")
            .field("namespace", &self.namespace)
            .field("lease", &self.lease)
            .field("pod", &self.pod)
            .finish_non_exhaustive()
    }
}

impl Candidate {
    /// Takes part until `stop` is true, then releases what it holds. While this process leads, `current` has what
    /// `open` gave; it is empty at once when it does not lead any more.
    pub async fn run<T, F>(
        self,
        open: impl Fn() -> F,
        current: watch::Sender<Option<Arc<T>>>,
        stop: watch::Receiver<bool>,
    ) where
        F: Future<Output = Result<Tenure<T>, String>>,
    {
        let (terms, term) = watch::channel(None);
        let (labelled, label) = watch::channel(false);
        let (vacated, vacancy) = watch::channel(false);
        let resign = Notify::new();
        let preside = async {
            preside(open, &current, term, &labelled, &resign, stop).await;
            drop(labelled);
            vacated.send_replace(true);
        };
        tokio::join!(
            preside,
            self.hold(terms, &resign, vacancy),
            label::follow(&self, label)
        );
    }

    /// Holds the Lease, or waits for it. `terms` has a number while this process leads, another one for each time.
    async fn hold(
        &self,
        terms: watch::Sender<Option<u64>>,
        resign: &Notify,
        mut vacancy: watch::Receiver<bool>,
    ) {
        let leases: Objects<Lease> = Objects::of(self.client.clone(), &self.namespace);
        // A container that starts anew in the same pod is another candidate.
        let host = self.pod.as_deref().unwrap_or("outside");
        let name = format!("{host}_{:016x}", rand::random::<u64>());
        tracing::info!(
            lease = self.lease,
            candidate = name,
            "candidate for the CA's lead"
        );
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
                () = told(&mut vacancy) => {
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
                        "could not renew the lease in time: this CA leads no more"
                    );
                    election.step_down();
                    terms.send_replace(None);
                }
                outcome = round => {
                    next_round = Instant::now() + match outcome {
                        Ok(()) => self.timing.renew,
                        Err(fault) if fault.is_conflict() => SOON,
                        Err(fault) => {
                            tracing::warn!(
                                lease = self.full_name(), %fault, leads = terms.borrow().is_some(),
                                "cannot read or write the CA's lease"
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

    /// Looks at the Lease once, and does what is due.
    async fn round(
        &self,
        leases: &Objects<Lease>,
        name: &str,
        election: &mut Election,
    ) -> Result<(), Fault> {
        let found = leases.get(&self.lease).await?;
        let view = found.as_ref().map(view);
        let sent = Instant::now();
        let next = match (election.next(sent, view.as_ref()), found) {
            (Move::Wait, _) => return Ok(()),
            (Move::StepDown, _) => {
                tracing::warn!(
                    lease = self.full_name(),
                    leader = view.unwrap_or_default().holder,
                    "the lease was taken: this CA leads no more"
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
            tracing::info!(lease = self.full_name(), "this CA leads");
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

    /// Lets others lead at once: they would otherwise wait for the Lease's end.
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
            Ok::<(), Fault>(())
        };
        let failed = match timeout(RELEASE, release).await {
            Ok(Ok(())) => return,
            Ok(Err(fault)) => fault,
            Err(_) => Fault::TimedOut(RELEASE),
        };
        tracing::warn!(
            lease = self.full_name(), fault = %failed,
            "cannot release the lease; another CA leads once it has ended"
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

/// Opens what a leader leads with at the beginning of each term, and closes it at the term's end.
async fn preside<T, F>(
    open: impl Fn() -> F,
    current: &watch::Sender<Option<Arc<T>>>,
    mut terms: watch::Receiver<Option<u64>>,
    labelled: &watch::Sender<bool>,
    resign: &Notify,
    mut stop: watch::Receiver<bool>,
) where
    F: Future<Output = Result<Tenure<T>, String>>,
{
    loop {
        let term = tokio::select! {
            biased;
            () = told(&mut stop) => return,
            term = terms.wait_for(Option::is_some) => match term {
                Ok(term) => *term,
                Err(_) => return,
            },
        };
        let opened = tokio::select! {
            biased;
            () = told(&mut stop) => return,
            () = ended(&mut terms, term) => continue,
            opened = open() => opened,
        };
        let why = match opened {
            Err(error) => Some(error),
            Ok(Tenure {
                value,
                mut lost,
                work,
            }) => {
                current.send_replace(Some(value));
                labelled.send_replace(true);
                let why = tokio::select! {
                    biased;
                    () = told(&mut stop) => None,
                    () = ended(&mut terms, term) => None,
                    lost = lost.wait_for(|lost| *lost) => Some(match lost {
                        Ok(_) => "somebody else has written the CA's state".to_owned(),
                        Err(_) => "the CA's store has ended".to_owned(),
                    }),
                    () = work => Some("the CA's own work has ended".to_owned()),
                };
                current.send_replace(None);
                labelled.send_replace(false);
                why
            }
        };
        if let Some(error) = why {
            tracing::error!(%error, "this CA cannot lead; it leaves that to others for a while");
            resign.notify_one();
            tokio::select! {
                biased;
                () = told(&mut stop) => return,
                () = ended(&mut terms, term) => {}
            }
        }
    }
}

/// Waits until it is true, or will never change again.
async fn told(what: &mut watch::Receiver<bool>) {
    let _ = what.wait_for(|now| *now).await;
}

/// Waits until `term` is over.
async fn ended(terms: &mut watch::Receiver<Option<u64>>, term: Option<u64>) {
    let _ = terms.wait_for(|now| *now != term).await;
}
