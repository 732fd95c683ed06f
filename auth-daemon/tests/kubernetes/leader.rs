//! Who leads.

use std::{future::pending, sync::Arc, time::Duration};

use auth_ca::leader::{Candidate, LEADER_LABEL, Term, election::Timing};
use kube::Client;
use mesh_tests::Kubernetes;
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinHandle};

use crate::{NAMESPACE, as_ca, cluster, eventually};

const TIMING: Timing = Timing {
    lease: Duration::from_secs(6),
    renew: Duration::from_millis(300),
    give_up: Duration::from_secs(4),
};

struct Replica {
    current: watch::Receiver<Option<Arc<String>>>,
    stop: watch::Sender<bool>,
    lost: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Replica {
    fn start(client: Client, lease: &str, name: &str) -> Self {
        let (sender, current) = watch::channel(None);
        let (stop, stopped) = watch::channel(false);
        let (lost, was_lost) = watch::channel(false);
        let candidate = Candidate {
            client,
            namespace: NAMESPACE.into(),
            lease: lease.into(),
            pod: Some(name.into()),
            timing: TIMING,
        };
        let name = Arc::new(name.to_owned());
        let open = move || {
            let (value, lost) = (name.clone(), was_lost.clone());
            async move {
                Ok(Term {
                    value,
                    lost,
                    work: Box::pin(pending()),
                })
            }
        };
        Self {
            current,
            stop,
            lost,
            task: tokio::spawn(candidate.run(open, sender, stopped)),
        }
    }

    fn leads(&self) -> bool {
        self.current.borrow().is_some()
    }

    async fn wait(&self, leads: bool) {
        let mut current = self.current.clone();
        let change = current.wait_for(|now| now.is_some() == leads);
        let waited = tokio::time::timeout(Duration::from_secs(60), change).await;
        assert!(waited.is_ok(), "timed out waiting for leading={leads}");
    }
}

fn lease(cluster: &Kubernetes, name: &str) -> Value {
    let path = format!("/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/{name}");
    cluster.get(&path).unwrap().unwrap()
}

fn labelled(cluster: &Kubernetes, prefix: &str) -> Vec<String> {
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods?labelSelector={LEADER_LABEL}%3Dtrue");
    let list = cluster.get(&path).unwrap().unwrap();
    let pods = list["items"].as_array().unwrap().iter();
    pods.map(|pod| pod["metadata"]["name"].as_str().unwrap().to_owned())
        .filter(|name| name.starts_with(prefix))
        .collect()
}

async fn label_is_on(cluster: &Kubernetes, prefix: &str, expected: &[&str]) {
    eventually(&format!("the label on {expected:?}"), async || {
        (labelled(cluster, prefix) == expected).then_some(())
    })
    .await;
}

fn pods(cluster: &Kubernetes, names: &[&str]) {
    for (name, n) in names.iter().zip(1..) {
        cluster
            .pod(NAMESPACE, name, "auth-ca", "node-a", &format!("10.9.0.{n}"))
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_leads_until_it_stops_dies_or_gives_up() {
    let test = "one_leads_until_it_stops_dies_or_gives_up";
    if let Some(why) = Kubernetes::missing() {
        println!("SKIPPED {test}: {why}");
        return;
    }
    // Its own: pods of other tests would lose the label to this one.
    let cluster = Kubernetes::start().unwrap();
    let client = as_ca(&cluster).await;
    pods(&cluster, &["ca-a", "ca-b", "ca-stale"]);
    let stale = json!({"metadata": {"labels": {LEADER_LABEL: "true"}}});
    cluster
        .merge(
            &format!("/api/v1/namespaces/{NAMESPACE}/pods/ca-stale"),
            &stale,
        )
        .unwrap();

    let a = Replica::start(client.clone(), "ca", "ca-a");
    a.wait(true).await;
    let b = Replica::start(client.clone(), "ca", "ca-b");
    label_is_on(&cluster, "ca-", &["ca-a"]).await;
    assert!(!b.leads());
    let held = lease(&cluster, "ca");
    let holder = held["spec"]["holderIdentity"].as_str().unwrap();
    assert!(holder.starts_with("ca-a_"), "{held}");
    assert_eq!(held["spec"]["leaseDurationSeconds"], 6);

    // It stops: the other one follows at once, not after the lease.
    a.stop.send_replace(true);
    a.task.await.unwrap();
    b.wait(true).await;
    label_is_on(&cluster, "ca-", &["ca-b"]).await;

    // It dies: the other one follows after the lease.
    let a = Replica::start(client.clone(), "ca", "ca-a");
    b.task.abort();
    a.wait(true).await;
    label_is_on(&cluster, "ca-", &["ca-a"]).await;

    // The API server does not answer: it gives up before anybody could follow, and leads again after that.
    cluster.freeze(true).unwrap();
    a.wait(false).await;
    cluster.freeze(false).unwrap();
    a.wait(true).await;

    // Its store reports another writer: it gives up the Lease for a while.
    a.lost.send_replace(true);
    a.wait(false).await;
    eventually("a free lease", async || {
        (lease(&cluster, "ca")["spec"]["holderIdentity"] == "").then_some(())
    })
    .await;
    a.stop.send_replace(true);
    a.task.await.unwrap();
    label_is_on(&cluster, "ca-", &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_lost_the_lease_no_longer_leads() {
    let Some((cluster, client)) = cluster("a_replica_that_lost_the_lease_no_longer_leads").await
    else {
        return;
    };
    pods(&cluster, &["robbed"]);
    let replica = Replica::start(client, "robbed", "robbed");
    replica.wait(true).await;
    let path = format!("/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/robbed");
    let taken = json!({"spec": {"holderIdentity": "somebody"}});
    cluster.merge(&path, &taken).unwrap();
    replica.wait(false).await;
    // Nobody renews it: the lead comes back after the lease.
    replica.wait(true).await;
    assert!(lease(&cluster, "robbed")["spec"]["leaseTransitions"].as_i64() >= Some(2));
    replica.stop.send_replace(true);
    replica.task.await.unwrap();
}
