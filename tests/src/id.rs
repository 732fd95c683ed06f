//! The ID of a mesh, which is part of the name of everything that it creates.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};

/// Distinguishes the meshes of one machine: the process that created the mesh and that process's count of meshes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct MeshId {
    pid: u32,
    number: u32,
}

impl MeshId {
    /// Returns an ID that no other mesh of this process has.
    pub(crate) fn next() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self {
            pid: process::id(),
            number: NEXT.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// The process that created the mesh.
    pub fn pid(self) -> u32 {
        self.pid
    }

    /// The name of a network namespace of this mesh.
    pub fn netns_name(self, what: &str) -> String {
        format!("am{self}-{what}")
    }

    /// The folder name of this mesh, in the cgroup tree, under the bpffs and in the temporary folder.
    pub fn folder_name(self) -> String {
        format!("auth-mesh-{self}")
    }

    pub(crate) fn of_netns_name(name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix("am")?.splitn(3, '-');
        let id = format!("{}-{}", parts.next()?, parts.next()?);
        parts.next()?;
        id.parse().ok()
    }

    pub(crate) fn of_folder_name(name: &str) -> Option<Self> {
        name.strip_prefix("auth-mesh-")?.parse().ok()
    }

    pub(crate) fn owner_is_dead(self) -> bool {
        !Path::new("/proc").join(self.pid.to_string()).exists()
    }

    pub(crate) fn temporary_folder(self) -> PathBuf {
        std::env::temp_dir().join(self.folder_name())
    }
}

impl fmt::Display for MeshId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.pid, self.number)
    }
}

impl FromStr for MeshId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (pid, number) = text.split_once('-').ok_or(())?;
        Ok(Self {
            pid: pid.parse().map_err(|_| ())?,
            number: number.parse().map_err(|_| ())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        let id = MeshId { pid: 12, number: 3 };
        assert_eq!(id.netns_name("node-a"), "am12-3-node-a");
        assert_eq!(MeshId::of_netns_name("am12-3-node-a"), Some(id));
        assert_eq!(MeshId::of_folder_name(&id.folder_name()), Some(id));
        for name in ["am12-3", "am12", "amber-1-x", "am1-x-y", "cni-12-3-x"] {
            assert_eq!(MeshId::of_netns_name(name), None, "{name}");
        }
    }
}
