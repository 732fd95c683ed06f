//! Discovery of the mesh: which pods and services run where, and which policies apply.

pub mod files;
pub mod istiod;
pub mod kubernetes;
pub mod manifest;
pub mod removal;
pub mod taint;

use std::{
    collections::HashSet,
    sync::{Arc, atomic::AtomicUsize},
};

use crate::{observe::remote_clusters::RemoteStatus, proxy::lookups::Lookups};
use auth_mesh::{
    Published, Registry, Snapshot,
    policy::{Policies, api},
};

/// Where discovery publishes what it finds.
#[derive(Clone, Debug, Default)]
pub struct Sink {
    /// Pods and services.
    pub registry: Arc<Registry>,
    /// Policies. `None` for users that do not need them.
    pub policies: Option<Arc<Published<Policies>>>,
    /// The names that connections need, if discovery reports nothing else. `None`: discovery reports everything.
    pub lookups: Option<Arc<Lookups>>,
    /// Number of objects that stay in force although the API server lists no object of their kind any more.
    pub unconfirmed: Arc<AtomicUsize>,
    /// The remote clusters that are followed.
    pub remote: Arc<Published<Vec<RemoteStatus>>>,
}

impl Sink {
    /// Publishes the complete state, and logs the errors that it did not have before. `None`: no policies are known.
    fn publish(&self, policies: Option<Vec<Arc<api::Object>>>, snapshot: Snapshot) {
        // First, because new pods are checked against them.
        if let Some(policies) = policies {
            self.publish_policies(policies);
        }
        let errors: Vec<_> = snapshot.errors_since(&self.registry.snapshot()).collect();
        self.registry.publish(snapshot);
        // Last, so that the snapshot is in force once these lines are logged.
        for error in errors {
            tracing::error!("{error}");
        }
    }

    /// Publishes `objects` as the complete set of policies. Does nothing if they are unchanged.
    fn publish_policies(&self, mut objects: Vec<Arc<api::Object>>) {
        let Some(policies) = &self.policies else {
            return;
        };
        let before = policies.current();
        objects.sort_by(|a, b| (a.kind(), a.name()).cmp(&(b.kind(), b.name())));
        if before.objects().eq(&objects) {
            return;
        }
        let next = Policies::compile(before.settings().clone(), objects);
        let known: HashSet<_> = before.warnings().into_iter().collect();
        for warning in next
            .warnings()
            .iter()
            .filter(|warning| !known.contains(*warning))
        {
            tracing::warn!("{warning}");
        }
        let count = next.objects().len();
        policies.publish(next);
        // Last, so that the policies are in force once this line is logged.
        tracing::info!(policies = count, "policies changed");
    }
}
