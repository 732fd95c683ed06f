//! Resource usage of processes, from `/proc`.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

/// Memory of a process, in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Memory {
    /// Current resident memory (VmRSS).
    pub(super) resident: u64,
    /// Peak resident memory (VmHWM).
    pub(super) peak: u64,
}

/// CPU time of a process and all its threads, in user and kernel mode. Its resolution is 10 ms.
///
/// # Errors
/// If the process does not exist.
pub(super) fn cpu(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let ticks = ticks(&text).with_context(|| format!("{path} is not as expected: {text}"))?;
    Ok(TICK * u32::try_from(ticks).context("more CPU time than a benchmark can take")?)
}

/// Memory of a process.
///
/// # Errors
/// If the process does not exist.
pub(super) fn memory(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let field = |name| field(&text, name).with_context(|| format!("{path} has no {name}"));
    Ok(Memory {
        resident: field("VmRSS:")?,
        peak: field("VmHWM:")?,
    })
}

/// Parses `utime` plus `stime`: the fields 14 and 15, counted from the end of the process's name, which may contain
/// anything.
fn ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace().skip(11);
    let (user, kernel) = (fields.next()?, fields.next()?);
    Some(user.parse::<u64>().ok()? + kernel.parse::<u64>().ok()?)
}

fn field(status: &str, name: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// USER_HZ, which is 100 on all Linux systems that run a daemon.
const TICK: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let stat = "7 (a) b 1 (c) S 1 7 7 0 -1 4194560 12 0 3 0 250 50 9 9 20 0 4 0 99 1 2";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!(ticks("7 (a) S 1"), None);
    }

    #[test]
    fn memory_is_found_among_the_fields() {
        let status = "Name:\tx\nVmHWM:\t   20480 kB\nVmRSS:\t   10240 kB\n";
        assert_eq!(field(status, "VmRSS:"), Some(10240));
        assert_eq!(field(status, "VmHWM:"), Some(20480));
        assert_eq!(field(status, "VmSwap:"), None);
    }

    #[test]
    fn this_process_has_both() {
        let own = std::process::id();
        assert!(cpu(own).is_ok());
        let memory = memory(own).unwrap();
        assert!(memory.resident > 0 && memory.peak >= memory.resident);
    }
}
