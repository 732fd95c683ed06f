//! Which pods are of the mesh.

use std::{collections::BTreeSet, str::FromStr};

/// What a pod or namespace says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    /// Its pods are of the mesh.
    Enabled,
    /// They are not.
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

/// What holds for pods that say nothing, in namespaces that say nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshDefault {
    /// For most.
    pub membership: Membership,
    /// Namespaces whose pods are not of the mesh.
    pub excluded: BTreeSet<String>,
}

impl MeshDefault {
    /// For a pod of `namespace`.
    pub fn of(&self, namespace: &str) -> Membership {
        if self.excluded.contains(namespace) {
            Membership::Disabled
        } else {
            self.membership
        }
    }
}

impl Default for MeshDefault {
    /// Every pod is of the mesh.
    fn default() -> Self {
        Self {
            membership: Membership::Enabled,
            excluded: BTreeSet::new(),
        }
    }
}
