//! A pod has its share of the kernel's records of connections under way. One that takes more is refused, and its neighbours
//! notice nothing.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::ensure;
use mesh_tests::{App, DaemonOptions, Place, Pod, Result, TIMEOUT, eventually_ok};
use serde_json::Value;

use crate::common::neighbours::{Neighbours, builder, echo};

/// A pod's share.
const SHARE: u64 = 2048;
/// More than a share and the queue of a listener.
const MANY: u64 = 3000;
/// Connections whose closing would fill the ring buffer of events, which has room for 8,192: two for each.
const RING: u64 = 4600;
/// Connections of a neighbour.
const FEW: u64 = 30;
/// Time in which all connections of a client that has ended are gone. Where the listener's queue was full, the kernel repeats
/// their FIN at intervals that double, so the last may take a minute.
const ENDED: Duration = Duration::from_secs(120);
/// Length of the queues of listeners in pods, so that many connections stay half open.
const QUEUE: u64 = 16;

/// The stage, where listeners in `client` and `web` have short queues, with echo servers on ports 8080 and 8081 of `web`.
fn stage() -> Result<(Neighbours, [App; 2])> {
    let mesh = builder().start()?;
    for pod in ["client", "web"] {
        mesh.pod(pod)
            .netns()
            .set_parameters(&[("net/core/somaxconn", &QUEUE.to_string())])?;
    }
    let daemon = mesh
        .start_daemons_with(&DaemonOptions::default())?
        .remove(0);
    let stage = Neighbours {
        daemon,
        client: mesh.pod("client"),
        other: mesh.pod("other"),
        web: mesh.pod("web"),
        mesh,
    };
    let server = |port| {
        let server = format!("echo-server --port {port} --quiet");
        stage.web.app(&server)?.listening()
    };
    let servers = [server(8080)?, server(8081)?];
    Ok((stage, servers))
}

fn half_open(from: &Place, to: SocketAddr) -> Result<(App, Value)> {
    let mut app = from.app(&format!("half-open --to {to} --connections {MANY}"))?;
    let begun = app.event("begun", TIMEOUT)?;
    Ok((app, begun))
}

/// Number of connections under way, of all pods and the node.
fn under_way(stage: &Neighbours) -> Result<u64> {
    let status = stage.daemon.status_json()?;
    Ok(status["kernel"]["underWay"].as_u64().unwrap_or(u64::MAX))
}

fn wait_for_none_under_way(stage: &Neighbours) -> Result<()> {
    eventually_ok(ENDED, "no connection to be under way", || {
        let count = under_way(stage)?;
        ensure!(count == 0, "{count}");
        Ok(())
    })
}

/// Asserts that the connects beyond the share of `client` were refused, and that the log and the status say so.
fn assert_refused(stage: &Neighbours, start: u64, begun: &Value) -> Result<()> {
    let (held, refused) = (begun["held"].as_u64(), begun["refused"].as_u64());
    assert_eq!(begun["failed"], 0, "{begun}");
    let most = SHARE + QUEUE + 1;
    assert!(held >= Some(SHARE) && held <= Some(most), "{begun}");
    assert!(refused >= Some(MANY - most), "{begun}");
    stage
        .daemon
        .wait_for_log_after(start, "the warning", TIMEOUT, |line| {
            line["pod"] == "default/client"
                && line["limit"] == SHARE
                && line["message"]
                    .as_str()
                    .is_some_and(|text| text.starts_with("connects refused"))
        })?;
    eventually_ok(TIMEOUT, "the status to tell", || {
        ensure!(over_share(stage, "default/client")? == refused, "{begun}");
        Ok(())
    })?;
    assert_eq!(over_share(stage, "default/other")?, None);
    Ok(())
}

fn over_share(stage: &Neighbours, pod: &str) -> Result<Option<u64>> {
    let status = stage.daemon.status_json()?;
    let pods = status["pods"].as_array().cloned().unwrap_or_default();
    let mut pods = pods.iter();
    let found = pods.find(|found| found["pod"] == pod);
    Ok(found.and_then(|found| found["overShare"].as_u64()))
}

fn echoes(from: &Pod, to: SocketAddr) -> Result<()> {
    for _ in 0..20 {
        echo(from, to)?;
    }
    Ok(())
}

#[test]
fn connects_to_a_neighbour_beyond_a_pods_share_are_refused() -> Result<()> {
    let (stage, [mut stopped, _server]) = stage()?;
    let (to, elsewhere) = (stage.web.at(8080), stage.web.at(8081));
    stage.decide(to)?;
    wait_for_none_under_way(&stage)?;
    stopped.process().suspend()?;

    let start = stage.daemon.log_position();
    let (flood, begun) = half_open(&stage.client, to)?;
    assert_refused(&stage, start, &begun)?;
    assert_eq!(under_way(&stage)?, SHARE);
    // Another destination, too.
    let dial = format!("dial --to {elsewhere} --send hello");
    let answer = stage.client.app(&dial)?.failure(TIMEOUT)?;
    assert_eq!(answer["errno"], "EPERM", "{answer}");
    // By the daemon, and then by the kernel alone.
    stage.decide_from(&stage.other, elsewhere)?;
    echoes(&stage.other, elsewhere)?;

    drop(flood);
    wait_for_none_under_way(&stage)?;
    echoes(&stage.client, elsewhere)
}

#[test]
fn captured_connects_beyond_a_pods_share_are_refused() -> Result<()> {
    let (stage, _servers) = stage()?;
    let to = stage.web.at(8080);
    wait_for_none_under_way(&stage)?;
    let start = stage.daemon.log_position();
    // Nobody accepts captured connections.
    stage.daemon.suspend()?;
    let flooded = half_open(&stage.client, to);
    let neighbour = stage.other.app(&format!("dial --to {to} --send hello"));
    stage.daemon.resume()?;
    let (flood, begun) = flooded?;
    let answer = neighbour?.success(TIMEOUT)?;
    assert_eq!(answer["text"], "hello", "{answer}");
    drop(flood);
    assert_refused(&stage, start, &begun)?;
    wait_for_none_under_way(&stage)?;
    echoes(&stage.client, to)
}

#[test]
fn a_pod_that_closes_connections_faster_than_they_are_logged_costs_its_neighbours_no_line()
-> Result<()> {
    let stage = Neighbours::start()?;
    let _sink = stage.web.app("sink --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    let hoard = |from: &Pod, connections| {
        let mut hoard = from.app(&format!("hoard --to {to} --connections {connections}"))?;
        hoard.event("opened", TIMEOUT)?;
        Ok::<_, anyhow::Error>(hoard)
    };
    drop((hoard(&stage.client, 1)?, hoard(&stage.other, 1)?));
    eventually_ok(TIMEOUT, "verdicts", || {
        ensure!(stage.verdicts()? == 2, "{} verdicts", stage.verdicts()?);
        Ok(())
    })?;
    let hoards = [
        (&stage.client, hoard(&stage.client, RING)?),
        (&stage.other, hoard(&stage.other, FEW)?),
    ];
    let start = stage.daemon.log_position();
    // Nobody reads the events.
    stage.daemon.suspend()?;
    let closed = hoards.into_iter().try_for_each(|(pod, hoard)| {
        drop(hoard);
        eventually_ok(TIMEOUT, "the connections to close", || {
            let live = pod.sockets()?.live();
            ensure!(live < FEW as usize, "{live} sockets");
            Ok(())
        })
    });
    stage.daemon.resume()?;
    closed?;
    let address = stage.other.ipv4().to_string();
    let mut lines = 0;
    stage
        .daemon
        .wait_for_log_after(start, "the neighbour's lines", TIMEOUT, |line| {
            let client = line["client"].as_str().unwrap_or_default();
            if line["path"] == "same-node" && client.starts_with(&address) {
                lines += 1;
            }
            // Both ends log a connection. The first few are the daemon's, until there is a verdict.
            lines >= 2 * (FEW - 5)
        })?;
    stage
        .daemon
        .wait_for_log_after(start, "the warning", TIMEOUT, |line| {
            line["pod"] == "default/client"
                && line["lost"].as_u64() > Some(RING / 2)
                && line["message"]
                    .as_str()
                    .is_some_and(|text| text.starts_with("access log lines left out"))
        })?;
    Ok(())
}

#[test]
fn connects_of_the_node_beyond_its_share_are_not_recorded() -> Result<()> {
    let (stage, [mut stopped, _server]) = stage()?;
    let (to, elsewhere) = (stage.web.at(8080), stage.web.at(8081));
    wait_for_none_under_way(&stage)?;
    stopped.process().suspend()?;
    let (flood, begun) = half_open(stage.mesh.node("a").place(), to)?;
    assert_eq!(begun["refused"], 0, "{begun}");
    assert_eq!(under_way(&stage)?, SHARE);
    // The pods' connections have shares of their own.
    echoes(&stage.client, elsewhere)?;
    stage.decide_from(&stage.other, elsewhere)?;
    drop(flood);
    wait_for_none_under_way(&stage)
}
