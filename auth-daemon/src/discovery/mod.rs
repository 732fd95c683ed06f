//! Where the mesh is learnt of: what runs where, and who may call whom.

pub mod files;
pub mod kubernetes;
pub mod manifest;
pub mod removal;

use std::sync::Arc;

use auth_mesh::{
    Published, Registry,
    policy::{Policies, api},
};

/// Where discovery writes what it learns.
#[derive(Clone, Debug, Default)]
pub struct Sink {
    /// Pods and services.
    pub registry: Arc<Registry>,
    /// Policies; for who has no use for them, none.
    pub policies: Option<Arc<Published<Policies>>>,
}

impl Sink {
    /// These are all policies there are. Nothing happens where they are the same as before.
    fn publish_policies(&self, mut objects: Vec<Arc<api::Object>>) {
        let Some(policies) = &self.policies else {
            return;
        };
        let before = policies.current();
        objects.sort_by(|a, b| (a.kind(), a.name()).cmp(&(b.kind(), b.name())));
        if before.objects() == objects {
            return;
        }
        let next = Policies::compile(before.settings().clone(), objects);
        let known = before.warnings();
        for warning in next
            .warnings()
            .iter()
            .filter(|warning| !known.contains(warning))
        {
            tracing::warn!("{warning}");
        }
        tracing::info!(policies = next.objects().len(), "policies changed");
        policies.publish(next);
    }
}
