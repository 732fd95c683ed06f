//! Child processes: collects their output, waits until they exit, and kills them.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use serde_json::Value;

use crate::eventually::{eventually, eventually_ok};

/// A running program whose output is collected. Dropping it kills it and the processes of its group.
#[derive(Debug)]
pub struct Process {
    what: String,
    child: Child,
    status: Option<ExitStatus>,
    stdout: Collected,
    stderr: Collected,
}

impl Process {
    /// Starts the command in a process group of its own, with its output collected and its input empty.
    pub fn spawn(mut command: Command) -> Result<Self> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Self::spawn_as_is(command)
    }

    /// Like [`Process::spawn`], but leaves the output where the command sends it.
    pub fn spawn_as_is(mut command: Command) -> Result<Self> {
        let what = describe(&command);
        command.process_group(0).stdin(Stdio::null());
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start `{what}`"))?;
        let collect = |pipe: Option<OwnedFd>| match pipe {
            Some(pipe) => Collected::from(pipe),
            None => Ok(Collected::default()),
        };
        let stdout = collect(child.stdout.take().map(OwnedFd::from))?;
        let stderr = collect(child.stderr.take().map(OwnedFd::from))?;
        Ok(Self {
            what,
            child,
            status: None,
            stdout,
            stderr,
        })
    }

    /// Its process ID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Its exit status, if it has exited.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self
                .child
                .try_wait()
                .with_context(|| format!("waiting for `{}`", self.what))?;
        }
        Ok(self.status)
    }

    /// Waits until it exits. Returns an error if it still runs at the deadline, and does not kill it.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("the end of `{}`", self.what);
        eventually_ok(deadline, &what, || {
            self.ended()?.ok_or_else(|| anyhow!("it still runs"))
        })
        .with_context(|| format!("it has said: {}{}", self.stdout(), self.stderr()))
    }

    /// Waits until it exits and returns all of its output. At the deadline, kills it and returns an error.
    pub fn finish(mut self, deadline: Duration) -> Result<Finished> {
        let status = self.wait(deadline)?;
        // All of its own output is in the pipe by now. A grandchild may hold that open; its later output is not collected.
        let _ = eventually(Duration::from_secs(1), "the end of its output", || {
            (self.stdout.at_end() && self.stderr.at_end()).then_some(())
        });
        Ok(Finished {
            what: self.what.clone(),
            status,
            stdout: self.stdout(),
            stderr: self.stderr(),
        })
    }

    /// Waits until standard output contains a line for which `find` returns a value.
    pub fn wait_for_line<T>(
        &mut self,
        what: &str,
        deadline: Duration,
        mut find: impl FnMut(&str) -> Option<T>,
    ) -> Result<T> {
        let mut seen = 0;
        let mut found = eventually(deadline, what, || {
            // Check for the exit first: all output from before it has then been read.
            let ended = self.ended().ok().flatten().is_some() && self.stdout.at_end();
            let news = self.stdout.text_from(seen);
            for line in news
                .split_inclusive('\n')
                .filter(|line| line.ends_with('\n'))
            {
                seen += line.len();
                if let Some(value) = find(line.trim_end()) {
                    return Some(Some(value));
                }
            }
            ended.then_some(None)
        })
        .with_context(|| {
            format!(
                "`{}` has said: {}{}",
                self.what,
                self.stdout(),
                self.stderr()
            )
        })?;
        found.take().ok_or_else(|| {
            anyhow!(
                "`{}` ended ({:?}) before {what}: {}{}",
                self.what,
                self.status,
                self.stdout(),
                self.stderr()
            )
        })
    }

    /// Sends a signal to this process only.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        nix::sys::signal::kill(self.as_pid(), signal)
            .with_context(|| format!("sending {signal} to `{}`", self.what))
    }

    /// Suspends it (SIGSTOP), and waits until it is: other threads continue until the one that gets the signal is
    /// scheduled.
    pub fn suspend(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)?;
        let stopped = WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        match waitid(Id::Pid(self.as_pid()), stopped)
            .with_context(|| format!("waiting for `{}` to stop", self.what))?
        {
            WaitStatus::Stopped(..) => Ok(()),
            other => bail!("`{}` did not stop: {other:?}", self.what),
        }
    }

    /// Resumes it (SIGCONT).
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Kills it and its process group with SIGKILL and waits until it has exited.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.ended()? {
            return Ok(status);
        }
        // The process has not been reaped yet, so the group ID is still its own.
        let _ = killpg(self.as_pid(), Signal::SIGKILL);
        let status = self
            .child
            .wait()
            .with_context(|| format!("waiting for `{}`", self.what))?;
        self.status = Some(status);
        Ok(status)
    }

    fn as_pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("Linux process ids are below 2^22"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// A program that has exited.
#[derive(Debug, Clone)]
pub struct Finished {
    what: String,
    /// Its exit status.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl Finished {
    /// Returns itself if the program exited with 0, otherwise an error with its exit status and output.
    pub fn ok(self) -> Result<Self> {
        if !self.status.success() {
            bail!(
                "`{}` ended with {}: {}{}",
                self.what,
                describe_status(self.status),
                self.stderr,
                self.stdout
            );
        }
        Ok(self)
    }

    /// The exit code, or `None` if it was killed by a signal.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// The lines of standard output that are JSON.
    pub fn json_lines(&self) -> Vec<Value> {
        json_lines(&self.stdout)
    }
}

/// The lines of a text that are JSON, in order.
pub(crate) fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

/// The output read from a pipe so far.
#[derive(Debug, Clone, Default)]
struct Collected(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    /// `None` after its end.
    pipe: Option<File>,
}

impl Collected {
    /// Reads from the pipe on a thread, so that the program never waits for a reader.
    fn from(pipe: OwnedFd) -> Result<Self> {
        let pipe = File::from(pipe);
        // Of this end only: the program's end is another open file.
        fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let awaited = pipe.try_clone()?;
        let collected = Self(Arc::new(Mutex::new(State {
            bytes: Vec::new(),
            pipe: Some(pipe),
        })));
        let reader = collected.clone();
        thread::spawn(move || {
            while !reader.at_end() {
                let _ = poll(
                    &mut [PollFd::new(awaited.as_fd(), PollFlags::POLLIN)],
                    PollTimeout::NONE,
                );
            }
        });
        Ok(collected)
    }

    /// All that the program has written, also what the thread has not read yet.
    fn text(&self) -> String {
        self.text_from(0)
    }

    fn text_from(&self, start: usize) -> String {
        String::from_utf8_lossy(&self.up_to_date().bytes[start..]).into_owned()
    }

    fn at_end(&self) -> bool {
        self.up_to_date().pipe.is_none()
    }

    fn up_to_date(&self) -> MutexGuard<'_, State> {
        let mut state = self.0.lock().expect("no holder of this lock panics");
        state.read();
        state
    }
}

impl State {
    /// Reads what the pipe holds.
    fn read(&mut self) {
        let mut buffer = [0; 64 * 1024];
        while let Some(pipe) = &mut self.pipe {
            match pipe.read(&mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(count) => self.bytes.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.pipe = None,
            }
        }
    }
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

fn describe_status(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}
