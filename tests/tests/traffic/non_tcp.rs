//! `nonTcp: deny`: pods can send only TCP to the mesh.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::ensure;
use mesh_tests::{DaemonOptions, Place, PodSpec, Result, eventually_ok};
use socket2::{Domain, Protocol, Socket, Type};

use super::common::{lifecycle_pair::echoes, pair::Pair};

const TIMEOUT: Duration = Duration::from_secs(10);
/// Numbers of protocols (IANA, "Protocol Numbers"), and a socket type of Linux.
const SCTP: i32 = 132;
const DCCP: i32 = 33;
const SOCK_DCCP: i32 = 6;

fn denied() -> Result<Pair> {
    let options = DaemonOptions::default().setting("nonTcp", "deny".into());
    Pair::start_with(&options, |builder| builder)
}

/// `to` as IPv4-mapped IPv6 (RFC 4291 §2.5.5.2).
fn mapped(to: SocketAddr) -> SocketAddr {
    let SocketAddr::V4(to) = to else { return to };
    SocketAddr::from((Ipv4Addr::to_ipv6_mapped(to.ip()), to.port()))
}

#[test]
fn datagrams_to_the_mesh_are_refused_with_eperm() -> Result<()> {
    let pair = denied()?;
    let _echo = pair.web.app("udp-echo --port 53")?.listening()?;
    let service = SocketAddr::new("10.96.0.7".parse()?, 53);
    let destinations = [
        pair.web.at(53),
        pair.web.at6(53),
        mapped(pair.web.at(53)),
        service,
    ];
    let capture = pair.mesh.wire().capture()?;
    for to in destinations {
        for (how, stage) in [
            ("", "connect"),
            ("--unconnected", "send"),
            ("--lite", "socket"),
        ] {
            let failed = pair
                .client
                .app(&format!("udp-send --to {to} {how}"))?
                .failure(TIMEOUT)?;
            ensure!(
                failed["stage"] == stage && failed["errno"] == "EPERM",
                "{to} {how}: {failed}"
            );
        }
    }
    let crossed = capture.stop()?;
    ensure!(crossed.packets().is_empty(), "{:?}", crossed.packets());
    Ok(())
}

#[test]
fn datagrams_to_the_pod_itself_and_beyond_the_mesh_pass() -> Result<()> {
    let pair = denied()?;
    let legacy = PodSpec::new("legacy").on("b");
    let legacy = legacy.label("auth-daemon.io/mesh", "disabled");
    let legacy = pair.mesh.add_pod(legacy)?;
    let outside = pair.mesh.outside();
    let _echoes = [
        pair.client.app("udp-echo --port 53")?.listening()?,
        legacy.app("udp-echo --port 53")?.listening()?,
        outside.app("udp-echo --port 53")?.listening()?,
    ];
    eventually_ok(TIMEOUT, "a pod that is known outside the mesh", || {
        pair.client
            .app(&format!("udp-send --to {}", legacy.at(53)))?
            .success(TIMEOUT)
    })?;
    for to in [
        SocketAddr::from(([127, 0, 0, 1], 53)),
        pair.client.at(53),
        pair.client.at6(53),
        legacy.at(53),
        (pair.mesh.outside_ipv4(), 53).into(),
        (pair.mesh.outside_ipv6(), 53).into(),
    ] {
        for how in ["", "--unconnected"] {
            pair.client
                .app(&format!("udp-send --to {to} {how}"))?
                .success(TIMEOUT)?;
        }
    }
    Ok(())
}

#[test]
fn sockets_of_other_transports_are_refused() -> Result<()> {
    let create = |from: &Place, protocol: i32| -> Result<std::io::Result<Socket>> {
        let kind = match protocol {
            DCCP => Type::from(SOCK_DCCP),
            _ => Type::STREAM,
        };
        from.enter(move || Socket::new(Domain::IPV4, kind, Some(Protocol::from(protocol))))
    };
    let pair = denied()?;
    let outside = pair.mesh.outside();
    for protocol in [SCTP, DCCP] {
        if let Err(error) = create(outside, protocol)? {
            println!("SKIPPED protocol {protocol}: {error}");
            continue;
        }
        let refused = create(&pair.client, protocol)?.err();
        let refused = refused.and_then(|error| error.raw_os_error());
        ensure!(refused == Some(nix::libc::EPERM), "{protocol}: {refused:?}");
    }
    Ok(())
}

#[test]
fn tcp_works_while_other_protocols_are_denied() -> Result<()> {
    let pair = denied()?;
    let _echo = pair.web.app("echo-server --port 8080")?.listening()?;
    echoes(&pair.client, pair.web.at(8080));
    echoes(&pair.client, pair.web.at6(8080));
    Ok(())
}
