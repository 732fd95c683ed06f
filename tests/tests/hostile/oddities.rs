//! Unusual but valid clients inside the tunnel, expiry, and errors of the app.

use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::common::hostile::{
    ALPN, DATA, END, Faults, Peer, RESET, client_config, connect_frame, dial, frame, lines_of,
    spiffe,
};
use crate::common::stage::{ECHO, HTTP, Stage};
use mesh_tests::{Result, TIMEOUT, eventually_ok, slowdown};
use rcgen::date_time_ymd;

/// The code of a RESET.
const FORBIDDEN: u8 = 4;
/// The largest payload of a DATA frame.
const MIB: usize = 1 << 20;

#[test]
fn serves_unusual_but_valid_clients() -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let text: Vec<u8> = (0..4000_u32).map(|number| (number % 251) as u8).collect();
    let one_by_one: Vec<u8> = text.iter().flat_map(|byte| frame(DATA, &[*byte])).collect();

    // Frames of one byte, all in a few records.
    let mut peer = stage.outsider(ECHO)?;
    let client = peer.open()?;
    peer.send(&one_by_one)?;
    assert_eq!(peer.read_data(text.len())?, text);
    // Frames of one byte, each in its own record, with key updates in both directions.
    for (number, byte) in text.iter().enumerate() {
        peer.send(&frame(DATA, &[*byte]))?;
        if number % 100 == 0 {
            peer.update_keys()?;
        }
    }
    assert_eq!(peer.read_data(text.len())?, text);
    // Records of one byte.
    for byte in frame(DATA, &text[..500]) {
        peer.send(&[byte])?;
    }
    assert_eq!(peer.read_data(500)?, text[..500]);
    // The largest frame; the echo starts before it is fully sent.
    let largest = vec![7; MIB];
    let sent = frame(DATA, &largest);
    for piece in sent.chunks(64 * 1024) {
        peer.send(piece)?;
        peer.update_keys()?;
        let header = if piece.as_ptr() == sent.as_ptr() {
            5
        } else {
            0
        };
        let echoed = peer.read_data(piece.len() - header)?;
        assert!(echoed.iter().all(|byte| *byte == 7));
    }
    peer.send(&frame(END, b""))?;
    assert_eq!(peer.frame()?, Some((END, vec![])));
    let mut faults = Faults::default();
    faults.expect_line("odd but lawful", &stage.daemon, client, ("ok", ""));

    // The same tunnel carries another connection, and its orderly close writes no line.
    peer.open()?;
    peer.send(&[frame(DATA, b"again"), frame(END, b"")].concat())?;
    assert_eq!(peer.read_data(5)?, b"again");
    assert_eq!(peer.frame()?, Some((END, vec![])));
    peer.close_notify()?;
    peer.end();
    stage.traffic();
    let lines = eventually_ok(TIMEOUT, "two lines", || {
        let lines = lines_of(&stage.daemon, client)?;
        anyhow::ensure!(lines.len() == 2, "{lines:#?}");
        Ok(lines)
    })?;
    assert!(
        lines.iter().all(|line| line["result"] == "ok"),
        "{lines:#?}"
    );
    let bytes = 2 * text.len() + 500 + MIB;
    assert_eq!(lines[0]["bytes_to_server"], bytes, "{}", lines[0]);
    assert_eq!(lines[0]["bytes_to_client"], bytes, "{}", lines[0]);
    faults.finish();
    stage.assert_unharmed(&before, 16 * 1024);
    Ok(())
}

#[test]
fn survives_a_flood_of_key_updates() -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let mut peer = stage.outsider(ECHO)?;
    peer.open()?;
    for _ in 0..5000 {
        // Whether the daemon refuses it in the end does not matter.
        if peer.update_keys().is_err() {
            break;
        }
    }
    stage.traffic();
    drop(peer);
    stage.assert_unharmed(&before, 16 * 1024);
    Ok(())
}

#[test]
fn tunnel_ends_when_its_certificate_expires() -> Result<()> {
    let life = Duration::from_secs(4) * slowdown();
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let expiry = now + life;
    let certificate = stage
        .authority
        .mint_with(&[&spiffe("outsider")], |params| {
            params.not_after = date_time_ymd(1970, 1, 1) + expiry;
        })?;
    let mut peer = stage.outsider_as(ECHO, Some(&certificate))?;
    let exchange = |peer: &mut Peer| -> Result<()> {
        peer.open()?;
        peer.send(&[frame(DATA, b"x"), frame(END, b"")].concat())?;
        assert_eq!(peer.read_data(1)?, b"x");
        assert_eq!(peer.frame()?, Some((END, vec![])));
        Ok(())
    };
    exchange(&mut peer)?;
    // Waits for real time: certificates expire on the second.
    thread::sleep(life + Duration::from_secs(1));
    let tunnel = peer.local();
    peer.send(&connect_frame(stage.web().at(ECHO), tunnel))?;
    let ended = peer.end();
    assert!(
        matches!(&ended.frames[..], [(RESET, payload)] if payload[0] == FORBIDDEN),
        "{ended:?}"
    );
    let mut faults = Faults::default();
    faults.expect_line("expired", &stage.daemon, tunnel, ("refused", "has expired"));
    faults.finish();
    stage.assert_unharmed(&before, 16 * 1024);
    Ok(())
}

#[test]
fn caller_learns_that_the_app_does_not_listen() -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let mut peer = stage.outsider(HTTP + 1)?;
    let client = peer.local();
    peer.send(&connect_frame(stage.web().at(HTTP + 1), client))?;
    let ended = peer.end();
    assert!(
        matches!(&ended.frames[..], [(RESET, payload)] if payload[0] == 2),
        "{ended:?}"
    );
    let mut faults = Faults::default();
    faults.expect_line(
        "nobody listens",
        &stage.daemon,
        client,
        ("refused", "refused"),
    );
    faults.finish();
    stage.assert_unharmed(&before, 16 * 1024);
    Ok(())
}

#[test]
fn daemon_port_is_refused_as_destination() -> Result<()> {
    const TUNNEL_PORT: u16 = 15008;
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let mut faults = Faults::default();
    let web = stage.web();
    // From outside, and from the pod's own namespace, without redirection.
    for (place, account) in [(stage.mesh.outside(), "outsider"), (web.place(), "web")] {
        let certificate = stage.authority.mint(account)?;
        let config = client_config(Some(&certificate), &[ALPN])?;
        let mut peer = Peer::client(dial(place, web.at(TUNNEL_PORT))?, config)?;
        let tunnel = peer.local();
        peer.send(&connect_frame(web.at(TUNNEL_PORT), tunnel))?;
        let ended = peer.end();
        faults.check(matches!(&ended.frames[..], [(RESET, _)]), || {
            format!("{ended:?}")
        });
        faults.expect_line(
            account,
            &stage.daemon,
            tunnel,
            ("refused", "not to the daemon's"),
        );
    }
    faults.finish();
    stage.assert_unharmed(&before, 16 * 1024);
    Ok(())
}
