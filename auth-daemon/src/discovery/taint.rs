//! Keeps the scheduler from placing pods on this node while no daemon serves it, by a taint of the Node object.
//!
//! Whoever registers the node sets the taint (the kubelet's `--register-with-taints`). The daemon removes it once it serves
//! the node, and puts it back when it stops without a successor. A daemon that is killed leaves the node without it.

use std::{pin::pin, time::Duration};

use futures_util::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{Node, Taint};
use kube::{Api, Client, ResourceExt, runtime::watcher};
use serde_json::{Value, json};
use tokio::{sync::watch, time::timeout};

use auth_kubernetes::{ApiError, Objects, follow};

/// The taint's key.
pub const KEY: &str = "auth-daemon.io/not-ready";
/// The effect with which the daemon puts the taint back. It removes the taint whatever its effect.
const EFFECT: &str = "NoSchedule";
/// Longest time for putting the taint back.
const PATIENCE: Duration = Duration::from_secs(3);
/// Pause after a failed change, unless the node changes before.
const PAUSE: Duration = Duration::from_secs(5);

/// The taint of this daemon's node.
pub struct NodeTaint {
    nodes: Objects<Node>,
    name: String,
    node: watch::Receiver<Option<Node>>,
}

impl NodeTaint {
    /// Watches the node of this name.
    pub fn watch(client: &Client, name: &str) -> Self {
        let by_name = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let events = follow(Api::all(client.clone()), by_name, "the daemon's own node");
        let (sender, node) = watch::channel(None);
        tokio::spawn(forward(events, sender));
        Self {
            nodes: Objects::all(client.clone()),
            name: name.to_owned(),
            node,
        }
    }

    /// Removes the taint, now and whenever the node has it again. Never ends.
    pub async fn keep_removed(&self) {
        let mut node = self.node.clone();
        loop {
            let found = node.borrow_and_update().clone();
            match self.change(found.as_ref(), without).await {
                Ok(false) => {
                    // An error means that the watch has ended, which it does not.
                    let _ = node.changed().await;
                }
                Ok(true) => tracing::info!(node = self.name, "taint {KEY} removed from the node"),
                Err(error) => {
                    // The next event brings what the change was in conflict with.
                    if !error.is_conflict() {
                        tracing::error!(
                            node = self.name, %error,
                            "cannot remove taint {KEY} from the node; retrying"
                        );
                    }
                    let _ = timeout(PAUSE, node.changed()).await;
                }
            }
        }
    }

    /// Adds the taint, if the node does not have it.
    pub async fn put_back(&self) {
        let added = timeout(PATIENCE, async {
            let mut node = self.node.clone();
            loop {
                let found = node.borrow_and_update().clone();
                match self.change(found.as_ref(), with).await {
                    Err(error) if error.is_conflict() => {
                        let _ = node.changed().await;
                    }
                    outcome => return outcome,
                }
            }
        });
        match added.await.unwrap_or(Err(ApiError::TimedOut(PATIENCE))) {
            Ok(true) => tracing::info!(
                node = self.name,
                "taint {KEY} added: no daemon serves the node from now on"
            ),
            Ok(false) => {}
            Err(error) => tracing::warn!(
                node = self.name, %error,
                "cannot add taint {KEY}: the scheduler may place pods on the node although no daemon serves it"
            ),
        }
    }

    /// Applies `change` to the node's taints. Returns whether there was anything to change. The API server refuses it with
    /// a conflict if the node is not what `found` shows any more.
    async fn change(
        &self,
        found: Option<&Node>,
        change: impl FnOnce(&[Taint]) -> Option<Vec<Taint>>,
    ) -> Result<bool, ApiError> {
        let Some(node) = found else {
            return Ok(false);
        };
        let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref());
        let Some(taints) = change(taints.unwrap_or_default()) else {
            return Ok(false);
        };
        let patch = patch(node.resource_version().as_deref(), &taints);
        self.nodes.merge(&self.name, &patch).await.map(|_| true)
    }
}

async fn forward(
    events: impl Stream<Item = watcher::Event<Node>>,
    sender: watch::Sender<Option<Node>>,
) {
    let mut events = pin!(events);
    while let Some(event) = events.next().await {
        match event {
            watcher::Event::Apply(node) | watcher::Event::InitApply(node) => {
                sender.send_replace(Some(node));
            }
            watcher::Event::Delete(_) => {
                sender.send_replace(None);
            }
            watcher::Event::Init | watcher::Event::InitDone => {}
        }
    }
}

/// A merge patch (RFC 7396) that replaces the taints of a node of this version.
fn patch(version: Option<&str>, taints: &[Taint]) -> Value {
    json!({"metadata": {"resourceVersion": version}, "spec": {"taints": taints}})
}

/// The taints without ours, if it is there.
fn without(taints: &[Taint]) -> Option<Vec<Taint>> {
    let others: Vec<_> = taints
        .iter()
        .filter(|taint| taint.key != KEY)
        .cloned()
        .collect();
    (others.len() < taints.len()).then_some(others)
}

/// The taints with ours, if it is not there.
fn with(taints: &[Taint]) -> Option<Vec<Taint>> {
    let ours = Taint {
        key: KEY.to_owned(),
        effect: EFFECT.to_owned(),
        ..Taint::default()
    };
    let is_absent = taints.iter().all(|taint| taint.key != KEY);
    is_absent.then(|| taints.iter().cloned().chain([ours]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taint(key: &str, effect: &str) -> Taint {
        Taint {
            key: key.to_owned(),
            effect: effect.to_owned(),
            ..Taint::default()
        }
    }

    #[test]
    fn other_taints_stay() {
        let other = taint("node.kubernetes.io/unschedulable", "NoSchedule");
        let ours = [taint(KEY, "NoSchedule"), taint(KEY, "NoExecute")];
        let all = [ours[0].clone(), other.clone(), ours[1].clone()];
        assert_eq!(without(&all), Some(vec![other.clone()]));
        assert_eq!(without(std::slice::from_ref(&other)), None);
        let both = vec![other.clone(), ours[0].clone()];
        assert_eq!(with(std::slice::from_ref(&other)), Some(both));
        assert_eq!(with(&ours[1..]), None, "whatever its effect");
    }

    #[test]
    fn a_patch_is_for_one_version_of_the_node() {
        let patch = patch(Some("7"), &[]);
        let expected = json!({"metadata": {"resourceVersion": "7"}, "spec": {"taints": []}});
        assert_eq!(patch, expected);
    }
}
