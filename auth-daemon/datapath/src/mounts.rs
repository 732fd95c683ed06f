//! Finds the file systems that the kernel side needs, and mounts them if necessary.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use nix::{
    mount::{MsFlags, mount},
    sys::{
        statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, statfs},
        statvfs::{FsFlags, statvfs},
    },
};

const BPFFS: &str = "/sys/fs/bpf";
const SYSCTLS: &str = "/proc/sys";
/// The folder of all that the daemon sets in pods' netns. A service may have only this one writable.
const NETWORK_SYSCTLS: &str = "/proc/sys/net";

/// Returns the cgroup v2 mount point: `configured`, or the first one in /proc/mounts.
pub fn cgroup_root(configured: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(path) = configured {
        let kind = statfs(path).with_context(|| format!("kernel.cgroup: {}", path.display()))?;
        if kind.filesystem_type() != CGROUP2_SUPER_MAGIC {
            bail!(
                "kernel.cgroup: {} is not a cgroup v2 directory",
                path.display()
            );
        }
        return Ok(path.to_owned());
    }
    let mounts = fs::read_to_string("/proc/mounts").context("/proc/mounts")?;
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, kind) = (fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(path))
        })
        .next()
        .context(
            "cgroup v2 is not mounted; run `mount -t cgroup2 none /sys/fs/cgroup/unified` \
             or name a mount in kernel.cgroup",
        )
}

/// Makes the sysctls of the pods' netns writable for the daemon, because a container initially sees them read-only.
/// Only changes the daemon's own view.
pub fn ensure_sysctls() -> anyhow::Result<()> {
    let flags = statvfs(NETWORK_SYSCTLS).context(NETWORK_SYSCTLS)?.flags();
    if !flags.contains(FsFlags::ST_RDONLY) {
        return Ok(());
    }
    mount(
        None::<&str>,
        SYSCTLS,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REMOUNT,
        None::<&str>,
    )
    .with_context(|| {
        format!("{NETWORK_SYSCTLS} is read-only, and cannot be made writable; the container needs CAP_SYS_ADMIN and no profile that forbids mounts")
    })
}

/// Ensures that `pins` is on a bpf file system. Mounts one on /sys/fs/bpf if nothing is mounted there.
pub fn ensure_bpffs(pins: &Path) -> anyhow::Result<()> {
    if is_bpffs(pins) {
        return Ok(());
    }
    if !pins.starts_with(BPFFS) {
        bail!(
            "kernel.pins: {} is not on a bpf file system; run `mount -t bpf bpf <folder>` there, or use the default",
            pins.display()
        );
    }
    mount(
        Some("bpf"),
        BPFFS,
        Some("bpf"),
        MsFlags::empty(),
        None::<&str>,
    )
    .with_context(|| format!("cannot mount a bpf file system on {BPFFS}"))?;
    tracing::info!("mounted a bpf file system on {BPFFS}");
    Ok(())
}

/// Whether `path`, or its nearest existing ancestor, is on a bpf file system.
pub fn is_bpffs(path: &Path) -> bool {
    path.ancestors()
        .find_map(|folder| statfs(folder).ok())
        .is_some_and(|kind| kind.filesystem_type() == BPF_FS_MAGIC)
}
