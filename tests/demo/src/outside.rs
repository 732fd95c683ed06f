//! Hosts outside of the mesh: they cannot connect without a certificate, and connections to them are not intercepted.

use std::net::SocketAddr;

use anyhow::{Result, ensure};

use super::evidence::Evidence;
use super::stage::{CLIENT, LOGGED, NODE_A, NODE_B, OUTSIDE, PORT, Stage};

pub(super) fn plaintext_refused(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let web = stage.mesh.pod("web-1");
    let b = stage.daemon(NODE_B)?;
    let start = b.log_position();
    let path = stage.path("from-outside");
    let outside = stage.mesh.outside();
    let why = stage.ask_in_vain(outside, web.at(PORT), &path)?;
    evidence.saw(format!(
        "curl from {} to http://{}: {why}",
        stage.mesh.outside_ipv4(),
        web.at(PORT)
    ));
    let line = b.wait_for_log_after(start, "the refusal", LOGGED, |line| {
        let caller = line["client"].as_str().unwrap_or_default();
        line["target"] == "access" && caller.starts_with(&stage.mesh.outside_ipv4().to_string())
    })?;
    evidence.saw(format!(
        "{NODE_B} logged: result={} reason={}",
        line["result"].as_str().unwrap_or_default(),
        line["reason"].as_str().unwrap_or_default()
    ));
    ensure!(line["result"] == "refused", "it was not refused");
    let after = stage.path("from-inside");
    stage.ask(web.at(PORT), &after)?;
    stage.request("web-1", &after)?;
    let seen = stage.requests("web-1", &path).len();
    evidence.saw(format!(
        "nginx logged a later request of the client pod, and {seen} from outside"
    ));
    ensure!(seen == 0, "the request from outside reached nginx");
    Ok(())
}

pub(super) fn non_mesh_untouched(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (client, a) = (stage.mesh.pod(CLIENT), stage.daemon(NODE_A)?);
    let b = stage.daemon(NODE_B)?;
    let starts = [a.log_position(), b.log_position()];
    let before = [a.status()?.kernel, b.status()?.kernel];
    let server = SocketAddr::new(stage.mesh.outside_ipv4().into(), PORT);
    let path = stage.path("outside");
    let capture = stage.mesh.wire().capture()?;
    let answer = stage.ask(server, &path)?;
    let recording = capture.stop()?;
    let after = [a.status()?.kernel, b.status()?.kernel];
    let request = stage.request(OUTSIDE, &path)?;
    evidence.saw(format!(
        "curl {} -> {}; nginx outside logged the client {}:{}",
        answer.local, answer.remote, request.remote_address, request.remote_port
    ));
    let streams = recording
        .tcp_between(client.ipv4().into(), server.ip())
        .streams();
    let own: Vec<_> = streams
        .iter()
        .filter(|stream| stream.client == answer.local && stream.server == server)
        .collect();
    let readable = recording.contains(stage.marker.as_bytes());
    evidence.saw(format!(
        "on the wire: {} connection, from curl's own socket; the marker is {}readable",
        streams.len(),
        if readable { "" } else { "not " }
    ));
    ensure!(
        streams.len() == 1 && own.len() == 1,
        "the connection is not curl's own: {:?}",
        recording.connections()
    );
    ensure!(readable, "something encrypts what is not the mesh's");
    for (node, (before, after)) in [NODE_A, NODE_B].into_iter().zip(before.iter().zip(&after)) {
        evidence.saw(format!(
            "{node}'s maps before and after: {} and {} mesh addresses, {} and {} connections on their way, {} and {} pods",
            before.mesh_addresses,
            after.mesh_addresses,
            before.originals,
            after.originals,
            before.pods,
            after.pods
        ));
    }
    ensure!(
        before == after,
        "the maps have grown: {before:?}, {after:?}"
    );
    // Log lines are in order: if the next connection's line is there, this connection's line would be as well.
    let web = stage.mesh.pod("web-1").at(PORT);
    stage.ask(web, &stage.path("fence"))?;
    for (daemon, start) in [a, b].into_iter().zip(starts) {
        daemon.wait_for_log_after(start, "the next connection", LOGGED, |line| {
            line["target"] == "access" && line["destination"] == web.to_string()
        })?;
        let lines = daemon.access_log();
        let touching = lines.iter().filter(|line| {
            let text = line.to_string();
            text.contains(&server.to_string()) || text.contains(&answer.local.to_string())
        });
        let count = touching.count();
        evidence.saw(format!(
            "{}: {count} of {} access-log lines speak of it",
            daemon.node(),
            lines.len()
        ));
        ensure!(count == 0, "a daemon has carried it");
    }
    Ok(())
}
