//! The `ip` program, with many commands at a time.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs `commands`, one per line, inside the named network namespace or, without one, in the caller's.
pub(crate) fn ip(netns: Option<&str>, commands: &[String]) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(netns) = netns {
        command.args(["-n", netns]);
    }
    let mut child = command
        .args(["-b", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start the program `ip` (package iproute2)")?;
    // A write error means that ip has exited early; its own message says why.
    let _ = child
        .stdin
        .take()
        .expect("stdin is piped")
        .write_all(commands.join("\n").as_bytes());
    let output = child.wait_with_output().context("waiting for `ip -b`")?;
    if !output.status.success() {
        bail!(
            "`ip -b` in namespace {} failed: {}\nits commands were:\n{}",
            netns.unwrap_or("of the caller"),
            String::from_utf8_lossy(&output.stderr).trim(),
            commands
                .iter()
                .enumerate()
                .map(|(n, line)| format!("{:3}  {line}\n", n + 1))
                .collect::<String>(),
        );
    }
    Ok(())
}
