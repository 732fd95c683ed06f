//! A new pod is closed until there is a verdict on it, with or without a daemon: until it is enrolled, or known to be
//! outside the mesh. The pods here are found by their UID, as the kubelet's are.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mesh_tests::{
    App, Context, Daemon, Mesh, Place, Pod, PodSpec, Result, TIMEOUT, eventually_ok, slowdown,
};
use serde_json::Value;

use crate::common::by_uid::{daemons, pair, pause};
use crate::common::lifecycle_pair::{MARKER, assert_soon};

const PORT: u16 = 8080;
/// How long a caller waits that must not get an answer: longer than until its second SYN.
const SILENCE: Duration = Duration::from_millis(1500);
/// How long a caller waits that must get an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How soon a pod outside the mesh must be open when the daemon runs again: a start of the daemon, and a repeated SYN.
const SOON: Duration = Duration::from_secs(8);

fn spec(name: &str) -> PodSpec {
    PodSpec::new(name).service_account(name).on("b").by_uid()
}

fn outside_the_mesh(name: &str) -> PodSpec {
    spec(name).annotation("auth-daemon.io/mesh", "disabled")
}

/// Starts an echo server in the first container of a pod, and waits until it listens.
fn serve(pod: &Pod) -> Result<App> {
    let container = pod.container("app")?;
    container
        .app(&format!("echo-server --port {PORT}"))?
        .listening()
}

/// Sends [`MARKER`] and reads the answer. Returns the last event.
fn call(from: &Place, to: SocketAddr, timeout: Duration) -> Result<Value> {
    let timeout = timeout.as_millis();
    let command =
        format!("connect --to {to} --timeout {timeout} --send {MARKER} --shutdown --read");
    let events = from.app(&command)?.finish(TIMEOUT)?.json_lines();
    events.last().cloned().context("no event")
}

fn is_answered(from: &Place, to: SocketAddr, timeout: Duration) -> Result<bool> {
    Ok(call(from, to, timeout)?["text"] == MARKER)
}

fn becomes_answered(from: &Place, to: SocketAddr) -> Result<()> {
    eventually_ok(TIMEOUT, &format!("an answer at {to}"), || {
        let last = call(from, to, SILENCE)?;
        let is_answered = last["text"] == MARKER;
        is_answered.then_some(()).with_context(|| last.to_string())
    })
}

fn of_outside(mesh: &Mesh) -> [IpAddr; 2] {
    [mesh.outside_ipv4().into(), mesh.outside_ipv6().into()]
}

/// The connections that a server has accepted from these addresses. What it accepted from others just before may not be
/// among its events yet.
fn accepted_from(app: &App, addresses: &[IpAddr]) -> Vec<Value> {
    let is_from = |event: &Value| {
        let peer = event["peer"].as_str().unwrap_or_default();
        peer.parse::<SocketAddr>()
            .is_ok_and(|peer| addresses.contains(&peer.ip()))
    };
    let mut accepted = app.events_of("accepted");
    accepted.retain(is_from);
    accepted
}

/// Asserts that a new pod of node b, whose server is `app`, is closed: to callers beyond its node, and to the mesh.
fn assert_closed(mesh: &Mesh, pod: &Pod, app: &App) -> Result<()> {
    let node = mesh.node("a");
    let others = [of_outside(mesh), [node.ipv4().into(), node.ipv6().into()]].concat();
    let accepted = accepted_from(app, &others);
    for to in [pod.at(PORT), pod.at6(PORT)] {
        for from in [mesh.outside(), node.place()] {
            let last = call(from, to, SILENCE)?;
            assert_eq!(last["event"], "failed", "{to} from {}: {last}", from.name());
        }
    }
    let now = accepted_from(app, &others);
    assert_eq!(now, accepted, "nothing arrived");
    // The node itself, such as the kubelet's probes, and the pod itself.
    for to in [pod.at(PORT), pod.at6(PORT)] {
        assert!(
            is_answered(mesh.node("b"), to, PATIENCE)?,
            "{to} from the node"
        );
    }
    let itself = pod.container("itself")?;
    let local = SocketAddr::from(([127, 0, 0, 1], PORT));
    assert!(is_answered(&itself, local, PATIENCE)?, "its loopback");
    let web = mesh.pod("web");
    for to in [web.at(PORT), web.at6(PORT), "10.96.0.7:80".parse()?] {
        let last = call(&itself, to, SILENCE)?;
        assert_eq!(last["event"], "failed", "{to} from the pod: {last}");
    }
    let beyond = SocketAddr::from((mesh.outside_ipv4(), PORT));
    assert!(is_answered(&itself, beyond, PATIENCE)?, "not to the mesh");
    Ok(())
}

/// The mesh of [`pair`] with servers, and daemons that have enrolled its pods.
struct Stage {
    a: Daemon,
    b: Daemon,
    client: Place,
    _servers: Vec<App>,
    mesh: Mesh,
}

impl Stage {
    fn start() -> Result<Self> {
        let mesh = pair();
        let client = mesh.pod("client").container("app")?;
        let web = serve(&mesh.pod("web"))?;
        let client_server = serve(&mesh.pod("client"))?;
        let beyond = mesh.outside().app(&format!("echo-server --port {PORT}"))?;
        let servers = vec![web, client_server, beyond.listening()?];
        let (a, b) = daemons(&mesh);
        a.wait_enrolled(&["default/client"])?;
        b.wait_enrolled(&["default/web"])?;
        Ok(Self {
            a,
            b,
            client,
            _servers: servers,
            mesh,
        })
    }
}

/// Asserts that a new pod of the mesh becomes reachable through tunnels, and only through them.
fn becomes_enrolled(stage_mesh: &Mesh, client: &Place, pod: &Pod, app: &App) -> Result<()> {
    let capture = stage_mesh.wire().capture()?;
    for to in [pod.at(PORT), pod.at6(PORT)] {
        becomes_answered(client, to)?;
    }
    let own = pod.container("client")?;
    becomes_answered(&own, stage_mesh.pod("client").at(PORT))?;
    let accepted = accepted_from(app, &of_outside(stage_mesh));
    for to in [pod.at(PORT), pod.at6(PORT)] {
        assert!(!is_answered(stage_mesh.outside(), to, SILENCE)?, "{to}");
    }
    assert_eq!(accepted_from(app, &of_outside(stage_mesh)), accepted);
    // What the caller beyond the mesh has sent is readable, but only that.
    let outside = stage_mesh.outside_ipv4();
    let others = capture
        .stop()?
        .only(|packet| packet.source.ip() != outside && packet.source.is_ipv4());
    assert!(
        !others.contains(MARKER.as_bytes()),
        "plaintext between pods"
    );
    Ok(())
}

#[test]
fn a_pod_that_starts_while_the_daemon_is_dead_is_closed_until_it_is_enrolled() -> Result<()> {
    let stage = Stage::start()?;
    let Stage {
        a,
        b,
        client,
        mesh,
        _servers,
    } = stage;
    b.kill()?;
    let pod = mesh.add_pod(spec("late"))?;
    let _pause = pause(&pod);
    let app = serve(&pod)?;
    assert_closed(&mesh, &pod, &app)?;
    let _b = mesh.node("b").start_daemon()?;
    becomes_enrolled(&mesh, &client, &pod, &app)?;
    drop(a);
    Ok(())
}

#[test]
fn a_pod_that_starts_while_the_daemon_is_stopped_is_closed_until_it_is_enrolled() -> Result<()> {
    let mut stage = Stage::start()?;
    stage.b.process().suspend()?;
    let pod = stage.mesh.add_pod(spec("late"))?;
    let _pause = pause(&pod);
    let app = serve(&pod)?;
    assert_closed(&stage.mesh, &pod, &app)?;
    stage.b.process().resume()?;
    becomes_enrolled(&stage.mesh, &stage.client, &pod, &app)?;
    drop(stage.a);
    Ok(())
}

#[test]
fn a_pod_outside_the_mesh_waits_for_the_daemon() -> Result<()> {
    let Stage { b, mesh, .. } = &mut Stage::start()?;
    b.process().suspend()?;
    let pod = mesh.add_pod(outside_the_mesh("stranger"))?;
    let _pause = pause(&pod);
    let app = serve(&pod)?;
    assert_closed(mesh, &pod, &app)?;
    // A connect from before does not fail, but waits.
    let waiting = format!(
        "connect --to {} --timeout 60000 --send {MARKER} --shutdown --read",
        pod.at(PORT)
    );
    let waiting = mesh.outside().app(&waiting)?;
    thread::sleep(Duration::from_millis(100));
    b.process().resume()?;
    let since = Instant::now();
    let events = waiting.finish(TIMEOUT)?.json_lines();
    assert_eq!(
        events.last().context("no event")?["text"],
        MARKER,
        "{events:?}"
    );
    eprintln!(
        "a caller that was waiting was answered after {:?}",
        since.elapsed()
    );
    assert!(since.elapsed() < SOON * slowdown(), "{:?}", since.elapsed());
    for to in [pod.at(PORT), pod.at6(PORT)] {
        assert!(is_answered(mesh.outside(), to, PATIENCE)?);
    }
    // It dials the mesh as before: a STRICT pod refuses it, and the kernel of its own node does not.
    let last = call(
        &pod.container("client")?,
        mesh.pod("client").at(PORT),
        SILENCE,
    )?;
    assert_ne!(last["errno"], "EPERM", "{last}");
    // Nothing more is to be decided when the daemon goes.
    b.process().suspend()?;
    let again = pod.container("again")?;
    let mut server = again.app("echo-server --port 8081")?.listening()?;
    assert!(is_answered(mesh.outside(), pod.at(8081), PATIENCE)?);
    server.event("accepted", TIMEOUT)?;
    b.process().resume()?;
    Ok(())
}

#[test]
fn a_new_pod_outside_the_mesh_is_open_at_once_while_the_daemon_runs() -> Result<()> {
    const PODS: usize = 20;
    let stage = Stage::start()?;
    let mut took = Vec::new();
    for number in 0..PODS {
        let pod = stage
            .mesh
            .add_pod(outside_the_mesh(&format!("stranger-{number}")))?;
        let _pause = pause(&pod);
        let since = Instant::now();
        let _app = serve(&pod)?;
        let before = since.elapsed();
        // Shorter than until a SYN is repeated.
        eventually_ok(TIMEOUT, "an answer", || {
            let timeout = Duration::from_millis(100);
            let is_answered = is_answered(stage.mesh.outside(), pod.at(PORT), timeout)?;
            is_answered.then_some(()).context("none")
        })?;
        took.push(since.elapsed().saturating_sub(before));
    }
    assert_soon(took, Duration::from_secs(2));
    Ok(())
}

#[test]
fn a_pod_outside_the_mesh_is_not_cut_off_when_the_first_daemon_starts() -> Result<()> {
    let mesh = pair();
    let pod = mesh.add_pod(outside_the_mesh("stranger"))?;
    let _pause = pause(&pod);
    let _before = serve(&pod)?;
    let place = pod.container("again")?;
    let mut servers = Vec::new();
    let call_all = |ports: std::ops::RangeInclusive<u16>| -> Result<()> {
        for port in ports {
            let is_answered =
                is_answered(mesh.outside(), pod.at(port), Duration::from_millis(900))?;
            assert!(is_answered, "port {port}, at the first attempt");
        }
        Ok(())
    };
    call_all(PORT..=PORT)?;
    let mut daemon = mesh.node("b").spawn_daemon(Default::default())?;
    // Its sockets are created before the programs are attached, in between, and after.
    let mut port = PORT;
    while !daemon.is_ready() {
        port += 1;
        let app = place.app(&format!("echo-server --port {port}"))?;
        servers.push(app.listening()?);
        call_all(port..=port)?;
    }
    daemon.wait_ready()?;
    call_all(PORT..=port)?;
    Ok(())
}

#[test]
fn a_pod_that_leaves_the_mesh_or_joins_it_stays_as_open_as_it_may_be() -> Result<()> {
    let stage = Stage::start()?;
    let pod = stage.mesh.add_pod(outside_the_mesh("stranger"))?;
    let _pause = pause(&pod);
    let app = serve(&pod)?;
    becomes_answered(stage.mesh.outside(), pod.at(PORT))?;
    let addresses = || anyhow::Ok(stage.a.status()?.kernel.mesh_addresses);
    let before = addresses()?;
    let mut manifest = pod.manifest();
    manifest["metadata"]["annotations"]["auth-daemon.io/mesh"] = "enabled".into();
    stage.mesh.manifests().apply(&manifest)?;
    stage.b.wait_enrolled(&["default/stranger"])?;
    // Until the client's node knows, too, the client sends it plaintext.
    eventually_ok(TIMEOUT, "node a to know the pod's addresses", || {
        let now = addresses()?;
        anyhow::ensure!(now == before + 2, "{now} addresses, {before} before");
        Ok(())
    })?;
    becomes_enrolled(&stage.mesh, &stage.client, &pod, &app)?;
    stage.mesh.manifests().apply(&pod.manifest())?;
    becomes_answered(stage.mesh.outside(), pod.at(PORT))?;
    // Also a socket that it creates after its release.
    let second = pod.container("second")?;
    let _second = second.app("echo-server --port 8081")?.listening()?;
    becomes_answered(stage.mesh.outside(), pod.at(8081))?;
    Ok(())
}

#[test]
fn a_namespace_nested_in_a_pod_is_open_once_its_pod_has_a_verdict() -> Result<()> {
    let stage = Stage::start()?;
    for name in ["stranger", "member"] {
        let spec = match name {
            "stranger" => outside_the_mesh(name),
            _ => spec(name),
        };
        let pod = stage.mesh.add_pod(spec)?;
        let _pause = pause(&pod);
        let (nested, address, _) = stage.mesh.nest(&pod)?;
        let app = nested.app(&format!("echo-server --port {PORT}"))?;
        let _app = app.listening()?;
        becomes_answered(&pod.container("client")?, (address, PORT).into())?;
        stage.mesh.remove_pod(name)?;
    }
    Ok(())
}

/// What happens to the daemon of node b while pods start there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Runs,
    IsDead,
    /// It is killed and started, again and again.
    Restarts,
    /// By SIGSTOP.
    IsStopped,
}

/// Pods that start in each test. `FIRST_MOMENT_PODS` is another number.
fn first_moment_pods() -> Result<usize> {
    match std::env::var("FIRST_MOMENT_PODS") {
        Ok(number) => number.parse().context("FIRST_MOMENT_PODS"),
        Err(_) => Ok(30),
    }
}

/// Starts pods. Their first connects and the first to them, all at once, send and deliver no plaintext, and all that should
/// pass does as soon as there is a daemon. The servers of these pods accept any caller.
fn first_moments(fate: Fate) -> Result<()> {
    let Stage {
        a,
        mut b,
        client,
        _servers,
        mesh,
    } = Stage::start()?;
    let capture = mesh.wire().capture()?;
    let stop = AtomicBool::new(false);
    let mut pods = Vec::new();
    let mut b = match fate {
        Fate::IsDead => {
            b.kill()?;
            None
        }
        Fate::IsStopped => {
            b.process().suspend()?;
            Some(b)
        }
        Fate::Runs | Fate::Restarts => Some(b),
    };
    let b = thread::scope(|scope| -> Result<Option<Daemon>> {
        let restarts = scope.spawn(|| -> Result<Option<Daemon>> {
            while fate == Fate::Restarts && !stop.load(Ordering::Relaxed) {
                b.take().map_or(Ok(()), Daemon::kill)?;
                thread::sleep(Duration::from_millis(300));
                b = Some(mesh.node("b").start_daemon()?);
            }
            Ok(b)
        });
        let started = (0..first_moment_pods()?).try_for_each(|number| -> Result<()> {
            let pod = mesh.add_pod(spec(&format!("late-{number}")))?;
            let app = serve(&pod)?;
            let to_client = format!(
                "connect --to {} --timeout 300 --send {MARKER}",
                mesh.pod("client").at(PORT)
            );
            let from_outside = format!("connect --to {} --timeout 300 --send hello", pod.at(PORT));
            let calls = [
                pod.container("client")?.app(&to_client)?,
                mesh.outside().app(&from_outside)?,
            ];
            for call in calls {
                call.finish(TIMEOUT)?;
            }
            pods.push((pod, app));
            Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        let b = restarts.join().expect("the restarts do not panic")?;
        started?;
        Ok(b)
    })?;
    let recording = capture.stop()?;
    assert!(!recording.contains(MARKER.as_bytes()), "plaintext");
    for (pod, app) in &pods {
        let accepted = app.events_of("accepted");
        let outside = mesh.outside_ipv4().to_string();
        let from_outside = accepted
            .iter()
            .filter(|event| event.to_string().contains(&outside));
        assert_eq!(from_outside.count(), 0, "{}: {accepted:?}", pod.name());
    }
    let b = match b {
        Some(mut b) => {
            b.process().resume()?;
            b
        }
        None => mesh.node("b").start_daemon()?,
    };
    for (pod, _) in &pods {
        becomes_answered(&client, pod.at(PORT))?;
        becomes_answered(&pod.container("client")?, mesh.pod("client").at(PORT))?;
    }
    drop((a, b));
    Ok(())
}

#[test]
fn pods_that_start_while_the_daemon_runs_send_and_accept_no_plaintext() -> Result<()> {
    first_moments(Fate::Runs)
}

#[test]
fn pods_that_start_while_the_daemon_is_dead_send_and_accept_no_plaintext() -> Result<()> {
    first_moments(Fate::IsDead)
}

#[test]
fn pods_that_start_while_the_daemon_restarts_send_and_accept_no_plaintext() -> Result<()> {
    first_moments(Fate::Restarts)
}

#[test]
fn pods_that_start_while_the_daemon_is_stopped_send_and_accept_no_plaintext() -> Result<()> {
    first_moments(Fate::IsStopped)
}

#[test]
fn unload_opens_new_pods() -> Result<()> {
    let Stage {
        b, mesh, _servers, ..
    } = Stage::start()?;
    b.kill()?;
    let pod = mesh.add_pod(spec("late"))?;
    let _pause = pause(&pod);
    let app = serve(&pod)?;
    assert_closed(&mesh, &pod, &app)?;
    mesh.node("b").unload()?.ok()?;
    // The kernel detaches a program soon after its link's pin is removed.
    becomes_answered(mesh.outside(), pod.at(PORT))?;
    Ok(())
}
