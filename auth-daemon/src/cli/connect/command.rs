//! Runs a program that uses the connection.

use std::{
    net::SocketAddr,
    os::unix::process::ExitStatusExt,
    process::{Command, ExitCode, ExitStatus},
};

use anyhow::Context;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::spawn_blocking,
};

/// Runs `program` until it ends, and returns its exit code; 128 and the signal's number if a signal ended it, as a shell
/// does. A SIGTERM is passed on. The terminal sends Ctrl-C to the program itself.
pub(super) async fn run(
    program: &str,
    arguments: &[String],
    address: SocketAddr,
) -> anyhow::Result<ExitCode> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for signals")?;
    let mut child = Command::new(program)
        .args(arguments)
        .env("AUTH_DAEMON_ADDRESS", address.to_string())
        .env("AUTH_DAEMON_HOST", address.ip().to_string())
        .env("AUTH_DAEMON_PORT", address.port().to_string())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    let pid = i32::try_from(child.id()).ok().map(Pid::from_raw);
    let mut ended = spawn_blocking(move || child.wait());
    loop {
        tokio::select! {
            status = &mut ended => {
                let status = status?.with_context(|| format!("cannot wait for {program}"))?;
                return Ok(exit_code(status).into());
            }
            _ = interrupt.recv() => {}
            _ = terminate.recv() => if let Some(pid) = pid {
                // It may have ended a moment ago.
                let _ = kill(pid, Signal::SIGTERM);
            }
        }
    }
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_the_programs() {
        for (raw, code) in [(0, 0), (3 << 8, 3), (255 << 8, 255), (9, 137), (15, 143)] {
            assert_eq!(exit_code(ExitStatus::from_raw(raw)), code);
        }
    }
}
