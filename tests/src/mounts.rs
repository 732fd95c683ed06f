//! The two file systems that a mesh needs: cgroup v2 and the bpffs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use nix::mount::{MsFlags, mount};

/// The mount point of the bpffs. [`mount_bpffs`] mounts it if necessary.
pub(crate) const BPFFS: &str = "/sys/fs/bpf";

/// The mount point of cgroup v2.
pub(crate) fn cgroup2() -> Result<PathBuf> {
    mounted("cgroup2")?.into_iter().next().ok_or_else(|| {
        anyhow!("no cgroup v2 is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
    })
}

/// Mounts the bpffs unless it is already mounted.
pub(crate) fn mount_bpffs() -> Result<()> {
    if mounted("bpf")?.iter().any(|path| path == Path::new(BPFFS)) {
        return Ok(());
    }
    mount(
        Some("bpf"),
        BPFFS,
        Some("bpf"),
        MsFlags::empty(),
        Some("mode=0700"),
    )
    .with_context(|| format!("mounting the bpffs on {BPFFS}"))
}

fn mounted(kind: &str) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    Ok(table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let path = fields.next()?;
            (fields.next()? == kind).then(|| PathBuf::from(path))
        })
        .collect())
}
