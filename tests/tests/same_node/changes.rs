//! A verdict lasts, also across a restart of the daemon, for as long as the daemon would grant it again.

use std::fs;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mesh_tests::{
    App, DaemonOptions, Mesh, PodSpec, Result, ServiceSpec, TIMEOUT, eventually,
    vm::skipped_when_emulated,
};
use serde_json::Value;

use crate::common::neighbours::{
    self, Neighbours, echo, is_direct, refused, verdicts, wait_for_verdicts,
};

#[test]
fn verdicts_are_removed_when_either_pod_changes_its_account() -> Result<()> {
    for (pod, field) in [("web", "server_identity"), ("client", "client_identity")] {
        let stage = Neighbours::start()?;
        let _server = stage.web.app("echo-server --port 8080")?.listening()?;
        let to = stage.web.at(8080);
        stage.decide(to)?;
        stage.mesh.manifests().edit("Pod", "default", pod, |pod| {
            pod["spec"]["serviceAccountName"] = "promoted".into();
        })?;
        wait_for_verdicts(&stage.daemon, 0)?;
        wait_for_account(&stage, pod, "promoted")?;
        let start = stage.daemon.log_position();
        let mut chat = stage
            .client
            .app(&format!("chat --to {to} --rounds 2 --interval 300"))?;
        let ends = chat.event("connected", TIMEOUT)?;
        assert!(!is_direct(&stage.client, &ends["local"])?);
        chat.success(TIMEOUT)?;
        for line in stage.lines(start, to, 2)? {
            assert_eq!(line[field], spiffe("promoted"), "{line}");
        }
        wait_for_verdicts(&stage.daemon, 1)?;
    }
    Ok(())
}

#[test]
fn change_of_a_service_removes_only_its_own_verdict() -> Result<()> {
    let stage = Neighbours::start_with(&DaemonOptions::default(), |builder| {
        builder.pod(
            PodSpec::new("web-2")
                .on("a")
                .label("app", "web")
                .not_ready(),
        )
    })?;
    let _server = stage.web.app("echo-server --port 8080")?.listening()?;
    let _other = stage.web.app("echo-server --port 8090")?.listening()?;
    let service: SocketAddr = neighbours::SERVICES[0].parse()?;
    stage.decide(service)?;
    stage.decide(stage.web.at(8080))?;
    // The service gets another target port.
    stage
        .mesh
        .manifests()
        .edit("Service", "default", "web", |service| {
            service["spec"]["ports"][0]["targetPort"] = 8090.into();
        })?;
    wait_for_verdicts(&stage.daemon, 1)?;
    stage.decide(service)?;
    let start = stage.daemon.log_position();
    echo(&stage.client, service)?;
    for line in stage.lines(start, service, 2)? {
        assert_eq!(line["endpoint"], stage.web.at(8090).to_string(), "{line}");
    }
    // The service gets another pod.
    stage
        .mesh
        .manifests()
        .edit("Pod", "default", "web-2", |pod| {
            pod["status"]["conditions"][0]["status"] = "True".into();
        })?;
    wait_for_verdicts(&stage.daemon, 1)?;
    // Pinned to an account that is not the pod's.
    stage
        .mesh
        .manifests()
        .edit("Pod", "default", "web-2", |pod| {
            pod["status"]["conditions"][0]["status"] = "False".into();
        })?;
    eventually(TIMEOUT, "a verdict on the service", || {
        echo(&stage.client, service).ok()?;
        (stage.verdicts().ok()? == 2).then_some(())
    })?;
    stage
        .mesh
        .manifests()
        .edit("Service", "default", "web", |service| {
            service["metadata"]["annotations"]["auth-daemon.io/service-accounts"] = "nobody".into();
        })?;
    wait_for_verdicts(&stage.daemon, 1)?;
    refused(&stage.client, service)?;
    // Only the service's verdict is removed.
    let mut chat = stage.client.app(&format!(
        "chat --to {} --rounds 2 --interval 300",
        stage.web.at(8080)
    ))?;
    let ends = chat.event("connected", TIMEOUT)?;
    assert!(is_direct(&stage.client, &ends["local"])?);
    chat.success(TIMEOUT)?;
    Ok(())
}

#[test]
fn removed_pod_loses_its_verdicts() -> Result<()> {
    let stage = Neighbours::start()?;
    let server = stage.web.app("echo-server --port 8080")?.listening()?;
    for client in [&stage.client, &stage.other] {
        stage.decide_from(client, stage.web.at(8080))?;
        stage.decide_from(client, neighbours::SERVICES[0].parse()?)?;
    }
    stage.mesh.remove_pod("other")?;
    wait_for_verdicts(&stage.daemon, 2)?;
    // Recreated under the same name, in another netns.
    drop(server);
    stage.mesh.recreate_pod("web")?;
    wait_for_verdicts(&stage.daemon, 0)?;
    let web = stage.mesh.pod("web");
    let _server = web.app("echo-server --port 8080")?.listening()?;
    // Connections use the tunnel until the daemon has seen that the new pod's link is private.
    eventually(TIMEOUT, "a verdict on the new pod", || {
        echo(&stage.client, web.at(8080)).ok()?;
        (stage.verdicts().ok()? == 1).then_some(())
    })?;
    stage.mesh.remove_pod("web")?;
    wait_for_verdicts(&stage.daemon, 0)?;
    Ok(())
}

#[test]
fn connections_end_when_either_pod_changes_its_account() -> Result<()> {
    for (pod, account) in [("web", "web"), ("client", "client")] {
        let stage = Neighbours::start()?;
        let _server = stage.web.app("echo-server --port 8080")?.listening()?;
        let _server6 = stage.web.app("echo-server --port 8081")?.listening()?;
        let _bystander = stage.other.app("echo-server --port 8080")?.listening()?;
        let ways = [stage.web.at(8080), stage.web.at6(8081)];
        for to in ways {
            stage.decide(to)?;
        }
        // A connection between pods that do not change: to another server if the client changes.
        let (from, beside) = match pod {
            "web" => (&stage.client, stage.other.at(8080)),
            _ => (&stage.other, stage.web.at(8080)),
        };
        stage.decide_from(from, beside)?;
        let mut goes = from.app(&format!("chat --to {beside}"))?;
        let ends = goes.event("connected", TIMEOUT)?;
        assert!(is_direct(from, &ends["local"])?);
        let mut chats = Vec::new();
        for to in ways {
            let mut chat = stage.client.app(&format!("chat --to {to}"))?;
            let ends = chat.event("connected", TIMEOUT)?;
            assert!(is_direct(&stage.client, &ends["local"])?);
            chats.push(chat);
        }
        let start = stage.daemon.log_position();
        stage.mesh.manifests().edit("Pod", "default", pod, |pod| {
            pod["spec"]["serviceAccountName"] = "promoted".into();
        })?;
        for (chat, to) in chats.into_iter().zip(ways) {
            let failed = chat.failure(TIMEOUT)?;
            assert_eq!(failed["errno"], "ECONNRESET", "{failed}");
            for line in stage.lines(start, to, 2)? {
                assert_eq!(line["result"], "reset", "{line}");
                let reason = line["reason"].as_str().unwrap_or_default();
                let expected = format!("sa/{account} has left this node, or the mesh");
                assert!(reason.ends_with(&expected), "{line}");
            }
        }
        goes_on(&goes)?;
    }
    Ok(())
}

#[test]
fn verdicts_hold_until_the_lease_of_a_dead_daemon_expires() -> Result<()> {
    let stage = Neighbours::start()?;
    let _server = stage.web.app("echo-server --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    stage.decide(to)?;
    let chat = stage.client.app(&format!("chat --to {to}"))?;
    goes_on(&chat)?;
    let Neighbours {
        daemon,
        client,
        mesh,
        web,
        ..
    } = stage;
    // Its process runs before the daemon dies, because the lease is short.
    let go = client.folder().join("go");
    let mut dial = client.app(&format!(
        "dial --to {to} --send {} --after {}",
        neighbours::MESSAGE,
        go.display()
    ))?;
    dial.event("socket", TIMEOUT)?;
    daemon.kill()?;
    let died = Instant::now();
    fs::write(&go, "")?;
    assert_eq!(dial.success(TIMEOUT)?["text"], neighbours::MESSAGE);
    // Destinations without a verdict are refused at once, and all others after the lease.
    refused(&client, web.at6(8080))?;
    eventually(TIMEOUT, "the end of the lease", || {
        refuses(&client, to).then_some(())
    })?;
    // It was renewed at most some moments before.
    let held = died.elapsed();
    assert!(
        (Duration::from_secs(2)..Duration::from_secs(15)).contains(&held),
        "it held for {held:?}"
    );
    // An open connection is not affected.
    goes_on(&chat)?;

    let daemon = mesh.node("a").start_daemon()?;
    // The next daemon logs connections that closed meanwhile.
    for direction in ["outbound", "inbound"] {
        let line = daemon.wait_for_access("what closed without a daemon", TIMEOUT, |line| {
            line["direction"] == direction && line["bytes_to_server"] == 19
        })?;
        for (field, value) in [
            ("client_identity", spiffe("client")),
            ("server_identity", spiffe("web")),
            ("path", "same-node".into()),
            ("result", "ok".into()),
        ] {
            assert_eq!(line[field], value, "{line}");
        }
    }
    // The new daemon would decide the same, so the verdict holds.
    assert_eq!(verdicts(&daemon)?, 1);
    echo(&client, to)?;
    let start = daemon.log_position();
    drop(chat);
    daemon.wait_for_log_after(start, "the long connection", TIMEOUT, |line| {
        line["path"] == "same-node"
            && line["direction"] == "outbound"
            && line["client_identity"] == spiffe("client")
    })?;
    Ok(())
}

#[test]
fn restart_interrupts_no_connection() -> Result<()> {
    if skipped_when_emulated("restart_interrupts_no_connection") {
        return Ok(());
    }
    let stage = Neighbours::start()?;
    let _server = stage
        .web
        .app("echo-server --port 8080 --quiet")?
        .listening()?;
    let to = stage.web.at(8080);
    let service = neighbours::SERVICES[0].parse()?;
    stage.decide(to)?;
    stage.decide(service)?;
    let chat = stage.client.app(&format!("chat --to {to} --interval 10"))?;
    goes_on(&chat)?;
    let Neighbours {
        daemon,
        client,
        mesh,
        ..
    } = stage;
    // Connections all the time, a hundred at once, because each keeps a port busy for a minute.
    let over = AtomicBool::new(false);
    let daemon = thread::scope(|scope| {
        let dialling = [to, service].map(|to| {
            let (client, over) = (&client, &over);
            scope.spawn(move || -> Result<u64> {
                let mut hundreds = 0;
                while !over.load(Ordering::Relaxed) {
                    client
                        .app(&format!("churn --to {to} --connections 100"))?
                        .success(TIMEOUT)?;
                    hundreds += 1;
                }
                Ok(hundreds)
            })
        });
        let restarted = daemon
            .terminate(TIMEOUT)
            .and_then(|_| mesh.node("a").start_daemon())
            .and_then(|daemon| echo(&client, to).map(|_| daemon));
        over.store(true, Ordering::Relaxed);
        for dialled in dialling {
            let hundreds = dialled.join().expect("it does not panic")?;
            assert!(hundreds > 0);
        }
        restarted
    })?;
    goes_on(&chat)?;
    assert_eq!(verdicts(&daemon)?, 2);
    Ok(())
}

#[test]
fn changes_made_while_no_daemon_ran_are_applied() -> Result<()> {
    let stage = Neighbours::start()?;
    let _server = stage.web.app("echo-server --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    stage.decide(to)?;
    stage.decide_from(&stage.other, to)?;
    let Neighbours {
        daemon,
        client,
        other,
        mesh,
        ..
    } = stage;
    assert!(daemon.terminate(TIMEOUT)?.success());
    mesh.manifests().edit("Pod", "default", "other", |pod| {
        pod["metadata"]["annotations"]["auth-daemon.io/mesh"] = "disabled".into();
    })?;
    let daemon = mesh.node("a").start_daemon()?;
    assert_eq!(verdicts(&daemon)?, 1);
    echo(&client, to)?;
    refused(&other, to)?;
    Ok(())
}

#[test]
fn pods_communicate_in_plaintext_after_unload() -> Result<()> {
    let stage = Neighbours::start()?;
    let _server = stage.web.app("echo-server --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    stage.decide(to)?;
    let chat = stage.client.app(&format!("chat --to {to}"))?;
    goes_on(&chat)?;
    let Neighbours {
        daemon,
        client,
        mesh,
        other,
        ..
    } = stage;
    assert!(daemon.terminate(TIMEOUT)?.success());
    mesh.node("a").unload()?.ok()?;
    for pod in [&client, &other] {
        let answer = echo(pod, to)?;
        assert_eq!(answer["peer"], to.to_string(), "{answer}");
    }
    goes_on(&chat)?;
    Ok(())
}

#[test]
fn same_node_tunnel_mode_writes_no_verdicts() -> Result<()> {
    let stage = Neighbours::start()?;
    let _server = stage.web.app("echo-server --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    stage.decide(to)?;
    let Neighbours {
        daemon,
        client,
        mesh,
        ..
    } = stage;
    assert!(daemon.terminate(TIMEOUT)?.success());
    let daemon = mesh
        .node("a")
        .start_daemon_with(DaemonOptions::default().same_node_tunnel())?;
    eventually(TIMEOUT, "the tunnel", || {
        let start = daemon.log_position();
        echo(&client, to).ok()?;
        let line = daemon.wait_for_log_after(start, "a connection", TIMEOUT, |line| {
            line["target"] == "access" && line["direction"] == "outbound"
        });
        (line.ok()?["path"] == "tunnel").then_some(())
    })?;
    Ok(())
}

#[test]
fn service_in_front_of_a_remote_pod_gets_no_verdict() -> Result<()> {
    let mesh = Mesh::builder()
        .node("a")
        .node("b")
        .pod(PodSpec::new("client").on("a"))
        .pod(PodSpec::new("far").on("b").label("app", "far"))
        .service(
            ServiceSpec::new("far")
                .selector("app", "far")
                .address("10.96.0.9")
                .port(80, 8080),
        )
        .start()?;
    let daemons = mesh.start_daemons()?;
    let (client, far) = (mesh.pod("client"), mesh.pod("far"));
    let _server = far.app("echo-server --port 8080")?.listening()?;
    let capture = mesh.wire().capture()?;
    for to in [far.at(8080), "10.96.0.9:80".parse()?] {
        for _ in 0..2 {
            echo(&client, to)?;
        }
    }
    assert!(!capture.stop()?.contains(neighbours::MESSAGE.as_bytes()));
    for daemon in &daemons {
        assert_eq!(verdicts(daemon)?, 0);
    }
    Ok(())
}

/// Waits until a conversation makes progress.
fn goes_on(chat: &App) -> Result<()> {
    let rounds = chat.events_of("round").len();
    eventually(TIMEOUT, "the conversation to continue", || {
        (chat.events_of("round").len() > rounds + 1).then_some(())
    })
}

fn refuses(client: &mesh_tests::Pod, to: SocketAddr) -> bool {
    let answer = client
        .app(&format!("connect --to {to}"))
        .and_then(|app| app.finish(TIMEOUT))
        .map(|finished| finished.json_lines());
    answer.is_ok_and(|events| {
        events
            .iter()
            .any(|event| event["errno"] == "ECONNREFUSED" && event["stage"] == "connect")
    })
}

fn wait_for_account(stage: &Neighbours, pod: &str, account: &str) -> Result<()> {
    let name = format!("default/{pod}");
    eventually(TIMEOUT, &format!("{pod} to be {account}"), || {
        let status = stage.daemon.status().ok()?;
        status
            .pods
            .iter()
            .any(|pod| pod.pod == name && pod.enrolled && spiffe(account) == pod.identity)
            .then_some(())
    })
}

fn spiffe(account: &str) -> Value {
    format!("spiffe://cluster.local/ns/default/sa/{account}").into()
}
