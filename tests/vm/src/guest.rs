//! The contents of a machine: the daemon, the tests, the programs that they run, and the kernel's modules.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use mesh_tests::FileTree;
use mesh_tests::vm::{PLAN, Plan};

use super::kernels::Unpacked;
use super::programs::OURS;
use test_runner::binaries::Binary;
use xtask_support::step::{programs, run, which};

/// Programs that the tests, the demo and the guest itself run.
const PROGRAMS: [&str; 26] = [
    "bash", "cat", "curl", "env", "faketime", "id", "ip", "iperf3", "mkdir", "modprobe", "mount",
    "nft", "nginx", "nsenter", "openssl", "ping", "ps", "setpriv", "sh", "sleep", "ss", "sysctl",
    "tcpdump", "umount", "unshare", "wrk",
];

/// Settings and data of those programs.
const FILES: [&str; 8] = [
    "/etc/passwd",
    "/etc/group",
    // containerd gives each pod a copy of these two.
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/protocols",
    "/etc/ssl/openssl.cnf",
    "/usr/lib/ssl/openssl.cnf",
    "/etc/iproute2/rt_tables",
];

/// Modules that the tests' networks and containers may ask for; the kernel loads what it wants of them. Others need
/// hardware.
const MODULES: [&str; 7] = [
    "net",
    "lib",
    "crypto",
    "arch/x86/crypto",
    "drivers/net/veth.ko",
    "drivers/net/dummy.ko",
    "fs/overlayfs",
];

/// Everything but the kernel's modules and the plan, from this machine.
///
/// # Errors
/// If a program is missing.
pub(super) fn collect(tests: &[Binary], folder: &Path) -> Result<FileTree> {
    let mut tree = FileTree::default();
    for name in ["bin", "sbin", "lib", "lib64"] {
        let path = Path::new("/").join(name);
        if let Ok(target) = fs::read_link(&path) {
            tree.link(path, target)?;
        }
    }
    for path in ["/root", "/var/log/nginx", "/var/lib/nginx", "/run/netns"] {
        tree.folder(path, None)?;
    }
    for name in PROGRAMS {
        let path = which(name).with_context(|| format!("there is no {name} here"))?;
        let path = path.canonicalize().unwrap_or(path);
        // Under its own name: some are links to a program of several names.
        tree.program(Path::new("/usr/bin").join(name), &path)?;
    }
    // Where the kernel looks for it.
    tree.link("/usr/sbin/modprobe", "/usr/bin/modprobe")?;
    for path in FILES.map(Path::new) {
        if let Ok(source) = path.canonicalize() {
            tree.file(path, &source)?;
        }
    }
    for folder in faketime_libraries() {
        tree.copy(&folder, &folder)?;
    }
    let built = programs()?;
    tree.program("/init", &stripped(&built.join("vm-guest"), folder)?)?;
    for name in ["auth-daemon", "pod-app", "xtask"] {
        let path = Path::new(OURS).join(name);
        tree.program(path, &stripped(&built.join(name), folder)?)?;
    }
    for test in tests {
        let path = Path::new(OURS).join("tests").join(&test.name);
        tree.program(path, &stripped(&test.path, folder)?)?;
    }
    Ok(tree)
}

/// Writes a machine's archive: that tree, a kernel's modules, and the plan.
///
/// # Errors
/// If a file cannot be read or written.
pub(super) fn write(
    everything: &FileTree,
    kernel: &Unpacked,
    plan: &Plan,
    archive: &Path,
) -> Result<()> {
    let mut tree = everything.clone();
    let folder = Path::new("/usr/lib/modules").join(&kernel.release);
    for part in MODULES {
        add_modules(&mut tree, &kernel.modules, &folder, part)?;
    }
    for entry in fs::read_dir(&kernel.modules).context("reading the kernel's modules")? {
        let path = entry.context("reading the kernel's modules")?.path();
        // The indexes.
        if let Some(name) = path.file_name().filter(|_| path.is_file())
            && name.to_string_lossy().starts_with("modules.")
        {
            tree.file(folder.join(name), &path)?;
        }
    }
    let plan = serde_json::to_vec(plan).context("writing the plan")?;
    tree.bytes(PLAN, plan)?;
    let file = File::create(archive).with_context(|| format!("making {}", archive.display()))?;
    let mut file = BufWriter::new(file);
    tree.write_initramfs(&mut file)?;
    file.flush()
        .with_context(|| format!("writing {}", archive.display()))
}

/// Adds a folder of modules, or a module, which some distributions compress.
fn add_modules(tree: &mut FileTree, modules: &Path, to: &Path, part: &str) -> Result<()> {
    let part = Path::new("kernel").join(part);
    let source = modules.join(&part);
    if source.is_dir() {
        return tree.copy(&to.join(&part), &source);
    }
    for ending in ["", ".xz", ".zst"] {
        let name = format!("{}{ending}", part.display());
        let source = modules.join(&name);
        if source.is_file() {
            tree.file(to.join(name), &source)?;
        }
    }
    Ok(())
}

/// A program without what only debuggers read; kept for the next run.
pub(super) fn stripped(program: &Path, folder: &Path) -> Result<PathBuf> {
    let folder = folder.join("stripped");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let name = program
        .file_name()
        .with_context(|| format!("{}: has no name", program.display()))?;
    let small = folder.join(name);
    let modified = |path: &Path| -> io::Result<_> { path.metadata()?.modified() };
    let built = modified(program).with_context(|| format!("reading {}", program.display()))?;
    if modified(&small).is_ok_and(|made| made > built) {
        return Ok(small);
    }
    run(Command::new("strip").arg("-o").args([&small, program]))?;
    Ok(small)
}

/// The library that faketime loads into the programs that it starts.
fn faketime_libraries() -> Vec<PathBuf> {
    let folders = ["/usr/lib/x86_64-linux-gnu/faketime", "/usr/lib/faketime"];
    let folders = folders.map(PathBuf::from).into_iter();
    folders.filter(|folder| folder.is_dir()).collect()
}
