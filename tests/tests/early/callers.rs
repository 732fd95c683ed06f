//! Callers that send all frames at once to a real daemon: bytes after a CONNECT go to the app that accepted, complete,
//! or are dropped.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use crate::common::early::{Ledger, Taken, echo, piece};
use crate::common::hostile::{
    self, CONNECT, CONNECTED, DATA, END, Ended, Faults, Peer, RESET, connect_frame, frame, lines_of,
};
use crate::common::stage::Stage;
use mesh_tests::{Context, Result, eventually};
use socket2::{Domain, Socket, Type};

const APP: u16 = 7100;
const NOBODY: u16 = 7101;
const FULL: u16 = 7102;

#[test]
fn early_bytes_after_a_failed_connect_are_dropped() -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let mut faults = Faults::default();
    let full = full_listener(&stage)?;
    for (port, code) in [(NOBODY, 2), (FULL, 3)] {
        for size in [1, 8192, 1 << 20] {
            let mut peer = stage.outsider(port)?;
            let client = other_port(&peer);
            let connect = connect_frame(stage.web().at(port), client);
            let data = frame(DATA, &piece("early", 0, size));
            // The daemon reads no more than the sockets hold before it answers, and the answer is a refusal.
            let _ = peer.send(&[connect, data].concat());
            let first = peer.frame();
            let refused = matches!(&first, Ok(Some((RESET, payload))) if payload[0] == code);
            faults.check(refused, || format!("{port}, {size} bytes: {first:?}"));
            let what = format!("{size} bytes to port {port}");
            faults.expect_line(&what, &stage.daemon, client, ("refused", ""));
        }
    }
    // The connection in the queue is the test's own, and there are no others.
    full.set_nonblocking(true)?;
    while let Ok((mut stream, peer)) = full.accept() {
        stream.set_nonblocking(true)?;
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        faults.check(bytes.is_empty() && peer.ip().is_loopback(), || {
            format!("{peer} came, with {} bytes", bytes.len())
        });
    }
    stage.assert_unharmed(&before, 16 * 1024);
    faults.finish();
    Ok(())
}

#[test]
fn frames_in_one_flight_are_served_in_order_or_refused() -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let mut faults = Faults::default();
    let ledger = Ledger::default();
    let web = stage.web();
    let _app = echo(&web, web.at(APP), "app", &ledger)?;
    let data = |size| frame(DATA, &piece("early", 0, size));
    let end = || frame(END, b"");
    // The frames after CONNECT, how many bytes the app must get, and whether the connection must end in order.
    let cases: Vec<(&str, Vec<u8>, usize, bool)> = vec![
        ("END", end(), 0, true),
        ("DATA and END", [data(100), end()].concat(), 100, true),
        (
            "64 KiB and END",
            [data(1 << 16), end()].concat(),
            1 << 16,
            true,
        ),
        (
            "1 byte, 8192 bytes in two, END",
            {
                let all = piece("early", 0, 8193);
                let (one, more) = all.split_at(1);
                [frame(DATA, one), frame(DATA, more), end()].concat()
            },
            8193,
            true,
        ),
        (
            "a second CONNECT",
            connect_frame(web.at(APP), web.at(1)),
            0,
            false,
        ),
        (
            "DATA and a second CONNECT",
            { [data(100), connect_frame(web.at(APP), web.at(1))].concat() },
            100,
            false,
        ),
        ("RESET", frame(RESET, &[1]), 0, false),
        (
            "DATA and RESET",
            [data(100), frame(RESET, &[1])].concat(),
            100,
            false,
        ),
        (
            "DATA, END and RESET",
            [data(100), end(), frame(RESET, &[1])].concat(),
            100,
            false,
        ),
        (
            "DATA, END and DATA",
            [data(100), end(), data(100)].concat(),
            100,
            false,
        ),
        ("END twice", [end(), end()].concat(), 0, false),
        ("CONNECTED", frame(CONNECTED, b""), 0, false),
        ("DATA of nothing", frame(DATA, b""), 0, false),
        (
            "DATA too long",
            hostile::frame_of_length(DATA, (1 << 20) + 1, b"x"),
            0,
            false,
        ),
        (
            "half a DATA",
            hostile::frame_of_length(DATA, 100, &piece("early", 0, 50)),
            50,
            false,
        ),
    ];
    for (what, behind, size, well) in cases {
        for byte_by_byte in [false, true] {
            if byte_by_byte && behind.len() > 1000 {
                continue;
            }
            let mut peer = stage.outsider(APP)?;
            let client = other_port(&peer);
            let all = [connect_frame(web.at(APP), client), behind.clone()].concat();
            let step = if byte_by_byte { 1 } else { all.len() };
            for piece in all.chunks(step) {
                // The daemon may have closed the connection.
                if peer.send(piece).is_err() {
                    break;
                }
            }
            if !well {
                // Likewise.
                let _ = peer.finish_tcp();
            }
            let what = format!("{what}{}", if byte_by_byte { ", byte by byte" } else { "" });
            check(&ledger, peer, client, size, well, &what, &mut faults)?;
            if byte_by_byte && behind.windows(end().len()).any(|part| part == end()) {
                // The connection may have ended before the bytes after its END arrived.
                let lines = lines_of(&stage.daemon, client)?;
                let results: Vec<_> = lines.iter().map(|line| line["result"].as_str()).collect();
                let right = match results.as_slice() {
                    [Some("ok")] => true,
                    [Some("reset")] => !well,
                    _ => false,
                };
                faults.check(right, || format!("{what}: {lines:?}"));
            } else {
                let result = if well { "ok" } else { "reset" };
                faults.expect_line(&what, &stage.daemon, client, (result, ""));
            }
        }
    }
    // Before the first CONNECT.
    for (what, bytes) in [
        ("DATA", data(100)),
        ("END", end()),
        ("RESET", frame(RESET, &[1])),
    ] {
        let mut peer = stage.outsider(APP)?;
        let client = other_port(&peer);
        let connect = connect_frame(web.at(APP), client);
        peer.send(&[bytes, connect].concat())?;
        let ended = peer.end();
        faults.check(is_breach(&ended), || {
            format!("{what} before CONNECT: {ended:?}")
        });
        faults.check(
            !ledger.all().iter().any(|taken| taken.from == client),
            || format!("{what} before CONNECT: the app was connected to"),
        );
    }
    stage.assert_unharmed(&before, 16 * 1024);
    faults.finish();
    Ok(())
}

/// Sequential connections on one tunnel, each sent in one flight after the previous one has ended.
#[test]
fn each_connection_on_a_reused_tunnel_is_served_in_one_flight() -> Result<()> {
    let stage = Stage::set()?;
    let ledger = Ledger::default();
    let web = stage.web();
    let _app = echo(&web, web.at(APP), "app", &ledger)?;
    let mut peer = stage.outsider(APP)?;
    let client = other_port(&peer);
    for number in 0..200 {
        let (name, size) = (format!("n{number}"), 10 + number * 83);
        let client = SocketAddr::new(client.ip(), 40_000 + number as u16);
        let connect = connect_frame(web.at(APP), client);
        let data = frame(DATA, &piece(&name, 0, size));
        peer.send(&[connect, data, frame(END, b"")].concat())?;
        let connected = peer.frame()?;
        anyhow::ensure!(matches!(connected, Some((CONNECTED, _))), "{connected:?}");
        let echoed = peer.read_data(size)?;
        assert!(
            echoed == piece(&name, 0, size),
            "{name} came back otherwise"
        );
        let end = peer.frame()?;
        anyhow::ensure!(matches!(end, Some((END, _))), "{end:?}");
        let taken = ledger.ended("app", client)?;
        assert_eq!((taken.name(), taken.bytes.len()), (name, size));
    }
    Ok(())
}

/// The frames that came back, and the bytes that the app received.
fn check(
    ledger: &Ledger,
    peer: Peer,
    client: SocketAddr,
    size: usize,
    well: bool,
    what: &str,
    faults: &mut Faults,
) -> Result<()> {
    if well {
        let mut peer = peer;
        let connected = peer.frame()?;
        faults.check(matches!(connected, Some((CONNECTED, _))), || {
            format!("{what}: {connected:?}")
        });
        let echoed = peer.read_data(size)?;
        faults.check(echoed == piece("early", 0, size), || {
            format!("{what}: another echo")
        });
        let end = peer.frame()?;
        faults.check(matches!(end, Some((END, _))), || format!("{what}: {end:?}"));
    } else {
        let ended = peer.end();
        println!(
            "{what}: {:?}",
            ended.frames.iter().map(|frame| frame.0).collect::<Vec<_>>()
        );
        let reconnected = ended
            .frames
            .iter()
            .filter(|frame| frame.0 == CONNECT)
            .count();
        faults.check(reconnected == 0, || format!("{what}: {ended:?}"));
    }
    let find = || {
        let all = ledger.all().into_iter();
        let mut own: Vec<Taken> = all.filter(|taken| taken.from == client).collect();
        let ended = own.iter().all(|taken| taken.end.is_some());
        ended.then(|| own.pop())
    };
    let taken = eventually(Duration::from_secs(10), "the app's end", find)
        .with_context(|| what.to_owned())?;
    let got = taken.as_ref().map_or(0, |taken| taken.bytes.len());
    let true_bytes = taken
        .as_ref()
        .is_none_or(|taken| taken.bytes == piece("early", 0, got));
    let ended = taken.and_then(|taken| taken.end);
    let right = if well {
        got == size && ended.as_deref() == Some("end")
    } else {
        // An END counts, whatever follows it.
        got <= size && (ended.as_deref() != Some("end") || what.contains("END"))
    };
    faults.check(right && true_bytes, || {
        format!("{what}: the app got {got} of {size} bytes, then {ended:?}")
    });
    Ok(())
}

fn is_breach(ended: &Ended) -> bool {
    matches!(ended.frames.as_slice(), [(RESET, payload)] if payload[0] == 5)
}

/// Returns another client port than the tunnel's own, which is in use.
fn other_port(peer: &Peer) -> SocketAddr {
    let local = peer.local();
    SocketAddr::new(local.ip(), local.port() + 20_000)
}

/// Opens a listener with a full queue, which does not answer SYNs.
fn full_listener(stage: &Stage) -> Result<TcpListener> {
    let on = SocketAddr::from((Ipv4Addr::UNSPECIFIED, FULL));
    let listener = stage.web().enter(|| -> std::io::Result<_> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&on.into())?;
        socket.listen(0)?;
        Ok(TcpListener::from(socket))
    })??;
    // Its only place is taken, because nothing accepts.
    let _filler = stage.web().connect((Ipv4Addr::LOCALHOST, FULL).into())?;
    Ok(listener)
}
