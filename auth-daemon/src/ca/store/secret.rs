//! The CA's state in Secrets of its namespace.
//!
//! One Secret holds the core. Records of issued certificates go to segments: `<name>-issued-<number>`. The one with the
//! highest number grows; when it is full the next one begins, and one whose certificates have all ended is deleted. The
//! core says how many segments there have been, so that none begins without a write to the core.
//!
//! Every write names the resource version that this side knows. [`Store::load`] writes the core and the growing segment
//! anew, under the name of a new writer. Whoever wrote before holds resource versions that are none any more: each of
//! its writes fails, and says that there is another CA.

mod worker;

use std::time::Duration;

use kube::Client;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep_until, timeout},
};

use worker::Worker;

use super::{Kept, Store, StoreError, Stored};
use crate::ca::authority::IssuedRecord;
pub use worker::STATE_LABEL;

/// Most records in one commit.
const MAX_COMMIT: usize = 4096;
/// Least time between commits of records: those that come meanwhile go together. Keeps etcd's history small.
const PACE: Duration = Duration::from_millis(50);
/// How long one operation may take.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long reading everything may take.
const LOAD_DEADLINE: Duration = Duration::from_secs(60);
/// Operations that wait.
const QUEUE: usize = 1024;

/// Keeps the state in Secrets of one namespace.
#[derive(Debug)]
pub struct SecretStore {
    jobs: mpsc::Sender<Job>,
    lost: watch::Receiver<bool>,
}

enum Job {
    Load(Reply<Option<Kept>>),
    Keep(Vec<u8>, Reply<()>),
    Record(Vec<IssuedRecord>, Reply<()>),
    Prune(u64, Reply<()>),
}

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

impl SecretStore {
    /// Will keep the state in Secret `name` of `namespace`, and in others whose names begin so. Does nothing until
    /// [`Store::load`]. Runs in the current tokio runtime.
    pub fn new(client: Client, namespace: &str, name: &str) -> Self {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let (lost, was_lost) = watch::channel(false);
        let worker = Worker::new(client, namespace, name, lost);
        tokio::spawn(run(worker, queue));
        Self {
            jobs,
            lost: was_lost,
        }
    }

    /// Becomes true when somebody else has written: this store will never write again.
    pub fn lost(&self) -> watch::Receiver<bool> {
        self.lost.clone()
    }

    async fn ask<T>(&self, job: impl FnOnce(Reply<T>) -> Job) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let gone = || StoreError("the CA is stopping".into());
        self.jobs.send(job(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

impl Store for SecretStore {
    fn load(&self) -> Stored<'_, Option<Kept>> {
        Box::pin(self.ask(Job::Load))
    }

    fn keep<'a>(&'a self, core: &'a [u8]) -> Stored<'a, ()> {
        Box::pin(self.ask(|reply| Job::Keep(core.to_vec(), reply)))
    }

    fn record<'a>(&'a self, issued: &'a [IssuedRecord]) -> Stored<'a, ()> {
        Box::pin(self.ask(|reply| Job::Record(issued.to_vec(), reply)))
    }

    fn prune(&self, now: u64) -> Stored<'_, ()> {
        Box::pin(self.ask(move |reply| Job::Prune(now, reply)))
    }
}

/// Does one thing after the other. That who asked has gone interrupts nothing.
async fn run(mut worker: Worker, mut jobs: mpsc::Receiver<Job>) {
    let mut next = None;
    let mut committed: Option<Instant> = None;
    loop {
        let job = match next.take() {
            Some(job) => job,
            None => match jobs.recv().await {
                Some(job) => job,
                None => return,
            },
        };
        match job {
            Job::Load(reply) => {
                let result = within(LOAD_DEADLINE, worker.load()).await;
                let _ = reply.send(result);
            }
            Job::Keep(core, reply) => {
                let result = within(DEADLINE, worker.keep(core)).await;
                let _ = reply.send(result);
            }
            Job::Prune(now, reply) => {
                let result = within(DEADLINE, worker.prune(now)).await;
                let _ = reply.send(result);
            }
            Job::Record(mut records, reply) => {
                if let Some(committed) = committed {
                    sleep_until(committed + PACE).await;
                }
                let mut replies = vec![reply];
                while records.len() < MAX_COMMIT {
                    match jobs.try_recv() {
                        Ok(Job::Record(more, reply)) => {
                            records.extend(more);
                            replies.push(reply);
                        }
                        Ok(other) => {
                            next = Some(other);
                            break;
                        }
                        Err(_) => break,
                    }
                }
                let result = within(DEADLINE, worker.record(&records)).await;
                committed = Some(Instant::now());
                for reply in replies {
                    let result = result.as_ref().copied();
                    let _ = reply.send(result.map_err(|error| StoreError(error.0.clone())));
                }
            }
        }
    }
}

async fn within<T>(
    deadline: Duration,
    work: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    let late = || StoreError(format!("the CA's Secrets: not done within {deadline:?}"));
    timeout(deadline, work)
        .await
        .unwrap_or_else(|_| Err(late()))
}
