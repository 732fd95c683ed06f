//! Which pods are in the mesh.

use std::{
    collections::{BTreeMap, BTreeSet},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use super::cluster;

/// Membership as set on a pod or namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Membership {
    /// The pods are in the mesh.
    Enabled,
    /// The pods are not in the mesh.
    Disabled,
}

impl FromStr for Membership {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "enabled" => Ok(Self::Enabled),
            "disabled" => Ok(Self::Disabled),
            _ => Err("is neither enabled nor disabled"),
        }
    }
}

/// Default for pods whose membership is set neither on the pod nor on its namespace.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MeshDefault {
    /// Membership in all namespaces that are not excluded.
    pub membership: Membership,
    /// Namespaces whose pods are not in the mesh by default.
    pub excluded: BTreeSet<String>,
}

impl MeshDefault {
    /// Returns what holds for a pod of `namespace` that sets nothing itself: what its namespace sets, else the default.
    pub fn of(&self, namespace: &str, set: Option<Membership>) -> Membership {
        set.unwrap_or_else(
            || match self.excluded.contains(cluster::namespace_of(namespace)) {
                true => Membership::Disabled,
                false => self.membership,
            },
        )
    }
}

impl Default for MeshDefault {
    /// Returns a default under which every pod is in the mesh.
    fn default() -> Self {
        Self {
            membership: Membership::Enabled,
            excluded: BTreeSet::new(),
        }
    }
}

/// What decides whether a pod is in the mesh, apart from the pod itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Memberships {
    /// What namespaces set for their pods.
    pub namespaces: BTreeMap<String, Membership>,
    /// What applies where the namespace sets nothing.
    pub defaults: MeshDefault,
}

impl Memberships {
    /// Reports whether a pod of `namespace` that sets `own` itself is in the mesh.
    pub fn include(&self, namespace: &str, own: Option<Membership>) -> bool {
        let set = self.namespaces.get(namespace).copied();
        let membership = own.unwrap_or_else(|| self.defaults.of(namespace, set));
        membership == Membership::Enabled
    }
}
