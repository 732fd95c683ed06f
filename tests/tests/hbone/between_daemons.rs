//! HBONE between two daemons of ours: the manifest of the server's pod says that it is reached by HBONE.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::{DaemonOptions, Mesh, PodSpec, ServiceSpec, TIMEOUT, eventually_ok};
use serde_json::json;

use crate::common::pair::Pair;
use crate::endings::{half_close, server_resets};

/// Limit for operations that take seconds on an idle machine.
const LONG: Duration = Duration::from_secs(180);

fn pair() -> Result<Pair> {
    let web = PodSpec::new("web")
        .on("b")
        .service_account("web")
        .label("app", "web")
        .annotation("ambient.istio.io/redirection", "enabled");
    let service = ServiceSpec::new("web")
        .selector("app", "web")
        .address("10.96.0.7")
        .address("fd96::7")
        .port(80, 8080);
    let mesh = Mesh::builder()
        .node("a")
        .node("b")
        .pod(PodSpec::new("client").on("a").service_account("client"))
        .pod(web)
        .service(service)
        .start()?;
    Pair::on(mesh, &DaemonOptions::default())
}

#[test]
fn carries_bytes_both_ways_and_names_both_identities() -> Result<()> {
    let pair = pair()?;
    let recording = pair.mesh.wire().capture_start_of_packets(0)?;
    let _server = pair.web.app("bidi --port 14 --quiet")?.listening()?;
    let each = 64_u64 << 20;
    for to in [pair.web.at(14), pair.web.at6(14)] {
        let bidi = format!("bidi --to {to} --bytes {} --streams 4", each / 4);
        let done = pair.client.app(&bidi)?.success(LONG)?;
        ensure!(
            (done["sent"].as_u64(), done["received"].as_u64()) == (Some(each), Some(each)),
            "{done}"
        );
    }
    for daemon in [&pair.near, &pair.far] {
        let lines = eventually_ok(TIMEOUT, "eight lines in the access log", || {
            let log = daemon.access_log();
            (log.len() == 8).then_some(log).context("not eight")
        })?;
        for line in lines {
            ensure!(line["path"] == "hbone" && line["result"] == "ok", "{line}");
            ensure!(
                line["client_identity"] == "spiffe://cluster.local/ns/default/sa/client"
                    && line["server_identity"] == "spiffe://cluster.local/ns/default/sa/web",
                "{line}"
            );
        }
    }
    // One connection to each address carried them, and nothing went to the app's own port.
    let connections = recording.stop()?.connections();
    let ports: Vec<u16> = connections.iter().map(|(_, to)| to.port()).collect();
    ensure!(ports == [15008, 15008], "{connections:?}");
    Ok(())
}

#[test]
fn endings_arrive_as_they_were() -> Result<()> {
    let pair = pair()?;
    // Through the service, whose endpoint it is.
    half_close(&pair.client, &pair.web, 8080, "10.96.0.7:80")?;
    server_resets(&pair.client, &pair.web, 10, pair.web.at(10))?;

    let mut echo = pair.web.app("echo-server --port 7")?.listening()?;
    let reset = format!("reset --to {} --after 5", pair.web.at(7));
    pair.client.app(&reset)?.success(TIMEOUT)?;
    let served = echo.event("closed", TIMEOUT)?;
    ensure!(served["errno"] == "ECONNRESET", "{served}");

    let refused = format!("connect --to {} --read", pair.web.at(9));
    pair.client.app(&refused)?.failure(TIMEOUT)?;
    let line = pair
        .near
        .wait_for_access("the refusal", TIMEOUT, |line| line["result"] == "refused")?;
    let reason = line["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("503"), "{line}");
    Ok(())
}

#[test]
fn a_thousand_streams_are_open_at_once() -> Result<()> {
    let pair = pair()?;
    let _echo = pair.web.app("echo-server --port 7 --quiet")?.listening()?;
    let done = pair.client.folder().join("seen");
    let many = format!(
        "many --to {} --connections 1000 --until {}",
        pair.web.at(7),
        done.display()
    );
    let mut many = pair.client.app(&many)?;
    let open = many.event("open", LONG)?;
    ensure!(open["failed"] == 0, "{open}");
    let tunnels = pair.web.sockets()?;
    println!("{tunnels:?}");
    ensure!(pair.far.status()?.connections.len() == 1000);
    fs::write(done, "")?;
    ensure!(many.success(LONG)?["failed"] == 0);
    Ok(())
}

#[test]
fn a_client_learns_that_a_policy_denies_it() -> Result<()> {
    let pair = pair()?;
    let _echo = pair.web.app("echo-server --port 7 --quiet")?.listening()?;
    pair.mesh.manifests().apply(&json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "nobody", "namespace": "default"},
        "spec": {"action": "ALLOW", "rules": []},
    }))?;
    let connect = format!("connect --to {} --send x --shutdown --read", pair.web.at(7));
    eventually_ok(TIMEOUT, "the policy to refuse", || {
        pair.client.app(&connect)?.failure(TIMEOUT)?;
        let line = pair
            .near
            .wait_for_access("401", Duration::from_secs(1), |line| {
                line["reason"]
                    .as_str()
                    .is_some_and(|reason| reason.contains("401"))
            })?;
        ensure!(line["path"] == "hbone", "{line}");
        Ok(())
    })
}

#[test]
fn another_identity_than_the_services_is_refused() -> Result<()> {
    let pair = pair()?;
    let _echo = pair
        .web
        .app("echo-server --port 8080 --quiet")?
        .listening()?;
    // Node a takes the pod for one of another account.
    pair.mesh
        .node("a")
        .manifests()
        .edit("Pod", "default", "web", |pod| {
            pod["spec"]["serviceAccountName"] = "other".into();
        })?;
    let connect = format!(
        "connect --to {} --send x --shutdown --read",
        pair.web.at(8080)
    );
    eventually_ok(TIMEOUT, "secure naming to refuse", || {
        pair.client.app(&connect)?.failure(TIMEOUT)?;
        pair.near
            .wait_for_access("secure naming", Duration::from_secs(1), |line| {
                line["reason"]
                    .as_str()
                    .is_some_and(|reason| reason.contains("secure naming"))
            })?;
        Ok(())
    })
}
