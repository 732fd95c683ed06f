//! A QEMU virtual machine, from start to shutdown.

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mesh_tests::vm::Event;

const QEMU: &str = "qemu-system-x86_64";
/// For a kernel's start, and for its end; on a busy machine of two cores it takes some ten seconds.
const BOOT: Duration = Duration::from_secs(180);

/// For QEMU, to end once it has nothing more to say.
const MOMENT: Duration = Duration::from_secs(5);

/// How a machine's instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Accelerator {
    /// The processor itself.
    Kvm,
    /// QEMU translates them.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM",
            Self::Tcg => "TCG, emulated",
        })
    }
}

impl Accelerator {
    /// KVM where a kernel starts with it: that /dev/kvm is there does not say so. Tells which it is, and why.
    ///
    /// # Errors
    /// If QEMU is missing.
    pub(super) fn probe(image: &Path) -> Result<Self> {
        if !Path::new("/dev/kvm").exists() {
            eprintln!("    no /dev/kvm here: the machines are emulated (TCG)");
            return Ok(Self::Tcg);
        }
        let mut command = Self::Kvm.qemu();
        command.args(["-m", "256", "-serial", "stdio"]);
        command.arg("-kernel").arg(image);
        command.args(["-append", "console=ttyS0 earlyprintk=serial,ttyS0 panic=-1"]);
        let mut running = Running::start(command)?;
        let started = Instant::now();
        while let Some(left) = Duration::from_secs(10).checked_sub(started.elapsed()) {
            match running.lines.recv_timeout(left) {
                Ok(line) if line.contains("Linux version") => {
                    eprintln!("    KVM works here");
                    return Ok(Self::Kvm);
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        let why = running.end(MOMENT);
        eprintln!(
            "    /dev/kvm is here, but no kernel starts with it ({why}): the machines are emulated (TCG)"
        );
        Ok(Self::Tcg)
    }

    /// QEMU without any device that it would add by itself.
    fn qemu(self) -> Command {
        let mut command = Command::new(QEMU);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        match self {
            Self::Kvm => command.args(["-accel", "kvm", "-cpu", "host"]),
            Self::Tcg => command.args(["-accel", "tcg,thread=multi", "-cpu", "max"]),
        };
        command
    }
}

/// The parts of a machine.
#[derive(Debug)]
pub(super) struct Machine {
    /// The kernel's image.
    pub(super) kernel: PathBuf,
    /// Its first root file system, and only one.
    pub(super) archive: PathBuf,
    /// The file for its console output.
    pub(super) console: PathBuf,
    /// Its memory in MiB.
    pub(super) memory: u32,
    /// What runs it.
    pub(super) accelerator: Accelerator,
}

impl Machine {
    /// Runs it until it is done, and hands on what it reports. `patience` tells how long after an event the next one, if
    /// only a line of output, may take.
    ///
    /// # Errors
    /// With the kernel's last words: when it panics, hangs, or goes down before it is done.
    pub(super) fn run(
        &self,
        mut report: impl FnMut(Event) -> Result<()>,
        patience: Duration,
    ) -> Result<()> {
        let mut command = self.accelerator.qemu();
        command.args(["-smp", "2", "-m", &self.memory.to_string()]);
        command.arg("-kernel").arg(&self.kernel);
        command.arg("-initrd").arg(&self.archive);
        command.arg("-append").arg(COMMAND_LINE);
        command
            .arg("-serial")
            .arg(format!("file:{}", self.console.display()));
        command.args(["-serial", "stdio"]);
        let mut running = Running::start(command)?;
        let mut limit = BOOT;
        loop {
            let line = match running.lines.recv_timeout(limit) {
                Ok(line) => line,
                Err(why) => {
                    let how = match why {
                        RecvTimeoutError::Timeout => {
                            format!("has said nothing for {} s", limit.as_secs())
                        }
                        RecvTimeoutError::Disconnected => {
                            format!("went down before it was done ({})", running.end(MOMENT))
                        }
                    };
                    bail!("the machine {how}; {}", self.last_words());
                }
            };
            match serde_json::from_str(line.trim_end()) {
                Ok(Event::Done) => break,
                Ok(Event::Trouble(why)) => bail!("the machine cannot go on: {why}"),
                Ok(event) => report(event)?,
                // The firmware greets on all lines.
                Err(_) => continue,
            }
            limit = patience;
        }
        // The machine powers off now, which is not part of the test.
        running.end(BOOT);
        if self.console_text().lines().any(complains) {
            bail!("all was run; {}", self.last_words());
        }
        Ok(())
    }

    fn console_text(&self) -> String {
        fs::read(&self.console)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// The kernel's first error message and what follows it, or the last lines.
    fn last_words(&self) -> String {
        let text = self.console_text();
        let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
        let complaint = lines.iter().position(|line| complains(line));
        let (head, start) = match complaint {
            Some(at) => (format!("its kernel said: {}", lines[at]), at),
            None => (
                "its kernel's last words".to_owned(),
                lines.len().saturating_sub(30),
            ),
        };
        let some = lines[start..].iter().take(60);
        some.fold(head, |text, line| text + "\n      " + line)
    }
}

/// Makes a kernel that fails stop at once and report where. On a busy machine, a kernel would mistrust an emulated TSC, and
/// use a slower clock.
/// Mitigations cost an emulated processor much and protect it from nothing: QEMU executes nothing speculatively.
const COMMAND_LINE: &str = "console=ttyS0 panic=-1 oops=panic tsc=reliable mitigations=off";

/// Whether the kernel reports an error of its own in this line.
fn complains(line: &str) -> bool {
    [
        "Kernel panic",
        "BUG:",
        "WARNING:",
        "Oops:",
        "general protection fault",
    ]
    .iter()
    .any(|word| line.contains(word))
}

/// QEMU, and the lines of its standard output. Killed when dropped.
struct Running {
    child: Child,
    lines: Receiver<String>,
}

impl Running {
    fn start(mut command: Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {QEMU}"))?;
        let output = child.stdout.take().context("QEMU has no standard output")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                if sender
                    .send(String::from_utf8_lossy(&line).into_owned())
                    .is_err()
                {
                    break;
                }
            }
        });
        Ok(Self { child, lines })
    }

    fn lives(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|ended| ended.is_none())
    }

    /// Waits up to `patience` for its end, ends it, and says how it was and what QEMU said of itself.
    fn end(&mut self, patience: Duration) -> String {
        let started = Instant::now();
        while self.lives() && started.elapsed() < patience {
            thread::sleep(Duration::from_millis(50));
        }
        let ended = self.child.try_wait().ok().flatten();
        let _ = self.child.kill();
        let _ = self.child.wait();
        let said = self
            .child
            .stderr
            .take()
            .and_then(|stderr| std::io::read_to_string(stderr).ok())
            .unwrap_or_default();
        match (said.trim().lines().next(), ended) {
            (Some(line), _) => line.to_owned(),
            (None, Some(status)) => format!("QEMU ended with {status}"),
            (None, None) => "it hung".to_owned(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_complains_is_heard() {
        assert!(complains(
            "[    2.0] WARNING: CPU: 0 PID: 1 at net/core/sock.c:1"
        ));
        assert!(complains(
            "[    2.0] Kernel panic - not syncing: Fatal exception"
        ));
        assert!(!complains(
            "[    1.0] bridge: filtering is no longer available"
        ));
    }
}
