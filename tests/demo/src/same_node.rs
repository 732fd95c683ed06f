//! Two pods of one node: there is no wire, so no TLS, and after the first connection the daemon is bypassed as well.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use mesh_tests::{TIMEOUT, TcpState, eventually, eventually_ok};

use super::evidence::Evidence;
use super::stage::{LOGGED, NEIGHBOUR, NODE_B, PORT, Stage, soon};

pub(super) fn same_node(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (neighbour, shop) = (stage.mesh.pod(NEIGHBOUR), stage.mesh.pod("shop"));
    let daemon = stage.daemon(NODE_B)?;
    let server = shop.at(PORT);
    let first = stage.path("same-node-first");
    stage.ask_from(&neighbour, server, &first)?;
    soon("the daemon's verdict", || {
        let status = daemon.status_json().ok()?;
        (status["sameNode"]["verdicts"].as_u64()? > 0).then_some(())
    })?;
    evidence.saw(format!(
        "pod {NEIGHBOUR} asked pod shop, both on {NODE_B}: the daemon decided and carried the first connection"
    ));

    let start = daemon.log_position();
    let path = stage.path("same-node");
    // It stays open after the response, until it is killed.
    let talk = format!(
        "exec 3<>/dev/tcp/{}/{PORT}; printf 'GET {path} HTTP/1.1\\r\\nHost: shop\\r\\n\\r\\n' >&3; exec cat <&3",
        shop.ipv4()
    );
    // A verdict holds for five seconds, and the daemon renews it each second: where it gets no time to do so, it carries the
    // next connection, too.
    let (asking, direct) = eventually_ok(
        TIMEOUT,
        "a connection that the daemon does not carry",
        || {
            let asking = neighbour.spawn("bash", ["-c", &talk])?;
            eventually(TIMEOUT, "the answer", || {
                asking.stdout().contains(&stage.marker).then_some(())
            })?;
            let sockets = neighbour.endpoints()?;
            let direct: Vec<SocketAddr> = sockets
                .iter()
                .filter(|socket| socket.state == TcpState::Established && socket.remote == server)
                .map(|socket| socket.local)
                .collect();
            let captured = sockets
                .iter()
                .filter(|socket| {
                    socket.state == TcpState::Established && socket.remote.port() == 15001
                })
                .count();
            ensure!(
                direct.len() == 1 && captured == 0,
                "the second connection is not its app's own socket: {sockets:?}"
            );
            Ok((asking, direct))
        },
    )?;
    let request = soon("nginx to log the request", || {
        let mut requests = stage.requests("shop", &path).into_iter();
        requests.find(|request| request.remote_port == direct[0].port())
    })?;
    evidence.saw(format!(
        "the second has no socket but the app's, {} -> {server}, and the daemon none; nginx logged {}:{}",
        direct[0], request.remote_address, request.remote_port
    ));
    ensure!(
        SocketAddr::new(request.remote_address, request.remote_port) == direct[0],
        "nginx saw another client"
    );
    drop(asking);
    for direction in ["outbound", "inbound"] {
        let line = daemon.wait_for_log_after(start, "the connection", LOGGED, |line| {
            line["target"] == "access"
                && line["direction"] == direction
                && line["client"] == direct[0].to_string()
        })?;
        let of = |field: &str| line[field].as_str().unwrap_or_default().to_owned();
        evidence.saw(format!(
            "{NODE_B} logged: direction={direction} path={} client_identity={} server_identity={} bytes_to_server={} bytes_to_client={}",
            of("path"),
            of("client_identity"),
            of("server_identity"),
            line["bytes_to_server"],
            line["bytes_to_client"]
        ));
        ensure!(
            of("path") == "same-node"
                && of("client_identity").ends_with("/sa/neighbour")
                && of("server_identity").ends_with("/sa/web"),
            "the line does not say who talked: {line}"
        );
    }
    eventually(LOGGED, "the end of it", || {
        let left = neighbour.endpoints().ok()?;
        (!left
            .iter()
            .any(|socket| socket.local == direct[0] && socket.state == TcpState::Established))
        .then_some(())
    })
}
