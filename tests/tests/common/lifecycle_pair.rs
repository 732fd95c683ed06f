//! Two nodes, a client on one and a server on the other.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_tests::{
    App, Daemon, DaemonOptions, Mesh, MeshBuilder, Pod, PodSpec, PodStatus, ServiceSpec, TIMEOUT,
    eventually_ok, slowdown,
};
use serde_json::Value;

/// A marker that must not be readable on the wire.
pub(crate) const MARKER: &str = "marker-that-nobody-may-read";
/// The service in front of `web`, port 80 to 8080.
pub(crate) const SERVICES: [&str; 2] = ["10.96.0.7:80", "[fd96::7]:80"];

/// `client` on node a and `web` on node b, each with its own service account, and a service in front of `web`.
pub(crate) fn pair() -> Mesh {
    builder().start().unwrap()
}

/// A [`pair`] that is not started.
pub(crate) fn builder() -> MeshBuilder {
    Mesh::builder()
        .node("a")
        .node("b")
        .pod(PodSpec::new("client").on("a").service_account("client"))
        .pod(
            PodSpec::new("web")
                .on("b")
                .service_account("web")
                .label("app", "web"),
        )
        .service(
            ServiceSpec::new("web")
                .selector("app", "web")
                .address("10.96.0.7")
                .address("fd96::7")
                .port(80, 8080),
        )
}

/// Starts daemons on both nodes of a [`pair`].
pub(crate) fn daemons(mesh: &Mesh) -> (Daemon, Daemon) {
    daemons_with(mesh, &DaemonOptions::default())
}

/// Starts daemons with options on both nodes of a [`pair`].
pub(crate) fn daemons_with(mesh: &Mesh, options: &DaemonOptions) -> (Daemon, Daemon) {
    let mut daemons = mesh.start_daemons_with(options).unwrap().into_iter();
    (daemons.next().unwrap(), daemons.next().unwrap())
}

/// A [`pair`], or a larger mesh, in which `web` echoes on port 8080. Fields are dropped in this order.
pub(crate) struct Echoing {
    /// The client's daemon.
    pub(crate) a: Daemon,
    /// The server's daemon.
    pub(crate) b: Daemon,
    pub(crate) client: Pod,
    pub(crate) web: Pod,
    _echo: App,
    pub(crate) mesh: Mesh,
}

impl Echoing {
    /// Starts a [`pair`] and its daemons.
    pub(crate) fn start() -> Self {
        Self::on(pair(), &DaemonOptions::default())
    }

    /// Starts the server and, with options, the daemons of a mesh that has the pods and nodes of a [`pair`].
    pub(crate) fn on(mesh: Mesh, options: &DaemonOptions) -> Self {
        let web = mesh.pod("web");
        let echo = web.app("echo-server --port 8080").unwrap();
        let echo = echo.listening().unwrap();
        let (a, b) = daemons_with(&mesh, options);
        Self {
            a,
            b,
            client: mesh.pod("client"),
            web,
            _echo: echo,
            mesh,
        }
    }
}

/// The addresses of `web`: its own and its service's, in both families.
pub(crate) fn ways(web: &Pod) -> [SocketAddr; 4] {
    let [v4, v6] = SERVICES.map(|service| service.parse().unwrap());
    [web.at(8080), web.at6(8080), v4, v6]
}

/// The daemon's status of a pod of its node, `namespace/name`, if the daemon knows it.
pub(crate) fn pod_status(daemon: &Daemon, name: &str) -> Option<PodStatus> {
    let status = daemon.status().ok()?;
    status.pods.into_iter().find(|pod| pod.pod == name)
}

/// Sends [`MARKER`] to an `echo-server` or `greeter` and reads to the end of the stream. Returns the last event,
/// whether it succeeded or not.
pub(crate) fn call(from: &mesh_tests::Place, to: SocketAddr) -> Value {
    let arguments = format!("connect --to {to} --timeout 10000 --send {MARKER} --shutdown --read");
    let mut events = from
        .app(&arguments)
        .unwrap()
        .finish(TIMEOUT)
        .unwrap()
        .json_lines();
    events.pop().unwrap()
}

/// Like [`call`], but must succeed and receive the marker.
pub(crate) fn echoes(from: &mesh_tests::Place, to: SocketAddr) {
    let answer = call(from, to);
    assert_eq!(
        (&answer["event"], &answer["text"]),
        (&"finished".into(), &MARKER.into()),
        "{} to {to}: {answer}",
        from.name()
    );
}

/// Waits until a call succeeds and receives the marker. Each node reads the manifests on its own: until both know a change,
/// a call may be refused.
pub(crate) fn becomes_reachable(from: &mesh_tests::Place, to: SocketAddr) {
    eventually_ok(TIMEOUT, &format!("{} to reach {to}", from.name()), || {
        let answer = call(from, to);
        anyhow::ensure!(answer["text"] == MARKER, "{answer}");
        Ok(())
    })
    .unwrap();
}

/// Asserts that what was tried several times takes no longer than `limit`: half of the tries, and the slowest no more than
/// three times as long. On a busy machine a single one may be held up.
pub(crate) fn assert_soon(mut took: Vec<Duration>, limit: Duration) {
    took.sort_unstable();
    let (median, slowest) = (took[took.len() / 2], took[took.len() - 1]);
    println!(
        "{} tries took {median:?}, the slowest {slowest:?}",
        took.len()
    );
    let limit = limit * slowdown();
    assert!(median < limit && slowest < 3 * limit, "{took:?}");
}

/// Asserts that the event reports a connection that was reset, not closed cleanly.
pub(crate) fn assert_reset(event: &Value) {
    // If the RST arrived before shutdown(2), there was no connection left to shut down.
    let already = event["stage"] == "shutdown" && event["errno"] == "ENOTCONN";
    assert!(already || event["errno"] == "ECONNRESET", "{event}");
}

/// Asserts that connect(2) itself was refused.
pub(crate) fn assert_refused(event: &Value) {
    assert_eq!(
        (&event["stage"], &event["errno"]),
        (&"connect".into(), &"ECONNREFUSED".into()),
        "{event}"
    );
}
