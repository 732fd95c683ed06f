//! Callers with a valid certificate that violate the protocol inside the tunnel.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use crate::common::hostile::{
    CONNECT, CONNECTED, DATA, END, Faults, Peer, RESET, connect_frame, connect_payload, frame,
    frame_of_length, lines_of, spiffe,
};
use crate::common::stage::{Stage, WITNESS};
use mesh_tests::{Context, Result};
use socket2::SockRef;

const MIB: u32 = 1 << 20;
/// Code of a RESET for a protocol violation.
const PROTOCOL: u8 = 5;

/// What the peer does wrong.
type Breach = Box<dyn Fn(&mut Peer) -> io::Result<()>>;

fn plain(bytes: &[u8]) -> Breach {
    let bytes = bytes.to_vec();
    Box::new(move |peer| peer.send(&bytes))
}

#[test]
fn refuses_first_frame_that_is_not_connect() -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let mut faults = Faults::default();
    let web = stage.web().at(WITNESS);
    let connect = connect_payload(1, web, web);
    let connecting = |change: fn(&mut Vec<u8>)| {
        let mut payload = connect.clone();
        change(&mut payload);
        plain(&frame(CONNECT, &payload))
    };
    let cases: Vec<(&str, Breach, &str)> = vec![
        (
            "a length of 2^32-1",
            plain(&frame_of_length(CONNECT, u32::MAX, b"")),
            "length 4294967295",
        ),
        (
            "DATA of 2^32-1",
            plain(&frame_of_length(DATA, u32::MAX, b"")),
            "length 4294967295",
        ),
        (
            "a CONNECT of 0 bytes",
            plain(&frame(CONNECT, b"")),
            "length 0",
        ),
        (
            "a CONNECT of 257 bytes",
            plain(&frame(CONNECT, &[1; 257])),
            "length 257",
        ),
        (
            "frame type 0",
            plain(&frame(0, b"")),
            "unknown frame type 0",
        ),
        (
            "frame type 6",
            plain(&frame(6, b"x")),
            "unknown frame type 6",
        ),
        (
            "frame type 255",
            plain(&[255; 300]),
            "unknown frame type 255",
        ),
        (
            "HTTP",
            plain(b"GET / HTTP/1.1\r\n\r\n"),
            "unknown frame type 71",
        ),
        (
            "DATA before CONNECT",
            plain(&frame(DATA, b"too early")),
            "DATA out of turn",
        ),
        ("END before CONNECT", plain(&frame(END, b"")), "out of turn"),
        (
            "CONNECTED by the client",
            plain(&frame(CONNECTED, b"")),
            "out of turn",
        ),
        (
            "CONNECTED with a payload",
            plain(&frame(CONNECTED, b"x")),
            "length 1",
        ),
        (
            "RESET before CONNECT",
            plain(&frame(RESET, &[1])),
            "out of turn",
        ),
        (
            "version 2",
            connecting(|payload| payload[0] = 2),
            "CONNECT of version 2",
        ),
        (
            "version 0",
            connecting(|payload| payload[0] = 0),
            "CONNECT of version 0",
        ),
        (
            "a byte too many",
            connecting(|payload| payload.push(0)),
            "malformed CONNECT",
        ),
        (
            "a byte too few",
            connecting(|payload| payload.truncate(payload.len() - 1)),
            "malformed CONNECT",
        ),
        (
            "another family",
            connecting(|payload| payload[1] = 5),
            "malformed CONNECT",
        ),
        (
            "a version alone",
            plain(&frame(CONNECT, &[1])),
            "malformed CONNECT",
        ),
        (
            "an IPv4-mapped address",
            plain(&frame(CONNECT, &{
                let mapped = |ip: std::net::Ipv4Addr| SocketAddr::from((ip.to_ipv6_mapped(), 1));
                let (web, outside) = (stage.web().ipv4(), stage.mesh.outside_ipv4());
                connect_payload(1, mapped(web), mapped(outside))
            })),
            "malformed CONNECT",
        ),
        (
            "close_notify",
            Box::new(Peer::close_notify),
            "without a CONNECT",
        ),
        (
            "the end of TCP",
            Box::new(|peer| peer.finish_tcp()),
            "without a CONNECT",
        ),
        (
            "an alert in the clear",
            Box::new(|peer| peer.send_raw(&[21, 3, 3, 0, 2, 2, 40])),
            "record header",
        ),
        (
            "a record of 2^16-1",
            Box::new(|peer| peer.send_raw(&[23, 3, 3, 255, 255])),
            "record of 65535",
        ),
        (
            "a record without room for a tag",
            Box::new(|peer| peer.send_raw(&[23, 3, 3, 0, 0])),
            "record of 0",
        ),
        (
            "a record made up",
            Box::new(|peer| peer.send_raw(&[&[23, 3, 3, 0, 40][..], &[7; 40]].concat())),
            "cannot be decrypted",
        ),
        (
            "a forged CONNECT",
            Box::new(|peer| forge(peer, &frame(END, b""))),
            "cannot be decrypted",
        ),
        (
            "a record sent twice",
            Box::new(|peer| {
                let record = peer.seal(&[CONNECT, 0, 0])?;
                peer.send_raw(&record)?;
                peer.send_raw(&record)
            }),
            "cannot be decrypted",
        ),
        (
            "half a record, then the end",
            Box::new(|peer| {
                let record = peer.seal(&frame(CONNECT, &[1; 200]))?;
                peer.send_raw(&record[..record.len() / 2])?;
                peer.finish_tcp()
            }),
            "closed the tunnel",
        ),
        (
            "half a CONNECT, then close_notify",
            Box::new(|peer| {
                peer.send(&frame_of_length(CONNECT, 15, &[1, 4]))?;
                peer.close_notify()
            }),
            "closed the tunnel",
        ),
    ];
    for (what, breach, reason) in &cases {
        let mut peer = stage.outsider(WITNESS)?;
        let client = peer.local();
        breach(&mut peer).with_context(|| (*what).to_owned())?;
        let ended = peer.end();
        for (kind, payload) in &ended.frames {
            faults.check(*kind == RESET && payload.first() == Some(&PROTOCOL), || {
                format!("{what}: the daemon answers with {ended:?}")
            });
        }
        faults.expect_line(what, &stage.daemon, client, ("refused", reason));
        let line = &lines_of(&stage.daemon, client)?[0];
        faults.check(line["client_identity"] == spiffe("outsider"), || {
            format!("{what}: whose? {line}")
        });
    }
    // Claims the address of another pod, of the server itself, or of its loopback.
    for claimed in [
        stage.mesh.pod("client").at(40_000),
        web,
        ([127, 0, 0, 1], 1).into(),
    ] {
        let mut peer = stage.outsider(WITNESS)?;
        let client = peer.local();
        peer.send(&connect_frame(web, claimed))?;
        let ended = peer.end();
        assert_eq!(ended.frames.len(), 1, "{ended:?}");
        let reason = format!("192.0.2.10 says that it is {}", claimed.ip());
        faults.expect_line(
            "another's address",
            &stage.daemon,
            client,
            ("refused", &reason),
        );
    }
    faults.finish();
    stage.assert_unharmed(&before, 16 * 1024);
    Ok(())
}

/// Sends a record with one bit of its tag changed.
fn forge(peer: &mut Peer, bytes: &[u8]) -> io::Result<()> {
    let mut record = peer.seal(bytes)?;
    if let Some(last) = record.last_mut() {
        *last ^= 1;
    }
    peer.send_raw(&record)
}

#[test]
fn protocol_violation_resets_the_app() -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let mut faults = Faults::default();
    let web = stage.web().at(WITNESS);
    let after_end = |garbage: &[u8]| plain(&[frame(END, b""), garbage.to_vec()].concat());
    let reason = |code: u8, length: usize| {
        let text = "\x1b[31m\r\n{\"result\":\"ok\"}\u{7f}\u{9b}"
            .chars()
            .cycle();
        let mut payload = vec![code];
        payload.extend(
            text.map(|c| if c.is_ascii() { c as u8 } else { b'\t' })
                .take(length),
        );
        plain(&frame(RESET, &payload))
    };
    let cases: Vec<(&str, Breach, &str)> = vec![
        (
            "CONNECT after CONNECT",
            plain(&connect_frame(web, web)),
            "CONNECT out of turn",
        ),
        (
            "CONNECTED",
            plain(&frame(CONNECTED, b"")),
            "CONNECTED out of turn",
        ),
        (
            "DATA of 0 bytes",
            plain(&frame(DATA, b"")),
            "type 3 with length 0",
        ),
        (
            "DATA of 1 MiB and a byte",
            plain(&frame_of_length(DATA, MIB + 1, b"x")),
            "length 1048577",
        ),
        (
            "DATA of 2^32-1",
            plain(&frame_of_length(DATA, u32::MAX, b"x")),
            "length 4294967295",
        ),
        (
            "END with a payload",
            plain(&frame(END, b"x")),
            "type 4 with length 1",
        ),
        (
            "frame type 6",
            plain(&frame(6, b"")),
            "unknown frame type 6",
        ),
        (
            "DATA after END",
            after_end(&frame(DATA, b"x")),
            "a frame after END",
        ),
        (
            "END after END",
            after_end(&frame(END, b"")),
            "a frame after END",
        ),
        (
            "CONNECT after END",
            after_end(&connect_frame(web, web)),
            "a frame after END",
        ),
        (
            "garbage after END",
            after_end(b"garbage"),
            "unknown frame type 103",
        ),
        ("RESET of 256 bytes", reason(1, 255), "malformed RESET"),
        ("RESET of 257 bytes", reason(1, 256), "length 257"),
        ("RESET with code 99", reason(99, 3), "malformed RESET"),
        (
            "RESET without UTF-8",
            plain(&frame(RESET, &[1, 0xff, 0xfe])),
            "malformed RESET",
        ),
        (
            "RESET with control characters",
            reason(1, 190),
            "the client's side",
        ),
        (
            "a forged record",
            Box::new(|peer| forge(peer, &frame(DATA, b"forged"))),
            "cannot be decrypted",
        ),
        (
            "half a record, then the end",
            Box::new(|peer| {
                let record = peer.seal(&frame(DATA, &[1; 1000]))?;
                peer.send_raw(&record[..record.len() / 2])?;
                peer.finish_tcp()
            }),
            "closed the tunnel in the middle",
        ),
        (
            "half a frame, then close_notify",
            Box::new(|peer| {
                peer.send(&frame_of_length(DATA, 1000, b"half"))?;
                peer.close_notify()
            }),
            "closed the tunnel in the middle",
        ),
        (
            "close_notify",
            Box::new(Peer::close_notify),
            "closed the tunnel in the middle",
        ),
        (
            "the end of TCP",
            Box::new(|peer| peer.finish_tcp()),
            "closed the tunnel in the middle",
        ),
        (
            "a reset of TCP",
            Box::new(|peer| {
                SockRef::from(&peer.tcp).set_linger(Some(Duration::ZERO))?;
                // Closes the socket by replacing its descriptor.
                let nowhere = std::os::unix::net::UnixStream::pair()?.0;
                peer.tcp = std::net::TcpStream::from(std::os::fd::OwnedFd::from(nowhere));
                Ok(())
            }),
            "Connection reset by peer",
        ),
    ];
    for (what, breach, reason) in &cases {
        let mut peer = stage.outsider(WITNESS)?;
        let client = peer.open().with_context(|| (*what).to_owned())?;
        peer.send(&frame(DATA, b"a good start"))?;
        breach(&mut peer).with_context(|| (*what).to_owned())?;
        let ended = peer.end();
        faults.check(ended.frames.iter().all(|(kind, _)| *kind == RESET), || {
            format!("{what}: the daemon answers with {ended:?}")
        });
        faults.expect_line(what, &stage.daemon, client, ("reset", reason));
        // The app sees an END that came before the violation; everything else is an error.
        let app = stage.witnessed(client)?;
        let finished = what.ends_with("after END") && app == "finished after 12 bytes";
        faults.check(finished || app == "error: ConnectionReset", || {
            format!("{what}: to the app it looks like: {app}")
        });
    }
    let log = stage.daemon.log_text();
    faults.check(!log.contains(['\x1b', '\u{7f}', '\u{9b}', '\r']), || {
        "control characters of a RESET are in the log".into()
    });
    faults.finish();
    stage.assert_unharmed(&before, 16 * 1024);
    Ok(())
}
