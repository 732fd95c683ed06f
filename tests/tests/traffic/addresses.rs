//! Socket names: apps see the same own and peer addresses with the daemons as without them, however they connect.

use std::net::SocketAddr;

use mesh_tests::{App, Context, Pod, Result, TIMEOUT, eventually};
use serde_json::Value;

use crate::common::pair::{self, Pair};

#[test]
fn socket_names_are_the_same_as_without_the_daemon_v4() -> Result<()> {
    names_are_the_same(|web| web.at(7))
}

#[test]
fn socket_names_are_the_same_as_without_the_daemon_v6() -> Result<()> {
    names_are_the_same(|web| web.at6(7))
}

#[test]
fn socket_names_are_the_same_as_without_the_daemon_v4_mapped() -> Result<()> {
    names_are_the_same(|web| (web.ipv4().to_ipv6_mapped(), 7).into())
}

/// Connects unbound, bound to the pod's address, to a port and to both: first without a daemon, then with one.
fn names_are_the_same(to: impl Fn(&Pod) -> SocketAddr) -> Result<()> {
    let mesh = pair::builder().start()?;
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let to = to(&web);
    let address = match to {
        SocketAddr::V4(_) => client.ipv4().into(),
        SocketAddr::V6(to) if to.ip().to_ipv4_mapped().is_some() => {
            client.ipv4().to_ipv6_mapped().into()
        }
        SocketAddr::V6(_) => std::net::IpAddr::from(client.ipv6()),
    };
    let mut echo = web.app("echo-server --port 7")?.listening()?;
    let mut look = |first_port: u16| -> Result<Vec<Seen>> {
        let ways = [
            String::new(),
            format!("--bind {address}"),
            format!("--source-port {first_port}"),
            format!("--bind {address} --source-port {}", first_port + 1),
        ];
        let seen = ways.iter().map(|way| {
            let dial = client.app(&format!("dial --to {to} {way}"))?;
            let client = dial.success(TIMEOUT).with_context(|| way.clone())?;
            let server = echo.event("accepted", TIMEOUT)?;
            Seen::new(way, &client, &server)
        });
        seen.collect()
    };
    let without = look(5000)?;
    let _daemons = mesh.start_daemons()?;
    let with = look(5002)?;
    for (without, with) in without.iter().zip(&with) {
        println!("{with:?}");
        assert_eq!(with.client, without.client, "getsockname, {}", with.way);
        assert_eq!(with.peer, without.peer, "getpeername, {}", with.way);
        assert_eq!(with.seen, without.seen, "the server's view, {}", with.way);
        assert!(with.same_port, "the server sees another port, {}", with.way);
    }
    Ok(())
}

/// What both ends of a connection see, without the client's port, which differs for each connection.
#[derive(Debug)]
struct Seen {
    way: String,
    client: std::net::IpAddr,
    peer: SocketAddr,
    seen: std::net::IpAddr,
    same_port: bool,
}

impl Seen {
    fn new(way: &str, client: &Value, server: &Value) -> Result<Self> {
        let (local, seen) = (address(&client["local"])?, address(&server["peer"])?);
        Ok(Self {
            way: way.to_owned(),
            client: local.ip(),
            peer: address(&client["peer"])?,
            seen: seen.ip(),
            same_port: local.port() == seen.port(),
        })
    }
}

#[test]
fn server_sees_the_source_port_that_the_client_bound() -> Result<()> {
    let pair = Pair::start()?;
    let mut echo = pair.web.app("echo-server --port 7")?.listening()?;
    // The last ports are in the range that tunnels use.
    for port in [1023, 5555, 40_000, 65_000, 15_100] {
        for to in [pair.web.at(7), pair.web.at6(7)] {
            let dial = format!("dial --to {to} --source-port {port}");
            let answer = pair.client.app(&dial)?.success(TIMEOUT)?;
            assert_eq!(answer["text"], "hello", "{dial}: {answer}");
            let accepted = echo.event("accepted", TIMEOUT)?;
            let client: SocketAddr = if to.is_ipv4() {
                pair.client.at(port)
            } else {
                pair.client.at6(port)
            };
            assert_eq!(accepted["peer"], client.to_string(), "{dial}");
        }
    }
    Ok(())
}

#[test]
fn source_port_can_be_reused_immediately() -> Result<()> {
    let pair = Pair::start()?;
    // The server closes first, so the client's port is free again.
    let mut greeter = pair
        .web
        .app("half-close --port 20 --message bye")?
        .listening()?;
    for to in [pair.web.at(20), pair.web.at6(20)] {
        for round in 0..5 {
            let answer = pair
                .client
                .app(&format!("connect --to {to} --source-port 5555 --read"))?
                .success(TIMEOUT)?;
            assert_eq!(answer["text"], "bye", "round {round}: {answer}");
            let client: SocketAddr = if to.is_ipv4() {
                pair.client.at(5555)
            } else {
                pair.client.at6(5555)
            };
            let accepted = greeter.event("accepted", TIMEOUT)?;
            assert_eq!(accepted["peer"], client.to_string(), "round {round}");
            greeter.event("closed", TIMEOUT)?;
        }
    }
    Ok(())
}

#[test]
fn client_may_bind_the_source_port_of_an_idle_tunnel() -> Result<()> {
    let pair = Pair::start()?;
    let mut echo = pair.web.app("echo-server --port 7")?.listening()?;
    let to = pair.web.at(7);
    pair.client
        .app(&format!("dial --to {to}"))?
        .success(TIMEOUT)?;
    echo.event("accepted", TIMEOUT)?;
    let tunnel = |socket: &&mesh_tests::Endpoint| socket.remote == to;
    let idle = eventually(TIMEOUT, "an idle tunnel", || {
        pair.client.endpoints().ok()?.iter().find(tunnel).copied()
    })?;
    let port = idle.local.port();
    let answer = pair
        .client
        .app(&format!("dial --to {to} --source-port {port}"))?
        .success(TIMEOUT)?;
    assert_eq!(answer["text"], "hello", "{answer}");
    assert_eq!(
        echo.event("accepted", TIMEOUT)?["peer"],
        pair.client.at(port).to_string()
    );
    Ok(())
}

#[test]
fn non_blocking_connect_completes_in_poll() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = pair.web.app("echo-server --port 7")?.listening()?;
    for to in [pair.web.at(7), pair.web.at6(7)] {
        let command = format!("connect --to {to} --non-blocking --send hi --shutdown --read");
        let finished = pair.client.app(&command)?.finish(TIMEOUT)?.ok()?;
        let events = finished.json_lines();
        assert!(
            !events
                .iter()
                .any(|event| event["event"] == "connected-at-once"),
            "connect(2) was to say EINPROGRESS: {events:?}"
        );
        let last = events.last().context("an event")?;
        assert_eq!(
            (&last["text"], &last["peer"]),
            (&"hi".into(), &to.to_string().into())
        );
    }
    Ok(())
}

#[test]
fn both_address_families_work_at_the_same_time() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = pair.web.app("echo-server --port 7 --quiet")?.listening()?;
    let clients: Vec<App> = [pair.web.at(7), pair.web.at6(7)]
        .iter()
        .map(|to| {
            pair.client
                .app(&format!("many --to {to} --connections 50 --hold 200"))
        })
        .collect::<Result<_>>()?;
    for client in clients {
        assert_eq!(client.success(TIMEOUT)?["failed"], 0);
    }
    Ok(())
}

const MARKER: &str = "marker-of-an-odd-client";
const MULTIPATH: &str = "--multipath";

#[test]
fn tcp_fast_open_is_captured() -> Result<()> {
    // The kernel's default, and data in the first SYN without a cookie, as client and as server.
    for setting in ["1", "1031"] {
        odd_client("--fast-open", |pair| {
            for pod in [&pair.client, &pair.web] {
                let parameter = [("net/ipv4/tcp_fastopen", setting)];
                pod.netns().set_parameters(&parameter)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn multipath_tcp_is_captured() -> Result<()> {
    if !std::path::Path::new("/proc/sys/net/mptcp/enabled").exists() {
        println!("SKIPPED multipath_tcp_is_captured: this kernel has no Multipath TCP");
        return Ok(());
    }
    odd_client(MULTIPATH, |_| Ok(()))
}

#[test]
fn client_bound_to_an_interface_is_captured() -> Result<()> {
    odd_client("--device eth0", |_| Ok(()))
}

/// Checks that the connection works and that its bytes are not readable on the wire.
fn odd_client(way: &str, prepare: impl Fn(&Pair) -> Result<()>) -> Result<()> {
    let pair = Pair::start()?;
    prepare(&pair)?;
    let mut echo = pair.web.app("echo-server --port 7")?.listening()?;
    let capture = pair.mesh.wire().capture()?;
    for to in [pair.web.at(7), pair.web.at6(7)] {
        let dial = format!("dial --to {to} {way} --send {MARKER}");
        // Twice: the second time, a cookie or an idle tunnel may be there.
        for _ in 0..2 {
            let answer = pair.client.app(&dial)?.success(TIMEOUT);
            assert!(
                !capture.so_far().contains(MARKER.as_bytes()),
                "{dial}: readable on the wire"
            );
            let answer = answer.with_context(|| dial.clone())?;
            assert_eq!(answer["text"], MARKER, "{dial}: {answer}");
            let (local, peer) = (address(&answer["local"])?, address(&answer["peer"])?);
            let own = if to.is_ipv4() {
                pair.client.at(local.port())
            } else {
                pair.client.at6(local.port())
            };
            let accepted = echo.event("accepted", TIMEOUT)?;
            assert_eq!(address(&accepted["peer"])?, own, "{dial}");
            // The kernel asks the programs about the Multipath TCP socket, which knows nothing of what its subflow
            // dialled: the app is told of the connection to the daemon.
            if way != MULTIPATH {
                assert_eq!((local, peer), (own, to), "{dial}: {answer}");
            }
        }
    }
    let recording = capture.stop()?;
    for stream in recording.streams() {
        stream.tls_records()?;
    }
    Ok(())
}

#[test]
fn socket_can_connect_again_after_a_failure() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = pair.web.app("echo-server --port 7")?.listening()?;
    let mut outside = pair
        .mesh
        .outside()
        .app("echo-server --port 7")?
        .listening()?;
    let Pair {
        near,
        far: _far,
        client,
        web,
        mesh,
    } = pair;
    let to_outside = [
        SocketAddr::from((mesh.outside_ipv4(), 7)),
        SocketAddr::from((mesh.outside_ipv6(), 7)),
    ];
    // From outside the mesh, which refuses, into it.
    for (first, to) in [("[::1]:9", web.at6(7)), ("127.0.0.1:9", web.at(7))] {
        let answer = client
            .app(&format!("dial --first {first} --to {to}"))?
            .success(TIMEOUT)?;
        assert_eq!(answer["peer"], to.to_string(), "{answer}");
        assert_eq!(answer["text"], "hello", "{answer}");
    }
    // First to the mesh, refused because no daemon runs, then to the outside.
    near.kill()?;
    for (first, to) in [web.at(7), web.at6(7)].into_iter().zip(to_outside) {
        let answer = client
            .app(&format!("dial --first {first} --to {to}"))?
            .success(TIMEOUT)?;
        assert_eq!(answer["first"], "ECONNREFUSED", "{answer}");
        assert_eq!(answer["peer"], to.to_string(), "{answer}");
        assert_eq!(
            outside.event("accepted", TIMEOUT)?["peer"],
            answer["local"],
            "{answer}"
        );
    }
    Ok(())
}

fn address(value: &Value) -> Result<SocketAddr> {
    let address = value.as_str().and_then(|text| text.parse().ok());
    address.with_context(|| format!("no address: {value}"))
}
