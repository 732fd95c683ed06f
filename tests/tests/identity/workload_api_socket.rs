//! The SPIFFE Workload API at the node's Unix socket: the caller is who connected, and must be of the pod whose network
//! namespace the socket is in.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    os::unix::net::UnixStream,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::{
    Daemon, DaemonOptions, Mesh, Place, Pod, PodSpec, Process, TIMEOUT, chart, eventually_ok,
};
use nix::sys::{
    signal::Signal,
    socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
};
use serde_json::json;

use crate::common::with_ca::spiffe;

/// The accounts that may use the API.
const ALLOWED: [&str; 2] = ["default/allowed", "default/crowd"];

/// A node with a socket, and three pods of accounts with their names.
struct Stage {
    mesh: Mesh,
    socket: PathBuf,
    options: DaemonOptions,
    /// A process in each pod, by which the daemon finds those without a named namespace.
    _residents: Vec<Process>,
}

impl Stage {
    fn set(by_uid: bool) -> Result<Self> {
        let pod = |name: &str| {
            let pod = PodSpec::new(name).service_account(name);
            if by_uid { pod.by_uid() } else { pod }
        };
        let mesh = Mesh::builder()
            .node("a")
            .pod(pod("allowed"))
            .pod(pod("crowd"))
            .pod(pod("other"))
            .start()?;
        let pods = mesh.pods();
        let residents = pods.iter().map(|pod| pod.spawn("sleep", ["1000"]));
        let residents = residents.collect::<Result<_>>()?;
        let socket = mesh.node("a").place().folder().join("api/api.sock");
        let options = DaemonOptions::default().setting(
            "workloadApi",
            json!({"accounts": ALLOWED, "socket": socket}),
        );
        Ok(Self {
            mesh,
            socket,
            options,
            _residents: residents,
        })
    }

    fn start(&self, options: &DaemonOptions) -> Result<Daemon> {
        let daemon = self.mesh.start_daemons_with(options)?.remove(0);
        self.wait_open(&daemon)?;
        Ok(daemon)
    }

    fn wait_open(&self, daemon: &Daemon) -> Result<()> {
        for pod in ALLOWED {
            daemon.wait_for_log("the API", TIMEOUT, |line| {
                line["message"] == "workload API open" && line["pod"] == pod
            })?;
        }
        daemon.wait_for_log("the socket", TIMEOUT, |line| {
            line["message"] == "workload API socket open"
        })?;
        Ok(())
    }

    fn pod(&self, name: &str) -> Pod {
        self.mesh.pod(name)
    }

    /// Asks from a process of the pod with this name.
    fn ask(&self, name: &str) -> Result<Answer> {
        let pod = self.pod(name);
        ask(&self.socket, &pod, &pod)
    }
}

/// What a caller gets.
#[derive(Debug, PartialEq)]
enum Answer {
    /// A certificate of this SPIFFE ID.
    Certificate(String),
    /// An error of gRPC.
    Refused,
    /// Nothing: the connection is closed.
    Closed,
}

/// Connections that a process has made. It runs until this is dropped.
struct Connected {
    connections: Vec<UnixStream>,
    _process: Process,
}

/// Has a process in `process` connect sockets that were created in the network namespace of `created`.
fn connect_in(path: &Path, created: &Place, process: &Place, count: usize) -> Result<Connected> {
    let new = || {
        socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
    };
    let sockets: Vec<OwnedFd> = created.enter(|| {
        let sockets = (0..count).map(|_| new());
        sockets.collect::<nix::Result<_>>()
    })??;
    let address = UnixAddr::new(path)?;
    let descriptors: Vec<_> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
    let mut command = process.command("sleep")?;
    command.arg("1000");
    // SAFETY: between fork and exec only connect(2) is called, with what the closure owns; nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            for descriptor in &descriptors {
                connect(*descriptor, &address)?;
            }
            Ok(())
        });
    }
    let process = Process::spawn(command).context("connecting")?;
    Ok(Connected {
        connections: sockets.into_iter().map(UnixStream::from).collect(),
        _process: process,
    })
}

/// Asks for a certificate on a connection that was made as in [`connect_in`].
fn ask(path: &Path, created: &Place, process: &Place) -> Result<Answer> {
    let mut connected = connect_in(path, created, process, 1)?;
    request(&mut connected.connections[0])
}

/// Asks for a certificate as gRPC's clients for Python and C++ do, in whose requests the socket's path is the authority.
fn request(connection: &mut UnixStream) -> Result<Answer> {
    const HEADERS: &[u8] = b"\x83\x86\x40\x05:path\x20/SpiffeWorkloadAPI/FetchX509SVID\
        \x40\x0a:authority\x0erun%2Fapi.sock\x40\x0ccontent-type\x10application/grpc\
        \x40\x02te\x08trailers\x00\x12workload.spiffe.io\x04true";
    const END_HEADERS: u8 = 4;
    const END_STREAM: u8 = 1;
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        let head = [0, 0, payload.len() as u8, kind, flags, 0, 0, 0, stream];
        [&head[..], payload].concat()
    };
    let sent = [
        &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..],
        &frame(4, 0, 0, &[]),
        &frame(1, END_HEADERS, 1, HEADERS),
        &frame(0, END_STREAM, 1, &[0; 5]),
    ]
    .concat();
    connection.set_read_timeout(Some(TIMEOUT))?;
    // The server may have closed the connection already.
    let _ = connection.write_all(&sent);
    let mut data = Vec::new();
    loop {
        let mut head = [0; 9];
        match connection.read_exact(&mut head) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(Answer::Closed),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(Answer::Closed),
            read => read?,
        }
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        connection.read_exact(&mut payload)?;
        match head[3] {
            0 => data.extend(payload),
            1 if head[4] & END_STREAM != 0 => return Ok(Answer::Refused),
            3 => bail!("the stream is reset: {payload:?}"),
            _ => {}
        }
        let text = String::from_utf8_lossy(&data);
        if let Some((_, rest)) = text.split_once("spiffe://") {
            let id =
                rest.split(|byte: char| !byte.is_ascii_alphanumeric() && !"./-".contains(byte));
            let id = id.into_iter().next().unwrap_or_default();
            return Ok(Answer::Certificate(format!("spiffe://{id}")));
        }
    }
}

fn certificate(name: &str) -> Answer {
    Answer::Certificate(spiffe(name))
}

/// Waits until the daemon has logged that a caller is refused, of this pod or none, and why.
fn wait_refused(daemon: &Daemon, after: u64, pod: &str, why: &str) -> Result<()> {
    daemon.wait_for_log_after(after, "the refusal", TIMEOUT, |line| {
        line["message"] == "caller of the workload API refused"
            && line["pod"] == pod
            && line["pid"].as_u64().is_some_and(|pid| pid > 1)
            && line["reason"]
                .as_str()
                .is_some_and(|reason| reason.contains(why))
    })?;
    Ok(())
}

#[test]
fn pods_get_the_identity_of_their_own_account_if_it_is_allowed() -> Result<()> {
    for by_uid in [false, true] {
        let stage = Stage::set(by_uid)?;
        let daemon = stage.start(&stage.options.clone().capabilities(&chart::capabilities()?))?;
        for name in ["allowed", "crowd"] {
            ensure!(stage.ask(name)? == certificate(name), "{name}, {by_uid}");
        }
        let container = stage.pod("allowed").container("app")?;
        let answer = ask(&stage.socket, &container, &container)?;
        ensure!(answer == certificate("allowed"), "{answer:?}");
        let start = daemon.log_position();
        ensure!(stage.ask("other")? == Answer::Refused);
        wait_refused(&daemon, start, "default/other", "workloadApi.accounts")?;
    }
    Ok(())
}

#[test]
fn processes_outside_of_pods_are_refused() -> Result<()> {
    let stage = Stage::set(true)?;
    let daemon = stage.start(&stage.options)?;
    let node = stage.mesh.node("a").place();
    let start = daemon.log_position();
    ensure!(ask(&stage.socket, node, node)? == Answer::Refused);
    wait_refused(&daemon, start, "", "hostNetwork")?;
    let outside = stage.mesh.outside();
    ensure!(ask(&stage.socket, outside, outside)? == Answer::Refused);
    // One that has entered a pod's network namespace, as nsenter does.
    let allowed = stage.pod("allowed");
    let start = daemon.log_position();
    let mut entered = allowed.enter(|| UnixStream::connect(&stage.socket))??;
    ensure!(request(&mut entered)? == Answer::Refused);
    wait_refused(&daemon, start, "default/allowed", "no pod's cgroup")?;
    ensure!(stage.ask("allowed")? == certificate("allowed"));
    Ok(())
}

#[test]
fn a_socket_that_is_handed_on_gives_nobody_anothers_identity() -> Result<()> {
    for by_uid in [false, true] {
        let stage = Stage::set(by_uid)?;
        let daemon = stage.start(&stage.options)?;
        let [allowed, crowd, other] = ["allowed", "crowd", "other"].map(|name| stage.pod(name));
        // Created in a pod that may, connected by a process of another one.
        for thief in [&other, &crowd] {
            let refused = ask(&stage.socket, &allowed, thief)?;
            ensure!(refused == Answer::Refused, "{refused:?}");
        }
        let why = format!("in the cgroup of pod {}", other.uid());
        wait_refused(&daemon, 0, "default/allowed", &why)?;
        // And the other way round.
        let refused = ask(&stage.socket, &other, &allowed)?;
        ensure!(refused == Answer::Refused, "{refused:?}");
        // A process of the pod that has left its network namespace or its cgroup.
        let node = stage.mesh.node("a").place();
        for (created, process) in [(node, &*allowed), (&*allowed, node)] {
            let refused = ask(&stage.socket, created, process)?;
            ensure!(refused == Answer::Refused, "{refused:?}");
        }
        let moved = allowed.container_of(other.uid())?;
        let refused = ask(&stage.socket, &moved, &moved)?;
        ensure!(refused == Answer::Refused, "{refused:?}");
        ensure!(stage.ask("allowed")? == certificate("allowed"));
    }
    Ok(())
}

#[test]
fn a_pod_with_many_connections_keeps_no_other_from_the_api() -> Result<()> {
    let stage = Stage::set(false)?;
    let _daemon = stage.start(&stage.options)?;
    let crowd = stage.pod("crowd");
    let held = connect_in(&stage.socket, &crowd, &crowd, 500)?;
    ensure!(stage.ask("allowed")? == certificate("allowed"));
    let crowded = stage.ask("crowd")?;
    ensure!(crowded == Answer::Closed, "{crowded:?}");
    // Without a request, none of them stays open.
    eventually_ok(TIMEOUT, "the crowd to be served", || {
        let answer = stage.ask("crowd")?;
        ensure!(answer == certificate("crowd"), "{answer:?}");
        Ok(())
    })?;
    drop(held);
    Ok(())
}

#[test]
fn the_next_daemon_serves_at_the_same_path() -> Result<()> {
    let stage = Stage::set(true)?;
    let options = stage.options.clone().drain(Duration::from_secs(120));
    let mut first = stage.start(&options)?;
    let allowed = stage.pod("allowed");
    let mut before = connect_in(&stage.socket, &allowed, &allowed, 1)?;
    let before = &mut before.connections[0];
    ensure!(request(before)? == certificate("allowed"));
    let node = stage.mesh.node("a");
    let next = node.spawn_daemon(options.stand_by())?;
    next.wait_probed("standing by")?;
    ensure!(stage.ask("allowed")? == certificate("allowed"));
    first.process().signal(Signal::SIGTERM)?;
    next.wait_probed("ready")?;
    stage.wait_open(&next)?;
    ensure!(stage.ask("allowed")? == certificate("allowed"));
    // The client learns that it must connect again.
    match before.read_to_end(&mut Vec::new()) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => return Err(error.into()),
        _ => {}
    }

    // Whatever becomes of the file.
    fs::remove_file(&stage.socket)?;
    eventually_ok(TIMEOUT, "another socket", || {
        let answer = stage.ask("allowed")?;
        ensure!(answer == certificate("allowed"), "{answer:?}");
        Ok(())
    })?;
    let folder = stage.socket.parent().context("no folder")?;
    ensure!(fs::read_dir(folder)?.count() == 1, "nothing but the socket");

    drop(first);
    next.kill()?;
    ensure!(UnixStream::connect(&stage.socket).is_err());
    let _third = stage.start(&stage.options)?;
    ensure!(stage.ask("allowed")? == certificate("allowed"));
    Ok(())
}

#[test]
fn unload_removes_the_socket() -> Result<()> {
    let stage = Stage::set(false)?;
    let daemon = stage.start(&stage.options)?;
    daemon.terminate(TIMEOUT)?;
    ensure!(stage.socket.exists(), "it is to be replaced at once");
    stage.mesh.node("a").unload()?.ok()?;
    ensure!(!stage.socket.exists());
    let folder = stage.socket.parent().context("no folder")?;
    ensure!(folder.exists(), "pods have it mounted");
    Ok(())
}
