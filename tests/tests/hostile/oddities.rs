//! What is odd inside the tunnel but lawful, and what time and the app have to say.

use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::common::hostile::{
    ALPN, DATA, END, Faults, Peer, RESET, client_config, connect_frame, dial, frame, lines_of,
    spiffe,
};
use crate::common::stage::{ECHO, HTTP, Stage};
use mesh_tests::Result;
use rcgen::date_time_ymd;

/// The code of a RESET.
const FORBIDDEN: u8 = 4;
/// The largest payload of a DATA frame.
const MIB: usize = 1 << 20;

#[test]
fn odd_but_lawful_is_served() -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let text: Vec<u8> = (0..4000_u32).map(|number| (number % 251) as u8).collect();
    let one_by_one: Vec<u8> = text.iter().flat_map(|byte| frame(DATA, &[*byte])).collect();

    // One byte a frame, all frames in a few records.
    let mut peer = stage.outsider(ECHO)?;
    let client = peer.open()?;
    peer.send(&one_by_one)?;
    assert_eq!(peer.read_data(text.len())?, text);
    // One byte a frame, a record for each; keys change all the time, as the peer wants the daemon's to.
    for (number, byte) in text.iter().enumerate() {
        peer.send(&frame(DATA, &[*byte]))?;
        if number % 100 == 0 {
            peer.update_keys()?;
        }
    }
    assert_eq!(peer.read_data(text.len())?, text);
    // One byte of a frame a record.
    for byte in frame(DATA, &text[..500]) {
        peer.send(&[byte])?;
    }
    assert_eq!(peer.read_data(500)?, text[..500]);
    // The largest frame there is; the echo comes while it is still sent.
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

    // The same tunnel carries another connection, and is closed in good order without a line of its own.
    peer.open()?;
    peer.send(&[frame(DATA, b"again"), frame(END, b"")].concat())?;
    assert_eq!(peer.read_data(5)?, b"again");
    assert_eq!(peer.frame()?, Some((END, vec![])));
    peer.close_notify()?;
    peer.end();
    stage.traffic();
    let lines = lines_of(&stage.daemon, client)?;
    assert_eq!(lines.len(), 2, "{lines:#?}");
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
fn a_flood_of_key_updates_harms_nobody() -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let mut peer = stage.outsider(ECHO)?;
    peer.open()?;
    for _ in 0..5000 {
        // Refused in the end or not: both are fine.
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
fn a_tunnel_does_not_outlive_its_certificate() -> Result<()> {
    const LIFE: Duration = Duration::from_secs(4);
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let expiry = now + LIFE;
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
    // Time itself is waited for: certificates end on the second.
    thread::sleep(LIFE + Duration::from_secs(1));
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
fn an_app_that_is_not_there_is_told_to_the_caller() -> Result<()> {
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
fn the_daemons_own_port_is_no_app() -> Result<()> {
    const TUNNEL_PORT: u16 = 15008;
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let mut faults = Faults::default();
    let web = stage.web();
    // From outside, and from the pod's own namespace, past all that steers.
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
