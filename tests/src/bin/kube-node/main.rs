//! Prepares the mounts and cgroups of a node that runs containers, in namespaces of its own. The node's programs enter
//! these namespaces, which disappear when this process and those programs have exited.
//!
//! The network namespace is the one that this program is started in.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

#[derive(Debug, Parser)]
#[command(about = "Holds the namespaces of a node that runs containers")]
struct Arguments {
    /// The folder that is the node's root in a cgroup hierarchy, as OPTIONS=FOLDER with the mount options of the
    /// hierarchy, such as `memory=/sys/fs/cgroup/memory/x`; cgroup v2 has no options
    #[arg(long = "root", required = true)]
    roots: Vec<Root>,
    /// The cgroup below the root of version 2 that this process joins
    #[arg(long)]
    leaf: String,
}

#[derive(Debug, Clone)]
struct Root {
    options: String,
    folder: PathBuf,
}

impl std::str::FromStr for Root {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // Options may contain `=`, as in `name=systemd=/x`; our folders do not.
        let (options, folder) = text.rsplit_once('=').ok_or("expected OPTIONS=FOLDER")?;
        Ok(Self {
            options: options.to_owned(),
            folder: folder.into(),
        })
    }
}

impl Root {
    /// Where a hierarchy with these options is mounted: version 2 on /sys/fs/cgroup itself if it is alone.
    fn mount_point(&self, is_alone: bool) -> PathBuf {
        let folder = Path::new(CGROUPS);
        match self.options.as_str() {
            "" if is_alone => folder.to_owned(),
            "" => folder.join("unified"),
            options => folder.join(options.trim_start_matches("none,name=")),
        }
    }
}

fn main() -> ExitCode {
    match become_node(&Arguments::parse()) {
        Ok(()) => loop {
            nix::unistd::pause();
        },
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn become_node(arguments: &Arguments) -> Result<()> {
    for root in &arguments.roots {
        join(&root.folder)?;
    }
    unshare(CloneFlags::CLONE_NEWCGROUP | CloneFlags::CLONE_NEWNS)
        .context("creating mount and cgroup namespaces")?;
    // Mounts must not propagate to the machine, but those of the kubelet must propagate to containers.
    for propagation in [MsFlags::MS_PRIVATE, MsFlags::MS_SHARED] {
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            propagation | MsFlags::MS_REC,
            None::<&str>,
        )
        .context("changing the propagation of mounts")?;
    }
    for folder in ["/run", "/var/lib", "/var/log", CGROUPS] {
        mount_on("tmpfs", Path::new(folder), Some("mode=755"))?;
    }
    let is_alone = arguments.roots.len() == 1;
    for root in &arguments.roots {
        let folder = root.mount_point(is_alone);
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        match root.options.as_str() {
            "" => {
                mount_on("cgroup2", &folder, None)?;
                // The root of a tree with controllers has no processes of its own.
                join(&folder.join(&arguments.leaf))?;
                if is_alone {
                    delegate(&folder)?;
                }
            }
            options => mount_on("cgroup", &folder, Some(options))?,
        }
    }
    mount_on("bpf", Path::new("/sys/fs/bpf"), Some("mode=700"))?;
    for folder in ["/run/netns", "/run/lock"] {
        fs::create_dir(folder).with_context(|| format!("creating {folder}"))?;
    }
    println!("ready");
    Ok(())
}

/// Lets the kubelet limit what is below the node's root by each controller that the root has.
fn delegate(root: &Path) -> Result<()> {
    let controllers = root.join("cgroup.controllers");
    let controllers = fs::read_to_string(&controllers)
        .with_context(|| format!("reading {}", controllers.display()))?;
    let enabled: Vec<String> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    let control = root.join("cgroup.subtree_control");
    fs::write(&control, enabled.join(" ")).with_context(|| format!("writing {}", control.display()))
}

/// Moves this process into a cgroup.
fn join(folder: &Path) -> Result<()> {
    let members = folder.join("cgroup.procs");
    OpenOptions::new()
        .write(true)
        .open(&members)
        .and_then(|mut file| file.write_all(b"0"))
        .with_context(|| format!("writing {}", members.display()))
}

fn mount_on(kind: &str, folder: &Path, options: Option<&str>) -> Result<()> {
    mount(Some(kind), folder, Some(kind), MsFlags::empty(), options)
        .with_context(|| format!("mounting {kind} on {}", folder.display()))
}

const CGROUPS: &str = "/sys/fs/cgroup";
