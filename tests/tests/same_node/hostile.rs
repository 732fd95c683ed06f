//! The kernel admits plaintext to a pod only from the namespace of the verdict and from a socket that it has
//! seen connect: forged addresses and packets are not admitted.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use etherparse::PacketBuilder;
use mesh_tests::{App, Firewall, PodSpec, Result, TIMEOUT, TcpState, eventually};
use serde_json::Value;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::common::neighbours::{MESSAGE, Neighbours, echo, is_direct, refused};

#[test]
fn forged_source_address_is_not_admitted() -> Result<()> {
    let stage = Neighbours::start()?;
    let mut server = stage.web.app("echo-server --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    stage.decide(to)?;
    stage.decide_from(&stage.other, to)?;
    accepted(&mut server, 2)?;
    // A pod with CAP_NET_ADMIN takes the client's address, and its route prefers that.
    let forged = stage.client.ipv4();
    let ip = |arguments: &str| -> Result<()> {
        stage.other.run("ip", arguments.split(' '))?.ok()?;
        Ok(())
    };
    ip(&format!("addr add {forged}/32 dev lo"))?;
    let start = stage.daemon.log_position();
    // Bound to the address: the daemon carries it.
    let answer = stage
        .other
        .app(&format!("dial --to {to} --bind {forged}"))?
        .failure(TIMEOUT)?;
    assert_ne!(answer["stage"], "bind", "{answer}");
    let line = stage
        .daemon
        .wait_for_log_after(start, "the refusal", TIMEOUT, |line| {
            line["target"] == "access" && line["direction"] == "outbound"
        })?;
    assert_eq!(line["result"], "refused", "{line}");
    let reason = line["reason"].as_str().unwrap_or_default();
    assert!(
        reason.contains(&format!("says that it is {forged}")),
        "{line}"
    );
    // Chosen by the route: the kernel makes no record.
    ip(&format!(
        "route add {}/32 via 10.77.1.1 src {forged} onlink dev eth0",
        to.ip()
    ))?;
    for _ in 0..2 {
        let answer = stage
            .other
            .app(&format!("dial --to {to} --send forged"))?
            .finish(Duration::from_millis(1500));
        assert!(
            answer.is_err() || !answer?.status.success(),
            "it was answered"
        );
    }
    // From its own address it is served, as before.
    ip(&format!("route del {}/32", to.ip()))?;
    echo(&stage.other, to)?;
    accepted(&mut server, 1)?;
    assert!(
        server.events_of("accepted").len() == 3,
        "{:?}",
        server.events()
    );
    Ok(())
}

#[test]
fn plaintext_without_a_recorded_4_tuple_is_refused() -> Result<()> {
    let stage = Neighbours::start()?;
    let server = stage.web.app("echo-server --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    stage.decide(to)?;
    let heard = server.events_of("accepted").len();
    let stranger = PodSpec::new("stranger").on("a");
    let stranger = stage
        .mesh
        .add_pod(stranger.annotation("auth-daemon.io/mesh", "disabled"))?;
    refused(&stranger, to)?;
    // Bypasses the connect hooks, from the client's own namespace: the kernel saw no socket connect.
    for place in [stage.client.place(), stage.other.place()] {
        let mut stream = place.connect(to)?;
        let sent = std::io::Write::write_all(&mut stream, MESSAGE.as_bytes())
            .and_then(|()| std::io::Read::read(&mut stream, &mut [0; 64]));
        assert!(!matches!(sent, Ok(1..)), "it was answered");
    }
    assert_eq!(server.events_of("accepted").len(), heard);
    Ok(())
}

#[test]
fn forged_packet_with_a_recorded_4_tuple_is_not_admitted() -> Result<()> {
    const PORT: u16 = 45_678;
    let stage = Neighbours::start()?;
    let server = stage.web.app("echo-server --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    stage.decide(to)?;
    let heard = server.events_of("accepted").len();
    // The client's own SYN is lost, so its record stays.
    let firewall = Firewall::install(
        stage.mesh.node("a"),
        &format!(
            "counter lost {{}}\nchain forward {{\n  type filter hook forward priority 0; policy accept;\n\
             \x20 ip saddr {} tcp sport {PORT} ether saddr {} counter name lost drop\n}}",
            stage.client.ipv4(),
            mac(&stage.client)?,
        ),
    )?;
    let dialling = stage
        .client
        .app(&format!("connect --to {to} --source-port {PORT}"))?;
    eventually(TIMEOUT, "the client's SYN", || {
        let sent = stage.client.sockets().ok()?.of(TcpState::SynSent) == 1;
        (sent && firewall.packets("lost").ok()? > 0).then_some(())
    })?;
    // Another pod sends as the client, blindly: a SYN, and ACKs with data for several sequence numbers.
    let client = SocketAddr::from((stage.client.ipv4(), PORT));
    for sequence in [1, 1000] {
        send(&stage.other, client, to, sequence, None)?;
        for guess in [1, 2, 1 << 31] {
            send(&stage.other, client, to, sequence + 1, Some(guess))?;
        }
    }
    // And from ports without a record.
    let nobody = SocketAddr::from((stage.client.ipv4(), PORT + 1));
    send(&stage.other, nobody, to, 1, None)?;
    echo(&stage.client, to)?;
    let events = server.events_of("accepted");
    assert_eq!(events.len(), heard + 1, "{events:?}");
    drop(dialling);
    Ok(())
}

#[test]
fn apps_that_connect_in_other_ways_are_served() -> Result<()> {
    let stage = Neighbours::start()?;
    let web = stage.web.netns();
    let _server = stage.web.app("echo-server --port 8080")?.listening()?;
    let ways = stage.ways();
    for to in ways {
        stage.decide(to)?;
    }
    let own = |to: SocketAddr| stage.client.addresses()[usize::from(to.is_ipv6())];
    for to in ways {
        let service = to.port() == 80;
        for (options, seen) in [
            (String::new(), true),
            (format!("--bind {}", own(to)), true),
            (format!("--bind {} --source-port 44444", own(to)), true),
            ("--device eth0".into(), true),
            ("--fast-open".into(), true),
            // Its getpeername bypasses all hooks.
            ("--multipath".into(), !service),
        ] {
            let start = stage.daemon.log_position();
            let dial = format!("dial --to {to} --send {MESSAGE} {options}");
            let answer = stage.client.app(&dial)?.finish(TIMEOUT)?.json_lines();
            let answer = answer.last().cloned().unwrap_or_default();
            if options == "--multipath" && answer["stage"] == "socket" {
                println!("no multipath TCP here: {answer}");
                continue;
            }
            assert_eq!(answer["text"], MESSAGE, "{options} to {to}: {answer}");
            if seen {
                assert_eq!(answer["peer"], to.to_string(), "{options}: {answer}");
            }
            for line in stage.lines(start, to, 2)? {
                let bytes = (&line["bytes_to_server"], &line["bytes_to_client"]);
                assert_eq!(bytes, (&19.into(), &19.into()), "{options}: {line}");
                assert_eq!(line["path"], "same-node", "{options}: {line}");
            }
        }
    }
    // An IPv6 socket that connects to IPv4.
    let mapped: SocketAddr = format!("[::ffff:{}]:8080", stage.web.ipv4()).parse()?;
    let start = stage.daemon.log_position();
    let answer = stage
        .client
        .app(&format!("dial --to {mapped} --send {MESSAGE}"))?
        .success(TIMEOUT)?;
    assert_eq!(answer["peer"], mapped.to_string(), "{answer}");
    stage.lines(start, stage.web.at(8080), 2)?;

    // Real data in the SYN; then SYN cookies, with which the server's kernel keeps nothing before the last ACK.
    let sysctl = |name: &str, value: &str| web.set_parameters(&[(name, value)]);
    for (name, value, options) in [
        ("net/ipv4/tcp_fastopen", "1027", "--fast-open"),
        ("net/ipv4/tcp_fastopen", "1539", "--fast-open"),
        ("net/ipv4/tcp_syncookies", "2", ""),
    ] {
        sysctl(name, value)?;
        for to in ways {
            for _ in 0..2 {
                let start = stage.daemon.log_position();
                stage
                    .client
                    .app(&format!("dial --to {to} --send {MESSAGE} {options}"))?
                    .success(TIMEOUT)?;
                for line in stage.lines(start, to, 2)? {
                    let bytes = (&line["bytes_to_server"], &line["bytes_to_client"]);
                    assert_eq!(bytes, (&19.into(), &19.into()), "{name}={value}: {line}");
                    assert_eq!(line["result"], "ok", "{name}={value}: {line}");
                }
            }
        }
    }
    // Also for connections that the daemon itself delivers.
    stage.decide_from(&stage.other, ways[0])?;
    Ok(())
}

#[test]
fn client_may_bind_a_busy_port() -> Result<()> {
    let stage = Neighbours::start()?;
    let _server = stage.web.app("echo-server --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    // The first connection, from an address and port that the daemon then cannot have as well.
    let own = stage.client.ipv4();
    let start = stage.daemon.log_position();
    let mut chat = stage.client.app(&format!(
        "chat --to {to} --bind {own} --source-port 44445 --rounds 2 --interval 300"
    ))?;
    let ends = chat.event("connected", TIMEOUT)?;
    assert!(!is_direct(&stage.client, &ends["local"])?);
    chat.success(TIMEOUT)?;
    let expected = Value::from(format!("{own}:44445"));
    for line in stage.lines(start, to, 2)? {
        assert_eq!(line["client"], expected, "{line}");
        assert_eq!(line["result"], "ok", "{line}");
    }
    Ok(())
}

fn accepted(server: &mut App, count: usize) -> Result<()> {
    for _ in 0..count {
        server.event("accepted", TIMEOUT)?;
    }
    Ok(())
}

/// The link address of a pod's own interface.
fn mac(pod: &mesh_tests::Pod) -> Result<String> {
    let links = pod.run("ip", ["-br", "link", "show", "eth0"])?.ok()?.stdout;
    Ok(links
        .split_whitespace()
        .find(|word| word.len() == 17 && word.matches(':').count() == 5)
        .unwrap_or_default()
        .to_owned())
}

/// A TCP packet with any addresses: a SYN or, with a number to acknowledge, data.
fn send(
    from: &mesh_tests::Pod,
    source: SocketAddr,
    to: SocketAddr,
    sequence: u32,
    acknowledged: Option<u32>,
) -> Result<()> {
    let octets = |address: SocketAddr| match address.ip() {
        std::net::IpAddr::V4(v4) => v4.octets(),
        std::net::IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED.octets(),
    };
    let builder = PacketBuilder::ipv4(octets(source), octets(to), 64).tcp(
        source.port(),
        to.port(),
        sequence,
        65_000,
    );
    let (builder, payload) = match acknowledged {
        None => (builder.syn(), &b""[..]),
        Some(number) => (builder.ack(number).psh(), &b"forged"[..]),
    };
    let mut packet = Vec::new();
    builder.write(&mut packet, payload)?;
    let raw = Protocol::from(nix::libc::IPPROTO_RAW);
    from.enter(|| {
        Socket::new(Domain::IPV4, Type::RAW, Some(raw))?
            .send_to(&packet, &SockAddr::from(to))
            .map(drop)
    })??;
    Ok(())
}
