//! The label on the leader's pod, which a Service selects.

use std::time::Duration;

use auth_kubernetes::{ApiError, Objects, objects::Pod};
use kube::Client;
use serde_json::{Value, json};
use tokio::{sync::watch, time::sleep};

/// On the leader's pod, with value `true`.
pub const LEADER_LABEL: &str = "auth-daemon.io/ca-leader";
/// Pause after a failure.
const RETRY: Duration = Duration::from_secs(2);
/// How often the leader checks whether another pod has the label.
const CHECK: Duration = Duration::from_secs(30);

/// Keeps the label of `pod` equal to `leads` until its sender is dropped.
pub(super) async fn follow(
    client: &Client,
    namespace: &str,
    pod: Option<&str>,
    mut leads: watch::Receiver<bool>,
) {
    let Some(pod) = pod else {
        tracing::info!("leader label is not set: this is not a pod ($POD_NAME is not set)");
        return;
    };
    let pods: Objects<Pod> = Objects::of(client.clone(), namespace);
    loop {
        let leader = *leads.borrow_and_update();
        let closing = leads.has_changed().is_err();
        let wait = match apply(&pods, pod, leader).await {
            Ok(()) => CHECK,
            Err(error) => {
                tracing::warn!(
                    pod = format!("{namespace}/{pod}"), leader, %error,
                    "leader label cannot be set"
                );
                RETRY
            }
        };
        if closing {
            return;
        }
        tokio::select! {
            // The last value of a dropped sender is still applied.
            _ = leads.changed() => {}
            () = sleep(wait) => {}
        }
    }
}

async fn apply(pods: &Objects<Pod>, own: &str, leader: bool) -> Result<(), ApiError> {
    let labelled = pods.list(&format!("{LEADER_LABEL}=true")).await?;
    let names = labelled.into_iter().filter_map(|pod| pod.metadata.name);
    let (own_label, others): (Vec<_>, Vec<_>) = names.partition(|name| name == own);
    if leader {
        for other in others {
            match pods.merge(&other, &change(Value::Null)).await {
                Err(error) if !error.is_not_found() => return Err(error),
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
