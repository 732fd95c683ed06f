//! Misbehaving servers, each on a port of a pod without a daemon, and an application that calls all of them through the
//! daemon of its own node.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mesh_tests::{
    App, Daemon, InProcess, Mesh, PodSpec, Result, Snapshot, TIMEOUT, eventually_ok, slowdown,
};

use super::hostile::{Authority, Faults, PATIENCE, spiffe};

/// What the application sends; no server here must receive it.
const SECRET: &str = "for-web-only";
/// Time limit for the application to get a result.
const BOUND: Duration = Duration::from_secs(12);
pub(crate) const FIRST_PORT: u16 = 9000;

/// What the server does with a connection.
type Behaviour = Box<dyn Fn(TcpStream) -> io::Result<()> + Send + Sync>;

pub(crate) struct Case {
    what: &'static str,
    behaviour: Behaviour,
    result: &'static str,
    reason: &'static str,
}

pub(crate) fn case(
    what: &'static str,
    (result, reason): (&'static str, &'static str),
    behaviour: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
) -> Case {
    let behaviour = Box::new(behaviour);
    Case {
        what,
        behaviour,
        result,
        reason,
    }
}

/// Payloads of DATA frames that servers received; must stay empty.
pub(crate) type Leaks = Arc<Mutex<Vec<String>>>;

/// Node a with a client and a daemon, and node b with the hostile pod `web` and no daemon.
pub(crate) fn mesh() -> Result<(Mesh, Daemon, Authority)> {
    let mesh = Mesh::builder()
        .node("a")
        .node("b")
        .pod(PodSpec::new("client").on("a").service_account("client"))
        .pod(PodSpec::new("web").on("b").service_account("web"))
        .start()?;
    let daemon = mesh.node("a").start_daemon()?;
    daemon.wait_enrolled(&["default/client"])?;
    let authority = Authority::stolen(&mesh.node("a").ca_folder())?;
    Ok((mesh, daemon, authority))
}

pub(crate) type Extra = (u16, &'static str, (&'static str, &'static str));

/// Calls every server at once from an application, each on its own port, and checks the outcome and the log.
pub(crate) fn run(
    mesh: &Mesh,
    daemon: &Daemon,
    cases: Vec<Case>,
    extras: &[Extra],
    faults: &mut Faults,
) -> Result<()> {
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let mut expected = extras.to_vec();
    let mut servers = Vec::new();
    for (port, case) in (FIRST_PORT..).zip(cases) {
        expected.push((port, case.what, (case.result, case.reason)));
        servers.push(InProcess::start(&web, web.at(port), move |tcp, _| {
            // The server's own outcome does not matter.
            let _ = (case.behaviour)(tcp);
        })?);
    }
    let start = Instant::now();
    let apps: Vec<(Extra, App)> = expected
        .into_iter()
        .map(|extra| {
            let to = web.at(extra.0);
            // Reads to the end without shutting down its own direction. A clean end counts as an answer, everything
            // else is an error.
            let app = client.app(&format!("connect --to {to} --send {SECRET} --read"))?;
            Ok((extra, app))
        })
        .collect::<Result<_>>()?;
    for ((port, what, (result, reason)), app) in apps {
        let finished = app.finish(BOUND).map_err(|error| error.context(what))?;
        faults.check(start.elapsed() < BOUND * slowdown(), || {
            format!("{what}: the app knows after {:?}", start.elapsed())
        });
        // An END frame is a clean end by the server; everything else is an error to the application.
        let ended = what.ends_with("after END") && finished.status.success();
        let says = |error| finished.stdout.contains(error);
        let reset = !finished.status.success() && (says("ECONNRESET") || says("EPIPE"));
        faults.check(ended || reset, || {
            format!("{what}: the app sees {}", finished.stdout)
        });
        let line = line_to(daemon, web.at(port), what, faults)?;
        let logged = line["reason"].as_str().unwrap_or_default();
        println!("{what}: {} {logged}", line["result"]);
        faults.check(line["result"] == result, || {
            format!("{what}: not {result}: {line}")
        });
        faults.check(
            logged.to_lowercase().contains(&reason.to_lowercase()),
            || format!("{what}: the reason is to say {reason:?}: {line}"),
        );
        faults.check(line["client_identity"] == spiffe("client"), || {
            format!("{what}: who called? {line}")
        });
        faults.check(!logged.chars().any(char::is_control), || {
            format!("{what}: raw: {line}")
        });
    }
    Ok(())
}

/// The one log line of the connections to this address.
fn line_to(
    daemon: &Daemon,
    to: SocketAddr,
    what: &str,
    faults: &mut Faults,
) -> Result<serde_json::Value> {
    let is = |line: &serde_json::Value| line["destination"] == to.to_string();
    let line = daemon.wait_for_access(what, PATIENCE, is)?;
    let count = daemon.access_log().iter().filter(|line| is(line)).count();
    faults.check(count == 1, || format!("{what}: {count} lines in the log"));
    Ok(line)
}

pub(crate) fn leak(leaks: &Leaks, what: &str, kind: u8, payload: &[u8]) {
    let payload = String::from_utf8_lossy(payload);
    let mut leaks = leaks.lock().expect("no holder panics");
    leaks.push(format!("{what} got a frame of type {kind}: {payload:?}"));
}

pub(crate) fn no_leaks(leaks: &Leaks, faults: &mut Faults) {
    let leaks = leaks.lock().expect("no holder panics");
    faults.check(leaks.is_empty(), || format!("{leaks:?}"));
}

/// Asserts that the daemon is running, and that nothing of the connections is left.
pub(crate) fn unharmed(mesh: &Mesh, mut daemon: Daemon, before: &Snapshot) {
    assert!(
        daemon.is_running(),
        "the daemon died: {}",
        daemon.log_text()
    );
    assert!(
        !daemon.log_text().contains("panicked"),
        "{}",
        daemon.log_text()
    );
    eventually_ok(TIMEOUT, "nothing to be left", || {
        let now = Snapshot::take(&daemon, &[mesh.pod("client").place()])?;
        let growth = now.growth_since(before, 16 * 1024, 2);
        anyhow::ensure!(growth.is_empty(), "{growth:?}");
        Ok(())
    })
    .unwrap_or_else(|error| panic!("something leaks: {error:#}"));
}

/// Keeps a connection open until the other side closes it.
pub(crate) fn hold(mut tcp: &TcpStream) -> io::Result<()> {
    tcp.set_read_timeout(Some(PATIENCE))?;
    let mut buffer = [0; 4096];
    while tcp.read(&mut buffer)? > 0 {}
    Ok(())
}
