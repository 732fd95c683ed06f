//! Networks that lose packets: connections through two daemons survive what TCP survives.

use std::time::{Duration, Instant};

use mesh_tests::{DaemonOptions, Firewall, Result, TIMEOUT, eventually, slowdown};

use crate::common::pair::Pair;

#[test]
fn waits_for_a_server_that_answers_late() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = pair.web.app("echo-server --port 7")?.listening()?;
    // Three SYNs are lost. The first leaves at once, the third after two or three seconds, depending on the kernel's version.
    let rules = "counter dropped {}\n\
        chain forward { type filter hook forward priority 0; \
        tcp flags & (syn | ack) == syn limit rate 1/day burst 3 packets counter name dropped drop; }";
    let firewall = Firewall::install(pair.mesh.node("b"), rules)?;
    let to = pair.web.at(7);
    let client = pair
        .client
        .app(&format!("connect --to {to} --send hi --shutdown --read"))?;
    assert_eq!(client.success(TIMEOUT)?["text"], "hi");
    assert_eq!(firewall.packets("dropped")?, 3);
    Ok(())
}

#[test]
fn replaces_a_tunnel_whose_peer_vanished() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = pair.web.app("echo-server --port 7")?.listening()?;
    let to = pair.web.at(7);
    let talk = || {
        let command = format!("connect --to {to} --send hi --shutdown --read");
        pair.client.app(&command)?.success(TIMEOUT)
    };
    talk()?;
    let idle = eventually(TIMEOUT, "an idle tunnel", || {
        let sockets = pair.client.endpoints().ok()?;
        sockets.into_iter().find(|socket| socket.remote == to)
    })?;
    // As if a firewall had forgotten the connection: it drops this one, and lets a new one pass.
    let rules = format!(
        "chain forward {{ type filter hook forward priority 0; tcp sport {} drop; }}",
        idle.local.port()
    );
    let _firewall = Firewall::install(pair.mesh.node("b"), &rules)?;
    let start = Instant::now();
    assert_eq!(talk()?["text"], "hi");
    let took = start.elapsed();
    assert!(
        took < Duration::from_secs(8) * slowdown(),
        "it took {took:?}"
    );
    Ok(())
}

#[test]
fn connections_survive_packet_loss() -> Result<()> {
    for options in [
        DaemonOptions::default(),
        DaemonOptions::default().permissive(),
    ] {
        let pair = Pair::start_with(&options, |builder| builder)?;
        let _echo = pair.web.app("echo-server --port 7 --quiet")?.listening()?;
        // Every twentieth packet. At random, one of so many connections would at times lose all of its SYNs.
        let rules = "counter dropped {}\nchain forward { type filter hook forward priority 0; \
            numgen inc mod 20 == 0 counter name dropped drop; }";
        let firewall = Firewall::install(pair.mesh.node("b"), rules)?;
        let to = pair.web.at(7);
        let many = pair
            .client
            .app(&format!("many --to {to} --connections 200"))?
            .finish(TIMEOUT)?;
        assert!(firewall.packets("dropped")? > 0);
        let events = many.json_lines();
        let last = events.last();
        assert!(
            last.is_some_and(|last| last["failed"] == 0),
            "{last:?}, {:?}",
            pair.near
                .access_log()
                .iter()
                .find(|line| line["result"] != "ok")
        );
    }
    Ok(())
}
