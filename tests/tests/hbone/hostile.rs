//! Peers with a valid certificate that abuse HTTP/2. Each is bounded: the daemon's memory and descriptors stay as they were,
//! real traffic continues, and abuse that the daemon does not tolerate ends the connection.

use anyhow::{Result, ensure};
use mesh_tests::{Snapshot, TIMEOUT, eventually_ok};

use crate::common::stage::{ECHO, Stage};
use crate::http2::{
    CANCEL, CONTINUATION, Client, END_HEADERS, ENHANCE_YOUR_CALM, GOAWAY, HEADERS, PING,
    RST_STREAM, SETTINGS, connect, frame, header,
};

/// Growth of the daemon's memory that an attack may cause, in KiB: buffers that the allocator keeps.
const MEMORY_KIB: u64 = 16 * 1024;
/// `SETTINGS_INITIAL_WINDOW_SIZE`.
const INITIAL_WINDOW: u16 = 4;

/// Runs an attack on a mesh with real traffic, and asserts that it leaves nothing behind.
fn attack(run: impl FnOnce(&Stage, &str, &Snapshot) -> Result<()>) -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let echo = stage.web().at(ECHO).to_string();
    run(&stage, &echo, &before)?;
    stage.assert_unharmed(&before, MEMORY_KIB);
    Ok(())
}

/// During the attack, asserts that the daemon's memory has not grown by more than is allowed.
fn bounded(stage: &Stage, before: &Snapshot) -> Result<()> {
    let now = stage.snapshot()?.resident_kib;
    ensure!(
        now < before.resident_kib + MEMORY_KIB,
        "{now} KiB, before {}",
        before.resident_kib
    );
    stage.traffic();
    Ok(())
}

/// Sends until the connection is closed, at most `times`. Returns the code of the server's GOAWAY.
fn flood(
    client: &mut Client,
    times: u32,
    mut bytes: impl FnMut(u32) -> Vec<u8>,
) -> Result<Option<u32>> {
    for round in 0..times {
        if client.send_raw(&bytes(round)).is_err() {
            break;
        }
    }
    Ok(client.end())
}

#[test]
fn rapid_reset_ends_the_connection() -> Result<()> {
    attack(|stage, echo, before| {
        let mut client = Client::connect(stage, &[])?;
        let code = flood(&mut client, 20_000, |round| {
            let stream = 2 * round + 1;
            let mut bytes = frame(HEADERS, END_HEADERS, stream, &connect(echo));
            bytes.extend(frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes()));
            bytes
        })?;
        // The code is lost if the attacker's bytes were still on their way.
        ensure!(matches!(code, None | Some(ENHANCE_YOUR_CALM)), "{code:?}");
        bounded(stage, before)
    })
}

#[test]
fn a_flood_of_continuations_ends_the_connection() -> Result<()> {
    attack(|stage, echo, before| {
        let mut client = Client::connect(stage, &[])?;
        client.send(HEADERS, 0, 1, &connect(echo))?;
        let code = flood(&mut client, 20_000, |_| {
            frame(CONTINUATION, 0, 1, &header("x-flood", "f"))
        })?;
        ensure!(code != Some(0), "{code:?}");
        bounded(stage, before)
    })
}

#[test]
fn huge_headers_are_not_kept() -> Result<()> {
    attack(|stage, echo, before| {
        let mut client = Client::connect(stage, &[])?;
        let huge = "h".repeat(15_000);
        let code = flood(&mut client, 500, |round| {
            let stream = 2 * round + 1;
            let mut bytes = frame(HEADERS, 0, stream, &connect(echo));
            for _ in 0..8 {
                bytes.extend(frame(CONTINUATION, 0, stream, &header("x-huge", &huge)));
            }
            bytes.extend(frame(CONTINUATION, END_HEADERS, stream, &[]));
            bytes
        })?;
        ensure!(code != Some(0), "{code:?}");
        bounded(stage, before)
    })
}

#[test]
fn a_window_of_zero_holds_only_its_own_streams() -> Result<()> {
    attack(|stage, _, before| {
        let web = stage.web();
        let _source = web
            .app("source --port 13 --bytes 200000000 --quiet")?
            .listening()?;
        let mut client = Client::connect(stage, &[(INITIAL_WINDOW, 0)])?;
        for index in 0..100 {
            ensure!(client.ask(2 * index + 1, &web.at(13).to_string())? == 200);
        }
        bounded(stage, before)
    })
}

#[test]
fn more_streams_than_allowed_are_refused() -> Result<()> {
    attack(|stage, echo, before| {
        let mut client = Client::connect(stage, &[])?;
        client.is_polite = false;
        for index in 0..300 {
            client.request(2 * index + 1, echo)?;
        }
        let (mut answered, mut reset) = (0, 0);
        while answered + reset < 300 {
            match client.frame()? {
                frame if frame.kind == HEADERS => answered += 1,
                frame if frame.kind == RST_STREAM => reset += 1,
                frame => ensure!(frame.kind != GOAWAY, "{frame:?}"),
            }
        }
        ensure!((answered, reset) == (200, 100), "{answered}, {reset}");
        bounded(stage, before)
    })
}

#[test]
fn floods_of_settings_and_pings_wait_for_their_answers_to_be_read() -> Result<()> {
    for (kind, payload) in [(SETTINGS, &[][..]), (PING, &[0; 8][..])] {
        attack(|stage, _, before| {
            let mut client = Client::connect(stage, &[])?;
            client.is_polite = false;
            client.set_write_timeout(TIMEOUT)?;
            let some: Vec<u8> = frame(kind, 0, 0, payload).repeat(1000);
            let mut sent = 0;
            // Nothing is read, so the daemon stops reading, too, or closes the connection.
            let stopped = loop {
                match client.send_raw(&some) {
                    Ok(()) if sent < 100_000 => sent += 1,
                    Ok(()) => break None,
                    Err(error) => break Some(error.kind()),
                }
            };
            println!("{sent} thousand frames, then {stopped:?}");
            ensure!(stopped.is_some(), "all of {sent} thousand were taken");
            bounded(stage, before)
        })?;
    }
    Ok(())
}

#[test]
fn a_client_that_asks_for_nothing_or_answers_no_ping_is_closed() -> Result<()> {
    attack(|stage, echo, _| {
        let mut silent = Client::connect(stage, &[])?;
        ensure!(silent.end() == Some(0), "within the handshake's time");
        let mut deaf = Client::connect(stage, &[])?;
        ensure!(deaf.ask(1, echo)? == 200);
        let address = deaf.local();
        deaf.is_polite = false;
        eventually_ok(4 * TIMEOUT, "the connection to end", || {
            let open = stage.daemon.status()?.connections;
            ensure!(open.is_empty(), "{address}: {open:?}");
            Ok(())
        })
    })
}

#[test]
fn bytes_that_are_no_http2_end_the_connection() -> Result<()> {
    attack(|stage, echo, before| {
        let large = frame(0xff, 0xff, 0x7fff_ffff, &[0; 64]);
        for bytes in [
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            vec![0xff; 4096],
            frame(HEADERS, END_HEADERS, 0, &connect(echo)),
            frame(HEADERS, END_HEADERS, 2, &connect(echo)),
            frame(HEADERS, END_HEADERS, 1, &[0xff; 64]),
            frame(CONTINUATION, END_HEADERS, 1, &[]),
            frame(PING, 0, 0, &[1]),
            frame(8, 0, 0, &0_u32.to_be_bytes()),
            [large, frame(SETTINGS, 0, 0, &[1])].concat(),
        ] {
            let mut client = Client::connect(stage, &[])?;
            client.send_raw(&bytes)?;
            let code = client.end();
            ensure!(code != Some(0), "{bytes:x?}: {code:?}");
        }
        bounded(stage, before)
    })
}
