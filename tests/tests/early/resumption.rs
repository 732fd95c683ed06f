//! Sessions between real daemons: resumed if nothing has changed, and not with another owner of the server's address.

use std::net::IpAddr;

use crate::common::early::{Ledger, echo, line_of, script, spoken};
use crate::common::pair::Pair;
use crate::common::resumption::{self, handshakes, held};
use mesh_tests::{Mesh, Pod, PodSpec, Result, TIMEOUT, eventually, eventually_ok};

const PORT: u16 = 7000;

fn spiffe(account: &str) -> String {
    format!("spiffe://cluster.local/ns/default/sa/{account}")
}

#[test]
fn resumed_handshake_sends_no_certificate() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = pair
        .web
        .app("echo-server --port 7000 --quiet")?
        .listening()?;
    for to in [pair.web.at(PORT), pair.web.at6(PORT)] {
        let capture = pair.mesh.wire().capture()?;
        let first = held(&pair.client, to)?;
        let others = (0..4)
            .map(|_| held(&pair.client, to))
            .collect::<Result<Vec<_>>>()?;
        let seen = handshakes(&capture.stop()?, to);
        println!("{seen:#?}");
        assert_eq!(seen.len(), 5, "{seen:#?}");
        assert!(!seen[0].offered && !seen[0].resumed, "{seen:#?}");
        for later in &seen[1..] {
            assert!(later.offered && later.resumed, "{seen:#?}");
            // Two certificates with signatures take at least a kilobyte.
            let bytes = |seen: &resumption::Handshake| seen.from_server + seen.from_client;
            assert!(later.from_server + 500 < seen[0].from_server, "{seen:#?}");
            assert!(bytes(later) < bytes(&seen[0]), "{seen:#?}");
        }
        drop((first, others));
    }
    let daemons = [&pair.near, &pair.far];
    eventually_ok(TIMEOUT, "the lines", || {
        for daemon in daemons {
            let lines = daemon.access_log();
            anyhow::ensure!(lines.len() == 10, "{} lines", lines.len());
            for line in lines {
                // A resumed session has the same two identities.
                assert_eq!(line["client_identity"], spiffe("client"), "{line}");
                assert_eq!(line["server_identity"], spiffe("web"), "{line}");
            }
        }
        Ok(())
    })
}

#[test]
fn concurrent_handshakes_resume_later() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = pair
        .web
        .app("echo-server --port 7000 --quiet")?
        .listening()?;
    let to = pair.web.at(PORT);
    let at_once = |count: usize| -> Result<Vec<resumption::Handshake>> {
        let capture = pair.mesh.wire().capture()?;
        let app = pair
            .client
            .app(&format!("many --to {to} --connections {count} --hold 300"))?;
        let done = app.success(TIMEOUT)?;
        assert_eq!(done["failed"], 0, "{done}");
        Ok(handshakes(&capture.stop()?, to))
    };
    let first = at_once(6)?;
    assert!((1..=6).contains(&first.len()), "{first:#?}");
    // Both daemons end a connection after the app has.
    eventually_ok(TIMEOUT, "the tunnels to be idle", || {
        let idle = pair.near.status()?.pool.idle;
        anyhow::ensure!(idle == first.len() as u64, "{idle} are");
        Ok(())
    })?;
    // More than the idle tunnels, so the rest needs handshakes. Each full handshake leaves a session.
    let sessions = first.iter().filter(|seen| !seen.resumed).count();
    // The first SYN need not belong to the first hello.
    assert!(sessions >= 1, "{first:#?}");
    let second = at_once(9)?;
    println!("{} then {}", first.len(), second.len());
    assert!(!second.is_empty() && second.len() < 9, "{second:#?}");
    let resumed = second.iter().filter(|seen| seen.resumed).count();
    assert!(
        resumed >= sessions.min(second.len()),
        "{sessions} sessions: {second:#?}"
    );
    Ok(())
}

/// An address that moves to a pod of another account on another node.
#[test]
fn session_is_not_resumed_when_the_address_changes_owner() -> Result<()> {
    let mesh = Mesh::builder()
        .node("a")
        .node("b")
        .node("c")
        .pod(PodSpec::new("client").on("a").service_account("client"))
        .pod(
            PodSpec::new("web")
                .on("b")
                .service_account("web")
                .ipv4_only(),
        )
        .start()?;
    let daemons = mesh.start_daemons()?;
    let (near, client, web) = (&daemons[0], mesh.pod("client"), mesh.pod("web"));
    let (to, ledger) = (web.at(PORT), Ledger::default());
    let server = echo(&web, to, "web", &ledger)?;
    drop(held(&client, to)?);
    drop(server);
    mesh.remove_pod_quietly("web")?;
    // The client's node does not know yet; the others do.
    for node in ["b", "c"] {
        mesh.node(node)
            .manifests()
            .remove("Pod", "default", "web")?;
    }
    let evil = PodSpec::new("evil").on("c").service_account("evil");
    let evil = mesh.add_pod_quietly(evil.ipv4_only())?;
    take_over(&mesh, &evil, to.ip())?;
    let mut manifest = evil.manifest();
    manifest["status"]["podIP"] = to.ip().to_string().into();
    manifest["status"]["podIPs"] = serde_json::json!([{"ip": to.ip()}]);
    mesh.node("b").manifests().apply(&manifest)?;
    mesh.node("c").manifests().apply(&manifest)?;
    daemons[2].wait_enrolled(&["default/evil"])?;
    let _server = echo(&evil, to, "evil", &ledger)?;

    let capture = mesh.wire().capture()?;
    let spokes = spoken(script(&client, to, "secret", "send:100,end,rest")?)?;
    assert!(spokes[0].was_reset(), "{}", spokes[0].0);
    let line = line_of(near, &spokes[0])?;
    let reason = line["reason"].as_str().unwrap_or_default();
    let named = format!(
        "presents {}, but may only be {}",
        spiffe("evil"),
        spiffe("web")
    );
    assert!(reason.contains(&named), "{line}");
    assert_eq!(ledger.takers("secret"), [""; 0]);
    let seen = handshakes(&capture.stop()?, to);
    println!("{seen:?}");
    assert!(
        !seen.is_empty() && seen.iter().all(|seen| !seen.resumed),
        "{seen:#?}"
    );

    // Now the client's node knows, and dials the other pod.
    let capture = mesh.wire().capture()?;
    mesh.node("a").manifests().remove("Pod", "default", "web")?;
    mesh.node("a").manifests().apply(&manifest)?;
    let account = mesh.node("a").manifests();
    account.apply(&serde_json::json!({
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": "evil", "namespace": "default"},
    }))?;
    let line = eventually_ok(TIMEOUT, "the other one to be known", || {
        let spokes = spoken(script(&client, to, "known", "send:100,end,rest")?)?;
        anyhow::ensure!(spokes[0].was_echoed(), "{}", spokes[0].0);
        line_of(near, &spokes[0])
    })?;
    assert_eq!(line["server_identity"], spiffe("evil"), "{line}");
    let seen = handshakes(&capture.stop()?, to);
    // The refused handshakes left sessions with the other pod, which may be resumed; those of web may not.
    println!("{seen:?}");
    assert!(ledger.of("known").iter().all(|taken| taken.who == "evil"));
    Ok(())
}

/// Gives a pod another node's address, as a CNI plugin without a network per node does.
fn take_over(mesh: &Mesh, pod: &Pod, address: IpAddr) -> Result<()> {
    let run = |place: &mesh_tests::Place, command: String| -> Result<()> {
        place
            .run("ip", command.split_whitespace())
            .and_then(mesh_tests::Finished::ok)
            .map(drop)
    };
    run(pod, format!("addr add {address}/32 dev eth0"))?;
    let (to, own) = (mesh.node("c").ipv4(), pod.ipv4());
    run(
        pod,
        format!("route change default via 10.77.3.1 src {address}"),
    )?;
    run(
        mesh.node("c"),
        format!("route replace {address}/32 via {own}"),
    )?;
    run(
        mesh.node("a"),
        format!("route replace {address}/32 via {to}"),
    )?;
    eventually(TIMEOUT, "the address to be routed", || {
        let ping = mesh
            .node("a")
            .run("ping", ["-c1", "-W1", &address.to_string()]);
        // Without the app there is nothing to wait for.
        ping.map_or(Some(()), |ping| ping.status.success().then_some(()))
    })
}
