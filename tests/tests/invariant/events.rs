//! What happens to a mesh while its pods communicate.

use std::fmt;

use serde_json::Value;

use crate::policies::{self, APPS};
use crate::random::Random;
use crate::world::{NODES, Object, State, World};

/// One event, and what it changes.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    /// Applies a policy, new or instead of one of the same name.
    Apply(Value),
    /// Removes a policy.
    Remove(Value),
    /// A pod joins or leaves the mesh.
    Membership { pod: usize, member: bool },
    /// A pod's label changes, and with it its policies and its Service.
    Relabel { pod: usize, app: &'static str },
    /// A daemon dies and is started again.
    Crash { node: usize },
    /// A daemon is stopped, drains, and is started again.
    Restart { node: usize },
    /// A pod's object says something else, while its processes run on.
    Object { pod: usize, object: Object },
    /// A node and its pods are ready, or not, as the API says.
    Flap { node: usize, ready: bool },
    /// A pod's processes and network are removed and created again, with its name and addresses.
    Recreate { pod: usize },
}

impl Event {
    /// Draws an event that is possible in this state.
    pub(crate) fn generate(
        random: &mut Random,
        world: &World,
        state: &State,
        number: usize,
    ) -> Self {
        // Only what is still running changes otherwise.
        let running: Vec<usize> = (0..world.pods.len())
            .filter(|pod| state.pods[*pod].object == Object::Running)
            .collect();
        let pod = random.one(&running);
        let node = random.below(NODES.len());
        match random.below(100) {
            0..40 => {
                let known: Vec<&Value> = state.policies.values().collect();
                // A few policies at a time: many refuse everything.
                if known.len() >= MOST_POLICIES || (!known.is_empty() && random.chance(30)) {
                    return Self::Remove(random.one(&known).clone());
                }
                let name = format!("policy-{number}");
                if !known.is_empty() && random.chance(25) {
                    let old = random.one(&known);
                    let mut new = policies::generate(random, "");
                    // Another object of the same name and kind.
                    if new["kind"] == old["kind"] {
                        new["metadata"] = old["metadata"].clone();
                        return Self::Apply(new);
                    }
                }
                Self::Apply(policies::generate(random, &name))
            }
            40..50 => Self::Apply(policies::peer_authentication(
                random,
                &format!("policy-{number}"),
            )),
            50..64 => Self::Membership {
                pod,
                member: !state.pods[pod].member,
            },
            64..70 => Self::Relabel {
                pod,
                app: random.one(&APPS),
            },
            // Half of the pods stay as they are.
            70..80 if running.len() > world.pods.len() / 2 => Self::Object {
                pod,
                object: random.one(&[Object::Failed, Object::Removed]),
            },
            70..88 => Self::Crash { node },
            88..92 => Self::Restart { node },
            92..96 => match state.ready.iter().position(|ready| !ready) {
                Some(node) => Self::Flap { node, ready: true },
                None => Self::Flap { node, ready: false },
            },
            // What is nested in a pod would not be created again.
            _ if world.pods[pod].nested => Self::Crash { node },
            _ => Self::Recreate { pod },
        }
    }

    /// Changes the state as the event does once it is over.
    pub(crate) fn apply(&self, state: &mut State) {
        match self {
            Self::Apply(policy) => {
                state.policies.insert(full_name(policy), policy.clone());
            }
            Self::Remove(policy) => {
                state.policies.remove(&full_name(policy));
            }
            Self::Membership { pod, member } => state.pods[*pod].member = *member,
            Self::Relabel { pod, app } => {
                let labels = &mut state.pods[*pod].labels;
                labels.insert("app".to_owned(), (*app).to_owned());
            }
            Self::Object { pod, object } => state.pods[*pod].object = *object,
            Self::Flap { node, ready } => state.ready[*node] = *ready,
            Self::Crash { .. } | Self::Restart { .. } | Self::Recreate { .. } => {}
        }
    }

    /// Changes the state as it is until then: removes what is missing.
    pub(crate) fn begin(&self, state: &mut State) {
        match self {
            Self::Crash { node } | Self::Restart { node } => state.serving[*node] = false,
            Self::Recreate { pod } => state.pods[*pod].present = false,
            _ => {}
        }
    }

    /// Whether something is missing until it is over.
    pub(crate) fn has_an_end(&self) -> bool {
        matches!(
            self,
            Self::Crash { .. } | Self::Restart { .. } | Self::Recreate { .. }
        )
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Apply(policy) => write!(f, "apply {policy}"),
            Self::Remove(policy) => write!(f, "remove {}", full_name(policy)),
            Self::Membership { pod, member: true } => write!(f, "p{pod} joins the mesh"),
            Self::Membership { pod, member: false } => write!(f, "p{pod} leaves the mesh"),
            Self::Relabel { pod, app } => write!(f, "p{pod} gets the label app={app}"),
            Self::Object { pod, object } => write!(f, "p{pod}'s object is {object:?}"),
            Self::Crash { node } => {
                write!(f, "the daemon of node {} crashes and starts", NODES[*node])
            }
            Self::Restart { node } => write!(f, "the daemon of node {} restarts", NODES[*node]),
            Self::Flap { node, ready } => {
                let not = if *ready { "" } else { "not " };
                write!(f, "node {} is {not}ready", NODES[*node])
            }
            Self::Recreate { pod } => write!(f, "p{pod} is recreated"),
        }
    }
}

/// Kind, namespace and name of a policy.
fn full_name(policy: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let metadata = &policy["metadata"];
    format!(
        "{} {}/{}",
        text(&policy["kind"]),
        text(&metadata["namespace"]),
        text(&metadata["name"])
    )
}

const MOST_POLICIES: usize = 4;
