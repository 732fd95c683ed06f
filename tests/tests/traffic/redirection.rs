//! Traffic that the mesh does not touch: it keeps the kernel's own path and leaves no trace in maps, logs or addresses.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixListener;
use std::thread;

use mesh_tests::{Context, Nginx, Recording, Result, TIMEOUT, Transport, eventually};

use crate::common::pair::Pair;

const MARKER: &str = "marker-that-may-be-read-by-all";

#[test]
fn udp_between_pods_is_not_touched() -> Result<()> {
    let pair = Pair::start()?;
    let mut echo = pair.web.app("udp-echo --port 53")?.listening()?;
    let capture = pair.mesh.wire().capture()?;
    for to in [pair.web.at(53), pair.web.at6(53)] {
        let answer = pair
            .client
            .app(&format!("udp-send --to {to} --message {MARKER} --count 3"))?
            .success(TIMEOUT)?;
        assert_eq!(answer["peer"], to.to_string(), "{answer}");
        for _ in 0..3 {
            let datagram = echo.event("datagram", TIMEOUT)?;
            assert_eq!(datagram["peer"], answer["local"], "{datagram}");
        }
    }
    let crossed = capture.stop()?;
    assert!(
        crossed
            .packets()
            .iter()
            .all(|packet| packet.transport == Transport::Udp)
    );
    // Three datagrams in each direction, of both families.
    let whole = crossed.only(|packet| packet.payload == MARKER.as_bytes());
    assert_eq!(whole.packets().len(), 12, "{:?}", crossed.packets());
    assert_untouched(&pair)
}

#[test]
fn udp_to_the_outside_is_not_touched() -> Result<()> {
    let pair = Pair::start()?;
    let mut echo = pair.mesh.outside().app("udp-echo --port 53")?.listening()?;
    let capture = pair.mesh.wire().capture()?;
    for (to, own) in outside(&pair, 53) {
        pair.client
            .app(&format!("udp-send --to {to} --message {MARKER}"))?
            .success(TIMEOUT)?;
        let datagram = echo.event("datagram", TIMEOUT)?;
        let peer: SocketAddr = datagram["peer"].as_str().context("a peer")?.parse()?;
        assert_eq!(peer.ip(), own);
    }
    assert!(capture.stop()?.contains(MARKER.as_bytes()));
    assert_untouched(&pair)
}

#[test]
fn tcp_to_the_outside_is_not_touched() -> Result<()> {
    let pair = Pair::start()?;
    let mut echo = pair
        .mesh
        .outside()
        .app("echo-server --port 80")?
        .listening()?;
    let capture = pair.mesh.wire().capture()?;
    for (to, own) in outside(&pair, 80) {
        let client = format!("connect --to {to} --send {MARKER} --shutdown --read");
        let answer = pair.client.app(&client)?.success(TIMEOUT)?;
        assert_eq!(
            (&answer["text"], &answer["peer"]),
            (&MARKER.into(), &to.to_string().into())
        );
        let accepted = echo.event("accepted", TIMEOUT)?;
        // The server sees the client's own address and port.
        assert_eq!(accepted["peer"], answer["local"], "{answer}");
        let local: SocketAddr = answer["local"].as_str().context("an address")?.parse()?;
        assert_eq!(local.ip(), own);
    }
    let crossed = capture.stop()?;
    for (to, own) in outside(&pair, 80) {
        let between = crossed.tcp_between(own, to.ip());
        assert_readable(&between, to, own)?;
    }
    assert_untouched(&pair)
}

#[test]
fn many_connections_to_the_outside_leave_no_entries() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = pair
        .mesh
        .outside()
        .app("echo-server --port 80 --quiet")?
        .listening()?;
    let to = SocketAddr::from((pair.mesh.outside_ipv4(), 80));
    let mut many = pair
        .client
        .app(&format!("many --to {to} --connections 200 --hold 500"))?;
    assert_eq!(many.event("open", TIMEOUT)?["failed"], 0);
    assert_untouched(&pair)?;
    assert_eq!(many.success(TIMEOUT)?["failed"], 0);
    assert_untouched(&pair)
}

#[test]
fn refusals_from_outside_reach_the_client() -> Result<()> {
    let pair = Pair::start()?;
    for (to, _) in outside(&pair, 9) {
        for how in ["", "--non-blocking"] {
            let failed = pair
                .client
                .app(&format!("connect --to {to} {how}"))?
                .failure(TIMEOUT)?;
            assert_eq!(
                (&failed["stage"], &failed["errno"]),
                (&"connect".into(), &"ECONNREFUSED".into()),
                "{failed}"
            );
        }
    }
    assert_untouched(&pair)
}

#[test]
fn unix_sockets_are_not_touched() -> Result<()> {
    let pair = Pair::start()?;
    let path = pair.client.folder().join("socket");
    let listener = UnixListener::bind(&path)?;
    let server = thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let _ = stream.read(&mut [0; 1024])?;
        write!(stream, "HTTP/1.0 200 OK\r\n\r\n{MARKER}")
    });
    let path = path.display().to_string();
    let curl = ["-sS", "-m", "30", "--unix-socket", &path, "http://web/"];
    let answer = pair.client.run("curl", curl)?.ok()?;
    assert_eq!(answer.stdout, MARKER);
    server.join().expect("the server does not panic")?;
    assert_untouched(&pair)
}

#[test]
fn pod_can_connect_to_itself() -> Result<()> {
    let pair = Pair::start()?;
    let mut echo = pair.web.app("echo-server --port 7")?.listening()?;
    let capture = pair.mesh.wire().capture()?;
    let addresses = [
        pair.web.at(7),
        pair.web.at6(7),
        "127.0.0.1:7".parse()?,
        "[::1]:7".parse()?,
    ];
    for to in addresses {
        let client = format!("connect --to {to} --send {MARKER} --shutdown --read");
        let answer = pair.web.app(&client)?.success(TIMEOUT)?;
        assert_eq!(
            (&answer["text"], &answer["peer"]),
            (&MARKER.into(), &to.to_string().into())
        );
        let accepted = echo.event("accepted", TIMEOUT)?;
        assert_eq!(accepted["peer"], answer["local"], "{answer}");
        assert_eq!(accepted["local"], to.to_string(), "{answer}");
    }
    assert_eq!(capture.stop()?.packets().len(), 0);
    assert_untouched(&pair)
}

#[test]
fn strict_admits_probes_of_its_own_node() -> Result<()> {
    let pair = Pair::start()?;
    let nginx = Nginx::start(&pair.web, 8080, "alive")?;
    let node = pair.mesh.node("b");
    for (number, to) in [pair.web.at(8080), pair.web.at6(8080)]
        .into_iter()
        .enumerate()
    {
        let path = format!("/probe-{number}");
        let url = format!("http://{to}{path}");
        let write = "\n%{local_ip}";
        let curl = ["-sS", "-m", "30", "-w", write, &url];
        let answer = node.run("curl", curl)?.ok()?;
        let (body, local) = answer.stdout.split_once('\n').context("two lines")?;
        assert_eq!(body, "alive");
        let request = nginx.wait_for_request(&path, TIMEOUT)?;
        assert_eq!(request.remote_address, local.parse::<IpAddr>()?);
    }
    assert_untouched(&pair)
}

#[test]
fn strict_refuses_plaintext_from_outside_the_mesh() -> Result<()> {
    let pair = Pair::start()?;
    let nginx = Nginx::start(&pair.web, 8080, "secret")?;
    let openssl = mesh_tests::OpensslServer::start(&pair.web, 8443, &[])?;
    // In the pods' network, but unknown to the mesh.
    let stranger = pair
        .mesh
        .add_pod_quietly(mesh_tests::PodSpec::new("stranger").on("a"))?;
    let callers = [
        pair.mesh.outside(),
        // Another node is not exempt.
        pair.mesh.node("a").place(),
        stranger.place(),
    ];
    for caller in callers {
        for to in [pair.web.at(8080), pair.web.at6(8080)] {
            let url = format!("http://{to}/");
            let refused = caller.run("curl", ["-sS", "-m", "30", &url])?;
            assert_eq!(
                refused.code(),
                Some(RECEIVE_ERROR),
                "{}: {}",
                caller.name(),
                refused.stderr
            );
            assert_eq!(refused.stdout, "");
        }
        let url = format!("https://{}/", pair.web.at(8443));
        let refused = caller.run("curl", ["-sSk", "-m", "30", &url])?;
        assert_ne!(refused.code(), Some(0), "{}", caller.name());
        assert_eq!(refused.stdout, "");
    }
    assert_eq!(nginx.requests(), []);
    drop(openssl);
    // One line for each.
    let refusals = eventually(TIMEOUT, "a line for each refusal", || {
        let refusals = pair.far.access_log();
        (refusals.len() >= 9).then_some(refusals)
    })?;
    assert_eq!(refusals.len(), 9, "{refusals:#?}");
    for line in refusals {
        assert_eq!(line["result"], "refused", "{line}");
        assert_ne!(line["reason"], "", "{line}");
    }
    Ok(())
}

/// curl's exit codes for a connection that failed without an answer.
const RECEIVE_ERROR: i32 = 56;

/// The outside host's addresses with a port, each with the client's own address of the family.
fn outside(pair: &Pair, port: u16) -> [(SocketAddr, IpAddr); 2] {
    [
        (
            (pair.mesh.outside_ipv4(), port).into(),
            pair.client.ipv4().into(),
        ),
        (
            (pair.mesh.outside_ipv6(), port).into(),
            pair.client.ipv6().into(),
        ),
    ]
}

/// Checks that the bytes left the pod for the outside unchanged.
fn assert_readable(crossed: &Recording, to: SocketAddr, own: IpAddr) -> Result<()> {
    let streams = crossed.streams();
    let [stream] = streams.as_slice() else {
        panic!("one connection to {to}, not {streams:?}");
    };
    assert_eq!((stream.client.ip(), stream.server), (own, to));
    assert_eq!(stream.to_server, MARKER.as_bytes());
    assert_eq!(stream.to_client, MARKER.as_bytes());
    Ok(())
}

/// Checks that no daemon carried a connection, and that no map has an entry for it.
fn assert_untouched(pair: &Pair) -> Result<()> {
    for daemon in [&pair.near, &pair.far] {
        let status = daemon.status()?;
        assert_eq!(status.kernel.originals, 0, "on {}", daemon.node());
        assert_eq!(status.connections.len(), 0, "on {}", daemon.node());
        let log = daemon.access_log();
        assert!(log.is_empty(), "on {}: {log:?}", daemon.node());
    }
    Ok(())
}
