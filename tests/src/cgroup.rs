//! Folders of the cgroup v2 tree: creates them, kills all processes in them, removes them. Does the same for the cgroup
//! v1 trees beside it, which hold the limits of the nodes' containers.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::eventually::eventually_ok;

pub(crate) fn create(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("making the cgroup {}", path.display()))
}

/// Weight of a mesh that is limited, as a multiple of the usual one.
const WEIGHT: u32 = 8;

/// The controllers that a kubelet limits pods by. Version 2 has all of them where no hierarchy of version 1 does.
const KUBELET: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// Whether cgroup v2, mounted at `mount`, has the controllers that a kubelet needs.
pub(crate) fn has_controllers(mount: &Path) -> Result<bool> {
    let path = mount.join("cgroup.controllers");
    let there = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let there: Vec<&str> = there.split_whitespace().collect();
    Ok(KUBELET.iter().all(|name| there.contains(name)))
}

/// Enables these controllers of cgroup v2, mounted at `mount`, in `below`, a folder in it.
pub(crate) fn enable_controllers(mount: &Path, below: &Path) -> Result<()> {
    let above: Vec<&Path> = below
        .ancestors()
        .skip(1)
        .take_while(|folder| folder.starts_with(mount))
        .collect();
    let enabled = KUBELET.map(|name| format!("+{name}")).join(" ");
    for folder in above.into_iter().rev() {
        let control = folder.join("cgroup.subtree_control");
        fs::write(&control, &enabled)
            .with_context(|| format!("writing {enabled} to {}", control.display()))?;
    }
    Ok(())
}

/// Gives what runs in a cgroup an equal share of its parent's CPU time, the outermost cgroup more than what else runs on the
/// machine, and limits the number of its processes. `mount` is that of cgroup v2. Returns the cgroups that a process must join beside `path`: those of the
/// hierarchies of version 1 that have the controllers, if version 2 has not.
pub(crate) fn limit(mount: &Path, path: &Path, processes: u32) -> Result<Vec<PathBuf>> {
    let set = |file: PathBuf, value: u32| {
        fs::write(&file, value.to_string()).with_context(|| format!("writing {}", file.display()))
    };
    let below = path.strip_prefix(mount).context("a cgroup of version 2")?;
    let outermost = below.iter().next().context("a cgroup below the root")?;
    if has_controllers(mount)? {
        enable_controllers(mount, path)?;
        set(mount.join(outermost).join("cpu.weight"), WEIGHT * 100)?;
        set(path.join("pids.max"), processes)?;
        return Ok(Vec::new());
    }
    let mut joined = Vec::new();
    for hierarchy in Hierarchy::all()? {
        let has = |name| hierarchy.options.split(',').any(|option| option == name);
        if !has("cpu") && !has("pids") {
            continue;
        }
        let folder = hierarchy.create(below)?;
        if has("cpu") {
            let outermost = hierarchy.mount.join(outermost);
            set(outermost.join("cpu.shares"), WEIGHT * 1024)?;
        }
        if has("pids") {
            set(folder.join("pids.max"), processes)?;
        }
        joined.push(folder);
    }
    Ok(joined)
}

/// Kills every process in the cgroup and below it, and waits until all have exited.
pub(crate) fn kill(path: &Path) -> Result<()> {
    // Linux 5.14. It also kills processes that are forked meanwhile.
    match fs::write(path.join("cgroup.kill"), "1") {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        result => result.with_context(|| format!("killing the cgroup {}", path.display()))?,
    }
    eventually_ok(
        Duration::from_secs(10),
        &format!("the end of what runs in {}", path.display()),
        || {
            let events = match fs::read_to_string(path.join("cgroup.events")) {
                // Another thread that cleans up has removed it meanwhile.
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                events => events.context("reading cgroup.events")?,
            };
            events
                .contains("populated 0")
                .then_some(())
                .ok_or_else(|| anyhow!("still populated"))
        },
    )
}

/// Kills all processes in the cgroup and removes it with all cgroups below it.
pub(crate) fn remove(path: &Path) -> Result<()> {
    kill(path)?;
    remove_folders(path)
}

fn remove_folders(path: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(path) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_folders(&entry.path())?;
        }
    }
    // The last process may be gone from the count before it is gone from the folder.
    eventually_ok(
        Duration::from_secs(10),
        "an empty cgroup",
        || match fs::remove_dir(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing the cgroup {}", path.display()))
            }
            _ => Ok(()),
        },
    )
}

/// A mounted hierarchy of cgroup v1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    /// The mount options that mount it again: `memory`, or `none,name=systemd` for one without controllers.
    pub(crate) options: String,
    /// Where it is mounted.
    pub(crate) mount: PathBuf,
}

impl Hierarchy {
    /// All hierarchies that are mounted.
    pub(crate) fn all() -> Result<Vec<Self>> {
        let table = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
        Ok(parse_hierarchies(&table))
    }

    /// Creates a folder below its root, with access to all CPUs and memory nodes.
    pub(crate) fn create(&self, path: &Path) -> Result<PathBuf> {
        let mut folder = self.mount.clone();
        for part in path {
            let above = folder.clone();
            folder.push(part);
            create(&folder)?;
            // A new cpuset has no CPUs and memory nodes, and accepts no process until it has some.
            for name in ["cpuset.cpus", "cpuset.mems"] {
                if folder.join(name).exists() {
                    fs::read(above.join(name))
                        .and_then(|all| fs::write(folder.join(name), all))
                        .with_context(|| format!("setting {name} of {}", folder.display()))?;
                }
            }
        }
        Ok(folder)
    }

    /// Removes a folder below its root, with all folders below it. Their processes must have exited.
    pub(crate) fn remove(&self, path: &Path) -> Result<()> {
        remove_folders(&self.mount.join(path))
    }
}

fn parse_hierarchies(table: &str) -> Vec<Hierarchy> {
    let hierarchies = table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, mount, "cgroup", options, ..] = fields.as_slice() else {
            return None;
        };
        let mut chosen: Vec<&str> = options
            .split(',')
            .filter(|option| CONTROLLERS.contains(option) || option.starts_with("name="))
            .collect();
        if chosen.iter().all(|option| option.starts_with("name=")) {
            chosen.insert(0, "none");
        }
        Some(Hierarchy {
            options: chosen.join(","),
            mount: PathBuf::from(mount),
        })
    });
    hierarchies.collect()
}

/// The controllers of version 1 (Linux, Documentation/admin-guide/cgroup-v1).
const CONTROLLERS: [&str; 14] = [
    "blkio",
    "cpu",
    "cpuacct",
    "cpuset",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "misc",
    "net_cls",
    "net_prio",
    "perf_event",
    "pids",
    "rdma",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_what_would_mount_them_again() {
        let table = "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,relatime,cpu,cpuacct 0 0\n\
            cgroup /sys/fs/cgroup/systemd cgroup rw,xattr,release_agent=/x,name=systemd 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw,nsdelegate 0 0\n";
        let found = parse_hierarchies(table);
        let options: Vec<&str> = found.iter().map(|one| one.options.as_str()).collect();
        assert_eq!(options, ["cpu,cpuacct", "none,name=systemd"]);
        assert_eq!(found[0].mount, Path::new("/sys/fs/cgroup/cpu,cpuacct"));
    }
}
