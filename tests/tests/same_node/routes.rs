//! The kernel carries connections between pods of a node only where the node's routes lead from one pod's link to the other's.
//! Some networks send these packets out of the node and back: GKE by its intranode visibility, AWS by its security groups for
//! pods. TLS protects them there.

use std::net::IpAddr;

use mesh_tests::{DaemonOptions, Mesh, Pod, Result, TIMEOUT, eventually_ok};

use crate::common::neighbours::{
    MESSAGE, Neighbours, builder, echo, is_direct, verdicts, wait_for_verdicts,
};

/// The table of routes that lead out of the node.
const OUT: &str = "77";

#[test]
fn pods_whose_packets_leave_the_node_use_tls() -> Result<()> {
    for one_way in [false, true] {
        let mesh = builder().start()?;
        reflect(&mesh)?;
        // If only the answers leave the node, they are secret, too.
        let diverted = [mesh.pod("client"), mesh.pod("web")];
        for pod in &diverted[usize::from(one_way)..] {
            divert(&mesh, "add", pod)?;
        }
        let stage = Neighbours::on(mesh, &DaemonOptions::default())?;
        let _server = stage.web.app("echo-server --port 8080")?.listening()?;
        let capture = stage.mesh.wire().capture()?;
        for to in stage.ways() {
            for _ in 0..3 {
                let start = stage.daemon.log_position();
                echo(&stage.client, to)?;
                for line in stage.lines(start, to, 2)? {
                    assert_eq!(line["path"], "tunnel", "{line}");
                    assert_eq!(line["result"], "ok", "{line}");
                }
            }
        }
        assert_eq!(stage.verdicts()?, 0);
        // One for each address family.
        assert_eq!(stage.daemon.status_json()?["sameNode"]["diverted"], 2);
        let recording = capture.stop()?;
        assert!(!recording.contains(MESSAGE.as_bytes()));
        let (client, web) = (stage.client.ipv4().into(), stage.web.ipv4().into());
        let outside = recording.tcp_between(client, web);
        assert!(!outside.packets().is_empty(), "nothing has left the node");
        // Others are not concerned.
        let _other = stage.other.app("echo-server --port 8080")?.listening()?;
        if one_way {
            stage.decide(stage.other.at(8080))?;
        }
    }
    Ok(())
}

#[test]
fn connections_end_when_their_packets_begin_to_leave_the_node() -> Result<()> {
    let stage = Neighbours::start()?;
    reflect(&stage.mesh)?;
    // By a rule for what comes from the pod, and by a route of the other pod's address.
    for by_route in [false, true] {
        let port = 8080 + u16::from(by_route);
        let _server = stage
            .web
            .app(&format!("echo-server --port {port}"))?
            .listening()?;
        let to = stage.web.at(port);
        let chat = |direct| -> Result<_> {
            let mut chat = stage.client.app(&format!("chat --to {to} --interval 10"))?;
            let ends = chat.event("connected", TIMEOUT)?;
            assert_eq!(is_direct(&stage.client, &ends["local"])?, direct, "{ends}");
            chat.event("round", TIMEOUT)?;
            Ok((chat, ends["local"].clone()))
        };
        let before = stage.verdicts()?;
        // One that the daemon carries, and one that the kernel carries.
        let chats = [chat(false)?, chat(true)?];
        wait_for_verdicts(&stage.daemon, before + 1)?;
        let start = stage.daemon.log_position();
        let change = |verb: &str| match by_route {
            true => {
                let out = stage.mesh.outside_ipv4();
                let route = format!("{}/32 via {out} dev eth0 onlink table {OUT}", to.ip());
                ip(&stage.mesh, &format!("route {verb} {route}"))
            }
            false => divert(&stage.mesh, verb, &stage.client),
        };
        change("add")?;
        wait_for_verdicts(&stage.daemon, 0)?;
        for (mut chat, local) in chats {
            assert!(!chat.process().wait(TIMEOUT)?.success());
            let ended = |line: &serde_json::Value| {
                line["target"] == "access"
                    && line["direction"] == "outbound"
                    && line["client"] == local
            };
            let line = stage
                .daemon
                .wait_for_log_after(start, "the end", TIMEOUT, ended)?;
            assert_eq!(line["result"], "reset", "{line}");
            let reason = line["reason"].as_str().unwrap_or_default();
            assert!(reason.contains("may leave the node"), "{line}");
        }
        let wait_for_path = |path: &str| {
            eventually_ok(TIMEOUT, path, || {
                let start = stage.daemon.log_position();
                echo(&stage.client, to)?;
                let lines = stage.lines(start, to, 2)?;
                anyhow::ensure!(lines.iter().all(|line| line["path"] == path), "{lines:?}");
                Ok(())
            })
        };
        wait_for_path("tunnel")?;
        assert_eq!(stage.verdicts()?, 0);
        change("del")?;
        wait_for_path("same-node")?;
        wait_for_verdicts(&stage.daemon, 1)?;
        if !by_route {
            // From now on, the table of the rule is empty where it does not lead to the pods.
            ip(&stage.mesh, &format!("route flush table {OUT}"))?;
            ip(
                &stage.mesh,
                &format!("-4 rule add iif {} lookup {OUT}", stage.client.link()),
            )?;
            wait_for_path("same-node")?;
        }
    }
    Ok(())
}

#[test]
fn routes_that_change_without_a_daemon_end_verdicts_and_connections() -> Result<()> {
    let stage = Neighbours::start()?;
    reflect(&stage.mesh)?;
    let _server = stage.web.app("echo-server --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    stage.decide(to)?;
    let mut chat = stage.client.app(&format!("chat --to {to}"))?;
    let ends = chat.event("connected", TIMEOUT)?;
    assert!(is_direct(&stage.client, &ends["local"])?);
    let Neighbours {
        daemon,
        client,
        mesh,
        ..
    } = stage;
    assert!(daemon.terminate(TIMEOUT)?.success());
    divert(&mesh, "add", &client)?;
    let daemon = mesh.node("a").start_daemon()?;
    assert_eq!(verdicts(&daemon)?, 0);
    assert_eq!(chat.failure(TIMEOUT)?["errno"], "ECONNRESET");
    echo(&client, to)?;
    let line = daemon.wait_for_access("the tunnel", TIMEOUT, |line| line["path"] == "tunnel")?;
    assert_eq!(line["result"], "ok", "{line}");
    Ok(())
}

/// Makes the host outside send what the pods send to each other back to their node.
fn reflect(mesh: &Mesh) -> Result<()> {
    let node = mesh.node("a").place();
    let everywhere = |name: &str| ["all", "eth0"].map(|at| format!("net/ipv4/conf/{at}/{name}"));
    // The node takes packets of its pods from outside.
    for parameter in everywhere("rp_filter") {
        node.netns().set_parameters(&[(parameter.as_str(), "0")])?;
    }
    let outside = mesh.outside().netns();
    for parameter in everywhere("rp_filter")
        .into_iter()
        .chain(everywhere("send_redirects"))
    {
        outside.set_parameters(&[(parameter.as_str(), "0")])?;
    }
    outside.set_parameters(&[
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
    ])?;
    for out in [IpAddr::V4(mesh.outside_ipv4()), mesh.outside_ipv6().into()] {
        ip(
            mesh,
            &format!("route add default via {out} dev eth0 onlink table {OUT}"),
        )?;
    }
    Ok(())
}

/// Adds or deletes the rules that send out of the node what comes from the pod.
fn divert(mesh: &Mesh, verb: &str, pod: &Pod) -> Result<()> {
    for family in ["-4", "-6"] {
        let rule = format!("{family} rule {verb} iif {} lookup {OUT}", pod.link());
        ip(mesh, &rule)?;
    }
    Ok(())
}

fn ip(mesh: &Mesh, arguments: &str) -> Result<()> {
    mesh.node("a").run("ip", arguments.split(' '))?.ok()?;
    Ok(())
}
