//! A pod whose HBONE is Envoy's reaches our pods.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use mesh_tests::{TIMEOUT, eventually_ok};
use serde_json::json;

use super::{APP, Facing, PEER};
use crate::endings::{half_close, server_resets};

/// Envoy's loopback ports.
const BYTES: u16 = 9001;
const BYTES6: u16 = 9002;
const HALF_CLOSE: u16 = 9003;
const RESET: u16 = 9004;
const ECHO: u16 = 9005;
const MALFORMED: u16 = 9400;
const DENIED: u16 = 9401;
const UNREACHABLE: u16 = 9503;

#[test]
fn envoy_reaches_our_pods() -> Result<()> {
    let started = Facing::start("envoy_reaches_our_pods", |config, app, peer, log| {
        let ports = [
            (BYTES, app.at(14)),
            (HALF_CLOSE, app.at(15)),
            (RESET, app.at(10)),
            (ECHO, app.at(7)),
            (MALFORMED, peer.at(7)),
            (DENIED, app.at(11)),
            (UNREACHABLE, app.at(9)),
        ];
        config.call(app.at(0).ip(), "app", &ports, log);
        config.call(app.at6(0).ip(), "app", &[(BYTES6, app.at6(14))], log);
    })?;
    let Some(facing) = started else { return Ok(()) };
    bytes(&facing)?;
    half_close(&facing.peer, &facing.app, 15, at(HALF_CLOSE))?;
    resets(&facing)?;
    refusals(&facing)
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn bytes(facing: &Facing) -> Result<()> {
    let _server = facing.app.app("bidi --port 14 --quiet")?.listening()?;
    let each = 16_u64 << 20;
    for (port, to, from) in [
        (BYTES, facing.app.at(14), facing.peer.at(0)),
        (BYTES6, facing.app.at6(14), facing.peer.at6(0)),
    ] {
        let bidi = format!("bidi --to {} --bytes {} --streams 4", at(port), each / 4);
        let done = facing.peer.app(&bidi)?.success(4 * TIMEOUT)?;
        ensure!(
            (done["sent"].as_u64(), done["received"].as_u64()) == (Some(each), Some(each)),
            "{done}"
        );
        let to = to.to_string();
        let line =
            facing.wait_for_access((PEER, APP), &[("destination", &to), ("result", "ok")])?;
        let client: SocketAddr = line["client"].as_str().unwrap_or_default().parse()?;
        ensure!(client.ip() == from.ip(), "{line}");
        let line = facing.wait_for_line(&[("destination", &to)])?;
        ensure!(line["server"] == APP, "{line}");
    }
    Ok(())
}

fn resets(facing: &Facing) -> Result<()> {
    server_resets(&facing.peer, &facing.app, 10, at(RESET))?;

    let mut echo = facing.app.app("echo-server --port 7")?.listening()?;
    let reset = format!("reset --to {} --after 5", at(ECHO));
    facing.peer.app(&reset)?.success(TIMEOUT)?;
    let served = echo.event("closed", TIMEOUT)?;
    ensure!(served["errno"] == "ECONNRESET", "{served}");
    Ok(())
}

fn refusals(facing: &Facing) -> Result<()> {
    facing.mesh.manifests().apply(&json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "no-eleven", "namespace": "default"},
        "spec": {"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["11"]}}]}]},
    }))?;
    let _denied = facing
        .app
        .app("echo-server --port 11 --quiet")?
        .listening()?;
    for (port, to, code) in [
        (DENIED, facing.app.at(11), "401"),
        (MALFORMED, facing.peer.at(7), "400"),
        (UNREACHABLE, facing.app.at(9), "503"),
    ] {
        let to = to.to_string();
        // Until the policy is in force, its port answers.
        eventually_ok(TIMEOUT, "the refusal", || {
            let connect = format!("connect --to {} --send x --shutdown --read", at(port));
            facing.peer.app(&connect)?.finish(TIMEOUT)?;
            let log = facing.daemon.access_log();
            let mut refused = log.iter().filter(|line| line["result"] == "refused");
            ensure!(
                refused.any(|line| line["destination"] == to.as_str()),
                "none"
            );
            Ok(())
        })?;
        let fields = [("destination", to.as_str()), ("result", "refused")];
        facing.wait_for_access((PEER, APP), &fields)?;
        facing.wait_for_line(&[("destination", &to), ("answer", code)])?;
    }
    Ok(())
}
