//! Connections through a service: the choice of an endpoint, and failover to another.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_tests::{
    Daemon, Firewall, InProcess, Mesh, Nginx, Pod, PodSpec, Result, ServiceSpec, TIMEOUT, slowdown,
};

use crate::common::pair::{self, Pair};

#[test]
fn both_endpoints_are_used() -> Result<()> {
    let three = Three::start()?;
    for service in [SERVICE, "[fd96::8]:80"] {
        let answers = three.ask(service, 40)?;
        assert_eq!(answers.len(), 2, "{service}: {answers:?}");
    }
    Ok(())
}

#[test]
fn silent_endpoint_fails_over_to_the_other() -> Result<()> {
    let three = Three::start()?;
    let _firewall = three.silence("b")?;
    three.all_answered_by("two")
}

#[test]
fn endpoint_that_becomes_silent_fails_over_to_the_other() -> Result<()> {
    let three = Three::start()?;
    // There are idle tunnels to both endpoints when one becomes silent.
    assert_eq!(three.ask(SERVICE, 20)?.len(), 2);
    let _firewall = three.silence("b")?;
    three.all_answered_by("two")
}

#[test]
fn endpoint_with_a_hung_daemon_fails_over_to_the_other() -> Result<()> {
    let three = Three::start()?;
    // Its kernel still accepts connections.
    let hung = three.daemons.iter().find(|daemon| daemon.node() == "b");
    let hung = hung.expect("node b has a daemon");
    hung.suspend()?;
    let result = three.all_answered_by("two");
    hung.resume()?;
    result
}

#[test]
fn endpoint_without_an_app_fails_over_to_the_other() -> Result<()> {
    let mut three = Three::start()?;
    three.servers.remove(0);
    three.all_answered_by("two")
}

#[test]
fn a_port_that_the_service_does_not_have_is_refused() -> Result<()> {
    let pair = Pair::start()?;
    // The pod listens on this port, but the service does not have it.
    let _nginx = Nginx::start(&pair.web, 8080, "answer")?;
    for to in ["10.96.0.7:8080", "[fd96::7]:443"] {
        let failed = pair
            .client
            .app(&format!("connect --to {to} --send hello --read"))?
            .failure(TIMEOUT)?;
        assert_eq!(failed["errno"], "ECONNRESET", "{failed}");
        let line = pair
            .near
            .wait_for_access("the refusal", TIMEOUT, |line| line["destination"] == to)?;
        assert_eq!(line["result"], "refused", "{line}");
        let port = to.rsplit(':').next().unwrap_or_default();
        assert!(
            line["reason"]
                .as_str()
                .is_some_and(|reason| reason.contains("default/web") && reason.contains(port)),
            "{line}"
        );
    }
    Ok(())
}

#[test]
fn a_service_without_a_ready_endpoint_is_refused() -> Result<()> {
    let pair = Pair::start_with(&Default::default(), |builder| {
        let starting = PodSpec::new("starting").on("b").service_account("web");
        let service = ServiceSpec::new("starting").selector("app", "starting");
        builder
            .pod(starting.label("app", "starting").not_ready())
            .service(service.address("10.96.0.9").port(80, 8080))
    })?;
    let _nginx = Nginx::start(&pair.mesh.pod("starting"), 8080, "too early")?;
    let failed = pair
        .client
        .app("connect --to 10.96.0.9:80 --send hello --read")?
        .failure(TIMEOUT)?;
    assert_eq!(failed["errno"], "ECONNRESET", "{failed}");
    let line = pair.near.wait_for_access("the refusal", TIMEOUT, |line| {
        line["destination"] == "10.96.0.9:80"
    })?;
    assert_eq!(line["result"], "refused", "{line}");
    assert!(
        line["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains("no ready endpoint")),
        "{line}"
    );
    Ok(())
}

#[test]
fn a_port_may_be_named_differently_by_each_pod() -> Result<()> {
    let pair = Pair::start_with(&Default::default(), |builder| {
        let other = PodSpec::new("other").on("b").service_account("web");
        builder.pod(other.label("app", "web").port("http", 9090))
    })?;
    let other = pair.mesh.pod("other");
    let _web = Nginx::start(&pair.web, 8081, "web")?;
    let _other = Nginx::start(&other, 9090, "other")?;
    let mut answers = BTreeMap::new();
    for _ in 0..40 {
        let url = "http://10.96.0.7:81/";
        let curl = pair.client.run("curl", ["-sS", "-m", "30", url])?.ok()?;
        *answers.entry(curl.stdout).or_insert(0) += 1;
    }
    assert_eq!(answers.keys().collect::<Vec<_>>(), ["other", "web"]);
    Ok(())
}

#[test]
fn a_pod_reaches_itself_through_its_own_service() -> Result<()> {
    let pair = Pair::start()?;
    let _nginx = Nginx::start(&pair.web, 8080, "myself")?;
    let capture = pair.mesh.wire().capture()?;
    for to in ["10.96.0.7:80", "[fd96::7]:80"] {
        let url = format!("http://{to}/");
        let curl = pair.web.run("curl", ["-sS", "-m", "30", &url])?.ok()?;
        assert_eq!(curl.stdout, "myself");
        let line = pair
            .far
            .wait_for_access("the connection", TIMEOUT, |line| line["destination"] == to)?;
        assert_eq!(
            (&line["path"], &line["result"]),
            (&"self".into(), &"ok".into()),
            "{line}"
        );
        assert!(line["bytes_to_client"].as_u64() > Some(0), "{line}");
    }
    let crossed = capture.stop()?;
    assert_eq!(
        crossed.packets().len(),
        0,
        "it went over the wire: {:?}",
        crossed.connections()
    );
    Ok(())
}

#[test]
fn a_pod_that_reaches_itself_sees_resets_too() -> Result<()> {
    let pair = Pair::start()?;
    let refused = pair
        .web
        .app("connect --to 10.96.0.7:80 --send hello --read")?
        .failure(TIMEOUT)?;
    assert_eq!(refused["errno"], "ECONNRESET", "{refused}");
    let (sender, ends) = std::sync::mpsc::channel();
    let on: SocketAddr = "[::]:8080".parse()?;
    let _server = InProcess::start(&pair.web, on, move |mut stream, _| {
        use std::io::{Read, Write};
        let mut byte = [0; 1];
        let _ = stream.read_exact(&mut byte);
        let _ = stream.write_all(&byte);
        let _ = stream.read_to_end(&mut Vec::new());
        let error = mesh_tests::eventually(TIMEOUT, "an error of the socket", || {
            stream.take_error().ok().flatten()
        });
        let _ = sender.send(error.map(|error| error.kind()).ok());
    })?;
    pair.web
        .app("reset --to 10.96.0.7:80 --after 1 --shutdown")?
        .success(TIMEOUT)?;
    let end = ends.recv_timeout(TIMEOUT + Duration::from_secs(1))?;
    assert!(
        end.is_some(),
        "the server never saw the reset that came after the end"
    );
    Ok(())
}

const SERVICE: &str = "10.96.0.8:80";
/// Limit for a connection that first tries an endpoint that does not answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// A client on node `a`, and pods `one` and `two` of one service on nodes `b` and `c`, which answer with their names.
struct Three {
    servers: Vec<Nginx>,
    daemons: Vec<Daemon>,
    client: Pod,
    mesh: Mesh,
}

impl Three {
    fn start() -> Result<Self> {
        let server = |name: &str, node: &str| {
            let pod = PodSpec::new(name).on(node).service_account("web");
            pod.label("app", "two")
        };
        let service = ServiceSpec::new("two")
            .selector("app", "two")
            .port(80, 8080);
        let mesh = pair::builder()
            .node("c")
            .pod(server("one", "b"))
            .pod(server("two", "c"))
            .service(service.address("10.96.0.8").address("fd96::8"))
            .start()?;
        Ok(Self {
            servers: vec![
                Nginx::start(&mesh.pod("one"), 8080, "one")?,
                Nginx::start(&mesh.pod("two"), 8080, "two")?,
            ],
            daemons: mesh.start_daemons()?,
            client: mesh.pod("client"),
            mesh,
        })
    }

    /// Returns how often each endpoint answered.
    fn ask(&self, service: &str, times: u32) -> Result<BTreeMap<String, u32>> {
        let mut answers = BTreeMap::new();
        for _ in 0..times {
            let url = format!("http://{service}/");
            let curl = self.client.run("curl", ["-sS", "-m", "20", &url])?.ok()?;
            *answers.entry(curl.stdout).or_insert(0) += 1;
        }
        Ok(answers)
    }

    /// Checks that this endpoint answers each of several connections, within a few seconds.
    fn all_answered_by(&self, name: &str) -> Result<()> {
        for number in 0..4 {
            let start = Instant::now();
            let answers = self.ask(SERVICE, 1)?;
            let took = start.elapsed();
            println!("connection {number}: {took:?}, {answers:?}");
            assert!(answers.contains_key(name), "{answers:?}");
            assert!(
                took < PATIENCE * slowdown(),
                "connection {number} took {took:?}"
            );
        }
        Ok(())
    }

    /// Drops all packets that the node forwards, without an ICMP error.
    fn silence(&self, node: &str) -> Result<Firewall> {
        let rule = "chain forward { type filter hook forward priority 0; policy drop; }";
        Firewall::install(self.mesh.node(node), rule)
    }
}
