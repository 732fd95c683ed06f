//! The leader's pod has a label, by which a Service finds it.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::{sync::watch, time::sleep};

use super::Candidate;
use crate::kubernetes::{Fault, Objects, objects::Pod};

/// On the leader's pod, with value `true`.
pub const LEADER_LABEL: &str = "auth-daemon.io/ca-leader";
/// How soon to try again.
const RETRY: Duration = Duration::from_secs(2);
/// How often the leader looks whether another pod has the label.
const LOOK: Duration = Duration::from_secs(30);

/// Keeps the label in step with `leads` until its sender is gone.
pub(super) async fn follow(candidate: &Candidate, mut leads: watch::Receiver<bool>) {
    let Some(pod) = &candidate.pod else {
        tracing::info!("not in a pod ($POD_NAME is not set): no label says that this CA leads");
        return;
    };
    let pods: Objects<Pod> = Objects::of(candidate.client.clone(), &candidate.namespace);
    loop {
        let leader = *leads.borrow_and_update();
        let closing = leads.has_changed().is_err();
        let wait = match apply(&pods, pod, leader).await {
            Ok(()) => LOOK,
            Err(fault) => {
                tracing::warn!(
                    pod = format!("{}/{pod}", candidate.namespace), leader, %fault,
                    "cannot set the label of the CA's leader"
                );
                RETRY
            }
        };
        if closing {
            return;
        }
        tokio::select! {
            // Of a sender that is gone, the last value still counts.
            _ = leads.changed() => {}
            () = sleep(wait) => {}
        }
    }
}

async fn apply(pods: &Objects<Pod>, own: &str, leader: bool) -> Result<(), Fault> {
    let labelled = pods.list(&format!("{LEADER_LABEL}=true")).await?;
    let names = labelled.into_iter().filter_map(|pod| pod.metadata.name);
    let (own_label, others): (Vec<_>, Vec<_>) = names.partition(|name| name == own);
    if leader {
        for other in others {
            match pods.merge(&other, &change(Value::Null)).await {
                Err(fault) if !fault.is_not_found() => return Err(fault),
                _ => {}
            }
        }
        if own_label.is_empty() {
            pods.merge(own, &change("true".into())).await?;
        }
    } else if !own_label.is_empty() {
        pods.merge(own, &change(Value::Null)).await?;
    }
    Ok(())
}

fn change(value: Value) -> Value {
    json!({"metadata": {"labels": {LEADER_LABEL: value}}})
}
