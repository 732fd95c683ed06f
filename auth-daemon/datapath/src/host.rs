//! Checks whether a daemon that runs in a pod can see its node, so that omissions in its manifest are reported at the
//! start, before they affect the node's pods.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path, process};

/// Returns what the daemon's own pod lacks to serve its node. Empty if nothing is missing. `cgroup` is where the daemon
/// would attach.
pub fn blind_spots(cgroup: &Path) -> Vec<String> {
    let mut errors = Vec::new();
    // In the container's own PID namespace, process 1 belongs to the container.
    let mounts = |process: &str| Some(fs::metadata(format!("/proc/{process}/ns/mnt")).ok()?.ino());
    if process::id() == 1 || mounts("1").is_some_and(|first| mounts("self") == Some(first)) {
        errors.push(
            "no process of the node is visible, so no pod's is either: set hostPID: true"
                .to_owned(),
        );
    }
    match is_own(cgroup) {
        Ok(false) => {}
        Ok(true) => errors.push(format!(
            "{} is the daemon's own cgroup, and not the node's: mount the node's /sys/fs/cgroup there",
            cgroup.display()
        )),
        Err(error) => errors.push(format!("{}: {error}", cgroup.display())),
    }
    errors
}

/// Whether this process is in `cgroup` itself and `cgroup` is not a root, which may contain any process of the node.
fn is_own(cgroup: &Path) -> io::Result<bool> {
    let own = process::id().to_string();
    let members = fs::read_to_string(cgroup.join("cgroup.procs"))?;
    let is_member = members.lines().any(|process| process == own);
    // Only the root has no cgroup.events. In hybrid mode with cgroup v1, processes may stay in whatever cgroup serves
    // as the root.
    let is_root = !cgroup.join("cgroup.events").exists();
    let hierarchies = fs::read_to_string("/proc/self/cgroup")?.lines().count();
    Ok(is_member && !is_root && hierarchies == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_no_cgroup_is_named() {
        let errors = blind_spots(Path::new("/nowhere"));
        assert!(
            errors.iter().any(|error| error.starts_with("/nowhere: ")),
            "{errors:?}"
        );
    }
}
