//! Which pods are in the mesh.

use std::{collections::BTreeSet, str::FromStr};

/// Membership as set on a pod or namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshDefault {
    /// Membership in all namespaces that are not excluded.
    pub membership: Membership,
    /// Namespaces whose pods are not in the mesh by default.
    pub excluded: BTreeSet<String>,
}

impl MeshDefault {
    /// Returns the default for a pod of `namespace`.
    pub fn of(&self, namespace: &str) -> Membership {
        if self.excluded.contains(namespace) {
            Membership::Disabled
        } else {
            self.membership
        }
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
