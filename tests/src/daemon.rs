//! The daemon of a node, as a process.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, PipeReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::libc;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};
use serde_json::Value;

use crate::daemon_options::DaemonOptions;
use crate::eventually::{TIMEOUT, eventually, eventually_ok};
use crate::http::http_get;
use crate::locate::auth_daemon;
use crate::node::Node;
use crate::process::{Finished, Process, json_lines};
use crate::status::Status;

/// A running daemon. Dropping it kills it with SIGKILL; its pins are kept until the mesh is removed.
#[derive(Debug)]
pub struct Daemon {
    node: Node,
    process: Process,
    log: PathBuf,
    /// Where this daemon's lines begin in the node's log, which restarts append to.
    start: u64,
    /// The end of the pipe that nobody reads, after [`DaemonOptions::log_stalls`].
    _unread: Option<PipeReader>,
}

impl Daemon {
    pub(crate) fn spawn(node: &Node, options: DaemonOptions) -> Result<Self> {
        let folder = node.folder();
        if let Some(ca) = &options.ca_folder {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(ca);
            made.with_context(|| format!("making {}", ca.display()))?;
        }
        let config = folder.join(CONFIG);
        let text = format!("{:#}\n", options.config(node));
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        // Two daemons that share a node have separate logs.
        let log = folder.join(if options.stands_by { LOG_OF_NEXT } else { LOG });
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("opening {}", log.display()))?;
        let start = file
            .metadata()
            .context("reading the size of the log")?
            .len();
        let program = auth_daemon()?;
        let mut command = if options.stands_by {
            let mut command = node.daemon_place().command("unshare")?;
            command
                .args([
                    "--mount",
                    "--propagation",
                    "slave",
                    "sh",
                    "-c",
                    OWN_RUN,
                    "sh",
                ])
                .arg(&program);
            command
        } else if let Some(set) = &options.capabilities {
            let mut command = node.daemon_place().command("setpriv")?;
            command.arg(format!("--bounding-set={set}")).arg(&program);
            command
        } else {
            node.daemon_place().command(&program)?
        };
        command.args(["run", "--config"]).arg(&config);
        if options.stands_by {
            command.arg("--stand-by");
        }
        if options.refuses_programs {
            refuse_programs(&mut command)?;
        }
        if let Some(limit) = options.descriptors {
            // SAFETY: between fork and exec only setrlimit(2) is called; nothing is allocated unless that fails.
            unsafe {
                command.pre_exec(move || {
                    setrlimit(Resource::RLIMIT_NOFILE, limit, limit).map_err(io::Error::from)
                });
            }
        }
        command.envs(options.environment);
        command
            .stdout(file.try_clone().context("sharing the log")?)
            .stderr(file);
        let mut unread = None;
        if options.log_stalls {
            let (reader, writer) = io::pipe().context("making a pipe for the log")?;
            command.stderr(writer);
            unread = Some(reader);
        }
        let process =
            Process::spawn_as_is(command).with_context(|| format!("on {}", node.name()))?;
        Ok(Self {
            node: node.clone(),
            process,
            log,
            start,
            _unread: unread,
        })
    }

    /// The name of its node.
    pub fn node(&self) -> &str {
        self.node.name()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Whether it is still running.
    pub fn is_running(&mut self) -> bool {
        matches!(self.process.ended(), Ok(None))
    }

    /// Its process, to send it signals or wait until it exits.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Suspends it, and waits until it is.
    pub fn suspend(&self) -> Result<()> {
        self.process.suspend()
    }

    /// Resumes it after [`Daemon::suspend`].
    pub fn resume(&self) -> Result<()> {
        self.process.resume()
    }

    /// Waits until the readiness endpoint returns 200. Fails at once if the daemon exits instead.
    pub fn wait_ready(&mut self) -> Result<()> {
        let what = format!("the daemon on {} to be ready", self.node());
        let ready = eventually_ok(TIMEOUT, &what, || {
            if let Some(status) = self.process.ended()? {
                return Ok(Err(status));
            }
            match http_get(self.node.netns(), READINESS, "/healthz/ready")? {
                answer if answer.status == 200 => Ok(Ok(())),
                answer => Err(anyhow!(
                    "it answers {}: {}",
                    answer.status,
                    answer.body.trim()
                )),
            }
        });
        match ready.with_context(|| format!("its log: {}", self.log_text()))? {
            Ok(()) => Ok(()),
            Err(status) => bail!(
                "the daemon on {} ended with {status}: {}",
                self.node(),
                self.log_text()
            ),
        }
    }

    /// Runs `auth-daemon probe ready` as in the daemon's container; for a daemon started with
    /// [`DaemonOptions::stand_by`].
    pub fn probe_ready(&self) -> Result<Finished> {
        let mut command = self.node.daemon_place().command("nsenter")?;
        command
            .args(["--mount", "--target", &self.pid().to_string()])
            .arg(auth_daemon()?)
            .args(["probe", "ready"]);
        Process::spawn(command)?.finish(TIMEOUT)
    }

    /// Waits until the output of the readiness probe begins with `answer`.
    pub fn wait_probed(&self, answer: &str) -> Result<()> {
        let what = format!("the daemon on {} to answer {answer:?}", self.node());
        eventually_ok(TIMEOUT, &what, || {
            let probe = self.probe_ready()?;
            ensure!(
                probe.stdout.starts_with(answer),
                "{}{}",
                probe.stdout,
                probe.stderr
            );
            Ok(())
        })
        .with_context(|| format!("its log: {}", self.log_text()))
    }

    /// Waits until its status lists these pods, `namespace/name`, as enrolled.
    pub fn wait_enrolled<S: AsRef<str>>(&self, pods: &[S]) -> Result<()> {
        let what = format!("the daemon on {} to enrol its pods", self.node());
        eventually_ok(TIMEOUT, &what, || {
            let status = self.status()?;
            for name in pods {
                match status.pods.iter().find(|pod| pod.pod == name.as_ref()) {
                    Some(pod) if pod.enrolled => {}
                    Some(pod) => bail!("{} is not enrolled: {:?}", pod.pod, pod.reason),
                    None => bail!("{} is not known", name.as_ref()),
                }
            }
            Ok(())
        })
        .with_context(|| format!("its log: {}", self.log_text()))
    }

    /// Whether the readiness endpoint returns 200 now.
    pub fn is_ready(&self) -> bool {
        http_get(self.node.netns(), READINESS, "/healthz/ready")
            .is_ok_and(|answer| answer.status == 200)
    }

    /// Its current status.
    pub fn status(&self) -> Result<Status> {
        let value = self.status_json()?;
        serde_json::from_value(value.clone()).with_context(|| format!("reading the status {value}"))
    }

    /// Its metrics, in the Prometheus text format.
    pub fn metrics(&self) -> Result<String> {
        let answer = http_get(self.node.netns(), METRICS, "/metrics")?;
        if answer.status != 200 {
            bail!(
                "the daemon on {} answers {} to /metrics: {}",
                self.node.name(),
                answer.status,
                answer.body
            );
        }
        Ok(answer.body)
    }

    /// Its current status, as unparsed JSON.
    pub fn status_json(&self) -> Result<Value> {
        let answer = http_get(self.node.netns(), ADMIN, "/status")?;
        if answer.status != 200 {
            bail!(
                "the daemon on {} answers {} to /status: {}",
                self.node(),
                answer.status,
                answer.body
            );
        }
        serde_json::from_str(&answer.body)
            .with_context(|| format!("reading the status {}", answer.body))
    }

    /// All of its output, which includes text other than log lines when it panics.
    pub fn log_text(&self) -> String {
        read_from(&self.log, self.start)
    }

    /// Its log lines so far, one JSON object each.
    pub fn logs(&self) -> Vec<Value> {
        json_lines(&self.log_text())
    }

    /// The lines of its access log so far.
    pub fn access_log(&self) -> Vec<Value> {
        self.logs().into_iter().filter(is_access).collect()
    }

    /// The lines of its access log after a [`Daemon::log_position`].
    pub fn access_log_after(&self, position: u64) -> Vec<Value> {
        let lines = json_lines(&read_from(&self.log, position));
        lines.into_iter().filter(is_access).collect()
    }

    /// A position at the log's end, for [`Daemon::wait_for_log_after`].
    pub fn log_position(&self) -> u64 {
        fs::metadata(&self.log).map_or(0, |metadata| metadata.len())
    }

    /// Waits for a log line, past or future, that the predicate accepts.
    pub fn wait_for_log(
        &self,
        what: &str,
        deadline: Duration,
        accept: impl FnMut(&Value) -> bool,
    ) -> Result<Value> {
        self.wait_for_log_after(self.start, what, deadline, accept)
    }

    /// Like [`Daemon::wait_for_log`], for lines after a [`Daemon::log_position`].
    pub fn wait_for_log_after(
        &self,
        position: u64,
        what: &str,
        deadline: Duration,
        mut accept: impl FnMut(&Value) -> bool,
    ) -> Result<Value> {
        let mut position = position;
        eventually(
            deadline,
            &format!("the daemon on {} to log {what}", self.node()),
            || {
                let news = read_from(&self.log, position);
                for line in news
                    .split_inclusive('\n')
                    .filter(|line| line.ends_with('\n'))
                {
                    position += line.len() as u64;
                    let Ok(value) = serde_json::from_str(line) else {
                        continue;
                    };
                    if accept(&value) {
                        return Some(value);
                    }
                }
                None
            },
        )
    }

    /// Waits for a line of the access log that the predicate accepts.
    pub fn wait_for_access(
        &self,
        what: &str,
        deadline: Duration,
        mut accept: impl FnMut(&Value) -> bool,
    ) -> Result<Value> {
        self.wait_for_log(what, deadline, |line| is_access(line) && accept(line))
    }

    /// Changes its configuration file, as an operator would. The daemon applies what can change while it runs.
    pub fn edit_config(&self, change: impl FnOnce(&mut Value)) -> Result<()> {
        let path = self.node.folder().join(CONFIG);
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let mut config = serde_json::from_str(&text).context("parsing the configuration")?;
        change(&mut config);
        let new = path.with_extension("new");
        fs::write(&new, format!("{config:#}\n"))
            .with_context(|| format!("writing {}", new.display()))?;
        fs::rename(&new, &path).with_context(|| format!("renaming {}", new.display()))
    }

    /// Kills it with SIGKILL, as a crash would.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill().map(drop)
    }

    /// Sends SIGTERM and waits until it has exited.
    pub fn terminate(mut self, deadline: Duration) -> Result<ExitStatus> {
        self.process.signal(Signal::SIGTERM)?;
        self.process
            .wait(deadline)
            .with_context(|| format!("its log: {}", self.log_text()))
    }
}

/// Makes the kernel refuse the eBPF programs of a command, and nothing else.
fn refuse_programs(command: &mut Command) -> Result<()> {
    let load = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        u64::from(BPF_PROG_LOAD),
    )?;
    let rule = SeccompRule::new(vec![load])?;
    let filter: BpfProgram = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_bpf, vec![rule])]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EINVAL as u32),
        std::env::consts::ARCH.try_into()?,
    )?
    .try_into()?;
    // SAFETY: between fork and exec only prctl(2) and seccomp(2) are called, on a filter that the closure owns; nothing is
    // allocated unless that fails.
    unsafe {
        command.pre_exec(move || apply_filter(&filter).map_err(io::Error::other));
    }
    Ok(())
}

fn is_access(line: &Value) -> bool {
    line["target"] == "access"
}

fn read_from(path: &Path, start: u64) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        use std::io::{Read, Seek, SeekFrom};
        let mut file = fs::File::open(path)?;
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

/// The daemon's configuration, in the node's folder.
pub(crate) const CONFIG: &str = "auth-daemon.yaml";
/// The daemon's log, in the node's folder.
pub(crate) const LOG: &str = "auth-daemon.log";
/// The log of a daemon that was started beside another one.
const LOG_OF_NEXT: &str = "auth-daemon-next.log";
/// Runs a command with the folder of the health socket to itself.
const OWN_RUN: &str =
    "mkdir -p /run/auth-daemon && mount -t tmpfs tmpfs /run/auth-daemon && exec \"$@\"";
/// A command of bpf(2), from linux/bpf.h.
const BPF_PROG_LOAD: u32 = 5;
const ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15000);
const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15020);
const READINESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15021);
