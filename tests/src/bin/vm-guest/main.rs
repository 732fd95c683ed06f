//! The init process of a virtual machine of `cargo xtask vm-test`. Mounts the file systems that programs expect, runs
//! the steps of its plan one after the other, reports the results, and powers off.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use mesh_tests::vm::{Cgroups, EVENTS, Event, PLAN, Plan, Step};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::utsname::uname;
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{Pid, chdir, chroot};

fn main() {
    // Outside of the virtual machine, this program would kill processes that are not ours.
    if std::process::id() != 1 {
        eprintln!("vm-guest is the first program of a virtual machine, see `cargo xtask vm-test`");
        std::process::exit(2);
    }
    if let Err(error) = run() {
        // The serial line may be what is missing; in that case, the kernel's console shows this message.
        eprintln!("vm-guest: {error:#}");
        if let Ok(reporter) = Reporter::open() {
            let _ = reporter.say(&Event::Trouble(format!("{error:#}")));
        }
    }
    let _ = reboot(RebootMode::RB_POWER_OFF);
}

fn run() -> Result<()> {
    let plan = fs::read(PLAN).with_context(|| format!("reading {PLAN}"))?;
    let plan: Plan = serde_json::from_slice(&plan).with_context(|| format!("reading {PLAN}"))?;
    if plan.containers {
        move_root()?;
    }
    for (kind, on) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/run"),
        ("tmpfs", "/tmp"),
    ] {
        mount_on(kind, on, None)?;
    }
    let reporter = Reporter::open()?;
    mount_on("bpf", "/sys/fs/bpf", Some("mode=0700"))?;
    let kernel = uname().context("asking for the kernel's version")?;
    reporter.say(&Event::Started(
        kernel.release().to_string_lossy().into_owned(),
    ))?;

    let mut mounted = None;
    for (index, step) in plan.steps.iter().enumerate() {
        reporter.say(&Event::Begins(index))?;
        if mounted != Some(step.cgroups) {
            set_up_cgroups(step.cgroups)
                .with_context(|| format!("setting up cgroups ({:?})", step.cgroups))?;
            mounted = Some(step.cgroups);
        }
        let ended = perform(step, &reporter).with_context(|| step.name.clone())?;
        reporter.say(&ended)?;
    }
    reporter.say(&Event::Done)
}

/// The serial line on which the guest reports, one write at a time.
#[derive(Clone)]
struct Reporter(Arc<Mutex<File>>);

impl Reporter {
    fn open() -> Result<Self> {
        let line = OpenOptions::new().write(true).open(EVENTS);
        let line = line.with_context(|| format!("opening {EVENTS}"))?;
        Ok(Self(Arc::new(Mutex::new(line))))
    }

    fn say(&self, event: &Event) -> Result<()> {
        let mut line = serde_json::to_vec(event).context("writing an event")?;
        line.push(b'\n');
        let mut out = self.0.lock().expect("no holder of this lock panics");
        out.write_all(&line)
            .with_context(|| format!("writing to {EVENTS}"))
    }
}

/// Runs a step's program until it exits, and reports its output.
fn perform(step: &Step, reporter: &Reporter) -> Result<Event> {
    let (program, arguments) = step.command.split_first().context("has no command")?;
    let (reader, writer) = io::pipe().context("making a pipe")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .envs(step.environment.iter().map(|(name, value)| (name, value)))
        .current_dir("/tmp")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(writer.try_clone().context("copying a pipe")?)
        .stderr(writer);
    let child = command
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    // The command holds the other end of the pipe.
    drop(command);
    let child = Pid::from_raw(child.id().cast_signed());

    let (sent, printed) = mpsc::channel();
    let passing = reporter.clone();
    thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            if passing.say(&Event::Line(line)).is_err() {
                break;
            }
        }
        let _ = sent.send(());
    });
    let (ended, waits) = mpsc::channel();
    let patience = Duration::from_secs(step.seconds);
    let watch = thread::spawn(move || {
        let late = waits.recv_timeout(patience).is_err();
        if late {
            let _ = killpg(child, Signal::SIGKILL);
        }
        late
    });
    // As the init process we are the parent of all orphaned processes, so they are reaped here as well.
    let code = loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => break Some(code),
            Ok(WaitStatus::Signaled(pid, ..)) if pid == child => break None,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("waiting for it"),
        }
    };
    let _ = ended.send(());
    let late = watch.join().unwrap_or(false);
    // Processes that the step left behind must neither hold the pipe open nor interfere with the next step.
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    while wait().is_ok() {}
    let _ = printed.recv_timeout(Duration::from_secs(30));
    Ok(Event::Ended { code, late })
}

fn set_up_cgroups(wanted: Cgroups) -> Result<()> {
    const ROOT: &str = "/sys/fs/cgroup";
    // Deepest first. The folder itself stays busy for a moment after the last process has exited.
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    let below = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    for path in below.filter(|path| Path::new(path).starts_with(ROOT)).rev() {
        umount2(path, MntFlags::empty()).with_context(|| format!("unmounting {path}"))?;
    }
    if wanted == Cgroups::V2 {
        return mount_on("cgroup2", ROOT, None);
    }
    mount_on("tmpfs", ROOT, None)?;
    let unified = format!("{ROOT}/unified");
    fs::create_dir(&unified).context("making a folder")?;
    mount_on("cgroup2", &unified, None)?;
    let table = fs::read_to_string("/proc/cgroups").context("reading /proc/cgroups")?;
    let controllers = table.lines().filter(|line| !line.starts_with('#'));
    let mut there = Vec::new();
    for name in controllers.filter_map(|line| line.split('\t').next()) {
        let folder = format!("{ROOT}/{name}");
        fs::create_dir(&folder).context("making a folder")?;
        // Newer kernels have some controllers for version 2 only.
        match mount_on("cgroup", &folder, Some(name)) {
            Ok(()) => there.push(name),
            Err(_) => fs::remove_dir(&folder).context("removing a folder")?,
        }
    }
    // These two share a field of the kernel's sockets with version 2, so they are the ones that matter here.
    anyhow::ensure!(
        there.contains(&"net_cls") && there.contains(&"net_prio"),
        "this kernel mounts only {there:?} in version 1"
    );
    Ok(())
}

/// Mounts the root on itself. A container's root cannot replace the kernel's first root (pivot_root(2)), but a mount on it.
fn move_root() -> Result<()> {
    const ON: &str = "/mnt";
    fs::create_dir_all(ON).with_context(|| format!("making {ON}"))?;
    let bind =
        |from: &str, to: &str, flags| mount(Some(from), to, None::<&str>, flags, None::<&str>);
    bind("/", ON, MsFlags::MS_BIND)
        .and_then(|()| chdir(ON))
        .and_then(|()| bind(".", "/", MsFlags::MS_MOVE))
        .and_then(|()| chroot("."))
        .context("mounting the root on itself")
}

fn mount_on(kind: &str, on: &str, options: Option<&str>) -> Result<()> {
    fs::create_dir_all(on).with_context(|| format!("making {on}"))?;
    mount(Some(kind), on, Some(kind), MsFlags::empty(), options)
        .with_context(|| format!("mounting {kind} on {on}"))
}
