//! A network namespace nested in a pod, such as a container engine's in a pod, behind a port of the pod.

use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};

use mesh_tests::{App, Context, DaemonOptions, Firewall, Place, Result, TIMEOUT, eventually_ok};
use serde_json::{Value, json};

use crate::common::pair::Pair;

/// The port of the pod `web` that leads to [`NESTED_PORT`] of the nested namespace.
const PORT: u16 = 8080;
const NESTED_PORT: u16 = 80;
const MARKER: &str = "marker-for-the-nested-server";

/// Fields are dropped in this order: the programs, then the mesh.
struct Stage {
    echo: App,
    _published: Firewall,
    nested: Place,
    pair: Pair,
}

impl Stage {
    fn start(options: &DaemonOptions) -> Result<Self> {
        let pair = Pair::start_with(options, |builder| builder)?;
        let (nested, v4, v6) = pair.mesh.nest(&pair.web)?;
        let published = Firewall::published_port(
            &pair.web,
            PORT,
            SocketAddrV4::new(v4, NESTED_PORT),
            SocketAddrV6::new(v6, NESTED_PORT, 0, 0),
        )?;
        let echo = nested.app("echo-server --port 80")?.listening()?;
        Ok(Self {
            echo,
            _published: published,
            nested,
            pair,
        })
    }

    fn ports(&self) -> [SocketAddr; 2] {
        [self.pair.web.at(PORT), self.pair.web.at6(PORT)]
    }
}

fn is_answered(from: &Place, to: SocketAddr) -> Result<bool> {
    let command = format!("connect --to {to} --timeout 5000 --send {MARKER} --shutdown --read");
    let events = from.app(&command)?.finish(TIMEOUT)?.json_lines();
    Ok(events.last().context("no event")?["text"] == MARKER)
}

/// Asserts that a connection is reset.
fn assert_reset(from: &Place, to: SocketAddr) -> Result<()> {
    let command = format!("connect --to {to} --timeout 5000 --send {MARKER} --read");
    let event = from.app(&command)?.failure(TIMEOUT)?;
    assert_eq!(event["errno"], "ECONNRESET", "{event}");
    Ok(())
}

fn peer_authentication(mode: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": "web", "namespace": "default"}, "spec": {"mtls": {"mode": mode}},
    })
}

#[test]
fn a_strict_pod_forwards_nothing_from_outside() -> Result<()> {
    let stage = Stage::start(&DaemonOptions::default())?;
    let outside = stage.pair.mesh.outside().clone();
    // The interface to the nested namespace is new.
    for to in stage.ports() {
        eventually_ok(TIMEOUT, &format!("{to} to be refused"), || {
            let answered = is_answered(&outside, to)?;
            (!answered).then_some(()).context("not yet")
        })?;
    }
    let before = stage.echo.events_of("accepted").len();
    let Pair { near, far, .. } = &stage.pair;
    for to in stage.ports() {
        assert_reset(&outside, to)?;
        far.wait_for_access("the refusal", TIMEOUT, |line| {
            let reason = line["reason"].as_str().unwrap_or_default();
            let client = line["client"].as_str().unwrap_or_default();
            line["result"] == "refused"
                && line["destination"] == to.to_string()
                && client.parse::<SocketAddr>().is_ok_and(|client| {
                    let mesh = &stage.pair.mesh;
                    client.ip() == mesh.outside_ipv4() || client.ip() == mesh.outside_ipv6()
                })
                && reason.starts_with("the pod forwards it to ")
                && reason.contains(&format!(":{NESTED_PORT},"))
        })?;
        // The mesh's tunnel does not lead there either.
        assert!(!is_answered(&stage.pair.client, to)?, "{to} from the mesh");
        near.wait_for_access("the refusal", TIMEOUT, |line| {
            line["result"] == "refused" && line["destination"] == to.to_string()
        })?;
    }
    assert_eq!(stage.echo.events_of("accepted").len(), before);
    // The node's probes reach the server behind the port.
    for to in stage.ports() {
        assert!(
            is_answered(stage.pair.mesh.node("b"), to)?,
            "{to} from the node"
        );
    }
    // The pod itself is served.
    let _own = stage.pair.web.app("echo-server --port 8081")?.listening()?;
    for to in [stage.pair.web.at(8081), stage.pair.web.at6(8081)] {
        assert!(is_answered(&stage.pair.client, to)?, "{to} from the mesh");
        assert!(!is_answered(&outside, to)?, "{to} from outside");
    }
    Ok(())
}

#[test]
fn connections_that_the_nested_namespace_opens_work() -> Result<()> {
    let stage = Stage::start(&DaemonOptions::default())?;
    let mesh = &stage.pair.mesh;
    let _echo = mesh.outside().app("echo-server --port 8080")?.listening()?;
    for to in [
        SocketAddr::from((mesh.outside_ipv4(), 8080)),
        (mesh.outside_ipv6(), 8080).into(),
    ] {
        assert!(is_answered(&stage.nested, to)?, "{to}");
    }
    Ok(())
}

#[test]
fn forwarding_follows_the_mode_and_outlives_the_daemon() -> Result<()> {
    let stage = Stage::start(&DaemonOptions::default().permissive())?;
    let outside = stage.pair.mesh.outside().clone();
    let ports = stage.ports();
    let becomes = |answered: bool| -> Result<()> {
        for to in ports {
            eventually_ok(TIMEOUT, &format!("{to} to be answered: {answered}"), || {
                (is_answered(&outside, to)? == answered)
                    .then_some(())
                    .context("not yet")
            })?;
        }
        Ok(())
    };
    becomes(true)?;
    let manifests = stage.pair.mesh.manifests();
    manifests.apply(&peer_authentication("STRICT"))?;
    becomes(false)?;
    manifests.apply(&peer_authentication("PERMISSIVE"))?;
    becomes(true)?;
    manifests.apply(&peer_authentication("STRICT"))?;
    becomes(false)?;
    let Stage {
        echo,
        _published,
        pair: Pair { far, mesh, .. },
        ..
    } = stage;
    let accepted = echo.events_of("accepted").len();
    far.kill()?;
    for to in ports {
        assert!(!is_answered(&outside, to)?, "{to} without a daemon");
        assert!(is_answered(mesh.node("b"), to)?, "{to} from the node");
    }
    assert_eq!(echo.events_of("accepted").len(), accepted + 2, "the node's");
    // After unload, nothing is refused.
    mesh.node("b").unload()?.ok()?;
    for to in ports {
        assert!(is_answered(&outside, to)?, "{to} after unloading");
    }
    Ok(())
}

#[test]
fn forwarded_connections_end_when_the_pod_becomes_strict() -> Result<()> {
    let stage = Stage::start(&DaemonOptions::default().permissive())?;
    let mesh = &stage.pair.mesh;
    let outside = mesh.outside();
    let _echo = outside.app("echo-server --port 8080")?.listening()?;
    let chat = |from: &Place, to: SocketAddr| -> Result<App> {
        let mut chat = from.app(&format!("chat --to {to}"))?;
        chat.event("round", TIMEOUT)?;
        Ok(chat)
    };
    let mut forwarded = Vec::new();
    for to in stage.ports() {
        eventually_ok(TIMEOUT, "the first answer", || {
            is_answered(outside, to)?.then_some(()).context("not yet")
        })?;
        forwarded.push(chat(outside, to)?);
    }
    let mut others = [
        chat(mesh.node("b"), stage.ports()[0])?,
        chat(&stage.pair.web, (mesh.outside_ipv4(), 8080).into())?,
        chat(&stage.nested, (mesh.outside_ipv4(), 8080).into())?,
        chat(&stage.nested, (mesh.outside_ipv6(), 8080).into())?,
    ];
    mesh.manifests().apply(&peer_authentication("STRICT"))?;
    for chat in forwarded {
        let event = chat.failure(TIMEOUT)?;
        assert_eq!(event["errno"], "ECONNRESET", "{event}");
    }
    let line = stage.pair.far.wait_for_log("the end", TIMEOUT, |line| {
        let message = line["message"].as_str().unwrap_or_default();
        message.starts_with("forwarded connections ended")
    })?;
    assert_eq!(line["connections"], 2, "{line}");
    // Another scan has passed by then.
    std::thread::sleep(std::time::Duration::from_secs(2));
    for chat in &mut others {
        let before = chat.events_of("round").len();
        eventually_ok(TIMEOUT, "another round", || {
            (chat.events_of("round").len() > before)
                .then_some(())
                .context("not yet")
        })?;
    }
    Ok(())
}
