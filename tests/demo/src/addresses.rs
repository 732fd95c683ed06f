//! Addresses and ports as applications, firewalls between the nodes and users of services see them.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use mesh_tests::{Firewall, eventually_ok};

use super::evidence::Evidence;
use super::stage::{Answer, CLIENT, LOGGED, NODE_A, NODE_B, PORT, Stage, WEB, WEB_V6, soon};
use super::wire::only_tls;

pub(super) fn peer_address_kept(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (client, web) = (stage.mesh.pod(CLIENT), stage.mesh.pod("web-1"));
    let path = stage.path("peer");
    let answer = stage.ask(web.at(PORT), &path)?;
    let request = stage.request("web-1", &path)?;
    through_tunnel(stage, &answer)?;
    evidence.saw(format!(
        "nginx logged the client {}:{}; curl's own socket is {}",
        request.remote_address, request.remote_port, answer.local
    ));
    evidence.saw(format!(
        "curl's socket has the peer {}; nginx accepted on {}:{}",
        answer.remote, request.server_address, request.server_port
    ));
    ensure!(
        request.remote_address == client.ipv4(),
        "nginx did not see the client pod's address {}",
        client.ipv4()
    );
    ensure!(
        SocketAddr::new(request.remote_address, request.remote_port) == answer.local,
        "nginx and curl do not agree on the client"
    );
    ensure!(
        answer.remote == web.at(PORT)
            && answer.remote == SocketAddr::new(request.server_address, request.server_port),
        "nginx and curl do not agree on the server"
    );
    Ok(())
}

/// Waits until the client's daemon logs that it carried curl's connection. Without the daemon, addresses are kept
/// anyway.
fn through_tunnel(stage: &Stage, answer: &Answer) -> Result<()> {
    let client = answer.local.to_string();
    let line = stage.daemon(NODE_A)?.wait_for_access(
        "that it carried curl's connection",
        LOGGED,
        |line| line["client"] == client,
    )?;
    ensure!(line["path"] == "tunnel", "it went another way: {line}");
    Ok(())
}

pub(super) fn port_kept(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (client, web) = (stage.mesh.pod(CLIENT), stage.mesh.pod("web-2"));
    let firewall = Firewall::only_port(stage.mesh.node(NODE_B), PORT)?;
    evidence.saw(format!(
        "nft on {NODE_B}: tcp dport {PORT} accept, tcp sport {PORT} accept, all other TCP between nodes and pods drop"
    ));
    let capture = stage.mesh.wire().capture()?;
    stage.ask(web.at(PORT), &stage.path("port"))?;
    let recording = capture.stop()?;
    let syns = recording
        .only(|packet| packet.is_syn() && packet.touches(web.ipv4().into()))
        .packets()
        .to_vec();
    for syn in &syns {
        evidence.saw(format!("SYN {} -> {}", syn.source, syn.destination));
    }
    ensure!(
        !syns.is_empty(),
        "no connection was opened between the nodes"
    );
    ensure!(
        syns.iter()
            .all(|syn| syn.source.ip() == client.ipv4() && syn.destination == web.at(PORT)),
        "not all connections go from the client pod to the app's own port"
    );
    only_tls(
        &recording,
        client.ipv4().into(),
        web.ipv4().into(),
        &stage.marker,
        evidence,
    )?;
    let counts = |when: &str| -> Result<(u64, u64)> {
        let counts = (firewall.packets("allowed")?, firewall.packets("dropped")?);
        evidence.saw(format!(
            "{when}: the rule has allowed {} packets and dropped {}",
            counts.0, counts.1
        ));
        Ok(counts)
    };
    let (allowed, dropped) = counts("after a request that was answered")?;
    ensure!(
        allowed > 0 && dropped == 0,
        "the call did not pass by the rule"
    );
    // Verify that the rule can reject traffic.
    eventually_ok(LOGGED, "a packet that the rule drops", || {
        let why = stage.ask_nobody(&client, web.at(PORT + 1))?;
        // The daemon may not have dialled before curl gave up.
        let (_, dropped) = counts(&format!("after one to port {}, {why}", PORT + 1))?;
        ensure!(dropped > 0, "the rule drops nothing, so it shows nothing");
        Ok(())
    })
}

pub(super) fn service_address(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let path = stage.path("service");
    let service = SocketAddr::new(WEB.parse()?, 80);
    let answer = stage.ask(service, &path)?;
    evidence.saw(format!(
        "curl http://{service} was answered: {:?}; its socket has the peer {}",
        answer.body, answer.remote
    ));
    ensure!(
        answer.remote == service,
        "curl does not see the address that it dialled"
    );
    // One curl process, with one connection per request.
    let url = format!("http://{service}{path}?[2-{CALLS}]");
    let arguments = [
        "-sS",
        "-m",
        "20",
        "--noproxy",
        "*",
        "-H",
        "Connection: close",
        &url,
    ];
    stage.mesh.pod(CLIENT).run("curl", arguments)?.ok()?;
    let count = |pod: &str| {
        let requests = stage.nginx(pod).requests();
        requests
            .iter()
            .filter(|request| request.path.starts_with(&path))
            .count()
    };
    let (first, second) = soon("nginx to log all requests", || {
        let counts = (count("web-1"), count("web-2"));
        (counts.0 + counts.1 >= CALLS).then_some(counts)
    })
    .with_context(|| format!("web-1 got {}, web-2 {}", count("web-1"), count("web-2")))?;
    evidence.saw(format!(
        "of {CALLS} connections, web-1 got {first} and web-2 {second}"
    ));
    ensure!(first > 0 && second > 0, "one endpoint was never used");
    Ok(())
}

pub(super) fn ipv6(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (client, web) = (stage.mesh.pod(CLIENT), stage.mesh.pod("web-1"));
    let path = stage.path("ipv6");
    let capture = stage.mesh.wire().capture()?;
    let answer = stage.ask(web.at6(PORT), &path)?;
    let recording = capture.stop()?;
    let request = stage.request("web-1", &path)?;
    evidence.saw(format!(
        "curl {} -> {}; nginx logged the client {} port {}",
        answer.local, answer.remote, request.remote_address, request.remote_port
    ));
    ensure!(
        SocketAddr::new(request.remote_address, request.remote_port) == answer.local
            && request.remote_address == client.ipv6(),
        "nginx did not see the client pod's IPv6 address"
    );
    ensure!(
        answer.remote == web.at6(PORT),
        "curl does not see the address that it dialled"
    );
    only_tls(
        &recording,
        client.ipv6().into(),
        web.ipv6().into(),
        &stage.marker,
        evidence,
    )?;
    let service = SocketAddr::new(WEB_V6.parse()?, 80);
    let answer = stage.ask(service, &stage.path("ipv6-service"))?;
    evidence.saw(format!(
        "curl http://{service} was answered: {:?}",
        answer.body
    ));
    Ok(())
}

/// Enough requests that chance misses one of two endpoints only once in eight million runs.
const CALLS: usize = 24;
