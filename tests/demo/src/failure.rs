//! Behaviour without a daemon: refused while its programs are loaded, plaintext after they are unloaded.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use mesh_tests::{Pod, Recording, TcpState};

use super::evidence::Evidence;
use super::stage::{CLIENT, NODE_A, NODE_B, PORT, Stage, WEB, soon};

pub(super) fn fail_closed(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    client_daemon(stage, evidence)?;
    server_daemon(stage, evidence)
}

fn client_daemon(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let client = stage.mesh.pod(CLIENT);
    stage.take_daemon(NODE_A)?.kill()?;
    evidence.saw(format!("kill -9 of the daemon on {NODE_A}"));
    tunnels_have_ended(&client)?;
    let capture = stage.mesh.wire().capture()?;
    let pod = stage.mesh.pod("web-1").at(PORT);
    for server in [pod, SocketAddr::new(WEB.parse()?, 80)] {
        let why = stage.ask_in_vain(&client, server, &stage.path("killed"))?;
        evidence.saw(format!("curl http://{server}: {why}"));
    }
    let recording = capture.stop()?;
    let sent = of(&recording, client.ipv4().into());
    evidence.saw(format!(
        "packets of the client pod on the wire: {}",
        sent.packets().len()
    ));
    ensure!(
        sent.packets().is_empty(),
        "something crossed the wire: {:?}",
        sent.connections()
    );
    come_back(stage, NODE_A, evidence)
}

/// Waits until a pod has no connections: the kernel ends a killed daemon's tunnels in order, which takes some packets.
fn tunnels_have_ended(pod: &Pod) -> Result<()> {
    soon("the killed daemon's tunnels to end", || {
        let sockets = pod.endpoints().ok()?;
        let mut open = sockets
            .iter()
            .filter(|socket| socket.remote.port() != 0 && socket.state != TcpState::TimeWait);
        open.next().is_none().then_some(())
    })
}

fn server_daemon(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (client, web) = (stage.mesh.pod(CLIENT), stage.mesh.pod("web-1"));
    stage.take_daemon(NODE_B)?.kill()?;
    evidence.saw(format!("kill -9 of the daemon on {NODE_B}"));
    // The client's daemon ends its side of them with a TLS alert.
    tunnels_have_ended(&web)?;
    tunnels_have_ended(&client)?;
    let capture = stage.mesh.wire().capture()?;
    let path = stage.path("killed");
    let why = stage.ask_in_vain(&client, web.at(PORT), &path)?;
    evidence.saw(format!(
        "curl from the client pod to http://{}: {why}",
        web.at(PORT)
    ));
    let why = stage.ask_in_vain(stage.mesh.outside(), web.at(PORT), &path)?;
    evidence.saw(format!(
        "curl from outside to http://{}: {why}",
        web.at(PORT)
    ));
    let recording = capture.stop()?;
    let bytes = of(&recording, web.ipv4().into()).payload_bytes();
    evidence.saw(format!(
        "bytes that packets from and to the server pod carried: {bytes}"
    ));
    ensure!(bytes == 0, "data was sent without a daemon");
    come_back(stage, NODE_B, evidence)?;
    ensure!(
        stage.requests("web-1", &path).is_empty(),
        "a refused request reached nginx"
    );
    Ok(())
}

fn come_back(stage: &mut Stage, node: &'static str, evidence: &Evidence) -> Result<()> {
    let start = Instant::now();
    let pid = stage.start_daemon(node)?.pid();
    let time = start.elapsed();
    let path = stage.path(&format!("restarted-{node}"));
    let answer = stage.ask(stage.mesh.pod("web-1").at(PORT), &path)?;
    stage.request("web-1", &path)?;
    evidence.saw(format!(
        "a new daemon on {node} (process {pid}) was ready after {} ms; the same curl got {:?}",
        time.as_millis(),
        answer.body
    ));
    Ok(())
}

fn of(recording: &Recording, address: IpAddr) -> Recording {
    recording.only(|packet| packet.touches(address))
}

pub(super) fn unload(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    for node in [NODE_A, NODE_B] {
        let status = stage.take_daemon(node)?.terminate(STOP)?;
        ensure!(status.success(), "the daemon on {node} ended with {status}");
        let stdout = stage.mesh.node(node).unload()?.ok()?.stdout;
        evidence.saw(format!(
            "{node}: SIGTERM, exit 0; auth-daemon unload: {}",
            stdout.trim()
        ));
        let pins = stage.mesh.node(node).pins();
        ensure!(!pins.exists(), "{} is still there", pins.display());
    }
    for pod in stage.mesh.pods() {
        let rules = pod.run("ip", ["rule", "show"])?.ok()?.stdout;
        let routes = pod
            .run("ip", ["route", "show", "table", "all"])?
            .ok()?
            .stdout;
        let sysctl = pod.enter(|| fs::read_to_string(Path::new(FWMARK_ACCEPT)))??;
        let listeners = pod
            .endpoints()?
            .iter()
            .filter(|socket| {
                // Sockets in TIME-WAIT belong to the kernel, for a minute at most.
                socket.state != TcpState::TimeWait && DAEMON_PORTS.contains(&socket.local.port())
            })
            .count();
        let rules = rules.lines().filter(|rule| rule.contains("fwmark")).count();
        let routes = routes
            .lines()
            .filter(|route| route.contains(ROUTE_TABLE))
            .count();
        if (rules, routes, sysctl.trim(), listeners) != (0, 0, "0", 0) {
            bail!(
                "{} keeps {rules} rules, {routes} routes, {listeners} sockets, tcp_fwmark_accept {}",
                pod.name(),
                sysctl.trim()
            );
        }
    }
    evidence.saw(
        "no pod keeps a rule, a route, a sysctl or a socket of the daemon's, and no pin is left",
    );
    let capture = stage.mesh.wire().capture()?;
    let answer = stage.ask(stage.mesh.pod("web-1").at(PORT), &stage.path("unloaded"))?;
    let readable = capture.stop()?.contains(stage.marker.as_bytes());
    evidence.saw(format!(
        "curl got {:?}, readable on the wire again: {readable}",
        answer.body
    ));
    ensure!(readable, "something still encrypts");
    Ok(())
}

/// Time limit for a daemon to drain; no connection is open.
const STOP: Duration = Duration::from_secs(10);
const FWMARK_ACCEPT: &str = "/proc/sys/net/ipv4/tcp_fwmark_accept";
/// The routing table as `ip route` prints it.
const ROUTE_TABLE: &str = "table 15006";
/// Listeners inside pods.
const DAEMON_PORTS: [u16; 2] = [15001, 15008];
