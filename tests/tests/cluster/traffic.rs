//! Steps about traffic between pods, and what is visible of it on the wire and in the access log.

use std::net::{IpAddr, SocketAddr};

pub(crate) use mesh_tests::cluster::apps::{MARKER, PORT, server, server_pod};
use mesh_tests::{Context, Recording, Result, Stream, eventually_ok};
use serde_json::{Value, json};

use crate::stage::{
    APPS, NODES, PATIENCE, Stage, account, address, addresses, ensure, idle_pod, name, status_of,
};
use crate::workloads::evicted_pod;

/// The cluster IP of a service of the apps.
pub(crate) fn service_address(stage: &Stage, name: &str) -> Result<String> {
    let service = stage.get(&format!("service -n {APPS} {name}"))?;
    Ok(service["spec"]["clusterIP"]
        .as_str()
        .unwrap_or_default()
        .to_owned())
}

/// The URL of `/cgi-bin/who` of a service.
pub(crate) fn who(stage: &Stage, service: &str) -> Result<String> {
    Ok(format!(
        "http://{}/cgi-bin/who",
        service_address(stage, service)?
    ))
}

/// The client pods of the first and the second node.
pub(crate) fn clients() -> [&'static str; 2] {
    ["client-1", "client-2"]
}

/// Starts a client and a server on each node: `client-1` and `web-1`, `client-2` and `web-2`.
pub(crate) fn apps_start(stage: &Stage) -> Result<()> {
    // A later step waits for the eviction.
    let mut objects = vec![account("client"), evicted_pod()];
    for (node, (client, web)) in NODES
        .into_iter()
        .zip(clients().into_iter().zip(["web-1", "web-2"]))
    {
        objects.extend(server(web, Some(node), 1));
        objects.push(idle_pod(client, node, "client"));
    }
    stage.apply(&objects)?;
    for web in ["web-1", "web-2"] {
        stage.rolled_out(APPS, &format!("deployment/{web}"))?;
    }
    stage.becomes("pod/client-1 pod/client-2", "Ready")
}

/// Checks that everything between two addresses is TLS 1.3: one plaintext hello from each side, then encrypted records.
fn is_tls_1_3(recording: &Recording, client: IpAddr, server: IpAddr) -> Result<()> {
    let streams = recording.tcp_between(client, server).streams();
    ensure(!streams.is_empty(), || {
        "no connection crossed the wire".to_owned()
    })?;
    for stream in &streams {
        ensure(stream.server.port() == PORT, || {
            format!("to a port that is not the app's: {}", stream.server)
        })?;
        hides_all(stream)?;
    }
    Ok(())
}

fn hides_all(stream: &Stream) -> Result<()> {
    let (sent, received) = stream.tls_records()?;
    for records in [sent, received] {
        let kinds: Vec<u8> = records.iter().map(|record| record.content_type).collect();
        // A handshake record (22), perhaps a change_cipher_spec (20), application data (23): RFC 8446, appendix D.4.
        // Up to TLS 1.2, certificates are in records of kind 22.
        let tls_1_3 = kinds.first() == Some(&22)
            && kinds[1..].iter().all(|kind| [20, 23].contains(kind))
            && kinds.iter().filter(|kind| **kind == 20).count() <= 1;
        ensure(tls_1_3 && kinds.contains(&23), || {
            format!("{} to {}: {kinds:?}", stream.client, stream.server)
        })?;
    }
    Ok(())
}

/// Waits until the daemons know the services and have the certificates of the pods. None of this opens a tunnel between a
/// client and its server.
fn daemons_know_the_apps(stage: &Stage) -> Result<()> {
    for (node, (neighbour, web)) in NODES
        .into_iter()
        .zip([("web-1", "web-2"), ("web-2", "web-1")])
    {
        let neighbour = stage.pod(APPS, &format!("app={neighbour}"))?;
        eventually_ok(PATIENCE, "an answer", || {
            stage.curl(name(&neighbour), &who(stage, web)?)
        })?;
        eventually_ok(PATIENCE, "the client's certificate", || {
            let status = status_of(stage, node)?;
            let held = status["certificates"].as_array().into_iter().flatten();
            let mut of_client = held.filter(|one| one["identity"] == identity("client"));
            let is_issued = of_client.any(|one| one["serial"].is_string());
            ensure(is_issued, || status["certificates"].to_string())
        })?;
    }
    Ok(())
}

pub(crate) fn pods_talk_tls(stage: &Stage) -> Result<()> {
    daemons_know_the_apps(stage)?;
    for (client, web) in [("client-1", "web-2"), ("client-2", "web-1")] {
        let client_addresses = addresses(&stage.get(&format!("pod -n {APPS} {client}"))?)?;
        let web_addresses = addresses(&stage.pod(APPS, &format!("app={web}"))?)?;
        let service = stage.get(&format!("service -n {APPS} {web}"))?;
        let cluster_ips = service["spec"]["clusterIPs"]
            .as_array()
            .context("no address")?;
        for ((client_address, web_address), cluster_ip) in client_addresses
            .into_iter()
            .zip(web_addresses)
            .zip(cluster_ips)
        {
            let cluster_ip: IpAddr = cluster_ip.as_str().unwrap_or_default().parse()?;
            let capture = stage.cluster.wire().capture()?;
            for to in [
                SocketAddr::from((cluster_ip, 80)),
                SocketAddr::from((web_address, PORT)),
            ] {
                let answer = stage.curl(client, &format!("http://{to}/cgi-bin/who"))?;
                let expected = format!("{client_address} asked {web}");
                ensure(
                    answer.contains(MARKER) && answer.contains(&expected),
                    || format!("{to}: {answer:?} instead of {expected:?}"),
                )?;
            }
            let recording = capture.stop()?;
            is_tls_1_3(&recording, client_address, web_address)?;
            ensure(!recording.contains(MARKER.as_bytes()), || {
                format!("{MARKER} is readable on the wire")
            })?;
        }
    }
    // Traffic within a node does not cross the wire.
    for (client, web) in [("client-1", "web-1"), ("client-2", "web-2")] {
        let answer = stage.curl(client, &who(stage, web)?)?;
        ensure(answer.contains(MARKER), || answer.clone())?;
    }
    Ok(())
}

/// The access log lines of a daemon's log.
pub(crate) fn access(log: &str) -> impl Iterator<Item = Value> + '_ {
    log.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter(|line: &Value| line["target"] == "access")
}

/// The identity of a service account of the apps.
pub(crate) fn identity(account: &str) -> String {
    format!("spiffe://cluster.local/ns/{APPS}/sa/{account}")
}

/// Waits until the access log of a node has such a line.
pub(crate) fn log_has(stage: &Stage, node: &str, wanted: impl Fn(&Value) -> bool) -> Result<()> {
    eventually_ok(PATIENCE, "a line of the access log", || {
        logged(stage, node, &wanted)
    })
}

/// Fails unless the access log of a node has such a line by now.
pub(crate) fn logged(stage: &Stage, node: &str, wanted: impl Fn(&Value) -> bool) -> Result<()> {
    let log = stage.daemon_log(node)?;
    ensure(access(&log).any(|line| wanted(&line)), || {
        let lines: Vec<_> = access(&log).map(|line| line.to_string()).collect();
        let last = &lines[lines.len().saturating_sub(20)..];
        format!("{node}: {}", last.join("\n"))
    })
}

/// Waits until the access log of a node has a tunnelled connection between two accounts, and, where given, to an endpoint
/// that starts with this string.
pub(crate) fn log_has_tunnel(
    stage: &Stage,
    node: &str,
    client: &str,
    server: &str,
    endpoint: Option<&str>,
) -> Result<()> {
    log_has(stage, node, |line| {
        let at = line["endpoint"].as_str().unwrap_or_default();
        line["path"] == "tunnel"
            && line["client_identity"] == identity(client)
            && line["server_identity"] == identity(server)
            && endpoint.is_none_or(|endpoint| at.starts_with(endpoint))
            && line["result"] == "ok"
    })
    .with_context(|| format!("{client} to {server}"))
}

pub(crate) fn log_names_callers(stage: &Stage) -> Result<()> {
    for node in NODES {
        log_has_tunnel(stage, node, "client", "web-1", None)?;
        log_has_tunnel(stage, node, "client", "web-2", None)?;
    }
    // The server's node logs the client pod's own address.
    let client_address = address(&stage.get(&format!("pod -n {APPS} client-1"))?).to_owned();
    let client = format!("{client_address}:");
    log_has(stage, "node2", |line| {
        let at = line["client"].as_str().unwrap_or_default();
        line["direction"] == "inbound" && at.starts_with(&client) && line["result"] == "ok"
    })
    .with_context(|| format!("no connection from {client_address}"))
}

pub(crate) fn outsiders_are_refused(stage: &Stage) -> Result<()> {
    let mut outsider = idle_pod("outsider", "node1", "client");
    outsider["metadata"]["labels"]["auth-daemon.io/mesh"] = json!("disabled");
    stage.apply(&[outsider])?;
    stage.becomes("pod/outsider", "Ready")?;
    // By the pod's address, and by the service's, which kube-proxy translates.
    let web = address(&stage.pod(APPS, "app=web-2")?).to_owned();
    let urls = [
        format!("http://{web}:{PORT}/cgi-bin/who"),
        who(stage, "web-2")?,
    ];
    let outsider = stage.get(&format!("pod -n {APPS} outsider"))?;
    let outsider_address: IpAddr = address(&outsider).parse()?;
    // Its own node refuses it, too, until the daemon knows that it is outside the mesh.
    eventually_ok(PATIENCE, "a line with the reason", || {
        for url in &urls {
            let answer = stage.curl("outsider", url);
            assert!(answer.is_err(), "it was answered: {answer:?}");
        }
        ensure(
            has_refused_plaintext(stage, "node2", &[outsider_address])?,
            || format!("none from {outsider_address}"),
        )
    })?;
    stage
        .kubectl(&format!("delete pod -n {APPS} outsider --now --wait=false"))
        .map(drop)
}

/// Whether the daemon on `node` has refused plaintext from one of `clients`, and has logged it with the reason.
pub(crate) fn has_refused_plaintext(stage: &Stage, node: &str, clients: &[IpAddr]) -> Result<bool> {
    let log = stage.daemon_log(node)?;
    Ok(access(&log).any(|line| {
        let text = |field: &str| line[field].as_str().unwrap_or_default();
        let client: Option<SocketAddr> = text("client").parse().ok();
        line["result"] == "refused"
            && client.is_some_and(|client| clients.contains(&client.ip()))
            && text("reason").contains("plaintext, and the port takes STRICT")
    }))
}

pub(crate) fn probes_have_passed(stage: &Stage) -> Result<()> {
    for web in ["web-1", "web-2"] {
        stage.rolled_out(APPS, &format!("deployment/{web}"))?;
        let pod = stage.pod(APPS, &format!("app={web}"))?;
        let status = &pod["status"]["containerStatuses"][0];
        // An earlier step killed one of them. A failing probe would restart it repeatedly.
        ensure(status["restartCount"].as_u64() <= Some(1), || {
            format!("{}: {status}", name(&pod))
        })?;
    }
    Ok(())
}
