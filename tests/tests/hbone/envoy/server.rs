//! Our pods reach a server whose HBONE is Envoy's.

use anyhow::{Result, ensure};
use mesh_tests::TIMEOUT;

use super::config::Answer;
use super::{APP, Facing, PEER};
use crate::endings::{half_close, server_resets};

#[test]
fn envoy_serves_our_pods() -> Result<()> {
    let started = Facing::start("envoy_serves_our_pods", |config, _, peer, log| {
        let apps = [7, 14, 15, 10, 9].map(|port| (peer.at(port), Answer::App(port)));
        let apps6 = [14].map(|port| (peer.at6(port), Answer::App(port)));
        let refusals = [400, 401, 503].map(|code| (peer.at(4000 + code), Answer::Status(code)));
        config.serve(&[&apps[..], &apps6[..], &refusals[..]].concat(), log);
    })?;
    let Some(facing) = started else { return Ok(()) };
    bytes(&facing)?;
    half_close(&facing.app, &facing.peer, 15, facing.peer.at(15))?;
    resets(&facing)?;
    refusals(&facing)
}

fn bytes(facing: &Facing) -> Result<()> {
    let recording = facing.mesh.wire().capture()?;
    let _server = facing.peer.app("bidi --port 14 --quiet")?.listening()?;
    let each = 16_u64 << 20;
    for to in [facing.peer.at(14), facing.peer.at6(14)] {
        let bidi = format!("bidi --to {to} --bytes {} --streams 4", each / 4);
        let done = facing.app.app(&bidi)?.success(4 * TIMEOUT)?;
        ensure!(
            (done["sent"].as_u64(), done["received"].as_u64()) == (Some(each), Some(each)),
            "{done}"
        );
        let to = to.to_string();
        facing.wait_for_access((APP, PEER), &[("destination", &to), ("result", "ok")])?;
        let line = facing.wait_for_line(&[("authority", &to), ("status", "200")])?;
        ensure!(line["client"] == APP, "{line}");
    }
    let connections = recording.stop()?.connections();
    let ports: Vec<u16> = connections.iter().map(|(_, to)| to.port()).collect();
    ensure!(ports == [15008, 15008], "{connections:?}");
    Ok(())
}

fn resets(facing: &Facing) -> Result<()> {
    server_resets(&facing.app, &facing.peer, 10, facing.peer.at(10))?;

    let mut echo = facing.peer.app("echo-server --port 7")?.listening()?;
    let to = facing.peer.at(7).to_string();
    let reset = format!("reset --to {to} --after 5");
    facing.app.app(&reset)?.success(TIMEOUT)?;
    // Envoy understands the reset (flag DR), but closes the app's connection in order.
    facing.wait_for_line(&[("authority", &to), ("details", "DR")])?;
    echo.event("closed", TIMEOUT)?;
    facing.wait_for_access((APP, PEER), &[("destination", &to), ("result", "reset")])?;
    Ok(())
}

fn refusals(facing: &Facing) -> Result<()> {
    // Port 9 is the app's own refusal: nothing listens there.
    for (port, code) in [(4400, "400"), (4401, "401"), (4503, "503"), (9, "503")] {
        let to = facing.peer.at(port).to_string();
        facing
            .app
            .app(&format!("connect --to {to} --read"))?
            .failure(TIMEOUT)?;
        let fields = [
            ("destination", to.as_str()),
            ("result", "refused"),
            ("reason", code),
        ];
        facing.wait_for_access((APP, PEER), &fields)?;
        facing.wait_for_line(&[("authority", &to), ("status", code), ("client", APP)])?;
    }
    Ok(())
}
