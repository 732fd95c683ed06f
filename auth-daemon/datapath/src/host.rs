//! Whether a daemon that runs in a pod has its node in sight: what a manifest leaves out is named at the start, before the
//! node's pods find out.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path, process};

/// What the daemon's own pod lacks to serve its node; `cgroup` is where it would attach. Nothing, where all is there.
pub fn blind_spots(cgroup: &Path) -> Vec<String> {
    let mut faults = Vec::new();
    // In the container's own process namespace the first process is one of the container's.
    let mounts = |process: &str| Some(fs::metadata(format!("/proc/{process}/ns/mnt")).ok()?.ino());
    if process::id() == 1 || mounts("1").is_some_and(|first| mounts("self") == Some(first)) {
        faults.push(
            "no process of the node is to be seen, and so no pod's: set hostPID: true".to_owned(),
        );
    }
    match is_own(cgroup) {
        Ok(false) => {}
        Ok(true) => faults.push(format!(
            "{} is the daemon's own cgroup, and not the node's: mount the node's /sys/fs/cgroup there",
            cgroup.display()
        )),
        Err(error) => faults.push(format!("{}: {error}", cgroup.display())),
    }
    faults
}

/// Whether this process is in `cgroup` itself, and that is no root that all processes of a node may be in.
fn is_own(cgroup: &Path) -> io::Result<bool> {
    let own = process::id().to_string();
    let members = fs::read_to_string(cgroup.join("cgroup.procs"))?;
    let is_member = members.lines().any(|process| process == own);
    // The root has none. Beside version 1, processes may be left in whatever stands for it.
    let is_root = !cgroup.join("cgroup.events").exists();
    let hierarchies = fs::read_to_string("/proc/self/cgroup")?.lines().count();
    Ok(is_member && !is_root && hierarchies == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_no_cgroup_is_named() {
        let faults = blind_spots(Path::new("/nowhere"));
        assert!(
            faults.iter().any(|fault| fault.starts_with("/nowhere: ")),
            "{faults:?}"
        );
    }
}
