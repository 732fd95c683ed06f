//! Another process' descriptors and memory.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use clap::Args;
use nix::errno::Errno;
use nix::libc;
use serde_json::{Value, json};

use crate::report::{At, Outcome, errno_name};

/// Looks at another process' standard input, duplicates it, and opens the process' memory. Reports what came of each
#[derive(Debug, Clone, Args)]
pub(crate) struct Steal {
    /// The other process
    #[arg(long)]
    pid: i32,
}

impl Steal {
    pub(crate) fn run(self) -> Outcome {
        let pid = self.pid;
        let process = open(pid).at("pidfd_open")?;
        let link = fs::read_link(format!("/proc/{pid}/fd/0"));
        let memory = File::open(format!("/proc/{pid}/mem"));
        let duplicated = duplicate(&process, 0);
        Ok(json!({
            "link": outcome(link.map(drop)),
            "memory": outcome(memory.map(drop)),
            "duplicate": outcome(duplicated.map(drop)),
        }))
    }
}

fn outcome(result: io::Result<()>) -> Value {
    result.map_or_else(|error| json!(errno_name(&error)), |()| json!("done"))
}

/// pidfd_open(2).
fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// pidfd_getfd(2).
fn duplicate(process: &OwnedFd, descriptor: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), descriptor, 0) })
}

/// Takes the descriptor that a system call has returned.
fn owned(returned: libc::c_long) -> io::Result<OwnedFd> {
    let descriptor = i32::try_from(Errno::result(returned)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for this process, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
