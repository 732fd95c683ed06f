//! A machine with systemd: a node of a mesh with this machine's disk, whose changes are kept in memory and forgotten.

use std::fs;
use std::path::{Path, PathBuf};

use mesh_tests::{Context, Finished, Node, Process, Result, TIMEOUT, eventually_ok};
use xtask_support::step::which;

/// What makes a machine out of namespaces.
const PROGRAMS: [&str; 6] = [
    "unshare",
    "nsenter",
    "pivot_root",
    "systemctl",
    "deb-systemd-helper",
    "dpkg",
];
const SYSTEMD: &str = "/lib/systemd/systemd";
/// Joins the node's cgroup, which becomes the root of the machine's, and makes the namespaces.
const ENTER: &str = r#"
echo $$ > "$1/cgroup.procs"
exec unshare --mount --cgroup --pid --fork --kill-child --uts --ipc sh -ec "$3" "$0" "$2"
"#;
/// Mounts the machine's disk and what a kernel has at its start, and becomes its first process.
const BOOT: &str = r#"
mkdir -p "$1/disk" "$1/root"
mount -t tmpfs disk "$1/disk"
mkdir "$1/disk/upper" "$1/disk/work"
mount -t overlay -o "lowerdir=/,upperdir=$1/disk/upper,workdir=$1/disk/work" disk "$1/root"
cd "$1/root"
# Of this machine's own units, only those start that the daemon's asks for. Nothing keeps packages from starting theirs.
rm -rf etc/systemd/system etc/fstab usr/lib/systemd/system/*.wants usr/lib/systemd/system-generators usr/sbin/policy-rc.d
mkdir etc/systemd/system
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t bpf -o mode=700 bpf sys/fs/bpf
for folder in dev run tmp; do mount -t tmpfs -o mode=755 $folder $folder; done
for device in full null random tty urandom zero; do
    touch dev/$device
    mount --bind /dev/$device dev/$device
done
mkdir dev/mqueue run/netns
ln -s pts/ptmx dev/ptmx
mount --rbind /run/netns run/netns
# Of this process, as /proc of the machine around this one has it.
read -r pid _ < /proc/self/stat
pivot_root . mnt
umount -l /mnt
mount --make-rshared /
echo "$pid"
exec env -i PATH="$PATH" container=mesh SYSTEMD_LOG_TARGET=console "$0" --unit=basic.target
"#;

/// A running machine. Dropping it ends it.
pub(crate) struct Machine {
    node: Node,
    /// Of its first process.
    pid: u32,
    _first: Process,
}

impl Machine {
    /// Why this machine cannot run another one.
    pub(crate) fn missing() -> Option<String> {
        if !Path::new(SYSTEMD).exists() {
            return Some(format!("no {SYSTEMD}"));
        }
        let missing = PROGRAMS.iter().find(|program| which(program).is_none())?;
        Some(format!("no {missing}"))
    }

    /// Makes `node` a machine, and waits until systemd has started.
    pub(crate) fn boot(node: &Node) -> Result<Self> {
        let mut command = node.place().command("sh")?;
        command
            .args(["-ec", ENTER, SYSTEMD])
            .arg(node.cgroup())
            .arg(node.folder())
            .arg(BOOT);
        let mut first = Process::spawn(command)?;
        let pid = first.wait_for_line("a machine", TIMEOUT, |line| line.parse().ok())?;
        let machine = Self {
            node: node.clone(),
            pid,
            _first: first,
        };
        eventually_ok(TIMEOUT, "systemd to have started", || {
            let state = machine.run("systemctl is-system-running")?;
            let is_up = ["running", "degraded"].contains(&state.stdout.trim());
            is_up
                .then_some(())
                .with_context(|| format!("it is {}{}", state.stdout, state.stderr))
        })?;
        Ok(machine)
    }

    /// The path by which the others reach a file of this machine.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid))
    }

    pub(crate) fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    pub(crate) fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path))
            .unwrap_or_else(|error| panic!("reading {path}: {error}"))
    }

    pub(crate) fn write(&self, path: &str, text: &str) {
        fs::write(self.path(path), text).unwrap_or_else(|error| panic!("writing {path}: {error}"));
    }

    /// Runs a command on the machine, as its administrator would: words separated by white space.
    pub(crate) fn run(&self, command: &str) -> Result<Finished> {
        let mut entered = self.node.place().command("nsenter")?;
        entered
            .args(["--mount", "--pid", "--uts", "--ipc", "--target"])
            .arg(self.pid.to_string())
            .args(command.split_whitespace())
            .env("DEBIAN_FRONTEND", "noninteractive");
        Process::spawn(entered)?.finish(2 * TIMEOUT)
    }

    /// Runs a command that must succeed, and returns what it says.
    pub(crate) fn ok(&self, command: &str) -> String {
        self.run(command).and_then(Finished::ok).unwrap().stdout
    }
}
